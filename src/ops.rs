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

/// `gate = gelu(gate) * up`.
pub fn gelu_mul(ops: &Ops, team: &Team, gate: &mut [f32], up: &[f32]) {
    const PART: usize = 1024;
    team.share(gate.len().div_ceil(PART), 1, Lines(gate, PART), |parts, Lines(gate, _)| {
        ops.gelu_mul(gate, &up[parts.start * PART..][..gate.len()]);
    });
}

/// Cosines and sines of a run of positions for one class of layers.
#[derive(Default)]
pub struct RopeTable {
    dims: usize,
    cos: Vec<f32>, // (positions, dims / 2)
    sin: Vec<f32>, // (positions, dims / 2)
}

impl RopeTable {
    /// Fills the table for `positions`: pair `i` turns by `position * base^(-2i/dims) / factor[i]`; without `factors`
    /// every factor is 1.
    pub fn fill(&mut self, rope: Rope, factors: Option<&[f32]>, positions: Range<usize>) {
        self.dims = rope.dims;
        self.cos.clear();
        self.sin.clear();
        let half = rope.dims / 2;
        let frequency = |i: usize| {
            let factor = factors.map_or(1.0, |factors| f64::from(factors[i]));
            libm::pow(f64::from(rope.base), -2.0 * i as f64 / rope.dims as f64) / factor
        };
        let frequencies: Vec<f64> = (0..half).map(frequency).collect();
        for position in positions {
            for frequency in &frequencies {
                let (sin, cos) = libm::sincos(position as f64 * frequency);
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }

    /// Rotates every head of every token of `x`, (tokens, heads, head_dim), in place; token `t` sits at position `first + t`
    /// of the table. Elements past the rotary width stay as they are.
    pub fn rotate(&self, ops: &Ops, team: &Team, x: &mut [f32], heads: usize, head_dim: usize, first: usize) {
        let half = self.dims / 2;
        each_row(team, x, heads * head_dim, |t, token| {
            let at = (first + t) * half..(first + t + 1) * half;
            for head in token.chunks_exact_mut(head_dim) {
                ops.rope(&mut head[..self.dims], &self.cos[at.clone()], &self.sin[at.clone()]);
            }
        });
    }
}
