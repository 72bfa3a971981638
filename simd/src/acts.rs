//! Activations as the kernels read them: the f32 rows, and the same rounded to int8: in groups of 32, or by one scale
//! that the model's file gives.
//!
//! The one idea: integers are x / scale rounded half to even, within ±127, with the same bits on every ISA. What is
//! left to choose is the scale. amax / 127 is the obvious one; trying a few slightly larger ones and keeping the one whose
//! integers, times their own least-squares scale, lie closest to x makes the squared error about a third smaller for a
//! cost that is lost beside the matrix product. The squared error is Σx² − (Σxq)²/Σq², so the best scale has the largest
//! (Σxq)²/Σq², and the least-squares scale is Σxq/Σq².
//!
//! The largest magnitude is found on the bits, where infinity and NaN beat every number: a damaged model shows as a
//! non-finite scale, hence non-finite logits, and never as zeros. Sums of 16 integers go along, for formats with minima
//! or biased weights.

#![forbid(unsafe_code)]

use std::ops::Range;

use crate::vec::Ops;

/// Storage for quantised activations, reused from matmul to matmul.
#[derive(Default)]
pub struct ActsBuf {
    q: Vec<i8>,
    scale: Vec<f32>,
    sums: Vec<i16>,
}

/// Activations of some tokens, ready for [`crate::Kernel::matmul`]. Row-major.
#[derive(Clone, Copy)]
pub struct Acts<'a> {
    /// Rows.
    pub tokens: usize,
    /// Length of a row.
    pub cols: usize,
    /// The activations themselves, for float formats. (tokens, cols)
    pub x: &'a [f32],
    /// Rounded to integers within ±127, or −128..=127 by a static scale; empty if not quantised. (tokens, cols)
    pub q: &'a [i8],
    /// What a unit of `q` is worth; empty if not quantised. (tokens, cols/32), or (tokens) for channel-wise formats.
    pub scale: &'a [f32],
    /// Sums of 16 consecutive `q`; empty if not quantised. (tokens, cols/16)
    pub sums: &'a [i16],
}

/// Some rows of an [`ActsBuf`], to be filled; splits, so that threads can share the work.
pub struct ActsMut<'a> {
    cols: usize,
    q: &'a mut [i8],
    scale: &'a mut [f32],
    sums: &'a mut [i16],
}

impl ActsBuf {
    /// Quantises all rows of `x` (tokens, cols).
    ///
    /// # Panics
    /// If `cols` is not a positive multiple of 32, or `x` is not whole rows.
    pub fn quantize<'a>(&'a mut self, ops: &Ops, x: &'a [f32], cols: usize) -> Acts<'a> {
        self.rows(x.len(), cols).quantize(ops, x);
        self.acts(x, cols)
    }

    /// Rounds all rows of `x` (tokens, cols) by one static `scale`, for channel-wise formats: x / scale, half to even, within
    /// −128..=127. An infinite or NaN activation makes its token's scale NaN, so that it is not lost.
    ///
    /// # Panics
    /// As [`ActsBuf::quantize`].
    pub fn quantize_static<'a>(&'a mut self, ops: &Ops, x: &'a [f32], cols: usize, scale: f32) -> Acts<'a> {
        let rows = self.rows(x.len(), cols);
        for (t, x) in x.chunks_exact(cols).enumerate() {
            let range = t * cols..(t + 1) * cols;
            let sums = &mut rows.sums[range.start / 16..range.end / 16];
            let finite = ops.quantize_static(x, scale, &mut rows.q[range], sums);
            rows.scale[t] = if finite { scale } else { f32::NAN };
        }
        self.acts_static(x, cols)
    }

    /// Room for `elems` = tokens·cols activations, to be filled row range by row range and then read
    /// with [`ActsBuf::acts`].
    ///
    /// # Panics
    /// As [`ActsBuf::quantize`].
    pub fn rows(&mut self, elems: usize, cols: usize) -> ActsMut<'_> {
        assert!(cols > 0 && cols.is_multiple_of(32), "rows of {cols} activations: expected a multiple of 32");
        assert!(elems.is_multiple_of(cols), "{elems} activations: expected whole rows of {cols}");
        // Only ever grows: what lies beyond the rows in use is not read.
        if self.q.len() < elems {
            self.q.resize(elems, 0);
            self.scale.resize(elems / 32, 0.0);
            self.sums.resize(elems / 16, 0);
        }
        ActsMut {
            cols,
            q: &mut self.q[..elems],
            scale: &mut self.scale[..elems / 32],
            sums: &mut self.sums[..elems / 16],
        }
    }

    /// What [`ActsBuf::rows`] made room for and has been filled since, as the quantised form of `x`.
    pub fn acts<'a>(&'a self, x: &'a [f32], cols: usize) -> Acts<'a> {
        let n = x.len();
        Acts { tokens: n / cols, cols, x, q: &self.q[..n], scale: &self.scale[..n / 32], sums: &self.sums[..n / 16] }
    }

    /// The same after [`ActsBuf::quantize_static`].
    pub fn acts_static<'a>(&'a self, x: &'a [f32], cols: usize) -> Acts<'a> {
        Acts { scale: &self.scale[..x.len() / cols], ..self.acts(x, cols) }
    }
}

impl<'a> ActsMut<'a> {
    /// The first `tokens` rows, and the rest.
    pub fn split_at(self, tokens: usize) -> (ActsMut<'a>, ActsMut<'a>) {
        let n = tokens * self.cols;
        let (q, q_rest) = self.q.split_at_mut(n);
        let (scale, scale_rest) = self.scale.split_at_mut(n / 32);
        let (sums, sums_rest) = self.sums.split_at_mut(n / 16);
        let rest = ActsMut { cols: self.cols, q: q_rest, scale: scale_rest, sums: sums_rest };
        (ActsMut { cols: self.cols, q, scale, sums }, rest)
    }

    /// Fills these rows from `x`, which is as long as they are.
    pub fn quantize(self, ops: &Ops, x: &[f32]) {
        ops.quantize(x, self.q, self.scale, self.sums);
    }
}

impl<'a> Acts<'a> {
    /// Activations for float formats only.
    ///
    /// # Panics
    /// If `x` is not whole rows of `cols`.
    pub fn float(x: &'a [f32], cols: usize) -> Acts<'a> {
        assert!(cols > 0 && x.len().is_multiple_of(cols), "{} activations: expected whole rows of {cols}", x.len());
        Acts { tokens: x.len() / cols, cols, x, q: &[], scale: &[], sums: &[] }
    }

    /// Those of some of the tokens.
    ///
    /// # Panics
    /// If there are fewer tokens.
    pub fn part(&self, tokens: Range<usize>) -> Acts<'a> {
        fn lines<T>(values: &[T], all: usize, tokens: Range<usize>) -> &[T] {
            let line = values.len().checked_div(all).unwrap_or(0);
            &values[tokens.start * line..tokens.end * line]
        }
        Acts {
            tokens: tokens.len(),
            cols: self.cols,
            x: lines(self.x, self.tokens, tokens.clone()),
            q: lines(self.q, self.tokens, tokens.clone()),
            scale: lines(self.scale, self.tokens, tokens.clone()),
            sums: lines(self.sums, self.tokens, tokens),
        }
    }

    /// Whether block formats can be multiplied with these.
    pub fn is_quantized(&self) -> bool {
        self.q.len() == self.x.len()
    }
}
