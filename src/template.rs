//! Chat templates: a conversation as the text, or the tokens, that the model expects.
//!
//! The file's own Jinja template is rendered; a file without one gets the canonical format of its model family. The
//! source comes out of a downloaded file, so it runs on a meter ([`machine`]): a template that loops, recurses or
//! prints without end costs one error line.
//!
//! [`Template::encode`] is the way to the model. What people and tools wrote never becomes a marker token there: before
//! rendering, a private character is put behind each `<` of the messages that could begin a marker; after the rendered
//! text has been split at the markers that are left, which are the template's own, it is taken out again. Messages
//! without such a `<` are not touched at all. Earlier replies of the model lose their `<|channel>…<channel|>` spans
//! first, as the format wants it; what they contain after that is plain text too. [`Template::render`] shows the text
//! as the template prints it, for people to read.

mod machine;

use minijinja::value::Serde;
use serde_json::{Map, Value, json};

use crate::error::{Error, Kind, Result};
use crate::gguf::Gguf;
use crate::tokenizer::{MARKERS, Tokenizer};
use machine::{Failure, Limits};

/// The canonical format; it takes `large` (12B and up) as a variable.
const CANONICAL: &str = include_str!("template/canonical.jinja");
/// Published templates have 12 to 19 KB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Lists in lists of messages and tools. JSON files cannot nest deeper than 128 anyway.
const MAX_NESTING: usize = 64;
/// Compiling, rendering and freeing recurse as deep as the limits allow: that happens on a thread of its own, whatever
/// the caller has left. Only what is used of the stack becomes memory.
const STACK_BYTES: usize = 64 << 20;

/// A chat template, checked for syntax.
#[derive(Debug, Clone)]
pub struct Template {
    file: String,
    source: String,
    large: bool,
}

/// What a conversation is rendered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// End with the beginning of the model's turn.
    pub add_generation_prompt: bool,
    /// Let the model think before it answers.
    pub enable_thinking: bool,
    /// Keep the thoughts of earlier turns that called tools.
    pub preserve_thinking: bool,
}

impl Default for Options {
    /// A reply, without thinking.
    fn default() -> Options {
        Options { add_generation_prompt: true, enable_thinking: false, preserve_thinking: false }
    }
}

impl Template {
    /// The template in `gguf`, or the canonical one where there is none: that of E2B and E4B for a file with
    /// per-layer embeddings, that of the large models otherwise.
    ///
    /// # Errors
    /// `Invalid` when the source is too long, not UTF-8 or not Jinja.
    pub fn from_gguf(gguf: &Gguf) -> Result<Template> {
        const KEY: &str = "tokenizer.chat_template";
        let small = match gguf.string("general.architecture")? {
            Some(name) => gguf.uint(&format!("{name}.embedding_length_per_layer_input"))?.unwrap_or(0) > 0,
            None => false,
        };
        match gguf.string(KEY)? {
            // `large` is for the canonical format in a file; other templates do not know it.
            Some(source) if !source.is_empty() => {
                let template = Template::new(&format!("{}: key {KEY}", gguf.name()), source)?;
                Ok(Template { large: !small, ..template })
            }
            _ => Ok(Template::canonical(!small)),
        }
    }

    /// A template from its source; `name` stands in front of errors.
    ///
    /// # Errors
    /// `Invalid` when the source is longer than 1 MiB or not Jinja.
    pub fn new(name: &str, source: &str) -> Result<Template> {
        if source.len() > MAX_SOURCE_BYTES {
            let bytes = source.len();
            return Err(Error::invalid(format!("{name}: has {bytes} bytes: expected at most {MAX_SOURCE_BYTES}")));
        }
        let template = Template { file: name.to_string(), source: source.to_string(), large: true };
        template.on_own_stack(|| machine::check(source))?;
        Ok(template)
    }

    /// The canonical format of the large models, or of E2B and E4B.
    pub fn canonical(large: bool) -> Template {
        Template { file: "canonical chat template".into(), source: CANONICAL.into(), large }
    }

    /// The source of the template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation. `messages` and `tools` are in OpenAI's form; arguments of tool calls that are JSON
    /// in a string are unpacked first.
    ///
    /// # Errors
    /// `Usage` when the template refuses the messages; `Invalid`, with the line in the template, when it is broken or
    /// wants more time or memory than a conversation of this size can need.
    pub fn render(&self, messages: &[Value], tools: &[Value], options: Options) -> Result<String> {
        self.render_values(prepare(messages)?, prepare(tools)?, options)
    }

