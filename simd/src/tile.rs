//! The part of an output matrix that one call of a kernel writes.
//!
//! The one idea: the matrix is (tokens, rows) and threads share it by rows, so a part is a strided
//! view: the same column range of every line. [`Tiles`] hands such views out; that two live ones do not
//! overlap is the caller's promise, made once, where work is shared out.

use std::marker::PhantomData;
use std::ops::Range;

/// A mutable view of rows `start .. start + rows` of an output matrix (tokens, all rows).
pub struct Tile<'a> {
    /// Element (0, start); valid for `rows` writes at every multiple of `stride` below `tokens·stride`.
    base: *mut f32,
    tokens: usize,
    stride: usize,
    rows: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a tile is an exclusive view of f32 values, like `&mut [f32]`.
unsafe impl Send for Tile<'_> {}
// SAFETY: through a shared reference a tile gives out its sizes only.
unsafe impl Sync for Tile<'_> {}

impl<'a> Tile<'a> {
    /// The whole of `out`, a matrix of (tokens, rows).
    ///
    /// # Panics
    /// If `out` is not whole lines of `rows`.
    pub fn whole(out: &'a mut [f32], rows: usize) -> Tile<'a> {
        // SAFETY: the only tile of a matrix borrowed mutably.
        unsafe { Tiles::new(out, rows).tile(0..rows) }
    }

    /// Rows in this view.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Tokens of the matrix.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Some of its tokens, as a tile of their own.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline(always)]
    pub fn lines(&mut self, tokens: Range<usize>) -> Tile<'_> {
        assert!(tokens.start <= tokens.end && tokens.end <= self.tokens, "tokens {tokens:?} of {}", self.tokens);
        let base = self.base.wrapping_add(tokens.start * self.stride);
        Tile { base, tokens: tokens.len(), stride: self.stride, rows: self.rows, owner: PhantomData }
    }

    /// The outputs of token `t`, one for each row of the view.
    #[inline(always)]
    pub fn row(&mut self, t: usize) -> &mut [f32] {
        assert!(t < self.tokens);
        // SAFETY: t is in range, so base + t·stride is valid for `rows` elements (see `base`), which no
        // other tile covers (`Tiles::tile`); the borrow of self keeps slices of this one apart.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(t * self.stride), self.rows) }
    }
}

/// An output matrix (tokens, rows), to be shared out by row ranges.
pub struct Tiles<'a> {
    base: *mut f32,
    tokens: usize,
    rows: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: it only hands out tiles, whose ranges the callers of `tile` promise to keep apart.
unsafe impl Send for Tiles<'_> {}
// SAFETY: as above; `tile` does not touch the values.
unsafe impl Sync for Tiles<'_> {}

impl<'a> Tiles<'a> {
    /// # Panics
    /// If `out` is not whole lines of `rows`.
    pub fn new(out: &'a mut [f32], rows: usize) -> Tiles<'a> {
        let tokens = out.len().checked_div(rows).unwrap_or(0);
        assert!(out.len() == tokens * rows, "output of {} values: expected whole lines of {rows}", out.len());
        Tiles { base: out.as_mut_ptr(), tokens, rows, owner: PhantomData }
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Tokens of the matrix.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The view of `rows` of all tokens.
    ///
    /// # Panics
    /// If the range does not lie within the matrix.
    ///
    /// # Safety
    /// No other live tile of this matrix may overlap `rows`.
    pub unsafe fn tile(&self, rows: Range<usize>) -> Tile<'a> {
        // SAFETY: as the caller promises.
        unsafe { self.part(0..self.tokens, rows) }
    }

    /// The view of `rows` of some tokens.
    ///
    /// # Panics
    /// If the ranges do not lie within the matrix.
    ///
    /// # Safety
    /// No other live tile of this matrix may overlap this one.
    pub unsafe fn part(&self, tokens: Range<usize>, rows: Range<usize>) -> Tile<'a> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(tokens.start <= tokens.end && tokens.end <= self.tokens, "tokens {tokens:?} of {}", self.tokens);
        Tile {
            // A matrix without tokens is an empty slice, whose pointer must stay where it is.
            base: if tokens.is_empty() {
                self.base
            } else {
                self.base.wrapping_add(tokens.start * self.rows + rows.start)
            },
            tokens: tokens.len(),
            stride: self.rows,
            rows: rows.len(),
            owner: PhantomData,
        }
    }
}
