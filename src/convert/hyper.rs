//! Hyper-parameters: from a checkpoint's `config.json` to GGUF keys.
//!
//! [`Hyper`] holds what both kinds of checkpoint need to know to check shapes, one [`Layer`] for each layer; what differs between
//! the ways in which published files spell it is resolved here. Only what a converter needs is read; the engine checks
//! the keys again when it loads the file.

use super::json::Json;
use crate::gguf::write::Writer;
use crate::{Error, Result};

/// Bounds as in `config.rs`, which reads what is written here.
const MAX_LAYERS: usize = 512;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1024;
const MAX_VOCAB: usize = 1 << 21;

/// Divides the angle of pairs that do not rotate: large enough for an angle of 0.
const STILL: f32 = 1e30;

/// The hyper-parameters of a text model.
pub(super) struct Hyper {
    pub(super) dim: usize,
    pub(super) vocab: usize,
    pub(super) heads: usize,
    /// Width of the per-layer embedding, 0 without.
    pub(super) ple: usize,
    pub(super) layers: Vec<Layer>,
    pub(super) experts: Option<Experts>,
    /// Values of global layers are their keys before norm and rotation; there is no `v_proj`.
    pub(super) v_is_k: bool,
    /// The output matrix is the embedding table, says the configuration.
    pub(super) tied: bool,
    head_dims: HeadDims,
    context: usize,
    window: usize,
    shared: usize,
    eps: f32,
    softcap: Option<f32>,
    bases: Bases,
    /// Pairs of a global head that rotate.
    rotating: usize,
}

/// Elements of a head.
struct HeadDims {
    global: usize,
    sliding: usize,
}

/// Bases of the rotary embeddings.
struct Bases {
    global: f32,
    sliding: f32,
}

/// What differs between layers.
pub(super) struct Layer {
    pub(super) sliding: bool,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) ff: usize,
    /// Computes keys and values of its own.
    pub(super) owns_kv: bool,
}

/// The mixture of experts.
pub(super) struct Experts {
    pub(super) count: usize,
    pub(super) ff: usize,
    used: usize,
}

