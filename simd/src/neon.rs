//! Vectors of aarch64: NEON as every ARMv8 CPU has it, eight rows in two vectors of 128 bits.
//!
//! The one idea: [`Neon`] is all of [`Simd`] but the dot products ([`Dot`]), which `neon_dot.rs` and `neon_i8mm.rs` do
//! by instructions of their own. This file's are [`Mull`]: bytes are multiplied into 16 bits, as many products are added
//! there as the span of the weights allows, then pairs are added into 32 bits.
//!
//! ```text
//! weights       row 0: k k k k | row 1: k k k k | row 2: k k k k | row 3: k k k k      (one vector; four more rows: another)
//! activations          k k k k |        k k k k |        k k k k |        k k k k
//! smull, smlal ..      8 sums of rows 0 and 1            smull2, smlal2 ..      8 sums of rows 2 and 3
//! addp                 2 sums of each row
//! sadalp               rows 0, 1, 2, 3
//! ```

use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

use crate::Isa;
use crate::format::Block;
use crate::vec::LANES;
use crate::wide::{AHEAD, Eight, Product, Range, Simd, Vectors, halves, proven, unrolled};

/// Bytes: rows 0..4 and 4..8, or the two halves of 32 bytes of one row.
pub(crate) type Bytes = [uint8x16_t; 2];
/// An i32 for each of eight rows.
pub(crate) type Ints = [int32x4_t; 2];

/// Integer dot products of 128-bit vectors.
pub(crate) trait Dot: Copy {
    const ISA: Isa;
    fn new() -> Option<Self>;
    /// The way into code compiled for this ISA.
    fn enter<B: Block>(s: Neon<Self>, product: Product<B>);
    /// `acc` plus products of 4·N weights of each row, four in each of `w`, with the first 4·N of `a`.
    fn dot<const N: usize>(acc: Ints, w: [Bytes; N], a: &[i8], range: Range) -> Ints;
    /// The products of 16 weights of one row with 16 activations, some of them added in each lane.
    fn row(w: uint8x16_t, a: int8x16_t, range: Range) -> int32x4_t;
    /// The same of 32.
    fn row32(w: Bytes, a: [int8x16_t; 2], range: Range) -> int32x4_t;
    /// [`Vectors::panel`].
    #[inline(always)]
    fn panel(w: [Bytes; 8]) -> [Bytes; 8] {
        w
    }
    /// [`Dot::dot`] for several tokens, of weights in the order of [`Dot::panel`].
    #[inline(always)]
    fn panel_dot<const N: usize, const K: usize, const T: usize>(
        acc: [Ints; T],
        w: [Bytes; N],
        a: [&[i8; K]; T],
        range: Range,
    ) -> [Ints; T] {
        let mut acc = acc;
        unrolled!(t < T, {
            acc[t] = Self::dot(acc[t], w, a[t], range);
        });
        acc
    }
    /// [`Simd::Sums`] and [`Simd::NARROW`].
    type Sums: Copy;
    const NARROW: bool = false;
    /// [`Simd::no_sums`], [`Simd::crumbs`], [`Simd::nibbles`], [`Simd::bytes`].
    fn no_sums() -> Self::Sums;
    fn crumbs(sums: Self::Sums, w: Bytes, a: [Bytes; 4]) -> Self::Sums;
    fn nibbles(sums: Self::Sums, w: Bytes, a: [Bytes; 2]) -> Self::Sums;
    fn bytes(sums: Self::Sums, w: Bytes, a: Bytes) -> Self::Sums;
    /// [`Simd::widen`]: one vector takes all sums of a row.
    fn widen(total: int32x4_t, sums: Self::Sums, bits: usize) -> int32x4_t;
    /// For each of four rows, the products of its 32 nibbles with the activations.
    fn nibbles_of_rows(rows: [uint8x16_t; 4], a: [int8x16_t; 2]) -> int32x4_t;
}

/// Eight rows in pairs of 128-bit vectors. A value proves that the CPU has NEON, and what `D` needs.
#[derive(Clone, Copy)]
pub(crate) struct Neon<D>(PhantomData<D>);

/// `f` of both vectors.
#[inline(always)]
fn both<A: Copy, B>(a: [A; 2], f: impl Fn(A) -> B) -> [B; 2] {
    [f(a[0]), f(a[1])]
}

/// `f` of both pairs of vectors.
#[inline(always)]
fn zip<A: Copy, B: Copy, C>(a: [A; 2], b: [B; 2], f: impl Fn(A, B) -> C) -> [C; 2] {
    [f(a[0], b[0]), f(a[1], b[1])]
}

