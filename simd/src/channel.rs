//! The kernels of formats with one scale a row: all integers, one multiplication at the end.
//!
//! The one idea: where a whole row is one integer sum, any lane may add any product. So a row is read as it lies in the file, a
//! *piece* of 32 bytes or, where vectors are as long, two of them at a time, and its lanes are added across once, at the end. A byte
//! holds n = 4, 2 or 1 weights as fields of 2, 4 or 8 bits; one field of all bytes is masked out at a time, and the activations are
//! put into that order first:
//!
//! ```text
//! piece, two-bit weights        byte 0: k = 0 1 2 3 | byte 1: k = 4 5 6 7 | ... | byte 31: k = 124 .. 127
//! activations of its fields     0 4 8 .. 124 | 1 5 9 .. 125 | 2 6 .. 126 | 3 7 .. 127
//! of two pieces side by side    0 4 8 .. 252 | 1 5 9 .. 253 | ...
//! ```
//!
//! *Few tokens* ([`few`]): four rows far apart, which are separate streams of memory; two or four of them at once, which share
//! their activations. *Many tokens* ([`Panel`]): words of four bytes of eight rows are transposed to stand side by side, a byte to
//! a weight.
//!
//! Formats with the blocks of Q4_0, Q8_0 and TQ2_0 are the same once the blocks' scales are skipped.
//!
//! The sum of a row stays an i32 throughout: |q·a| ≤ 128·128, so up to 131 071 columns.

use std::cell::Cell;

use crate::aligned::Aligned;
use crate::format::Block;
use crate::wide::{self, CHUNK, Eight, MANY, Next, Range, Simd, Vectors, unrolled};
use crate::{Acts, Format, Rows, Tile};

/// The product of all rows of `w` with all tokens of `x`.
#[inline(always)]
pub(crate) fn matmul<S: Simd, B: Block>(s: S, w: Rows, row_bytes: usize, x: &Acts, out: &mut Tile) {
    let wide = if x.tokens < MANY { const { S::ROWS / 8 } } else { 1 };
    let piece = wide * const { 32 * fields::<B>() };
    let mut ordered = ORDERED.take();
    let a = if in_order::<B>(wide) && x.cols.is_multiple_of(piece) {
        x.q
    } else {
        let len = x.cols.next_multiple_of(piece);
        ordered.grow(x.tokens * len);
        let ordered = &mut ordered[..x.tokens * len];
        for (a, to) in x.q.chunks_exact(x.cols).zip(ordered.chunks_exact_mut(len)) {
            by_fields::<B>(a, wide, to.as_chunks_mut().0);
        }
        ordered
    };
    let a = a.as_chunks().0;
    let tokens = Tokens { a, groups: a.len() / x.tokens, whole: x.cols / piece, x };
    if x.tokens >= MANY {
        Panel::<S::Many>::new().matmul::<B>(s.many(), w, row_bytes, &tokens, out);
    } else {
        // Narrow sums of two-bit weights need many registers.
        match const { if S::NARROW && bits::<B>() == 2 { 2 } else { 4 } } {
            2 => few::<S, B, 2>(s, w, row_bytes, &tokens, out),
            _ => few::<S, B, 4>(s, w, row_bytes, &tokens, out),
        }
    }
    ORDERED.set(ordered);
}

thread_local! {
    /// Activations in the order of the fields, kept so that a product allocates nothing.
    static ORDERED: Cell<Aligned> = const { Cell::new(Aligned::new()) };
}

/// Bits of a weight.
const fn bits<B: Block>() -> usize {
    B::FORMAT.bits()
}

