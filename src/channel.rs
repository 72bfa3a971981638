//! Thoughts, tool calls and the answer, told apart in what a model generates.
//!
//! Gemma wraps its thoughts in `<|channel>thought … <channel|>` and calls tools with
//! `<|tool_call>call:name{…}<tool_call|>`; everything else is the answer. [`Channel`] takes the tokens one by one and
//! passes text on as soon as it is certain what it is. Markers are known by their token, so the same characters in
//! ordinary tokens are text, and a vocabulary without the markers makes everything the answer. Markers themselves are
//! never shown, with one exception: a call that cannot be read is kept as it came, as part of the answer.
//!
//! Models stray from the format in the field: calls with `=` for `:`, with JSON's quotes, or with closing brackets
//! missing are read too. Running tools is the caller's business.

use serde_json::{Map, Number, Value};

use crate::tokenizer::{Decoder, Tokenizer};

/// Brackets in brackets in the arguments of a tool call.
const MAX_NESTING: usize = 64;
const THOUGHT: &str = "thought";

/// A piece of what was generated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event<'a> {
    /// More of the answer.
    Answer(&'a str),
    /// More of the thoughts. Whitespace around a block of thoughts is not part of it.
    Thought(&'a str),
    /// The model wants a tool to be run.
    ToolCall {
        /// The tool.
        name: &'a str,
        /// An object, with the keys in the model's order.
        arguments: &'a Value,
    },
}

/// What the next token would be part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The answer.
    Answer,
    /// The word behind `<|channel>`.
    Name,
    /// A thought.
    Thought,
    /// A tool call.
    Call,
}

/// Where in the format the next token stands.
#[derive(Debug, Clone)]
enum State {
    Answer,
    /// Behind `<|channel>`, with the text since, which is a beginning of `thought`. `inside` is the thought this
    /// stands in, if it does.
    Name {
        text: String,
        inside: Option<Block>,
    },
    Thought(Block),
    Call(Raw),
}

/// A block of thoughts.
#[derive(Debug, Clone, Default)]
struct Block {
    /// Whether anything but whitespace has come.
    begun: bool,
    /// Whitespace that belongs to the thought if more of it follows.
    held: String,
}

/// A tool call as it came: the text behind `<|tool_call>`, and where in it the `<|"|>` tokens stand.
#[derive(Debug, Clone, Default)]
struct Raw {
    text: String,
    quotes: Vec<usize>,
}

/// Reads one reply, token by token.
#[derive(Debug, Clone)]
pub struct Channel {
    open: Option<u32>,
    close: Option<u32>,
    call: Option<u32>,
    call_end: Option<u32>,
    quote: Option<u32>,
    decoder: Decoder,
    state: State,
    /// A thought has just ended: line feeds are not yet part of the answer.
    after_thought: bool,
}

impl Channel {
    /// At the beginning of the reply to `prompt`, which may end inside a thought: with `<|channel>thought` and a line
    /// feed.
    pub fn after(tokenizer: &Tokenizer, prompt: &[u32]) -> Channel {
        let open = tokenizer.id_of("<|channel>");
        let opened = prompt.iter().rposition(|&id| Some(id) == open);
        let in_thought = opened.is_some_and(|at| tokenizer.decode(&prompt[at + 1..], true) == b"thought\n");
        Channel {
            open,
            close: tokenizer.id_of("<channel|>"),
            call: tokenizer.id_of("<|tool_call>"),
            call_end: tokenizer.id_of("<tool_call|>"),
            quote: tokenizer.id_of("<|\"|>"),
            decoder: Decoder::new(false),
            state: if in_thought { State::Thought(Block::default()) } else { State::Answer },
            after_thought: false,
        }
    }

    /// Where the next token stands.
    pub fn place(&self) -> Place {
        match self.state {
            State::Answer => Place::Answer,
            State::Name { .. } => Place::Name,
            State::Thought(_) => Place::Thought,
            State::Call(_) => Place::Call,
        }
    }