impl<D: Dot> Vectors for Neon<D> {
    type B = Bytes;
    type I = Ints;
    type F = [float32x4_t; 2];
    type Eight = Self;

    const ROWS: usize = 8;
    const SIGNED_BIAS: i32 = 0;

    #[inline(always)]
    fn eight(self) -> Self {
        self
    }

    #[inline(always)]
    fn load(self, groups: [&[u8; 32]; 2]) -> Bytes {
        self.load32(groups[0])
    }
    #[inline(always)]
    fn splat_u8(self, value: u8) -> Bytes {
        proven!([vdupq_n_u8(value); 2])
    }

    #[inline(always)]
    fn splat(self, value: i32) -> Ints {
        proven!([vdupq_n_s32(value); 2])
    }
    #[inline(always)]
    fn load_i32(self, from: &[i32; 16]) -> Ints {
        proven!([vld1q_s32(from.as_ptr()), vld1q_s32(from[4..].as_ptr())])
    }
    #[inline(always)]
    fn store_i32(self, v: Ints, to: &mut [i32; 16]) {
        proven!({
            vst1q_s32(to.as_mut_ptr(), v[0]);
            vst1q_s32(to[4..].as_mut_ptr(), v[1]);
        });
    }
    #[inline(always)]
    fn add(self, a: Ints, b: Ints) -> Ints {
        zip(a, b, |a, b| proven!(vaddq_s32(a, b)))
    }
    #[inline(always)]
    fn mul(self, a: Ints, b: Ints) -> Ints {
        zip(a, b, |a, b| proven!(vmulq_s32(a, b)))
    }

    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat_f32(0.0)
    }
    #[inline(always)]
    fn splat_f32(self, value: f32) -> Self::F {
        proven!([vdupq_n_f32(value); 2])
    }
    #[inline(always)]
    fn load_f32(self, from: &[f32; 16]) -> Self::F {
        proven!([vld1q_f32(from.as_ptr()), vld1q_f32(from[4..].as_ptr())])
    }
    #[inline(always)]
    fn store_f32(self, v: Self::F, to: &mut [f32; 16]) {
        proven!({
            vst1q_f32(to.as_mut_ptr(), v[0]);
            vst1q_f32(to[4..].as_mut_ptr(), v[1]);
        });
    }
    #[inline(always)]
    fn to_f32(self, v: Ints) -> Self::F {
        both(v, |v| proven!(vcvtq_f32_s32(v)))
    }
    #[inline(always)]
    fn mul_f32(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| proven!(vmulq_f32(a, b)))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        proven!([vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])])
    }
    #[inline(always)]
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        proven!([vfmsq_f32(c[0], a[0], b[0]), vfmsq_f32(c[1], a[1], b[1])])
    }

    #[inline(always)]
    fn dot16(self, acc: Ints, w: [Bytes; 4], a: &[i8; 16], range: Range) -> Ints {
        D::dot(acc, w, a, range)
    }
    #[inline(always)]
    fn dot32(self, acc: Ints, w: [Bytes; 8], a: &[i8; 32], range: Range) -> Ints {
        D::dot(acc, w, a, range)
    }
    #[inline(always)]
    fn dot16_scaled(self, acc: Ints, w: [Bytes; 4], a: &[i8; 16], range: Range, scale: Ints) -> Ints {
        let products = self.dot16(self.splat(0), w, a, range);
        proven!([vmlaq_s32(acc[0], products[0], scale[0]), vmlaq_s32(acc[1], products[1], scale[1])])
    }
    #[inline(always)]
    fn panel(self, w: [Bytes; 8]) -> [Bytes; 8] {
        D::panel(w)
    }
    #[inline(always)]
    fn panel_dot32<const T: usize>(self, acc: [Ints; T], w: [Bytes; 8], a: [&[i8; 32]; T], range: Range) -> [Ints; T] {
        D::panel_dot(acc, w, a, range)
    }
    #[inline(always)]
    fn panel_dot16_scaled<const T: usize>(
        self,
        acc: [Ints; T],
        w: [Bytes; 4],
        a: [&[i8; 16]; T],
        range: Range,
        scale: Ints,
    ) -> [Ints; T] {
        scaled(acc, D::panel_dot([self.splat(0); T], w, a, range), scale)
    }
    #[inline(always)]
    fn panel_dot32_scaled<const T: usize>(
        self,
        acc: [Ints; T],
        w: [Bytes; 8],
        a: [&[i8; 32]; T],
        range: Range,
        scale: Ints,
    ) -> [Ints; T] {
        scaled(acc, D::panel_dot([self.splat(0); T], w, a, range), scale)
    }
    #[inline(always)]
    fn weighted(self, scales: [Ints; 2], sums: &[i16; 2]) -> Ints {
        let sums = [sums[0] as i32, sums[1] as i32];
        zip(scales[0], scales[1], |a, b| proven!(vmlaq_n_s32(vmulq_n_s32(a, sums[0]), b, sums[1])))
    }
}

