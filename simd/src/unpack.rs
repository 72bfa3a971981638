//! How vectors see a block: its integers and its scales, for every order of bytes and every ISA.
//!
//! The one idea: `format.rs` says what each weight *is*; this file says the same once more in terms of whole vectors.
//! [`codes`] gives 32 integers of a group — of one row ([`Row`], GGUF order), or four of each row ([`Vector`],
//! interleaved order): both read the same fields of a block, because interleaving moves bytes but never splits a field.
//! [`common`] and [`lanes`] give the scales, a row to a lane. The tests compare both files bit for bit.
//!
//! To give a format vectors, add it to [`codes`]; to give it loops for few tokens, which read it where it lies in both orders of
//! bytes, also to `interleave.rs`, and to [`lanes`] if it has scales within its blocks.

use std::marker::PhantomData;

use crate::Format;
use crate::format::{self, Block};
use crate::wide::{Eight, Simd, Vectors, prefetch};

/// Formats with integer scales within a block.
pub(crate) const fn sub_scales(format: Format) -> bool {
    matches!(format, Format::Q2K | Format::Q3K | Format::Q4K | Format::Q5K | Format::Q6K | Format::Iq4Xs)
}

/// Those of them where both halves of a group have a scale of their own.
pub(crate) const fn halves_apart(format: Format) -> bool {
    matches!(format, Format::Q2K | Format::Q3K | Format::Q6K)
}

/// After how many groups the shifts and masks of [`codes`] come round again.
pub(crate) const fn period(format: Format) -> usize {
    match format {
        Format::Q4K => 2,
        Format::Q6K | Format::Tq2_0 => 4,
        Format::Q5K => 8,
        _ => 1,
    }
}

/// Where the 16 bytes of a block start that hold its 32 integers as nibbles, low ones first, and nothing is looked up.
pub(crate) const fn plain_nibbles(format: Format) -> Option<usize> {
    match format {
        Format::Q4_0 => Some(2),
        Format::Q4_1 => Some(4),
        _ => None,
    }
}

/// Scales and minima of a group, a row to a lane; see [`format::Group`].
#[derive(Clone, Copy)]
pub(crate) struct Lanes<S: Vectors> {
    pub d: S::F,
    pub dmin: S::F,
    pub s: [S::I; 2],
    pub m: [S::I; 2],
}

/// What all groups of a block share.
#[derive(Clone, Copy)]
pub(crate) struct Common<S: Simd> {
    d: S::F,
    dmin: S::F,
    /// Q4_K and Q5_K: the scales of groups 0..4 and 4..8, then the minima; a byte each.
    six_bits: [S::I; 4],
}

impl<S: Simd> Common<S> {
    #[inline(always)]
    pub fn none(s: S) -> Common<S> {
        Common { d: s.zero(), dmin: s.zero(), six_bits: [s.splat(0); 4] }
    }
}

/// Fields of a block, a row to a lane.
pub(crate) trait Fields<S: Simd> {
    /// The half at byte `at`.
    fn half(&self, s: S, at: usize) -> S::F;
    /// The four bytes at `at`.
    fn word(&self, s: S, at: usize) -> S::I;
    /// The two signed bytes at `at`.
    fn two_bytes(&self, s: S, at: usize) -> [S::I; 2];
}

/// Where the vectors of [`codes`] come from.
pub(crate) trait Codes<S: Simd>: Copy {
    /// The bytes at `at..at + 32`.
    fn bytes(self, s: S, at: usize) -> S::B;
    /// The nibbles of the bytes at `at..at + 16`: low ones first.
    fn nibbles(self, s: S, at: usize) -> S::B;
    /// `value` for each set bit of the 4 bytes at `at`.
    fn bits(self, s: S, at: usize, value: u8) -> S::B;
    /// Group `g` of a format without a line in [`codes`].
    fn others<B: Block>(self, s: S, g: usize) -> S::B;
}

/// `(byte >> shift) & mask` of the bytes at `at`.
#[inline(always)]
fn low<S: Simd, C: Codes<S>>(s: S, c: C, at: usize, shift: usize, mask: u8) -> S::B {
    s.field(c.bytes(s, at), shift, mask)
}

