//! Dot products of 256 bits by `vpdpbusd`: AVX-VNNI, and the same instruction as AVX-512 encodes it.
//!
//! The one idea: the instruction multiplies unsigned by signed bytes and adds four products to an i32 lane, exactly: no
//! 16 bits in between, so nothing saturates and every [`Range`] is one loop. Signed weights become unsigned by turning
//! their top bit, which adds 128 to each ([`Simd::SIGNED_BIAS`](crate::wide::Simd::SIGNED_BIAS)); the loops in `wide.rs`
//! take 128·Σa off again. All but the dot products is [`Ymm`]'s.

use std::arch::x86_64::*;

use crate::Isa;
use crate::avx2::{Dot, Ymm, add_across, every, four, load_i8};
use crate::format::Block;
use crate::wide::{self, Product, Range, proven};

/// `vpdpbusd` on 256 bits in one of its two encodings. A value proves that the CPU has it.
pub(crate) trait Dpbusd: Copy {
    const ISA: Isa;
    fn new() -> Option<Self>;
    fn enter<B: Block>(s: Ymm<Self>, product: Product<B>);
    /// `acc` plus four products of unsigned with signed bytes in every lane.
    fn dpbusd(acc: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i;
}

/// The encoding of AVX-VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Vex;

impl Dpbusd for Vex {
    const ISA: Isa = Isa::AvxVnni;

    #[inline(always)]
    fn new() -> Option<Vex> {
        Isa::AvxVnni.supported().then_some(Vex)
    }

    #[inline(always)]
    fn enter<B: Block>(s: Ymm<Vex>, product: Product<B>) {
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        fn compiled<B: Block>(s: Ymm<Vex>, product: Product<B>) {
            product.run(s);
        }
        proven!(compiled(s, product));
    }

    #[inline(always)]
    fn dpbusd(acc: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
        proven!(_mm256_dpbusd_avx_epi32(acc, unsigned, signed))
    }
}

/// Weights as unsigned bytes.
#[inline(always)]
fn unsigned(w: __m256i, range: Range) -> __m256i {
    match range {
        Range::Unsigned(_) => w,
        Range::Signed | Range::Full => proven!(_mm256_xor_si256(w, _mm256_set1_epi8(i8::MIN))),
    }
}

impl<V: Dpbusd> Dot for V {
    const ISA: Isa = V::ISA;
    const ANEW: bool = true;
    const SIGNED_BIAS: i32 = 128;

    #[inline(always)]
    fn new() -> Option<V> {
        V::new()
    }

    #[inline(always)]
    fn enter<B: Block>(s: Ymm<V>, product: Product<B>) {
        V::enter(s, product);
    }

    #[inline(always)]
    fn dot16(acc: __m256i, w: [__m256i; 4], a: &[i8; 16], range: Range) -> __m256i {
        let mut acc = acc;
        for (v, w) in w.into_iter().enumerate() {
            acc = V::dpbusd(acc, unsigned(w, range), every(four(a, v)));
        }
        acc
    }

    #[inline(always)]
    fn dot32(acc: __m256i, w: [__m256i; 8], a: &[i8; 32], range: Range) -> __m256i {
        let (first, second) = wide::halves(a);
        let acc = Self::dot16(acc, [w[0], w[1], w[2], w[3]], first, range);
        Self::dot16(acc, [w[4], w[5], w[6], w[7]], second, range)
    }

    #[inline(always)]
    fn dot16_scaled(acc: __m256i, w: [__m256i; 4], a: &[i8; 16], range: Range, scale: __m256i) -> __m256i {
        proven!({
            let isum = Self::dot16(_mm256_setzero_si256(), w, a, range);
            _mm256_add_epi32(acc, _mm256_mullo_epi32(isum, scale))
        })
    }

    #[inline(always)]
    fn dot32_scaled(acc: __m256i, w: [__m256i; 8], a: &[i8; 32], range: Range, scale: __m256i) -> __m256i {
        proven!({
            let isum = Self::dot32(_mm256_setzero_si256(), w, a, range);
            _mm256_add_epi32(acc, _mm256_mullo_epi32(isum, scale))
        })
    }

    /// Fields 1 and 3 stay four times too large: a shift less for each.
    #[inline(always)]
    fn crumbs(sums: [__m256i; 2], w: __m256i, a: [__m256i; 4]) -> [__m256i; 2] {
        proven!({
            let (low, high) = (_mm256_set1_epi8(3), _mm256_set1_epi8(12));
            let upper = _mm256_srli_epi16::<4>(w);
            let once = V::dpbusd(sums[0], _mm256_and_si256(w, low), a[0]);
            let four_times = V::dpbusd(sums[1], _mm256_and_si256(w, high), a[1]);
            [
                V::dpbusd(once, _mm256_and_si256(upper, low), a[2]),
                V::dpbusd(four_times, _mm256_and_si256(upper, high), a[3]),
            ]
        })
    }
    #[inline(always)]
    fn nibbles(sums: [__m256i; 2], w: __m256i, a: [__m256i; 2]) -> [__m256i; 2] {
        proven!({
            let low = _mm256_set1_epi8(15);
            let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(w), low);
            [V::dpbusd(sums[0], _mm256_and_si256(w, low), a[0]), V::dpbusd(sums[1], upper, a[1])]
        })
    }
    #[inline(always)]
    fn widen(total: __m256i, sums: [__m256i; 2], bits: usize) -> __m256i {
        proven!({
            let upper = if bits == 2 { _mm256_srai_epi32::<2>(sums[1]) } else { sums[1] };
            _mm256_add_epi32(_mm256_add_epi32(total, sums[0]), upper)
        })
    }

    #[inline(always)]
    fn dot(w: __m256i, a: __m256i, range: Range) -> __m256i {
        proven!(V::dpbusd(_mm256_setzero_si256(), unsigned(w, range), a))
    }

    #[inline(always)]
    fn nibbles_across(rows: [&[u8; 16]; 8], a: &[i8; 32]) -> __m256i {
        proven!({
            let low = _mm256_set1_epi8(15);
            let a = load_i8(a);
            let a_low = _mm256_permute2x128_si256::<0x00>(a, a);
            let a_high = _mm256_permute2x128_si256::<0x11>(a, a);
            // Rows i and i + 4 share a vector.
            let mut part = [_mm256_setzero_si256(); 4];
            for (i, part) in part.iter_mut().enumerate() {
                let load = |row: &[u8; 16]| _mm_loadu_si128(row.as_ptr().cast());
                let q = _mm256_set_m128i(load(rows[i + 4]), load(rows[i]));
                *part = V::dpbusd(*part, _mm256_and_si256(q, low), a_low);
                *part = V::dpbusd(*part, _mm256_and_si256(_mm256_srli_epi16::<4>(q), low), a_high);
            }
            add_across(part)
        })
    }
}
