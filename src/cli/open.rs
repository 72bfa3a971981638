//! From a MODEL argument to a loaded model, and the options every command that computes has in common.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use gemrun::calibrate;
use gemrun::config::Config;
use gemrun::fit::{self, Fit, Need};
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::pack::{self, Found, Packed};
use gemrun::registry::{self, Entry, Registry, Source};
use gemrun::session;
use gemrun::team::MAX_THREADS;
use gemrun::template::Template;
use gemrun::tokenizer::Tokenizer;
use gemrun::weight::{Act, Numerics};
use gemrun::{Error, Kind, Result};

use gemrun::machine::cores::{Cores, Which, confine};
use gemrun::machine::{self, Root};
use gemrun_simd::Layout;

use super::page_in;
use super::terminal::eprintln_quietly;
use super::text;

/// `--threads` and `--cores`, which never change a result.
#[derive(Args, Clone)]
pub struct Threads {
    /// Threads to compute with [default: as many as there are fast cores]
    #[arg(short, long, value_name = "N", env = "GEMRUN_THREADS", hide_env_values = true)]
    threads: Option<usize>,
    #[command(flatten)]
    cores: CoresArg,
}

impl Threads {
    /// The number of threads. This process is confined to the cores it is to use.
    pub fn take(&self) -> Result<usize> {
        self.cores.take(self.threads.as_slice()).map(|threads| threads[0])
    }
}

/// `--cores`.
#[derive(Args, Clone)]
pub struct CoresArg {
    /// Cores to compute on: big (the fastest), all, or processors such as 0-3,6 [default: big, if that many threads have
    /// room there, else all]
    #[arg(long, value_name = "WHICH")]
    cores: Option<Which>,
}

impl CoresArg {
    /// The `asked` numbers of threads, or one that suits the cores. This process is confined to the cores it is to use.
    pub fn take(&self, asked: &[usize]) -> Result<Vec<usize>> {
        asked.iter().try_for_each(|threads| check_threads(*threads).map(drop))?;
        let cores = Cores::read(&Root::system());
        let mut chosen = cores.choose(self.cores.as_ref().unwrap_or(&Which::Big))?;
        if self.cores.is_none() && asked.iter().any(|threads| *threads > chosen.threads) {
            chosen = cores.choose(&Which::All)?;
        }
        confine(&chosen.cpus);
        Ok(if asked.is_empty() { vec![chosen.threads.min(MAX_THREADS)] } else { asked.to_vec() })
    }
}

/// `--kernel`, which never changes a result.
#[derive(Args, Clone, Default)]
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
#[derive(Args, Clone, Default)]
pub struct Compute {
    #[command(flatten)]
    kernel: KernelName,
    /// How the cache stores keys and values [default: mixed if the file has scales for it, else f16; for eval f32]
    #[arg(long, value_name = "TYPE")]
    kv: Option<KvArg>,
    /// What activations become before a matrix product: auto is what the file was made for, float the slow reference
    #[arg(long, value_name = "MODE", default_value = "auto")]
    act: ActArg,
    /// Round inputs of matrices by the scales in FILE, which gemrun calibrate wrote
    #[arg(long = "static", value_name = "FILE")]
    scales: Option<PathBuf>,
    /// Tokens of a prompt computed at once [default: 64; with experts 512]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Read the file alone, not its packed copy; slower, same results
    #[arg(long)]
    no_packed: bool,
    /// Plan with at most so much memory, such as 3G or 800M [default: what is available]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    mem_limit: Option<u64>,
    /// Run a model that does not fit in memory: each token then waits for the disk
    #[arg(long)]
    allow_paging: bool,
}

/// Bytes, in binary units: `3G`, `1.5GiB`, `800M`.
pub fn size(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().trim_end_matches('b').trim_end_matches('i') {
        "" => Some(1.0),
        "k" => Some(1024.0),
        "m" => Some(1024.0 * 1024.0),
        "g" => Some(1024.0 * 1024.0 * 1024.0),
        _ => None,
    };
    let number: Option<f64> = digits.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    match (number, unit) {
        (Some(number), Some(unit)) => Ok((number * unit) as u64),
        _ => Err("expected a size such as 3G or 800M".into()),
    }
}

