//! Mobile checkpoints: 2-, 4- and 8-bit weights with a scale a row, static activation and cache scales.
//!
//! *Native* files carry the packed bytes as they are, in tensors of plain bytes, with the row scales beside them; no other program
//! takes them for a model. *Stock* files spread each row's scale over blocks of TQ2_0, Q4_0 and Q8_0, which any GGUF engine
//! reads, and keep the exact scales as metadata. Both have the static scales as metadata, so that this program computes the
//! same bits from either. What the keys are called, `convert.rs` lists.
//!
//! Everything about scales is checked before a byte is written. Packed weights cannot be wrong: every byte is a weight.

use gemrun_simd::Format;
use gemrun_simd::half::f32_to_f16;

use super::checkpoint::{Dtype, Stored};
use super::widths::Widths;
use super::{HEAD, ROLES, Target, Text, linear_shape, put, tensor_id};
use crate::gguf::I8;
use crate::gguf::write::Writer;
use crate::{Error, Result};

/// Module names in maps begin with this, however the file is cut.
const MODULES: &str = "model.language_model.";

/// Whether `scale` can be the step of a grid: a value divided by less could overflow, and no network's are so small.
fn step(scale: f32) -> bool {
    (1e-30..=f32::MAX).contains(&scale)
}

/// A matrix of packed integers: a linear module's, or an embedding table.
struct Packed<'a> {
    weight: &'a Stored,
    scale: &'a Stored,
    bits: usize,
    rows: usize,
    cols: usize,
    /// Scales of a row, each for as many columns.
    groups: usize,
}

/// A linear module with its static scales.
struct Linear<'a> {
    packed: Packed<'a>,
    input: f32,
    output: f32,
}

/// Collects what goes into the file.
pub(super) struct Mobile<'a, 'b, 'p> {
    pub(super) text: &'b Text<'a, 'p>,
    pub(super) widths: &'b Widths,
    pub(super) target: Target,
}

