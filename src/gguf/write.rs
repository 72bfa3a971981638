//! Writing GGUF files, version 3: keys and tensors in the order they are added, data streamed.
//!
//! The one idea: the reader is the judge. Before a byte goes out the finished header is parsed by the same code that
//! opens files, so whatever is written here can be read here, and a duplicate name or a bad shape is an error now
//! rather than for whoever opens the file. Tensor data comes from slices or from callbacks that produce it piece by
//! piece, so a file larger than memory can be written.

use std::borrow::Cow;
use std::io::Write;

use super::{Array, DEFAULT_ALIGNMENT, Header, MAGIC, Type, Value, align, block_format, tensor_bytes};
use crate::error::{Error, Kind, Result};

/// Name of the unfinished file in messages.
const NAME: &str = "new file";

/// Collects keys and tensors, then writes them in one go.
pub struct Writer<'a> {
    alignment: u64,
    n_pairs: u64,
    pairs: Vec<u8>,
    tensors: Vec<NewTensor<'a>>,
}

struct NewTensor<'a> {
    name: String,
    type_id: u32,
    dims: Vec<u64>,
    data: Data<'a>,
}

/// Writes the bytes of one tensor.
type Fill<'a> = Box<dyn FnOnce(&mut dyn Write) -> Result<()> + 'a>;

enum Data<'a> {
    Bytes(Cow<'a, [u8]>),
    Fill(Fill<'a>),
}

/// A Rust type that can be an element of a metadata array.
pub trait Element: Copy {
    /// Its number in the file.
    const TYPE: Type;
    /// Appends its little-endian bytes.
    fn put(self, out: &mut Vec<u8>);
}

macro_rules! element {
    ($($ty:ty => $variant:ident),*) => {$(
        impl Element for $ty {
            const TYPE: Type = Type::$variant;
            fn put(self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
element!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64, f32 => F32,
         f64 => F64);

impl Element for bool {
    const TYPE: Type = Type::Bool;
    fn put(self, out: &mut Vec<u8>) {
        out.push(self.into());
    }
}

impl Default for Writer<'_> {
    fn default() -> Self {
        Writer::new()
    }
}

impl<'a> Writer<'a> {
    /// An empty file.
    pub fn new() -> Writer<'a> {
        Writer { alignment: DEFAULT_ALIGNMENT, n_pairs: 0, pairs: Vec::new(), tensors: Vec::new() }
    }

    /// Adds a key. The key `general.alignment` also sets the alignment of the tensor data.
    pub fn metadata<'v>(&mut self, key: &str, value: impl Into<Value<'v>>) -> &mut Self {
        let value = value.into();
        if let ("general.alignment", Value::U32(n)) = (key, value) {
            self.alignment = n.into();
        }
        self.n_pairs = self.n_pairs.saturating_add(1);
        put_string(&mut self.pairs, key.as_bytes());
        self.pairs.extend_from_slice(&(value.value_type() as u32).to_le_bytes());
        put_value(&mut self.pairs, value);
        self
    }

    /// Adds an array of numbers or bools.
    pub fn array<T: Element>(&mut self, key: &str, values: &[T]) -> &mut Self {
        let mut raw = Vec::with_capacity(size_of_val(values));
        for &value in values {
            value.put(&mut raw);
        }
        self.metadata(key, Array { elem: T::TYPE, len: values.len(), raw: &raw, file: NAME, key })
    }

    /// Adds an array of strings.
    pub fn strings<S: AsRef<[u8]>>(&mut self, key: &str, values: impl IntoIterator<Item = S>) -> &mut Self {
        let (mut raw, mut len) = (Vec::new(), 0_usize);
        for value in values {
            put_string(&mut raw, value.as_ref());
            len = len.saturating_add(1);
        }
        self.metadata(key, Array { elem: Type::Str, len, raw: &raw, file: NAME, key })
    }

    /// Adds a tensor of block format `type_id` with its data, `dims` contiguous dimension first.
    pub fn tensor(&mut self, name: &str, type_id: u32, dims: &[u64], data: impl Into<Cow<'a, [u8]>>) -> &mut Self {
        self.push(name, type_id, dims, Data::Bytes(data.into()))
    }

    /// Adds a tensor whose data `fill` writes when its turn comes; it must write exactly the tensor's size.
    pub fn tensor_with(
        &mut self,
        name: &str,
        type_id: u32,
        dims: &[u64],
        fill: impl FnOnce(&mut dyn Write) -> Result<()> + 'a,
    ) -> &mut Self {
        self.push(name, type_id, dims, Data::Fill(Box::new(fill)))
    }

    fn push(&mut self, name: &str, type_id: u32, dims: &[u64], data: Data<'a>) -> &mut Self {
        self.tensors.push(NewTensor { name: name.to_string(), type_id, dims: dims.to_vec(), data });
        self
    }

    /// Bytes of all tensors added so far, with the padding behind each.
    pub fn data_bytes(&self) -> u64 {
        let padded = |t: &NewTensor| t.bytes().and_then(|n| align(n, self.alignment)).unwrap_or(0);
        self.tensors.iter().map(padded).fold(0, u64::saturating_add)
    }

    /// The whole file in memory.
    ///
    /// # Errors
    /// As for [`Writer::write_to`].
    pub fn to_vec(self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        self.write_to(&mut out)?;
        Ok(out)
    }

    /// Writes the file to `out` from front to back.
    ///
    /// # Errors
    /// When the file would not be a valid one, when a tensor's data has the wrong size, and when `out` fails.
    pub fn write_to(self, out: &mut dyn Write) -> Result<()> {
        let mut header = Vec::with_capacity(self.pairs.len());
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&3_u32.to_le_bytes());
        header.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        header.extend_from_slice(&self.n_pairs.to_le_bytes());
        header.extend_from_slice(&self.pairs);
        let mut data_bytes = 0_u64;
        for t in &self.tensors {
            put_string(&mut header, t.name.as_bytes());
            header.extend_from_slice(&(t.dims.len() as u32).to_le_bytes());
            for dim in &t.dims {
                header.extend_from_slice(&dim.to_le_bytes());
            }
            header.extend_from_slice(&t.type_id.to_le_bytes());
            header.extend_from_slice(&data_bytes.to_le_bytes());
            // A size that cannot be formed is left for the reader to complain about.
            let padded = t.bytes().and_then(|n| align(data_bytes.checked_add(n)?, self.alignment));
            data_bytes = padded.unwrap_or(data_bytes);
        }
        let padding = |n: u64| align(n, self.alignment).and_then(|end| end.checked_sub(n)).unwrap_or(0);
        let header_padding = if self.tensors.is_empty() { 0 } else { padding(header.len() as u64) };
        let file_bytes = (header.len() as u64).checked_add(header_padding).and_then(|n| n.checked_add(data_bytes));
        let checked = Header::read(NAME, &header, file_bytes.unwrap_or(u64::MAX))?;

        put(out, &header)?;
        put_zeros(out, header_padding)?;
        for (tensor, known) in self.tensors.into_iter().zip(&checked.tensors) {
            let mut counted = Counted { out, bytes: 0 };
            match tensor.data {
                Data::Bytes(bytes) => put(&mut counted, &bytes)?,
                Data::Fill(fill) => fill(&mut counted)?,
            }
            let written = counted.bytes;
            if written != known.bytes {
                return Err(Error::new(
                    Kind::Other,
                    format!("{NAME}: tensor {}: has {written} bytes of data: expected {}", known.name, known.bytes),
                ));
            }
            put_zeros(out, padding(written))?;
        }
        Ok(())
    }
}

impl NewTensor<'_> {
    fn bytes(&self) -> Option<u64> {
        let (_, block_elems, block_bytes) = block_format(self.type_id)?;
        let mut dims = [1; 4];
        for (to, from) in dims.iter_mut().zip(&self.dims) {
            *to = *from;
        }
        tensor_bytes(&dims, block_elems, block_bytes)
    }
}

