//! A loaded model: every field is a tensor of the file, under the tensor's own name.
//!
//! Loading is looking up and checking: a tensor must exist, have the shape the hyper-parameters call for and a type its
//! role allows. Matrices stay in the mapped file, or in the mapped packed copy of it; only norms and scales, a few hundred
//! kilobytes, are copied. Tensors
//! the text model does not know (`v.*`, `a.*`, `mm.*`, redundant keys and values of sharing layers) are ignored.

mod channel;

pub use channel::width;

use std::cell::RefCell;
use std::collections::BTreeMap;

use gemrun_simd::{Format, Layout, Ops, interleave};

use crate::config::{Config, Experts, LayerConfig};
use crate::gguf::{Bytes, Gguf, Tensor};
use crate::pack::Packed;
use crate::weight::{Act, Numerics, StaticScales, Stored, Table, Weight};
use crate::{Error, Result};

/// A Gemma 4 text model.
pub struct Model {
    /// The hyper-parameters.
    pub config: Config,
    /// The vector operations of the chosen ISA.
    pub ops: &'static Ops,
    /// (vocab, dim) input embedding.
    pub token_embd: Table,
    /// (vocab, dim) output head; the same bytes as `token_embd` unless the file has `output.weight`.
    pub output: Weight,
    /// (dim) final norm.
    pub output_norm: Vec<f32>,
    /// (rotary width of global layers / 2) divisors of the angle, global layers only.
    pub rope_freqs: Vec<f32>,
    /// Per-layer embeddings, E2B and E4B.
    pub ple: Option<PerLayerEmbedding>,
    /// First layer first.
    pub layers: Vec<Layer>,
    /// The matrices that a packed copy may hold.
    interleavable: Vec<(String, Format)>,
    /// Whether the head has bytes of its own, so that of `token_embd` only rows are read.
    own_head: bool,
}

/// The model-wide tensors of per-layer embeddings.
pub struct PerLayerEmbedding {
    /// (vocab, layers · ple): one row per token id, read by row and never as a whole.
    pub per_layer_token_embd: Table,
    /// (layers · ple, dim).
    pub per_layer_model_proj: Weight,
    /// (ple), shared by all layers.
    pub per_layer_proj_norm: Vec<f32>,
}

/// One transformer layer.
pub struct Layer {
    /// (dim).
    pub attn_norm: Vec<f32>,
    /// (heads · head_dim, dim).
    pub attn_q: Weight,
    /// (head_dim).
    pub attn_q_norm: Vec<f32>,
    /// Own keys and values; absent where another layer's are read.
    pub attn_kv: Option<KeyValue>,
    /// (dim, heads · head_dim).
    pub attn_output: Weight,
    /// (dim).
    pub post_attention_norm: Vec<f32>,
    /// (dim).
    pub ffn_norm: Vec<f32>,
    /// (ff, dim).
    pub ffn_gate: Weight,
    /// (ff, dim).
    pub ffn_up: Weight,
    /// (dim, ff).
    pub ffn_down: Weight,
    /// Experts beside the dense network.
    pub moe: Option<Moe>,
    /// (dim).
    pub post_ffw_norm: Vec<f32>,
    /// This layer's use of the per-layer embedding.
    pub ple: Option<LayerPle>,
    /// Factor of the whole residual stream after this layer; 1 where the file has none.
    pub layer_output_scale: f32,
}

/// Key and value projections.
pub struct KeyValue {
    /// (kv_heads · head_dim, dim).
    pub attn_k: Weight,
    /// (head_dim).
    pub attn_k_norm: Vec<f32>,
    /// (kv_heads · head_dim, dim); absent where the value is the raw key projection.
    pub attn_v: Option<Weight>,
}

/// Mixture of experts of one layer.
pub struct Moe {
    /// (experts, dim) router.
    pub ffn_gate_inp: Weight,
    /// (dim) scale of the router's input.
    pub ffn_gate_inp_scale: Vec<f32>,
    /// (dim) norm before the experts.
    pub pre_ffw_norm_2: Vec<f32>,
    /// (dim) norm after the dense network.
    pub post_ffw_norm_1: Vec<f32>,
    /// (dim) norm after the experts.
    pub post_ffw_norm_2: Vec<f32>,
    /// One entry per expert.
    pub experts: Vec<Expert>,
    /// (experts) factor of each expert's output.
    pub ffn_down_exps_scale: Vec<f32>,
}

