//! Files in the store that came from somewhere else: whole or not yet there.
//!
//! The one idea: a file has its name only while it is, as far as anybody knows, what it should be. Until then it is
//! `NAME.part`. Beside each lies a record, `NAME.json` or `NAME.part.json`: where the file comes from, its SHA-256, and that of every
//! [`SPAN`] of it, so that a damaged span is told from the others and fetched again alone. A lock, `NAME.lock`, keeps two
//! processes from writing one file; it ends with its process, however that ends.
//!
//! What of a part is trusted after a crash: all of it if the computer has not been started since, as what a process wrote
//! survives it; else the spans that were on the disk when the record was last written. Both are read and compared again.
//!
//! Not here: where bytes come from.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Remote, check_hex};
use crate::new_file::{NewFile, same_file, sync_directory};
use crate::{Error, Kind, Result};
use crate::{lock, machine};

/// Bytes with a SHA-256 of their own.
pub const SPAN: u64 = 16 << 20;
/// Spans between two times at which a part is brought to the disk.
const SPANS_A_SYNC: usize = 4;
/// Read at a time.
const BUFFER: usize = 1 << 20;
/// A record of the largest model has a thousandth of this.
const MAX_RECORD: u64 = 64 << 20;
/// Between two looks whether another process is done.
const WAIT: Duration = Duration::from_millis(100);

/// Told the bytes done and of how many; says whether to go on.
pub type Progress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + 'a;

/// What is known of a file, whole or in part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Repository of origin, `owner/name`, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
    /// Commit, branch or tag that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Name in that repository.
    pub file: String,
    /// Size of the whole file.
    pub bytes: u64,
    /// SHA-256 of the whole file in hex: computed; of a part, what is expected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// What the server calls this version of the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// When the whole file was written, in nanoseconds since 1970: it has been touched since if this is another time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified_ns: Option<u64>,
    /// Which start of the computer a part was written in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
    /// Bytes in a span, [`SPAN`].
    pub span_bytes: u64,
    /// SHA-256 of each span, in hex; the last one may be shorter than the others. Of a part, those that are complete.
    pub spans: Vec<String>,
    /// Spans that were found damaged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<usize>,
}

impl Record {
    /// The beginning of a record of `remote`, of which nothing is there yet.
    pub fn of(remote: &Remote, bytes: u64) -> Record {
        Record {
            repo: Some(remote.repo.clone()).filter(|repo| !repo.is_empty()),
            revision: remote.revision.clone(),
            sha256: remote.sha256.clone(),
            ..Record::new(&remote.file, bytes)
        }
    }

    /// The same of a file that comes from nowhere.
    fn new(file: &str, bytes: u64) -> Record {
        Record {
            repo: None,
            revision: None,
            file: file.to_string(),
            bytes,
            sha256: None,
            etag: None,
            modified_ns: None,
            boot: None,
            span_bytes: SPAN,
            spans: Vec::new(),
            damaged: Vec::new(),
        }
    }

    /// Where the record of the file at `path` is.
    pub fn path(path: &Path) -> PathBuf {
        with_suffix(path, ".json")
    }

    /// The record of the file at `path`; `None` if there is none, or none that can be relied on: then nothing is known.
    pub fn read(path: &Path) -> Option<Record> {
        let file = File::open(Record::path(path)).ok()?;
        let mut text = String::new();
        file.take(MAX_RECORD).read_to_string(&mut text).ok()?;
        let record: Record = serde_json::from_str(&text).ok()?;
        let hashes = record.spans.iter().chain(&record.sha256).all(|hash| check_hex("", hash, 64).is_ok());
        let count = record.spans.len() <= spans(record.bytes);
        let places = record.damaged.iter().all(|&span| span < record.spans.len());
        let header = record.etag.as_ref().is_none_or(|etag| etag.bytes().all(|b| (b' '..=b'~').contains(&b)));
        (record.span_bytes == SPAN && hashes && count && places && header).then_some(record)
    }

    /// Writes the record of the file at `path`.
    pub fn write(&self, path: &Path) -> Result<()> {
        let path = Record::path(path);
        let mut file = NewFile::create(&path)?;
        let text = serde_json::to_vec(self).map_err(std::io::Error::from).and_then(|text| file.write_all(&text));
        text.map_err(|e| Error::io(&path, &e))?;
        file.finish()
    }

