//! What a model name on the command line stands for.
//!
//! `models.toml` is built in: names, and where each file comes from. A name is looked up there and then in the
//! store, one directory of plain GGUF files that keep the names their authors gave them. Anything that looks like a
//! path is a path. Nothing here opens a file or talks to a network.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

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
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// Version of the file's layout.
    schema: u32,
    /// By name.
    #[serde(rename = "model")]
    models: BTreeMap<String, Entry>,
}

/// One known model.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What it is, for people.
    pub title: String,
    /// Repository of origin, `owner/name`.
    pub repo: Option<String>,
    /// Commit in that repository.
    pub revision: Option<String>,
    /// File name, in the repository and in the store.
    pub file: Option<String>,
    /// Size of the complete file.
    pub bytes: Option<u64>,
    /// SHA-256 of the complete file, in hex.
    pub sha256: Option<String>,
    /// The model is part of the program.
    #[serde(default)]
    pub embedded: bool,
    /// SPDX name of the weights' licence.
    pub license: String,
}

/// Where a model was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In the program itself, under this name.
    Embedded(String),
    /// A file.
    File(PathBuf),
}

impl Registry {
    /// The built-in table.
    pub fn builtin() -> Result<Registry> {
        let parsed: std::result::Result<Registry, _> = toml::from_str(MODELS);
        let registry = parsed.map_err(|e| Error::invalid(format!("models.toml: {}", e.message())))?;
        match registry.schema {
            1 => Ok(registry),
            other => Err(Error::unsupported(format!("models.toml: schema {other}: expected 1"))),
        }
    }

    /// All entries, by name.
    pub fn models(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.models.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// What `model` stands for: a path (anything with a slash or ending in `.gguf`), a known name, or an existing
    /// file. A known model that is not in the store is [`Kind::NotFound`] with where to get it and where to put it;
    /// so is an unknown name, with the names there are.
    pub fn find(&self, model: &str, store: Option<&Path>) -> Result<Source> {
        if let Some(rest) = model.strip_prefix("hf:") {
            let error =
                format!("{model}: downloads are not supported: get {rest} yourself and give the path of the file");
            return Err(Error::unsupported(error));
        }
        let is_gguf = Path::new(model).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        if is_gguf || model.contains(std::path::is_separator) {
            return Ok(Source::File(PathBuf::from(model)));
        }
        if let Some(entry) = self.models.get(model) {
            return entry.find(model, store);
        }
        if Path::new(model).is_file() {
            return Ok(Source::File(PathBuf::from(model)));
        }
        let names: Vec<&str> = self.models.keys().map(String::as_str).collect();
        let near = names.iter().map(|name| (distance(model, name), name)).min().filter(|(distance, _)| *distance <= 2);
        let hint = near.map(|(_, name)| format!("did you mean {name}? ")).unwrap_or_default();
        let error = format!("{model}: no such model or file: {hint}known names: {}; or give a path", names.join(", "));
        Err(Error::new(Kind::NotFound, error))
    }
}

impl Entry {
    fn find(&self, name: &str, store: Option<&Path>) -> Result<Source> {
        if self.embedded {
            return Ok(Source::Embedded(name.to_string()));
        }
        let (Some(file), Some(repo)) = (&self.file, &self.repo) else {
            return Err(Error::invalid(format!("models.toml: {name}: neither embedded nor a file of a repository")));
        };
        let Some(store) = store else {
            let error = format!("{name}: no home directory to look for {file} in: set GEMRUN_HOME");
            return Err(Error::new(Kind::NotFound, error));
        };
        let path = store.join("models").join(file);
        if path.is_file() {
            return Ok(Source::File(path));
        }
        let size = self.bytes.map(|bytes| format!(" ({:.2} GB)", bytes as f64 / 1e9)).unwrap_or_default();
        let error = format!("{name}: not downloaded: put {file}{size} from {repo} at {}", path.display());
        Err(Error::new(Kind::NotFound, error))
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

    #[test]
    fn the_built_in_table_is_sound() {
        for (name, entry) in registry().models() {
            assert!(entry.embedded || (entry.file.is_some() && entry.repo.is_some()), "{name}");
            let hex =
                |text: &String, len: usize| text.len() == len && text.bytes().all(|b| b"0123456789abcdef".contains(&b));
            assert!(entry.sha256.as_ref().is_none_or(|hash| hex(hash, 64)), "{name}: sha256");
            assert!(entry.revision.as_ref().is_none_or(|commit| hex(commit, 40)), "{name}: revision");
            assert!(entry.file.as_ref().is_none_or(|file| !file.contains(['/', '\\'])), "{name}: file");
            assert!(!entry.embedded || embedded(name).is_ok(), "{name}: embedded");
            assert!(!name.contains(std::path::is_separator) && !name.ends_with(".gguf"), "{name} reads as a path");
        }
        assert_eq!(registry().find("demo", None).unwrap(), Source::Embedded("demo".into()));
    }

    #[test]
    fn paths_are_paths() {
        for path in ["./demo", "a/b", "missing.gguf", "/models/E2B.GGUF"] {
            assert_eq!(registry().find(path, None).unwrap(), Source::File(path.into()));
        }
    }

    #[test]
    fn a_name_finds_its_file_in_the_store() {
        let home = tempfile::tempdir().unwrap();
        let missing = registry().find("e2b", Some(home.path())).unwrap_err();
        assert_eq!(missing.exit_code(), 3);
        let path = home.path().join("models/gemma-4-E2B_q4_0-it.gguf");
        assert_eq!(
            missing.to_string(),
            format!(
                "e2b: not downloaded: put gemma-4-E2B_q4_0-it.gguf (3.35 GB) from google/gemma-4-E2B-it-qat-q4_0-gguf at {}",
                path.display()
            )
        );
        std::fs::create_dir(home.path().join("models")).unwrap();
        std::fs::write(&path, "").unwrap();
        assert_eq!(registry().find("e2b", Some(home.path())).unwrap(), Source::File(path));
    }

    #[test]
    fn unknown_names_list_the_known_ones() {
        let error = registry().find("e2", None).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert_eq!(
            error.to_string(),
            "e2: no such model or file: did you mean e2b? known names: 12b, 26b-a4b, 31b, demo, demo-mobile, e2b, e4b; or give a path"
        );
        assert!(!registry().find("llama", None).unwrap_err().to_string().contains("did you mean"));
        assert_eq!(registry().find("hf:google/x", None).unwrap_err().exit_code(), 6);
    }

    #[test]
    fn edit_distance() {
        for (a, b, d) in [("", "", 0), ("", "ab", 2), ("e2b", "e4b", 1), ("dmeo", "demo", 2), ("kitten", "sitting", 3)]
        {
            assert_eq!((distance(a, b), distance(b, a)), (d, d), "{a} {b}");
        }
    }
}
