//! Vectors of 512 bits on x86-64: AVX-512 with VNNI.
//!
//! The one idea: sixteen rows stand in the lanes, as two groups of eight side by side, so files interleaved by eight are
//! read as they are, two groups at a time. Fewer than sixteen rows, and rows in GGUF order, are worked on eight at a time
//! in vectors of 256 bits ([`Ymm`]) with this ISA's encoding of the dot product ([`Evex`]).
//!
//! Only instructions of AVX-512 F, BW, DQ, VL and VNNI, which come together since Ice Lake and Zen 4; the masks and
//! permutations of other extensions are not needed.

use std::arch::x86_64::*;

use crate::Isa;
use crate::avx_vnni::Dpbusd;
use crate::avx2::{Ymm, four, pair};
use crate::format::Block;
use crate::wide::{NEAR, Product, Range, Simd, Vectors, proven};

/// `vpdpbusd` on 256 bits as AVX-512 encodes it.
#[derive(Clone, Copy)]
pub(crate) struct Evex;

impl Dpbusd for Evex {
    const ISA: Isa = Isa::Avx512;

    #[inline(always)]
    fn new() -> Option<Evex> {
        Isa::Avx512.supported().then_some(Evex)
    }

    #[inline(always)]
    fn enter<B: Block>(s: Ymm<Evex>, product: Product<B>) {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
        fn compiled<B: Block>(s: Ymm<Evex>, product: Product<B>) {
            product.run(s);
        }
        proven!(compiled(s, product));
    }

    #[inline(always)]
    fn dpbusd(acc: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
        proven!(_mm256_dpbusd_epi32(acc, unsigned, signed))
    }
}

/// Sixteen rows in the lanes of 512-bit vectors. A value proves that the CPU has them.
#[derive(Clone, Copy)]
pub(crate) struct Zmm(Ymm<Evex>);

/// Two vectors of 256 bits as one.
#[inline(always)]
fn both(low: __m256i, high: __m256i) -> __m512i {
    proven!(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high))
}

impl Vectors for Zmm {
    type B = __m512i;
    type I = __m512i;
    type F = __m512;
    type Eight = Ymm<Evex>;

    const ROWS: usize = 16;
    const TOKENS: usize = 8;
    const SIGNED_BIAS: i32 = 128;

    #[inline(always)]
    fn eight(self) -> Ymm<Evex> {
        self.0
    }
    #[inline(always)]
    fn load(self, groups: [&[u8; 32]; 2]) -> __m512i {
        proven!({
            let load = |group: &[u8; 32]| _mm256_loadu_si256(group.as_ptr().cast());
            both(load(groups[0]), load(groups[1]))
        })
    }
    #[inline(always)]
    fn splat_u8(self, value: u8) -> __m512i {
        proven!(_mm512_set1_epi8(value as i8))
    }

