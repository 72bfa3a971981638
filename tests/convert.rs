//! Checkpoints converted: what is in the file, that damaged ones are refused with the reason, and what other programs wrote.
//!
//! Small checkpoints are made up here; larger ones and files of the reference converter and quantizer are used where
//! they are found beside the checkout.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use common::checkpoint::{self, Checkpoint, PREFIX, Tensor, VOCAB};
use common::damage::{self, Draw, Rng};
use gemrun::convert::{Options, Report, Target, convert};
use gemrun::gguf::{Gguf, Value};
use gemrun::tokenizer::Tokenizer;
use gemrun::{Error, Kind};
use gemrun_simd::Format;
use gemrun_simd::half::f32_to_f16;
use serde_json::json;
use sha2::{Digest, Sha256};

const NATIVE: Options = Options { target: Some(Target::Native), format: None, overwrite: false };
const STOCK: Options = Options { target: Some(Target::Stock), format: None, overwrite: false };

fn plain(format: Format) -> Options {
    Options { target: None, format: Some(format), overwrite: false }
}

/// Converts without watching.
fn run(source: &Path, out: &Path, options: Options) -> Result<Report, Error> {
    convert(source, out, &options, &mut |_, _| ControlFlow::Continue(()))
}

/// The file that `checkpoint` becomes.
fn converted(checkpoint: &Checkpoint, options: Options) -> (Gguf, Report) {
    let folder = tempfile::tempdir().unwrap();
    checkpoint.write(folder.path());
    let out = folder.path().join("out.gguf");
    let report = run(folder.path(), &out, options).unwrap();
    assert_eq!(report.bytes, fs::metadata(&out).unwrap().len());
    (Gguf::from_bytes("out.gguf", fs::read(&out).unwrap()).unwrap(), report)
}

/// The golden mobile checkpoint, or `None` with a note.
fn golden() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden-mobile/public/model");
    if !path.exists() {
        eprintln!("note: skipped, there is no ../shared/golden-mobile");
        return None;
    }
    Some(path)
}

/// Names of a checkpoint's modules for those of a file.
fn module(name: &str) -> String {
    let roles = [
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("inp_gate", "per_layer_input_gate"),
        ("proj", "per_layer_projection"),
    ];
    match name.split('.').collect::<Vec<_>>()[..] {
        ["output"] => "lm_head".into(),
        ["token_embd"] => format!("{PREFIX}embed_tokens"),
        ["per_layer_token_embd"] => format!("{PREFIX}embed_tokens_per_layer"),
        ["blk", il, role] => {
            let (_, module) = roles.iter().find(|(own, _)| *own == role).unwrap();
            format!("{PREFIX}layers.{il}.{module}")
        }
        _ => panic!("{name}"),
    }
}

/// A tensor of the checkpoint by its module and whether it is the scales.
fn of<'a>(tensors: &'a BTreeMap<String, Tensor>, name: &str, scale: bool) -> &'a Tensor {
    let table = name.ends_with("token_embd");
    let end = match (table, scale) {
        (true, false) => "embedding_quantized",
        (true, true) => "embedding_scale",
        (false, false) => "weight",
        (false, true) => "weight_scale",
    };
    &tensors[&format!("{}.{end}", module(name))]
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect()
}

/// The integers of packed weights, lowest bits first.
fn integers(bits: usize, bytes: &[u8]) -> Vec<i32> {
    let unpack = |&byte: &u8| -> Vec<i32> {
        match bits {
            8 => vec![i32::from(byte as i8)],
            4 => vec![i32::from(byte & 15) - 8, i32::from(byte >> 4) - 8],
            2 => (0..4).map(|i| i32::from(byte >> (2 * i) & 3) - 2).collect(),
            _ => panic!("{bits} bits"),
        }
    };
    bytes.iter().flat_map(unpack).collect()
}

/// The packed matrices of a native file: name, columns, bits.
fn matrices(gguf: &Gguf) -> Vec<(String, usize, usize)> {
    let mut found = Vec::new();
    for tensor in gguf.tensors().iter().filter(|tensor| tensor.type_name() == "I8") {
        let name = tensor.name.strip_suffix(".weight").unwrap();
        let bits = match name.split('.').collect::<Vec<_>>()[..] {
            ["blk", il, role] => {
                let bits = gguf.array(&format!("gemma4-srq.srq.bits.{role}")).unwrap().unwrap();
                bits.ints().unwrap().nth(il.parse().unwrap()).unwrap() as usize
            }
            _ => gguf.uint(&format!("gemma4-srq.srq.bits.{name}")).unwrap().unwrap() as usize,
        };
        found.push((name.to_string(), tensor.dims[0] as usize * 8 / bits, bits));
    }
    found
}

