//! `gemrun convert`: a folder of safetensors becomes a GGUF file.
//!
//! What becomes of what, `gemrun::convert` tells. Here: a progress bar, Ctrl-C, words, and a look at the finished file's name:
//! one that answers worse in other programs should say so wherever it is seen. Standard output is the path of the file.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use gemrun::convert::{self, Options, Target};
use gemrun::error::printable;
use gemrun_simd::Format;

use super::Result;
use super::progress::Shown;
use super::run::interrupt_flag;
use super::terminal::eprintln_quietly;

/// Convert a folder of safetensors to a GGUF file
#[derive(Args)]
#[command(
    after_help = "The folder holds config.json, model.safetensors (or its parts and their index), tokenizer.json and a chat \
    template, as published or as a fine-tune was saved. Towers for images and sound are left out.\n\n\
    Mobile checkpoints (gemma-4-E2B-it-qat-mobile-transformers and the like) have 2-, 4- and 8-bit weights and static \
    scales for int8 activations. --format native keeps their bytes as they are, in a file for gemrun alone. --format stock \
    writes block types that other programs read too; gemrun computes the same from either, others leave the static \
    scales out and answer much worse. Other checkpoints are quantized to --type.\n\n\
    Examples:\n  \
    gemrun convert ./gemma-4-E2B-it-qat-mobile-transformers -o e2b-mobile.gguf\n  \
    gemrun convert ./gemma-4-E2B-it-qat-mobile-transformers -o e2b-mobile-no-srq.gguf --format stock\n  \
    gemrun convert ./my-fine-tune -o my-fine-tune.gguf --type q8_0"
)]
pub struct Convert {
    /// Folder of the checkpoint
    source: PathBuf,
    /// GGUF file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Of a mobile checkpoint: what the file is made for [default: native]
    #[arg(long)]
    format: Option<FormatArg>,
    /// Of any other checkpoint: type of the matrices [default: q4_0]
    #[arg(long = "type", value_name = "TYPE")]
    plain: Option<TypeArg>,
    /// Replace FILE if it is there
    #[arg(long)]
    force: bool,
}

/// `--format`.
#[derive(Clone, Copy, ValueEnum)]
enum FormatArg {
    Native,
    Stock,
}

/// `--type`.
#[derive(Clone, Copy, ValueEnum)]
enum TypeArg {
    F16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
}

impl Convert {
    pub fn run(self) -> Result {
        let target = self.format.map(|format| match format {
            FormatArg::Native => Target::Native,
            FormatArg::Stock => Target::Stock,
        });
        let format = self.plain.map(|plain| match plain {
            TypeArg::F16 => Format::F16,
            TypeArg::Q8_0 => Format::Q8_0,
            TypeArg::Q4_0 => Format::Q4_0,
        });
        let options = Options { target, format, overwrite: self.force };
        let interrupt = interrupt_flag()?;
        let mut shown = Shown::new("converting", &interrupt);
        let report = convert::convert(&self.source, &self.output, &options, &mut |done, total| shown.at(done, total));
        let seconds = shown.end().as_secs_f64();
        let report = report?;
        for note in &report.notes {
            eprintln_quietly(format_args!("note: {}", printable(note)));
        }
        if report.target == Some(Target::Stock) && !tells(&self.output) {
            let name = printable(&self.output.display().to_string());
            let better = printable(&suggested(&self.output).to_string_lossy());
            eprintln_quietly(format_args!(
                "warning: {name}: other programs run this file without its static scales and answer much worse, and nothing in \
                 its name says so: a name like {better} would"
            ));
        }
        let kind = match report.target {
            Some(Target::Native) => "native, for gemrun alone",
            Some(Target::Stock) => "stock types",
            None => "plain weights",
        };
        let gigabytes = report.bytes as f64 / 1e9;
        eprintln_quietly(format_args!("converted: {gigabytes:.2} GB in {seconds:.1} s, {kind}"));
        Ok(writeln!(std::io::stdout(), "{}", self.output.display())?)
    }
}

/// What a stock file's name may have in it to say what it is: no static-range quantization elsewhere.
const TELLING: [&str; 4] = ["no-srq", "nosrq", "no_srq", "degraded"];

/// Whether a file's name says that it is not what it seems.
fn tells(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    TELLING.iter().any(|word| name.contains(word))
}

/// A name that says so.
fn suggested(path: &Path) -> OsString {
    let mut name = path.file_stem().unwrap_or_default().to_os_string();
    name.push("-no-srq");
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_or_are_improved() {
        for name in ["x/e2b-no-srq.gguf", "e2b-NoSRQ.gguf", "degraded.gguf"] {
            assert!(tells(Path::new(name)), "{name}");
        }
        assert!(!tells(Path::new("no-srq/e2b.gguf")));
        for name in ["a/e2b.gguf", "e2b", ".gguf"] {
            assert!(tells(Path::new(&suggested(Path::new(name)))), "{name}");
        }
        assert_eq!(suggested(Path::new("a/e2b.gguf")), "e2b-no-srq.gguf");
    }
}
