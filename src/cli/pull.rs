//! `gemrun pull`: a model by name, from the hub to the store.
//!
//! What a download is, `gemrun::registry::download` tells. Here: which file is meant, what people see meanwhile, and the packed copy
//! at the end. Standard output is the paths of the files.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use clap::Args;
use gemrun::error::printable;
use gemrun::registry::download::{self, Event, Network, Outcome};
use gemrun::registry::store::{self, Lock, Record};
use gemrun::registry::{self, Entry, Reference, Registry, Remote, Source, Wanted};
use gemrun::{Error, Kind};

use super::open::Compute;
use super::progress::Shown;
use super::run::interrupt_flag;
use super::terminal::eprintln_quietly;
use super::{Result, config, interrupted, open, pack};

/// Download a model, or go on where a download stopped, or put right what was damaged since
#[derive(Args)]
#[command(
    after_help = "Only the text model is fetched. Its size and checksum are compared with the list of known models; gemrun list shows \
    what is there. A download that was interrupted goes on where it stopped. Of a damaged file only the damaged parts are fetched again. \
    At the end a packed copy is written if there is room for it, which is read faster (gemrun pack).\n\n\
    HF_ENDPOINT names another hub, HF_TOKEN is sent to it and to nobody else; HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE are honoured.\n\n\
    Examples:\n  \
    gemrun pull e2b\n  \
    gemrun pull hf:unsloth/gemma-4-E2B-it-qat-GGUF:gemma-4-E2B-it-qat-UD-Q4_K_XL.gguf\n  \
    gemrun pull e2b --to /media/stick     then, elsewhere: gemrun import /media/stick"
)]
pub struct Pull {
    /// Model names, or hf:OWNER/REPO[:FILE][@REVISION]
    #[arg(value_name = "MODEL", required = true)]
    models: Vec<String>,
    /// Fetch the part for images and sound, too; gemrun does not use it, other programs do
    #[arg(long)]
    projector: bool,
    /// Fetch the small model that guesses tokens ahead, too; gemrun does not use it yet
    #[arg(long)]
    drafter: bool,
    /// Put the files into DIR, for gemrun import on another computer
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    /// Write no packed copy
    #[arg(long)]
    no_pack: bool,
    /// Do not use the network: succeed only if the model is there
    #[arg(long)]
    offline: bool,
}

