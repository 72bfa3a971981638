//! What was said in a conversation: a file of JSON lines that is only ever added to.
//!
//! The first line says what the conversation began with, each further one what happened: a finished turn, a turn taken back, a changed
//! setting. Reading them in order gives the conversation as it is now. A line is on the disk before the next message can be
//! typed, so a crash loses at most the turn that was being made.
//!
//! ```text
//! {"chat":1,"created":"2026-11-21T17:40:00Z","model":"e2b","source":…,"template":…,"settings":{…}}
//! {"time":…,"turn":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello"}],"end":"stop","seed":7}
//! {"time":…,"undo":1}                    the last turn is taken back
//! {"time":…,"undo":1,"turn":[…]}         the last turn is replaced: another answer, an edited message
//! {"time":…,"system":"be brief"}         settings: system, think, title; "" is none
//! {"time":…,"left_out":4}                the first four turns are no longer shown to the model
//! {"time":…,"left_out":4,"summary":"…"}  but this instead
//! ```
//!
//! A line that cannot be read is left out and counted; at the end of the file it is what a crash left of a turn, and is cut off
//! before the next is added.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::sample::Sampling;
use crate::{Error, Result};

const VERSION: u32 = 1;
/// A transcript longer than this was not typed by anybody.
const MAX_BYTES: u64 = 256 << 20;
/// Characters of a title.
const TITLE: usize = 60;

/// What a conversation began with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Header {
    /// Version of the layout.
    pub chat: u32,
    /// When, as RFC 3339 has it.
    pub created: String,
    /// The model as it was asked for.
    pub model: String,
    /// What its numbers depend on.
    pub source: String,
    /// SHA-256 of its chat template.
    pub template: String,
    /// The conversation it was copied from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<String>,
    /// How it is run.
    pub settings: Settings,
}

/// How a conversation is run where nothing else is asked for when it is continued.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Tokens of context.
    pub context: usize,
    /// How keys and values are stored.
    pub kv: String,
    /// How tokens are chosen.
    #[serde(flatten)]
    pub sampling: Sampling,
    /// Whether the model thinks.
    pub think: bool,
    /// The system prompt as the user gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// What was remembered when the conversation began, and is part of the system prompt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub facts: Vec<String>,
}

/// What happened: one line.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Entry {
    /// When.
    pub time: String,
    /// So many turns are taken back, before anything else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undo: Option<usize>,
    /// The messages of a turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turn: Option<Vec<Value>>,
    /// Why the reply ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<String>,
    /// The seed it was made with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The system prompt from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Whether the model thinks from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub think: Option<bool>,
    /// The title from now on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// So many of the first turns are not shown to the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_out: Option<usize>,
    /// What it is shown in their place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
}

impl Entry {
    /// Nothing, now.
    pub fn now() -> Entry {
        Entry { time: now(), ..Entry::default() }
    }
}

impl Entry {
    /// Whether a turn in it is one: a user's message and what followed.
    fn is_sound(&self) -> bool {
        let mut users = self.turn.iter().flatten().map(|message| message["role"] == "user");
        self.turn.is_none() || users.next() == Some(true) && !users.any(|user| user)
    }
}

/// The time as a transcript has it.
pub fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// A user message and all that followed it.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// When it was finished.
    pub time: String,
    /// As a chat template gets them.
    pub messages: Vec<Value>,
}

/// A conversation as it is now.
#[derive(Debug, Clone)]
pub struct Chat {
    header: Option<Header>,
    turns: Vec<Turn>,
    /// Whether there ever was a turn.
    begun: bool,
    title: Option<String>,
    system: Option<String>,
    think: bool,
    seed: Option<u64>,
    left_out: usize,
    summary: Option<String>,
    /// Numbers of lines that could not be read.
    damaged: Vec<usize>,
    /// Where the next line belongs: behind the last whole one.
    end: u64,
    /// Whether what stands behind that is a part of a line.
    cut: bool,
}