/// Native and stock conversions of the checkpoint in `source` against its tensors, read independently.
fn check_mobile(source: &Path) {
    let tensors = checkpoint::parse(&fs::read(source.join("model.safetensors")).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let (native, stock) = (folder.path().join("native.gguf"), folder.path().join("stock.gguf"));
    run(source, &native, NATIVE).unwrap();
    run(source, &stock, STOCK).unwrap();
    let (native, stock) = (Gguf::open(&native).unwrap(), Gguf::open(&stock).unwrap());
    assert_eq!(native.string("general.architecture").unwrap(), Some("gemma4-srq"));
    assert_eq!(stock.string("general.architecture").unwrap(), Some("gemma4"));
    assert!(stock.string("general.name").unwrap().unwrap().ends_with("(degraded without static activations)"));

    let all = matrices(&native);
    assert!(all.len() > 20, "{}", all.len());
    for (name, cols, bits) in all {
        // Bytes as they are.
        let weight = of(&tensors, &name, false);
        let scale = of(&tensors, &name, true);
        let own = native.bytes(native.tensor(&format!("{name}.weight")).unwrap());
        assert_eq!(Sha256::digest(&*own), Sha256::digest(&weight.bytes), "{name}");
        let end = if name == "per_layer_token_embd" { "group_scale" } else { "row_scale" };
        let rows = native.tensor(&format!("{name}.{end}")).unwrap();
        assert_eq!(*native.bytes(rows), scale.bytes, "{name}");
        let shape: Vec<usize> = rows.shape().iter().rev().map(|&n| n as usize).collect();
        assert_eq!(shape, if end == "group_scale" { &scale.shape } else { &scale.shape[..1] }, "{name}");

        // Integers times the scale as a half.
        let tensor = stock.tensor(&format!("{name}.weight")).unwrap();
        let scales = floats(&scale.bytes);
        let exact = stock.array(&format!("gemma4.srq.{end}.{name}")).unwrap().unwrap();
        assert_eq!(exact.floats().unwrap().collect::<Vec<_>>(), scales, "{name}");
        assert_eq!(tensor.shape(), [cols as u64, weight.shape[0] as u64], "{name}");
        let group = cols / scale.shape[1];
        let expected_type = match (bits, group % 256) {
            (2, 0) => "TQ2_0",
            (2 | 4, _) => "Q4_0",
            _ => "Q8_0",
        };
        assert_eq!(tensor.type_name(), expected_type, "{name}");
        let mut values = vec![0.0; cols * weight.shape[0]];
        Format::from_ggml(tensor.type_id).unwrap().unpack_row(&stock.bytes(tensor), &mut values);
        let half = |scale: f32| gemrun_simd::half::f16_to_f32(f32_to_f16(scale));
        let expected =
            integers(bits, &weight.bytes).into_iter().enumerate().map(|(i, q)| q as f32 * half(scales[i / group]));
        assert!(values.iter().copied().eq(expected), "{name}");
    }

    // Static scales, in both alike.
    let layers = native.uint("gemma4-srq.block_count").unwrap().unwrap() as usize;
    let shared = native.uint("gemma4-srq.attention.shared_kv_layers").unwrap().unwrap() as usize;
    let sliding: Vec<bool> =
        native.array("gemma4-srq.attention.sliding_window_pattern").unwrap().unwrap().bools().unwrap().collect();
    let scalar = |name: String| floats(&tensors[&name].bytes)[0];
    let mut pairs = vec![];
    for role in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "inp_gate", "proj"] {
        for side in ["input", "output"] {
            let value = |il: usize| match role {
                "attn_k" | "attn_v" if il >= layers - shared => 0.0,
                _ => scalar(format!("{}.{side}_activation_scale", module(&format!("blk.{il}.{role}")))),
            };
            pairs.push((format!("srq.{side}_scale.{role}"), (0..layers).map(value).collect::<Vec<_>>()));
        }
    }
    for which in ["k", "v"] {
        let value = |il: usize| match il >= layers - shared {
            true => 0.0,
            false => scalar(format!("{PREFIX}layers.{il}.self_attn.{which}_cache_scale")),
        };
        pairs.push((format!("srq.kv.{which}_scale"), (0..layers).map(value).collect()));
    }
    for (gguf, arch) in [(&native, "gemma4-srq"), (&stock, "gemma4")] {
        let int = |key: &str| gguf.get(&format!("{arch}.srq.{key}")).unwrap();
        assert_eq!((int("version"), int("scheme"), int("round")), (1_u32.into(), "wna8o8".into(), "half_even".into()));
        assert_eq!((int("qmin"), int("qmax")), ((-128_i32).into(), 127_i32.into()));
        assert_eq!(int("input_scale.output"), Value::F32(scalar("lm_head.input_activation_scale".into())));
        for (key, expected) in &pairs {
            let array = gguf.array(&format!("{arch}.{key}")).unwrap().unwrap();
            assert_eq!(&array.floats().unwrap().collect::<Vec<_>>(), expected, "{key}");
        }
        let bits = gguf.array(&format!("{arch}.srq.kv.bits")).unwrap().unwrap();
        assert!(bits.ints().unwrap().eq(sliding.iter().map(|&sliding| if sliding { 8 } else { 4 })));
        // What a layer that reads another's cache does not need, and towers.
        for il in layers - shared..layers {
            for name in ["attn_k.weight", "attn_v.weight", "attn_k_norm.weight", "attn_k.row_scale"] {
                assert!(gguf.tensor(&format!("blk.{il}.{name}")).is_none(), "{il} {name}");
            }
        }
        assert!(gguf.tensors().iter().all(|tensor| !tensor.name.contains("vision")));
        let norm = gguf.tensor("blk.0.attn_norm.weight").unwrap();
        assert_eq!(norm.type_name(), "F32");
        let bf16 = &tensors[&format!("{PREFIX}layers.0.input_layernorm.weight")].bytes;
        let widened: Vec<u8> = bf16.chunks(2).flat_map(|b| [0, 0, b[0], b[1]]).collect();
        assert_eq!(*gguf.bytes(norm), widened);
        let projection = gguf.tensor("per_layer_model_proj.weight").unwrap();
        assert_eq!(projection.type_name(), "BF16");
        assert_eq!(*gguf.bytes(projection), tensors[&format!("{PREFIX}per_layer_model_projection.weight")].bytes);
        let freqs = floats(&gguf.bytes(gguf.tensor("rope_freqs.weight").unwrap()));
        let head = gguf.uint(&format!("{arch}.attention.key_length")).unwrap().unwrap() as usize;
        assert_eq!(freqs, (0..head / 2).map(|i| if i < head / 8 { 1.0 } else { 1e30 }).collect::<Vec<_>>());
    }
}

#[test]
fn mobile_files_hold_the_integers_and_all_scales() {
    let folder = tempfile::tempdir().unwrap();
    Checkpoint::mobile().write(folder.path());
    check_mobile(folder.path());
}

#[test]
fn so_do_those_of_the_golden_checkpoint() {
    if let Some(source) = golden() {
        check_mobile(&source);
        check_tokens(&source, &source.join("tokenizer.json"));
    }
}

#[test]
fn a_head_is_kept_once_if_it_is_the_embedding_table() {
    let mut checkpoint = Checkpoint::mobile();
    let (gguf, report) = converted(&checkpoint, NATIVE);
    assert!(gguf.tensor("output.weight").is_some() && gguf.tensor("output.row_scale").is_some());
    assert!(!report.notes.iter().any(|note| note.starts_with("lm_head")), "{:?}", report.notes);

    *checkpoint.tensor("lm_head.weight") = checkpoint.tensor("embed_tokens.embedding_quantized").clone();
    assert!(converted(&checkpoint, NATIVE).0.tensor("output.weight").is_some(), "the scales still differ");
    *checkpoint.tensor("lm_head.weight_scale") = checkpoint.tensor("embed_tokens.embedding_scale").clone();
    for options in [NATIVE, STOCK] {
        let (gguf, report) = converted(&checkpoint, options);
        assert!(gguf.tensor("output.weight").is_none() && gguf.tensor("output.row_scale").is_none());
        assert!(
            gguf.metadata().all(|(key, _)| !key.ends_with("srq.bits.output") && !key.ends_with("row_scale.output"))
        );
        assert_eq!(report.notes, ["lm_head: the same as embed_tokens, bit for bit: kept once"]);
    }
    let last = checkpoint.tensor("lm_head.weight").bytes.last_mut().unwrap();
    *last ^= 1;
    assert!(converted(&checkpoint, NATIVE).0.tensor("output.weight").is_some());
}

/// The bytes of the file that `write` makes a checkpoint for, in a folder of a name of its own.
fn file_of(write: impl Fn(&Path), options: Options) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (folder.path().join("model"), folder.path().join("out.gguf"));
    write(&source);
    run(&source, &out, options).unwrap();
    fs::read(out).unwrap()
}

