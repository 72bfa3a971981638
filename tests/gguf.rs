//! The GGUF reader and writer against each other, against files made by other programs, and against damaged files.

use std::path::{Path, PathBuf};
use std::time::Instant;

use gemrun::gguf::write::Writer;
use gemrun::gguf::{Gguf, Type, Value};

/// A file of the reference data, or `None` (with a note) where that is not checked out.
fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
    if !path.exists() {
        println!("skipped: no {}", path.display());
        return None;
    }
    Some(path)
}

/// The same keys and tensors again, through the writer.
fn rewrite(file: &Gguf) -> Vec<u8> {
    let data: Vec<_> = file.tensors().iter().map(|t| file.bytes(t)).collect();
    let mut w = Writer::new();
    for (key, value) in file.metadata() {
        w.metadata(key, value);
    }
    for (t, data) in file.tensors().iter().zip(&data) {
        w.tensor(&t.name, t.type_id, t.shape(), &data[..]);
    }
    w.to_vec().unwrap()
}

#[test]
fn the_real_vocabulary_opens_in_milliseconds_and_is_rewritten_byte_for_byte() {
    let Some(path) = shared("vocab/ggml-vocab-gemma-4.gguf") else { return };
    let bytes = std::fs::read(&path).unwrap();
    let start = Instant::now();
    let file = Gguf::open(&path).unwrap();
    let took = start.elapsed();
    println!("opened in {took:?}");
    assert!(took.as_millis() < 250, "{took:?}");

    assert_eq!(file.name(), "ggml-vocab-gemma-4.gguf");
    assert_eq!(file.string("tokenizer.ggml.model").unwrap(), Some("gemma4"));
    let tokens = file.array("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!((tokens.elem(), tokens.len()), (Type::Str, 262_144));
    assert_eq!(tokens.strings().unwrap().count(), 262_144);
    assert_eq!(tokens.strings().unwrap().nth(2), Some(&b"<bos>"[..]));
    assert_eq!(file.array("tokenizer.ggml.merges").unwrap().unwrap().strings().unwrap().count(), 514_906);
    let types = file.array("tokenizer.ggml.token_type").unwrap().unwrap();
    assert!(types.ints().unwrap().all(|t| (1..=6).contains(&t)));
    assert!(types.floats().is_err() && tokens.ints().is_err());
    assert!(file.header_bytes().len() <= bytes.len());
    assert!(bytes.starts_with(&rewrite(&file)));
}

#[test]
fn files_of_the_reference_writer_are_rewritten_byte_for_byte() {
    for path in [
        "golden/models/a_eseries/a_eseries-q4_0.gguf",
        "golden/models/b_dense/b_dense-q8_0.gguf",
        "golden/models/c_moe/c_moe-q4_k_m.gguf",
    ] {
        let Some(path) = shared(path) else { return };
        let file = Gguf::open(&path).unwrap();
        assert!(file.tensors().len() > 30);
        let t = file.tensor("blk.0.attn_q.weight").unwrap();
        assert_eq!((t.n_dims, t.shape()), (2, &[256, 128][..]));
        assert_eq!(file.bytes(t).len() as u64, t.bytes);
        file.advise_random(t);
        file.willneed(t);
        assert!(file.tensor("blk.0.attn_q").is_none());
        assert_eq!(std::fs::read(&path).unwrap(), rewrite(&file), "{}", path.display());
    }
}

#[test]
fn typed_access_names_file_key_and_types() {
    let mut w = Writer::new();
    w.metadata("n", -3_i16).metadata("f", 1.5_f64).metadata("b", true).metadata("s", &b"\xff"[..]);
    w.array("u", &[u64::MAX]).array("x", &[1.0_f32, 2.0]);
    let file = Gguf::from_bytes("t.gguf", w.to_vec().unwrap()).unwrap();
    let error = |e: gemrun::Error| e.to_string();
    assert_eq!(file.uint("absent").unwrap(), None);
    assert_eq!(file.float("f").unwrap(), Some(1.5));
    assert_eq!(file.boolean("b").unwrap(), Some(true));
    assert_eq!(error(file.uint("n").unwrap_err()), "t.gguf: key n: is -3: expected 0 or more");
    assert_eq!(error(file.uint("b").unwrap_err()), "t.gguf: key b: is of type bool: expected an integer");
    assert_eq!(error(file.float("n").unwrap_err()), "t.gguf: key n: is of type i16: expected a float");
    assert_eq!(error(file.boolean("x").unwrap_err()), "t.gguf: key x: is of type array of f32: expected a bool");
    assert_eq!(error(file.string("s").unwrap_err()), "t.gguf: key s: is not UTF-8 at byte 0: expected UTF-8 text");
    assert_eq!(error(file.array("s").unwrap_err()), "t.gguf: key s: is of type string: expected an array");
    let array = |key| file.array(key).unwrap().unwrap();
    assert_eq!(
        array("u").ints().err().map(error).as_deref(),
        Some("t.gguf: key u: element 0 is too large: expected at most 9223372036854775807")
    );
    assert_eq!(
        array("x").strings().err().map(error).as_deref(),
        Some("t.gguf: key x: is an array of f32: expected an array of string")
    );
    assert_eq!(array("x").floats().unwrap().collect::<Vec<_>>(), [1.0, 2.0]);
    assert_eq!(array("u").values().collect::<Vec<_>>(), [Value::U64(u64::MAX)]);
}