impl Hyper {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// `Unsupported` for other architectures, `Invalid` with the key for what is missing or out of bounds.
    pub(super) fn read(config: &Json) -> Result<Hyper> {
        let kind = config.need("model_type")?;
        let (text, nested) = match kind.text()? {
            "gemma4" | "gemma4_unified" => (config.need("text_config")?, true),
            "gemma4_text" | "gemma4_unified_text" => (config.clone(), false),
            _ => return Err(kind.unsupported("gemma4")),
        };
        let width = |key: &str| text.need(key)?.uint(1, MAX_WIDTH);
        let flag = |key: &str| text.get(key).map_or(Ok(false), |value| value.boolean());
        if let Some(act) = text.get("hidden_activation")
            && act.text()? != "gelu_pytorch_tanh"
        {
            return Err(act.unsupported("gelu_pytorch_tanh"));
        }
        if flag("attention_bias")? {
            return Err(text.need("attention_bias")?.unsupported("false"));
        }
        if let Some(both) = text.get("use_bidirectional_attention")
            && both.text()? == "all"
        {
            return Err(both.unsupported("null or vision"));
        }

        let count = text.need("num_hidden_layers")?.uint(1, MAX_LAYERS)?;
        let shared = text.get("num_kv_shared_layers").map_or(Ok(0), |value| value.uint(0, count.saturating_sub(1)))?;
        let types = text.need("layer_types")?;
        let is_sliding = |kind: &Json| match kind.text()? {
            "sliding_attention" => Ok(true),
            "full_attention" => Ok(false),
            _ => Err(kind.wrong("sliding_attention or full_attention")),
        };
        let sliding: Vec<bool> = types.list()?.iter().map(is_sliding).collect::<Result<_>>()?;
        if sliding.len() != count {
            return Err(types.wrong(&format!("one entry for each of {count} layers")));
        }

        let heads = text.need("num_attention_heads")?.uint(1, MAX_HEADS)?;
        let kv_heads = text.need("num_key_value_heads")?.uint(1, MAX_HEADS)?;
        let head_dim = width("head_dim")?;
        // Google's files have the global head width under a key of its own; files saved again by transformers 5.23 name layers.
        let v_is_k = flag("attention_k_eq_v")?;
        let ungated = text.get("attention_k_eq_v").is_none();
        let per_layer = text.get("per_layer_config");
        let global_dim = text.get("global_head_dim").map(|value| value.uint(1, MAX_WIDTH)).transpose()?;
        let global_kv = text.get("num_global_key_value_heads").map(|value| value.uint(1, MAX_HEADS)).transpose()?;
        let global_kv = global_kv.filter(|_| v_is_k || ungated);
        let ff = width("intermediate_size")?;
        let wide = flag("use_double_wide_mlp")?;

        let mut layers = Vec::with_capacity(count);
        for (il, &sliding) in sliding.iter().enumerate() {
            let own = per_layer.as_ref().and_then(|layers| layers.get(&il.to_string()));
            let own = |key: &str, max: usize| {
                own.as_ref().and_then(|layer| layer.get(key)).map(|value| value.uint(1, max)).transpose()
            };
            let own_dim = own("head_dim", MAX_WIDTH)?;
            let own_kv = own("num_key_value_heads", MAX_HEADS)?;
            let head_dim = match (own_dim, sliding) {
                (Some(dim), _) => dim,
                (None, true) => head_dim,
                // Without either spelling there is no telling.
                (None, false) if per_layer.is_some() => head_dim,
                (None, false) => match global_dim {
                    Some(dim) => dim,
                    None => text.need("global_head_dim")?.uint(1, MAX_WIDTH)?,
                },
            };
            let kv_heads = own_kv.or(global_kv.filter(|_| !sliding)).unwrap_or(kv_heads);
            let owns_kv = il < count.saturating_sub(shared);
            let ff = if wide && !owns_kv { ff.saturating_mul(2) } else { ff };
            layers.push(Layer { sliding, kv_heads, head_dim, ff, owns_kv });
        }
        // A class without layers has no head width of its own: any will do.
        let class = |sliding: bool| {
            let mut dims = layers.iter().filter(|layer| layer.sliding == sliding).map(|layer| layer.head_dim);
            let first = dims.next().unwrap_or(head_dim);
            match dims.all(|dim| dim == first) {
                true if first.is_multiple_of(2) => Ok(first),
                true => Err(types.wrong(&format!("heads of an even width, not {first}"))),
                false => Err(types.wrong("the same head width in all layers of a kind")),
            }
        };
        let head_dims = HeadDims { global: class(false)?, sliding: class(true)? };

        let experts = match flag("enable_moe_block")? {
            true => Some(Experts {
                count: text.need("num_experts")?.uint(1, MAX_HEADS)?,
                used: text.need("top_k_experts")?.uint(1, MAX_HEADS)?,
                ff: width("moe_intermediate_size")?,
            }),
            false => None,
        };
        let ropes = text.get("rope_parameters");
        let rope = |kind: &str, key: &str| ropes.as_ref()?.get(kind)?.get(key);
        let base = |kind: &str, usual: f32| rope(kind, "rope_theta").map_or(Ok(usual), |base| base.positive());
        let bases = Bases { global: base("full_attention", 1e6)?, sliding: base("sliding_attention", 1e4)? };
        let part = match rope("full_attention", "partial_rotary_factor") {
            Some(part) => part.positive()?,
            None if ropes.is_some() => 1.0,
            None => 0.25,
        };
        if let Some(kind) = rope("sliding_attention", "rope_type")
            && kind.text()? != "default"
        {
            return Err(kind.unsupported("default"));
        }
        if let Some(kind) = rope("full_attention", "rope_type")
            && !["proportional", "default"].contains(&kind.text()?)
        {
            return Err(kind.unsupported("proportional"));
        }
        let rotating = ((head_dims.global as f32 * part) as usize / 2).min(head_dims.global / 2);

        let tied = config.get("tie_word_embeddings").filter(|_| nested).or(text.get("tie_word_embeddings"));
        Ok(Hyper {
            dim: width("hidden_size")?,
            vocab: text.need("vocab_size")?.uint(1, MAX_VOCAB)?,
            heads,
            ple: text.get("hidden_size_per_layer_input").map_or(Ok(0), |value| value.uint(0, MAX_WIDTH))?,
            layers,
            experts,
            v_is_k,
            tied: tied.map_or(Ok(true), |value| value.boolean())?,
            head_dims,
            context: text.need("max_position_embeddings")?.uint(1, u32::MAX as usize)?,
            window: text.need("sliding_window")?.uint(1, u32::MAX as usize)?,
            shared,
            eps: text.need("rms_norm_eps")?.positive()?,
            softcap: text.get("final_logit_softcapping").map(|cap| cap.positive()).transpose()?,
            bases,
            rotating,
        })
    }

