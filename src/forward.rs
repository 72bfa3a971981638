//! The forward pass of Gemma 4, read top to bottom.
//!
//! [`forward`] takes a chunk of tokens that continue what the cache holds and returns logits. Every function below it is one
//! step of the model, in the order of the model; tensors are called as in the file. A chunk is only a way to share the
//! reading of weights: each token's numbers depend on its own position and the cache, never on its neighbours in the chunk
//! or on the thread that computed them. Quantization formats, instruction sets and file layout live elsewhere.
//!
//! Buffers are (tokens, width), row-major; shapes stand beside them in [`State`].

use std::cell::RefCell;

use gemrun_simd::{ActsBuf, Ops};

use crate::config::{Config, LayerConfig};
use crate::kv::{Kv, KvType, Run};
use crate::model::{Layer, Model, Moe, PerLayerEmbedding};
use crate::ops::{RopeTable, add_rms_norm, rms_norm, rms_norm_in_place};
use crate::team::Team;
use crate::weight::{acts, multiply};
use crate::{Error, Result};

/// Which tokens of a chunk need logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// None: the chunk only fills the cache.
    Nothing,
    /// The last one.
    Last,
    /// Every one.
    All,
}

/// Receives intermediate results: a name as in llama.cpp's graph, the layer (0 for the whole model), the values.
pub type Tap = Box<dyn FnMut(&str, usize, &[f32]) + Send>;

/// A conversation's cache and the buffers of the pass.
pub struct State {
    /// Keys and values of the tokens so far.
    pub kv: Kv,
    /// Watches intermediate results, for comparing engines tensor by tensor.
    pub tap: Option<Tap>,
    batch: usize,
    acts: ActsBuf,
    rope_sliding: RopeTable,
    rope_global: RopeTable,
    x: Vec<f32>,      // (tokens, dim) residual stream
    h: Vec<f32>,      // (tokens, dim) input or output of a sub-layer
    q: Vec<f32>,      // (tokens, heads, head_dim)
    k: Vec<f32>,      // (tokens, kv_heads, head_dim)
    v: Vec<f32>,      // (tokens, kv_heads, head_dim)
    o: Vec<f32>,      // (tokens, heads, head_dim) attention output
    gate: Vec<f32>,   // (tokens, ff)
    up: Vec<f32>,     // (tokens, ff); at first, one row of the per-layer embedding table
    ple: Vec<f32>,    // (tokens, layers, ple) per-layer inputs
    gated: Vec<f32>,  // (tokens, ple)
    moe: MoeState,    // only with experts
    logits: Vec<f32>, // (wanted tokens, vocab)
}

/// Buffers of the mixture of experts.
#[derive(Default)]
struct MoeState {
    dense: Vec<f32>,              // (tokens, dim) output of the dense network
    router: Vec<f32>,             // (tokens, experts) probabilities
    chosen: Vec<(usize, f32)>,    // (tokens, used) expert and its weight, best first
    members: Vec<(usize, usize)>, // (token, slot) of the tokens sent to one expert
    input: Vec<f32>,              // (members, dim)
    output: Vec<f32>,             // (members, dim)
    slots: Vec<f32>,              // (tokens, used, dim) weighted expert outputs
}

impl State {
    /// Buffers for chunks of at most `batch` tokens and an empty cache for `context` positions.
    pub fn new(model: &Model, kv: KvType, context: usize, batch: usize) -> Result<State> {
        let c = &model.config;
        if !(1..=c.context).contains(&context) {
            return Err(Error::usage(format!("context: {context}: expected 1 to the model's {}", c.context)));
        }
        let batch = batch.clamp(1, context);
        let widest = |width: fn(&LayerConfig) -> usize| c.layers.iter().map(width).max().unwrap_or(0);
        let (q, k) = (widest(|l| l.heads * l.head_dim), widest(|l| l.kv_heads * l.head_dim));
        let ff = widest(|l| l.ff.max(l.expert_ff));
        let buffer = |width: usize| vec![0.0; batch * width];
        let moe = match c.experts {
            None => MoeState::default(),
            Some(experts) => MoeState {
                dense: buffer(c.dim),
                router: buffer(experts.count),
                chosen: Vec::with_capacity(batch * experts.used),
                members: Vec::with_capacity(batch),
                input: buffer(c.dim),
                output: buffer(c.dim),
                slots: buffer(experts.used * c.dim),
            },
        };
        Ok(State {
            kv: Kv::new(c, kv, context, batch),
            tap: None,
            batch,
            acts: ActsBuf::default(),
            rope_sliding: RopeTable::default(),
            rope_global: RopeTable::default(),
            x: buffer(c.dim),
            h: buffer(c.dim),
            q: buffer(q),
            k: buffer(k),
            v: buffer(k),
            o: buffer(q),
            gate: buffer(ff),
            up: vec![0.0; (batch * ff).max(c.ple * c.layers.len())],
            ple: buffer(c.ple * c.layers.len()),
            gated: buffer(c.ple),
            moe,
            logits: Vec::new(),
        })
    }

