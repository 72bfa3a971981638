//! The tokenizer against recorded results of the reference implementation, on two small vocabularies that come with
//! the tests and on the real one where it is at hand; then what must hold for any text and any file.

use std::path::{Path, PathBuf};
use std::time::Instant;

use gemrun::gguf::{Gguf, write::Writer};
use gemrun::tokenizer::{Decoder, MARKERS, Tokenizer};
use proptest::prelude::*;
use serde_json::Value;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(path)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn small() -> Tokenizer {
    Tokenizer::open(&data("tok/merges/vocab.gguf")).unwrap()
}

/// The vocabulary of the released models, or `None` with a note.
fn real() -> Option<Tokenizer> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/vocab/ggml-vocab-gemma-4.gguf");
    if !path.exists() {
        println!("skipped: no {}", path.display());
        return None;
    }
    let gguf = Gguf::open(&path).unwrap();
    let start = Instant::now();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    println!("built in {:?}", start.elapsed());
    Some(tokenizer)
}

#[test]
fn encodes_as_the_reference() {
    for variant in ["merges", "added"] {
        let tokenizer = Tokenizer::open(&data(&format!("tok/{variant}/vocab.gguf"))).unwrap();
        let cases = json(&data(&format!("tok/{variant}/golden.json")));
        for case in cases["encode"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            // In `added` the reference also matches HTML tags, from a list that no GGUF file carries.
            let tags = variant == "added" && ["<table>", "<b>"].iter().any(|tag| text.contains(tag));
            let (marked, plain) = if tags { ("llama_ids", "llama_ids_no_special") } else { ("ids", "ids_no_special") };
            assert_eq!(tokenizer.encode(text, true), ids(&case[marked])[1..], "{variant}: {text:?}");
            assert_eq!(tokenizer.encode(text, false), ids(&case[plain])[1..], "{variant}, plain: {text:?}");

            let ids = &ids(&case["ids"])[1..];
            let decode = |markers| String::from_utf8(tokenizer.decode(ids, markers)).unwrap();
            assert_eq!(decode(true), case["decode"].as_str().unwrap(), "{variant}: {text:?}");
            assert_eq!(decode(false), case["decode_skip_special"].as_str().unwrap(), "{variant}: {text:?}");
        }
    }
}

/// The reference turns every byte of a run of byte tokens into U+FFFD when the run as a whole is not UTF-8; we keep
/// what is valid. Apply its rule to our bytes to compare them exactly.
#[test]
fn decodes_as_the_reference() {
    for variant in ["merges", "added"] {
        let tokenizer = Tokenizer::open(&data(&format!("tok/{variant}/vocab.gguf"))).unwrap();
        let cases = json(&data(&format!("tok/{variant}/golden.json")));
        for case in cases["decode"].as_array().unwrap() {
            let ids = ids(&case["ids"]);
            for (field, markers) in [("decode", true), ("decode_skip_special", false)] {
                let mut text = String::new();
                let mut run = Vec::new();
                let visible = ids.iter().filter(|&&id| markers || !tokenizer.is_hidden(id));
                for &id in visible.chain([&u32::MAX]) {
                    if (238..494).contains(&id) {
                        run.extend(tokenizer.token_bytes(id).unwrap());
                        continue;
                    }
                    match std::str::from_utf8(&run) {
                        Ok(valid) => text.push_str(valid),
                        Err(_) => text.extend(std::iter::repeat_n('\u{fffd}', run.len())),
                    }
                    run.clear();
                    text.push_str(&String::from_utf8(tokenizer.decode(&[id], true)).unwrap());
                }
                assert_eq!(text, case[field].as_str().unwrap(), "{variant}: {ids:?}");
            }
        }
    }
}

