//! Replies: the same text and markers cut into tokens in three ways must be read as the same thoughts, calls and answer.

use std::sync::LazyLock;

use gemrun::gguf::Gguf;
use gemrun::tokenizer::Tokenizer;

use super::common::damage::{Bytes, Draw};
use super::common::pieces::read_ids;

const MARKERS: [&str; 8] =
    ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|\"|>", "<pad>", "<turn|>", "<|tool_response>"];

/// A part of a reply.
enum Part<'a> {
    Marker(u32),
    Text(&'a [u8]),
}

/// In the bytes, one of `0xf8..` is a marker; runs of others are text, UTF-8 or not.
pub fn run(data: &[u8]) {
    static VOCABULARY: LazyLock<Tokenizer> = LazyLock::new(|| {
        let file = include_bytes!("../../data/golden/tok/merges/vocab.gguf");
        Tokenizer::from_gguf(&Gguf::from_static("vocab.gguf", file).expect("a valid file")).expect("a vocabulary")
    });
    let tokenizer = &*VOCABULARY;
    let choices = &mut Bytes(data);
    let prompt = if choices.below(2) == 1 { "<|channel>thought\n" } else { "" };
    let prompt = tokenizer.encode(prompt, true);
    let cuts = choices.string();

    let mut parts = Vec::new();
    let mut rest = choices.0;
    while let Some(&first) = rest.first() {
        let marker = first.checked_sub(0xf8).map(|i| MARKERS[usize::from(i)]);
        if let Some(id) = marker.and_then(|text| tokenizer.id_of(text)) {
            parts.push(Part::Marker(id));
            rest = &rest[1..];
        } else {
            let end = 1 + rest[1..].iter().position(|&byte| byte >= 0xf8).unwrap_or(rest.len() - 1);
            parts.push(Part::Text(&rest[..end]));
            rest = &rest[end..];
        }
    }

    let byte = |byte: &u8| tokenizer.id_of(&format!("<0x{byte:02X}>")).expect("a token for every byte");
    let whole = |bytes: &[u8], ids: &mut Vec<u32>| match std::str::from_utf8(bytes) {
        // U+2581 is how the vocabulary writes a space, so as text it would come back as one.
        Ok(text) if !text.contains('\u{2581}') => tokenizer.append(text, false, ids),
        _ => ids.extend(bytes.iter().map(byte)),
    };
    let bytewise = tokens(&parts, &mut |bytes, ids| ids.extend(bytes.iter().map(byte)));
    let longest = tokens(&parts, &mut |bytes, ids| whole(bytes, ids));
    let mut lengths = cuts.iter().cycle();
    let mixed = tokens(&parts, &mut |bytes, ids| {
        let mut rest = bytes;
        while !rest.is_empty() {
            let len = 1 + usize::from(lengths.next().copied().unwrap_or(0)) % 8;
            let (piece, tail) = rest.split_at(len.min(rest.len()));
            whole(piece, ids);
            rest = tail;
        }
    });
    let read = read_ids(tokenizer, &prompt, &bytewise);
    assert_eq!(read, read_ids(tokenizer, &prompt, &longest), "cut into long tokens");
    assert_eq!(read, read_ids(tokenizer, &prompt, &mixed), "cut anywhere");
}

/// The tokens of a reply, whose texts `text` cuts.
fn tokens(parts: &[Part], text: &mut dyn FnMut(&[u8], &mut Vec<u32>)) -> Vec<u32> {
    let mut ids = Vec::new();
    for part in parts {
        match part {
            Part::Marker(id) => ids.push(*id),
            Part::Text(bytes) => text(bytes, &mut ids),
        }
    }
    ids
}
