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

    /// Whether there are colours.
    pub fn is_on(self) -> bool {
        self.on
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
    /// The terminal expects one byte a character.
    narrow: bool,
}

impl Shown {
    /// Depends on whether standard output is a terminal.
    pub fn stdout() -> Shown {
        Shown { terminal: std::io::stdout().is_terminal(), narrow: charset() == Charset::Other }
    }

    /// For a terminal.
    pub fn terminal() -> Shown {
        Shown { terminal: true, narrow: charset() == Charset::Other }
    }

    /// `text` with control characters other than line feed and tab, and bidirectional overrides, made visible if it
    /// goes to a terminal. One that does not understand UTF-8 could take parts of it for commands: it gets ASCII.
    pub fn text(self, text: &str) -> String {
        if !self.terminal {
            return text.to_string();
        }
        if self.narrow { harmless(text).chars().map(ascii).collect() } else { harmless(text) }
    }
}

/// What a terminal makes of bytes, as far as the locale tells.
#[derive(Debug, PartialEq)]
enum Charset {
    Utf8,
    /// The locale `C`, or none: most such terminals show UTF-8.
    Unknown,
    Other,
}

fn charset() -> Charset {
    let set = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
    match ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set) {
        Some(locale) => charset_of(&locale),
        None if cfg!(windows) => Charset::Utf8,
        None => Charset::Unknown,
    }
}

/// The character set of a locale: `de_CH.UTF-8`, `ja_JP.eucJP@cjknarrow`. One that names none has an old one.
fn charset_of(locale: &str) -> Charset {
    let name = locale.split('@').next().unwrap_or_default();
    match name.split_once('.').map(|(_, set)| set.to_ascii_lowercase().replace('-', "")).as_deref() {
        Some("utf8") => Charset::Utf8,
        None if ["C", "POSIX"].contains(&name) => Charset::Unknown,
        _ => Charset::Other,
    }
}

/// Whether bullets and bars may be other characters than ASCII's.
pub fn shows_unicode() -> bool {
    charset() == Charset::Utf8
}

/// `c`, or what comes close to it in ASCII.
fn ascii(c: char) -> char {
    match c {
        _ if c.is_ascii() => c,
        '\u{a0}' | '\u{2000}'..='\u{200a}' | '\u{202f}' => ' ',
        '‘' | '’' | '‚' | '′' => '\'',
        '“' | '”' | '„' | '″' | '«' | '»' => '"',
        '‐'..='―' | '−' => '-',
        '•' | '·' | '×' => '*',
        _ => '?',
    }
}

/// The width of the terminal standard output goes to, now.
pub fn stdout_columns() -> Option<usize> {
    terminal_size::terminal_size_of(std::io::stdout()).map(|(width, _)| width.0.into())
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
        let piped = Shown { terminal: false, narrow: true };
        assert_eq!(piped.text("\x1b[0mü"), "\x1b[0mü");
        let old = Shown { terminal: true, narrow: true };
        assert_eq!(old.text("“naïve” – 1 × 2\n\u{9b}"), "\"na?ve\" - 1 * 2\n\\u{9b}");
    }

    #[test]
    fn locales_tell_the_character_set() {
        for (locale, charset) in [
            ("en_US.UTF-8", Charset::Utf8),
            ("C.utf8", Charset::Utf8),
            ("de_CH.UTF-8@euro", Charset::Utf8),
            ("C", Charset::Unknown),
            ("POSIX", Charset::Unknown),
            ("de_DE", Charset::Other),
            ("ja_JP.eucJP", Charset::Other),
            ("ru_RU.KOI8-R", Charset::Other),
        ] {
            assert_eq!(charset_of(locale), charset, "{locale}");
        }
    }
}
