//! GGUF files, read in place: header, metadata and tensor table over a memory map.
//!
//! The one idea: nothing is copied and nothing is believed. Every count, length and offset of the file is compared
//! with the bytes that are really there before it is used, sizes are only ever formed by checked arithmetic, and the
//! whole table is validated once at open, so that everything handed out later lies inside the file. Strings, arrays
//! and tensor data borrow from the map; opening a file never touches tensor data.
//!
//! Not here: what the keys and tensors mean (`config.rs`, `model.rs`) and whether a tensor's format can be computed
//! with. Formats this build cannot run are sized and listed like all others, since a file may hold tensors we ignore.
//! Writing files is [`write`].
#![deny(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

pub(crate) mod map;
pub mod write;

use std::cmp::Ordering;
use std::fmt;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::error::{Error, Result, printable};
use map::Source;

/// `GGUF`, the first four bytes of every file.
const MAGIC: &[u8; 4] = b"GGUF";
/// Magic, version and the two counts: the smallest file there is.
const MIN_FILE_BYTES: u64 = 24;
/// Alignment of tensor data when `general.alignment` is absent.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// Alignments accepted: below 8 a data section could not hold aligned words; above 64 KiB (the largest page size in
/// use) there is nothing left to align to, only padding to make a small file claim a large one.
const ALIGNMENTS: std::ops::RangeInclusive<u64> = 8..=65_536;
/// The largest Gemma 4 file has 833 tensors; the table of 65,536 costs 8 MB of memory, which is harmless.
const MAX_TENSORS: u64 = 65_536;
/// Real files have some 60 keys.
const MAX_KEYS: u64 = 65_536;
/// The limit of the format's description.
const MAX_KEY_BYTES: u64 = 65_535;
/// Tensor names are shorter than 64 bytes, terminator included, in the reference implementation.
const MAX_TENSOR_NAME_BYTES: u64 = 63;
/// Everything before the tensor data. A vocabulary of 262,144 tokens and all its merges takes 16 MB. String arrays have
/// to be walked to find their end, so this bounds the time and the resident memory of opening a file full of holes.
const MAX_HEADER_BYTES: u64 = 128 << 20;
/// The longest text anybody reads is a chat template; published ones have 12 to 19 KB.
const MAX_TEXT_BYTES: usize = 1 << 20;
/// The format has at most four dimensions.
const MAX_DIMS: u32 = 4;
/// The smallest key/value pair: length, one byte of key, type, one byte of value.
const MIN_PAIR_BYTES: u64 = 8 + 1 + 4 + 1;
/// The smallest tensor entry: length, one byte of name, dimension count, one dimension, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// An open GGUF file. Clones share one map, which lives as long as any of them or of their [`Bytes`].
///
/// ```
/// use gemrun::gguf::{Gguf, write::Writer};
/// let mut w = Writer::new();
/// w.metadata("general.architecture", "gemma4");
/// let file = Gguf::from_bytes("small.gguf", w.to_vec()?)?;
/// assert_eq!(file.string("general.architecture")?, Some("gemma4"));
/// assert_eq!(file.uint("gemma4.block_count")?, None);
/// # Ok::<(), gemrun::Error>(())
/// ```
#[derive(Clone)]
pub struct Gguf(Arc<File>);

struct File {
    name: String,
    /// As it was opened; empty for what is not a file.
    path: PathBuf,
    source: Source,
    version: u32,
    alignment: u64,
    pairs: Vec<Pair>,
    /// Indices into `pairs`, sorted by key.
    pairs_by_key: Vec<usize>,
    tensors: Vec<Tensor>,
    /// Indices into `tensors`, sorted by name.
    tensors_by_name: Vec<usize>,
    header_end: usize,
    data_start: u64,
}

/// One key and its value. All ranges lie inside the file.
struct Pair {
    key: Range<usize>,
    value: Place,
}

/// A value as remembered: numbers themselves, everything longer by its place in the file.
enum Place {
    Scalar(Value<'static>),
    Str(Range<usize>),
    Array { elem: Type, len: usize, raw: Range<usize> },
}

/// ggml's type id of 8-bit integers: plain bytes.
pub const I8: u32 = 24;

/// An entry of the tensor table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// The name, 1 to 63 bytes, unique in the file.
    pub name: String,
    /// The id of the block format (0 = F32, 2 = Q4_0, …); always one whose block size is known.
    pub type_id: u32,
    /// Sizes, the contiguous dimension first; 1 beyond `n_dims`. None is 0 and their product fits `u64`.
    pub dims: [u64; 4],
    /// How many dimensions the file names, 1 to 4.
    pub n_dims: usize,
    /// Where the data starts, in bytes from the start of the data section; a multiple of the file's alignment.
    pub offset: u64,
    /// Size of the data in bytes; `offset + bytes` lies inside the file.
    pub bytes: u64,
}

impl Tensor {
    /// The dimensions the file names, contiguous one first.
    pub fn shape(&self) -> &[u64] {
        self.dims.get(..self.n_dims).unwrap_or(&self.dims)
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.dims.iter().fold(1, |n, &d| n.saturating_mul(d))
    }

