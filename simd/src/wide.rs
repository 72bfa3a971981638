//! The kernels of every ISA with vectors, written once.
//!
//! The one idea: rows stand in lanes. Eight rows (sixteen on AVX-512) are worked on at a time and their sums meet in
//! one vector, so the canonical order of `scalar.rs` (one f32 accumulator for each row, groups in order) costs nothing.
//! What an ISA must offer are the traits [`Vectors`], integer dot products of four activations with four weights of every
//! row and f32 arithmetic, and [`Simd`], what else unpacking takes. What a format must offer is in `unpack.rs`. Three
//! loops give the same bits:
//!
//! *Few tokens, GGUF order* ([`few`]): eight rows are read where they lie; each row's vector of 32 weights meets the same
//! 32 activations, and eight vectors of partial sums are added across.
//!
//! *Few tokens, interleaved order* ([`few_interleaved`], see `interleave.rs`): four weights of each row stand side by
//! side, so nothing is added across, and several groups of rows far apart are read as separate streams.
//!
//! *Many tokens* ([`Panel`]): some rows of up to 1024 weights are unpacked once and multiplied by all tokens, four at a
//! time. A group of 32 weights of eight rows lies in a panel as 8 vectors, which is also what the interleaved order holds:
//!
//! ```text
//! vector v:  row 0: k = 4v..4v+4 | row 1: k = 4v..4v+4 | ... | row 7: k = 4v..4v+4      (32 bytes)
//!
//! for each four tokens t                       for each group
//!     isum[t] = Σ_v dot(vector v, activations 4v..4v+4 of t in every lane)
//!     acc[t] = fma(isum[t] as f32, d·da[t], acc[t])
//! ```

use std::marker::PhantomData;

use crate::channel;
use crate::format::Block;
use crate::scalar::check;
use crate::unpack::{self, EightRows, Lanes, Row, Vector};
use crate::{Acts, Format, Isa, Kernel, Layout, Rows, Tile};

/// Runs a block for each `i` below `n`, a constant of at most 8, without a loop: what arrays hold at `i` stays in a register.
macro_rules! unrolled {
    ($i:ident < $n:expr, $body:block) => {
        $crate::wide::unrolled!(@ 0 1 2 3 4 5 6 7; $i < $n, $body)
    };
    (@ $($at:literal)*; $i:ident < $n:expr, $body:block) => {
        $(if $at < $n {
            let $i = $at;
            $body
        })*
    };
}
pub(crate) use unrolled;

/// Evaluates intrinsics where a value of the ISA's type, or being called by a method of one, proves that the CPU has them.
macro_rules! proven {
    ($e:expr) => {{
        // SAFETY: a value of the type exists only where `new` found the instructions; pointers come from references to
        // arrays as large as what is read or written, and nothing needs alignment.
        #[allow(unused_unsafe)]
        unsafe {
            $e
        }
    }};
}
#[allow(unused_imports)] // on an architecture without vectors
pub(crate) use proven;

/// From this many tokens on, unpacking weights into a panel pays also for formats with a loop of their own.
pub(crate) const MANY: usize = 6;

/// What integers the weights of a dot product may be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Range {
    /// `0..=span` as unsigned bytes, span ≤ 127; activations −128..=127.
    Unsigned(i32),
    /// −128..=127 as signed bytes; activations −127..=127.
    Signed,
    /// −128..=127 as signed bytes; activations −128..=127.
    Full,
}

/// Vectors with [`Vectors::ROWS`] rows in their lanes: dot products, sums and scales, all that the loops over many tokens take.
///
/// Every method is inlined into a function compiled for the ISA ([`Simd::enter`] is the way in).
pub(crate) trait Vectors: Copy {
    /// Four bytes of each row.
    type B: Copy;
    /// An i32 for each row.
    type I: Copy;
    /// An f32 for each row.
    type F: Copy;
    /// The same ISA with eight rows in lanes; itself, unless `ROWS` is 16.
    type Eight: Eight;

    /// 8, or 16. With 16, rows come as two groups of eight; with 8, the second group of each pair below is ignored.
    const ROWS: usize;
    /// How many tokens a panel is multiplied by at a time: 4, or 8 where there are registers for so many sums.
    const TOKENS: usize = 4;
    /// What [`Vectors::dot16`] adds to every signed weight: the sum of activations times this must be taken off.
    const SIGNED_BIAS: i32;

    fn eight(self) -> Self::Eight;

    fn load(self, groups: [&[u8; 32]; 2]) -> Self::B;
    fn splat_u8(self, value: u8) -> Self::B;

    fn splat(self, value: i32) -> Self::I;
    fn load_i32(self, from: &[i32; 16]) -> Self::I;
    fn store_i32(self, v: Self::I, to: &mut [i32; 16]);
    fn add(self, a: Self::I, b: Self::I) -> Self::I;
    fn mul(self, a: Self::I, b: Self::I) -> Self::I;
    /// scales[0]·sums[0] + scales[1]·sums[1]; the scales fit in 16 bits.
    fn weighted(self, scales: [Self::I; 2], sums: &[i16; 2]) -> Self::I;

    fn zero(self) -> Self::F;
    fn splat_f32(self, value: f32) -> Self::F;
    fn load_f32(self, from: &[f32; 16]) -> Self::F;
    fn store_f32(self, v: Self::F, to: &mut [f32; 16]);
    fn to_f32(self, v: Self::I) -> Self::F;
    fn mul_f32(self, a: Self::F, b: Self::F) -> Self::F;
    /// `fma(a, b, c)`.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `fma(a, −b, c)`.
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;

    /// `acc` plus the products of 16 weights of each row, four in each of `w`, with 16 activations.
    fn dot16(self, acc: Self::I, w: [Self::B; 4], a: &[i8; 16], range: Range) -> Self::I;

    /// The same for 32 of them.
    #[inline(always)]
    fn dot32(self, acc: Self::I, w: [Self::B; 8], a: &[i8; 32], range: Range) -> Self::I {
        let (first, second) = halves(a);
        let acc = self.dot16(acc, [w[0], w[1], w[2], w[3]], first, range);
        self.dot16(acc, [w[4], w[5], w[6], w[7]], second, range)
    }

