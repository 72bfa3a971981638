//! The tensors of a checkpoint folder: safetensors files, mapped, whole or in parts.
//!
//! The one idea: a tensor is found by name with the shape and type it must have, or refused with a line that names file and
//! tensor; what is handed out lies inside the file. Data is read piece by piece and its pages are let go of behind the
//! reader, so that a checkpoint of any size takes little memory. The `safetensors` crate reads headers.
//!
//! Not here: what tensors mean.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};

use gemrun_simd::Format;
pub(super) use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::Progress;
use super::json;
use crate::gguf::map::Source;
use crate::{Error, Kind, Result};

/// Data of a file begins behind its header, whose length comes first.
const LENGTH: usize = 8;
/// Headers of real files have some 300 KB; the crate's own limit.
const MAX_HEADER: u64 = 100_000_000;
/// Files a checkpoint may be cut into.
const MAX_SHARDS: usize = 1000;
/// Handled at a time, about.
const PIECE: usize = 1 << 20;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An open checkpoint.
pub(super) struct Checkpoint {
    files: Vec<(String, Source)>,
    tensors: BTreeMap<String, Stored>,
    used: RefCell<BTreeSet<String>>,
}

/// A tensor where it lies.
#[derive(Clone)]
pub(super) struct Stored {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    /// As in the file: the contiguous dimension last.
    pub(super) shape: Vec<usize>,
    file: usize,
    range: Range<usize>,
}

impl Checkpoint {
    /// Opens the files of `folder` and checks their headers.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there are none, [`Kind::Invalid`] with file and tensor for what is damaged.
    pub(super) fn open(folder: &Path) -> Result<Checkpoint> {
        if !folder.is_dir() {
            let error = match folder.exists() {
                true => Error::invalid(format!("{}: is not a folder: expected one with config.json", folder.display())),
                false => Error::new(Kind::NotFound, format!("{}: no such file or directory", folder.display())),
            };
            return Err(error);
        }
        if folder.join(SINGLE).exists() {
            let (source, tensors) = open_file(folder, SINGLE, 0)?;
            return Ok(Checkpoint { files: vec![(SINGLE.into(), source)], tensors, used: RefCell::default() });
        }
        let index = json::load(folder, INDEX)?.ok_or_else(|| {
            let error = format!("{}: no {SINGLE} and no {INDEX}: expected one of them", folder.display());
            Error::new(Kind::NotFound, error)
        })?;
        let index = json::Json::of(INDEX, &index);
        let mut found: Vec<BTreeMap<String, Stored>> = Vec::new();
        let mut files: Vec<(String, Source)> = Vec::new();
        let mut tensors = BTreeMap::new();
        for (name, file) in index.need("weight_map")?.entries()? {
            let shard = file.text()?;
            // A name only: an index must not lead out of its folder.
            if Path::new(shard).file_name() != Some(shard.as_ref()) {
                return Err(file.wrong("the name of a file in the same folder"));
            }
            let at = match files.iter().position(|(open, _)| open == shard) {
                Some(at) => at,
                None if files.len() == MAX_SHARDS => return Err(file.wrong(&format!("at most {MAX_SHARDS} files"))),
                None if !folder.join(shard).exists() => {
                    let error =
                        format!("{INDEX}: weight_map.{name}: {shard}: no such file: expected it beside the index");
                    return Err(Error::new(Kind::NotFound, error));
                }
                None => {
                    let (source, inside) = open_file(folder, shard, files.len())?;
                    files.push((shard.to_string(), source));
                    found.push(inside);
                    files.len() - 1
                }
            };
            let stored = found.get_mut(at).and_then(|inside| inside.remove(name)).ok_or_else(|| {
                Error::invalid(format!("{shard}: tensor {name}: missing: expected it there by {INDEX}"))
            })?;
            tensors.insert(name.to_string(), stored);
        }
        Ok(Checkpoint { files, tensors, used: RefCell::default() })
    }