    /// The block format's name, e.g. `Q4_0`.
    pub fn type_name(&self) -> &'static str {
        block_format(self.type_id).map_or("?", |(name, _, _)| name)
    }
}

impl Gguf {
    /// Opens and validates the file at `path` without reading tensor data.
    ///
    /// # Errors
    /// [`NotFound`](crate::Kind::NotFound) for a missing file, [`Unsupported`](crate::Kind::Unsupported) for a later
    /// version of the format or an unknown block format, [`Invalid`](crate::Kind::Invalid) for everything else that is
    /// wrong with the file, including that it is a directory, a pipe or a device.
    pub fn open(path: &Path) -> Result<Gguf> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let source = Source::open(path, &name, MIN_FILE_BYTES, "a GGUF file")?;
        Gguf::parse(name, path.to_path_buf(), source)
    }

    /// A file compiled into the program. Nothing is copied.
    ///
    /// # Errors
    /// As for [`Gguf::open`].
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Gguf> {
        Gguf::parse(name.to_string(), PathBuf::new(), Source::Static(bytes))
    }

    /// A file held in memory, for tests and for files that were just made.
    ///
    /// # Errors
    /// As for [`Gguf::open`].
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Gguf> {
        Gguf::parse(name.to_string(), PathBuf::new(), Source::Owned(bytes))
    }

    fn parse(name: String, path: PathBuf, source: Source) -> Result<Gguf> {
        let header = Header::read(&name, source.bytes(), source.bytes().len() as u64)?;
        Ok(Gguf(Arc::new(File {
            version: header.version,
            alignment: header.alignment,
            pairs: header.pairs,
            pairs_by_key: header.pairs_by_key,
            tensors: header.tensors,
            tensors_by_name: header.tensors_by_name,
            header_end: header.end,
            data_start: header.data_start,
            name,
            path,
            source,
        })))
    }

    /// The file's name without its folder, for messages.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Where the file is and when it was last changed, as of its opening; `None` for bytes that are not a file.
    pub fn origin(&self) -> Option<(&Path, SystemTime)> {
        Some((&self.0.path, self.0.source.modified()?))
    }

    /// The whole file.
    pub fn all_bytes(&self) -> &[u8] {
        self.0.source.bytes()
    }

    /// Size of the whole file in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.0.source.bytes().len() as u64
    }

    /// Version of the container format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.0.version
    }

    /// What tensor offsets are multiples of, in bytes.
    pub fn alignment(&self) -> u64 {
        self.0.alignment
    }

    /// Where the data section starts, in bytes from the start of the file.
    pub fn data_start(&self) -> u64 {
        self.0.data_start
    }

    /// Everything up to the end of the tensor table: the part of a file that tells two models apart.
    pub fn header_bytes(&self) -> &[u8] {
        self.0.slice(&(0..self.0.header_end))
    }

    /// All keys and values in the order of the file.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.0.pairs.iter().map(|pair| (self.0.key(pair), self.0.value(pair)))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.pair(key).map(|pair| self.0.value(pair))
    }

    fn pair(&self, key: &str) -> Option<&Pair> {
        let file = &*self.0;
        let found = file.pairs_by_key.binary_search_by(|&i| file.key_at(i).cmp(key)).ok()?;
        file.pairs.get(*file.pairs_by_key.get(found)?)
    }

    /// The value of `key` as an integer, of whatever width it is stored in. `None` when the key is absent.
    ///
    /// # Errors
    /// When the value is not an integer, or is negative.
    pub fn uint(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_int() {
            Some(n) => match u64::try_from(n) {
                Ok(n) => Ok(Some(n)),
                Err(_) => Err(self.invalid_key(key, format_args!("is {n}: expected 0 or more"))),
            },
            None => Err(self.wrong_type(key, &value, "an integer")),
        }
    }

    /// The value of `key` as a float; an f64 is rounded. `None` when the key is absent.
    ///
    /// # Errors
    /// When the value is not a float. NaN and infinities are handed on.
    pub fn float(&self, key: &str) -> Result<Option<f32>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(x)) => Ok(Some(x)),
            Some(Value::F64(x)) => Ok(Some(x as f32)),
            Some(value) => Err(self.wrong_type(key, &value, "a float")),
        }
    }

    /// The value of `key` as a bool. `None` when the key is absent.
    ///
    /// # Errors
    /// When the value is not a bool.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(value) => Err(self.wrong_type(key, &value, "a bool")),
        }
    }

    /// The value of `key` as text. `None` when the key is absent.
    ///
    /// # Errors
    /// When the value is not a string, not UTF-8 or longer than 1 MiB.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Str(bytes)) if bytes.len() > MAX_TEXT_BYTES => {
                let len = bytes.len();
                Err(self.invalid_key(key, format_args!("has {len} bytes: expected at most {MAX_TEXT_BYTES}")))
            }
            Some(Value::Str(bytes)) => match std::str::from_utf8(bytes) {
                Ok(text) => Ok(Some(text)),
                Err(e) => Err(self
                    .invalid_key(key, format_args!("is not UTF-8 at byte {}: expected UTF-8 text", e.valid_up_to()))),
            },
            Some(value) => Err(self.wrong_type(key, &value, "a string")),
        }
    }

    /// The value of `key` as an array. `None` when the key is absent.
    ///
    /// # Errors
    /// When the value is not an array.
    pub fn array(&self, key: &str) -> Result<Option<Array<'_>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) => Ok(Some(array)),
            Some(value) => Err(self.wrong_type(key, &value, "an array")),
        }
    }

    fn invalid_key(&self, key: &str, what: fmt::Arguments<'_>) -> Error {
        Error::invalid(format!("{}: key {key}: {what}", self.0.name))
    }

    fn wrong_type(&self, key: &str, found: &Value<'_>, expected: &str) -> Error {
        self.invalid_key(key, format_args!("is of type {}: expected {expected}", found.type_name()))
    }

    /// The tensor table in the order of the file.
    pub fn tensors(&self) -> &[Tensor] {
        &self.0.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let file = &*self.0;
        let found = file.tensors_by_name.binary_search_by(|&i| file.tensor_name_at(i).cmp(name)).ok()?;
        file.tensors.get(*file.tensors_by_name.get(found)?)
    }

    /// The elements of the array `key` as they stand in the file, little-endian: a handle that keeps the file open, no copy.
    /// `None` if there is no such array of type `elem`.
    pub fn array_bytes(&self, key: &str, elem: Type) -> Option<Bytes> {
        match &self.pair(key)?.value {
            Place::Array { elem: found, raw, .. } if *found == elem => {
                Some(Bytes { range: raw.clone(), file: self.clone() })
            }
            _ => None,
        }
    }

    /// The data of a tensor of this file: a handle that keeps the file open, no copy. The address is a multiple of the
    /// file's alignment only if the file was opened from disk.
    pub fn bytes(&self, tensor: &Tensor) -> Bytes {
        Bytes { range: self.0.data_range(tensor), file: self.clone() }
    }
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gguf({:?}, {} keys, {} tensors)", self.0.name, self.0.pairs.len(), self.0.tensors.len())
    }
}