impl<D: Dot> Simd for Neon<D> {
    type Sums = D::Sums;
    type Many = Self;

    const ISA: Isa = D::ISA;
    const TURN: usize = 4;
    const NARROW: bool = D::NARROW;

    #[inline(always)]
    fn new() -> Option<Self> {
        D::new().filter(|_| Isa::Neon.supported()).map(|_| Neon(PhantomData))
    }
    #[inline(always)]
    fn many(self) -> Self {
        self
    }
    #[inline(always)]
    fn enter<B: Block>(self, product: Product<B>) {
        D::enter(self, product);
    }

    #[inline(always)]
    fn field(self, b: Bytes, shift: usize, mask: u8) -> Bytes {
        both(b, |b| {
            let b = if shift == 0 { b } else { proven!(vshlq_u8(b, vdupq_n_s8(-(shift as i8)))) };
            // The shift alone leaves no other bits.
            if mask == 255 >> shift { b } else { proven!(vandq_u8(b, vdupq_n_u8(mask))) }
        })
    }
    #[inline(always)]
    fn shl(self, b: Bytes, n: usize) -> Bytes {
        both(b, |b| proven!(vshlq_u8(b, vdupq_n_s8(n as i8))))
    }
    #[inline(always)]
    fn or(self, a: Bytes, b: Bytes) -> Bytes {
        zip(a, b, |a, b| proven!(vorrq_u8(a, b)))
    }
    #[inline(always)]
    fn look_up(self, table: &[i8; 16], indices: Bytes) -> Bytes {
        both(indices, |i| proven!(vqtbl1q_u8(vreinterpretq_u8_s8(vld1q_s8(table.as_ptr())), i)))
    }
    #[inline(always)]
    fn sub(self, a: Ints, b: Ints) -> Ints {
        zip(a, b, |a, b| proven!(vsubq_s32(a, b)))
    }
    #[inline(always)]
    fn or_i32(self, a: Ints, b: Ints) -> Ints {
        zip(a, b, |a, b| proven!(vorrq_s32(a, b)))
    }
    #[inline(always)]
    fn field_i32(self, v: Ints, shift: usize, mask: u32) -> Ints {
        both(v, |v| {
            proven!({
                let v = vshlq_u32(vreinterpretq_u32_s32(v), vdupq_n_s32(-(shift as i32)));
                vreinterpretq_s32_u32(vandq_u32(v, vdupq_n_u32(mask)))
            })
        })
    }
    #[inline(always)]
    fn shl_i32(self, v: Ints, n: usize) -> Ints {
        both(v, |v| proven!(vshlq_s32(v, vdupq_n_s32(n as i32))))
    }
    #[inline(always)]
    fn words(self, b: Bytes) -> Ints {
        both(b, |b| proven!(vreinterpretq_s32_u8(b)))
    }
    #[inline(always)]
    fn two_bytes(self, groups: [&[u8; 16]; 2]) -> [Ints; 2] {
        proven!({
            let pairs = vreinterpretq_s8_u8(vld1q_u8(groups[0].as_ptr()));
            let (even, odd) =
                (vmovl_s8(vget_low_s8(vuzp1q_s8(pairs, pairs))), vmovl_s8(vget_low_s8(vuzp2q_s8(pairs, pairs))));
            [widen(even), widen(odd)]
        })
    }
    #[inline(always)]
    fn halves(self, groups: [&[u8; 16]; 2]) -> Self::F {
        proven!(from_halves(vld1q_u8(groups[0].as_ptr())))
    }

    #[inline(always)]
    fn now(self, v: Self::F) -> Self::F {
        let [mut low, mut high] = v;
        if cfg!(not(miri)) {
            // SAFETY: no instruction at all.
            unsafe {
                asm!("/* {0:v} {1:v} */", inlateout(vreg) low, inlateout(vreg) high, options(nomem, nostack, preserves_flags))
            };
        }
        [low, high]
    }

    #[inline(always)]
    fn prefetch_lines(self, at: *const u8, streams: usize, lines: std::ops::Range<usize>) {
        for line in lines {
            prefetch_line(at.wrapping_add(self.ahead(streams) - AHEAD), line);
        }
    }

