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

use crate::aligned::Aligned;
use crate::vec::Ops;

/// Rows that [`ActsBuf::quantize_digits`] makes of one.
pub const DIGITS: usize = 3;

/// Storage for quantised activations, reused from matmul to matmul.
#[derive(Default)]
pub struct ActsBuf {
    q: Aligned,
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
        self.rows(x.len(), cols).quantize_static(ops, x, scale);
        self.merge_scales(x.len(), cols);
        self.acts_per_token(x, cols)
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
            self.q.grow(elems);
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

    /// Rounds all rows of `x` (tokens, cols) to 24-bit integers, by one scale a row, and makes three rows of each: of the digits to
    /// the base 256 that are worth most, of the next, of the last, all within −128..=127. So kernels of channel-wise formats
    /// multiply with numbers as fine as f32: the sum of the three products is the product, see [`DIGITS`]. A row with an
    /// infinite or NaN activation gets scales that are NaN.
    ///
    /// # Panics
    /// As [`ActsBuf::quantize`].
    pub fn quantize_digits<'a>(&'a mut self, x: &[f32], cols: usize) -> Acts<'a> {
        /// 127 in every digit.
        const LARGEST: f32 = (127 << 16 | 127 << 8 | 127) as f32;
        let all = self.rows(DIGITS * x.len(), cols);
        for (t, x) in x.chunks_exact(cols).enumerate() {
            let amax = x.iter().fold(0.0, |amax: f32, x| amax.max(x.abs()));
            let finite = x.iter().all(|x| x.is_finite());
            let unit = if amax > f32::MIN_POSITIVE * LARGEST { amax / LARGEST } else { 1.0 };
            for digit in 0..DIGITS {
                let row = DIGITS * t + digit;
                let shift = 8 * (DIGITS - 1 - digit);
                let worth = (1_u32 << shift) as f32 * unit;
                all.scale[row] = if finite { worth } else { f32::NAN };
                let q = &mut all.q[row * cols..(row + 1) * cols];
                for (q, x) in q.iter_mut().zip(x) {
                    let n = (x / unit).round_ties_even().clamp(-LARGEST, LARGEST) as i32;
                    // Balanced digits: what is below counts as up to half a unit of this one.
                    *q = ((n + (0x80_8080 & ((1 << shift) - 1))) >> shift) as i8;
                }
                let sums = &mut all.sums[row * cols / 16..(row + 1) * cols / 16];
                for (sum, q) in sums.iter_mut().zip(q.as_chunks::<16>().0) {
                    *sum = q.iter().map(|q| i16::from(*q)).sum();
                }
            }
        }
        self.acts_digits(x.len(), cols)
    }

    /// What [`ActsBuf::quantize_digits`] made of `elems` activations.
    pub fn acts_digits(&self, elems: usize, cols: usize) -> Acts<'_> {
        let n = DIGITS * elems;
        Acts {
            tokens: n / cols,
            cols,
            x: &[],
            q: &self.q[..n],
            scale: &self.scale[..n / cols],
            sums: &self.sums[..n / 16],
        }
    }

    /// Makes one scale a token out of the scales of its groups, which are the same unless a group is damaged: then NaN.
    pub fn merge_scales(&mut self, elems: usize, cols: usize) {
        let groups = cols / 32;
        for t in 0..elems / cols {
            let of_token = &self.scale[t * groups..(t + 1) * groups];
            // Never behind what is still to be read.
            self.scale[t] = of_token.iter().copied().find(|scale| scale.is_nan()).unwrap_or(of_token[0]);
        }
    }

    /// [`ActsBuf::acts`] for channel-wise formats, after [`ActsBuf::merge_scales`].
    pub fn acts_per_token<'a>(&'a self, x: &'a [f32], cols: usize) -> Acts<'a> {
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

    /// Fills these rows from `x`, which is as long as they are, with a scale for each 32 values.
    pub fn quantize(self, ops: &Ops, x: &[f32]) {
        ops.quantize(x, self.q, self.scale, self.sums);
    }

    /// The same with the static `scale` for all values: integers within −128..=127. A group with an infinite or NaN
    /// activation gets the scale NaN.
    pub fn quantize_static(self, ops: &Ops, x: &[f32], scale: f32) {
        let finite = ops.quantize_static(x, scale, self.q, self.sums);
        self.scale.fill(scale);
        if !finite {
            for (scale, x) in self.scale.iter_mut().zip(x.as_chunks::<32>().0) {
                if x.iter().any(|x| !x.is_finite()) {
                    *scale = f32::NAN;
                }
            }
        }
    }

    /// The same with a scale for each row: the largest magnitude is 127.
    pub fn quantize_rows(self, ops: &Ops, x: &[f32]) {
        let mut rest = self;
        for x in x.chunks_exact(rest.cols) {
            let (row, others) = rest.split_at(1);
            let largest = x.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
            row.quantize_static(ops, x, if largest > f32::MIN_POSITIVE { largest / 127.0 } else { 1.0 });
            rest = others;
        }
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
        self.q.len() == self.tokens * self.cols
    }
}
