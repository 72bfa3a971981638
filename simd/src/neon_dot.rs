//! Dot products of aarch64 CPUs with `sdot` (ARMv8.2 with the dot product feature: Cortex-A76, Raspberry Pi 5).
//!
//! The one idea: `sdot` adds four products of signed bytes into each 32-bit lane, and its form "by element" takes the same
//! four activations for every lane from any quarter of a register. So 16 activations are loaded once and never broadcast.
//! The intrinsics are not in stable Rust, hence the two lines of assembly.

use std::arch::aarch64::*;

use crate::Isa;
use crate::format::Block;
use crate::neon::{Bytes, Dot, Ints, Neon, add_across, load_i8, nibbles};
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

/// Crumbs are not shifted down but masked out where they stand, as 4 or 16 times what they are, and have sums of their
/// own, to be shifted once a row. Of the uppermost, which would be negative, and the lowest the shift is the mask:
///
/// ```text
/// acc[0] += (w & 0x03)·a0 + (w >> 6)·a3        acc[1] += (w & 0x0c)·a1        acc[2] += (w & 0x30)·a2
/// ```
///
/// |Σ 48·a| ≤ 48·128·16 384 columns fits in 31 bits.
#[inline(always)]
pub(crate) fn crumbs(acc: [Ints; 3], w: [Bytes; 2], a: &[i8; 32]) -> [Ints; 3] {
    let mut acc = acc;
    for (w, a) in w.into_iter().zip(a.as_chunks().0) {
        let a = load_i8(a);
        for i in 0..2 {
            proven!({
                acc[0][i] = sdot_lane::<0>(acc[0][i], masked(w[i], 0x03), a);
                acc[1][i] = sdot_lane::<1>(acc[1][i], masked(w[i], 0x0c), a);
                acc[2][i] = sdot_lane::<2>(acc[2][i], masked(w[i], 0x30), a);
                acc[0][i] = sdot_lane::<3>(acc[0][i], vreinterpretq_s8_u8(vshrq_n_u8::<6>(w[i])), a);
            });
        }
    }
    acc
}

/// `w & mask` in every byte.
#[inline(always)]
fn masked(w: uint8x16_t, mask: u8) -> int8x16_t {
    proven!(vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(mask))))
}

/// The sum of products that [`crumbs`] has added up. The shifts are exact.
#[inline(always)]
pub(crate) fn crumbs_total(acc: [Ints; 3]) -> Ints {
    let mut sums = acc[0];
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = proven!(vaddq_s32(*sum, vaddq_s32(vshrq_n_s32::<2>(acc[1][i]), vshrq_n_s32::<4>(acc[2][i]))));
    }
    sums
}

impl Dot for Sdot {
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
    fn crumbs(_: Neon<Sdot>, acc: [Ints; 3], w: [Bytes; 2], a: &[i8; 32]) -> [Ints; 3] {
        crumbs(acc, w, a)
    }
    #[inline(always)]
    fn crumbs_total(acc: [Ints; 3]) -> Ints {
        crumbs_total(acc)
    }

    #[inline(always)]
    fn row(w: uint8x16_t, a: int8x16_t, _: Range) -> int32x4_t {
        proven!(sdot(vdupq_n_s32(0), vreinterpretq_s8_u8(w), a))
    }

    #[inline(always)]
    fn nibbles(rows: [uint8x16_t; 4], a: [int8x16_t; 2]) -> int32x4_t {
        let mut sums = [proven!(vdupq_n_s32(0)); 4];
        for (sum, q) in sums.iter_mut().zip(rows) {
            let [low, high] = nibbles(q);
            *sum = proven!(sdot(sdot(*sum, vreinterpretq_s8_u8(low), a[0]), vreinterpretq_s8_u8(high), a[1]));
        }
        add_across(sums)
    }
}
