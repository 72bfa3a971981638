//! Text from arguments, files and standard input, which must be UTF-8.

use std::ffi::OsStr;
use std::io::{IsTerminal, Read};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use gemrun::{Error, Result};

use super::terminal::eprintln_quietly;

/// The text of an argument.
pub fn from_argument(name: &str, value: &OsStr) -> Result<String> {
    utf8(name, value.as_encoded_bytes().to_vec())
}

/// Bytes of a text at most: far more than the longest context holds, and `/dev/zero` comes to an end.
const MAX_BYTES: u64 = 256 << 20;

/// All of standard input.
pub fn from_stdin() -> Result<String> {
    read(Path::new("standard input"), std::io::stdin().lock())
}

/// All of `source`, called `name`.
fn read(name: &Path, source: impl Read) -> Result<String> {
    let mut bytes = Vec::new();
    source.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| Error::io(name, &e))?;
    if bytes.len() as u64 > MAX_BYTES {
        let name = name.display();
        return Err(Error::usage(format!("{name}: too long: expected at most {} MiB of text", MAX_BYTES >> 20)));
    }
    utf8(&name.display().to_string(), bytes)
}

/// What was piped in beside a prompt; `None` where standard input is a terminal or a device such as `/dev/null`.
///
/// Programs that start others often leave them a pipe nobody ever writes to or closes, and to wait for its end without
/// a word would look like a crash.
pub fn piped_beside_prompt() -> Result<Option<String>> {
    if std::io::stdin().is_terminal() || stdin_is_device() {
        return Ok(None);
    }
    let (done, waiting) = mpsc::channel::<()>();
    let reminder = std::thread::spawn(move || {
        if waiting.recv_timeout(Duration::from_secs(2)) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln_quietly(format_args!(
                "note: reading standard input too; give < /dev/null if it has nothing to say"
            ));
        }
    });
    let text = from_stdin();
    drop(done);
    let _ = reminder.join();
    text.map(Some)
}

/// Whether standard input is a character device.
#[cfg(unix)]
fn stdin_is_device() -> bool {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileTypeExt;
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().map(std::fs::File::from);
    stdin.and_then(|file| file.metadata()).is_ok_and(|metadata| metadata.file_type().is_char_device())
}

#[cfg(not(unix))]
fn stdin_is_device() -> bool {
    false
}

/// All of a file; `-` is standard input.
pub fn from_file(path: &Path) -> Result<String> {
    if path == Path::new("-") {
        return from_stdin();
    }
    read(path, std::fs::File::open(path).map_err(|e| Error::io(path, &e))?)
}

fn utf8(name: &str, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::usage(format!("{name}: byte {at} is not UTF-8: expected UTF-8 text"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_utf8_names_the_byte() {
        assert_eq!(utf8("prompt", "Zürich".into()).unwrap(), "Zürich");
        let error = utf8("prompt", b"ab\xff".to_vec()).unwrap_err();
        let expected = (2, "prompt: byte 2 is not UTF-8: expected UTF-8 text");
        assert_eq!((error.exit_code(), error.to_string().as_str()), expected);
    }
}
