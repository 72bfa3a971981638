//! The vocabulary: from `tokenizer.json` to the keys of a GGUF file, and the texts that go with it.
//!
//! Gemma 4's tokenizer replaces spaces by U+2581, splits at marker tokens and merges characters by rank, with a token for each
//! byte to fall back on. A GGUF file says nothing of all that but "gemma4", so a tokenizer that works otherwise is refused.
//! Token types are those of the published files, by text: seven markers are "user-defined", so that programs show
//! them to whoever parses tool calls; the others are "control".

use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::json::{self, Json};
use crate::gguf::write::Writer;
use crate::tokenizer::MARKERS;
use crate::{Error, Kind, Result};

const TOKENIZER: &str = "tokenizer.json";
/// Gemma's has 33 MB.
const MAX_TOKENIZER: u64 = 256 << 20;
/// Readers refuse longer texts.
const MAX_TEMPLATE: u64 = 1 << 20;

/// `token_type` of a GGUF file.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Markers that a reader of the model's output wants to see.
const SHOWN: [&str; 7] =
    ["<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|\"|>", "<|channel>", "<channel|>"];

/// What a token without a text is called; nothing encodes to it.
const SCORE: f32 = -1000.0;

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    vocab: Entries<u32>,
    merges: Vec<Merge>,
}

/// A merge rule as newer and as older files write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

/// An object's entries in the order of the file, repeated keys and all.
struct Entries<V>(Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Entries<V>, D::Error> {
        struct Collect<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Collect<V> {
            type Value = Entries<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries<V>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        from.deserialize_map(Collect(PhantomData))
    }
}

/// Adds tokenizer, chat template and sampling defaults of `folder` to `writer`, for a model with embeddings of `vocab` tokens.
/// Returns what people should know.
///
/// # Errors
/// `NotFound` without tokenizer.json, `Unsupported` for one of another kind, `Invalid` for one that contradicts itself.
pub(super) fn write(folder: &Path, vocab: usize, writer: &mut Writer) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    let generation = json::load(folder, "generation_config.json")?;
    let settings = json::load(folder, "tokenizer_config.json")?;
    tokens(folder, vocab, settings.as_ref(), writer, &mut notes)?;
    if let Some(generation) = &generation {
        sampling(&Json::of("generation_config.json", generation), vocab, writer)?;
    }
    match template(folder, settings.as_ref())? {
        Some(template) => {
            writer.metadata("tokenizer.chat_template", template.as_str());
        }
        None => notes.push(format!("{}: no chat template: the file gets none", folder.display())),
    }
    Ok(notes)
}

