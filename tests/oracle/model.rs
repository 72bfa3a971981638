//! Gemma 4 in f64: the whole text model as plain loops over plain vectors.
//!
//! Every token's residual stream is kept, layer after layer, and attention looks at the keys of the whole
//! sequence under a mask: there is no cache, no chunking, no threads and nothing is done in place. Weights
//! are dequantised to f32 when the file is read; everything after that is f64. It is slow on purpose.

use super::dequant;
use super::gguf::{Gguf, Value};

/// `rows` rows of `cols` consecutive values; multiplying gives one value a row.
struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn row(&self, r: usize) -> Vec<f64> {
        let row = &self.values[r * self.cols..(r + 1) * self.cols];
        row.iter().map(|&w| f64::from(w)).collect()
    }

    fn times(&self, x: &[f64]) -> Vec<f64> {
        assert_eq!(x.len(), self.cols);
        let rows = self.values.chunks_exact(self.cols);
        let dot = |row: &[f32]| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
        rows.map(dot).collect()
    }

    /// Cuts the rows at the given counts, as fused tensors are cut into their parts.
    fn split<const N: usize>(self, rows: [usize; N]) -> [Matrix; N] {
        assert_eq!(rows.iter().sum::<usize>(), self.rows);
        let mut start = 0;
        rows.map(|rows| {
            let values = self.values[start * self.cols..(start + rows) * self.cols].to_vec();
            start += rows;
            Matrix { rows, cols: self.cols, values }
        })
    }
}

/// Reads weights of a known shape; a wrong shape is a panic.
struct Weights<'a>(Gguf<'a>);

impl Weights<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.tensors.contains_key(name)
    }

    fn values(&self, name: &str, ne: &[usize]) -> Vec<f32> {
        let tensor = self.0.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}"));
        let mut stored = tensor.ne.clone();
        while stored.len() > ne.len() && stored.last() == Some(&1) {
            stored.pop();
        }
        assert_eq!(stored, ne, "shape of {name}");
        let format = dequant::format(tensor.type_id);
        dequant::dequantise(format, tensor.bytes, ne.iter().product())
    }

    fn vector(&self, name: &str, len: usize) -> Vec<f64> {
        self.values(name, &[len]).into_iter().map(f64::from).collect()
    }

    fn matrix(&self, name: &str, cols: usize, rows: usize) -> Matrix {
        Matrix { rows, cols, values: self.values(name, &[cols, rows]) }
    }

    fn matrices(&self, name: &str, cols: usize, rows: usize, count: usize) -> Vec<Matrix> {
        let values = self.values(name, &[cols, rows, count]);
        let parts = values.chunks_exact(cols * rows);
        parts.map(|part| Matrix { rows, cols, values: part.to_vec() }).collect()
    }

    fn key(&self, key: &str) -> Option<&Value> {
        self.0.metadata.get(&format!("gemma4.{key}"))
    }

    fn int(&self, key: &str) -> usize {
        self.key(key).unwrap_or_else(|| panic!("no key {key}")).int()
    }

    /// A key that holds one number for all layers or a list with one number for each.
    fn per_layer(&self, key: &str, layers: usize) -> Option<Vec<usize>> {
        self.key(key).map(|value| match value {
            Value::List(list) => {
                assert_eq!(list.len(), layers, "length of {key}");
                list.iter().map(Value::int).collect()
            }
            one => vec![one.int(); layers],
        })
    }
}

/// The gated feed-forward network: `down(gelu(gate x) * (up x))`.
struct FeedForward {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl FeedForward {
    fn times(&self, x: &[f64]) -> Vec<f64> {
        let gate = self.gate.times(x);
        let up = self.up.times(x);
        let gated: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| gelu(*g) * u).collect();
        self.down.times(&gated)
    }
}

/// What a layer of the mixture-of-experts variant has beside its dense feed-forward network.
struct Experts {
    used: usize,
    router: Matrix,
    router_scale: Vec<f64>,
    experts: Vec<FeedForward>,
    expert_scale: Vec<f64>,
    pre_norm_2: Vec<f64>,
    post_norm_1: Vec<f64>,
    post_norm_2: Vec<f64>,
}

/// Projections and norm of a layer that owns its keys and values; `v` is absent where V comes from K.
struct KeyValue {
    k: Matrix,
    v: Option<Matrix>,
    k_norm: Vec<f64>,
}

