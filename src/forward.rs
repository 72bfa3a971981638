//! The forward pass of Gemma 4, read top to bottom.
//!
//! [`forward`] takes a chunk of tokens that continue what the cache holds and returns logits. Every function below it is one
//! step of the model, in the order of the model; tensors are called as in the file. A chunk is only a way to share the
//! reading of weights: each token's numbers depend on its own position and the cache, never on its neighbours in the chunk
//! or on the thread that computed them. Quantization formats, instruction sets and file layout live elsewhere.
//!
//! Not every token goes all the way. Later tokens read a token's keys and values and nothing else of it, so above the last
//! layer that makes any, only tokens whose logits are wanted are computed: `on` is the range of the chunk's tokens that go on.
//!
//! Buffers are (tokens, width), row-major; shapes stand beside them in [`State`].

use std::ops::Range;

use crate::attend::{self, Attention};
use crate::config::{Config, LayerConfig};
use crate::kv::{Kv, KvType};
use crate::model::{KeyValue, Layer, Model, Moe, PerLayerEmbedding};
use crate::ops::{RopeTable, add_rms_norm, rms_norm, rms_norm_in_place};
use crate::team::{Lines, Team};
use crate::weight::{ActsBufs, acts, gelu_acts, multiply, multiply_best};
use crate::{Error, Result};

/// Which tokens of a chunk need logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// None: the chunk only fills the cache.
    Nothing,
    /// The last one.
    Last,
    /// The last one, and of its logits the so many largest: others may be lower than they are.
    Best(usize),
    /// Every one.
    All,
}

impl Want {
    /// The wanted ones of `n` tokens.
    fn of(self, n: usize) -> Range<usize> {
        match self {
            Want::Nothing => n..n,
            Want::Last | Want::Best(_) => n.saturating_sub(1)..n,
            Want::All => 0..n,
        }
    }
}

/// Receives intermediate results and may change them: a name as in llama.cpp's graph, the layer (0 for the whole model), the values.
pub type Tap = Box<dyn FnMut(&str, usize, &mut [f32]) + Send>;

/// A conversation's cache and the buffers of the pass.
pub struct State {
    /// Keys and values of the tokens so far.
    pub kv: Kv,
    /// Watches intermediate results, for comparing engines tensor by tensor.
    pub tap: Option<Tap>,
    /// Whether tokens stop where nothing more is wanted of them. Only speed depends on it.
    pub shortcut: bool,
    batch: usize,
    acts: ActsBufs,
    rope_sliding: RopeTable,
    rope_global: RopeTable,
    x: Vec<f32>,        // (tokens, dim) residual stream
    h: Vec<f32>,        // (tokens, dim) input or output of a sub-layer
    q: Vec<f32>,        // (tokens, heads, head_dim)
    k: Vec<f32>,        // (tokens, kv_heads, head_dim)
    v: Vec<f32>,        // (tokens, kv_heads, head_dim)
    o: Vec<f32>,        // (tokens, heads, head_dim) attention output
    gate: Vec<f32>,     // (tokens, ff)
    up: Vec<f32>,       // (tokens, ff); at first, one row of the per-layer embedding table
    ple: Vec<f32>,      // (tokens, layers, ple) per-layer inputs, of layers that all tokens go through
    late_ple: Vec<f32>, // (tokens that go on, layers, ple) those of the other layers
    attend: attend::Scratch,
    gated: Vec<f32>,  // (tokens, ple)
    moe: MoeState,    // only with experts
    logits: Vec<f32>, // (wanted tokens, vocab)
    maxima: Vec<f32>, // of parts of the logits
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

/// The widest queries, keys (or values) and hidden layer of a feed-forward network.
fn widths(c: &Config) -> (usize, usize, usize) {
    let widest = |width: fn(&LayerConfig) -> usize| c.layers.iter().map(width).max().unwrap_or(0);
    (widest(|l| l.heads * l.head_dim), widest(|l| l.kv_heads * l.head_dim), widest(|l| l.ff.max(l.expert_ff)))
}

impl State {
    /// Buffers for chunks of at most `batch` tokens and an empty cache for `context` positions.
    pub fn new(model: &Model, kv: KvType, context: usize, batch: usize) -> Result<State> {
        let c = &model.config;
        if !(1..=c.context).contains(&context) {
            return Err(Error::usage(format!("context: {context}: expected 1 to the model's {}", c.context)));
        }
        let batch = batch.clamp(1, context);
        let (q, k, ff) = widths(c);
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
            shortcut: true,
            batch,
            acts: Default::default(),
            rope_sliding: RopeTable::new(c.rope_sliding, None),
            rope_global: RopeTable::new(c.rope_global, Some(&model.rope_freqs)),
            x: buffer(c.dim),
            h: buffer(c.dim),
            q: buffer(q),
            k: buffer(k),
            v: buffer(k),
            o: buffer(q),
            gate: buffer(ff),
            up: vec![0.0; (batch * ff).max(c.ple * c.layers.len())],
            ple: Vec::new(),
            late_ple: Vec::new(),
            attend: attend::Scratch::default(),
            gated: buffer(c.ple),
            moe,
            logits: Vec::new(),
            maxima: Vec::new(),
        })
    }

    /// Bytes of the buffers, the cache left out, when a chunk of `batch` tokens has been computed at the end of `context`.
    pub fn buffer_bytes(c: &Config, context: usize, batch: usize) -> usize {
        let batch = batch.clamp(1, context.max(1));
        let (q, k, ff) = widths(c);
        let experts = c.experts.map_or(0, |experts| (3 + experts.used) * c.dim + experts.count);
        let embedded = c.ple * (2 * c.layers.len() + 1);
        // Inputs of matrices are kept as integers and as sums of them beside the floats they were.
        let floats = 2 * (3 * c.dim + 2 * q + 2 * k + 2 * ff) + experts + embedded;
        4 * (batch * floats + c.vocab)
    }

    /// The most tokens one call of [`forward`] takes.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Forgets positions from `len` on; returns how many are kept, which is 0 if a sliding window was overwritten.
    pub fn truncate(&mut self, model: &Model, len: usize) -> usize {
        self.kv.truncate(len, model.config.window)
    }

    fn tap(&mut self, name: &str, layer: usize, values: fn(&mut State) -> &mut [f32], len: usize) {
        if let Some(mut tap) = self.tap.take() {
            tap(name, layer, &mut values(self)[..len]);
            self.tap = Some(tap);
        }
    }
}

