//! Dot-product kernels for the formats of GGUF files, and the f32 arithmetic around them.
//!
//! The contract: [`Kernel::matmul`] gives the same bits on every ISA, for any number of rows and tokens
//! at a time. `scalar.rs` states the order of operations; all other kernels are tested against it bit
//! for bit. The ISA is chosen at run time, once, when weights are loaded ([`select`], [`find`]).
//!
//! | file | what is there |
//! |---|---|
//! | `format.rs` | [`Format`]: sizes, names, ids; the decoder of every block format |
//! | `interleave.rs` | the order of bytes in which eight rows lie side by side |
//! | `acts.rs` | [`Acts`]: activations, rounded to int8 |
//! | `aligned.rs` | bytes that begin with a cache line |
//! | `tile.rs` | [`Tile`]: the part of the output one call writes |
//! | `vec.rs` | [`Ops`]: f32 loops, one safe source compiled per ISA |
//! | `half.rs` | IEEE halves and bfloat16 as bits |
//! | `scalar.rs` | the reference kernels |
//! | `wide.rs` | the loops of all other kernels, written once over an ISA's vectors |
//! | `unpack.rs` | how vectors see a block of each format |
//! | `channel.rs` | the loops for formats with one scale a row |
//! | `avx2.rs`, ... | the vectors of each ISA |
//! | `selftest.rs` | the same products for every kernel, and what must come out |
//! | `measure.rs` | how fast memory is read and bytes are multiplied, at best |
//!
//! It knows nothing of files, models or threads. To add a format, give `format.rs` its decoder, `unpack.rs` its vectors
//! and the tables below a line; to add an ISA, add an [`Isa`], a file with its vectors, its line in [`kernels!`] and one
//! in `vec.rs`.

pub mod acts;
mod aligned;
mod channel;
pub mod format;
pub mod half;
pub mod interleave;
pub mod measure;
mod scalar;
pub mod selftest;
mod tile;
mod unpack;
pub mod vec;
mod wide;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_dot;
#[cfg(target_arch = "aarch64")]
mod neon_i8mm;

use std::marker::PhantomData;

pub use acts::{Acts, ActsBuf, ActsMut, DIGITS};
pub use format::{Format, ggml_type_name};
pub use tile::{Tile, Tiles};
pub use vec::{Ops, ops};

use scalar::{Floats, Groups, Unpacked};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use wide::Wide;

/// The features of an ISA: architecture, macro that detects them, names.
macro_rules! features {
    ($arch:tt $detected:ident $($name:tt)*) => {{
        #[cfg(target_arch = $arch)]
        const FEATURES: &[Feature] = &[$(($name, || std::arch::$detected!($name))),*];
        #[cfg(not(target_arch = $arch))]
        const FEATURES: &[Feature] = &[(OTHER_ARCHITECTURE, || false)];
        FEATURES
    }};
}

/// An instruction set, in the sense of "what a kernel may use". Later ones are better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// What every CPU has.
    Scalar,
    /// AVX2, FMA and F16C: x86-64 since 2013.
    Avx2,
    /// AVX-VNNI beside that: dot products of bytes on 256 bits. Intel since Alder Lake, AMD since Zen 5.
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI beside AVX2's. Intel servers since Ice Lake, AMD since Zen 4.
    Avx512,
    /// NEON: every 64-bit ARM CPU (Cortex-A53 and A72, Raspberry Pi 4).
    Neon,
    /// NEON with `sdot` (Cortex-A76, Raspberry Pi 5).
    NeonDot,
    /// NEON with `sdot` and `smmla` (Cortex-A510, Neoverse V1).
    NeonI8mm,
}

impl Isa {
    /// Every ISA, worst first.
    pub const ALL: [Isa; 7] =
        [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Neon, Isa::NeonDot, Isa::NeonI8mm];

