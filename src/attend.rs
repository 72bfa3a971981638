//! Attention over the cache: scores, softmax, and the weighted sum of the values.
//!
//! The one idea: query heads that share a key/value head, and neighbouring tokens, are the lines of one matrix of scores,
//! so that a block of the cache is read once for all of them. The matrix is filled and used up by tiles that any thread
//! may take; what a sliding window does not reach is not computed. Every score, every softmax and every output element
//! is computed on its own, in ascending order of positions, so its bits depend neither on the tiling nor on the chunk.
//!
//! ```text
//! for tokens, as many as SCORES hold:                       line = (token, query head of one key/value head)
//!     scores[line][position] = q · k                        by (lines, block of the cache)
//!     scores[line] = softmax(scores[line])                  by (lines)
//!     o[token][head] = Σ scores[line][position] · v         by (token and key/value head, columns)
//! ```

use std::ops::Range;

use gemrun_simd::Ops;
use gemrun_simd::vec::line_groups;

use crate::config::LayerConfig;
use crate::kv::{BLOCK, Kv, PANEL, Run};
use crate::team::Team;

/// Scores computed before they are used: fewer would mean more regions, more would not stay in a core's cache.
const SCORES: usize = 1 << 18;

/// Lines of a tile of scores: enough that fetching a block of keys costs little beside using it.
const LINES: usize = 32;

/// The least that another thread is worth: scores of a softmax, multiply-adds of a weighted sum.
const SOME_SCORES: usize = 1 << 12;
const SOME_PRODUCTS: usize = 1 << 16;

/// Buffers, reused from layer to layer.
#[derive(Default)]
pub struct Scratch {
    queries: Vec<f32>, // (kv_heads, lines in groups, head_dim, lines of the group)
    scores: Vec<f32>,  // (lines, kv_heads, span)
}

/// Attention of one layer over what the cache holds.
pub struct Attention<'a> {
    /// The vector operations.
    pub ops: &'a Ops,
    /// Who computes.
    pub team: &'a Team,
    /// Keys and values, those of the chunk included.
    pub kv: &'a Kv,
    /// The layer.
    pub layer: &'a LayerConfig,
    /// How many positions a token of a sliding layer sees, itself included.
    pub window: usize,
    /// The position of the first query's token.
    pub first: usize,
}