    /// Whether the file at `path` is, by size and time, as it was left.
    pub fn untouched(&self, path: &Path) -> bool {
        self.damaged.is_empty()
            && self.modified_ns.is_some()
            && fs::metadata(path).is_ok_and(|meta| meta.len() == self.bytes && modified(&meta) == self.modified_ns)
    }

    /// The bytes of span `i`.
    pub fn span(&self, i: usize) -> Range<u64> {
        let start = i as u64 * SPAN;
        start..(start.saturating_add(SPAN)).min(self.bytes)
    }
}

/// The number of spans in so many bytes.
fn spans(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(SPAN)).unwrap_or(usize::MAX)
}

fn modified(meta: &fs::Metadata) -> Option<u64> {
    u64::try_from(meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos()).ok()
}

/// `path` with `suffix` after its name.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(suffix);
    name.into()
}

/// Where a file is while it is not whole.
pub fn part(path: &Path) -> PathBuf {
    with_suffix(path, ".part")
}

/// The right to change a file of the store and what lies beside it.
pub struct Lock {
    _held: lock::Lock,
    path: PathBuf,
}

impl Lock {
    /// Waits until no other process changes the file at `target`. `waiting` is asked, several times a second, whether to go on.
    ///
    /// # Errors
    /// [`Kind::Interrupted`] if `waiting` says so, others if the lock cannot be made.
    pub fn take(target: &Path, waiting: &mut dyn FnMut() -> ControlFlow<()>) -> Result<Lock> {
        let path = with_suffix(target, ".lock");
        loop {
            match lock::Lock::try_take(&path)? {
                // The one before may have removed its lock between our opening and locking it.
                Some(held) if same_file(held.file(), &path) => return Ok(Lock { _held: held, path }),
                Some(_) => continue,
                None => {}
            }
            if waiting().is_break() {
                return Err(interrupted());
            }
            std::thread::sleep(WAIT);
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

pub(super) fn interrupted() -> Error {
    Error::new(Kind::Interrupted, "interrupted")
}

/// The digests of a file as its bytes pass.
struct Sums {
    whole: Sha256,
    span: Sha256,
    /// Bytes that have passed.
    bytes: u64,
    spans: Vec<String>,
}

impl Sums {
    fn new() -> Sums {
        Sums { whole: Sha256::new(), span: Sha256::new(), bytes: 0, spans: Vec::new() }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        self.whole.update(bytes);
        while !bytes.is_empty() {
            let left = SPAN - self.bytes % SPAN;
            let (now, later) = bytes.split_at(bytes.len().min(left as usize));
            self.span.update(now);
            self.bytes = self.bytes.saturating_add(now.len() as u64);
            if self.bytes.is_multiple_of(SPAN) {
                self.spans.push(hex(&self.span.finalize_reset()));
            }
            bytes = later;
        }
    }

    /// SHA-256 of all and of each span.
    fn finish(mut self) -> (String, Vec<String>) {
        if !self.bytes.is_multiple_of(SPAN) {
            self.spans.push(hex(&self.span.finalize()));
        }
        (hex(&self.whole.finalize()), self.spans)
    }
}

/// SHA-256 of `bytes`, in hex.
pub(super) fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Passes the rest of `file`, `len` bytes in all, to `take`.
fn read_all(
    file: &mut File,
    path: &Path,
    len: u64,
    progress: &mut Progress,
    mut take: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut done = 0;
    loop {
        if progress(done, len).is_break() {
            return Err(interrupted());
        }
        let n = match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::io(path, &e)),
        };
        take(&buffer[..n])?;
        done = done.saturating_add(n as u64);
    }
}

/// A regular file, opened, and its size. Anything else could block for ever or never end.
fn open(path: &Path) -> Result<(File, u64)> {
    let meta = fs::metadata(path).map_err(|e| Error::io(path, &e))?;
    if !meta.is_file() {
        return Err(Error::invalid(format!("{}: not a file", path.display())));
    }
    let file = File::open(path).map_err(|e| Error::io(path, &e))?;
    Ok((file, meta.len()))
}

/// What reading a file from end to end has shown.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is what it was when it was complete.
    Same,
    /// These ranges of bytes are not; neighbours are one range.
    Damaged(Vec<Range<u64>>),
    /// There was nothing to compare it with. Its SHA-256.
    Unknown(String),
    /// It is another file than expected. Its SHA-256.
    Other(String),
}

