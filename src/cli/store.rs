//! `gemrun list`, `path`, `verify`, `rm` and `import`: what is in the store, and how it gets in without a network.
//!
//! Files and their records are `gemrun::registry::store`'s; here are their names, and words.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Args;
use gemrun::error::printable;
use gemrun::pack;
use gemrun::registry::download;
use gemrun::registry::store::{self, Record, Stored, Verdict};
use gemrun::registry::{self, Reference, Registry, Remote, Source, Wanted};
use gemrun::{Error, Kind};
use serde_json::json;

use super::progress::Shown;
use super::pull::copy;
use super::run::interrupt_flag;
use super::terminal::eprintln_quietly;
use super::{Result, open};

/// Show which models are on this computer
#[derive(Args)]
#[command(
    after_help = "States: whole (as it was when its checksum was compared), unchecked (nobody has), changed (written to since), damaged, \
    older (there is a newer upload), partial (gemrun pull goes on).\n\n\
    Examples:\n  \
    gemrun list\n  \
    gemrun list --json"
)]
pub struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// List the known models that are not here, too
    #[arg(short, long)]
    all: bool,
}

/// Print where the file of a model is
#[derive(Args)]
#[command(after_help = "Example: llama-cli -m \"$(gemrun path e2b)\"")]
pub struct Locate {
    /// Model name, hf:OWNER/REPO[:FILE][@REVISION], or path of a GGUF file
    model: String,
}

/// Read models from end to end and compare their checksums
#[derive(Args)]
#[command(
    after_help = "Without MODEL, all that are in the store. Damaged ranges of bytes are named, and gemrun pull fetches them again.\n\n\
    Example: gemrun verify e2b"
)]
pub struct Verify {
    /// Model names, hf:OWNER/REPO[:FILE][@REVISION], or paths of GGUF files
    #[arg(value_name = "MODEL")]
    models: Vec<String>,
}

/// Remove models from this computer, with their packed copies
#[derive(Args)]
#[command(after_help = "Only what is in the store is removed, unfinished downloads too.\n\nExample: gemrun rm e2b")]
pub struct Rm {
    /// Model names, or hf:OWNER/REPO[:FILE][@REVISION]
    #[arg(value_name = "MODEL", required = true)]
    models: Vec<String>,
}

/// Copy models into the store, from a folder that gemrun pull --to has filled or from anywhere
#[derive(Args)]
#[command(
    after_help = "What lies beside a file, from gemrun pull --to, tells which model it is; else its name does. The copy is compared \
    with what is known.\n\n\
    Examples:\n  \
    gemrun import /media/stick\n  \
    gemrun import ./gemma-4-E2B_q4_0-it.gguf"
)]
pub struct Import {
    /// Folder with GGUF files, or a GGUF file
    #[arg(value_name = "DIR|FILE")]
    from: PathBuf,
    /// Write no packed copy
    #[arg(long)]
    no_pack: bool,
}

/// The store and the names in it.
struct Names {
    home: PathBuf,
    registry: Registry,
}

impl Names {
    fn load() -> gemrun::Result<Names> {
        let home = registry::home()
            .ok_or_else(|| Error::new(Kind::NotFound, "no home directory to look for models in: set GEMRUN_HOME"))?;
        Ok(Names { registry: open::registry(Some(&home))?, home })
    }

    fn files(&self) -> Vec<Stored> {
        store::list(&store::directory(&self.home))
    }

    /// What people call the file at `path`.
    fn name(&self, path: &Path) -> String {
        let name = self.registry.name_of(path, &self.home);
        printable(&name.unwrap_or_else(|| path.display().to_string()))
    }

    /// What is known of the file at `path` of the store.
    fn remote(&self, path: &Path) -> Option<Remote> {
        let remotes = self.registry.models().filter_map(|(_, entry)| entry.place(&self.home).zip(entry.remote()));
        let parts = self.registry.models().flat_map(|(_, entry)| [&entry.projector, &entry.drafter]).flatten();
        let parts = parts.map(|part| (part.place(&self.home), part.clone()));
        remotes.chain(parts).find(|(place, _)| place == path).map(|(_, remote)| remote)
    }