    /// `acc + scale·(the products)`; |scale| ≤ 128.
    #[inline(always)]
    fn dot16_scaled(self, acc: Self::I, w: [Self::B; 4], a: &[i8; 16], range: Range, scale: Self::I) -> Self::I {
        self.add(acc, self.mul(self.dot16(self.splat(0), w, a, range), scale))
    }

    /// The same for 32 weights.
    #[inline(always)]
    fn dot32_scaled(self, acc: Self::I, w: [Self::B; 8], a: &[i8; 32], range: Range, scale: Self::I) -> Self::I {
        self.add(acc, self.mul(self.dot32(self.splat(0), w, a, range), scale))
    }

    /// Puts 32 weights of each row into the order in which the many-token loops keep them.
    #[inline(always)]
    fn panel(self, w: [Self::B; 8]) -> [Self::B; 8] {
        w
    }
    /// [`Vectors::dot32`] for several tokens, of weights in the order of [`Vectors::panel`].
    #[inline(always)]
    fn panel_dot32<const T: usize>(
        self,
        acc: [Self::I; T],
        w: [Self::B; 8],
        a: [&[i8; 32]; T],
        range: Range,
    ) -> [Self::I; T] {
        let mut acc = acc;
        unrolled!(t < T, {
            acc[t] = self.dot32(acc[t], w, a[t], range);
        });
        acc
    }
    /// [`Vectors::dot16_scaled`] likewise, of half of such weights.
    #[inline(always)]
    fn panel_dot16_scaled<const T: usize>(
        self,
        acc: [Self::I; T],
        w: [Self::B; 4],
        a: [&[i8; 16]; T],
        range: Range,
        scale: Self::I,
    ) -> [Self::I; T] {
        let mut acc = acc;
        unrolled!(t < T, {
            acc[t] = self.dot16_scaled(acc[t], w, a[t], range, scale);
        });
        acc
    }

    /// [`Vectors::dot32_scaled`] likewise.
    #[inline(always)]
    fn panel_dot32_scaled<const T: usize>(
        self,
        acc: [Self::I; T],
        w: [Self::B; 8],
        a: [&[i8; 32]; T],
        range: Range,
        scale: Self::I,
    ) -> [Self::I; T] {
        let mut acc = acc;
        unrolled!(t < T, {
            acc[t] = self.dot32_scaled(acc[t], w, a[t], range, scale);
        });
        acc
    }
}

/// An ISA's vectors, and what unpacking weights and multiplying by few tokens take. A value proves that this CPU has the ISA, so
/// the methods are safe.
pub(crate) trait Simd: Vectors {
    /// Sums of products of one row with one token, wherever they stand.
    type Sums: Copy;
    /// What many tokens are multiplied by: itself, or more rows at once.
    type Many: Vectors<Eight = Self::Eight>;

    const ISA: Isa;
    /// Blocks of one group multiplied in a turn of the loop: one, where the compiler makes enough of that.
    const TURN: usize = 1;
    /// Whether [`Simd::Sums`] have room for four times 32 bytes of weights only, and must then be [`Simd::widen`]ed.
    const NARROW: bool = false;

    /// The proof. `None` if this CPU lacks the ISA.
    fn new() -> Option<Self>;
    fn many(self) -> Self::Many;
    /// The product, compiled for this ISA. What is inlined there must call the methods below in loops: a closure given to `map`
    /// stays code of its own, without the ISA's instructions.
    fn enter<B: Block>(self, product: Product<B>);

    /// `(b >> shift) & mask` in every byte.
    fn field(self, b: Self::B, shift: usize, mask: u8) -> Self::B;
    /// `b << n` in every byte; no bit may leave its byte.
    fn shl(self, b: Self::B, n: usize) -> Self::B;
    fn or(self, a: Self::B, b: Self::B) -> Self::B;
    /// `table[i]` for every byte i, all below 16.
    fn look_up(self, table: &[i8; 16], indices: Self::B) -> Self::B;

    fn sub(self, a: Self::I, b: Self::I) -> Self::I;
    fn or_i32(self, a: Self::I, b: Self::I) -> Self::I;
    /// `(v >> shift) & mask` in every lane, unsigned.
    fn field_i32(self, v: Self::I, shift: usize, mask: u32) -> Self::I;
    /// `v << n` in every lane.
    fn shl_i32(self, v: Self::I, n: usize) -> Self::I;
    /// The bytes of each row as an i32, little-endian.
    fn words(self, b: Self::B) -> Self::I;
    /// Two signed bytes of each row, apart.
    fn two_bytes(self, groups: [&[u8; 16]; 2]) -> [Self::I; 2];

    fn halves(self, groups: [&[u8; 16]; 2]) -> Self::F;

    /// `v`, computed before what follows: for compilers that put off a sum until they run out of registers.
    #[inline(always)]
    fn now(self, v: Self::F) -> Self::F {
        v
    }

    /// `v`, computed before anything else is read: for compilers that otherwise read more ahead than there are registers.
    #[inline(always)]
    fn first(self, v: Self::F) -> Self::F {
        v
    }

    /// How far ahead of each of so many streams its bytes are asked for: of few streams further, so that as much is on its way.
    #[inline(always)]
    fn ahead(self, streams: usize) -> usize {
        far(streams)
    }
    /// Asks for some lines of one of so many streams, see [`prefetch`], counted from [`Simd::ahead`] of `at`.
    #[inline(always)]
    fn prefetch_lines(self, at: *const u8, streams: usize, lines: std::ops::Range<usize>) {
        for line in lines {
            prefetch(at.wrapping_add(self.ahead(streams) + 64 * line));
        }
    }

    fn load_i8(self, groups: [&[i8; 32]; 2]) -> Self::B;
    /// [`Simd::load`] of groups whose halves lie apart.
    fn load_halves(self, groups: [[&[u8; 16]; 2]; 2]) -> Self::B;
    /// No sums yet.
    fn no_sums(self) -> Self::Sums;
    /// Adds the products of bytes of a row, four weights to a byte, with the activations of the lowest to the highest two bits.
    fn crumbs(self, sums: Self::Sums, w: Self::B, a: [Self::B; 4]) -> Self::Sums;
    /// The same of two weights to a byte.
    fn nibbles(self, sums: Self::Sums, w: Self::B, a: [Self::B; 2]) -> Self::Sums;
    /// The same of a weight to a byte: [`Range::Full`].
    fn bytes(self, sums: Self::Sums, w: Self::B, a: Self::B) -> Self::Sums;
    /// `total` plus sums of products of weights of `bits` bits.
    fn widen(self, total: Self::I, sums: Self::Sums, bits: usize) -> Self::I;
    /// The sum of all lanes of each vector.
    fn across_lanes(self, totals: [Self::I; 4]) -> [i32; 4];