    /// `scalar`, `avx2`, `avx_vnni`, `avx512`, `neon`, `neon_dot`, `neon_i8mm`.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avx_vnni",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
            Isa::NeonDot => "neon_dot",
            Isa::NeonI8mm => "neon_i8mm",
        }
    }

    /// The ISA of this name.
    pub fn parse(name: &str) -> Option<Isa> {
        Isa::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// What a CPU needs for it: the name of each feature, and whether this CPU has it and the operating system keeps its
    /// registers.
    pub fn features(self) -> &'static [Feature] {
        match self {
            Isa::Scalar => &[],
            Isa::Avx2 => features!("x86_64" is_x86_feature_detected "avx2" "fma" "f16c"),
            Isa::AvxVnni => features!("x86_64" is_x86_feature_detected "avx2" "fma" "f16c" "avxvnni"),
            Isa::Avx512 => features!(
                "x86_64" is_x86_feature_detected
                "avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512vnni"
            ),
            Isa::Neon => features!("aarch64" is_aarch64_feature_detected "neon"),
            Isa::NeonDot => features!("aarch64" is_aarch64_feature_detected "neon" "dotprod"),
            Isa::NeonI8mm => features!("aarch64" is_aarch64_feature_detected "neon" "dotprod" "i8mm"),
        }
    }

    /// Whether this CPU has all of them.
    pub fn supported(self) -> bool {
        self.features().iter().all(|(_, has)| has())
    }

    /// Whether there are CPUs of this architecture that have it.
    pub fn of_this_architecture(self) -> bool {
        self.features().iter().all(|(name, _)| *name != OTHER_ARCHITECTURE)
    }

    /// The best this CPU has.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.supported()).unwrap_or(Isa::Scalar)
    }
}

/// A feature of CPUs by its name in the standard library, and whether this CPU has it.
pub type Feature = (&'static str, fn() -> bool);

/// Stands for the features of an ISA that no CPU of this architecture has.
const OTHER_ARCHITECTURE: &str = "other architecture";

/// How the bytes of a matrix are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As in a GGUF file: row after row, block after block.
    Gguf,
    /// Eight rows side by side, see [`interleave`]. Kernels take multiples of eight rows.
    Interleaved,
}

/// Some rows of a matrix.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// All their bytes, in a kernel's [`Layout`].
    pub bytes: &'a [u8],
    /// The scale of each row, for channel-wise formats; empty for others.
    pub scale: &'a [f32],
}

impl<'a> From<&'a [u8]> for Rows<'a> {
    /// Rows without scales of their own.
    fn from(bytes: &'a [u8]) -> Rows<'a> {
        Rows { bytes, scale: &[] }
    }
}

/// Multiplies matrices of one format on one ISA.
pub trait Kernel: Sync {
    /// `format/isa`, lower case: `q4_0/avx2`; for rows interleaved by eight, `q4_0x8/avx2`.
    fn name(&self) -> &'static str;
    /// The format of the weights.
    fn format(&self) -> Format;
    /// What it needs.
    fn isa(&self) -> Isa;
    /// Whether this CPU can run it.
    fn supported(&self) -> bool {
        self.isa().supported()
    }
    /// The order of bytes it reads.
    fn layout(&self) -> Layout;
    /// `out[t][r] = Σ_k w[r][k]·x[t][k]` for the rows of the tile: `w` holds exactly those rows, in order.
    ///
    /// # Panics
    /// If this CPU lacks the ISA, or if weights, activations and tile do not fit together. Block formats need activations
    /// quantised in groups, channel-wise formats quantised by one scale a token.
    fn matmul(&self, w: Rows, x: &Acts, out: &mut Tile);
}

/// Calls the given macro with a line for each block format people's files are made of, or for every one: type, names of
/// its two orders of bytes. The former have kernels on every ISA, the others on the first one of an architecture.
macro_rules! for_each_block_format {
    (hot $table:ident) => { for_each_block_format! { $table } };
    (all $table:ident) => {
        for_each_block_format! {
            $table
            (Q4_1 "q4_1") (Q5_0 "q5_0") (Q5_1 "q5_1") (Q2K "q2_k") (Q3K "q3_k") (Iq4Nl "iq4_nl" "iq4_nlx8")
            (Iq4Xs "iq4_xs") (Tq1_0 "tq1_0") (Tq2_0 "tq2_0" "tq2_0x8") (Mxfp4 "mxfp4") (Q1_0 "q1_0") (Q2_0 "q2_0")
            (Q4_0C "q4_0c") (Q8_0C "q8_0c") (Tq2_0C "tq2_0c")
        }
    };
    ($table:ident $($more:tt)*) => {
        $table! {
            (Q4_0 "q4_0" "q4_0x8") (Q8_0 "q8_0" "q8_0x8") (Q4K "q4_k" "q4_kx8") (Q5K "q5_k" "q5_kx8")
            (Q6K "q6_k" "q6_kx8") (W2C "w2c") (W4C "w4c") (W8C "w8c")
            $($more)*
        }
    };
}

