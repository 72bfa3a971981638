//! Makes small random Gemma 4 files, so that the engine can meet shapes and formats the golden data lacks.
//!
//! A [`Spec`] names every choice a real file can make; [`gguf`] turns it into the bytes of a complete file,
//! tokenizer included. Weights are random *blocks*, not quantised numbers: all bit patterns occur, those no
//! quantiser writes too, and only the scales are chosen, so that activations keep a reasonable size. Norms
//! and scales are random, of both signs and away from 1.
//!
//! What is drawn depends on the seed and the tensor's name alone. So two specs that differ only in how the
//! same weights are stored (fused or not, lists or numbers) describe the same model.

use super::dequant::{self, Format};
use std::ops::Range;

/// The choices of the mixture-of-experts variant.
#[derive(Clone, Debug)]
pub struct Experts {
    pub count: usize,
    pub used: usize,
    pub ff: usize,
    /// One tensor with gate and up rows for each expert, or two tensors.
    pub fused_gate_up: bool,
    /// Write `ffn_down_exps.scale`.
    pub output_scale: bool,
}

/// Everything that shapes a file.
#[derive(Clone, Debug)]
pub struct Spec {
    pub seed: u64,
    /// At least [`VOCAB_MIN`].
    pub vocab: usize,
    pub dim: usize,
    /// One letter a layer: S sliding, F full attention.
    pub layers: &'static str,
    pub heads: usize,
    pub kv_heads_sliding: usize,
    pub kv_heads_full: usize,
    pub head_dim_sliding: usize,
    pub head_dim_full: usize,
    pub window: usize,
    /// Trailing layers that use the keys and values of an earlier one.
    pub shared: usize,
    /// Write K and V tensors for those layers nevertheless; they must be ignored.
    pub redundant_kv: bool,
    /// Full layers have no `attn_v`.
    pub v_from_k: bool,
    pub fused_qkv: bool,
    pub ff: usize,
    /// Feed-forward width of the layers that share keys and values.
    pub ff_shared: usize,
    pub per_layer_width: usize,
    pub experts: Option<Experts>,
    /// Write `output.weight` beside `token_embd.weight`.
    pub separate_output: bool,
    /// Write `layer_output_scale.weight`.
    pub layer_output_scale: bool,
    pub softcap: Option<f32>,
    pub suppress_tokens: Vec<i32>,
    /// Write lists of one number a layer even where all layers have the same.
    pub lists: bool,
    pub alignment: usize,
    /// The format of a matrix: that of the first entry whose text occurs in the tensor's name, else F32.
    /// Rows which the format's blocks do not divide fall back to Q8_0, then to F16.
    pub formats: Vec<(&'static str, &'static str)>,
}

/// The smallest vocabulary: special tokens, newlines, spaces, bytes, and the few words below.
pub const VOCAB_MIN: usize = WORDS_START + WORDS.len();

const WORDS_START: usize = 494;
const WORDS: [&str; 15] = ["▁t", "he", "in", "▁the", "an", "▁", "t", "h", "e", "i", "n", "a", "s", "o", "r"];

impl Spec {
    /// A dense model with V = K on its full layers.
    pub fn dense(seed: u64) -> Spec {
        Spec {
            seed,
            vocab: 512,
            dim: 128,
            layers: "SSF",
            heads: 4,
            kv_heads_sliding: 2,
            kv_heads_full: 1,
            head_dim_sliding: 32,
            head_dim_full: 64,
            window: 8,
            shared: 0,
            redundant_kv: false,
            v_from_k: true,
            fused_qkv: false,
            ff: 192,
            ff_shared: 192,
            per_layer_width: 0,
            experts: None,
            separate_output: false,
            layer_output_scale: true,
            softcap: Some(30.0),
            suppress_tokens: Vec::new(),
            lists: false,
            alignment: 32,
            formats: Vec::new(),
        }
    }

    /// A model with per-layer embeddings, shared keys and values and wider shared layers.
    pub fn per_layer(seed: u64) -> Spec {
        Spec {
            layers: "SSFSFSF",
            kv_heads_full: 2,
            v_from_k: false,
            shared: 3,
            ff: 96,
            ff_shared: 192,
            per_layer_width: 32,
            ..Spec::dense(seed)
        }
    }

