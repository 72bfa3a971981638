//! The engine against the golden data: what another implementation computed for the same files and tokens.
//!
//! With f32 activations only rounding is left and the difference is bounded at every position. With int8
//! activations the distance to the exact result is measured, and llama.cpp's distance on the same file is the
//! yardstick. Files that are not kept in the repository are skipped with a note when absent.

mod common;

use common::run::{self, EXACT, INT8, Way};
use common::{argmax, golden, kl, max_abs_difference, median, npy};
use gemrun::forward::{State, Want, forward};
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::team::Team;
use gemrun::weight::Numerics;
use std::path::Path;

/// Five times the noise of f32 on these models.
const TOLERANCE: f64 = 2e-4;

fn logits(file: &Path, tokens: &[u32], way: Way) -> Vec<f32> {
    run::logits(&Gguf::open(file).unwrap(), tokens, way)
}

/// BF16 weights are multiplied by f32 activations whatever is asked for.
#[test]
fn logits_of_exact_weights() {
    for model in golden::MODELS {
        let Some(file) = golden::path(model, &format!("{model}-bf16.gguf")) else {
            continue;
        };
        for len in [1, 7, 64, 200] {
            let expected = golden::array(model, &format!("logits_len{len}.npy")).unwrap();
            let ours = logits(&file, &golden::tokens(model, len), INT8);
            let difference = max_abs_difference(expected.values, ours);
            println!("{model} length {len}: {difference:.2e}");
            assert!(difference <= TOLERANCE, "{model} length {len}: {difference:e}");
        }
    }
}

#[test]
fn logits_of_quantised_weights_and_float_activations() {
    for (model, kind) in golden::QUANTISED {
        let Some(file) = golden::path(model, &format!("{model}-{kind}.gguf")) else {
            continue;
        };
        let expected = golden::array(model, &format!("hf_dequant_logits_len64.{kind}.npy")).unwrap();
        let ours = logits(&file, &golden::tokens(model, 64), EXACT);
        let difference = max_abs_difference(expected.values, ours);
        println!("{model} {kind}: {difference:.2e}");
        assert!(difference <= TOLERANCE, "{model} {kind}: {difference:e}");
    }
}

/// How far logits are from the exact ones: the median divergence, and at how many positions the best token is the same.
fn distance(exact: &npy::Npy, other: &[f32]) -> (f64, usize) {
    let rows = || exact.rows().zip(other.chunks_exact(exact.shape[1]));
    let agree = rows().filter(|(p, q)| argmax(p) == argmax(q)).count();
    (median(rows().map(|(p, q)| kl(p, q)).collect()), agree)
}

/// Both programs round the same activations to int8, in different orders; ours looks for better scales.
#[test]
fn int8_activations_are_as_good_as_those_of_llama_cpp() {
    for (model, kind) in golden::QUANTISED {
        let Some(file) = golden::path(model, &format!("{model}-{kind}.gguf")) else {
            continue;
        };
        let exact = golden::array(model, &format!("hf_dequant_logits_len64.{kind}.npy")).unwrap();
        let theirs = golden::array(model, &format!("llama_logits_len64.{kind}.npy")).unwrap();
        let ours = distance(&exact, &logits(&file, &golden::tokens(model, 64), INT8));
        let theirs = distance(&exact, &theirs.values);
        println!("{model} {kind}: divergence and agreement {ours:?}, llama.cpp {theirs:?}");
        assert!(ours.0 > 1e-5, "{model} {kind}: activations were not quantised");
        assert!(ours.0 <= 1.1 * theirs.0, "{model} {kind}: divergence {}, llama.cpp's is {}", ours.0, theirs.0);
        assert!(ours.1 >= theirs.1, "{model} {kind}: {} best tokens agree, llama.cpp's {}", ours.1, theirs.1);
    }
}

fn load(model: &str) -> Option<Model> {
    let path = golden::path(model, &format!("{model}-bf16.gguf"))?;
    Some(Model::load(&Gguf::open(&path).unwrap(), &Numerics::default()).unwrap())
}

#[test]
fn hidden_states_of_exact_weights() {
    for name in golden::MODELS {
        let Some(file) = golden::path(name, &format!("{name}-bf16.gguf")) else {
            continue;
        };
        let seen = run::hidden(&Gguf::open(&file).unwrap(), &golden::tokens(name, 64), EXACT);
        let expected = golden::array(name, "hidden_len64.npy").unwrap();
        assert_eq!(seen.len(), expected.shape[0]);
        let layers = expected.values.chunks_exact(expected.values.len() / expected.shape[0]);
        for (layer, (expected, ours)) in layers.zip(seen.iter()).enumerate() {
            let difference = max_abs_difference(expected.iter().copied(), ours.iter().copied());
            assert!(difference <= TOLERANCE, "{name} hidden state {layer}: {difference:e}");
        }
    }
}

/// Token by token, as text is generated; the smallest margin between the two best tokens in the golden run is
/// several times the tolerance, so the tokens must be the same.
#[test]
fn greedy_continuation() {
    for name in golden::MODELS {
        let Some(model) = load(name) else {
            continue;
        };
        let prompt = golden::tokens(name, 7);
        let expected = golden::greedy_continuation(name);
        let mut state = State::new(&model, KvType::F32, prompt.len() + expected.len(), prompt.len()).unwrap();
        let ours: Vec<u32> = Team::new(1).unwrap().enter(|team| {
            let mut next = argmax(forward(&model, team, &mut state, &prompt, Want::Last).unwrap()) as u32;
            let step = || {
                let token = next;
                next = argmax(forward(&model, team, &mut state, &[token], Want::Last).unwrap()) as u32;
                token
            };
            std::iter::repeat_with(step).take(expected.len()).collect()
        });
        assert_eq!(ours, expected, "{name}");
    }
}
