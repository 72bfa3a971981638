//! A vocabulary out of the fuzzer's bytes, alone or added to a usable one, and a text to encode with it.

use std::borrow::Cow;

use gemrun::gguf::{Gguf, write::Writer};
use gemrun::tokenizer::{Decoder, MARKERS, Tokenizer};

use super::common::damage::{Bytes, Draw};

/// Ids stay within the vocabulary, decoding in pieces equals decoding at once, text typed by a person never becomes a
/// marker, and with a token for every byte any text comes back.
pub fn run(data: &[u8]) {
    let choices = &mut Bytes(data);
    let usable = choices.below(4) > 0;
    let mut tokens: Vec<Cow<[u8]>> = Vec::new();
    if usable {
        tokens.extend(MARKERS.iter().map(|marker| marker.as_bytes().into()));
        tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>").into_bytes().into()));
        tokens.extend(["\u{2581}", "a", "b", "ab", "\n", "\n\n", "<", "|"].map(|text| text.as_bytes().into()));
    }
    for _ in 0..choices.below(256) {
        tokens.push(choices.string().into());
    }
    let mut merges: Vec<Cow<[u8]>> = Vec::new();
    for _ in 0..choices.below(256) {
        // A rule spelled out, or one for two tokens, whose result becomes a token.
        let rule = choices.string();
        if let [left, right] = *rule
            && !tokens.is_empty()
        {
            let [left, right] = [left, right].map(|i| tokens[tokens.len() - 1 - usize::from(i) % tokens.len()].clone());
            tokens.push([&left[..], &right].concat().into());
            merges.push([&left[..], b" ", &right].concat().into());
        } else {
            merges.push(rule.into());
        }
    }
    let mut writer = Writer::new();
    writer.metadata("tokenizer.ggml.model", "gemma4");
    writer.strings("tokenizer.ggml.tokens", &tokens).strings("tokenizer.ggml.merges", &merges);
    match choices.below(4) {
        0 => {}
        kind => {
            let types: Vec<i32> = tokens.iter().map(|_| i32::from(choices.byte() % 8)).collect();
            writer.array("tokenizer.ggml.token_type", &types[..types.len() - usize::from(kind == 3 && usable)]);
        }
    }
    for key in ["bos", "eos", "unknown"] {
        if choices.below(2) == 1 {
            writer.metadata(&format!("tokenizer.ggml.{key}_token_id"), choices.below(300) as u32);
        }
    }
    let file = Gguf::from_bytes("x.gguf", writer.to_vec().expect("a valid file")).expect("the same file");
    match Tokenizer::from_gguf(&file) {
        Ok(tokenizer) => check(&tokenizer, &String::from_utf8_lossy(choices.0), usable, &tokens),
        Err(e) => {
            let line = e.to_string();
            assert!(line.starts_with("x.gguf: ") && !line.chars().any(char::is_control), "{line}");
        }
    }
}

fn check(tokenizer: &Tokenizer, text: &str, has_bytes: bool, tokens: &[Cow<[u8]>]) {
    assert_eq!(tokenizer.vocab_size(), tokens.len());
    for markers in [true, false] {
        let ids = tokenizer.encode(text, markers);
        assert!(ids.iter().all(|&id| (id as usize) < tokens.len()));
        let bytes = tokenizer.decode(&ids, true);
        // A vocabulary may have rules that lead to `<0x41>`, which then stands for its byte.
        if has_bytes && !text.contains("<0x") {
            assert_eq!(String::from_utf8_lossy(&bytes), text.replace('\u{2581}', " "));
        }
        let mut decoder = Decoder::new(true);
        let mut streamed: String = ids.iter().map(|&id| decoder.push(tokenizer, id)).collect();
        streamed += &decoder.finish();
        assert_eq!(streamed, String::from_utf8_lossy(&bytes));
        // `<unk>` stands for what a vocabulary without bytes cannot say.
        let marker = |id: u32| MARKERS.iter().any(|m| m.as_bytes() == &tokens[id as usize][..] && *m != "<unk>");
        assert!(markers || !ids.iter().any(|&id| marker(id)), "typed text became a marker");
        let with_bos = tokenizer.encode_with_bos(text, markers);
        assert_eq!(with_bos[0], tokenizer.bos());
    }
    for id in 0..tokens.len() as u32 + 2 {
        assert_eq!(tokenizer.token_bytes(id).is_some(), (id as usize) < tokens.len());
    }
    assert!(tokenizer.never_sample().iter().all(|id| !tokenizer.stop_tokens().contains(id)));
}