    /// A mixture of experts.
    pub fn moe(seed: u64) -> Spec {
        let experts = Experts { count: 6, used: 2, ff: 64, fused_gate_up: true, output_scale: true };
        Spec { ff: 96, ff_shared: 96, experts: Some(experts), ..Spec::dense(seed) }
    }

    /// A model in which every choice is drawn at random; `formats` stays empty.
    pub fn random(seed: u64) -> Spec {
        let mut rng = Rng(seed);
        let mut spec = match rng.below(3) {
            0 => Spec::dense(seed),
            1 => Spec::per_layer(seed),
            _ => Spec::moe(seed),
        };
        spec.vocab = VOCAB_MIN + rng.below(40);
        spec.dim = 32 * (1 + rng.below(8));
        spec.kv_heads_sliding = 1 + rng.below(2);
        spec.kv_heads_full = 1 + rng.below(2);
        spec.heads = spec.kv_heads_sliding * spec.kv_heads_full * (1 + rng.below(2));
        spec.head_dim_sliding = [32, 64, 96][rng.below(3)];
        spec.head_dim_full = [32, 64, 128][rng.below(3)];
        spec.window = 1 + rng.below(12);
        spec.fused_qkv = rng.coin();
        spec.v_from_k &= !spec.fused_qkv;
        spec.redundant_kv = rng.coin();
        spec.ff = 32 * (1 + rng.below(6));
        spec.ff_shared = if spec.shared > 0 && rng.coin() { 2 * spec.ff } else { spec.ff };
        if spec.per_layer_width > 0 {
            spec.per_layer_width = 32 * (1 + rng.below(2));
        }
        if let Some(experts) = &mut spec.experts {
            experts.count = 3 + rng.below(6);
            experts.used = 1 + rng.below(3);
            experts.ff = 32 * (1 + rng.below(3));
            experts.fused_gate_up = rng.coin();
            experts.output_scale = rng.coin();
        }
        spec.separate_output = rng.coin();
        spec.layer_output_scale = rng.coin();
        spec.softcap = [Some(30.0), Some(12.0), None][rng.below(3)];
        spec.suppress_tokens = if rng.coin() { vec![5, 99] } else { vec![] };
        spec.lists = rng.coin();
        spec.alignment = [32, 64][rng.below(2)];
        spec
    }

    /// The same spec with every matrix in one format.
    pub fn all_in(self, format: &'static str) -> Spec {
        Spec { formats: vec![("", format)], ..self }
    }

    fn format_of(&self, tensor: &str, cols: usize) -> &'static Format {
        let entry = self.formats.iter().find(|(part, _)| tensor.contains(part));
        let wanted = entry.map_or("F32", |(_, format)| format);
        let candidates = [wanted, "Q8_0", "F16"].map(dequant::by_name);
        candidates.into_iter().find(|format| cols.is_multiple_of(format.elements)).unwrap()
    }
}

/// `len` random token ids of the spec's vocabulary, the first of them `<bos>`.
pub fn tokens(spec: &Spec, len: usize) -> Vec<u32> {
    let mut rng = Rng(spec.seed ^ 0x746f_6b65_6e73);
    (0..len).map(|i| if i == 0 { 2 } else { rng.below(spec.vocab) as u32 }).collect()
}

/// The bytes of the file a spec describes.
pub fn gguf(spec: &Spec) -> Vec<u8> {
    assert!(spec.vocab >= VOCAB_MIN);
    let mut file = Writer::default();
    metadata(spec, &mut file);
    let mut weights = Weights { spec, file };
    tensors(spec, &mut weights);
    weights.file.finish(spec.alignment)
}

