//! Answers that are JSON: any, or by a schema.
//!
//! The schema narrows what the model may say (`guide.rs`); it is not shown to the model, which should be told in the
//! prompt what is wanted.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use gemrun::guide::Schema;
use gemrun::session::{End, Reply};
use gemrun::tokenizer::Tokenizer;
use gemrun::{Error, Kind};
use serde_json::Value;

use super::text;

/// Flags on the form of an answer.
#[derive(Args)]
pub struct Format {
    /// Hold the answer to the JSON schema in FILE; tell the model in the prompt what it is to say
    #[arg(long, value_name = "FILE")]
    json_schema: Option<PathBuf>,
    /// Form of the answer; json is an object or an array
    #[arg(long, value_name = "FORM", default_value = "text")]
    format: Form,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Text,
    Json,
}

/// A schema before there is a vocabulary to compile it for.
pub enum Wanted {
    Text,
    Json,
    Schema(String, Value),
}

impl Format {
    /// Reads the schema, if there is one.
    pub fn read(&self) -> gemrun::Result<Wanted> {
        match &self.json_schema {
            Some(path) => {
                let name = path.display().to_string();
                let schema = serde_json::from_str(&text::from_file(path)?)
                    .map_err(|e| Error::usage(format!("{name}: {e}: expected a JSON schema")))?;
                Ok(Wanted::Schema(name, schema))
            }
            None if self.format == Form::Json => Ok(Wanted::Json),
            None => Ok(Wanted::Text),
        }
    }
}

impl Wanted {
    pub fn compile(&self, tokenizer: &Tokenizer) -> gemrun::Result<Option<Schema>> {
        match self {
            Wanted::Text => Ok(None),
            Wanted::Json => Schema::any(tokenizer).map(Some),
            Wanted::Schema(name, schema) => Schema::new(tokenizer, schema).map(Some).map_err(|e| e.within(name)),
        }
    }
}

/// An error if `reply`, which was held to a schema, ended too early.
pub fn whole(reply: &Reply) -> gemrun::Result<()> {
    let (what, more) = match reply.end {
        End::Length => ("the limit", "a larger -n"),
        End::Context => ("the context", "a larger --ctx"),
        End::Stop | End::Interrupted => return Ok(()),
    };
    let tokens = reply.usage.generated;
    Err(Error::new(
        Kind::Other,
        format!("answer: cut off by {what} after {tokens} tokens: the JSON is not whole: expected {more}"),
    ))
}
