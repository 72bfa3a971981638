//! Dot products of aarch64 CPUs with `sdot` (ARMv8.2 with the dot product feature: Cortex-A76, Raspberry Pi 5).
//!
//! The one idea: `sdot` adds four products of signed bytes into each 32-bit lane, and its form "by element" takes the same
//! four activations for every lane from any quarter of a register. So 16 activations are loaded once and never broadcast.
//! The intrinsics are not in stable Rust, hence the two lines of assembly.

use std::arch::aarch64::*;

use crate::Isa;
use crate::format::Block;
use crate::neon::{self, Bytes, Dot, Ints, Neon, add_across, load_i8};
use crate::wide::{Product, Range, proven};

/// Dot products by `sdot`.
#[derive(Clone, Copy)]
pub(crate) struct Sdot;

/// `acc` plus, in each lane, four products.
#[inline]
#[target_feature(enable = "dotprod")]
pub(crate) fn sdot(acc: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
    #[cfg(not(miri))]
    {
        let mut sum = acc;
        // SAFETY: arithmetic on registers.
        unsafe {
            std::arch::asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inlateout(vreg) sum, in(vreg) w, in(vreg) a,
                options(nomem, nostack, preserves_flags));
        }
        sum
    }
    #[cfg(miri)]
    {
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(a));
        let high = vmull_high_s8(w, a);
        let low = vpaddq_s32(vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low));
        let high = vpaddq_s32(vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high));
        vaddq_s32(acc, vpaddq_s32(low, high))
    }
}

/// The same with activations 4·LANE.. for every lane.
#[inline]
#[target_feature(enable = "dotprod")]
fn sdot_lane<const LANE: i32>(acc: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
    #[cfg(not(miri))]
    {
        let mut sum = acc;
        // SAFETY: arithmetic on registers.
        unsafe {
            std::arch::asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]", inlateout(vreg) sum, in(vreg) w, in(vreg) a,
                const LANE, options(nomem, nostack, preserves_flags));
        }
        sum
    }
    #[cfg(miri)]
    {
        sdot(acc, w, vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(a))))
    }
}

/// `acc` plus products of 4·N weights of each row with the first 4·N of `a`.
#[inline(always)]
pub(crate) fn dot<const N: usize>(acc: Ints, w: [Bytes; N], a: &[i8]) -> Ints {
    let mut acc = acc;
    let mut loaded = [proven!(vdupq_n_s8(0)); N];
    for (to, a) in loaded.iter_mut().zip(a.as_chunks().0) {
        *to = load_i8(a);
    }
    for (w, a) in w.as_chunks::<4>().0.iter().zip(loaded) {
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = proven!({
                let sum = sdot_lane::<0>(*acc, vreinterpretq_s8_u8(w[0][i]), a);
                let sum = sdot_lane::<1>(sum, vreinterpretq_s8_u8(w[1][i]), a);
                let sum = sdot_lane::<2>(sum, vreinterpretq_s8_u8(w[2][i]), a);
                sdot_lane::<3>(sum, vreinterpretq_s8_u8(w[3][i]), a)
            });
        }
    }
    acc
}

/// [`Simd::Sums`](crate::wide::Simd::Sums) of those with `sdot`.
pub(crate) type Sums = [int32x4_t; 3];

/// Crumbs are not shifted down but masked out where they stand, as 4 or 16 times what they are, and have sums of their
/// own, to be shifted once a row. Of the uppermost, which would be negative, and the lowest the shift is the mask:
///
/// ```text
/// sums[0] += (w & 0x03)·a0 + (w >> 6)·a3        sums[1] += (w & 0x0c)·a1        sums[2] += (w & 0x30)·a2
/// ```
///
/// |Σ 48·a| ≤ 48·128·16 384 columns fits in 31 bits.
#[inline(always)]
pub(crate) fn crumbs(sums: Sums, w: Bytes, a: [Bytes; 4]) -> Sums {
    let mut sums = sums;
    for h in 0..2 {
        sums[0] = along(sums[0], masked(w[h], 0x03), a[0][h]);
        sums[1] = along(sums[1], masked(w[h], 0x0c), a[1][h]);
        sums[2] = along(sums[2], masked(w[h], 0x30), a[2][h]);
        sums[0] = along(sums[0], proven!(vreinterpretq_s8_u8(vshrq_n_u8::<6>(w[h]))), a[3][h]);
    }
    sums
}