/// Reads the file at `path` and compares it with its record, or with what is known of `expected` if that is another file. The record
/// that comes back says what was found; once written, the file need not be read again to be trusted, or to be repaired.
///
/// # Errors
/// If the file cannot be read; [`Kind::Interrupted`] if `progress` says so.
pub fn verify(path: &Path, expected: Option<&Remote>, progress: &mut Progress) -> Result<(Verdict, Record)> {
    let (mut file, len) = open(path)?;
    let (before, mut sums) = (file.metadata().ok().and_then(|meta| modified(&meta)), Sums::new());
    read_all(&mut file, path, len, progress, |bytes| {
        sums.update(bytes);
        Ok(())
    })?;
    let bytes = sums.bytes;
    let (sha256, spans) = sums.finish();

    let wanted = expected.and_then(|remote| remote.sha256.as_ref());
    let old = Record::read(path).filter(|record| {
        let right = wanted.is_none() || record.sha256.as_ref() == wanted;
        // Sums of the whole and of the spans tell the same, or the record was never right.
        let sound = record.spans != spans || record.sha256.as_ref() == Some(&sha256);
        right && sound && record.spans.len() == self::spans(record.bytes)
    });
    let (mut record, verdict) = match old {
        Some(mut record) => {
            let differ = |&i: &usize| record.spans.get(i) != spans.get(i);
            record.damaged = (0..record.spans.len()).filter(differ).collect();
            let mut ranges: Vec<Range<u64>> = Vec::new();
            for range in record.damaged.iter().map(|&i| record.span(i)) {
                match ranges.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => ranges.push(range),
                }
            }
            // Of a file that has grown, all that was there may be as it was.
            if bytes > record.bytes {
                ranges.push(record.bytes..bytes);
            }
            let verdict = if ranges.is_empty() { Verdict::Same } else { Verdict::Damaged(ranges) };
            (record, verdict)
        }
        None => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let mut record = match expected.filter(|_| wanted == Some(&sha256)) {
                Some(remote) => Record::of(remote, bytes),
                None => Record::new(&name, bytes),
            };
            (record.sha256, record.spans) = (Some(sha256.clone()), spans);
            let verdict = match wanted {
                Some(wanted) if *wanted == sha256 => Verdict::Same,
                Some(_) => Verdict::Other(sha256),
                None => Verdict::Unknown(sha256),
            };
            (record, verdict)
        }
    };
    record.modified_ns = before;
    Ok((verdict, record))
}

/// A file that is not whole yet, under the name it has until then. Whoever holds it holds the [`Lock`], too.
pub struct Part {
    file: File,
    path: PathBuf,
    target: PathBuf,
    /// What is known; `spans` are those that were complete when the record was last written.
    pub record: Record,
    sums: Sums,
}

impl Part {
    /// What there is of `target` from an earlier time, or an empty part of `remote`. Spans that are not what they were when they
    /// were written are told: they must be [`refill`](Part::refill)ed, and the part opened again, before anything is appended.
    ///
    /// # Errors
    /// If the file cannot be read or written; [`Kind::Interrupted`] if `progress` says so.
    pub fn open(target: &Path, remote: &Remote, progress: &mut Progress) -> Result<(Part, Vec<usize>)> {
        let path = part(target);
        let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
        let file = file.map_err(|e| Error::io(&path, &e))?;
        let len = file.metadata().map_err(|e| Error::io(&path, &e))?.len();
        let fits = |record: &Record| {
            let agree = remote.sha256.is_none() || record.sha256 == remote.sha256;
            record.repo.as_deref().unwrap_or_default() == remote.repo
                && record.revision == remote.revision
                && agree
                && remote.bytes.is_none_or(|bytes| bytes == record.bytes)
        };
        let record = Record::read(&path).filter(fits);
        let known =
            record.as_ref().map_or(0, |record| match record.boot.is_some() && record.boot == machine::boot_id() {
                true => record.bytes,
                false => (record.spans.len() as u64 * SPAN).min(record.bytes),
            });
        let mut record = record.unwrap_or_else(|| Record::of(remote, remote.bytes.unwrap_or(0)));
        let len = len.min(known);
        file.set_len(len).map_err(|e| Error::io(&path, &e))?;
        record.spans.truncate(spans(len));
        if len < record.bytes {
            record.spans.truncate((len / SPAN) as usize);
        }
        record.boot = machine::boot_id();
        let mut part = Part { file, path, target: target.to_path_buf(), record, sums: Sums::new() };
        let sums = &mut part.sums;
        read_all(&mut part.file, &part.path, len, progress, |bytes| {
            sums.update(bytes);
            Ok(())
        })?;
        let mut found = part.sums.spans.clone();
        if part.len() == part.record.bytes && !part.len().is_multiple_of(SPAN) {
            found.push(hex(&part.sums.span.clone().finalize()));
        }
        let bad = part.record.spans.iter().zip(&found).enumerate().filter(|(_, (old, new))| old != new);
        let bad = bad.map(|(i, _)| i).collect();
        Ok((part, bad))
    }

