//! Kernels for x86-64 with AVX2, FMA and F16C: all block formats.
//!
//! The one idea: rows stand in lanes. Eight rows are worked on at a time and their sums meet in one
//! vector of eight, so the canonical order (one f32 accumulator for each row, groups in order) costs
//! nothing. Two paths give the same bits:
//!
//! *Few tokens* of Q4_0, Q8_0 and Q6_K, the formats of Google's files: eight rows are read where they lie.
//!
//! *Many tokens*, and every other format: eight rows of up to 1024 weights are unpacked once into a [`Panel`]
//! and multiplied by all tokens, four at a time. A group of 32 weights lies there as 8 vectors, four weights of each row together:
//!
//! ```text
//! vector v:  row 0: k = 4v..4v+4 | row 1: k = 4v..4v+4 | ... | row 7: k = 4v..4v+4      (32 bytes)
//!
//! for each four tokens                         for each group
//!     for each vector v: sum[t] += maddubs(vector v, four activations of t in every lane)
//!     acc[t] = fma(sum[t] as f32, d·da[t], acc[t])
//! ```
//!
//! `maddubs` multiplies unsigned by signed bytes and saturates at 16 bits. Weights that span at most 64
//! values are stored as q + BIAS ≥ 0; the sum of the activations takes the bias out again, exactly.
//! Weights that span more (Q8_0, IQ4) go as |w| with the activation carrying the sign: |w| ≤ 128 and
//! |a| ≤ 127 give at most 32 512, even for w = −128.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use crate::format::{self, Block};
use crate::scalar::check;
use crate::vec::LANES;
use crate::{Acts, Format, Isa, Kernel, Layout, Tile};

/// Rows in lanes.
const ROWS: usize = 8;

/// From this many tokens on, unpacking weights into a panel pays also for formats with a loop of their own.
const MANY: usize = 6;

/// The AVX2 kernel of a block format.
pub(crate) struct Avx2Groups<B>(pub &'static str, pub PhantomData<B>);

impl<B: Block> Kernel for Avx2Groups<B> {
    fn name(&self) -> &'static str {
        self.0
    }
    fn format(&self) -> Format {
        B::FORMAT
    }
    fn isa(&self) -> Isa {
        Isa::Avx2
    }
    fn layout(&self) -> Layout {
        Layout::Gguf
    }
    fn matmul(&self, w: &[u8], x: &Acts, out: &mut Tile) {
        assert!(self.supported(), "{}: not on this CPU", self.name());
        let row_bytes = check(B::FORMAT, w, x, out);
        // SAFETY: the CPU has AVX2, FMA and F16C, just asserted.
        unsafe { matmul::<B>(w, row_bytes, x, out) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn matmul<B: Block>(w: &[u8], row_bytes: usize, x: &Acts, out: &mut Tile) {
    if w.is_empty() {
        return;
    }
    let own_loop = matches!(B::FORMAT, Format::Q4_0 | Format::Q8_0 | Format::Q6K);
    let mut panel = Panel::new();
    for (r, w) in w.chunks(ROWS * row_bytes).enumerate() {
        let n = w.len() / row_bytes;
        let lanes = r * ROWS..r * ROWS + n;
        if own_loop && x.tokens < MANY {
            for t in 0..x.tokens {
                let token = Token::of(x, t);
                let acc = match B::FORMAT {
                    Format::Q4_0 => eight_q4_0(&Eight::new(w, row_bytes), &token),
                    Format::Q8_0 => eight_q8_0(&Eight::new(w, row_bytes), &token),
                    _ => eight_q6_k(&Eight::new(w, row_bytes), &token),
                };
                out.row(t)[lanes.clone()].copy_from_slice(&floats(acc)[..n]);
            }
        } else {
            panel.matmul::<B>(w, row_bytes, x, |t, acc| out.row(t)[lanes.clone()].copy_from_slice(&acc[..n]));
        }
    }
}

/// Eight rows of `n` blocks of `N` bytes each. Short of eight, the last row stands in for the missing ones.
struct Eight<'a, const N: usize> {
    rows: [&'a [[u8; N]]; ROWS],
    n: usize,
}

impl<'a, const N: usize> Eight<'a, N> {
    /// `w` is one to eight rows of `row_bytes` bytes.
    fn new(w: &'a [u8], row_bytes: usize) -> Eight<'a, N> {
        let last = w.len() / row_bytes - 1;
        let mut rows = [&[][..]; ROWS];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = w[i.min(last) * row_bytes..][..row_bytes].as_chunks().0;
        }
        Eight { rows, n: row_bytes / N }
    }

    /// Block `b` of row `i`. One bound for all rows, so that loops over blocks check nothing.
    #[inline(always)]
    fn block(&self, i: usize, b: usize) -> &'a [u8; N] {
        assert!(b < self.n);
        // SAFETY: `new` made each row `n` blocks long.
        unsafe { self.rows[i].get_unchecked(b) }
    }

    /// Asks for the bytes of block `b` in the eight rows after these, which need not exist: a prefetch
    /// reads nothing and never faults. The matmul will be there next.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn prefetch(&self, b: usize, within: usize) {
        let ahead = ROWS * self.n * N + within;
        for row in &self.rows {
            _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(b).cast::<u8>().wrapping_add(ahead).cast());
        }
    }
}

