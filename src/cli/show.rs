//! `gemrun show`: what a file holds, for people or as JSON.
//!
//! Any file with a sound header and tensor table can be looked at, also one that cannot be run. What it holds is
//! printed first; then tokenizer and model are loaded as `run` would load them, and where that fails the command ends
//! with the same error and exit code. So a file that `show` accepts is one that runs.

use std::ffi::OsString;
use std::io::Write;

use clap::Args;
use gemrun::Error;
use gemrun::error::printable;
use gemrun::gguf::{Gguf, Tensor, Value};
use gemrun::model::width;
use gemrun::sample::all_finite;
use gemrun_simd::Format;
use serde_json::{Map, json};

use super::{Result, open, terminal};

/// Show what a model file holds
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    gemrun show demo\n  \
    gemrun show ./model.gguf --tensors\n  \
    gemrun show e2b --json | jq .metadata\n\n\
    Shapes are in the file's order, fastest dimension first. Offsets count from the start of the tensor \
    data. In JSON, arrays of more than 64 entries are given by type, length and first entries.\n\n\
    A file that cannot be run is shown too; then an error says why, and the exit code is that of run.")]
pub struct Show {
    /// Model name or path of a GGUF file
    model: OsString,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
    /// List the tensors
    #[arg(long)]
    tensors: bool,
    /// List the metadata
    #[arg(long)]
    kv: bool,
    /// Read all tensor data and refuse values that are not finite
    #[arg(long)]
    check_data: bool,
}

/// Arrays with more entries than this are abbreviated.
const LONG: usize = 64;
/// Entries shown of an abbreviated array.
const FIRST: usize = 8;
/// Characters of a key or value shown to people.
const VALUE_WIDTH: usize = 80;
/// Bytes of a string shown in JSON; a chat template has some 20,000.
const MAX_STRING: usize = 1 << 20;
/// Blocks looked at in one go by `--check-data`.
const PIECE: usize = 64;

impl Show {
    pub fn run(self) -> Result {
        let gguf = open::gguf(&self.model)?;
        let summary = Summary::of(&gguf);
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        if self.json {
            let text = serde_json::to_string_pretty(&summary.json(&gguf)).map_err(std::io::Error::from)?;
            writeln!(out, "{}", harmless_json(&text))?;
        } else {
            summary.print(&gguf, &mut out)?;
            if self.kv {
                print_metadata(&gguf, &mut out)?;
            }
            if self.tensors {
                print_tensors(&gguf, &mut out)?;
            }
        }
        out.flush()?;
        drop(out);
        open::check(&gguf)?;
        if self.check_data {
            check_data(&gguf)?;
        }
        Ok(())
    }
}

/// The figures people ask for first.
struct Summary {
    architecture: Option<String>,
    name: Option<String>,
    parameters: u64,
    hot_bytes: u64,
    ple_bytes: u64,
    context_length: Option<u64>,
}

impl Summary {
    fn of(gguf: &Gguf) -> Summary {
        let text = |key: &str| match gguf.get(key) {
            Some(Value::Str(bytes)) => Some(readable(bytes)),
            _ => None,
        };
        let architecture = text("general.architecture");
        let context_length = architecture.as_ref().and_then(|arch| {
            let value = gguf.get(&format!("{arch}.context_length"))?;
            u64::try_from(value.as_int()?).ok()
        });
        // Embedding tables are read a row at a time, towers for images and sound not at all.
        let tied = gguf.tensor("output.weight").is_none();
        let hot = |tensor: &&Tensor| match tensor.name.as_str() {
            "per_layer_token_embd.weight" | "per_layer_token_embd.group_scale" => false,
            "token_embd.weight" | "token_embd.row_scale" => tied,
            name => !["v.", "a.", "mm."].iter().any(|tower| name.starts_with(tower)),
        };
        let sum = |value: &dyn Fn(&Tensor) -> u64, tensors: &mut dyn Iterator<Item = &Tensor>| {
            tensors.map(value).fold(0, u64::saturating_add)
        };
        Summary {
            name: text("general.name"),
            parameters: sum(&|t| elements(gguf, t), &mut gguf.tensors().iter()),
            hot_bytes: sum(&|t| t.bytes, &mut gguf.tensors().iter().filter(hot)),
            ple_bytes: sum(
                &|t| t.bytes,
                &mut gguf.tensors().iter().filter(|t| t.name.starts_with("per_layer_token_embd.")),
            ),
            architecture,
            context_length,
        }
    }