fn metadata(spec: &Spec, file: &mut Writer) {
    let sliding: Vec<bool> = spec.layers.chars().map(|c| c == 'S').collect();
    let owners = sliding.len() - spec.shared;
    let ffs: Vec<usize> = (0..sliding.len()).map(|il| spec.ff_of(il)).collect();
    let kv_heads: Vec<usize> = sliding.iter().map(|&s| spec.kv_heads_of(s)).collect();
    assert!(spec.shared == 0 || sliding[..owners].contains(&true) && sliding[..owners].contains(&false));

    file.text("general.architecture", "gemma4");
    file.text("general.name", "synthetic");
    if spec.alignment != 32 {
        file.int("general.alignment", spec.alignment);
    }
    file.int("gemma4.block_count", sliding.len());
    file.int("gemma4.context_length", 131_072);
    file.int("gemma4.embedding_length", spec.dim);
    file.per_layer("gemma4.feed_forward_length", &ffs, spec.lists);
    file.per_layer("gemma4.attention.head_count", &vec![spec.heads; sliding.len()], spec.lists);
    file.per_layer("gemma4.attention.head_count_kv", &kv_heads, spec.lists);
    file.float("gemma4.rope.freq_base", 1e6);
    file.float("gemma4.rope.freq_base_swa", 1e4);
    file.float("gemma4.attention.layer_norm_rms_epsilon", 1e-6);
    if let Some(experts) = &spec.experts {
        file.int("gemma4.expert_count", experts.count);
        file.int("gemma4.expert_used_count", experts.used);
        file.per_layer("gemma4.expert_feed_forward_length", &vec![experts.ff; sliding.len()], spec.lists);
    }
    file.int("gemma4.attention.key_length", spec.head_dim_full);
    file.int("gemma4.attention.value_length", spec.head_dim_full);
    file.int("gemma4.attention.key_length_swa", spec.head_dim_sliding);
    file.int("gemma4.attention.value_length_swa", spec.head_dim_sliding);
    file.int("gemma4.rope.dimension_count", spec.head_dim_full);
    file.int("gemma4.rope.dimension_count_swa", spec.head_dim_sliding);
    if let Some(cap) = spec.softcap {
        file.float("gemma4.final_logit_softcapping", cap);
    }
    file.int("gemma4.attention.sliding_window", spec.window);
    file.int("gemma4.attention.shared_kv_layers", spec.shared);
    file.int("gemma4.embedding_length_per_layer_input", spec.per_layer_width);
    let bools: Vec<u8> = sliding.iter().map(|&s| s.into()).collect();
    file.list("gemma4.attention.sliding_window_pattern", BOOL, bools.len(), &bools);
    file.int("general.quantization_version", 2);

    let (tokens, types, merges) = vocabulary(spec.vocab);
    file.text("tokenizer.ggml.model", "gemma4");
    file.texts("tokenizer.ggml.tokens", &tokens);
    file.ints("tokenizer.ggml.token_type", &types);
    file.texts("tokenizer.ggml.merges", &merges);
    file.int("tokenizer.ggml.bos_token_id", 2);
    file.int("tokenizer.ggml.eos_token_id", 1);
    file.int("tokenizer.ggml.unknown_token_id", 3);
    file.int("tokenizer.ggml.padding_token_id", 0);
    if !spec.suppress_tokens.is_empty() {
        file.ints("tokenizer.ggml.suppress_tokens", &spec.suppress_tokens);
    }
}

/// Tokens, their types and merges; special tokens and bytes have the ids of the real vocabulary.
fn vocabulary(len: usize) -> (Vec<String>, Vec<i32>, Vec<String>) {
    let mut tokens: Vec<String> = (0..len).map(|id| format!("<unused{id}>")).collect();
    let mut types = vec![1; len];
    let specials = [
        (3, vec![(0, "<pad>"), (1, "<eos>"), (2, "<bos>"), (3, "<unk>"), (4, "<mask>")]),
        (3, vec![(46, "<|tool>"), (47, "<tool|>"), (98, "<|think|>"), (105, "<|turn>"), (106, "<turn|>")]),
        (4, vec![(48, "<|tool_call>"), (49, "<tool_call|>"), (50, "<|tool_response>"), (51, "<tool_response|>")]),
        (4, vec![(52, "<|\"|>"), (100, "<|channel>"), (101, "<channel|>")]),
    ];
    for (kind, list) in specials {
        for (id, text) in list {
            tokens[id] = text.into();
            types[id] = kind;
        }
    }
    for n in 1..32 {
        tokens[106 + n] = "\n".repeat(n);
    }
    for n in 2..32 {
        tokens[136 + n] = "▁".repeat(n);
    }
    for byte in 0..256 {
        tokens[238 + byte] = format!("<0x{byte:02X}>");
        types[238 + byte] = 6;
    }
    for (i, word) in WORDS.iter().enumerate() {
        tokens[WORDS_START + i] = (*word).into();
    }
    let merges = ["\n \n", "▁ ▁", "▁ t", "h e", "i n", "▁t he", "a n"];
    (tokens, types, merges.map(String::from).to_vec())
}

