//! Telling thoughts, tool calls and the answer apart: the format's cases, what models make of it, and any tokens at
//! all against a second, simpler reading of the whole reply.

mod common;

use std::path::Path;
use std::sync::LazyLock;

use common::pieces::{Piece, add, read_ids};
use gemrun::channel::{Channel, Event};
use gemrun::gguf::{Gguf, write::Writer};
use gemrun::tokenizer::Tokenizer;
use proptest::prelude::*;
use serde_json::{Value, json};

fn tokenizer() -> Tokenizer {
    static OPENED: LazyLock<Tokenizer> = LazyLock::new(|| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/tok/merges/vocab.gguf");
        Tokenizer::open(&path).unwrap()
    });
    OPENED.clone()
}

fn read(tokenizer: &Tokenizer, text: &str) -> Vec<Piece> {
    read_ids(tokenizer, &[], &tokenizer.encode(text, true))
}

fn answer(text: &str) -> Piece {
    Piece::Answer(text.into())
}

fn thought(text: &str) -> Piece {
    Piece::Thought(text.into())
}

#[test]
fn thoughts_and_answers() {
    let t = tokenizer();
    let cases: Vec<(&str, Vec<Piece>)> = vec![
        ("", vec![]),
        ("Hello\n", vec![answer("Hello\n")]),
        ("\n Hello", vec![answer("\n Hello")]),
        ("<|channel>thought\nhmm\n<channel|>Hello", vec![thought("hmm"), answer("Hello")]),
        ("<|channel>thought\na\n\nb  \n<channel|>\n\n Hello", vec![thought("a\n\nb"), answer(" Hello")]),
        ("<|channel>thought\n<channel|>Hello", vec![answer("Hello")]),
        ("<|channel>thought<channel|>", vec![]),
        ("<|channel>thought\nnever done ", vec![thought("never done")]),
        ("a<|channel>thought\nb<channel|>c", vec![answer("a"), thought("b"), answer("c")]),
        (
            "<|channel>thought a<channel|>b<|channel>thought c<channel|>d",
            vec![thought("a"), answer("b"), thought("c"), answer("d")],
        ),
        ("Hello<channel|>", vec![answer("Hello")]),
        ("<channel|>\nHello", vec![answer("\nHello")]),
        ("a<|channel>final b", vec![answer("afinal b")]),
        ("a<|channel>", vec![answer("a")]),
        ("a<|channel>thou<channel|>b", vec![answer("athoub")]),
        ("a<|channel>tho", vec![answer("atho")]),
        ("<|channel>thought\na<|channel>x<channel|>b", vec![thought("ax"), answer("b")]),
        ("<|channel>thought\na <|channel>thought\nb<channel|>c", vec![thought("a \nb"), answer("c")]),
        ("<|channel>thought\na<|channel><|channel>thou<channel|>c", vec![thought("athou"), answer("c")]),
        ("<|channel>thought\na<|tool_call>call:f{}<tool_call|>b<channel|>c", vec![thought("acall:f{}b"), answer("c")]),
        ("a<tool_call|><|\"|><tool|>b<pad>", vec![answer("ab")]),
    ];
    for (text, expected) in cases {
        assert_eq!(read(&t, text), expected, "{text:?}");
    }
}

#[test]
fn the_prompt_says_where_the_reply_begins() {
    let t = tokenizer();
    for (prompt, expected) in [
        ("<|turn>model\n<|channel>thought\n", vec![thought("a"), answer("b")]),
        ("<|turn>model\n<|channel>thought\n<channel|>", vec![answer("\na \nb")]),
        ("<|turn>model\n", vec![answer("\na \nb")]),
        ("<|channel>thought\nx", vec![answer("\na \nb")]),
        ("", vec![answer("\na \nb")]),
    ] {
        let ids = t.encode("\na <channel|>\nb", true);
        assert_eq!(read_ids(&t, &t.encode(prompt, true), &ids), expected, "{prompt:?}");
    }
    // Typed, not generated: no marker.
    let typed = t.encode("<|turn>model\n<|channel>thought\n", false);
    assert_eq!(read_ids(&t, &typed, &t.encode("a", true)), [answer("a")]);
}