impl<'a> Mobile<'a, '_, '_> {
    fn arch(&self) -> &'static str {
        self.target.architecture()
    }

    /// Adds all matrices and their scales to `writer`; whether the head is the embedding table.
    ///
    /// # Errors
    /// `Invalid` with file and tensor for what is missing, has another shape or type than it should, or a scale that is none.
    pub(super) fn write(&self, writer: &mut Writer<'a>) -> Result<bool> {
        let (hyper, arch) = (self.text.hyper, self.arch());
        let count = hyper.layers.len();
        writer.metadata(&format!("{arch}.srq.version"), 1_u32);
        writer.metadata(&format!("{arch}.srq.scheme"), "wna8o8");
        writer.metadata(&format!("{arch}.srq.round"), "half_even");
        writer.metadata(&format!("{arch}.srq.qmin"), -128_i32);
        writer.metadata(&format!("{arch}.srq.qmax"), 127_i32);

        let table = self.table("embed_tokens", hyper.dim, 1)?;
        let head = self.head(&table)?;
        self.matrix(writer, "token_embd", &table, "row_scale")?;
        let (input, output) = match &head {
            Some(head) => (head.input, head.output),
            None => (0.0, 0.0),
        };
        writer.metadata(&format!("{arch}.srq.input_scale.output"), input);
        writer.metadata(&format!("{arch}.srq.output_scale.output"), output);
        let tied = match head {
            Some(head) if !self.same(&table, &head.packed)? => {
                self.matrix(writer, "output", &head.packed, "row_scale")?;
                false
            }
            _ => true,
        };
        if hyper.ple > 0 {
            let table = self.table("embed_tokens_per_layer", hyper.ple.saturating_mul(count), count)?;
            self.matrix(writer, "per_layer_token_embd", &table, "group_scale")?;
        }

        for (role, module) in ROLES {
            if hyper.ple == 0 && ["inp_gate", "proj"].contains(&role) {
                continue;
            }
            let (mut bits, mut inputs, mut outputs) = (vec![0_u8; count], vec![0.0_f32; count], vec![0.0_f32; count]);
            let places = bits.iter_mut().zip(&mut inputs).zip(&mut outputs);
            for ((il, layer), ((bits, input), output)) in hyper.layers.iter().enumerate().zip(places) {
                if !layer.owns_kv && ["attn_k", "attn_v"].contains(&role) {
                    self.skip_linear(&format!("layers.{il}.{module}"));
                    continue;
                }
                let (rows, cols) = linear_shape(hyper, layer, role);
                let linear = self.linear(&format!("layers.{il}.{module}"), rows, cols)?;
                *bits = linear.packed.bits as u8;
                (*input, *output) = (linear.input, linear.output);
                self.matrix(writer, &format!("blk.{il}.{role}"), &linear.packed, "row_scale")?;
            }
            writer.array(&format!("{arch}.srq.input_scale.{role}"), &inputs);
            writer.array(&format!("{arch}.srq.output_scale.{role}"), &outputs);
            if self.target == Target::Native {
                writer.array(&format!("{arch}.srq.bits.{role}"), &bits);
            }
        }
        self.cache(writer)?;
        self.widths.check()?;
        Ok(tied)
    }

    /// The scales of the key/value cache.
    fn cache(&self, writer: &mut Writer<'a>) -> Result<()> {
        let mut bits = Vec::new();
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for (il, layer) in self.text.hyper.layers.iter().enumerate() {
            let name = |which: &str| format!("{}layers.{il}.self_attn.{which}_cache_scale", self.text.prefix);
            if layer.owns_kv {
                let scale = |which: &str| self.scalar(&name(which), step, "a number of at least 1e-30");
                k.push(scale("k")?);
                v.push(scale("v")?);
            } else {
                [name("k"), name("v")].iter().for_each(|name| self.text.checkpoint.skip(name));
                k.push(0.0);
                v.push(0.0);
            }
            bits.push(if layer.sliding { 8_u8 } else { 4 });
        }
        let arch = self.arch();
        writer.array(&format!("{arch}.srq.kv.k_scale"), &k);
        writer.array(&format!("{arch}.srq.kv.v_scale"), &v);
        writer.array(&format!("{arch}.srq.kv.bits"), &bits);
        Ok(())
    }

    /// The head, if it has tensors of its own.
    fn head(&self, table: &Packed) -> Result<Option<Linear<'a>>> {
        if !self.text.checkpoint.has(HEAD) && self.text.hyper.tied {
            return Ok(None);
        }
        self.linear_at("lm_head", "lm_head", table.rows, table.cols).map(Some)
    }

    /// Whether two matrices are the same, bit for bit.
    fn same(&self, a: &Packed, b: &Packed) -> Result<bool> {
        let same = |a: &Stored, b: &Stored| self.text.checkpoint.same(a, b, self.text.meter);
        Ok(a.bits == b.bits && same(a.scale, b.scale)? && same(a.weight, b.weight)?)
    }

    fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Linear<'a>> {
        self.linear_at(&format!("{}{name}", self.text.prefix), &format!("{MODULES}{name}"), rows, cols)
    }

    /// A linear module: its tensors begin with `tensors`, its name in the map is `module`.
    fn linear_at(&self, tensors: &str, module: &str, rows: usize, cols: usize) -> Result<Linear<'a>> {
        let weight = self.text.checkpoint.tensor(&format!("{tensors}.weight"))?;
        let bits = self.bits(weight, module, rows, cols)?;
        let scale = self.text.checkpoint.exactly(&format!("{tensors}.weight_scale"), Dtype::F32, &[rows, 1])?;
        self.scales(scale)?;
        let side = |side: &str| {
            let name = format!("{tensors}.{side}_activation_scale");
            self.scalar(&name, |x| x == 0.0 || step(x), "0 or a number of at least 1e-30")
        };
        let (input, output) = (side("input")?, side("output")?);
        Ok(Linear { packed: Packed { weight, scale, bits, rows, cols, groups: 1 }, input, output })
    }

    /// An embedding table with `groups` scales a row.
    fn table(&self, name: &str, cols: usize, groups: usize) -> Result<Packed<'a>> {
        let rows = self.text.hyper.vocab;
        let weight = self.text.checkpoint.tensor(&format!("{}{name}.embedding_quantized", self.text.prefix))?;
        let bits = self.bits(weight, &format!("{MODULES}{name}"), rows, cols)?;
        let scale = format!("{}{name}.embedding_scale", self.text.prefix);
        let scale = self.text.checkpoint.exactly(&scale, Dtype::F32, &[rows, groups])?;
        self.scales(scale)?;
        Ok(Packed { weight, scale, bits, rows, cols, groups })
    }

    /// The width of packed weights: of their shape, which the map must confirm.
    fn bits(&self, weight: &Stored, module: &str, rows: usize, cols: usize) -> Result<usize> {
        let wrong = |what: String, expected: String| Err(self.text.checkpoint.wrong(weight, what, expected));
        let shape = format!("shape {:?}", weight.shape);
        let &[found, bytes] = weight.shape.as_slice() else {
            return wrong(shape, format!("{rows} rows of packed weights"));
        };
        let bits = bytes.saturating_mul(8);
        if found != rows || !bits.is_multiple_of(cols.max(1)) {
            return wrong(shape, format!("{rows} rows of {cols} packed weights"));
        }
        let bits = bits.checked_div(cols).unwrap_or(0);
        let dtype = match bits {
            2 | 4 => Dtype::U8,
            8 => Dtype::I8,
            _ => return wrong(format!("{shape}: {bits} bits a weight"), "2, 4 or 8".into()),
        };
        if weight.dtype != dtype {
            return wrong(format!("type {}", weight.dtype), format!("{dtype} for weights of {bits} bits"));
        }
        match self.widths.of(module)? {
            Some(says) if says == bits => {}
            Some(says) => {
                let expected = format!("the {says} that config.json's module_quant_configs gives {module}");
                return wrong(format!("{shape}: {bits} bits a weight"), expected);
            }
            None => {
                let expected = format!("none, as config.json's modules_to_not_convert names {module}");
                return wrong(format!("{shape}: {bits} bits a weight"), expected);
            }
        }
        // Kernels and blocks hold groups of 32 weights.
        if !cols.is_multiple_of(32) {
            let error =
                format!("{}: rows of {cols} weights: expected a multiple of 32", self.text.checkpoint.place(weight));
            return Err(Error::unsupported(error));
        }
        Ok(bits)
    }

    /// Checks scales of rows: a row may be all zeros, but no more than that.
    fn scales(&self, stored: &Stored) -> Result<()> {
        self.text.checkpoint.check_f32s(stored, |x| x.is_finite() && x >= 0.0, "finite numbers of at least 0")
    }

    fn scalar(&self, name: &str, good: impl Fn(f32) -> bool, expected: &str) -> Result<f32> {
        // A number is written without dimensions, or by some as a list of one.
        let list = self.text.checkpoint.tensor(name)?.shape == [1];
        let stored = self.text.checkpoint.exactly(name, Dtype::F32, if list { &[1] } else { &[] })?;
        self.text.checkpoint.check_f32s(stored, good, expected)?;
        Ok(self.text.checkpoint.f32s(stored).first().copied().unwrap_or(0.0))
    }

    fn skip_linear(&self, module: &str) {
        for part in ["weight", "weight_scale", "input_activation_scale", "output_activation_scale"] {
            self.text.checkpoint.skip(&format!("{}{module}.{part}", self.text.prefix));
        }
    }

    /// Adds `packed` to the file as `name`, with its scales, which are called `scale`.
    fn matrix(&self, writer: &mut Writer<'a>, name: &str, packed: &Packed<'a>, scale: &str) -> Result<()> {
        match self.target {
            Target::Native => self.native(writer, name, packed, scale),
            Target::Stock => self.stock(writer, name, packed, scale),
        }
        Ok(())
    }

    fn native(&self, writer: &mut Writer<'a>, name: &str, packed: &Packed<'a>, scale: &str) {
        let (checkpoint, meter) = (self.text.checkpoint, self.text.meter);
        let row = packed.cols.saturating_mul(packed.bits) / 8;
        if !name.starts_with("blk.") {
            writer.metadata(&format!("{}.srq.bits.{name}", self.arch()), packed.bits as u8);
        }
        meter.expect(checkpoint.bytes(packed.weight).len() as u64);
        meter.expect(checkpoint.bytes(packed.scale).len() as u64);
        let (weight, scales) = (packed.weight, packed.scale);
        writer.tensor_with(&format!("{name}.weight"), I8, &[row as u64, packed.rows as u64], move |out| {
            checkpoint.rows(weight, row, meter, |_, bytes| put(out, bytes))
        });
        let dims = [packed.groups as u64, packed.rows as u64];
        let dims = if packed.groups == 1 { &dims[1..] } else { &dims[..] };
        writer.tensor_with(&format!("{name}.{scale}"), tensor_id(Format::F32), dims, move |out| {
            checkpoint.rows(scales, 4, meter, |_, bytes| put(out, bytes))
        });
    }

    fn stock(&self, writer: &mut Writer<'a>, name: &str, packed: &Packed<'a>, scale: &str) {
        let (checkpoint, meter) = (self.text.checkpoint, self.text.meter);
        let exact = checkpoint.f32s(packed.scale);
        writer.array(&format!("{}.srq.{scale}.{name}", self.arch()), &exact);
        drop(exact);
        checkpoint.let_go(packed.scale);

        let group = packed.cols.checked_div(packed.groups).unwrap_or(0);
        let format = match packed.bits {
            2 if group.is_multiple_of(Format::Tq2_0.block_elems()) => Format::Tq2_0,
            2 | 4 => Format::Q4_0,
            _ => Format::Q8_0,
        };
        let row = packed.cols.saturating_mul(packed.bits) / 8;
        meter.expect(checkpoint.bytes(packed.weight).len() as u64);
        let (weight, scales, bits, groups) = (packed.weight, packed.scale, packed.bits, packed.groups);
        let dims = [packed.cols as u64, packed.rows as u64];
        writer.tensor_with(&format!("{name}.weight"), tensor_id(format), &dims, move |out| {
            let mut blocks = Vec::new();
            checkpoint.rows(weight, row, meter, |first, bytes| {
                blocks.clear();
                let scales = checkpoint.bytes(scales).as_chunks().0;
                let scales = scales.get(first.saturating_mul(groups)..).unwrap_or_default();
                // A group of columns with a scale of its own is a short row.
                for (row, scale) in bytes.chunks(row.checked_div(groups).unwrap_or(row).max(1)).zip(scales) {
                    blocks_of_row(format, bits, row, f32::from_le_bytes(*scale), &mut blocks);
                }
                put(out, &blocks)
            })
        });
    }
}