impl Chat {
    fn new(header: Option<Header>) -> Chat {
        let settings = header.as_ref().map(|header| &header.settings);
        Chat {
            title: None,
            turns: Vec::new(),
            begun: false,
            system: settings.and_then(|settings| settings.system.clone()),
            think: settings.is_some_and(|settings| settings.think),
            seed: settings.map(|settings| settings.sampling.seed),
            left_out: 0,
            summary: None,
            damaged: Vec::new(),
            end: 0,
            cut: false,
            header,
        }
    }

    /// Reads a transcript.
    ///
    /// # Errors
    /// [`crate::Kind::NotFound`] if there is no such file. Damage is no error.
    pub fn read(path: &Path) -> Result<Chat> {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes));
        read.map_err(|e| Error::io(path, &e))?;
        Ok(Chat::parse(&bytes))
    }

    /// The conversation that lines tell of.
    pub fn parse(bytes: &[u8]) -> Chat {
        let lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
        let header = lines.first().and_then(|line| serde_json::from_slice::<Header>(line).ok());
        let mut chat = Chat::new(header.filter(|header| header.chat == VERSION));
        let mut at = 0;
        for (i, line) in lines.iter().enumerate() {
            at += line.len() as u64;
            let last = i + 1 == lines.len();
            if i == 0 && chat.header.is_some() && line.ends_with(b"\n") {
                chat.end = at;
                continue;
            }
            match serde_json::from_slice::<Entry>(line) {
                Ok(entry) if line.ends_with(b"\n") && entry.is_sound() && (i > 0 || entry.turn.is_some()) => {
                    chat.apply(&entry);
                    chat.end = at;
                }
                _ if last && i > 0 => chat.cut = true,
                _ => {
                    chat.damaged.push(i + 1);
                    chat.end = at;
                }
            }
        }
        chat
    }

    /// Lets something happen.
    pub fn apply(&mut self, entry: &Entry) {
        if let Some(undo) = entry.undo {
            self.turns.truncate(self.turns.len().saturating_sub(undo));
            if self.left_out > self.turns.len() {
                (self.left_out, self.summary) = (0, None);
            }
        }
        if let Some(messages) = &entry.turn {
            self.begun = true;
            self.turns.push(Turn { time: entry.time.clone(), messages: messages.clone() });
        }
        if let Some(left_out) = entry.left_out {
            self.left_out = left_out.min(self.turns.len());
            self.summary = entry.summary.clone();
        }
        if let Some(system) = &entry.system {
            self.system = some_text(system);
        }
        if let Some(title) = &entry.title {
            self.title = some_text(title);
        }
        self.think = entry.think.unwrap_or(self.think);
        self.seed = entry.seed.or(self.seed);
    }

    /// What it began with; `None` if the first line cannot be read.
    pub fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }

    /// The turns, those left out included.
    pub fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// Whether nothing was ever said, and nothing is damaged.
    pub fn is_blank(&self) -> bool {
        !self.begun && self.damage().is_none()
    }

    /// So many of the first turns are not shown to the model, and what is in their place.
    pub fn left_out(&self) -> (usize, Option<&str>) {
        (self.left_out, self.summary.as_deref())
    }

    /// The system prompt as the user gave it.
    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// Whether the model thinks.
    pub fn think(&self) -> bool {
        self.think
    }

    /// The seed of the last reply.
    pub fn seed(&self) -> Option<u64> {
        self.seed
    }

    /// What has to be added to an empty transcript to get the same conversation.
    pub fn entries(&self) -> Vec<Entry> {
        let turn =
            |turn: &Turn| Entry { time: turn.time.clone(), turn: Some(turn.messages.clone()), ..Entry::default() };
        let mut entries: Vec<Entry> = self.turns.iter().map(turn).collect();
        let text = |text: &Option<String>| Some(text.clone().unwrap_or_default());
        let (title, system, think, seed) = (self.title.clone(), text(&self.system), Some(self.think), self.seed);
        let left_out = (self.left_out > 0).then_some(self.left_out);
        entries.push(Entry { title, system, think, seed, left_out, summary: self.summary.clone(), ..Entry::now() });
        entries
    }

    /// The title that was given, or the beginning of the first message.
    pub fn title(&self) -> String {
        if let Some(title) = &self.title {
            return title.clone();
        }
        let first = self.turns.first().and_then(|turn| turn.messages.first()).map(text).unwrap_or_default();
        shortened(first)
    }

    /// What is wrong with the file, if anything is, for people.
    pub fn damage(&self) -> Option<String> {
        let lines: Vec<String> = self.damaged.iter().map(usize::to_string).collect();
        match (&lines[..], self.cut) {
            ([], false) => None,
            ([], true) => Some("its last line is cut short and left out".into()),
            ([line], _) => Some(format!("line {line} is damaged and left out")),
            (_, _) => Some(format!("lines {} are damaged and left out", lines.join(", "))),
        }
    }
}

