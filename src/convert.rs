//! Checkpoints in, GGUF out: a folder of safetensors, as models are published and fine-tuned, becomes one file.
//!
//! Everything is checked first (shapes, types, scales, the vocabulary), then the file is written from front to back while the
//! source is read a megabyte at a time, so neither has to fit in memory. The file gets its name when it is complete.
//! Two kinds of checkpoint are known: Google's *mobile* ones (`quant_method: "gemma"`, see `mobile.rs`), which become *native* or
//! *stock* files, and *plain* ones of floats (`plain.rs`). Towers for images and sound are left out.
//!
//! A file made from a mobile checkpoint has the keys of any Gemma 4 file and, below its architecture (`gemma4-srq` of native
//! files, `gemma4` of stock ones), for R in attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down inp_gate proj:
//!
//! ```text
//! srq.version u32 1, srq.scheme "wna8o8", srq.round "half_even", srq.qmin i32 -128, srq.qmax i32 127
//! srq.source                                  str: the folder, and repository and revision where its path tells them
//! srq.input_scale.R, srq.output_scale.R       f32[layers]; 0: no rounding on that side
//! srq.input_scale.output, .output_scale.output f32, of the head
//! srq.kv.k_scale, .v_scale                    f32[layers], of global layers on a grid of 4 bits; 0: reads another's cache
//! srq.kv.bits                                 u8[layers]: 4 global, 8 sliding
//! native: srq.bits.R                          u8[layers]; srq.bits.token_embd, .output, .per_layer_token_embd: u8
//!         NAME.weight I8 [columns·bits/8, rows], blk.N.R.row_scale and the like F32 [rows],
//!         per_layer_token_embd.group_scale F32 [layers, vocabulary]
//! stock:  srq.row_scale.NAME                  f32[rows], exact; srq.group_scale.per_layer_token_embd
//! ```
#![deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod checkpoint;
mod hyper;
mod json;
mod mobile;
mod plain;
mod quant;
mod vocab;
mod widths;

use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;

use gemrun_simd::Format;

use crate::gguf::write::Writer;
use crate::gguf::{Gguf, I8};
use crate::machine::storage;
use crate::model::Model;
use crate::new_file::NewFile;
use crate::tokenizer::Tokenizer;
use crate::weight::Numerics;
use crate::{Error, Kind, Result};
use checkpoint::{Checkpoint, Meter};
use hyper::{Hyper, Layer};
use json::Json;
use mobile::Mobile;
use plain::Plain;
use widths::Widths;

/// Told the bytes read so far and of how many; says whether to go on.
pub type Progress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + 'a;

/// What a mobile checkpoint becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Its bytes as they are, under an architecture that other programs refuse.
    Native,
    /// Block formats that other programs read; they leave the static scales out and answer much worse.
    Stock,
}

impl Target {
    /// The file's `general.architecture`.
    pub fn architecture(self) -> &'static str {
        match self {
            Target::Native => "gemma4-srq",
            Target::Stock => "gemma4",
        }
    }
}

/// What is wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Of a mobile checkpoint; native by default. Not for plain ones.
    pub target: Option<Target>,
    /// Format of a plain checkpoint's matrices: F16, Q8_0 or Q4_0, which is the default. Not for mobile ones.
    pub format: Option<Format>,
    /// Replace a file that is there.
    pub overwrite: bool,
}

/// What was made.
#[derive(Debug)]
pub struct Report {
    /// `None`: the checkpoint was a plain one.
    pub target: Option<Target>,
    /// Size of the new file.
    pub bytes: u64,
    /// What people should know, a line each.
    pub notes: Vec<String>,
}