/// Both nibbles of each byte.
#[inline(always)]
pub(crate) fn nibbles(sums: Sums, w: Bytes, a: [Bytes; 2]) -> Sums {
    let mut sums = sums;
    for h in 0..2 {
        sums[0] = along(sums[0], masked(w[h], 15), a[0][h]);
        sums[1] = along(sums[1], proven!(vreinterpretq_s8_u8(vshrq_n_u8::<4>(w[h]))), a[1][h]);
    }
    sums
}

/// Whole bytes.
#[inline(always)]
pub(crate) fn bytes(sums: Sums, w: Bytes, a: Bytes) -> Sums {
    let mut sums = sums;
    for h in 0..2 {
        sums[h] = along(sums[h], proven!(vreinterpretq_s8_u8(w[h])), a[h]);
    }
    sums
}

/// `total` plus what those have added up. The shifts are exact.
#[inline(always)]
pub(crate) fn widen(total: int32x4_t, sums: Sums, bits: usize) -> int32x4_t {
    proven!({
        let [first, mut second, mut third] = sums;
        if bits == 2 {
            (second, third) = (vshrq_n_s32::<2>(second), vshrq_n_s32::<4>(third));
        }
        vaddq_s32(vaddq_s32(total, first), vaddq_s32(second, third))
    })
}

/// `sum` plus the products of a row's bytes.
#[inline(always)]
fn along(sum: int32x4_t, w: int8x16_t, a: uint8x16_t) -> int32x4_t {
    proven!(sdot(sum, w, vreinterpretq_s8_u8(a)))
}

/// `w & mask` in every byte.
#[inline(always)]
fn masked(w: uint8x16_t, mask: u8) -> int8x16_t {
    proven!(vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(mask))))
}

impl Dot for Sdot {
    type Sums = Sums;
    const ISA: Isa = Isa::NeonDot;

    #[inline(always)]
    fn new() -> Option<Sdot> {
        Isa::NeonDot.supported().then_some(Sdot)
    }

    #[inline(always)]
    fn enter<B: Block>(s: Neon<Sdot>, product: Product<B>) {
        #[target_feature(enable = "dotprod")]
        fn compiled<B: Block>(s: Neon<Sdot>, product: Product<B>) {
            product.run(s);
        }
        proven!(compiled(s, product));
    }

    #[inline(always)]
    fn dot<const N: usize>(acc: Ints, w: [Bytes; N], a: &[i8], _: Range) -> Ints {
        dot(acc, w, a)
    }

    #[inline(always)]
    fn no_sums() -> Sums {
        proven!([vdupq_n_s32(0); 3])
    }
    #[inline(always)]
    fn crumbs(sums: Sums, w: Bytes, a: [Bytes; 4]) -> Sums {
        crumbs(sums, w, a)
    }
    #[inline(always)]
    fn nibbles(sums: Sums, w: Bytes, a: [Bytes; 2]) -> Sums {
        nibbles(sums, w, a)
    }
    #[inline(always)]
    fn bytes(sums: Sums, w: Bytes, a: Bytes) -> Sums {
        bytes(sums, w, a)
    }
    #[inline(always)]
    fn widen(total: int32x4_t, sums: Sums, bits: usize) -> int32x4_t {
        widen(total, sums, bits)
    }

    #[inline(always)]
    fn row(w: uint8x16_t, a: int8x16_t, _: Range) -> int32x4_t {
        proven!(sdot(vdupq_n_s32(0), vreinterpretq_s8_u8(w), a))
    }

    #[inline(always)]
    fn row32(w: Bytes, a: [int8x16_t; 2], _: Range) -> int32x4_t {
        proven!(sdot(sdot(vdupq_n_s32(0), vreinterpretq_s8_u8(w[0]), a[0]), vreinterpretq_s8_u8(w[1]), a[1]))
    }

    #[inline(always)]
    fn nibbles_of_rows(rows: [uint8x16_t; 4], a: [int8x16_t; 2]) -> int32x4_t {
        let mut sums = [proven!(vdupq_n_s32(0)); 4];
        for (sum, q) in sums.iter_mut().zip(rows) {
            let [low, high] = neon::nibbles(q);
            *sum = proven!(sdot(sdot(*sum, vreinterpretq_s8_u8(low), a[0]), vreinterpretq_s8_u8(high), a[1]));
        }
        add_across(sums)
    }
}