    /// The most tokens one call of [`forward`] takes.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Forgets positions from `len` on; returns how many are kept, which is 0 if a sliding window was overwritten.
    pub fn truncate(&mut self, model: &Model, len: usize) -> usize {
        self.kv.truncate(len, model.config.window)
    }

    fn tap(&mut self, name: &str, layer: usize, values: fn(&State) -> &[f32], len: usize) {
        if let Some(mut tap) = self.tap.take() {
            tap(name, layer, &values(self)[..len]);
            self.tap = Some(tap);
        }
    }
}

/// Runs `tokens`, at most [`State::batch`] of them, at the positions after those in the cache. Returns the logits of the
/// wanted tokens, (wanted, vocab), after the soft cap.
///
/// # Errors
/// A token id outside the vocabulary, more tokens than the batch or the rest of the context, no memory for the cache.
pub fn forward<'s>(m: &Model, team: &Team, s: &'s mut State, tokens: &[u32], want: Want) -> Result<&'s [f32]> {
    begin(&m.config, s, tokens)?;
    let (n, dim) = (tokens.len(), m.config.dim);
    let first = s.kv.len();
    s.rope_sliding.fill(m.config.rope_sliding, None, first..first + n);
    s.rope_global.fill(m.config.rope_global, Some(&m.rope_freqs), first..first + n);

    embed(m, s, tokens);
    s.tap("inp_scaled", 0, |s| &s.x, n * dim);
    if let Some(ple) = &m.ple {
        per_layer_inputs(m, ple, team, s, tokens);
    }
    for (il, layer) in m.layers.iter().enumerate() {
        attention(m, layer, il, team, s, n);
        feed_forward(m, layer, il, team, s, n);
        per_layer_embedding(m, layer, il, team, s, n);
        m.ops.scale(&mut s.x[..n * dim], layer.layer_output_scale);
        s.tap("l_out", il, |s| &s.x, n * dim);
    }
    s.kv.advance(n);
    logits(m, team, s, n, want);
    Ok(&s.logits)
}

fn begin(c: &Config, s: &mut State, tokens: &[u32]) -> Result<()> {
    if tokens.len() > s.batch {
        return Err(Error::usage(format!("{} tokens at once: expected at most {}", tokens.len(), s.batch)));
    }
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= c.vocab) {
        return Err(Error::usage(format!("token id {id}: expected less than the vocabulary's {}", c.vocab)));
    }
    s.kv.reserve(tokens.len())
}

/// x = √dim · token_embd\[token\]
fn embed(m: &Model, s: &mut State, tokens: &[u32]) {
    let dim = m.config.dim;
    for (x, &token) in s.x.chunks_exact_mut(dim).zip(tokens) {
        m.token_embd.look_up(token as usize, x);
        m.ops.scale(x, (dim as f32).sqrt());
    }
}

/// ple\[layer\] = (rms(per_layer_model_proj · x / √dim) · per_layer_proj_norm + √ple · per_layer_token_embd\[token\]) / √2
fn per_layer_inputs(m: &Model, p: &PerLayerEmbedding, team: &Team, s: &mut State, tokens: &[u32]) {
    let Config { dim, ple, eps, .. } = m.config;
    let width = ple * m.layers.len();
    let projected = &mut s.ple[..tokens.len() * width];
    let x = acts(m.ops, &mut s.acts, &s.x[..tokens.len() * dim], &[&p.per_layer_model_proj]);
    multiply(team, &x, [&p.per_layer_model_proj], [projected]);
    m.ops.scale(projected, 1.0 / (dim as f32).sqrt());
    rms_norm_in_place(m.ops, projected, ple, Some(&p.per_layer_proj_norm), eps);
    for (row, &token) in projected.chunks_exact_mut(width).zip(tokens) {
        let looked_up = &mut s.up[..width]; // free until the first feed-forward network
        p.per_layer_token_embd.look_up(token as usize, looked_up);
        m.ops.scale(looked_up, (ple as f32).sqrt());
        m.ops.add(row, looked_up);
    }
    m.ops.scale(projected, std::f32::consts::FRAC_1_SQRT_2);
}

