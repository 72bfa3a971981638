//! JSON schemas as sets of tokens, by the `llguidance` crate.
//!
//! The crate turns a schema into a grammar over bytes and walks it along a tree of the vocabulary's tokens. Here it is
//! given the vocabulary: markers end an answer or are no text at all, and tokens that are never sampled do not exist.
//! White space is one space behind each comma and colon and none elsewhere: a model that is kept from saying what it
//! wants fills the time with space, if it may. For the same reason numbers have no more digits than they need.

use std::fmt;
use std::sync::Arc;

use llguidance::api::{StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory, panic_utils};
use serde_json::{Value, json};

use crate::tokenizer::Tokenizer;
use crate::{Error, Kind, Result};

/// Longer tokens are not offered; Gemma's longest is 93 bytes, and the tree holds no more than 1024.
const MAX_TOKEN_BYTES: usize = 255;

/// Digits of a number in a row, and those of its exponent: enough for every 64-bit integer, and for `f64` to hold it.
const MAX_DIGITS: usize = 20;
const MAX_EXPONENT: usize = 2;

/// A schema, ready for any number of answers.
#[derive(Clone)]
pub struct Schema(Arc<Start>);

struct Start {
    matcher: Matcher,
    vocabulary: TokEnv,
    /// Tokens that begin with a digit.
    digits: Vec<u32>,
    source: Value,
}

impl fmt::Debug for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Schema({})", self.0.source)
    }
}

impl Schema {
    /// Compiles `schema` for the vocabulary of `tokenizer`.
    ///
    /// # Errors
    /// `Usage` for what is no schema, allows no value, or has keywords that cannot be enforced.
    pub fn new(tokenizer: &Tokenizer, schema: &Value) -> Result<Schema> {
        let mut grammar = match schema {
            Value::Object(_) => schema.clone(),
            Value::Bool(true) => json!({}),
            _ => return Err(Error::usage("schema: expected a JSON object")),
        };
        let options = JsonCompileOptions {
            item_separator: ", ".into(),
            key_separator: ": ".into(),
            whitespace_flexible: false,
            ..JsonCompileOptions::default()
        };
        options.apply_to(&mut grammar);
        let vocabulary = vocabulary(tokenizer)?;
        // The crate's own guard against its own bugs: a schema comes from a file.
        let compiled = panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut factory = ParserFactory::new_simple(&vocabulary)?;
            factory.quiet().limits_mut().verbose_errors = false;
            let mut matcher = Matcher::new(factory.create_parser(TopLevelGrammar::from_json_schema(grammar)));
            // A schema no value fits, or none this vocabulary can write, is found with the first token.
            matcher.compute_mask().map(|_| matcher)
        }));
        let matcher = compiled.map_err(|e| Error::usage(format!("schema: {}", one_line(&e))))?;
        let tree = vocabulary.tok_trie();
        let begins_with_digit = |&id: &u32| tree.token(id).first().is_some_and(u8::is_ascii_digit);
        let digits = (0..tree.vocab_size() as u32).filter(begins_with_digit).collect();
        Ok(Schema(Arc::new(Start { matcher, vocabulary, digits, source: schema.clone() })))
    }

    /// Any object or array.
    ///
    /// # Errors
    /// `Usage` where the vocabulary cannot write one.
    pub fn any(tokenizer: &Tokenizer) -> Result<Schema> {
        Schema::new(tokenizer, &json!({ "type": ["object", "array"] }))
    }

    /// At the beginning of an answer.
    pub(super) fn begin(&self) -> Answer {
        let start = Arc::clone(&self.0);
        Answer { matcher: start.matcher.deep_clone(), start, begun: false, number: Number::default() }
    }
}

/// One answer as it grows.
pub(super) struct Answer {
    matcher: Matcher,
    start: Arc<Start>,
    begun: bool,
    number: Number,
}

/// Where in a number the text ends.
#[derive(Default)]
struct Number {
    in_string: bool,
    escaped: bool,
    exponent: bool,
    digits: usize,
}

impl Number {
    fn push(&mut self, byte: u8) {
        if self.in_string {
            self.in_string = self.escaped || byte != b'"';
            self.escaped = !self.escaped && byte == b'\\';
            return;
        }
        match byte {
            b'0'..=b'9' => self.digits += 1,
            b'e' | b'E' if self.digits > 0 => (self.exponent, self.digits) = (true, 0),
            b'+' | b'-' if self.exponent => {}
            _ => *self = Number { in_string: byte == b'"', ..Number::default() },
        }
    }

    fn is_full(&self) -> bool {
        !self.in_string && self.digits >= if self.exponent { MAX_EXPONENT } else { MAX_DIGITS }
    }
}

impl Answer {
    /// Whether a token of it has come.
    pub fn begun(&self) -> bool {
        self.begun
    }

    /// Fills `bits` with the tokens that may follow; where the answer may end, stop tokens are among them.
    pub fn allowed(&mut self, bits: &mut Vec<u32>) -> Result<()> {
        let mask: SimpleVob = self.matcher.compute_mask_or_eos().map_err(|e| failed(&e))?;
        bits.clear();
        bits.extend_from_slice(mask.as_slice());
        if self.number.is_full() {
            for &id in &self.start.digits {
                bits[id as usize / 32] &= !(1 << (id % 32));
            }
            if bits.iter().all(|&word| word == 0) {
                bits.copy_from_slice(mask.as_slice()); // the schema asks for more
            }
        }
        Ok(())
    }

    /// Takes a token that [`Answer::allowed`] allowed.
    pub fn push(&mut self, token: u32) -> Result<()> {
        self.begun = true;
        self.start.vocabulary.tok_trie().token(token).iter().for_each(|&byte| self.number.push(byte));
        self.matcher.consume_token(token).map_err(|e| failed(&e))
    }

    /// Whether the answer is whole and cannot go on.
    pub fn done(&self) -> bool {
        self.matcher.is_stopped() && self.matcher.stop_reason() != StopReason::InternalError
    }
}

fn failed(error: &anyhow::Error) -> Error {
    Error::new(Kind::Other, format!("schema: {}: expected a simpler one", one_line(error)))
}

/// The crate's message as our errors are: one line that begins in lower case.
fn one_line(error: &anyhow::Error) -> String {
    let line = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    let mut chars = line.chars();
    chars.next().map_or(String::new(), |first| first.to_lowercase().chain(chars).collect())
}

/// The tree of the vocabulary's tokens.
fn vocabulary(tokenizer: &Tokenizer) -> Result<TokEnv> {
    let mut stops: Vec<u32> = tokenizer.stop_tokens().to_vec();
    // That one asks for a tool; it ends no answer.
    stops.retain(|&id| Some(id) != tokenizer.id_of("<|tool_response>"));
    let Some(&stop) = stops.first() else {
        return Err(Error::usage("schema: the vocabulary has no token that ends an answer: expected one"));
    };
    let words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32)
        .map(|id| match tokenizer.token_bytes(id) {
            // Behind 255, which no text holds, stands what is no text.
            Some(bytes) if stops.contains(&id) => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes.as_slice()].concat(),
            Some(bytes) if bytes.len() <= MAX_TOKEN_BYTES && !tokenizer.is_hidden(id) => bytes,
            _ => Vec::new(),
        })
        .enumerate()
        .map(|(id, word)| if tokenizer.never_sample().binary_search(&(id as u32)).is_ok() { Vec::new() } else { word })
        .collect();
    let tree = TokTrie::from(&TokRxInfo::new(words.len() as u32, stop), &words).with_eos_tokens(&stops);
    Ok(Arc::new(ApproximateTokEnv::new(tree)))
}
