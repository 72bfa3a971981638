//! What the user wants to be remembered: one fact a line, in a file that people can read and change.
//!
//! Nothing is remembered until somebody says so. Facts are read once, when a conversation begins, and are part of its system prompt from then
//! on: so they are in the cache like anything else a conversation begins with, and a conversation never changes its past.
//!
//! ```text
//! # What gemrun remembers, one fact a line. Change it as you like.
//! - The user's name is Ann.
//! ```

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::new_file::NewFile;
use crate::{Error, Kind, Result};

const HEADING: &str = "# What gemrun remembers, one fact a line. Change it as you like.\n";
const MARK: &str = "- ";
/// What stands in front of the facts in a system prompt.
const INTRODUCTION: &str = "The user asked you to remember:";
/// More than anybody's context holds.
const MAX_BYTES: u64 = 1 << 20;

/// The file of facts below `home`.
pub fn path(home: &Path) -> PathBuf {
    home.join("memory.md")
}

/// The facts; none if there is no file.
///
/// # Errors
/// [`Kind::Other`] if the file cannot be read, [`Kind::Invalid`] if it is no text.
pub fn read(home: &Path) -> Result<Vec<String>> {
    let text = text(home)?;
    Ok(text.lines().filter_map(fact).map(str::to_string).collect())
}

fn text(home: &Path) -> Result<String> {
    let path = path(home);
    match fs::metadata(&path) {
        Ok(meta) if meta.len() > MAX_BYTES => {
            Err(Error::invalid(format!("{}: {} bytes: expected at most {MAX_BYTES}", path.display(), meta.len())))
        }
        Ok(_) => fs::read_to_string(&path).map_err(|e| Error::io(&path, &e)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(Error::io(&path, &e)),
    }
}

/// The fact in a line of the file.
fn fact(line: &str) -> Option<&str> {
    line.trim().strip_prefix(MARK).map(str::trim).filter(|fact| !fact.is_empty())
}

/// Adds a fact, unless it is there already. Line feeds in it become spaces.
///
/// # Errors
/// [`Kind::Usage`] if it is empty, [`Kind::Other`] if the file cannot be written.
pub fn add(home: &Path, new: &str) -> Result<()> {
    let new = new.split_whitespace().collect::<Vec<_>>().join(" ");
    if new.is_empty() {
        return Err(Error::usage("fact: empty: expected text"));
    }
    let mut text = text(home)?;
    if text.lines().filter_map(fact).any(|fact| fact == new) {
        return Ok(());
    }
    if text.is_empty() {
        text += HEADING;
    } else if !text.ends_with('\n') {
        text.push('\n');
    }
    text += &format!("{MARK}{new}\n");
    write(home, &text)
}

/// Forgets the facts that `which` means: the one with that number, from 1, or those with these words in them, whatever their case.
/// They are returned.
///
/// # Errors
/// [`Kind::NotFound`] if there is none, [`Kind::Other`] if the file cannot be written.
pub fn forget(home: &Path, which: &str) -> Result<Vec<String>> {
    let text = text(home)?;
    let words = which.trim().to_lowercase();
    let number = words.parse::<usize>().ok();
    let (mut kept, mut gone, mut count) = (String::new(), Vec::new(), 0);
    for line in text.lines() {
        let named = fact(line).filter(|fact| {
            count += 1;
            number.map_or(!words.is_empty() && fact.to_lowercase().contains(&words), |number| number == count)
        });
        match named {
            Some(fact) => gone.push(fact.to_string()),
            None => kept += &format!("{line}\n"),
        }
    }
    if gone.is_empty() {
        return Err(Error::new(Kind::NotFound, format!("{}: nothing like it is remembered", which.trim())));
    }
    write(home, &kept)?;
    Ok(gone)
}

fn write(home: &Path, text: &str) -> Result<()> {
    fs::create_dir_all(home).map_err(|e| Error::io(home, &e))?;
    let path = path(home);
    let mut file = NewFile::create(&path)?;
    file.write_all(text.as_bytes()).map_err(|e| Error::io(file.part(), &e))?;
    file.finish()
}

/// The system prompt of a conversation that begins with `facts`.
pub fn system_prompt(system: Option<&str>, facts: &[String]) -> Option<String> {
    let list = facts.iter().map(|fact| format!("\n{MARK}{fact}")).collect::<String>();
    let remembered = (!facts.is_empty()).then(|| format!("{INTRODUCTION}{list}"));
    let parts: Vec<&str> = [system, remembered.as_deref()].into_iter().flatten().collect();
    (!parts.is_empty()).then(|| parts.join("\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_lines_of_a_file_people_may_change() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        assert!(read(home).unwrap().is_empty());
        assert_eq!(system_prompt(None, &[]), None);
        add(home, "I live in\n Zürich. ").unwrap();
        add(home, "I like cats").unwrap();
        add(home, "I like cats").unwrap();
        let text = fs::read_to_string(path(home)).unwrap();
        assert_eq!(text, format!("{HEADING}- I live in Zürich.\n- I like cats\n"));
        // What else people write there stays, and is not a fact.
        fs::write(path(home), format!("{text}\n## Later\n-not this\n- and this")).unwrap();
        add(home, "last").unwrap();
        assert_eq!(read(home).unwrap(), ["I live in Zürich.", "I like cats", "and this", "last"]);
        assert_eq!(forget(home, "2").unwrap(), ["I like cats"]);
        assert_eq!(forget(home, "ZÜRICH").unwrap(), ["I live in Zürich."]);
        assert_eq!(forget(home, "dogs").unwrap_err().to_string(), "dogs: nothing like it is remembered");
        assert!(forget(home, " ").is_err() && forget(home, "9").is_err() && add(home, " \n").is_err());
        assert!(fs::read_to_string(path(home)).unwrap().contains("## Later\n-not this\n"));
        let facts = read(home).unwrap();
        assert_eq!(facts, ["and this", "last"]);
        let prompt = system_prompt(Some("be brief"), &facts).unwrap();
        assert_eq!(prompt, "be brief\n\nThe user asked you to remember:\n- and this\n- last");
    }
}
