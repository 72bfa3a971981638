//! What a model name on the command line stands for.
//!
//! `models.toml` is built in: names, and where each file comes from. One in the store is laid over it. A name is looked up
//! there and then in the store, which has a folder for each repository, of plain GGUF files that keep the names their
//! authors gave them. `hf:owner/repo:file` names a file that no table knows. Anything that looks like a path is a path.
//! What a table says is checked before it becomes part of a path or an address.
//!
//! Files of the store are [`store`]'s, fetching them is [`download`]'s. Nothing here opens a model or talks to a network.

pub mod download;
pub mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use crate::{Error, Kind, Result};

/// The table of known models, as written.
const MODELS: &str = include_str!("../models.toml");

/// The demo model, part of the program: a GGUF file.
pub static DEMO: &[u8] = include_bytes!("demo.gguf");

/// The same model trained for channel-wise integers and static activations, part of the program too.
pub static DEMO_MOBILE: &[u8] = include_bytes!("demo-mobile.gguf");

/// The bytes of the model that is part of the program under this name.
///
/// # Errors
///
/// `Invalid` if there is none, though `models.toml` says so.
pub fn embedded(name: &str) -> Result<&'static [u8]> {
    match name {
        "demo" => Ok(DEMO),
        "demo-mobile" => Ok(DEMO_MOBILE),
        _ => {
            Err(Error::invalid(format!("models.toml: {name}: embedded: expected a model that is part of the program")))
        }
    }
}

/// The known models.
#[derive(Debug, Deserialize)]
pub struct Registry {
    /// Version of the file's layout.
    schema: u32,
    /// By name.
    #[serde(rename = "model", default)]
    models: BTreeMap<String, Entry>,
    /// What was found in the user's file and not understood, a line each.
    #[serde(skip)]
    pub warnings: Vec<String>,
}

/// One known model.
#[derive(Debug, Clone, Deserialize)]
pub struct Entry {
    /// What it is, for people.
    pub title: String,
    /// Other names.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Repository of origin, `owner/name`.
    pub repo: Option<String>,
    /// Commit in that repository; the newest if there is none.
    pub revision: Option<String>,
    /// File name, in the repository and in the store.
    pub file: Option<String>,
    /// Size of the complete file.
    pub bytes: Option<u64>,
    /// SHA-256 of the complete file, in hex.
    pub sha256: Option<String>,
    /// SHA-256 of earlier uploads of the same file.
    #[serde(default)]
    pub supersedes: Vec<String>,
    /// What of the above could not be confirmed, for people.
    pub unproven: Option<String>,
    /// How the weights are stored: `Q4_0`.
    pub quant: Option<String>,
    /// Bytes of the weights that are read again and again: all but the per-layer embeddings.
    pub hot_bytes: Option<u64>,
    /// Bytes of the weights that one generated token reads, where a token reads a part of them: of experts, those it is sent to.
    pub token_bytes: Option<u64>,
    /// Bytes of the per-layer embeddings, of which a token reads one row.
    #[serde(default)]
    pub ple_bytes: u64,
    /// Bytes of the keys and values of one position in all global layers, as f16.
    pub kv_bytes_per_token: Option<u64>,
    /// Bytes of the keys and values of a full window in all sliding layers, as f16.
    pub kv_window_bytes: Option<u64>,
    /// Positions the model was made for.
    pub ctx_max: Option<u64>,
    /// Positions a conversation has if neither the user nor the memory says otherwise.
    pub ctx_default: Option<u64>,
    /// The file with the parts for images and sound.
    pub projector: Option<Remote>,
    /// The small model that guesses tokens ahead for this one.
    pub drafter: Option<Remote>,
    /// The model is part of the program.
    #[serde(default)]
    pub embedded: bool,
    /// SPDX name of the weights' licence.
    pub license: String,
    /// What to know before choosing it, for people.
    pub notes: Option<String>,
}

/// A file in a repository, and what is known of it. Each part can stand in a path and in an address as it is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Remote {
    /// `owner/name`.
    pub repo: String,
    /// Commit, branch or tag; the newest commit if there is none.
    pub revision: Option<String>,
    /// File name.
    pub file: String,
    /// Size of the complete file.
    pub bytes: Option<u64>,
    /// SHA-256 of the complete file, in hex.
    pub sha256: Option<String>,
    /// SHA-256 of earlier uploads of the same file.
    #[serde(skip)]
    pub supersedes: Vec<String>,
    /// The revision is not the usual one of this repository, so its files have a folder of their own.
    #[serde(skip)]
    pub apart: bool,
}

/// `hf:owner/repo[:file][@revision]`: a file of a repository that need not be in any table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `owner/name`.
    pub repo: String,
    /// File name; without one it is the only model there.
    pub file: Option<String>,
    /// Commit, branch or tag.
    pub revision: Option<String>,
}

