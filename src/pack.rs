//! Packed copies: the matrices of a model once more, in interleaved order, as a file in the store.
//!
//! The one idea: a copy is a GGUF file that holds only what a token is multiplied by, each matrix under its own name,
//! type and shape, with every eight rows side by side ([`gemrun_simd::interleave`]). It is made in one pass over the source,
//! a megabyte at a time, and is mapped from then on; everything else, embedding tables above all, is still read where the
//! source is mapped. Its architecture is [`ARCHITECTURE`], so that no other program takes it for a model.
//!
//! ```text
//! pack.layout             version of the order of bytes and of this list
//! pack.source.path        where the source was
//! pack.source.key         SHA-256 of the source's size, time of change, tensor table and a few of its weights
//! blk.0.attn_q.weight     and so on, in the order of the source
//! pack.sha256             three digests: the source, this header, the data between header and digests
//! ```
//!
//! A copy belongs to a source if their keys agree, and is used if its header's digest agrees too, which takes less than a
//! millisecond. Data is compared only when asked ([`Packed::check`]), as nobody compares a model's data each time it is
//! opened. What does not fit is not used, and the reason given.
//!
//! Not here: which matrices are worth it (`model.rs` knows), and talking to people.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use gemrun_simd::Format;
use gemrun_simd::interleave::ROWS;
use sha2::{Digest, Sha256};

use crate::gguf::write::Writer;
use crate::gguf::{Bytes, Gguf, I8, Tensor, Value};
use crate::lock::Lock;
use crate::machine::storage;
use crate::new_file::NewFile;
use crate::{Error, Kind, Result};

/// What the copies call themselves in `general.architecture`.
pub const ARCHITECTURE: &str = "gemrun-pack";
/// Version of the order of bytes within a tensor and of the file's keys. Copies of another version are made again.
const LAYOUT: u32 = 2;
/// Tensor data starts at multiples of this, the largest page in use, so that advice on a tensor concerns no other.
const ALIGNMENT: u32 = 65_536;
/// Name of the tensor with the digests, bytes.
const DIGESTS: &str = "pack.sha256";
const DIGEST_BYTES: usize = 32;
/// Read and written at a time, about.
const PIECE: usize = 1 << 20;
/// The most that eight rows may have. Those of the largest model have 200 KB; a file full of holes can claim gigabytes, which
/// would have to be held in memory.
const MAX_GROUP: usize = 64 << 20;
/// Matrices whose first bytes are part of the key, at most, and how many bytes. They tell two models apart whose sizes,
/// shapes and times are the same: archives and package stores set all times to one value.
const SAMPLES: usize = 16;
const SAMPLE_BYTES: usize = 64;

/// Told the bytes read so far and of how many; says whether to go on.
pub type Progress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + 'a;

/// A copy that belongs to its source.
pub struct Packed(Gguf);

/// What the store has for a source.
pub enum Found {
    /// No copy.
    Nothing,
    /// One that may be used.
    Copy(Packed),
    /// One that may not: why, as `FILE: WHAT IS WRONG`.
    Unusable(Error),
}

/// What tells a source from others, and from itself after a change, without reading much of it.
struct Identity {
    path: PathBuf,
    bytes: u64,
    /// Nanoseconds since 1970.
    modified: i64,
    /// SHA-256 of size, time, tensor table and samples, in hex. Not of the path: files are moved.
    key: String,
}

impl Identity {
    fn of(source: &Gguf) -> Option<Identity> {
        let (path, modified) = source.origin()?;
        let modified = match modified.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |n| -n),
        };
        let bytes = source.file_bytes();
        let mut hash = Sha256::new();
        hash.update(bytes.to_le_bytes());
        hash.update(modified.to_le_bytes());
        for tensor in source.tensors() {
            hash.update((tensor.name.len() as u64).to_le_bytes());
            hash.update(&tensor.name);
            hash.update(tensor.type_id.to_le_bytes());
            tensor.dims.iter().chain([&tensor.offset]).for_each(|n| hash.update(n.to_le_bytes()));
        }
        let matrices: Vec<&Tensor> = source.tensors().iter().filter(|tensor| interleaves(tensor)).collect();
        for tensor in matrices.iter().step_by(matrices.len().div_ceil(SAMPLES).max(1)) {
            let bytes = source.bytes(tensor);
            hash.update(&bytes[..bytes.len().min(SAMPLE_BYTES)]);
        }
        Some(Identity { path: place(path), bytes, modified, key: hex(&hash.finalize()) })
    }

    /// End of the names of this source's copies. Half of the key is enough for a name; the file has all of it.
    fn suffix(&self) -> String {
        format!("-{}.gguf", &self.key[..32])
    }
}

