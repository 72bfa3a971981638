//! Matrices with one scale a row: where files keep their integers and their scales.
//!
//! Two kinds of files have them. Native ones hold the integers of a checkpoint as they are, as I8 tensors, and the scales as F32
//! tensors beside them. Files that other programs can read, too, hold the integers in blocks (TQ2_0, Q4_0, Q8_0), whose own
//! scales are halves; the exact scales are in the metadata, and the blocks' are not looked at.
//!
//! | | integers of `blk.N.attn_q` | its scales |
//! |---|---|---|
//! | native | I8 `blk.N.attn_q.weight`, (rows, cols·bits/8) bytes | F32 `blk.N.attn_q.row_scale`, (rows) |
//! | in blocks | Q4_0 `blk.N.attn_q.weight`, (rows, cols) | key `{arch}.srq.row_scale.blk.N.attn_q`, (rows) |
//!
//! The embedding has `token_embd.row_scale`; the per-layer embedding, one scale for each token and layer,
//! `per_layer_token_embd.group_scale`, (vocab, layers).
//!
//! A third kind says nothing in the metadata: blocks that repeat one scale along each row, which is how others convert such
//! checkpoints. It is recognised by looking.

use gemrun_simd::Format;
use gemrun_simd::half::f16_to_f32;

use super::{Loader, shape};
use crate::gguf::{Bytes, Gguf, I8, Tensor, Type};
use crate::weight::StaticScales;
use crate::{Error, Result};

/// The integers of a matrix.
pub(super) struct Channel {
    pub format: Format,
    pub bytes: Bytes,
}

/// The format of the integers in the blocks of another.
fn by_rows(format: Format) -> Option<Format> {
    match format {
        Format::Q4_0 => Some(Format::Q4_0C),
        Format::Q8_0 => Some(Format::Q8_0C),
        Format::Tq2_0 => Some(Format::Tq2_0C),
        _ => None,
    }
}

/// The integers of a matrix whose blocks repeat one scale along each row, and the scales. Other matrices are told by their first
/// rows.
pub(super) fn repeated_scales(format: Format, bytes: &Bytes, cols: usize) -> Option<(Format, Vec<f32>)> {
    let integers = by_rows(format)?;
    let (row_bytes, block_bytes) = (format.row_bytes(cols)?, format.block_bytes());
    let at = if format == Format::Tq2_0 { block_bytes - 2 } else { 0 };
    if row_bytes == block_bytes {
        return None; // nothing is repeated
    }
    let scale_of = |row: &[u8]| {
        let mut scales = row.chunks_exact(block_bytes).map(|block| [block[at], block[at + 1]]);
        let first = scales.next()?;
        let scale = f16_to_f32(u16::from_le_bytes(first));
        // The integers of `Tq2_0C` have the other sign.
        let scale = if format == Format::Tq2_0 { -scale } else { scale };
        scales.all(|scale| scale == first).then_some(scale).filter(|scale| scale.is_finite())
    };
    let scales = bytes.chunks_exact(row_bytes).map(scale_of).collect::<Option<Vec<f32>>>()?;
    Some((integers, scales))
}