/// Weights of a byte.
const fn fields<B: Block>() -> usize {
    8 / B::FORMAT.bits()
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

/// Whether weights lie in the order of the fields of so `wide` pieces: one to a byte, or byte m of a piece with weights m, m + 32,
/// m + 64, m + 96.
const fn in_order<B: Block>(wide: usize) -> bool {
    fields::<B>() == 1 || wide == 1 && matches!(B::FORMAT, Format::Tq2_0C)
}

/// The activations of a token in the order of the fields of so `wide` pieces, with zeros up to their end.
#[inline(always)]
fn by_fields<B: Block>(a: &[i8], wide: usize, to: &mut [[i8; 32]]) {
    let len = const { 32 * fields::<B>() };
    let (whole, rest) = a.split_at(a.len() / len * len);
    let mut last = [0; 256];
    last[..rest.len()].copy_from_slice(rest);
    let mut pieces = whole.chunks_exact(len).chain(last.chunks_exact(len));
    for to in to.chunks_exact_mut(wide * const { fields::<B>() }) {
        for i in 0..wide {
            let a = pieces.next().expect("zeros beyond the end");
            let dealt = dealt::<B>(a);
            for f in 0..const { fields::<B>() } {
                to[wide * f + i] = dealt[f];
            }
        }
    }
}

/// The activations of a piece, field after field.
#[inline(always)]
fn dealt<B: Block>(a: &[i8]) -> [[i8; 32]; 4] {
    let mut to = [[0; 32]; 4];
    match B::FORMAT {
        // Byte m of a block has weights m and m + 16; a piece is two blocks.
        Format::Q4_0C => {
            for (m, half) in a.as_chunks::<16>().0.iter().enumerate() {
                to[m % 2][m / 2 * 16..][..16].copy_from_slice(half);
            }
        }
        _ if const { in_order::<B>(1) } => {
            to.as_flattened_mut()[..a.len()].copy_from_slice(a);
        }
        _ => neighbours(a, &mut to[..const { fields::<B>() }]),
    }
    to
}

/// Deals `a` out, one after another, to each of `to`, two or four. Read as words, compilers do it with vectors.
#[inline(always)]
fn neighbours(a: &[i8], to: &mut [[i8; 32]]) {
    let mut words = [0; 32];
    for (m, word) in words.iter_mut().enumerate() {
        *word = match a[to.len() * m..][..to.len()] {
            [a, b, c, d] => u32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]),
            [a, b] => u16::from_le_bytes([a as u8, b as u8]) as u32,
            _ => unreachable!("a byte holds two or four narrow weights"),
        };
    }
    for (f, to) in to.iter_mut().enumerate() {
        for (to, word) in to.iter_mut().zip(words) {
            *to = (word >> (8 * f)) as i8;
        }
    }
}

/// Activations in the order of the fields, and the rest of what is known of them.
struct Tokens<'a> {
    a: &'a [[i8; 32]],
    /// Groups of 32 activations of a token, up to a whole piece.
    groups: usize,
    /// Pieces of a row that are whole.
    whole: usize,
    x: &'a Acts<'a>,
}

impl Tokens<'_> {
    /// The groups of token `t`.
    #[inline(always)]
    fn groups(&self, t: usize) -> &[[i8; 32]] {
        &self.a[t * self.groups..][..self.groups]
    }
}

/// What the integers of a format are, and what has been added to them.
#[inline(always)]
fn range<S: Vectors, B: Block>() -> (Range, i32) {
    if B::SPAN > 127 { (Range::Full, S::SIGNED_BIAS) } else { (Range::Unsigned(B::SPAN), B::BIAS) }
}

/// What biased weights add to the sums with token `t`: not for 32 bits to hold, but their differences do.
#[inline(always)]
fn bias<S: Vectors, B: Block>(x: &Acts, t: usize) -> i32 {
    let of_16 = x.cols / 16;
    let sum: i32 = x.sums[t * of_16..][..of_16].iter().map(|a| *a as i32).sum();
    range::<S, B>().1.wrapping_mul(sum)
}

/// From the integer sum of a row to the output.
#[inline(always)]
fn finish<B: Block>(isum: i32, bias: i32, row_scale: f32, scale: f32) -> f32 {
    let isum = isum.wrapping_sub(bias);
    let isum = if B::NEGATIVE { -isum } else { isum };
    isum as f32 * (row_scale * scale)
}

/// An integer sum, to lie in the output until [`finish`].
#[inline(always)]
fn unfinished(isum: i32) -> f32 {
    f32::from_bits(isum as u32)
}

/// Piece `i` of a row, 32 bytes, with zeros beyond the end.
#[inline(never)]
fn padded<B: Block>(row: &[u8], i: usize) -> [u8; 32] {
    let mut whole = [0; 32];
    for (half, at) in whole.chunks_exact_mut(16).zip(piece::<B>(i)) {
        let bytes = row.get(at..).unwrap_or_default();
        let n = bytes.len().min(16);
        half[..n].copy_from_slice(&bytes[..n]);
    }
    whole
}