/// What a MODEL argument means, wherever it may be.
#[derive(Debug)]
pub enum Wanted<'a> {
    /// A known model, by its name.
    Known(&'a str, &'a Entry),
    /// A file of a repository.
    Hub(Reference),
    /// A file.
    Path(PathBuf),
}

/// Where a model was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In the program itself, under this name.
    Embedded(String),
    /// A file.
    File(PathBuf),
}

/// Name of the user's table in the store.
const USER_FILE: &str = "models.toml";

impl Registry {
    /// The built-in table alone.
    ///
    /// # Errors
    /// None in a program whose tests pass.
    pub fn builtin() -> Result<Registry> {
        Registry::read(None)
    }

    /// The built-in table with the user's, `models.toml` in `store`, laid over it. Keys that nobody knows become
    /// [`Registry::warnings`]: the file may have been written for a newer gemrun.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the user's file is not a table of models, [`Kind::Other`] if it cannot be read.
    pub fn load(store: Option<&Path>) -> Result<Registry> {
        let Some(path) = store.map(|store| store.join(USER_FILE)) else { return Registry::read(None) };
        match std::fs::read_to_string(&path) {
            Ok(text) => Registry::read(Some((&path, &text))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Registry::read(None),
            Err(e) => Err(Error::io(&path, &e)),
        }
    }

    fn read(user: Option<(&Path, &str)>) -> Result<Registry> {
        let path = user.map_or(Path::new(USER_FILE), |(path, _)| path);
        let invalid = |e: toml::de::Error| Error::invalid(format!("{}: {}", path.display(), e.message()));
        let mut table: Table = toml::from_str(MODELS).map_err(invalid)?;
        if let Some((_, text)) = user {
            lay_over(&mut table, toml::from_str(text).map_err(invalid)?);
        }
        let mut warnings = Vec::new();
        let unknown = &mut |key: serde_ignored::Path<'_>| {
            warnings.push(crate::error::printable(&format!("{}: {key}: unknown key, not used", path.display())));
        };
        let mut registry: Registry = serde_ignored::deserialize(Value::Table(table), unknown).map_err(invalid)?;
        if registry.schema != 1 {
            let error = format!("{}: schema {}: expected 1", path.display(), registry.schema);
            return Err(Error::unsupported(error));
        }
        registry.check().map_err(|e| e.within(&path.display().to_string()))?;
        registry.warnings = warnings;
        Ok(registry)
    }

    /// That every entry can be used without another look at it: names are names and hashes are hashes.
    fn check(&self) -> Result<()> {
        let mut seen = BTreeMap::new();
        for (name, entry) in self.models() {
            entry.check().map_err(|e| e.within(&format!("model.{name}")))?;
            for name in entry.aliases.iter().map(String::as_str).chain([name]) {
                if !is_name(name) || is_path(name) {
                    return Err(Error::invalid(format!("{name}: expected letters, digits and . _ - in a name")));
                }
                if seen.insert(name, ()).is_some() {
                    return Err(Error::invalid(format!("{name}: the name of two models")));
                }
            }
        }
        Ok(())
    }

    /// All entries, by name.
    pub fn models(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.models.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// The entry with this name or alias, and its name.
    pub fn get(&self, name: &str) -> Option<(&str, &Entry)> {
        let named = self.models.get_key_value(name).map(|(name, entry)| (name.as_str(), entry));
        named.or_else(|| self.models().find(|(_, entry)| entry.aliases.iter().any(|alias| alias == name)))
    }

    /// What `model` means: `hf:` and a file of a repository, a path (anything with a slash or ending in `.gguf`), a known
    /// name, or an existing file.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown name, with the names there are; [`Kind::Usage`] for `hf:` and something else.
    pub fn wanted(&self, model: &str) -> Result<Wanted<'_>> {
        if let Some(rest) = model.strip_prefix("hf:") {
            let reference = Reference::parse(rest)?;
            let mut same = self.models().filter(|(_, entry)| entry.remote().is_some_and(|own| reference.means(&own)));
            return Ok(match (same.next(), same.next()) {
                (Some((name, entry)), None) => Wanted::Known(name, entry),
                _ => Wanted::Hub(reference),
            });
        }
        if is_path(model) {
            return Ok(Wanted::Path(PathBuf::from(model)));
        }
        if let Some((name, entry)) = self.get(model) {
            return Ok(Wanted::Known(name, entry));
        }
        if Path::new(model).is_file() {
            return Ok(Wanted::Path(PathBuf::from(model)));
        }
        Err(self.unknown(model))
    }

