//! Saved conversations: one folder each, found by name.
//!
//! ```text
//! HOME/chats/why-is-the-sky-blue/transcript.jsonl   what was said (`transcript.rs`)
//! HOME/chats/why-is-the-sky-blue/lock               held by the process that continues it
//! HOME/chats/why-is-the-sky-blue/kv.index, kv.N     its cache (`kv/disk.rs`), which can be thrown away
//! HOME/prefixes/…/kv.index, kv.N                    caches of documents for any conversation to begin with
//! ```
//!
//! A conversation is called after its first message. Names that people give are looked up among those there are, never joined to a
//! path. One process at a time may add to a conversation; others may read it. Caches, not transcripts, are removed when all of
//! them together take more room than they may, those first that have not been used for longest.

pub mod transcript;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::kv::disk;
use crate::lock::Lock;
use crate::{Error, Kind, Result};
use transcript::{Chat, Entry, Header, Writer};

const TRANSCRIPT: &str = "transcript.jsonl";
const LOCK: &str = "lock";
/// Of the words of a first message that become a name.
const NAME_WORDS: usize = 5;
const NAME_LETTERS: usize = 32;

/// All saved conversations.
#[derive(Debug, Clone)]
pub struct Chats {
    folder: PathBuf,
    prefixes: PathBuf,
}

/// One of them, as lists show it.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its name.
    pub id: String,
    /// What was said.
    pub chat: Chat,
    /// When the transcript was last added to.
    pub updated: SystemTime,
    /// Bytes of the transcript.
    pub transcript_bytes: u64,
    /// Bytes of the cache.
    pub kv_bytes: u64,
}

/// A conversation that this process may add to.
#[derive(Debug)]
pub struct Open {
    /// Its name.
    pub id: String,
    folder: PathBuf,
    chat: Chat,
    writer: Writer,
    _lock: Lock,
}

/// What asking for a conversation gives.
pub enum Opened {
    /// It, to be added to.
    Ours(Open),
    /// What was said in it: another process has it open.
    Busy(Chat),
}

/// A message that was searched for.
#[derive(Debug, Clone)]
pub struct Hit {
    /// The conversation.
    pub id: String,
    /// Its title.
    pub title: String,
    /// Which turn, from 1.
    pub turn: usize,
    /// Who said it.
    pub role: String,
    /// The message around the first of the words, on one line.
    pub excerpt: String,
    /// All of it.
    pub text: String,
}

impl Chats {
    /// Those below `home`.
    pub fn new(home: &Path) -> Chats {
        Chats { folder: home.join("chats"), prefixes: home.join("prefixes") }
    }

