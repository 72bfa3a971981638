//! The mobile demo model against the logits of its checkpoint by an implementation of its own (tests/data/demo/mobile_file.py,
//! exact integers and float64).
//!
//! Rounding makes the forward pass discontinuous: a value next to a boundary may fall on the other side here, and changes every
//! logit after it. So the share of rows that agree is compared, over sequences too short for a difference to grow in.

mod common;

use common::npy::Npy;
use common::run::{self, EXACT, INT8, Way};
use common::{argmax, max_abs_difference};
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::registry;
use std::path::Path;

/// The sequences and, for each of their tokens, the reference's logits.
fn reference(array: &str) -> Vec<(Vec<u32>, Npy)> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/demo");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(data.join("mobile.json")).unwrap()).unwrap();
    let ids: Vec<Vec<u32>> = serde_json::from_value(json["ids"].clone()).unwrap();
    let all = Npy::read(&std::fs::read(data.join(array)).unwrap());
    let (tokens, vocab) = (all.shape[1], all.shape[2]);
    assert!(all.shape[0] == ids.len() && ids.iter().all(|ids| ids.len() == tokens));
    let each = all
        .values
        .chunks_exact(tokens * vocab)
        .map(|values| Npy { shape: vec![tokens, vocab], values: values.to_vec() });
    ids.into_iter().zip(each).collect()
}

/// Largest difference of a logit at the first positions, and of the later positions the share without any to speak of and the
/// share whose best token is the same.
fn agreement(array: &str, way: Way) -> (f64, f64, f64) {
    let gguf = Gguf::from_static("demo-mobile", registry::DEMO_MOBILE).unwrap();
    let (mut first, mut same, mut best, mut rows) = (0.0f64, 0, 0, 0);
    for (ids, expected) in reference(array) {
        let ours = run::logits(&gguf, &ids, way);
        for (at, (theirs, ours)) in expected.rows().zip(ours.chunks_exact(expected.shape[1])).enumerate() {
            let difference = max_abs_difference(theirs.iter().copied(), ours.iter().copied());
            if at == 0 {
                first = first.max(difference);
            } else {
                rows += 1;
                same += usize::from(difference < 1e-3);
                best += usize::from(argmax(theirs) == argmax(ours));
            }
        }
    }
    let share = |n: usize| n as f64 / f64::from(rows);
    (first, share(same), share(best))
}

#[test]
fn static_integers() {
    let (first, same, best) = agreement("mobile.npy", INT8);
    println!("first {first:.1e}, same {same:.2}, best {best:.2}");
    assert!(first <= 1e-4, "{first:e}");
    assert!(same >= 0.8 && best >= 0.95, "{same} of the rows are the same, {best} have the same best token");
}

/// Keys and values in eight bits on sliding layers and four on global ones, with the file's scales.
#[test]
fn integer_keys_and_values() {
    let (first, same, best) = agreement("mobile_kv.npy", Way { kv: KvType::Mixed, ..INT8 });
    println!("first {first:.1e}, same {same:.2}, best {best:.2}");
    assert!(first <= 1e-4, "{first:e}");
    assert!(same >= 0.8 && best >= 0.95, "{same} of the rows are the same, {best} have the same best token");
    let (_, same, _) = agreement("mobile_kv.npy", INT8);
    assert!(same < 0.2, "{same} of the rows are the same with keys and values in f32");
}

/// The gate of `static_integers` can fail: without the rounding no row is the same.
#[test]
fn float_activations_are_something_else() {
    let (first, same, _) = agreement("mobile.npy", EXACT);
    println!("first {first:.1e}, same {same:.2}");
    assert!(first > 1e-2 && same == 0.0, "{first:e}, {same} of the rows are the same");
}