/// What tells a model from others, without reading much of it, in hex: a file's key as copies have it, the digest of one that is part
/// of the program.
pub fn key(source: &Gguf) -> String {
    match Identity::of(source) {
        Some(identity) => identity.key,
        None => hex(&Sha256::digest(source.all_bytes())),
    }
}

/// The path that is recorded for a file, also for one that is gone.
fn place(path: &Path) -> PathBuf {
    fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_path_buf())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The directory of copies in `store`.
pub fn directory(store: &Path) -> PathBuf {
    store.join("packed")
}

/// The files that may be copies, by name.
fn files(store: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory(store)).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|e| e == "gguf")).collect();
    files.sort();
    files
}

fn ends_with(path: &Path, suffix: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(suffix))
}

/// The path of the source as a copy has it.
fn recorded(copy: &Gguf) -> Option<&[u8]> {
    match copy.get("pack.source.path") {
        Some(Value::Str(path)) => Some(path),
        _ => None,
    }
}

/// Whether the file at `copy` was made from one at `path`.
fn made_from(copy: &Path, path: &Path) -> bool {
    Gguf::open(copy).is_ok_and(|copy| recorded(&copy) == Some(path.as_os_str().as_encoded_bytes()))
}

/// Looks for a copy of `source`.
pub fn find(store: &Path, source: &Gguf) -> Found {
    let files = files(store);
    if files.is_empty() {
        return Found::Nothing;
    }
    let Some(identity) = Identity::of(source) else { return Found::Nothing };
    match files.iter().find(|path| ends_with(path, &identity.suffix())) {
        Some(path) => match Packed::open(path, source, &identity) {
            Ok(packed) => Found::Copy(packed),
            Err(error) => Found::Unusable(error),
        },
        None => match files.iter().find(|path| made_from(path, &identity.path)) {
            Some(path) => {
                let copy = path.file_name().unwrap_or_default().to_string_lossy();
                Found::Unusable(Error::invalid(format!("{copy}: {} has changed since it was packed", source.name())))
            }
            None => Found::Nothing,
        },
    }
}

impl Packed {
    fn open(path: &Path, source: &Gguf, identity: &Identity) -> Result<Packed> {
        let packed = Packed(Gguf::open(path)?);
        let copy = &packed.0;
        if copy.string("general.architecture")? != Some(ARCHITECTURE) {
            return Err(packed.wrong("general.architecture is not that of a packed copy"));
        }
        match copy.uint("pack.layout")? {
            Some(layout) if layout == u64::from(LAYOUT) => {}
            Some(layout) => return Err(packed.wrong(format!("layout {layout}: expected {LAYOUT}"))),
            None => return Err(packed.wrong("layout: missing")),
        }
        if copy.string("pack.source.key")? != Some(&identity.key) {
            return Err(packed.wrong(format!("is not a copy of {}", source.name())));
        }
        if packed.digests()?[1] != header_digest(copy) {
            return Err(packed.wrong("header: damaged"));
        }
        for tensor in copy.tensors().iter().filter(|tensor| tensor.name != DIGESTS) {
            let same = source.tensor(&tensor.name).filter(|s| (s.type_id, s.dims) == (tensor.type_id, tensor.dims));
            if !same.is_some_and(interleaves) {
                return Err(packed.wrong(format!("tensor {}: not one of {}", tensor.name, source.name())));
            }
        }
        Ok(packed)
    }

    fn wrong(&self, what: impl AsRef<str>) -> Error {
        Error::invalid(format!("{}: {}", self.0.name(), what.as_ref()))
    }

    /// The file's name without its folder.
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// Size of the file.
    pub fn file_bytes(&self) -> u64 {
        self.0.file_bytes()
    }

    /// The matrix that is `tensor` in the source, interleaved; `None` if it is not packed.
    pub fn bytes(&self, tensor: &Tensor) -> Option<Bytes> {
        let own = self.0.tensor(&tensor.name)?;
        ((own.type_id, own.dims) == (tensor.type_id, tensor.dims)).then(|| self.0.bytes(own))
    }