    /// −bias·(sums[0] + sums[1]) in every lane: what a dot product of 32 biased weights starts from.
    fn start(self, sums: &[i16; 2], bias: i32) -> Self::I;
}

/// Eight rows in lanes, and what reading rows in GGUF order takes: vectors of 32 weights of one row.
pub(crate) trait Eight: Simd {
    /// 32 bytes of a row.
    fn load32(self, bytes: &[u8; 32]) -> Self::B;
    fn store(self, b: Self::B, to: &mut [u8; 32]);
    /// 16 bytes of nibbles: low nibbles, then high nibbles.
    fn load_nibbles(self, bytes: &[u8; 16]) -> Self::B;
    /// `value` for each of 32 bits that is set, the least significant first.
    fn bits(self, bits: [u8; 4], value: u8) -> Self::B;
    /// One half as f32.
    fn half(self, bits: u16) -> f32;

    /// For each row, the products of its 32 weights with the activations: those of the first 16, those of the rest.
    fn across16(self, w: [Self::B; 8], a: &[i8; 32], range: Range) -> [Self::I; 2];
    /// For each row, the products of its 32 weights with the activations.
    #[inline(always)]
    fn across32(self, w: [Self::B; 8], a: &[i8; 32], range: Range) -> Self::I {
        let halves = self.across16(w, a, range);
        self.add(halves[0], halves[1])
    }
    /// For each row, the products of its 32 nibbles (as [`Eight::load_nibbles`] orders them) with the activations.
    fn nibbles_across(self, rows: [&[u8; 16]; 8], a: &[i8; 32]) -> Self::I;
    /// Vectors of rows to vectors of columns: four bytes of each row in every vector.
    fn transpose(self, rows: [Self::B; 8]) -> [Self::B; 8];
    /// The half at byte `at` of each row.
    #[inline(always)]
    fn halves_of(self, rows: &EightRows, at: usize) -> Self::F {
        let bytes = rows.two(at);
        self.halves([&bytes, &bytes])
    }
}

/// The first 16 and the last 16.
#[inline(always)]
pub(crate) fn halves(a: &[i8; 32]) -> (&[i8; 16], &[i8; 16]) {
    let (halves, _) = a.as_chunks();
    (&halves[0], &halves[1])
}

/// The kernel of a block format on an ISA, for one order of bytes.
pub(crate) struct Wide<S, B>(pub &'static str, pub Layout, pub PhantomData<fn() -> (S, B)>);

impl<S: Simd, B: Block> Kernel for Wide<S, B> {
    fn name(&self) -> &'static str {
        self.0
    }
    fn format(&self) -> Format {
        B::FORMAT
    }
    fn isa(&self) -> Isa {
        S::ISA
    }
    fn layout(&self) -> Layout {
        self.1
    }
    fn matmul(&self, w: Rows, x: &Acts, out: &mut Tile) {
        let s = S::new().unwrap_or_else(|| panic!("{}: not on this CPU", self.name()));
        let row_bytes = check(B::FORMAT, self.1, &w, x, out);
        if !w.bytes.is_empty() && x.tokens > 0 {
            s.enter::<B>(Product { layout: self.1, w, row_bytes, x, out, format: PhantomData });
        }
    }
}

/// A matrix product: what [`Kernel::matmul`] was given, checked and not empty.
pub(crate) struct Product<'p, 'w, 'x, 'o, B> {
    pub layout: Layout,
    pub w: Rows<'w>,
    pub row_bytes: usize,
    pub x: &'p Acts<'x>,
    pub out: &'p mut Tile<'o>,
    format: PhantomData<B>,
}

impl<B: Block> Product<'_, '_, '_, '_, B> {
    /// Computes it. To be inlined into a function compiled for the ISA of `S`.
    #[inline(always)]
    pub fn run<S: Simd>(self, s: S) {
        let Product { layout, w, row_bytes, x, out, .. } = self;
        if const { B::FORMAT.is_channel() } {
            return channel::matmul::<S, B>(s, w, row_bytes, x, out);
        }
        let few_tokens = x.tokens < MANY;
        match layout {
            Layout::Gguf if few_tokens && const { B::FORMAT.interleaves() } => {
                few::<S::Eight, B>(s.eight(), w.bytes, row_bytes, x, out);
            }
            Layout::Interleaved if few_tokens => interleaved::<S, B>(s, w.bytes, row_bytes, x, out),
            _ => Panel::<S::Many>::new().matmul::<B>(s.many(), layout, w.bytes, row_bytes, x, out),
        }
    }
}

/// The quantised activations of one token, by groups.
#[derive(Clone, Copy)]
struct Token<'a> {
    a: &'a [[i8; 32]],
    da: &'a [f32],
    sums: &'a [[i16; 2]],
}

impl<'a> Token<'a> {
    /// Groups `from..from + n` of token `t`.
    #[inline(always)]
    fn of(x: &Acts<'a>, t: usize, from: usize, n: usize) -> Token<'a> {
        let at = t * (x.cols / 32) + from;
        Token { a: &x.q.as_chunks().0[at..][..n], da: &x.scale[at..][..n], sums: &x.sums.as_chunks().0[at..][..n] }
    }

    /// Takes off the first `n` groups.
    ///
    /// # Safety
    /// There must be as many.
    #[inline(always)]
    unsafe fn take(&mut self, n: usize) -> Token<'a> {
        // SAFETY: the caller's promise, for each of three slices of the same length.
        let ((a, a_rest), (da, da_rest), (sums, sums_rest)) =
            unsafe { (self.a.split_at_unchecked(n), self.da.split_at_unchecked(n), self.sums.split_at_unchecked(n)) };
        *self = Token { a: a_rest, da: da_rest, sums: sums_rest };
        Token { a, da, sums }
    }