impl Attention<'_> {
    /// o = softmax(q · Kᵀ) · V for every query head of consecutive tokens; `q` and `o` are (tokens, heads, head_dim). A token
    /// sees all positions up to its own, in a sliding layer the last `window` of them. The scale is 1: the norms of q and
    /// k carry it.
    pub fn run(&self, scratch: &mut Scratch, q: &[f32], o: &mut [f32]) {
        let token = self.layer.heads * self.layer.head_dim;
        let tokens = q.len() / token;
        let mut start = 0;
        while start < tokens {
            let scores = |end: usize| (end - start) * self.layer.heads * self.blocks(start..end).len() * BLOCK;
            let mut end = start + 1;
            while end < tokens && scores(end + 1) <= SCORES {
                end += 1;
            }
            let part = start * token..end * token;
            self.some(start..end, scratch, &q[part.clone()], &mut o[part]);
            start = end;
        }
    }

    /// The positions that token `t` attends to.
    fn seen(&self, t: usize) -> Range<usize> {
        let end = self.first + t + 1;
        if self.layer.sliding { end.saturating_sub(self.window)..end } else { 0..end }
    }

    /// The blocks of the cache that hold what some of `tokens` attend to.
    fn blocks(&self, tokens: Range<usize>) -> Range<usize> {
        self.seen(tokens.start).start / BLOCK..self.seen(tokens.end - 1).end.div_ceil(BLOCK)
    }

    /// [`Attention::run`] for so many tokens that their scores fit.
    fn some(&self, tokens: Range<usize>, scratch: &mut Scratch, q: &[f32], o: &mut [f32]) {
        let Attention { ops, team, kv, .. } = *self;
        let LayerConfig { heads, kv_heads, head_dim: dim, kv_layer, .. } = *self.layer;
        let shared = heads / kv_heads; // query heads of one key/value head
        let lines = tokens.len() * shared;
        let blocks = self.blocks(tokens.clone());
        let (origin, span) = (blocks.start * BLOCK, blocks.len() * BLOCK);
        let seen = |t: usize| self.seen(tokens.start + t);

        let order = kv.key_order(kv_layer);
        let queries = sized(&mut scratch.queries, q.len());
        for (kv_head, queries) in queries.chunks_exact_mut(lines * dim).enumerate() {
            for group in line_groups(0..lines) {
                let out = &mut queries[group.start * dim..group.end * dim];
                for (i, line) in group.clone().enumerate() {
                    let head = (line / shared) * heads + kv_head * shared + line % shared;
                    let query = &q[head * dim..][..dim];
                    out.iter_mut().skip(i).step_by(group.len()).zip(order).for_each(|(out, &d)| *out = query[d]);
                }
            }
        }

        let scores = sized(&mut scratch.scores, lines * kv_heads * span);
        team.grid(scores, kv_heads * span, LINES, BLOCK, |lines_here, columns, mut tile| {
            let (kv_head, block) = (columns.start / span, blocks.start + columns.start % span / BLOCK);
            let (keys, _) = kv.block(kv_layer, kv_head, block);
            // Of the tile's groups of lines those that see something of the block.
            let sees = |group: &Range<usize>| {
                let (oldest, newest) = (seen(group.start / shared), seen((group.end - 1) / shared));
                oldest.start < (block + 1) * BLOCK && block * BLOCK < newest.end
            };
            let see = line_groups(lines_here.clone()).filter(sees);
            let Some(see) = see.reduce(|all, group| all.start..group.end) else { return };
            let q = &queries[(kv_head * lines + see.start) * dim..][..see.len() * dim];
            let mut tile = tile.lines(see.start - lines_here.start..see.end - lines_here.start);
            match keys {
                Run::F32(keys) => ops.scores_f32(&mut tile, q, keys),
                Run::F16(keys) => ops.scores_f16(&mut tile, q, keys),
                Run::I8(keys, scale) => ops.scores_i8(&mut tile, q, keys, scale),
                Run::I4(keys, scale) => ops.scores_i4(&mut tile, q, keys, scale),
            }
        });

        team.grid(scores, span, SOME_SCORES.div_ceil(span), span, |rows, _, mut tile| {
            for (i, row) in rows.enumerate() {
                let seen = seen(row / kv_heads / shared);
                ops.softmax(&mut tile.row(i)[seen.start - origin..seen.end - origin]);
            }
        });

        // With few tokens the columns are shared out too, in parts as wide as will do: they are read end to end.
        let most = if team.threads() == 1 { 1 } else { shared * span * dim / SOME_PRODUCTS };
        let parts = (2 * team.threads()).div_ceil(tokens.len() * kv_heads).min(most).max(1);
        let width = dim.div_ceil(parts).next_multiple_of(PANEL);
        team.grid(o, dim, shared, width, |heads_here, columns, mut tile| {
            let (t, kv_head) = (heads_here.start / heads, heads_here.start % heads / shared);
            (0..shared).for_each(|line| tile.row(line).fill(0.0));
            let stride = kv_heads * span;
            let weights = &scores[t * shared * stride + kv_head * span..];
            let seen = seen(t);
            let mut start = seen.start;
            while start < seen.end {
                let end = ((start / BLOCK + 1) * BLOCK).min(seen.end);
                let (_, values) = kv.block(kv_layer, kv_head, start / BLOCK);
                let weights = &weights[start - origin..];
                let positions = start % BLOCK..(end - 1) % BLOCK + 1;
                let panels = columns.start * BLOCK..columns.end.next_multiple_of(PANEL) * BLOCK;
                match values {
                    Run::F32(values) => ops.weigh_f32(&mut tile, weights, stride, &values[panels], positions),
                    Run::F16(values) => ops.weigh_f16(&mut tile, weights, stride, &values[panels], positions),
                    Run::I8(values, scale) => {
                        ops.weigh_i8(&mut tile, weights, stride, &values[panels], scale, positions);
                    }
                    Run::I4(values, scale) => {
                        let panels = panels.start / 2..panels.end / 2;
                        ops.weigh_i4(&mut tile, weights, stride, &values[panels], scale, positions);
                    }
                }
                start = end;
            }
        });
    }
}

/// The first `len` values of a buffer that only grows.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
