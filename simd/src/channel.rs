//! The kernels of formats with one scale a row: all integers, one multiplication at the end.
//!
//! The one idea: these formats are nothing but words of four bytes, n = 16, 8 or 4 weights a word. The words of eight
//! rows side by side, as the interleaved order has them and as transposing eight rows gives them, are multiplied by
//! masking out one field of every byte at a time. In interleaved order that field holds four neighbouring weights. In
//! GGUF order neighbours share a byte, so there the activations are put into the order of the fields instead:
//!
//! ```text
//! activations of a word of n:   0 1 2 .. n   ->   0, n/4, n/2, 3n/4 | 1, n/4 + 1, ... | ...
//! ```
//!
//! Formats with the blocks of Q4_0, Q8_0 and TQ2_0 are the same once the blocks' scales are skipped and the activations are put
//! into the order of their fields: a *piece* is what 32 bytes of a row's integers are.
//!
//! The sum of a row stays an i32 throughout: |q·a| ≤ 128·128, so up to 131 071 columns.

use crate::format::Block;
use crate::unpack::Vector;
use crate::wide::{self, Eight, MANY, Range, Simd, unrolled};
use crate::{Acts, Format, Layout, Rows, Tile};

/// The product of all rows of `w` with all tokens of `x`.
#[inline(always)]
pub(crate) fn matmul<S: Simd, B: Block>(s: S, layout: Layout, w: Rows, row_bytes: usize, x: &Acts, out: &mut Tile) {
    let mut fields = Vec::new();
    let a = match layout {
        Layout::Gguf if bits::<B>() < 8 => {
            fields.resize(x.q.len(), 0);
            by_fields::<B>(x.q, &mut fields);
            &fields[..]
        }
        _ => x.q,
    };
    let mut sums = vec![0; x.tokens];
    for (sum, of_16) in sums.iter_mut().zip(x.sums.chunks_exact(x.cols / 16)) {
        *sum = of_16.iter().map(|a| *a as i32).sum();
    }
    let tokens = Tokens { a: a.as_chunks().0, sums: &sums, x };
    if x.tokens >= MANY {
        Panel::<S>::new().matmul::<B>(s, layout, w, row_bytes, &tokens, out);
    } else if layout == Layout::Gguf {
        few::<S::Eight, B>(s.eight(), w, row_bytes, &tokens, out);
    } else {
        interleaved::<S, B>(s, w, row_bytes, &tokens, out);
    }
}

/// Bits of a weight.
const fn bits<B: Block>() -> usize {
    B::FORMAT.bits()
}

/// The lowest bits of a byte, as many as a weight has. (No channel-wise format has more than 8.)
const fn mask<B: Block>() -> u8 {
    if bits::<B>() < 8 { (1 << bits::<B>()) - 1 } else { 255 }
}

/// Words of a group of 32 weights.
const fn words<B: Block>() -> usize {
    bits::<B>()
}

/// Where the bytes of piece `i` of a row start, in two halves of 16.
#[inline(always)]
const fn piece<B: Block>(i: usize) -> [usize; 2] {
    match B::FORMAT {
        Format::Q4_0C => [36 * i + 2, 36 * i + 20],
        Format::Q8_0C => [34 * i + 2, 34 * i + 18],
        Format::Tq2_0C => [66 * (i / 2) + 32 * (i % 2), 66 * (i / 2) + 32 * (i % 2) + 16],
        _ => [32 * i, 32 * i + 16],
    }
}

/// Which weight of 128 stands in place `i` of the order of fields: byte i%4 of field i/4, in a word of 16 two-bit weights or two
/// words of 8 four-bit ones.
const fn field_order<B: Block>(i: usize) -> usize {
    match B::FORMAT {
        // Byte m of a piece has weights m, m + 32, m + 64, m + 96.
        Format::Tq2_0C => 32 * (i / 4 % 4) + 4 * (i / 16) + i % 4,
        // Byte m of a block has weights m and m + 16.
        Format::Q4_0C => i / 32 * 32 + 16 * (i / 4 % 2) + 4 * (i % 32 / 8) + i % 4,
        Format::W2C => i / 16 * 16 + 4 * (i % 4) + i / 4 % 4,
        _ => i / 8 * 8 + 2 * (i % 4) + i / 4 % 2,
    }
}