    /// Group `k`, which must be one of the `n` asked for.
    #[inline(always)]
    fn group(&self, k: usize) -> (&'a [i8; 32], f32, &'a [i16; 2]) {
        (&self.a[k], self.da[k], &self.sums[k])
    }
}

/// What the integers of a format are, and what is added to them to make them so.
#[inline(always)]
fn range<S: Vectors, B: Block>() -> (Range, i32) {
    if B::SPAN > 127 { (Range::Signed, S::SIGNED_BIAS) } else { (Range::Unsigned(B::SPAN), B::BIAS) }
}

/// The last lines of the canonical order: from the raw sums of a group to the accumulator. `sums` are those of both
/// halves together where the format has one scale for both (`isum[1]` is ignored), and start from [`start`].
#[inline(always)]
fn step<S: Vectors, B: Block>(s: S, isum: S::I, lanes: &Lanes<S>, da: f32, sums: &[i16; 2], acc: S::F) -> S::F {
    let da = s.splat_f32(da);
    let acc = s.fma(s.to_f32(isum), s.mul_f32(lanes.d, da), acc);
    if !B::MINIMA {
        return acc;
    }
    let msum = s.weighted(lanes.m, sums);
    s.fnma(s.to_f32(msum), s.mul_f32(lanes.dmin, da), acc)
}

/// Whether what biased weights bring too much depends on the activations alone.
#[inline(always)]
fn plain_bias<S: Vectors, B: Block>() -> bool {
    range::<S, B>().1 != 0 && !const { unpack::sub_scales(B::FORMAT) }
}

/// What the integer sum of a group starts from: what biased weights bring too much, negative.
#[inline(always)]
fn start<S: Simd, B: Block>(s: S, lanes: &Lanes<S>, sums: &[i16; 2]) -> S::I {
    if plain_bias::<S, B>() { s.start(sums, range::<S, B>().1) } else { scaled_start::<S, B>(s, lanes, sums) }
}

/// The same where it is not [`plain_bias`].
#[inline(always)]
fn scaled_start<S: Vectors, B: Block>(s: S, lanes: &Lanes<S>, sums: &[i16; 2]) -> S::I {
    match range::<S, B>().1 {
        0 => s.splat(0),
        bias => s.mul(s.weighted(lanes.s, sums), s.splat(-bias)),
    }
}

/// The integer sum of a group whose weights are four of each row to a vector.
#[inline(always)]
fn sum<S: Simd, B: Block>(s: S, w: [S::B; 8], lanes: &Lanes<S>, a: &[i8; 32], sums: &[i16; 2]) -> S::I {
    let (range, start) = (range::<S, B>().0, start::<S, B>(s, lanes, sums));
    if !const { unpack::sub_scales(B::FORMAT) } {
        return s.dot32(start, w, a, range);
    }
    if !const { unpack::halves_apart(B::FORMAT) } {
        return s.dot32_scaled(start, w, a, range, lanes.s[0]);
    }
    let (first, second) = halves(a);
    let isum = s.dot16_scaled(start, [w[0], w[1], w[2], w[3]], first, range, lanes.s[0]);
    s.dot16_scaled(isum, [w[4], w[5], w[6], w[7]], second, range, lanes.s[1])
}

/// The same of several tokens, from what each starts from, with weights in the order of [`Vectors::panel`].
#[inline(always)]
fn panel_sum<S: Vectors, B: Block, const T: usize>(
    s: S,
    start: [S::I; T],
    w: [S::B; 8],
    lanes: &Lanes<S>,
    a: [&[i8; 32]; T],
) -> [S::I; T] {
    let range = range::<S, B>().0;
    if !const { unpack::sub_scales(B::FORMAT) } {
        return s.panel_dot32(start, w, a, range);
    }
    if !const { unpack::halves_apart(B::FORMAT) } {
        return s.panel_dot32_scaled(start, w, a, range, lanes.s[0]);
    }
    let (mut first, mut second) = ([halves(a[0]).0; T], [halves(a[0]).1; T]);
    unrolled!(t < T, {
        (first[t], second[t]) = halves(a[t]);
    });
    let isum = s.panel_dot16_scaled(start, [w[0], w[1], w[2], w[3]], first, range, lanes.s[0]);
    s.panel_dot16_scaled(isum, [w[4], w[5], w[6], w[7]], second, range, lanes.s[1])
}

// Few tokens, GGUF order.

#[inline(always)]
fn few<S: Eight, B: Block>(s: S, w: &[u8], row_bytes: usize, x: &Acts, out: &mut Tile) {
    let per_block = const { B::FORMAT.block_elems() / 32 };
    let block_bytes = const { B::FORMAT.block_bytes() };
    let period = const { unpack::period(B::FORMAT) };
    let blocks = row_bytes / block_bytes;
    let group_bytes = const { 8 * B::FORMAT.block_bytes() / (B::FORMAT.block_elems() / 32) };
    // Whether eight rows and the next eight leave room in the smallest of first-level caches.
    let fits = 16 * row_bytes <= 24 << 10;
    for (r, w) in w.chunks(8 * row_bytes).enumerate() {
        let n = w.len() / row_bytes;
        let rows = EightRows::new(w, row_bytes);
        for t in 0..x.tokens {
            let token = Token::of(x, t, 0, blocks * per_block);
            let mut acc = s.zero();
            let mut asked = 0;
            for b in 0..blocks {
                let block = rows.block(b, block_bytes);
                let common = unpack::common::<S, B, _>(s, &block);
                for outer in 0..per_block / period {
                    unrolled!(inner < period, {
                        let g = outer * period + inner;
                        let (a, da, sums) = token.group(b * per_block + g);
                        // The eight rows after these, in the order in which they lie.
                        let next = w.as_ptr().wrapping_add(8 * row_bytes);
                        let at = (b * per_block + g) * group_bytes;
                        if cfg!(target_arch = "x86_64") {
                            // Every line once.
                            while asked < at + group_bytes {
                                let line = next.wrapping_add(asked);
                                if fits {
                                    prefetch(line)
                                } else {
                                    prefetch_into::<2, _>(line)
                                }
                                asked += 64;
                            }
                        } else {
                            // Some twice: a fixed number takes fewer instructions.
                            (0..group_bytes).step_by(64).for_each(|line| prefetch(next.wrapping_add(at + line)));
                        }
                        let lanes = unpack::lanes::<S, B, _>(s, &block, &common, g);
                        let isum = sum_across::<S, B>(s, &block, g, &lanes, a, sums);
                        acc = step::<S, B>(s, isum, &lanes, da, sums, acc);
                        // Two groups may share what was read once; of more, vectors would wait on the stack.
                        if per_block > 1 && (period > 2 || inner + 1 == period) {
                            acc = s.first(acc);
                        }
                    });
                }
            }
            store(s, acc, &mut out.row(t)[8 * r..][..n]);
        }
    }
}