    /// Where `model` is. The network is not asked.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if it is not in the store, with the command that puts it there; those of [`Registry::wanted`].
    pub fn find(&self, model: &str, home: Option<&Path>) -> Result<Source> {
        let missing = |what: String| Error::new(Kind::NotFound, format!("{model}: {what}"));
        let home = || home.ok_or_else(|| missing("no home directory to look for models in: set GEMRUN_HOME".into()));
        match self.wanted(model)? {
            Wanted::Path(path) => Ok(Source::File(path)),
            Wanted::Known(name, entry) if entry.embedded => Ok(Source::Embedded(name.to_string())),
            Wanted::Known(name, entry) => match entry.place(home()?).filter(|path| path.is_file()) {
                Some(path) => Ok(Source::File(path)),
                None => {
                    let size = entry.bytes.map(|bytes| format!(" ({:.2} GB)", bytes as f64 / 1e9)).unwrap_or_default();
                    Err(missing(format!("not downloaded: gemrun pull {name}{size}")))
                }
            },
            Wanted::Hub(reference) => {
                let folder = self.remote(&reference, "").folder(home()?);
                let files: Vec<PathBuf> = match &reference.file {
                    Some(file) => Some(folder.join(file)).filter(|path| path.is_file()).into_iter().collect(),
                    None => store::list(&folder).into_iter().filter(|f| f.whole).map(|f| f.path).collect(),
                };
                match files.as_slice() {
                    [file] => Ok(Source::File(file.clone())),
                    [] => Err(missing(format!("not downloaded: gemrun pull {model}"))),
                    several => {
                        let names = several.iter().filter_map(|path| path.file_name()?.to_str());
                        let error = format!("{model}: several files: name one, as in {model}:FILE");
                        Err(Error::usage(format!("{error}: {}", names.collect::<Vec<_>>().join(", "))))
                    }
                }
            }
        }
    }

    /// `file` of the repository that `reference` names, and what the tables know of it.
    pub fn remote(&self, reference: &Reference, file: &str) -> Remote {
        let mut known = self.models().flat_map(|(_, entry)| entry.remotes());
        let exact = |own: &Remote| own.file == file && reference.means(own);
        let usual = |own: &Remote| own.repo == reference.repo && own.revision == reference.revision;
        known.find(exact).unwrap_or_else(|| Remote {
            apart: reference.revision.is_some() && !self.models().flat_map(|(_, e)| e.remotes()).any(|own| usual(&own)),
            revision: reference.revision.clone(),
            ..Remote::new(&reference.repo, file)
        })
    }

    /// The name of what lies at `path` in the store: of a known model, or `hf:` and where it came from.
    pub fn name_of(&self, path: &Path, home: &Path) -> Option<String> {
        let known = self.models().find(|(_, entry)| entry.place(home).is_some_and(|place| place == path));
        if let Some((name, _)) = known {
            return Some(name.to_string());
        }
        let folder = path.parent().filter(|folder| folder.parent() == Some(&store::directory(home)))?;
        let (folder, file) = (folder.file_name()?.to_str()?, path.file_name()?.to_str()?);
        let (repo, revision) = folder.split_once('@').map_or((folder, None), |(repo, revision)| (repo, Some(revision)));
        let (owner, repo) = repo.split_once("--")?;
        let revision = revision.map(|revision| format!("@{revision}")).unwrap_or_default();
        Some(format!("hf:{owner}/{repo}:{file}{revision}"))
    }

    /// That nothing has this name, and what has.
    fn unknown(&self, model: &str) -> Error {
        let names: Vec<&str> = self.models.keys().map(String::as_str).collect();
        let near = names.iter().map(|name| (distance(model, name), name)).min().filter(|(distance, _)| *distance <= 2);
        let hint = near.map(|(_, name)| format!("did you mean {name}? ")).unwrap_or_default();
        let error = format!("{model}: no such model or file: {hint}known names: {}; or give a path", names.join(", "));
        Error::new(Kind::NotFound, error)
    }
}

impl Entry {
    /// Where the model is or would be in the store at `home`; `None` if it is part of the program. A file that somebody put
    /// beside the folders, with the right name and size, will do.
    pub fn place(&self, home: &Path) -> Option<PathBuf> {
        let remote = self.remote()?;
        let (place, flat) = (remote.place(home), store::directory(home).join(&remote.file));
        let size = |bytes| remote.bytes.is_none_or(|expected| expected == bytes);
        let by_hand = || std::fs::metadata(&flat).is_ok_and(|meta| meta.is_file() && size(meta.len()));
        Some(if !place.exists() && by_hand() { flat } else { place })
    }

    /// Where the file comes from; `None` for a model that is part of the program.
    pub fn remote(&self) -> Option<Remote> {
        Some(Remote {
            repo: self.repo.clone()?,
            revision: self.revision.clone(),
            file: self.file.clone()?,
            bytes: self.bytes,
            sha256: self.sha256.clone(),
            supersedes: self.supersedes.clone(),
            apart: false,
        })
    }