/// What the integers of a format are, and what has been added to them.
#[inline(always)]
fn range<S: Simd, B: Block>() -> (Range, i32) {
    if B::SPAN > 127 { (Range::Full, S::SIGNED_BIAS) } else { (Range::Unsigned(B::SPAN), B::BIAS) }
}

/// Puts the activations into the order of the fields of the weights.
#[inline(always)]
fn by_fields<B: Block>(a: &[i8], out: &mut [i8]) {
    const ALL: usize = 128;
    let (a, a_rest) = a.as_chunks::<ALL>();
    let (out, out_rest) = out.as_chunks_mut::<ALL>();
    for (a, out) in a.iter().zip(out) {
        for i in 0..ALL {
            out[i] = a[const { field_orders::<B>() }[i] as usize];
        }
    }
    // A multiple of 32, of formats whose fields stay within 32.
    for (i, out) in out_rest.iter_mut().enumerate() {
        *out = a_rest[field_order::<B>(i)];
    }
}

/// [`field_order`] as a table.
const fn field_orders<B: Block>() -> [u8; 128] {
    let mut all = [0; 128];
    let mut i = 0;
    while i < all.len() {
        all[i] = field_order::<B>(i) as u8;
        i += 1;
    }
    all
}

/// Activations in the order of the weights, and the rest of what is known of them.
struct Tokens<'a> {
    a: &'a [[i8; 32]],
    /// The sum of all activations of each token.
    sums: &'a [i32],
    x: &'a Acts<'a>,
}

impl Tokens<'_> {
    /// The groups of token `t`.
    #[inline(always)]
    fn groups(&self, t: usize) -> &[[i8; 32]] {
        let n = self.x.cols / 32;
        &self.a[t * n..][..n]
    }

    /// From the running sum of products with token `t` to the output.
    #[inline(always)]
    fn finish<S: Simd, B: Block>(&self, s: S, t: usize, isum: S::I, row_scale: &[f32], out: &mut [f32]) {
        let bias = s.splat(range::<S, B>().1 * self.sums[t]);
        let isum = if B::NEGATIVE { s.sub(bias, isum) } else { s.sub(isum, bias) };
        let mut lanes = [0.0; 16];
        match row_scale.first_chunk::<8>() {
            Some(eight) if row_scale.len() == 8 => lanes[..8].copy_from_slice(eight),
            _ => lanes[..row_scale.len()].copy_from_slice(row_scale),
        }
        let scale = s.mul_f32(s.load_f32(&lanes), s.splat_f32(self.x.scale[t]));
        s.store_f32(s.mul_f32(s.to_f32(isum), scale), &mut lanes);
        wide::write(&lanes, out);
    }
}

/// Adds the products of one group, the first [`words`] of `w`, with 32 activations.
#[inline(always)]
fn add<S: Simd, B: Block>(s: S, acc: [S::I; 3], w: [S::B; 8], a: &[i8; 32]) -> [S::I; 3] {
    match bits::<B>() {
        2 => s.crumbs(acc, [w[0], w[1]], a),
        4 => s.nibbles(acc, [w[0], w[1], w[2], w[3]], a),
        _ => [s.dot32(acc[0], w, a, Range::Full), acc[1], acc[2]],
    }
}

/// What [`add`] has added up.
#[inline(always)]
fn total<S: Simd, B: Block>(s: S, acc: [S::I; 3]) -> S::I {
    if bits::<B>() < 8 { s.total(acc, bits::<B>()) } else { acc[0] }
}