impl File {
    /// A range that was checked when it was recorded (or empty, should a foreign `Tensor` be passed in).
    fn slice(&self, range: &Range<usize>) -> &[u8] {
        self.source.bytes().get(range.clone()).unwrap_or_default()
    }

    fn key(&self, pair: &Pair) -> &str {
        std::str::from_utf8(self.slice(&pair.key)).unwrap_or_default()
    }

    fn key_at(&self, index: usize) -> &str {
        self.pairs.get(index).map_or("", |pair| self.key(pair))
    }

    fn tensor_name_at(&self, index: usize) -> &str {
        self.tensors.get(index).map_or("", |t| &t.name)
    }

    fn value(&self, pair: &Pair) -> Value<'_> {
        match &pair.value {
            Place::Scalar(value) => *value,
            Place::Str(range) => Value::Str(self.slice(range)),
            Place::Array { elem, len, raw } => Value::Array(Array {
                elem: *elem,
                len: *len,
                raw: self.slice(raw),
                file: &self.name,
                key: self.key(pair),
            }),
        }
    }

    /// The bytes of a tensor in the file; an empty range for a tensor of another file that does not fit here.
    fn data_range(&self, tensor: &Tensor) -> Range<usize> {
        let start = self.data_start.checked_add(tensor.offset);
        let end = start.and_then(|start| start.checked_add(tensor.bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.source.bytes().len() as u64 => start as usize..end as usize,
            _ => 0..0,
        }
    }
}

/// The data of one tensor. Dereferences to the bytes in the file's own layout; cheap to clone.
#[derive(Clone)]
pub struct Bytes {
    file: Gguf,
    range: Range<usize>,
}

impl Bytes {
    /// A part of these bytes, over the same mapping.
    ///
    /// # Panics
    /// When `range` does not lie within them.
    pub fn slice(&self, range: Range<usize>) -> Bytes {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of {} bytes", self.len());
        let range = self.range.start.saturating_add(range.start)..self.range.start.saturating_add(range.end);
        Bytes { file: self.file.clone(), range }
    }

    /// Tells the system that these bytes are read a few here and a few there: no read-ahead. A hint; errors do not matter.
    pub fn advise_random(&self) {
        self.file.0.source.advise_random(self.range.clone());
    }

    /// Tells the system that these bytes will be read soon: start reading ahead. A hint; errors do not matter.
    pub fn willneed(&self) {
        self.file.0.source.willneed(self.range.clone());
    }

    /// Reads them into memory now, as far as they are not there. A hint; errors do not matter.
    pub fn page_in(&self) {
        self.file.0.source.page_in(self.range.clone());
    }

    /// Takes them out of this process's resident memory, where they need not be for now. They can be read as before. A hint;
    /// errors do not matter.
    pub fn let_go(&self) {
        self.file.0.source.let_go(self.range.clone());
    }

