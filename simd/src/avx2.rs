//! Vectors of 256 bits on x86-64: AVX2, FMA and F16C.
//!
//! The one idea: [`Ymm`] is all of [`Simd`] but the dot products, which differ between AVX2 and what came later
//! ([`Dot`]); `avx_vnni.rs` and `avx512.rs` bring their own. This file's is [`Maddubs`]: it multiplies unsigned by
//! signed bytes and adds pairs into 16 bits, with saturation. So as many products are added in 16 bits as their span
//! allows. Signed weights go as |w| with the activation carrying the sign: |w| ≤ 128 and |a| ≤ 127 give at most 32 512.
//! That fails for a = −128, so where activations may be that ([`Range::Full`]) even and odd bytes are widened first.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::Isa;
use crate::format::Block;
use crate::unpack::EightRows;
use crate::vec::LANES;
use crate::wide::{self, Eight, NEAR, Product, Range, Simd, Vectors, proven};

/// Integer dot products of 256-bit vectors.
pub(crate) trait Dot: Copy {
    const ISA: Isa;
    const SIGNED_BIAS: i32;
    /// [`Simd::Many`].
    type Many: Vectors<Eight = Ymm<Self>>;
    fn many(s: Ymm<Self>) -> Self::Many;
    fn new() -> Option<Self>;
    /// The way into code compiled for this ISA.
    fn enter<B: Block>(s: Ymm<Self>, product: Product<B>);
    fn dot16(acc: __m256i, w: [__m256i; 4], a: &[i8; 16], range: Range) -> __m256i;
    fn dot32(acc: __m256i, w: [__m256i; 8], a: &[i8; 32], range: Range) -> __m256i;
    fn dot16_scaled(acc: __m256i, w: [__m256i; 4], a: &[i8; 16], range: Range, scale: __m256i) -> __m256i;
    fn dot32_scaled(acc: __m256i, w: [__m256i; 8], a: &[i8; 32], range: Range, scale: __m256i) -> __m256i;
    /// [`Simd::ahead`].
    #[inline(always)]
    fn ahead(self, _streams: usize) -> usize {
        NEAR
    }
    /// [`Simd::NARROW`].
    const NARROW: bool = false;
    /// [`Simd::crumbs`]: fields 0 and 2 to `sums[0]`, four times fields 1 and 3 to `sums[1]`.
    fn crumbs(sums: [__m256i; 2], w: __m256i, a: [__m256i; 4]) -> [__m256i; 2];
    /// [`Simd::nibbles`], to `sums[0]`.
    fn nibbles(sums: [__m256i; 2], w: __m256i, a: [__m256i; 2]) -> [__m256i; 2];
    /// [`Simd::widen`] of those.
    fn widen(total: __m256i, sums: [__m256i; 2], bits: usize) -> __m256i;
    /// The products of 32 weights with 32 activations, four added in each lane.
    fn dot(w: __m256i, a: __m256i, range: Range) -> __m256i;
    fn nibbles_across(rows: [&[u8; 16]; 8], a: &[i8; 32]) -> __m256i;
}

/// Eight rows in the lanes of 256-bit vectors. A value proves that the CPU has AVX2, FMA and F16C, and what `D` needs.
#[derive(Clone, Copy)]
pub(crate) struct Ymm<D>(D);

impl<D: Dot> Vectors for Ymm<D> {
    type B = __m256i;
    type I = __m256i;
    type F = __m256;
    type Eight = Self;

    const ROWS: usize = 8;
    const SIGNED_BIAS: i32 = D::SIGNED_BIAS;

    #[inline(always)]
    fn eight(self) -> Self {
        self
    }

    #[inline(always)]
    fn load(self, groups: [&[u8; 32]; 2]) -> __m256i {
        self.load32(groups[0])
    }
    #[inline(always)]
    fn splat_u8(self, value: u8) -> __m256i {
        proven!(_mm256_set1_epi8(value as i8))
    }