    #[inline(always)]
    fn first(self, v: Self::F) -> Self::F {
        let mut v = v;
        if cfg!(not(miri)) {
            // SAFETY: no instruction at all.
            unsafe {
                asm!("/* {0:v} {1:v} */", inlateout(vreg) v[0], inlateout(vreg) v[1], options(nostack, preserves_flags));
            }
        }
        v
    }

    #[inline(always)]
    fn load_i8(self, groups: [&[i8; 32]; 2]) -> Bytes {
        both(activations(groups[0]), |a| proven!(vreinterpretq_u8_s8(a)))
    }
    #[inline(always)]
    fn load_halves(self, groups: [[&[u8; 16]; 2]; 2]) -> Bytes {
        let [first, second] = groups[0];
        proven!([vld1q_u8(first.as_ptr()), vld1q_u8(second.as_ptr())])
    }
    #[inline(always)]
    fn no_sums(self) -> D::Sums {
        D::no_sums()
    }
    #[inline(always)]
    fn crumbs(self, sums: D::Sums, w: Bytes, a: [Bytes; 4]) -> D::Sums {
        D::crumbs(sums, w, a)
    }
    #[inline(always)]
    fn nibbles(self, sums: D::Sums, w: Bytes, a: [Bytes; 2]) -> D::Sums {
        D::nibbles(sums, w, a)
    }
    #[inline(always)]
    fn bytes(self, sums: D::Sums, w: Bytes, a: Bytes) -> D::Sums {
        D::bytes(sums, w, a)
    }
    #[inline(always)]
    fn widen(self, total: Ints, sums: D::Sums, bits: usize) -> Ints {
        [D::widen(total[0], sums, bits), total[1]]
    }
    #[inline(always)]
    fn across_lanes(self, totals: [Ints; 4]) -> [i32; 4] {
        let mut sums = [0; 4];
        let rows = [totals[0][0], totals[1][0], totals[2][0], totals[3][0]];
        proven!(vst1q_s32(sums.as_mut_ptr(), add_across(rows)));
        sums
    }
    #[inline(always)]
    fn start(self, sums: &[i16; 2], bias: i32) -> Ints {
        proven!({
            // A factor the compiler does not know: what it would do for a power of two takes more instructions.
            let mut factor = vdup_n_s16(-bias as i16);
            if cfg!(not(miri)) {
                asm!("/* {0:v} */", inlateout(vreg) factor, options(pure, nomem, nostack, preserves_flags));
            }
            let sums = vreinterpret_s16_s32(vdup_n_s32((sums[0] as u16 as u32 | (sums[1] as u16 as u32) << 16) as i32));
            [vmlal_lane_s16::<1>(vmull_lane_s16::<0>(factor, sums), factor, sums); 2]
        })
    }
}