/// The same, moved up again: `((byte >> shift) & mask) << up`, by one shift.
#[inline(always)]
fn high<S: Simd, C: Codes<S>>(s: S, c: C, at: usize, shift: usize, mask: u8, up: usize) -> S::B {
    let bytes = c.bytes(s, at);
    if shift >= up {
        s.field(bytes, shift - up, mask << up)
    } else {
        s.shl(s.field(bytes, 0, mask << shift), up - shift)
    }
}

/// The integers of group `g`: `q + BIAS` where the format's span is at most 127, else `q`.
#[inline(always)]
pub(crate) fn codes<S: Simd, B: Block, C: Codes<S>>(s: S, c: C, g: usize) -> S::B {
    match B::FORMAT {
        Format::Q4_0 => c.nibbles(s, 2),
        Format::Q4_1 => c.nibbles(s, 4),
        Format::Q5_0 => s.or(c.nibbles(s, 6), c.bits(s, 2, 16)),
        Format::Q5_1 => s.or(c.nibbles(s, 8), c.bits(s, 4, 16)),
        Format::Q8_0 => c.bytes(s, 2),
        Format::Q2K => low(s, c, 16 + 32 * (g / 4), 2 * (g % 4), 3),
        Format::Q3K => s.or(low(s, c, 32 + 32 * (g / 4), 2 * (g % 4), 3), high(s, c, 0, g, 1, 2)),
        Format::Q4K => low(s, c, 16 + 32 * (g / 2), 4 * (g % 2), 15),
        Format::Q5K => s.or(low(s, c, 48 + 32 * (g / 2), 4 * (g % 2), 15), high(s, c, 16, g, 1, 4)),
        Format::Q6K => {
            let (half, part) = (g / 4, g % 4);
            let low = low(s, c, 64 * half + 32 * (part % 2), 4 * (part / 2), 15);
            s.or(low, high(s, c, 128 + 32 * half, 2 * part, 3, 4))
        }
        Format::Iq4Nl => s.look_up(&format::IQ4, c.nibbles(s, 2)),
        Format::Iq4Xs => s.look_up(&format::IQ4, c.nibbles(s, 8 + 16 * g)),
        Format::Mxfp4 => s.look_up(&format::E2M1_PLUS_12, c.nibbles(s, 1)),
        Format::Tq2_0 => low(s, c, 32 * (g / 4), 2 * (g % 4), 3),
        Format::Q1_0 => c.bits(s, 2 + 4 * g, 2),
        _ => c.others::<B>(s, g),
    }
}

/// The upper two bits of every byte, moved to stand above four others.
#[inline(always)]
fn upper<S: Simd>(s: S, word: S::I) -> S::I {
    s.shl_i32(s.field_i32(word, 6, 0x0303_0303), 4)
}

/// What all groups of a block share, for formats with a loop of their own.
#[inline(always)]
pub(crate) fn common<S: Simd, B: Block, F: Fields<S>>(s: S, f: &F) -> Common<S> {
    let none = Common::none(s);
    match B::FORMAT {
        Format::Q6K => Common { d: f.half(s, 208), ..none },
        Format::Tq2_0 => Common { d: f.half(s, 64), ..none },
        Format::Q4K | Format::Q5K => {
            // Three words of each row: six bits of scales, six of minima, and four and four of both for groups
            // 4..8, whose upper two bits stand above the first two words' six.
            let words = [f.word(s, 4), f.word(s, 8), f.word(s, 12)];
            let six_bits = [
                s.field_i32(words[0], 0, 0x3f3f_3f3f),
                s.or_i32(s.field_i32(words[2], 0, 0x0f0f_0f0f), upper(s, words[0])),
                s.field_i32(words[1], 0, 0x3f3f_3f3f),
                s.or_i32(s.field_i32(words[2], 4, 0x0f0f_0f0f), upper(s, words[1])),
            ];
            Common { d: f.half(s, 0), dmin: f.half(s, 2), six_bits }
        }
        _ => Common { d: f.half(s, 0), ..none },
    }
}