#[test]
fn parts_and_other_spellings_make_the_same_file() {
    let checkpoint = Checkpoint::mobile();
    for options in [NATIVE, STOCK] {
        let whole = file_of(|folder| checkpoint.write(folder), options);
        for parts in [1, 3, 50] {
            let file = file_of(|folder| checkpoint.write_parts(folder, parts), options);
            assert!(file == whole, "{parts} parts");
        }
        // As transformers saves it again.
        let mut saved = checkpoint.clone();
        let text = saved.config["text_config"].as_object_mut().unwrap();
        text.remove("global_head_dim");
        text.insert("per_layer_config".into(), json!({"1": {"head_dim": 64}, "3": {"head_dim": 64}}));
        assert!(file_of(|folder| saved.write(folder), options) == whole);
    }
}

/// Texts are encoded as the `tokenizers` crate does with tokenizer.json.
fn check_tokens(source: &Path, tokenizer: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.gguf");
    run(source, &out, Options::default()).unwrap();
    let ours = Tokenizer::open(&out).unwrap();
    let theirs = tokenizers::Tokenizer::from_file(tokenizer).unwrap();
    assert_eq!(ours.vocab_size(), theirs.get_vocab_size(true));
    let texts = [
        "",
        "the",
        " the  than the",
        "hen\nthe\n\n\n x",
        "<|turn>user\nthat<turn|>\n",
        "Grüße, 日本語 \u{10ffff}",
        "<bos>the<|tool_call>an<pad>",
        "   \t\r\n",
        "a<turn>b <|turn",
        "0x0A <0x0A>",
    ];
    for text in texts {
        let expected = theirs.encode(text, false).unwrap();
        assert_eq!(ours.encode(text, true), expected.get_ids(), "{text:?}");
    }
}

#[test]
fn texts_are_encoded_as_by_tokenizer_json() {
    let folder = tempfile::tempdir().unwrap();
    Checkpoint::mobile().write(folder.path());
    check_tokens(folder.path(), &folder.path().join("tokenizer.json"));
}

/// A plain checkpoint whose vocabulary is that of a folder with tokenizer.json.
fn with_vocabulary(tokenizer: &Path) -> Checkpoint {
    let tokenizer: serde_json::Value = serde_json::from_slice(&fs::read(tokenizer).unwrap()).unwrap();
    let count = tokenizer["model"]["vocab"].as_object().unwrap().len();
    let mut made = Checkpoint::plain();
    made.tokenizer = tokenizer;
    made.config["text_config"]["vocab_size"] = count.into();
    for name in ["embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight"] {
        let tensor = made.tensor(name);
        tensor.bytes = tensor.bytes.iter().copied().cycle().take(tensor.bytes.len() / VOCAB * count).collect();
        tensor.shape[0] = count;
    }
    made
}

#[test]
fn the_vocabulary_is_that_of_the_reference_converter() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden/tok");
    for variant in ["merges", "added"] {
        let tokenizer = root.join(variant).join("tokenizer.json");
        if !tokenizer.exists() {
            eprintln!("note: skipped, there is no ../shared/golden/tok/{variant}/tokenizer.json");
            continue;
        }
        let reference = Gguf::open(&root.join(variant).join("vocab.gguf")).unwrap();
        let (ours, _) = converted(&with_vocabulary(&tokenizer), plain(Format::Q8_0));
        for (key, value) in reference.metadata().filter(|(key, _)| key.starts_with("tokenizer.ggml.")) {
            if key == "tokenizer.ggml.add_sep_token" {
                continue; // false; nobody reads it
            }
            assert_eq!(ours.get(key), Some(value), "{variant}: {key}");
        }
        // Lists of texts and numbers compare by their bytes.
        assert!(ours.array("tokenizer.ggml.tokens").unwrap().unwrap().len() > 1000);
    }
}

/// A message of a refusal, and that nothing is left of the file.
fn refused(write: impl Fn(&Path), options: Options) -> (Kind, String) {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("model"), folder.path().join("target"));
    write(&source);
    fs::create_dir(&target).unwrap();
    let error = run(&source, &target.join("out.gguf"), options).expect_err("a damaged checkpoint was converted");
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0, "{error}");
    let message = error.to_string();
    assert!(!message.contains('\n'), "{message}");
    (error.kind(), message.replace(&folder.path().display().to_string(), ""))
}