/// x += rms(attn_output · attend(q, K, V)) · post_attention_norm
fn attention(m: &Model, layer: &Layer, il: usize, team: &Team, s: &mut State, n: usize) {
    let Config { dim, eps, .. } = m.config;
    let c = &m.config.layers[il];
    let ops = m.ops;
    let rope = if c.sliding { &s.rope_sliding } else { &s.rope_global };
    let (x, h) = (&mut s.x[..n * dim], &mut s.h[..n * dim]);
    let q = &mut s.q[..n * c.heads * c.head_dim];
    rms_norm(ops, h, x, &layer.attn_norm, eps);

    if let Some(kv) = &layer.attn_kv {
        let (k, v) = (&mut s.k[..n * c.kv_heads * c.head_dim], &mut s.v[..n * c.kv_heads * c.head_dim]);
        match &kv.attn_v {
            Some(attn_v) => {
                let h = acts(ops, &mut s.acts, h, &[&layer.attn_q, &kv.attn_k, attn_v]);
                multiply(team, &h, [&layer.attn_q, &kv.attn_k, attn_v], [q, &mut *k, &mut *v]);
            }
            None => {
                let h = acts(ops, &mut s.acts, h, &[&layer.attn_q, &kv.attn_k]);
                multiply(team, &h, [&layer.attn_q, &kv.attn_k], [q, &mut *k]);
                v.copy_from_slice(k); // before its norm and rotation
            }
        }
        rms_norm_in_place(ops, k, c.head_dim, Some(&kv.attn_k_norm), eps);
        rope.rotate(ops, k, c.kv_heads, c.head_dim);
        rms_norm_in_place(ops, v, c.head_dim, None, eps);
        let (first, width) = (s.kv.len(), c.kv_heads * c.head_dim);
        for (t, (k, v)) in k.chunks_exact(width).zip(v.chunks_exact(width)).enumerate() {
            s.kv.write(il, first + t, k, v, ops);
        }
    } else {
        let h = acts(ops, &mut s.acts, h, &[&layer.attn_q]);
        multiply(team, &h, [&layer.attn_q], [q]);
    }
    let q = &mut s.q[..n * c.heads * c.head_dim];
    rms_norm_in_place(ops, q, c.head_dim, Some(&layer.attn_q_norm), eps);
    rope.rotate(ops, q, c.heads, c.head_dim);

    let o = &mut s.o[..n * c.heads * c.head_dim];
    attend(ops, c, m.config.window, team, &s.kv, q, o);

    let o = acts(ops, &mut s.acts, o, &[&layer.attn_output]);
    multiply(team, &o, [&layer.attn_output], [&mut *h]);
    add_rms_norm(ops, x, h, &layer.post_attention_norm, eps);
    s.tap("attn_out", il, |s| &s.x, n * dim);
}