/// Scales and minima of group `g`, for formats with a loop of their own.
#[inline(always)]
pub(crate) fn lanes<S: Simd, B: Block, F: Fields<S>>(s: S, f: &F, common: &Common<S>, g: usize) -> Lanes<S> {
    let Common { d, dmin, six_bits } = *common;
    let ones = [s.splat(1); 2];
    match B::FORMAT {
        Format::Q6K => Lanes { d, dmin, s: f.two_bytes(s, 192 + 2 * g), m: ones },
        Format::Q4K | Format::Q5K => {
            let scale = s.field_i32(six_bits[g / 4], 8 * (g % 4), 63);
            let minimum = s.field_i32(six_bits[2 + g / 4], 8 * (g % 4), 63);
            Lanes { d, dmin, s: [scale; 2], m: [minimum; 2] }
        }
        _ => Lanes { d, dmin, s: ones, m: ones },
    }
}

// GGUF order.

/// One block of one row.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a>(pub &'a [u8]);

impl<S: Eight> Codes<S> for Row<'_> {
    #[inline(always)]
    fn bytes(self, s: S, at: usize) -> S::B {
        s.load32(self.0[at..].first_chunk().expect("32 bytes"))
    }
    #[inline(always)]
    fn nibbles(self, s: S, at: usize) -> S::B {
        s.load_nibbles(self.0[at..].first_chunk().expect("16 bytes"))
    }
    #[inline(always)]
    fn bits(self, s: S, at: usize, value: u8) -> S::B {
        s.bits(*self.0[at..].first_chunk().expect("4 bytes"), value)
    }
    #[inline(always)]
    fn others<B: Block>(self, s: S, g: usize) -> S::B {
        let bias = if B::SPAN > 127 { 0 } else { B::BIAS as u8 };
        let mut codes = [0; 32];
        for (code, q) in codes.iter_mut().zip(B::weights(self.0, g)) {
            *code = (q as u8).wrapping_add(bias);
        }
        s.load32(&codes)
    }
}

/// Eight rows, or one block of each. Short of eight, the last row stands in for the missing ones.
#[derive(Clone, Copy)]
pub(crate) struct EightRows<'a>([&'a [u8]; 8]);

impl<'a> EightRows<'a> {
    /// `w` is one to eight rows of `row_bytes` bytes.
    #[inline(always)]
    pub fn new(w: &'a [u8], row_bytes: usize) -> EightRows<'a> {
        let last = w.len() / row_bytes - 1;
        let mut rows = [&[][..]; 8];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = &w[i.min(last) * row_bytes..][..row_bytes];
        }
        EightRows(rows)
    }

    /// Block `b` of each row.
    #[inline(always)]
    pub fn block(&self, b: usize, block_bytes: usize) -> EightRows<'a> {
        let at = b * block_bytes;
        assert!(at + block_bytes <= self.0[0].len());
        let mut block = self.0;
        for block in &mut block {
            // SAFETY: all rows are as long as the first, just checked.
            *block = unsafe { block.get_unchecked(at..at + block_bytes) };
        }
        EightRows(block)
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [u8] {
        self.0[i]
    }

    /// Two bytes of each row.
    #[inline(always)]
    pub fn two(&self, at: usize) -> [u8; 16] {
        let mut bytes = [0; 16];
        for (to, row) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(self.0) {
            *to = *row[at..].first_chunk().expect("two bytes");
        }
        bytes
    }

    /// Sixteen bytes of each row.
    #[inline(always)]
    pub fn sixteen(&self, at: usize) -> [&'a [u8; 16]; 8] {
        let mut sixteen = [&[0; 16]; 8];
        for (to, row) in sixteen.iter_mut().zip(self.0) {
            *to = row[at..].first_chunk().expect("16 bytes");
        }
        sixteen
    }
}

impl<S: Eight> Fields<S> for EightRows<'_> {
    #[inline(always)]
    fn half(&self, s: S, at: usize) -> S::F {
        s.halves_of(self, at)
    }
    #[inline(always)]
    fn word(&self, s: S, at: usize) -> S::I {
        let mut words = [0; 32];
        for (to, row) in words.as_chunks_mut::<4>().0.iter_mut().zip(self.0) {
            *to = *row[at..].first_chunk().expect("four bytes");
        }
        s.words(s.load32(&words))
    }
    #[inline(always)]
    fn two_bytes(&self, s: S, at: usize) -> [S::I; 2] {
        let bytes = self.two(at);
        s.two_bytes([&bytes, &bytes])
    }
}