/// One expert: slices of the layer's expert tensors.
pub struct Expert {
    /// (expert_ff, dim).
    pub gate: Weight,
    /// (expert_ff, dim).
    pub up: Weight,
    /// (dim, expert_ff).
    pub down: Weight,
}

/// Per-layer embedding tensors of one layer.
pub struct LayerPle {
    /// (ple, dim).
    pub inp_gate: Weight,
    /// (dim, ple).
    pub proj: Weight,
    /// (dim).
    pub post_norm: Vec<f32>,
}

impl Model {
    /// Looks up and checks every tensor of `gguf`; picks a kernel for each weight.
    pub fn load(gguf: &Gguf, numerics: &Numerics) -> Result<Model> {
        Model::load_packed(gguf, None, numerics)
    }

    /// The same, with the matrices in `packed`, a copy of this very file, multiplied by in its order of bytes. Results are
    /// the same.
    pub fn load_packed(gguf: &Gguf, packed: Option<&Packed>, numerics: &Numerics) -> Result<Model> {
        let config = Config::from_gguf(gguf)?;
        if numerics.act == Act::Static && config.srq.is_none() && numerics.input_scales.is_empty() {
            let error = format!(
                "{}: static activation scales: the file has none: expected --static or another --act",
                gguf.name()
            );
            return Err(Error::unsupported(error));
        }
        let load = Loader { gguf, config: &config, numerics, packed, interleavable: RefCell::default() };
        let Config { dim, vocab, .. } = config;

        let token_embd = load.table("token_embd.weight", vocab, dim, 1)?;
        let head = gguf.tensor("output.weight").map_or("token_embd.weight", |_| "output.weight");
        let output = load.head(head, vocab, dim)?;
        let rope_freqs = load.vector("rope_freqs.weight", config.rope_global.dims / 2)?;
        if let Some(bad) = rope_freqs.iter().find(|&&factor| factor <= 0.0) {
            return Err(load.wrong("rope_freqs.weight", format!("value {bad}"), "divisors above 0"));
        }
        let layers = config.layers.len();
        let ple = match config.ple {
            0 => None,
            ple => Some(PerLayerEmbedding {
                per_layer_token_embd: load.table("per_layer_token_embd.weight", vocab, ple * layers, layers)?,
                per_layer_model_proj: load.weight("per_layer_model_proj.weight", ple * layers, dim)?,
                per_layer_proj_norm: load.vector("per_layer_proj_norm.weight", ple)?,
            }),
        };
        if let Some(ple) = &ple {
            ple.per_layer_token_embd.advise_random();
        }
        // Nothing reads the embedding as a whole where the head has bytes of its own.
        let own_head = head != "token_embd.weight" || output.kernel().layout() == Layout::Interleaved;
        if own_head {
            token_embd.advise_random();
        }
        let layers = (0..layers).map(|il| load.layer(il)).collect::<Result<Vec<_>>>()?;
        let output_norm = load.vector("output_norm.weight", dim)?;
        let interleavable = load.interleavable.into_inner();
        Ok(Model {
            ops: numerics.ops(),
            token_embd,
            output,
            output_norm,
            rope_freqs,
            ple,
            layers,
            interleavable,
            own_head,
            config,
        })
    }

    /// Takes the rows that were looked up out of this process's memory. A row brings along as many pages as the system likes
    /// to map at once, up to megabytes, and over a conversation that adds up to tables that are never read as a whole.
    pub fn let_go_of_rows(&self) {
        if let Some(ple) = &self.ple {
            ple.per_layer_token_embd.let_go();
        }
        if self.own_head {
            self.token_embd.let_go();
        }
    }

    /// The matrices a token is multiplied by, as integers, whose format has an interleaved order and whose rows, also of every
    /// part used on its own, come in eights: what a packed copy holds.
    pub fn interleavable(&self) -> &[(String, Format)] {
        &self.interleavable
    }