/// The per-layer-embedding part of a layer.
struct PerLayer {
    gate: Matrix,
    proj: Matrix,
    norm: Vec<f64>,
}

struct Layer {
    sliding: bool,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// The layer whose keys and values are attended to: this one, or an earlier one of its class.
    kv_layer: usize,
    attn_norm: Vec<f64>,
    q: Matrix,
    q_norm: Vec<f64>,
    key_value: Option<KeyValue>,
    output: Matrix,
    post_attention_norm: Vec<f64>,
    ffn_norm: Vec<f64>,
    ffn: FeedForward,
    experts: Option<Experts>,
    post_ffw_norm: Vec<f64>,
    per_layer: Option<PerLayer>,
    output_scale: f64,
}

/// The per-layer-embedding tensors that all layers share.
struct PerLayerTable {
    width: usize,
    embd: Matrix,
    model_proj: Matrix,
    proj_norm: Vec<f64>,
}

pub struct Model {
    eps: f64,
    window: usize,
    rope_base: f64,
    rope_base_sliding: f64,
    rope_freqs: Vec<f64>,
    softcap: Option<f64>,
    token_embd: Matrix,
    output: Option<Matrix>,
    output_norm: Vec<f64>,
    per_layer: Option<PerLayerTable>,
    layers: Vec<Layer>,
    /// Rounds the key (true) or value of one head before anything reads it; gets the layer and whether that slides.
    pub round_kv: Option<RoundKv>,
}

pub type RoundKv = Box<dyn Fn(usize, bool, bool, &mut [f64])>;

/// Everything a comparison may want from one evaluation.
pub struct Trace {
    /// After the soft cap: (tokens, vocabulary).
    pub logits: Vec<Vec<f64>>,
    /// (layers + 2, tokens, dim): the scaled embedding, each layer's output, the output of the final norm.
    pub hidden: Vec<Vec<Vec<f64>>>,
    /// The smallest gap between the last chosen and the first rejected expert's probability; infinite
    /// without experts. Below the noise of f32 the choice of experts is not determined.
    pub router_gap: f64,
}