    /// About how many of them are not in memory, by looking at a page of each `every` bytes.
    pub fn missing(&self, every: usize) -> usize {
        let every = every.max(1);
        let missing = self.range.clone().step_by(every).filter(|&at| !self.file.0.source.resident(at)).count();
        missing.saturating_mul(every).min(self.len())
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.file.0.slice(&self.range)
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({:?}, {:?})", self.file.name(), self.range)
    }
}

/// The type of a metadata value or of the elements of an array, numbered as in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Type {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    Str = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl Type {
    const ALL: [Type; 13] = [
        Type::U8,
        Type::I8,
        Type::U16,
        Type::I16,
        Type::U32,
        Type::I32,
        Type::F32,
        Type::Bool,
        Type::Str,
        Type::Array,
        Type::U64,
        Type::I64,
        Type::F64,
    ];

    fn from_id(id: u32) -> Option<Type> {
        Type::ALL.into_iter().find(|&t| t as u32 == id)
    }

    /// Bytes of one value; `None` for strings and arrays.
    fn width(self) -> Option<u8> {
        match self {
            Type::U8 | Type::I8 | Type::Bool => Some(1),
            Type::U16 | Type::I16 => Some(2),
            Type::U32 | Type::I32 | Type::F32 => Some(4),
            Type::U64 | Type::I64 | Type::F64 => Some(8),
            Type::Str | Type::Array => None,
        }
    }

    /// The name in messages, e.g. `u32`.
    pub fn name(self) -> &'static str {
        match self {
            Type::U8 => "u8",
            Type::I8 => "i8",
            Type::U16 => "u16",
            Type::I16 => "i16",
            Type::U32 => "u32",
            Type::I32 => "i32",
            Type::F32 => "f32",
            Type::Bool => "bool",
            Type::Str => "string",
            Type::Array => "array",
            Type::U64 => "u64",
            Type::I64 => "i64",
            Type::F64 => "f64",
        }
    }
}

/// A metadata value. Strings are bytes: the format asks for UTF-8, files do not always comply.
///
/// `Display` shows it on one line with control characters escaped, arrays by type and length.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(&'a [u8]),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl<'a> Value<'a> {
    /// Which type it is.
    pub fn value_type(&self) -> Type {
        match self {
            Value::U8(_) => Type::U8,
            Value::I8(_) => Type::I8,
            Value::U16(_) => Type::U16,
            Value::I16(_) => Type::I16,
            Value::U32(_) => Type::U32,
            Value::I32(_) => Type::I32,
            Value::F32(_) => Type::F32,
            Value::Bool(_) => Type::Bool,
            Value::Str(_) => Type::Str,
            Value::Array(_) => Type::Array,
            Value::U64(_) => Type::U64,
            Value::I64(_) => Type::I64,
            Value::F64(_) => Type::F64,
        }
    }

    /// The type for messages, e.g. `u32` or `array of string`.
    pub fn type_name(&self) -> String {
        match self {
            Value::Array(array) => format!("array of {}", array.elem.name()),
            other => other.value_type().name().to_string(),
        }
    }

    /// The value of an integer of any width; `None` for everything else, bools included.
    pub fn as_int(&self) -> Option<i128> {
        match *self {
            Value::U8(n) => Some(n.into()),
            Value::I8(n) => Some(n.into()),
            Value::U16(n) => Some(n.into()),
            Value::I16(n) => Some(n.into()),
            Value::U32(n) => Some(n.into()),
            Value::I32(n) => Some(n.into()),
            Value::U64(n) => Some(n.into()),
            Value::I64(n) => Some(n.into()),
            _ => None,
        }
    }

    /// Reads a scalar of type `ty` from exactly its bytes. `None` for strings, arrays, a wrong length, and a bool that
    /// is neither 0 nor 1.
    fn scalar(ty: Type, raw: &[u8]) -> Option<Value<'static>> {
        Some(match ty {
            Type::U8 => Value::U8(u8::from_le_bytes(raw.try_into().ok()?)),
            Type::I8 => Value::I8(i8::from_le_bytes(raw.try_into().ok()?)),
            Type::U16 => Value::U16(u16::from_le_bytes(raw.try_into().ok()?)),
            Type::I16 => Value::I16(i16::from_le_bytes(raw.try_into().ok()?)),
            Type::U32 => Value::U32(u32::from_le_bytes(raw.try_into().ok()?)),
            Type::I32 => Value::I32(i32::from_le_bytes(raw.try_into().ok()?)),
            Type::F32 => Value::F32(f32::from_le_bytes(raw.try_into().ok()?)),
            Type::U64 => Value::U64(u64::from_le_bytes(raw.try_into().ok()?)),
            Type::I64 => Value::I64(i64::from_le_bytes(raw.try_into().ok()?)),
            Type::F64 => Value::F64(f64::from_le_bytes(raw.try_into().ok()?)),
            Type::Bool => match raw {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                _ => return None,
            },
            Type::Str | Type::Array => return None,
        })
    }
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::U8(n) => n.fmt(f),
            Value::I8(n) => n.fmt(f),
            Value::U16(n) => n.fmt(f),
            Value::I16(n) => n.fmt(f),
            Value::U32(n) => n.fmt(f),
            Value::I32(n) => n.fmt(f),
            Value::U64(n) => n.fmt(f),
            Value::I64(n) => n.fmt(f),
            Value::F32(x) => x.fmt(f),
            Value::F64(x) => x.fmt(f),
            Value::Bool(b) => b.fmt(f),
            Value::Str(bytes) => f.write_str(&printable(&String::from_utf8_lossy(bytes))),
            Value::Array(array) => write!(f, "{} values of type {}", array.len, array.elem.name()),
        }
    }
}