    /// The matrices of the layers that may have static scales, by role ([`config::ROLES`](crate::config::ROLES)).
    pub fn layer_weights(&mut self, il: usize) -> Vec<(&'static str, &mut Weight)> {
        let layer = &mut self.layers[il];
        let mut weights = vec![
            ("attn_q", &mut layer.attn_q),
            ("attn_output", &mut layer.attn_output),
            ("ffn_gate", &mut layer.ffn_gate),
            ("ffn_up", &mut layer.ffn_up),
            ("ffn_down", &mut layer.ffn_down),
        ];
        if let Some(kv) = &mut layer.attn_kv {
            weights.push(("attn_k", &mut kv.attn_k));
            weights.extend(kv.attn_v.as_mut().map(|weight| ("attn_v", weight)));
        }
        if let Some(ple) = &mut layer.ple {
            weights.extend([("inp_gate", &mut ple.inp_gate), ("proj", &mut ple.proj)]);
        }
        weights
    }

    /// Whether any weight is read from a packed copy.
    pub fn packed(&self) -> bool {
        self.weights().any(|weight| weight.kernel().layout() == Layout::Interleaved)
    }

    /// How many tokens of a prompt are best computed at once. Weights unpacked for 64 tokens are as good as free. An expert is
    /// sent few of a chunk's tokens, so that a chunk must be longer for its weights to be used more than once.
    pub fn batch(&self) -> usize {
        if self.config.experts.is_some() { 512 } else { 64 }
    }

    /// Starts reading what the embeddings of `tokens` take from the file: on a slow disk, row after row would take long.
    pub fn read_ahead(&self, tokens: &[u32]) {
        self.token_embd.read_ahead(tokens);
        if let Some(ple) = &self.ple {
            ple.per_layer_token_embd.read_ahead(tokens);
        }
    }

    /// Every weight a token is multiplied by; of experts, all.
    pub fn weights(&self) -> impl Iterator<Item = &Weight> {
        self.layers
            .iter()
            .flat_map(Layer::weights)
            .chain(self.ple.iter().map(|p| &p.per_layer_model_proj))
            .chain([&self.output])
    }

    /// The kernel of each weight format in use, by the format's name. If not all matrices of a format are packed, the kernel
    /// that reads more bytes.
    pub fn kernels(&self) -> BTreeMap<&'static str, &'static str> {
        let mut bytes = BTreeMap::new();
        for weight in self.weights() {
            let kernel = weight.kernel();
            *bytes.entry((kernel.format().name(), kernel.name())).or_insert(0) += weight.bytes();
        }
        let mut by_bytes: Vec<_> = bytes.into_iter().collect();
        by_bytes.sort_by_key(|&(_, bytes)| bytes);
        by_bytes.into_iter().map(|(names, _)| names).collect()
    }

    /// Bytes of weights that one generated token reads: every matrix once, of experts only those a token is sent to,
    /// of embedding tables one row.
    pub fn bytes_per_token(&self) -> usize {
        self.bytes_read(1, true)
    }

    /// Bytes of weights that `tokens` tokens, computed at once, cannot do without: a matrix counts once for all of them, experts
    /// as often as there are choices to be made, a row of an embedding table for each. `wanted` is whether the logits are asked
    /// for.
    pub fn bytes_read(&self, tokens: usize, wanted: bool) -> usize {
        let row = |table: &Table| table.bytes() / table.rows();
        let rows = row(&self.token_embd) + self.ple.as_ref().map_or(0, |p| row(&p.per_layer_token_embd));
        self.needed(tokens, wanted, Weight::bytes) + tokens * rows
    }

    /// Multiplications with weights, each followed by an addition, that a token cannot do without. `wanted` is whether its
    /// logits are asked for.
    pub fn multiply_adds(&self, wanted: bool) -> usize {
        self.needed(1, wanted, |weight| weight.rows() * weight.cols())
    }

    /// The sum of `size` over the weights that are needed. Of a token whose logits nobody wants, only keys and values matter:
    /// it ends with the last layer that makes any.
    fn needed(&self, tokens: usize, wanted: bool, size: fn(&Weight) -> usize) -> usize {
        let last = self.config.last_kv_layer();
        let whole = if wanted { self.layers.len() } else { last };
        let layer = |layer: &Layer| {
            let all: usize = layer.weights().map(size).sum();
            let experts: usize =
                layer.moe.iter().flat_map(|moe| &moe.experts).flat_map(Expert::weights).map(size).sum();
            let unused = |e: Experts| experts / e.count * (e.count - e.count.min(e.used * tokens));
            all - self.config.experts.map_or(0, unused)
        };
        let layers: usize = self.layers[..whole].iter().map(layer).sum();
        let ple = self.ple.as_ref().map_or(0, |p| size(&p.per_layer_model_proj) / self.layers.len() * whole);
        let end = match wanted {
            true => size(&self.output),
            false => self.layers[last].attn_kv.iter().flat_map(KeyValue::weights).map(size).sum(),
        };
        layers + ple + end
    }
}