/// Piece `i` of a row, as long as a vector.
///
/// # Safety
/// The row must have that piece.
#[inline(always)]
unsafe fn load<S: Simd, B: Block>(s: S, row: &[u8], i: usize) -> S::B {
    let wide = const { S::ROWS / 8 };
    let [first, second] = [piece::<B>(wide * i), piece::<B>(wide * i + wide - 1)];
    let at = row.as_ptr();
    // SAFETY: the caller's promise.
    unsafe {
        if const { piece::<B>(0)[1] == 16 } {
            s.load([&*at.add(first[0]).cast(), &*at.add(second[0]).cast()])
        } else {
            let halves = [&*at.add(first[0]).cast(), &*at.add(first[1]).cast()];
            s.load_halves([halves, [&*at.add(second[0]).cast(), &*at.add(second[1]).cast()]])
        }
    }
}

// Few tokens.

/// Streams of memory that rows are read from, one of each.
const STREAMS: usize = 4;

/// `N` rows at once.
#[inline(always)]
fn few<S: Simd, B: Block, const N: usize>(s: S, w: Rows, row_bytes: usize, tokens: &Tokens, out: &mut Tile) {
    let n_rows = w.bytes.len() / row_bytes;
    let each = n_rows / STREAMS;
    let mut streams = [&[][..]; STREAMS];
    for (i, stream) in streams.iter_mut().enumerate() {
        *stream = &w.bytes[i * each * row_bytes..][..each * row_bytes];
    }
    wide::begin(streams.iter().copied());
    // Rows of one token after another: they stay in a cache meanwhile.
    for t in 0..tokens.x.tokens {
        let (a, rest) = tokens.groups(t).split_at(tokens.whole * const { S::ROWS / 8 * fields::<B>() });
        let out = &mut out.row(t)[..n_rows];
        for r in 0..each {
            let mut rows = [&[][..]; STREAMS];
            unrolled!(i < STREAMS, {
                // SAFETY: a stream has `each` rows.
                rows[i] = unsafe { streams[i].get_unchecked(r * row_bytes..) };
            });
            let sums = row_of_each::<S, B, N>(s, rows, a);
            unrolled!(i < STREAMS, {
                out[i * each + r] = sums[i];
            });
        }
        // What is left over, and rows that are not there.
        let over = n_rows % STREAMS;
        if over > 0 {
            let mut rows = [&[][..]; STREAMS];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = &w.bytes[(n_rows - over + i).min(n_rows - 1) * row_bytes..];
            }
            out[n_rows - over..].copy_from_slice(&row_of_each::<S, B, N>(s, rows, a)[..over]);
        }
        if !rest.is_empty() {
            for (out, row) in out.iter_mut().zip(w.bytes.chunks_exact(row_bytes)) {
                let sum = last::<S, B>(row, a.len() / const { S::ROWS / 8 * fields::<B>() }, rest);
                *out = unfinished(sum.wrapping_add(out.to_bits() as i32));
            }
        }
        let (bias, scale) = (bias::<S, B>(tokens.x, t), tokens.x.scale[t]);
        for (out, row_scale) in out.iter_mut().zip(w.scale) {
            *out = finish::<B>(out.to_bits() as i32, bias, *row_scale, scale);
        }
    }
}

/// The integer sums of the whole pieces of rows, which begin there, with the activations of a token, unfinished; `N` rows at once.
#[inline(always)]
fn row_of_each<S: Simd, B: Block, const N: usize>(s: S, rows: [&[u8]; STREAMS], a: &[[i8; 32]]) -> [f32; STREAMS] {
    let mut total = [s.splat(0); STREAMS];
    unrolled!(g < const { STREAMS / N }, {
        let mut some = [&[][..]; N];
        unrolled!(i < N, {
            some[i] = rows[g * N + i];
        });
        let sums = sums::<S, B, N>(s, some, a);
        unrolled!(i < N, {
            total[g * N + i] = sums[i];
        });
    });
    s.across_lanes(total).map(unfinished)
}

/// The sum of what follows the `whole` pieces of a row, with its activations.
#[inline(never)]
fn last<S: Simd, B: Block>(row: &[u8], whole: usize, a: &[[i8; 32]]) -> i32 {
    let wide = const { S::ROWS / 8 };
    let mut sum: i32 = 0;
    for i in 0..wide {
        for (m, byte) in padded::<B>(row, wide * whole + i).into_iter().enumerate() {
            for f in 0..const { fields::<B>() } {
                let q = match const { bits::<B>() } {
                    8 => i32::from(byte as i8) + S::SIGNED_BIAS,
                    n => i32::from(byte) >> (n * f) & ((1 << n) - 1),
                };
                sum = sum.wrapping_add(q * i32::from(a[wide * f + i][m]));
            }
        }
    }
    sum
}