    /// Digests of the source, of the header, of the data.
    fn digests(&self) -> Result<[[u8; DIGEST_BYTES]; 3]> {
        let tensor = self.0.tensor(DIGESTS).ok_or_else(|| self.wrong(format!("tensor {DIGESTS}: missing")))?;
        match self.0.bytes(tensor).as_chunks() {
            ([source, header, data], []) => Ok([*source, *header, *data]),
            _ => Err(self.wrong(format!("tensor {DIGESTS}: {} bytes", tensor.bytes))),
        }
    }

    /// Reads source and copy from end to end and compares their digests.
    ///
    /// # Errors
    /// [`Kind::Invalid`] with the file that is not what it was, [`Kind::Interrupted`] if `progress` says so.
    pub fn check(&self, source: &Gguf, progress: &mut Progress) -> Result<()> {
        let [source_digest, _, data_digest] = self.digests()?;
        let end = self.0.tensor(DIGESTS).map_or(0, |tensor| tensor.offset).saturating_add(self.0.data_start());
        let total = source.file_bytes().saturating_add(end);
        let mut reader = Reader::new(source, progress, total)?;
        reader.skip_to(source.file_bytes())?;
        if reader.digest() != source_digest {
            return Err(Error::invalid(format!("{}: is not the file that was packed", source.name())));
        }
        let done = reader.done;
        let mut reader = Reader { done, ..Reader::new(&self.0, progress, total)? };
        reader.skip_to(self.0.data_start())?;
        reader.digest(); // the header was compared when the copy was opened
        reader.skip_to(end)?;
        if reader.digest() != data_digest {
            return Err(self.wrong("data: damaged"));
        }
        Ok(())
    }
}

/// Whether a tensor may be one whose rows are interleaved: of such a format, or integers, of which the model knows the format.
fn interleaves(tensor: &Tensor) -> bool {
    let known = Format::from_ggml(tensor.type_id).is_some_and(Format::interleaves) || tensor.type_id == I8;
    known && rows(tensor).is_multiple_of(ROWS) && group_bytes(tensor) <= MAX_GROUP
}

fn rows(tensor: &Tensor) -> usize {
    tensor.dims[1..].iter().map(|&n| n as usize).product()
}

/// Bytes of the rows that are interleaved with each other.
fn group_bytes(tensor: &Tensor) -> usize {
    tensor.bytes as usize / rows(tensor) * ROWS
}

/// Digest of everything before the data: the header and the zeros behind it.
fn header_digest(copy: &Gguf) -> [u8; DIGEST_BYTES] {
    let header = copy.header_bytes();
    let padding = copy.data_start().saturating_sub(header.len() as u64).min(ALIGNMENT.into());
    Sha256::new().chain_update(header).chain_update(vec![0; padding as usize]).finalize().into()
}

/// A file read from front to back and hashed on the way.
struct Reader<'a, 'p> {
    file: File,
    path: PathBuf,
    at: u64,
    hash: Sha256,
    buf: Vec<u8>,
    done: u64,
    total: u64,
    progress: &'a mut Progress<'p>,
}

impl<'a, 'p> Reader<'a, 'p> {
    fn new(gguf: &Gguf, progress: &'a mut Progress<'p>, total: u64) -> Result<Reader<'a, 'p>> {
        let path = gguf.origin().map(|(path, _)| path.to_path_buf()).unwrap_or_default();
        let file = File::open(&path).map_err(|e| Error::io(&path, &e))?;
        Ok(Reader { file, path, at: 0, hash: Sha256::new(), buf: Vec::new(), done: 0, total, progress })
    }

    /// The next `len` bytes.
    fn read(&mut self, len: usize) -> Result<&[u8]> {
        if (self.progress)(self.done, self.total).is_break() {
            return Err(Error::new(Kind::Interrupted, "interrupted"));
        }
        self.buf.resize(len, 0);
        self.file.read_exact(&mut self.buf).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => Error::invalid(format!("{}: cut short while it was read", self.path.display())),
            _ => Error::io(&self.path, &e),
        })?;
        self.hash.update(&self.buf);
        (self.at, self.done) = (self.at.saturating_add(len as u64), self.done.saturating_add(len as u64));
        Ok(&self.buf)
    }

    fn skip_to(&mut self, offset: u64) -> Result<()> {
        while self.at < offset {
            self.read((offset - self.at).min(PIECE as u64) as usize)?;
        }
        Ok(())
    }

    /// Digest of what was read since the last one.
    fn digest(&mut self) -> [u8; DIGEST_BYTES] {
        self.hash.finalize_reset().into()
    }
}