    /// The files that `model` stands for, here or not.
    fn places(&self, model: &str) -> gemrun::Result<Vec<PathBuf>> {
        Ok(match self.registry.wanted(model)? {
            Wanted::Known(_, entry) => {
                let parts = [&entry.projector, &entry.drafter].into_iter().flatten();
                entry.place(&self.home).into_iter().chain(parts.map(|part| part.place(&self.home))).collect()
            }
            Wanted::Hub(reference) => {
                let file = reference.file.clone().unwrap_or_default();
                let place = self.registry.remote(&reference, &file).place(&self.home);
                match reference.file {
                    Some(_) => vec![place],
                    None => store::list(&place).into_iter().map(|stored| stored.path).collect(),
                }
            }
            Wanted::Path(path) => vec![path],
        })
    }
}

/// What a file of the store is worth.
fn state(stored: &Stored, known: Option<&Remote>) -> &'static str {
    let Some(record) = stored.record.as_ref() else { return if stored.whole { "unchecked" } else { "partial" } };
    let other = known.is_some_and(|known| known.sha256.is_some() && known.sha256 != record.sha256);
    match () {
        () if !stored.whole => "partial",
        () if !record.damaged.is_empty() => "damaged",
        () if !record.untouched(&stored.path) => "changed",
        () if other
            && known.is_some_and(|known| record.sha256.as_ref().is_some_and(|h| known.supersedes.contains(h))) =>
        {
            "older"
        }
        () if other => "changed",
        () if record.repo.is_none() && known.is_none_or(|known| known.sha256.is_none()) => "unchecked",
        () => "whole",
    }
}

impl List {
    pub fn run(self) -> Result {
        let names = Names::load()?;
        let files = names.files();
        let copies = pack::list(&names.home);
        let packed = |path: &Path| {
            let place = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
            copies.iter().any(|copy| copy.trouble.is_none() && copy.source.as_deref() == Some(&place))
        };
        let mut out = std::io::stdout().lock();
        if self.json {
            let rows = files.iter().map(|stored| {
                let record = stored.record.as_ref();
                json!({
                    "name": names.name(&stored.path),
                    "path": stored.path.display().to_string(),
                    "state": state(stored, names.remote(&stored.path).as_ref()),
                    "bytes": stored.bytes,
                    "bytes_whole": record.map_or(stored.bytes, |record| record.bytes),
                    "sha256": record.and_then(|record| record.sha256.clone()),
                    "repo": record.and_then(|record| record.repo.clone()),
                    "revision": record.and_then(|record| record.revision.clone()),
                    "packed": stored.whole && packed(&stored.path),
                })
            });
            writeln!(out, "{:#}", serde_json::Value::Array(rows.collect()))?;
            return Ok(out.flush()?);
        }
        let mut rows: Vec<[String; 4]> = Vec::new();
        for stored in &files {
            let mut state = state(stored, names.remote(&stored.path).as_ref()).to_string();
            if let Some(record) = stored.record.as_ref().filter(|record| !stored.whole && record.bytes > 0) {
                state = format!("partial, {} %", stored.bytes.min(record.bytes) * 100 / record.bytes);
            }
            let packed = if stored.whole && packed(&stored.path) { "packed" } else { "" };
            rows.push([names.name(&stored.path), gb(stored.bytes), state, packed.to_string()]);
        }
        let here = rows.len();
        if self.all {
            for (name, entry) in names.registry.models() {
                if entry.embedded {
                    rows.push([name.to_string(), String::new(), "built in".into(), String::new()]);
                } else if !rows[..here].iter().any(|row| row[0] == name) {
                    let size = entry.bytes.map(gb).unwrap_or_default();
                    rows.push([name.to_string(), size, "not here".into(), String::new()]);
                }
            }
        }
        let widest = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let (name, size, state) = (widest(0), widest(1), widest(2));
        for row in &rows {
            let line = format!("{:name$}  {:>size$}  {:state$}  {}", row[0], row[1], row[2], row[3]);
            writeln!(out, "{}", line.trim_end())?;
        }
        if here == 0 {
            eprintln_quietly(format_args!(
                "no models here yet: gemrun list --all shows the known ones, gemrun pull e2b fetches one"
            ));
        }
        Ok(out.flush()?)
    }
}

