//! gemrun, the CPU engine for Gemma 4: a memory-mapped GGUF file, a forward pass, a conversation.

pub mod attend;
pub mod calibrate;
pub mod channel;
pub mod chats;
pub mod config;
pub mod convert;
pub mod error;
pub mod facts;
pub mod fit;
pub mod forward;
pub mod gguf;
pub mod guide;
pub mod kv;
pub mod lock;
pub mod machine;
pub mod model;
pub mod new_file;
pub mod ops;
pub mod pack;
pub mod registry;
pub mod sample;
pub mod session;
pub mod team;
pub mod template;
pub mod tokenizer;
pub mod weight;
pub mod windows;

pub use error::{Error, Kind, Result};
