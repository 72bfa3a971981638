//! One file from a hub to the store: whole and right, or not there.
//!
//! The one idea: whatever is there is read and compared first, then what is missing is asked for, and again until it is there: the damaged
//! spans of a file one by one, the rest of a part from its end on. A part is continued only if the server says that the file
//! is still the one it was; if it is another, or the server knows no ranges, it begins anew. The SHA-256 of the whole decides.
//!
//! The hub's interface is Hugging Face's: `/OWNER/REPO/resolve/REVISION/FILE`, and `/api/models/OWNER/REPO/tree/REVISION`
//! for the names of files. Not here: names of models, and talking to people.

mod http;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;

pub use self::http::Authorities;
use self::http::{Answer, Failure};
use super::store::{self, Lock, Part, Record, Verdict, interrupted};
use super::{Reference, Remote, is_name};
use crate::machine::storage;
use crate::{Error, Kind, Result};

/// Where files come from unless `HF_ENDPOINT` says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
/// A repository's list of files is not longer.
const MAX_LIST: usize = 4 << 20;
/// Times a download begins anew, or a repair again, because the file at the other end has changed.
const RESTARTS: usize = 2;
/// Longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How to talk to the hub.
#[derive(Debug, Clone)]
pub struct Network {
    /// Scheme, host and what stands before every path, without a slash at the end.
    pub endpoint: String,
    /// Access token for the endpoint.
    pub token: Option<String>,
    /// Whom to believe that it is the endpoint.
    pub authorities: Authorities,
    /// How long nothing may arrive.
    pub stall: Duration,
    /// Tries in a row that bring nothing.
    pub tries: usize,
    /// Pause after the first of them, about; each is twice as long as the one before.
    pub pause: Duration,
}

impl Network {
    /// As `HF_ENDPOINT`, `HF_TOKEN` and `SSL_CERT_FILE` say, which are looked up with `variable`.
    ///
    /// # Errors
    /// [`Kind::Usage`] if they cannot be what they should; those of [`Authorities::read`].
    pub fn new(variable: impl Fn(&str) -> Option<String>) -> Result<Network> {
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let endpoint = endpoint.trim().trim_end_matches('/').to_string();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::usage(format!("HF_ENDPOINT: {endpoint}: expected an address such as {ENDPOINT}")));
        }
        let token = variable("HF_TOKEN").map(|token| token.trim().to_string());
        if token.as_ref().is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(Error::usage("HF_TOKEN: expected letters and digits"));
        }
        let authorities = match std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()) {
            Some(path) => Authorities::read(Path::new(&path)).map_err(|e| e.within("SSL_CERT_FILE"))?,
            None => Authorities::default(),
        };
        let (stall, pause) = (Duration::from_secs(30), Duration::from_millis(500));
        Ok(Network { endpoint, token, authorities, stall, tries: 6, pause })
    }
}

/// What a download is doing.
pub enum Event<'a> {
    /// Another process downloads the same file.
    Waiting,
    /// Reading what is there: bytes done, of how many.
    Checking(u64, u64),
    /// Bytes that are there, of how many.
    Downloading(u64, u64),
    /// Putting right so many bytes of a damaged file: done, of how many.
    Repairing(u64, u64),
    /// What went wrong, and how long until the next try.
    Again(&'a Error, Duration),
    /// Nothing new; asks whether to go on.
    Nothing,
}

/// Told what is done; says whether to go on.
pub type Tell<'a> = dyn FnMut(Event<'_>) -> ControlFlow<()> + 'a;

/// How a file came to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It was there. Not read again, or read and found right.
    Present,
    /// So many bytes were fetched.
    Fetched(u64),
    /// These ranges of it were damaged, and so many bytes were fetched to put them right.
    Repaired(Vec<Range<u64>>, u64),
}