impl Layer {
    fn weights(&self) -> impl Iterator<Item = &Weight> {
        let kv = self.attn_kv.iter().flat_map(KeyValue::weights);
        let moe =
            self.moe.iter().flat_map(|moe| moe.experts.iter().flat_map(Expert::weights).chain([&moe.ffn_gate_inp]));
        let ple = self.ple.iter().flat_map(|ple| [&ple.inp_gate, &ple.proj]);
        [&self.attn_q, &self.attn_output, &self.ffn_gate, &self.ffn_up, &self.ffn_down]
            .into_iter()
            .chain(kv)
            .chain(moe)
            .chain(ple)
    }
}

impl KeyValue {
    fn weights(&self) -> impl Iterator<Item = &Weight> {
        [Some(&self.attn_k), self.attn_v.as_ref()].into_iter().flatten()
    }
}

impl Expert {
    fn weights(&self) -> [&Weight; 3] {
        [&self.gate, &self.up, &self.down]
    }
}

/// Look-up with checks; errors name file and tensor.
struct Loader<'a> {
    gguf: &'a Gguf,
    config: &'a Config,
    numerics: &'a Numerics,
    packed: Option<&'a Packed>,
    /// Matrices met so far that may be packed.
    interleavable: RefCell<Vec<(String, Format)>>,
}