impl Model {
    pub fn read(file: &[u8]) -> Self {
        let w = Weights(Gguf::read(file));
        let architecture = w.0.metadata.get("general.architecture");
        assert_eq!(architecture, Some(&Value::Text("gemma4".into())));

        let layer_count = w.int("block_count");
        let dim = w.int("embedding_length");
        let ffs = w.per_layer("feed_forward_length", layer_count).unwrap();
        let heads = w.per_layer("attention.head_count", layer_count).unwrap();
        let kv_heads = w.per_layer("attention.head_count_kv", layer_count);
        let kv_heads = kv_heads.unwrap_or_else(|| heads.clone());
        let expert_ffs = w.per_layer("expert_feed_forward_length", layer_count);
        let pattern = w.key("attention.sliding_window_pattern").unwrap().list();
        let sliding: Vec<bool> = pattern.iter().map(|v| *v == Value::Bool(true)).collect();
        assert_eq!(sliding.len(), layer_count);
        let shared = w.key("attention.shared_kv_layers").map_or(0, Value::int);
        let width = w.key("embedding_length_per_layer_input").map_or(0, Value::int);
        let vocab = w.0.metadata["tokenizer.ggml.tokens"].list().len();
        let experts = w.key("expert_count").map_or(0, Value::int);
        let (hd_global, hd_sliding) = (w.int("attention.key_length"), w.int("attention.key_length_swa"));
        assert_eq!(w.int("attention.value_length"), hd_global);
        assert_eq!(w.int("attention.value_length_swa"), hd_sliding);

        let layers = (0..layer_count).map(|il| {
            let name = |tensor: &str| format!("blk.{il}.{tensor}");
            let (nh, nk, ff) = (heads[il], kv_heads[il], ffs[il]);
            let hd = if sliding[il] { hd_sliding } else { hd_global };
            let owners = layer_count - shared;
            let kv_layer = match il < owners {
                true => il,
                false => (0..owners).rfind(|&o| sliding[o] == sliding[il]).expect("an owner"),
            };

            let qkv = name("attn_qkv.weight");
            let (q, k, v);
            if w.has(&qkv) {
                let fused = w.matrix(&qkv, dim, hd * (nh + 2 * nk));
                let [fused_q, fused_k, fused_v] = fused.split([hd * nh, hd * nk, hd * nk]);
                (q, k, v) = (fused_q, Some(fused_k), Some(fused_v));
            } else {
                let optional = |tensor| {
                    let tensor = name(tensor);
                    w.has(&tensor).then(|| w.matrix(&tensor, dim, hd * nk))
                };
                q = w.matrix(&name("attn_q.weight"), dim, hd * nh);
                (k, v) = (optional("attn_k.weight"), optional("attn_v.weight"));
            }
            // A shared layer may carry projections of its own; they are not used.
            let key_value = (kv_layer == il).then(|| KeyValue {
                k: k.expect("attn_k"),
                v,
                k_norm: w.vector(&name("attn_k_norm.weight"), hd),
            });

            let experts = (experts > 0).then(|| {
                let ff = expert_ffs.as_ref().expect("expert_feed_forward_length")[il];
                let fused = name("ffn_gate_up_exps.weight");
                let gates_and_ups: Vec<[Matrix; 2]> = if w.has(&fused) {
                    let fused = w.matrices(&fused, dim, 2 * ff, experts);
                    fused.into_iter().map(|m| m.split([ff, ff])).collect()
                } else {
                    let gates = w.matrices(&name("ffn_gate_exps.weight"), dim, ff, experts);
                    let ups = w.matrices(&name("ffn_up_exps.weight"), dim, ff, experts);
                    gates.into_iter().zip(ups).map(|(gate, up)| [gate, up]).collect()
                };
                let downs = w.matrices(&name("ffn_down_exps.weight"), ff, dim, experts);
                let scale = name("ffn_down_exps.scale");
                Experts {
                    used: w.int("expert_used_count"),
                    router: w.matrix(&name("ffn_gate_inp.weight"), dim, experts),
                    router_scale: w.vector(&name("ffn_gate_inp.scale"), dim),
                    experts: gates_and_ups
                        .into_iter()
                        .zip(downs)
                        .map(|([gate, up], down)| FeedForward { gate, up, down })
                        .collect(),
                    expert_scale: match w.has(&scale) {
                        true => w.vector(&scale, experts),
                        false => vec![1.0; experts],
                    },
                    pre_norm_2: w.vector(&name("pre_ffw_norm_2.weight"), dim),
                    post_norm_1: w.vector(&name("post_ffw_norm_1.weight"), dim),
                    post_norm_2: w.vector(&name("post_ffw_norm_2.weight"), dim),
                }
            });

            let scale = name("layer_output_scale.weight");
            Layer {
                sliding: sliding[il],
                heads: nh,
                kv_heads: nk,
                head_dim: hd,
                kv_layer,
                attn_norm: w.vector(&name("attn_norm.weight"), dim),
                q,
                q_norm: w.vector(&name("attn_q_norm.weight"), hd),
                key_value,
                output: w.matrix(&name("attn_output.weight"), hd * nh, dim),
                post_attention_norm: w.vector(&name("post_attention_norm.weight"), dim),
                ffn_norm: w.vector(&name("ffn_norm.weight"), dim),
                ffn: FeedForward {
                    gate: w.matrix(&name("ffn_gate.weight"), dim, ff),
                    up: w.matrix(&name("ffn_up.weight"), dim, ff),
                    down: w.matrix(&name("ffn_down.weight"), ff, dim),
                },
                experts,
                post_ffw_norm: w.vector(&name("post_ffw_norm.weight"), dim),
                per_layer: (width > 0).then(|| PerLayer {
                    gate: w.matrix(&name("inp_gate.weight"), dim, width),
                    proj: w.matrix(&name("proj.weight"), width, dim),
                    norm: w.vector(&name("post_norm.weight"), dim),
                }),
                output_scale: match w.has(&scale) {
                    true => w.vector(&scale, 1)[0],
                    false => 1.0,
                },
            }
        });
        let layers = layers.collect();

        let float = |key| w.key(key).map(Value::float);
        Model {
            eps: float("attention.layer_norm_rms_epsilon").unwrap(),
            window: w.int("attention.sliding_window"),
            rope_base: float("rope.freq_base").unwrap(),
            rope_base_sliding: float("rope.freq_base_swa").unwrap_or(10_000.0),
            rope_freqs: w.vector("rope_freqs.weight", hd_global / 2),
            softcap: float("final_logit_softcapping"),
            token_embd: w.matrix("token_embd.weight", dim, vocab),
            output: w.has("output.weight").then(|| w.matrix("output.weight", dim, vocab)),
            output_norm: w.vector("output_norm.weight", dim),
            per_layer: (width > 0).then(|| PerLayerTable {
                width,
                embd: w.matrix("per_layer_token_embd.weight", width * layer_count, vocab),
                model_proj: w.matrix("per_layer_model_proj.weight", dim, width * layer_count),
                proj_norm: w.vector("per_layer_proj_norm.weight", width),
            }),
            layers,
            round_kv: None,
        }
    }