/// The quantised activations of one token, by groups.
struct Token<'a> {
    a: &'a [[i8; 32]],
    da: &'a [f32],
    sums: &'a [[i16; 2]],
}

impl<'a> Token<'a> {
    #[inline(always)]
    fn of(x: &Acts<'a>, t: usize) -> Token<'a> {
        let n = x.cols / 32;
        Token {
            a: &x.q.as_chunks().0[t * n..][..n],
            da: &x.scale[t * n..][..n],
            sums: &x.sums.as_chunks().0[t * n..][..n],
        }
    }

    /// Activations, scale and sums of each group, of which there are `n`.
    #[inline(always)]
    fn groups(&self, n: usize) -> impl Iterator<Item = ((&'a [i8; 32], &'a f32), &'a [i16; 2])> {
        self.a[..n].iter().zip(&self.da[..n]).zip(&self.sums[..n])
    }
}

// Loads and stores, the only places that touch memory by pointer. All unaligned.

#[inline]
#[target_feature(enable = "avx2")]
fn load16(b: &[u8]) -> __m128i {
    let b: &[u8; 16] = b.first_chunk().expect("16 bytes");
    // SAFETY: 16 bytes are there.
    unsafe { _mm_loadu_si128(b.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load32(b: &[u8]) -> __m256i {
    let b: &[u8; 32] = b.first_chunk().expect("32 bytes");
    // SAFETY: 32 bytes are there.
    unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_i8(q: &[i8; 32]) -> __m256i {
    // SAFETY: 32 bytes are there.
    unsafe { _mm256_loadu_si256(q.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_i16(v: &[i16; 16]) -> __m256i {
    // SAFETY: 32 bytes are there.
    unsafe { _mm256_loadu_si256(v.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_f32(v: &[f32; 8]) -> __m256 {
    // SAFETY: 32 bytes are there.
    unsafe { _mm256_loadu_ps(v.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn floats(v: __m256) -> [f32; 8] {
    let mut out = [0.0; 8];
    // SAFETY: room for 32 bytes.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), v) };
    out
}

#[inline]
#[target_feature(enable = "avx2")]
fn store32(out: &mut [u8; 32], v: __m256i) {
    // SAFETY: room for 32 bytes.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), v) }
}

// Pieces the paths share.

/// Both sums of 16 activations, as a pair in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn pair(sums: &[i16; 2]) -> __m256i {
    _mm256_set1_epi32((sums[0] as u16 as u32 | (sums[1] as u16 as u32) << 16) as i32)
}

/// The half at byte `at` of block `b` of eight rows, as f32. Reads 4 bytes of each: a whole word goes to a
/// vector without a shuffle.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn halves<const N: usize>(rows: &Eight<N>, b: usize, at: usize) -> __m256 {
    let mut h = [_mm_setzero_si128(); ROWS];
    for (i, h) in h.iter_mut().enumerate() {
        let word: &[u8; 4] = rows.block(i, b)[at.min(N - 4)..][..4].try_into().expect("4 bytes");
        *h = _mm_cvtsi32_si128(i32::from_le_bytes(*word) >> (8 * (at - at.min(N - 4))));
    }
    let pairs = [
        _mm_unpacklo_epi16(h[0], h[1]),
        _mm_unpacklo_epi16(h[2], h[3]),
        _mm_unpacklo_epi16(h[4], h[5]),
        _mm_unpacklo_epi16(h[6], h[7]),
    ];
    let fours = [_mm_unpacklo_epi32(pairs[0], pairs[1]), _mm_unpacklo_epi32(pairs[2], pairs[3])];
    _mm256_cvtph_ps(_mm_unpacklo_epi64(fours[0], fours[1]))
}

/// The sum of each of eight vectors of i32, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn sums_of(v: &[__m256i; ROWS]) -> __m256i {
    let low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    let high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    _mm256_add_epi32(_mm256_permute2x128_si256::<0x20>(low, high), _mm256_permute2x128_si256::<0x31>(low, high))
}

/// Products of signed bytes, pairs added: |w|·(a with the sign of w). w may be −128, a may not.
#[inline]
#[target_feature(enable = "avx2")]
fn signed_products(w: __m256i, a: __m256i) -> __m256i {
    _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w))
}

/// acc + isum·(d·da), the step of the canonical order.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn accumulate(acc: __m256, isum: __m256i, d: __m256, da: f32) -> __m256 {
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum), _mm256_mul_ps(d, _mm256_set1_ps(da)), acc)
}

/// acc − msum·(dmin·da).
#[inline]
#[target_feature(enable = "avx2,fma")]
fn subtract_minima(acc: __m256, msum: __m256i, dmin: __m256, da: f32) -> __m256 {
    _mm256_fnmadd_ps(_mm256_cvtepi32_ps(msum), _mm256_mul_ps(dmin, _mm256_set1_ps(da)), acc)
}

// Few tokens: eight rows read where they lie.

#[target_feature(enable = "avx2,fma,f16c")]
fn eight_q4_0(rows: &Eight<18>, x: &Token) -> __m256 {
    let low = _mm256_set1_epi8(15);
    let mut acc = _mm256_setzero_ps();
    for (g, ((a, da), sums)) in x.groups(rows.n).enumerate() {
        if g % 4 == 0 {
            rows.prefetch(g, 0);
        }
        let a = load_i8(a);
        let a_low = _mm256_permute2x128_si256::<0x00>(a, a);
        let a_high = _mm256_permute2x128_si256::<0x11>(a, a);
        // Rows i and i + 4 share a vector. |sum of four products| ≤ 4·15·127 = 7 620, so two levels of
        // horizontal additions still fit in 16 bits: 30 480.
        let mut part = [_mm256_setzero_si256(); 4];
        for (i, part) in part.iter_mut().enumerate() {
            let q = _mm256_set_m128i(load16(&rows.block(i + 4, g)[2..]), load16(&rows.block(i, g)[2..]));
            let products_low = _mm256_maddubs_epi16(_mm256_and_si256(q, low), a_low);
            let products_high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(q), low), a_high);
            *part = _mm256_add_epi16(products_low, products_high);
        }
        let part = _mm256_hadd_epi16(_mm256_hadd_epi16(part[0], part[1]), _mm256_hadd_epi16(part[2], part[3]));
        let isum = _mm256_madd_epi16(part, _mm256_set1_epi16(1));
        let isum = _mm256_sub_epi32(isum, _mm256_madd_epi16(pair(sums), _mm256_set1_epi16(8)));
        acc = accumulate(acc, isum, halves(rows, g, 0), *da);
    }
    acc
}

#[target_feature(enable = "avx2,fma,f16c")]
fn eight_q8_0(rows: &Eight<34>, x: &Token) -> __m256 {
    let mut acc = _mm256_setzero_ps();
    for (g, ((a, da), _)) in x.groups(rows.n).enumerate() {
        if g % 2 == 0 {
            rows.prefetch(g, 0);
        }
        let a = load_i8(a);
        let mut part = [_mm256_setzero_si256(); ROWS];
        for (i, part) in part.iter_mut().enumerate() {
            let products = signed_products(load32(&rows.block(i, g)[2..]), a);
            *part = _mm256_madd_epi16(products, _mm256_set1_epi16(1));
        }
        acc = accumulate(acc, sums_of(&part), halves(rows, g, 0), *da);
    }
    acc
}

#[target_feature(enable = "avx2,fma,f16c")]
fn eight_q6_k(rows: &Eight<210>, x: &Token) -> __m256 {
    let (a, da) = (x.a.as_chunks::<4>().0, x.da.as_chunks::<4>().0);
    let low = _mm256_set1_epi8(15);
    let two = _mm256_set1_epi8(0x30);
    let bias = _mm256_set1_epi8(32);
    let mut acc = _mm256_setzero_ps();
    for (k, (a, da)) in a.iter().zip(da).enumerate() {
        // Four groups at a time: half a block shares its bytes, see `format::Q6K`.
        let (b, half) = (k / 2, k % 2);
        rows.prefetch(b, 105 * half);
        rows.prefetch(b, 105 * half + 64);
        let a = [load_i8(&a[0]), load_i8(&a[1]), load_i8(&a[2]), load_i8(&a[3])];
        let mut part = [[_mm256_setzero_si256(); ROWS]; 4];
        #[allow(clippy::needless_range_loop)] // i is a lane, the inner index
        for i in 0..ROWS {
            let block = rows.block(i, b);
            let l0 = load32(&block[64 * half..][..32]);
            let l1 = load32(&block[64 * half + 32..][..32]);
            let h = load32(&block[128 + 32 * half..][..32]);
            let q = [
                (_mm256_and_si256(l0, low), _mm256_slli_epi16::<4>(h)),
                (_mm256_and_si256(l1, low), _mm256_slli_epi16::<2>(h)),
                (_mm256_and_si256(_mm256_srli_epi16::<4>(l0), low), h),
                (_mm256_and_si256(_mm256_srli_epi16::<4>(l1), low), _mm256_srli_epi16::<2>(h)),
            ];
            let scales = load16(&block[192..208]);
            for (g, (l, h)) in q.into_iter().enumerate() {
                let q = _mm256_or_si256(l, _mm256_and_si256(h, two));
                // (q − 32)·a in pairs: each side is at most 63·127·2 = 16 002, so nothing saturates.
                let products = _mm256_sub_epi16(_mm256_maddubs_epi16(q, a[g]), _mm256_maddubs_epi16(bias, a[g]));
                let first = _mm_set1_epi8((8 * half + 2 * g) as i8);
                let pick = _mm_add_epi8(first, _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
                let scale = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, pick));
                part[g][i] = _mm256_madd_epi16(products, scale);
            }
        }
        let d = halves(rows, b, 208);
        for (part, da) in part.iter().zip(da) {
            acc = accumulate(acc, sums_of(part), d, *da);
        }
    }
    acc
}

/// All but the weights of one group of eight rows, in lanes.
#[derive(Clone, Copy)]
struct ScaleLanes {
    /// Scales of the halves, a pair in each lane.
    s: [i16; 16],
    /// Minima of the halves, a pair in each lane.
    m: [i16; 16],
    d: [f32; ROWS],
    dmin: [f32; ROWS],
}

impl ScaleLanes {
    const fn new() -> ScaleLanes {
        ScaleLanes { s: [0; 16], m: [0; 16], d: [0.0; ROWS], dmin: [0.0; ROWS] }
    }

    /// Puts a group into lane `i`.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    fn set<B: Block>(&mut self, i: usize, block: &[u8], g: usize) {
        let w = B::scales(block, g, |h| _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h as i32))));
        (self.s[2 * i], self.s[2 * i + 1]) = (w.s[0] as i16, w.s[1] as i16);
        (self.m[2 * i], self.m[2 * i + 1]) = (w.m[0] as i16, w.m[1] as i16);
        (self.d[i], self.dmin[i]) = (w.d, w.dmin);
    }
}

