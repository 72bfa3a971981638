//! Dot products of 256 bits by `vpdpbusd`: AVX-VNNI, and the same instruction as AVX-512 encodes it.
//!
//! The one idea: the instruction multiplies unsigned by signed bytes and adds four products to an i32 lane, exactly: no
//! 16 bits in between, so nothing saturates and every [`Range`] is one loop. Signed weights become unsigned by turning
//! their top bit, which adds 128 to each ([`Vectors::SIGNED_BIAS`]); the loops in `wide.rs`
//! take 128·Σa off again. All but the dot products is [`Ymm`]'s.
//!
//! Where a dot product is one instruction, reading activations into every lane takes longer than multiplying by them. So many
//! tokens are multiplied by sixteen rows in two vectors, [`Twin`]: three reads for four dot products in place of five, and
//! twice as many sums that do not wait for each other.

use std::arch::x86_64::*;

use crate::Isa;
use crate::avx2::{Dot, Ymm, add_across, every, four, load_i8};
use crate::format::Block;
use crate::wide::{self, Product, Range, Vectors, proven};

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
    const SIGNED_BIAS: i32 = 128;
    type Many = Twin<V>;

    #[inline(always)]
    fn many(s: Ymm<V>) -> Twin<V> {
        Twin(s)
    }

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

/// Sixteen rows in the lanes of two vectors.
#[derive(Clone, Copy)]
pub(crate) struct Twin<V>(Ymm<V>);

/// The second eight of sixteen values, where the first are expected.
#[inline(always)]
fn second<T: Copy>(of: &[T; 16]) -> [T; 16] {
    let mut second = *of;
    second.copy_within(8.., 0);
    second
}

impl<V: Dpbusd> Vectors for Twin<V> {
    type B = [__m256i; 2];
    type I = [__m256i; 2];
    type F = [__m256; 2];
    type Eight = Ymm<V>;

    const ROWS: usize = 16;
    const SIGNED_BIAS: i32 = V::SIGNED_BIAS;

    #[inline(always)]
    fn eight(self) -> Ymm<V> {
        self.0
    }

    #[inline(always)]
    fn load(self, groups: [&[u8; 32]; 2]) -> [__m256i; 2] {
        [self.0.load([groups[0]; 2]), self.0.load([groups[1]; 2])]
    }
    #[inline(always)]
    fn splat_u8(self, value: u8) -> [__m256i; 2] {
        [self.0.splat_u8(value); 2]
    }

    #[inline(always)]
    fn splat(self, value: i32) -> [__m256i; 2] {
        [self.0.splat(value); 2]
    }
    #[inline(always)]
    fn load_i32(self, from: &[i32; 16]) -> [__m256i; 2] {
        [self.0.load_i32(from), self.0.load_i32(&second(from))]
    }
    #[inline(always)]
    fn store_i32(self, v: [__m256i; 2], to: &mut [i32; 16]) {
        let mut lanes = [0; 16];
        self.0.store_i32(v[1], &mut lanes);
        to[8..].copy_from_slice(&lanes[..8]);
        self.0.store_i32(v[0], to);
    }
    #[inline(always)]
    fn add(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [self.0.add(a[0], b[0]), self.0.add(a[1], b[1])]
    }
    #[inline(always)]
    fn mul(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        [self.0.mul(a[0], b[0]), self.0.mul(a[1], b[1])]
    }
    #[inline(always)]
    fn weighted(self, [s, t]: [[__m256i; 2]; 2], sums: &[i16; 2]) -> [__m256i; 2] {
        [self.0.weighted([s[0], t[0]], sums), self.0.weighted([s[1], t[1]], sums)]
    }

    #[inline(always)]
    fn zero(self) -> [__m256; 2] {
        [self.0.zero(); 2]
    }
    #[inline(always)]
    fn splat_f32(self, value: f32) -> [__m256; 2] {
        [self.0.splat_f32(value); 2]
    }
    #[inline(always)]
    fn load_f32(self, from: &[f32; 16]) -> [__m256; 2] {
        [self.0.load_f32(from), self.0.load_f32(&second(from))]
    }
    #[inline(always)]
    fn store_f32(self, v: [__m256; 2], to: &mut [f32; 16]) {
        let mut lanes = [0.0; 16];
        self.0.store_f32(v[1], &mut lanes);
        to[8..].copy_from_slice(&lanes[..8]);
        self.0.store_f32(v[0], to);
    }
    #[inline(always)]
    fn to_f32(self, v: [__m256i; 2]) -> [__m256; 2] {
        [self.0.to_f32(v[0]), self.0.to_f32(v[1])]
    }
    #[inline(always)]
    fn mul_f32(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        [self.0.mul_f32(a[0], b[0]), self.0.mul_f32(a[1], b[1])]
    }
    #[inline(always)]
    fn fma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        [self.0.fma(a[0], b[0], c[0]), self.0.fma(a[1], b[1], c[1])]
    }
    #[inline(always)]
    fn fnma(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        [self.0.fnma(a[0], b[0], c[0]), self.0.fnma(a[1], b[1], c[1])]
    }

    #[inline(always)]
    fn dot16(self, acc: [__m256i; 2], w: [[__m256i; 2]; 4], a: &[i8; 16], range: Range) -> [__m256i; 2] {
        let mut acc = acc;
        for (v, w) in w.into_iter().enumerate() {
            let a = every(four(a, v));
            acc = [V::dpbusd(acc[0], unsigned(w[0], range), a), V::dpbusd(acc[1], unsigned(w[1], range), a)];
        }
        acc
    }
}