/// Pieces of 32 bytes multiplied in a turn of the loop: one vector is enough where vectors are long.
const fn turn<S: Simd>() -> usize {
    if S::ROWS == 16 { 2 } else { 4 }
}

/// The sums of `N` rows with the activations of their whole pieces; some in each lane.
#[inline(always)]
fn sums<S: Simd, B: Block, const N: usize>(s: S, rows: [&[u8]; N], a: &[[i8; 32]]) -> [S::I; N] {
    // Groups of activations of a piece; pieces of a turn of the loop, and the bytes of a row those take.
    let groups = const { S::ROWS / 8 * fields::<B>() };
    let pieces = const { turn::<S>() / (S::ROWS / 8) };
    let turn_bytes = const { piece::<B>(turn::<S>())[0] - piece::<B>(0)[0] };
    let turns = a.chunks_exact(pieces * groups);
    let mut total = [s.splat(0); N];
    let mut some = [s.no_sums(); N];
    if pieces > 1 {
        let done = (a.len() - turns.remainder().len()) / groups;
        for (i, a) in turns.remainder().chunks_exact(groups).enumerate() {
            unrolled!(r < N, {
                // SAFETY: rows have as many whole pieces as the tokens.
                some[r] = add::<S, B>(s, some[r], unsafe { load::<S, B>(s, rows[r], done + i) }, a);
                (total[r], some[r]) = (s.widen(total[r], some[r], bits::<B>()), s.no_sums());
            });
        }
    }
    let mut ahead = rows;
    for a in turns {
        unrolled!(r < N, {
            s.prefetch_lines(ahead[r].as_ptr(), STREAMS, 0..turn_bytes.div_ceil(64));
        });
        unrolled!(u < pieces, {
            unrolled!(r < N, {
                // SAFETY: as above.
                let w = unsafe { load::<S, B>(s, ahead[r], u) };
                some[r] = add::<S, B>(s, some[r], w, &a[u * groups..][..groups]);
            });
        });
        unrolled!(r < N, {
            if S::NARROW {
                (total[r], some[r]) = (s.widen(total[r], some[r], bits::<B>()), s.no_sums());
            }
            // SAFETY: as above: the pieces of this turn are there.
            ahead[r] = unsafe { ahead[r].get_unchecked(turn_bytes..) };
        });
    }
    unrolled!(r < N, {
        total[r] = s.widen(total[r], some[r], bits::<B>());
    });
    total
}

/// Adds the products of a piece with the activations of its fields.
#[inline(always)]
fn add<S: Simd, B: Block>(s: S, sums: S::Sums, w: S::B, a: &[[i8; 32]]) -> S::Sums {
    let wide = const { S::ROWS / 8 };
    match fields::<B>() {
        4 => {
            let [a, b, c, d] = [0, wide, 2 * wide, 3 * wide].map(|f| [&a[f], &a[f + wide - 1]]);
            s.crumbs(sums, w, [s.load_i8(a), s.load_i8(b), s.load_i8(c), s.load_i8(d)])
        }
        2 => s.nibbles(sums, w, [s.load_i8([&a[0], &a[wide - 1]]), s.load_i8([&a[wide], &a[2 * wide - 1]])]),
        _ => s.bytes(sums, w, s.load_i8([&a[0], &a[wide - 1]])),
    }
}

// Many tokens.

/// Some groups of the first rows of `w`, as [`Panel`] will unpack them.
#[inline(always)]
fn next_in<S: Vectors, B: Block>(w: &[u8], row_bytes: usize, groups: std::ops::Range<usize>) -> Next {
    let at = |g| piece::<B>(g / const { fields::<B>() })[0];
    Next::new(w, S::ROWS, row_bytes, at(groups.start)..at(groups.end))
}

/// Up to [`CHUNK`] groups of `S::ROWS` rows, a weight to a byte: eight vectors a group, four weights of each row in each;
/// with 16 rows, the two vectors of a step side by side.
#[repr(C, align(64))]
struct Panel<S> {
    q: [[u8; 32]; 16 * CHUNK],
    /// Running sums of every token.
    acc: Vec<[i32; 16]>,
    /// What to take off them.
    bias: Vec<i32>,
    isa: std::marker::PhantomData<S>,
}

