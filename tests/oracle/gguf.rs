//! A small GGUF reader for the oracle: metadata into a map, tensors into slices of the file.
//!
//! It exists so that the oracle shares nothing with the product, reader included. It reads files that
//! are known to be well formed and panics on anything else; hostile files are the product's business.

use std::collections::HashMap;

/// One metadata value; every integer width becomes `Int`, both float widths become `Float`.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Int(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    List(Vec<Value>),
}

impl Value {
    pub fn int(&self) -> usize {
        match self {
            Value::Int(i) => usize::try_from(*i).expect("not negative"),
            other => panic!("an integer was expected, not {other:?}"),
        }
    }

    pub fn float(&self) -> f64 {
        match self {
            Value::Float(f) => *f,
            other => panic!("a float was expected, not {other:?}"),
        }
    }

    pub fn list(&self) -> &[Value] {
        match self {
            Value::List(list) => list,
            other => panic!("a list was expected, not {other:?}"),
        }
    }
}

/// A tensor as it lies in the file; `ne[0]` is the contiguous dimension.
pub struct Tensor<'a> {
    pub ne: Vec<usize>,
    pub type_id: u32,
    /// From the first byte of the tensor to the end of the file: its size follows from type and shape.
    pub bytes: &'a [u8],
}

pub struct Gguf<'a> {
    pub metadata: HashMap<String, Value>,
    pub tensors: HashMap<String, Tensor<'a>>,
}

impl<'a> Gguf<'a> {
    pub fn read(file: &'a [u8]) -> Self {
        let mut at = Cursor { file, position: 0 };
        assert_eq!(at.take(4), b"GGUF");
        let version = at.u32();
        assert!(version == 2 || version == 3, "version {version}");
        let tensor_count = at.u64();
        let metadata_count = at.u64();

        let mut metadata = HashMap::new();
        for _ in 0..metadata_count {
            let key = at.text();
            let kind = at.u32();
            let value = at.value(kind);
            assert!(metadata.insert(key, value).is_none(), "a key occurs twice");
        }

        let mut infos = Vec::new();
        for _ in 0..tensor_count {
            let name = at.text();
            let dimensions = at.u32();
            let ne: Vec<usize> = (0..dimensions).map(|_| at.u64()).collect();
            let type_id = at.u32();
            let offset = at.u64();
            infos.push((name, ne, type_id, offset));
        }

        let alignment = metadata.get("general.alignment").map_or(32, Value::int);
        let data_start = at.position.next_multiple_of(alignment);
        let mut tensors = HashMap::new();
        for (name, ne, type_id, offset) in infos {
            let bytes = &file[data_start + offset..];
            let tensor = Tensor { ne, type_id, bytes };
            assert!(tensors.insert(name, tensor).is_none(), "a tensor occurs twice");
        }
        Gguf { metadata, tensors }
    }
}

struct Cursor<'a> {
    file: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let bytes = &self.file[self.position..self.position + n];
        self.position += n;
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> usize {
        u64::from_le_bytes(self.take(8).try_into().unwrap()) as usize
    }

    fn text(&mut self) -> String {
        let length = self.u64();
        String::from_utf8(self.take(length).to_vec()).unwrap()
    }

    fn value(&mut self, kind: u32) -> Value {
        match kind {
            0 => Value::Int(self.take(1)[0].into()),
            1 => Value::Int((self.take(1)[0] as i8).into()),
            2 => Value::Int(u16::from_le_bytes(self.take(2).try_into().unwrap()).into()),
            3 => Value::Int(i16::from_le_bytes(self.take(2).try_into().unwrap()).into()),
            4 => Value::Int(self.u32().into()),
            5 => Value::Int((self.u32() as i32).into()),
            6 => Value::Float(f32::from_bits(self.u32()).into()),
            7 => Value::Bool(self.take(1)[0] != 0),
            8 => Value::Text(self.text()),
            9 => {
                let element = self.u32();
                let count = self.u64();
                Value::List((0..count).map(|_| self.value(element)).collect())
            }
            10 | 11 => Value::Int(self.u64() as i64),
            12 => Value::Float(f64::from_bits(self.u64() as u64)),
            other => panic!("value type {other}"),
        }
    }
}