    fn json(&self, gguf: &Gguf) -> serde_json::Value {
        let metadata: Map<_, _> = gguf.metadata().map(|(key, value)| (key.to_string(), json_value(&value))).collect();
        let tensor = |t: &Tensor| json!({ "name": t.name, "type": type_name(gguf, t), "shape": t.shape(), "offset": t.offset, "bytes": t.bytes });
        json!({
            "architecture": self.architecture,
            "name": self.name,
            "parameters": self.parameters,
            "file_bytes": gguf.file_bytes(),
            "hot_bytes": self.hot_bytes,
            "ple_bytes": self.ple_bytes,
            "context_length": self.context_length,
            "metadata": metadata,
            "tensors": gguf.tensors().iter().map(tensor).collect::<Vec<_>>(),
        })
    }

    fn print(&self, gguf: &Gguf, out: &mut impl Write) -> Result {
        let unknown = || "not given".to_string();
        let name = self.name.as_deref().map(brief).unwrap_or_else(unknown);
        let architecture = self.architecture.as_deref().map(brief).unwrap_or_else(unknown);
        writeln!(out, "file            {}", printable(gguf.name()))?;
        writeln!(out, "name            {name}")?;
        writeln!(out, "architecture    {architecture}")?;
        writeln!(out, "parameters      {}", count(self.parameters))?;
        writeln!(out, "context length  {}", self.context_length.map_or_else(unknown, |n| n.to_string()))?;
        writeln!(out, "file size       {}", bytes(gguf.file_bytes()))?;
        writeln!(out, "read per token  at most {}", bytes(self.hot_bytes))?;
        if self.ple_bytes > 0 {
            writeln!(out, "read by the row {} of per-layer embeddings", bytes(self.ple_bytes))?;
        }
        writeln!(out, "metadata        {} keys", gguf.metadata().count())?;
        writeln!(out, "tensors         {}", gguf.tensors().len())?;
        let mut types: Vec<(String, u64, u64)> = Vec::new();
        for tensor in gguf.tensors() {
            let kind = type_name(gguf, tensor);
            match types.iter_mut().find(|(known, ..)| *known == kind) {
                Some((_, tensors, size)) => (*tensors, *size) = (*tensors + 1, size.saturating_add(tensor.bytes)),
                None => types.push((kind, 1, tensor.bytes)),
            }
        }
        types.sort_by_key(|(_, _, size)| std::cmp::Reverse(*size));
        for (kind, tensors, size) in types {
            writeln!(out, "  {kind:<8} {tensors:>5}  {:>10}", bytes(size))?;
        }
        Ok(())
    }
}

fn print_metadata(gguf: &Gguf, out: &mut impl Write) -> Result {
    writeln!(out)?;
    for (key, value) in gguf.metadata() {
        let text = match &value {
            Value::Str(bytes) => readable(bytes),
            Value::Array(array) if array.len() <= FIRST => {
                format!("[{}]", array.values().map(|value| element(&value)).collect::<Vec<_>>().join(", "))
            }
            Value::Array(array) => {
                let first: Vec<_> = array.values().take(FIRST).map(|value| element(&value)).collect();
                format!("[{}, ...] ({} entries)", first.join(", "), array.len())
            }
            scalar => scalar.to_string(),
        };
        writeln!(out, "{} = {}", brief(key), brief(&text))?;
    }
    Ok(())
}

fn print_tensors(gguf: &Gguf, out: &mut impl Write) -> Result {
    writeln!(out)?;
    for tensor in gguf.tensors() {
        let shape: Vec<String> = tensor.shape().iter().map(u64::to_string).collect();
        let (name, kind, size) = (printable(&tensor.name), type_name(gguf, tensor), bytes(tensor.bytes));
        writeln!(out, "{name:<36} {kind:<6} {:<16} {size:>10}", shape.join(" x "))?;
    }
    Ok(())
}

/// Unpacks every tensor, some blocks at a time, and looks at each value.
fn check_data(gguf: &Gguf) -> Result {
    for tensor in gguf.tensors() {
        if width(gguf, tensor).is_some() {
            continue; // any integer is one
        }
        let Some(format) = Format::from_ggml(tensor.type_id) else {
            let name = printable(&tensor.name);
            let note = format_args!("note: {name}: {} is not supported, not checked", type_name(gguf, tensor));
            terminal::eprintln_quietly(note);
            continue;
        };
        let cols = tensor.shape().first().map_or(1, |&cols| cols as usize);
        let (data, piece_bytes) = (gguf.bytes(tensor), PIECE * format.block_bytes());
        let mut values = vec![0.0; PIECE * format.block_elems()];
        for (piece, bytes) in data.chunks(piece_bytes).enumerate() {
            let values = &mut values[..bytes.len() / format.block_bytes() * format.block_elems()];
            format.unpack_row(bytes, values);
            if !all_finite(values) {
                let at = values.iter().position(|value| !value.is_finite()).unwrap_or(0);
                let row = (piece * PIECE * format.block_elems() + at) / cols;
                let error = format!("{}: tensor {}: row {row}: value is not finite", gguf.name(), tensor.name);
                return Err(Error::invalid(error).into());
            }
        }
    }
    Ok(())
}