/// Piece `i` of each of one to eight rows, word by word, zeros beyond the end. Short of eight rows, the last stands in for the
/// missing ones.
#[inline(always)]
fn eight_words<S: Eight, B: Block>(s: S, w: &[u8], row_bytes: usize, i: usize) -> [S::B; 8] {
    let last = w.len() / row_bytes - 1;
    let [first, second] = piece::<B>(i);
    let mut rows = [s.splat_u8(0); 8];
    for (r, row) in rows.iter_mut().enumerate() {
        let bytes = &w[r.min(last) * row_bytes..][..row_bytes];
        *row = match bytes[first..].first_chunk() {
            Some(bytes) if second == first + 16 => s.load32(bytes),
            _ => {
                let mut whole = [0; 32];
                for (half, at) in whole.chunks_exact_mut(16).zip([first, second]) {
                    let bytes = bytes.get(at..).unwrap_or_default();
                    let n = bytes.len().min(16);
                    half[..n].copy_from_slice(&bytes[..n]);
                }
                s.load32(&whole)
            }
        };
    }
    s.transpose(rows)
}

// Few tokens, GGUF order.

#[inline(always)]
fn few<S: Eight, B: Block>(s: S, w: Rows, row_bytes: usize, tokens: &Tokens, out: &mut Tile) {
    for (r, bytes) in w.bytes.chunks(8 * row_bytes).enumerate() {
        let rows = 8 * r..8 * r + bytes.len() / row_bytes;
        for t in 0..tokens.x.tokens {
            let mut acc = [s.splat(0); 3];
            for (at, a) in tokens.groups(t).chunks(8 / words::<B>()).enumerate() {
                // The eight rows after these, in the order in which they lie.
                for line in (0..8 * 32).step_by(64) {
                    s.prefetch(bytes.as_ptr().wrapping_add(8 * row_bytes + 8 * 32 * at + line));
                }
                let w = eight_words::<S, B>(s, bytes, row_bytes, at);
                for (g, a) in a.iter().enumerate() {
                    let mut group = w;
                    group[..words::<B>()].copy_from_slice(&w[g * words::<B>()..][..words::<B>()]);
                    acc = add::<S, B>(s, acc, group, a);
                }
            }
            tokens.finish::<S, B>(s, t, total::<S, B>(s, acc), &w.scale[rows.clone()], &mut out.row(t)[rows.clone()]);
        }
    }
}

// Few tokens, interleaved order.

/// Reads as many streams at once as there are rows for.
#[inline(always)]
fn interleaved<S: Simd, B: Block>(s: S, w: Rows, row_bytes: usize, tokens: &Tokens, out: &mut Tile) {
    let rows = w.bytes.len() / row_bytes;
    let streams = const { if bits::<B>() == 2 { S::CRUMB_STREAMS } else { 4 } };
    let each = rows / (streams * S::ROWS) * S::ROWS;
    match streams {
        4 => few_interleaved::<S, B, 4>(s, w, row_bytes, 0, each, tokens, out),
        _ => few_interleaved::<S, B, 2>(s, w, row_bytes, 0, each, tokens, out),
    }
    let done = streams * each;
    let rest = (rows - done) / S::ROWS * S::ROWS;
    few_interleaved::<S, B, 1>(s, w, row_bytes, done, rest, tokens, out);
    few_interleaved::<S::Eight, B, 1>(s.eight(), w, row_bytes, done + rest, rows - done - rest, tokens, out);
}

/// Groups multiplied in a turn of the loop: one is less work than a turn should be.
const TURN: usize = 4;

/// Rows `from..from + N·each`: `N` streams of `each` rows.
#[inline(always)]
fn few_interleaved<S: Simd, B: Block, const N: usize>(
    s: S,
    w: Rows,
    row_bytes: usize,
    from: usize,
    each: usize,
    tokens: &Tokens,
    out: &mut Tile,
) {
    for r in (0..each).step_by(S::ROWS) {
        let mut streams = [[&[][..]; 2]; N];
        for (i, stream) in streams.iter_mut().enumerate() {
            let first = from + i * each + r;
            // The second group, where there is one; where not, it is never looked at.
            let second = if S::ROWS == 16 { first + 8 } else { first };
            *stream = [first, second].map(|row| &w.bytes[row * row_bytes..][..8 * row_bytes]);
        }
        for t in 0..tokens.x.tokens {
            let mut acc = [[s.splat(0); 3]; N];
            let mut streams = streams;
            let (turns, rest) = tokens.groups(t).as_chunks::<TURN>();
            for a in turns {
                // SAFETY: rows have as many blocks as tokens have groups.
                unsafe { add_blocks::<S, B, N, _>(s, &mut streams, a, &mut acc) };
            }
            for a in rest.as_chunks::<1>().0 {
                // SAFETY: as above.
                unsafe { add_blocks::<S, B, N, _>(s, &mut streams, a, &mut acc) };
            }
            for (i, acc) in acc.into_iter().enumerate() {
                let rows = from + i * each + r..from + i * each + r + S::ROWS;
                let isum = total::<S, B>(s, acc);
                tokens.finish::<S, B>(s, t, isum, &w.scale[rows.clone()], &mut out.row(t)[rows]);
            }
        }
    }
}

