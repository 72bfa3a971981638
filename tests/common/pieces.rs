//! A reply as a whole: what the reader of model output makes of it, joined to pieces that can be compared.

use gemrun::channel::{Channel, Event};
use gemrun::tokenizer::Tokenizer;
use serde_json::Value;

/// An event that outlives its text, with neighbours of the same kind joined.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    Answer(String),
    Thought(String),
    Call(String, Value),
}

/// Takes an event in.
pub fn add(pieces: &mut Vec<Piece>, event: Event) {
    match (event, pieces.last_mut()) {
        (Event::Answer(text), Some(Piece::Answer(last))) => last.push_str(text),
        (Event::Thought(text), Some(Piece::Thought(last))) => last.push_str(text),
        (Event::Answer(text), _) => pieces.push(Piece::Answer(text.into())),
        (Event::Thought(text), _) => pieces.push(Piece::Thought(text.into())),
        (Event::ToolCall { name, arguments }, _) => pieces.push(Piece::Call(name.into(), arguments.clone())),
    }
}

/// What is made of the reply `ids` to `prompt`.
pub fn read_ids(tokenizer: &Tokenizer, prompt: &[u32], ids: &[u32]) -> Vec<Piece> {
    let mut channel = Channel::after(tokenizer, prompt);
    let mut pieces = Vec::new();
    let mut emit = |event: Event| {
        assert!(!matches!(event, Event::Answer("") | Event::Thought("")), "an event without text");
        add(&mut pieces, event);
        false
    };
    for &id in ids {
        assert!(!channel.push(tokenizer, id, &mut emit));
    }
    assert!(!channel.finish(&mut emit));
    pieces
}
