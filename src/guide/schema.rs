//! JSON schemas as sets of tokens, by the `llguidance` crate.
//!
//! The crate turns a schema into a grammar over bytes and walks it along a tree of the vocabulary's tokens. Here it is
//! given the vocabulary: markers end an answer or are no text at all, and tokens that are never sampled do not exist.
//! White space between the tokens of JSON is at most a line feed and a few spaces, so that none goes on for ever.

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
/// White space, where JSON may have any.
const SPACE: &str = r"\n? {1,16}|\n";

/// A schema, ready for any number of answers.
#[derive(Clone)]
pub struct Schema(Arc<Start>);

struct Start {
    matcher: Matcher,
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
        let options = JsonCompileOptions { whitespace_pattern: Some(SPACE.into()), ..JsonCompileOptions::default() };
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
        Ok(Schema(Arc::new(Start { matcher, source: schema.clone() })))
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
        Answer { matcher: self.0.matcher.deep_clone(), begun: false }
    }
}

/// One answer as it grows.
pub(super) struct Answer {
    matcher: Matcher,
    begun: bool,
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
        Ok(())
    }

    /// Takes a token that [`Answer::allowed`] allowed.
    pub fn push(&mut self, token: u32) -> Result<()> {
        self.begun = true;
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
