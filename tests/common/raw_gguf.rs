//! GGUF files as loose parts, to build broken ones from: every count, length, type and offset can be made to lie.
//!
//! [`File::of`] takes a good file apart; `bytes` puts the parts together again without checking anything.

use gemrun::gguf::{Gguf, Value};

/// Numbers of the value types in a file.
pub mod ty {
    pub const U8: u32 = 0;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STR: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const F64: u32 = 12;
}

#[derive(Clone)]
pub struct File {
    pub magic: [u8; 4],
    pub version: u32,
    /// Counts in the header, when they are not to be the true ones.
    pub n_tensors: Option<u64>,
    pub n_pairs: Option<u64>,
    pub pairs: Vec<Pair>,
    pub tensors: Vec<Tensor>,
    /// What the data is really aligned to, whatever the metadata says.
    pub alignment: usize,
}

#[derive(Clone)]
pub struct Pair {
    pub key: Vec<u8>,
    /// The length in the file, when it is not to be the true one.
    pub key_len: Option<u64>,
    pub ty: u32,
    /// Everything after the type.
    pub value: Vec<u8>,
}

#[derive(Clone)]
pub struct Tensor {
    pub name: Vec<u8>,
    pub dims: Vec<u64>,
    pub n_dims: Option<u32>,
    pub type_id: u32,
    /// The offset in the file, when it is not to be the true one.
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

/// Where an integer stands in the bytes, and its width.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub at: usize,
    pub width: usize,
}

pub fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

/// An array value: element type, count, and the elements as they are.
pub fn array(elem: u32, len: u64, elements: &[u8]) -> Vec<u8> {
    [&elem.to_le_bytes()[..], &len.to_le_bytes(), elements].concat()
}

pub fn strings<S: AsRef<[u8]>>(values: &[S]) -> Vec<u8> {
    let elements: Vec<u8> = values.iter().flat_map(|v| string(v.as_ref())).collect();
    array(ty::STR, values.len() as u64, &elements)
}

pub fn i32s(values: &[i32]) -> Vec<u8> {
    let elements: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    array(ty::I32, values.len() as u64, &elements)
}

fn parts(value: Value<'_>) -> (u32, Vec<u8>) {
    let raw = match value {
        Value::U8(x) => x.to_le_bytes().into(),
        Value::I8(x) => x.to_le_bytes().into(),
        Value::U16(x) => x.to_le_bytes().into(),
        Value::I16(x) => x.to_le_bytes().into(),
        Value::U32(x) => x.to_le_bytes().into(),
        Value::I32(x) => x.to_le_bytes().into(),
        Value::U64(x) => x.to_le_bytes().into(),
        Value::I64(x) => x.to_le_bytes().into(),
        Value::F32(x) => x.to_le_bytes().into(),
        Value::F64(x) => x.to_le_bytes().into(),
        Value::Bool(x) => vec![x.into()],
        Value::Str(x) => string(x),
        Value::Array(x) => array(x.elem() as u32, x.len() as u64, x.raw()),
    };
    (value.value_type() as u32, raw)
}

impl File {
    /// The parts of a good file.
    pub fn of(file: &Gguf) -> File {
        let pairs = file.metadata().map(|(key, value)| {
            let (ty, value) = parts(value);
            Pair { key: key.into(), key_len: None, ty, value }
        });
        let tensors = file.tensors().iter().map(|t| Tensor {
            name: t.name.clone().into(),
            dims: t.shape().to_vec(),
            n_dims: None,
            type_id: t.type_id,
            offset: None,
            data: file.bytes(t).to_vec(),
        });
        File {
            magic: *b"GGUF",
            version: 3,
            n_tensors: None,
            n_pairs: None,
            pairs: pairs.collect(),
            tensors: tensors.collect(),
            alignment: file.alignment() as usize,
        }
    }

    /// Sets or adds a key.
    pub fn set(&mut self, key: &str, ty: u32, value: impl Into<Vec<u8>>) {
        let pair = Pair { key: key.into(), key_len: None, ty, value: value.into() };
        match self.pairs.iter_mut().find(|p| p.key == key.as_bytes()) {
            Some(old) => *old = pair,
            None => self.pairs.push(pair),
        }
    }

    pub fn set_u32(&mut self, key: &str, value: u32) {
        self.set(key, ty::U32, value.to_le_bytes());
    }

    pub fn set_f32(&mut self, key: &str, value: f32) {
        self.set(key, ty::F32, value.to_le_bytes());
    }