#[test]
fn damaged_tensors_are_refused_by_name() {
    type Damage = fn(&mut Checkpoint);
    let cases: &[(Damage, &str)] = &[
        (
            |c| c.remove("layers.0.self_attn.q_proj.weight_scale"),
            "tensor model.language_model.layers.0.self_attn.q_proj.weight_scale: missing: expected it in the checkpoint",
        ),
        (
            |c| c.remove("layers.1.mlp.up_proj.output_activation_scale"),
            "tensor model.language_model.layers.1.mlp.up_proj.output_activation_scale: missing: expected it in the checkpoint",
        ),
        (
            |c| c.remove("layers.1.self_attn.v_cache_scale"),
            "tensor model.language_model.layers.1.self_attn.v_cache_scale: missing: expected it in the checkpoint",
        ),
        (
            |c| c.remove("layers.3.layer_scalar"),
            "tensor model.language_model.layers.3.layer_scalar: missing: expected it in the checkpoint",
        ),
        (|c| c.remove("lm_head.weight"), "tensor lm_head.weight: missing: expected it in the checkpoint"),
        (
            |c| c.tensor("layers.0.self_attn.q_proj.weight").shape = vec![32, 256],
            "tensor model.language_model.layers.0.self_attn.q_proj.weight: shape [32, 256]: expected 64 rows of 256 packed weights",
        ),
        (
            |c| c.tensor("layers.0.self_attn.q_proj.weight").shape = vec![8192],
            "tensor model.language_model.layers.0.self_attn.q_proj.weight: shape [8192]: expected 64 rows of packed weights",
        ),
        (
            |c| c.tensor("layers.0.self_attn.q_proj.weight").dtype = "I8".into(),
            "tensor model.language_model.layers.0.self_attn.q_proj.weight: type I8: expected U8 for weights of 4 bits",
        ),
        (
            |c| {
                let t = c.tensor("layers.0.self_attn.q_proj.weight");
                t.shape = vec![64, 96];
                t.bytes.truncate(64 * 96);
            },
            "tensor model.language_model.layers.0.self_attn.q_proj.weight: shape [64, 96]: 3 bits a weight: expected 2, 4 or 8",
        ),
        (
            |c| {
                let t = c.tensor("layers.0.self_attn.q_proj.weight");
                t.shape = vec![64, 100];
                t.bytes.truncate(64 * 100);
            },
            "tensor model.language_model.layers.0.self_attn.q_proj.weight: shape [64, 100]: expected 64 rows of 256 packed weights",
        ),
        (
            |c| {
                let t = c.tensor("layers.0.self_attn.q_proj.weight");
                t.shape = vec![64, 64];
                t.bytes.truncate(64 * 64);
            },
            "tensor model.language_model.layers.0.self_attn.q_proj.weight: shape [64, 64]: 2 bits a weight: expected the 4 that \
             config.json's module_quant_configs gives model.language_model.layers.0.self_attn.q_proj",
        ),
        (
            |c| c.tensor("layers.0.self_attn.q_proj.weight_scale").shape = vec![64],
            "tensor model.language_model.layers.0.self_attn.q_proj.weight_scale: shape [64]: expected [64, 1]",
        ),
        (
            |c| {
                let t = c.tensor("layers.2.input_layernorm.weight");
                t.dtype = "I16".into();
            },
            "tensor model.language_model.layers.2.input_layernorm.weight: type I16: expected BF16, F16 or F32",
        ),
        (
            |c| c.tensor("layers.0.self_attn.q_proj.weight_scale").dtype = "I32".into(),
            "tensor model.language_model.layers.0.self_attn.q_proj.weight_scale: type I32: expected F32",
        ),
        (
            |c| {
                c.tensor("embed_tokens_per_layer.embedding_scale").bytes[8..12].copy_from_slice(&f32::NAN.to_le_bytes())
            },
            "tensor model.language_model.embed_tokens_per_layer.embedding_scale: value 2 is NaN: expected finite numbers of at least 0",
        ),
        (
            |c| {
                c.tensor("layers.0.self_attn.q_proj.weight_scale").bytes[..4].copy_from_slice(&(-0.5_f32).to_le_bytes())
            },
            "tensor model.language_model.layers.0.self_attn.q_proj.weight_scale: value 0 is -0.5: expected finite numbers of at least 0",
        ),
        (
            |c| c.tensor("layers.0.self_attn.q_proj.input_activation_scale").bytes = f32::INFINITY.to_le_bytes().into(),
            "tensor model.language_model.layers.0.self_attn.q_proj.input_activation_scale: value 0 is inf: expected 0 or a number of at least 1e-30",
        ),
        (
            |c| c.tensor("layers.1.self_attn.k_cache_scale").bytes = 0_f32.to_le_bytes().into(),
            "tensor model.language_model.layers.1.self_attn.k_cache_scale: value 0 is 0: expected a number of at least 1e-30",
        ),
        (
            |c| c.tensor("norm.weight").bytes[6..8].copy_from_slice(&[0x80, 0x7f]),
            "tensor model.language_model.norm.weight: value inf: expected finite numbers",
        ),
    ];
    for (damage, message) in cases {
        let mut checkpoint = Checkpoint::mobile();
        damage(&mut checkpoint);
        for options in [NATIVE, STOCK] {
            let expected = (Kind::Invalid, format!("model.safetensors: {message}"));
            assert_eq!(refused(|folder| checkpoint.write(folder), options), expected);
        }
    }
}

#[test]
fn settings_that_do_not_fit_are_refused_by_key() {
    type Damage = fn(&mut Checkpoint);
    let cases: &[(Damage, Kind, &str)] = &[
        (
            |c| c.config["model_type"] = "llama".into(),
            Kind::Unsupported,
            "config.json: model_type: \"llama\": expected gemma4",
        ),
        (
            |c| drop(c.config.as_object_mut().unwrap().remove("text_config")),
            Kind::Invalid,
            "config.json: text_config: missing: expected a value",
        ),
        (
            |c| drop(c.config["text_config"].as_object_mut().unwrap().remove("hidden_size")),
            Kind::Invalid,
            "config.json: text_config.hidden_size: missing: expected a value",
        ),
        (
            |c| drop(c.config["text_config"].as_object_mut().unwrap().remove("global_head_dim")),
            Kind::Invalid,
            "config.json: text_config.global_head_dim: missing: expected a value",
        ),
        (
            |c| c.config["text_config"]["num_hidden_layers"] = 4000.into(),
            Kind::Invalid,
            "config.json: text_config.num_hidden_layers: 4000: expected an integer from 1 to 512",
        ),
        (
            |c| c.config["text_config"]["num_hidden_layers"] = 5.into(),
            Kind::Invalid,
            "config.json: text_config.layer_types: [\"sliding_attention\",\"full_attention\",\"sliding_attention\",\"f...: expected one \
             entry for each of 5 layers",
        ),
        (
            |c| c.config["text_config"]["hidden_activation"] = "silu".into(),
            Kind::Unsupported,
            "config.json: text_config.hidden_activation: \"silu\": expected gelu_pytorch_tanh",
        ),
        (
            |c| c.config["text_config"]["rms_norm_eps"] = (-1).into(),
            Kind::Invalid,
            "config.json: text_config.rms_norm_eps: -1: expected a number above 0",
        ),
        (
            |c| c.config["quantization_config"]["quant_method"] = "awq".into(),
            Kind::Unsupported,
            "config.json: quantization_config.quant_method: \"awq\": expected gemma, or no quantization_config",
        ),
        (
            |c| c.config["quantization_config"]["num_bits"] = 3.into(),
            Kind::Invalid,
            "config.json: quantization_config.num_bits: 3: expected 2, 4 or 8",
        ),
        (
            |c| c.config["quantization_config"]["module_quant_configs"] = json!({"(": {"num_bits": 2}}),
            Kind::Invalid,
            "config.json: quantization_config.module_quant_configs.(: {\"num_bits\":2}: expected a key that is a regular expression, not (",
        ),
        (
            |c| c.config["quantization_config"]["module_quant_configs"] = json!({"another_model": {"num_bits": 2}}),
            Kind::Invalid,
            "model.safetensors: tensor model.language_model.embed_tokens.embedding_quantized: shape [278, 64]: 2 bits a weight: expected \
             the 4 that config.json's module_quant_configs gives model.language_model.embed_tokens",
        ),
        (
            |c| c.config["quantization_config"]["modules_to_not_convert"] = json!(["lm_head"]),
            Kind::Invalid,
            "model.safetensors: tensor lm_head.weight: shape [278, 64]: 2 bits a weight: expected none, as config.json's \
             modules_to_not_convert names lm_head",
        ),
        (
            |c| c.tokenizer["model"]["type"] = "Unigram".into(),
            Kind::Unsupported,
            "tokenizer.json: model.type: Unigram: expected Gemma 4's tokenizer",
        ),
        (
            |c| c.tokenizer["normalizer"] = json!({"type": "NFC"}),
            Kind::Unsupported,
            "tokenizer.json: normalizer: does not replace each space by U+2581 and nothing else: expected Gemma 4's tokenizer",
        ),
        (
            |c| c.tokenizer["model"]["vocab"]["one more"] = VOCAB.into(),
            Kind::Invalid,
            "tokenizer.json: token one more: id 278: expected less than 278, the rows of the embedding table",
        ),
        (
            |c| c.tokenizer["model"]["vocab"]["one\u{1b}more"] = 7.into(),
            Kind::Invalid,
            "tokenizer.json: tokens <|tool_call> and one\\u{1b}more: both have id 7: expected one text an id",
        ),
        (
            |c| c.tokenizer["model"]["merges"][1] = json!(["a b", "c"]),
            Kind::Invalid,
            "tokenizer.json: model.merges.1: a b c: expected two texts without spaces",
        ),
    ];
    for (damage, kind, message) in cases {
        let mut checkpoint = Checkpoint::mobile();
        damage(&mut checkpoint);
        assert_eq!(refused(|folder| checkpoint.write(folder), NATIVE), (*kind, message.to_string()));
    }

    // What fits the tensors and still is no model: a global layer that shares, and no global layer before it.
    let mut checkpoint = Checkpoint::plain();
    checkpoint.config["text_config"]["num_kv_shared_layers"] = 3.into();
    checkpoint.config["text_config"]["use_double_wide_mlp"] = false.into();
    for (il, name) in [(2, "gate"), (2, "up"), (2, "down"), (3, "gate"), (3, "up"), (3, "down")] {
        let narrow = checkpoint.tensor(&format!("layers.0.mlp.{name}_proj.weight")).clone();
        *checkpoint.tensor(&format!("layers.{il}.mlp.{name}_proj.weight")) = narrow;
    }
    let message = "/model: makes a file that does not run: out.gguf.part: gemma4.attention.shared_kv_layers: 3: expected an earlier \
                   global layer for layer 1 to share with";
    assert_eq!(refused(|folder| checkpoint.write(folder), Options::default()), (Kind::Invalid, message.into()));

    // A map that speaks of other modules, while the width for all others is right.
    let mut checkpoint = Checkpoint::mobile_with(|_| 4);
    checkpoint.config["quantization_config"]["module_quant_configs"] = json!({"another_model": {"num_bits": 2}});
    let message = "config.json: quantization_config.module_quant_configs: matches none of 35 quantized modules: expected this model's map";
    assert_eq!(refused(|folder| checkpoint.write(folder), NATIVE), (Kind::Invalid, message.into()));
    checkpoint.config["quantization_config"]["module_quant_configs"] = json!({});
    converted(&checkpoint, NATIVE);
}

