//! Every kernel of a format on the same weights and activations: what `gemrun selftest` runs on somebody's own CPU.
//!
//! The one idea: two comparisons make a chain. [`Cases`] holds what the scalar kernel of a format gives, and any other
//! kernel must give the same bits ([`Cases::check`]). The scalar kernel must give the bits it gave everywhere else, of
//! which a digest is recorded here ([`Cases::check_scalar`]). [`check_ops`] and [`check_scalar_ops`] are the same for
//! the f32 arithmetic. The first output that differs is named.
//!
//! The data is small and chosen for what goes wrong: every byte value, integers that saturate or lose a sign, rows
//! around the eight in lanes, token counts around the change of path, rows from one group of 32 to more than a panel of
//! 1024, odd addresses. It is made anew each time from a fixed seed. The tests of this crate use the same generator and
//! go much further; shapes that do not fit and damaged weights are theirs alone.

#![forbid(unsafe_code)]

use crate::half::{f16_to_f32, f32_to_f16};
use crate::{Acts, ActsBuf, Format, Isa, Kernel, Ops, Tile, ops, select};

/// A small generator of pseudo-random numbers (splitmix64): the same numbers from the same seed, everywhere.
pub struct Rng(pub u64);

impl Rng {
    /// 64 random bits.
    #[allow(clippy::should_implement_trait)] // an iterator would be in the way
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A random byte.
    pub fn byte(&mut self) -> u8 {
        (self.next() >> 40) as u8
    }

    /// Between −1 and 1.
    pub fn unit(&mut self) -> f32 {
        ((self.next() >> 40) as i32 - (1 << 23)) as f32 / (1 << 23) as f32
    }

    /// `n` values of the magnitudes activations have, with the odd zero.
    pub fn values(&mut self, n: usize) -> Vec<f32> {
        let value = |rng: &mut Rng| match rng.byte() % 16 {
            0 => 0.0,
            1 => -0.0,
            2 => 1000.0 * rng.unit(),
            3 => 1e-20 * rng.unit(),
            _ => 5.0 * rng.unit(),
        };
        (0..n).map(|_| value(self)).collect()
    }
}

/// Where the half-precision scales of a block stand, as the format's definition gives them.
fn scales_at(format: Format) -> &'static [usize] {
    match format {
        Format::F32 | Format::F16 | Format::BF16 | Format::Mxfp4 => &[],
        Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
        Format::Q2K => &[80, 82],
        Format::Q3K => &[108],
        Format::Q6K => &[208],
        Format::Tq1_0 => &[52],
        Format::Tq2_0 => &[64],
        _ => &[0],
    }
}

/// Rows of weights whose integers are the bytes `next` gives and whose scales are random, finite and
/// neither tiny nor huge. Float formats get values between −1 and 1 and ignore `next`.
///
/// # Panics
/// If `cols` is not whole blocks.
pub fn weights(
    format: Format,
    rows: usize,
    cols: usize,
    rng: &mut Rng,
    mut next: impl FnMut(&mut Rng) -> u8,
) -> Vec<u8> {
    let len = rows * format.row_bytes(cols).expect("whole blocks");
    match format {
        Format::F32 => (0..rows * cols).flat_map(|_| rng.unit().to_le_bytes()).collect(),
        Format::F16 => (0..rows * cols).flat_map(|_| f32_to_f16(rng.unit()).to_le_bytes()).collect(),
        Format::BF16 => (0..rows * cols).flat_map(|_| ((rng.unit().to_bits() >> 16) as u16).to_le_bytes()).collect(),
        _ => {
            let mut w: Vec<u8> = (0..len).map(|_| next(rng)).collect();
            for block in w.chunks_exact_mut(format.block_bytes()) {
                for &at in scales_at(format) {
                    block[at..at + 2].copy_from_slice(&f32_to_f16(rng.unit()).to_le_bytes());
                }
                if format == Format::Mxfp4 {
                    block[0] = 120 + rng.byte() % 16;
                }
            }
            w
        }
    }
}

/// Equal bits, or both NaN.
pub fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// FNV-1a over the bits: tells sequences apart, and no more is asked of it. Any NaN counts as the same one.
fn digest<'a>(values: impl IntoIterator<Item = &'a f32>) -> u64 {
    let canonical = |v: &f32| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() };
    let mix = |hash: u64, byte: u8| (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3);
    values.into_iter().flat_map(|v| canonical(v).to_le_bytes()).fold(0xcbf2_9ce4_8422_2325, mix)
}

