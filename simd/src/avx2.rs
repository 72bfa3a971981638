//! Kernels for x86-64 with AVX2, FMA and F16C: all block formats.
//!
//! The one idea: rows stand in lanes. Eight rows are worked on at a time and their sums meet in one
//! vector of eight, so the canonical order (one f32 accumulator for each row, groups in order) costs
//! nothing. Two paths give the same bits:
//!
//! *Few tokens*: eight rows are read where they lie. Q4_0, Q8_0 and Q6_K have their own loops, every
//! other format decodes group by group.
//!
//! *Many tokens*: eight rows of up to 1024 weights are unpacked once into a [`Panel`] and multiplied by all
//! tokens, four at a time. A group of 32 weights lies there as 8 vectors, four weights of each row together:
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

use crate::format::{Block, Group};
use crate::scalar::check;
use crate::vec::LANES;
use crate::{Acts, Format, Isa, Kernel, Layout, Tile};

/// Rows in lanes.
const ROWS: usize = 8;

/// From this many tokens on, unpacking weights into a panel pays.
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
    let mut panel = Panel::new();
    for (r, eight) in w.chunks(ROWS * row_bytes).enumerate() {
        let n = eight.len() / row_bytes;
        // Short of eight rows, the last is read again and its result dropped.
        let mut rows = [&eight[..row_bytes]; ROWS];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = &eight[i.min(n - 1) * row_bytes..][..row_bytes];
        }
        let lanes = r * ROWS..r * ROWS + n;
        if x.tokens < MANY {
            for t in 0..x.tokens {
                let acc = match B::FORMAT {
                    Format::Q4_0 => eight_q4_0(&rows, &Token::of(x, t)),
                    Format::Q8_0 => eight_q8_0(&rows, &Token::of(x, t)),
                    Format::Q6K => eight_q6_k(&rows, &Token::of(x, t)),
                    _ => eight_groups::<B>(&rows, &Token::of(x, t)),
                };
                out.row(t)[lanes.clone()].copy_from_slice(&floats(acc)[..n]);
            }
        } else {
            panel.matmul::<B>(&rows, x, |t, acc| out.row(t)[lanes.clone()].copy_from_slice(&acc[..n]));
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
}

// Loads and stores, the only places that touch memory by pointer. All unaligned.

#[inline(always)]
fn bytes<const N: usize, const FROM: usize, const TO: usize>(b: &[u8; N]) -> &[u8] {
    const { assert!(FROM < TO && TO <= N) }
    &b[FROM..TO]
}

#[inline]
#[target_feature(enable = "avx2")]
fn load16(b: &[u8]) -> __m128i {
    let b: &[u8; 16] = b.try_into().expect("16 bytes");
    // SAFETY: 16 bytes are there.
    unsafe { _mm_loadu_si128(b.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load32(b: &[u8]) -> __m256i {
    let b: &[u8; 32] = b.try_into().expect("32 bytes");
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

/// Asks for the cache line `ahead` bytes after the start of `b`, which need not exist: a prefetch reads
/// nothing and never faults.
#[inline]
#[target_feature(enable = "avx2")]
fn prefetch(b: &[u8], ahead: usize) {
    _mm_prefetch::<_MM_HINT_T0>(b.as_ptr().wrapping_add(ahead).cast());
}

// Pieces the paths share.

/// Both sums of 16 activations, as a pair in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn pair(sums: &[i16; 2]) -> __m256i {
    _mm256_set1_epi32((sums[0] as u16 as u32 | (sums[1] as u16 as u32) << 16) as i32)
}

/// The little-endian half at the start of each block of eight rows, as f32.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn halves(b: [&[u8; 2]; ROWS]) -> __m256 {
    let h = b.map(|b| i16::from_le_bytes(*b));
    _mm256_cvtph_ps(_mm_setr_epi16(h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]))
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

/// The blocks of eight rows, `N` bytes each, as many in each row.
#[inline(always)]
fn blocks<'a, const N: usize>(rows: &[&'a [u8]; ROWS], n: usize) -> [&'a [[u8; N]]; ROWS] {
    rows.map(|row| &row.as_chunks().0[..n])
}