#[test]
fn encodes_the_recorded_cases_of_the_real_vocabulary() {
    let Some(tokenizer) = real() else { return };
    let file = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/vocab/ggml-vocab-gemma-4.gguf");
        std::fs::read_to_string(format!("{}.{name}", path.display())).unwrap()
    };
    let (texts, expected) = (file("inp"), file("out"));
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let lines: Vec<&str> = expected.lines().collect();
    let mut checked = 0;
    for (text, line) in texts.iter().zip(&lines) {
        let expected: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(tokenizer.encode(text, true), expected, "{text:?}");
        checked += 1;
    }
    assert_eq!(checked, 46);

    let thirty_one = "\n".repeat(31);
    let more: [(&str, &[u32]); 30] = [
        ("Hello world", &[9259, 1902]),
        (" Hello World!", &[26352, 4109, 236888]),
        ("Äpfel", &[239122, 22744, 535]),
        (" ", &[236743]),
        ("  ", &[138]),
        ("\t\n", &[255968, 107]),
        ("    Hello\n    Hello", &[140, 9259, 107, 140, 9259]),
        ("w048 7tuijk dsdfhu", &[236765, 236771, 236812, 236828, 236743, 236832, 11372, 12065, 31806, 3405, 9360]),
        ("🚀 (normal) 😶‍🌫️", &[242015, 568, 7382, 236768, 236743, 247717, 237243, 248989, 238178]),
        ("Cửa Việt", &[236780, 29719, 33154]),
        ("\r\n", &[251, 107]),
        ("\u{10ffff}", &[482, 381, 429, 429]),
        (&("\n".to_string() + &thirty_one), &[137, 107]),
        (&("\n".repeat(9) + &thirty_one), &[137, 115]),
        (&" ".repeat(32), &[167, 236743]),
        (&" ".repeat(33), &[167, 138]),
        (&"\t".repeat(33), &[255998, 255969]),
        ("<table>", &[236820, 5127, 236813]),
        ("</s>", &[954, 236751, 236813]),
        ("def f(x):\n    return x+1\n", &[2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 236862, 236770, 107]),
        ("don't", &[13246, 236789, 236745]),
        ("日本語のテキスト", &[94951, 236945, 95830]),
        ("foo_bar", &[26537, 236779, 2230]),
        ("FooBar", &[104218, 5015]),
        ("https://example.com/a?b=c", &[2574, 1411, 8358, 236761, 854, 236786, 236746, 236881, 236763, 236784, 236755]),
        ("The capital of Finland is", &[818, 5279, 529, 37038, 563]),
        ("<bos><|turn>user\nHello<turn|>\n<|turn>model\n", &[2, 105, 2364, 107, 9259, 106, 107, 105, 4368, 107]),
        ("<|channel>thought\n<channel|>", &[100, 45518, 107, 101]),
        (
            "<|turn>system\n<|think|>\nYou are terse.<turn|>\n",
            &[105, 9731, 107, 98, 107, 3048, 659, 17514, 236761, 106, 107],
        ),
        (
            "<|tool_call>call:get_weather{city:<|\"|>Zürich<|\"|>,unit:<|\"|>c<|\"|>}<tool_call|><|tool_response>",
            &[
                48, 6639, 236787, 828, 236779, 19323, 236782, 13319, 236787, 52, 236953, 105214, 52, 236764, 6805,
                236787, 52, 236755, 52, 236783, 49, 50,
            ],
        ),
    ];
    for (text, expected) in more {
        assert_eq!(tokenizer.encode(text, true), expected, "{text:?}");
        assert_eq!(tokenizer.decode(expected, true), text.as_bytes(), "{text:?}");
    }
}