    /// Takes the name away from the damaged file at `target`, which is a part from now on.
    ///
    /// # Errors
    /// If it cannot be renamed.
    pub fn reopen(target: &Path, record: Record) -> Result<()> {
        let path = part(target);
        Record { boot: machine::boot_id(), modified_ns: None, damaged: Vec::new(), ..record }.write(&path)?;
        fs::rename(target, &path).map_err(|e| Error::io(target, &e))?;
        let _ = fs::remove_file(Record::path(target));
        sync_directory(target)
    }

    /// Bytes that are there.
    pub fn len(&self) -> u64 {
        self.sums.bytes
    }

    /// Whether nothing is there.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Throws away what is there.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn clear(&mut self) -> Result<()> {
        self.file.set_len(0).and_then(|()| self.file.rewind()).map_err(|e| self.failed(&e))?;
        self.sums = Sums::new();
        self.record.spans.clear();
        self.record.etag = None;
        let _ = fs::remove_file(Record::path(&self.path));
        Ok(())
    }

    /// Appends bytes, and brings the part to the disk now and then.
    ///
    /// # Errors
    /// If the disk is full or fails. What was there stays.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.seek(SeekFrom::Start(self.sums.bytes)).map_err(|e| self.failed(&e))?;
        self.file.write_all(bytes).map_err(|e| self.failed(&e))?;
        self.sums.update(bytes);
        match self.sums.spans.len() >= self.record.spans.len() + SPANS_A_SYNC {
            true => self.sync(),
            false => Ok(()),
        }
    }

    /// Puts the right bytes where span `i` is damaged.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if they are not the right ones, others if the disk fails.
    pub fn refill(&mut self, i: usize, bytes: &[u8]) -> Result<()> {
        let range = self.record.span(i);
        if self.record.spans.get(i) != Some(&digest(bytes)) {
            let (target, last) = (self.target.display(), range.end - 1);
            return Err(Error::invalid(format!(
                "{target}: bytes {}-{last} of the repository are other ones",
                range.start
            )));
        }
        let written = self.file.seek(SeekFrom::Start(range.start)).and_then(|_| self.file.write_all(bytes));
        written.map_err(|e| self.failed(&e))
    }

    /// Brings the part and its record to the disk.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|e| self.failed(&e))?;
        // A repaired file has all its digests from the start.
        if self.sums.spans.len() > self.record.spans.len() {
            self.record.spans.clone_from(&self.sums.spans);
        }
        self.record.write(&self.path)
    }

    /// Gives the complete file its name if it is what was expected; its SHA-256.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it is another file: then nothing is left of it. Others if the disk fails.
    pub fn finish(mut self) -> Result<String> {
        self.file.sync_all().map_err(|e| self.failed(&e))?;
        let (bytes, sums) = (self.sums.bytes, std::mem::replace(&mut self.sums, Sums::new()));
        let (sha256, spans) = sums.finish();
        let target = self.target.display();
        if bytes != self.record.bytes || self.record.sha256.as_ref().is_some_and(|expected| *expected != sha256) {
            let expected = self.record.sha256.as_deref().unwrap_or("?");
            let whole = self.record.bytes;
            let error = format!("{target}: {bytes} bytes with sha256 {sha256}: expected {whole} with {expected}");
            self.remove();
            return Err(Error::invalid(error));
        }
        let modified_ns = self.file.metadata().ok().and_then(|meta| modified(&meta));
        fs::rename(&self.path, &self.target).map_err(|e| Error::io(&self.target, &e))?;
        sync_directory(&self.target)?;
        let record = Record { sha256: Some(sha256.clone()), spans, modified_ns, boot: None, ..self.record };
        record.write(&self.target)?;
        let old = Record::path(&self.path);
        let _ = fs::remove_file(part(&old));
        let _ = fs::remove_file(old);
        Ok(sha256)
    }

    /// Removes the part.
    pub fn remove(&self) {
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_file(Record::path(&self.path));
    }

    fn failed(&self, error: &std::io::Error) -> Error {
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                let (path, done, all) = (self.path.display(), self.len() as f64 / 1e9, self.record.bytes as f64 / 1e9);
                let error = format!(
                    "{path}: the disk is full at {done:.2} of {all:.2} GB: make room and run the command again, it goes on"
                );
                Error::new(Kind::Other, error)
            }
            ErrorKind::FileTooLarge => {
                let (path, all) = (self.path.display(), self.record.bytes as f64 / 1e9);
                let error = format!("{path}: the file system does not take files of {all:.2} GB: choose another");
                Error::new(Kind::Other, error)
            }
            _ => Error::io(&self.path, error),
        }
    }
}