/// o = softmax(q · Kᵀ) · V for every token and head, over all positions up to the token's own, or the last `window`.
/// The scale is 1: the norms of q and k carry it. Positions are taken in ascending order.
fn attend(ops: &Ops, c: &LayerConfig, window: usize, team: &Team, kv: &Kv, q: &[f32], o: &mut [f32]) {
    thread_local! {
        static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let dim = c.head_dim;
    team.parts(o, dim, |i, o| {
        let (token, head) = (i / c.heads, i % c.heads);
        let kv_head = head / (c.heads / c.kv_heads);
        let q = &q[i * dim..][..dim];
        let end = kv.len() + token + 1;
        let start = if c.sliding { end.saturating_sub(window) } else { 0 };
        SCORES.with_borrow_mut(|scores| {
            scores.clear();
            kv.runs(c.kv_layer, kv_head, start..end, |_, keys, _| match keys {
                Run::F32(keys) => scores.extend(keys.chunks_exact(dim).map(|key| ops.dot(q, key))),
                Run::F16(keys) => scores.extend(keys.chunks_exact(dim).map(|key| ops.dot_f16(q, key))),
            });
            ops.softmax(scores);
            o.fill(0.0);
            kv.runs(c.kv_layer, kv_head, start..end, |positions, _, values| {
                let weights = &scores[positions.start - start..positions.end - start];
                match values {
                    Run::F32(values) => {
                        values.chunks_exact(dim).zip(weights).for_each(|(value, &w)| ops.axpy(o, w, value));
                    }
                    Run::F16(values) => {
                        values.chunks_exact(dim).zip(weights).for_each(|(value, &w)| ops.axpy_f16(o, w, value));
                    }
                }
            });
        });
    });
}

/// x += rms(ffn(x)) · post_ffw_norm
fn feed_forward(m: &Model, layer: &Layer, il: usize, team: &Team, s: &mut State, n: usize) {
    let Config { dim, eps, .. } = m.config;
    let ff = m.config.layers[il].ff;
    let ops = m.ops;
    rms_norm(ops, &mut s.h[..n * dim], &s.x[..n * dim], &layer.ffn_norm, eps);
    let (gate, up) = (&mut s.gate[..n * ff], &mut s.up[..n * ff]);
    let h = acts(ops, &mut s.acts, &s.h[..n * dim], &[&layer.ffn_gate, &layer.ffn_up]);
    multiply(team, &h, [&layer.ffn_gate, &layer.ffn_up], [&mut *gate, &mut *up]);
    team.parts(gate, ff, |t, gate| ops.gelu_mul(gate, &up[t * ff..][..ff]));
    let gate = acts(ops, &mut s.acts, gate, &[&layer.ffn_down]);
    multiply(team, &gate, [&layer.ffn_down], [&mut s.h[..n * dim]]);
    if let Some(moe) = &layer.moe {
        rms_norm_in_place(ops, &mut s.h[..n * dim], dim, Some(&moe.post_ffw_norm_1), eps);
        s.moe.dense[..n * dim].copy_from_slice(&s.h[..n * dim]);
        experts(m, moe, il, team, s, n);
        ops.add(&mut s.h[..n * dim], &s.moe.dense[..n * dim]);
    }
    add_rms_norm(ops, &mut s.x[..n * dim], &mut s.h[..n * dim], &layer.post_ffw_norm, eps);
    s.tap("ffn_out", il, |s| &s.x, n * dim);
}

/// h = rms(Σ over the chosen experts of weight · scale · expert(rms(x) · pre_ffw_norm_2)) · post_ffw_norm_2
fn experts(m: &Model, moe: &Moe, il: usize, team: &Team, s: &mut State, n: usize) {
    let Some(e) = m.config.experts else { return };
    let Config { dim, eps, .. } = m.config;
    let ff = m.config.layers[il].expert_ff;
    let ops = m.ops;
    route(m, moe, team, s, n);

    // The tokens of the chunk, expert by expert, so that an expert's weights are read once.
    rms_norm(ops, &mut s.h[..n * dim], &s.x[..n * dim], &moe.pre_ffw_norm_2, eps);
    let b = &mut s.moe;
    for (index, expert) in moe.experts.iter().enumerate() {
        b.members.clear();
        let sent = b.chosen.iter().enumerate().filter(|(_, (chosen, _))| *chosen == index);
        b.members.extend(sent.map(|(at, _)| (at / e.used, at % e.used)));
        let members = b.members.len();
        if members == 0 {
            continue;
        }
        for (input, (token, _)) in b.input.chunks_exact_mut(dim).zip(&b.members) {
            input.copy_from_slice(&s.h[token * dim..][..dim]);
        }
        let (gate, up) = (&mut s.gate[..members * ff], &mut s.up[..members * ff]);
        let input = acts(ops, &mut s.acts, &b.input[..members * dim], &[&expert.gate, &expert.up]);
        multiply(team, &input, [&expert.gate, &expert.up], [&mut *gate, &mut *up]);
        ops.gelu_mul(gate, up);
        let gate = acts(ops, &mut s.acts, gate, &[&expert.down]);
        multiply(team, &gate, [&expert.down], [&mut b.output[..members * dim]]);
        for (output, &(token, slot)) in b.output.chunks_exact_mut(dim).zip(&b.members) {
            let at = token * e.used + slot;
            ops.scale(output, moe.ffn_down_exps_scale[index]);
            ops.scale(output, b.chosen[at].1);
            b.slots[at * dim..][..dim].copy_from_slice(output);
        }
    }
    for (h, slots) in s.h.chunks_exact_mut(dim).zip(b.slots.chunks_exact(e.used * dim)).take(n) {
        h.fill(0.0);
        slots.chunks_exact(dim).for_each(|slot| ops.add(h, slot)); // best expert first
    }
    rms_norm_in_place(ops, &mut s.h[..n * dim], dim, Some(&moe.post_ffw_norm_2), eps);
}

/// Chooses each token's experts: the largest of softmax(ffn_gate_inp · (rms(x) / √dim · ffn_gate_inp.scale)), renormalised.
fn route(m: &Model, moe: &Moe, team: &Team, s: &mut State, n: usize) {
    let Some(e) = m.config.experts else { return };
    let Config { dim, eps, .. } = m.config;
    let ops = m.ops;
    let h = &mut s.h[..n * dim];
    h.copy_from_slice(&s.x[..n * dim]);
    rms_norm_in_place(ops, h, dim, None, eps);
    ops.scale(h, 1.0 / (dim as f32).sqrt());
    for row in h.chunks_exact_mut(dim) {
        row.iter_mut().zip(&moe.ffn_gate_inp_scale).for_each(|(x, scale)| *x *= scale);
    }
    let h = acts(ops, &mut s.acts, h, &[&moe.ffn_gate_inp]);
    multiply(team, &h, [&moe.ffn_gate_inp], [&mut s.moe.router[..n * e.count]]);
    s.moe.chosen.clear();
    for row in s.moe.router.chunks_exact_mut(e.count).take(n) {
        ops.softmax(row);
        let at = s.moe.chosen.len();
        for _ in 0..e.used {
            // Strictly greater: of equal probabilities the lower expert wins.
            let taken = |expert: usize, chosen: &[(usize, f32)]| chosen.iter().any(|&(other, _)| other == expert);
            let mut best = None;
            for (expert, &p) in row.iter().enumerate() {
                if best.is_none_or(|(_, most)| p > most) && !taken(expert, &s.moe.chosen[at..]) {
                    best = Some((expert, p));
                }
            }
            s.moe.chosen.extend(best);
        }
        let sum: f32 = s.moe.chosen[at..].iter().map(|&(_, p)| p).sum();
        // The smallest normal half: what a vanishing sum is replaced by.
        let sum = if sum < 6.103_515_6e-5 { 6.103_515_6e-5 } else { sum };
        s.moe.chosen[at..].iter_mut().for_each(|(_, p)| *p /= sum);
    }
}

/// x += rms(proj · (gelu(inp_gate · x) · ple\[layer\])) · post_norm
fn per_layer_embedding(m: &Model, layer: &Layer, il: usize, team: &Team, s: &mut State, n: usize) {
    let Some(p) = &layer.ple else { return };
    let Config { dim, ple, eps, .. } = m.config;
    let ops = m.ops;
    let gated = &mut s.gated[..n * ple];
    let x = acts(ops, &mut s.acts, &s.x[..n * dim], &[&p.inp_gate]);
    multiply(team, &x, [&p.inp_gate], [&mut *gated]);
    for (gated, inputs) in gated.chunks_exact_mut(ple).zip(s.ple.chunks_exact(ple * m.layers.len())) {
        ops.gelu_mul(gated, &inputs[il * ple..][..ple]);
    }
    let gated = acts(ops, &mut s.acts, gated, &[&p.proj]);
    multiply(team, &gated, [&p.proj], [&mut s.h[..n * dim]]);
    add_rms_norm(ops, &mut s.x[..n * dim], &mut s.h[..n * dim], &p.post_norm, eps);
    s.tap("per_layer_embd_out", il, |s| &s.x, n * dim);
}

/// logits = softcap(output · (rms(x) · output_norm)) of the wanted tokens
fn logits(m: &Model, team: &Team, s: &mut State, n: usize, want: Want) {
    /// Logits one thread caps at a time.
    const PART: usize = 4096;
    let Config { dim, vocab, eps, .. } = m.config;
    let rows = match want {
        Want::Nothing => 0,
        Want::Last => n.min(1),
        Want::All => n,
    };
    s.logits.resize(rows * vocab, 0.0);
    if rows == 0 {
        return;
    }
    let h = &mut s.h[..rows * dim];
    rms_norm(m.ops, h, &s.x[(n - rows) * dim..n * dim], &m.output_norm, eps);
    let h = acts(m.ops, &mut s.acts, h, &[&m.output]);
    multiply(team, &h, [&m.output], [&mut s.logits]);
    if let Some(cap) = m.config.softcap {
        let all = s.logits.len();
        team.tiles([(&mut s.logits[..], all, PART)], |_, _, mut part| m.ops.softcap(part.row(0), cap));
    }
    s.tap("result_norm", 0, |s| &s.h, rows * dim);
    s.tap("result_output", 0, |s| &s.logits, rows * vocab);
}