    #[inline(always)]
    fn splat(self, value: i32) -> __m256i {
        proven!(_mm256_set1_epi32(value))
    }
    #[inline(always)]
    fn load_i32(self, from: &[i32; 16]) -> __m256i {
        proven!(_mm256_loadu_si256(from.as_ptr().cast()))
    }
    #[inline(always)]
    fn store_i32(self, v: __m256i, to: &mut [i32; 16]) {
        proven!(_mm256_storeu_si256(to.as_mut_ptr().cast(), v));
    }
    #[inline(always)]
    fn add(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_mullo_epi32(a, b))
    }

    #[inline(always)]
    fn zero(self) -> __m256 {
        proven!(_mm256_setzero_ps())
    }
    #[inline(always)]
    fn splat_f32(self, value: f32) -> __m256 {
        proven!(_mm256_set1_ps(value))
    }
    #[inline(always)]
    fn load_f32(self, from: &[f32; 16]) -> __m256 {
        proven!(_mm256_loadu_ps(from.as_ptr()))
    }
    #[inline(always)]
    fn store_f32(self, v: __m256, to: &mut [f32; 16]) {
        proven!(_mm256_storeu_ps(to.as_mut_ptr(), v));
    }
    #[inline(always)]
    fn to_f32(self, v: __m256i) -> __m256 {
        proven!(_mm256_cvtepi32_ps(v))
    }
    #[inline(always)]
    fn mul_f32(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        proven!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn fnma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        proven!(_mm256_fnmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn dot16(self, acc: __m256i, w: [__m256i; 4], a: &[i8; 16], range: Range) -> __m256i {
        D::dot16(acc, w, a, range)
    }
    #[inline(always)]
    fn dot32(self, acc: __m256i, w: [__m256i; 8], a: &[i8; 32], range: Range) -> __m256i {
        D::dot32(acc, w, a, range)
    }
    #[inline(always)]
    fn dot16_scaled(self, acc: __m256i, w: [__m256i; 4], a: &[i8; 16], range: Range, scale: __m256i) -> __m256i {
        D::dot16_scaled(acc, w, a, range, scale)
    }
    #[inline(always)]
    fn dot32_scaled(self, acc: __m256i, w: [__m256i; 8], a: &[i8; 32], range: Range, scale: __m256i) -> __m256i {
        D::dot32_scaled(acc, w, a, range, scale)
    }
    #[inline(always)]
    fn weighted(self, scales: [__m256i; 2], sums: &[i16; 2]) -> __m256i {
        proven!({
            let pairs = _mm256_blend_epi16::<0xaa>(scales[0], _mm256_slli_epi32::<16>(scales[1]));
            _mm256_madd_epi16(pairs, every(pair(sums)))
        })
    }
}

impl<D: Dot> Simd for Ymm<D> {
    type Sums = [__m256i; 2];
    type Many = D::Many;

    const ISA: Isa = D::ISA;
    const NARROW: bool = D::NARROW;

    #[inline(always)]
    fn new() -> Option<Self> {
        D::new().filter(|_| Isa::Avx2.supported()).map(Ymm)
    }
    #[inline(always)]
    fn many(self) -> D::Many {
        D::many(self)
    }
    #[inline(always)]
    fn enter<B: Block>(self, product: Product<B>) {
        D::enter(self, product);
    }

    #[inline(always)]
    fn field(self, b: __m256i, shift: usize, mask: u8) -> __m256i {
        if shift == 0 && mask == 255 {
            return b;
        }
        proven!(_mm256_and_si256(right(b, shift), _mm256_set1_epi8(mask as i8)))
    }
    #[inline(always)]
    fn shl(self, b: __m256i, n: usize) -> __m256i {
        proven!(_mm256_sll_epi16(b, _mm_cvtsi32_si128(n as i32)))
    }
    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_or_si256(a, b))
    }
    #[inline(always)]
    fn look_up(self, table: &[i8; 16], indices: __m256i) -> __m256i {
        proven!({
            let table = _mm_loadu_si128(table.as_ptr().cast());
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), indices)
        })
    }
    #[inline(always)]
    fn sub(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_sub_epi32(a, b))
    }
    #[inline(always)]
    fn or_i32(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_or_si256(a, b))
    }
    #[inline(always)]
    fn field_i32(self, v: __m256i, shift: usize, mask: u32) -> __m256i {
        proven!(_mm256_and_si256(_mm256_srl_epi32(v, _mm_cvtsi32_si128(shift as i32)), _mm256_set1_epi32(mask as i32)))
    }
    #[inline(always)]
    fn shl_i32(self, v: __m256i, n: usize) -> __m256i {
        proven!(_mm256_sll_epi32(v, _mm_cvtsi32_si128(n as i32)))
    }
    #[inline(always)]
    fn words(self, b: __m256i) -> __m256i {
        b
    }
    #[inline(always)]
    fn two_bytes(self, groups: [&[u8; 16]; 2]) -> [__m256i; 2] {
        proven!({
            let pairs = _mm256_cvtepi8_epi16(_mm_loadu_si128(groups[0].as_ptr().cast()));
            [_mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(pairs)), _mm256_srai_epi32::<16>(pairs)]
        })
    }
    #[inline(always)]
    fn halves(self, groups: [&[u8; 16]; 2]) -> __m256 {
        proven!(_mm256_cvtph_ps(_mm_loadu_si128(groups[0].as_ptr().cast())))
    }

    #[inline(always)]
    fn ahead(self, streams: usize) -> usize {
        self.0.ahead(streams)
    }
    #[inline(always)]
    fn first(self, v: __m256) -> __m256 {
        proven!(before_the_rest(v))
    }
    #[inline(always)]
    fn load_i8(self, groups: [&[i8; 32]; 2]) -> __m256i {
        load_i8(groups[0])
    }
    #[inline(always)]
    fn load_halves(self, groups: [[&[u8; 16]; 2]; 2]) -> __m256i {
        let load = |half: &[u8; 16]| proven!(_mm_loadu_si128(half.as_ptr().cast()));
        proven!(_mm256_set_m128i(load(groups[0][1]), load(groups[0][0])))
    }
    #[inline(always)]
    fn no_sums(self) -> [__m256i; 2] {
        proven!([_mm256_setzero_si256(); 2])
    }
    #[inline(always)]
    fn crumbs(self, sums: [__m256i; 2], w: __m256i, a: [__m256i; 4]) -> [__m256i; 2] {
        D::crumbs(sums, w, a)
    }
    #[inline(always)]
    fn nibbles(self, sums: [__m256i; 2], w: __m256i, a: [__m256i; 2]) -> [__m256i; 2] {
        D::nibbles(sums, w, a)
    }
    #[inline(always)]
    fn bytes(self, sums: [__m256i; 2], w: __m256i, a: __m256i) -> [__m256i; 2] {
        [self.add(sums[0], D::dot(w, a, Range::Full)), sums[1]]
    }
    #[inline(always)]
    fn widen(self, total: __m256i, sums: [__m256i; 2], bits: usize) -> __m256i {
        if bits == 8 { self.add(total, sums[0]) } else { D::widen(total, sums, bits) }
    }
    #[inline(always)]
    fn across_lanes(self, totals: [__m256i; 4]) -> [i32; 4] {
        let mut sums = [0; 4];
        proven!({
            let halves = add_across(totals);
            let sum = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
            _mm_storeu_si128(sums.as_mut_ptr().cast(), sum);
        });
        sums
    }
    #[inline(always)]
    fn start(self, sums: &[i16; 2], bias: i32) -> __m256i {
        proven!(_mm256_madd_epi16(every(pair(sums)), _mm256_set1_epi16(-bias as i16)))
    }
}