/// The weights of a group as a panel holds them: q + BIAS where `run` is positive, else q.
/// `Block::weights` serves formats without a line of their own.
#[inline]
#[target_feature(enable = "avx2")]
fn stored<B: Block>(b: &[u8], g: usize) -> __m256i {
    match B::FORMAT {
        Format::Q4_0 => nibbles(&b[2..]),
        Format::Q4_1 => nibbles(&b[4..]),
        Format::Q5_0 => _mm256_or_si256(nibbles(&b[6..]), bits(&b[2..], 16)),
        Format::Q5_1 => _mm256_or_si256(nibbles(&b[8..]), bits(&b[4..], 16)),
        Format::Q8_0 => load32(&b[2..]),
        Format::Q2K => field(&b[16 + 32 * (g / 4)..], 2 * (g % 4), 3),
        Format::Q3K => {
            let high = _mm256_slli_epi16::<2>(field(b, g, 1));
            _mm256_or_si256(field(&b[32 + 32 * (g / 4)..], 2 * (g % 4), 3), high)
        }
        Format::Q4K => field(&b[16 + 32 * (g / 2)..], 4 * (g % 2), 15),
        Format::Q5K => {
            let high = _mm256_slli_epi16::<4>(field(&b[16..], g, 1));
            _mm256_or_si256(field(&b[48 + 32 * (g / 2)..], 4 * (g % 2), 15), high)
        }
        Format::Q6K => {
            let (half, part) = (g / 4, g % 4);
            let high = _mm256_slli_epi16::<4>(field(&b[128 + 32 * half..], 2 * part, 3));
            _mm256_or_si256(field(&b[64 * half + 32 * (part % 2)..], 4 * (part / 2), 15), high)
        }
        Format::Iq4Nl => look_up(&format::IQ4, nibbles(&b[2..])),
        Format::Iq4Xs => look_up(&format::IQ4, nibbles(&b[8 + 16 * g..])),
        Format::Mxfp4 => _mm256_add_epi8(look_up(&format::E2M1, nibbles(&b[1..])), _mm256_set1_epi8(12)),
        Format::Tq2_0 => field(&b[32 * (g / 4)..], 2 * (g % 4), 3),
        Format::Q1_0 => bits(&b[2 + 4 * g..], 2),
        _ => {
            let bias = if run::<B>() > 0 { B::BIAS as i8 } else { 0 };
            _mm256_add_epi8(load_i8(&B::weights(b, g)), _mm256_set1_epi8(bias))
        }
    }
}