fn gb(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

impl Locate {
    pub fn run(self) -> Result {
        match open::source(OsStr::new(&self.model))? {
            Source::File(path) if path.is_file() => Ok(writeln!(std::io::stdout(), "{}", path.display())?),
            Source::File(path) => Err(Error::new(Kind::NotFound, format!("{}: no such file", path.display())).into()),
            Source::Embedded(name) => {
                let error = format!("{name}: part of the program: it has no file");
                Err(Error::new(Kind::NotFound, error).into())
            }
        }
    }
}

impl Verify {
    pub fn run(self) -> Result {
        let names = Names::load()?;
        let interrupt = interrupt_flag()?;
        let paths: Vec<PathBuf> = match self.models.is_empty() {
            true => names.files().into_iter().filter(|stored| stored.whole).map(|stored| stored.path).collect(),
            false => {
                let each = self.models.iter().map(|model| names.find(model));
                each.collect::<gemrun::Result<Vec<_>>>()?.into_iter().flatten().collect()
            }
        };
        let mut wrong: Vec<String> = Vec::new();
        for path in &paths {
            let (name, found) = (names.name(path), names.verify(path, &interrupt)?);
            let told = match &found {
                Verdict::Same if names.is_earlier(path) => format!("whole, but gemrun pull {name} gets a newer upload"),
                Verdict::Same => "whole".to_string(),
                Verdict::Unknown(hash) => format!("sha256 {hash}, nothing to compare it with"),
                Verdict::Other(hash) => format!("another file than expected: sha256 {hash}"),
                Verdict::Damaged(ranges) => {
                    let ranges = ranges.iter().map(|range| format!("{}-{}", range.start, range.end - 1));
                    format!(
                        "damaged: bytes {}: gemrun pull {name} fetches them again",
                        ranges.collect::<Vec<_>>().join(", ")
                    )
                }
            };
            match found {
                Verdict::Same | Verdict::Unknown(_) => writeln!(std::io::stdout(), "{name}: {told}")?,
                Verdict::Other(_) | Verdict::Damaged(_) => wrong.push(format!("{name}: {told}")),
            }
        }
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(Error::invalid(wrong.join("; ")).into()),
        }
    }
}

impl Names {
    /// The files of `model` that are here, and at least one.
    fn find(&self, model: &str) -> gemrun::Result<Vec<PathBuf>> {
        let mut places = self.places(model)?;
        places.retain(|place| place.is_file());
        if places.is_empty() {
            // It says what to do about it, and why if it is part of the program.
            return match self.registry.find(model, Some(&self.home))? {
                Source::File(path) => Err(Error::new(Kind::NotFound, format!("{}: no such file", path.display()))),
                Source::Embedded(name) => {
                    Err(Error::new(Kind::NotFound, format!("{name}: part of the program: gemrun selftest checks it")))
                }
            };
        }
        Ok(places)
    }

    /// Whether the file at `path` is, by its record, an earlier upload of what is known.
    fn is_earlier(&self, path: &Path) -> bool {
        let supersedes = self.remote(path).map(|remote| remote.supersedes).unwrap_or_default();
        Record::read(path).and_then(|record| record.sha256).is_some_and(|hash| supersedes.contains(&hash))
    }

    fn verify(&self, path: &Path, interrupt: &AtomicBool) -> gemrun::Result<Verdict> {
        let known = self.remote(path).filter(|_| !self.is_earlier(path));
        let mut shown = Shown::new("checking", interrupt);
        let verified = store::verify(path, known.as_ref(), &mut |done, total| shown.at(done, total));
        shown.end();
        let (verdict, record) = verified?;
        // Nothing is left beside a file of somebody's own. A medium that cannot be written to can be read all the same.
        if path.starts_with(&self.home) || Record::read(path).is_some() {
            let _ = record.write(path);
        }
        Ok(verdict)
    }
}