macro_rules! value_from {
    ($($ty:ty => $variant:ident),*) => {$(
        impl From<$ty> for Value<'_> {
            fn from(x: $ty) -> Self {
                Value::$variant(x)
            }
        }
    )*};
}
value_from!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64, f32 => F32,
            f64 => F64, bool => Bool);

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Value::Str(text.as_bytes())
    }
}

impl<'a> From<&'a [u8]> for Value<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Value::Str(bytes)
    }
}

impl<'a> From<Array<'a>> for Value<'a> {
    fn from(array: Array<'a>) -> Self {
        Value::Array(array)
    }
}

/// An array of scalars or strings, still in the file's bytes. Never an array of arrays.
#[derive(Clone, Copy)]
pub struct Array<'a> {
    elem: Type,
    len: usize,
    raw: &'a [u8],
    file: &'a str,
    key: &'a str,
}

impl<'a> Array<'a> {
    /// Type of the elements.
    pub fn elem(&self) -> Type {
        self.elem
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No elements at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as they stand in the file: little-endian scalars, or strings each after its u64 length.
    pub fn raw(&self) -> &'a [u8] {
        self.raw
    }

    /// The elements of an array of strings, as bytes. One pass, no index: a hundred million steps a second.
    ///
    /// # Errors
    /// When the elements are not strings.
    pub fn strings(&self) -> Result<Strings<'a>> {
        match self.elem {
            Type::Str => Ok(Strings { raw: self.raw, left: self.len }),
            _ => Err(self.wrong_elements("string")),
        }
    }

    /// The elements of an array of integers of any width.
    ///
    /// # Errors
    /// When the elements are not integers, or one is above `i64::MAX`.
    pub fn ints(&self) -> Result<impl ExactSizeIterator<Item = i64> + Clone + use<'a>> {
        let (elem, raw) = (self.elem, self.raw);
        if !matches!(elem, Type::U8 | Type::I8 | Type::U16 | Type::I16 | Type::U32 | Type::I32 | Type::U64 | Type::I64)
        {
            return Err(self.wrong_elements("integer"));
        }
        let int = move |bytes: &[u8]| Value::scalar(elem, bytes).and_then(|v| i64::try_from(v.as_int()?).ok());
        let chunks = raw.chunks_exact(elem.width().unwrap_or(1).into());
        if elem == Type::U64
            && let Some(at) = chunks.clone().position(|bytes| int(bytes).is_none())
        {
            return Err(self.invalid(format_args!("element {at} is too large: expected at most {}", i64::MAX)));
        }
        Ok(chunks.map(move |bytes| int(bytes).unwrap_or_default()))
    }

    /// The elements of an array of floats; f64 are rounded.
    ///
    /// # Errors
    /// When the elements are not floats.
    pub fn floats(&self) -> Result<impl ExactSizeIterator<Item = f32> + Clone + use<'a>> {
        let elem = self.elem;
        if !matches!(elem, Type::F32 | Type::F64) {
            return Err(self.wrong_elements("float"));
        }
        let chunks = self.raw.chunks_exact(elem.width().unwrap_or(1).into());
        Ok(chunks.map(move |bytes| match Value::scalar(elem, bytes) {
            Some(Value::F32(x)) => x,
            Some(Value::F64(x)) => x as f32,
            _ => 0.0,
        }))
    }

    /// The elements of an array of bools.
    ///
    /// # Errors
    /// When the elements are not bools.
    pub fn bools(&self) -> Result<impl ExactSizeIterator<Item = bool> + Clone + use<'a>> {
        match self.elem {
            Type::Bool => Ok(self.raw.iter().map(|&b| b != 0)),
            _ => Err(self.wrong_elements("bool")),
        }
    }

    /// The elements whatever their type.
    pub fn values(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (elem, raw) = (self.elem, self.raw);
        let strings = Strings { raw, left: if elem == Type::Str { self.len } else { 0 } };
        let scalars = if elem == Type::Str { &[] } else { raw };
        let scalars = scalars.chunks_exact(elem.width().unwrap_or(1).into());
        strings.map(Value::Str).chain(scalars.filter_map(move |bytes| Value::scalar(elem, bytes)))
    }

    fn invalid(&self, what: fmt::Arguments<'_>) -> Error {
        Error::invalid(format!("{}: key {}: {what}", self.file, self.key))
    }

    fn wrong_elements(&self, expected: &str) -> Error {
        self.invalid(format_args!("is an array of {}: expected an array of {expected}", self.elem.name()))
    }
}