    /// Takes the next token. `emit` hears of what it completes, often of one piece of text, sometimes of nothing; it
    /// returns true when it wants no more, and then so does this.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32, emit: &mut dyn FnMut(Event) -> bool) -> bool {
        if !tokenizer.is_hidden(id) {
            let text = self.decoder.push(tokenizer, id);
            return self.text(&text, emit);
        }
        let cut = self.decoder.finish(); // no character goes on behind a marker
        let stop = self.text(&cut, emit);
        self.marker(tokenizer, id, emit) || stop
    }

    /// Ends the reply: passes on what was held back. A call without its end is taken if it is whole. As
    /// [`Channel::push`], true if `emit` wanted no more.
    pub fn finish(&mut self, emit: &mut dyn FnMut(Event) -> bool) -> bool {
        let cut = self.decoder.finish();
        let mut stop = self.text(&cut, emit);
        stop |= self.no_name(emit);
        self.leave(false, emit) || stop
    }

    fn marker(&mut self, tokenizer: &Tokenizer, id: u32, emit: &mut dyn FnMut(Event) -> bool) -> bool {
        let stop = self.no_name(emit);
        let marker = Some(id);
        if marker == self.open {
            let (inside, stop) = match std::mem::replace(&mut self.state, State::Answer) {
                State::Thought(block) => (Some(block), stop),
                other => {
                    self.state = other;
                    (None, self.leave(false, emit) || stop)
                }
            };
            self.state = State::Name { text: String::new(), inside };
            return stop;
        }
        match &mut self.state {
            State::Thought(_) if marker != self.close => stop, // only its own marker ends a thought
            State::Thought(_) => {
                self.after_thought = true;
                self.leave(false, emit) || stop
            }
            _ if marker == self.close => self.leave(false, emit) || stop,
            _ if marker == self.call_end => self.leave(true, emit) || stop,
            _ if marker == self.call => {
                let stop = self.leave(false, emit) || stop;
                self.state = State::Call(Raw::default());
                stop
            }
            State::Call(raw) => {
                if marker == self.quote {
                    raw.quotes.push(raw.text.len());
                }
                raw.text.push_str(&String::from_utf8_lossy(&tokenizer.decode(&[id], true)));
                stop
            }
            _ => stop,
        }
    }

    fn text(&mut self, text: &str, emit: &mut dyn FnMut(Event) -> bool) -> bool {
        if text.is_empty() {
            return false;
        }
        match &mut self.state {
            State::Answer => self.answer(text, emit),
            State::Call(raw) => {
                raw.text.push_str(text);
                false
            }
            State::Thought(block) => {
                let text = if block.begun { text } else { text.trim_start() };
                let body = text.trim_end();
                if body.is_empty() {
                    block.held.push_str(text);
                    return false;
                }
                block.begun = true;
                let said = std::mem::take(&mut block.held) + body;
                block.held.push_str(&text[body.len()..]);
                emit(Event::Thought(&said))
            }
            State::Name { text: name, inside } => {
                name.push_str(text);
                if THOUGHT.starts_with(name.as_str()) && name != THOUGHT {
                    return false;
                }
                let Some(rest) = name.strip_prefix(THOUGHT).map(str::to_string) else { return self.no_name(emit) };
                self.state = State::Thought(inside.take().unwrap_or_default());
                self.text(&rest, emit)
            }
        }
    }

    /// What came behind `<|channel>` is not `thought`: it belongs to where the marker stood.
    fn no_name(&mut self, emit: &mut dyn FnMut(Event) -> bool) -> bool {
        let State::Name { text, inside } = &mut self.state else { return false };
        let text = std::mem::take(text);
        self.state = inside.take().map_or(State::Answer, State::Thought);
        self.text(&text, emit)
    }

    fn answer(&mut self, text: &str, emit: &mut dyn FnMut(Event) -> bool) -> bool {
        let text = if self.after_thought { text.trim_start_matches('\n') } else { text };
        if text.is_empty() {
            return false;
        }
        self.after_thought = false;
        emit(Event::Answer(text))
    }

    /// Ends what the state is in; from here on it is the answer. `closed`: by `<tool_call|>`.
    fn leave(&mut self, closed: bool, emit: &mut dyn FnMut(Event) -> bool) -> bool {
        match std::mem::replace(&mut self.state, State::Answer) {
            State::Answer | State::Thought(_) | State::Name { .. } => false,
            State::Call(raw) => match parse(&raw, closed) {
                Some((name, arguments)) => emit(Event::ToolCall { name: &name, arguments: &arguments }),
                None => {
                    let end = if closed { "<tool_call|>" } else { "" };
                    self.answer(&format!("<|tool_call>{}{end}", raw.text), emit)
                }
            },
        }
    }
}