impl Spec {
    fn ff_of(&self, il: usize) -> usize {
        if il >= self.layers.len() - self.shared { self.ff_shared } else { self.ff }
    }

    fn kv_heads_of(&self, sliding: bool) -> usize {
        if sliding { self.kv_heads_sliding } else { self.kv_heads_full }
    }
}

fn tensors(spec: &Spec, w: &mut Weights) {
    let (dim, vocab, width) = (spec.dim, spec.vocab, spec.per_layer_width);
    let layer_count = spec.layers.len();
    w.matrix("token_embd.weight", dim, vocab);
    // Large, so that logits reach the soft cap.
    w.vector("output_norm.weight", dim, 2.0..6.0);
    if spec.separate_output {
        w.matrix("output.weight", dim, vocab);
    }
    let half = spec.head_dim_full / 2;
    let freqs: Vec<f32> = (0..half).map(|i| if i < half / 4 { 1.0 } else { 1e30 }).collect();
    w.given("rope_freqs.weight", &[half], &freqs);
    if width > 0 {
        w.matrix("per_layer_token_embd.weight", width * layer_count, vocab);
        w.matrix("per_layer_model_proj.weight", dim, width * layer_count);
        w.vector("per_layer_proj_norm.weight", width, 0.5..1.5);
    }

    for (il, class) in spec.layers.chars().enumerate() {
        let sliding = class == 'S';
        let nh = spec.heads;
        let nk = spec.kv_heads_of(sliding);
        let hd = if sliding { spec.head_dim_sliding } else { spec.head_dim_full };
        let ff = spec.ff_of(il);
        let has_kv = il < layer_count - spec.shared || spec.redundant_kv;
        let name = |tensor: &str| format!("blk.{il}.{tensor}");

        w.vector(&name("attn_norm.weight"), dim, 0.5..1.5);
        if spec.fused_qkv && has_kv {
            let parts = [("attn_q", nh), ("attn_k", nk), ("attn_v", nk)];
            let parts = parts.map(|(part, heads)| (name(&format!("{part}.weight")), hd * heads));
            w.stack(&name("attn_qkv.weight"), &[dim, hd * (nh + 2 * nk)], &parts);
        } else {
            w.matrix(&name("attn_q.weight"), dim, hd * nh);
            if has_kv {
                w.matrix(&name("attn_k.weight"), dim, hd * nk);
            }
            if has_kv && (sliding || !spec.v_from_k) {
                w.matrix(&name("attn_v.weight"), dim, hd * nk);
            }
        }
        w.vector(&name("attn_q_norm.weight"), hd, 0.3..1.0);
        if has_kv {
            w.vector(&name("attn_k_norm.weight"), hd, 0.3..1.0);
        }
        w.matrix(&name("attn_output.weight"), hd * nh, dim);
        w.vector(&name("post_attention_norm.weight"), dim, 0.5..1.5);
        if spec.layer_output_scale {
            w.vector(&name("layer_output_scale.weight"), 1, 0.4..1.2);
        }

        w.vector(&name("ffn_norm.weight"), dim, 0.5..1.5);
        w.matrix(&name("ffn_gate.weight"), dim, ff);
        w.matrix(&name("ffn_up.weight"), dim, ff);
        w.matrix(&name("ffn_down.weight"), ff, dim);
        w.vector(&name("post_ffw_norm.weight"), dim, 0.5..1.5);
        if let Some(experts) = &spec.experts {
            let (count, ff) = (experts.count, experts.ff);
            w.router(&name("ffn_gate_inp.weight"), dim, count);
            w.vector(&name("ffn_gate_inp.scale"), dim, 0.5..2.0);
            w.vector(&name("pre_ffw_norm_2.weight"), dim, 0.5..1.5);
            w.vector(&name("post_ffw_norm_1.weight"), dim, 0.5..1.5);
            w.vector(&name("post_ffw_norm_2.weight"), dim, 0.5..1.5);
            let part = |tensor: &str, e: usize, rows| (name(&format!("{tensor}.weight {e}")), rows);
            let gates: Vec<Part> = (0..count).map(|e| part("ffn_gate_exps", e, ff)).collect();
            let ups: Vec<Part> = (0..count).map(|e| part("ffn_up_exps", e, ff)).collect();
            let downs: Vec<Part> = (0..count).map(|e| part("ffn_down_exps", e, dim)).collect();
            if experts.fused_gate_up {
                let both: Vec<Part> = gates.into_iter().zip(ups).flat_map(|(g, u)| [g, u]).collect();
                w.stack(&name("ffn_gate_up_exps.weight"), &[dim, 2 * ff, count], &both);
            } else {
                w.stack(&name("ffn_gate_exps.weight"), &[dim, ff, count], &gates);
                w.stack(&name("ffn_up_exps.weight"), &[dim, ff, count], &ups);
            }
            w.stack(&name("ffn_down_exps.weight"), &[ff, dim, count], &downs);
            if experts.output_scale {
                w.vector(&name("ffn_down_exps.scale"), count, 0.3..2.0);
            }
        }
        if width > 0 {
            w.matrix(&name("inp_gate.weight"), dim, width);
            w.matrix(&name("proj.weight"), width, dim);
            w.vector(&name("post_norm.weight"), dim, 0.5..1.5);
        }
    }
}