impl<D: Dot> Eight for Ymm<D> {
    #[inline(always)]
    fn load32(self, bytes: &[u8; 32]) -> __m256i {
        proven!(_mm256_loadu_si256(bytes.as_ptr().cast()))
    }
    #[inline(always)]
    fn store(self, b: __m256i, to: &mut [u8; 32]) {
        proven!(_mm256_storeu_si256(to.as_mut_ptr().cast(), b));
    }
    #[inline(always)]
    fn load_nibbles(self, bytes: &[u8; 16]) -> __m256i {
        proven!({
            let b = _mm_loadu_si128(bytes.as_ptr().cast());
            _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16::<4>(b), b), _mm256_set1_epi8(15))
        })
    }
    #[inline(always)]
    fn bits(self, bits: [u8; 4], value: u8) -> __m256i {
        proven!({
            // Byte i/8 in every byte, then its bit i%8.
            let zeros = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            let spread = _mm256_set_m128i(_mm_add_epi8(zeros, _mm_set1_epi8(2)), zeros);
            let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(bits)), spread);
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
            _mm256_and_si256(set, _mm256_set1_epi8(value as i8))
        })
    }
    #[inline(always)]
    fn half(self, bits: u16) -> f32 {
        proven!(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits as i32))))
    }

    #[inline(always)]
    fn across16(self, w: [__m256i; 8], a: &[i8; 32], range: Range) -> [__m256i; 2] {
        let a = load_i8(a);
        let mut part = w;
        for part in &mut part {
            *part = D::dot(*part, a, range);
        }
        proven!({
            let low = add_across([part[0], part[1], part[2], part[3]]);
            let high = add_across([part[4], part[5], part[6], part[7]]);
            [_mm256_permute2x128_si256::<0x20>(low, high), _mm256_permute2x128_si256::<0x31>(low, high)]
        })
    }
    #[inline(always)]
    fn nibbles_across(self, rows: [&[u8; 16]; 8], a: &[i8; 32]) -> __m256i {
        D::nibbles_across(rows, a)
    }
    #[inline(always)]
    fn transpose(self, rows: [__m256i; 8]) -> [__m256i; 8] {
        transpose(rows)
    }

    /// Reads 4 bytes of each row: a whole word goes to a vector without a shuffle.
    #[inline(always)]
    fn halves_of(self, rows: &EightRows, at: usize) -> __m256 {
        proven!({
            let mut h = [_mm_setzero_si128(); 8];
            for (i, h) in h.iter_mut().enumerate() {
                let row = rows.row(i);
                // The last four bytes, where the half is at the end.
                let from = at.min(row.len() - 4);
                let word: &[u8; 4] = row[from..].first_chunk().expect("4 bytes");
                *h = _mm_cvtsi32_si128(i32::from_le_bytes(*word) >> (8 * (at - from)));
            }
            let pairs = [
                _mm_unpacklo_epi16(h[0], h[1]),
                _mm_unpacklo_epi16(h[2], h[3]),
                _mm_unpacklo_epi16(h[4], h[5]),
                _mm_unpacklo_epi16(h[6], h[7]),
            ];
            let fours = [_mm_unpacklo_epi32(pairs[0], pairs[1]), _mm_unpacklo_epi32(pairs[2], pairs[3])];
            _mm256_cvtph_ps(_mm_unpacklo_epi64(fours[0], fours[1]))
        })
    }
}