impl<D: Dot> Eight for Neon<D> {
    #[inline(always)]
    fn load32(self, bytes: &[u8; 32]) -> Bytes {
        proven!([vld1q_u8(bytes.as_ptr()), vld1q_u8(bytes[16..].as_ptr())])
    }
    #[inline(always)]
    fn store(self, b: Bytes, to: &mut [u8; 32]) {
        proven!({
            vst1q_u8(to.as_mut_ptr(), b[0]);
            vst1q_u8(to[16..].as_mut_ptr(), b[1]);
        });
    }
    #[inline(always)]
    fn load_nibbles(self, bytes: &[u8; 16]) -> Bytes {
        proven!(nibbles(vld1q_u8(bytes.as_ptr())))
    }
    #[inline(always)]
    fn bits(self, bits: [u8; 4], value: u8) -> Bytes {
        proven!({
            // Byte i/8 in every byte, then its bit i%8.
            let zeros = vcombine_u8(vdup_n_u8(0), vdup_n_u8(1));
            let bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
            let bytes = vreinterpretq_u8_u32(vdupq_n_u32(u32::from_le_bytes(bits)));
            let value = vdupq_n_u8(value);
            [
                vandq_u8(vtstq_u8(vqtbl1q_u8(bytes, zeros), bit), value),
                vandq_u8(vtstq_u8(vqtbl1q_u8(bytes, vaddq_u8(zeros, vdupq_n_u8(2))), bit), value),
            ]
        })
    }
    #[inline(always)]
    fn half(self, bits: u16) -> f32 {
        proven!(vgetq_lane_f32::<0>(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits)))))
    }

    #[inline(always)]
    fn across16(self, w: [Bytes; 8], a: &[i8; 32], range: Range) -> [Ints; 2] {
        let a = activations(a);
        let mut sums = [self.splat(0); 2];
        for four in 0..2 {
            // A row at a time: fewer vectors wait for their turn.
            let mut rows = [[proven!(vdupq_n_s32(0)); 4]; 2];
            for i in 0..4 {
                for half in 0..2 {
                    rows[half][i] = D::row(w[4 * four + i][half], a[half], range);
                }
            }
            for half in 0..2 {
                sums[half][four] = add_across(rows[half]);
            }
        }
        sums
    }
    #[inline(always)]
    fn across32(self, w: [Bytes; 8], a: &[i8; 32], range: Range) -> Ints {
        let a = activations(a);
        let mut sums = self.splat(0);
        for (four, sum) in sums.iter_mut().enumerate() {
            let mut rows = [proven!(vdupq_n_s32(0)); 4];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = D::row32(w[4 * four + i], a, range);
            }
            *sum = add_across(rows);
        }
        sums
    }
    #[inline(always)]
    fn nibbles_across(self, rows: [&[u8; 16]; 8], a: &[i8; 32]) -> Ints {
        let a = activations(a);
        let mut sums = self.splat(0);
        for (four, sum) in sums.iter_mut().enumerate() {
            let mut q = [proven!(vdupq_n_u8(0)); 4];
            for (i, q) in q.iter_mut().enumerate() {
                *q = proven!(vld1q_u8(rows[4 * four + i].as_ptr()));
            }
            *sum = D::nibbles_of_rows(q, a);
        }
        sums
    }
    #[inline(always)]
    fn transpose(self, rows: [Bytes; 8]) -> [Bytes; 8] {
        let mut columns = rows;
        for half in 0..2 {
            for four in 0..2 {
                let from = 4 * four;
                let rows = [rows[from][half], rows[from + 1][half], rows[from + 2][half], rows[from + 3][half]];
                for (v, column) in four_columns(rows).into_iter().enumerate() {
                    columns[4 * half + v][four] = column;
                }
            }
        }
        columns
    }
}

/// `acc + scale·products` of each token.
#[inline(always)]
fn scaled<const T: usize>(acc: [Ints; T], products: [Ints; T], scale: Ints) -> [Ints; T] {
    let mut acc = acc;
    unrolled!(t < T, {
        acc[t] = zip(acc[t], zip(products[t], scale, |p, s| proven!(vmulq_s32(p, s))), |a, p| proven!(vaddq_s32(a, p)));
    });
    acc
}

// Pieces the files of this architecture share. They are called where the instructions are proven to be there.

/// Asks for a line, counted from [`AHEAD`] beyond `at`. An offset within the instruction spares one that adds.
#[inline(always)]
fn prefetch_line(at: *const u8, line: usize) {
    macro_rules! line {
        ($($n:literal)*) => {
            match line {
                // SAFETY: a prefetch reads nothing, and never faults.
                $($n => unsafe {
                    asm!("prfm pldl1keep, [{0}, {1}]", in(reg) at, const AHEAD + 64 * $n,
                        options(nostack, readonly, preserves_flags))
                },)*
                _ => prefetch_line(at.wrapping_add(64 * line), 0),
            }
        };
    }
    if cfg!(not(miri)) {
        line!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17);
    }
}

/// 32 activations.
#[inline(always)]
fn activations(a: &[i8; 32]) -> [int8x16_t; 2] {
    let (first, second) = halves(a);
    [load_i8(first), load_i8(second)]
}

/// 16 activations.
#[inline(always)]
pub(crate) fn load_i8(a: &[i8; 16]) -> int8x16_t {
    proven!(vld1q_s8(a.as_ptr()))
}

/// Low nibbles, then high nibbles.
#[inline(always)]
pub(crate) fn nibbles(b: uint8x16_t) -> Bytes {
    proven!([vandq_u8(b, vdupq_n_u8(15)), vshrq_n_u8::<4>(b)])
}

/// Eight halves as f32.
#[inline(always)]
fn from_halves(h: uint8x16_t) -> [float32x4_t; 2] {
    proven!({
        let h = vreinterpretq_f16_u8(h);
        [vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)]
    })
}

/// Eight i16 to eight i32.
#[inline(always)]
fn widen(v: int16x8_t) -> Ints {
    proven!([vmovl_s16(vget_low_s16(v)), vmovl_high_s16(v)])
}

/// The sum of the lanes of each of four vectors.
#[inline(always)]
pub(crate) fn add_across(v: [int32x4_t; 4]) -> int32x4_t {
    proven!(vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])))
}