/// Positions after which looked-up rows are let go of: so many that it costs a token nothing to speak of.
const ROWS_KEPT: usize = 16;

/// Runs `tokens`, at most [`State::batch`] of them, at the positions after those in the cache. Returns the logits of the
/// wanted tokens, (wanted, vocab), after the soft cap.
///
/// # Errors
/// A token id outside the vocabulary, more tokens than the batch or the rest of the context, no memory for the cache.
pub fn forward<'s>(m: &Model, team: &Team, s: &'s mut State, tokens: &[u32], want: Want) -> Result<&'s [f32]> {
    begin(&m.config, s, tokens)?;
    let (n, dim) = (tokens.len(), m.config.dim);
    let first = s.kv.len();
    s.rope_sliding.fill(team, first..first + n);
    s.rope_global.fill(team, first..first + n);
    let wanted = want.of(n);
    // Layers that every token goes through.
    let common = if s.shortcut { m.config.last_kv_layer() } else { m.layers.len() };

    embed(m, s, tokens);
    s.tap("inp_scaled", 0, |s| &mut s.x, n * dim);
    if let Some(ple) = &m.ple {
        per_layer_inputs(m, ple, team, s, tokens, common, &wanted);
    }
    if first / ROWS_KEPT != (first + n) / ROWS_KEPT {
        m.let_go_of_rows();
    }
    for (il, layer) in m.layers.iter().enumerate() {
        let on = if il < common { 0..n } else { wanted.clone() };
        attention(m, layer, il, team, s, n, &on);
        if on.is_empty() {
            break;
        }
        feed_forward(m, layer, il, team, s, &on);
        per_layer_embedding(m, layer, il, team, s, &on, common);
        m.ops.scale(&mut s.x[rows(&on, dim)], layer.layer_output_scale);
        s.tap("l_out", il, |s| &mut s.x, n * dim);
    }
    s.kv.advance(n);
    logits(m, team, s, &wanted, want);
    Ok(&s.logits)
}

