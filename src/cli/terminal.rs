//! What people see: colours, error lines, and model text made harmless.
//!
//! A terminal obeys what is written to it, and a model (or the file it came from) can be made to write anything. So
//! text on its way to a terminal passes through [`Shown`]; text on its way to a file or pipe is left alone.

use std::io::IsTerminal;

use gemrun::Error;

/// Escape sequences, or nothing where colours are off.
#[derive(Clone, Copy)]
pub struct Style {
    on: bool,
}

impl Style {
    /// For standard output.
    pub fn stdout() -> Style {
        Style { on: std::io::stdout().is_terminal() && colours_allowed() }
    }

    /// For standard error.
    pub fn stderr() -> Style {
        Style { on: std::io::stderr().is_terminal() && colours_allowed() }
    }

    /// No colours, whatever the output is.
    #[cfg(test)]
    pub fn none() -> Style {
        Style { on: false }
    }

    /// Starts faint text.
    pub fn dim(self) -> &'static str {
        if self.on { "\x1b[2m" } else { "" }
    }

    /// Starts bold text.
    pub fn bold(self) -> &'static str {
        if self.on { "\x1b[1m" } else { "" }
    }

    /// Starts red text.
    pub fn red(self) -> &'static str {
        if self.on { "\x1b[1;31m" } else { "" }
    }

    /// Back to plain text.
    pub fn plain(self) -> &'static str {
        if self.on { "\x1b[0m" } else { "" }
    }
}

/// <https://no-color.org>: any value but the empty one turns colours off. A terminal without features has none.
fn colours_allowed() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Columns of the terminal on standard error, if there is one.
pub fn columns() -> Option<usize> {
    let (width, _) = terminal_size::terminal_size_of(std::io::stderr())?;
    Some(usize::from(width.0))
}

/// Writes the one line an error is.
pub fn error(error: &Error) {
    let style = Style::stderr();
    eprintln_quietly(format_args!("{}error:{} {error}", style.red(), style.plain()));
}

/// A line on standard error; that nobody reads it is no reason to fail.
pub fn eprintln_quietly(line: std::fmt::Arguments<'_>) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Model text as it may be shown on standard output.
#[derive(Clone, Copy)]
pub struct Shown {
    terminal: bool,
}

impl Shown {
    /// Depends on whether standard output is a terminal.
    pub fn stdout() -> Shown {
        Shown { terminal: std::io::stdout().is_terminal() }
    }

    /// For a terminal.
    pub fn terminal() -> Shown {
        Shown { terminal: true }
    }

    /// `text` with control characters other than line feed and tab, and bidirectional overrides, made visible if it
    /// goes to a terminal.
    pub fn text(self, text: &str) -> String {
        if !self.terminal {
            return text.to_string();
        }
        harmless(text)
    }
}

fn harmless(text: &str) -> String {
    let pieces = text.split_inclusive(['\n', '\t']).map(|piece| match piece.char_indices().next_back() {
        Some((at, last @ ('\n' | '\t'))) => {
            let mut shown = gemrun::error::printable(&piece[..at]);
            shown.push(last);
            shown
        }
        _ => gemrun::error::printable(piece),
    });
    pieces.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_text_cannot_command_the_terminal() {
        assert_eq!(harmless("a\tb\n\nü\n"), "a\tb\n\nü\n");
        assert_eq!(harmless("\x1b]0;x\x07\n\r"), "\\u{1b}]0;x\\u{7}\n\\r");
        assert_eq!(harmless("\u{9b}2J\u{202e}abc"), "\\u{9b}2J\\u{202e}abc");
        let piped = Shown { terminal: false };
        assert_eq!(piped.text("\x1b[0m"), "\x1b[0m");
    }
}