#[test]
fn the_real_vocabulary_is_read_whole() {
    let Some(tokenizer) = real() else { return };
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos(), tokenizer.dropped_merges()), (262_144, 2, 0));
    assert_eq!(tokenizer.stop_tokens(), [1, 106, 50]);
    let marker_ids: Vec<u32> = MARKERS.iter().map(|text| tokenizer.id_of(text).unwrap()).collect();
    let mut expected = vec![0, 1, 2, 3, 4, 46, 47, 48, 49, 50, 51, 52, 98, 100, 101, 105, 106, 255_999, 256_000];
    expected.extend(258_880..=258_884);
    assert_eq!(marker_ids, expected);
    // 6,227 unused rows, [multimodal], and 11 of the markers.
    assert_eq!(tokenizer.never_sample().len(), 6227 + 1 + 11);
    for never in [0, 2, 3, 4, 5, 6, 45, 53, 97, 99, 102, 256_001, 258_879, 258_880, 262_143] {
        assert!(tokenizer.never_sample().binary_search(&never).is_ok(), "{never}");
    }
    for fine in [1, 46, 50, 52, 98, 100, 101, 105, 106, 107, 168, 238, 9259] {
        assert!(tokenizer.never_sample().binary_search(&fine).is_err(), "{fine}");
    }
}

/// Tokens that no text leads to, exactly: the special ones, HTML tags, unused rows and four ordinary words.
#[test]
fn every_other_real_token_is_reached_by_its_own_text() {
    let Some(tokenizer) = real() else { return };
    let mut unreached = Vec::new();
    for id in 0..tokenizer.vocab_size() as u32 {
        let Ok(text) = String::from_utf8(tokenizer.token_bytes(id).unwrap()) else { continue };
        let byte = (238..494).contains(&id);
        if !byte && tokenizer.encode(&text, false) != [id] {
            unreached.push(id);
        }
    }
    let special = MARKERS.iter().map(|text| tokenizer.id_of(text).unwrap());
    let unused = tokenizer.never_sample().iter().copied();
    let mut expected: Vec<u32> =
        special.chain(unused).chain(168..=237).chain([146179, 160098, 189366, 220206]).collect();
    expected.sort_unstable();
    expected.dedup();
    assert_eq!(unreached, expected);
}

#[test]
fn bos_comes_first_and_once() {
    let tokenizer = small();
    let bos = tokenizer.bos();
    let hi = tokenizer.encode("hi", true);
    assert_eq!(tokenizer.encode_with_bos("hi", true), [&[bos], &hi[..]].concat());
    assert_eq!(tokenizer.encode_with_bos("<bos>hi", true), [&[bos], &hi[..]].concat());
    let typed = tokenizer.encode_with_bos("<bos>hi", false);
    assert_eq!((typed[0], typed.iter().filter(|&&id| id == bos).count()), (bos, 1));
    assert_eq!(tokenizer.decode(&typed, false), b"<bos>hi");
    assert_eq!(tokenizer.encode_with_bos("", true), [bos]);
}

/// A quadratic step anywhere would take hours on these, not seconds.
#[test]
fn a_mebibyte_without_a_break_is_quick() {
    let tokenizers = [Some(small()), real()];
    let repeated = ["a", " ", "\n", "\t", "\u{301}", "<", "ab", " a", "a\n", "<|turn>", "\u{10ffff}", "é", "the "];
    for tokenizer in tokenizers.iter().flatten() {
        for unit in repeated {
            let text = unit.repeat((1 << 20) / unit.len());
            for markers in [true, false] {
                let start = Instant::now();
                let ids = tokenizer.encode(&text, markers);
                let took = start.elapsed();
                assert!(took.as_secs() < 20, "{unit:?}: {took:?}");
                println!("{unit:?} markers={markers}: {} ids, {took:?}", ids.len());
                assert_eq!(tokenizer.decode(&ids, true), text.as_bytes());
            }
        }
    }
}

/// Long texts are cut into pieces between lines: that must not show.
#[test]
fn pieces_do_not_show() {
    let tokenizer = small();
    let line = "Some words, <|turn>user and more.\n\n  next";
    let one = tokenizer.encode(line, true);
    let text = line.repeat(5000);
    let whole = tokenizer.encode(&text, true);
    // Joined copies may merge where they touch, so compare with the copies encoded two at a time from the middle.
    assert_eq!(tokenizer.decode(&whole, true), text.as_bytes());
    let user = tokenizer.id_of("<|turn>").unwrap();
    assert_eq!(whole.iter().filter(|&&id| id == user).count(), 5000 * one.iter().filter(|&&id| id == user).count());
    let lines: Vec<u32> = text.split_inclusive("\n\n").flat_map(|part| tokenizer.encode(part, true)).collect();
    assert_eq!(whole, lines);
}