/// Where the rows of some tokens lie in a (tokens, width) buffer.
fn rows(tokens: &Range<usize>, width: usize) -> Range<usize> {
    tokens.start * width..tokens.end * width
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

/// ple\[layer\] = (rms(per_layer_model_proj · x / √dim) · per_layer_proj_norm + √ple · per_layer_token_embd\[token\]) / √2,
/// of the `common` layers for every token, of the others for those that go on.
fn per_layer_inputs(
    m: &Model,
    p: &PerLayerEmbedding,
    team: &Team,
    s: &mut State,
    tokens: &[u32],
    common: usize,
    on: &Range<usize>,
) {
    let Config { dim, ple, eps, .. } = m.config;
    let ops = m.ops;
    let early = 0..common * ple;
    let late = early.end..m.layers.len() * ple;
    s.ple.resize(tokens.len() * early.len(), 0.0);
    s.late_ple.resize(on.len() * late.len(), 0.0);
    for (layers, of, out) in [(early, 0..tokens.len(), &mut s.ple), (late, on.clone(), &mut s.late_ple)] {
        if out.is_empty() {
            continue;
        }
        let proj = p.per_layer_model_proj.slice(layers.clone());
        let [x] = acts(ops, team, &mut s.acts, &s.x[rows(&of, dim)], [&proj]);
        multiply(ops, team, [(x, &proj, &mut out[..])]);
        ops.scale(out, 1.0 / (dim as f32).sqrt());
        rms_norm_in_place(ops, team, out, ple, Some(&p.per_layer_proj_norm), eps);
        for (row, &token) in out.chunks_exact_mut(layers.len()).zip(&tokens[of]) {
            let looked_up = &mut s.up[..m.layers.len() * ple]; // free until the first feed-forward network
            p.per_layer_token_embd.look_up(token as usize, looked_up);
            ops.scale(looked_up, (ple as f32).sqrt());
            ops.add(row, &looked_up[layers.clone()]);
        }
        ops.scale(out, std::f32::consts::FRAC_1_SQRT_2);
    }
}

/// x += rms(attn_output · attend(q, K, V)) · post_attention_norm. Keys and values are made of all `n` tokens of the chunk.
fn attention(m: &Model, layer: &Layer, il: usize, team: &Team, s: &mut State, n: usize, on: &Range<usize>) {
    let Config { dim, eps, .. } = m.config;
    let c = &m.config.layers[il];
    let ops = m.ops;
    let (q_width, kv_width) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let rope = if c.sliding { &s.rope_sliding } else { &s.rope_global };
    let all = if layer.attn_kv.is_some() { 0..n } else { on.clone() };
    rms_norm(ops, team, &mut s.h[rows(&all, dim)], &s.x[rows(&all, dim)], &layer.attn_norm, eps);

    let h = &s.h[rows(&all, dim)];
    let queries = on.start - all.start..on.end - all.start;
    let q = &mut s.q[rows(on, q_width)];
    let (k, v) = (&mut s.k[..n * kv_width], &mut s.v[..n * kv_width]);
    match &layer.attn_kv {
        Some(KeyValue { attn_k, attn_v: Some(attn_v), .. }) => {
            let [h_q, h_k, h_v] = acts(ops, team, &mut s.acts, h, [&layer.attn_q, attn_k, attn_v]);
            let q = (layer.attn_q.part(&h_q, queries), &layer.attn_q, &mut *q);
            multiply(ops, team, [q, (h_k, attn_k, &mut *k), (h_v, attn_v, &mut *v)]);
        }
        Some(KeyValue { attn_k, attn_v: None, .. }) => {
            let [h_q, h_k] = acts(ops, team, &mut s.acts, h, [&layer.attn_q, attn_k]);
            let q = (layer.attn_q.part(&h_q, queries), &layer.attn_q, &mut *q);
            multiply(ops, team, [q, (h_k, attn_k, &mut *k)]);
            v.copy_from_slice(k); // before its norm and rotation
        }
        None => {
            let [h] = acts(ops, team, &mut s.acts, h, [&layer.attn_q]);
            multiply(ops, team, [(h, &layer.attn_q, &mut *q)]);
        }
    }
    if let Some(kv) = &layer.attn_kv {
        rms_norm_in_place(ops, team, k, c.head_dim, Some(&kv.attn_k_norm), eps);
        rope.rotate(ops, team, k, c.kv_heads, c.head_dim, 0);
        rms_norm_in_place(ops, team, v, c.head_dim, None, eps);
        let first = s.kv.len();
        for (t, (k, v)) in k.chunks_exact(kv_width).zip(v.chunks_exact(kv_width)).enumerate() {
            s.kv.write(il, first + t, k, v, ops);
        }
    }
    if on.is_empty() {
        return;
    }
    rms_norm_in_place(ops, team, q, c.head_dim, Some(&layer.attn_q_norm), eps);
    rope.rotate(ops, team, q, c.heads, c.head_dim, on.start);

    let o = &mut s.o[rows(on, q_width)];
    let first = s.kv.len() + on.start;
    let attention = Attention { ops, team, kv: &s.kv, layer: c, window: m.config.window, first };
    attention.run(&mut s.attend, q, o);

    let h = &mut s.h[rows(on, dim)];
    let [o] = acts(ops, team, &mut s.acts, o, [&layer.attn_output]);
    multiply(ops, team, [(o, &layer.attn_output, &mut *h)]);
    add_rms_norm(ops, team, &mut s.x[rows(on, dim)], h, &layer.post_attention_norm, eps);
    s.tap("attn_out", il, |s| &mut s.x, n * dim);
}

/// x += rms(ffn(x)) · post_ffw_norm
fn feed_forward(m: &Model, layer: &Layer, il: usize, team: &Team, s: &mut State, on: &Range<usize>) {
    let Config { dim, eps, .. } = m.config;
    let ff = m.config.layers[il].ff;
    let ops = m.ops;
    let (n, on) = (on.len(), rows(on, dim));
    rms_norm(ops, team, &mut s.h[on.clone()], &s.x[on.clone()], &layer.ffn_norm, eps);
    let (gate, up) = (&mut s.gate[..n * ff], &mut s.up[..n * ff]);
    let [h_gate, h_up] = acts(ops, team, &mut s.acts, &s.h[on.clone()], [&layer.ffn_gate, &layer.ffn_up]);
    multiply(ops, team, [(h_gate, &layer.ffn_gate, &mut *gate), (h_up, &layer.ffn_up, &mut *up)]);
    let gate = gelu_acts(ops, team, &mut s.acts, gate, up, &layer.ffn_down);
    multiply(ops, team, [(gate, &layer.ffn_down, &mut s.h[on.clone()])]);
    if let Some(moe) = &layer.moe {
        rms_norm_in_place(ops, team, &mut s.h[on.clone()], dim, Some(&moe.post_ffw_norm_1), eps);
        s.moe.dense[..n * dim].copy_from_slice(&s.h[on.clone()]);
        experts(m, moe, il, team, s, on.clone());
        ops.add(&mut s.h[on.clone()], &s.moe.dense[..n * dim]);
    }
    add_rms_norm(ops, team, &mut s.x[on.clone()], &mut s.h[on.clone()], &layer.post_ffw_norm, eps);
    s.tap("ffn_out", il, |s| &mut s.x, on.end);
}

/// h = rms(Σ over the chosen experts of weight · scale · expert(rms(x) · pre_ffw_norm_2)) · post_ffw_norm_2
fn experts(m: &Model, moe: &Moe, il: usize, team: &Team, s: &mut State, on: Range<usize>) {
    let Some(e) = m.config.experts else { return };
    let Config { dim, eps, .. } = m.config;
    let ff = m.config.layers[il].expert_ff;
    let ops = m.ops;
    route(m, moe, team, s, on.clone());

    // The tokens of the chunk, expert by expert, so that an expert's weights are read once.
    rms_norm(ops, team, &mut s.h[on.clone()], &s.x[on.clone()], &moe.pre_ffw_norm_2, eps);
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
            input.copy_from_slice(&s.h[on.start + token * dim..][..dim]);
        }
        let (gate, up) = (&mut s.gate[..members * ff], &mut s.up[..members * ff]);
        let [in_gate, in_up] = acts(ops, team, &mut s.acts, &b.input[..members * dim], [&expert.gate, &expert.up]);
        multiply(ops, team, [(in_gate, &expert.gate, &mut *gate), (in_up, &expert.up, &mut *up)]);
        let gate = gelu_acts(ops, team, &mut s.acts, gate, up, &expert.down);
        multiply(ops, team, [(gate, &expert.down, &mut b.output[..members * dim])]);
        for (output, &(token, slot)) in b.output.chunks_exact_mut(dim).zip(&b.members) {
            let at = token * e.used + slot;
            ops.scale(output, moe.ffn_down_exps_scale[index]);
            ops.scale(output, b.chosen[at].1);
            b.slots[at * dim..][..dim].copy_from_slice(output);
        }
    }
    for (h, slots) in s.h[on.clone()].chunks_exact_mut(dim).zip(b.slots.chunks_exact(e.used * dim)) {
        h.fill(0.0);
        slots.chunks_exact(dim).for_each(|slot| ops.add(h, slot)); // best expert first
    }
    rms_norm_in_place(ops, team, &mut s.h[on.clone()], dim, Some(&moe.post_ffw_norm_2), eps);
}