/// Same type, length and bytes; where they come from does not matter.
impl PartialEq for Array<'_> {
    fn eq(&self, other: &Self) -> bool {
        (self.elem, self.len, self.raw) == (other.elem, other.len, other.raw)
    }
}

impl fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Array({} x {})", self.len, self.elem.name())
    }
}

/// The strings of an [`Array`], in order.
#[derive(Clone)]
pub struct Strings<'a> {
    raw: &'a [u8],
    left: usize,
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.checked_sub(1)?;
        // The lengths were walked when the file was opened.
        let (len, rest) = self.raw.split_first_chunk()?;
        let (string, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        self.raw = rest;
        Some(string)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

/// What [`Header::read`] found.
struct Header {
    version: u32,
    alignment: u64,
    pairs: Vec<Pair>,
    pairs_by_key: Vec<usize>,
    tensors: Vec<Tensor>,
    tensors_by_name: Vec<usize>,
    end: usize,
    data_start: u64,
}

impl Header {
    /// Parses and checks `bytes`, which must reach at least to the end of the tensor table, as the start of a file of
    /// `file_bytes`.
    fn read(name: &str, bytes: &[u8], file_bytes: u64) -> Result<Header> {
        let mut cur = Cursor { name, bytes, pos: 0, part: Part::Header };

        if (bytes.len() as u64) < MIN_FILE_BYTES {
            return Err(cur.invalid(format_args!(
                "the file has {} bytes: expected a GGUF file of at least {MIN_FILE_BYTES}",
                bytes.len()
            )));
        }
        if cur.take(4)? != MAGIC {
            return Err(cur.invalid(format_args!("does not start with GGUF: expected a GGUF file")));
        }
        let version = cur.u32()?;
        match version {
            2 | 3 => {}
            0 | 1 => {
                let what = format_args!("GGUF version {version}, no longer in use: expected version 2 or 3");
                return Err(cur.invalid(what));
            }
            _ if version.trailing_zeros() >= 16 => {
                let what = format_args!("big-endian GGUF: expected a little-endian file");
                return Err(cur.invalid(what));
            }
            _ => {
                let what =
                    format!("{name}: header: GGUF version {version} is newer than this program: expected 2 or 3");
                return Err(Error::unsupported(what));
            }
        }
        let n_tensors = cur.count("tensors", MAX_TENSORS, MIN_TENSOR_BYTES)?;
        let n_pairs = cur.count("metadata keys", MAX_KEYS, MIN_PAIR_BYTES)?;

        let mut pairs = Vec::with_capacity(n_pairs);
        for i in 0..n_pairs {
            cur.part = Part::KeyNumber(i);
            pairs.push(cur.pair()?);
        }
        cur.part = Part::Header;
        let key = |i: usize| pairs.get(i).and_then(|p: &Pair| bytes.get(p.key.clone())).unwrap_or_default();
        let pairs_by_key = sorted(pairs.len(), |a, b| key(a).cmp(key(b))).map_err(|i| {
            let key = String::from_utf8_lossy(key(i));
            Error::invalid(format!("{name}: key {key}: occurs twice: expected unique keys"))
        })?;

        let alignment = match pairs.iter().find(|p| bytes.get(p.key.clone()) == Some(b"general.alignment")) {
            None => DEFAULT_ALIGNMENT,
            Some(Pair { value: Place::Scalar(Value::U32(n)), .. }) => u64::from(*n),
            Some(_) => return Err(Error::invalid(format!("{name}: key general.alignment: expected a u32"))),
        };
        if !alignment.is_power_of_two() || !ALIGNMENTS.contains(&alignment) {
            return Err(Error::invalid(format!(
                "{name}: key general.alignment: is {alignment}: expected a power of two from {} to {}",
                ALIGNMENTS.start(),
                ALIGNMENTS.end()
            )));
        }

        let mut tensors = Vec::with_capacity(n_tensors);
        for i in 0..n_tensors {
            cur.part = Part::TensorNumber(i);
            tensors.push(cur.tensor(alignment)?);
        }
        let tensor = |i: usize| tensors.get(i).map_or("", |t: &Tensor| t.name.as_str());
        let tensors_by_name = sorted(tensors.len(), |a, b| tensor(a).cmp(tensor(b))).map_err(|i| {
            Error::invalid(format!("{name}: tensor {}: occurs twice: expected unique names", tensor(i)))
        })?;

        let end = cur.pos;
        // A file without tensors may end right here; then there is no data section to speak of.
        let data_start = if tensors.is_empty() { Some(end as u64) } else { align(end as u64, alignment) };
        let Some(data_start) = data_start else {
            return Err(Error::invalid(format!(
                "{name}: header: is too large: expected at most {MAX_HEADER_BYTES} bytes"
            )));
        };
        check_places(name, &tensors, data_start, file_bytes)?;
        Ok(Header { version, alignment, pairs, pairs_by_key, tensors, tensors_by_name, end, data_start })
    }
}

/// `0..len` in the order of `compare`; `Err` with an index of two that are equal.
fn sorted(len: usize, compare: impl Fn(usize, usize) -> Ordering) -> std::result::Result<Vec<usize>, usize> {
    let mut order: Vec<usize> = (0..len).collect();
    order.sort_unstable_by(|&a, &b| compare(a, b));
    let twice = order.windows(2).find_map(|pair| match *pair {
        [a, b] if compare(a, b) == Ordering::Equal => Some(a.max(b)),
        _ => None,
    });
    twice.map_or(Ok(order), Err)
}

/// The smallest multiple of `alignment` that is at least `n`.
fn align(n: u64, alignment: u64) -> Option<u64> {
    n.checked_next_multiple_of(alignment)
}

/// Bytes of a tensor: the only place where a size is formed. `None` when it does not fit 64 bits; `ne[0]` must be a
/// multiple of the block.
fn tensor_bytes(dims: &[u64; 4], block_elems: u64, block_bytes: u64) -> Option<u64> {
    let [ne0, rest @ ..] = dims;
    let row = ne0.checked_div(block_elems)?.checked_mul(block_bytes)?;
    let bytes = rest.iter().try_fold(row, |n, &d| n.checked_mul(d))?;
    // The number of elements has to fit as well: blocks can be smaller than their elements.
    dims.iter().try_fold(1_u64, |n, &d| n.checked_mul(d))?;
    Some(bytes)
}

/// Every tensor inside the file, no two on the same bytes. Gaps are allowed.
fn check_places(name: &str, tensors: &[Tensor], data_start: u64, file_bytes: u64) -> Result<()> {
    for t in tensors {
        let end = data_start.checked_add(t.offset).and_then(|start| start.checked_add(t.bytes));
        let short = end.map_or(u64::MAX, |end| end.saturating_sub(file_bytes));
        if short > 0 {
            return Err(Error::invalid(format!(
                "{name}: tensor {}: needs {} bytes at offset {}, file ends {short} bytes short",
                t.name, t.bytes, t.offset
            )));
        }
    }
    let mut by_offset: Vec<&Tensor> = tensors.iter().collect();
    by_offset.sort_unstable_by_key(|t| t.offset);
    for pair in by_offset.windows(2) {
        if let [a, b] = pair
            && a.offset.saturating_add(a.bytes) > b.offset
        {
            return Err(Error::invalid(format!(
                "{name}: tensor {}: overlaps tensor {} at offset {}: expected data of its own",
                b.name, a.name, b.offset
            )));
        }
    }
    Ok(())
}

/// Reads forward through the header; every error says where.
struct Cursor<'a> {
    name: &'a str,
    bytes: &'a [u8],
    pos: usize,
    part: Part<'a>,
}