    /// Paths of the open files below `folder`.
    pub(super) fn paths(&self, folder: &Path) -> Vec<PathBuf> {
        self.files.iter().map(|(name, _)| folder.join(name)).collect()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The first file, for errors about tensors that are in none.
    pub(super) fn file(&self) -> &str {
        self.files.first().map_or(SINGLE, |(name, _)| if self.files.len() > 1 { INDEX } else { name })
    }

    /// The tensor `name`, which must be there.
    pub(super) fn tensor(&self, name: &str) -> Result<&Stored> {
        self.used.borrow_mut().insert(name.to_string());
        let missing =
            || Error::invalid(format!("{}: tensor {name}: missing: expected it in the checkpoint", self.file()));
        self.tensors.get(name).ok_or_else(missing)
    }

    /// The tensor `name` of type `dtype` and of `shape`, the contiguous dimension last.
    pub(super) fn exactly(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&Stored> {
        let stored = self.tensor(name)?;
        if stored.dtype != dtype {
            return Err(self.wrong(stored, format!("type {}", stored.dtype), format!("{dtype}")));
        }
        self.shaped(stored, shape)
    }

    /// The tensor `name` of a float type and of `shape`.
    pub(super) fn floats(&self, name: &str, shape: &[usize]) -> Result<&Stored> {
        let stored = self.tensor(name)?;
        if !matches!(stored.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32) {
            return Err(self.wrong(stored, format!("type {}", stored.dtype), "BF16, F16 or F32"));
        }
        self.shaped(stored, shape)
    }

    fn shaped<'a>(&self, stored: &'a Stored, shape: &[usize]) -> Result<&'a Stored> {
        match stored.shape == shape {
            true => Ok(stored),
            false => Err(self.wrong(stored, format!("shape {:?}", stored.shape), format!("{shape:?}"))),
        }
    }