// Interleaved order.

/// One block of eight rows in interleaved order, or of two times eight, and which vector of a group is meant: weights
/// `4v..4v + 4` of each row.
pub(crate) struct Vector<'a, B> {
    block: [&'a [u8]; 2],
    v: usize,
    format: PhantomData<B>,
}

impl<B> Clone for Vector<'_, B> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Vector<'_, B> {}

impl<'a, B: Block> Vector<'a, B> {
    #[inline(always)]
    fn new(block: [&'a [u8]; 2]) -> Vector<'a, B> {
        Vector { block, v: 0, format: PhantomData }
    }

    /// No block at all.
    #[inline(always)]
    pub fn none() -> Vector<'a, B> {
        Vector::new([&[]; 2])
    }

    /// Bytes of a block of eight rows.
    const BYTES: usize = 8 * B::FORMAT.block_bytes();

    /// Block `b` of eight rows each.
    #[inline(always)]
    pub fn block(groups: [&'a [u8]; 2], b: usize) -> Vector<'a, B> {
        let at = b * Self::BYTES;
        assert!(at + Self::BYTES <= groups[0].len() && at + Self::BYTES <= groups[1].len());
        Vector::new(groups.map(|group| &group[at..at + Self::BYTES]))
    }

    /// Takes the first block off what is left of eight rows each.
    ///
    /// # Safety
    /// There must be one.
    #[inline(always)]
    pub unsafe fn take(groups: &mut [&'a [u8]; 2]) -> Vector<'a, B> {
        // SAFETY: the caller's promise.
        let ((first, rest), (second, second_rest)) =
            unsafe { (groups[0].split_at_unchecked(Self::BYTES), groups[1].split_at_unchecked(Self::BYTES)) };
        *groups = [rest, second_rest];
        Vector::new([first, second])
    }

    /// Vector `v` of each group of the block.
    #[inline(always)]
    pub fn at(&self, v: usize) -> Vector<'a, B> {
        Vector { v, ..*self }
    }

    /// Asks for the lines `bytes` beyond the start of the block.
    #[inline(always)]
    pub fn prefetch<S: Simd>(&self, bytes: usize) {
        prefetch(self.block[0].as_ptr().wrapping_add(bytes));
        if S::ROWS == 16 {
            prefetch(self.block[1].as_ptr().wrapping_add(bytes));
        }
    }

    /// `N` bytes of each group where byte `at` of a row's block has come to stand.
    #[inline(always)]
    pub fn fields<const N: usize>(&self, at: usize) -> [&'a [u8; N]; 2] {
        let at = B::FORMAT.place(at);
        [
            self.block[0][8 * at..].first_chunk().expect("N bytes"),
            self.block[1][8 * at..].first_chunk().expect("N bytes"),
        ]
    }
}

impl<S: Simd, B: Block> Codes<S> for Vector<'_, B> {
    #[inline(always)]
    fn bytes(self, s: S, at: usize) -> S::B {
        s.load(self.fields(at + 4 * self.v))
    }
    #[inline(always)]
    fn nibbles(self, s: S, at: usize) -> S::B {
        s.field(s.load(self.fields(at + 4 * (self.v % 4))), 4 * (self.v / 4), 15)
    }
    #[cold]
    fn bits(self, _: S, _: usize, _: u8) -> S::B {
        unreachable!("no format that interleaves has bits apart")
    }
    #[cold]
    fn others<O: Block>(self, _: S, _: usize) -> S::B {
        unreachable!("{}: does not interleave", O::FORMAT)
    }
}

impl<S: Simd, B: Block> Fields<S> for Vector<'_, B> {
    #[inline(always)]
    fn half(&self, s: S, at: usize) -> S::F {
        s.halves(self.fields(at))
    }
    #[inline(always)]
    fn word(&self, s: S, at: usize) -> S::I {
        s.words(s.load(self.fields(at)))
    }
    #[inline(always)]
    fn two_bytes(&self, s: S, at: usize) -> [S::I; 2] {
        s.two_bytes(self.fields(at))
    }
}