/// What is being read, for messages.
#[derive(Clone, Copy)]
enum Part<'a> {
    Header,
    KeyNumber(usize),
    Key(&'a str),
    TensorNumber(usize),
    Tensor(&'a str),
}

impl fmt::Display for Part<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Header => f.write_str("header"),
            Part::KeyNumber(i) => write!(f, "metadata key number {i}"),
            Part::Key(key) => write!(f, "key {key}"),
            Part::TensorNumber(i) => write!(f, "tensor number {i}"),
            Part::Tensor(name) => write!(f, "tensor {name}"),
        }
    }
}

impl<'a> Cursor<'a> {
    fn invalid(&self, what: fmt::Arguments<'_>) -> Error {
        Error::invalid(format!("{}: {}: {what}", self.name, self.part))
    }

    fn left(&self) -> u64 {
        self.bytes.len().saturating_sub(self.pos) as u64
    }

    /// The next `n` bytes.
    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let end = usize::try_from(n).ok().and_then(|n| self.pos.checked_add(n));
        let Some((end, slice)) = end.and_then(|end| Some((end, self.bytes.get(self.pos..end)?))) else {
            let short = n.saturating_sub(self.left());
            return Err(
                self.invalid(format_args!("needs {n} bytes at offset {}, file ends {short} bytes short", self.pos))
            );
        };
        if end as u64 > MAX_HEADER_BYTES {
            return Err(self.invalid(format_args!(
                "the header grows beyond {MAX_HEADER_BYTES} bytes: expected less metadata before the tensor data"
            )));
        }
        self.pos = end;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let slice = self.take(N as u64)?;
        slice.try_into().map_err(|_| self.invalid(format_args!("needs {N} bytes")))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of entries, each at least `min_bytes` long: small enough to allocate for.
    fn count(&mut self, what: &str, max: u64, min_bytes: u64) -> Result<usize> {
        let n = self.u64()?;
        if n > max {
            return Err(self.invalid(format_args!("declares {n} {what}: expected at most {max}")));
        }
        if n.checked_mul(min_bytes).is_none_or(|bytes| bytes > self.left()) {
            let left = self.left();
            return Err(self.invalid(format_args!("declares {n} {what}: they cannot fit the {left} bytes left")));
        }
        Ok(n as usize)
    }

