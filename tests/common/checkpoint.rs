//! Small checkpoints to convert: folders of safetensors as models are published, made up, and read back.
//!
//! Shares no code with the converter: the container is written and parsed here.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub dtype: String,
    /// The contiguous dimension last.
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A checkpoint in parts, to be changed before it is written.
#[derive(Clone)]
pub struct Checkpoint {
    pub config: Value,
    pub tokenizer: Value,
    pub tensors: BTreeMap<String, Tensor>,
}

/// Bytes that a name gives, with every value among them.
fn bytes(name: &str, len: usize) -> Vec<u8> {
    let mut state = name.bytes().fold(0x9e37_79b9_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Numbers between `low` and `high` that a name gives.
pub fn numbers(name: &str, len: usize, low: f32, high: f32) -> Vec<f32> {
    let bytes = bytes(name, 2 * len);
    let unit = |b: &[u8]| f32::from(u16::from_le_bytes([b[0], b[1]])) / 65_536.0;
    bytes.chunks(2).map(|b| low + (high - low) * unit(b)).collect()
}

pub fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Rounded towards zero, which is as good as any.
pub fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| ((value.to_bits() >> 16) as u16).to_le_bytes()).collect()
}

const DIM: usize = 256;
const HEADS: usize = 2;
const PLE: usize = 32;
const FF: usize = 64;
const LAYERS: [bool; 4] = [true, false, true, false];
const OWNERS: usize = 2;
const SPECIAL: [&str; 8] = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|tool_call>"];
const WORDS: [&str; 14] = ["▁", "t", "h", "e", "a", "n", "\n", "th", "▁t", "▁th", "▁the", "an", "he", "ü"];
pub const VOCAB: usize = SPECIAL.len() + 256 + WORDS.len();

fn head_dim(sliding: bool) -> usize {
    if sliding { 32 } else { 64 }
}

fn config() -> Value {
    let types = LAYERS.map(|sliding| if sliding { "sliding_attention" } else { "full_attention" });
    json!({
        "model_type": "gemma4",
        "tie_word_embeddings": false,
        "text_config": {
            "model_type": "gemma4_text",
            "attention_bias": false,
            "attention_k_eq_v": false,
            "enable_moe_block": false,
            "final_logit_softcapping": 30.0,
            "global_head_dim": 64,
            "head_dim": 32,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": DIM,
            "hidden_size_per_layer_input": PLE,
            "intermediate_size": FF,
            "layer_types": types,
            "max_position_embeddings": 512,
            "num_attention_heads": HEADS,
            "num_global_key_value_heads": null,
            "num_hidden_layers": LAYERS.len(),
            "num_key_value_heads": 1,
            "num_kv_shared_layers": LAYERS.len() - OWNERS,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
            "sliding_window": 16,
            "use_double_wide_mlp": true,
            "vocab_size": VOCAB,
        },
    })
}

fn tokenizer() -> Value {
    let mut vocab = Map::new();
    for text in SPECIAL {
        vocab.insert(text.into(), vocab.len().into());
    }
    for byte in 0..256 {
        vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
    }
    for text in WORDS {
        vocab.insert(text.into(), vocab.len().into());
    }
    let added = SPECIAL.iter().enumerate().map(|(id, text)| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false},
        "post_processor": null,
        "decoder": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab,
            "merges": [["t", "h"], ["▁", "t"], ["▁t", "h"], ["▁th", "e"], ["a", "n"], ["h", "e"]],
        },
    })
}

/// Linear modules of layer `il`: name, rows, columns, bits.
fn linears(il: usize) -> Vec<(String, usize, usize, usize)> {
    let hd = head_dim(LAYERS[il]);
    let shared = il >= OWNERS;
    let (ff, mlp) = if shared { (2 * FF, 2) } else { (FF, 4) };
    [
        ("self_attn.q_proj", HEADS * hd, DIM, 4),
        ("self_attn.k_proj", hd, DIM, 4),
        ("self_attn.v_proj", hd, DIM, 4),
        ("self_attn.o_proj", DIM, HEADS * hd, 4),
        ("mlp.gate_proj", ff, DIM, mlp),
        ("mlp.up_proj", ff, DIM, mlp),
        ("mlp.down_proj", DIM, ff, mlp),
        ("per_layer_input_gate", PLE, DIM, 8),
        ("per_layer_projection", DIM, PLE, 8),
    ]
    .map(|(name, rows, cols, bits)| (format!("layers.{il}.{name}"), rows, cols, bits))
    .to_vec()
}