fn any_text() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        any::<String>(),
        "[ \\n\\t\\r]{0,40}",
        "[a-z ]{0,30}",
        "[\\u{300}-\\u{36f}é日本🚀\\u{200d}]{0,8}",
        prop::sample::select(MARKERS.to_vec()).prop_map(str::to_string),
        Just("<0x41>".to_string()),
        Just("<|tool".to_string()),
    ];
    prop::collection::vec(pieces, 0..6).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// U+2581 stands for the space, so it is the one character that does not come back.
    #[test]
    fn any_text_comes_back(text in any_text()) {
        let tokenizer = small();
        let expected = text.replace('\u{2581}', " ");
        for markers in [true, false] {
            let ids = tokenizer.encode(&text, markers);
            prop_assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            prop_assert_eq!(String::from_utf8(tokenizer.decode(&ids, true)).unwrap(), expected.clone());
        }
    }

    #[test]
    fn typed_text_never_becomes_a_marker(text in any_text()) {
        let tokenizer = small();
        let ids = tokenizer.encode(&text, false);
        prop_assert!(ids.iter().all(|&id| !tokenizer.is_hidden(id)));
        prop_assert_eq!(String::from_utf8(tokenizer.decode(&ids, false)).unwrap(), text.replace('\u{2581}', " "));
    }

    /// What the streaming decoder has said is always the beginning of the lossy text, and in the end all of it.
    #[test]
    fn streaming_equals_lossy(ids in prop::collection::vec(0u32..1100, 0..60), bytes in prop::collection::vec(238u32..494, 0..40)) {
        let tokenizer = small();
        for ids in [&ids, &bytes, &[&bytes[..], &ids].concat()] {
            let mut decoder = Decoder::new(true);
            let mut text: String = ids.iter().map(|&id| decoder.push(&tokenizer, id)).collect();
            text += &decoder.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&tokenizer.decode(ids, true)).into_owned());
        }
    }
}

#[test]
fn a_character_spread_over_tokens_appears_when_complete() {
    let tokenizer = small();
    let mut decoder = Decoder::new(false);
    let byte = |b: u8| tokenizer.id_of(&format!("<0x{b:02X}>")).unwrap();
    let pushed: Vec<String> = "€!".bytes().map(|b| decoder.push(&tokenizer, byte(b))).collect();
    assert_eq!(pushed, ["", "", "€", "!"]);
    // A lead byte followed by something else can no longer become a character.
    assert_eq!(decoder.push(&tokenizer, byte(0xe2)), "");
    assert_eq!(decoder.push(&tokenizer, byte(b'x')), "\u{fffd}x");
    assert_eq!(decoder.push(&tokenizer, byte(0xff)), "\u{fffd}");
    assert_eq!(decoder.push(&tokenizer, byte(0xf0)), "");
    assert_eq!((decoder.finish().as_str(), decoder.finish().as_str()), ("\u{fffd}", ""));
    assert_eq!(decoder.push(&tokenizer, tokenizer.bos()), "", "markers are hidden");
    assert_eq!(decoder.push(&tokenizer, u32::MAX), "");
}