/// The name under which rows are drawn, and their number.
type Part = (String, usize);

/// Draws tensors and hands them to the file.
struct Weights<'a> {
    spec: &'a Spec,
    file: Writer,
}

impl Weights<'_> {
    fn rng(&self, name: &str) -> Rng {
        let mix = |seed: u64, byte: u8| Rng(seed ^ u64::from(byte)).next();
        Rng(name.bytes().fold(self.spec.seed, mix))
    }

    /// F32 values whose magnitude is uniform in `range`, a quarter of them negative.
    fn vector(&mut self, name: &str, len: usize, range: Range<f64>) {
        let mut rng = self.rng(name);
        let mut value = || {
            let magnitude = range.start + (range.end - range.start) * rng.unit();
            let sign = if rng.below(4) == 0 { -1.0 } else { 1.0 };
            (sign * magnitude) as f32
        };
        let values: Vec<f32> = (0..len).map(|_| value()).collect();
        self.given(name, &[len], &values);
    }

    /// The router stays F32 in every file. Its input has length 1, so its weights are larger.
    fn router(&mut self, name: &str, cols: usize, rows: usize) {
        let mut rng = self.rng(name);
        let values: Vec<f32> = (0..cols * rows).map(|_| 1.5 * rng.normal() as f32).collect();
        self.given(name, &[cols, rows], &values);
    }

    fn given(&mut self, name: &str, ne: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.file.tensor(name, ne, dequant::by_name("F32").id, bytes);
    }

    fn matrix(&mut self, name: &str, cols: usize, rows: usize) {
        self.stack(name, &[cols, rows], &[(name.into(), rows)]);
    }

    /// A tensor that consists of the rows of several parts.
    fn stack(&mut self, name: &str, ne: &[usize], parts: &[Part]) {
        let cols = ne[0];
        assert_eq!(parts.iter().map(|(_, rows)| rows).sum::<usize>(), ne[1..].iter().product::<usize>());
        let format = self.spec.format_of(name, cols);
        let rms = (cols as f64).powf(-0.5);
        let mut bytes = Vec::new();
        for (part, rows) in parts {
            let mut rng = self.rng(part);
            for _ in 0..rows * cols / format.elements {
                bytes.extend(random_block(&mut rng, format, rms));
            }
        }
        self.file.tensor(name, ne, format.id, bytes);
    }
}

/// A block of random bytes with scales such that the root mean square of its values is about `rms`.
fn random_block(rng: &mut Rng, format: &Format, rms: f64) -> Vec<u8> {
    let value = (rms * rng.normal()) as f32;
    match format.name {
        "F32" => return value.to_le_bytes().into(),
        "F16" => return f16_bits(value).to_le_bytes().into(),
        "BF16" => return ((value.to_bits() >> 16) as u16).to_le_bytes().into(),
        _ => {}
    }
    let mut block: Vec<u8> = (0..format.bytes).map(|_| rng.next() as u8).collect();
    if format.name == "MXFP4" {
        block[0] = (128.0 + (rms / 5.0).log2().round()) as u8;
        return block;
    }
    // Where the scale is; where the minimum is, and the ratio to the scale that centres the values.
    let (d_at, minimum) = match format.name {
        "Q4_1" => (0, Some((2, -7.5))),
        "Q5_1" => (0, Some((2, -15.5))),
        "Q2_K" => (80, Some((82, 1.5))),
        "Q4_K" => (0, Some((2, 7.5))),
        "Q5_K" => (0, Some((2, 15.5))),
        "Q3_K" => (108, None),
        "Q6_K" => (208, None),
        "TQ1_0" => (52, None),
        "TQ2_0" => (64, None),
        _ => (0, None),
    };
    let jitter = 0.8 + 0.4 * rng.unit();
    let mut put = |d: f64| {
        block[d_at..d_at + 2].copy_from_slice(&f16_bits(d as f32).to_le_bytes());
        if let Some((at, ratio)) = minimum {
            block[at..at + 2].copy_from_slice(&f16_bits((d * ratio * jitter) as f32).to_le_bytes());
        }
        dequant::dequantise(format, &block, format.elements)
    };
    let values = put(1.0);
    let squares: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
    let now = (squares / values.len() as f64).sqrt();
    let sign = if rng.coin() { 1.0 } else { -1.0 };
    put(sign * rms / now.max(1e-3) * (0.6 + 0.8 * rng.unit()));
    block
}