// Pieces the files of this architecture share. They are called where the instructions are proven to be there.

/// 32 activations.
#[inline(always)]
pub(crate) fn load_i8(a: &[i8; 32]) -> __m256i {
    proven!(_mm256_loadu_si256(a.as_ptr().cast()))
}

/// Activations 4v..4v+4, for every lane.
#[inline(always)]
pub(crate) fn four(a: &[i8; 16], v: usize) -> i32 {
    let [a, b, c, d] = a.as_chunks::<4>().0[v];
    i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8])
}

/// Both sums of 16 activations, as a pair for every lane.
#[inline(always)]
pub(crate) fn pair(sums: &[i16; 2]) -> i32 {
    (sums[0] as u16 as u32 | (sums[1] as u16 as u32) << 16) as i32
}

/// The same in every lane.
#[inline(always)]
pub(crate) fn every(lane: i32) -> __m256i {
    proven!(_mm256_set1_epi32(lane))
}

/// `b >> shift` in every 16 bits.
#[inline(always)]
fn right(b: __m256i, shift: usize) -> __m256i {
    proven!(if shift == 0 { b } else { _mm256_srl_epi16(b, _mm_cvtsi32_si128(shift as i32)) })
}

/// The sum of each half of each of four vectors of i32: first halves in the low lane, in order, the others in the high.
#[inline(always)]
pub(crate) fn add_across(v: [__m256i; 4]) -> __m256i {
    proven!(_mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3])))
}

