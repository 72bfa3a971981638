//! What people type at the prompt of a chat: a line, or a block between `"""` and `"""`.
//!
//! Lines are remembered in a history file, as far as there can be one.

use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};

use super::Result;
use super::run::history_file;
use super::terminal::{Style, eprintln_quietly};

/// The line editor.
pub struct Input {
    editor: Editor<(), FileHistory>,
    prompt: String,
}

impl Input {
    pub fn new(name: &str) -> Result<Input> {
        let config = Config::builder().history_ignore_space(true).auto_add_history(false).build();
        let mut editor = Editor::with_config(config).map_err(|e| failed(&e))?;
        if let Some(file) = history_file() {
            // The first chat has no history yet.
            let _ = editor.load_history(&file);
        }
        Ok(Input { editor, prompt: format!("{name}> ") })
    }

    /// The next message or command; `None` when the user leaves with Ctrl-D.
    pub fn read(&mut self, style: Style) -> Result<Option<String>> {
        let mut message = String::new();
        let mut interrupted = false;
        loop {
            let prompt = if message.is_empty() { self.prompt.as_str() } else { "... " };
            match self.editor.readline(prompt) {
                Ok(line) => {
                    interrupted = false;
                    let opening = message.is_empty();
                    message.push_str(&line);
                    message.push('\n');
                    match Block::of(&message) {
                        Block::Open => continue,
                        Block::Closed(text) => {
                            self.remember(&message);
                            return Ok(Some(text));
                        }
                        Block::None => {
                            debug_assert!(opening);
                            self.remember(&line);
                            return Ok(Some(line));
                        }
                    }
                }
                Err(ReadlineError::Interrupted) if interrupted => return Err(super::interrupted()),
                Err(ReadlineError::Interrupted) => {
                    // An unfinished block is dropped; at an empty prompt the next one leaves.
                    interrupted = message.is_empty();
                    message.clear();
                    let note = "Ctrl-C again leaves, as does Ctrl-D.";
                    eprintln_quietly(format_args!("{}{note}{}", style.dim(), style.plain()));
                }
                Err(ReadlineError::Io(error)) if error.kind() == std::io::ErrorKind::InvalidData => {
                    message.clear();
                    eprintln_quietly(format_args!("note: what was typed is not UTF-8 and is dropped"));
                }
                Err(ReadlineError::Eof) => return Ok(None),
                Err(error) => return Err(failed(&error)),
            }
        }
    }

    /// A changed `text`; `None` if the user gives up. Line feeds become spaces: the editor has one line.
    pub fn edit(&mut self, text: &str) -> Result<Option<String>> {
        let line = text.lines().collect::<Vec<_>>().join(" ");
        match self.editor.readline_with_initial(&self.prompt, (&line, "")) {
            Ok(line) => {
                self.remember(&line);
                Ok(Some(line))
            }
            Err(ReadlineError::Interrupted | ReadlineError::Eof) => Ok(None),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Appends to the history, as far as there can be one.
    fn remember(&mut self, line: &str) {
        let line = line.trim_end();
        if line.is_empty() || !self.editor.add_history_entry(line).unwrap_or(false) {
            return;
        }
        if let Some(file) = history_file() {
            let folder = file.parent().map_or(Ok(()), std::fs::create_dir_all);
            let _ = folder.is_ok() && self.editor.append_history(&file).is_ok();
        }
    }
}

fn failed(error: &ReadlineError) -> anyhow::Error {
    gemrun::Error::new(gemrun::Kind::Other, format!("standard input: {error}")).into()
}

/// A message between `"""` and `"""`.
#[derive(Debug, PartialEq)]
enum Block {
    None,
    Open,
    Closed(String),
}

impl Block {
    fn of(text: &str) -> Block {
        let Some(inside) = text.trim_start().strip_prefix("\"\"\"") else { return Block::None };
        match inside.trim_end().strip_suffix("\"\"\"") {
            Some(block) => Block::Closed(block.trim_matches('\n').to_string()),
            None => Block::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks() {
        assert_eq!(Block::of("hello\n"), Block::None);
        assert_eq!(Block::of("\"\"\"\n"), Block::Open);
        assert_eq!(Block::of("\"\"\"a\n"), Block::Open);
        assert_eq!(Block::of("\"\"\"one\"\"\"\n"), Block::Closed("one".into()));
        assert_eq!(Block::of("\"\"\"\na\n  b\n\"\"\"\n"), Block::Closed("a\n  b".into()));
    }
}
