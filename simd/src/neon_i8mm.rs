//! Dot products of aarch64 CPUs with `smmla` (ARMv8.6, or the feature i8mm: Cortex-A510 and later, Neoverse V1, Apple M2).
//!
//! The one idea: for one token, what `neon_dot.rs` has. `smmla` multiplies 2 rows of 8 bytes by 2 columns of 8, so for two
//! tokens it does twice the work of `sdot`. A panel keeps its weights in pairs of rows:
//!
//! ```text
//! weights        row 0: k 0..8  | row 1: k 0..8
//! activations  token 0: k 0..8  | token 1: k 0..8
//! sums         row 0, token 0 | row 0, token 1 | row 1, token 0 | row 1, token 1
//! ```

use std::arch::aarch64::*;

use crate::Isa;
use crate::format::Block;
use crate::neon::{Bytes, Dot, Ints, Neon, load_i8};
use crate::neon_dot::{self, Sdot};
use crate::wide::{Product, Range, proven, unrolled};

/// `acc` plus the products of two rows with two tokens.
#[inline]
#[target_feature(enable = "i8mm")]
pub(crate) fn smmla(acc: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
    #[cfg(not(miri))]
    {
        let mut sum = acc;
        // SAFETY: arithmetic on registers.
        unsafe {
            std::arch::asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inlateout(vreg) sum, in(vreg) w, in(vreg) a,
                options(nomem, nostack, preserves_flags));
        }
        sum
    }
    #[cfg(miri)]
    {
        let products = [vmull_s8(vget_low_s8(w), vget_low_s8(a)), vmull_s8(vget_low_s8(w), vget_high_s8(a))];
        let rest = [vmull_s8(vget_high_s8(w), vget_low_s8(a)), vmull_high_s8(w, a)];
        let eight = |v: int16x8_t| vaddq_s32(vmovl_s16(vget_low_s16(v)), vmovl_high_s16(v));
        let (low, high) =
            (vpaddq_s32(eight(products[0]), eight(products[1])), vpaddq_s32(eight(rest[0]), eight(rest[1])));
        vaddq_s32(acc, vpaddq_s32(low, high))
    }
}

/// Rows 0 and 1, and 2 and 3, of four rows: two vectors of four bytes of each to eight bytes of each.
#[inline(always)]
fn pair_rows(low: uint8x16_t, high: uint8x16_t) -> [uint8x16_t; 2] {
    proven!({
        let (low, high) = (vreinterpretq_u32_u8(low), vreinterpretq_u32_u8(high));
        [vreinterpretq_u8_u32(vzip1q_u32(low, high)), vreinterpretq_u8_u32(vzip2q_u32(low, high))]
    })
}

/// Bytes 0..8, and bytes 8..16, of two vectors.
#[inline(always)]
fn pair_tokens(first: int8x16_t, second: int8x16_t) -> [int8x16_t; 2] {
    proven!({
        let (first, second) = (vreinterpretq_s64_s8(first), vreinterpretq_s64_s8(second));
        [vreinterpretq_s8_s64(vzip1q_s64(first, second)), vreinterpretq_s8_s64(vzip2q_s64(first, second))]
    })
}

/// Dot products by `sdot` and `smmla`.
#[derive(Clone, Copy)]
pub(crate) struct Smmla;

impl Dot for Smmla {
    type Sums = neon_dot::Sums;
    const ISA: Isa = Isa::NeonI8mm;

    #[inline(always)]
    fn new() -> Option<Smmla> {
        Isa::NeonI8mm.supported().then_some(Smmla)
    }

    #[inline(always)]
    fn enter<B: Block>(s: Neon<Smmla>, product: Product<B>) {
        #[target_feature(enable = "dotprod,i8mm")]
        fn compiled<B: Block>(s: Neon<Smmla>, product: Product<B>) {
            product.run(s);
        }
        proven!(compiled(s, product));
    }