impl Loader<'_> {
    fn layer(&self, il: usize) -> Result<Layer> {
        let config = self.config;
        let c = &config.layers[il];
        let dim = config.dim;
        let name = |suffix: &str| format!("blk.{il}.{suffix}");
        let (q_rows, kv_rows) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);

        let fused_name = name("attn_qkv.weight");
        let fused = match self.gguf.tensor(&fused_name) {
            Some(_) => Some(self.matrix_with(
                &fused_name,
                &[dim, q_rows + 2 * kv_rows],
                &[q_rows, kv_rows],
                self.static_scales(&name("attn_q.weight")),
            )?),
            None => None,
        };
        let attn_q = match &fused {
            Some(fused) => fused.slice(0..q_rows),
            None => self.weight(&name("attn_q.weight"), q_rows, dim)?,
        };
        let attn_kv = if config.owns_kv(il) {
            let v_name = name("attn_v.weight");
            let (attn_k, attn_v) = match &fused {
                Some(fused) => {
                    (fused.slice(q_rows..q_rows + kv_rows), Some(fused.slice(q_rows + kv_rows..q_rows + 2 * kv_rows)))
                }
                None => (
                    self.weight(&name("attn_k.weight"), kv_rows, dim)?,
                    // Global layers of the larger models have no value projection: the raw key serves.
                    match self.gguf.tensor(&v_name) {
                        None if !c.sliding => None,
                        _ => Some(self.weight(&v_name, kv_rows, dim)?),
                    },
                ),
            };
            Some(KeyValue { attn_k, attn_k_norm: self.vector(&name("attn_k_norm.weight"), c.head_dim)?, attn_v })
        } else {
            None
        };

        let gate_up_name = name("ffn_gate_up.weight");
        let (ffn_gate, ffn_up) = match self.gguf.tensor(&gate_up_name) {
            Some(_) => {
                let scales = self.static_scales(&name("ffn_gate.weight"));
                let both = self.matrix_with(&gate_up_name, &[dim, 2 * c.ff], &[c.ff], scales)?;
                (both.slice(0..c.ff), both.slice(c.ff..2 * c.ff))
            }
            None => {
                (self.weight(&name("ffn_gate.weight"), c.ff, dim)?, self.weight(&name("ffn_up.weight"), c.ff, dim)?)
            }
        };
        let scale_name = name("layer_output_scale.weight");
        let layer_output_scale = match self.gguf.tensor(&scale_name) {
            Some(_) => self.vector(&scale_name, 1)?[0],
            None => 1.0,
        };
        let ple = match config.ple {
            0 => None,
            ple => Some(LayerPle {
                inp_gate: self.weight(&name("inp_gate.weight"), ple, dim)?,
                proj: self.weight(&name("proj.weight"), dim, ple)?,
                post_norm: self.vector(&name("post_norm.weight"), dim)?,
            }),
        };
        let moe = match config.experts {
            None => None,
            Some(experts) => Some(self.moe(c, experts.count, &name)?),
        };
        Ok(Layer {
            attn_norm: self.vector(&name("attn_norm.weight"), dim)?,
            attn_q,
            attn_q_norm: self.vector(&name("attn_q_norm.weight"), c.head_dim)?,
            attn_kv,
            attn_output: self.weight(&name("attn_output.weight"), dim, q_rows)?,
            post_attention_norm: self.vector(&name("post_attention_norm.weight"), dim)?,
            ffn_norm: self.vector(&name("ffn_norm.weight"), dim)?,
            ffn_gate,
            ffn_up,
            ffn_down: self.weight(&name("ffn_down.weight"), dim, c.ff)?,
            moe,
            post_ffw_norm: self.vector(&name("post_ffw_norm.weight"), dim)?,
            ple,
            layer_output_scale,
        })
    }

    fn moe(&self, c: &LayerConfig, count: usize, name: &dyn Fn(&str) -> String) -> Result<Moe> {
        let (dim, ff) = (self.config.dim, c.expert_ff);
        // One tensor holds all experts; expert e is its e-th slice of rows.
        let fused_name = name("ffn_gate_up_exps.weight");
        let (gate, up, stride, up_at) = match self.gguf.tensor(&fused_name) {
            Some(_) => {
                let both = self.parts(&fused_name, &[dim, 2 * ff, count], &[ff])?;
                (both.clone(), both, 2 * ff, ff)
            }
            None => {
                let gate = self.experts(&name("ffn_gate_exps.weight"), count, ff, dim)?;
                (gate, self.experts(&name("ffn_up_exps.weight"), count, ff, dim)?, ff, 0)
            }
        };
        let down = self.experts(&name("ffn_down_exps.weight"), count, dim, ff)?;
        let expert = |e: usize| Expert {
            gate: gate.slice(e * stride..e * stride + ff),
            up: up.slice(e * stride + up_at..e * stride + up_at + ff),
            down: down.slice(e * dim..(e + 1) * dim),
        };
        let scale_name = name("ffn_down_exps.scale");
        let ffn_down_exps_scale = match self.gguf.tensor(&scale_name) {
            Some(_) => self.vector(&scale_name, count)?,
            None => vec![1.0; count],
        };
        Ok(Moe {
            ffn_gate_inp: self.weight(&name("ffn_gate_inp.weight"), count, dim)?,
            ffn_gate_inp_scale: self.vector(&name("ffn_gate_inp.scale"), dim)?,
            pre_ffw_norm_2: self.vector(&name("pre_ffw_norm_2.weight"), dim)?,
            post_ffw_norm_1: self.vector(&name("post_ffw_norm_1.weight"), dim)?,
            post_ffw_norm_2: self.vector(&name("post_ffw_norm_2.weight"), dim)?,
            experts: (0..count).map(expert).collect(),
            ffn_down_exps_scale,
        })
    }

    fn wrong(&self, name: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
        Error::invalid(format!("{}: tensor {name}: {found}: expected {expected}", self.gguf.name()))
    }

    /// The tensor `name`, whose dimensions, fastest first, must be `dims`; trailing ones may be left out.
    fn tensor(&self, name: &str, dims: &[usize]) -> Result<&Tensor> {
        let tensor = self.gguf.tensor(name).ok_or_else(|| {
            Error::invalid(format!("{}: tensor {name}: missing: expected shape {}", self.gguf.name(), shape(dims)))
        })?;
        let found: Vec<usize> = tensor.dims.iter().map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect();
        if (0..found.len().max(dims.len())).any(|i| found.get(i).unwrap_or(&1) != dims.get(i).unwrap_or(&1)) {
            let used = found.len() - found.iter().rev().take_while(|&&d| d == 1).count();
            return Err(self.wrong(
                name,
                format!("shape {}", shape(&found[..used.max(1)])),
                format!("shape {}", shape(dims)),
            ));
        }
        Ok(tensor)
    }

    fn format(&self, name: &str, tensor: &Tensor) -> Result<Format> {
        Format::from_ggml(tensor.type_id).ok_or_else(|| {
            let kind = tensor.type_name();
            let known: Vec<_> = Format::ALL.into_iter().filter(|f| f.ggml_id().is_some()).map(Format::name).collect();
            let known = known.join(" ");
            let file = self.gguf.name();
            Error::unsupported(format!("{file}: tensor {name}: type {kind} is not supported: expected one of {known}"))
        })
    }

    /// Format and bytes of a matrix of `dims`, fastest first.
    fn matrix(&self, name: &str, dims: &[usize]) -> Result<(Format, Bytes)> {
        let tensor = self.tensor(name, dims)?;
        let format = self.format(name, tensor)?;
        if name.ends_with(".weight") {
            let scale = format!("{}.scale", name.trim_end_matches(".weight"));
            // A factor beside a matrix belongs to formats with a scale per tensor; leaving it out would be silently wrong.
            if self.gguf.tensor(&scale).is_some() && !MOE_SCALES.iter().any(|known| scale.ends_with(known)) {
                let error = format!("{}: tensor {scale}: a scale beside a matrix is not supported", self.gguf.name());
                return Err(Error::unsupported(error));
            }
        }
        Ok((format, self.gguf.bytes(tensor)))
    }

    fn weight(&self, name: &str, rows: usize, cols: usize) -> Result<Weight> {
        self.parts(name, &[cols, rows], &[rows])
    }

    fn experts(&self, name: &str, count: usize, rows: usize, cols: usize) -> Result<Weight> {
        self.parts(name, &[cols, rows, count], &[rows])
    }

    /// A matrix of `dims`, fastest first, which will be cut into slices of so many rows as `parts` has.
    fn parts(&self, name: &str, dims: &[usize], parts: &[usize]) -> Result<Weight> {
        self.matrix_with(name, dims, parts, self.static_scales(name))
    }

    /// The head, which may be the same matrix as the embedding.
    fn head(&self, name: &str, rows: usize, cols: usize) -> Result<Weight> {
        self.matrix_with(name, &[cols, rows], &[rows], self.config.srq.as_ref().map(|srq| srq.output))
    }

    fn matrix_with(&self, name: &str, dims: &[usize], parts: &[usize], scales: Option<StaticScales>) -> Result<Weight> {
        let (cols, rows) = (dims[0], dims[1..].iter().product());
        let (format, bytes, row_scale) = match self.channel(name, rows, cols)? {
            Some(channel) => (channel.format, channel.bytes, self.row_scale(name, rows)?),
            None => {
                let (format, bytes) = self.matrix(name, dims)?;
                let (format, row_scale) =
                    channel::repeated_scales(format, &bytes, cols).unwrap_or((format, Vec::new()));
                (format, bytes, row_scale)
            }
        };
        let mut packed = None;
        if format.interleaves() && parts.iter().all(|rows| rows.is_multiple_of(interleave::ROWS)) {
            self.interleavable.borrow_mut().push((name.to_string(), format));
            packed = self.packed.zip(self.gguf.tensor(name)).and_then(|(packed, tensor)| packed.bytes(tensor));
        }
        Ok(Weight::new(Stored { format, bytes, packed, rows, cols, row_scale, scales }, self.numerics))
    }

    /// A table whose rows have `groups` scales each, if they have any beside them.
    fn table(&self, name: &str, rows: usize, cols: usize, groups: usize) -> Result<Table> {
        match self.channel(name, rows, cols)? {
            Some(channel) => {
                let scales = self.table_scales(name, rows, groups)?;
                Ok(Table::new(channel.format, channel.bytes, rows, cols).with_scales(scales))
            }
            None => {
                let (format, bytes) = self.matrix(name, &[cols, rows])?;
                Ok(Table::new(format, bytes, rows, cols))
            }
        }
    }

    /// A norm or scale: F32, copied, every value finite.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, &[len])?;
        if Format::from_ggml(tensor.type_id) != Some(Format::F32) {
            return Err(self.wrong(name, format!("type {}", tensor.type_name()), "F32"));
        }
        let mut values = vec![0.0; len];
        Format::F32.unpack_row(&self.gguf.bytes(tensor), &mut values);
        match values.iter().position(|value| !value.is_finite()) {
            Some(at) => Err(self.wrong(name, format!("value {at} is {}", values[at]), "finite values")),
            None => Ok(values),
        }
    }
}

/// Vectors named `*.scale` that the mixture of experts reads.
const MOE_SCALES: [&str; 2] = [".ffn_gate_inp.scale", ".ffn_down_exps.scale"];

fn shape(dims: &[usize]) -> String {
    dims.iter().map(usize::to_string).collect::<Vec<_>>().join("x")
}