/// Converts the checkpoint in the folder `source` to the file `out`.
///
/// # Errors
/// [`Kind::NotFound`] if files are missing, [`Kind::Unsupported`] for models of another kind, [`Kind::Invalid`] with file and
/// tensor or key for whatever is damaged or unexpected, [`Kind::Usage`] if options do not fit the checkpoint or `out` exists,
/// [`Kind::Interrupted`] if `progress` says so, [`Kind::Other`] if the disk is full. Nothing is left of a file then.
pub fn convert(source: &Path, out: &Path, options: &Options, progress: &mut Progress) -> Result<Report> {
    let checkpoint = Checkpoint::open(source)?;
    check_out(&checkpoint, source, out, options)?;
    let config = json::load(source, CONFIG)?.ok_or_else(|| {
        Error::new(Kind::NotFound, format!("{}: no {CONFIG}: expected the model's configuration", source.display()))
    })?;
    let config = Json::of(CONFIG, &config);
    let hyper = Hyper::read(&config)?;
    let quantization = config.get("quantization_config");
    let widths = quantization.as_ref().map(Widths::read).transpose()?;
    let meter = Meter::new(progress);
    let text = Text { checkpoint: &checkpoint, hyper: &hyper, meter: &meter, prefix: prefix(&checkpoint)? };
    let (name, origin) = origin(source);
    let mut notes = Vec::new();

    let mut writer = Writer::new();
    let target = match (&widths, options.target, options.format) {
        (Some(_), target, None) => Some(target.unwrap_or(Target::Native)),
        (None, None, _) => None,
        (Some(_), _, Some(_)) => {
            return Err(Error::usage("type: the checkpoint is a mobile one: its weights have their widths already"));
        }
        (None, Some(_), _) => {
            return Err(Error::usage("format: the checkpoint is a plain one: expected --type, or neither"));
        }
    };
    let arch = target.unwrap_or(Target::Stock).architecture();
    let format = options.format.unwrap_or(Format::Q4_0);
    writer.metadata("general.architecture", arch);
    writer.metadata("general.type", "model");
    let name = match target {
        Some(Target::Stock) => format!("{name} {DEGRADED}"),
        _ => name,
    };
    writer.metadata("general.name", name.as_str());
    if target == Some(Target::Stock) {
        writer.metadata("general.description", DESCRIPTION);
    }
    match (target, format) {
        (Some(Target::Native), _) => {} // no number of ggml's describes it
        (None, Format::F16) => drop(writer.metadata("general.file_type", 1_u32)),
        (None, Format::Q8_0) => drop(writer.metadata("general.file_type", 7_u32)),
        _ => drop(writer.metadata("general.file_type", 2_u32)),
    }
    writer.metadata("general.quantization_version", 2_u32);
    hyper.write(arch, &mut writer);
    let tied = match (&widths, target) {
        (Some(widths), Some(target)) => {
            hyper.mobile_only(CONFIG)?;
            writer.metadata(&format!("{arch}.srq.source"), origin.as_str());
            Mobile { text: &text, widths, target }.write(&mut writer)?
        }
        _ => Plain { text: &text, format }.write(&mut writer)?,
    };
    if tied && checkpoint.has(HEAD) {
        notes.push("lm_head: the same as embed_tokens, bit for bit: kept once".to_string());
    }
    text.vectors(&mut writer)?;
    notes.extend(vocab::write(source, hyper.vocab, &mut writer)?);
    notes.extend(unused(&checkpoint));

    let needed = writer.data_bytes();
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let Some(free) = storage::free(folder).filter(|free| *free < needed) {
        let (folder, needed, free) = (folder.display(), needed as f64 / 1e9, free as f64 / 1e9);
        let error = format!("{folder}: {free:.2} GB are free: expected {needed:.2} GB for {}", out.display());
        return Err(Error::new(Kind::Other, error));
    }
    let mut file = NewFile::create(out)?;
    writer.write_to(&mut file)?;
    file.flush().map_err(|e| Error::io(file.part(), &e))?;
    check_runs(file.part()).map_err(|e| e.within(&format!("{}: makes a file that does not run", source.display())))?;
    file.finish()?;
    let bytes = std::fs::metadata(out).map_err(|e| Error::io(out, &e))?.len();
    Ok(Report { target, bytes, notes })
}

const CONFIG: &str = "config.json";
const HEAD: &str = "lm_head.weight";
/// Part of a stock file's name, as every program shows it.
const DEGRADED: &str = "(degraded without static activations)";
const DESCRIPTION: &str = "A mobile checkpoint in stock tensor types. It was trained with int8 activations on static scales; programs \
    that leave those out, as all did when this file was made but gemrun, answer much worse than the model can.";

/// Refuses an output that is there, unless it is to be replaced; the source's own files never are.
fn check_out(checkpoint: &Checkpoint, source: &Path, out: &Path, options: &Options) -> Result<()> {
    let refuse = |what: &str| Err(Error::usage(format!("{}: {what}", out.display())));
    let Ok(meta) = std::fs::metadata(out) else { return Ok(()) };
    if meta.is_dir() {
        return refuse("is a folder: expected the name of a file to write");
    }
    if !meta.is_file() {
        return refuse("is a pipe or a device: expected the name of a file to write");
    }
    if !options.overwrite {
        return refuse("exists: expected the name of a new file, or --force");
    }
    let place = std::fs::canonicalize(out).ok();
    if checkpoint.paths(source).iter().any(|path| std::fs::canonicalize(path).ok() == place) {
        return refuse("is what is to be converted: expected another file");
    }
    Ok(())
}