/// Chooses each token's experts: the largest of softmax(ffn_gate_inp · (rms(x) / √dim · ffn_gate_inp.scale)), renormalised.
fn route(m: &Model, moe: &Moe, team: &Team, s: &mut State, on: Range<usize>) {
    let Some(e) = m.config.experts else { return };
    let Config { dim, eps, .. } = m.config;
    let ops = m.ops;
    let n = on.len() / dim;
    let h = &mut s.h[on.clone()];
    h.copy_from_slice(&s.x[on]);
    rms_norm_in_place(ops, team, h, dim, None, eps);
    ops.scale(h, 1.0 / (dim as f32).sqrt());
    for row in h.chunks_exact_mut(dim) {
        row.iter_mut().zip(&moe.ffn_gate_inp_scale).for_each(|(x, scale)| *x *= scale);
    }
    let [h] = acts(ops, team, &mut s.acts, h, [&moe.ffn_gate_inp]);
    multiply(ops, team, [(h, &moe.ffn_gate_inp, &mut s.moe.router[..n * e.count])]);
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
fn per_layer_embedding(
    m: &Model,
    layer: &Layer,
    il: usize,
    team: &Team,
    s: &mut State,
    on: &Range<usize>,
    common: usize,
) {
    let Some(p) = &layer.ple else { return };
    let Config { dim, ple, eps, .. } = m.config;
    let ops = m.ops;
    let gated = &mut s.gated[..on.len() * ple];
    let [x] = acts(ops, team, &mut s.acts, &s.x[rows(on, dim)], [&p.inp_gate]);
    multiply(ops, team, [(x, &p.inp_gate, &mut *gated)]);
    let (inputs, layers, il_there) =
        if il < common { (&s.ple, common, il) } else { (&s.late_ple, m.layers.len() - common, il - common) };
    for (gated, inputs) in gated.chunks_exact_mut(ple).zip(inputs.chunks_exact(layers * ple)) {
        ops.gelu_mul(gated, &inputs[il_there * ple..][..ple]);
    }
    let [gated] = acts(ops, team, &mut s.acts, gated, [&p.proj]);
    multiply(ops, team, [(gated, &p.proj, &mut s.h[rows(on, dim)])]);
    add_rms_norm(ops, team, &mut s.x[rows(on, dim)], &mut s.h[rows(on, dim)], &p.post_norm, eps);
    s.tap("per_layer_embd_out", il, |s| &mut s.x, on.end * dim);
}

/// logits = softcap(output · (rms(x) · output_norm)) of the wanted tokens
fn logits(m: &Model, team: &Team, s: &mut State, wanted: &Range<usize>, want: Want) {
    /// Logits one thread caps at a time.
    const PART: usize = 4096;
    let Config { dim, vocab, eps, .. } = m.config;
    let n = wanted.len();
    s.logits.resize(n * vocab, 0.0);
    if n == 0 {
        return;
    }
    let h = &mut s.h[..n * dim];
    rms_norm(m.ops, team, h, &s.x[rows(wanted, dim)], &m.output_norm, eps);
    let [h] = acts(m.ops, team, &mut s.acts, h, [&m.output]);
    match want {
        Want::Best(best) => multiply_best(m.ops, team, (h, &m.output, &mut s.logits), best, &mut s.maxima),
        _ => multiply(m.ops, team, [(h, &m.output, &mut s.logits)]),
    }
    if let Some(cap) = m.config.softcap {
        team.share(s.logits.len(), PART, Lines(&mut s.logits, 1), |_, Lines(part, _)| m.ops.softcap(part, cap));
    }
    s.tap("result_norm", 0, |s| &mut s.h, n * dim);
    s.tap("result_output", 0, |s| &mut s.logits, n * vocab);
}