#[test]
fn tool_calls() {
    let t = tokenizer();
    let call = |name: &str, arguments: Value| Piece::Call(name.into(), arguments);
    // `%` stands for the quote marker.
    let cases: Vec<(&str, Piece)> = vec![
        ("call:f{}", call("f", json!({}))),
        (
            "call:get_weather{city:%Z\u{fc}rich%,n:1.5e-05,none:null,obj:{a:[1,%t%],B:1},ok:true,unit:%c%}",
            call(
                "get_weather",
                json!({"city": "Zürich", "n": 1.5e-5, "none": null, "obj": {"a": [1, "t"], "B": 1}, "ok": true, "unit": "c"}),
            ),
        ),
        ("call:f{a:%{ } , : [%,b:false}", call("f", json!({"a": "{ } , : [", "b": false}))),
        ("call:f{a:%\"\n\\%}", call("f", json!({"a": "\"\n\\"}))),
        ("call:f{a:%%}", call("f", json!({"a": ""}))),
        ("call:f{ a : [ 1 , -2 , 3.5 ] , my key : {} }", call("f", json!({"a": [1, -2, 3.5], "my key": {}}))),
        ("call:f{a=1,b=%x=y%}", call("f", json!({"a": 1, "b": "x=y"}))),
        ("call:f{%a%:1,\"b\":\"c\\nd\"}", call("f", json!({"a": 1, "b": "c\nd"}))),
        ("call:f{a:1,}", call("f", json!({"a": 1}))),
        ("call:f{a:18446744073709551615}", call("f", json!({"a": u64::MAX}))),
        ("call:f{a:1,a:2}", call("f", json!({"a": 2}))),
        (" call: f {a:1} ", call("f", json!({"a": 1}))),
    ];
    for (text, expected) in cases {
        let text = text.replace('%', "<|\"|>");
        assert_eq!(read(&t, &format!("<|tool_call>{text}<tool_call|>")), vec![expected.clone()], "{text}");
        assert_eq!(read(&t, &format!("<|tool_call>{text}")), vec![expected.clone()], "without its end: {text}");
        assert_eq!(read(&t, &format!("x<|tool_call>{text}<|channel>thought y")), [answer("x"), expected, thought("y")]);
    }
    // The end of a call closes what is open; the end of a reply may have cut it off.
    for (text, arguments) in [("{", json!({})), ("{a:1", json!({"a": 1})), ("{a:[{b:%x%", json!({"a": [{"b": "x"}]}))] {
        let text = format!("<|tool_call>call:f{}", text.replace('%', "<|\"|>"));
        assert_eq!(read(&t, &format!("{text}<tool_call|>")), [call("f", arguments)]);
        assert_eq!(read(&t, &text), [answer(&text)]);
    }
    let two = "<|tool_call>call:a{}<tool_call|><|tool_call>call:b{x:1}<tool_call|>";
    assert_eq!(read(&t, two), [call("a", json!({})), call("b", json!({"x": 1}))]);
    assert_eq!(read(&t, &two.replacen("<tool_call|>", "", 1)), [call("a", json!({})), call("b", json!({"x": 1}))]);
}

#[test]
fn what_is_no_call_is_kept() {
    let t = tokenizer();
    let deep = |levels: usize| format!("call:f{{a:{}{}}}", "[".repeat(levels), "]".repeat(levels));
    for bad in [
        "",
        "x",
        "call:",
        "call:f",
        "call:{}",
        "f{}",
        "call:f{a}",
        "call:f{:1}",
        "call:f{a:}",
        "call:f{a:b}",
        "call:f{a:1 b:2}",
        "call:f{a:01}",
        "call:f{a:1e999}",
        "call:f{a:--1}",
        "call:f{a:nul}",
        "call:f{}x",
        "call:f{}{}",
        "call:f{a:%x}",
        "call:f{%a:1}",
        "call:f{a:\"x}",
        "call:f{a:\"\\q\"}",
        "call:f{a:[1}",
        "call:f{a:]}",
        "call:f{,}",
        &deep(65),
        &deep(60_000),
        &"call:f{a:{".repeat(3000),
    ] {
        let text = format!("<|tool_call>{}<tool_call|>", bad.replace('%', "<|\"|>"));
        assert_eq!(read(&t, &text), [answer(&text)]);
    }
    assert!(matches!(&read(&t, &format!("<|tool_call>{}<tool_call|>", deep(64)))[..], [Piece::Call(..)]));
}

/// The same characters in ordinary tokens are text.
#[test]
fn markers_are_tokens() {
    let t = tokenizer();
    let text = "<|channel>thought\na<channel|><|tool_call>call:f{}<tool_call|>";
    assert_eq!(read_ids(&t, &[], &t.encode(text, false)), [answer(text)]);
    let mut ids = t.encode("<|tool_call>call:f{a:<|\"|>", true);
    ids.extend(t.encode("x<|\"|>,b:<tool_call|>", false));
    ids.extend(t.encode("<|\"|>}<tool_call|>", true));
    let arguments = json!({"a": "x<|\"|>,b:<tool_call|>"});
    assert_eq!(read_ids(&t, &[], &ids), [Piece::Call("f".into(), arguments)]);
}