/// Loads the new file as whoever runs it would. Settings can fit the tensors and yet make no model.
fn check_runs(path: &Path) -> Result<()> {
    let gguf = Gguf::open(path)?;
    Model::load(&gguf, &Numerics::default())?;
    Tokenizer::from_gguf(&gguf).map(drop)
}

/// What the names of the text model's tensors begin with: it depends on which class they were saved from.
fn prefix(checkpoint: &Checkpoint) -> Result<&'static str> {
    let all = ["model.language_model.", "language_model.model.", "model.", ""];
    let table = |prefix: &&str| {
        ["weight", "embedding_quantized"].iter().any(|end| checkpoint.has(&format!("{prefix}embed_tokens.{end}")))
    };
    all.into_iter().find(table).ok_or_else(|| {
        let error = format!(
            "{}: tensor model.language_model.embed_tokens.weight: missing: expected a text model",
            checkpoint.file()
        );
        Error::invalid(error)
    })
}

/// The checkpoint's name and where it is from: the folder's name, or repository and revision where the folder is part of a
/// download cache (`models--OWNER--REPO/snapshots/REVISION`).
fn origin(source: &Path) -> (String, String) {
    let place = std::path::absolute(source).unwrap_or_else(|_| source.to_path_buf());
    let part =
        |up: usize| place.ancestors().nth(up).and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    let folder = part(0).unwrap_or_else(|| "model".to_string());
    if let (Some("snapshots"), Some(cache)) = (part(1).as_deref(), part(2))
        && let Some((owner, repo)) = cache.strip_prefix("models--").and_then(|rest| rest.split_once("--"))
    {
        return (repo.to_string(), format!("{owner}/{repo}@{folder}"));
    }
    (folder.clone(), folder)
}

/// A note on tensors that were not used, other than the towers'.
fn unused(checkpoint: &Checkpoint) -> Option<String> {
    const TOWERS: [&str; 6] = [
        "vision_tower.",
        "audio_tower.",
        "embed_vision.",
        "embed_audio.",
        "vision_embedder.",
        "multi_modal_projector.",
    ];
    let tower = |name: &&str| {
        let name = name.strip_prefix("model.").unwrap_or(name);
        TOWERS.iter().any(|tower| name.starts_with(tower))
    };
    let names: Vec<&str> = checkpoint.unused().into_iter().filter(|name| !tower(name)).collect();
    let first: Vec<&str> = names.iter().copied().take(3).collect();
    let more = if names.len() > first.len() { ", ..." } else { "" };
    let count = names.len();
    (count > 0)
        .then(|| format!("{count} tensors that no Gemma 4 text model has were left out: {}{more}", first.join(", ")))
}

/// The text model's tensors, as both kinds of checkpoint have them.
struct Text<'a, 'p> {
    checkpoint: &'a Checkpoint,
    hyper: &'a Hyper,
    meter: &'a Meter<'a, 'p>,
    /// What their names begin with.
    prefix: &'a str,
}

