//! A reply on the screen of a chat: thoughts faint, the answer plain, a tool call on a line of its own.

use std::io::Write;

use gemrun::session::Event;

use super::run::{Wait, tool_call};
use super::terminal::{Shown, Style, eprintln_quietly};

/// Puts a reply on the screen: thoughts faint, the answer plain.
pub struct Screen {
    out: std::io::Stdout,
    shown: Shown,
    style: Style,
    hide_thinking: bool,
    wait: Wait,
    now: Part,
    /// Whether the cursor stands at the beginning of a line.
    fresh_line: bool,
}

/// What was shown last.
#[derive(PartialEq)]
enum Part {
    Nothing,
    Thought,
    HiddenThought,
    Answer,
    ToolCall,
}

impl Screen {
    pub fn new(hide_thinking: bool, style: Style) -> Screen {
        let (out, shown) = (std::io::stdout(), Shown::stdout());
        Screen { out, shown, style, hide_thinking, wait: Wait::new(), now: Part::Nothing, fresh_line: true }
    }

    pub fn on(&mut self, event: Event) -> std::io::Result<()> {
        self.wait.on(&event);
        match event {
            Event::Prompt { .. } => {}
            Event::Note(note) => eprintln_quietly(format_args!("{}{note}{}", self.style.dim(), self.style.plain())),
            Event::Thought(_) if self.hide_thinking => {
                if self.now != Part::HiddenThought {
                    self.enter(Part::HiddenThought)?;
                    self.write(&format!("{}thinking ...{}", self.style.dim(), self.style.plain()))?;
                    self.fresh_line = false;
                }
            }
            Event::Thought(text) => {
                self.enter(Part::Thought)?;
                // Each piece is faint by itself, so that whatever ends the reply leaves the terminal plain.
                self.show(&format!("{}{}{}", self.style.dim(), self.shown.text(text), self.style.plain()), text)?;
            }
            Event::Answer(text) => {
                self.enter(Part::Answer)?;
                self.show(&self.shown.text(text), text)?;
            }
            Event::ToolCall { name, arguments } => {
                self.enter(Part::ToolCall)?;
                let line = format!("{}\n", tool_call(name, arguments));
                self.show(&self.shown.text(&line), &line)?;
            }
        }
        self.out.flush()
    }

    /// Ends the line of the part before.
    fn enter(&mut self, part: Part) -> std::io::Result<()> {
        if self.now != part {
            if !self.fresh_line {
                self.write("\n")?;
                self.fresh_line = true;
            }
            if self.now == Part::Thought {
                self.write("\n")?;
            }
            self.now = part;
        }
        Ok(())
    }

    fn show(&mut self, styled: &str, text: &str) -> std::io::Result<()> {
        if !text.is_empty() {
            self.fresh_line = text.ends_with('\n');
        }
        self.write(styled)
    }

    fn write(&mut self, text: &str) -> std::io::Result<()> {
        self.out.write_all(text.as_bytes())
    }

    pub fn finish(&mut self) -> std::io::Result<()> {
        self.wait.done();
        if !self.fresh_line {
            self.write("\n")?;
        }
        self.out.flush()
    }
}