/// Four vectors of four dwords, rows to columns.
#[inline(always)]
fn four_columns(rows: [uint8x16_t; 4]) -> [uint8x16_t; 4] {
    proven!({
        let mut r = [vdupq_n_u32(0); 4];
        for (r, row) in r.iter_mut().zip(rows) {
            *r = vreinterpretq_u32_u8(row);
        }
        // Columns 0 and 2, and 1 and 3, of two rows.
        let top = [vreinterpretq_u64_u32(vtrn1q_u32(r[0], r[1])), vreinterpretq_u64_u32(vtrn2q_u32(r[0], r[1]))];
        let bottom = [vreinterpretq_u64_u32(vtrn1q_u32(r[2], r[3])), vreinterpretq_u64_u32(vtrn2q_u32(r[2], r[3]))];
        [
            vreinterpretq_u8_u64(vtrn1q_u64(top[0], bottom[0])),
            vreinterpretq_u8_u64(vtrn1q_u64(top[1], bottom[1])),
            vreinterpretq_u8_u64(vtrn2q_u64(top[0], bottom[0])),
            vreinterpretq_u8_u64(vtrn2q_u64(top[1], bottom[1])),
        ]
    })
}

/// Dot products by `smull` and `smlal`.
#[derive(Clone, Copy)]
pub(crate) struct Mull;

/// How many products of weights and activations can be added in 16 bits.
#[inline(always)]
const fn fit(range: Range) -> usize {
    let largest = match range {
        Range::Unsigned(span) => span * 128,
        Range::Signed => 128 * 127,
        Range::Full => 128 * 128,
    };
    (i16::MAX as i32 / largest) as usize
}

/// Sums of products in 16 bits, of which pairs belong together, and what has been moved on to 32 bits.
#[derive(Clone, Copy)]
struct Sums {
    narrow: int16x8_t,
    wide: Option<int32x4_t>,
}

impl Sums {
    /// The first product: the low half of the vectors.
    #[inline(always)]
    fn low(w: int8x16_t, a: int8x16_t) -> Sums {
        Sums { narrow: proven!(vmull_s8(vget_low_s8(w), vget_low_s8(a))), wide: None }
    }
    /// The same of the high half.
    #[inline(always)]
    fn high(w: int8x16_t, a: int8x16_t) -> Sums {
        Sums { narrow: proven!(vmull_high_s8(w, a)), wide: None }
    }
    /// Another product into the same 16 bits, of the low half.
    #[inline(always)]
    fn plus_low(self, w: int8x16_t, a: int8x16_t) -> Sums {
        Sums { narrow: proven!(vmlal_s8(self.narrow, vget_low_s8(w), vget_low_s8(a))), ..self }
    }
    /// The same of the high half.
    #[inline(always)]
    fn plus_high(self, w: int8x16_t, a: int8x16_t) -> Sums {
        Sums { narrow: proven!(vmlal_high_s8(self.narrow, w, a)), ..self }
    }
    /// Another product where there is no more room in 16 bits.
    #[inline(always)]
    fn then(self, next: Sums) -> Sums {
        Sums { wide: Some(self.widen()), ..next }
    }
    /// All of it in 32 bits.
    #[inline(always)]
    fn widen(self) -> int32x4_t {
        proven!(match self.wide {
            Some(wide) => pair_add(wide, self.narrow),
            None => pairs(self.narrow),
        })
    }
}

/// Sums of pairs, in 32 bits.
#[inline(always)]
fn pairs(v: int16x8_t) -> int32x4_t {
    // Miri knows no saddlp.
    proven!(if cfg!(miri) { pair_add(vdupq_n_s32(0), v) } else { vpaddlq_s16(v) })
}

/// `acc` plus sums of pairs.
#[inline(always)]
fn pair_add(acc: int32x4_t, v: int16x8_t) -> int32x4_t {
    proven!(if cfg!(miri) {
        vaddq_s32(acc, vpaddq_s32(vmovl_s16(vget_low_s16(v)), vmovl_high_s16(v)))
    } else {
        vpadalq_s16(acc, v)
    })
}

/// Activations 4v..4v+4 in every lane.
#[inline(always)]
fn four(a: &[i8], v: usize) -> int8x16_t {
    let [a, b, c, d] = a.as_chunks::<4>().0[v];
    proven!(vreinterpretq_s8_s32(vdupq_n_s32(i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]))))
}

/// Sums of products of one row: in 16 bits of narrow weights, in 32 bits of others.
#[derive(Clone, Copy)]
pub(crate) struct RowSums {
    narrow: [int16x8_t; 2],
    wide: int32x4_t,
}