    /// The tokens of a conversation, beginning with BOS. Marker texts in messages and tools stay plain text.
    ///
    /// # Errors
    /// As [`Template::render`].
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Value],
        tools: &[Value],
        options: Options,
    ) -> Result<Vec<u32>> {
        let (mut messages, mut tools) = (prepare(messages)?, prepare(tools)?);
        messages.iter_mut().for_each(drop_thoughts);
        let shield = self.shield(messages.iter().chain(&tools))?;
        messages.iter_mut().chain(&mut tools).for_each(|value| for_each_text(value, &mut |text| protect(text, shield)));
        let text = self.render_values(messages, tools, options)?;

        let mut ids = Vec::new();
        for (i, part) in split_at_markers(&text, tokenizer).into_iter().enumerate() {
            match part {
                Part::Marker(id) if i == 0 && id == tokenizer.bos() => {}
                Part::Marker(id) => ids.push(id),
                Part::Text(text) if text.contains(shield) => {
                    tokenizer.append(&text.replace(shield, ""), false, &mut ids)
                }
                Part::Text(text) => tokenizer.append(text, false, &mut ids),
            }
        }
        ids.insert(0, tokenizer.bos());
        Ok(ids)
    }

    fn render_values(&self, messages: Vec<Value>, tools: Vec<Value>, options: Options) -> Result<String> {
        let count = messages.len() as u64;
        let mut bytes = 0u64;
        for value in messages.iter().chain(&tools) {
            visit_texts(value, &mut |text| bytes += text.len() as u64);
        }
        let limits = Limits::of_input(count, bytes);
        let variables = json!({
            "messages": messages,
            "tools": if tools.is_empty() { Value::Null } else { Value::Array(tools) },
            "add_generation_prompt": options.add_generation_prompt,
            "enable_thinking": options.enable_thinking,
            "preserve_thinking": options.preserve_thinking,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "large": self.large,
        });
        self.on_own_stack(|| machine::render(&self.source, minijinja::Value::from(Serde(&variables)), limits))
    }

    fn on_own_stack<T: Send>(&self, work: impl FnOnce() -> std::result::Result<T, Failure> + Send) -> Result<T> {
        let done = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("template".into()).stack_size(STACK_BYTES);
            Ok(thread.spawn_scoped(scope, work)?.join())
        });
        match done {
            Ok(Ok(result)) => result.map_err(|failure| match failure {
                Failure::Raised(message) => {
                    Error::usage(format!("{}: refuses the messages: {}", self.file, shortened(&message)))
                }
                Failure::Broken(what, Some(line)) => {
                    Error::invalid(format!("{}: line {line}: {}", self.file, shortened(&what)))
                }
                Failure::Broken(what, None) => Error::invalid(format!("{}: {}", self.file, shortened(&what))),
            }),
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(e) => Err(within_spawn(e)),
        }
    }

    /// A private-use character that occurs nowhere in the template and the conversation.
    fn shield<'v>(&self, values: impl Iterator<Item = &'v Value>) -> Result<char> {
        let private = |c: char| matches!(c, '\u{e000}'..='\u{f8ff}');
        let mut taken: Vec<char> = self.source.chars().filter(|&c| private(c)).collect();
        for value in values {
            visit_texts(value, &mut |text| taken.extend(text.chars().filter(|&c| private(c))));
        }
        taken.sort_unstable();
        ('\u{e000}'..='\u{f8ff}').rev().find(|c| taken.binary_search(c).is_err()).ok_or_else(|| {
            Error::usage("messages: use every private-use character of unicode: expected one to be left over")
        })
    }
}

fn within_spawn(e: std::io::Error) -> Error {
    Error::new(Kind::Other, format!("chat template: cannot start a thread: {e}"))
}

/// The first line of a message, or as much of it as is worth reading.
fn shortened(message: &str) -> String {
    let line = message.trim().lines().next().unwrap_or("no reason given");
    match line.char_indices().nth(300) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line.to_string(),
    }
}

impl Limits {
    /// Generous for any real template: the published ones look at all messages for each message.
    fn of_input(messages: u64, bytes: u64) -> Limits {
        let pairs = messages.saturating_mul(messages);
        let output = (4u64 << 20).max(bytes.saturating_mul(16));
        Limits {
            steps: (1u64 << 21).saturating_add(pairs.saturating_mul(64)).saturating_add(bytes.saturating_mul(4)),
            units: (1u64 << 20).saturating_add(pairs.saturating_mul(64)).saturating_add(bytes.saturating_mul(4)),
            value_units: (1u64 << 17).saturating_add(bytes),
            output: usize::try_from(output).unwrap_or(usize::MAX),
        }
    }
}