#[target_feature(enable = "avx2,fma,f16c")]
fn eight_q4_0(rows: &[&[u8]; ROWS], x: &Token) -> __m256 {
    let n = x.a.len();
    let blocks = blocks::<18>(rows, n);
    let (da, sums) = (&x.da[..n], &x.sums[..n]);
    let ahead = ROWS * rows[0].len();
    let low = _mm256_set1_epi8(15);
    let mut acc = _mm256_setzero_ps();
    for g in 0..n {
        let a = load_i8(&x.a[g]);
        let a_low = _mm256_permute2x128_si256::<0x00>(a, a);
        let a_high = _mm256_permute2x128_si256::<0x11>(a, a);
        // Rows i and i + 4 share a vector. |sum of four products| ≤ 4·15·127 = 7 620, so two levels of
        // horizontal additions still fit in 16 bits: 30 480.
        let mut part = [_mm256_setzero_si256(); 4];
        for i in 0..4 {
            let (b, c) = (&blocks[i][g], &blocks[i + 4][g]);
            if g % 4 == 0 {
                prefetch(b, ahead);
                prefetch(c, ahead);
            }
            let q = _mm256_set_m128i(load16(bytes::<18, 2, 18>(c)), load16(bytes::<18, 2, 18>(b)));
            let products_low = _mm256_maddubs_epi16(_mm256_and_si256(q, low), a_low);
            let products_high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16::<4>(q), low), a_high);
            part[i] = _mm256_add_epi16(products_low, products_high);
        }
        let part = _mm256_hadd_epi16(_mm256_hadd_epi16(part[0], part[1]), _mm256_hadd_epi16(part[2], part[3]));
        let isum = _mm256_madd_epi16(part, _mm256_set1_epi16(1));
        let isum = _mm256_sub_epi32(isum, _mm256_madd_epi16(pair(&sums[g]), _mm256_set1_epi16(8)));
        let d = halves(blocks.map(|b| b[g].first_chunk().expect("a half")));
        acc = accumulate(acc, isum, d, da[g]);
    }
    acc
}

#[target_feature(enable = "avx2,fma,f16c")]
fn eight_q8_0(rows: &[&[u8]; ROWS], x: &Token) -> __m256 {
    let n = x.a.len();
    let blocks = blocks::<34>(rows, n);
    let da = &x.da[..n];
    let ahead = ROWS * rows[0].len();
    let mut acc = _mm256_setzero_ps();
    for g in 0..n {
        let a = load_i8(&x.a[g]);
        let mut part = [_mm256_setzero_si256(); ROWS];
        for i in 0..ROWS {
            let b = &blocks[i][g];
            if g % 2 == 0 {
                prefetch(b, ahead);
            }
            let products = signed_products(load32(bytes::<34, 2, 34>(b)), a);
            part[i] = _mm256_madd_epi16(products, _mm256_set1_epi16(1));
        }
        let d = halves(blocks.map(|b| b[g].first_chunk().expect("a half")));
        acc = accumulate(acc, sums_of(&part), d, da[g]);
    }
    acc
}

#[target_feature(enable = "avx2,fma,f16c")]
fn eight_q6_k(rows: &[&[u8]; ROWS], x: &Token) -> __m256 {
    let n = x.a.len() / 8;
    let blocks = blocks::<210>(rows, n);
    let ahead = ROWS * rows[0].len();
    let (a, da) = (x.a.as_chunks::<8>().0, x.da.as_chunks::<8>().0);
    let (a, da) = (&a[..n], &da[..n]);
    let low = _mm256_set1_epi8(15);
    let two = _mm256_set1_epi8(0x30);
    let bias = _mm256_set1_epi8(32);
    let mut acc = _mm256_setzero_ps();
    for b in 0..n {
        let d = halves(blocks.map(|row| row[b].last_chunk().expect("a half")));
        for half in 0..2 {
            let mut part = [[_mm256_setzero_si256(); ROWS]; 4];
            for i in 0..ROWS {
                let block = &blocks[i][b];
                prefetch(block, ahead + 105 * half);
                prefetch(block, ahead + 105 * half + 64);
                let l0 = load32(&block[64 * half..][..32]);
                let l1 = load32(&block[64 * half + 32..][..32]);
                let h = load32(&block[128 + 32 * half..][..32]);
                let q = [
                    (_mm256_and_si256(l0, low), _mm256_slli_epi16::<4>(h)),
                    (_mm256_and_si256(l1, low), _mm256_slli_epi16::<2>(h)),
                    (_mm256_and_si256(_mm256_srli_epi16::<4>(l0), low), h),
                    (_mm256_and_si256(_mm256_srli_epi16::<4>(l1), low), _mm256_srli_epi16::<2>(h)),
                ];
                let scales = load16(bytes::<210, 192, 208>(block));
                for (g, (l, h)) in q.into_iter().enumerate() {
                    let q = _mm256_or_si256(l, _mm256_and_si256(h, two));
                    let a = load_i8(&a[b][4 * half + g]);
                    // (q − 32)·a in pairs: each product sum is at most 16 002, so neither saturates.
                    let products = _mm256_sub_epi16(_mm256_maddubs_epi16(q, a), _mm256_maddubs_epi16(bias, a));
                    let s = (8 * half + 2 * g) as i8;
                    let pick =
                        _mm_setr_epi8(s, s, s, s, s, s, s, s, s + 1, s + 1, s + 1, s + 1, s + 1, s + 1, s + 1, s + 1);
                    let scale = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, pick));
                    part[g][i] = _mm256_madd_epi16(products, scale);
                }
            }
            for (g, part) in part.iter().enumerate() {
                acc = accumulate(acc, sums_of(part), d, da[b][4 * half + g]);
            }
        }
    }
    acc
}