    /// Static scales: none for activations, and bits and scales of each layer's keys and values.
    pub fn set_kv_scales(&mut self, layers: &[(u8, f32, f32)]) {
        let floats = |values: &mut dyn Iterator<Item = f32>| -> Vec<u8> {
            let values: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
            array(ty::F32, values.len() as u64 / 4, &values)
        };
        let key = |name: &str| format!("gemma4.srq.{name}");
        self.set_u32(&key("version"), 1);
        self.set_str(&key("scheme"), "wna8o8");
        self.set_str(&key("round"), "half_even");
        self.set(&key("qmin"), ty::I32, (-128i32).to_le_bytes());
        self.set(&key("qmax"), ty::I32, 127i32.to_le_bytes());
        for side in ["input_scale", "output_scale"] {
            let matrices =
                ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "inp_gate", "proj"];
            for matrix in matrices {
                let none = floats(&mut layers.iter().map(|_| 0.0));
                self.set(&key(&format!("{side}.{matrix}")), ty::ARRAY, none);
            }
            self.set_f32(&key(&format!("{side}.output")), 0.0);
        }
        self.set(&key("kv.k_scale"), ty::ARRAY, floats(&mut layers.iter().map(|layer| layer.1)));
        self.set(&key("kv.v_scale"), ty::ARRAY, floats(&mut layers.iter().map(|layer| layer.2)));
        let bits: Vec<u8> = layers.iter().map(|layer| layer.0).collect();
        self.set(&key("kv.bits"), ty::ARRAY, array(ty::U8, bits.len() as u64, &bits));
    }

    pub fn set_str(&mut self, key: &str, value: impl AsRef<[u8]>) {
        self.set(key, ty::STR, string(value.as_ref()));
    }

    /// Takes a key out; it must be there.
    pub fn remove(&mut self, key: &str) {
        let before = self.pairs.len();
        self.pairs.retain(|p| p.key != key.as_bytes());
        assert_eq!(self.pairs.len() + 1, before, "{key}");
    }

    /// A key that must be there.
    pub fn pair(&mut self, key: &str) -> &mut Pair {
        self.pairs.iter_mut().find(|p| p.key == key.as_bytes()).expect(key)
    }

    /// A tensor that must be there.
    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name.as_bytes()).expect(name)
    }

    pub fn push_tensor(&mut self, name: &str, dims: &[u64], type_id: u32, data: Vec<u8>) {
        let (name, dims) = (name.into(), dims.to_vec());
        self.tensors.push(Tensor { name, dims, n_dims: None, type_id, offset: None, data });
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.bytes_and_fields().0
    }

    /// The file, and where the integers of its header are.
    pub fn bytes_and_fields(&self) -> (Vec<u8>, Vec<Field>) {
        let mut out = Out::default();
        out.bytes.extend(self.magic);
        out.u32(self.version);
        out.u64(self.n_tensors.unwrap_or(self.tensors.len() as u64));
        out.u64(self.n_pairs.unwrap_or(self.pairs.len() as u64));
        for p in &self.pairs {
            out.u64(p.key_len.unwrap_or(p.key.len() as u64));
            out.bytes.extend(&p.key);
            out.u32(p.ty);
            match p.ty {
                ty::ARRAY if p.value.len() >= 12 => {
                    out.field(4);
                    out.fields.push(Field { at: out.bytes.len() + 4, width: 8 });
                }
                ty::STR | ty::U64 | 11 => out.field(8),
                ty::U32 | ty::I32 => out.field(4),
                _ => {}
            }
            out.bytes.extend(&p.value);
        }
        let mut offset = 0;
        for t in &self.tensors {
            out.u64(t.name.len() as u64);
            out.bytes.extend(&t.name);
            out.u32(t.n_dims.unwrap_or(t.dims.len() as u32));
            t.dims.iter().for_each(|&dim| out.u64(dim));
            out.u32(t.type_id);
            out.u64(t.offset.unwrap_or(offset as u64));
            offset += t.data.len().next_multiple_of(self.alignment);
        }
        for t in &self.tensors {
            out.pad(self.alignment);
            out.bytes.extend(&t.data);
        }
        if !self.tensors.is_empty() {
            out.pad(self.alignment);
        }
        (out.bytes, out.fields)
    }
}

#[derive(Default)]
struct Out {
    bytes: Vec<u8>,
    fields: Vec<Field>,
}

impl Out {
    fn field(&mut self, width: usize) {
        self.fields.push(Field { at: self.bytes.len(), width });
    }

    fn u32(&mut self, n: u32) {
        self.field(4);
        self.bytes.extend(n.to_le_bytes());
    }

    fn u64(&mut self, n: u64) {
        self.field(8);
        self.bytes.extend(n.to_le_bytes());
    }

    fn pad(&mut self, alignment: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(alignment), 0);
    }
}