    /// Where conversations are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn transcript(&self, id: &str) -> PathBuf {
        self.folder.join(id).join(TRANSCRIPT)
    }

    /// Names of all conversations, the one last added to first.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<(SystemTime, String)> = subfolders(&self.folder)
            .filter_map(|path| {
                let updated = fs::metadata(path.join(TRANSCRIPT)).and_then(|meta| meta.modified()).ok()?;
                Some((updated, path.file_name()?.to_str()?.to_string()))
            })
            .collect();
        names.sort_by(|a, b| b.cmp(a));
        names.into_iter().map(|(_, name)| name).collect()
    }

    /// The conversation last added to, of those with `model` if that is given, in which anything was said.
    pub fn newest(&self, model: Option<&str>) -> Option<String> {
        let of_model = |chat: &Chat| chat.header().is_some_and(|header| Some(&*header.model) == model);
        let meant = |chat: &Chat| !chat.turns().is_empty() && (model.is_none() || of_model(chat));
        self.names().into_iter().find(|id| self.read(id).is_ok_and(|chat| meant(&chat)))
    }

    /// All conversations, the one last added to first; those that cannot be read are left out.
    pub fn list(&self) -> Vec<Listed> {
        let listed = |id: String| {
            let meta = fs::metadata(self.transcript(&id)).ok()?;
            let chat = self.read(&id).ok()?;
            let kv_bytes = disk::usage(&self.folder.join(&id)).map_or(0, |(bytes, _)| bytes);
            Some(Listed { chat, updated: meta.modified().ok()?, transcript_bytes: meta.len(), kv_bytes, id })
        };
        self.names().into_iter().filter_map(listed).collect()
    }

    /// The conversation that `name` means: its whole name, or the beginning of it and of no other.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none, [`Kind::Usage`] if there are several.
    pub fn find(&self, name: &str) -> Result<String> {
        let names = self.names();
        if let Some(exact) = names.iter().find(|id| *id == name) {
            return Ok(exact.clone());
        }
        let found: Vec<&String> = names.iter().filter(|id| !name.is_empty() && id.starts_with(name)).collect();
        match found[..] {
            [id] => Ok(id.clone()),
            [] => Err(Error::new(Kind::NotFound, format!("{name}: no such conversation: gemrun chats lists them"))),
            [a, b, ..] => Err(Error::usage(format!("{name}: begins several names: expected one of {a}, {b}, ..."))),
        }
    }

    /// What was said in a conversation.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is no such conversation.
    pub fn read(&self, id: &str) -> Result<Chat> {
        Chat::read(&self.transcript(id))
    }

    /// Opens a conversation to continue it. What is damaged at the end of its transcript is cut off.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is no such conversation, [`Kind::Other`] if it cannot be written to.
    pub fn open(&self, id: &str) -> Result<Opened> {
        let folder = self.folder.join(id);
        let Some(lock) = lock(&folder)? else { return Ok(Opened::Busy(self.read(id)?)) };
        let chat = self.read(id)?;
        let writer = Writer::append(&self.transcript(id), &chat)?;
        Ok(Opened::Ours(Open { id: id.to_string(), folder, chat, writer, _lock: lock }))
    }

    /// Begins a conversation about `about`, after which it is called, with `entries` already said.
    ///
    /// # Errors
    /// [`Kind::Other`] if it cannot be written.
    pub fn create(&self, header: &Header, about: &str, entries: &[Entry]) -> Result<Open> {
        private_folder(&self.folder)?;
        let name = name(about);
        let mut count = 1;
        let id = loop {
            let id = if count == 1 { name.clone() } else { format!("{name}-{count}") };
            let folder = self.folder.join(&id);
            match fs::create_dir(&folder) {
                Ok(()) => break id,
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => count += 1,
                Err(e) => return Err(Error::io(&folder, &e)),
            }
        };
        let folder = self.folder.join(&id);
        let lock = lock(&folder)?.ok_or_else(|| in_use(&id))?;
        let (mut writer, mut chat) = Writer::create(&self.transcript(&id), header)?;
        for entry in entries {
            writer.append_entry(entry)?;
            chat.apply(entry);
        }
        Ok(Open { id, folder, chat, writer, _lock: lock })
    }

    /// Removes a conversation, or only its cache.
    ///
    /// # Errors
    /// [`Kind::Other`] if another process has it open.
    pub fn remove(&self, id: &str, only_cache: bool) -> Result<()> {
        let folder = self.folder.join(id);
        let _lock = lock(&folder)?.ok_or_else(|| in_use(id))?;
        if only_cache {
            return disk::remove(&folder);
        }
        // What makes it a conversation goes first.
        let transcript = self.transcript(id);
        fs::remove_file(&transcript).map_err(|e| Error::io(&transcript, &e))?;
        fs::remove_dir_all(&folder).map_err(|e| Error::io(&folder, &e))
    }

    /// Messages with all of `words` in them, whatever their case, the newest turns first.
    pub fn search(&self, words: &str) -> Vec<Hit> {
        let words: Vec<String> = words.split_whitespace().map(str::to_lowercase).collect();
        let mut hits = Vec::new();
        if words.is_empty() {
            return hits;
        }
        for id in self.names() {
            let Ok(chat) = self.read(&id) else { continue };
            for (i, turn) in chat.turns().iter().enumerate().rev() {
                for message in &turn.messages {
                    let (role, text) = (message["role"].as_str().unwrap_or_default(), transcript::text(message));
                    let lower = text.to_lowercase();
                    if words.iter().all(|word| lower.contains(word)) {
                        let excerpt = excerpt(text, &words[0]);
                        let (title, role) = (chat.title(), role.to_string());
                        hits.push(Hit { id: id.clone(), title, turn: i + 1, role, excerpt, text: text.to_string() });
                    }
                }
            }
        }
        hits
    }

    /// Folders with caches, of conversations and of documents, those last used first.
    pub fn caches(&self) -> Vec<PathBuf> {
        let mut folders: Vec<(SystemTime, PathBuf)> = subfolders(&self.folder)
            .chain(subfolders(&self.prefixes))
            .filter_map(|folder| Some((disk::usage(&folder)?.1, folder)))
            .collect();
        folders.sort_by(|a, b| b.cmp(a));
        folders.into_iter().map(|(_, folder)| folder).collect()
    }

    /// The folder for a cache that any conversation may begin with, called `name`.
    ///
    /// # Errors
    /// [`Kind::Other`] if it cannot be made.
    pub fn prefix(&self, name: &str) -> Result<PathBuf> {
        let folder = self.prefixes.join(name);
        private_folder(&self.prefixes)?;
        fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, &e))?;
        Ok(folder)
    }

    /// Removes caches, those first that were not used for longest, until all of them take at most `budget` bytes; how many. That in
    /// `keep` stays, as do those of conversations that are open.
    pub fn trim(&self, budget: u64, keep: Option<&Path>) -> usize {
        let mut total: u64 = 0;
        let mut removed = 0;
        for folder in self.caches() {
            let Some((bytes, _)) = disk::usage(&folder) else { continue };
            total = total.saturating_add(bytes);
            if total <= budget || keep == Some(&folder) {
                continue;
            }
            if let Ok(Some(_lock)) = lock(&folder)
                && disk::remove(&folder).is_ok()
            {
                total -= bytes;
                removed += 1;
            }
        }
        removed
    }
}

