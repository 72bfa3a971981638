//! The oracle: an independent f64 evaluation of a Gemma 4 GGUF file, for tests.
//!
//! It shares no code with the engine: its own file reader ([`gguf`]), its own dequantisers ([`dequant`])
//! and the model as plain loops ([`model`]). It is itself checked against logits recorded from another
//! implementation (`oracle_vs_golden.rs`), so that nobody is compared only with themselves. [`synth`] makes
//! random files on which the engine and the oracle must agree.
//! What it does not do: tokenize, sample, cache, or tolerate a malformed file.

// Each test program uses its own part of this module.
#![allow(dead_code)]

pub mod dequant;
pub mod gguf;
pub mod model;
pub mod synth;

pub use model::{Model, Trace};

/// The soft-capped logits of every position: (tokens, vocabulary).
pub fn logits(file: &[u8], tokens: &[u32]) -> Vec<Vec<f64>> {
    trace(file, tokens, 0).logits
}

/// Logits and hidden states of a sequence that begins at `first_position`.
pub fn trace(file: &[u8], tokens: &[u32], first_position: usize) -> Trace {
    Model::read(file).trace(tokens, first_position)
}
