//! From a MODEL argument to a loaded model, and the options every command that computes has in common.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::registry::{self, Registry, Source};
use gemrun::session;
use gemrun::team::MAX_THREADS;
use gemrun::template::Template;
use gemrun::tokenizer::Tokenizer;
use gemrun::weight::{Act, Numerics};
use gemrun::{Error, Result};

use gemrun::machine;

/// `--threads`, which never changes a result.
#[derive(Args, Clone)]
pub struct Threads {
    /// Threads to compute with [default: all this process may use]
    #[arg(short, long, value_name = "N", env = "GEMRUN_THREADS", hide_env_values = true)]
    threads: Option<usize>,
}

impl Threads {
    /// The number of threads.
    pub fn count(&self) -> Result<usize> {
        check_threads(self.threads.unwrap_or_else(default_threads))
    }
}

/// `--kernel`, which never changes a result.
#[derive(Args, Clone)]
pub struct KernelName {
    /// Kernel (q4_0/avx2) or instruction set (avx2, scalar) to use [default: the best]
    #[arg(long, value_name = "NAME", env = "GEMRUN_KERNEL", hide_env_values = true)]
    kernel: Option<String>,
}

impl KernelName {
    /// What was asked for, if anything was.
    pub fn asked(&self) -> Option<String> {
        self.kernel.as_ref().filter(|name| !name.is_empty()).map(|name| gemrun::error::printable(name))
    }

    /// The kernels to run.
    pub fn choice(&self) -> Result<gemrun_simd::Choice> {
        match self.kernel.as_deref() {
            None | Some("") => Ok(gemrun_simd::Choice::default()),
            Some(name) => gemrun_simd::find(name).map_err(|e| Error::unsupported(format!("kernel: {e}"))),
        }
    }
}

/// How to compute. Only `--kv` and `--act` can change a result; the others change its speed.
#[derive(Args, Clone)]
pub struct Compute {
    #[command(flatten)]
    kernel: KernelName,
    /// How the cache stores keys and values; f16 rounds them and halves its size [default: f16; for eval f32]
    #[arg(long, value_name = "TYPE")]
    kv: Option<KvArg>,
    /// What activations become before a matrix product: auto is what the file was made for, float the slow reference
    #[arg(long, value_name = "MODE", default_value = "auto")]
    act: ActArg,
    /// Tokens of a prompt computed at once
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch: usize,
}

/// `--kv`.
#[derive(Clone, Copy, ValueEnum)]
enum KvArg {
    F32,
    F16,
    #[value(hide = true)]
    Int8,
    #[value(hide = true)]
    Mixed,
}

/// `--act`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ActArg {
    Auto,
    Static,
    Int8,
    Float,
}

impl ActArg {
    fn act(self) -> Act {
        match self {
            ActArg::Auto => Act::Auto,
            ActArg::Static => Act::Static,
            ActArg::Int8 => Act::Int8,
            ActArg::Float => Act::Float,
        }
    }

    fn name(self) -> &'static str {
        match self {
            ActArg::Auto => "auto",
            ActArg::Static => "static",
            ActArg::Int8 => "int8",
            ActArg::Float => "float",
        }
    }
}

impl Compute {
    /// The same with another `--act`.
    pub fn with_act(&self, act: ActArg) -> Compute {
        Compute { act, ..self.clone() }
    }

    /// The prompt chunk length.
    pub fn batch(&self) -> Result<usize> {
        match self.batch {
            1..=4096 => Ok(self.batch),
            other => Err(Error::usage(format!("batch: {other}: expected 1 to 4096"))),
        }
    }

    /// The cache's element type; `usual` where none is asked for.
    pub fn kv(&self, usual: KvType) -> Result<KvType> {
        let word = match self.kv {
            None => return Ok(usual),
            Some(KvArg::F32) => return Ok(KvType::F32),
            Some(KvArg::F16) => return Ok(KvType::F16),
            Some(KvArg::Int8) => "int8",
            Some(KvArg::Mixed) => "mixed",
        };
        Err(Error::unsupported(format!("kv: {word} is not supported: expected f32 or f16")))
    }

    /// The name of the activation mode.
    pub fn act(&self) -> &'static str {
        self.act.name()
    }

    /// Kernel choice and activation mode.
    pub fn numerics(&self) -> Result<Numerics> {
        Ok(Numerics { act: self.act.act(), kernel: self.kernel.choice()? })
    }
}

/// The threads used where nothing else is asked for: all this process may use.
pub fn default_threads() -> usize {
    machine::threads().min(MAX_THREADS)
}

/// Refuses thread counts no computer has.
pub fn check_threads(threads: usize) -> Result<usize> {
    match (1..=MAX_THREADS).contains(&threads) {
        true => Ok(threads),
        false => Err(Error::usage(format!("threads: {threads}: expected 1 to {MAX_THREADS}"))),
    }
}

/// Opens what `model` stands for.
pub fn gguf(model: &OsStr) -> Result<Gguf> {
    // A name that is not UTF-8 can only be a path.
    let source = match model.to_str() {
        Some(name) => Registry::builtin()?.find(name, registry::home().as_deref())?,
        None => Source::File(PathBuf::from(model)),
    };
    match source {
        Source::File(path) => Gguf::open(&path),
        Source::Embedded(name) => Gguf::from_static(&name, registry::DEMO),
    }
}

/// The tokenizer of a file.
pub fn tokenizer(gguf: &Gguf) -> Result<Tokenizer> {
    Tokenizer::from_gguf(gguf)
}

/// A model ready to run.
pub struct Loaded {
    pub gguf: Gguf,
    pub model: Model,
    pub tokenizer: Tokenizer,
    pub times: Times,
}

/// How long the start took.
#[derive(Clone, Copy)]
pub struct Times {
    /// Opening and mapping the file, reading its header.
    pub map: Duration,
    /// Building the tokenizer and looking up the tensors, at the same time.
    pub load: Duration,
}

/// Opens and loads `model`.
pub fn load(model: &OsStr, numerics: &Numerics) -> Result<Loaded> {
    let start = Instant::now();
    let gguf = gguf(model)?;
    let map = start.elapsed();
    let (model, tokenizer) = parts(&gguf, numerics)?;
    Ok(Loaded { gguf, model, tokenizer, times: Times { map, load: start.elapsed() - map } })
}

/// Why `run` would refuse this file, if it would.
pub fn check(gguf: &Gguf) -> Result<()> {
    parts(gguf, &Numerics::default())?;
    session::recommended(gguf)?;
    Template::from_gguf(gguf).map(drop)
}

/// Model and tokenizer of a file. The tokenizer is built on another thread while the tensors are looked up.
fn parts(gguf: &Gguf, numerics: &Numerics) -> Result<(Model, Tokenizer)> {
    let (model, tokenizer) = std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| tokenizer(gguf));
        let model = Model::load(gguf, numerics);
        (model, tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    // Of two errors the one about the model says more.
    Ok((model?, tokenizer?))
}