/// 16 bytes of nibbles: low nibbles, then high nibbles.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(b: &[u8]) -> __m256i {
    let b = load16(b);
    _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16::<4>(b), b), _mm256_set1_epi8(15))
}

/// The bits `mask << shift` of 32 bytes, shifted down.
#[inline]
#[target_feature(enable = "avx2")]
fn field(b: &[u8], shift: usize, mask: i8) -> __m256i {
    let shifted = _mm256_srl_epi16(load32(b), _mm_cvtsi32_si128(shift as i32));
    _mm256_and_si256(shifted, _mm256_set1_epi8(mask))
}

/// `value` for each of 32 bits that is set, the least significant first.
#[inline]
#[target_feature(enable = "avx2")]
fn bits(b: &[u8], value: i8) -> __m256i {
    let word = _mm256_set1_epi32(i32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    // Byte i/8 in every byte, then its bit i%8.
    let zeros = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    let spread = _mm256_set_m128i(_mm_add_epi8(zeros, _mm_set1_epi8(2)), zeros);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(word, spread), bit), bit);
    _mm256_and_si256(set, _mm256_set1_epi8(value))
}

/// table[i] for 32 indices below 16.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(table: &[i8; 16], indices: __m256i) -> __m256i {
    // SAFETY: 16 bytes are there.
    let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), indices)
}

