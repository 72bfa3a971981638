//! Hyper-parameters of a Gemma 4 text model, read from GGUF metadata.
//!
//! One [`Config`] describes every released shape: what differs from layer to layer (sliding or global, head width,
//! feed-forward width, whose cache is read) is resolved here into one [`LayerConfig`] per layer, so that no other
//! file needs to know how the metadata spells it. Keys are named in the field docs; `{arch}` is the file's
//! `general.architecture`.
//! Nothing here looks at tensors.

use crate::gguf::Gguf;
use crate::weight::StaticScales;
use crate::{Error, Result};

/// The architectures this program runs: Gemma 4, and the same with channel-wise weights and static activation scales as
/// files of our own making hold them, under another name because other programs would take the weights for something else.
pub const ARCHITECTURES: [&str; 2] = ["gemma4", "gemma4-srq"];

/// More layers than any transformer has; bounds work and memory of a crafted file (the largest Gemma 4 has 60).
const MAX_LAYERS: u64 = 512;
/// Bounds every width (hidden, feed-forward, head) so that products of two of them stay far below 2^53.
const MAX_WIDTH: u64 = 1 << 20;
/// Bounds query heads, key/value heads and experts; the largest Gemma 4 has 32, 16 and 128.
const MAX_HEADS: u64 = 1024;
/// Bounds positions: angles are computed in f64 and positions are held in u32.
const MAX_CONTEXT: u64 = 1 << 31;

/// The hyper-parameters of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `{arch}.embedding_length`: width of the residual stream.
    pub dim: usize,
    /// Length of `tokenizer.ggml.tokens`; there is no key for it.
    pub vocab: usize,
    /// `{arch}.context_length`: positions the model was trained for.
    pub context: usize,
    /// `{arch}.attention.layer_norm_rms_epsilon`.
    pub eps: f32,
    /// `{arch}.final_logit_softcapping`; absent means no cap.
    pub softcap: Option<f32>,
    /// `{arch}.attention.sliding_window`: a query sees itself and the `window - 1` positions before it.
    pub window: usize,
    /// `{arch}.embedding_length_per_layer_input`: width of the per-layer embedding, 0 where there is none.
    pub ple: usize,
    /// Rotary embedding of global layers: `{arch}.rope.freq_base`, `{arch}.rope.dimension_count`.
    pub rope_global: Rope,
    /// Rotary embedding of sliding layers: `{arch}.rope.freq_base_swa`, `{arch}.rope.dimension_count_swa`.
    pub rope_sliding: Rope,
    /// Mixture of experts, where the model has one.
    pub experts: Option<Experts>,
    /// One entry per layer, first layer first; `{arch}.block_count` of them.
    pub layers: Vec<LayerConfig>,
    /// `tokenizer.ggml.suppress_tokens`: ids that are never to be sampled.
    pub suppress: Vec<u32>,
    /// Static scales, of files that were trained with them.
    pub srq: Option<Srq>,
}

/// What a file with static activation scales (`{arch}.srq.version` 1) says beyond them.
#[derive(Debug, Clone, PartialEq)]
pub struct Srq {
    /// `{arch}.srq`: what its keys begin with.
    pub prefix: String,
    /// How each layer's keys and values are rounded; one entry per layer.
    pub kv: Vec<KvScale>,
    /// `{arch}.srq.input_scale.{role}`, `{arch}.srq.output_scale.{role}`: those of each matrix of [`ROLES`], one entry per layer.
    pub layers: Vec<[StaticScales; ROLES.len()]>,
    /// The same of the head.
    pub output: StaticScales,
}

/// The matrices of a layer that are multiplied with rounded activations.
pub const ROLES: [&str; 9] =
    ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "inp_gate", "proj"];

/// The static rounding of one layer's keys and values: integer = value / scale, to nearest, half to even.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct KvScale {
    /// `{arch}.srq.kv.bits`: 4 (−8 to 7) or 8 (−128 to 127); 0 for layers that share another's cache.
    pub bits: u8,
    /// `{arch}.srq.kv.k_scale`; 0 where keys are not to be rounded.
    pub k: f32,
    /// `{arch}.srq.kv.v_scale`; 0 where values are not to be rounded.
    pub v: f32,
}

/// Rotary position embedding of one class of layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the frequency ladder.
    pub base: f32,
    /// How many leading elements of a head rotate; even, at most the head width.
    pub dims: usize,
}