    /// Evaluates a sequence whose first token stands at `first_position`; nothing precedes it.
    pub fn trace(&self, tokens: &[u32], first_position: usize) -> Trace {
        let dim = self.token_embd.cols as f64;
        let embed = |&token: &u32| scaled(&self.token_embd.row(token as usize), dim.sqrt());
        let mut x: Vec<Vec<f64>> = tokens.iter().map(embed).collect(); // (tokens, dim)
        let per_layer: Vec<Vec<Vec<f64>>> = match &self.per_layer {
            Some(table) => x.iter().zip(tokens).map(|(x, &t)| self.per_layer_embedding(table, x, t)).collect(),
            None => Vec::new(),
        };

        let mut hidden = vec![x.clone()];
        let mut router_gap = f64::INFINITY;
        let mut caches: Vec<Option<Cache>> = Vec::new();
        for (il, layer) in self.layers.iter().enumerate() {
            let normed: Vec<Vec<f64>> = x.iter().map(|x| self.norm(x, &layer.attn_norm)).collect();
            let own = layer.key_value.as_ref();
            caches.push(own.map(|own| self.keys_and_values(il, layer, own, &normed, first_position)));
            let cache = caches[layer.kv_layer].as_ref().expect("the owner comes first");
            for t in 0..tokens.len() {
                let a = self.attention(layer, cache, &normed[t], t, first_position);
                let x1 = sum(&self.norm(&a, &layer.post_attention_norm), &x[t]);
                let (f, gap) = self.feed_forward(layer, &x1);
                router_gap = router_gap.min(gap);
                let mut x2 = sum(&self.norm(&f, &layer.post_ffw_norm), &x1);
                if let Some(part) = &layer.per_layer {
                    let gate = part.gate.times(&x2);
                    let gated: Vec<f64> = gate.iter().zip(&per_layer[t][il]).map(|(g, e)| gelu(*g) * e).collect();
                    x2 = sum(&x2, &self.norm(&part.proj.times(&gated), &part.norm));
                }
                x[t] = scaled(&x2, layer.output_scale);
            }
            hidden.push(x.clone());
        }

        let normed: Vec<Vec<f64>> = x.iter().map(|x| self.norm(x, &self.output_norm)).collect();
        let head = self.output.as_ref().unwrap_or(&self.token_embd);
        let logits = normed.iter().map(|y| {
            let logits = head.times(y).into_iter();
            logits.map(|v| self.softcap.map_or(v, |cap| cap * (v / cap).tanh())).collect()
        });
        let logits = logits.collect();
        hidden.push(normed);
        Trace { logits, hidden, router_gap }
    }

    /// The per-layer inputs of one token: (layers, width). `x` is its scaled embedding.
    fn per_layer_embedding(&self, table: &PerLayerTable, x: &[f64], token: u32) -> Vec<Vec<f64>> {
        let from_token = scaled(&table.embd.row(token as usize), (table.width as f64).sqrt());
        let from_x = scaled(&table.model_proj.times(x), 1.0 / (x.len() as f64).sqrt());
        let layers = from_token.chunks(table.width).zip(from_x.chunks(table.width));
        layers.map(|(a, b)| scaled(&sum(&self.norm(b, &table.proj_norm), a), 0.5f64.sqrt())).collect()
    }

    fn keys_and_values(&self, il: usize, layer: &Layer, own: &KeyValue, x: &[Vec<f64>], first: usize) -> Cache {
        let ones = vec![1.0; layer.head_dim];
        let mut cache = Cache { keys: Vec::new(), values: Vec::new() };
        for (t, x) in x.iter().enumerate() {
            let raw_k = own.k.times(x);
            let raw_v = own.v.as_ref().map_or_else(|| raw_k.clone(), |v| v.times(x));
            let heads = raw_k.chunks(layer.head_dim);
            let keys = heads.map(|k| self.rope(layer, &self.norm(k, &own.k_norm), first + t));
            cache.keys.push(keys.collect());
            let heads = raw_v.chunks(layer.head_dim);
            cache.values.push(heads.map(|v| self.norm(v, &ones)).collect());
        }
        if let Some(round) = &self.round_kv {
            cache.keys.iter_mut().flatten().for_each(|key| round(il, layer.sliding, true, key));
            cache.values.iter_mut().flatten().for_each(|value| round(il, layer.sliding, false, value));
        }
        cache
    }