/// Eight vectors of eight dwords, rows to columns.
#[inline(always)]
fn transpose(r: [__m256i; 8]) -> [__m256i; 8] {
    proven!({
        // Pairs of rows, then fours, within 128-bit lanes.
        let ab = [
            _mm256_unpacklo_epi32(r[0], r[1]),
            _mm256_unpackhi_epi32(r[0], r[1]),
            _mm256_unpacklo_epi32(r[2], r[3]),
            _mm256_unpackhi_epi32(r[2], r[3]),
            _mm256_unpacklo_epi32(r[4], r[5]),
            _mm256_unpackhi_epi32(r[4], r[5]),
            _mm256_unpacklo_epi32(r[6], r[7]),
            _mm256_unpackhi_epi32(r[6], r[7]),
        ];
        // Columns 0..4 of rows 0..4 (low lane) and columns 4..8 of them (high lane); then of rows 4..8.
        let top = [
            _mm256_unpacklo_epi64(ab[0], ab[2]),
            _mm256_unpackhi_epi64(ab[0], ab[2]),
            _mm256_unpacklo_epi64(ab[1], ab[3]),
            _mm256_unpackhi_epi64(ab[1], ab[3]),
        ];
        let bottom = [
            _mm256_unpacklo_epi64(ab[4], ab[6]),
            _mm256_unpackhi_epi64(ab[4], ab[6]),
            _mm256_unpacklo_epi64(ab[5], ab[7]),
            _mm256_unpackhi_epi64(ab[5], ab[7]),
        ];
        [
            _mm256_permute2x128_si256::<0x20>(top[0], bottom[0]),
            _mm256_permute2x128_si256::<0x20>(top[1], bottom[1]),
            _mm256_permute2x128_si256::<0x20>(top[2], bottom[2]),
            _mm256_permute2x128_si256::<0x20>(top[3], bottom[3]),
            _mm256_permute2x128_si256::<0x31>(top[0], bottom[0]),
            _mm256_permute2x128_si256::<0x31>(top[1], bottom[1]),
            _mm256_permute2x128_si256::<0x31>(top[2], bottom[2]),
            _mm256_permute2x128_si256::<0x31>(top[3], bottom[3]),
        ]
    })
}

/// `v`, computed before what follows: left to itself, the compiler keeps more products waiting to be added than there are
/// registers.
#[inline]
#[target_feature(enable = "avx")]
fn now(v: __m256i) -> __m256i {
    let mut v = v;
    if cfg!(not(miri)) {
        // SAFETY: no instruction at all.
        unsafe { asm!("/* {0} */", inlateout(ymm_reg) v, options(pure, nomem, nostack, preserves_flags)) };
    }
    v
}

/// `v`, computed before anything else is read.
#[inline]
#[target_feature(enable = "avx")]
fn before_the_rest(v: __m256) -> __m256 {
    let mut v = v;
    if cfg!(not(miri)) {
        // SAFETY: no instruction at all.
        unsafe { asm!("/* {0} */", inlateout(ymm_reg) v, options(nostack, preserves_flags)) };
    }
    v
}

/// Dot products by `maddubs`.
#[derive(Clone, Copy)]
pub(crate) struct Maddubs {
    /// The CPU has dot products of bytes, though they are not to be used: see [`NEAR`].
    near: bool,
}

/// `acc` plus products of unsigned with signed bytes, in 16 bits.
#[inline(always)]
fn products(w: [__m256i; 4], a: &[i8; 16]) -> [__m256i; 4] {
    let mut p = w;
    for (v, p) in p.iter_mut().enumerate() {
        *p = proven!(_mm256_maddubs_epi16(*p, every(four(a, v))));
    }
    p
}