/// Row lengths, of which a format takes those that are whole blocks: one group, an odd number of groups, one
/// super-block, five of them.
const COLS: [usize; 4] = [32, 96, 256, 1280];

/// Rows and tokens of the products of each row length.
const SHAPES: [(usize, usize); 12] =
    [(17, 1), (16, 1), (9, 1), (8, 1), (7, 1), (1, 1), (17, 2), (9, 3), (8, 5), (16, 8), (15, 9), (17, 64)];

/// Products of one format and what its scalar kernel makes of them.
pub struct Cases {
    format: Format,
    cases: Vec<Case>,
}

/// One product.
struct Case {
    rows: usize,
    cols: usize,
    w: Vec<u8>, // (rows, bytes of a row), after `shift` bytes that are not read
    shift: usize,
    x: Vec<f32>, // (tokens, cols)
    acts: ActsBuf,
    want: Vec<f32>, // (tokens, rows)
}

impl Cases {
    /// The products of `format`, computed by its scalar kernel.
    pub fn new(format: Format) -> Cases {
        let mut rng = Rng(format.ggml_id() as u64);
        let scalar = select(format, Isa::Scalar);
        let mut cases = Vec::new();
        for cols in COLS.into_iter().filter(|cols| format.row_bytes(*cols).is_some()) {
            for (i, (rows, tokens)) in SHAPES.into_iter().enumerate() {
                let mut case = Case::new(format, rows, cols, tokens, i, &mut rng);
                case.want = case.run(scalar);
                cases.push(case);
            }
        }
        Cases { format, cases }
    }

    /// Runs `kernel` on all of them.
    ///
    /// # Errors
    /// The first output whose bits are not the scalar kernel's: the shape, its place, what it is and should be.
    ///
    /// # Panics
    /// If the kernel is of another format, or needs more than this CPU has.
    pub fn check(&self, kernel: &dyn Kernel) -> Result<(), String> {
        assert_eq!(kernel.format(), self.format);
        for case in &self.cases {
            let got = case.run(kernel);
            if let Some(at) = difference(&got, &case.want) {
                let (token, row) = (at / case.rows, at % case.rows);
                return Err(format!(
                    "{} rows of {}, {} tokens: token {token}, row {row}: {}",
                    case.rows,
                    case.cols,
                    got.len() / case.rows,
                    found_expected(got[at], case.want[at])
                ));
            }
        }
        Ok(())
    }

    /// Compares the scalar kernel with what it gave when this program was written.
    ///
    /// # Errors
    /// The two digests.
    pub fn check_scalar(&self) -> Result<(), String> {
        let recorded = RECORDED.iter().find(|(format, _)| *format == self.format).map(|(_, digest)| *digest);
        same_digest(digest(self.cases.iter().flat_map(|case| &case.want)), recorded)
    }
}

impl Case {
    /// Case `i` of a row length. What a row or token holds depends on its number plus `i`, so that all meet in all lanes.
    fn new(format: Format, rows: usize, cols: usize, tokens: usize, i: usize, rng: &mut Rng) -> Case {
        let shift = i % 2;
        let mut w = vec![0; shift];
        for r in i..i + rows {
            let mut n = 0_usize;
            w.extend(weights(format, 1, cols, rng, |rng| {
                n += 1;
                match r % 4 {
                    0 => rng.byte(),
                    1 => (n + 64 * r) as u8,
                    2 => [0x00, 0xff][n % 2],
                    _ => [0x80, 0x7f, 0x88, 0x77, 0x81][n % 5],
                }
            }));
        }
        let mut x = Vec::with_capacity(tokens * cols);
        for t in i..i + tokens {
            x.extend((0..cols).map(|k| match t % 6 {
                0 => 1.0,
                1 => -1.0,
                2 => [1.0, -1.0][k % 2],
                3 => f32::from(k % 97 == 13),
                4 => [-1.0, -1.0, 1.0, 1.0][k % 4] * 1e-3,
                _ => rng.unit() * [1.0, 30.0, 1e-4][k / 32 % 3],
            }));
        }
        let mut acts = ActsBuf::default();
        acts.quantize(ops(Isa::Scalar), &x, cols);
        Case { rows, cols, w, shift, x, acts, want: Vec::new() }
    }