/// Passes writes on and counts them.
struct Counted<'a> {
    out: &'a mut dyn Write,
    bytes: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let n = self.out.write(buf)?;
        self.bytes = self.bytes.saturating_add(n as u64);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

fn put(out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(|e| Error::new(Kind::Other, format!("{NAME}: cannot write: {e}")))
}

fn put_zeros(out: &mut dyn Write, mut n: u64) -> Result<()> {
    let zeros = [0_u8; 512];
    while n > 0 {
        let step = n.min(zeros.len() as u64);
        put(out, zeros.get(..step as usize).unwrap_or(&zeros))?;
        n = n.saturating_sub(step);
    }
    Ok(())
}

fn put_string(out: &mut Vec<u8>, string: &[u8]) {
    out.extend_from_slice(&(string.len() as u64).to_le_bytes());
    out.extend_from_slice(string);
}

/// A value without its type; an array with its element type and length.
fn put_value(out: &mut Vec<u8>, value: Value<'_>) {
    match value {
        Value::U8(x) => x.put(out),
        Value::I8(x) => x.put(out),
        Value::U16(x) => x.put(out),
        Value::I16(x) => x.put(out),
        Value::U32(x) => x.put(out),
        Value::I32(x) => x.put(out),
        Value::F32(x) => x.put(out),
        Value::Bool(x) => x.put(out),
        Value::U64(x) => x.put(out),
        Value::I64(x) => x.put(out),
        Value::F64(x) => x.put(out),
        Value::Str(bytes) => put_string(out, bytes),
        Value::Array(Array { elem, len, raw, .. }) => {
            out.extend_from_slice(&(elem as u32).to_le_bytes());
            out.extend_from_slice(&(len as u64).to_le_bytes());
            out.extend_from_slice(raw);
        }
    }
}