    /// That `stored` is not as expected.
    pub(super) fn wrong(
        &self,
        stored: &Stored,
        what: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> Error {
        Error::invalid(format!("{}: {what}: expected {expected}", self.place(stored)))
    }

    /// `FILE: tensor NAME`.
    pub(super) fn place(&self, stored: &Stored) -> String {
        let file = self.files.get(stored.file).map_or(SINGLE, |(name, _)| name);
        format!("{file}: tensor {}", stored.name)
    }

    /// The data of a tensor.
    pub(super) fn bytes(&self, stored: &Stored) -> &[u8] {
        let file = self.files.get(stored.file).map(|(_, source)| source.bytes());
        file.and_then(|bytes| bytes.get(stored.range.clone())).unwrap_or_default()
    }

    /// Hands the rows of `row` bytes of `stored` to `each`, about a megabyte of whole rows at a time with the number of the first,
    /// and lets go of them afterwards.
    pub(super) fn rows(
        &self,
        stored: &Stored,
        row: usize,
        meter: &Meter,
        mut each: impl FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let row = row.max(1);
        let rows = (PIECE / row).max(1);
        for (i, piece) in self.bytes(stored).chunks(rows.saturating_mul(row)).enumerate() {
            meter.add(0)?;
            each(i.saturating_mul(rows), piece)?;
            meter.add(piece.len() as u64)?;
            let start = stored.range.start.saturating_add(i.saturating_mul(rows).saturating_mul(row));
            if let Some((_, source)) = self.files.get(stored.file) {
                source.let_go(start..start.saturating_add(piece.len()));
            }
        }
        Ok(())
    }

    /// The values of an F32 tensor.
    pub(super) fn f32s(&self, stored: &Stored) -> Vec<f32> {
        self.bytes(stored).as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect()
    }

    /// Refuses an F32 tensor with a value that is not `good`.
    pub(super) fn check_f32s(&self, stored: &Stored, good: impl Fn(f32) -> bool, expected: &str) -> Result<()> {
        let values = self.bytes(stored).as_chunks().0.iter().map(|&value| f32::from_le_bytes(value));
        let bad = values.enumerate().find(|&(_, value)| !good(value));
        self.let_go(stored);
        match bad {
            Some((at, value)) => Err(self.wrong(stored, format!("value {at} is {value}"), expected)),
            None => Ok(()),
        }
    }

    /// Lets go of the pages of a tensor.
    pub(super) fn let_go(&self, stored: &Stored) {
        if let Some((_, source)) = self.files.get(stored.file) {
            source.let_go(stored.range.clone());
        }
    }

    /// Whether two tensors are the same, bit for bit.
    pub(super) fn same(&self, a: &Stored, b: &Stored, meter: &Meter) -> Result<bool> {
        if (a.dtype, &a.shape) != (b.dtype, &b.shape) {
            return Ok(false);
        }
        let mut same = true;
        for (a, b) in self.bytes(a).chunks(PIECE).zip(self.bytes(b).chunks(PIECE)) {
            meter.add(0)?;
            same = same && a == b;
        }
        self.let_go(a);
        self.let_go(b);
        Ok(same)
    }

    /// Tensors nobody asked for, by name.
    pub(super) fn unused(&self) -> Vec<&str> {
        let used = self.used.borrow();
        self.tensors.keys().map(String::as_str).filter(|&name| !used.contains(name)).collect()
    }

    /// Marks the tensor `name` as known, if it is there.
    pub(super) fn skip(&self, name: &str) {
        self.used.borrow_mut().insert(name.to_string());
    }
}

/// The format of tensors of a float type.
pub(super) fn float_format(dtype: Dtype) -> Format {
    match dtype {
        Dtype::BF16 => Format::BF16,
        Dtype::F16 => Format::F16,
        _ => Format::F32,
    }
}

/// Maps a file and reads its header.
fn open_file(folder: &Path, name: &str, file: usize) -> Result<(Source, BTreeMap<String, Stored>)> {
    let source = Source::open(&folder.join(name), name, LENGTH as u64, "a safetensors file")?;
    let bytes = source.bytes();
    let invalid = |what: String| Error::invalid(format!("{name}: header: {what}: expected a safetensors file"));
    let Some((length, rest)) = bytes.split_first_chunk() else { return Err(invalid("is missing".into())) };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(invalid(format!("has {length} bytes")));
    }
    let Some((header, data)) = rest.split_at_checked(length as usize) else {
        let short = length.saturating_sub(rest.len() as u64);
        return Err(invalid(format!("has {length} bytes, the file ends {short} bytes short")));
    };
    // The crate compares shapes, types and offsets with each other when it parses; ends are compared with the file here, since
    // they may be anything.
    let parsed: Metadata = serde_json::from_slice(header).map_err(|e| invalid(e.to_string()))?;
    let mut tensors = BTreeMap::new();
    let mut end = 0;
    for (key, info) in parsed.tensors() {
        let (from, to) = info.data_offsets;
        if to > data.len() {
            let (bytes, short) = (to.saturating_sub(from), to.saturating_sub(data.len()));
            let error =
                format!("{name}: tensor {key}: needs {bytes} bytes at offset {from}, file ends {short} bytes short");
            return Err(Error::invalid(error));
        }
        end = end.max(to);
        let start = bytes.len().saturating_sub(data.len());
        let range = start.saturating_add(from)..start.saturating_add(to);
        tensors.insert(key.clone(), Stored { name: key, dtype: info.dtype, shape: info.shape.clone(), file, range });
    }
    if end != data.len() {
        let error = format!("{name}: has {} bytes behind its tensors: expected none", data.len().saturating_sub(end));
        return Err(Error::invalid(error));
    }
    Ok((source, tensors))
}

/// How far it is, told to whoever waits.
pub(super) struct Meter<'a, 'p> {
    done: Cell<u64>,
    total: Cell<u64>,
    progress: RefCell<&'a mut Progress<'p>>,
}

impl<'a, 'p> Meter<'a, 'p> {
    pub(super) fn new(progress: &'a mut Progress<'p>) -> Meter<'a, 'p> {
        Meter { done: Cell::new(0), total: Cell::new(0), progress: RefCell::new(progress) }
    }

    /// So many bytes more will be read.
    pub(super) fn expect(&self, bytes: u64) {
        self.total.set(self.total.get().saturating_add(bytes));
    }

    /// So many bytes more are done; whether to go on.
    pub(super) fn add(&self, bytes: u64) -> Result<()> {
        self.done.set(self.done.get().saturating_add(bytes));
        match (self.progress.borrow_mut())(self.done.get(), self.total.get()) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::new(Kind::Interrupted, "interrupted")),
        }
    }
}