/// The float formats' kernels on an ISA.
macro_rules! floats {
    ($isa:ident, $name:literal) => {
        &[
            &Floats { name: concat!("f32/", $name), format: Format::F32, isa: Isa::$isa, dot: Ops::dot_f32_bytes },
            &Floats { name: concat!("f16/", $name), format: Format::F16, isa: Isa::$isa, dot: Ops::dot_f16_bytes },
            &Floats { name: concat!("bf16/", $name), format: Format::BF16, isa: Isa::$isa, dot: Ops::dot_bf16_bytes },
        ]
    };
}

/// The kernels of an ISA: constructor of a block format's, then the ISA and its name.
macro_rules! kernels {
    ($isa:ident $name:literal $kernel:ident $vectors:ty; $(($block:ident $gguf:literal $($interleaved:literal)?))*) => {
        &[
            $(
                &$kernel::<$vectors, format::$block>(concat!($gguf, "/", $name), Layout::Gguf, PhantomData),
                $(&$kernel::<$vectors, format::$block>(concat!($interleaved, "/", $name), Layout::Interleaved, PhantomData),)?
            )*
        ]
    };
}

macro_rules! scalar_kernels { ($($line:tt)*) => { kernels!(Scalar "scalar" Groups (); $($line)*) }; }
#[cfg(target_arch = "x86_64")]
macro_rules! avx2_kernels { ($($line:tt)*) => { kernels!(Avx2 "avx2" Wide avx2::Ymm<avx2::Maddubs>; $($line)*) }; }
#[cfg(target_arch = "x86_64")]
macro_rules! avx_vnni_kernels { ($($line:tt)*) => { kernels!(AvxVnni "avx_vnni" Wide avx2::Ymm<avx_vnni::Vex>; $($line)*) }; }
#[cfg(target_arch = "x86_64")]
macro_rules! avx512_kernels { ($($line:tt)*) => { kernels!(Avx512 "avx512" Wide avx512::Zmm; $($line)*) }; }
#[cfg(target_arch = "aarch64")]
macro_rules! neon_kernels { ($($line:tt)*) => { kernels!(Neon "neon" Wide neon::Neon<neon::Mull>; $($line)*) }; }
#[cfg(target_arch = "aarch64")]
macro_rules! neon_dot_kernels { ($($line:tt)*) => { kernels!(NeonDot "neon_dot" Wide neon::Neon<neon_dot::Sdot>; $($line)*) }; }
#[cfg(target_arch = "aarch64")]
macro_rules! neon_i8mm_kernels { ($($line:tt)*) => { kernels!(NeonI8mm "neon_i8mm" Wide neon::Neon<neon_i8mm::Smmla>; $($line)*) }; }

/// The kernels by ISA, best first.
const BY_ISA: &[&[&dyn Kernel]] = &[
    #[cfg(target_arch = "x86_64")]
    for_each_block_format!(hot avx512_kernels),
    #[cfg(target_arch = "x86_64")]
    floats!(Avx512, "avx512"),
    #[cfg(target_arch = "x86_64")]
    for_each_block_format!(hot avx_vnni_kernels),
    #[cfg(target_arch = "x86_64")]
    for_each_block_format!(all avx2_kernels),
    #[cfg(target_arch = "x86_64")]
    floats!(Avx2, "avx2"),
    #[cfg(target_arch = "aarch64")]
    for_each_block_format!(hot neon_i8mm_kernels),
    #[cfg(target_arch = "aarch64")]
    for_each_block_format!(hot neon_dot_kernels),
    #[cfg(target_arch = "aarch64")]
    for_each_block_format!(all neon_kernels),
    #[cfg(target_arch = "aarch64")]
    floats!(Neon, "neon"),
    for_each_block_format!(all scalar_kernels),
    floats!(Scalar, "scalar"),
];

/// Every kernel of this build, best ISA first; some may need more than this CPU has.
pub static KERNELS: &[&dyn Kernel] = &{
    let mut all = [BY_ISA[0][0]; count(BY_ISA)];
    let (mut n, mut i) = (0, 0);
    while i < BY_ISA.len() {
        let mut j = 0;
        while j < BY_ISA[i].len() {
            all[n] = BY_ISA[i][j];
            (n, j) = (n + 1, j + 1);
        }
        i += 1;
    }
    all
};

