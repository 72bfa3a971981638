//! Vector arithmetic on f32: dots, norms, softmax, activation functions, rotation, int8 rounding.
//!
//! The one idea: each function has one body, in safe Rust with explicit `mul_add`, that [`instance!`]
//! compiles once per ISA. LLVM neither reassociates nor contracts floating point, so every instance
//! computes the same bits; only the width of the instructions differs. Sums run over [`LANES`] strided
//! lanes (element i goes to lane i % 32, the tail included), which are added in one fixed tree.
//!
//! `exp` and `tanh` are our own: nothing here calls a mathematical library, whose bits vary.
//! A NaN goes in and comes out as *a* NaN; its payload is not part of the contract.

use std::ops::Range;

use crate::Isa;
use crate::format::each;
use crate::half::{bf16_to_f32, f16_to_f32, f32_to_f16};
use crate::tile::Tile;
use crate::wide::{AHEAD, prefetch};

/// Lanes of every f32 sum.
pub const LANES: usize = 32;

/// Positions whose keys lie together, and whose values do, as panels of (rows, 16): the rows of a key's panels are its dimensions
/// in [`key_order`], for sixteen positions; those of a value's are the positions, for sixteen dimensions, the last panel filled up.
pub const KEYS: usize = 64;

/// Numbers of a row of a panel.
pub const PANEL: usize = 16;

/// The order in which queries and keys of `dim` dimensions are stored for [`Ops::scores_f32`]: lane by lane, and the lanes
/// in the order in which their sums are added.
pub fn key_order(dim: usize) -> Vec<usize> {
    (0..LANES).flat_map(|turn| (lane_in_turn(turn)..dim).step_by(LANES)).collect()
}

/// The tree adds lane l + 16 to lane l first, then l + 8, …: so neighbours are lanes whose numbers read backwards, as bits,
/// are neighbours.
#[inline(always)]
const fn lane_in_turn(turn: usize) -> usize {
    turn.reverse_bits() >> (usize::BITS - LANES.ilog2())
}

/// Splits lines into groups of four, then two, then one: as [`Ops::scores_f32`] takes queries.
pub fn line_groups(lines: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut start = lines.start;
    std::iter::from_fn(move || {
        let size = match lines.end - start {
            0 => return None,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        start += size;
        Some(start - size..start)
    })
}

/// How many of `dim` elements go to `lane`.
#[inline(always)]
const fn lane_len(dim: usize, lane: usize) -> usize {
    dim / LANES + (lane < dim % LANES) as usize
}

/// e^x, relative error below 3e-7; 0 below −87.33 (where f32 would become subnormal), infinite above 88.72.
///
/// x = n·ln 2 + r with n an integer and |r| ≤ ln 2 / 2 (Cody and Waite: ln 2 in two parts, so that n·hi
/// is exact), then the Taylor polynomial of degree 7, whose remainder is r^8/8! < 6e-9.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.33;
    const HIGHEST: f32 = 88.73;
    const LN2_HI: f32 = 0.693_359_4; // 355/512
    const LN2_LO: f32 = -2.121_944_4e-4;
    // 1.5·2^23: adding it leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // Written so that NaN passes both comparisons and reaches the result through r.
    let low = if x < LOWEST { LOWEST } else { x };
    let c = if low > HIGHEST { HIGHEST } else { low };
    let rounded = c.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, c));
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = r.mul_add(p, c);
    }
    // 2^n in two factors, because n may be 128.
    let n = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let y = p * power(half) * power(n.wrapping_sub(half));
    if x < LOWEST { 0.0 } else { y }
}

/// tanh x, absolute error below 2e-7 (relative below 5e-7, also near 0).
///
/// (1 − e)/(1 + e) with e = exp(−2|x|); below 0.25, where that would cancel, the Taylor polynomial of
/// degree 9.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let e = exp(-2.0 * a);
    let large = (1.0 - e) / (1.0 + e);
    let t = a * a;
    let mut p = 62.0 / 2835.0;
    for c in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0] {
        p = t.mul_add(p, c);
    }
    let small = (a * t).mul_add(p, a);
    (if a < 0.25 { small } else { large }).copysign(x)
}

/// What an instance does with the CPU's own instructions where the compiler would not find them: halves,
/// and the sum of the lanes. Same bits on every ISA.
pub(crate) trait Native {
    /// How far ahead of what is read from memory more is asked for.
    const AHEAD: usize = AHEAD;

    fn load(h: &[u16; 8]) -> [f32; 8];
    fn store(x: &[f32; 8]) -> [u16; 8];
    /// Adds lane l + 16 to lane l, then l + 8, l + 4, l + 2, l + 1.
    fn tree(lanes: [f32; LANES]) -> f32;
    /// The end of eight such trees: of each eight lanes, adds lane l + 4 to lane l, then l + 2, l + 1.
    fn trees(eights: &[[f32; 8]; 8]) -> [f32; 8];
}

/// A row of a panel of keys or values as it may be stored.
trait Sixteen: Copy {
    /// What it is made of.
    type Part: Copy;
    fn of(parts: &[Self::Part]) -> &[Self];
    fn load<H: Native>(&self) -> [[f32; 8]; 2];
}

impl Sixteen for [f32; 16] {
    type Part = f32;
    #[inline(always)]
    fn of(parts: &[f32]) -> &[Self] {
        parts.as_chunks().0
    }
    #[inline(always)]
    fn load<H: Native>(&self) -> [[f32; 8]; 2] {
        let x = self.as_chunks().0;
        [x[0], x[1]]
    }
}

/// Bits of IEEE halves.
impl Sixteen for [u16; 16] {
    type Part = u16;
    #[inline(always)]
    fn of(parts: &[u16]) -> &[Self] {
        parts.as_chunks().0
    }
    #[inline(always)]
    fn load<H: Native>(&self) -> [[f32; 8]; 2] {
        let x = self.as_chunks().0;
        [H::load(&x[0]), H::load(&x[1])]
    }
}