/// The name and the arguments of a call. Brackets may be missing at the end of a `closed` one; the text of one that
/// just ends may have been cut anywhere, so there they may not.
fn parse(raw: &Raw, closed: bool) -> Option<(String, Value)> {
    let (name, rest) = raw.text.trim_start().strip_prefix("call:")?.split_once('{')?;
    let name = name.trim();
    let mut parser = Parser { raw, at: raw.text.len() - rest.len(), closed };
    let arguments = parser.object(MAX_NESTING)?;
    (!name.is_empty() && parser.rest().trim().is_empty()).then(|| (name.to_string(), arguments))
}

const QUOTE: &str = "<|\"|>";

struct Parser<'r> {
    raw: &'r Raw,
    /// Offset of what is not read yet.
    at: usize,
    closed: bool,
}

impl<'r> Parser<'r> {
    fn rest(&self) -> &'r str {
        &self.raw.text[self.at..]
    }

    fn skip_space(&mut self) {
        self.at = self.raw.text.len() - self.rest().trim_start().len();
    }

    fn take(&mut self, text: &str) -> bool {
        let found = self.rest().starts_with(text);
        self.at += if found { text.len() } else { 0 };
        found
    }

    /// Whether a list ends here: with `bracket`, or with the text.
    fn ends(&mut self, bracket: &str) -> bool {
        self.skip_space();
        self.take(bracket) || self.closed && self.rest().is_empty()
    }

    /// The rest of an object whose `{` has been read.
    fn object(&mut self, depth: usize) -> Option<Value> {
        let mut map = Map::new();
        while !self.ends("}") {
            let key = match self.string() {
                Some(key) => key,
                None => {
                    let end = self.at + self.rest().find([':', '=', '}'])?;
                    let key = self.raw.text[self.at..end].trim_end();
                    if self.raw.quotes.iter().any(|quote| (self.at..end).contains(quote)) {
                        return None;
                    }
                    self.at = end;
                    key.to_string()
                }
            };
            self.skip_space();
            if key.is_empty() || !(self.take(":") || self.take("=")) {
                return None;
            }
            map.insert(key, self.value(depth)?);
            self.comma('}')?;
        }
        Some(Value::Object(map))
    }

    /// The rest of a list whose `[` has been read.
    fn array(&mut self, depth: usize) -> Option<Value> {
        let mut items = Vec::new();
        while !self.ends("]") {
            items.push(self.value(depth)?);
            self.comma(']')?;
        }
        Some(Value::Array(items))
    }

    /// The comma between entries; none is needed before `bracket` or the end.
    fn comma(&mut self, bracket: char) -> Option<()> {
        self.skip_space();
        (self.take(",") || self.rest().is_empty() || self.rest().starts_with(bracket)).then_some(())
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        self.skip_space();
        if let Some(text) = self.string() {
            return Some(Value::String(text));
        }
        if self.take("{") {
            return self.object(depth.checked_sub(1)?);
        }
        if self.take("[") {
            return self.array(depth.checked_sub(1)?);
        }
        for (text, value) in [("true", Value::Bool(true)), ("false", Value::Bool(false)), ("null", Value::Null)] {
            if self.take(text) {
                return Some(value);
            }
        }
        let digits = self.rest().find(|c: char| !matches!(c, '0'..='9' | '+' | '-' | '.' | 'e' | 'E'));
        let digits = &self.rest()[..digits.unwrap_or(self.rest().len())];
        self.at += digits.len();
        let number = serde_json::from_str::<Number>(digits).ok()?;
        if number.is_f64() {
            return digits.parse().ok().and_then(Number::from_f64).map(Value::Number); // to the last bit, as serde_json is not
        }
        Some(Value::Number(number))
    }

    /// A string between two `<|"|>` tokens, or one of JSON. Nothing is read where there is none.
    fn string(&mut self) -> Option<String> {
        let quotes = &self.raw.quotes;
        if let Ok(i) = quotes.binary_search(&self.at) {
            let begin = self.at + QUOTE.len();
            let end = *quotes.get(i + 1)?;
            self.at = end + QUOTE.len();
            return Some(self.raw.text[begin..end].to_string());
        }
        if !self.rest().starts_with('"') {
            return None;
        }
        let mut stream = serde_json::Deserializer::from_str(self.rest()).into_iter::<String>();
        let text = stream.next()?.ok()?;
        self.at += stream.byte_offset();
        Some(text)
    }
}