    #[inline(always)]
    fn splat(self, value: i32) -> __m512i {
        proven!(_mm512_set1_epi32(value))
    }
    #[inline(always)]
    fn load_i32(self, from: &[i32; 16]) -> __m512i {
        proven!(_mm512_loadu_si512(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn store_i32(self, v: __m512i, to: &mut [i32; 16]) {
        proven!(_mm512_storeu_si512(to.as_mut_ptr().cast(), v));
    }
    #[inline(always)]
    fn add(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_mullo_epi32(a, b))
    }

    #[inline(always)]
    fn zero(self) -> __m512 {
        proven!(_mm512_setzero_ps())
    }
    #[inline(always)]
    fn splat_f32(self, value: f32) -> __m512 {
        proven!(_mm512_set1_ps(value))
    }
    #[inline(always)]
    fn load_f32(self, from: &[f32; 16]) -> __m512 {
        proven!(_mm512_loadu_ps(from.as_ptr()))
    }
    #[inline(always)]
    fn store_f32(self, v: __m512, to: &mut [f32; 16]) {
        proven!(_mm512_storeu_ps(to.as_mut_ptr(), v));
    }
    #[inline(always)]
    fn to_f32(self, v: __m512i) -> __m512 {
        proven!(_mm512_cvtepi32_ps(v))
    }
    #[inline(always)]
    fn mul_f32(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        proven!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn fnma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        proven!(_mm512_fnmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn dot16(self, acc: __m512i, w: [__m512i; 4], a: &[i8; 16], range: Range) -> __m512i {
        let mut acc = acc;
        for (v, w) in w.into_iter().enumerate() {
            acc = proven!({
                let unsigned = match range {
                    Range::Unsigned(_) => w,
                    Range::Signed | Range::Full => _mm512_xor_si512(w, _mm512_set1_epi8(i8::MIN)),
                };
                _mm512_dpbusd_epi32(acc, unsigned, _mm512_set1_epi32(four(a, v)))
            });
        }
        acc
    }
    #[inline(always)]
    fn weighted(self, scales: [__m512i; 2], sums: &[i16; 2]) -> __m512i {
        proven!({
            let high = _mm512_slli_epi32::<16>(scales[1]);
            _mm512_madd_epi16(_mm512_mask_blend_epi16(0xaaaa_aaaa, scales[0], high), _mm512_set1_epi32(pair(sums)))
        })
    }
}

impl Simd for Zmm {
    type Sums = [__m512i; 2];
    type Many = Self;

    const ISA: Isa = Isa::Avx512;

    #[inline(always)]
    fn new() -> Option<Zmm> {
        Ymm::new().map(Zmm)
    }
    #[inline(always)]
    fn many(self) -> Self {
        self
    }
    #[inline(always)]
    fn enter<B: Block>(self, product: Product<B>) {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
        fn compiled<B: Block>(s: Zmm, product: Product<B>) {
            product.run(s);
        }
        proven!(compiled(self, product));
    }

    #[inline(always)]
    fn ahead(self, _streams: usize) -> usize {
        NEAR
    }
    #[inline(always)]
    fn field(self, b: __m512i, shift: usize, mask: u8) -> __m512i {
        proven!({
            let right = _mm512_srlv_epi16(b, _mm512_set1_epi16(shift as i16));
            _mm512_and_si512(right, _mm512_set1_epi8(mask as i8))
        })
    }
    #[inline(always)]
    fn shl(self, b: __m512i, n: usize) -> __m512i {
        proven!(_mm512_sllv_epi16(b, _mm512_set1_epi16(n as i16)))
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn look_up(self, table: &[i8; 16], indices: __m512i) -> __m512i {
        proven!({
            let table = _mm_loadu_si128(table.as_ptr().cast());
            _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), indices)
        })
    }
    #[inline(always)]
    fn sub(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_sub_epi32(a, b))
    }
    #[inline(always)]
    fn or_i32(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn field_i32(self, v: __m512i, shift: usize, mask: u32) -> __m512i {
        proven!({
            let right = _mm512_srlv_epi32(v, _mm512_set1_epi32(shift as i32));
            _mm512_and_si512(right, _mm512_set1_epi32(mask as i32))
        })
    }
    #[inline(always)]
    fn shl_i32(self, v: __m512i, n: usize) -> __m512i {
        proven!(_mm512_sllv_epi32(v, _mm512_set1_epi32(n as i32)))
    }
    #[inline(always)]
    fn words(self, b: __m512i) -> __m512i {
        b
    }
    #[inline(always)]
    fn two_bytes(self, groups: [&[u8; 16]; 2]) -> [__m512i; 2] {
        proven!({
            let load = |group: &[u8; 16]| _mm_loadu_si128(group.as_ptr().cast());
            let pairs = _mm512_cvtepi8_epi16(_mm256_set_m128i(load(groups[1]), load(groups[0])));
            [_mm512_srai_epi32::<16>(_mm512_slli_epi32::<16>(pairs)), _mm512_srai_epi32::<16>(pairs)]
        })
    }
    #[inline(always)]
    fn halves(self, groups: [&[u8; 16]; 2]) -> __m512 {
        proven!({
            let load = |group: &[u8; 16]| _mm256_cvtph_ps(_mm_loadu_si128(group.as_ptr().cast()));
            _mm512_insertf32x8::<1>(_mm512_castps256_ps512(load(groups[0])), load(groups[1]))
        })
    }

    #[inline(always)]
    fn load_i8(self, groups: [&[i8; 32]; 2]) -> __m512i {
        proven!(both(_mm256_loadu_si256(groups[0].as_ptr().cast()), _mm256_loadu_si256(groups[1].as_ptr().cast())))
    }
    #[inline(always)]
    fn load_halves(self, groups: [[&[u8; 16]; 2]; 2]) -> __m512i {
        let load = |group| self.0.load_halves([group, group]);
        both(load(groups[0]), load(groups[1]))
    }
    #[inline(always)]
    fn no_sums(self) -> [__m512i; 2] {
        proven!([_mm512_setzero_si512(); 2])
    }
    /// Fields 1 and 3 stay four times too large: a shift less for each.
    #[inline(always)]
    fn crumbs(self, sums: [__m512i; 2], w: __m512i, a: [__m512i; 4]) -> [__m512i; 2] {
        proven!({
            let (low, high) = (_mm512_set1_epi8(3), _mm512_set1_epi8(12));
            let upper = _mm512_srli_epi16::<4>(w);
            let once = _mm512_dpbusd_epi32(sums[0], _mm512_and_si512(w, low), a[0]);
            let four_times = _mm512_dpbusd_epi32(sums[1], _mm512_and_si512(w, high), a[1]);
            [
                _mm512_dpbusd_epi32(once, _mm512_and_si512(upper, low), a[2]),
                _mm512_dpbusd_epi32(four_times, _mm512_and_si512(upper, high), a[3]),
            ]
        })
    }
    #[inline(always)]
    fn nibbles(self, sums: [__m512i; 2], w: __m512i, a: [__m512i; 2]) -> [__m512i; 2] {
        proven!({
            let low = _mm512_set1_epi8(15);
            let upper = _mm512_and_si512(_mm512_srli_epi16::<4>(w), low);
            [_mm512_dpbusd_epi32(sums[0], _mm512_and_si512(w, low), a[0]), _mm512_dpbusd_epi32(sums[1], upper, a[1])]
        })
    }
    #[inline(always)]
    fn bytes(self, sums: [__m512i; 2], w: __m512i, a: __m512i) -> [__m512i; 2] {
        proven!({
            let unsigned = _mm512_xor_si512(w, _mm512_set1_epi8(i8::MIN));
            [_mm512_dpbusd_epi32(sums[0], unsigned, a), sums[1]]
        })
    }
    #[inline(always)]
    fn widen(self, total: __m512i, sums: [__m512i; 2], bits: usize) -> __m512i {
        proven!({
            let upper = if bits == 2 { _mm512_srai_epi32::<2>(sums[1]) } else { sums[1] };
            _mm512_add_epi32(_mm512_add_epi32(total, sums[0]), upper)
        })
    }
    #[inline(always)]
    fn across_lanes(self, totals: [__m512i; 4]) -> [i32; 4] {
        let mut sums = [0; 4];
        proven!({
            let words = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (ab, cd) = (words(totals[0], totals[1]), words(totals[2], totals[3]));
            let abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
            let half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64::<1>(abcd));
            let sum = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half));
            _mm_storeu_si128(sums.as_mut_ptr().cast(), sum);
        });
        sums
    }

    #[inline(always)]
    fn start(self, sums: &[i16; 2], bias: i32) -> __m512i {
        proven!(_mm512_madd_epi16(_mm512_set1_epi32(pair(sums)), _mm512_set1_epi16(-bias as i16)))
    }
}