/// `--kv`.
#[derive(Clone, Copy, ValueEnum)]
pub enum KvArg {
    F32,
    F16,
    Int8,
    Mixed,
}

/// `--act`.
#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ActArg {
    #[default]
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
    /// The same with another `--act`, another `--kv` if there is one, and without `--static`.
    pub fn with(&self, act: ActArg, kv: Option<KvArg>) -> Compute {
        Compute { act, kv: kv.or(self.kv), scales: None, ..self.clone() }
    }

    /// The prompt chunk length, if one was asked for.
    pub fn batch(&self) -> Result<Option<usize>> {
        match self.batch {
            None | Some(1..=4096) => Ok(self.batch),
            Some(other) => Err(Error::usage(format!("batch: {other}: expected 1 to 4096"))),
        }
    }

    /// How the cache is to store keys and values, if that was asked for.
    pub fn kv(&self) -> Option<KvType> {
        self.kv.map(|kv| match kv {
            KvArg::F32 => KvType::F32,
            KvArg::F16 => KvType::F16,
            KvArg::Int8 => KvType::Int8,
            KvArg::Mixed => KvType::Mixed,
        })
    }

    /// The same; where nothing was asked for, as the model was trained, else f16.
    pub fn kv_or_usual(&self, config: &Config) -> KvType {
        self.kv().unwrap_or(if config.srq.is_some() { KvType::Mixed } else { KvType::F16 })
    }

    /// These options as arguments of a command line.
    pub fn arguments(&self) -> Vec<String> {
        let kv = self.kv.and_then(|kv| Some(kv.to_possible_value()?.get_name().to_string()));
        let options = [
            ("--kernel", self.kernel.kernel.clone().filter(|name| !name.is_empty())),
            ("--kv", kv),
            ("--act", Some(self.act().to_string())),
            ("--static", self.scales.as_ref().map(|path| path.display().to_string())),
            ("--batch", self.batch.map(|batch| batch.to_string())),
            ("--mem-limit", self.mem_limit.map(|bytes| bytes.to_string())),
        ];
        let options = options.into_iter().filter_map(|(name, value)| Some([name.to_string(), value?])).flatten();
        let flags = [("--no-packed", self.no_packed), ("--allow-paging", self.allow_paging)];
        options.chain(flags.into_iter().filter(|(_, set)| *set).map(|(name, _)| name.to_string())).collect()
    }

    /// The name of the activation mode.
    pub fn act(&self) -> &'static str {
        self.act.name()
    }

    /// Bytes of memory to plan with, where that is known.
    fn usable_memory(&self) -> Option<u64> {
        let available = machine::usable_memory();
        self.mem_limit.map_or(available, |limit| Some(available.map_or(limit, |available| available.min(limit))))
    }

    /// The context to hold where none is asked for.
    pub fn context(&self, loaded: &Loaded, kv: KvType, batch: usize) -> usize {
        fit::context(&loaded.model, kv, batch, self.usable_memory())
    }

    /// Refuses what does not fit in memory with a cache for `context` tokens, unless that is asked for. What fits in part is
    /// said to.
    pub fn check_fit(&self, loaded: &Loaded, kv: KvType, context: usize, batch: usize) -> Result<()> {
        let Some(usable) = self.usable_memory() else { return Ok(()) };
        let (model, name) = (&loaded.model, loaded.gguf.name());
        let need = Need::of(model, kv, context, batch);
        match need.fit(usable) {
            Fit::Fits => Ok(()),
            Fit::Pages => {
                let name = gemrun::error::printable(name);
                eprintln_quietly(format_args!(
                    "note: {name}: {} of weights, {} of memory: a token reads {} of them, some from the disk: expect it to be slow",
                    gib(need.weights),
                    gib(usable),
                    gib(need.hot),
                ));
                Ok(())
            }
            Fit::Refused if self.allow_paging => Ok(()),
            Fit::Refused => {
                let least = fit::context(model, kv, batch, Some(0)).min(context);
                let shorter = Need::of(model, kv, least, batch).fit(usable) != Fit::Refused;
                let way_out = match shorter {
                    true => format!("try -c {least}"),
                    false => smaller(usable, need.resident())?,
                };
                Err(Error::new(
                    Kind::Memory,
                    format!(
                        "{name}: needs {} in memory ({} of weights, {} for {context} tokens, {} of buffers): {} are available: \
                         {way_out}, or --allow-paging, where each token waits for the disk",
                        gib(need.resident()),
                        gib(need.hot),
                        gib(need.cache),
                        gib(need.other),
                        gib(usable),
                    ),
                ))
            }
        }
    }

    /// Refuses a model of the table that is not here yet and would not fit, before gigabytes of it are fetched.
    pub fn check_entry(&self, name: &str, entry: &Entry) -> Result<()> {
        match self.usable_memory() {
            Some(usable) if !self.allow_paging => too_large(name, entry, usable)?.map_or(Ok(()), |why| {
                Err(Error::new(Kind::Memory, format!("{why}, or --allow-paging, where each token waits for the disk")))
            }),
            _ => Ok(()),
        }
    }

    /// Kernel choice and activation mode; static scales depend on the model and are not there yet.
    pub fn numerics(&self) -> Result<Numerics> {
        Ok(Numerics { act: self.act.act(), kernel: self.kernel.choice()?, ..Numerics::default() })
    }
}