/// The type's name; of integers with a scale a row, ours.
fn type_name(gguf: &Gguf, tensor: &Tensor) -> String {
    match (tensor.type_name(), width(gguf, tensor)) {
        ("?", _) => format!("type {}", tensor.type_id),
        (_, Some(bits)) => format!("W{bits}C"),
        (name, None) => name.to_string(),
    }
}

/// Numbers a tensor stands for. Scales of integers are not counted.
fn elements(gguf: &Gguf, tensor: &Tensor) -> u64 {
    let is_scale = tensor.name.ends_with(".row_scale") || tensor.name.ends_with(".group_scale");
    let per_element = width(gguf, tensor).map_or(1, |bits| 8 / bits as u64);
    if is_scale { 0 } else { tensor.elements().saturating_mul(per_element) }
}

/// A text as one line of bounded length.
fn brief(text: &str) -> String {
    match text.char_indices().nth(VALUE_WIDTH) {
        Some((cut, _)) => format!("{}...", printable(&text[..cut])),
        None => printable(text),
    }
}

/// An element of an array, for people.
fn element(value: &Value) -> String {
    match value {
        Value::Str(bytes) => brief(&readable(bytes)),
        scalar => scalar.to_string(),
    }
}

/// The text of a string that should be UTF-8; bytes that are not are shown as `\xHH`. What is too long is cut.
fn readable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes[..bytes.len().min(MAX_STRING)].utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
    }
    text
}

fn json_value(value: &Value) -> serde_json::Value {
    match value {
        Value::U8(n) => (*n).into(),
        Value::I8(n) => (*n).into(),
        Value::U16(n) => (*n).into(),
        Value::I16(n) => (*n).into(),
        Value::U32(n) => (*n).into(),
        Value::I32(n) => (*n).into(),
        Value::U64(n) => (*n).into(),
        Value::I64(n) => (*n).into(),
        // The shortest decimal that reads back as the same f32, not the f64 it widens to.
        Value::F32(x) => x.to_string().parse().map_or(serde_json::Value::Null, |x: f64| x.into()),
        Value::F64(x) => (*x).into(),
        Value::Bool(b) => (*b).into(),
        Value::Str(bytes) => readable(bytes).into(),
        Value::Array(array) if array.len() > LONG => {
            let first: Vec<_> = array.values().take(FIRST).map(|value| json_value(&value)).collect();
            json!({ "type": array.elem().name(), "len": array.len(), "first": first })
        }
        Value::Array(array) => array.values().map(|value| json_value(&value)).collect(),
    }
}

/// Escapes what JSON allows but a terminal should not get: DEL, C1 controls, line separators, bidirectional
/// overrides. All of them can only stand inside strings, and all are below U+10000.
fn harmless_json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out.push(c),
            c if printable(c.encode_utf8(&mut [0; 4])).chars().eq([c]) => out.push(c),
            c => out.push_str(&format!("\\u{:04x}", u32::from(c))),
        }
    }
    out
}

/// `3.35 GB`.
fn bytes(n: u64) -> String {
    match n {
        0..1_000 => format!("{n} B"),
        1_000..1_000_000 => format!("{:.2} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

/// `4.63 billion`.
fn count(n: u64) -> String {
    match n {
        0..1_000_000 => n.to_string(),
        1_000_000..1_000_000_000 => format!("{:.2} million", n as f64 / 1e6),
        _ => format!("{:.2} billion", n as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_that_are_not_utf8_are_readable() {
        assert_eq!(readable("ü".as_bytes()), "ü");
        assert_eq!(readable(b"a\xff\xc3b"), "a\\xff\\xc3b");
    }

    #[test]
    fn json_holds_no_control_characters_and_reads_back() {
        let value = json!({ "a": "\u{1b}[0m\u{9b}\u{7f}\u{202e}\u{2028}ü" });
        let text = harmless_json(&value.to_string());
        assert!(text.chars().all(|c| !c.is_control() && c != '\u{202e}'), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[test]
    fn floats_are_as_short_as_they_can_be() {
        assert_eq!(json_value(&Value::F32(1e-6)).to_string(), "1e-6");
        assert_eq!(json_value(&Value::F32(0.95)).to_string(), "0.95");
        assert_eq!(json_value(&Value::F32(f32::NAN)), serde_json::Value::Null);
    }

    #[test]
    fn sizes_in_words() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(3_349_516_256), "3.35 GB");
        assert_eq!(count(2_730_000), "2.73 million");
    }
}