    /// The product as `kernel` computes it.
    fn run(&self, kernel: &dyn Kernel) -> Vec<f32> {
        let x: Acts = self.acts.acts(&self.x, self.cols);
        // An output nobody writes stays NaN, which no product is.
        let mut out = vec![f32::NAN; x.tokens * self.rows];
        kernel.matmul(&self.w[self.shift..], &x, &mut Tile::whole(&mut out, self.rows));
        out
    }
}

/// A function of [`Ops`] by name, and its results on `n` (or `2·n`) values of a generator.
pub type Function = (&'static str, fn(&Ops, usize, &mut Rng) -> Vec<f32>);

/// Every function of [`Ops`].
pub const FUNCTIONS: &[Function] = &[
    ("dot", |ops, n, rng| vec![ops.dot(&rng.values(n), &rng.values(n))]),
    ("dot_f16", |ops, n, rng| vec![ops.dot_f16(&rng.values(n), &halves(rng, n))]),
    ("dot_f32_bytes", |ops, n, rng| {
        let w: Vec<u8> = rng.values(n).iter().flat_map(|w| w.to_le_bytes()).collect();
        vec![ops.dot_f32_bytes(&w, &rng.values(n))]
    }),
    ("dot_f16_bytes", |ops, n, rng| vec![ops.dot_f16_bytes(&bytes(&halves(rng, n)), &rng.values(n))]),
    ("dot_bf16_bytes", |ops, n, rng| vec![ops.dot_bf16_bytes(&bytes(&halves(rng, n)), &rng.values(n))]),
    ("rms_norm", |ops, n, rng| {
        let (x, mut with, mut without) = (rng.values(n), vec![0.0; n], vec![0.0; n]);
        ops.rms_norm(&mut with, &x, Some(&rng.values(n)), 1e-6);
        ops.rms_norm(&mut without, &x, None, 1e-6);
        [with, without].concat()
    }),
    ("rms_norm_in_place", |ops, n, rng| {
        let mut x = rng.values(n);
        ops.rms_norm_in_place(&mut x, Some(&rng.values(n)), 1e-6);
        x
    }),
    ("add", |ops, n, rng| {
        let mut x = rng.values(n);
        ops.add(&mut x, &rng.values(n));
        x
    }),
    ("scale", |ops, n, rng| {
        let mut x = rng.values(n);
        ops.scale(&mut x, rng.unit());
        x
    }),
    ("axpy", |ops, n, rng| {
        let mut x = rng.values(n);
        ops.axpy(&mut x, rng.unit(), &rng.values(n));
        x
    }),
    ("axpy_f16", |ops, n, rng| {
        let mut x = rng.values(n);
        ops.axpy_f16(&mut x, rng.unit(), &halves(rng, n));
        x
    }),
    ("softmax", |ops, n, rng| {
        let mut x = rng.values(n);
        ops.softmax(&mut x);
        x
    }),
    ("gelu_mul", |ops, n, rng| {
        let mut x = rng.values(n);
        ops.gelu_mul(&mut x, &rng.values(n));
        x
    }),
    ("softcap", |ops, n, rng| {
        let mut x = rng.values(n);
        ops.softcap(&mut x, 30.0);
        x
    }),
    ("rope", |ops, n, rng| {
        let mut x = rng.values(2 * n);
        ops.rope(&mut x, &rng.values(n), &rng.values(n));
        x
    }),
    ("store_f16", |ops, n, rng| {
        let mut out = vec![0; n];
        ops.store_f16(&mut out, &rng.values(n));
        out.into_iter().map(f16_to_f32).collect()
    }),
    ("quantize", |ops, n, rng| {
        let x = rng.values(n.next_multiple_of(32));
        let (mut q, mut scale, mut sums) = (vec![0; x.len()], vec![0.0; x.len() / 32], vec![0; x.len() / 16]);
        ops.quantize(&x, &mut q, &mut scale, &mut sums);
        scale.extend(q.into_iter().map(f32::from));
        scale.extend(sums.into_iter().map(f32::from));
        scale
    }),
];

fn halves(rng: &mut Rng, n: usize) -> Vec<u16> {
    rng.values(n).into_iter().map(f32_to_f16).collect()
}

fn bytes(halves: &[u16]) -> Vec<u8> {
    halves.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Lengths around the 8 of a vector and the 32 lanes.
const LENGTHS: [usize; 9] = [1, 7, 8, 9, 31, 32, 33, 100, 1536];

/// Every function of `ops` against the scalar one.
///
/// # Errors
/// The first value whose bits differ: the function, the length, its place, what it is and should be.
pub fn check_ops(instance: &Ops) -> Result<(), String> {
    for (name, function) in FUNCTIONS {
        for n in LENGTHS {
            let want = function(ops(Isa::Scalar), n, &mut Rng(n as u64));
            let got = function(instance, n, &mut Rng(n as u64));
            if let Some(at) = difference(&got, &want) {
                return Err(format!("{name}: {n} values: value {at}: {}", found_expected(got[at], want[at])));
            }
        }
    }
    Ok(())
}

/// The scalar functions against what they gave when this program was written.
///
/// # Errors
/// The two digests.
pub fn check_scalar_ops() -> Result<(), String> {
    let run = |n: usize| FUNCTIONS.iter().flat_map(move |(_, f)| f(ops(Isa::Scalar), n, &mut Rng(n as u64)));
    let all: Vec<f32> = LENGTHS.into_iter().flat_map(run).collect();
    same_digest(digest(&all), Some(RECORDED_OPS))
}

/// The first place where two equally long sequences differ.
fn difference(got: &[f32], want: &[f32]) -> Option<usize> {
    got.iter().zip(want).position(|(got, want)| !same(*got, *want))
}

fn found_expected(got: f32, want: f32) -> String {
    format!("{got} ({:#010x}), expected {want} ({:#010x})", got.to_bits(), want.to_bits())
}

fn same_digest(found: u64, recorded: Option<u64>) -> Result<(), String> {
    match recorded {
        Some(recorded) if found == recorded => Ok(()),
        Some(recorded) => Err(format!("digest {found:016x}, expected {recorded:016x}, the same on every machine")),
        None => Err(format!("digest {found:016x}: none is recorded to compare it with")),
    }
}

/// Digests of what the scalar kernels give. They change only with the data above or with the definition of a result.
const RECORDED: &[(Format, u64)] = &[
    (Format::F32, 0xd359_2ace_7856_63d0),
    (Format::F16, 0x9d32_70f1_05b6_e782),
    (Format::Q4_0, 0x5b71_5ca0_6161_f289),
    (Format::Q4_1, 0x09d9_befa_b50a_4be9),
    (Format::Q5_0, 0xa0af_212a_5668_bd7f),
    (Format::Q5_1, 0xb40e_4a32_03af_4fd1),
    (Format::Q8_0, 0x2cff_e311_879f_63e8),
    (Format::Q2K, 0x021d_48d5_2e62_a956),
    (Format::Q3K, 0x182b_6ad8_35ba_1b80),
    (Format::Q4K, 0x3da7_3c70_799e_9df2),
    (Format::Q5K, 0x8a7c_397f_3ed2_c91c),
    (Format::Q6K, 0x6234_f050_e6dc_7b6e),
    (Format::Iq4Nl, 0x2614_82e6_50f0_aead),
    (Format::Iq4Xs, 0x2ebd_8602_43c9_5ff8),
    (Format::BF16, 0x6379_b2a5_211f_ffaa),
    (Format::Tq1_0, 0xa27f_2817_8d00_04e0),
    (Format::Tq2_0, 0xa254_a50a_14f8_2da1),
    (Format::Mxfp4, 0xe271_9abb_e8cf_fe33),
    (Format::Q1_0, 0xc4c6_3356_bec6_9022),
    (Format::Q2_0, 0x176b_fe2d_2fb7_2de8),
];

/// The same for the f32 functions.
const RECORDED_OPS: u64 = 0x8d99_c699_083d_9feb;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KERNELS, Layout};

    #[test]
    fn every_kernel_of_this_cpu_passes() {
        for format in Format::ALL {
            let cases = Cases::new(format);
            assert_eq!(cases.check_scalar(), Ok(()), "{format}");
            for kernel in KERNELS.iter().filter(|k| k.format() == format && k.supported()) {
                assert_eq!(cases.check(*kernel), Ok(()), "{}", kernel.name());
            }
        }
        assert_eq!(check_scalar_ops(), Ok(()));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            assert_eq!(check_ops(ops(isa)), Ok(()), "{}", isa.name());
        }
    }

    #[test]
    fn every_function_of_ops_is_here() {
        let names: Vec<&str> = FUNCTIONS.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, Ops::NAMES);
    }

    /// Spoils the outputs of a product: rows, tokens, outputs.
    type Fault = fn(usize, usize, &mut [f32]);

    /// A kernel with a fault.
    struct Faulty(&'static dyn Kernel, Fault);

    impl Kernel for Faulty {
        fn name(&self) -> &'static str {
            "faulty"
        }
        fn format(&self) -> Format {
            self.0.format()
        }
        fn isa(&self) -> Isa {
            self.0.isa()
        }
        fn layout(&self) -> Layout {
            self.0.layout()
        }
        fn matmul(&self, w: &[u8], x: &Acts, out: &mut Tile) {
            let rows = out.rows();
            let mut sound = vec![0.0; x.tokens * rows];
            self.0.matmul(w, x, &mut Tile::whole(&mut sound, rows));
            (self.1)(rows, x.tokens, &mut sound);
            sound.chunks(rows).enumerate().for_each(|(t, line)| out.row(t).copy_from_slice(line));
        }
    }

    #[test]
    fn a_faulty_kernel_is_caught_and_the_output_named() {
        let faults: [(&str, Fault); 4] = [
            // The last bit of one output of a partial group of rows.
            ("9 rows of 32, 3 tokens: token 2, row 8: ", |rows, tokens, out| {
                if (rows, tokens) == (9, 3) {
                    out[2 * 9 + 8] = f32::from_bits(out[2 * 9 + 8].to_bits() ^ 1);
                }
            }),
            // An output that is not written.
            ("17 rows of 32, 64 tokens: token 63, row 16: ", |_, tokens, out| {
                if tokens == 64 {
                    out[63 * 17 + 16] = f32::NAN;
                }
            }),
            // Two rows exchanged.
            ("16 rows of 32, 1 tokens: token 0, row 3: ", |rows, _, out| {
                if rows == 16 {
                    out.swap(3, 4);
                }
            }),
            // One token for another from the fifth on.
            ("8 rows of 32, 5 tokens: token 4, row 0: ", |_, tokens, out| {
                if tokens == 5 {
                    out.copy_within(0..8, 32);
                }
            }),
        ];
        for format in [Format::Q4_0, Format::Q8_0, Format::F16] {
            let cases = Cases::new(format);
            for (message, fault) in faults {
                let error = cases.check(&Faulty(select(format, Isa::best()), fault)).unwrap_err();
                assert!(error.starts_with(message) && error.contains(", expected "), "{format}: {error}");
            }
        }
    }

    #[test]
    fn arithmetic_that_saturates_is_caught() {
        /// Weights as bytes without sign, q + 128, and sums of two products kept within 16 bits: `maddubs` as it must not
        /// be used.
        struct Saturating;
        impl Kernel for Saturating {
            fn name(&self) -> &'static str {
                "q8_0/saturating"
            }
            fn format(&self) -> Format {
                Format::Q8_0
            }
            fn isa(&self) -> Isa {
                Isa::Scalar
            }
            fn layout(&self) -> Layout {
                Layout::Gguf
            }
            fn matmul(&self, w: &[u8], x: &Acts, out: &mut Tile) {
                let row_bytes = w.len() / out.rows();
                for t in 0..x.tokens {
                    for r in 0..out.rows() {
                        let mut acc = 0.0;
                        for (g, block) in w[r * row_bytes..][..row_bytes].chunks(34).enumerate() {
                            let at = t * x.cols + 32 * g;
                            let product = |i: usize| (block[2 + i] ^ 128) as i32 * x.q[at + i] as i32;
                            let pair = |i: usize| (product(2 * i) + product(2 * i + 1)).clamp(-32768, 32767);
                            let bias: i32 = x.q[at..at + 32].iter().map(|a| 128 * *a as i32).sum();
                            let isum = (0..16).map(pair).sum::<i32>() - bias;
                            let d = f16_to_f32(u16::from_le_bytes([block[0], block[1]]));
                            acc = (isum as f32).mul_add(d * x.scale[at / 32], acc);
                        }
                        out.row(t)[r] = acc;
                    }
                }
            }
        }
        assert!(Cases::new(Format::Q8_0).check(&Saturating).is_err());
    }

    #[test]
    fn a_digest_tells_sequences_apart() {
        assert_ne!(digest(&[0.0]), digest(&[-0.0]));
        assert_ne!(digest(&[1.0, 2.0]), digest(&[2.0, 1.0]));
        assert_eq!(digest(&[f32::NAN]), digest(&[-f32::NAN]));
        assert!(same_digest(1, Some(2)).is_err() && same_digest(1, None).is_err());
    }
}
