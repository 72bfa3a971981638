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

use std::ops::Range;

use crate::half::{f16_to_f32, f32_to_f16};
use crate::vec::{KEYS, PANEL};
use crate::{Acts, ActsBuf, Format, Isa, Kernel, Layout, Ops, Rows, Tile, ops, select};

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
        Format::W2C | Format::W4C | Format::W8C => &[],
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
const SHAPES: [(usize, usize); 13] =
    [(17, 1), (16, 1), (9, 1), (8, 1), (7, 1), (1, 1), (72, 1), (17, 2), (9, 3), (8, 5), (16, 8), (15, 9), (17, 64)];

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
    scale: Vec<f32>, // (rows), for formats with a scale a row
    x: Vec<f32>,     // (tokens, cols)
    acts: ActsBuf,
    want: Vec<f32>, // (tokens, rows)
}

impl Cases {
    /// The products of `format`, computed by its scalar kernel.
    pub fn new(format: Format) -> Cases {
        let mut rng = Rng(format as u64);
        let scalar = select(format, Isa::Scalar);
        let mut cases = Vec::new();
        for cols in COLS.into_iter().filter(|cols| format.row_bytes(*cols).is_some()) {
            for (i, (rows, tokens)) in SHAPES.into_iter().enumerate() {
                let mut case = Case::new(format, rows, cols, tokens, i, &mut rng);
                case.want = case.run(scalar, rows);
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
            // Interleaved rows come by eight; the rest is left out.
            let rows = match kernel.layout() {
                Layout::Gguf => case.rows,
                Layout::Interleaved => case.rows / 8 * 8,
            };
            if rows == 0 {
                continue;
            }
            let got = case.run(kernel, rows);
            let want: Vec<f32> = case.want.chunks_exact(case.rows).flat_map(|line| &line[..rows]).copied().collect();
            if let Some(at) = difference(&got, &want) {
                let (token, row) = (at / rows, at % rows);
                return Err(format!(
                    "{rows} rows of {}, {} tokens: token {token}, row {row}: {}",
                    case.cols,
                    got.len() / rows,
                    found_expected(got[at], want[at])
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
        let mut scale = Vec::new();
        if format.is_channel() {
            // Small enough that the activations above reach −128 and 127.
            acts.quantize_static(ops(Isa::Scalar), &x, cols, 0.0073);
            scale.extend((0..rows).map(|_| rng.unit()));
        } else {
            acts.quantize(ops(Isa::Scalar), &x, cols);
        }
        Case { rows, cols, w, shift, scale, x, acts, want: Vec::new() }
    }

    /// The product of the first `rows` rows as `kernel` computes it.
    fn run(&self, kernel: &dyn Kernel, rows: usize) -> Vec<f32> {
        let format = kernel.format();
        let x: Acts = match format.is_channel() {
            true => self.acts.acts_per_token(&self.x, self.cols),
            false => self.acts.acts(&self.x, self.cols),
        };
        let mut w = self.w[..self.shift + rows * (self.w.len() - self.shift) / self.rows].to_vec();
        if kernel.layout() == Layout::Interleaved {
            let eight = 8 * (w.len() - self.shift) / rows;
            let from = self.w[self.shift..].chunks_exact(eight);
            from.zip(w[self.shift..].chunks_exact_mut(eight)).for_each(|(from, to)| format.interleave(from, to));
        }
        let w = Rows { bytes: &w[self.shift..], scale: &self.scale[..rows.min(self.scale.len())] };
        // An output nobody writes stays NaN, which no product is.
        let mut out = vec![f32::NAN; x.tokens * rows];
        kernel.matmul(w, &x, &mut Tile::whole(&mut out, rows));
        out
    }
}

/// Scores of some queries of up to 300 dimensions.
fn scores<T>(
    n: usize,
    rng: &mut Rng,
    values: fn(&mut Rng, usize) -> Vec<T>,
    f: impl Fn(&mut Tile, &[f32], &[T]),
) -> Vec<f32> {
    let dim = n.min(300);
    let keys = values(rng, dim * KEYS);
    let mut all = Vec::new();
    for queries in [1, 2, 4, 7, 8] {
        let mut out = vec![0.0; queries * KEYS];
        f(&mut Tile::whole(&mut out, KEYS), &rng.values(queries * dim), &keys);
        all.extend(out);
    }
    all
}

/// The same with a scale for each key.
fn scores_scaled<T>(
    n: usize,
    rng: &mut Rng,
    values: fn(&mut Rng, usize) -> Vec<T>,
    f: impl Fn(&mut Tile, &[f32], &[T], &[f32]),
) -> Vec<f32> {
    let scale = rng.values(KEYS);
    scores(n, rng, values, |out, q, keys| f(out, q, keys, &scale))
}

/// Sums of up to eleven lines of up to 300 dimensions over some positions.
fn weigh<T>(
    n: usize,
    rng: &mut Rng,
    values: fn(&mut Rng, usize) -> Vec<T>,
    f: impl Fn(&mut Tile, &[f32], usize, &[T], Range<usize>),
) -> Vec<f32> {
    let (width, lines, end) = (n.min(300), 1 + n % 11, 1 + n % KEYS);
    let positions = n / 3 % end..end;
    let values = values(rng, width.next_multiple_of(PANEL) * KEYS);
    let mut out = rng.values(lines * width);
    let (weights, stride) = (rng.values(lines * end), end);
    f(&mut Tile::whole(&mut out, width), &weights[positions.start..], stride, &values, positions);
    out
}

/// A function of [`Ops`] by name, and its results on `n` (or `2·n`) values of a generator.
pub type Function = (&'static str, fn(&Ops, usize, &mut Rng) -> Vec<f32>);

/// Every function of [`Ops`].
pub const FUNCTIONS: &[Function] = &[
    ("dot", |ops, n, rng| vec![ops.dot(&rng.values(n), &rng.values(n))]),
    ("dot_pair", |ops, n, rng| ops.dot_pair(&rng.values(n), &rng.values(n), &rng.values(n)).to_vec()),
    ("dot_f32_bytes", |ops, n, rng| {
        let w: Vec<u8> = rng.values(n).iter().flat_map(|w| w.to_le_bytes()).collect();
        vec![ops.dot_f32_bytes(&w, &rng.values(n))]
    }),
    ("dot_f16_bytes", |ops, n, rng| vec![ops.dot_f16_bytes(&bytes(&halves(rng, n)), &rng.values(n))]),
    ("widen_f16_bytes", |ops, n, rng| {
        let mut out = vec![0.0; n];
        ops.widen_f16_bytes(&mut out, &bytes(&halves(rng, n)));
        out
    }),
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
    ("scores_f32", |ops, n, rng| scores(n, rng, |rng, n| rng.values(n), |out, q, k| ops.scores_f32(out, q, k))),
    ("scores_f16", |ops, n, rng| scores(n, rng, halves, |out, q, k| ops.scores_f16(out, q, k))),
    ("scores_i8", |ops, n, rng| scores_scaled(n, rng, int8s, |out, q, k, scale| ops.scores_i8(out, q, k, scale))),
    ("scores_i4", |ops, n, rng| scores_scaled(n, rng, nibbles, |out, q, k, scale| ops.scores_i4(out, q, k, scale))),
    ("weigh_f32", |ops, n, rng| {
        weigh(
            n,
            rng,
            |rng, n| rng.values(n),
            |out, w, stride, v, positions| ops.weigh_f32(out, w, stride, v, positions),
        )
    }),
    ("weigh_f16", |ops, n, rng| {
        weigh(n, rng, halves, |out, w, stride, v, positions| ops.weigh_f16(out, w, stride, v, positions))
    }),
    ("weigh_i8", |ops, n, rng| {
        let scale = rng.values(KEYS);
        weigh(n, rng, int8s, |out, w, stride, v, positions| ops.weigh_i8(out, w, stride, v, &scale, positions))
    }),
    ("weigh_i4", |ops, n, rng| {
        let scale = rng.values(KEYS);
        weigh(n, rng, nibbles, |out, w, stride, v, positions| ops.weigh_i4(out, w, stride, v, &scale, positions))
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
    ("amax", |ops, n, rng| vec![ops.amax(&rng.values(n))]),
    ("store_i8", |ops, n, rng| {
        let x = rng.values(n);
        let mut out = vec![0; n];
        let mut all = Vec::new();
        for (scale, top) in [(0.031, 127), (0.7, 7), (0.0, 7)] {
            ops.store_i8(&mut out, &x, scale, top);
            all.extend(out.iter().map(|q| f32::from(*q)));
        }
        all
    }),
    ("quantize", |ops, n, rng| {
        let x = rng.values(n.next_multiple_of(32));
        let (mut q, mut scale, mut sums) = (vec![0; x.len()], vec![0.0; x.len() / 32], vec![0; x.len() / 16]);
        ops.quantize(&x, &mut q, &mut scale, &mut sums);
        scale.extend(q.into_iter().map(f32::from));
        scale.extend(sums.into_iter().map(f32::from));
        scale
    }),
    ("quantize_static", |ops, n, rng| {
        let x = rng.values(n.next_multiple_of(16));
        let (mut q, mut sums) = (vec![0; x.len()], vec![0; x.len() / 16]);
        let finite = ops.quantize_static(&x, 0.031, &mut q, &mut sums);
        let mut all = vec![f32::from(finite)];
        all.extend(q.into_iter().map(f32::from));
        all.extend(sums.into_iter().map(f32::from));
        all
    }),
    ("round_static", |ops, n, rng| {
        let mut x = rng.values(n);
        ops.round_static(&mut x, 0.031);
        x
    }),
];

fn int8s(rng: &mut Rng, n: usize) -> Vec<i8> {
    (0..n).map(|_| rng.byte() as i8).collect()
}

/// Half as many bytes as values.
fn nibbles(rng: &mut Rng, n: usize) -> Vec<u8> {
    (0..n / 2).map(|_| rng.byte()).collect()
}

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
    (Format::F32, 0xcc18_0266_5f99_c37a),
    (Format::F16, 0x1998_9b8a_11d7_8fa9),
    (Format::Q4_0, 0x6820_9d74_4b24_fb4f),
    (Format::Q4_1, 0x08ce_cadc_fa9f_ebf6),
    (Format::Q5_0, 0xea0e_1f60_c3c1_df28),
    (Format::Q5_1, 0x28aa_ee71_63b2_2ae7),
    (Format::Q8_0, 0xe6f7_7000_71ee_6dd7),
    (Format::Q2K, 0xd841_5058_f8ef_538e),
    (Format::Q3K, 0xba45_c0c0_4fc9_3f73),
    (Format::Q4K, 0x4ac1_4837_3e3d_383b),
    (Format::Q5K, 0xe783_1dca_e079_f13e),
    (Format::Q6K, 0x6639_fcf2_cc07_8c63),
    (Format::Iq4Nl, 0xbc13_0675_8d12_18ca),
    (Format::Iq4Xs, 0xfdd1_98a5_2f0d_6f13),
    (Format::BF16, 0xb203_b5cc_c8b6_8592),
    (Format::Tq1_0, 0x675b_b987_f1c1_8a38),
    (Format::Tq2_0, 0x96ec_7bbc_c18d_e2a9),
    (Format::Mxfp4, 0xb5cf_d9dc_7b80_e7e6),
    (Format::Q1_0, 0x0c03_2ba1_34f7_c8dd),
    (Format::Q2_0, 0x2821_def4_a6c6_fc46),
    (Format::W2C, 0x5da0_aaeb_a6de_683a),
    (Format::W4C, 0xd661_ac0a_45f9_093d),
    (Format::W8C, 0x24eb_65f8_0b26_6eea),
    (Format::Q4_0C, 0x79f7_635d_5c39_2a14),
    (Format::Q8_0C, 0x2aec_c4c9_c107_4220),
    (Format::Tq2_0C, 0x3db1_e25a_2dab_cfb9),
];

/// The same for the f32 functions.
const RECORDED_OPS: u64 = 0xde4a_466a_88a4_cc62;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KERNELS;

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
        fn matmul(&self, w: Rows, x: &Acts, out: &mut Tile) {
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
            fn matmul(&self, w: Rows, x: &Acts, out: &mut Tile) {
                let row_bytes = w.bytes.len() / out.rows();
                for t in 0..x.tokens {
                    for r in 0..out.rows() {
                        let mut acc = 0.0;
                        for (g, block) in w.bytes[r * row_bytes..][..row_bytes].chunks(34).enumerate() {
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
