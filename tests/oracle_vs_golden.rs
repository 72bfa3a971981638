//! The oracle against logits and hidden states recorded from another implementation of the model (f32).
//!
//! The tolerances are a small multiple of the noise of f32 itself on these models, 4e-5.

mod common;
mod oracle;

use common::{golden, max_abs_difference};

const TOLERANCE: f64 = 1e-4;

#[test]
fn logits_of_exact_weights() {
    for model in golden::MODELS {
        let Some(file) = golden::bytes(model, &format!("{model}-bf16.gguf")) else {
            continue;
        };
        let oracle = oracle::Model::read(&file);
        for len in [1, 7, 64, 200] {
            let expected = golden::array(model, &format!("logits_len{len}.npy")).unwrap();
            let trace = oracle.trace(&golden::tokens(model, len), 0);
            let difference = max_abs_difference(expected.values, trace.logits.concat());
            println!("{model} length {len}: {difference:.2e}");
            assert!(difference <= TOLERANCE, "{model} length {len}: {difference:e}");
        }
    }
}

#[test]
fn hidden_states_of_exact_weights() {
    for model in golden::MODELS {
        let Some(file) = golden::bytes(model, &format!("{model}-bf16.gguf")) else {
            continue;
        };
        let expected = golden::array(model, "hidden_len64.npy").unwrap();
        let trace = oracle::trace(&file, &golden::tokens(model, 64), 0);
        assert_eq!(expected.shape[0], trace.hidden.len());
        let layers = expected.values.chunks_exact(expected.values.len() / expected.shape[0]);
        for (layer, (expected, hidden)) in layers.zip(&trace.hidden).enumerate() {
            let difference = max_abs_difference(expected.iter().copied(), hidden.concat());
            println!("{model} hidden state {layer}: {difference:.2e}");
            assert!(difference <= TOLERANCE, "{model} hidden state {layer}: {difference:e}");
        }
    }
}

#[test]
fn logits_of_quantised_weights() {
    for (model, kind) in golden::QUANTISED {
        let Some(file) = golden::bytes(model, &format!("{model}-{kind}.gguf")) else {
            continue;
        };
        let expected = format!("hf_dequant_logits_len64.{kind}.npy");
        let expected = golden::array(model, &expected).unwrap();
        let logits = oracle::logits(&file, &golden::tokens(model, 64));
        let difference = max_abs_difference(expected.values, logits.concat());
        println!("{model} {kind}: {difference:.2e}");
        assert!(difference <= TOLERANCE, "{model} {kind}: {difference:e}");
    }
}

/// Attention sees differences of positions only, so moving the whole sequence must not change anything.
#[test]
fn logits_do_not_depend_on_the_first_position() {
    for model in golden::MODELS {
        let file = golden::bytes(model, &format!("{model}-q4_0-pure.gguf")).unwrap();
        let oracle = oracle::Model::read(&file);
        let tokens = golden::tokens(model, 64);
        let here = oracle.trace(&tokens, 0);
        let there = oracle.trace(&tokens, 100_000);
        let difference = max_abs_difference(here.logits.concat(), there.logits.concat());
        assert!(difference <= 1e-7, "{model}: {difference:e}");
    }
}