impl<'a> Text<'a, '_> {
    /// The name in the checkpoint.
    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Adds the float tensor `from` of `shape` (contiguous dimension last) as `to` in `format`, or as it is.
    ///
    /// # Errors
    /// `Invalid` if it is missing, not of floats or of another shape.
    fn floats(
        &self,
        writer: &mut Writer<'a>,
        to: &str,
        from: &str,
        shape: &[usize],
        format: Option<Format>,
    ) -> Result<()> {
        let (checkpoint, meter) = (self.checkpoint, self.meter);
        let stored = checkpoint.floats(from, shape)?;
        let given = checkpoint::float_format(stored.dtype);
        let format = format.unwrap_or(given);
        let dims: Vec<u64> = shape.iter().rev().map(|&n| n as u64).collect();
        let cols = shape.last().copied().unwrap_or(1);
        meter.expect(checkpoint.bytes(stored).len() as u64);
        writer.tensor_with(to, tensor_id(format), &dims, move |out| {
            let mut values = Vec::new();
            let mut blocks = Vec::new();
            checkpoint.rows(stored, cols.saturating_mul(given.block_bytes()), meter, |_, bytes| {
                values.resize(bytes.len().checked_div(given.block_bytes()).unwrap_or(0), 0.0);
                given.unpack_row(bytes, &mut values);
                if let Some(bad) = values.iter().find(|value| !value.is_finite()) {
                    return Err(checkpoint.wrong(stored, format!("value {bad}"), "finite numbers"));
                }
                if format == given {
                    return put(out, bytes);
                }
                blocks.clear();
                quant::encode(format, &values, &mut blocks);
                put(out, &blocks)
            })
        });
        Ok(())
    }

    /// Adds norms, scales and what else is kept in full.
    fn vectors(&self, writer: &mut Writer<'a>) -> Result<()> {
        let hyper = self.hyper;
        let (dim, count) = (hyper.dim, hyper.layers.len());
        let mut vector =
            |to: &str, from: &str, len: usize| self.floats(writer, to, &self.name(from), &[len], Some(Format::F32));
        vector("output_norm.weight", "norm.weight", dim)?;
        if hyper.ple > 0 {
            vector("per_layer_proj_norm.weight", "per_layer_projection_norm.weight", hyper.ple)?;
        }
        for (il, layer) in hyper.layers.iter().enumerate() {
            let mut norm = |to: &str, from: &str, len: usize| {
                vector(&format!("blk.{il}.{to}.weight"), &format!("layers.{il}.{from}.weight"), len)
            };
            norm("attn_norm", "input_layernorm", dim)?;
            norm("attn_q_norm", "self_attn.q_norm", layer.head_dim)?;
            if layer.owns_kv {
                norm("attn_k_norm", "self_attn.k_norm", layer.head_dim)?;
            } else {
                self.checkpoint.skip(&self.name(&format!("layers.{il}.self_attn.k_norm.weight")));
            }
            norm("post_attention_norm", "post_attention_layernorm", dim)?;
            norm("ffn_norm", "pre_feedforward_layernorm", dim)?;
            norm("post_ffw_norm", "post_feedforward_layernorm", dim)?;
            if hyper.ple > 0 {
                norm("post_norm", "post_per_layer_input_norm", dim)?;
            }
            if let Some(experts) = &hyper.experts {
                norm("pre_ffw_norm_2", "pre_feedforward_layernorm_2", dim)?;
                norm("post_ffw_norm_1", "post_feedforward_layernorm_1", dim)?;
                norm("post_ffw_norm_2", "post_feedforward_layernorm_2", dim)?;
                let scale = format!("layers.{il}.router.scale");
                vector(&format!("blk.{il}.ffn_gate_inp.scale"), &scale, dim)?;
                let scale = format!("layers.{il}.router.per_expert_scale");
                vector(&format!("blk.{il}.ffn_down_exps.scale"), &scale, experts.count)?;
            }
            vector(&format!("blk.{il}.layer_output_scale.weight"), &format!("layers.{il}.layer_scalar"), 1)?;
        }
        if hyper.ple > 0 {
            let shape = [hyper.ple.saturating_mul(count), dim];
            let from = self.name("per_layer_model_projection.weight");
            self.floats(writer, "per_layer_model_proj.weight", &from, &shape, None)?;
        }
        let freqs = hyper.rope_freqs();
        let bytes: Vec<u8> = freqs.iter().flat_map(|freq| freq.to_le_bytes()).collect();
        writer.tensor("rope_freqs.weight", tensor_id(Format::F32), &[freqs.len() as u64], bytes);
        Ok(())
    }
}

/// Rows and columns of the linear module `role` (its GGUF name) of a layer.
fn linear_shape(hyper: &Hyper, layer: &Layer, role: &str) -> (usize, usize) {
    let (q, kv) = (hyper.heads.saturating_mul(layer.head_dim), layer.kv_heads.saturating_mul(layer.head_dim));
    match role {
        "attn_q" => (q, hyper.dim),
        "attn_k" | "attn_v" => (kv, hyper.dim),
        "attn_output" => (hyper.dim, q),
        "ffn_down" => (hyper.dim, layer.ff),
        "inp_gate" => (hyper.ple, hyper.dim),
        "proj" => (hyper.dim, hyper.ple),
        _ => (layer.ff, hyper.dim),
    }
}

/// Linear modules of a layer: the GGUF name and the checkpoint's.
const ROLES: [(&str, &str); 9] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("inp_gate", "per_layer_input_gate"),
    ("proj", "per_layer_projection"),
];

/// ggml's id of a format that it has.
fn tensor_id(format: Format) -> u32 {
    format.ggml_id().unwrap_or(I8)
}

/// Writes to the file that is being made.
fn put(out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(|e| Error::new(Kind::Other, format!("new file: cannot write: {e}")))
}