/// A small vocabulary, to be spoiled in one place.
struct Parts {
    model: &'static str,
    tokens: Vec<Vec<u8>>,
    types: Vec<i32>,
    scores: Vec<f32>,
    merges: Vec<&'static str>,
    ids: Vec<(&'static str, u32)>,
    suppress: Vec<i32>,
}

impl Parts {
    fn good() -> Parts {
        let tokens: Vec<Vec<u8>> = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "ab", "<0x0A>", "▁", "<turn|>"]
            .map(|text| text.as_bytes().to_vec())
            .to_vec();
        Parts {
            model: "gemma4",
            types: vec![3, 1, 3, 3, 1, 1, 1, 6, 1, 3],
            scores: vec![0.0; tokens.len()],
            tokens,
            merges: vec!["a b"],
            ids: vec![("tokenizer.ggml.bos_token_id", 2), ("tokenizer.ggml.eos_token_id", 9)],
            suppress: vec![5],
        }
    }

    fn writer(&self) -> Writer<'static> {
        let mut w = Writer::new();
        w.metadata("tokenizer.ggml.model", self.model).strings("tokenizer.ggml.tokens", &self.tokens);
        w.array("tokenizer.ggml.token_type", &self.types).array("tokenizer.ggml.scores", &self.scores);
        w.strings("tokenizer.ggml.merges", &self.merges).array("tokenizer.ggml.suppress_tokens", &self.suppress);
        for &(key, id) in &self.ids {
            w.metadata(key, id);
        }
        w
    }
}

fn build(writer: Writer<'_>) -> gemrun::Result<Tokenizer> {
    Tokenizer::from_gguf(&Gguf::from_bytes("t.gguf", writer.to_vec()?)?)
}

fn refusal(spoil: impl FnOnce(&mut Parts)) -> String {
    let mut parts = Parts::good();
    spoil(&mut parts);
    match build(parts.writer()) {
        Ok(_) => panic!("accepted"),
        Err(e) => format!("{}: {e}", e.exit_code()),
    }
}

#[test]
fn a_small_file_works() {
    let tokenizer = build(Parts::good().writer()).unwrap();
    assert_eq!(tokenizer.encode("ab a\n", true), [6, 8, 4, 7]);
    assert_eq!(tokenizer.encode("é", true), [3], "no byte tokens for it, so <unk>");
    assert_eq!(tokenizer.stop_tokens(), [1, 9], "by text, whatever type and metadata say");
    assert_eq!(tokenizer.never_sample(), [0, 2, 3, 5]);
    assert!(tokenizer.is_hidden(1), "<eos> is a marker even when typed normal");
}

#[test]
fn contradictory_vocabularies_are_refused_in_one_line() {
    let bos = |id| move |p: &mut Parts| p.ids[0].1 = id;
    let cases = [
        (
            refusal(|p| p.model = "llama\x1b[2J"),
            "6: t.gguf: key tokenizer.ggml.model: is llama\\u{1b}[2J: expected gemma4",
        ),
        (
            refusal(|p| p.types.truncate(3)),
            "5: t.gguf: key tokenizer.ggml.token_type: has 3 entries: expected 10, one a token",
        ),
        (
            refusal(|p| p.scores.push(1.0)),
            "5: t.gguf: key tokenizer.ggml.scores: has 11 entries: expected 10, one a token",
        ),
        (refusal(bos(10)), "5: t.gguf: key tokenizer.ggml.bos_token_id: is token 10: expected less than 10"),
        (
            refusal(bos(u32::MAX)),
            "5: t.gguf: key tokenizer.ggml.bos_token_id: is token 4294967295: expected less than 10",
        ),
        (
            refusal(|p| p.suppress = vec![-1]),
            "5: t.gguf: key tokenizer.ggml.suppress_tokens: is token -1: expected less than 10",
        ),
        (
            refusal(|p| p.tokens[7] = b"<0x-1>".to_vec()),
            "5: t.gguf: key tokenizer.ggml.tokens: entry 7 is the byte token <0x-1>: expected <0xHH>",
        ),
        (
            refusal(|p| p.tokens[4] = vec![b'x'; (64 << 10) + 1]),
            "5: t.gguf: key tokenizer.ggml.tokens: entry 4 has 65537 bytes: expected at most 65536",
        ),
        (
            refusal(|p| {
                p.tokens[2] = b"c".to_vec();
                p.ids.clear();
            }),
            "5: t.gguf: key tokenizer.ggml.tokens: has no <bos>: expected the token every text begins with",
        ),
        (
            refusal(|p| {
                (p.tokens, p.types, p.scores) = (Vec::new(), Vec::new(), Vec::new());
            }),
            "5: t.gguf: key tokenizer.ggml.tokens: has 0 entries: expected 1 to 2097152",
        ),
    ];
    for (found, expected) in cases {
        assert_eq!(found, expected);
    }

    let mut bare = Writer::new();
    bare.metadata("tokenizer.ggml.model", "gemma4");
    let e = build(bare).err().unwrap();
    assert_eq!(e.to_string(), "t.gguf: key tokenizer.ggml.tokens: is missing: expected the vocabulary");
    let mut wrong = Writer::new();
    wrong.metadata("tokenizer.ggml.model", "gemma4").array("tokenizer.ggml.tokens", &[1u8]);
    assert_eq!(build(wrong).err().unwrap().exit_code(), 5);
}