/// Sees to it that `remote` is at `target`, whole and right.
///
/// # Errors
/// [`Kind::Invalid`] if what the server has is another file than `remote` calls for, [`Kind::NotFound`] if it has none,
/// [`Kind::Interrupted`] if `tell` says so, [`Kind::Other`] if the network or the disk fails. What has been fetched is kept for the next
/// time, except of a wrong file.
pub fn fetch(network: &Network, remote: &Remote, target: &Path, tell: &mut Tell) -> Result<Outcome> {
    remote.check()?;
    if is_there(remote, target) {
        return Ok(Outcome::Present);
    }
    let folder = target.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, &e))?;
    let _lock = Lock::take(target, &mut || tell(Event::Waiting))?;
    let damaged = match look(remote, target, tell)? {
        There::Right => return Ok(Outcome::Present),
        There::Damaged(ranges, record) => {
            Part::reopen(target, *record)?;
            ranges
        }
        There::Nothing => Vec::new(),
    };
    let mut job = Job { network, remote, target, tell, fetched: 0, restarts: 0 };
    job.run()?;
    Ok(match damaged.is_empty() {
        true => Outcome::Fetched(job.fetched),
        false => Outcome::Repaired(damaged, job.fetched),
    })
}

/// Whether `remote` is at `target` as far as can be told without reading it.
pub fn is_there(remote: &Remote, target: &Path) -> bool {
    Record::read(target).is_some_and(|record| {
        let right = remote.sha256.is_none() || record.sha256 == remote.sha256;
        right && record.untouched(target)
    })
}

enum There {
    Nothing,
    Right,
    Damaged(Vec<Range<u64>>, Box<Record>),
}

/// What is at `target`, with the lock held.
fn look(remote: &Remote, target: &Path, tell: &mut Tell) -> Result<There> {
    if !target.exists() {
        return Ok(There::Nothing);
    }
    if is_there(remote, target) {
        return Ok(There::Right);
    }
    let earlier = |hash: &String| remote.supersedes.contains(hash);
    // Whole or damaged, it is replaced.
    if Record::read(target).is_some_and(|old| old.sha256.as_ref().is_some_and(earlier)) {
        return Ok(There::Nothing);
    }
    let checking = &mut |done, total| tell(Event::Checking(done, total));
    let (verdict, record) = store::verify(target, Some(remote), checking)?;
    record.write(target)?;
    match verdict {
        Verdict::Same | Verdict::Unknown(_) => Ok(There::Right),
        Verdict::Other(hash) if earlier(&hash) => Ok(There::Nothing),
        Verdict::Other(hash) => {
            let expected = remote.sha256.as_deref().unwrap_or("another");
            let error = format!("{}: sha256 {hash}: expected {expected}: remove or rename it", target.display());
            Err(Error::invalid(error))
        }
        Verdict::Damaged(ranges) => Ok(There::Damaged(ranges, Box::new(record))),
    }
}

/// A download under way.
struct Job<'a, 't> {
    network: &'a Network,
    remote: &'a Remote,
    target: &'a Path,
    tell: &'a mut Tell<'t>,
    /// Bytes that came over the network.
    fetched: u64,
    restarts: usize,
}