    /// The file itself and those that belong to it.
    fn remotes(&self) -> Vec<Remote> {
        self.remote().into_iter().chain(self.projector.clone()).chain(self.drafter.clone()).collect()
    }

    /// Bytes of keys and values for a conversation of `ctx` positions, as f16.
    pub fn kv_bytes(&self, ctx: u64) -> Option<u64> {
        Some(self.kv_window_bytes?.saturating_add(self.kv_bytes_per_token?.saturating_mul(ctx)))
    }

    /// Bytes of weights that one generated token reads.
    pub fn token_bytes(&self) -> Option<u64> {
        self.token_bytes.or(self.hot_bytes)
    }

    /// Bytes of memory that a conversation of `ctx` positions takes, about: weights, keys and values, and what is beside them.
    pub fn resident_bytes(&self, ctx: u64) -> Option<u64> {
        /// Buffers and the tokenizer of a large vocabulary.
        const BESIDE: u64 = 100 << 20;
        Some(self.hot_bytes?.saturating_add(self.kv_bytes(ctx).unwrap_or(0)).saturating_add(BESIDE))
    }

    fn check(&self) -> Result<()> {
        let part_of_program = self.embedded && self.repo.is_none() && self.file.is_none();
        if !part_of_program && self.remote().is_none() {
            return Err(Error::invalid("expected repo and file, or embedded = true"));
        }
        for hash in &self.supersedes {
            check_hex("supersedes", hash, 64)?;
        }
        for (key, remote) in [("projector", &self.projector), ("drafter", &self.drafter)] {
            remote.as_ref().map_or(Ok(()), Remote::check).map_err(|e| e.within(key))?;
        }
        self.remote().as_ref().map_or(Ok(()), Remote::check)
    }
}

impl Remote {
    /// A file of which nothing else is known.
    pub fn new(repo: &str, file: &str) -> Remote {
        let (repo, file) = (repo.to_string(), file.to_string());
        Remote { repo, revision: None, file, bytes: None, sha256: None, supersedes: Vec::new(), apart: false }
    }

    /// The folder of its repository in the store at `home`.
    fn folder(&self, home: &Path) -> PathBuf {
        let revision = self.revision.iter().filter(|_| self.apart).map(|revision| format!("@{revision}"));
        let name = self.repo.replace('/', "--");
        store::directory(home).join(revision.fold(name, |name, revision| name + &revision))
    }

    /// Where it is or would be in the store at `home`.
    pub fn place(&self, home: &Path) -> PathBuf {
        self.folder(home).join(&self.file)
    }

    /// That each part can stand in a path and in an address as it is.
    pub(crate) fn check(&self) -> Result<()> {
        if !is_repo(&self.repo) {
            return Err(Error::invalid(format!("repo: {}: expected owner/name", self.repo)));
        }
        if !is_name(&self.file) {
            return Err(Error::invalid(format!("file: {}: expected the name of a file", self.file)));
        }
        if let Some(revision) = self.revision.as_ref().filter(|revision| !is_name(revision)) {
            return Err(Error::invalid(format!("revision: {revision}: expected a commit, branch or tag")));
        }
        self.sha256.as_ref().map_or(Ok(()), |hash| check_hex("sha256", hash, 64))
    }
}

impl Reference {
    /// What stands behind `hf:`.
    ///
    /// # Errors
    /// [`Kind::Usage`] if it does not have the form.
    pub fn parse(text: &str) -> Result<Reference> {
        let (rest, revision) = text.rsplit_once('@').map_or((text, None), |(rest, revision)| (rest, Some(revision)));
        let (repo, file) = rest.split_once(':').map_or((rest, None), |(repo, file)| (repo, Some(file)));
        let sound = is_repo(repo) && file.is_none_or(is_name) && revision.is_none_or(is_name);
        let own = |text: &str| text.to_string();
        match sound {
            true => Ok(Reference { repo: own(repo), file: file.map(own), revision: revision.map(own) }),
            false => Err(Error::usage(format!("hf:{text}: expected hf:OWNER/REPO[:FILE][@REVISION]"))),
        }
    }

    /// That each part has its form, wherever the parts are from.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if one has not.
    pub fn check(&self) -> Result<()> {
        let file = self.file.as_deref().unwrap_or("x");
        Remote { revision: self.revision.clone(), ..Remote::new(&self.repo, file) }.check()
    }

    /// Whether `remote` is what is meant: where nothing is said of file and revision, the known ones.
    fn means(&self, remote: &Remote) -> bool {
        self.repo == remote.repo
            && self.file.as_ref().is_none_or(|file| *file == remote.file)
            && (self.revision.is_none() || self.revision == remote.revision)
    }
}