fn tokens(
    folder: &Path,
    vocab: usize,
    settings: Option<&Value>,
    writer: &mut Writer,
    notes: &mut Vec<String>,
) -> Result<()> {
    let bytes = json::read(folder, TOKENIZER, MAX_TOKENIZER)?.ok_or_else(|| {
        Error::new(Kind::NotFound, format!("{}: no {TOKENIZER}: expected the vocabulary", folder.display()))
    })?;
    let invalid = |what: String| Error::invalid(format!("{TOKENIZER}: {what}"));
    let file: File = serde_json::from_slice(&bytes).map_err(|e| invalid(format!("is no tokenizer: {e}")))?;
    drop(bytes);
    let other = |what: &str| Error::unsupported(format!("{TOKENIZER}: {what}: expected Gemma 4's tokenizer"));
    if file.model.kind != "BPE" {
        return Err(other(&format!("model.type: {}", file.model.kind)));
    }
    if !file.model.byte_fallback || file.model.ignore_merges {
        return Err(other("model: without byte_fallback or with ignore_merges"));
    }
    if file.normalizer != serde_json::json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}) {
        return Err(other("normalizer: does not replace each space by U+2581 and nothing else"));
    }

    let mut tokens: Vec<Option<(&str, i32)>> = vec![None; vocab];
    let plain = file.model.vocab.0.iter().map(|(text, id)| (text.as_str(), *id, None));
    let added = file.added_tokens.iter().map(|added| (added.content.as_str(), added.id, Some(added.special)));
    for (text, id, special) in plain.chain(added) {
        let slot = tokens.get_mut(id as usize).ok_or_else(|| {
            invalid(format!("token {text}: id {id}: expected less than {vocab}, the rows of the embedding table"))
        })?;
        if let Some((first, _)) = slot.filter(|(first, _)| *first != text) {
            return Err(invalid(format!("tokens {first} and {text}: both have id {id}: expected one text an id")));
        }
        let kind = match special {
            _ if SHOWN.contains(&text) => USER_DEFINED,
            _ if MARKERS.contains(&text) => CONTROL,
            Some(true) => CONTROL,
            _ if is_byte(text) => BYTE,
            _ => NORMAL,
        };
        *slot = Some((text, kind));
    }
    let missing = tokens.iter().filter(|token| token.is_none()).count();
    if missing > 0 {
        notes.push(format!("{TOKENIZER}: {missing} of {vocab} ids have no token: they get names such as [PAD0]"));
    }
    // Those that are not special are pieces of text (runs of spaces, tags), which merges make or do not make.
    let special = file.added_tokens.iter().filter(|added| added.special).map(|added| added.content.as_str());
    let foreign: Vec<&str> = special.filter(|text| !MARKERS.contains(text)).collect();
    if let Some(first) = foreign.first() {
        let count = foreign.len();
        notes.push(format!(
            "{TOKENIZER}: {count} added tokens that Gemma 4 does not have, such as {first}: their texts are encoded as plain text"
        ));
    }
    let names =
        |id: usize, token: &Option<(&str, i32)>| token.map_or(format!("[PAD{id}]"), |(text, _)| text.to_string());
    writer.metadata("tokenizer.ggml.model", "gemma4");
    writer.strings("tokenizer.ggml.tokens", tokens.iter().enumerate().map(|(id, token)| names(id, token)));
    writer.array("tokenizer.ggml.scores", &vec![SCORE; vocab]);
    let types: Vec<i32> = tokens.iter().map(|token| token.map_or(UNUSED, |(_, kind)| kind)).collect();
    writer.array("tokenizer.ggml.token_type", &types);

    let mut lines = Vec::with_capacity(file.model.merges.len());
    for (rank, merge) in file.model.merges.iter().enumerate() {
        let line = match merge {
            Merge::Pair(left, right) => format!("{left} {right}"),
            Merge::Line(line) => line.clone(),
        };
        // In a GGUF file a space parts the two sides.
        if line.matches(' ').count() != 1 || line.starts_with(' ') || line.ends_with(' ') {
            return Err(invalid(format!("model.merges.{rank}: {line}: expected two texts without spaces")));
        }
        lines.push(line);
    }
    writer.strings("tokenizer.ggml.merges", &lines);

    for (key, setting, usual) in [
        ("bos", "bos_token", "<bos>"),
        ("eos", "eos_token", "<eos>"),
        ("unknown", "unk_token", "<unk>"),
        ("padding", "pad_token", "<pad>"),
        ("mask", "mask_token", "<mask>"),
    ] {
        // Text, or an object with the text as its content.
        let own = settings.and_then(|settings| settings.get(setting));
        let text = own.and_then(|own| own.get("content").unwrap_or(own).as_str()).unwrap_or(usual);
        let id = tokens.iter().position(|token| token.is_some_and(|(token, _)| token == text));
        if let Some(id) = id.and_then(|id| u32::try_from(id).ok()) {
            writer.metadata(&format!("tokenizer.ggml.{key}_token_id"), id);
        } else if key == "bos" {
            return Err(invalid(format!("no token {text}: expected the one every text begins with")));
        }
    }
    writer.metadata("tokenizer.ggml.add_space_prefix", false);
    writer.metadata("tokenizer.ggml.add_bos_token", true);
    Ok(())
}

/// `<0x0A>`.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// What the model's makers sample with, and what they never do.
fn sampling(generation: &Json, vocab: usize, writer: &mut Writer) -> Result<()> {
    if let Some(k) = generation.get("top_k") {
        let k = k.uint(0, i32::MAX as usize)?;
        writer.metadata("general.sampling.top_k", i32::try_from(k).unwrap_or(i32::MAX));
    }
    if let Some(p) = generation.get("top_p") {
        writer.metadata("general.sampling.top_p", p.positive()?);
    }
    if let Some(t) = generation.get("temperature") {
        writer.metadata("general.sampling.temp", t.positive()?);
    }
    if let Some(ids) = generation.get("suppress_tokens") {
        let ids = ids.list()?.iter().map(|id| id.uint(0, vocab.saturating_sub(1))).collect::<Result<Vec<_>>>()?;
        let ids: Vec<i32> = ids.into_iter().filter_map(|id| i32::try_from(id).ok()).collect();
        writer.array("tokenizer.ggml.suppress_tokens", &ids);
    }
    Ok(())
}

/// The chat template: a file of its own, or a text (or a list of named ones) among the tokenizer's settings.
fn template(folder: &Path, settings: Option<&Value>) -> Result<Option<String>> {
    const FILE: &str = "chat_template.jinja";
    if let Some(bytes) = json::read(folder, FILE, MAX_TEMPLATE)? {
        let text = String::from_utf8(bytes);
        return text.map(Some).map_err(|_| Error::invalid(format!("{FILE}: is not UTF-8: expected text")));
    }
    let Some(own) = settings.and_then(|settings| settings.get("chat_template")) else { return Ok(None) };
    let named = |list: &Vec<Value>| {
        let usual = list.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
        Some(usual?.get("template")?.as_str()?.to_string())
    };
    let text = own.as_str().map(str::to_string).or_else(|| own.as_array().and_then(named));
    match text {
        Some(text) if text.len() as u64 <= MAX_TEMPLATE => Ok(Some(text)),
        _ => Err(Json::of("tokenizer_config.json", settings.unwrap_or(&Value::Null))
            .need("chat_template")?
            .wrong("a text of at most 1 MiB, or a list with one named default")),
    }
}