/// [`sum`] for weights in GGUF order.
#[inline(always)]
fn sum_across<S: Eight, B: Block>(
    s: S,
    block: &EightRows,
    g: usize,
    lanes: &Lanes<S>,
    a: &[i8; 32],
    sums: &[i16; 2],
) -> S::I {
    let (range, bias) = range::<S, B>();
    if let Some(at) = const { unpack::plain_nibbles(B::FORMAT) } {
        let isum = s.nibbles_across(block.sixteen(at), a);
        return if bias > 0 { s.add(isum, s.start(sums, bias)) } else { isum };
    }
    let mut w = [s.splat_u8(0); 8];
    for (i, w) in w.iter_mut().enumerate() {
        *w = unpack::codes::<S, B, _>(s, Row(block.row(i)), g);
    }
    if !const { unpack::sub_scales(B::FORMAT) } {
        let isum = s.across32(w, a, range);
        return if bias > 0 { s.add(isum, s.start(sums, bias)) } else { isum };
    }
    let isum = if const { unpack::halves_apart(B::FORMAT) } {
        let halves = s.across16(w, a, range);
        s.add(s.mul(halves[0], lanes.s[0]), s.mul(halves[1], lanes.s[1]))
    } else {
        s.mul(s.across32(w, a, range), lanes.s[0])
    };
    if bias == 0 {
        return isum;
    }
    s.sub(isum, s.mul(s.weighted(lanes.s, sums), s.splat(bias)))
}

/// Writes as many lanes as `out` has room for; a whole vector of them by a vector.
#[inline(always)]
fn store<S: Simd>(s: S, v: S::F, out: &mut [f32]) {
    let mut lanes = [0.0; 16];
    s.store_f32(v, &mut lanes);
    if let Ok(out) = <&mut [f32; 8]>::try_from(&mut *out) {
        *out = *lanes.first_chunk().expect("16 lanes");
    } else {
        out.copy_from_slice(&lanes[..out.len()]);
    }
}

// Few tokens, interleaved order.

/// Reads four streams of eight rows at once, or two, each of them from end to end, as far as there are rows for that.
#[inline(always)]
fn interleaved<S: Simd, B: Block>(s: S, w: &[u8], row_bytes: usize, x: &Acts, out: &mut Tile) {
    let rows = w.len() / row_bytes;
    // Blocks of many groups keep many vectors alive: fewer streams.
    let streams = const {
        match unpack::period(B::FORMAT) {
            4 => 16 / S::ROWS,
            1 => 32 / S::ROWS,
            _ => 2,
        }
    };
    let each = rows / (streams * S::ROWS) * 8;
    let mut done = match streams {
        1 => 0,
        4 => few_interleaved::<S, B, 4>(s, w, row_bytes, 0, each, x, out),
        _ => few_interleaved::<S, B, 2>(s, w, row_bytes, 0, each, x, out),
    };
    done = few_interleaved::<S, B, 1>(s, w, row_bytes, done, (rows - done) / S::ROWS * 8, x, out);
    few_interleaved::<S::Eight, B, 1>(s.eight(), w, row_bytes, done, rows - done, x, out);
}

/// Rows from `from` on: `N` streams of `each` rows, or pairs of streams; returns the row after them.
#[inline(always)]
fn few_interleaved<S: Simd, B: Block, const N: usize>(
    s: S,
    w: &[u8],
    row_bytes: usize,
    from: usize,
    each: usize,
    x: &Acts,
    out: &mut Tile,
) -> usize {
    let per_block = const { B::FORMAT.block_elems() / 32 };
    let block_bytes = const { 8 * B::FORMAT.block_bytes() };
    let group_bytes = block_bytes / per_block;
    let ahead = s.ahead(const { N * S::ROWS / 8 });
    let period = const { unpack::period(B::FORMAT) };
    let blocks = row_bytes / const { B::FORMAT.block_bytes() };
    // With sixteen lanes, the other half of the streams.
    let other = const { (S::ROWS / 8 - 1) * N } * each;
    if each == 0 {
        return from;
    }
    begin((0..const { N * S::ROWS / 8 }).map(|i| &w[(from + i * each) * row_bytes..]));
    for r in (0..each).step_by(8) {
        let mut streams = [[&[][..]; 2]; N];
        for (i, stream) in streams.iter_mut().enumerate() {
            let first = from + i * each + r;
            *stream = [first, first + other].map(|row| &w[row * row_bytes..][..8 * row_bytes]);
        }
        for t in 0..x.tokens {
            let token = Token::of(x, t, 0, blocks * per_block);
            let mut acc = [s.zero(); N];
            let in_turns = per_block == 1 && S::TURN > 1;
            if in_turns {
                let (mut streams, mut token) = (streams, token);
                for _ in 0..blocks / S::TURN {
                    // SAFETY: a row has as many blocks as the token has groups.
                    unsafe { add_blocks::<S, B, N>(s, S::TURN, &mut streams, &mut token, &mut acc) };
                }
                for _ in 0..blocks % S::TURN {
                    // SAFETY: as above.
                    unsafe { add_blocks::<S, B, N>(s, 1, &mut streams, &mut token, &mut acc) };
                }
            }
            for b in 0..if in_turns { 0 } else { blocks } {
                let mut common = [unpack::Common::<S>::none(s); N];
                let mut block = [Vector::none(); N];
                unrolled!(i < N, {
                    block[i] = Vector::block(streams[i], b);
                    common[i] = unpack::common::<S, B, _>(s, &block[i]);
                });
                let (token, from) =
                    if per_block > 1 { (Token::of(x, t, b * per_block, per_block), 0) } else { (token, b) };
                for outer in 0..per_block / period {
                    unrolled!(inner < period, {
                        let g = outer * period + inner;
                        let group = token.group(from + g);
                        unrolled!(i < N, {
                            for line in (0..group_bytes).step_by(64) {
                                block[i].prefetch::<S>(g * group_bytes + line + ahead);
                            }
                            acc[i] = add_group::<S, B>(s, &block[i], &common[i], g, group, acc[i]);
                            if per_block > 1 {
                                acc[i] = s.first(acc[i]);
                            }
                        });
                    });
                }
            }
            for (i, acc) in acc.into_iter().enumerate() {
                let mut lanes = [0.0; 16];
                s.store_f32(acc, &mut lanes);
                for (half, lanes) in lanes.as_chunks::<8>().0.iter().enumerate().take(S::ROWS / 8) {
                    out.row(t)[from + half * other + i * each + r..][..8].copy_from_slice(lanes);
                }
            }
        }
    }
    from + N * S::ROWS / 8 * each
}