/// Any block format: eight groups decoded, then multiplied.
#[target_feature(enable = "avx2,fma,f16c")]
fn eight_groups<B: Block>(rows: &[&[u8]; ROWS], x: &Token) -> __m256 {
    let per_block = B::FORMAT.block_elems() / 32;
    let mut acc = _mm256_setzero_ps();
    for k in 0..x.a.len() {
        let (b, g) = (k / per_block, k % per_block);
        let a = load_i8(&x.a[k]);
        let mut part = [_mm256_setzero_si256(); ROWS];
        let (mut d, mut dmin, mut msum) = ([0.0; ROWS], [0.0; ROWS], [0; ROWS]);
        for i in 0..ROWS {
            let w = B::group(&rows[i][b * B::FORMAT.block_bytes()..][..B::FORMAT.block_bytes()], g);
            let scale = _mm256_set_m128i(_mm_set1_epi16(w.s[1] as i16), _mm_set1_epi16(w.s[0] as i16));
            part[i] = _mm256_madd_epi16(signed_products(load_i8(&w.q), a), scale);
            d[i] = w.d;
            dmin[i] = w.dmin;
            msum[i] = w.m[0] * x.sums[k][0] as i32 + w.m[1] * x.sums[k][1] as i32;
        }
        acc = accumulate(acc, sums_of(&part), load_f32(&d), x.da[k]);
        if B::MINIMA {
            let m = msum;
            let msum = _mm256_setr_epi32(m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]);
            acc = subtract_minima(acc, msum, load_f32(&dmin), x.da[k]);
        }
    }
    acc
}

// Many tokens: eight rows unpacked once.

/// Groups of a panel: 1024 weights of each row, 8 KB, well within the first-level cache.
const CHUNK: usize = 32;

/// Up to [`CHUNK`] groups of eight rows, unpacked.
#[repr(align(32))]
struct Panel {
    /// Weights as the drawing above; biased to be unsigned where the format's span allows.
    q: [[[u8; 32]; 8]; CHUNK],
    /// Scale of each half of the group: the row's scale twice in each lane.
    s: [[[i16; 16]; 2]; CHUNK],
    /// Minima of the halves, a pair in each lane.
    m: [[i16; 16]; CHUNK],
    d: [[f32; ROWS]; CHUNK],
    dmin: [[f32; ROWS]; CHUNK],
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
        Panel {
            q: [[[0; 32]; 8]; CHUNK],
            s: [[[0; 16]; 2]; CHUNK],
            m: [[0; 16]; CHUNK],
            d: [[0.0; ROWS]; CHUNK],
            dmin: [[0.0; ROWS]; CHUNK],
            acc: Vec::new(),
        }
    }

    /// Eight rows times all tokens; calls `out` with each token's results.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn matmul<B: Block>(&mut self, rows: &[&[u8]; ROWS], x: &Acts, mut out: impl FnMut(usize, &[f32; ROWS])) {
        let groups = x.cols / 32;
        self.acc.clear();
        self.acc.resize(x.tokens, [0.0; ROWS]);
        for from in (0..groups).step_by(CHUNK) {
            let n = CHUNK.min(groups - from);
            self.unpack::<B>(rows, from, n);
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

    /// Unpacks groups `from..from + n` of the rows.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn unpack<B: Block>(&mut self, rows: &[&[u8]; ROWS], from: usize, n: usize) {
        let per_block = B::FORMAT.block_elems() / 32;
        let bias = _mm256_set1_epi8(if run::<B>() > 0 { B::BIAS as i8 } else { 0 });
        for k in 0..n {
            let (b, g) = ((from + k) / per_block, (from + k) % per_block);
            let mut q = [_mm256_setzero_si256(); ROWS];
            for i in 0..ROWS {
                let w: Group = B::group(&rows[i][b * B::FORMAT.block_bytes()..][..B::FORMAT.block_bytes()], g);
                q[i] = _mm256_add_epi8(load_i8(&w.q), bias);
                for h in 0..2 {
                    self.s[k][h][2 * i] = w.s[h] as i16;
                    self.s[k][h][2 * i + 1] = w.s[h] as i16;
                    self.m[k][2 * i + h] = w.m[h] as i16;
                }
                self.d[k][i] = w.d;
                self.dmin[k][i] = w.dmin;
            }
            for (out, v) in self.q[k].iter_mut().zip(transpose(q)) {
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
            let scale = [load_i16(&self.s[k][0]), load_i16(&self.s[k][1])];
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
                    let pairs = _mm256_blend_epi16::<0xAA>(scale[0], scale[1]);
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
            let d = load_f32(&self.d[k]);
            for i in 0..T {
                acc[i] = accumulate(acc[i], isum[i], d, da[i][k]);
            }
            if B::MINIMA {
                let (m, dmin) = (load_i16(&self.m[k]), load_f32(&self.dmin[k]));
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

/// Activations 4v..4v+4 of group k, in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn four(a: &[[i8; 32]], k: usize, v: usize) -> __m256i {
    let a = a[k].as_chunks::<4>().0[v];
    _mm256_set1_epi32(i32::from_le_bytes(a.map(|a| a as u8)))
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
            // SAFETY: four loads of 8 cover the 32 lanes.
            let [a, b, c, d] = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(lanes[8 * i..].as_ptr()) });
            let v = _mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        }
        // SAFETY: only AVX2 instances use this type.
        unsafe { sum(lanes) }
    }
}