#[test]
fn damaged_files_are_refused() {
    let checkpoint = Checkpoint::mobile();
    let file = {
        let all: Vec<_> = checkpoint.tensors.iter().collect();
        checkpoint::safetensors(&all)
    };
    let with = |bytes: Vec<u8>| {
        refused(
            |folder| {
                checkpoint.write(folder);
                fs::write(folder.join("model.safetensors"), &bytes).unwrap();
            },
            NATIVE,
        )
    };
    let last = checkpoint.tensors.iter().next_back().unwrap();
    let (kind, message) = with(file[..file.len() - 5].to_vec());
    assert_eq!(kind, Kind::Invalid);
    assert!(message.starts_with(&format!("model.safetensors: tensor {}: needs ", last.0)), "{message}");
    assert!(message.ends_with("file ends 5 bytes short"), "{message}");
    assert_eq!(
        with([&file[..], &[0; 7]].concat()).1,
        "model.safetensors: has 7 bytes behind its tensors: expected none"
    );
    // The header cut, too long, no JSON, with offsets near the end of the number range.
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    for len in [0, 5, 8, 100, header + 7] {
        let (kind, message) = with(file[..len].to_vec());
        assert_eq!((kind, message.starts_with("model.safetensors: ")), (Kind::Invalid, true), "{message}");
    }
    let named = |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    for header in [
        "{",
        "[]",
        "{\"a\": 1}",
        "{\"a\": {\"dtype\": \"F99\", \"shape\": [], \"data_offsets\": [0, 4]}}",
        "{\"a\": {\"dtype\": \"U8\", \"shape\": [18446744073709551615], \"data_offsets\": [0, 18446744073709551615]}}",
        "{\"a\": {\"dtype\": \"F32\", \"shape\": [4611686018427387904, 4], \"data_offsets\": [0, 0]}}",
        "{\"a\": {\"dtype\": \"U8\", \"shape\": [2], \"data_offsets\": [2, 0]}}",
    ] {
        let (kind, message) = with(named(header));
        assert_eq!((kind, message.starts_with("model.safetensors: ")), (Kind::Invalid, true), "{message}");
    }
    for huge in [1_u64 << 40, u64::MAX] {
        assert_eq!(with([&huge.to_le_bytes()[..], &file[8..]].concat()).0, Kind::Invalid);
    }
}

/// Whatever stands in any of the files, there is a file or a line that says why there is none.
#[test]
fn random_damage_is_refused_or_harmless() {
    let checkpoint = Checkpoint::mobile();
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model");
    checkpoint.write(&source);
    checkpoint.write_parts(&source, 2);
    let header = {
        let file = fs::read(source.join("model-00001-of-00002.safetensors")).unwrap();
        8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize
    };
    fs::remove_file(source.join("model.safetensors")).unwrap();
    let files = [
        ("config.json", usize::MAX),
        ("tokenizer.json", usize::MAX),
        ("tokenizer_config.json", usize::MAX),
        ("generation_config.json", usize::MAX),
        ("model.safetensors.index.json", usize::MAX),
        ("model-00001-of-00002.safetensors", header),
    ];
    let (mut rng, start, mut runs, mut made) = (Rng(7), Instant::now(), 0, 0);
    while start.elapsed() < damage::time() {
        let (name, end) = files[rng.below(files.len())];
        let whole = fs::read(source.join(name)).unwrap();
        let mut bytes = whole.clone();
        // Well-formed text goes deeper: numbers grow and shrink, words become others, entries go.
        let place = rng.below(bytes.len().min(end));
        match rng.below(4) {
            0 => bytes[place] = rng.next() as u8,
            1 => drop(bytes.drain(place..(place + 1 + rng.below(30)).min(whole.len()))),
            2 => {
                let digits = (place..whole.len()).find(|&at| bytes[at].is_ascii_digit()).unwrap_or(place);
                let number =
                    ["0", "-1", "9", "99999999999", "1e999", "null", "[]", "18446744073709551615"][rng.below(8)];
                bytes.splice(digits..(digits + 1).min(whole.len()), number.bytes());
            }
            _ => {
                let piece = bytes[place..(place + rng.below(60)).min(whole.len())].to_vec();
                let to = rng.below(whole.len().min(end));
                bytes.splice(to..to, piece);
            }
        }
        fs::write(source.join(name), &bytes).unwrap();
        let out = folder.path().join("out.gguf");
        match run(&source, &out, NATIVE) {
            Ok(_) => {
                Gguf::open(&out).unwrap();
                fs::remove_file(&out).unwrap();
                made += 1;
            }
            Err(error) => {
                let line = error.to_string();
                assert!(line.lines().count() == 1 && !line.chars().any(char::is_control), "{line:?}");
                assert!(!out.exists() && !folder.path().join("out.gguf.part").exists(), "{line}");
            }
        }
        fs::write(source.join(name), &whole).unwrap();
        runs += 1;
    }
    println!("{runs} runs, {made} of them made a file");
    assert!(runs > 20 && made < runs);
}

