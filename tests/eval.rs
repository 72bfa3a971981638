//! `gemrun eval`: its files and figures against the library and the oracle.
//!
//! That the library is right is the business of `golden.rs` and `gemrun_vs_oracle.rs`; here it is that the command
//! passes flags on and counts correctly.

mod common;
mod oracle;

use common::run::{self, EXACT, INT8, Way};
use common::{argmax, golden, kl, npy, raw_gguf};
use gemrun::config::Config;
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use std::path::{Path, PathBuf};
use std::process::Command;

const TEXT: &str =
    "The window, the chunk and the cache:\n\n3 words, then a line of its own.\nEnough of them for two windows.";

/// What the command prints.
fn gemrun(command: &mut Command) -> String {
    let result = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success(), "{command:?}: {}: {stderr}", result.status);
    String::from_utf8(result.stdout).unwrap()
}

fn command(subcommands: &[&str], model: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
    command.args(subcommands).arg(model);
    command
}

fn kept(model: &str) -> PathBuf {
    golden::path(model, &format!("{model}-q4_0-pure.gguf")).unwrap()
}

fn text_file() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), TEXT).unwrap();
    file
}

/// The text's windows of `ctx` tokens, each begun with `<bos>`.
fn windows(model: &Path, ctx: usize) -> Vec<Vec<u32>> {
    let json = gemrun(command(&["tokenize"], model).args(["--no-special", "--json", TEXT]));
    let tokens: Vec<u32> = serde_json::from_str(&json).unwrap();
    assert!(tokens.len() > 2 * ctx, "{} tokens are too few", tokens.len());
    tokens.chunks(ctx - 1).map(|chunk| [&[2], chunk].concat()).collect()
}

#[test]
fn logits_are_those_of_the_library() {
    let f16 = KvType::F16;
    let runs: [(&[&str], Way); 7] = [
        (&["--kv", "f32"], INT8),
        (&["--kv", "f32", "--act", "int8", "--batch", "3", "-t", "2"], INT8),
        (&["--kv", "f32", "--act", "float"], EXACT),
        (&["--kv", "f16", "--batch", "64"], Way { kv: f16, ..INT8 }),
        (&["--kv", "f16", "--batch", "1", "--kernel", "scalar"], Way { kv: f16, ..INT8 }),
        (&["--kv", "int8"], Way { kv: KvType::Int8, ..INT8 }),
        (&["--kv", "mixed"], Way { kv: KvType::Mixed, ..INT8 }),
    ];
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("logits");
    for name in golden::MODELS {
        let model = kept(name);
        let tokens = golden::tokens(name, 64);
        let ids: Vec<String> = tokens.iter().map(u32::to_string).collect();
        let mut seen = Vec::new();
        for (flags, way) in runs {
            let mut command = command(&["eval", "logits"], &model);
            assert_eq!(gemrun(command.args(flags).args(["--tokens", &ids.join(",")]).arg("-o").arg(&out)), "");
            let ours = npy::floats(&std::fs::read(&out).unwrap());
            assert!(ours == run::logits(&Gguf::open(&model).unwrap(), &tokens, way), "{name} {flags:?}");
            seen.push(ours);
        }
        // --act and --kv must have had an effect.
        assert!(seen[0] != seen[2] && seen[0] != seen[3] && seen[0] != seen[5] && seen[5] != seen[6]);
    }
}

#[test]
fn perplexity_is_that_of_the_oracle() {
    let text = text_file();
    for name in golden::MODELS {
        let model = kept(name);
        let oracle = oracle::Model::read(&std::fs::read(&model).unwrap());
        let (mut nll, mut tokens) = (0.0, 0);
        for window in windows(&model, 12) {
            let logits = oracle.trace(&window[..window.len() - 1], 0).logits;
            for (row, &target) in logits.iter().zip(&window[1..]) {
                nll += row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[target as usize];
                tokens += 1;
            }
        }
        let mut command = command(&["eval", "ppl"], &model);
        command.args(["--ctx", "12", "--act", "float", "--kv", "f32", "--json", "--file"]).arg(text.path());
        let ours: serde_json::Value = serde_json::from_str(&gemrun(&mut command)).unwrap();
        assert_eq!(ours["tokens"], tokens);
        let expected = nll / f64::from(tokens);
        let (nll, ppl) = (ours["nll"].as_f64().unwrap(), ours["ppl"].as_f64().unwrap());
        assert!((nll - expected).abs() < 1e-4, "{name}: {nll}, oracle {expected}");
        assert!((ppl / expected.exp() - 1.0).abs() < 1e-4, "{name}: {ppl}, oracle {}", expected.exp());
    }
}