/// Adds the products of group `g` of a block with a group of activations.
#[inline(always)]
fn add_group<S: Simd, B: Block>(
    s: S,
    block: &Vector<B>,
    common: &unpack::Common<S>,
    g: usize,
    (a, da, sums): (&[i8; 32], f32, &[i16; 2]),
    acc: S::F,
) -> S::F {
    let lanes = unpack::lanes::<S, B, _>(s, block, common, g);
    let mut w = [s.splat_u8(0); 8];
    for (v, w) in w.iter_mut().enumerate() {
        *w = unpack::codes::<S, B, _>(s, block.at(v), g);
    }
    let isum = sum::<S, B>(s, w, &lanes, a, sums);
    s.now(step::<S, B>(s, isum, &lanes, da, sums, acc))
}

/// Takes `n` blocks of one group off each stream and as many groups off the token, and adds their products.
///
/// # Safety
/// There must be as many.
#[inline(always)]
unsafe fn add_blocks<S: Simd, B: Block, const N: usize>(
    s: S,
    n: usize,
    streams: &mut [[&[u8]; 2]; N],
    token: &mut Token,
    acc: &mut [S::F; N],
) {
    let block_bytes = const { 8 * B::FORMAT.block_bytes() };
    let start = *streams;
    unrolled!(b < n, {
        // SAFETY: the caller's promise.
        let group = unsafe { token.take(1) }.group(0);
        let lines = (b * block_bytes).div_ceil(64)..((b + 1) * block_bytes).div_ceil(64);
        unrolled!(i < N, {
            for start in &start[i][..S::ROWS / 8] {
                s.prefetch_lines(start.as_ptr(), const { N * S::ROWS / 8 }, lines.clone());
            }
            // SAFETY: the caller's promise.
            let block = unsafe { Vector::take(&mut streams[i]) };
            let common = unpack::common::<S, B, _>(s, &block);
            acc[i] = add_group::<S, B>(s, &block, &common, 0, group, acc[i]);
        });
    });
}

/// Asks for the line at `at`, which need not exist: a prefetch reads nothing and never faults.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    prefetch_into::<1, T>(at);
}

/// The same into the cache of that level, 1 or 2.
#[inline(always)]
fn prefetch_into<const LEVEL: usize, T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        if LEVEL == 1 { _mm_prefetch::<_MM_HINT_T0>(at.cast()) } else { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    // SAFETY: a hint, which changes neither memory nor registers.
    unsafe {
        std::arch::asm!("prfm pldl{level}keep, [{at}]", level = const LEVEL, at = in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", not(miri)))))]
    let _ = at;
}

/// Asks for the first lines of streams, of all of them the first, then of all the second: before they are read nobody has.
#[inline(always)]
pub(crate) fn begin<'a>(streams: impl Iterator<Item = &'a [u8]> + Clone) {
    for line in 0..BEGIN {
        for stream in streams.clone() {
            prefetch(stream.as_ptr().wrapping_add(64 * line));
        }
    }
}

/// Lines of each stream asked for before it is read.
const BEGIN: usize = 4;

/// How far ahead of each of four streams its bytes are asked for.
pub(crate) const AHEAD: usize = 2048;

/// The same of any number of streams on CPUs that see streams themselves, so that this comes on top of it: those with dot
/// products of bytes.
#[cfg(target_arch = "x86_64")]
pub(crate) const NEAR: usize = 256;

/// [`Simd::ahead`] where everything has to be asked for.
#[inline(always)]
pub(crate) fn far(streams: usize) -> usize {
    AHEAD * (4 / streams).max(1)
}

// Many tokens.

/// Groups of a panel: 1024 weights of each row, 8 KB for eight rows, well within the first-level cache.
pub(crate) const CHUNK: usize = 32;

/// What is unpacked after the groups up to `end` of some rows: more of them, or the first of the rows that follow.
#[inline(always)]
pub(crate) fn after<'w>(
    rows: &'w [u8],
    following: &'w [u8],
    end: usize,
    groups: usize,
) -> (&'w [u8], std::ops::Range<usize>) {
    if end < groups { (rows, end..groups.min(end + CHUNK)) } else { (following, 0..groups.min(CHUNK)) }
}

/// Some groups of the first rows of `w`, as [`Panel`] will unpack them.
#[inline(always)]
fn next_in<S: Vectors, B: Block>(layout: Layout, w: &[u8], row_bytes: usize, groups: std::ops::Range<usize>) -> Next {
    let bytes = |g| g / const { B::FORMAT.block_elems() / 32 } * const { B::FORMAT.block_bytes() };
    let (from, to) = (bytes(groups.start), bytes(groups.end));
    match layout {
        Layout::Gguf => Next::new(w, S::ROWS, row_bytes, from..to),
        Layout::Interleaved => Next::new(w, S::ROWS / 8, 8 * row_bytes, 8 * from..8 * to),
    }
}