impl<S: Vectors> Panel<S> {
    /// Vectors of eight rows in a panel of `S::ROWS`.
    const GROUPS: usize = S::ROWS / 8;

    #[inline(always)]
    fn new() -> Panel<S> {
        Panel { q: [[0; 32]; 16 * CHUNK], acc: Vec::new(), bias: Vec::new(), isa: std::marker::PhantomData }
    }

    /// All rows times all tokens.
    #[inline(always)]
    fn matmul<B: Block>(&mut self, s: S, w: Rows, row_bytes: usize, tokens: &Tokens, out: &mut Tile) {
        let n_tokens = tokens.x.tokens;
        self.bias.extend((0..n_tokens).map(|t| bias::<S, B>(tokens.x, t)));
        for (r, bytes) in w.bytes.chunks(S::ROWS * row_bytes).enumerate() {
            let rows = r * S::ROWS..r * S::ROWS + bytes.len() / row_bytes;
            let following = &w.bytes[rows.end * row_bytes..];
            self.acc.clear();
            self.acc.resize(n_tokens, [0; 16]);
            for from in (0..tokens.groups).step_by(CHUNK) {
                let n = CHUNK.min(tokens.groups - from);
                let (rows, ahead) = wide::after(bytes, following, from + n, tokens.groups);
                let mut next = next_in::<S, B>(rows, row_bytes, ahead);
                for (half, bytes) in bytes.chunks(8 * row_bytes).enumerate() {
                    self.spread::<B>(s.eight(), half, bytes, row_bytes, tokens.whole, from..from + n);
                }
                let mut t = 0;
                while S::TOKENS == 8 && t + 8 <= n_tokens {
                    next.ask(t + 8, n_tokens);
                    self.multiply::<B, 8>(s, tokens, t, from, n);
                    t += 8;
                }
                while t + 4 <= n_tokens {
                    next.ask(t + 4, n_tokens);
                    self.multiply::<B, 4>(s, tokens, t, from, n);
                    t += 4;
                }
                while t < n_tokens {
                    next.ask(t + 1, n_tokens);
                    self.multiply::<B, 1>(s, tokens, t, from, n);
                    t += 1;
                }
            }
            let mut row_scale = [0.0; 16];
            row_scale[..rows.len()].copy_from_slice(&w.scale[rows.clone()]);
            wide::write_tokens(out, n_tokens, rows, |t| {
                let (bias, scale) = (self.bias[t], tokens.x.scale[t]);
                let mut lanes = [0.0; 16];
                for (lane, (isum, row_scale)) in lanes.iter_mut().zip(self.acc[t].iter().zip(row_scale)) {
                    *lane = finish::<B>(*isum, bias, row_scale, scale);
                }
                lanes
            });
        }
    }

    /// A byte to a weight: some groups, whole pieces, of one to eight rows, as rows `8·half..` of the panel. Short of eight
    /// rows, the last stands in for the missing ones.
    #[inline(always)]
    fn spread<B: Block>(
        &mut self,
        s: S::Eight,
        half: usize,
        w: &[u8],
        row_bytes: usize,
        whole: usize,
        groups: std::ops::Range<usize>,
    ) {
        let fields = const { fields::<B>() };
        let mask = const { 255 >> (8 - bits::<B>()) };
        let last = w.len() / row_bytes - 1;
        for (k, i) in (groups.start / fields..groups.end / fields).enumerate() {
            let mut words = [s.splat_u8(0); 8];
            for (r, row) in words.iter_mut().enumerate() {
                let bytes = &w[r.min(last) * row_bytes..][..row_bytes];
                *row = if i < whole {
                    // SAFETY: the piece is one of the whole ones.
                    unsafe { load::<S::Eight, B>(s, bytes, i) }
                } else {
                    s.load32(&padded::<B>(bytes, i))
                };
            }
            let words = s.transpose(words);
            for f in 0..fields {
                let out = &mut self.q[8 * Self::GROUPS * (fields * k + f)..][..8 * Self::GROUPS];
                let mut codes = words;
                for code in &mut codes {
                    *code = s.field(*code, f * bits::<B>(), mask);
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
            acc = s.panel_dot32(acc, w, group, range);
        }
        unrolled!(i < T, {
            s.store_i32(acc[i], &mut self.acc[t + i]);
        });
    }
}