/// The beginning of a text, on one line, as a title.
pub fn shortened(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(TITLE) {
        Some((at, _)) => format!("{}...", &line[..at]),
        None => line,
    }
}

/// The text of a message.
pub fn text(message: &Value) -> &str {
    message["content"].as_str().unwrap_or_default()
}

fn some_text(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_string())
}

/// Adds lines.
#[derive(Debug)]
pub struct Writer {
    file: File,
    path: PathBuf,
}

impl Writer {
    /// Begins a transcript.
    ///
    /// # Errors
    /// [`crate::Kind::Other`] if it cannot be written.
    pub fn create(path: &Path, header: &Header) -> Result<(Writer, Chat)> {
        let header = Header { chat: VERSION, ..header.clone() };
        let file = File::options().create_new(true).write(true).open(path).map_err(|e| Error::io(path, &e))?;
        let mut writer = Writer { file, path: path.to_path_buf() };
        writer.line(&serde_json::to_string(&header).unwrap_or_default())?;
        Ok((writer, Chat::new(Some(header))))
    }

    /// Goes on with the transcript that `chat` was read from, behind its last whole line.
    ///
    /// # Errors
    /// [`crate::Kind::Other`] if it cannot be written.
    pub fn append(path: &Path, chat: &Chat) -> Result<Writer> {
        let failed = |e: std::io::Error| Error::io(path, &e);
        let mut file = File::options().read(true).write(true).open(path).map_err(failed)?;
        if chat.cut {
            file.set_len(chat.end).map_err(failed)?;
        }
        // A damaged first line may have lost its end.
        if file.seek(SeekFrom::End(0)).map_err(failed)? > 0 {
            let mut last = [0];
            file.seek(SeekFrom::End(-1)).and_then(|_| file.read_exact(&mut last)).map_err(failed)?;
            if last != *b"\n" {
                file.write_all(b"\n").map_err(failed)?;
            }
        }
        Ok(Writer { file, path: path.to_path_buf() })
    }

    /// Adds what happened and waits for the disk.
    ///
    /// # Errors
    /// [`crate::Kind::Other`] if the disk is full or fails.
    pub fn append_entry(&mut self, entry: &Entry) -> Result<()> {
        self.line(&serde_json::to_string(entry).unwrap_or_default())
    }