/// The bytes of weights to be unpacked next, asked for while all tokens are multiplied by the ones before: unpacking reads
/// so many streams for so short a time that no prefetcher sees them.
pub(crate) struct Next {
    /// What to ask for now, line `line` of the `each` of its piece; after the last, the next piece is `gap` bytes away.
    at: *const u8,
    line: usize,
    each: usize,
    gap: usize,
    /// How many have been asked for, of so many.
    asked: usize,
    lines: usize,
}

impl Next {
    /// Of up to `n` pieces of `w`, as many as there are, each of `stride` bytes, these bytes.
    #[inline(always)]
    pub fn new(w: &[u8], n: usize, stride: usize, bytes: std::ops::Range<usize>) -> Next {
        let each = bytes.len().div_ceil(64);
        let (at, gap) = (w.as_ptr().wrapping_add(bytes.start), stride.wrapping_sub(64 * each));
        Next { at, line: 0, each, gap, asked: 0, lines: n.min(w.len() / stride) * each }
    }

    /// Asks for as much as is due once the first `done` of `tokens` are multiplied.
    #[inline(always)]
    pub fn ask(&mut self, done: usize, tokens: usize) {
        let due = self.lines * done / tokens;
        while self.asked < due {
            prefetch(self.at);
            self.at = self.at.wrapping_add(64);
            self.line += 1;
            if self.line == self.each {
                (self.at, self.line) = (self.at.wrapping_add(self.gap), 0);
            }
            self.asked += 1;
        }
    }
}

/// Up to [`CHUNK`] groups of `S::ROWS` rows, unpacked.
#[repr(align(64))]
struct Panel<S> {
    /// Weights as the drawing above; with 16 rows, the two vectors of a step side by side.
    q: [[u8; 32]; 16 * CHUNK],
    s: [[[i32; 16]; 2]; CHUNK],
    m: [[[i32; 16]; 2]; CHUNK],
    d: [[f32; 16]; CHUNK],
    dmin: [[f32; 16]; CHUNK],
    /// Accumulators of every token, kept from one chunk of a row to the next.
    acc: Vec<[f32; 16]>,
    /// Of every token what the integer sums of its groups start from, where that is [`plain_bias`].
    start: Vec<i32>,
    isa: PhantomData<S>,
}

impl<S: Vectors> Panel<S> {
    #[inline(always)]
    fn new() -> Panel<S> {
        Panel {
            q: [[0; 32]; 16 * CHUNK],
            s: [[[0; 16]; 2]; CHUNK],
            m: [[[0; 16]; 2]; CHUNK],
            d: [[0.0; 16]; CHUNK],
            dmin: [[0.0; 16]; CHUNK],
            acc: Vec::new(),
            start: Vec::new(),
            isa: PhantomData,
        }
    }

    /// All rows times all tokens.
    #[inline(always)]
    fn matmul<B: Block>(&mut self, s: S, layout: Layout, all: &[u8], row_bytes: usize, x: &Acts, out: &mut Tile) {
        let groups = x.cols / 32;
        if plain_bias::<S, B>() {
            let bias = range::<S, B>().1;
            self.start.extend(x.sums.as_chunks().0.iter().map(|&[a, b]| -bias * (i32::from(a) + i32::from(b))));
        }
        for (r, w) in all.chunks(S::ROWS * row_bytes).enumerate() {
            let n_rows = w.len() / row_bytes;
            let following = &all[r * S::ROWS * row_bytes + w.len()..];
            self.acc.clear();
            self.acc.resize(x.tokens, [0.0; 16]);
            for from in (0..groups).step_by(CHUNK) {
                let n = CHUNK.min(groups - from);
                let (rows, ahead) = after(w, following, from + n, groups);
                let mut next = next_in::<S, B>(layout, rows, row_bytes, ahead);
                for (half, w) in w.chunks(8 * row_bytes).enumerate() {
                    match layout {
                        Layout::Gguf => self.unpack::<B>(s.eight(), half, w, row_bytes, from, n),
                        Layout::Interleaved => self.spread::<B>(s.eight(), half, w, from, n),
                    }
                }
                let mut t = 0;
                while S::TOKENS == 8 && t + 8 <= x.tokens {
                    next.ask(t + 8, x.tokens);
                    self.multiply::<B, 8>(s, x, t, from, n);
                    t += 8;
                }
                while t + 4 <= x.tokens {
                    next.ask(t + 4, x.tokens);
                    self.multiply::<B, 4>(s, x, t, from, n);
                    t += 4;
                }
                while t < x.tokens {
                    next.ask(t + 1, x.tokens);
                    self.multiply::<B, 1>(s, x, t, from, n);
                    t += 1;
                }
            }
            let rows = r * S::ROWS..r * S::ROWS + n_rows;
            write_tokens(out, x.tokens, rows, |t| self.acc[t]);
        }
    }

    /// Vectors of eight rows in a panel of `S::ROWS`.
    const GROUPS: usize = S::ROWS / 8;

    /// Unpacks groups `from..from + n` of one to eight rows in GGUF order, whole blocks, as rows `8·half..` of the
    /// panel. Lanes without a row keep what they had.
    #[inline(always)]
    fn unpack<B: Block>(&mut self, s: S::Eight, half: usize, w: &[u8], row_bytes: usize, from: usize, n: usize) {
        let per_block = const { B::FORMAT.block_elems() / 32 };
        let block_bytes = const { B::FORMAT.block_bytes() };
        let rows = EightRows::new(w, row_bytes);
        let n_rows = w.len() / row_bytes;
        for b in 0..n / per_block {
            let block = rows.block(from / per_block + b, block_bytes);
            for g in 0..per_block {
                let k = b * per_block + g;
                let mut codes = [s.splat_u8(0); 8];
                for (i, codes) in codes.iter_mut().enumerate() {
                    *codes = unpack::codes::<S::Eight, B, _>(s, Row(block.row(i)), g);
                }
                let out = &mut self.q[8 * Self::GROUPS * k..][..8 * Self::GROUPS];
                for (v, codes) in s.panel(s.transpose(codes)).into_iter().enumerate() {
                    s.store(codes, &mut out[v * Self::GROUPS + half]);
                }
                for i in 0..n_rows {
                    let scales = B::scales(block.row(i), g, |bits| s.half(bits));
                    let lane = 8 * half + i;
                    (self.d[k][lane], self.dmin[k][lane]) = (scales.d, scales.dmin);
                    (self.s[k][0][lane], self.s[k][1][lane]) = (scales.s[0], scales.s[1]);
                    (self.m[k][0][lane], self.m[k][1][lane]) = (scales.m[0], scales.m[1]);
                }
            }
        }
    }