/// Copies the file at `from` to `target` and compares it on the way with `remote`; its SHA-256.
///
/// # Errors
/// [`Kind::Invalid`] if it is another file than `remote` calls for, [`Kind::Interrupted`] if `progress` says so, others if a
/// disk is full or fails. Then nothing is left at `target`.
pub fn copy(from: &Path, target: &Path, remote: &Remote, progress: &mut Progress) -> Result<String> {
    let (mut file, len) = open(from)?;
    if remote.bytes.is_some_and(|bytes| bytes != len) {
        let (from, bytes) = (from.display(), remote.bytes.unwrap_or(0));
        return Err(Error::invalid(format!("{from}: {len} bytes: expected {bytes}")));
    }
    let (mut part, _) = Part::open(target, remote, &mut |_, _| ControlFlow::Continue(()))?;
    part.clear()?;
    part.record.bytes = len;
    let copied = read_all(&mut file, from, len, progress, |bytes| part.append(bytes));
    if let Err(error) = copied {
        part.remove();
        return Err(error);
    }
    part.finish()
}

/// Removes what the store has of the file at `path`, whole or in part; what was removed.
///
/// # Errors
/// [`Kind::Other`] if another process is writing it or a file cannot be removed.
pub fn remove(path: &Path) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    if !path.parent().is_some_and(Path::is_dir) {
        return Ok(removed);
    }
    let _lock = Lock::take(path, &mut || ControlFlow::Break(())).map_err(|error| match error.kind() {
        Kind::Interrupted => Error::new(Kind::Other, format!("{}: another gemrun is writing it", path.display())),
        _ => error,
    })?;
    let records = [Record::path(path), Record::path(&part(path))];
    // A killed process may have left a record half written.
    let halves = records.iter().map(|record| part(record));
    for file in [path.to_path_buf(), part(path)].into_iter().chain(halves).chain(records.clone()) {
        match fs::remove_file(&file) {
            Ok(()) => removed.push(file),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(&file, &e)),
        }
    }
    Ok(removed)
}

/// The directory of models in the store at `home`.
pub fn directory(home: &Path) -> PathBuf {
    home.join("models")
}

/// A file of the store.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Where it is, or will be when it is whole.
    pub path: PathBuf,
    /// Bytes that are there.
    pub bytes: u64,
    /// Whether it is whole. Of a part, `record` tells the size of the whole.
    pub whole: bool,
    /// What is known of it.
    pub record: Option<Record>,
}

/// The model files below `directory`, whole ones and parts, by path.
pub fn list(directory: &Path) -> Vec<Stored> {
    let inside = |folder: &Path| -> Vec<PathBuf> {
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let mut paths = inside(directory);
    paths.extend(inside(directory).iter().filter(|path| path.is_dir()).flat_map(|folder| inside(folder)));
    let mut files: Vec<Stored> = paths.iter().filter_map(|path| stored(path)).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path).then(b.whole.cmp(&a.whole)));
    files.dedup_by(|part, whole| part.path == whole.path);
    files
}

/// The model at `path`, if its name is one of a model or a part of one.
fn stored(path: &Path) -> Option<Stored> {
    let name = path.file_name()?.to_str()?;
    let lower = name.to_ascii_lowercase();
    let whole = match lower.strip_suffix(".part") {
        Some(stem) if stem.ends_with(".gguf") => false,
        None if lower.ends_with(".gguf") => true,
        _ => return None,
    };
    let meta = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let target = path.with_file_name(&name[..name.len() - if whole { 0 } else { ".part".len() }]);
    Some(Stored { path: target, bytes: meta.len(), whole, record: Record::read(path) })
}