#[test]
fn folders_without_what_is_needed_are_refused() {
    let checkpoint = Checkpoint::mobile();
    let without = |file: &str| {
        refused(
            |folder| {
                checkpoint.write(folder);
                fs::remove_file(folder.join(file)).unwrap();
            },
            NATIVE,
        )
    };
    let missing = |message: &str| (Kind::NotFound, message.to_string());
    assert_eq!(
        without("model.safetensors"),
        missing("/model: no model.safetensors and no model.safetensors.index.json: expected one of them")
    );
    assert_eq!(without("config.json"), missing("/model: no config.json: expected the model's configuration"));
    assert_eq!(without("tokenizer.json"), missing("/model: no tokenizer.json: expected the vocabulary"));
    assert_eq!(refused(|_| {}, NATIVE), missing("/model: no such file or directory"));
    let (kind, message) = refused(|folder| fs::write(folder, "a file").unwrap(), NATIVE);
    assert_eq!((kind, message.as_str()), (Kind::Invalid, "/model: is not a folder: expected one with config.json"));

    let parts = |change: fn(&Path)| {
        refused(
            |folder| {
                checkpoint.write_parts(folder, 3);
                change(folder);
            },
            NATIVE,
        )
    };
    let (kind, message) = parts(|folder| fs::remove_file(folder.join("model-00002-of-00003.safetensors")).unwrap());
    assert_eq!(kind, Kind::NotFound);
    assert!(
        message.starts_with("model.safetensors.index.json: weight_map.")
            && message.ends_with("model-00002-of-00003.safetensors: no such file: expected it beside the index"),
        "{message}"
    );
    let (kind, message) = parts(|folder| {
        let first = folder.join("model-00001-of-00003.safetensors");
        fs::copy(folder.join("model-00002-of-00003.safetensors"), first).map(drop).unwrap();
    });
    assert_eq!(kind, Kind::Invalid);
    assert!(
        message.starts_with("model-00001-of-00003.safetensors: tensor ")
            && message.ends_with(": missing: expected it there by model.safetensors.index.json"),
        "{message}"
    );
    let (kind, message) = parts(|folder| {
        let index = json!({"weight_map": {"a": "../model.safetensors"}});
        fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    });
    assert_eq!(
        (kind, message.as_str()),
        (
            Kind::Invalid,
            "model.safetensors.index.json: weight_map.a: \"../model.safetensors\": expected the name of a file in the same folder"
        )
    );
}

#[test]
fn nothing_is_left_of_an_interrupted_or_failed_file() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model");
    Checkpoint::mobile().write(&source);
    let target = folder.path().join("target");
    fs::create_dir(&target).unwrap();
    let out = target.join("out.gguf");
    let names = || -> Vec<_> {
        let entries = fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        entries.collect()
    };
    let mut calls = 0;
    let error = convert(&source, &out, &NATIVE, &mut |done, total| {
        calls += 1;
        assert!(done <= total);
        if calls > 40 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(error.unwrap_err().kind(), Kind::Interrupted);
    assert!(calls > 40 && names().is_empty(), "{calls} {:?}", names());

    // What a killed process left is taken over.
    fs::write(target.join("out.gguf.part"), vec![1; 1 << 20]).unwrap();
    run(&source, &out, NATIVE).unwrap();
    assert_eq!(names(), ["out.gguf"]);
    let first = fs::read(&out).unwrap();
    // Not again, unless told so; and while another writes, not at all.
    let error = run(&source, &out, NATIVE).unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    assert!(error.to_string().ends_with("out.gguf: exists: expected the name of a new file, or --force"), "{error}");
    let part = fs::File::create(target.join("out.gguf.part")).unwrap();
    part.lock().unwrap();
    let forced = Options { overwrite: true, ..NATIVE };
    let error = run(&source, &out, forced).unwrap_err();
    assert!(
        error.to_string().ends_with("out.gguf: another process is writing it: try again when it is done"),
        "{error}"
    );
    drop(part);
    run(&source, &out, forced).unwrap();
    assert!(fs::read(&out).unwrap() == first && names() == ["out.gguf"]);
    // Never what is read.
    let error = run(&source, &source.join("model.safetensors"), forced).unwrap_err();
    assert!(error.to_string().ends_with("is what is to be converted: expected another file"), "{error}");
    assert_eq!(run(&source, &target, forced).unwrap_err().kind(), Kind::Usage);
    assert_eq!(run(&source, &target.join("no/out.gguf"), NATIVE).unwrap_err().kind(), Kind::NotFound);
}

/// Root of the mean square difference over that of the values.
fn loss(values: &[f32], back: &[f32]) -> f64 {
    let sum = |of: &mut dyn Iterator<Item = f32>| of.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
    (sum(&mut values.iter().zip(back).map(|(a, b)| a - b)) / sum(&mut values.iter().copied())).sqrt()
}

#[test]
fn plain_checkpoints_are_quantized() {
    let checkpoint = Checkpoint::plain();
    for (format, matrix, table, most) in
        [(Format::F16, "F16", "F16", 5e-4), (Format::Q8_0, "Q8_0", "Q8_0", 6e-3), (Format::Q4_0, "Q4_0", "Q6_K", 0.09)]
    {
        let (gguf, report) = converted(&checkpoint, plain(format));
        assert_eq!(report.target, None);
        assert_eq!(report.notes, Vec::<String>::new());
        for (name, kind) in [
            ("token_embd", table),
            ("output", table),
            ("blk.0.attn_k", matrix),
            ("blk.1.ffn_down", matrix),
            ("blk.2.ffn_down", matrix),
            ("blk.3.proj", matrix),
            ("per_layer_token_embd", if table == "Q6_K" { "F16" } else { table }),
        ] {
            let tensor = gguf.tensor(&format!("{name}.weight")).unwrap();
            assert_eq!(tensor.type_name(), kind, "{name}");
            let bf16 = &checkpoint.tensors[&format!("{}.weight", module(name))].bytes;
            let values: Vec<f32> = bf16.chunks(2).map(|b| f32::from_le_bytes([0, 0, b[0], b[1]])).collect();
            let mut back = vec![0.0; values.len()];
            Format::from_ggml(tensor.type_id).unwrap().unpack_row(&gguf.bytes(tensor), &mut back);
            let lost = loss(&values, &back);
            assert!(lost < most, "{name} {kind}: {lost}");
        }
        assert!(gguf.tensor("blk.2.attn_k.weight").is_none() && gguf.tensor("blk.3.attn_k_norm.weight").is_none());
        // It runs.
        let tokens = Tokenizer::from_gguf(&gguf).unwrap().encode_with_bos("the than", true);
        let logits = common::run::logits(&gguf, &tokens, common::run::EXACT);
        assert!(logits.len() == tokens.len() * VOCAB && logits.iter().all(|logit| logit.is_finite()));
        assert!(logits.iter().any(|&logit| logit.abs() > 0.1));
    }
    let mut tied = checkpoint.clone();
    tied.remove("lm_head.weight");
    let (_, message) = refused(|folder| tied.write(folder), Options::default());
    assert_eq!(message, "model.safetensors: tensor lm_head.weight: missing: expected it in the checkpoint");
    tied.config["tie_word_embeddings"] = true.into();
    assert!(converted(&tied, Options::default()).0.tensor("output.weight").is_none());

    let usage = |checkpoint: &Checkpoint, options| refused(|folder| checkpoint.write(folder), options);
    let message = "format: the checkpoint is a plain one: expected --type, or neither";
    assert_eq!(usage(&checkpoint, NATIVE), (Kind::Usage, message.into()));
    let message = "type: the checkpoint is a mobile one: its weights have their widths already";
    assert_eq!(usage(&Checkpoint::mobile(), plain(Format::F16)), (Kind::Usage, message.into()));
    let mut broken = checkpoint.clone();
    broken.tensor("layers.3.mlp.up_proj.weight").bytes[..2].copy_from_slice(&[0xc0, 0x7f]);
    let message = "model.safetensors: tensor model.language_model.layers.3.mlp.up_proj.weight: value NaN: expected finite numbers";
    assert_eq!(usage(&broken, plain(Format::Q4_0)), (Kind::Invalid, message.into()));
}

#[test]
fn the_command_says_what_people_should_know() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("tiny-mobile");
    let mut checkpoint = Checkpoint::mobile();
    checkpoint.add("model.language_model.strange", "F32", &[], vec![0; 4]);
    checkpoint.write(&source);
    let gemrun = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
        let output = command.current_dir(&folder).args(arguments).stdin(Stdio::null()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, stdout, stderr) = gemrun(&["convert", "tiny-mobile", "-o", "native.gguf"]);
    assert_eq!((code, stdout.as_str()), (Some(0), "native.gguf\n"), "{stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    let note = "note: 1 tensors that no Gemma 4 text model has were left out: model.language_model.strange";
    assert_eq!(lines[0], note);
    assert!(
        lines[1].starts_with("converted: 0.00 GB in ") && lines[1].ends_with(" s, native, for gemrun alone"),
        "{stderr}"
    );
    assert_eq!(lines.len(), 2);

    let (_, _, stderr) = gemrun(&["convert", "tiny-mobile", "-o", "stock.gguf", "--format", "stock"]);
    assert!(stderr.contains("warning: stock.gguf: ") && stderr.contains("stock-no-srq.gguf"), "{stderr}");
    let (_, _, stderr) = gemrun(&["convert", "tiny-mobile", "-o", "stock-no-srq.gguf", "--format", "stock"]);
    assert!(!stderr.contains("warning"), "{stderr}");
    let (_, stdout, _) = gemrun(&["show", "stock.gguf"]);
    assert!(stdout.contains("tiny-mobile (degraded without static activations)"), "{stdout}");

    let (code, stdout, stderr) = gemrun(&["convert", "tiny-mobile", "-o", "native.gguf"]);
    let message = "error: native.gguf: exists: expected the name of a new file, or --force\n";
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (Some(2), "", message));
    assert_eq!(gemrun(&["convert", "tiny-mobile", "-o", "native.gguf", "--force"]).0, Some(0));
    assert_eq!(gemrun(&["convert", "nowhere", "-o", "x.gguf"]).0, Some(3));
    fs::write(source.join("model.safetensors"), "no tensors").unwrap();
    assert_eq!(gemrun(&["convert", "tiny-mobile", "-o", "x.gguf"]).0, Some(5));
    checkpoint.config["model_type"] = "other".into();
    checkpoint.write(&source);
    assert_eq!(gemrun(&["convert", "tiny-mobile", "-o", "x.gguf"]).0, Some(6));
    assert!(!folder.path().join("x.gguf").exists());
}