/// Mixture-of-experts parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// `{arch}.expert_count`.
    pub count: usize,
    /// `{arch}.expert_used_count`: experts a token is sent to.
    pub used: usize,
}

/// What differs between layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// `{arch}.attention.sliding_window_pattern`: sliding-window layer, else global.
    pub sliding: bool,
    /// `{arch}.attention.head_count`: query heads.
    pub heads: usize,
    /// `{arch}.attention.head_count_kv`: key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// `{arch}.attention.key_length` (global) or `key_length_swa` (sliding): elements of a head.
    pub head_dim: usize,
    /// `{arch}.feed_forward_length`: width of the dense feed-forward network.
    pub ff: usize,
    /// `{arch}.expert_feed_forward_length`: width of one expert, 0 without experts.
    pub expert_ff: usize,
    /// The layer whose keys and values this one attends over: itself, or an earlier layer of the same class for the
    /// trailing `{arch}.attention.shared_kv_layers` layers.
    pub kv_layer: usize,
}

impl Config {
    /// Reads and checks the hyper-parameters of `gguf`.
    pub fn from_gguf(gguf: &Gguf) -> Result<Config> {
        let mut keys = Keys { gguf, arch: ARCHITECTURES[0] };
        let found = gguf.string("general.architecture")?.ok_or_else(|| keys.missing("general.architecture"))?;
        keys.arch = ARCHITECTURES.into_iter().find(|&known| known == found).ok_or_else(|| {
            let known = ARCHITECTURES.join(" or ");
            Error::unsupported(format!(
                "{}: general.architecture: {found} is not supported: expected {known}",
                gguf.name()
            ))
        })?;
        if let Some(parts) = gguf.uint("split.count")?.filter(|&parts| parts > 1) {
            let error = format!("{}: split.count: one of {parts} parts: expected the model in one file", gguf.name());
            return Err(Error::unsupported(error));
        }

        let layer_count = keys.uint("block_count", 1, MAX_LAYERS)?;
        let context = keys.uint("context_length", 1, u64::from(u32::MAX))?.min(MAX_CONTEXT as usize);
        let dim = keys.uint("embedding_length", 1, MAX_WIDTH)?;
        let window = keys.uint("attention.sliding_window", 1, u64::from(u32::MAX))?;
        let ple = keys.uint("embedding_length_per_layer_input", 0, MAX_WIDTH)?;
        let shared = keys.uint_or("attention.shared_kv_layers", 0, 0, MAX_LAYERS)?;
        let eps = keys
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| keys.missing_key("attention.layer_norm_rms_epsilon"))?;
        if !(eps.is_finite() && eps >= 0.0) {
            return Err(keys.wrong("attention.layer_norm_rms_epsilon", eps, "a finite number of at least 0"));
        }
        let softcap = keys.float("final_logit_softcapping")?;
        if let Some(cap) = softcap
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(keys.wrong("final_logit_softcapping", cap, "a finite number above 0"));
        }

        let head_dim_global = keys.head_dim("key_length", "value_length", None)?;
        let head_dim_sliding = keys.head_dim("key_length_swa", "value_length_swa", None)?;
        let rope_global = keys.rope("rope.freq_base", 1e6, "rope.dimension_count", head_dim_global)?;
        let rope_sliding = keys.rope("rope.freq_base_swa", 1e4, "rope.dimension_count_swa", head_dim_sliding)?;

        let sliding = keys.pattern("attention.sliding_window_pattern", layer_count)?;
        let heads = keys.per_layer("attention.head_count", layer_count, 1, MAX_HEADS)?;
        let heads = heads.ok_or_else(|| keys.missing_key("attention.head_count"))?;
        let kv_heads = keys.per_layer("attention.head_count_kv", layer_count, 1, MAX_HEADS)?;
        let kv_heads = kv_heads.unwrap_or_else(|| heads.clone());
        let ff = keys.per_layer("feed_forward_length", layer_count, 1, MAX_WIDTH)?;
        let ff = ff.ok_or_else(|| keys.missing_key("feed_forward_length"))?;

        let experts = keys.experts()?;
        let expert_ff = match experts {
            Some(_) => keys
                .per_layer("expert_feed_forward_length", layer_count, 1, MAX_WIDTH)?
                .ok_or_else(|| keys.missing_key("expert_feed_forward_length"))?,
            None => vec![0; layer_count],
        };

        let owners = layer_count.checked_sub(shared).filter(|&owners| owners > 0).ok_or_else(|| {
            keys.wrong("attention.shared_kv_layers", shared, &format!("fewer than the {layer_count} layers"))
        })?;
        let mut layers = Vec::with_capacity(layer_count);
        for il in 0..layer_count {
            if heads[il] % kv_heads[il] != 0 {
                let expected = format!("a divisor of the {} query heads of layer {il}", heads[il]);
                return Err(keys.wrong("attention.head_count_kv", kv_heads[il], &expected));
            }
            let kv_layer = if il < owners {
                il
            } else {
                (0..owners).rev().find(|&owner| sliding[owner] == sliding[il]).ok_or_else(|| {
                    let class = if sliding[il] { "sliding" } else { "global" };
                    keys.wrong(
                        "attention.shared_kv_layers",
                        shared,
                        &format!("an earlier {class} layer for layer {il} to share with"),
                    )
                })?
            };
            if kv_heads[il] != kv_heads[kv_layer] {
                let expected = format!("{} as in layer {kv_layer}, whose cache layer {il} shares", kv_heads[kv_layer]);
                return Err(keys.wrong("attention.head_count_kv", kv_heads[il], &expected));
            }
            layers.push(LayerConfig {
                sliding: sliding[il],
                heads: heads[il],
                kv_heads: kv_heads[il],
                head_dim: if sliding[il] { head_dim_sliding } else { head_dim_global },
                ff: ff[il],
                expert_ff: expert_ff[il],
                kv_layer,
            });
        }

        let tokens = gguf.array("tokenizer.ggml.tokens")?.ok_or_else(|| keys.missing("tokenizer.ggml.tokens"))?;
        let vocab = tokens.len();
        if vocab == 0 || vocab > u32::MAX as usize {
            return Err(Error::invalid(format!(
                "{}: tokenizer.ggml.tokens: {vocab} entries: expected a vocabulary",
                gguf.name()
            )));
        }
        let suppress = keys.suppressed(vocab)?;
        let srq = keys.srq(&layers)?;
        Ok(Config {
            dim,
            vocab,
            context,
            eps,
            softcap,
            window,
            ple,
            rope_global,
            rope_sliding,
            experts,
            layers,
            suppress,
            srq,
        })
    }

    /// The static activation scales of the matrix `blk.{il}.{role}`, if the file has any.
    pub fn static_scales(&self, il: usize, role: &str) -> Option<StaticScales> {
        let role = ROLES.iter().position(|known| *known == role)?;
        Some(self.srq.as_ref()?.layers[il][role])
    }

    /// The rotary embedding of `layer`'s class.
    pub fn rope(&self, layer: &LayerConfig) -> Rope {
        if layer.sliding { self.rope_sliding } else { self.rope_global }
    }

    /// The last layer that computes keys and values of its own. What follows it, and its own output, only serves the logits of
    /// the token it belongs to: no later token reads it.
    pub fn last_kv_layer(&self) -> usize {
        (0..self.layers.len()).rposition(|il| self.owns_kv(il)).unwrap_or(0)
    }

    /// Whether layer `il` computes keys and values of its own.
    pub fn owns_kv(&self, il: usize) -> bool {
        self.layers[il].kv_layer == il
    }
}