impl Opened {
    /// What was said.
    pub fn chat(&self) -> &Chat {
        match self {
            Opened::Ours(open) => &open.chat,
            Opened::Busy(chat) => chat,
        }
    }
}

impl Open {
    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What was said.
    pub fn chat(&self) -> &Chat {
        &self.chat
    }

    /// Adds to the transcript and waits until that is on the disk.
    ///
    /// # Errors
    /// [`Kind::Other`] if the disk is full or fails.
    pub fn add(&mut self, entry: Entry) -> Result<()> {
        self.writer.append_entry(&entry)?;
        self.chat.apply(&entry);
        Ok(())
    }
}

/// Folders in `folder`.
fn subfolders(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// Keeps other processes out of a folder while it is held; `None` if another does.
fn lock(folder: &Path) -> Result<Option<Lock>> {
    Lock::try_take(&folder.join(LOCK))
}

fn in_use(id: &str) -> Error {
    Error::new(Kind::Other, format!("{id}: open in another gemrun: try again when it is done"))
}

/// Makes a folder that only its owner may look into: what is said to a model can be private.
fn private_folder(folder: &Path) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder).map_err(|e| Error::io(folder, &e))
}

/// A name for a conversation that begins with `about`: its first words, in letters that any keyboard and file system has.
fn name(about: &str) -> String {
    let words = about.split(|c: char| !c.is_ascii_alphanumeric() && c != '\'').map(|word| word.replace('\'', ""));
    let words: Vec<String> = words.filter(|word| !word.is_empty()).take(NAME_WORDS).collect();
    let mut name = String::new();
    for word in words {
        let word: String = word.to_lowercase().chars().take(NAME_LETTERS).collect();
        if !name.is_empty() && name.len() + 1 + word.len() > NAME_LETTERS {
            break;
        }
        name += if name.is_empty() { "" } else { "-" };
        name += &word;
    }
    if name.is_empty() { "chat".into() } else { name }
}

/// The part of `text` around `word`, which is in lower case, on one line.
fn excerpt(text: &str, word: &str) -> String {
    const AROUND: usize = 60;
    let line: Vec<char> = text.split_whitespace().collect::<Vec<_>>().join(" ").chars().collect();
    // Lower case can have more characters; then the place is a little off.
    let lower: String = line.iter().flat_map(|c| c.to_lowercase()).collect();
    let at = lower.find(word).map_or(0, |at| lower[..at].chars().count()).min(line.len());
    let (from, to) = (at.saturating_sub(AROUND), (at + word.chars().count() + AROUND).min(line.len()));
    let part: String = line[from..to].iter().collect();
    let (before, after) = (if from > 0 { "..." } else { "" }, if to < line.len() { "..." } else { "" });
    format!("{before}{part}{after}")
}

/// Whether `name` may be the name of a conversation, to tell it from a message.
pub fn is_name(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| !name.is_empty() && !name.contains(char::is_whitespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(name("Why is the sky blue?"), "why-is-the-sky-blue");
        assert_eq!(name("  What's 2+2, in words please?"), "whats-2-2-in-words");
        assert_eq!(name("../../etc/passwd"), "etc-passwd");
        assert_eq!(name("日本語"), "chat");
        assert_eq!(name(&"a".repeat(100)), "a".repeat(NAME_LETTERS));
        assert_eq!(name("Donaudampfschifffahrtsgesellschaft is long"), "donaudampfschifffahrtsgesellscha");
    }

    #[test]
    fn excerpts() {
        assert_eq!(excerpt("The quick\nbrown  fox", "quick"), "The quick brown fox");
        let long = format!("{} Fox {}", "a ".repeat(100), "b ".repeat(100));
        let found = excerpt(&long, "fox");
        assert!(found.starts_with("...") && found.ends_with("...") && found.contains(" Fox "), "{found}");
        assert_eq!(excerpt("İİİ x", "zzz"), "İİİ x");
    }
}