/// The plain checkpoint that a file of the reference converter was made from, by what the file says.
fn unconverted(gguf: &Gguf) -> Checkpoint {
    let roles = [
        ("token_embd.weight", "embed_tokens.weight"),
        ("per_layer_token_embd.weight", "embed_tokens_per_layer.weight"),
        ("per_layer_model_proj.weight", "per_layer_model_projection.weight"),
        ("per_layer_proj_norm.weight", "per_layer_projection_norm.weight"),
        ("output_norm.weight", "norm.weight"),
        ("attn_norm.weight", "input_layernorm.weight"),
        ("attn_q.weight", "self_attn.q_proj.weight"),
        ("attn_k.weight", "self_attn.k_proj.weight"),
        ("attn_v.weight", "self_attn.v_proj.weight"),
        ("attn_output.weight", "self_attn.o_proj.weight"),
        ("attn_q_norm.weight", "self_attn.q_norm.weight"),
        ("attn_k_norm.weight", "self_attn.k_norm.weight"),
        ("post_attention_norm.weight", "post_attention_layernorm.weight"),
        ("ffn_norm.weight", "pre_feedforward_layernorm.weight"),
        ("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
        ("ffn_gate.weight", "mlp.gate_proj.weight"),
        ("ffn_up.weight", "mlp.up_proj.weight"),
        ("ffn_down.weight", "mlp.down_proj.weight"),
        ("layer_output_scale.weight", "layer_scalar"),
        ("inp_gate.weight", "per_layer_input_gate.weight"),
        ("proj.weight", "per_layer_projection.weight"),
        ("post_norm.weight", "post_per_layer_input_norm.weight"),
        ("ffn_gate_inp.weight", "router.proj.weight"),
        ("ffn_gate_inp.scale", "router.scale"),
        ("ffn_down_exps.scale", "router.per_expert_scale"),
        ("ffn_gate_up_exps.weight", "experts.gate_up_proj"),
        ("ffn_down_exps.weight", "experts.down_proj"),
        ("pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight"),
        ("post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight"),
        ("post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight"),
    ];
    let uint = |key: &str| gguf.uint(&format!("gemma4.{key}")).unwrap();
    let list = |key: &str| -> Vec<i64> {
        match gguf.get(&format!("gemma4.{key}")).unwrap() {
            Value::Array(array) => array.ints().unwrap().collect(),
            value => vec![value.as_int().unwrap() as i64],
        }
    };
    let sliding: Vec<bool> =
        gguf.array("gemma4.attention.sliding_window_pattern").unwrap().unwrap().bools().unwrap().collect();
    let texts = |key: &str| -> Vec<String> {
        let strings = gguf.array(key).unwrap().unwrap().strings().unwrap();
        strings.map(|text| String::from_utf8(text.to_vec()).unwrap()).collect()
    };
    let (kv, ff) = (list("attention.head_count_kv"), list("feed_forward_length"));
    let tokens = texts("tokenizer.ggml.tokens");
    let global = sliding.iter().position(|&sliding| !sliding).unwrap();
    let mut made = Checkpoint::plain();
    made.tensors.clear();
    let text = made.config["text_config"].as_object_mut().unwrap();
    for (key, value) in [
        ("hidden_size", json!(uint("embedding_length"))),
        ("hidden_size_per_layer_input", json!(uint("embedding_length_per_layer_input"))),
        ("intermediate_size", json!(ff[0])),
        ("use_double_wide_mlp", json!(ff.len() > 1)),
        ("max_position_embeddings", json!(uint("context_length"))),
        ("num_attention_heads", json!(uint("attention.head_count"))),
        ("num_key_value_heads", json!(kv[0])),
        ("num_global_key_value_heads", json!(kv.get(global).unwrap_or(&kv[0]))),
        ("attention_k_eq_v", json!(gguf.tensor(&format!("blk.{global}.attn_v.weight")).is_none())),
        ("num_hidden_layers", json!(sliding.len())),
        ("num_kv_shared_layers", json!(uint("attention.shared_kv_layers"))),
        ("head_dim", json!(uint("attention.key_length_swa"))),
        ("global_head_dim", json!(uint("attention.key_length"))),
        ("sliding_window", json!(uint("attention.sliding_window"))),
        ("vocab_size", json!(tokens.len())),
        ("enable_moe_block", json!(uint("expert_count").is_some())),
        ("num_experts", json!(uint("expert_count"))),
        ("top_k_experts", json!(uint("expert_used_count"))),
        ("moe_intermediate_size", json!(uint("expert_feed_forward_length"))),
    ] {
        text.insert(key.into(), value);
    }
    let kind = |&sliding: &bool| if sliding { "sliding_attention" } else { "full_attention" };
    text.insert("layer_types".into(), sliding.iter().map(kind).collect());
    made.config["tie_word_embeddings"] = true.into();
    for tensor in gguf.tensors().iter().filter(|tensor| tensor.name != "rope_freqs.weight") {
        let (layer, own) = match tensor.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((il, own)) => (format!("layers.{il}."), own),
            None => (String::new(), tensor.name.as_str()),
        };
        let (_, name) = roles.iter().find(|(role, _)| *role == own).unwrap_or_else(|| panic!("{own}"));
        let shape: Vec<usize> = tensor.shape().iter().rev().map(|&n| n as usize).collect();
        made.add(&format!("{PREFIX}{layer}{name}"), tensor.type_name(), &shape, gguf.bytes(tensor).to_vec());
    }
    let marker = |text: &str| gemrun::tokenizer::MARKERS.contains(&text);
    let added = tokens.iter().enumerate().filter(|(_, text)| marker(text));
    made.tokenizer["added_tokens"] =
        added.map(|(id, text)| json!({"id": id, "content": text, "special": true})).collect();
    made.tokenizer["model"]["vocab"] =
        tokens.iter().enumerate().map(|(id, text)| (text.clone(), id.into())).collect::<serde_json::Map<_, _>>().into();
    made.tokenizer["model"]["merges"] = texts("tokenizer.ggml.merges").into();
    made
}

