//! Dot-product kernels for the block formats of GGUF files, and the f32 arithmetic around them.
//!
//! The contract: [`Kernel::matmul`] gives the same bits on every ISA, for any number of rows and tokens
//! at a time. `scalar.rs` states the order of operations; all other kernels are tested against it bit
//! for bit. The ISA is chosen at run time, once, when weights are loaded ([`select`], [`find`]).
//!
//! | file | what is there |
//! |---|---|
//! | `format.rs` | [`Format`]: sizes, names, ids; the decoder of every block format |
//! | `acts.rs` | [`Acts`]: activations, rounded to int8 in groups of 32 |
//! | `tile.rs` | [`Tile`]: the part of the output one call writes |
//! | `vec.rs` | [`Ops`]: f32 loops, one safe source compiled per ISA |
//! | `half.rs` | IEEE halves and bfloat16 as bits |
//! | `scalar.rs` | the reference kernels |
//! | `avx2.rs` | kernels for x86-64 with AVX2, FMA and F16C |
//! | `selftest.rs` | the same products for every kernel, and what must come out |
//!
//! It knows nothing of files, models or threads. To add a format, give `format.rs` its decoder and the
//! tables below a line; to add an ISA, add an [`Isa`], a file of kernels, its lines in [`KERNELS`] and
//! one line in `vec.rs`.

pub mod acts;
pub mod format;
pub mod half;
mod scalar;
pub mod selftest;
mod tile;
pub mod vec;

#[cfg(target_arch = "x86_64")]
mod avx2;

use std::marker::PhantomData;

pub use acts::{Acts, ActsBuf, ActsMut};
pub use format::{Format, ggml_type_name};
pub use tile::{Tile, Tiles};
pub use vec::{Ops, ops};

use scalar::{Floats, Groups, Unpacked};

/// An instruction set, in the sense of "what a kernel may use". Later ones are better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// What every CPU has.
    Scalar,
    /// AVX2, FMA and F16C: x86-64 since 2013.
    Avx2,
}

impl Isa {
    /// Every ISA, worst first.
    pub const ALL: [Isa; 2] = [Isa::Scalar, Isa::Avx2];

    /// `scalar`, `avx2`.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
        }
    }

    /// The ISA of this name.
    pub fn parse(name: &str) -> Option<Isa> {
        Isa::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// Whether this CPU has it.
    pub fn supported(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 => false,
        }
    }

    /// The best this CPU has.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.supported()).unwrap_or(Isa::Scalar)
    }
}

/// How the bytes of a matrix are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As in a GGUF file: row after row, block after block.
    Gguf,
}

/// Multiplies matrices of one format on one ISA.
pub trait Kernel: Sync {
    /// `format/isa`, lower case: `q4_0/avx2`.
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
    /// If this CPU lacks the ISA, or if weights, activations and tile do not fit together. Block formats
    /// need quantised activations.
    fn matmul(&self, w: &[u8], x: &Acts, out: &mut Tile);
}

/// Calls the given macro with a line for each block format: type, lower-case name.
macro_rules! for_each_block_format {
    ($table:ident) => {
        $table! {
            Q4_0 "q4_0", Q4_1 "q4_1", Q5_0 "q5_0", Q5_1 "q5_1", Q8_0 "q8_0", Q2K "q2_k", Q3K "q3_k",
            Q4K "q4_k", Q5K "q5_k", Q6K "q6_k", Iq4Nl "iq4_nl", Iq4Xs "iq4_xs", Tq1_0 "tq1_0",
            Tq2_0 "tq2_0", Mxfp4 "mxfp4", Q1_0 "q1_0", Q2_0 "q2_0"
        }
    };
}

/// The float formats' kernels on an ISA.
macro_rules! floats {
    ($isa:ident, $name:literal) => {
        [
            Floats { name: concat!("f32/", $name), format: Format::F32, isa: Isa::$isa, dot: Ops::dot_f32_bytes },
            Floats { name: concat!("f16/", $name), format: Format::F16, isa: Isa::$isa, dot: Ops::dot_f16_bytes },
            Floats { name: concat!("bf16/", $name), format: Format::BF16, isa: Isa::$isa, dot: Ops::dot_bf16_bytes },
        ]
    };
}

static SCALAR_FLOATS: [Floats; 3] = floats!(Scalar, "scalar");
#[cfg(target_arch = "x86_64")]
static AVX2_FLOATS: [Floats; 3] = floats!(Avx2, "avx2");

macro_rules! kernels {
    ($($block:ident $name:literal),*) => {
        /// Every kernel of this build, best ISA first; some may need more than this CPU has.
        pub static KERNELS: &[&dyn Kernel] = &[
            #[cfg(target_arch = "x86_64")] &AVX2_FLOATS[0],
            #[cfg(target_arch = "x86_64")] &AVX2_FLOATS[1],
            #[cfg(target_arch = "x86_64")] &AVX2_FLOATS[2],
            $(#[cfg(target_arch = "x86_64")] &avx2::Avx2Groups::<format::$block>(concat!($name, "/avx2"), PhantomData),)*
            &SCALAR_FLOATS[0],
            &SCALAR_FLOATS[1],
            &SCALAR_FLOATS[2],
            $(&Groups::<format::$block>(concat!($name, "/scalar"), PhantomData),)*
        ];
    };
}
for_each_block_format!(kernels);

macro_rules! unpacked {
    ($($block:ident $name:literal),*) => {
        /// The kernels of [`dequant`], for each ISA.
        static UNPACKED: &[Unpacked] = &[
            $(
                Unpacked { name: concat!($name, "/float"), format: Format::$block, isa: Isa::Scalar },
                #[cfg(target_arch = "x86_64")]
                Unpacked { name: concat!($name, "/float"), format: Format::$block, isa: Isa::Avx2 },
            )*
        ];
    };
}
for_each_block_format!(unpacked);

/// The best kernel this CPU has for `format`, among those not above `isa`. Every format has a scalar one.
pub fn select(format: Format, isa: Isa) -> &'static dyn Kernel {
    let fits = |k: &&&'static dyn Kernel| k.format() == format && k.isa() <= isa && k.supported();
    *KERNELS.iter().find(fits).expect("every format has a scalar kernel")
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
            Some(only) if only.format() == format => only,
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