    /// Adds the keys to `writer`, below `arch`.
    pub(super) fn write(&self, arch: &str, writer: &mut Writer) {
        let mut number = |key: &str, value: usize| {
            writer.metadata(&format!("{arch}.{key}"), u32::try_from(value).unwrap_or(u32::MAX));
        };
        number("block_count", self.layers.len());
        number("context_length", self.context);
        number("embedding_length", self.dim);
        number("embedding_length_per_layer_input", self.ple);
        number("attention.head_count", self.heads);
        number("attention.key_length", self.head_dims.global);
        number("attention.value_length", self.head_dims.global);
        number("attention.key_length_swa", self.head_dims.sliding);
        number("attention.value_length_swa", self.head_dims.sliding);
        number("attention.sliding_window", self.window);
        number("attention.shared_kv_layers", self.shared);
        number("rope.dimension_count", self.head_dims.global);
        number("rope.dimension_count_swa", self.head_dims.sliding);
        if let Some(experts) = &self.experts {
            number("expert_count", experts.count);
            number("expert_used_count", experts.used);
            number("expert_feed_forward_length", experts.ff);
        }
        let mut per_layer = |key: &str, value: fn(&Layer) -> usize| {
            let values: Vec<i32> =
                self.layers.iter().map(|layer| i32::try_from(value(layer)).unwrap_or(i32::MAX)).collect();
            let key = format!("{arch}.{key}");
            match values.first() {
                Some(&first) if values.iter().all(|&value| value == first) => {
                    writer.metadata(&key, first.unsigned_abs());
                }
                _ => {
                    writer.array(&key, &values);
                }
            }
        };
        per_layer("feed_forward_length", |layer| layer.ff);
        per_layer("attention.head_count_kv", |layer| layer.kv_heads);
        let pattern: Vec<bool> = self.layers.iter().map(|layer| layer.sliding).collect();
        writer.array(&format!("{arch}.attention.sliding_window_pattern"), &pattern);
        writer.metadata(&format!("{arch}.attention.layer_norm_rms_epsilon"), self.eps);
        writer.metadata(&format!("{arch}.rope.freq_base"), self.bases.global);
        writer.metadata(&format!("{arch}.rope.freq_base_swa"), self.bases.sliding);
        if let Some(cap) = self.softcap {
            writer.metadata(&format!("{arch}.final_logit_softcapping"), cap);
        }
    }

    /// What `rope_freqs.weight` holds: divisors of the angles of a global head's pairs.
    pub(super) fn rope_freqs(&self) -> Vec<f32> {
        (0..self.head_dims.global / 2).map(|pair| if pair < self.rotating { 1.0 } else { STILL }).collect()
    }

    /// That `config` describes something a mobile checkpoint cannot hold.
    pub(super) fn mobile_only(&self, config: &str) -> Result<()> {
        if self.experts.is_some() || self.v_is_k {
            let error =
                format!("{config}: enable_moe_block, attention_k_eq_v: expected neither in a mobile checkpoint");
            return Err(Error::unsupported(error));
        }
        Ok(())
    }
}