#[test]
fn a_vocabulary_without_markers_only_answers() {
    let mut w = Writer::new();
    let text: Vec<String> = "thougcanel|<>:{}_ ".chars().map(|c| c.to_string().replace(' ', "\u{2581}")).collect();
    let tokens: Vec<&str> = ["<bos>", "<eos>"].into_iter().chain(text.iter().map(String::as_str)).collect();
    w.metadata("tokenizer.ggml.model", "gemma4");
    w.strings("tokenizer.ggml.tokens", tokens);
    w.strings("tokenizer.ggml.merges", [""; 0]);
    let t = Tokenizer::from_gguf(&Gguf::from_bytes("t.gguf", w.to_vec().unwrap()).unwrap()).unwrap();
    let said = "<|channel>thought <channel|><|tool_call>call:gu{}<tool_call|>";
    assert_eq!(read(&t, said), [answer(said)]);
}

#[test]
fn characters_stay_whole_and_end_at_markers() {
    let t = tokenizer();
    let byte = |b: u8| t.id_of(&format!("<0x{b:02X}>")).unwrap();
    let [open, close] = ["<|channel>", "<channel|>"].map(|m| t.id_of(m).unwrap());
    let mut ids: Vec<u32> = "€".bytes().map(byte).collect();
    assert_eq!(read_ids(&t, &[], &ids), [answer("€")]);
    ids.truncate(2);
    assert_eq!(read_ids(&t, &[], &ids), [answer("\u{fffd}")]);
    ids.push(open);
    ids.extend(t.encode("thought", true));
    ids.extend(['\u{e9}', '\u{e9}'].iter().flat_map(|c| c.to_string().into_bytes()).map(byte).take(3));
    ids.push(close);
    assert_eq!(read_ids(&t, &[], &ids), [answer("\u{fffd}"), thought("é\u{fffd}")]);
}

#[test]
fn the_listener_can_end_it() {
    let t = tokenizer();
    for text in
        ["a", "<|channel>thought a", "<|tool_call>call:f{}<tool_call|>", "<|tool_call>f<tool_call|>", "<|channel>no"]
    {
        let mut channel = Channel::after(&t, &[]);
        let pushed = t.encode(text, true).into_iter().any(|id| channel.push(&t, id, &mut |_| true));
        assert!(pushed || channel.finish(&mut |_| true), "{text}");
    }
}

/// What a model may say, and how the format writes it.
#[derive(Debug, Clone)]
enum Part {
    Answer(String),
    Thought(String),
    Call(String, serde_json::Map<String, Value>),
    /// A marker without a meaning where it stands.
    Stray(&'static str),
}

fn part() -> impl Strategy<Value = Part> {
    let text = || prop_oneof!["[a-z\\n ]{0,8}", any::<String>(), Just("<|channel>thought".to_string())];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1e30..1e30f64).prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    let key = || "[a-zA-Z_][a-z 0-9\\[{,\"-]{0,5}[a-z]";
    let value = leaf.prop_recursive(4, 20, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key(), inner), 0..4)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    });
    let arguments = prop::collection::vec((key(), value), 0..4).prop_map(|entries| entries.into_iter().collect());
    prop_oneof![
        text().prop_map(Part::Answer),
        text().prop_map(Part::Thought),
        ("[a-z_.]{1,8}", arguments).prop_map(|(name, arguments)| Part::Call(name, arguments)),
        prop::sample::select(vec!["<channel|>", "<tool_call|>", "<|channel>", "<pad>", "<|\"|>"]).prop_map(Part::Stray),
    ]
}