    /// A length and that many bytes; the range of the bytes.
    fn string(&mut self) -> Result<Range<usize>> {
        let len = self.u64()?;
        let start = self.pos;
        self.take(len)?;
        Ok(start..self.pos)
    }

    /// A length from 1 to `max` and that many bytes of UTF-8.
    fn short_text(&mut self, what: &str, max: u64) -> Result<(Range<usize>, &'a str)> {
        let len = self.u64()?;
        if !(1..=max).contains(&len) {
            return Err(self.invalid(format_args!("{what} of {len} bytes: expected 1 to {max}")));
        }
        let start = self.pos;
        let bytes = self.take(len)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok((start..self.pos, text)),
            Err(_) => Err(self.invalid(format_args!("{what} is not UTF-8: expected UTF-8 text"))),
        }
    }

    fn value_type(&mut self, what: &str) -> Result<Type> {
        let id = self.u32()?;
        Type::from_id(id).ok_or_else(|| self.invalid(format_args!("unknown {what} type {id}: expected 0 to 12")))
    }

    fn scalar(&mut self, ty: Type, width: u8) -> Result<Value<'static>> {
        let raw = self.take(width.into())?;
        Value::scalar(ty, raw).ok_or_else(|| self.invalid(format_args!("is a bool of {raw:?}: expected 0 or 1")))
    }

    fn pair(&mut self) -> Result<Pair> {
        let (key, text) = self.short_text("a key", MAX_KEY_BYTES)?;
        self.part = Part::Key(text);
        let ty = self.value_type("value")?;
        let value = match (ty, ty.width()) {
            (_, Some(width)) => Place::Scalar(self.scalar(ty, width)?),
            (Type::Str, None) => Place::Str(self.string()?),
            (_, None) => self.array_value()?,
        };
        Ok(Pair { key, value })
    }

    fn array_value(&mut self) -> Result<Place> {
        let elem = self.value_type("element")?;
        if elem == Type::Array {
            return Err(self.invalid(format_args!("is an array of arrays: expected scalars or strings")));
        }
        let n = self.u64()?;
        // A string takes at least its length.
        let width = elem.width().unwrap_or(8);
        let Some(bytes) = n.checked_mul(width.into()).filter(|&bytes| bytes <= self.left()) else {
            let left = self.left();
            return Err(self.invalid(format_args!(
                "declares {n} elements of type {}: they cannot fit the {left} bytes left",
                elem.name()
            )));
        };
        let start = self.pos;
        if elem == Type::Str {
            for _ in 0..n {
                self.string()?;
            }
        } else {
            let raw = self.take(bytes)?;
            if elem == Type::Bool
                && let Some(at) = raw.iter().position(|&b| b > 1)
            {
                return Err(self.invalid(format_args!("element {at} is a bool of neither 0 nor 1")));
            }
        }
        Ok(Place::Array { elem, len: n as usize, raw: start..self.pos })
    }

    fn tensor(&mut self, alignment: u64) -> Result<Tensor> {
        let (_, name) = self.short_text("a tensor name", MAX_TENSOR_NAME_BYTES)?;
        self.part = Part::Tensor(name);
        let n_dims = self.u32()?;
        if !(1..=MAX_DIMS).contains(&n_dims) {
            return Err(self.invalid(format_args!("has {n_dims} dimensions: expected 1 to {MAX_DIMS}")));
        }
        let mut dims = [1; 4];
        for dim in dims.iter_mut().take(n_dims as usize) {
            *dim = self.u64()?;
        }
        let shape = dims;
        let shape = shape.get(..n_dims as usize).unwrap_or(&shape);
        if dims.contains(&0) {
            return Err(self.invalid(format_args!("has shape {shape:?}: expected no dimension of 0")));
        }
        let type_id = self.u32()?;
        let Some((type_name, block_elems, block_bytes)) = block_format(type_id) else {
            let (file, part) = (self.name, self.part);
            return Err(Error::unsupported(format!(
                "{file}: {part}: unknown type id {type_id}: its size is not known"
            )));
        };
        let [ne0, ..] = dims;
        if ne0.checked_rem(block_elems) != Some(0) {
            return Err(self.invalid(format_args!(
                "has rows of {ne0} elements: expected a multiple of {block_elems}, the block of {type_name}"
            )));
        }
        let Some(bytes) = tensor_bytes(&dims, block_elems, block_bytes) else {
            return Err(self.invalid(format_args!("has shape {shape:?}: its size does not fit 64 bits")));
        };
        let offset = self.u64()?;
        if offset.checked_rem(alignment) != Some(0) {
            return Err(self.invalid(format_args!("starts at offset {offset}: expected a multiple of {alignment}")));
        }
        Ok(Tensor { name: name.to_string(), type_id, dims, n_dims: n_dims as usize, offset, bytes })
    }
}

/// Name, elements and bytes of a block; `None` for ids whose size is not known.
fn block_format(id: u32) -> Option<(&'static str, u64, u64)> {
    gemrun_simd::ggml_type_name(id).map(|(name, elems, bytes)| (name, elems as u64, bytes as u64))
}