    fn line(&mut self, line: &str) -> Result<()> {
        let written = self.file.write_all(format!("{line}\n").as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|e| Error::io(&self.path, &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn header() -> Header {
        let settings = Settings {
            context: 8192,
            kv: "f16".into(),
            sampling: Sampling { seed: 7, ..Sampling::default() },
            think: false,
            system: None,
            facts: vec![],
        };
        let text = || "x".to_string();
        Header { chat: 0, created: now(), model: text(), source: text(), template: text(), copy_of: None, settings }
    }

    fn turn(user: &str) -> Entry {
        let messages =
            vec![json!({ "role": "user", "content": user }), json!({ "role": "assistant", "content": "ok" })];
        Entry { turn: Some(messages), ..Entry::now() }
    }

    fn said(chat: &Chat) -> Vec<&str> {
        chat.turns().iter().map(|turn| text(&turn.messages[0])).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        let (mut writer, mut chat) = Writer::create(&path, &header()).unwrap();
        let undo = Entry { undo: Some(1), ..Entry::now() };
        let edited = Entry { undo: Some(1), seed: Some(9), ..turn("b'") };
        let set = Entry { system: Some("be brief".into()), think: Some(true), title: Some("T".into()), ..Entry::now() };
        let left_out = Entry { left_out: Some(1), summary: Some("s".into()), ..Entry::now() };
        for entry in [turn("a"), turn("b"), edited, turn("c"), undo.clone(), set, turn("d\n\u{1b}"), left_out] {
            writer.append_entry(&entry).unwrap();
            chat.apply(&entry);
        }
        for chat in [&chat, &Chat::read(&path).unwrap()] {
            assert_eq!(said(chat), ["a", "b'", "d\n\u{1b}"]);
            assert_eq!((chat.system(), chat.think(), chat.seed()), (Some("be brief"), true, Some(9)));
            assert_eq!((chat.title().as_str(), chat.left_out(), chat.damage()), ("T", (1, Some("s")), None));
        }
        // A line each, as other programs read them.
        let lines = std::fs::read_to_string(&path).unwrap();
        assert_eq!(lines.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count(), 9);
        // More is taken back than there is.
        (0..5).for_each(|_| chat.apply(&undo));
        assert_eq!((said(&chat).len(), chat.left_out(), chat.title().as_str()), (0, (0, None), "T"));
    }

    #[test]
    fn a_cut_transcript_loses_its_last_line_at_most() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        let (mut writer, _) = Writer::create(&path, &header()).unwrap();
        let ends: Vec<u64> = ["a", "b", "c"]
            .map(|user| {
                writer.append_entry(&turn(user)).unwrap();
                std::fs::metadata(&path).unwrap().len()
            })
            .into();
        let bytes = std::fs::read(&path).unwrap();
        let first = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        for len in first..bytes.len() {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let chat = Chat::read(&path).unwrap();
            let whole = ends.iter().filter(|end| **end <= len as u64).count();
            assert_eq!(chat.turns().len(), whole, "{len} bytes");
            let at_end = len == first || ends.contains(&(len as u64));
            assert_eq!(chat.damage().is_none(), at_end, "{len} bytes");
            // It can be gone on with.
            let mut writer = Writer::append(&path, &chat).unwrap();
            writer.append_entry(&turn("d")).unwrap();
            let chat = Chat::read(&path).unwrap();
            assert_eq!((chat.turns().len(), chat.damage()), (whole + 1, None));
        }
        for len in 0..first {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let chat = Chat::read(&path).unwrap();
            assert!(chat.turns().is_empty() && (chat.header().is_none() || len == first - 1));
            Writer::append(&path, &chat).unwrap().append_entry(&turn("d")).unwrap();
            assert_eq!(Chat::read(&path).unwrap().turns().len(), 1, "{len} bytes");
        }
    }

    #[test]
    fn damage_costs_the_lines_it_is_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        let (mut writer, _) = Writer::create(&path, &header()).unwrap();
        ["a", "b", "c"].iter().for_each(|user| writer.append_entry(&turn(user)).unwrap());
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            for value in [0, b'\n', b'"', 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                let (chat, most) = (Chat::parse(&damaged), if bytes[at] == b'\n' { 2 } else { 1 });
                let lost = 3 - chat.turns().len();
                assert!(lost <= most && (lost == 0 || chat.damage().is_some()), "byte {at}: {value}: {lost} lost");
            }
        }
        let odd = b"{}\n{\"turn\":[]}\n{\"turn\":[1]}\n{\"turn\":[{\"role\":\"assistant\"}]}\n{\"undo\":3}\n";
        let chat = Chat::parse(odd);
        assert_eq!(
            (chat.turns().len(), chat.damage().unwrap().as_str()),
            (0, "lines 1, 2, 3, 4 are damaged and left out")
        );
        assert_eq!(Chat::parse(b"\xff\xff\n{}\nx\n").damage().unwrap(), "line 1 is damaged and left out");
    }

    #[test]
    fn titles_are_short() {
        let mut chat = Chat::parse(b"");
        chat.apply(&turn(&format!("  one\n two {}", "ü".repeat(80))));
        assert_eq!(chat.title(), format!("one two {}...", "ü".repeat(52)));
    }
}