/// Typed look-up of `{arch}.*` keys with errors that name file and key.
struct Keys<'a> {
    gguf: &'a Gguf,
    arch: &'static str,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn missing(&self, full_key: &str) -> Error {
        Error::invalid(format!("{}: {full_key}: missing: every {} model has it", self.gguf.name(), self.arch))
    }

    fn missing_key(&self, key: &str) -> Error {
        self.missing(&self.full(key))
    }

    fn wrong(&self, key: &str, found: impl std::fmt::Display, expected: &str) -> Error {
        Error::invalid(format!("{}: {}: {found}: expected {expected}", self.gguf.name(), self.full(key)))
    }

    fn range(&self, key: &str, value: u64, low: u64, high: u64) -> Result<usize> {
        if !(low..=high).contains(&value) {
            return Err(self.wrong(key, value, &format!("{low} to {high}")));
        }
        Ok(value as usize)
    }

    fn uint(&self, key: &str, low: u64, high: u64) -> Result<usize> {
        let value = self.gguf.uint(&self.full(key))?.ok_or_else(|| self.missing_key(key))?;
        self.range(key, value, low, high)
    }

    fn uint_or(&self, key: &str, default: usize, low: u64, high: u64) -> Result<usize> {
        match self.gguf.uint(&self.full(key))? {
            Some(value) => self.range(key, value, low, high),
            None => Ok(default),
        }
    }

    fn float(&self, key: &str) -> Result<Option<f32>> {
        self.gguf.float(&self.full(key))
    }

    /// A scalar for all layers, or an array with one integer per layer.
    fn per_layer(&self, key: &str, layers: usize, low: u64, high: u64) -> Result<Option<Vec<usize>>> {
        let full = self.full(key);
        if !matches!(self.gguf.get(&full), Some(crate::gguf::Value::Array(_))) {
            let Some(value) = self.gguf.uint(&full)? else { return Ok(None) };
            return Ok(Some(vec![self.range(key, value, low, high)?; layers]));
        }
        let Some(array) = self.gguf.array(&full)? else { return Ok(None) };
        if array.len() != layers {
            return Err(self.wrong(
                key,
                format!("{} entries", array.len()),
                &format!("one for each of {layers} layers"),
            ));
        }
        let values = array.ints()?;
        let entry = |value: i64| match u64::try_from(value) {
            Ok(value) => self.range(key, value, low, high),
            Err(_) => Err(self.wrong(key, value, &format!("{low} to {high}"))),
        };
        values.map(entry).collect::<Result<Vec<_>>>().map(Some)
    }

    /// The static rounding a file was trained with. One of a kind that is not known here would give wrong answers, so it is
    /// refused.
    fn srq(&self, layers: &[LayerConfig]) -> Result<Option<Srq>> {
        let Some(version) = self.gguf.uint(&self.full("srq.version"))? else { return Ok(None) };
        let missing = |key| self.wrong(key, "missing", "it beside srq.version");
        let unknown = |key: &str, found: &dyn std::fmt::Display, expected: &str| {
            let (file, key, found) = (self.gguf.name(), self.full(key), crate::error::printable(&found.to_string()));
            Err(Error::unsupported(format!("{file}: {key}: {found} is not supported: expected {expected}")))
        };
        if version != 1 {
            return unknown("srq.version", &version, "1");
        }
        for (key, expected) in [("srq.scheme", "wna8o8"), ("srq.round", "half_even")] {
            let found = self.gguf.string(&self.full(key))?.ok_or_else(|| missing(key))?;
            if found != expected {
                return unknown(key, &found, expected);
            }
        }
        for (key, expected) in [("srq.qmin", -128), ("srq.qmax", 127)] {
            let found = self.gguf.get(&self.full(key)).ok_or_else(|| missing(key))?.as_int();
            if found != Some(expected) {
                let found = found.map_or("not an integer".to_string(), |found| found.to_string());
                return unknown(key, &found, &expected.to_string());
            }
        }
        let (k, v) = (self.scales("srq.kv.k_scale", layers.len())?, self.scales("srq.kv.v_scale", layers.len())?);
        let bits = self.per_layer("srq.kv.bits", layers.len(), 0, 8)?;
        let bits = bits.ok_or_else(|| missing("srq.kv.bits"))?;
        let kv = (0..layers.len()).map(|il| match (layers[il].kv_layer == il, bits[il]) {
            (false, _) => Ok(KvScale::default()),
            (true, width @ (4 | 8)) => Ok(KvScale { bits: width as u8, k: k[il], v: v[il] }),
            (true, width) => Err(self.wrong("srq.kv.bits", format!("{width} for layer {il}"), "4 or 8")),
        });
        let kv = kv.collect::<Result<_>>()?;
        let mut scales = vec![[StaticScales::default(); ROLES.len()]; layers.len()];
        for (r, role) in ROLES.iter().enumerate() {
            let input = self.scales(&format!("srq.input_scale.{role}"), layers.len())?;
            let output = self.scales(&format!("srq.output_scale.{role}"), layers.len())?;
            for (scales, (input, output)) in scales.iter_mut().zip(input.into_iter().zip(output)) {
                scales[r] = StaticScales { input, output };
            }
        }
        let head = |side: &str| {
            let key = format!("srq.{side}_scale.output");
            self.float(&key)?.map_or(Ok(0.0), |scale| self.scale(&key, scale))
        };
        let output = StaticScales { input: head("input")?, output: head("output")? };
        Ok(Some(Srq { prefix: self.full("srq"), kv, layers: scales, output }))
    }

    /// One scale for each layer.
    fn scales(&self, key: &str, layers: usize) -> Result<Vec<f32>> {
        let array = self.gguf.array(&self.full(key))?;
        let array = array.ok_or_else(|| self.wrong(key, "missing", "it beside srq.version"))?;
        if array.len() != layers {
            return Err(self.wrong(
                key,
                format!("{} entries", array.len()),
                &format!("one for each of {layers} layers"),
            ));
        }
        array.floats()?.map(|scale| self.scale(key, scale)).collect()
    }

    fn scale(&self, key: &str, scale: f32) -> Result<f32> {
        // Below this a value divided by the scale could overflow: no network has activations so small.
        const LEAST: f32 = 1e-30;
        if scale != 0.0 && !(LEAST..=f32::MAX).contains(&scale) {
            return Err(self.wrong(key, scale, &format!("0 or {LEAST:e} and more")));
        }
        Ok(scale)
    }

    fn pattern(&self, key: &str, layers: usize) -> Result<Vec<bool>> {
        let array = self.gguf.array(&self.full(key))?.ok_or_else(|| self.missing_key(key))?;
        if array.len() != layers {
            return Err(self.wrong(
                key,
                format!("{} entries", array.len()),
                &format!("one for each of {layers} layers"),
            ));
        }
        Ok(array.bools()?.collect())
    }

    fn head_dim(&self, key: &str, value: &str, default: Option<usize>) -> Result<usize> {
        let (key_name, value_name) = (format!("attention.{key}"), format!("attention.{value}"));
        let dim = match default {
            Some(default) => self.uint_or(&key_name, default, 1, MAX_WIDTH)?,
            None => self.uint(&key_name, 1, MAX_WIDTH)?,
        };
        let value_dim = self.uint_or(&value_name, dim, 1, MAX_WIDTH)?;
        if value_dim != dim {
            return Err(self.wrong(&value_name, value_dim, &format!("{dim} as {}", self.full(&key_name))));
        }
        if dim % 2 != 0 {
            return Err(self.wrong(&key_name, dim, "an even number"));
        }
        Ok(dim)
    }

    fn rope(&self, base_key: &str, default: f32, dims_key: &str, head_dim: usize) -> Result<Rope> {
        let base = self.float(base_key)?.unwrap_or(default);
        if !(base.is_finite() && base > 0.0) {
            return Err(self.wrong(base_key, base, "a finite number above 0"));
        }
        let dims = self.uint_or(dims_key, head_dim, 2, MAX_WIDTH)?;
        if dims % 2 != 0 || dims > head_dim {
            return Err(self.wrong(dims_key, dims, &format!("an even number of at most the head width {head_dim}")));
        }
        Ok(Rope { base, dims })
    }

    fn experts(&self) -> Result<Option<Experts>> {
        let count = self.uint_or("expert_count", 0, 0, MAX_HEADS)?;
        let used = self.uint_or("expert_used_count", 0, 0, u64::from(u32::MAX))?;
        if count == 0 && used == 0 {
            return Ok(None);
        }
        if used == 0 || used > count {
            return Err(self.wrong("expert_used_count", used, &format!("1 to the expert count {count}")));
        }
        Ok(Some(Experts { count, used }))
    }

    fn suppressed(&self, vocab: usize) -> Result<Vec<u32>> {
        let key = "tokenizer.ggml.suppress_tokens";
        let Some(array) = self.gguf.array(key)? else { return Ok(Vec::new()) };
        let wrong = |found: String| {
            Error::invalid(format!("{}: {key}: {found}: expected token ids below {vocab}", self.gguf.name()))
        };
        if array.len() > vocab {
            return Err(wrong(format!("{} entries", array.len())));
        }
        let ids = array.ints()?;
        let entry =
            |id: i64| u32::try_from(id).ok().filter(|&id| (id as usize) < vocab).ok_or_else(|| wrong(id.to_string()));
        ids.map(entry).collect()
    }
}
