//! The library's one error type: a line for people and a kind for the exit code.
//!
//! Messages follow `FILE: WHERE: WHAT IS WRONG: WHAT WAS EXPECTED`, lower case, one line. Text that came out of a
//! file passes through [`printable`] first, so that no escape sequence of a hostile file reaches a terminal.

use std::borrow::Cow;
use std::fmt;

/// What went wrong, as far as a caller (or the shell) needs to tell cases apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Anything without a class of its own, e.g. an I/O error while writing a result. Exit code 1.
    Other,
    /// The request contradicts itself or the model: a bad flag value, a prompt longer than the context. Exit code 2.
    Usage,
    /// No such model or file. Exit code 3.
    NotFound,
    /// The model, or the context asked for, does not fit in memory. Exit code 4.
    Memory,
    /// The file is damaged, truncated or not what it claims to be. Exit code 5.
    Invalid,
    /// A valid request this build or CPU cannot serve: an architecture, a tensor format, a kernel. Exit code 6.
    Unsupported,
    /// This CPU or build computes something else than it should. Exit code 10.
    SelfTest,
    /// Stopped by the user. Exit code 130.
    Interrupted,
}

/// One line of text and its [`Kind`].
#[derive(Debug, Clone)]
pub struct Error {
    kind: Kind,
    message: String,
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of any kind. Line breaks and control characters in `message` are made visible, and of a text that
    /// would fill the screen only beginning and end are kept.
    pub fn new(kind: Kind, message: impl AsRef<str>) -> Error {
        // Once before escapes make it longer, which bounds the work, and once after.
        let message = printable(&shortened(message.as_ref()));
        Error { kind, message: shortened(&message).into_owned() }
    }

    /// A damaged or contradictory file.
    pub fn invalid(message: impl AsRef<str>) -> Error {
        Error::new(Kind::Invalid, message)
    }

    /// Something valid that is not supported.
    pub fn unsupported(message: impl AsRef<str>) -> Error {
        Error::new(Kind::Unsupported, message)
    }

    /// A request that cannot be meant.
    pub fn usage(message: impl AsRef<str>) -> Error {
        Error::new(Kind::Usage, message)
    }

    /// An I/O error on `path`: "not found" and "is a directory" are told apart from the rest.
    pub fn io(path: &std::path::Path, error: &std::io::Error) -> Error {
        let kind = match error.kind() {
            std::io::ErrorKind::NotFound => Kind::NotFound,
            _ => Kind::Other,
        };
        let text = error.to_string().to_lowercase();
        let text = text.split(" (os error").next().unwrap_or_default();
        Error::new(kind, format!("{}: {text}", path.display()))
    }

    /// The same error with `prefix: ` in front of the message.
    pub fn within(self, prefix: &str) -> Error {
        Error { kind: self.kind, message: format!("{}: {}", printable(prefix), self.message) }
    }

    /// The class of the error.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The documented exit code of the `gemrun` command for this error.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Other => 1,
            Kind::Usage => 2,
            Kind::NotFound => 3,
            Kind::Memory => 4,
            Kind::Invalid => 5,
            Kind::Unsupported => 6,
            Kind::SelfTest => 10,
            Kind::Interrupted => 130,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// `text` with every control character (C0, DEL, C1), line and paragraph separator and bidirectional override
/// escaped as in Rust source, so that it can be shown on a terminal as one line.
pub fn printable(text: &str) -> String {
    let unsafe_char = |c: char| {
        c.is_control()
            || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.chars().any(unsafe_char) {
        return text.to_string();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if unsafe_char(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Bytes of a message that are kept: what a file can put into it (a key, a name) may be much longer.
const HEAD: usize = 500;
const TAIL: usize = 200;
/// Stands for the rest.
const GAP: &str = " ... ";

fn shortened(message: &str) -> Cow<'_, str> {
    if message.len() <= HEAD + GAP.len() + TAIL {
        return message.into();
    }
    let head = message.floor_char_boundary(HEAD);
    let tail = message.ceil_char_boundary(message.len() - TAIL);
    format!("{}{GAP}{}", &message[..head], &message[tail..]).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_not_sent() {
        assert_eq!(printable("a\x1b[31mb\n"), "a\\u{1b}[31mb\\n");
        assert_eq!(printable("\u{9b}x\u{202e}"), "\\u{9b}x\\u{202e}");
        assert_eq!(printable("Zürich 日本"), "Zürich 日本");
    }

    #[test]
    fn long_messages_keep_their_ends() {
        let message = Error::invalid(format!("x.gguf: key {}: is too long", "ü".repeat(70_000))).to_string();
        assert!(message.starts_with("x.gguf: key üü") && message.ends_with("üü: is too long"));
        assert!(message.contains("ü ... ü") && message.len() <= 705, "{} bytes", message.len());
        assert!(Error::invalid("\x1b".repeat(70_000)).to_string().len() <= 705);
        let message = "y".repeat(700);
        assert_eq!(Error::invalid(&message).to_string(), message);
    }

    #[test]
    fn a_missing_file_is_not_found() {
        let e = Error::io(std::path::Path::new("x.gguf"), &std::io::Error::from_raw_os_error(2));
        assert_eq!((e.exit_code(), e.to_string().as_str()), (3, "x.gguf: no such file or directory"));
    }
}