/// Four sums of two products to pairs of i32: as few additions of 32 bits as the span allows. `scale` is two i16 in
/// every lane.
#[inline(always)]
fn fold(acc: __m256i, w: [__m256i; 4], a: &[i8; 16], range: Range, scale: __m256i) -> __m256i {
    proven!(match range {
        Range::Unsigned(span) => {
            let p = products(w, a);
            let (low, high) = (_mm256_add_epi16(p[0], p[1]), _mm256_add_epi16(p[2], p[3]));
            if span * 2 * 128 * 4 <= 32_767 {
                _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_add_epi16(low, high), scale))
            } else {
                let both = _mm256_add_epi32(_mm256_madd_epi16(low, scale), _mm256_madd_epi16(high, scale));
                _mm256_add_epi32(acc, both)
            }
        }
        Range::Signed => {
            let mut acc = acc;
            for (v, w) in w.into_iter().enumerate() {
                let p = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(every(four(a, v)), w));
                acc = _mm256_add_epi32(acc, _mm256_madd_epi16(p, scale));
            }
            acc
        }
        Range::Full => {
            // The scale is one: only formats without scales within a row have such activations.
            let mut acc = acc;
            for (v, w) in w.into_iter().enumerate() {
                let a = every(four(a, v));
                let odd = _mm256_madd_epi16(_mm256_srai_epi16::<8>(w), _mm256_srai_epi16::<8>(a));
                let even = _mm256_madd_epi16(even(w), even(a));
                acc = _mm256_add_epi32(acc, _mm256_add_epi32(odd, even));
            }
            acc
        }
    })
}

/// The same of eight such sums.
#[inline(always)]
fn fold_all(acc: __m256i, w: [__m256i; 8], a: &[i8; 32], range: Range, scale: __m256i) -> __m256i {
    let (first, second) = wide::halves(a);
    let (w_first, w_second) = ([w[0], w[1], w[2], w[3]], [w[4], w[5], w[6], w[7]]);
    match range {
        // All 16 sums of two products fit in 16 bits together.
        Range::Unsigned(span) if span * 2 * 128 * 8 <= 32_767 => proven!({
            let (p, q) = (products(w_first, first), products(w_second, second));
            let p = _mm256_add_epi16(_mm256_add_epi16(p[0], p[1]), _mm256_add_epi16(p[2], p[3]));
            let q = _mm256_add_epi16(_mm256_add_epi16(q[0], q[1]), _mm256_add_epi16(q[2], q[3]));
            _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_add_epi16(p, q), scale))
        }),
        _ => fold(fold(acc, w_first, first, range, scale), w_second, second, range, scale),
    }
}

/// The low halves of i32, in both halves.
#[inline(always)]
fn twice(v: __m256i) -> __m256i {
    proven!(_mm256_blend_epi16::<0xaa>(v, _mm256_slli_epi32::<16>(v)))
}

/// The even bytes, widened to 16 bits.
#[inline(always)]
fn even(v: __m256i) -> __m256i {
    proven!(_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v)))
}

impl Dot for Maddubs {
    const ISA: Isa = Isa::Avx2;
    const NARROW: bool = true;
    const SIGNED_BIAS: i32 = 0;
    type Many = Ymm<Maddubs>;

    #[inline(always)]
    fn many(s: Ymm<Maddubs>) -> Ymm<Maddubs> {
        s
    }
    #[inline(always)]
    fn new() -> Option<Maddubs> {
        Some(Maddubs { near: Isa::AvxVnni.supported() || Isa::Avx512.supported() })
    }
    #[inline(always)]
    fn ahead(self, streams: usize) -> usize {
        if self.near { NEAR } else { wide::far(streams) }
    }