impl Pull {
    pub fn run(self) -> Result {
        let home = registry::home();
        let registry = open::registry(home.as_deref())?;
        let interrupt = interrupt_flag()?;
        for model in &self.models {
            let puller = Puller { home: home.as_deref(), interrupt: &interrupt, offline: self.offline };
            for (remote, place) in self.files(&registry, model, &puller)? {
                match &self.to {
                    Some(folder) => puller.to(&remote, place.as_deref(), folder)?,
                    None => {
                        let place = place.ok_or_else(no_home)?;
                        puller.get(model, &remote, &place)?;
                        if !self.no_pack {
                            pack::after_pull(model, &place, &interrupt)?;
                        }
                        writeln!(std::io::stdout(), "{}", place.display())?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The files to fetch for `model`, and where they belong in the store.
    fn files(&self, registry: &Registry, model: &str, puller: &Puller) -> Result<Vec<(Remote, Option<PathBuf>)>> {
        let place = |remote: &Remote| puller.home.map(|home| remote.place(home));
        match registry.wanted(model)? {
            Wanted::Known(name, entry) if entry.embedded => {
                eprintln_quietly(format_args!("{name}: part of the program: nothing to download"));
                Ok(Vec::new())
            }
            Wanted::Known(name, entry) => {
                let mut files: Vec<_> = entry
                    .remote()
                    .into_iter()
                    .map(|own| (own, puller.home.and_then(|home| entry.place(home))))
                    .collect();
                for (asked, part, what) in
                    [(self.projector, &entry.projector, "projector"), (self.drafter, &entry.drafter, "drafter")]
                {
                    match part {
                        Some(part) if asked => files.push((part.clone(), place(part))),
                        None if asked => {
                            let error = format!("{name}: no {what} is known");
                            return Err(Error::new(Kind::NotFound, error).into());
                        }
                        _ => {}
                    }
                }
                say_notes(name, entry);
                if let Some(why) = gemrun::machine::usable_memory()
                    .map(|usable| open::too_large(name, entry, usable))
                    .transpose()?
                    .flatten()
                {
                    eprintln_quietly(format_args!("note: {}", printable(&why)));
                }
                Ok(files)
            }
            Wanted::Hub(reference) => {
                let file = puller.file(registry, &reference)?;
                let remote = registry.remote(&reference, &file);
                let place = place(&remote);
                Ok(vec![(remote, place)])
            }
            Wanted::Path(_) => {
                let error =
                    format!("{model}: a path: expected the name of a model, or hf:OWNER/REPO[:FILE][@REVISION]");
                Err(Error::usage(error).into())
            }
        }
    }
}

/// What to know of a model before gigabytes of it are fetched.
fn say_notes(name: &str, entry: &Entry) {
    if let Some(unproven) = &entry.unproven {
        eprintln_quietly(format_args!("note: {name}: not confirmed: {}", printable(unproven)));
    }
    if let Some(notes) = &entry.notes {
        eprintln_quietly(format_args!("note: {name}: {}", printable(notes)));
    }
}

fn no_home() -> Error {
    Error::new(Kind::NotFound, "no home directory to keep models in: set GEMRUN_HOME")
}

/// Asks, on a terminal, whether a known model that is missing is to be downloaded, and does so. Nothing is asked where nobody
/// can answer; what is still missing then is said by whoever needs it.
pub fn offer(model: &str, compute: &Compute, interrupt: &AtomicBool) -> Result {
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(());
    }
    let Some(home) = registry::home() else { return Ok(()) };
    let registry = open::registry(Some(&home))?;
    let Ok(Wanted::Known(name, entry)) = registry.wanted(model) else { return Ok(()) };
    let (Some(remote), Some(place)) = (entry.remote(), entry.place(&home)) else { return Ok(()) };
    if place.is_file() {
        return Ok(());
    }
    compute.check_entry(name, entry)?;
    say_notes(name, entry);
    let size = remote.bytes.map(|bytes| format!(", {:.2} GB", bytes as f64 / 1e9)).unwrap_or_default();
    eprint_question(&format!("{} is not on this computer. Download it{size}? [Y/n] ", printable(&entry.title)));
    let answer = answer(interrupt)?;
    if !answer.is_some_and(|answer| ["", "y", "yes"].contains(&answer.trim().to_lowercase().as_str())) {
        return Ok(());
    }
    Puller { home: Some(&home), interrupt, offline: false }.get(name, &remote, &place)?;
    pack::after_pull(name, &place, interrupt)
}

/// A line from the terminal, unless it is at its end. Another thread waits for it, so that Ctrl-C is noticed at once.
fn answer(interrupt: &AtomicBool) -> Result<Option<String>> {
    let (sender, line) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut answer = String::new();
        let read = std::io::stdin().read_line(&mut answer).unwrap_or(0);
        let _ = sender.send((read > 0).then_some(answer));
    });
    loop {
        match line.recv_timeout(Duration::from_millis(50)) {
            Ok(answer) => return Ok(answer),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) if interrupt.load(Ordering::Relaxed) => {
                eprintln_quietly(format_args!(""));
                return Err(interrupted());
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

fn eprint_question(question: &str) {
    let mut err = std::io::stderr();
    let _ = write!(err, "{question}").and_then(|()| err.flush());
}

/// What all downloads of a run have in common.
struct Puller<'a> {
    home: Option<&'a Path>,
    interrupt: &'a AtomicBool,
    offline: bool,
}

impl Puller<'_> {
    /// The file that is meant where only a repository is named.
    fn file(&self, registry: &Registry, reference: &Reference) -> Result<String> {
        if let Some(file) = &reference.file {
            return Ok(file.clone());
        }
        let repo = format!("hf:{}", reference.repo);
        if self.offline {
            let mut model = repo.clone();
            model.extend(reference.revision.iter().map(|revision| format!("@{revision}")));
            if let Source::File(found) = registry.find(&model, self.home)? {
                return Ok(found.file_name().unwrap_or_default().to_string_lossy().into_owned());
            }
        }
        let network = Network::new(config::variable)?;
        let files = download::models(&network, reference, &mut |_| go_on(self.interrupt))?;
        match files.as_slice() {
            [file] => Ok(file.clone()),
            [] => Err(Error::new(Kind::NotFound, format!("{repo}: no GGUF file of a model in it")).into()),
            several => Err(Error::usage(format!(
                "{repo}: several models: name one, as in {repo}:FILE: {}",
                several.join(", ")
            ))
            .into()),
        }
    }

    /// Sees to it that `remote`, which people call `model`, is at `place`.
    fn get(&self, model: &str, remote: &Remote, place: &Path) -> Result {
        let file = printable(&remote.file);
        if download::is_there(remote, place) {
            eprintln_quietly(format_args!("{file}: here already; gemrun verify {} reads it again", printable(model)));
            return Ok(());
        }
        if self.offline {
            let error =
                format!("{model}: not in the store, or not known to be whole: expected it there with --offline");
            return Err(Error::new(Kind::NotFound, error).into());
        }
        let network = Network::new(config::variable)?;
        let size = remote.bytes.map(|bytes| format!(", {:.2} GB", bytes as f64 / 1e9)).unwrap_or_default();
        let host = network.endpoint.split_once("://").map_or(network.endpoint.as_str(), |(_, host)| host);
        eprintln_quietly(format_args!("{file}{size}, {} of {}", printable(&remote.repo), printable(host)));
        let mut told = Told { interrupt: self.interrupt, shown: None, waited: false };
        let outcome = download::fetch(&network, remote, place, &mut |event| told.tell(event));
        let seconds = told.end();
        match outcome? {
            Outcome::Present => eprintln_quietly(format_args!("{file}: here already")),
            Outcome::Fetched(bytes) => {
                let (gb, speed) = (bytes as f64 / 1e9, bytes as f64 / 1e6 / seconds.max(1e-3));
                let right = match Record::read(place).and_then(|record| record.sha256) {
                    Some(hash) if remote.sha256.as_ref() == Some(&hash) => "sha256 as expected".to_string(),
                    hash => format!("sha256 {}", hash.unwrap_or_default()),
                };
                eprintln_quietly(format_args!("fetched {gb:.2} GB in {seconds:.0} s, {speed:.0} MB/s; {right}"));
            }
            Outcome::Repaired(ranges, fetched) => {
                let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
                let (damaged, fetched) = (bytes as f64 / 1e6, fetched as f64 / 1e6);
                let right = "sha256 as expected";
                eprintln_quietly(format_args!(
                    "{file}: {damaged:.0} MB were damaged, fetched {fetched:.0} MB; {right}"
                ));
            }
        }
        Ok(())
    }

    /// Puts `remote` into `folder`: from the store, if it is there, else from the hub.
    fn to(&self, remote: &Remote, place: Option<&Path>, folder: &Path) -> Result {
        if !folder.is_dir() {
            let error = format!("{}: not a folder: expected one that is there", folder.display());
            return Err(Error::new(Kind::NotFound, error).into());
        }
        let target = folder.join(&remote.file);
        match place.filter(|place| download::is_there(remote, place) && !download::is_there(remote, &target)) {
            Some(place) => {
                let known = Record::read(place).and_then(|record| record.sha256);
                let remote = Remote { sha256: remote.sha256.clone().or(known), ..remote.clone() };
                copy(place, &target, &remote, self.interrupt)?;
            }
            None => self.get(&remote.file, remote, &target)?,
        }
        Ok(writeln!(std::io::stdout(), "{}", target.display())?)
    }
}

/// Copies a file under the eyes of the user.
pub fn copy(from: &Path, to: &Path, remote: &Remote, interrupt: &AtomicBool) -> gemrun::Result<()> {
    let _lock = Lock::take(to, &mut || go_on(interrupt))?;
    let mut shown = Shown::new("copying", interrupt);
    let copied = store::copy(from, to, remote, &mut |done, total| shown.at(done, total));
    shown.end();
    copied.map(drop)
}

fn go_on(interrupt: &AtomicBool) -> ControlFlow<()> {
    if interrupt.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// What people see of a download.
struct Told<'a> {
    interrupt: &'a AtomicBool,
    shown: Option<(&'static str, Shown<'a>)>,
    waited: bool,
}

impl Told<'_> {
    fn tell(&mut self, event: Event<'_>) -> ControlFlow<()> {
        match event {
            Event::Checking(done, total) => self.bar("checking", done, total),
            Event::Downloading(done, total) => self.bar("downloading", done, total),
            Event::Repairing(done, total) => self.bar("repairing", done, total),
            Event::Waiting => {
                if !std::mem::replace(&mut self.waited, true) {
                    eprintln_quietly(format_args!("another gemrun downloads this file: waiting until it is done"));
                }
                go_on(self.interrupt)
            }
            Event::Again(error, pause) => {
                self.end();
                eprintln_quietly(format_args!("note: {error}: trying again in {:.1} s", pause.as_secs_f64()));
                go_on(self.interrupt)
            }
            Event::Nothing => go_on(self.interrupt),
        }
    }

    fn bar(&mut self, what: &'static str, done: u64, total: u64) -> ControlFlow<()> {
        if self.shown.as_ref().is_none_or(|(shown, _)| *shown != what) {
            self.end();
            self.shown = Some((what, Shown::new(what, self.interrupt)));
        }
        self.shown.as_mut().map_or(ControlFlow::Continue(()), |(_, shown)| shown.at(done, total))
    }

    /// Takes the bar away; the seconds it was there.
    fn end(&mut self) -> f64 {
        self.shown.take().map_or(0.0, |(_, mut shown)| shown.end().as_secs_f64())
    }
}
