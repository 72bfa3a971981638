//! `gemrun calibrate` and `--static`: scales are found, belong to their model, and are used.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const GEMRUN: &str = env!("CARGO_BIN_EXE_gemrun");

fn text() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/demo/heldout.txt")
}

fn run(arguments: &[&str]) -> Output {
    Command::new(GEMRUN).args(arguments).output().unwrap()
}

fn stdout(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(arguments: &[&str], code: i32, line: &str) {
    let output = run(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    assert!(stderr.contains(line) && stderr.lines().count() == 1, "{arguments:?}: {stderr}");
}

#[test]
fn scales_are_found_and_used() {
    let folder = tempfile::tempdir().unwrap();
    let (scales, text) = (folder.path().join("demo.static.gguf"), text());
    let (scales, text) = (scales.to_str().unwrap(), text.to_str().unwrap());
    let said = stdout(&["calibrate", "demo", "--file", text, "-o", scales, "--ctx", "128", "-t", "2"]);
    for role in ["attn_q", "ffn_down", "proj", "KL", "perplexity"] {
        assert!(said.lines().any(|line| line.starts_with(role)), "{role}: {said}");
    }
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["demo.static.gguf"], "nothing else is left");

    // Rounding by one scale a matrix costs something, and not much.
    let kl = |more: &[&str]| -> f64 {
        let base = ["eval", "kl", "demo", "--base", "demo", "--file", text, "--json", "--ctx", "256"];
        let json: serde_json::Value = serde_json::from_str(&stdout(&[&base[..], more].concat())).unwrap();
        json["kl_mean"].as_f64().unwrap()
    };
    assert_eq!(kl(&[]), 0.0);
    let cost = kl(&["--static", scales]);
    println!("KL {cost:.6}");
    assert!(cost > 1e-5 && cost < 0.01, "{cost}");

    // The same bits whoever computes.
    let logits = |name: &str, more: &[&str]| {
        let file = folder.path().join(name);
        let base = ["eval", "logits", "demo", "--tokens", "2,105,107,600,700,800,900,1000", "--static", scales, "-o"];
        stdout(&[&base[..], &[file.to_str().unwrap()], more].concat());
        std::fs::read(file).unwrap()
    };
    let all = logits("a", &[]);
    assert!(all == logits("b", &["--kernel", "scalar", "-t", "3", "--batch", "3"]));
    assert!(all == logits("c", &["--act", "static"]));
    assert!(all != logits("d", &["--act", "int8"]));
}

#[test]
fn what_cannot_be_used_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (out, text) = (path("out.gguf"), text());
    let text = text.to_str().unwrap();
    let short = path("short.txt");
    std::fs::write(&short, "too short").unwrap();
    refused(&["calibrate", "demo", "--file", &short, "-o", &out], 2, "too short");
    refused(&["calibrate", "demo", "--file", text, "-o", &out, "--ctx", "1"], 2, "ctx: 1: expected 2 to");
    refused(&["calibrate", "demo-mobile", "--file", text, "-o", &out], 6, "has static scales already");
    refused(&["run", "demo", "hi", "--static", &out], 3, "out.gguf");
    assert!(!Path::new(&out).exists());

    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo.gguf");
    refused(&["run", "demo", "hi", "--static", demo.to_str().unwrap()], 5, "not a file of static scales");
    stdout(&["calibrate", "demo", "--file", text, "-o", &out, "--ctx", "512"]);
    refused(&["run", "demo-mobile", "hi", "--static", &out], 5, "made for another model");
    let whole = std::fs::read(&out).unwrap();
    std::fs::write(&out, &whole[..whole.len() - 40]).unwrap();
    refused(&["run", "demo", "hi", "--static", &out], 5, "out.gguf");
}