/// Alternately plain text and markers.
fn write_value(value: &Value, space: &str, out: &mut Vec<(String, bool)>) {
    let plain = |out: &mut Vec<_>, text: &str| out.push((text.to_string(), false));
    match value {
        Value::String(text) => out.extend([("<|\"|>".into(), true), (text.clone(), false), ("<|\"|>".into(), true)]),
        Value::Array(items) => {
            plain(out, "[");
            for (i, item) in items.iter().enumerate() {
                plain(out, &format!("{}{space}", if i > 0 { "," } else { "" }));
                write_value(item, space, out);
            }
            plain(out, &format!("{space}]"));
        }
        Value::Object(map) => {
            plain(out, "{");
            for (i, (key, item)) in map.iter().enumerate() {
                plain(out, &format!("{}{space}{key}{space}:{space}", if i > 0 { "," } else { "" }));
                write_value(item, space, out);
            }
            plain(out, &format!("{space}}}"));
        }
        other => plain(out, &other.to_string()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// What the format writes is read back, typed markers in it included.
    #[test]
    fn what_is_written_is_read(parts in prop::collection::vec(part(), 0..8), space in " {0,2}|\n") {
        let t = tokenizer();
        let mut ids = Vec::new();
        let mut expected = Vec::new();
        let mut after_thought = false;
        for part in parts {
            let mut written: Vec<(String, bool)> = Vec::new();
            match part {
                Part::Answer(text) => {
                    // Behind a stray `<|channel>` this would be a thought.
                    let text = format!("{}{text}", if ids.last() == t.id_of("<|channel>").as_ref() { "x" } else { "" });
                    let said = if after_thought { text.trim_start_matches('\n') } else { &text };
                    if !said.is_empty() {
                        after_thought = false;
                        add(&mut expected, Event::Answer(said));
                    }
                    written.push((text, false));
                }
                Part::Thought(text) => {
                    if !text.trim().is_empty() {
                        add(&mut expected, Event::Thought(text.trim()));
                    }
                    after_thought = true;
                    written.extend([("<|channel>".into(), true), (format!("thought\n{text}\n"), false), ("<channel|>".into(), true)]);
                }
                Part::Call(name, arguments) => {
                    let arguments = Value::Object(arguments);
                    add(&mut expected, Event::ToolCall { name: &name, arguments: &arguments });
                    written.extend([("<|tool_call>".into(), true), (format!("call:{name}"), false)]);
                    write_value(&arguments, &space, &mut written);
                    written.push(("<tool_call|>".into(), true));
                }
                Part::Stray(marker) => written.push((marker.into(), true)),
            }
            written.iter().for_each(|(text, marker)| t.append(text, *marker, &mut ids));
        }
        prop_assert_eq!(read_ids(&t, &[], &ids), expected);
    }

    /// The same text in other tokens, between the same markers, is the same events.
    #[test]
    fn any_split_is_read_the_same(parts in prop::collection::vec(part(), 0..6), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20)) {
        let t = tokenizer();
        let mut pieces: Vec<(String, bool)> = Vec::new();
        for part in parts {
            match part {
                Part::Answer(text) => pieces.push((text, false)),
                Part::Thought(text) => pieces.extend([("<|channel>".into(), true), (format!("thought\n{text}\n"), false), ("<channel|>".into(), true)]),
                Part::Call(name, arguments) => {
                    pieces.extend([("<|tool_call>".into(), true), (format!("call:{name}"), false)]);
                    write_value(&Value::Object(arguments), " ", &mut pieces);
                    pieces.push(("<tool_call|>".into(), true));
                }
                Part::Stray(marker) => pieces.push((marker.into(), true)),
            }
        }
        let (mut whole, mut split, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
        for (text, marker) in &pieces {
            t.append(text, *marker, &mut whole);
            if *marker {
                t.append(text, true, &mut split);
                t.append(text, true, &mut bytes);
                continue;
            }
            let mut at: Vec<usize> = cuts.iter().map(|cut| text.floor_char_boundary(cut.index(text.len() + 1))).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            at.windows(2).for_each(|cut| t.append(&text[cut[0]..cut[1]], false, &mut split));
            // Characters in several tokens.
            bytes.extend(text.bytes().filter_map(|byte| t.id_of(&format!("<0x{byte:02X}>"))));
        }
        let expected = read_ids(&t, &[], &whole);
        prop_assert_eq!(&read_ids(&t, &[], &split), &expected);
        prop_assert_eq!(&read_ids(&t, &[], &bytes), &expected);
    }

    /// Any tokens are read without a panic; without markers that open something, the answer is their whole text.
    #[test]
    fn any_tokens_are_read(ids in prop::collection::vec(prop_oneof![
        prop::sample::select(vec!["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|\"|>", "thought", "call", ":", "{", "}", "[", "]", ",", "\n", "1", "a"])
            .prop_map(|text| tokenizer().id_of(text).unwrap_or(0)),
        0u32..300_000,
    ], 0..60), thinking in any::<bool>()) {
        let t = tokenizer();
        let prompt = t.encode(if thinking { "<|channel>thought\n" } else { "" }, true);
        read_ids(&t, &prompt, &ids);
        let openers = ["<|channel>", "<|tool_call>"].map(|m| t.id_of(m).unwrap());
        let closed: Vec<u32> = ids.into_iter().filter(|id| !openers.contains(id)).collect();
        let text: String = closed.split(|&id| t.is_hidden(id)).map(|run| String::from_utf8_lossy(&t.decode(run, true)).into_owned()).collect();
        let expected = if text.is_empty() { vec![] } else { vec![answer(&text)] };
        prop_assert_eq!(read_ids(&t, &[], &closed), expected);
    }
}