    /// The same for eight rows in interleaved order.
    #[inline(always)]
    fn spread<B: Block>(&mut self, s: S::Eight, half: usize, w: &[u8], from: usize, n: usize) {
        let per_block = const { B::FORMAT.block_elems() / 32 };
        for b in 0..n / per_block {
            let block = Vector::<B>::block([w, w], from / per_block + b);
            let common = unpack::common::<S::Eight, B, _>(s, &block);
            for g in 0..per_block {
                let k = b * per_block + g;
                let out = &mut self.q[8 * Self::GROUPS * k..][..8 * Self::GROUPS];
                let mut codes = [s.splat_u8(0); 8];
                for (v, codes) in codes.iter_mut().enumerate() {
                    *codes = unpack::codes::<S::Eight, B, _>(s, block.at(v), g);
                }
                for (v, codes) in s.panel(codes).into_iter().enumerate() {
                    s.store(codes, &mut out[v * Self::GROUPS + half]);
                }
                let lanes = unpack::lanes::<S::Eight, B, _>(s, &block, &common, g);
                put_f32(s, lanes.d, half, &mut self.d[k]);
                if B::MINIMA {
                    put_f32(s, lanes.dmin, half, &mut self.dmin[k]);
                }
                for h in 0..2 {
                    if const { unpack::sub_scales(B::FORMAT) } {
                        put(s, lanes.s[h], half, &mut self.s[k][h]);
                    }
                    if B::MINIMA {
                        put(s, lanes.m[h], half, &mut self.m[k][h]);
                    }
                }
            }
        }
    }

    /// Adds groups `from..from + n`, which are in the panel, to the accumulators of tokens `t..t + T`.
    #[inline(always)]
    fn multiply<B: Block, const T: usize>(&mut self, s: S, x: &Acts, t: usize, from: usize, n: usize) {
        let mut acc = [s.zero(); T];
        let mut tokens = [Token { a: &[], da: &[], sums: &[] }; T];
        let mut starts = [&[][..]; T];
        unrolled!(i < T, {
            tokens[i] = Token::of(x, t + i, from, n);
            acc[i] = s.load_f32(&self.acc[t + i]);
            if plain_bias::<S, B>() {
                starts[i] = &self.start[(t + i) * (x.cols / 32) + from..][..n];
            }
        });
        #[expect(clippy::needless_range_loop, reason = "iterating over the panel takes more instructions on ARM")]
        for k in 0..n {
            let q = &self.q[8 * Self::GROUPS * k..][..8 * Self::GROUPS];
            let mut w = [s.splat_u8(0); 8];
            for (v, w) in w.iter_mut().enumerate() {
                *w = s.load([&q[v * Self::GROUPS], &q[(v + 1) * Self::GROUPS - 1]]);
            }
            let (d, dmin) = (s.load_f32(&self.d[k]), s.load_f32(&self.dmin[k]));
            let lanes = Lanes { d, dmin, s: of_halves::<S, B>(s, &self.s[k]), m: of_halves::<S, B>(s, &self.m[k]) };
            let (mut a, mut da, mut sums) = ([&[0; 32]; T], [0.0; T], [&[0; 2]; T]);
            unrolled!(i < T, {
                (a[i], da[i], sums[i]) = tokens[i].group(k);
            });
            let mut start = [s.splat(0); T];
            unrolled!(i < T, {
                start[i] =
                    if plain_bias::<S, B>() { s.splat(starts[i][k]) } else { scaled_start::<S, B>(s, &lanes, sums[i]) };
            });
            let isum = panel_sum::<S, B, T>(s, start, w, &lanes, a);
            unrolled!(i < T, {
                acc[i] = step::<S, B>(s, isum[i], &lanes, da[i], sums[i], acc[i]);
            });
        }
        unrolled!(i < T, {
            s.store_f32(acc[i], &mut self.acc[t + i]);
        });
    }
}

/// Writes the lanes of each of so many tokens to these rows of it. Whole vectors of them in loops of their own: where the
/// length is another choice for each token, compilers call `memcpy`.
#[inline(always)]
pub(crate) fn write_tokens(
    out: &mut Tile,
    tokens: usize,
    rows: std::ops::Range<usize>,
    lanes: impl Fn(usize) -> [f32; 16],
) {
    match rows.len() {
        16 => {
            for t in 0..tokens {
                *out.row(t)[rows.clone()].first_chunk_mut().expect("16 rows") = lanes(t);
            }
        }
        8 => {
            for t in 0..tokens {
                *out.row(t)[rows.clone()].first_chunk_mut::<8>().expect("8 rows") =
                    *lanes(t).first_chunk().expect("16 lanes");
            }
        }
        n => {
            for t in 0..tokens {
                out.row(t)[rows.clone()].copy_from_slice(&lanes(t)[..n]);
            }
        }
    }
}

/// Scales or minima of both halves of a group; one of all of it for both.
#[inline(always)]
fn of_halves<S: Vectors, B: Block>(s: S, of: &[[i32; 16]; 2]) -> [S::I; 2] {
    let first = s.load_i32(&of[0]);
    [first, if const { unpack::halves_apart(B::FORMAT) } { s.load_i32(&of[1]) } else { first }]
}

/// Lanes of eight rows to one half of sixteen.
#[inline(always)]
fn put<S: Eight>(s: S, v: S::I, half: usize, to: &mut [i32; 16]) {
    let mut eight = [0; 16];
    s.store_i32(v, &mut eight);
    to[8 * half..][..8].copy_from_slice(&eight[..8]);
}

/// The same for f32.
#[inline(always)]
fn put_f32<S: Eight>(s: S, v: S::F, half: usize, to: &mut [f32; 16]) {
    let mut eight = [0.0; 16];
    s.store_f32(v, &mut eight);
    to[8 * half..][..8].copy_from_slice(&eight[..8]);
}
