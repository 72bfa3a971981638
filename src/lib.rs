//! gemrun, the CPU engine for Gemma 4: a memory-mapped GGUF file, a forward pass, a conversation.

pub mod error;
pub mod gguf;
pub mod registry;
pub mod sample;
pub mod tokenizer;

pub use error::{Error, Kind, Result};