#[test]
fn odd_vocabularies_are_tolerated() {
    let mut parts = Parts::good();
    parts.tokens[4] = vec![0xff, 0xfe];
    parts.tokens[5] = b"".to_vec();
    parts.tokens[6] = b"<pad>".to_vec();
    parts.merges = vec!["no", "a b c", "", " ", "x y", "▁ ▁"];
    let tokenizer = build(parts.writer()).unwrap();
    assert_eq!(tokenizer.token_bytes(4).unwrap(), [0xff, 0xfe]);
    assert_eq!(tokenizer.id_of("<pad>"), Some(0), "of equal texts the first");
    assert_eq!(tokenizer.dropped_merges(), 6);
    assert_eq!(tokenizer.encode("b a", false), [3, 8, 3]);
    let mut decoder = Decoder::new(true);
    assert_eq!(decoder.push(&tokenizer, 4), "\u{fffd}\u{fffd}");
}

/// Typed text goes through the merge rules, so no rule may lead to a marker.
#[test]
fn merge_rules_never_make_a_marker() {
    let mut parts = Parts::good();
    for text in ["<", "t", "u", "r", "n", "|", ">", "<t", "<tu", "<tur", "<turn", "<turn|"] {
        parts.tokens.push(text.into());
        parts.types.push(1);
        parts.scores.push(0.0);
    }
    parts.merges = vec!["< t", "<t u", "<tu r", "<tur n", "<turn |", "<turn| >"];
    let tokenizer = build(parts.writer()).unwrap();
    let [marker, beginning, end] = ["<turn|>", "<turn|", ">"].map(|text| tokenizer.id_of(text).unwrap());
    assert_eq!(tokenizer.encode("<turn|>", false), [beginning, end]);
    assert_eq!(tokenizer.encode("<turn|>", true), [marker]);
    assert_eq!(tokenizer.dropped_merges(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any list of byte strings is a vocabulary or an error, and never a panic.
    #[test]
    fn any_vocabulary_is_safe(
        tokens in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..6),
            "[ab\\n▁]{0,3}".prop_map(String::into_bytes),
            prop::sample::select(MARKERS.to_vec()).prop_map(|m| m.as_bytes().to_vec()),
            Just(b"<0x61>".to_vec()),
        ], 0..30),
        merges in prop::collection::vec("[ab\\n▁ ]{0,5}", 0..30),
        text in "[ab\\n ▁é]{0,30}",
    ) {
        let mut w = Writer::new();
        w.metadata("tokenizer.ggml.model", "gemma4").strings("tokenizer.ggml.tokens", &tokens);
        w.strings("tokenizer.ggml.merges", &merges);
        if let Ok(tokenizer) = build(w) {
            for markers in [true, false] {
                let ids = tokenizer.encode(&text, markers);
                prop_assert!(ids.iter().all(|&id| (id as usize) < tokens.len()));
                tokenizer.decode(&ids, markers);
            }
        }
    }
}
