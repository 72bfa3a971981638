//! `gemrun tokenize` and `gemrun detokenize`: text to token ids and back.

use std::ffi::OsString;
use std::io::Write;

use clap::Args;
use gemrun::Error;

use super::{Result, open, text};

/// Print the token ids of a text
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    gemrun tokenize demo \"Hello world\"\n  \
    gemrun tokenize e2b --json - < story.txt")]
pub struct Tokenize {
    /// Model name or path of a GGUF file
    model: OsString,
    /// The text, or - for standard input
    #[arg(allow_hyphen_values = true)]
    text: OsString,
    /// Begin with the <bos> token
    #[arg(long)]
    bos: bool,
    /// Take markers such as <|turn> for plain text
    #[arg(long)]
    no_special: bool,
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

impl Tokenize {
    pub fn run(self) -> Result {
        let text = match self.text.as_encoded_bytes() {
            b"-" => text::from_stdin()?,
            _ => text::from_argument("text", &self.text)?,
        };
        let tokenizer = open::tokenizer(&open::gguf(&self.model)?)?;
        let markers = !self.no_special;
        let ids = match self.bos {
            true => tokenizer.encode_with_bos(&text, markers),
            false => tokenizer.encode(&text, markers),
        };
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        if self.json {
            writeln!(out, "{}", serde_json::Value::from(ids))?;
        } else {
            let mut separator = "";
            for id in ids {
                write!(out, "{separator}{id}")?;
                separator = " ";
            }
            writeln!(out)?;
        }
        Ok(out.flush()?)
    }
}

/// Print the text of token ids, byte for byte
#[derive(Args)]
#[command(after_help = "The bytes are written as they are: nothing is added, and they need not be UTF-8.\n\n\
    Example: gemrun detokenize e2b 9259 1902")]
pub struct Detokenize {
    /// Model name or path of a GGUF file
    model: OsString,
    /// Token ids
    #[arg(required = true, value_name = "ID")]
    ids: Vec<u32>,
}

impl Detokenize {
    pub fn run(self) -> Result {
        let gguf = open::gguf(&self.model)?;
        let tokenizer = open::tokenizer(&gguf)?;
        let vocab = tokenizer.vocab_size();
        if let Some(id) = self.ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::usage(format!(
                "token id {id}: expected less than {vocab}, the vocabulary of {}",
                gguf.name()
            ))
            .into());
        }
        let mut out = std::io::stdout().lock();
        out.write_all(&tokenizer.decode(&self.ids, true))?;
        Ok(out.flush()?)
    }
}