/// A copy of `values`, refused when nested too deeply, with JSON arguments of tool calls unpacked.
fn prepare(values: &[Value]) -> Result<Vec<Value>> {
    fn depth(value: &Value, left: usize) -> bool {
        let Some(left) = left.checked_sub(1) else { return false };
        match value {
            Value::Array(items) => items.iter().all(|item| depth(item, left)),
            Value::Object(map) => map.values().all(|item| depth(item, left)),
            _ => true,
        }
    }
    if !values.iter().all(|value| depth(value, MAX_NESTING)) {
        return Err(Error::usage(format!("messages: nested too deeply: expected at most {MAX_NESTING} levels")));
    }
    let mut values = values.to_vec();
    for value in &mut values {
        let calls = value.get_mut("tool_calls").and_then(Value::as_array_mut);
        for call in calls.into_iter().flatten() {
            let Some(arguments) = call.get_mut("function").and_then(|f| f.get_mut("arguments")) else { continue };
            if let Some(text) = arguments.as_str()
                && let Ok(map @ Value::Object(_)) = serde_json::from_str(text)
                && depth(&map, MAX_NESTING)
            {
                *arguments = map;
            }
        }
    }
    Ok(values)
}

/// Takes the thoughts out of an earlier reply: at each `<channel|>` the text is cut, and of each piece everything
/// from its first `<|channel>` on is dropped.
fn drop_thoughts(message: &mut Value) {
    let strip = |text: &mut String| {
        if text.contains("<|channel>") || text.contains("<channel|>") {
            *text = text.split("<channel|>").filter_map(|piece| piece.split("<|channel>").next()).collect();
        }
    };
    if !matches!(message["role"].as_str(), Some("assistant" | "model")) {
        return;
    }
    match message.get_mut("content") {
        Some(Value::String(text)) => strip(text),
        Some(Value::Array(parts)) => {
            for part in parts {
                if let Some(Value::String(text)) = part.get_mut("text") {
                    strip(text);
                }
            }
        }
        _ => {}
    }
}

/// Puts `shield` behind each `<` of `text` that begins a marker, or would if the text went on.
fn protect(text: &mut String, shield: char) {
    let begins_marker = |rest: &str| MARKERS.iter().any(|marker| marker.starts_with(rest) || rest.starts_with(marker));
    let at: Vec<usize> = text.match_indices('<').map(|(at, _)| at).filter(|&at| begins_marker(&text[at..])).collect();
    for at in at.into_iter().rev() {
        text.insert(at + 1, shield);
    }
}

/// Applies `change` to every string and every key.
fn for_each_text(value: &mut Value, change: &mut impl FnMut(&mut String)) {
    match value {
        Value::String(text) => change(text),
        Value::Array(items) => items.iter_mut().for_each(|item| for_each_text(item, change)),
        Value::Object(map) => {
            let old = std::mem::take(map);
            *map = old
                .into_iter()
                .map(|(mut key, mut item)| {
                    change(&mut key);
                    for_each_text(&mut item, change);
                    (key, item)
                })
                .collect::<Map<_, _>>();
        }
        _ => {}
    }
}

fn visit_texts(value: &Value, visit: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => visit(text),
        Value::Array(items) => items.iter().for_each(|item| visit_texts(item, visit)),
        Value::Object(map) => map.iter().for_each(|(key, item)| {
            visit(key);
            visit_texts(item, visit);
        }),
        _ => visit("1234"),
    }
}

enum Part<'t> {
    Marker(u32),
    Text(&'t str),
}

/// `text` cut at every marker the vocabulary has. No marker is the beginning of another, so the order does not matter.
fn split_at_markers<'t>(text: &'t str, tokenizer: &Tokenizer) -> Vec<Part<'t>> {
    let markers: Vec<(&str, u32)> = MARKERS.iter().filter_map(|&m| Some((m, tokenizer.id_of(m)?))).collect();
    let mut parts = Vec::new();
    let mut begin = 0; // of the text not yet handed on
    let mut at = 0;
    while let Some(found) = text[at..].find('<').map(|i| at + i) {
        at = found + 1;
        if let Some((marker, id)) = markers.iter().find(|(marker, _)| text[found..].starts_with(marker)) {
            if begin < found {
                parts.push(Part::Text(&text[begin..found]));
            }
            parts.push(Part::Marker(*id));
            begin = found + marker.len();
            at = begin;
        }
    }
    if begin < text.len() {
        parts.push(Part::Text(&text[begin..]));
    }
    parts
}