/// Takes as many blocks off each stream as there are groups of activations, at most eight, and adds their products.
///
/// # Safety
/// There must be as many.
#[inline(always)]
unsafe fn add_blocks<S: Simd, B: Block, const N: usize, const GROUPS: usize>(
    s: S,
    streams: &mut [[&[u8]; 2]; N],
    a: &[[i8; 32]; GROUPS],
    acc: &mut [[S::I; 3]; N],
) {
    let block_bytes = const { 8 * B::FORMAT.block_bytes() };
    let start = *streams;
    unrolled!(g < GROUPS, {
        let lines = g * block_bytes / 64..(g + 1) * block_bytes / 64;
        unrolled!(i < N, {
            s.prefetch_lines(start[i][0].as_ptr(), lines.clone());
            if S::ROWS == 16 {
                s.prefetch_lines(start[i][1].as_ptr(), lines.clone());
            }
            if bits::<B>() > 2 {
                // SAFETY: the caller's promise.
                let group = unsafe { take_words::<S, B, 8>(s, &mut streams[i]) };
                acc[i] = add::<S, B>(s, acc[i], group, &a[g]);
            }
        });
    });
    if bits::<B>() == 2 {
        unrolled!(i < N, {
            let mut groups = [[s.splat_u8(0); 2]; GROUPS];
            unrolled!(g < GROUPS, {
                // SAFETY: the caller's promise.
                groups[g] = unsafe { take_words::<S, B, 2>(s, &mut streams[i]) };
            });
            acc[i] = s.crumbs_of(acc[i], groups, a.each_ref());
        });
    }
}

/// Takes a block off a stream: its words, up to `N` of them.
///
/// # Safety
/// There must be one.
#[inline(always)]
unsafe fn take_words<S: Simd, B: Block, const N: usize>(s: S, stream: &mut [&[u8]; 2]) -> [S::B; N] {
    // SAFETY: the caller's promise.
    let block = unsafe { Vector::take(stream, const { 8 * B::FORMAT.block_bytes() }) };
    let mut group = [s.splat_u8(0); N];
    for (u, word) in group.iter_mut().enumerate().take(words::<B>()) {
        *word = s.load(block.fields(4 * u));
    }
    group
}

// Many tokens.

/// Groups of a panel: 1024 weights of each row.
const CHUNK: usize = 32;

/// Up to [`CHUNK`] groups of `S::ROWS` rows, a weight to a byte: eight vectors a group, four weights of each row in each;
/// with 16 rows, the two vectors of a step side by side.
#[repr(align(64))]
struct Panel<S: Simd> {
    q: [[u8; 32]; 16 * CHUNK],
    /// Running sums of every token.
    acc: Vec<[i32; 16]>,
    isa: std::marker::PhantomData<S>,
}

impl<S: Simd> Panel<S> {
    /// Vectors of eight rows in a panel of `S::ROWS`.
    const GROUPS: usize = S::ROWS / 8;

    #[inline(always)]
    fn new() -> Panel<S> {
        Panel { q: [[0; 32]; 16 * CHUNK], acc: Vec::new(), isa: std::marker::PhantomData }
    }

