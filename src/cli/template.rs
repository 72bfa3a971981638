//! `gemrun template`: the text a list of messages becomes.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use gemrun::Error;
use gemrun::template::{Options, Template as ChatTemplate};
use serde_json::Value;

use super::terminal::Shown;
use super::{Result, open, text};

/// Render a model's chat template
#[derive(Args)]
#[command(
    after_help = "FILE holds a JSON array of messages in OpenAI's form: [{\"role\": \"user\", \"content\": \"Hi\"}].\n\
    The text is printed as it is, without a final newline.\n\n\
    Example: gemrun template e2b --messages chat.json --think on"
)]
pub struct Template {
    /// Model name or path of a GGUF file
    model: OsString,
    /// Messages, a JSON array; - is standard input
    #[arg(long, value_name = "FILE")]
    messages: PathBuf,
    /// Tool declarations, a JSON array
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
    /// Ask the model to think first
    #[arg(long, value_name = "WHEN", default_value = "off")]
    think: Switch,
    /// Stop after the last message instead of beginning the model's turn
    #[arg(long)]
    no_generation_prompt: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl Template {
    pub fn run(self) -> Result {
        let messages = array(&self.messages)?;
        let tools = self.tools.as_deref().map(array).transpose()?.unwrap_or_default();
        let template = ChatTemplate::from_gguf(&open::gguf(&self.model)?)?;
        let options = Options {
            enable_thinking: self.think == Switch::On,
            add_generation_prompt: !self.no_generation_prompt,
            ..Options::default()
        };
        let rendered = template.render(&messages, &tools, options)?;
        let mut out = std::io::stdout().lock();
        out.write_all(Shown::stdout().text(&rendered).as_bytes())?;
        Ok(out.flush()?)
    }
}

/// The JSON array in a file.
fn array(path: &Path) -> gemrun::Result<Vec<Value>> {
    let text = text::from_file(path)?;
    serde_json::from_str(&text).map_err(|e| {
        let error = e.to_string();
        Error::usage(format!("{}: {error}: expected a JSON array", path.display()))
    })
}