/// The new file, and the digest of what passes.
struct Output {
    file: NewFile,
    hash: Sha256,
}

/// [`Output`] as both the writer of GGUF files and the writer of a tensor hold it.
struct Shared<'a>(&'a RefCell<Output>);

impl Write for Shared<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut out = self.0.borrow_mut();
        let n = out.file.write(bytes)?;
        out.hash.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.borrow_mut().file.flush()
    }
}

/// One process at a time changes the directory.
fn lock(directory: &Path) -> Result<Lock> {
    Lock::try_take(&directory.join("lock"))?.ok_or_else(|| {
        let error = format!("{}: another gemrun is packing: try again when it is done", directory.display());
        Error::new(Kind::Other, error)
    })
}

/// Writes the copy of `source` with the matrices `names` and removes earlier ones of the same file; where it is. Until it is
/// complete and on the disk, nothing has its name.
///
/// # Errors
/// [`Kind::Unsupported`] if there is nothing to pack, [`Kind::Invalid`] if the source changes meanwhile,
/// [`Kind::Interrupted`] if `progress` says so, [`Kind::Other`] if the disk is full or another process is packing.
pub fn write(store: &Path, source: &Gguf, names: &[(String, Format)], progress: &mut Progress) -> Result<PathBuf> {
    let Some(identity) = Identity::of(source) else {
        return Err(Error::unsupported(format!("{}: part of the program: expected a file to pack", source.name())));
    };
    let found = names.iter().filter_map(|(name, format)| Some((source.tensor(name)?, *format)));
    let mut matrices: Vec<(&Tensor, Format)> = found.filter(|(tensor, _)| interleaves(tensor)).collect();
    matrices.sort_by_key(|(tensor, _)| tensor.offset);
    if matrices.is_empty() {
        let error =
            format!("{}: nothing to pack: all its matrices are read best as they lie in the file", source.name());
        return Err(Error::unsupported(error));
    }

    let directory = directory(store);
    fs::create_dir_all(&directory).map_err(|e| Error::io(&directory, &e))?;
    let _lock = lock(&directory)?;
    remove_unfinished(&directory);
    let aligned: u64 = matrices.iter().map(|(tensor, _)| tensor.bytes.next_multiple_of(ALIGNMENT.into())).sum();
    let needed = aligned.saturating_add(matrices.len() as u64 * 256 + 2 * u64::from(ALIGNMENT));
    if let Some(free) = storage::free(&directory).filter(|free| *free < needed) {
        let (directory, needed, free) = (directory.display(), needed as f64 / 1e9, free as f64 / 1e9);
        let error = format!("{directory}: {free:.2} GB are free: expected {needed:.2} GB for the packed copy");
        return Err(Error::new(Kind::Other, error));
    }

    let target = directory.join(format!("{}{}", stem(&identity.path), identity.suffix()));
    write_file(NewFile::create(&target)?, source, &identity, &matrices, progress)?.finish()?;
    let replaced = |old: &&PathBuf| ends_with(old, &identity.suffix()) || made_from(old, &identity.path);
    for old in files(store).iter().filter(|old| **old != target).filter(replaced) {
        fs::remove_file(old).map_err(|e| Error::io(old, &e))?;
    }
    Ok(target)
}