impl Loader<'_> {
    /// The integers of the matrix `name` if they are to be multiplied by a scale of their row; `None` if it has blocks with
    /// scales of their own.
    pub(super) fn channel(&self, name: &str, rows: usize, cols: usize) -> Result<Option<Channel>> {
        let Some(srq) = &self.config.srq else { return Ok(None) };
        let Some(tensor) = self.gguf.tensor(name) else { return Ok(None) };
        if tensor.type_id == I8 {
            return self.native(name, tensor, rows, cols).map(Some);
        }
        let key = |kind: &str| format!("{}.{kind}.{}", srq.prefix, stem(name));
        if self.gguf.get(&key("row_scale")).is_none() && self.gguf.get(&key("group_scale")).is_none() {
            return Ok(None);
        }
        let tensor = self.tensor(name, &[cols, rows])?;
        let format = Format::from_ggml(tensor.type_id).and_then(by_rows);
        let format =
            format.ok_or_else(|| self.wrong(name, format!("type {}", tensor.type_name()), "TQ2_0, Q4_0 or Q8_0"))?;
        Ok(Some(Channel { format, bytes: self.gguf.bytes(tensor) }))
    }

    /// The width of its integers follows from the shape, and must be the one the metadata tells.
    fn native(&self, name: &str, tensor: &Tensor, rows: usize, cols: usize) -> Result<Channel> {
        let formats = [(Format::W2C, 4), (Format::W4C, 2), (Format::W8C, 1)];
        let found = formats
            .into_iter()
            .find(|(_, per_byte)| cols.is_multiple_of(32) && tensor.shape() == [(cols / per_byte) as u64, rows as u64]);
        let Some((format, per_byte)) = found else {
            let dims: Vec<usize> = tensor.shape().iter().map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect();
            let widths: Vec<String> = formats.iter().map(|(_, per_byte)| shape(&[cols / per_byte, rows])).collect();
            return Err(self.wrong(name, format!("shape {}", shape(&dims)), format!("shape {}", widths.join(" or "))));
        };
        let told = width(self.gguf, tensor);
        if told != Some(8 / per_byte) {
            let told =
                told.map_or("no width in the metadata".to_string(), |bits| format!("{bits} bits in the metadata"));
            return Err(self.wrong(name, told, format!("{}, as its shape tells", 8 / per_byte)));
        }
        Ok(Channel { format, bytes: self.gguf.bytes(tensor) })
    }

    /// The static activation scales of the matrix `name`.
    pub(super) fn static_scales(&self, name: &str) -> Option<StaticScales> {
        if let Some(&input) = self.numerics.input_scales.get(stem(name)) {
            return Some(StaticScales { input, output: 0.0 });
        }
        let (il, role) = in_layer(name)?;
        self.config.static_scales(il, role)
    }

    /// The scales of the rows of the matrix `name`.
    pub(super) fn row_scale(&self, name: &str, rows: usize) -> Result<Vec<f32>> {
        let tensor = format!("{}.row_scale", stem(name));
        if self.gguf.tensor(&tensor).is_some() {
            return self.vector(&tensor, rows);
        }
        let (key, bytes) = self.scales_in_metadata(name, "row_scale", rows)?;
        let scales: Vec<f32> = bytes.as_chunks().0.iter().map(|scale| f32::from_le_bytes(*scale)).collect();
        match scales.iter().position(|scale| !scale.is_finite()) {
            Some(at) => Err(self.wrong_key(&key, format!("value {at} is {}", scales[at]), "finite values")),
            None => Ok(scales),
        }
    }

    /// The scales of `groups` equal parts of each row of the table `name`, where they lie.
    pub(super) fn table_scales(&self, name: &str, rows: usize, groups: usize) -> Result<Bytes> {
        let kind = if groups > 1 || stem(name) == "per_layer_token_embd" { "group_scale" } else { "row_scale" };
        let tensor = format!("{}.{kind}", stem(name));
        if self.gguf.tensor(&tensor).is_none() {
            return Ok(self.scales_in_metadata(name, kind, rows * groups)?.1);
        }
        let dims = if kind == "group_scale" { vec![groups, rows] } else { vec![rows] };
        let found = self.tensor(&tensor, &dims)?;
        match Format::from_ggml(found.type_id) {
            Some(Format::F32) => Ok(self.gguf.bytes(found)),
            _ => Err(self.wrong(&tensor, format!("type {}", found.type_name()), "F32")),
        }
    }

    fn scales_in_metadata(&self, name: &str, kind: &str, len: usize) -> Result<(String, Bytes)> {
        let prefix = self.config.srq.as_ref().map_or("", |srq| &srq.prefix);
        let key = format!("{prefix}.{kind}.{}", stem(name));
        let missing = || self.wrong(&format!("{}.{kind}", stem(name)), "missing", format!("{len} scales"));
        let bytes = self.gguf.array_bytes(&key, Type::F32).ok_or_else(missing)?;
        match bytes.len() == 4 * len {
            true => Ok((key, bytes)),
            false => Err(self.wrong_key(&key, format!("{} values", bytes.len() / 4), format!("{len}"))),
        }
    }

    fn wrong_key(&self, key: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
        Error::invalid(format!("{}: {key}: {found}: expected {expected}", self.gguf.name()))
    }
}

/// Bits of the integers in an I8 tensor that holds several to a byte, as `{arch}.srq.bits.{role}` tells: one number for each layer,
/// or one for a matrix that is not in a layer.
pub fn width(gguf: &Gguf, tensor: &Tensor) -> Option<usize> {
    if tensor.type_id != I8 {
        return None;
    }
    let arch = gguf.string("general.architecture").ok()??;
    let key = |role: &str| format!("{arch}.srq.bits.{role}");
    let bits = match in_layer(&tensor.name) {
        Some((il, role)) => gguf.array(&key(role)).ok()??.ints().ok()?.nth(il)?,
        None => i64::try_from(gguf.uint(&key(stem(&tensor.name))).ok()??).ok()?,
    };
    [2, 4, 8].into_iter().find(|&width| width as i64 == bits)
}

/// The name without `.weight`.
fn stem(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// Layer and role of `blk.{layer}.{role}.weight`.
fn in_layer(name: &str) -> Option<(usize, &str)> {
    let (il, role) = stem(name).strip_prefix("blk.")?.split_once('.')?;
    Some((il.parse().ok()?, role))
}