    /// All rows times all tokens.
    #[inline(always)]
    fn matmul<B: Block>(&mut self, s: S, layout: Layout, w: Rows, row_bytes: usize, tokens: &Tokens, out: &mut Tile) {
        let n_tokens = tokens.x.tokens;
        for (r, bytes) in w.bytes.chunks(S::ROWS * row_bytes).enumerate() {
            let rows = r * S::ROWS..r * S::ROWS + bytes.len() / row_bytes;
            self.acc.clear();
            self.acc.resize(n_tokens, [0; 16]);
            for from in (0..tokens.x.cols / 32).step_by(CHUNK) {
                let n = CHUNK.min(tokens.x.cols / 32 - from);
                for (half, bytes) in bytes.chunks(8 * row_bytes).enumerate() {
                    self.spread::<B>(s.eight(), layout, half, bytes, row_bytes, from, n);
                }
                let mut t = 0;
                while S::TOKENS == 8 && t + 8 <= n_tokens {
                    self.multiply::<B, 8>(s, tokens, t, from, n);
                    t += 8;
                }
                while t + 4 <= n_tokens {
                    self.multiply::<B, 4>(s, tokens, t, from, n);
                    t += 4;
                }
                while t < n_tokens {
                    self.multiply::<B, 1>(s, tokens, t, from, n);
                    t += 1;
                }
            }
            for t in 0..n_tokens {
                let isum = s.load_i32(&self.acc[t]);
                tokens.finish::<S, B>(s, t, isum, &w.scale[rows.clone()], &mut out.row(t)[rows.clone()]);
            }
        }
    }

    /// A byte to a weight: groups `from..from + n` of one to eight rows, as rows `8·half..` of the panel.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn spread<B: Block>(
        &mut self,
        s: S::Eight,
        layout: Layout,
        half: usize,
        w: &[u8],
        row_bytes: usize,
        from: usize,
        n: usize,
    ) {
        let per_load = const { 8 / words::<B>() };
        for k in (0..n).step_by(per_load) {
            let words = match layout {
                Layout::Gguf => eight_words::<S::Eight, B>(s, w, row_bytes, (from + k) / per_load),
                Layout::Interleaved => {
                    let at = 8 * (from + k) * B::FORMAT.block_bytes();
                    let mut words = [s.splat_u8(0); 8];
                    for (word, bytes) in words.iter_mut().zip(w[at..].as_chunks().0) {
                        *word = s.load32(bytes);
                    }
                    words
                }
            };
            for g in 0..per_load.min(n - k) {
                let out = &mut self.q[8 * Self::GROUPS * (k + g)..][..8 * Self::GROUPS];
                let fields = const { 8 / bits::<B>() };
                let mut codes = [s.splat_u8(0); 8];
                for (v, code) in codes.iter_mut().enumerate() {
                    let word = words[(8 * g + v) / fields];
                    *code = s.field(word, bits::<B>() * (v % fields), mask::<B>());
                }
                for (v, code) in s.panel(codes).into_iter().enumerate() {
                    s.store(code, &mut out[v * Self::GROUPS + half]);
                }
            }
        }
    }

    /// Adds groups `from..from + n`, which are in the panel, to the sums of tokens `t..t + T`.
    #[inline(always)]
    fn multiply<B: Block, const T: usize>(&mut self, s: S, tokens: &Tokens, t: usize, from: usize, n: usize) {
        let range = range::<S, B>().0;
        let mut acc = [s.splat(0); T];
        let mut a = [&[][..]; T];
        unrolled!(i < T, {
            a[i] = &tokens.groups(t + i)[from..from + n];
            acc[i] = s.load_i32(&self.acc[t + i]);
        });
        for (k, q) in self.q.chunks_exact(8 * Self::GROUPS).take(n).enumerate() {
            let mut w = [s.splat_u8(0); 8];
            for (v, w) in w.iter_mut().enumerate() {
                *w = s.load([&q[v * Self::GROUPS], &q[(v + 1) * Self::GROUPS - 1]]);
            }
            let mut group = [&[0; 32]; T];
            unrolled!(i < T, {
                group[i] = &a[i][k];
            });
            if S::ANEW {
                let isum = s.panel_dot32([s.splat(0); T], w, group, range);
                unrolled!(i < T, {
                    acc[i] = s.add(acc[i], isum[i]);
                });
            } else {
                acc = s.panel_dot32(acc, w, group, range);
            }
        }
        unrolled!(i < T, {
            s.store_i32(acc[i], &mut self.acc[t + i]);
        });
    }
}