impl Sixteen for [i8; 16] {
    type Part = i8;
    #[inline(always)]
    fn of(parts: &[i8]) -> &[Self] {
        parts.as_chunks().0
    }
    #[inline(always)]
    fn load<H: Native>(&self) -> [[f32; 8]; 2] {
        let x = self.as_chunks::<8>().0;
        [each(|i| x[0][i] as f32), each(|i| x[1][i] as f32)]
    }
}

/// Nibbles, in two's complement: of sixteen, the first eight in the low halves of the bytes, the others in the high ones.
impl Sixteen for [u8; 8] {
    type Part = u8;
    #[inline(always)]
    fn of(parts: &[u8]) -> &[Self] {
        parts.as_chunks().0
    }
    #[inline(always)]
    fn load<H: Native>(&self) -> [[f32; 8]; 2] {
        let wide: [i32; 8] = each(|i| self[i] as i8 as i32);
        [each(|i| (wide[i] << 28 >> 28) as f32), each(|i| (wide[i] >> 4) as f32)]
    }
}

struct Software;
impl Native for Software {
    #[inline(always)]
    fn load(h: &[u16; 8]) -> [f32; 8] {
        each(|i| f16_to_f32(h[i]))
    }
    #[inline(always)]
    fn store(x: &[f32; 8]) -> [u16; 8] {
        each(|i| f32_to_f16(x[i]))
    }
    #[inline(always)]
    fn tree(mut lanes: [f32; LANES]) -> f32 {
        let mut n = LANES / 2;
        while n > 0 {
            for l in 0..n {
                lanes[l] += lanes[l + n];
            }
            n /= 2;
        }
        lanes[0]
    }
    #[inline(always)]
    fn trees(eights: &[[f32; 8]; 8]) -> [f32; 8] {
        each(|i| {
            let [a, b, c, d, e, f, g, h] = eights[i];
            ((a + e) + (c + g)) + ((b + f) + (d + h))
        })
    }
}

/// The bodies. `H` is the instance's [`Native`]; functions that need nothing of it ignore it.
mod body {
    #![forbid(unsafe_code)]
    use super::*;