impl Job<'_, '_> {
    fn run(&mut self) -> Result<()> {
        let path = address(self.remote);
        let mut refilled = 0;
        loop {
            let (mut part, bad) = self.open()?;
            if !bad.is_empty() {
                refilled += 1;
                if refilled > RESTARTS {
                    let error = "what is read is not what was written: the disk fails";
                    return Err(Error::invalid(format!("{}: {error}", self.target.display())));
                }
                match self.refill(&path, &mut part, &bad) {
                    Ok(()) => continue,
                    Err(error) => self.restart(&mut part, error)?,
                }
            }
            let resumed = !part.is_empty();
            let rest = self.rest(&path, &mut part);
            if let Err(error) = rest {
                if part.is_empty() {
                    part.remove();
                } else {
                    // Worth keeping, whatever went wrong. If it cannot be kept, the first error says more.
                    let _ = part.sync();
                }
                return Err(error);
            }
            match part.finish() {
                Ok(_) => return Ok(()),
                // A part of long ago may not have been what it seemed. What came in one go is as the server has it.
                Err(error) if error.kind() == Kind::Invalid && resumed && self.restarts < RESTARTS => {
                    self.restarts += 1
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn open(&mut self) -> Result<(Part, Vec<usize>)> {
        let tell = &mut *self.tell;
        Part::open(self.target, self.remote, &mut |done, total| tell(Event::Checking(done, total)))
    }

    /// Begins anew because of `error`, unless that has happened too often.
    fn restart(&mut self, part: &mut Part, error: Error) -> Result<()> {
        if error.kind() != Kind::Invalid || self.restarts >= RESTARTS {
            return Err(error);
        }
        self.restarts += 1;
        part.clear()
    }

    /// Fetches damaged spans again.
    fn refill(&mut self, path: &str, part: &mut Part, bad: &[usize]) -> Result<()> {
        let total = bad.iter().map(|&i| part.record.span(i)).map(|span| span.end - span.start).sum();
        let mut done = 0;
        for &i in bad {
            let span = part.record.span(i);
            let mut bytes = Vec::new();
            self.tries(|job, more| {
                bytes.clear();
                let mut answer = job.get(path, Some((span.start, Some(span.end - 1))), None)?;
                if (answer.head.status, answer.head.range.0) != (206, Some((span.start, span.end - 1))) {
                    let what =
                        format!("{}: bytes {}-{} cannot be had alone", job.remote.file, span.start, span.end - 1);
                    return Err(Error::invalid(what).into());
                }
                while let Some(piece) = job.next(&mut answer)? {
                    *more = true;
                    bytes.extend(piece);
                    job.told(Event::Repairing(done + bytes.len() as u64, total))?;
                    if bytes.len() as u64 > span.end - span.start {
                        return Err(Error::invalid(format!("{}: more bytes than asked for", job.remote.file)).into());
                    }
                }
                match bytes.len() as u64 == span.end - span.start {
                    true => Ok(()),
                    false => Err(Failure::Passing(cut_short(job.remote), None)),
                }
            })?;
            part.refill(i, &bytes)?;
            done += bytes.len() as u64;
        }
        Ok(())
    }

    /// Fetches what is missing at the end.
    fn rest(&mut self, path: &str, part: &mut Part) -> Result<()> {
        // A size of 0 is one that only the server knows.
        while part.record.bytes == 0 || part.len() < part.record.bytes {
            self.tries(|job, more| job.stream(path, part, more))?;
        }
        Ok(())
    }

    /// One try at that.
    fn stream(&mut self, path: &str, part: &mut Part, more: &mut bool) -> std::result::Result<(), Failure> {
        if !part.is_empty() && part.record.etag.is_none() && part.record.sha256.is_none() {
            let what = "cannot be continued: the server does not tell one version from another";
            self.restart(part, Error::invalid(format!("{}: {what}", self.remote.file)))?;
        }
        let range = (!part.is_empty()).then(|| (part.len(), None));
        let etag = part.record.etag.clone().filter(|_| range.is_some());
        let mut answer = self.get(path, range, etag.as_deref())?;
        let head = answer.head.clone();
        let from = match (head.status, head.range) {
            (206, (Some((from, _)), _)) => from,
            (206, _) => u64::MAX,
            (416, _) => {
                // Nothing there beyond what is here, which is less than there should be: another file.
                let error = Error::invalid(format!("{}: shorter than expected", self.remote.file));
                return Ok(self.restart(part, error)?);
            }
            _ => 0,
        };
        let whole = head.range.1.or(head.length.filter(|_| head.status == 200));
        let whole = self.agreed(part, &head, whole)?;
        let differ =
            |ours: &Option<String>, theirs: &Option<String>| ours.is_some() && theirs.is_some() && ours != theirs;
        let other = part.record.bytes != whole.0
            || differ(&part.record.sha256, &whole.1)
            || (head.status == 206 && differ(&part.record.etag, &head.etag));
        if !part.is_empty() && (other || from != part.len()) {
            let what = if other { "changes while it is downloaded" } else { "the server does not continue downloads" };
            self.restart(part, Error::invalid(format!("{}: {what}", self.remote.file)))?;
            if from != 0 {
                return Ok(());
            }
        }
        if part.is_empty() {
            if from != 0 {
                let error = format!("{}: the answer does not begin at its beginning", self.remote.file);
                return Err(Error::invalid(error).into());
            }
            (part.record.bytes, part.record.sha256, part.record.etag) = (whole.0, whole.1, head.etag);
            part.sync()?;
        }
        self.check_room(part)?;
        while let Some(piece) = self.next(&mut answer)? {
            let left = part.record.bytes - part.len();
            if piece.len() as u64 > left {
                return Err(Error::invalid(format!("{}: longer than expected", self.remote.file)).into());
            }
            part.append(&piece)?;
            *more = true;
            self.told(Event::Downloading(part.len(), part.record.bytes))?;
        }
        match part.len() == part.record.bytes {
            true => Ok(()),
            false => Err(Failure::Passing(cut_short(self.remote), None)),
        }
    }

    /// Size and SHA-256 of the file at the other end, if it is the right one.
    fn agreed(&self, part: &Part, head: &http::Head, whole: Option<u64>) -> Result<(u64, Option<String>)> {
        let file = &self.remote.file;
        let newer = |what: String| {
            let error = format!("{file}: the repository has another upload: {what}");
            let hub = format!("hf:{}:{file}@main", self.remote.repo);
            Error::invalid(format!("{error}: gemrun pull {hub} takes it as it is"))
        };
        let bytes = head.bytes.or(whole).or(Some(part.record.bytes).filter(|&bytes| bytes > 0));
        let bytes =
            bytes.ok_or_else(|| Error::new(Kind::Other, format!("{file}: the server does not tell its size")))?;
        if bytes == 0 {
            return Err(Error::invalid(format!("{file}: empty: expected a model")));
        }
        if let Some(expected) = self.remote.bytes.filter(|expected| *expected != bytes) {
            return Err(newer(format!("{bytes} bytes: expected {expected}")));
        }
        if whole.is_some_and(|whole| whole != bytes) {
            let error = format!("{file}: {} bytes: expected {bytes}", whole.unwrap_or(0));
            return Err(Error::invalid(error));
        }
        match (&self.remote.sha256, &head.sha256) {
            (Some(expected), Some(theirs)) if expected != theirs => {
                Err(newer(format!("sha256 {theirs}: expected {expected}")))
            }
            (Some(hash), _) | (None, Some(hash)) => Ok((bytes, Some(hash.clone()))),
            (None, None) => Ok((bytes, part.record.sha256.clone())),
        }
    }

    /// That the rest of the file fits on the disk, with a little to spare.
    fn check_room(&self, part: &Part) -> Result<()> {
        let folder = self.target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let needed = part.record.bytes - part.len();
        let needed = needed.saturating_add(needed / 50);
        match storage::free(folder).filter(|free| *free < needed) {
            None => Ok(()),
            Some(free) => {
                let (folder, needed, free) = (folder.display(), needed as f64 / 1e9, free as f64 / 1e9);
                let file = &self.remote.file;
                let error = format!("{folder}: {free:.2} GB are free: expected {needed:.2} GB for {file}");
                Err(Error::new(Kind::Other, error))
            }
        }
    }

    fn get(
        &mut self,
        path: &str,
        range: Option<(u64, Option<u64>)>,
        etag: Option<&str>,
    ) -> std::result::Result<Answer, Failure> {
        let tell = &mut *self.tell;
        http::get(self.network, path, range, etag, &mut || tell(Event::Nothing))
    }

    fn next(&mut self, answer: &mut Answer) -> std::result::Result<Option<Vec<u8>>, Failure> {
        let tell = &mut *self.tell;
        let piece = answer.next(&mut || tell(Event::Nothing))?;
        self.fetched = self.fetched.saturating_add(piece.as_ref().map_or(0, |piece| piece.len() as u64));
        Ok(piece)
    }

    fn told(&mut self, event: Event<'_>) -> Result<()> {
        if (self.tell)(event).is_break() { Err(interrupted()) } else { Ok(()) }
    }

    /// Does `work` until it succeeds or has failed too often in a row without bringing anything.
    fn tries(&mut self, mut work: impl FnMut(&mut Self, &mut bool) -> std::result::Result<(), Failure>) -> Result<()> {
        let mut failures = 0;
        loop {
            let mut more = false;
            let (error, wait) = match work(self, &mut more) {
                Ok(()) => return Ok(()),
                Err(Failure::Final(error)) => return Err(error),
                // A connection that was there comes back; one that never was is not waited for.
                Err(Failure::Unreachable(error)) if self.fetched == 0 => return Err(error),
                Err(Failure::Unreachable(error)) => (error, None),
                Err(Failure::Passing(error, wait)) => (error, wait),
            };
            failures = if more { 0 } else { failures + 1 };
            if failures >= self.network.tries {
                return Err(error);
            }
            let pause = wait.unwrap_or_else(|| jittered(self.network.pause, failures.max(1)));
            self.told(Event::Again(&error, pause))?;
            let until = Instant::now() + pause;
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                self.told(Event::Nothing)?;
                std::thread::sleep(left.min(Duration::from_millis(50)));
            }
        }
    }
}

fn cut_short(remote: &Remote) -> Error {
    Error::new(Kind::Other, format!("{}: the connection was closed before its end", remote.file))
}

/// Pause after the n-th failure: doubled each time, and between half and all of that by chance, so that many clients do not come
/// back at once.
fn jittered(pause: Duration, failures: usize) -> Duration {
    let pause = pause.saturating_mul(1 << (failures - 1).min(16)).min(LONGEST_PAUSE);
    let chance = RandomState::new().build_hasher().finish() % 1024;
    pause.mul_f64(0.5 + chance as f64 / 2048.0)
}

/// Where the hub has it.
fn address(remote: &Remote) -> String {
    format!("/{}/resolve/{}/{}", remote.repo, remote.revision.as_deref().unwrap_or("main"), remote.file)
}

/// A line of a repository's list of files.
#[derive(Deserialize)]
struct Listed {
    #[serde(rename = "type")]
    kind: String,
    path: String,
}

/// The model files in the repository that `reference` names.
///
/// # Errors
/// Those of [`fetch`], as far as they concern the network.
pub fn models(network: &Network, reference: &Reference, tell: &mut Tell) -> Result<Vec<String>> {
    let path = format!("/api/models/{}/tree/{}", reference.repo, reference.revision.as_deref().unwrap_or("main"));
    let nothing = Remote::new(&reference.repo, "");
    let mut job = Job { network, remote: &nothing, target: Path::new(""), tell, fetched: 0, restarts: 0 };
    let mut text = Vec::new();
    job.tries(|job, _| {
        let mut answer = job.get(&path, None, None)?;
        let tell = &mut *job.tell;
        text = answer.body(MAX_LIST, &mut || tell(Event::Nothing))?;
        Ok(())
    })?;
    let wrong = |e| Error::invalid(format!("hf:{}: list of files: {e}", reference.repo));
    let listed: Vec<Listed> = serde_json::from_slice(&text).map_err(wrong)?;
    let files = listed.into_iter().filter(|file| file.kind == "file").map(|file| file.path);
    Ok(files.filter(|name| is_name(name) && is_model(name)).collect())
}

/// Whether a file of this name is a model, and not the part of one for images or for guessing ahead.
fn is_model(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name.ends_with(".gguf") && !name.contains("mmproj") && !name.starts_with("mtp-")
}