#[test]
fn files_are_those_of_the_reference_converter_and_quantizer() {
    for model in common::golden::MODELS {
        let Some(path) = common::golden::path(model, &format!("{model}-bf16.gguf")) else { continue };
        let reference = Gguf::open(&path).unwrap();
        let checkpoint = unconverted(&reference);
        let (f16, report) = converted(&checkpoint, plain(Format::F16));
        assert_eq!(report.notes, Vec::<String>::new(), "{model}");
        // Names, shapes, hyper-parameters, vocabulary.
        let shapes = |gguf: &Gguf| -> BTreeMap<String, Vec<u64>> {
            gguf.tensors().iter().map(|tensor| (tensor.name.clone(), tensor.shape().to_vec())).collect()
        };
        assert_eq!(shapes(&f16), shapes(&reference), "{model}");
        let freqs = |gguf: &Gguf| gguf.bytes(gguf.tensor("rope_freqs.weight").unwrap()).to_vec();
        assert_eq!(freqs(&f16), freqs(&reference), "{model}");
        let compared = |key: &&str| {
            let other = ["tokenizer.chat_template", "tokenizer.ggml.add_sep_token"].contains(key);
            !other && (key.starts_with("gemma4.") || key.starts_with("tokenizer."))
        };
        let keys: Vec<&str> = reference.metadata().map(|(key, _)| key).filter(compared).collect();
        assert!(keys.len() > 25);
        for key in keys {
            assert_eq!(f16.get(key), reference.get(key), "{model}: {key}");
        }
        // Blocks, byte for byte.
        for (format, name) in [(Format::Q4_0, "q4_0-pure"), (Format::Q8_0, "q8_0")] {
            if format == Format::Q8_0 && model != "b_dense" {
                continue; // the others have no such file
            }
            let Some(path) = common::golden::path(model, &format!("{model}-{name}.gguf")) else { continue };
            let (theirs, (ours, _)) = (Gguf::open(&path).unwrap(), converted(&checkpoint, plain(format)));
            let mut same = 0;
            for tensor in ours.tensors() {
                let other = theirs.tensor(&tensor.name).unwrap();
                let quantized = [tensor, other].map(gemrun::gguf::Tensor::type_name) == [format.name(); 2];
                if quantized {
                    assert!(*ours.bytes(tensor) == *theirs.bytes(other), "{model} {name}: {}", tensor.name);
                }
                same += usize::from(quantized);
            }
            assert!(same > 15, "{model} {name}: {same} tensors compared");
        }
    }
}

#[test]
fn native_and_stock_files_compute_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    Checkpoint::mobile().write(folder.path());
    for source in [Some(folder.path().to_path_buf()), golden()].into_iter().flatten() {
        let file = |options| {
            let out = folder.path().join("out.gguf");
            run(&source, &out, Options { overwrite: true, ..options }).unwrap();
            Gguf::from_bytes("out.gguf", fs::read(&out).unwrap()).unwrap()
        };
        let (native, stock) = (file(NATIVE), file(STOCK));
        let tokens: Vec<u32> = [2].into_iter().chain((0..40).map(|i| 5 + i * 6)).collect();
        let logits = |gguf: &Gguf| common::run::logits(gguf, &tokens, common::run::INT8);
        let (native, stock) = (logits(&native), logits(&stock));
        assert!(native.iter().all(|logit| logit.is_finite()) && native.iter().any(|logit| logit.abs() > 0.01));
        assert!(native.iter().map(|x| x.to_bits()).eq(stock.iter().map(|x| x.to_bits())), "{}", source.display());
    }
}