/// One byte a weight: the stored codes of 2 and 4 bits, lowest bits first, or the values of 8.
fn codes<const N: usize>(bits: usize, packed: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    match bits {
        2 => {
            for (codes, byte) in out.as_chunks_mut().0.iter_mut().zip(packed) {
                *codes = [byte & 3, (byte >> 2) & 3, (byte >> 4) & 3, byte >> 6];
            }
        }
        4 => {
            for (codes, byte) in out.as_chunks_mut().0.iter_mut().zip(packed) {
                *codes = [byte & 15, byte >> 4];
            }
        }
        _ => out.iter_mut().zip(packed).for_each(|(code, byte)| *code = *byte),
    }
    out
}

/// Appends the blocks of `format` that hold a row of packed weights, each with the scale rounded to a half.
fn blocks_of_row(format: Format, bits: usize, row: &[u8], scale: f32, out: &mut Vec<u8>) {
    let half = f32_to_f16(scale).to_le_bytes();
    for block in row.chunks_exact((format.block_elems() * bits / 8).max(1)) {
        match format {
            Format::Tq2_0 => {
                // (t - 1)·(-s) with t = 1 - q = 3 - code; of each 128 weights the first 32 have the lowest bits.
                for weights in codes::<256>(bits, block).as_chunks::<128>().0 {
                    let [a, b, c, d] = weights.as_chunks::<32>().0 else { continue };
                    let mut packed = [0; 32];
                    for (((packed, a), b), (c, d)) in packed.iter_mut().zip(a).zip(b).zip(c.iter().zip(d)) {
                        *packed = !(a | b << 2 | c << 4 | d << 6);
                    }
                    out.extend_from_slice(&packed);
                }
                let [low, high] = half;
                out.extend_from_slice(&[low, high ^ 0x80]);
            }
            Format::Q4_0 => {
                // (n - 8)·s; n is the code of four bits, and six more than the code of two.
                let shift = if bits == 2 { 6 } else { 0 };
                let codes: [u8; 32] = codes(bits, block);
                let (low, high) = codes.split_at(16);
                let mut packed = [0; 16];
                for ((packed, low), high) in packed.iter_mut().zip(low).zip(high) {
                    *packed = (low + shift) | (high + shift) << 4;
                }
                out.extend_from_slice(&half);
                out.extend_from_slice(&packed);
            }
            _ => {
                out.extend_from_slice(&half);
                out.extend_from_slice(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All weights of a row, as any engine reads the blocks.
    fn unpacked(format: Format, bits: usize, row: &[u8], scale: f32) -> Vec<f32> {
        let mut blocks = Vec::new();
        blocks_of_row(format, bits, row, scale, &mut blocks);
        let mut values = vec![0.0; row.len() * 8 / bits];
        format.unpack_row(&blocks, &mut values);
        values
    }

    #[test]
    fn blocks_hold_the_integers_of_the_row() {
        let row: Vec<u8> = (0..512_u32).map(|i| (i * 167 + i / 7) as u8).collect();
        let two: Vec<f32> = row.iter().flat_map(|b| [0, 2, 4, 6].map(|s| f32::from((b >> s) & 3) - 2.0)).collect();
        let four: Vec<f32> = row.iter().flat_map(|b| [b & 15, b >> 4].map(|n| f32::from(n) - 8.0)).collect();
        let eight: Vec<f32> = row.iter().map(|&b| f32::from(b as i8)).collect();
        let times = |values: &[f32]| values.iter().map(|v| v * 0.25).collect::<Vec<_>>();
        assert_eq!(unpacked(Format::Tq2_0, 2, &row, 0.25), times(&two));
        assert_eq!(unpacked(Format::Q4_0, 2, &row, 0.25), times(&two));
        assert_eq!(unpacked(Format::Q4_0, 4, &row, 0.25), times(&four));
        assert_eq!(unpacked(Format::Q8_0, 8, &row, 0.25), times(&eight));
    }
}