/// `sums` plus the products of the low half, plus those of the high half.
#[inline(always)]
fn both_halves(sums: int16x8_t, w: uint8x16_t, a: uint8x16_t) -> int16x8_t {
    proven!({
        let (w, a) = (vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(a));
        vmlal_high_s8(vmlal_s8(sums, vget_low_s8(w), vget_low_s8(a)), w, a)
    })
}

impl Dot for Mull {
    type Sums = RowSums;
    const NARROW: bool = true;
    const ISA: Isa = Isa::Neon;

    #[inline(always)]
    fn new() -> Option<Mull> {
        Some(Mull)
    }

    #[inline(always)]
    fn enter<B: Block>(s: Neon<Mull>, product: Product<B>) {
        product.run(s);
    }

    #[inline(always)]
    fn dot<const N: usize>(acc: Ints, w: [Bytes; N], a: &[i8], range: Range) -> Ints {
        let (mut acc, fit) = (acc, fit(range));
        for (rows, acc) in acc.iter_mut().enumerate() {
            let first = proven!(vreinterpretq_s8_u8(w[0][rows]));
            let (mut low, mut high) = (Sums::low(first, four(a, 0)), Sums::high(first, four(a, 0)));
            for v in 1..N {
                let (w, a) = (proven!(vreinterpretq_s8_u8(w[v][rows])), four(a, v));
                if v % fit == 0 {
                    (low, high) = (low.then(Sums::low(w, a)), high.then(Sums::high(w, a)));
                } else {
                    (low, high) = (low.plus_low(w, a), high.plus_high(w, a));
                }
            }
            *acc = if 2 * N <= fit {
                pair_add(*acc, proven!(vpaddq_s16(low.narrow, high.narrow)))
            } else {
                proven!(vaddq_s32(*acc, vpaddq_s32(low.widen(), high.widen())))
            };
        }
        acc
    }

    #[inline(always)]
    fn no_sums() -> RowSums {
        proven!(RowSums { narrow: [vdupq_n_s16(0); 2], wide: vdupq_n_s32(0) })
    }
    /// Field 1 stays four times too large. A lane takes 12 products of 32 bytes to the first sum and 4 to the second, at most 3·128
    /// and 12·128: of four times 32 bytes, at most 24 576.
    #[inline(always)]
    fn crumbs(sums: RowSums, w: Bytes, a: [Bytes; 4]) -> RowSums {
        let [mut once, mut four_times] = sums.narrow;
        for h in 0..2 {
            proven!({
                let (low, high) = (vdupq_n_u8(3), vdupq_n_u8(12));
                once = both_halves(once, vandq_u8(w[h], low), a[0][h]);
                four_times = both_halves(four_times, vandq_u8(w[h], high), a[1][h]);
                once = both_halves(once, vandq_u8(vshrq_n_u8::<4>(w[h]), low), a[2][h]);
                once = both_halves(once, vshrq_n_u8::<6>(w[h]), a[3][h]);
            });
        }
        RowSums { narrow: [once, four_times], ..sums }
    }
    /// A lane takes 4 products of 32 bytes to each sum, at most 15·128: of four times 32 bytes, at most 30 720.
    #[inline(always)]
    fn nibbles(sums: RowSums, w: Bytes, a: [Bytes; 2]) -> RowSums {
        let mut narrow = sums.narrow;
        for h in 0..2 {
            let codes = proven!([vandq_u8(w[h], vdupq_n_u8(15)), vshrq_n_u8::<4>(w[h])]);
            for f in 0..2 {
                narrow[f] = both_halves(narrow[f], codes[f], a[f][h]);
            }
        }
        RowSums { narrow, ..sums }
    }
    #[inline(always)]
    fn bytes(sums: RowSums, w: Bytes, a: Bytes) -> RowSums {
        let product = |h: usize| Self::row(w[h], proven!(vreinterpretq_s8_u8(a[h])), Range::Full);
        RowSums { wide: proven!(vaddq_s32(sums.wide, vaddq_s32(product(0), product(1)))), ..sums }
    }
    #[inline(always)]
    fn widen(total: int32x4_t, sums: RowSums, bits: usize) -> int32x4_t {
        let [once, other] = sums.narrow;
        match bits {
            2 => pair_add(total, proven!(vsraq_n_s16::<2>(once, other))),
            4 => pair_add(pair_add(total, once), other),
            _ => proven!(vaddq_s32(total, sums.wide)),
        }
    }

    #[inline(always)]
    fn row(w: uint8x16_t, a: int8x16_t, range: Range) -> int32x4_t {
        let w = proven!(vreinterpretq_s8_u8(w));
        let sums = Sums::low(w, a);
        if fit(range) > 1 { sums.plus_high(w, a).widen() } else { sums.then(Sums::high(w, a)).widen() }
    }

