//! Plain checkpoints: BF16, F16 or F32 tensors, to be quantized or rounded.
//!
//! Types are chosen as the published Q4_0 files have them: matrices in the format asked for, the embedding tables one step
//! better, the projection of the per-layer embedding as it is, the router and all vectors in F32. A matrix whose rows are no
//! whole number of blocks is kept in F16.

use gemrun_simd::Format;

use super::checkpoint::Stored;
use super::{HEAD, ROLES, Text, linear_shape};
use crate::Result;
use crate::gguf::write::Writer;

/// Collects what goes into the file.
pub(super) struct Plain<'a, 'b, 'p> {
    pub(super) text: &'b Text<'a, 'p>,
    pub(super) format: Format,
}

impl<'a> Plain<'a, '_, '_> {
    /// Adds all matrices to `writer`; whether the head is the embedding table.
    ///
    /// # Errors
    /// `Invalid` with file and tensor for what is missing or has another shape or type than it should.
    pub(super) fn write(&self, writer: &mut Writer<'a>) -> Result<bool> {
        let (text, hyper) = (self.text, self.text.hyper);
        let dim = hyper.dim;
        let mut matrix = |to: &str, from: &str, shape: &[usize], format: Format| {
            let whole = shape.last().is_some_and(|cols| cols.is_multiple_of(format.block_elems()));
            text.floats(writer, to, from, shape, Some(if whole { format } else { Format::F16 }))
        };
        let table = match self.format {
            Format::Q4_0 => Format::Q6K,
            other => other,
        };
        let shape = [hyper.vocab, dim];
        let tied = self.tied(&shape)?;
        matrix("token_embd.weight", &text.name("embed_tokens.weight"), &shape, table)?;
        if !tied {
            matrix("output.weight", HEAD, &shape, table)?;
        }
        if hyper.ple > 0 {
            let shape = [hyper.vocab, hyper.ple.saturating_mul(hyper.layers.len())];
            matrix("per_layer_token_embd.weight", &text.name("embed_tokens_per_layer.weight"), &shape, table)?;
        }
        for (il, layer) in hyper.layers.iter().enumerate() {
            for (role, module) in ROLES {
                let from = text.name(&format!("layers.{il}.{module}.weight"));
                let shared = !layer.owns_kv && ["attn_k", "attn_v"].contains(&role);
                if shared || (role == "attn_v" && hyper.v_is_k && !layer.sliding) {
                    text.checkpoint.skip(&from);
                } else if hyper.ple > 0 || !["inp_gate", "proj"].contains(&role) {
                    let (rows, cols) = linear_shape(hyper, layer, role);
                    matrix(&format!("blk.{il}.{role}.weight"), &from, &[rows, cols], self.format)?;
                }
            }
            if let Some(experts) = &hyper.experts {
                let (count, ff) = (experts.count, experts.ff);
                let from = |name: &str| text.name(&format!("layers.{il}.{name}"));
                let to = |name: &str| format!("blk.{il}.{name}.weight");
                matrix(&to("ffn_gate_inp"), &from("router.proj.weight"), &[count, dim], Format::F32)?;
                let shape = [count, ff.saturating_mul(2), dim];
                matrix(&to("ffn_gate_up_exps"), &from("experts.gate_up_proj"), &shape, self.format)?;
                matrix(&to("ffn_down_exps"), &from("experts.down_proj"), &[count, dim, ff], self.format)?;
            }
        }
        Ok(tied)
    }

    /// Whether the head is the embedding table: the configuration says so, or both have the same bytes.
    fn tied(&self, shape: &[usize]) -> Result<bool> {
        let checkpoint = self.text.checkpoint;
        if self.text.hyper.tied {
            checkpoint.skip(HEAD);
            return Ok(true);
        }
        let table: &Stored = checkpoint.floats(&self.text.name("embed_tokens.weight"), shape)?;
        let head = checkpoint.floats(HEAD, shape)?;
        checkpoint.same(table, head, self.text.meter)
    }
}