// Many tokens, and every other format: eight rows unpacked once.

/// Groups of a panel: 1024 weights of each row, 8 KB, well within the first-level cache.
const CHUNK: usize = 32;

/// Up to [`CHUNK`] groups of eight rows, unpacked.
#[repr(align(32))]
struct Panel {
    /// Weights as the drawing above; biased to be unsigned where the format's span allows.
    q: [[[u8; 32]; 8]; CHUNK],
    scales: [ScaleLanes; CHUNK],
    /// Accumulators of every token, kept from one chunk of a row to the next.
    acc: Vec<[f32; ROWS]>,
}

/// How many vectors of products can be added in 16 bits, at most those that share a scale; 0 where
/// weights do not go unsigned.
const fn run<B: Block>() -> usize {
    if B::SPAN > 64 {
        0
    } else {
        let fit = 32_767 / (B::SPAN * 2 * 127);
        let share = if B::PER_16 { 4 } else { 8 };
        if fit >= 8 && share == 8 {
            8
        } else if fit >= 4 {
            4
        } else {
            2
        }
    }
}

impl Panel {
    fn new() -> Panel {
        Panel { q: [[[0; 32]; 8]; CHUNK], scales: [ScaleLanes::new(); CHUNK], acc: Vec::new() }
    }

    /// Eight rows times all tokens; calls `out` with each token's results.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn matmul<B: Block>(&mut self, w: &[u8], row_bytes: usize, x: &Acts, mut out: impl FnMut(usize, &[f32; ROWS])) {
        let groups = x.cols / 32;
        self.acc.clear();
        self.acc.resize(x.tokens, [0.0; ROWS]);
        for from in (0..groups).step_by(CHUNK) {
            let n = CHUNK.min(groups - from);
            self.unpack::<B>(w, row_bytes, from, n);
            let mut t = 0;
            while t + 4 <= x.tokens {
                self.multiply::<B, 4>(x, t, from, n);
                t += 4;
            }
            while t < x.tokens {
                self.multiply::<B, 1>(x, t, from, n);
                t += 1;
            }
        }
        for (t, acc) in self.acc.iter().enumerate() {
            out(t, acc);
        }
    }

    /// Unpacks groups `from..from + n` of the rows, whole blocks. Lanes without a row keep what they had.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn unpack<B: Block>(&mut self, w: &[u8], row_bytes: usize, from: usize, n: usize) {
        let per_block = const { B::FORMAT.block_elems() / 32 };
        let block_bytes = const { B::FORMAT.block_bytes() };
        let (q, scales) = (&mut self.q[..n], &mut self.scales[..n]);
        for (i, row) in w.chunks_exact(row_bytes).enumerate() {
            let blocks = row[from / per_block * block_bytes..].chunks_exact(block_bytes);
            let groups = q.chunks_exact_mut(per_block).zip(scales.chunks_exact_mut(per_block));
            for (block, (q, scales)) in blocks.zip(groups) {
                for g in 0..per_block {
                    store32(&mut q[g][i], stored::<B>(block, g));
                    scales[g].set::<B>(i, block, g);
                }
            }
        }
        for q in q {
            let rows = [
                load32(&q[0]),
                load32(&q[1]),
                load32(&q[2]),
                load32(&q[3]),
                load32(&q[4]),
                load32(&q[5]),
                load32(&q[6]),
                load32(&q[7]),
            ];
            for (out, v) in q.iter_mut().zip(transpose(rows)) {
                store32(out, v);
            }
        }
    }

    /// Adds groups `from..from + n`, which are in the panel, to the accumulators of tokens `t..t + T`.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn multiply<B: Block, const T: usize>(&mut self, x: &Acts, t: usize, from: usize, n: usize) {
        let mut acc = [_mm256_setzero_ps(); T];
        let (mut a, mut da, mut sums) = ([&[][..]; T], [&[][..]; T], [&[][..]; T]);
        for i in 0..T {
            let token = Token::of(x, t + i);
            a[i] = &token.a[from..][..n];
            da[i] = &token.da[from..][..n];
            sums[i] = &token.sums[from..][..n];
            acc[i] = load_f32(&self.acc[t + i]);
        }
        for k in 0..n {
            let mut isum = [_mm256_setzero_si256(); T];
            let scales = &self.scales[k];
            let pairs = load_i16(&scales.s);
            let scale = [twice::<0>(pairs), twice::<1>(pairs)];
            let run = const { run::<B>() };
            if run > 0 {
                for first in (0..8).step_by(run) {
                    let mut products = [_mm256_setzero_si256(); T];
                    for v in first..first + run {
                        let w = load32(&self.q[k][v]);
                        for i in 0..T {
                            let p = _mm256_maddubs_epi16(w, four(a[i], k, v));
                            products[i] = if v == first { p } else { _mm256_add_epi16(products[i], p) };
                        }
                    }
                    for i in 0..T {
                        let p = _mm256_madd_epi16(products[i], scale[first / 4]);
                        isum[i] = if first == 0 { p } else { _mm256_add_epi32(isum[i], p) };
                    }
                }
                if B::BIAS > 0 {
                    let pairs = _mm256_mullo_epi16(pairs, _mm256_set1_epi16(B::BIAS as i16));
                    for i in 0..T {
                        isum[i] = _mm256_sub_epi32(isum[i], _mm256_madd_epi16(pairs, pair(&sums[i][k])));
                    }
                }
            } else {
                for v in 0..8 {
                    let w = load32(&self.q[k][v]);
                    let magnitude = _mm256_abs_epi8(w);
                    for i in 0..T {
                        let p = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(four(a[i], k, v), w));
                        isum[i] = _mm256_add_epi32(isum[i], _mm256_madd_epi16(p, scale[v / 4]));
                    }
                }
            }
            let d = load_f32(&scales.d);
            for i in 0..T {
                acc[i] = accumulate(acc[i], isum[i], d, da[i][k]);
            }
            if B::MINIMA {
                let (m, dmin) = (load_i16(&scales.m), load_f32(&scales.dmin));
                for i in 0..T {
                    let msum = _mm256_madd_epi16(m, pair(&sums[i][k]));
                    acc[i] = subtract_minima(acc[i], msum, dmin, da[i][k]);
                }
            }
        }
        for (kept, acc) in self.acc[t..].iter_mut().zip(acc) {
            *kept = floats(acc);
        }
    }
}

/// The low or the high number of each pair, twice.
#[inline]
#[target_feature(enable = "avx2")]
fn twice<const HIGH: usize>(pairs: __m256i) -> __m256i {
    let low = _mm256_setr_epi8(
        0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13, 0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13,
    );
    _mm256_shuffle_epi8(pairs, _mm256_add_epi8(low, _mm256_set1_epi8(2 * HIGH as i8)))
}

/// Activations 4v..4v+4 of group k, in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn four(a: &[[i8; 32]], k: usize, v: usize) -> __m256i {
    let a = a[k].as_chunks::<4>().0[v];
    _mm256_set1_epi32(i32::from_le_bytes([a[0] as u8, a[1] as u8, a[2] as u8, a[3] as u8]))
}

/// Eight vectors of eight dwords, rows to columns.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(r: [__m256i; 8]) -> [__m256i; 8] {
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
}

/// The instructions `vec.rs` asks for by name.
pub(crate) struct Avx2;

impl crate::vec::Native for Avx2 {
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
}