    #[inline(always)]
    fn enter<B: Block>(s: Ymm<Maddubs>, product: Product<B>) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<B: Block>(s: Ymm<Maddubs>, product: Product<B>) {
            product.run(s);
        }
        proven!(compiled(s, product));
    }

    #[inline(always)]
    fn dot16(acc: __m256i, w: [__m256i; 4], a: &[i8; 16], range: Range) -> __m256i {
        proven!(fold(acc, w, a, range, _mm256_set1_epi16(1)))
    }

    #[inline(always)]
    fn dot32(acc: __m256i, w: [__m256i; 8], a: &[i8; 32], range: Range) -> __m256i {
        proven!(fold_all(acc, w, a, range, _mm256_set1_epi16(1)))
    }

    #[inline(always)]
    fn dot16_scaled(acc: __m256i, w: [__m256i; 4], a: &[i8; 16], range: Range, scale: __m256i) -> __m256i {
        fold(acc, w, a, range, twice(scale))
    }
    #[inline(always)]
    fn dot32_scaled(acc: __m256i, w: [__m256i; 8], a: &[i8; 32], range: Range, scale: __m256i) -> __m256i {
        fold_all(acc, w, a, range, twice(scale))
    }

    /// Fields 1 and 3 stay four times too large: a shift less for each. A lane takes four products of 32 bytes to each sum, at
    /// most 3·128 or 12·128: of four times 32 bytes, at most 24 576.
    #[inline(always)]
    fn crumbs(sums: [__m256i; 2], w: __m256i, a: [__m256i; 4]) -> [__m256i; 2] {
        proven!({
            let (low, high) = (now(_mm256_set1_epi8(3)), now(_mm256_set1_epi8(12)));
            let once = now(_mm256_add_epi16(sums[0], _mm256_maddubs_epi16(_mm256_and_si256(w, low), a[0])));
            let four_times = now(_mm256_add_epi16(sums[1], _mm256_maddubs_epi16(_mm256_and_si256(w, high), a[1])));
            let upper = now(_mm256_srli_epi16::<4>(w));
            [
                now(_mm256_add_epi16(once, _mm256_maddubs_epi16(_mm256_and_si256(upper, low), a[2]))),
                now(_mm256_add_epi16(four_times, _mm256_maddubs_epi16(_mm256_and_si256(upper, high), a[3]))),
            ]
        })
    }
    /// A lane takes four products of 32 bytes, at most 15·128: of four times 32 bytes, at most 30 720.
    #[inline(always)]
    fn nibbles(sums: [__m256i; 2], w: __m256i, a: [__m256i; 2]) -> [__m256i; 2] {
        proven!({
            let low = _mm256_set1_epi8(15);
            let p = _mm256_maddubs_epi16(_mm256_and_si256(w, low), a[0]);
            let q = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(w), low), a[1]);
            [now(_mm256_add_epi16(sums[0], _mm256_add_epi16(p, q))), sums[1]]
        })
    }
    #[inline(always)]
    fn widen(total: __m256i, sums: [__m256i; 2], bits: usize) -> __m256i {
        proven!({
            let [once, four_times] = sums;
            let sum = if bits == 2 { _mm256_add_epi16(once, _mm256_srai_epi16::<2>(four_times)) } else { once };
            _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)))
        })
    }

    #[inline(always)]
    fn dot(w: __m256i, a: __m256i, range: Range) -> __m256i {
        proven!({
            let p = match range {
                Range::Unsigned(_) => _mm256_maddubs_epi16(w, a),
                Range::Signed => _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w)),
                Range::Full => {
                    let odd = _mm256_madd_epi16(_mm256_srai_epi16::<8>(w), _mm256_srai_epi16::<8>(a));
                    return _mm256_add_epi32(odd, _mm256_madd_epi16(even(w), even(a)));
                }
            };
            _mm256_madd_epi16(p, _mm256_set1_epi16(1))
        })
    }

    #[inline(always)]
    fn nibbles_across(rows: [&[u8; 16]; 8], a: &[i8; 32]) -> __m256i {
        proven!({
            let low = _mm256_set1_epi8(15);
            let a = load_i8(a);
            let a_low = _mm256_permute2x128_si256::<0x00>(a, a);
            let a_high = _mm256_permute2x128_si256::<0x11>(a, a);
            // Rows i and i + 4 share a vector. |sum of four products| ≤ 4·15·127 = 7 620, so two levels of horizontal
            // additions still fit in 16 bits: 30 480.
            let mut part = [_mm256_setzero_si256(); 4];
            for (i, part) in part.iter_mut().enumerate() {
                let load = |row: &[u8; 16]| _mm_loadu_si128(row.as_ptr().cast());
                let q = _mm256_set_m128i(load(rows[i + 4]), load(rows[i]));
                let products_low = _mm256_maddubs_epi16(_mm256_and_si256(q, low), a_low);
                let products_high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(q), low), a_high);
                *part = _mm256_add_epi16(products_low, products_high);
            }
            let part = _mm256_hadd_epi16(_mm256_hadd_epi16(part[0], part[1]), _mm256_hadd_epi16(part[2], part[3]));
            _mm256_madd_epi16(part, _mm256_set1_epi16(1))
        })
    }
}