    #[inline(always)]
    fn widen<H: Native>(h: &[u16; LANES]) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        for (o, h) in out.as_chunks_mut().0.iter_mut().zip(h.as_chunks().0) {
            *o = H::load(h);
        }
        out
    }

    #[inline(always)]
    pub fn dot<H: Native>(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0.0; LANES];
        assert_eq!(a.len(), b.len());
        let (a, a_tail) = a.as_chunks::<LANES>();
        let (b, b_tail) = b.as_chunks::<LANES>();
        for (a, b) in a.iter().zip(b) {
            for l in 0..LANES {
                lanes[l] = a[l].mul_add(b[l], lanes[l]);
            }
        }
        for (l, (a, b)) in a_tail.iter().zip(b_tail).enumerate() {
            lanes[l] = a.mul_add(*b, lanes[l]);
        }
        H::tree(lanes)
    }

    #[inline(always)]
    pub fn dot_pair<H: Native>(w: &[f32], a: &[f32], b: &[f32]) -> [f32; 2] {
        assert!(w.len() == a.len() && w.len() == b.len());
        let mut lanes = [[0.0; LANES]; 2];
        let (w, w_tail) = w.as_chunks::<LANES>();
        let (a, a_tail) = a.as_chunks::<LANES>();
        let (b, b_tail) = b.as_chunks::<LANES>();
        for ((w, a), b) in w.iter().zip(a).zip(b) {
            for l in 0..LANES {
                lanes[0][l] = w[l].mul_add(a[l], lanes[0][l]);
                lanes[1][l] = w[l].mul_add(b[l], lanes[1][l]);
            }
        }
        for (l, ((w, a), b)) in w_tail.iter().zip(a_tail).zip(b_tail).enumerate() {
            lanes[0][l] = w.mul_add(*a, lanes[0][l]);
            lanes[1][l] = w.mul_add(*b, lanes[1][l]);
        }
        [H::tree(lanes[0]), H::tree(lanes[1])]
    }

    /// 1/√(mean square + eps).
    #[inline(always)]
    fn inverse_rms<H: Native>(x: &[f32], eps: f32) -> f32 {
        1.0 / (dot::<H>(x, x) / x.len() as f32 + eps).sqrt()
    }

    #[inline(always)]
    pub fn rms_norm<H: Native>(out: &mut [f32], x: &[f32], weight: Option<&[f32]>, eps: f32) {
        assert_eq!(out.len(), x.len());
        let r = inverse_rms::<H>(x, eps);
        match weight {
            Some(weight) => {
                assert_eq!(weight.len(), x.len());
                for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
                    *o = (x * r) * w;
                }
            }
            None => {
                for (o, x) in out.iter_mut().zip(x) {
                    *o = x * r;
                }
            }
        }
    }

    #[inline(always)]
    pub fn rms_norm_in_place<H: Native>(x: &mut [f32], weight: Option<&[f32]>, eps: f32) {
        let r = inverse_rms::<H>(x, eps);
        match weight {
            Some(weight) => {
                assert_eq!(weight.len(), x.len());
                for (x, w) in x.iter_mut().zip(weight) {
                    *x = (*x * r) * w;
                }
            }
            None => scale::<H>(x, r),
        }
    }

    #[inline(always)]
    pub fn add<H: Native>(out: &mut [f32], x: &[f32]) {
        assert_eq!(out.len(), x.len());
        for (o, x) in out.iter_mut().zip(x) {
            *o += x;
        }
    }

    #[inline(always)]
    pub fn scale<H: Native>(x: &mut [f32], f: f32) {
        for x in x {
            *x *= f;
        }
    }

    /// Sums of sixteen columns in `V` panels for each of `R` lines.
    type Sums<const R: usize, const V: usize> = [[[[f32; 8]; 2]; V]; R];

    /// Lines whose weights are gathered at a time.
    const LINES: usize = 8;

    /// Adds factor r times `row(v)` to the sums of line r and panel v.
    #[allow(clippy::needless_range_loop)] // constant indices keep arrays in registers
    #[inline(always)]
    fn add_row<H: Native, T: Sixteen, const R: usize, const V: usize>(
        acc: &mut Sums<R, V>,
        factor: [f32; R],
        row: impl Fn(usize) -> T,
    ) {
        for v in 0..V {
            let row = row(v).load::<H>();
            for r in 0..R {
                for half in 0..2 {
                    for l in 0..8 {
                        acc[r][v][half][l] = factor[r].mul_add(row[half][l], acc[r][v][half][l]);
                    }
                }
            }
        }
    }

    /// For each of `R` lines, adds `factor(i)` times row i of each of `V` panels, in order.
    #[allow(clippy::needless_range_loop)] // rows of several panels
    #[inline(always)]
    fn add_rows<H: Native, T: Sixteen, const R: usize, const V: usize>(
        acc: &mut Sums<R, V>,
        panels: [&[T]; V],
        factor: impl Fn(usize) -> [f32; R],
    ) {
        let rows = panels[0].len();
        for i in 0..rows / 4 {
            for panel in panels {
                let four = panel[..rows].as_chunks::<4>().0[i].as_ptr();
                for line in 0..size_of::<[T; 4]>().div_ceil(64) {
                    prefetch(four.wrapping_byte_add(H::AHEAD + 64 * line));
                }
            }
            for j in 0..4 {
                add_row::<H, T, R, V>(acc, factor(4 * i + j), |v| panels[v][..rows].as_chunks::<4>().0[i][j]);
            }
        }
        for i in rows / 4 * 4..rows {
            add_row::<H, T, R, V>(acc, factor(i), |v| panels[v][i]);
        }
    }

    /// Scores of `R` queries against the keys of `V` panels.
    ///
    /// The sums of single lanes come in the order in which the tree adds them, so that few are kept: `partial[i]` is the sum
    /// of 2^i lanes, waiting for the next 2^i, as a carry waits in a binary counter.
    #[allow(clippy::needless_range_loop)] // constant indices keep arrays in registers
    #[inline(always)]
    fn scores<H: Native, T: Sixteen, const R: usize, const V: usize>(
        out: &mut Tile,
        first: usize,
        q: &[f32],
        keys: &[T],
        panel: usize,
    ) {
        let q = q.as_chunks::<R>().0;
        let dim = q.len();
        let keys: [&[T]; V] = std::array::from_fn(|v| &keys[(panel + v) * dim..][..dim]);
        let mut partial = [[[[[0.0; 8]; 2]; V]; R]; LANES.ilog2() as usize + 1];
        let mut start = 0;
        for turn in 0..LANES {
            let end = start + lane_len(dim, lane_in_turn(turn));
            let mut acc = [[[[0.0; 8]; 2]; V]; R];
            let q = &q[start..end];
            let mut lane: [&[T]; V] = keys;
            for lane in &mut lane {
                *lane = &lane[start..end];
            }
            add_rows::<H, T, R, V>(&mut acc, lane, |i| q[i]);
            start = end;
            let mut level = 0;
            while turn >> level & 1 == 1 {
                for r in 0..R {
                    for v in 0..V {
                        for half in 0..2 {
                            for i in 0..8 {
                                acc[r][v][half][i] += partial[level][r][v][half][i];
                            }
                        }
                    }
                }
                level += 1;
            }
            partial[level] = acc;
        }
        for (r, sums) in partial[LANES.ilog2() as usize].iter().enumerate() {
            let sums = sums.as_flattened().as_flattened();
            out.row(first + r)[PANEL * panel..][..PANEL * V].copy_from_slice(sums);
        }
    }

    #[inline(always)]
    fn all_scores<H: Native, T: Sixteen>(out: &mut Tile, q: &[f32], keys: &[T::Part]) {
        let keys = T::of(keys);
        let (lines, dim) = (out.tokens(), keys.len() / (KEYS / PANEL));
        assert!(out.rows() == KEYS && q.len() == lines * dim && keys.len() == dim * (KEYS / PANEL));
        for panel in (0..KEYS / PANEL).step_by(2) {
            for lines in line_groups(0..lines) {
                let q = &q[lines.start * dim..lines.end * dim];
                match lines.len() {
                    4 => {
                        scores::<H, T, 4, 1>(out, lines.start, q, keys, panel);
                        scores::<H, T, 4, 1>(out, lines.start, q, keys, panel + 1);
                    }
                    2 => scores::<H, T, 2, 2>(out, lines.start, q, keys, panel),
                    _ => scores::<H, T, 1, 2>(out, lines.start, q, keys, panel),
                }
            }
        }
    }

    #[inline(always)]
    pub fn scores_f32<H: Native>(out: &mut Tile, q: &[f32], keys: &[f32]) {
        all_scores::<H, [f32; 16]>(out, q, keys);
    }

    #[inline(always)]
    pub fn scores_f16<H: Native>(out: &mut Tile, q: &[f32], keys: &[u16]) {
        all_scores::<H, [u16; 16]>(out, q, keys);
    }

    #[inline(always)]
    pub fn scores_i8<H: Native>(out: &mut Tile, q: &[f32], keys: &[i8], scale: &[f32]) {
        all_scores::<H, [i8; 16]>(out, q, keys);
        scale_scores(out, scale);
    }

    #[inline(always)]
    pub fn scores_i4<H: Native>(out: &mut Tile, q: &[f32], keys: &[u8], scale: &[f32]) {
        all_scores::<H, [u8; 8]>(out, q, keys);
        scale_scores(out, scale);
    }

    #[inline(always)]
    fn scale_scores(out: &mut Tile, scale: &[f32]) {
        assert_eq!(scale.len(), KEYS);
        for r in 0..out.tokens() {
            for (score, scale) in out.row(r).iter_mut().zip(scale) {
                *score *= scale;
            }
        }
    }

    /// Weighted sums of the columns of `V` panels of values, `column` the first of them, for `R` lines, `first` the first.
    #[inline(always)]
    fn weigh<H: Native, T: Sixteen, const R: usize, const V: usize>(
        out: &mut Tile,
        (first, column): (usize, usize),
        weights: &[[f32; KEYS]],
        panels: [&[T]; V],
    ) {
        let weights: &[[f32; KEYS]; R] = weights[..R].try_into().expect("R lines");
        let mut acc = [[[[0.0; 8]; 2]; V]; R];
        for (r, acc) in acc.iter_mut().enumerate() {
            acc.as_flattened_mut().as_flattened_mut().copy_from_slice(&out.row(first + r)[column..][..PANEL * V]);
        }
        add_rows::<H, T, R, V>(&mut acc, panels, |p| each(|r| weights[r][p]));
        for (r, acc) in acc.iter().enumerate() {
            out.row(first + r)[column..][..PANEL * V].copy_from_slice(acc.as_flattened().as_flattened());
        }
    }

    #[inline(always)]
    fn all_weigh<H: Native, T: Sixteen>(
        out: &mut Tile,
        (weights, stride, scale): (&[f32], usize, Option<&[f32]>),
        values: &[T::Part],
        positions: Range<usize>,
    ) {
        let values = T::of(values);
        assert!(values.len() == out.rows().div_ceil(PANEL) * KEYS && positions.end <= KEYS);
        assert!(scale.is_none_or(|scale| scale.len() == KEYS));
        let panel = |column: usize| &values[column / PANEL * KEYS..][..KEYS][positions.clone()];
        let whole = out.rows() / PANEL * PANEL;
        let mut w = [[0.0; KEYS]; LINES];
        for first in (0..out.tokens()).step_by(LINES) {
            let lines = first..(first + LINES).min(out.tokens());
            for (line, w) in lines.clone().zip(&mut w) {
                let w = &mut w[..positions.len()];
                w.copy_from_slice(&weights[line * stride..][..positions.len()]);
                if let Some(scale) = scale {
                    w.iter_mut().zip(&scale[positions.clone()]).for_each(|(w, scale)| *w *= scale);
                }
            }
            for column in (0..whole).step_by(2 * PANEL) {
                let (right, two) = (column + PANEL, column + PANEL < whole);
                for group in line_groups(lines.clone()) {
                    let (w, line) = (&w[group.start - first..], group.start);
                    match (group.len(), two) {
                        (4, _) => {
                            weigh::<H, T, 4, 1>(out, (line, column), w, [panel(column)]);
                            if two {
                                weigh::<H, T, 4, 1>(out, (line, right), w, [panel(right)]);
                            }
                        }
                        (2, true) => weigh::<H, T, 2, 2>(out, (line, column), w, [panel(column), panel(right)]),
                        (2, false) => weigh::<H, T, 2, 1>(out, (line, column), w, [panel(column)]),
                        (_, true) => weigh::<H, T, 1, 2>(out, (line, column), w, [panel(column), panel(right)]),
                        (_, false) => weigh::<H, T, 1, 1>(out, (line, column), w, [panel(column)]),
                    }
                }
            }
            if whole < out.rows() {
                // Part of a panel, as if it were whole.
                let mut part = [0.0; LINES * PANEL];
                let mut tile = Tile::whole(&mut part, PANEL);
                for line in lines.clone() {
                    let out = &out.row(line)[whole..];
                    tile.row(line - first)[..out.len()].copy_from_slice(out);
                }
                for line in 0..lines.len() {
                    weigh::<H, T, 1, 1>(&mut tile, (line, 0), &w[line..], [panel(whole)]);
                }
                for line in lines {
                    let out = &mut out.row(line)[whole..];
                    out.copy_from_slice(&tile.row(line - first)[..out.len()]);
                }
            }
        }
    }

    #[inline(always)]
    pub fn weigh_f32<H: Native>(
        out: &mut Tile,
        weights: &[f32],
        stride: usize,
        values: &[f32],
        positions: Range<usize>,
    ) {
        all_weigh::<H, [f32; 16]>(out, (weights, stride, None), values, positions);
    }

    #[inline(always)]
    pub fn weigh_f16<H: Native>(
        out: &mut Tile,
        weights: &[f32],
        stride: usize,
        values: &[u16],
        positions: Range<usize>,
    ) {
        all_weigh::<H, [u16; 16]>(out, (weights, stride, None), values, positions);
    }

    #[inline(always)]
    pub fn weigh_i8<H: Native>(
        out: &mut Tile,
        weights: &[f32],
        stride: usize,
        values: &[i8],
        scale: &[f32],
        positions: Range<usize>,
    ) {
        all_weigh::<H, [i8; 16]>(out, (weights, stride, Some(scale)), values, positions);
    }

    #[inline(always)]
    pub fn weigh_i4<H: Native>(
        out: &mut Tile,
        weights: &[f32],
        stride: usize,
        values: &[u8],
        scale: &[f32],
        positions: Range<usize>,
    ) {
        all_weigh::<H, [u8; 8]>(out, (weights, stride, Some(scale)), values, positions);
    }

    /// The largest element; NaN is passed over; −∞ if there is none.
    #[inline(always)]
    fn max(x: &[f32]) -> f32 {
        // NaN fails every comparison and is passed over.
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, tail) = x.as_chunks::<LANES>();
        for x in chunks {
            for l in 0..LANES {
                lanes[l] = larger(lanes[l], x[l]);
            }
        }
        for (l, x) in tail.iter().enumerate() {
            lanes[l] = larger(lanes[l], *x);
        }
        lanes.into_iter().fold(f32::NEG_INFINITY, larger)
    }

    #[inline(always)]
    pub fn softmax<H: Native>(x: &mut [f32]) {
        let top = max(x);
        let mut lanes = [0.0; LANES];
        let (chunks, tail) = x.as_chunks_mut::<LANES>();
        for x in chunks {
            for l in 0..LANES {
                x[l] = exp(x[l] - top);
                lanes[l] += x[l];
            }
        }
        for (l, x) in tail.iter_mut().enumerate() {
            *x = exp(*x - top);
            lanes[l] += *x;
        }
        scale::<H>(x, 1.0 / H::tree(lanes));
    }

    #[inline(always)]
    pub fn gelu_mul<H: Native>(gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len());
        const ROOT_2_OVER_PI: f32 = 0.797_884_6;
        for (g, u) in gate.iter_mut().zip(up) {
            let x = *g;
            let inner = (ROOT_2_OVER_PI * x) * (0.044715 * x).mul_add(x, 1.0);
            *g = ((0.5 * x) * (1.0 + tanh(inner))) * u;
        }
    }

    #[inline(always)]
    pub fn softcap<H: Native>(x: &mut [f32], cap: f32) {
        for x in x {
            *x = cap * tanh(*x / cap);
        }
    }

    #[inline(always)]
    pub fn rope<H: Native>(x: &mut [f32], cos: &[f32], sin: &[f32]) {
        assert!(x.len() == 2 * cos.len() && cos.len() == sin.len());
        let (low, high) = x.split_at_mut(cos.len());
        for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let (x, y) = (*a, *b);
            *a = x.mul_add(*c, -(y * s));
            *b = y.mul_add(*c, x * s);
        }
    }

    #[inline(always)]
    pub fn store_f16<H: Native>(out: &mut [u16], x: &[f32]) {
        assert_eq!(out.len(), x.len());
        let (out, out_tail) = out.as_chunks_mut::<8>();
        let (x, x_tail) = x.as_chunks();
        for (o, x) in out.iter_mut().zip(x) {
            *o = H::store(x);
        }
        for (o, x) in out_tail.iter_mut().zip(x_tail) {
            *o = f32_to_f16(*x);
        }
    }

    #[inline(always)]
    pub fn amax<H: Native>(x: &[f32]) -> f32 {
        // As bits, so that infinity and NaN win over every number.
        let mut lanes = [0; 8];
        let (eights, tail) = x.as_chunks::<8>();
        for x in eights {
            for l in 0..8 {
                lanes[l] = lanes[l].max(x[l].to_bits() & 0x7fff_ffff);
            }
        }
        for x in tail {
            lanes[0] = lanes[0].max(x.to_bits() & 0x7fff_ffff);
        }
        f32::from_bits(lanes.into_iter().fold(0, u32::max))
    }

    #[inline(always)]
    pub fn store_i8<H: Native>(out: &mut [i8], x: &[f32], scale: f32, top: i8) {
        assert_eq!(out.len(), x.len());
        let (low, high) = (-1.0 - top as f32, top as f32);
        for (q, x) in out.iter_mut().zip(x) {
            let y = x / scale;
            // Comparisons that NaN fails; the additions round.
            let above = if y > low { y } else { low };
            let c = if above < high { above } else { high };
            *q = (c + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i8;
        }
    }

    /// Dot product of little-endian weights, `N` bytes each, with f32.
    #[inline(always)]
    fn dot_bytes<H: Native, const N: usize>(w: &[u8], x: &[f32], value: impl Fn([u8; N]) -> f32) -> f32 {
        let (w, rest) = w.as_chunks::<N>();
        assert!(rest.is_empty() && w.len() == x.len());
        let mut lanes = [0.0; LANES];
        let (w, w_tail) = w.as_chunks::<LANES>();
        let (x, x_tail) = x.as_chunks::<LANES>();
        for (w, x) in w.iter().zip(x) {
            for line in (0..size_of_val(w)).step_by(64) {
                prefetch(w.as_ptr().wrapping_byte_add(H::AHEAD + line));
            }
            for l in 0..LANES {
                lanes[l] = value(w[l]).mul_add(x[l], lanes[l]);
            }
        }
        for (l, (w, x)) in w_tail.iter().zip(x_tail).enumerate() {
            lanes[l] = value(*w).mul_add(*x, lanes[l]);
        }
        H::tree(lanes)
    }

    #[inline(always)]
    pub fn dot_f32_bytes<H: Native>(w: &[u8], x: &[f32]) -> f32 {
        dot_bytes::<H, _>(w, x, f32::from_le_bytes)
    }

    #[inline(always)]
    pub fn dot_f16_bytes<H: Native>(w: &[u8], x: &[f32]) -> f32 {
        let (w, rest) = w.as_chunks::<2>();
        assert!(rest.is_empty() && w.len() == x.len());
        let mut lanes = [0.0; LANES];
        let (w, w_tail) = w.as_chunks::<LANES>();
        let (x, x_tail) = x.as_chunks::<LANES>();
        for (w, x) in w.iter().zip(x) {
            prefetch(w.as_ptr().wrapping_byte_add(H::AHEAD));
            let w = widen::<H>(&each(|l| u16::from_le_bytes(w[l])));
            for l in 0..LANES {
                lanes[l] = w[l].mul_add(x[l], lanes[l]);
            }
        }
        for (l, (w, x)) in w_tail.iter().zip(x_tail).enumerate() {
            lanes[l] = f16_to_f32(u16::from_le_bytes(*w)).mul_add(*x, lanes[l]);
        }
        H::tree(lanes)
    }

    #[inline(always)]
    pub fn widen_f16_bytes<H: Native>(out: &mut [f32], w: &[u8]) {
        let (w, rest) = w.as_chunks::<2>();
        assert!(rest.is_empty() && w.len() == out.len());
        let (w, w_tail) = w.as_chunks::<8>();
        let (out, out_tail) = out.as_chunks_mut::<8>();
        for (out, w) in out.iter_mut().zip(w) {
            *out = H::load(&each(|l| u16::from_le_bytes(w[l])));
        }
        for (out, w) in out_tail.iter_mut().zip(w_tail) {
            *out = f16_to_f32(u16::from_le_bytes(*w));
        }
    }

    #[inline(always)]
    pub fn dot_bf16_bytes<H: Native>(w: &[u8], x: &[f32]) -> f32 {
        dot_bytes::<H, _>(w, x, |b| bf16_to_f32(u16::from_le_bytes(b)))
    }

    #[inline(always)]
    pub fn quantize<H: Native>(x: &[f32], q: &mut [i8], scale: &mut [f32], sums: &mut [i16]) {
        let (x, rest) = x.as_chunks();
        let (q, q_rest) = q.as_chunks_mut();
        let (sums, sums_rest) = sums.as_chunks_mut();
        assert!(rest.is_empty() && q_rest.is_empty() && sums_rest.is_empty());
        assert!(x.len() == q.len() && x.len() == scale.len() && x.len() == sums.len());
        for (((x, q), scale), sums) in x.iter().zip(&mut *q).zip(&mut *scale).zip(&mut *sums) {
            let top = amax::<H>(x);
            *scale = if top < TINY { 0.0 } else { top };
            if !(TINY..=f32::MAX).contains(&top) {
                // All but zero, or damaged: a non-finite scale makes every product with the group non-finite.
                (*q, *sums) = ([0; 32], [0; 2]);
            }
        }
        let (x, q, scale, sums) = (x.chunks(8), q.chunks_mut(8), scale.chunks_mut(8), sums.chunks_mut(8));
        for (((x, q), scale), sums) in x.zip(q).zip(scale).zip(sums) {
            quantize_groups::<H>(x, q, scale, sums);
        }
    }

    /// Up to eight groups, so that what each has one of lies in lanes. `scale` holds their largest magnitudes; those for which it
    /// is 0 or not finite are done.
    #[allow(clippy::needless_range_loop)] // constant indices keep arrays in registers
    #[inline(always)]
    fn quantize_groups<H: Native>(x: &[[f32; 32]], q: &mut [[i8; 32]], scale: &mut [f32], sums: &mut [[i16; 2]]) {
        let mut top = [0.0; 8];
        top[..scale.len()].copy_from_slice(scale);
        let unit: [f32; 8] = each(|g| 1.0 / top[g]);
        let (mut best, mut best_inverse, mut best_scale) = ([-1.0; 8], [0.0; 8], [0.0; 8]);
        let (mut xq, mut qq) = ([[0.0; 8]; 8], [[0.0; 8]; 8]);
        for level in 0..LEVELS {
            let inverse: [f32; 8] = each(|g| (127.0 - STEP * level as f32) * unit[g]);
            for (g, x) in x.iter().enumerate() {
                let (mut xq4, mut qq4) = ([[0.0; 8]; 4], [[0.0; 8]; 4]);
                for (part, x) in x.as_chunks::<8>().0.iter().enumerate() {
                    for l in 0..8 {
                        let q = x[l].mul_add(inverse[g], ROUND) - ROUND;
                        xq4[part][l] = x[l] * unit[g] * q;
                        qq4[part][l] = q * q;
                    }
                }
                // The first steps of the tree.
                let halves = |[a, b, c, d]: [[f32; 8]; 4]| each(|l| (a[l] + c[l]) + (b[l] + d[l]));
                (xq[g], qq[g]) = (halves(xq4), halves(qq4));
            }
            let (xq, qq) = (H::trees(&xq), H::trees(&qq)); // by group
            for g in 0..8 {
                let explained = xq[g] * xq[g] / qq[g];
                let better = explained > best[g];
                best[g] = if better { explained } else { best[g] };
                best_inverse[g] = if better { inverse[g] } else { best_inverse[g] };
                best_scale[g] = if better { xq[g] / qq[g] * top[g] } else { best_scale[g] };
            }
        }
        for (g, x) in x.iter().enumerate() {
            if top[g] == 0.0 || !top[g].is_finite() {
                continue;
            }
            scale[g] = best_scale[g];
            let nearest: [i32; 32] = each(|l| {
                let nearest = x[l].mul_add(best_inverse[g], ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
                nearest.clamp(-127, 127)
            });
            q[g] = each(|l| nearest[l] as i8);
            sums[g] = each(|half| nearest[16 * half..][..16].iter().sum::<i32>() as i16);
        }
    }

    #[inline(always)]
    pub fn quantize_static<H: Native>(x: &[f32], scale: f32, q: &mut [i8], sums: &mut [i16]) -> bool {
        assert!(x.len().is_multiple_of(16) && x.len() == q.len() && x.len() == 16 * sums.len());
        let (x, x_last) = x.as_chunks::<32>();
        let (q, q_last) = q.as_chunks_mut::<32>();
        let (sums, sum_last) = sums.as_chunks_mut::<2>();
        // Of 32 at a time compilers make vectors, of 16 they do not.
        let mut damaged = [0; 32];
        for ((x, q), sums) in x.iter().zip(q).zip(sums) {
            damaged = each(|l| damaged[l] | !x[l].is_finite() as i32);
            (*q, *sums) = static_codes(x, scale);
        }
        if let [sum] = sum_last {
            let mut last = [0.0; 32];
            last[..16].copy_from_slice(x_last);
            damaged = each(|l| damaged[l] | !last[l].is_finite() as i32);
            let (codes, sums) = static_codes(&last, scale);
            q_last.copy_from_slice(&codes[..16]);
            *sum = sums[0];
        }
        damaged == [0; 32]
    }

    /// ROUND plus x/scale within −128..=127: the addition rounds. NaN fails the first comparison.
    #[inline(always)]
    fn static_code(x: f32, scale: f32) -> f32 {
        let y = x / scale;
        let low = if y > -128.0 { y } else { -128.0 };
        let c = if low < 127.0 { low } else { 127.0 };
        c + ROUND
    }

    /// The codes of 32 values, and the sums of each half.
    #[inline(always)]
    fn static_codes(x: &[f32; 32], scale: f32) -> ([i8; 32], [i16; 2]) {
        let nearest: [i32; 32] = each(|l| static_code(x[l], scale).to_bits().wrapping_sub(ROUND.to_bits()) as i32);
        (each(|l| nearest[l] as i8), each(|half| nearest[16 * half..][..16].iter().sum::<i32>() as i16))
    }

    #[inline(always)]
    pub fn round_static<H: Native>(x: &mut [f32], scale: f32) {
        for x in x {
            *x = if x.is_finite() { (static_code(*x, scale) - ROUND) * scale } else { f32::NAN };
        }
    }

    /// Below this, 127/amax could overflow; such a group counts as zero.
    const TINY: f32 = 1e-30;
    /// Scales tried for a group: the largest magnitude becomes 127, 127 − STEP, 127 − 2·STEP, …
    const LEVELS: usize = 10;
    const STEP: f32 = 0.5;
    /// 1.5·2^23: adding it rounds to the nearest integer, half to even, see `exp`.
    const ROUND: f32 = 12_582_912.0;
}

/// Passes the signature of every function to a macro, after what is to stand before them.
macro_rules! functions {
    ($then:ident! $($first:tt)*) => {
        $then! { $($first)*
            /// Σ a·b. In every dot product and sum, element i goes to lane i % 32.
            fn dot(a: &[f32], b: &[f32]) -> f32;
            /// Two dot products that share a side: Σ w·a and Σ w·b.
            fn dot_pair(w: &[f32], a: &[f32], b: &[f32]) -> [f32; 2];
            /// Σ w·x with `w` as little-endian f32, unaligned.
            fn dot_f32_bytes(w: &[u8], x: &[f32]) -> f32;
            /// Σ w·x with `w` as little-endian halves, unaligned.
            fn dot_f16_bytes(w: &[u8], x: &[f32]) -> f32;
            /// out = w with `w` as little-endian halves, unaligned.
            fn widen_f16_bytes(out: &mut [f32], w: &[u8]);
            /// Σ w·x with `w` as little-endian bfloat16, unaligned.
            fn dot_bf16_bytes(w: &[u8], x: &[f32]) -> f32;
            /// out = (x·r)·weight with r = 1/√(mean x² + eps); without a weight, x·r.
            fn rms_norm(out: &mut [f32], x: &[f32], weight: Option<&[f32]>, eps: f32);
            /// `rms_norm` with x as its own output.
            fn rms_norm_in_place(x: &mut [f32], weight: Option<&[f32]>, eps: f32);
            /// out += x.
            fn add(out: &mut [f32], x: &[f32]);
            /// x *= f.
            fn scale(x: &mut [f32], f: f32);
            /// out[r][p] = Σ q[r]·keys[p], with the bits of `dot`, for the [`KEYS`] keys of the panels and any number of queries,
            /// which are stored by [`line_groups`], each group as (dim, queries), the dimensions in [`key_order`].
            fn scores_f32(out: &mut Tile<'_>, q: &[f32], keys: &[f32]);
            /// `scores_f32` with the keys as bits of IEEE halves.
            fn scores_f16(out: &mut Tile<'_>, q: &[f32], keys: &[u16]);
            /// `scores_f32` with keys int8 · `scale`, one scale for each of the [`KEYS`] keys, by which its scores are multiplied
            /// last.
            fn scores_i8(out: &mut Tile<'_>, q: &[f32], keys: &[i8], scale: &[f32]);
            /// `scores_i8` with the integers as nibbles in two's complement: of the sixteen of a row the first eight in the low
            /// halves of eight bytes, the others in the high ones.
            fn scores_i4(out: &mut Tile<'_>, q: &[f32], keys: &[u8], scale: &[f32]);
            /// out[r] = fma(weights[r][i], value, out[r]) for the value of each of `positions`, the i-th of them, in order. Lines
            /// of `weights` are `stride` apart. `values` are the panels of out's columns, of [`KEYS`] positions each.
            fn weigh_f32(out: &mut Tile<'_>, weights: &[f32], stride: usize, values: &[f32], positions: Range<usize>);
            /// `weigh_f32` with the values as bits of IEEE halves.
            fn weigh_f16(out: &mut Tile<'_>, weights: &[f32], stride: usize, values: &[u16], positions: Range<usize>);
            /// `weigh_f32` with values int8 · `scale`, one scale for each of the [`KEYS`] values, by which weights are multiplied
            /// first.
            fn weigh_i8(
                out: &mut Tile<'_>, weights: &[f32], stride: usize, values: &[i8], scale: &[f32], positions: Range<usize>
            );
            /// `weigh_i8` with the integers as nibbles, which lie as those of `scores_i4`.
            fn weigh_i4(
                out: &mut Tile<'_>, weights: &[f32], stride: usize, values: &[u8], scale: &[f32], positions: Range<usize>
            );
            /// x = exp(x − max x) / Σ exp(x − max x). A NaN makes all of them NaN.
            fn softmax(x: &mut [f32]);
            /// gate = gelu(gate)·up, gelu(x) = 0.5·x·(1 + tanh(√(2/π)·x·(1 + 0.044715·x²))).
            fn gelu_mul(gate: &mut [f32], up: &[f32]);
            /// x = cap·tanh(x/cap).
            fn softcap(x: &mut [f32], cap: f32);
            /// Rotates the pairs (x[i], x[i + n/2]) of one head by the angles whose cosines and sines are given:
            /// (a, b) becomes (fma(a, cos, −(b·sin)), fma(b, cos, a·sin)).
            fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]);
            /// Rounds to the nearest half, ties to even; beyond ±65504 saturates; keeps NaN.
            fn store_f16(out: &mut [u16], x: &[f32]);
            /// The largest magnitude; infinite or NaN if one is.
            fn amax(x: &[f32]) -> f32;
            /// out = x/scale rounded half to even, within −top−1..=top; the division is that of f32.
            fn store_i8(out: &mut [i8], x: &[f32], scale: f32, top: i8);
            /// int8 activations, see [`crate::acts`]: `q` as long as `x`, one `scale` for 32, one sum for 16.
            fn quantize(x: &[f32], q: &mut [i8], scale: &mut [f32], sums: &mut [i16]);
            /// q = x/scale rounded half to even, within −128..=127; the division is that of f32. One sum for 16. False if
            /// an x is infinite or NaN.
            fn quantize_static(x: &[f32], scale: f32, q: &mut [i8], sums: &mut [i16]) -> bool;
            /// x = scale · (x/scale rounded as by `quantize_static`); what is infinite becomes NaN.
            fn round_static(x: &mut [f32], scale: f32);
        }
    };
}

/// Declares [`Ops`].
macro_rules! table {
    ($($(#[doc = $doc:literal])* fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*) => {
        /// The functions of this module, compiled for one ISA. Get one with [`ops`].
        ///
        /// Functions that write take their output first. All panic if lengths do not match.
        pub struct Ops {
            /// The ISA these instances were compiled for.
            pub isa: Isa,
            $($name: fn($($ty),*) $(-> $ret)?,)*
        }

        impl Ops {
            /// The names of its functions.
            pub const NAMES: &[&str] = &[$(stringify!($name)),*];

            $(
                $(#[doc = $doc])*
                #[inline]
                pub fn $name(&self, $($arg: $ty),*) $(-> $ret)? {
                    (self.$name)($($arg),*)
                }
            )*
        }
    };
}

/// Compiles every body for one ISA: module name, ISA, its [`Native`], its target features (or any
/// attribute, where it needs none).
macro_rules! instance {
    (
        $module:ident $isa:ident $native:ty, #[$features:meta]
        $($(#[doc = $doc:literal])* fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*
    ) => {
        mod $module {
            use super::*;
            pub static OPS: Ops = Ops { isa: Isa::$isa, $($name),* };
            $(fn $name($($arg: $ty),*) $(-> $ret)? {
                #[$features]
                fn instance($($arg: $ty),*) $(-> $ret)? {
                    body::$name::<$native>($($arg),*)
                }
                #[allow(unused_unsafe)] // safe where the instance needs no features
                // SAFETY: `OPS` is reachable only through `ops`, which asserts that the CPU has the ISA.
                unsafe { instance($($arg),*) }
            })*
        }
    };
}

functions!(table!);
functions!(instance! scalar Scalar Software, #[inline]);
#[cfg(target_arch = "x86_64")]
functions!(instance! avx2 Avx2 crate::avx2::Avx2<AHEAD>, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
functions!(
    instance! avx512 Avx512 crate::avx2::Avx2<{ crate::wide::NEAR }>,
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
);
#[cfg(target_arch = "aarch64")]
functions!(instance! neon Neon crate::neon::Halves, #[target_feature(enable = "neon")]);

/// The instance for `isa`.
///
/// # Panics
/// If this CPU lacks the ISA.
pub fn ops(isa: Isa) -> &'static Ops {
    assert!(isa.supported(), "this CPU has no {}", isa.name());
    match isa {
        Isa::Scalar => &scalar::OPS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => &avx2::OPS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &avx512::OPS,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => &neon::OPS,
        #[allow(unreachable_patterns)] // none is left over on some architectures
        _ => unreachable!("not supported on this architecture"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 97th f32 of an interval of bit patterns, both signs.
    fn sweep(low: f32, high: f32) -> impl Iterator<Item = f32> {
        (low.to_bits()..high.to_bits()).step_by(97).map(f32::from_bits).flat_map(|x| [x, -x])
    }

    #[test]
    fn exp_is_within_3e_7() {
        let mut worst = 0f64;
        for x in sweep(1e-9, 88.72).filter(|x| *x >= -87.33) {
            let want = (x as f64).exp();
            worst = worst.max((exp(x) as f64 / want - 1.0).abs());
        }
        assert!(worst < 3e-7, "{worst}");
    }

    #[test]
    fn exp_at_its_limits() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::MIN_POSITIVE), 1.0);
        assert!(exp(-87.33) >= f32::MIN_POSITIVE);
        for x in [-87.34, -100.0, -1e30, f32::NEG_INFINITY] {
            assert_eq!(exp(x).to_bits(), 0, "{x}");
        }
        assert!(exp(88.72).is_finite());
        for x in [88.73, 89.0, 1e30, f32::INFINITY] {
            assert_eq!(exp(x), f32::INFINITY, "{x}");
        }
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_within_2e_7_and_5e_7_of_the_value() {
        let (mut absolute, mut relative) = (0f64, 0f64);
        for x in sweep(1e-9, 20.0) {
            let want = (x as f64).tanh();
            absolute = absolute.max((tanh(x) as f64 - want).abs());
            relative = relative.max((tanh(x) as f64 / want - 1.0).abs());
        }
        assert!(absolute < 2e-7 && relative < 5e-7, "{absolute} {relative}");
        for (x, want) in [(0.0, 0.0), (-0.0, -0.0), (1e30, 1.0), (f32::NEG_INFINITY, -1.0)] {
            assert_eq!(tanh(x).to_bits(), f32::to_bits(want), "{x}");
        }
        assert!(tanh(f32::NAN).is_nan());
    }
}
