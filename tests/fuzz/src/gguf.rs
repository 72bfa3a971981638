//! GGUF files: bytes that begin with the magic number are a file as they are; any others choose a small valid model and
//! what to damage in it, which gets past the container's own checks to those of configuration, tensors and vocabulary.

use std::sync::LazyLock;

use gemrun::template::Template;

use super::common::damage::{Bytes, Draw, contradict, injure};
use super::common::examine::open_damaged;
use super::common::raw_gguf::File;
use super::small::{base, experts, use_model};

/// Whatever is accepted must survive a trip through the writer and can be used as `gemrun run` would.
pub fn run(data: &[u8]) {
    let bytes = if data.starts_with(b"GGUF") { data.to_vec() } else { damaged(&mut Bytes(data)) };
    let Ok(file) = open_damaged(bytes.clone()) else { return };
    if let Err(e) = Template::from_gguf(&file).map(drop).and_then(|()| use_model(bytes)) {
        let line = e.to_string();
        assert!(line.starts_with("x.gguf: ") && !line.chars().any(char::is_control), "{line}");
    }
}

/// A model with what `choices` says wrong.
fn damaged(choices: &mut Bytes) -> Vec<u8> {
    static MODELS: LazyLock<[File; 2]> = LazyLock::new(|| [base(), experts()]);
    let mut parts = MODELS[choices.below(MODELS.len())].clone();
    if choices.below(2) == 1 {
        contradict(&mut parts, choices);
    }
    let (mut bytes, fields) = parts.bytes_and_fields();
    while !choices.is_empty() {
        injure(&mut bytes, &fields, choices);
    }
    bytes
}