/// f32 to f16: exact in the exponent, subnormals included, otherwise truncated; too large is a panic.
fn f16_bits(value: f32) -> u16 {
    let sign = ((value.to_bits() >> 31) as u16) << 15;
    let magnitude = value.abs();
    assert!(magnitude < 65504.0);
    if magnitude < 2f32.powi(-14) {
        return sign | (magnitude * 2f32.powi(24)) as u16;
    }
    sign | ((magnitude.to_bits() >> 13) - ((127 - 15) << 10)) as u16
}

/// SplitMix64: small, seeded, good enough to draw weights.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 1
    }

    /// Uniform in 0..1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal, near enough: the sum of twelve uniform numbers.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }
}

const INT: u32 = 4;
const SIGNED: u32 = 5;
const FLOAT: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const LIST: u32 = 9;

/// Collects metadata and tensors and lays them out as a GGUF file of version 3.
#[derive(Default)]
struct Writer {
    metadata: Vec<u8>,
    metadata_count: u64,
    tensors: Vec<(String, Vec<usize>, u32, Vec<u8>)>,
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Writer {
    fn key(&mut self, key: &str, kind: u32) -> &mut Vec<u8> {
        self.metadata_count += 1;
        push_text(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
        &mut self.metadata
    }

    fn int(&mut self, key: &str, value: usize) {
        self.key(key, INT).extend((value as u32).to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f32) {
        self.key(key, FLOAT).extend(value.to_le_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        push_text(self.key(key, TEXT), value);
    }

    fn list(&mut self, key: &str, element: u32, len: usize, elements: &[u8]) {
        let out = self.key(key, LIST);
        out.extend(element.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
        out.extend(elements);
    }

    fn ints(&mut self, key: &str, values: &[i32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.list(key, SIGNED, values.len(), &bytes);
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        let mut bytes = Vec::new();
        values.iter().for_each(|value| push_text(&mut bytes, value));
        self.list(key, TEXT, values.len(), &bytes);
    }

    /// One number if all layers have the same and no list is asked for, else a list.
    fn per_layer(&mut self, key: &str, values: &[usize], always_list: bool) {
        if always_list || values.iter().any(|v| v != &values[0]) {
            let values: Vec<i32> = values.iter().map(|&v| v as i32).collect();
            self.ints(key, &values);
        } else {
            self.int(key, values[0]);
        }
    }

    fn tensor(&mut self, name: &str, ne: &[usize], type_id: u32, bytes: Vec<u8>) {
        self.tensors.push((name.into(), ne.into(), type_id, bytes));
    }

    fn finish(self, alignment: usize) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend(self.metadata_count.to_le_bytes());
        file.extend(self.metadata);
        let mut offset = 0;
        for (name, ne, type_id, bytes) in &self.tensors {
            push_text(&mut file, name);
            file.extend((ne.len() as u32).to_le_bytes());
            ne.iter().for_each(|n| file.extend((*n as u64).to_le_bytes()));
            file.extend(type_id.to_le_bytes());
            file.extend((offset as u64).to_le_bytes());
            offset += bytes.len().next_multiple_of(alignment);
        }
        for (_, _, _, bytes) in self.tensors {
            file.resize(file.len().next_multiple_of(alignment), 0);
            file.extend(bytes);
        }
        file.resize(file.len().next_multiple_of(alignment), 0);
        file
    }
}