/// Refuses thread counts no computer has.
pub fn check_threads(threads: usize) -> Result<usize> {
    match (1..=MAX_THREADS).contains(&threads) {
        true => Ok(threads),
        false => Err(Error::usage(format!("threads: {threads}: expected 1 to {MAX_THREADS}"))),
    }
}

/// `1.5 GiB`, `300 MiB`.
pub fn gib(bytes: u64) -> String {
    match bytes as f64 / f64::from(1 << 30) {
        gib if gib < 0.95 => format!("{:.0} MiB", gib * 1024.0),
        gib => format!("{gib:.1} GiB"),
    }
}

/// What to try instead of a model that takes `needed` bytes, with `usable` bytes of memory: the largest known one that fits.
fn smaller(usable: u64, needed: u64) -> Result<String> {
    let registry = Registry::load(registry::home().as_deref())?;
    let fitting = registry.models().filter_map(|(name, entry)| Some((entry.resident_bytes(SHORT)?, name)));
    let best = fitting.filter(|(bytes, _)| *bytes < needed && *bytes <= usable).max();
    Ok(best.map_or("close other programs".to_string(), |(_, name)| format!("try gemrun run {name}")))
}

/// That a model of the table does not fit in `usable` bytes of memory, and what does; `None` if it does or nobody knows.
pub fn too_large(name: &str, entry: &Entry, usable: u64) -> Result<Option<String>> {
    // Of experts, those that a token is sent to must fit.
    let beside = entry.resident_bytes(SHORT).zip(entry.hot_bytes).map(|(all, hot)| all - hot);
    match beside.zip(entry.token_bytes()).map(|(beside, token)| beside + token).filter(|needed| *needed > usable) {
        None => Ok(None),
        Some(needed) => {
            let way_out = smaller(usable, needed)?;
            Ok(Some(format!("{name}: needs {} in memory: {} are available: {way_out}", gib(needed), gib(usable))))
        }
    }
}

/// A context with which a model is still of use.
const SHORT: u64 = 2048;

/// What `model` stands for.
pub fn source(model: &OsStr) -> Result<Source> {
    // A name that is not UTF-8 can only be a path.
    match model.to_str() {
        Some(name) => {
            let home = registry::home();
            registry(home.as_deref())?.find(name, home.as_deref())
        }
        None => Ok(Source::File(PathBuf::from(model))),
    }
}