fn write_file(
    file: NewFile,
    source: &Gguf,
    identity: &Identity,
    matrices: &[(&Tensor, Format)],
    progress: &mut Progress,
) -> Result<NewFile> {
    let part = file.part().to_path_buf();
    let output = RefCell::new(Output { file, hash: Sha256::new() });
    let reader = RefCell::new(Reader::new(source, progress, identity.bytes)?);
    let header = RefCell::new([0; DIGEST_BYTES]);
    let digest = || <[u8; DIGEST_BYTES]>::from(output.borrow_mut().hash.finalize_reset());
    let write = |to: &mut dyn Write, bytes: &[u8]| to.write_all(bytes).map_err(|e| Error::io(&part, &e));

    let mut writer = Writer::new();
    writer.metadata("general.architecture", ARCHITECTURE);
    writer.metadata("general.alignment", ALIGNMENT);
    writer.metadata("pack.layout", LAYOUT);
    writer.metadata("pack.source.path", Value::Str(identity.path.as_os_str().as_encoded_bytes()));
    writer.metadata("pack.source.bytes", identity.bytes);
    writer.metadata("pack.source.modified_ns", identity.modified);
    writer.metadata("pack.source.key", identity.key.as_str());
    for (i, &(tensor, format)) in matrices.iter().enumerate() {
        let (reader, header, digest) = (&reader, &header, &digest);
        writer.tensor_with(&tensor.name, tensor.type_id, tensor.shape(), move |to| {
            if i == 0 {
                *header.borrow_mut() = digest();
            }
            let mut reader = reader.borrow_mut();
            reader.skip_to(source.data_start().saturating_add(tensor.offset))?;
            let group = group_bytes(tensor);
            let piece = (PIECE / group).max(1) * group;
            let mut left = tensor.bytes as usize;
            let mut interleaved = vec![0; piece.min(left)];
            while left > 0 {
                let bytes = reader.read(piece.min(left))?;
                let groups = bytes.chunks_exact(group).zip(interleaved.chunks_exact_mut(group));
                groups.for_each(|(from, to)| format.interleave(from, to));
                write(to, &interleaved[..bytes.len()])?;
                left -= bytes.len();
            }
            Ok(())
        });
    }
    writer.tensor_with(DIGESTS, I8, &[DIGEST_BYTES as u64, 3], |to| {
        let data = digest();
        let mut reader = reader.borrow_mut();
        reader.skip_to(identity.bytes)?;
        let digests = [reader.digest(), *header.borrow(), data];
        write(to, digests.as_flattened())
    });
    writer.write_to(&mut Shared(&output))?;

    if unchanged(source, identity) {
        Ok(output.into_inner().file)
    } else {
        Err(Error::invalid(format!("{}: changed while it was packed", source.name())))
    }
}

/// Whether the file at the source's path is still what was opened.
fn unchanged(source: &Gguf, identity: &Identity) -> bool {
    let Some((path, modified)) = source.origin() else { return false };
    fs::metadata(path).is_ok_and(|now| now.len() == identity.bytes && now.modified().is_ok_and(|m| m == modified))
}

/// Removes what killed processes left; called with the lock held.
fn remove_unfinished(directory: &Path) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in entries.filter(|path| path.extension().is_some_and(|e| e == "part")) {
        let _ = fs::remove_file(path);
    }
}

/// The beginning of a copy's name: the source's, of a length and with characters that any file system takes.
fn stem(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    stem.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' }).take(100).collect()
}

/// Removes the copies of the file at `path`, which may itself be gone, and returns their paths.
///
/// # Errors
/// [`Kind::Other`] if another process is packing or a file cannot be removed.
pub fn remove(store: &Path, path: &Path) -> Result<Vec<PathBuf>> {
    let directory = directory(store);
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    let _lock = lock(&directory)?;
    remove_unfinished(&directory);
    let own = Gguf::open(path).ok().and_then(|source| Identity::of(&source)).map(|identity| identity.suffix());
    let path = place(path);
    let of_it = |copy: &PathBuf| own.as_ref().is_some_and(|own| ends_with(copy, own)) || made_from(copy, &path);
    let copies: Vec<PathBuf> = files(store).into_iter().filter(of_it).collect();
    copies.iter().try_for_each(|copy| fs::remove_file(copy).map_err(|e| Error::io(copy, &e)))?;
    Ok(copies)
}

/// A file among the copies of a store.
pub struct Entry {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// The file it was made from, if it says.
    pub source: Option<PathBuf>,
    /// Why it cannot be used, if it cannot.
    pub trouble: Option<Error>,
}

/// The copies in `store`, with what is wrong with them.
pub fn list(store: &Path) -> Vec<Entry> {
    files(store).into_iter().map(examine).collect()
}

fn examine(path: PathBuf) -> Entry {
    let bytes = fs::metadata(&path).map_or(0, |meta| meta.len());
    let opened = Gguf::open(&path);
    let source = opened.as_ref().ok().and_then(recorded).map(|path| PathBuf::from(&*String::from_utf8_lossy(path)));
    let trouble = match (opened, &source) {
        (Err(error), _) => Some(error),
        (Ok(copy), None) => Some(Error::invalid(format!("{}: does not say what it was made from", copy.name()))),
        (Ok(_), Some(source)) => Gguf::open(source)
            .and_then(|source| match Identity::of(&source) {
                Some(identity) => Packed::open(&path, &source, &identity).map(drop),
                None => Ok(()),
            })
            .err(),
    };
    Entry { path, bytes, source, trouble }
}