/// The instructions `vec.rs` asks for by name, and how many bytes ahead of what it reads it asks for more.
pub(crate) struct Avx2<const AHEAD: usize>;

impl<const AHEAD: usize> crate::vec::Native for Avx2<AHEAD> {
    const AHEAD: usize = AHEAD;

    #[inline(always)]
    fn load(h: &[u16; 8]) -> [f32; 8] {
        #[inline]
        #[target_feature(enable = "avx,f16c")]
        fn convert(h: &[u16; 8]) -> [f32; 8] {
            let mut out = [0.0; 8];
            // SAFETY: both arrays are as large as the unaligned load and store.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(h.as_ptr().cast()))) };
            out
        }
        // SAFETY: only AVX2 instances use this type.
        unsafe { convert(h) }
    }

    #[inline(always)]
    fn store(x: &[f32; 8]) -> [u16; 8] {
        #[inline]
        #[target_feature(enable = "avx,f16c")]
        fn convert(x: &[f32; 8]) -> [u16; 8] {
            let mut out = [0; 8];
            let limit = _mm256_set1_ps(crate::half::F16_MAX);
            // SAFETY: both arrays are as large as the unaligned load and store.
            unsafe {
                let x = _mm256_loadu_ps(x.as_ptr());
                // With NaN, min and max return their second operand, x.
                let x = _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), limit), _mm256_min_ps(limit, x));
                _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
            }
            out
        }
        // SAFETY: only AVX2 instances use this type.
        unsafe { convert(x) }
    }

    #[inline(always)]
    fn tree(lanes: [f32; LANES]) -> f32 {
        #[inline]
        #[target_feature(enable = "avx")]
        fn sum(lanes: [f32; LANES]) -> f32 {
            // SAFETY: 32 lanes are four vectors of eight; any bits are valid f32.
            let [a, b, c, d]: [__m256; 4] = unsafe { std::mem::transmute(lanes) };
            let v = _mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
        // SAFETY: only AVX2 instances use this type.
        unsafe { sum(lanes) }
    }

    #[inline(always)]
    fn trees(eights: &[[f32; 8]; 8]) -> [f32; 8] {
        #[inline]
        #[target_feature(enable = "avx")]
        fn sums(eights: &[[f32; 8]; 8]) -> [f32; 8] {
            // SAFETY: an unaligned load of eight f32.
            let load = |i: usize| unsafe { _mm256_loadu_ps(eights[i].as_ptr()) };
            // i in the lower half, j in the upper.
            let fours = |i: usize, j: usize| {
                let (a, b) = (load(i), load(j));
                _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
            };
            let twos = |a: __m256, b: __m256| {
                let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
                let (low, high) = (_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
                _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high))
            };
            let (a, b) = (twos(fours(0, 4), fours(1, 5)), twos(fours(2, 6), fours(3, 7)));
            let v = _mm256_add_ps(_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b));
            let mut out = [0.0; 8];
            // SAFETY: the array is as large as the unaligned store.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), v) };
            out
        }
        // SAFETY: only AVX2 instances use this type.
        unsafe { sums(eights) }
    }
}