    /// Attention of the token with index `t`, output projection included. The scale of the scores is 1.
    fn attention(&self, layer: &Layer, cache: &Cache, x: &[f64], t: usize, first: usize) -> Vec<f64> {
        let visible: Vec<usize> = (0..=t).filter(|key| !layer.sliding || t - key < self.window).collect();
        let mut heads = Vec::new();
        for (head, q) in layer.q.times(x).chunks(layer.head_dim).enumerate() {
            let kv_head = head / (layer.heads / layer.kv_heads);
            let q = self.rope(layer, &self.norm(q, &layer.q_norm), first + t);
            let scores: Vec<f64> = visible.iter().map(|&key| dot(&q, &cache.keys[key][kv_head])).collect();
            let mut out = vec![0.0; layer.head_dim];
            for (p, &key) in softmax(&scores).iter().zip(&visible) {
                out = sum(&out, &scaled(&cache.values[key][kv_head], *p));
            }
            heads.extend(out);
        }
        layer.output.times(&heads)
    }

    /// The feed-forward part of a layer before its post-norm, and the router's gap (infinite without one).
    fn feed_forward(&self, layer: &Layer, x: &[f64]) -> (Vec<f64>, f64) {
        let dense = layer.ffn.times(&self.norm(x, &layer.ffn_norm));
        let Some(moe) = &layer.experts else {
            return (dense, f64::INFINITY);
        };
        let a = self.norm(&dense, &moe.post_norm_1);

        let mut router_in = scaled(&rms(x, self.eps), 1.0 / (x.len() as f64).sqrt());
        for (t, scale) in router_in.iter_mut().zip(&moe.router_scale) {
            *t *= scale;
        }
        let p = softmax(&moe.router.times(&router_in));
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|&i, &j| p[j].total_cmp(&p[i]));
        let (chosen, rest) = order.split_at(moe.used);
        let total: f64 = chosen.iter().map(|&e| p[e]).sum();
        let gap = rest.first().map_or(f64::INFINITY, |&next| p[chosen[moe.used - 1]] - p[next]);

        let m = self.norm(x, &moe.pre_norm_2);
        let mut experts = vec![0.0; x.len()];
        for &e in chosen {
            let weight = p[e] / total.max(6.103515625e-5) * moe.expert_scale[e];
            experts = sum(&experts, &scaled(&moe.experts[e].times(&m), weight));
        }
        (sum(&a, &self.norm(&experts, &moe.post_norm_2)), gap)
    }

    /// Rotates the pairs (i, i + head_dim/2) of one head; `rope_freqs` divides angles of global layers only.
    fn rope(&self, layer: &Layer, x: &[f64], position: usize) -> Vec<f64> {
        let half = x.len() / 2;
        let mut y = x.to_vec();
        for i in 0..half {
            let exponent = -2.0 * i as f64 / x.len() as f64;
            let angle = match layer.sliding {
                true => position as f64 * self.rope_base_sliding.powf(exponent),
                false => position as f64 * self.rope_base.powf(exponent) / self.rope_freqs[i],
            };
            y[i] = x[i] * angle.cos() - x[i + half] * angle.sin();
            y[i + half] = x[i] * angle.sin() + x[i + half] * angle.cos();
        }
        y
    }

    fn norm(&self, x: &[f64], weight: &[f64]) -> Vec<f64> {
        assert_eq!(x.len(), weight.len());
        rms(x, self.eps).iter().zip(weight).map(|(x, w)| x * w).collect()
    }
}

/// Keys (normalised, rotated) and values (normalised) of a layer: (tokens, heads, head dim).
struct Cache {
    keys: Vec<Vec<Vec<f64>>>,
    values: Vec<Vec<Vec<f64>>>,
}

fn rms(x: &[f64], eps: f64) -> Vec<f64> {
    let mean = dot(x, x) / x.len() as f64;
    scaled(x, 1.0 / (mean + eps).sqrt())
}

/// The tanh form of GELU.
fn gelu(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * x * (1.0 + 0.044715 * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    scaled(&e, 1.0 / e.iter().sum::<f64>())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn scaled(a: &[f64], factor: f64) -> Vec<f64> {
    a.iter().map(|a| a * factor).collect()
}