/// Norms and the like: name and length.
fn vectors() -> Vec<(String, usize)> {
    let mut all = vec![("norm.weight".into(), DIM), ("per_layer_projection_norm.weight".into(), PLE)];
    for (il, &sliding) in LAYERS.iter().enumerate() {
        let mut own = vec![
            ("input_layernorm.weight", DIM),
            ("post_attention_layernorm.weight", DIM),
            ("pre_feedforward_layernorm.weight", DIM),
            ("post_feedforward_layernorm.weight", DIM),
            ("post_per_layer_input_norm.weight", DIM),
            ("self_attn.q_norm.weight", head_dim(sliding)),
            ("layer_scalar", 1),
        ];
        if il < OWNERS {
            own.push(("self_attn.k_norm.weight", head_dim(sliding)));
        }
        all.extend(own.into_iter().map(|(name, len)| (format!("layers.{il}.{name}"), len)));
    }
    all
}

pub const PREFIX: &str = "model.language_model.";

impl Checkpoint {
    /// One with the tensors of both kinds.
    fn common() -> Checkpoint {
        let mut made = Checkpoint { config: config(), tokenizer: tokenizer(), tensors: BTreeMap::new() };
        for (name, len) in vectors() {
            let name = format!("{PREFIX}{name}");
            let values = numbers(&name, len, 0.5, 1.5);
            made.add(&name, "BF16", &[len], bf16_bytes(&values));
        }
        let name = format!("{PREFIX}per_layer_model_projection.weight");
        let shape = [PLE * LAYERS.len(), DIM];
        made.add(&name, "BF16", &shape, bf16_bytes(&numbers(&name, shape[0] * DIM, -0.1, 0.1)));
        made
    }

    /// A mobile checkpoint: layers of both kinds, two that share keys and values and have wide 2-bit networks.
    pub fn mobile() -> Checkpoint {
        Checkpoint::mobile_with(|bits| bits)
    }

    /// The same with other widths of the weights; the map is not changed.
    pub fn mobile_with(width: impl Fn(usize) -> usize) -> Checkpoint {
        let mut made = Checkpoint::common();
        made.config["quantization_config"] = json!({
            "quant_method": "gemma",
            "num_bits": 4,
            "quantize_embeddings": true,
            "module_quant_configs": {
                "^lm_head$": {"num_bits": 2},
                "audio_tower(?!.*lconv1d\\.linear_start)": {"num_bits": 2},
                "language_model\\.embed_tokens$": {"num_bits": 2},
                "language_model\\.layers\\.[01]\\.mlp\\.": {"num_bits": 4},
                "language_model\\.layers\\.\\d+\\.mlp\\.": {"num_bits": 2},
                "language_model\\.layers\\.\\d+\\.per_layer_input_gate$": {"num_bits": 8},
                "language_model\\.layers\\.\\d+\\.per_layer_projection$": {"num_bits": 8},
            },
            "modules_to_not_convert": ["model.audio_tower.output_proj", "relative_k_proj", "per_layer_model_projection"],
        });
        let scale = |made: &mut Checkpoint, name: &str, value: f32| {
            made.add(name, "F32", &[], f32_bytes(&[value]));
        };
        for (il, &sliding) in LAYERS.iter().enumerate() {
            for (name, rows, cols, bits) in linears(il) {
                made.packed(&format!("{PREFIX}{name}"), "weight", "weight_scale", rows, cols, width(bits), 1);
                for (i, side) in ["input", "output"].iter().enumerate() {
                    // One module has no rounding of its input.
                    let value = if il == 1 && name.contains("down") && i == 0 { 0.0 } else { 0.02 + 0.01 * il as f32 };
                    scale(&mut made, &format!("{PREFIX}{name}.{side}_activation_scale"), value);
                }
            }
            for which in ["k", "v"] {
                let value = if sliding { 0.05 } else { 0.8 };
                scale(&mut made, &format!("{PREFIX}layers.{il}.self_attn.{which}_cache_scale"), value);
            }
        }
        let table = format!("{PREFIX}embed_tokens");
        made.packed(&table, "embedding_quantized", "embedding_scale", VOCAB, DIM, width(2), 1);
        let table = format!("{PREFIX}embed_tokens_per_layer");
        made.packed(
            &table,
            "embedding_quantized",
            "embedding_scale",
            VOCAB,
            PLE * LAYERS.len(),
            width(4),
            LAYERS.len(),
        );
        made.packed("lm_head", "weight", "weight_scale", VOCAB, DIM, width(2), 1);
        for side in ["input", "output"] {
            scale(&mut made, &format!("lm_head.{side}_activation_scale"), 0.0);
        }
        // Not the text model's, but in the same file.
        made.add("model.vision_tower.patch_embedder.weight", "BF16", &[2, 3], vec![0; 12]);
        made
    }