const fn count(lists: &[&[&dyn Kernel]]) -> usize {
    let (mut n, mut i) = (0, 0);
    while i < lists.len() {
        (n, i) = (n + lists[i].len(), i + 1);
    }
    n
}

macro_rules! unpacked {
    ($(($block:ident $gguf:literal $($interleaved:literal)?))*) => {
        /// The kernels of [`dequant`], for each ISA.
        static UNPACKED: &[Unpacked] = &[
            $(
                Unpacked { name: concat!($gguf, "/float"), format: Format::$block, isa: Isa::Scalar },
                #[cfg(target_arch = "x86_64")]
                Unpacked { name: concat!($gguf, "/float"), format: Format::$block, isa: Isa::Avx2 },
                #[cfg(target_arch = "x86_64")]
                Unpacked { name: concat!($gguf, "/float"), format: Format::$block, isa: Isa::Avx512 },
                #[cfg(target_arch = "aarch64")]
                Unpacked { name: concat!($gguf, "/float"), format: Format::$block, isa: Isa::Neon },
            )*
        ];
    };
}
for_each_block_format!(all unpacked);

/// The best kernel this CPU has for `format` in the order of GGUF files, among those not above `isa`. Every format has a
/// scalar one.
pub fn select(format: Format, isa: Isa) -> &'static dyn Kernel {
    select_in(Layout::Gguf, format, isa).expect("every format has a scalar kernel")
}

/// The same for any order of bytes; `None` if `format` does not have that order.
pub fn select_in(layout: Layout, format: Format, isa: Isa) -> Option<&'static dyn Kernel> {
    let fits =
        |k: &&&'static dyn Kernel| k.format() == format && k.layout() == layout && k.isa() <= isa && k.supported();
    KERNELS.iter().find(fits).copied()
}

/// The kernel that unpacks to f32 and multiplies f32 activations: `q4_0/float`. For float formats, what
/// [`select`] gives.
pub fn dequant(format: Format, isa: Isa) -> &'static dyn Kernel {
    let fits = |k: &&Unpacked| k.format == format && k.isa <= isa && k.supported();
    match UNPACKED.iter().rev().find(fits) {
        Some(kernel) => kernel,
        None => select(format, isa),
    }
}

/// Which kernels to run: the best not above an ISA, and perhaps one named kernel for its own format.
#[derive(Clone, Copy)]
pub struct Choice {
    /// The highest ISA to use.
    pub isa: Isa,
    /// The kernel to use for its format, whatever `isa` would give.
    pub only: Option<&'static dyn Kernel>,
}

impl Default for Choice {
    /// The best this CPU has.
    fn default() -> Choice {
        Choice { isa: Isa::best(), only: None }
    }
}

impl Choice {
    /// The kernel for `format`.
    pub fn kernel(&self, format: Format) -> &'static dyn Kernel {
        match self.only {
            Some(only) if only.format() == format && only.layout() == Layout::Gguf => only,
            _ => select(format, self.isa),
        }
    }
}

/// Reads a choice of kernels: an ISA (`scalar`, `avx2`), or one kernel (`q4_0/scalar`), which leaves
/// every other format at its best.
///
/// # Errors
/// A line that says what exists, or that this CPU lacks it.
pub fn find(name: &str) -> Result<Choice, String> {
    if let Some(isa) = Isa::parse(name) {
        return if isa.supported() {
            Ok(Choice { isa, only: None })
        } else {
            Err(format!("{name}: this CPU has no {name}: expected one of {}", supported_isas()))
        };
    }
    match KERNELS.iter().find(|k| k.name() == name) {
        Some(kernel) if kernel.supported() => Ok(Choice { isa: Isa::best(), only: Some(*kernel) }),
        Some(kernel) => {
            Err(format!("{name}: this CPU has no {}: expected one of {}", kernel.isa().name(), supported_isas()))
        }
        None => {
            let (name, isas) = (name.escape_default(), supported_isas());
            Err(format!("{name}: no such kernel: expected one of {isas}, or FORMAT/ISA such as q4_0/scalar"))
        }
    }
}

/// The ISAs of this CPU, for messages.
fn supported_isas() -> String {
    let names: Vec<_> = Isa::ALL.into_iter().filter(|isa| isa.supported()).map(Isa::name).collect();
    names.join(", ")
}
