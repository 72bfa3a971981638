//! What the fuzzer drives: one function a target, from bytes to an assertion.
//!
//! | target | the bytes are | must hold |
//! |---|---|---|
//! | [`gguf`] | a file, or damage to a small model | refused in one line, or read, written back and run |
//! | [`tokenizer`] | a vocabulary and a text | no panic; text comes back; typed text is never a marker |
//! | [`template`] | a chat template and a conversation | the meter stops it; typed text is never a marker |
//! | [`output`] | tokens of a reply | read the same however its text is cut into tokens |
//! | [`kernels`] | weights and activations | every kernel gives the bits of the scalar one |
//!
//! Two things drive them: libFuzzer (`targets/`, steered by coverage) and `tests/fuzz.rs` (plain mutations, part of
//! `cargo test`). Both start from `corpus/TARGET`. A finding becomes a file there and a named test elsewhere.

#[path = "../../common/mod.rs"]
pub mod common;
pub mod gguf;
pub mod kernels;
#[path = "../../oracle/mod.rs"]
mod oracle;
pub mod output;
#[path = "../../common/small.rs"]
mod small;
pub mod template;
pub mod tokenizer;
