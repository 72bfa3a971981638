//! Row-wise arithmetic of the forward pass: what is neither a matrix product nor attention.
//!
//! Each function applies one of `gemrun_simd`'s vector operations to every row of a (tokens, width) buffer. The rotary
//! tables are computed here, in f64 with `libm`, once per chunk of tokens and class of layer; nothing depends on the
//! platform's mathematics library.

use std::ops::Range;

use gemrun_simd::Ops;

use crate::config::Rope;
use crate::team::{Lines, Team};

/// Values that are worth another thread.
const SOME: usize = 8192;

/// Calls `f(row, values)` for every row of `x`.
fn each_row(team: &Team, x: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    team.share(x.len() / width, SOME.div_ceil(width), Lines(x, width), |rows, Lines(x, _)| {
        rows.zip(x.chunks_exact_mut(width)).for_each(|(row, x)| f(row, x));
    });
}

/// `out[t] = rms(x[t]) * weight` for every row of `weight.len()` values.
pub fn rms_norm(ops: &Ops, team: &Team, out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    each_row(team, out, width, |row, out| ops.rms_norm(out, &x[row * width..][..width], Some(weight), eps));
}

/// [`rms_norm`] in place; without `weight`, rows of `width` values are only normalised.
pub fn rms_norm_in_place(ops: &Ops, team: &Team, x: &mut [f32], width: usize, weight: Option<&[f32]>, eps: f32) {
    each_row(team, x, width, |_, row| ops.rms_norm_in_place(row, weight, eps));
}

/// Adds `rms(y[t]) * weight` to every row of the residual stream: `x += rms(y) * weight`. `y` is used up.
pub fn add_rms_norm(ops: &Ops, team: &Team, x: &mut [f32], y: &mut [f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    let rows = (Lines(x, width), Lines(y, width));
    team.share(rows.0.0.len() / width, SOME.div_ceil(width), rows, |_, (Lines(x, _), Lines(y, _))| {
        for (x, y) in x.chunks_exact_mut(width).zip(y.chunks_exact_mut(width)) {
            ops.rms_norm_in_place(y, Some(weight), eps);
            ops.add(x, y);
        }
    });
}

/// Cosines and sines of a run of positions for one class of layers.
pub struct RopeTable {
    /// The angle between a position and the next, of each pair.
    frequencies: Vec<f64>, // (dims / 2)
    turns: Vec<f32>, // (positions, 2, dims / 2) cosines, then sines
}

impl RopeTable {
    /// Pair `i` turns by `position * base^(-2i/dims) / factor[i]`; without `factors` every factor is 1.
    pub fn new(rope: Rope, factors: Option<&[f32]>) -> RopeTable {
        let frequency = |i: usize| {
            let factor = factors.map_or(1.0, |factors| f64::from(factors[i]));
            libm::pow(f64::from(rope.base), -2.0 * i as f64 / rope.dims as f64) / factor
        };
        RopeTable { frequencies: (0..rope.dims / 2).map(frequency).collect(), turns: Vec::new() }
    }

    /// Fills the table for `positions`.
    pub fn fill(&mut self, team: &Team, positions: Range<usize>) {
        /// Sines and cosines that are worth another thread.
        const SOME: usize = 512;
        let half = self.frequencies.len();
        self.turns.resize(positions.len() * 2 * half, 0.0);
        if half == 0 {
            return;
        }
        let turns = Lines(&mut self.turns, 2 * half);
        team.share(positions.len(), SOME.div_ceil(half), turns, |some, Lines(turns, _)| {
            for (position, turns) in some.zip(turns.chunks_exact_mut(2 * half)) {
                let (cos, sin) = turns.split_at_mut(half);
                for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&self.frequencies) {
                    let exact = libm::sincos((positions.start + position) as f64 * frequency);
                    (*sin, *cos) = (exact.0 as f32, exact.1 as f32);
                }
            }
        });
    }

    /// Rotates every head of every token of `x`, (tokens, heads, head_dim), in place; token `t` sits at position `first + t`
    /// of the table. Elements past the rotary width stay as they are.
    pub fn rotate(&self, ops: &Ops, team: &Team, x: &mut [f32], heads: usize, head_dim: usize, first: usize) {
        let half = self.frequencies.len();
        each_row(team, x, heads * head_dim, |t, token| {
            let (cos, sin) = self.turns[(first + t) * 2 * half..][..2 * half].split_at(half);
            for head in token.chunks_exact_mut(head_dim) {
                ops.rope(&mut head[..2 * half], cos, sin);
            }
        });
    }
}
