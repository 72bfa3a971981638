//! Finds the golden data: models with random weights and the logits that other programs computed for them.
//!
//! A small part is kept in `tests/data/golden`; the rest is read from `../shared/golden/models` where that
//! directory exists. Both have the same layout, MODEL/FILE.

use super::npy::Npy;
use std::path::{Path, PathBuf};

/// The three models: per-layer embeddings with shared K/V; dense with V = K; mixture of experts with V = K.
pub const MODELS: [&str; 3] = ["a_eseries", "b_dense", "c_moe"];

/// The quantised files for which there are logits of the dequantised weights, as (model, type).
pub const QUANTISED: [(&str, &str); 7] = [
    ("a_eseries", "q4_0-pure"),
    ("b_dense", "q4_0-pure"),
    ("c_moe", "q4_0-pure"),
    ("a_eseries", "q4_0"),
    ("a_eseries", "q4_k_m"),
    ("b_dense", "q8_0"),
    ("c_moe", "q4_0"),
];

/// Where a golden file is, or None with a note on stderr. A file of the kept part always is there.
pub fn path(model: &str, file: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kept = root.join("tests/data/golden").join(model).join(file);
    let outside = root.join("../shared/golden/models").join(model).join(file);
    if kept.exists() {
        return Some(kept);
    }
    assert!(!file.contains("q4_0-pure"), "{} is missing", kept.display());
    if outside.exists() {
        return Some(outside);
    }
    eprintln!("note: skipped, there is no ../shared/golden/models/{model}/{file}");
    None
}

/// The bytes of a golden file.
pub fn bytes(model: &str, file: &str) -> Option<Vec<u8>> {
    path(model, file).map(|path| std::fs::read(path).unwrap())
}

/// A golden array.
pub fn array(model: &str, file: &str) -> Option<Npy> {
    bytes(model, file).map(|bytes| Npy::read(&bytes))
}

fn info(model: &str) -> serde_json::Value {
    let bytes = bytes(model, "info.json").expect("info.json is kept for every model");
    serde_json::from_slice(&bytes).unwrap()
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The golden token sequence of a length: 1, 7, 64 or 200.
pub fn tokens(model: &str, len: usize) -> Vec<u32> {
    let tokens = ids(&info(model)["sequences"][len.to_string()]["ids"]);
    assert_eq!(tokens.len(), len);
    tokens
}

/// The 48 tokens which follow the sequence of length 7 when the largest logit is always taken.
pub fn greedy_continuation(model: &str) -> Vec<u32> {
    ids(&info(model)["greedy_from_len7"]["ids"])
}