/// Lays the user's table over the built-in one, field by field. An entry with another origin replaces the one of the same name:
/// nothing that is known of the one file holds for the other.
fn lay_over(table: &mut Table, user: Table) {
    for (key, value) in user {
        match (table.get_mut(&key), value) {
            (Some(Value::Table(models)), Value::Table(theirs)) if key == "model" => {
                for (name, entry) in theirs {
                    match (models.get_mut(&name), entry) {
                        (Some(Value::Table(old)), Value::Table(new))
                            if !new.contains_key("repo") && !new.contains_key("file") =>
                        {
                            old.extend(new);
                        }
                        (_, entry) => drop(models.insert(name, entry)),
                    }
                }
            }
            (_, value) => drop(table.insert(key, value)),
        }
    }
}

/// Whether `text` is a name that stands for itself in a path and in an address: letters, digits, `.`, `_`, `-`; not hidden, and so
/// neither `.` nor `..`; not empty and not of a length file systems refuse.
pub fn is_name(text: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=200).contains(&text.len()) && !text.starts_with('.') && text.chars().all(known)
}

/// Whether `text` is `owner/name`. Two hyphens in a row, which the hub does not allow either, divide the two in the names of folders.
fn is_repo(text: &str) -> bool {
    text.split_once('/').is_some_and(|(owner, name)| is_name(owner) && is_name(name)) && !text.contains("--")
}

/// Whether a MODEL argument can only be meant as a path.
fn is_path(model: &str) -> bool {
    let is_gguf = Path::new(model).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    is_gguf || model.contains(std::path::is_separator)
}

fn check_hex(key: &str, text: &str, len: usize) -> Result<()> {
    match text.len() == len && text.bytes().all(|b| b"0123456789abcdef".contains(&b)) {
        true => Ok(()),
        false => Err(Error::invalid(format!("{key}: {text}: expected {len} digits 0-9 a-f"))),
    }
}

/// The directory that holds models and the chat history: `GEMRUN_HOME`, or `gemrun` in the platform's data directory.
/// `None` where there is no home directory.
pub fn home() -> Option<PathBuf> {
    use etcetera::BaseStrategy;
    if let Some(home) = std::env::var_os("GEMRUN_HOME").filter(|home| !home.is_empty()) {
        return Some(PathBuf::from(home));
    }
    Some(etcetera::choose_base_strategy().ok()?.data_dir().join("gemrun"))
}

/// The user's settings: `config.toml` in `GEMRUN_HOME`, or in `gemrun` in the platform's configuration directory. `None` where
/// there is no home directory.
pub fn config_file() -> Option<PathBuf> {
    use etcetera::BaseStrategy;
    if let Some(home) = std::env::var_os("GEMRUN_HOME").filter(|home| !home.is_empty()) {
        return Some(PathBuf::from(home).join("config.toml"));
    }
    Some(etcetera::choose_base_strategy().ok()?.config_dir().join("gemrun/config.toml"))
}