#[test]
fn divergence_between_two_ways() {
    let text = text_file();
    let model = kept("b_dense");
    let gguf = Gguf::open(&model).unwrap();
    let (mut divergences, mut agree) = (Vec::new(), 0);
    for window in windows(&model, 20) {
        let inputs = &window[..window.len() - 1];
        let (exact, int8) = (run::logits(&gguf, inputs, EXACT), run::logits(&gguf, inputs, INT8));
        let width = exact.len() / inputs.len();
        for (p, q) in exact.chunks(width).zip(int8.chunks(width)) {
            divergences.push(kl(p, q));
            agree += usize::from(argmax(p) == argmax(q));
        }
    }
    let mut command = command(&["eval", "kl"], &model);
    command.arg("--base").arg(&model).args(["--base-act", "float", "--kv", "f32", "--ctx", "20", "--json", "--file"]);
    let ours: serde_json::Value = serde_json::from_str(&gemrun(command.arg(text.path()))).unwrap();
    let number = |key: &str| ours[key].as_f64().unwrap();
    let mean = divergences.iter().sum::<f64>() / divergences.len() as f64;
    assert_eq!(ours["tokens"], divergences.len());
    assert!((number("kl_mean") - mean).abs() < 1e-9, "{ours}: expected {mean}");
    assert!((number("top1") - agree as f64 / divergences.len() as f64).abs() < 1e-12, "{ours}");
    assert!(mean > 1e-4 && number("kl_p99") > mean);
    assert!((number("ppl") / number("ppl_base") - 1.0).abs() < 0.2, "{ours}");
}

/// Where nothing else is asked for, a file with static scales is run as it was trained; another one is not.
#[test]
fn what_a_file_was_trained_with_is_the_default() {
    let plain = Gguf::open(&kept("a_eseries")).unwrap();
    let layers = Config::from_gguf(&plain).unwrap().layers;
    let scales = layers.iter().map(|layer| if layer.sliding { (8, 0.03, 0.02) } else { (4, 0.5, 0.4) });
    let mut parts = raw_gguf::File::of(&plain);
    parts.set_kv_scales(&scales.collect::<Vec<_>>());
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("with-scales.gguf"), directory.path().join("logits"));
    std::fs::write(&model, parts.bytes()).unwrap();
    let logits = |model: &Path, flags: &[&str]| {
        gemrun(command(&["eval", "logits"], model).args(["--tokens", "2,105,9,4,105"]).args(flags).arg("-o").arg(&out));
        std::fs::read(&out).unwrap()
    };
    // What `eval` tells is about the weights and activations, unless asked otherwise.
    assert!(logits(&model, &[]) == logits(&model, &["--kv", "f32"]));
    assert!(logits(&model, &["--kv", "int8"]) != logits(&model, &["--kv", "mixed"]));
    let bench = |model: &Path| {
        let flags = ["-p", "3", "-n", "0", "-r", "1", "-t", "1", "--no-warmup", "--no-limits", "-o", "json"];
        let json = gemrun(command(&["bench"], model).args(flags));
        serde_json::from_str::<serde_json::Value>(&json).unwrap()[0]["kv"].clone()
    };
    assert_eq!((bench(&model), bench(&kept("a_eseries"))), ("mixed".into(), "f16".into()));
}

/// `--base-kv` is for the model compared with, `--kv` for the other.
#[test]
fn divergence_between_two_caches() {
    let text = text_file();
    let model = kept("a_eseries");
    let kl = |flags: &[&str]| {
        let mut command = command(&["eval", "kl"], &model);
        command.arg("--base").arg(&model).args(["--ctx", "20", "--json", "--file"]).arg(text.path());
        let json: serde_json::Value = serde_json::from_str(&gemrun(command.args(flags))).unwrap();
        json["kl_mean"].as_f64().unwrap()
    };
    let int8 = kl(&["--kv", "int8", "--base-kv", "f32"]);
    assert!(int8 > 0.0 && int8 < 0.01, "{int8}");
    assert!(kl(&["--kv", "mixed", "--base-kv", "f32"]) > int8);
    assert_eq!(kl(&["--kv", "int8"]), 0.0);
    assert_eq!(kl(&["--base-kv", "f32"]), 0.0);
}

#[test]
fn a_model_does_not_diverge_from_itself() {
    let text = text_file();
    let model = kept("c_moe");
    let mut command = command(&["eval", "kl"], &model);
    command.arg("--base").arg(&model).args(["--ctx", "20", "--json", "--file"]).arg(text.path());
    let ours: serde_json::Value = serde_json::from_str(&gemrun(&mut command)).unwrap();
    assert_eq!((&ours["kl_mean"], &ours["kl_p99"], &ours["top1"]), (&0.0.into(), &0.0.into(), &1.0.into()));
    assert_eq!(ours["ppl"], ours["ppl_base"]);
}
