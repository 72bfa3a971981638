//! A chat template out of the fuzzer's bytes on a small conversation, or any conversation in the canonical one.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use gemrun::gguf::Gguf;
use gemrun::template::{Options, Template};
use gemrun::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::common::damage::{Bytes, Draw};

/// Longer than the meter lets any template run, even on a busy machine and with every check compiled in.
const TOO_LONG: Duration = Duration::from_secs(20);

/// A template ends by itself or by the meter, with a text or one line of error; what was typed never becomes a marker.
pub fn run(data: &[u8]) {
    static VOCABULARY: LazyLock<Tokenizer> = LazyLock::new(|| {
        let file = include_bytes!("../../data/golden/tok/merges/vocab.gguf");
        Tokenizer::from_gguf(&Gguf::from_static("vocab.gguf", file).expect("a valid file")).expect("a vocabulary")
    });
    let choices = &mut Bytes(data);
    let flags = choices.byte();
    let options = Options {
        add_generation_prompt: flags & 1 > 0,
        enable_thinking: flags & 2 > 0,
        preserve_thinking: flags & 4 > 0,
    };
    let start = Instant::now();
    if flags & 8 > 0 {
        conversation(&VOCABULARY, choices, options);
    } else {
        let content = String::from_utf8_lossy(choices.string()).into_owned();
        let source = String::from_utf8_lossy(choices.0);
        let messages = messages(&content);
        let tools = [
            json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}),
        ];
        let tools = if flags & 16 > 0 { &tools[..] } else { &[] };
        let result = Template::new("t", &source).and_then(|template| {
            template.encode(&VOCABULARY, &messages, tools, options)?;
            template.render(&messages, tools, options)
        });
        if let Err(e) = result {
            let line = e.to_string();
            assert!(line.starts_with("t: ") && !line.chars().any(char::is_control), "{line}");
        }
    }
    assert!(start.elapsed() < TOO_LONG, "took {:?}", start.elapsed());
}

fn messages(content: &str) -> [Value; 3] {
    [
        json!({"role": "system", "content": content}),
        json!({"role": "user", "content": [{"type": "text", "text": content}]}),
        json!({"role": "assistant", "content": content, "tool_calls": [{"function": {"name": "f", "arguments": {"a": content}}}]}),
    ]
}

/// The canonical format is ours: it has no errors but refusals, and prints as many markers for one text as for another.
fn conversation(vocabulary: &Tokenizer, choices: &mut Bytes, options: Options) {
    let template = Template::canonical(choices.below(2) == 1);
    // Messages as JSON, whatever they hold.
    if let Ok(Value::Array(messages)) = serde_json::from_slice(choices.0) {
        for result in [
            template.render(&messages, &[], options).map(drop),
            template.encode(vocabulary, &messages, &[], options).map(drop),
            template.render(&[], &messages, options).map(drop),
        ] {
            if let Err(e) = result {
                assert!(matches!(e.exit_code(), 2 | 5) && !e.to_string().chars().any(char::is_control), "{e}");
            }
        }
        return;
    }
    let typed = String::from_utf8_lossy(choices.0);
    let markers = |content: &str| {
        let ids = template.encode(vocabulary, &messages(content), &[], options).expect("a sound conversation");
        ids.into_iter().filter(|&id| vocabulary.is_hidden(id)).collect::<Vec<_>>()
    };
    // A text that is nothing but whitespace may leave its whole turn out, and thoughts are taken out of replies.
    if !typed.contains("channel") && typed.chars().any(char::is_alphanumeric) {
        assert_eq!(markers(&typed), markers("x"), "typed text became a marker");
    } else {
        markers(&typed);
    }
}