    #[inline(always)]
    fn dot<const N: usize>(acc: Ints, w: [Bytes; N], a: &[i8], _: Range) -> Ints {
        neon_dot::dot(acc, w, a)
    }
    #[inline(always)]
    fn panel(w: [Bytes; 8]) -> [Bytes; 8] {
        let mut pairs = w;
        for v in (0..8).step_by(2) {
            for rows in 0..2 {
                [pairs[v][rows], pairs[v + 1][rows]] = pair_rows(w[v][rows], w[v + 1][rows]);
            }
        }
        pairs
    }
    #[inline(always)]
    fn panel_dot<const N: usize, const K: usize, const T: usize>(
        acc: [Ints; T],
        w: [Bytes; N],
        a: [&[i8; K]; T],
        _: Range,
    ) -> [Ints; T] {
        let mut acc = acc;
        // Sums of pair p of tokens: of rows 0, 1 and 4, 5, then of rows 2, 3 and 6, 7. An odd token is its own pair.
        let mut sums = [[[proven!(vdupq_n_s32(0)); 2]; 2]; T];
        unrolled!(p < T.div_ceil(2), {
            let (first, second) = (acc[2 * p], acc[(2 * p + 1).min(T - 1)]);
            for rows in 0..2 {
                sums[p][0][rows] = proven!(vzip1q_s32(first[rows], second[rows]));
                sums[p][1][rows] = proven!(vzip2q_s32(first[rows], second[rows]));
            }
        });
        for half in 0..N / 4 {
            unrolled!(p < T.div_ceil(2), {
                let (first, second) = (a[2 * p].as_chunks().0, a[(2 * p + 1).min(T - 1)].as_chunks().0);
                let a = pair_tokens(load_i8(&first[half]), load_i8(&second[half]));
                for i in 0..4 {
                    for rows in 0..2 {
                        let w = proven!(vreinterpretq_s8_u8(w[4 * half + i][rows]));
                        sums[p][i % 2][rows] = proven!(smmla(sums[p][i % 2][rows], w, a[i / 2]));
                    }
                }
            });
        }
        unrolled!(p < T.div_ceil(2), {
            for rows in 0..2 {
                let (low, high) = (sums[p][0][rows], sums[p][1][rows]);
                acc[(2 * p + 1).min(T - 1)][rows] = proven!(vuzp2q_s32(low, high));
                acc[2 * p][rows] = proven!(vuzp1q_s32(low, high));
            }
        });
        acc
    }

    #[inline(always)]
    fn no_sums() -> neon_dot::Sums {
        proven!([vdupq_n_s32(0); 3])
    }
    #[inline(always)]
    fn crumbs(sums: neon_dot::Sums, w: Bytes, a: [Bytes; 4]) -> neon_dot::Sums {
        neon_dot::crumbs(sums, w, a)
    }
    #[inline(always)]
    fn nibbles(sums: neon_dot::Sums, w: Bytes, a: [Bytes; 2]) -> neon_dot::Sums {
        neon_dot::nibbles(sums, w, a)
    }
    #[inline(always)]
    fn bytes(sums: neon_dot::Sums, w: Bytes, a: Bytes) -> neon_dot::Sums {
        neon_dot::bytes(sums, w, a)
    }
    #[inline(always)]
    fn widen(total: int32x4_t, sums: neon_dot::Sums, bits: usize) -> int32x4_t {
        neon_dot::widen(total, sums, bits)
    }
    #[inline(always)]
    fn row(w: uint8x16_t, a: int8x16_t, range: Range) -> int32x4_t {
        Sdot::row(w, a, range)
    }
    #[inline(always)]
    fn row32(w: Bytes, a: [int8x16_t; 2], range: Range) -> int32x4_t {
        Sdot::row32(w, a, range)
    }
    #[inline(always)]
    fn nibbles_of_rows(rows: [uint8x16_t; 4], a: [int8x16_t; 2]) -> int32x4_t {
        Sdot::nibbles_of_rows(rows, a)
    }
}