impl Rm {
    pub fn run(self) -> Result {
        let names = Names::load()?;
        let models = store::directory(&names.home);
        for model in &self.models {
            let mut removed = Vec::new();
            for path in names.places(model)? {
                if !path.starts_with(&models) {
                    let error =
                        format!("{}: not in the store {}: remove it yourself", path.display(), models.display());
                    return Err(Error::usage(error).into());
                }
                if path.is_file() {
                    removed.extend(pack::remove(&names.home, &path)?);
                }
                removed.extend(store::remove(&path)?);
                // The folder of its repository, if it is empty now.
                let folder = path.parent().filter(|folder| *folder != models);
                let _ = folder.map(std::fs::remove_dir);
            }
            if removed.is_empty() {
                return Err(
                    Error::new(Kind::NotFound, format!("{model}: nothing of it is in {}", models.display())).into()
                );
            }
            for path in removed {
                eprintln_quietly(format_args!("removed {}", printable(&path.display().to_string())));
            }
        }
        Ok(())
    }
}

impl Import {
    pub fn run(self) -> Result {
        let names = Names::load()?;
        let interrupt = interrupt_flag()?;
        let from = &self.from;
        let files: Vec<PathBuf> = match from.is_dir() {
            true => store::list(from).into_iter().filter(|stored| stored.whole).map(|stored| stored.path).collect(),
            false if from.exists() => vec![from.clone()],
            false => {
                return Err(Error::new(Kind::NotFound, format!("{}: no such file or folder", from.display())).into());
            }
        };
        if files.is_empty() {
            return Err(Error::new(Kind::NotFound, format!("{}: no GGUF files in it", from.display())).into());
        }
        for file in files {
            let (remote, place) = names.identify(&file)?;
            let name = names.name(&place);
            if download::is_there(&remote, &place) {
                eprintln_quietly(format_args!("{name}: here already"));
            } else {
                let folder = place.parent().unwrap_or(Path::new("."));
                std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, &e))?;
                copy(&file, &place, &remote, &interrupt)?;
                let right =
                    if remote.sha256.is_some() { "sha256 as expected" } else { "nothing known to compare it with" };
                eprintln_quietly(format_args!("{name}: imported; {right}"));
            }
            if !self.no_pack {
                super::pack::after_pull(&name, &place, &interrupt)?;
            }
            writeln!(std::io::stdout(), "{}", place.display())?;
        }
        Ok(())
    }
}

impl Names {
    /// Which file this is, by what lies beside it or by its name, and where it belongs.
    fn identify(&self, file: &Path) -> gemrun::Result<(Remote, PathBuf)> {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let beside = Record::read(file).filter(|record| record.file == name);
        let origin = beside.as_ref().and_then(|record| Some((record.repo.clone()?, record)));
        if let Some((repo, record)) = origin {
            let reference = Reference { repo, file: Some(name.clone()), revision: record.revision.clone() };
            reference.check().map_err(|e| e.within(&Record::path(file).display().to_string()))?;
            let known = self.registry.remote(&reference, &name);
            let other = known.sha256.is_some() && known.sha256 != record.sha256;
            if other && !record.sha256.as_ref().is_some_and(|hash| known.supersedes.contains(hash)) {
                let (hash, expected) =
                    (record.sha256.as_deref().unwrap_or("none"), known.sha256.as_deref().unwrap_or(""));
                let error = format!("{}: sha256 {hash}: expected {expected}", file.display());
                return Err(Error::invalid(error));
            }
            let remote = Remote { bytes: Some(record.bytes), sha256: record.sha256.clone(), ..known };
            let place = remote.place(&self.home);
            return Ok((remote, place));
        }
        let entries = self.registry.models().map(|(_, entry)| entry);
        let parts = entries.flat_map(|e| e.remote().into_iter().chain(e.projector.clone()).chain(e.drafter.clone()));
        if let Some(remote) = parts.into_iter().find(|remote| remote.file == name) {
            let place = remote.place(&self.home);
            return Ok((remote, place));
        }
        if !registry::is_name(&name) {
            let error = format!("{}: expected a name of letters, digits and . _ -", file.display());
            return Err(Error::usage(error));
        }
        let remote = Remote::new("", &name);
        Ok((remote, store::directory(&self.home).join(name)))
    }
}