    /// A plain checkpoint of the same shape in BF16, with a head of its own.
    pub fn plain() -> Checkpoint {
        let mut made = Checkpoint::common();
        let mut matrix = |name: &str, rows: usize, cols: usize| {
            made.add(name, "BF16", &[rows, cols], bf16_bytes(&numbers(name, rows * cols, -0.2, 0.2)));
        };
        for il in 0..LAYERS.len() {
            for (name, rows, cols, _) in linears(il) {
                matrix(&format!("{PREFIX}{name}.weight"), rows, cols);
            }
        }
        matrix(&format!("{PREFIX}embed_tokens.weight"), VOCAB, DIM);
        matrix(&format!("{PREFIX}embed_tokens_per_layer.weight"), VOCAB, PLE * LAYERS.len());
        matrix("lm_head.weight", VOCAB, DIM);
        made
    }

    pub fn add(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.insert(name.into(), Tensor { dtype: dtype.into(), shape: shape.into(), bytes });
    }

    #[allow(clippy::too_many_arguments)]
    fn packed(&mut self, name: &str, weight: &str, scale: &str, rows: usize, cols: usize, bits: usize, groups: usize) {
        let (weight, scale) = (format!("{name}.{weight}"), format!("{name}.{scale}"));
        let packed = cols * bits / 8;
        let dtype = if bits == 8 { "I8" } else { "U8" };
        self.add(&weight, dtype, &[rows, packed], bytes(&weight, rows * packed));
        self.add(&scale, "F32", &[rows, groups], f32_bytes(&numbers(&scale, rows * groups, 0.001, 0.002)));
    }

    /// The tensor, to be changed. Short for one of the text model's.
    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        let full = format!("{PREFIX}{name}");
        let name = if self.tensors.contains_key(name) { name } else { &full };
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("no {name}"))
    }

    pub fn remove(&mut self, name: &str) {
        let full = format!("{PREFIX}{name}");
        assert!(self.tensors.remove(name).or_else(|| self.tensors.remove(&full)).is_some(), "no {name}");
    }

    /// Writes everything but the tensors.
    fn write_settings(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
        write("config.json", self.config.to_string());
        write("tokenizer.json", self.tokenizer.to_string());
        write("tokenizer_config.json", json!({"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}).to_string());
        let sampling =
            json!({"top_k": 64, "top_p": 0.95, "temperature": 1.0, "eos_token_id": [1, 6], "suppress_tokens": [4]});
        write("generation_config.json", sampling.to_string());
        write("chat_template.jinja", "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}".into());
    }

    /// Writes the folder.
    pub fn write(&self, folder: &Path) {
        self.write_settings(folder);
        let all: Vec<_> = self.tensors.iter().collect();
        std::fs::write(folder.join("model.safetensors"), safetensors(&all)).unwrap();
    }

    /// Writes the folder with the tensors in `parts` files.
    pub fn write_parts(&self, folder: &Path, parts: usize) {
        self.write_settings(folder);
        let all: Vec<_> = self.tensors.iter().collect();
        let mut map = Map::new();
        for (i, part) in all.chunks(all.len().div_ceil(parts)).enumerate() {
            let name = format!("model-{:05}-of-{parts:05}.safetensors", i + 1);
            std::fs::write(folder.join(&name), safetensors(part)).unwrap();
            map.extend(part.iter().map(|(tensor, _)| (tensor.to_string(), Value::from(name.as_str()))));
        }
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

/// The bytes of a file with these tensors.
pub fn safetensors(tensors: &[(&String, &Tensor)]) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let start = data.len();
        data.extend(&tensor.bytes);
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()]});
        header.insert(name.to_string(), entry);
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// The tensors of a file.
pub fn parse(file: &[u8]) -> BTreeMap<String, Tensor> {
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&file[8..8 + len]).unwrap();
    let tensors = header.iter().filter(|(name, _)| *name != "__metadata__");
    let number = |value: &Value| value.as_u64().unwrap() as usize;
    tensors
        .map(|(name, entry)| {
            let (from, to) = (number(&entry["data_offsets"][0]), number(&entry["data_offsets"][1]));
            let shape = entry["shape"].as_array().unwrap().iter().map(number).collect();
            let dtype = entry["dtype"].as_str().unwrap().to_string();
            (name.clone(), Tensor { dtype, shape, bytes: file[8 + len + from..8 + len + to].to_vec() })
        })
        .collect()
}
