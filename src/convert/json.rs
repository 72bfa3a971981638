//! JSON files of a checkpoint, read with limits, and values looked up with errors that say which file and where in it.
//!
//! The one idea: a [`Json`] knows the way to itself, so that whoever reads a value need not word the error.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

/// `config.json` and its like have a few KB.
const MAX_BYTES: u64 = 64 << 20;

/// Reads the file `name` in `folder`, of at most `max` bytes; `None` if there is none.
pub(super) fn read(folder: &Path, name: &str, max: u64) -> Result<Option<Vec<u8>>> {
    let path = folder.join(name);
    let meta = match fs::metadata(&path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(&path, &e)),
    };
    if !meta.is_file() {
        return Err(Error::invalid(format!("{name}: is not a regular file: expected one in {}", folder.display())));
    }
    if meta.len() > max {
        return Err(Error::invalid(format!("{name}: has {} bytes: expected at most {max}", meta.len())));
    }
    fs::read(&path).map(Some).map_err(|e| Error::io(&path, &e))
}

/// The JSON file `name` in `folder`; `None` if there is none.
pub(super) fn load(folder: &Path, name: &str) -> Result<Option<Value>> {
    let Some(bytes) = read(folder, name, MAX_BYTES)? else { return Ok(None) };
    let value = serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("{name}: is not JSON: {e}")))?;
    Ok(Some(value))
}

/// A value and the way to it.
#[derive(Clone)]
pub(super) struct Json<'a> {
    file: &'a str,
    path: String,
    pub(super) value: &'a Value,
}

impl<'a> Json<'a> {
    /// The whole of `file`.
    pub(super) fn of(file: &'a str, value: &'a Value) -> Json<'a> {
        Json { file, path: String::new(), value }
    }

    /// The value of `key`; a null is none.
    pub(super) fn get(&self, key: &str) -> Option<Json<'a>> {
        let value = self.value.get(key).filter(|value| !value.is_null())?;
        Some(self.at(key, value))
    }

    /// The value of `key`, which must be there.
    pub(super) fn need(&self, key: &str) -> Result<Json<'a>> {
        self.get(key)
            .ok_or_else(|| Error::invalid(format!("{}: {}: missing: expected a value", self.file, self.way(key))))
    }

    fn at(&self, key: &str, value: &'a Value) -> Json<'a> {
        Json { file: self.file, path: self.way(key), value }
    }

    fn way(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_string() } else { format!("{}.{key}", self.path) }
    }

    /// That this value is not what was expected.
    pub(super) fn wrong(&self, expected: &str) -> Error {
        let mut found = self.value.to_string();
        if found.len() > 60 {
            found.truncate(found.floor_char_boundary(60));
            found.push_str("...");
        }
        Error::invalid(format!("{}: {}: {found}: expected {expected}", self.file, self.path))
    }

    /// That this value asks for something this program does not do.
    pub(super) fn unsupported(&self, expected: &str) -> Error {
        Error::unsupported(self.wrong(expected).to_string())
    }

    /// An integer from `low` to `high`.
    pub(super) fn uint(&self, low: usize, high: usize) -> Result<usize> {
        let value = self.value.as_u64().and_then(|n| usize::try_from(n).ok());
        value
            .filter(|n| (low..=high).contains(n))
            .ok_or_else(|| self.wrong(&format!("an integer from {low} to {high}")))
    }

    /// A finite number above 0, as f32.
    pub(super) fn positive(&self) -> Result<f32> {
        let value = self.value.as_f64().map(|x| x as f32);
        value.filter(|x| x.is_finite() && *x > 0.0).ok_or_else(|| self.wrong("a number above 0"))
    }

    /// A bool.
    pub(super) fn boolean(&self) -> Result<bool> {
        self.value.as_bool().ok_or_else(|| self.wrong("true or false"))
    }

    /// Text.
    pub(super) fn text(&self) -> Result<&'a str> {
        self.value.as_str().ok_or_else(|| self.wrong("text"))
    }

    /// The elements of a list.
    pub(super) fn list(&self) -> Result<Vec<Json<'a>>> {
        let list = self.value.as_array().ok_or_else(|| self.wrong("a list"))?;
        Ok(list.iter().enumerate().map(|(i, value)| self.at(&i.to_string(), value)).collect())
    }

    /// The entries of an object, in the order of the file.
    pub(super) fn entries(&self) -> Result<Vec<(&'a str, Json<'a>)>> {
        let object = self.value.as_object().ok_or_else(|| self.wrong("an object"))?;
        Ok(object.iter().map(|(key, value)| (key.as_str(), self.at(key, value))).collect())
    }
}