/// Edits (insert, delete, replace one character) that turn `a` into `b`.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect(); // distances of the prefix of `a` so far to each prefix of `b`
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replace = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> Registry {
        Registry::builtin().unwrap()
    }

    fn with_user_file(text: &str) -> Result<Registry> {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("models.toml"), text).unwrap();
        Registry::load(Some(home.path()))
    }

    #[test]
    fn the_built_in_table_is_sound() {
        let registry = registry();
        assert_eq!(registry.warnings, [""; 0], "keys nobody reads");
        for (name, entry) in registry.models() {
            assert!(!entry.embedded || embedded(name).is_ok(), "{name}: embedded");
            assert!(entry.revision.as_ref().is_none_or(|commit| check_hex("", commit, 40).is_ok()), "{name}: revision");
            assert!(entry.embedded || entry.bytes.is_some_and(|bytes| bytes > 1 << 30), "{name}: bytes");
            let proven = entry.sha256.is_some() && entry.revision.is_some();
            assert!(entry.embedded || proven || entry.unproven.is_some(), "{name}: does not say what is unproven");
            assert!(!entry.supersedes.contains(entry.sha256.as_ref().unwrap_or(&String::new())), "{name}: supersedes");
            assert!(entry.embedded || entry.ctx_default <= entry.ctx_max, "{name}: ctx_default");
        }
        assert_eq!(registry.find("demo", None).unwrap(), Source::Embedded("demo".into()));
        assert_eq!(registry.get("gemma-4-e2b-it").unwrap().0, "e2b");
    }

    /// The dimensions of a model, as published, and with them the sizes of its tensors in Google's Q4_0 files: embeddings in
    /// Q6_K, per-layer projection in f16, norms and router in f32, all else in Q4_0.
    struct Shape {
        layers: u64,
        dim: u64,
        /// Of the first fifteen layers and of the others.
        ff: [u64; 2],
        heads: u64,
        /// Heads of keys and values in sliding and in global layers.
        kv_heads: [u64; 2],
        /// Every how many layers one is global.
        period: u64,
        /// Layers at the end that use the keys and values of others.
        shared: u64,
        ple: u64,
        window: u64,
        /// Number and width of experts.
        experts: [u64; 2],
    }

    #[derive(Default, Debug)]
    struct Sizes {
        hot: u64,
        /// Of experts, the eight that a token is sent to.
        token: u64,
        ple: u64,
        /// All tensors, each padded to a multiple of 32 bytes.
        padded: u64,
        kv_global: u64,
        kv_window: u64,
    }

    impl Shape {
        fn sizes(&self) -> Sizes {
            const VOCAB: u64 = 262_144;
            let mut tensors: Vec<u64> = Vec::new();
            let (mut sizes, mut unused) = (Sizes::default(), 0);
            let (d, q4, q6) = (self.dim, |n: u64| n / 32 * 18, |n: u64| n / 256 * 210);
            // token_embd, output_norm, rope_freqs; per_layer_model_proj, per_layer_proj_norm
            tensors.extend([q6(d * VOCAB), 4 * d, 4 * 256]);
            if self.ple > 0 {
                tensors.extend([2 * d * self.ple * self.layers, 4 * self.ple]);
                sizes.ple = q6(self.ple * self.layers * VOCAB);
            }
            for layer in 0..self.layers {
                let global = layer % self.period == self.period - 1;
                let head_dim = if global { 512 } else { 256 };
                let kv_heads = self.kv_heads[usize::from(global)];
                let ff = self.ff[usize::from(layer >= 15)];
                tensors.extend([4 * d; 4]); // attn_norm, post_attention_norm, ffn_norm, post_ffw_norm
                tensors.extend([4 * head_dim, 4]); // attn_q_norm, layer_output_scale
                tensors.extend([q4(d * head_dim * self.heads); 2]); // attn_q, attn_output
                tensors.extend([q4(d * ff); 3]);
                if layer < self.layers - self.shared {
                    let values_of_their_own = !global || self.ple > 0;
                    let matrix = q4(d * head_dim * kv_heads);
                    tensors.extend([matrix, 4 * head_dim]); // attn_k, attn_k_norm
                    tensors.extend(values_of_their_own.then_some(matrix)); // attn_v
                    let position = 2 * head_dim * kv_heads * 2;
                    if global {
                        sizes.kv_global += position;
                    } else {
                        sizes.kv_window += position * self.window;
                    }
                }
                if self.ple > 0 {
                    tensors.extend([q4(d * self.ple), q4(d * self.ple), 4 * d]); // inp_gate, proj, post_norm
                }
                let [experts, width] = self.experts;
                if experts > 0 {
                    unused += q4(d * 3 * width) * (experts - 8);
                    tensors.extend([4 * d * experts, 4 * d, 4 * d, 4 * d, 4 * d, 4 * experts]); // router and norms
                    tensors.extend([q4(d * 2 * width * experts), q4(d * width * experts)]);
                }
            }
            sizes.hot = tensors.iter().sum();
            sizes.token = sizes.hot - unused;
            sizes.padded = tensors.iter().chain([&sizes.ple]).map(|bytes| bytes.next_multiple_of(32)).sum();
            sizes
        }
    }

    #[test]
    fn derived_sizes_follow_from_the_dimensions() {
        let e2b = Shape {
            layers: 35,
            dim: 1536,
            ff: [6144, 12288],
            heads: 8,
            kv_heads: [1, 1],
            period: 5,
            shared: 20,
            ple: 256,
            window: 512,
            experts: [0, 0],
        };
        let e4b = Shape { layers: 42, dim: 2560, ff: [10240; 2], kv_heads: [2, 2], period: 6, shared: 18, ..e2b };
        let dense = Shape { period: 6, shared: 0, ple: 0, window: 1024, ..e2b };
        let b12 = Shape { layers: 48, dim: 3840, ff: [15360; 2], heads: 16, kv_heads: [8, 1], ..dense };
        let moe =
            Shape { layers: 30, dim: 2816, ff: [2112; 2], heads: 16, kv_heads: [8, 2], experts: [128, 704], ..dense };
        let b31 = Shape { layers: 60, dim: 5376, ff: [21504; 2], heads: 32, kv_heads: [16, 4], ..dense };
        let registry = registry();
        for (name, shape) in [("e2b", &e2b), ("e4b", &e4b), ("12b", &b12), ("26b-a4b", &moe), ("31b", &b31)] {
            let (_, entry) = registry.get(name).unwrap();
            let sizes = shape.sizes();
            assert_eq!((entry.hot_bytes, entry.ple_bytes), (Some(sizes.hot), sizes.ple), "{name}");
            assert_eq!(entry.token_bytes(), Some(sizes.token), "{name}");
            // What is left of the file is its header: a vocabulary of 262144 tokens and its merges, the same for all.
            let header = entry.bytes.unwrap() - sizes.padded;
            assert!((15_815_552..=15_833_440).contains(&header), "{name}: {header} bytes of header");
        }
        for (name, entry) in registry.models().filter(|(_, entry)| !entry.embedded) {
            let shape = match name.split('-').next().unwrap() {
                "e2b" => &e2b,
                "e4b" => &e4b,
                "12b" => &b12,
                "26b" => &moe,
                "31b" => &b31,
                _ => panic!("{name}: of which shape?"),
            };
            let sizes = shape.sizes();
            let kv = (entry.kv_bytes_per_token, entry.kv_window_bytes);
            assert_eq!(kv, (Some(sizes.kv_global), Some(sizes.kv_window)), "{name}");
            assert_eq!(entry.kv_bytes(8192), Some(sizes.kv_window + 8192 * sizes.kv_global), "{name}");
        }
    }

    #[test]
    fn the_users_table_lies_over_the_built_in_one() {
        let registry = with_user_file(
            "colour = 1\n[model.e2b]\nctx_default = 4096\nlicence = \"x\"\n[model.mine]\ntitle = \"Mine\"\nrepo = \"me/mine\"\n\
             file = \"mine.gguf\"\nlicense = \"MIT\"\n[model.e4b]\ntitle = \"My own\"\nrepo = \"me/e4b\"\nfile = \"e4b.gguf\"\nlicense = \"MIT\"",
        )
        .unwrap();
        let e2b = registry.get("e2b").unwrap().1;
        assert_eq!((e2b.ctx_default, e2b.bytes), (Some(4096), Some(3_349_516_256)));
        assert_eq!(registry.get("mine").unwrap().1.remote().unwrap().repo, "me/mine");
        assert_eq!(registry.get("e4b").unwrap().1.sha256, None, "nothing of Google's file holds for another");
        let unknown: Vec<&str> = registry.warnings.iter().map(|line| line.split_once(".toml: ").unwrap().1).collect();
        assert_eq!(unknown, ["colour: unknown key, not used", "model.e2b.licence: unknown key, not used"]);
        assert!(Registry::load(None).unwrap().warnings.is_empty());
    }

    #[test]
    fn a_users_table_cannot_lead_out_of_the_store() {
        let entry = |fields: &str| with_user_file(&format!("[model.x]\ntitle = \"X\"\nlicense = \"MIT\"\n{fields}"));
        let good = "repo = \"a/b\"\nfile = \"x.gguf\"\n";
        assert!(entry(good).is_ok());
        let hash = "0".repeat(63) + "G";
        for (fields, what) in [
            ("repo = \"a/b\"", "expected repo and file"),
            ("repo = \"a/b\"\nfile = \"../x.gguf\"", "file: ../x.gguf: expected the name of a file"),
            ("repo = \"a/b\"\nfile = \"..\"", "file: ..:"),
            ("repo = \"a/b\"\nfile = \"/etc/passwd\"", "file: /etc/passwd:"),
            ("repo = \"a/b\"\nfile = \"a\\u001b[2J\"", "file: a\\u{1b}[2J:"),
            ("repo = \"a\"\nfile = \"x.gguf\"", "repo: a: expected owner/name"),
            ("repo = \"a/b/c\"\nfile = \"x.gguf\"", "repo: a/b/c:"),
            ("repo = \"../b\"\nfile = \"x.gguf\"", "repo: ../b:"),
            ("repo = \"a/b?x\"\nfile = \"x.gguf\"", "repo: a/b?x:"),
            (&format!("{good}revision = \"a/../b\""), "revision: a/../b:"),
            (&format!("{good}sha256 = \"{hash}\""), "expected 64 digits"),
            (&format!("{good}supersedes = [\"\"]"), "supersedes: : expected 64 digits"),
            (&format!("{good}aliases = [\"a/b\"]"), "a/b: expected letters"),
            (&format!("{good}aliases = [\"e2b\"]"), "e2b: the name of two models"),
            (&format!("{good}bytes = -1"), "invalid value"),
            (&format!("{good}[model.x.projector]\nrepo = \"a/b\"\nfile = \"..\""), "projector: file: ..:"),
        ] {
            let error = entry(fields).unwrap_err();
            assert!(error.to_string().contains(what) && error.to_string().contains("models.toml: "), "{error}");
            assert_eq!(error.exit_code(), 5);
        }
        for text in ["x", "model = 1", "[model]\nx = 1", "schema = \"one\""] {
            assert_eq!(with_user_file(text).unwrap_err().exit_code(), 5, "{text}");
        }
        assert_eq!(with_user_file("schema = 2").unwrap_err().exit_code(), 6);
    }

    #[test]
    fn paths_are_paths() {
        for path in ["./demo", "a/b", "missing.gguf", "/models/E2B.GGUF"] {
            assert_eq!(registry().find(path, None).unwrap(), Source::File(path.into()));
        }
    }

    #[test]
    fn a_name_finds_its_file_in_the_store() {
        let (registry, home) = (registry(), tempfile::tempdir().unwrap());
        let find = |model: &str| registry.find(model, Some(home.path()));
        let missing = find("e2b").unwrap_err();
        assert_eq!(
            (missing.exit_code(), missing.to_string().as_str()),
            (3, "e2b: not downloaded: gemrun pull e2b (3.35 GB)")
        );
        let folder = home.path().join("models/google--gemma-4-E2B-it-qat-q4_0-gguf");
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("gemma-4-E2B_q4_0-it.gguf");
        std::fs::write(&path, "").unwrap();
        let other = "hf:google/gemma-4-E2B-it-qat-q4_0-gguf:gemma-4-E2B_q4_0-it.gguf";
        let pinned = format!("{other}@675cff42a74c774d6cb76f76d8eacb49b48c9b93");
        for name in ["e2b", "gemma-4-e2b", "hf:google/gemma-4-E2B-it-qat-q4_0-gguf", other, &pinned] {
            assert_eq!(find(name).unwrap(), Source::File(path.clone()), "{name}");
        }
        assert_eq!(registry.name_of(&path, home.path()).unwrap(), "e2b");
        assert_eq!(find(&format!("{other}@main")).unwrap_err().exit_code(), 3, "another revision is another file");

        // Beside the folders only what has the right size.
        let flat = home.path().join("models/gemma-4-E4B_q4_0-it.gguf");
        let file = std::fs::File::create(&flat).unwrap();
        assert_eq!(find("e4b").unwrap_err().exit_code(), 3);
        file.set_len(5_154_941_280).unwrap();
        assert_eq!(find("e4b").unwrap(), Source::File(flat));
    }

    #[test]
    fn files_of_repositories_have_names_of_their_own() {
        let (registry, home) = (registry(), tempfile::tempdir().unwrap());
        let find = |model: &str| registry.find(model, Some(home.path()));
        let put = |path: &str| {
            let path = home.path().join("models").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "").unwrap();
            path
        };
        assert_eq!(find("hf:me/mine").unwrap_err().to_string(), "hf:me/mine: not downloaded: gemrun pull hf:me/mine");
        let one = put("me--mine/one.gguf");
        put("me--mine/unfinished.gguf.part");
        assert_eq!(find("hf:me/mine").unwrap(), Source::File(one.clone()));
        assert_eq!(registry.name_of(&one, home.path()).unwrap(), "hf:me/mine:one.gguf");
        let two = put("me--mine/two.gguf");
        assert_eq!(find("hf:me/mine:two.gguf").unwrap(), Source::File(two));
        let several = find("hf:me/mine").unwrap_err();
        assert_eq!(
            several.to_string(),
            "hf:me/mine: several files: name one, as in hf:me/mine:FILE: one.gguf, two.gguf"
        );
        let apart = put("me--mine@v2/one.gguf");
        assert_eq!(find("hf:me/mine@v2").unwrap(), Source::File(apart.clone()));
        assert_eq!(registry.name_of(&apart, home.path()).unwrap(), "hf:me/mine:one.gguf@v2");
        for wrong in [
            "hf:",
            "hf:mine",
            "hf:me/mine/x",
            "hf:../mine",
            "hf:me/..",
            "hf:me/mine:../x",
            "hf:me/mine:a/b.gguf",
            "hf:me/mine@a/b",
            "hf:me/mine@..",
            "hf:me/mine:",
            "hf:me/mine@",
            "hf:me/mi--ne",
            "hf:me/m\u{e9}",
            "hf:me/mine?x=y",
        ] {
            let error = find(wrong).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{wrong}");
            assert!(error.to_string().ends_with("expected hf:OWNER/REPO[:FILE][@REVISION]"), "{error}");
        }
    }

    #[test]
    fn unknown_names_list_the_known_ones() {
        let error = registry().find("e2", None).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert_eq!(
            error.to_string(),
            "e2: no such model or file: did you mean e2b? known names: 12b, 26b-a4b, 31b, demo, demo-mobile, e2b, e2b-mobile, e2b-s, e2b-ud, e4b, e4b-mobile, e4b-s; or give a path"
        );
        assert!(!registry().find("llama", None).unwrap_err().to_string().contains("did you mean"));
    }

    #[test]
    fn edit_distance() {
        for (a, b, d) in [("", "", 0), ("", "ab", 2), ("e2b", "e4b", 1), ("dmeo", "demo", 2), ("kitten", "sitting", 3)]
        {
            assert_eq!((distance(a, b), distance(b, a)), (d, d), "{a} {b}");
        }
    }
}
