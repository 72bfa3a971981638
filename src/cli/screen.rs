//! A reply on the screen of a chat: thoughts faint, the answer plain, a tool call on a line of its own.
//!
//! On a terminal with colours text is Markdown and broken into lines; elsewhere it is written as it comes.

use std::io::Write;

use gemrun::session::Event;

use super::markdown::Markdown;
use super::run::{Wait, tool_call};
use super::terminal::{Shown, Style, eprintln_quietly, shows_unicode, stdout_columns};
use super::wrap::{Look, Wrap};

/// What is to be written on standard output for a model's text.
pub struct Page {
    shown: Shown,
    styled: Option<Styled>,
    /// Whether the cursor stands at the beginning of a line.
    fresh: bool,
}

struct Styled {
    answer: Markdown,
    thought: Wrap,
}

impl Page {
    /// `plain`: text as it comes, whatever standard output is.
    pub fn new(plain: bool) -> Page {
        let styled = (!plain && Style::stdout().is_on())
            .then(|| Styled { answer: Markdown::new(shows_unicode()), thought: Wrap::new() });
        Page { shown: Shown::stdout(), styled, fresh: true }
    }

    /// More of the answer.
    pub fn answer(&mut self, text: &str) -> String {
        let text = self.shown.text(text);
        let Some(styled) = &mut self.styled else { return self.plain(text.clone(), text) };
        let out = styled.answer.push(&text, stdout_columns());
        self.fresh = styled.answer.is_fresh();
        out
    }

    /// More of the thoughts, faint in `style`.
    pub fn thought(&mut self, text: &str, style: Style) -> String {
        let text = self.shown.text(text);
        let Some(Styled { thought, .. }) = &mut self.styled else {
            // Each piece is faint by itself, so that whatever ends the reply leaves the terminal plain.
            return self.plain(format!("{}{text}{}", style.dim(), style.plain()), text);
        };
        thought.set_columns(stdout_columns());
        text.chars().for_each(|c| thought.put(c, Look::FAINT));
        self.fresh = thought.is_fresh();
        thought.take()
    }

    fn plain(&mut self, out: String, text: String) -> String {
        if !text.is_empty() {
            self.fresh = text.ends_with('\n');
        }
        out
    }

    /// What was held back; something else follows, or nothing.
    pub fn end(&mut self) -> String {
        let Some(Styled { answer, thought }) = &mut self.styled else { return String::new() };
        thought.end_word();
        let out = thought.take() + &answer.finish();
        (*answer, *thought) = (Markdown::new(shows_unicode()), Wrap::new());
        out
    }
}

/// Puts a reply on the screen: thoughts faint, the answer plain.
pub struct Screen {
    out: std::io::Stdout,
    page: Page,
    shown: Shown,
    style: Style,
    hide_thinking: bool,
    wait: Wait,
    now: Part,
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
    /// `plain`: no Markdown.
    pub fn new(hide_thinking: bool, plain: bool, style: Style) -> Screen {
        let (out, shown, page) = (std::io::stdout(), Shown::stdout(), Page::new(plain));
        Screen { out, page, shown, style, hide_thinking, wait: Wait::new(), now: Part::Nothing }
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
                    self.page.fresh = false;
                }
            }
            Event::Thought(text) => {
                self.enter(Part::Thought)?;
                let out = self.page.thought(text, self.style);
                self.write(&out)?;
            }
            Event::Answer(text) => {
                self.enter(Part::Answer)?;
                let out = self.page.answer(text);
                self.write(&out)?;
            }
            Event::ToolCall { name, arguments } => {
                self.enter(Part::ToolCall)?;
                let line = format!("{}\n", tool_call(name, arguments));
                let line = self.shown.text(&line);
                self.write(&line)?;
                self.page.fresh = true;
            }
        }
        self.out.flush()
    }

    /// Ends the line of the part before.
    fn enter(&mut self, part: Part) -> std::io::Result<()> {
        if self.now != part {
            self.end_line()?;
            if self.now == Part::Thought {
                self.write("\n")?;
            }
            self.now = part;
        }
        Ok(())
    }

    fn end_line(&mut self) -> std::io::Result<()> {
        let rest = self.page.end();
        self.write(&rest)?;
        if !self.page.fresh {
            self.write("\n")?;
            self.page.fresh = true;
        }
        Ok(())
    }

    fn write(&mut self, text: &str) -> std::io::Result<()> {
        self.out.write_all(text.as_bytes())
    }

    pub fn finish(&mut self) -> std::io::Result<()> {
        self.wait.done();
        self.end_line()?;
        self.out.flush()
    }
}