/// The known models. What the user's own table has that nobody knows is said, once.
pub fn registry(home: Option<&Path>) -> Result<Registry> {
    let registry = Registry::load(home)?;
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        registry.warnings.iter().for_each(|warning| eprintln_quietly(format_args!("note: {warning}")));
    });
    Ok(registry)
}

/// Opens what `model` stands for.
pub fn gguf(model: &OsStr) -> Result<Gguf> {
    match source(model)? {
        Source::File(path) => Gguf::open(&path),
        Source::Embedded(name) => Gguf::from_static(&name, registry::embedded(&name)?),
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

impl Compute {
    /// Opens and loads `model`, with its packed copy if there is one.
    pub fn load(&self, model: &OsStr) -> Result<Loaded> {
        let mut numerics = self.numerics()?;
        let start = Instant::now();
        let gguf = gguf(model)?;
        if let Some(scales) = &self.scales {
            numerics.input_scales = Arc::new(calibrate::read(scales, &gguf)?);
        }
        let packed = self.packed(&gguf, model);
        if let Some(only) = numerics.kernel.only.filter(|only| only.layout() == Layout::Interleaved)
            && packed.is_none()
        {
            let error = format!("kernel: {}: reads packed copies, and none of {} is in use", only.name(), gguf.name());
            return Err(Error::unsupported(error));
        }
        let map = start.elapsed();
        let (model, tokenizer) = parts(&gguf, packed.as_ref(), &numerics)?;
        Ok(Loaded { gguf, model, tokenizer, times: Times { map, load: start.elapsed() - map } })
    }

    /// What the numbers of a model depend on, in words: its file and the flags that change results, without `--kv`.
    pub fn identity(&self, loaded: &Loaded) -> Result<String> {
        let scales = match &self.scales {
            Some(path) => text::from_file(path)?,
            None => String::new(),
        };
        Ok(format!("{} {} {scales}", pack::key(&loaded.gguf), self.act()))
    }

    /// The packed copy to use. One that cannot be used is said to be so: the file itself will do.
    fn packed(&self, gguf: &Gguf, model: &OsStr) -> Option<Packed> {
        let store = registry::home().filter(|_| !self.no_packed && self.act != ActArg::Float)?;
        match pack::find(&store, gguf) {
            Found::Copy(packed) => Some(packed),
            Found::Nothing => None,
            Found::Unusable(why) => {
                let model = gemrun::error::printable(&model.to_string_lossy());
                eprintln_quietly(format_args!("note: packed copy not used: {why}: renew it with gemrun pack {model}"));
                None
            }
        }
    }
}

/// Why `run` would refuse this file, if it would.
pub fn check(gguf: &Gguf) -> Result<()> {
    parts(gguf, None, &Numerics::default())?;
    session::recommended(gguf)?;
    Template::from_gguf(gguf).map(drop)
}

/// Model and tokenizer of a file. The tokenizer is built on another thread while the tensors are looked up and the first of them are
/// read from a slow disk.
fn parts(gguf: &Gguf, packed: Option<&Packed>, numerics: &Numerics) -> Result<(Model, Tokenizer)> {
    let (model, tokenizer) = std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| tokenizer(gguf));
        let model = Model::load_packed(gguf, packed, numerics);
        if let Ok(model) = &model {
            page_in::begin(model);
        }
        (model, tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    // Of two errors the one about the model says more.
    Ok((model?, tokenizer?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let right =
            [("0", 0), ("1234", 1234), ("3k", 3 << 10), ("500MB", 500 << 20), ("1.5GiB", 3 << 29), ("2G", 2 << 30)];
        right.iter().for_each(|(text, bytes)| assert_eq!(size(text), Ok(*bytes), "{text}"));
        for wrong in ["", "G", "-1", "1T", "500 MB", "1e400", "NaN", "infG"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert_eq!(size("99999999999G"), Ok(u64::MAX), "more than there is of anything");
        assert_eq!([gib(300 << 20), gib(3 << 29)], ["300 MiB", "1.5 GiB"]);
    }
}
