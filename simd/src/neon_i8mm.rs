//! Dot products of aarch64 CPUs with `smmla` (ARMv8.6, or the feature i8mm: Cortex-A510 and later, Neoverse V1, Apple M2).
//!
//! The one idea: what `neon_dot.rs` has, for one token; for several tokens `smmla` does twice the work of `sdot`.

use std::arch::aarch64::*;

use crate::Isa;
use crate::format::Block;
use crate::neon::{Bytes, Dot, Ints, Neon, proven};
use crate::neon_dot::{self, Sdot};
use crate::wide::{Product, Range};

/// Dot products by `sdot` and `smmla`.
#[derive(Clone, Copy)]
pub(crate) struct Smmla;

impl Dot for Smmla {
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
    fn crumbs(_: Neon<Smmla>, acc: [Ints; 3], w: [Bytes; 2], a: &[i8; 32]) -> [Ints; 3] {
        neon_dot::crumbs(acc, w, a)
    }
    #[inline(always)]
    fn crumbs_total(acc: [Ints; 3]) -> Ints {
        neon_dot::crumbs_total(acc)
    }
    #[inline(always)]
    fn row(w: uint8x16_t, a: int8x16_t, range: Range) -> int32x4_t {
        Sdot::row(w, a, range)
    }
    #[inline(always)]
    fn nibbles(rows: [uint8x16_t; 4], a: [int8x16_t; 2]) -> int32x4_t {
        Sdot::nibbles(rows, a)
    }
}