    #[inline(always)]
    fn row32(w: Bytes, a: [int8x16_t; 2], range: Range) -> int32x4_t {
        if fit(range) < 4 {
            return proven!(vaddq_s32(Self::row(w[0], a[0], range), Self::row(w[1], a[1], range)));
        }
        let w = both(w, |w| proven!(vreinterpretq_s8_u8(w)));
        Sums::low(w[0], a[0]).plus_high(w[0], a[0]).plus_low(w[1], a[1]).plus_high(w[1], a[1]).widen()
    }

    #[inline(always)]
    fn nibbles_of_rows(rows: [uint8x16_t; 4], a: [int8x16_t; 2]) -> int32x4_t {
        // |sum of four products| ≤ 4·15·128 = 7 680, so two levels of additions across still fit in 16 bits: 30 720.
        let mut sums = [proven!(vdupq_n_s16(0)); 4];
        for (sum, q) in sums.iter_mut().zip(rows) {
            let [low, high] = nibbles(q);
            *sum = proven!({
                let (low, high) = (vreinterpretq_s8_u8(low), vreinterpretq_s8_u8(high));
                let sum = vmull_s8(vget_low_s8(low), vget_low_s8(a[0]));
                let sum = vmlal_high_s8(sum, low, a[0]);
                vmlal_high_s8(vmlal_s8(sum, vget_low_s8(high), vget_low_s8(a[1])), high, a[1])
            });
        }
        pairs(proven!(vpaddq_s16(vpaddq_s16(sums[0], sums[1]), vpaddq_s16(sums[2], sums[3]))))
    }
}

/// The instructions `vec.rs` asks for by name.
pub(crate) struct Halves;

impl crate::vec::Native for Halves {
    #[inline(always)]
    fn load(h: &[u16; 8]) -> [f32; 8] {
        proven!({
            let h = vreinterpretq_f16_u16(vld1q_u16(h.as_ptr()));
            let mut out = [0.0; 8];
            vst1q_f32(out.as_mut_ptr(), vcvt_f32_f16(vget_low_f16(h)));
            vst1q_f32(out[4..].as_mut_ptr(), vcvt_high_f32_f16(h));
            out
        })
    }

    #[inline(always)]
    fn store(x: &[f32; 8]) -> [u16; 8] {
        proven!({
            let limit = vdupq_n_f32(crate::half::F16_MAX);
            // With NaN, min and max return NaN.
            let clamp = |x| vmaxq_f32(vminq_f32(x, limit), vnegq_f32(limit));
            let low = vcvt_f16_f32(clamp(vld1q_f32(x.as_ptr())));
            let mut out = [0; 8];
            vst1q_u16(
                out.as_mut_ptr(),
                vreinterpretq_u16_f16(vcvt_high_f16_f32(low, clamp(vld1q_f32(x[4..].as_ptr())))),
            );
            out
        })
    }

    #[inline(always)]
    fn tree(lanes: [f32; LANES]) -> f32 {
        proven!({
            let mut v = [vdupq_n_f32(0.0); 4];
            for (i, v) in v.iter_mut().enumerate() {
                *v = vaddq_f32(vld1q_f32(lanes[4 * i..].as_ptr()), vld1q_f32(lanes[4 * i + 16..].as_ptr()));
            }
            let v = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
        })
    }

    #[inline(always)]
    fn trees(eights: &[[f32; 8]; 8]) -> [f32; 8] {
        proven!({
            let mut v = [vdupq_n_f32(0.0); 8];
            for (v, eight) in v.iter_mut().zip(eights) {
                *v = vaddq_f32(vld1q_f32(eight.as_ptr()), vld1q_f32(eight[4..].as_ptr()));
            }
            // Two lanes of each of two vectors.
            let mut twos = [vdupq_n_f32(0.0); 4];
            for (i, twos) in twos.iter_mut().enumerate() {
                let (a, b) = (vreinterpretq_f64_f32(v[2 * i]), vreinterpretq_f64_f32(v[2 * i + 1]));
                let (low, high) = (vzip1q_f64(a, b), vzip2q_f64(a, b));
                *twos = vaddq_f32(vreinterpretq_f32_f64(low), vreinterpretq_f32_f64(high));
            }
            let mut out = [0.0; 8];
            vst1q_f32(out.as_mut_ptr(), vpaddq_f32(twos[0], twos[1]));
            vst1q_f32(out[4..].as_mut_ptr(), vpaddq_f32(twos[2], twos[3]));
            out
        })
    }
}
