//! `gemrun` alone: what this is, what it runs on, which models fit, what to type next.
//!
//! The one idea: a person who has just installed it wants one command to type. It is the best model that is here and fits, or
//! the demo that needs no download, and the best one to get. Speeds are estimates, from how fast this memory is read; that
//! is measured once and remembered.

use std::ffi::OsStr;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Parser;
use gemrun::machine::cores::{Cores, Which};
use gemrun::machine::memory::Memory;
use gemrun::machine::speed::{Buffer, Measured};
use gemrun::machine::{self, Root};
use gemrun::registry::{self, Entry, Registry, Source};

use super::open::{self, Compute, gib};
use super::terminal::{self, Style, eprintln_quietly};
use super::{Cli, Result, pull, run};

/// How long memory is read, the first time.
const TIME: Duration = Duration::from_millis(150);
/// The share of memory's speed that generating reaches, about.
const REACHED: f64 = 0.7;
/// Tokens a second at which a person reads along.
const READABLE: f64 = 5.0;
/// Positions of the conversation that memory is judged for.
const CONTEXT: u64 = 8192;

/// A model of the table, as it stands here.
struct Known<'r> {
    name: &'r str,
    entry: &'r Entry,
    state: State,
    /// Bytes it takes in memory, and tokens a second; unknown for some.
    memory: Option<u64>,
    speed: Option<f64>,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    BuiltIn,
    Ready,
    Fits,
    TooLarge,
    Unknown,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::BuiltIn => "built in",
            State::Ready => "ready",
            State::Fits => "fits",
            State::TooLarge => "too large",
            State::Unknown => "",
        }
    }
}

/// Prints the first-run screen.
pub fn welcome() -> Result {
    let home = registry::home();
    let threads = Cores::read(&Root::system()).choose(&Which::Big)?.threads;
    let memory = Memory::read(&Root::system());
    let usable = memory.as_ref().map(Memory::usable);
    let bandwidth = bandwidth(threads, usable);
    let registry = open::registry(home.as_deref())?;
    let known: Vec<Known> = known(&registry, usable, bandwidth);

    let style = Style::stdout();
    let (bold, plain, dim) = (style.bold(), style.plain(), style.dim());
    let columns = terminal::columns().unwrap_or(100);
    let mut out = std::io::stdout().lock();
    writeln!(out, "{bold}gemrun {}{plain}  Gemma 4 on the CPU, from GGUF files", env!("CARGO_PKG_VERSION"))?;
    writeln!(out)?;
    let isa = gemrun_simd::Isa::best().name();
    let threads = format!("{threads} thread{}", if threads == 1 { "" } else { "s" });
    writeln!(
        out,
        "  cpu     {}",
        cut(&format!("{}, {threads}, {isa}", machine::cpu_name()), columns.saturating_sub(10))
    )?;
    if let Some(memory) = &memory {
        let speed = bandwidth.map(|speed| format!(", {:.0} GB/s", speed / 1e9)).unwrap_or_default();
        writeln!(out, "  memory  {}, {} available{speed}", gib(memory.total), gib(memory.usable()))?;
    }
    writeln!(out)?;
    // A narrow screen has no room for the size of the file.
    let file = |size: &str| if columns < 55 { String::new() } else { format!(" {size:>8}") };
    writeln!(out, "  {dim}{:<11}{} {:>8} {:>6}{plain}", "model", file("file"), "memory", "tok/s")?;
    for model in known.iter().filter(|model| model.state != State::Unknown) {
        let size = model.entry.bytes.map(|bytes| format!("{:.2} GB", bytes as f64 / 1e9)).unwrap_or_default();
        let memory = model.memory.map(gib).unwrap_or_default();
        let speed = model.speed.map(|speed| format!("~{speed:.0}")).unwrap_or_default();
        let row = format!("{:<11}{} {memory:>8} {speed:>6}  {:<9}  ", model.name, file(&size), model.state.name());
        let title = &model.entry.title;
        let shade = if model.state == State::TooLarge { dim } else { "" };
        let (row, title) = (cut(&row, columns.saturating_sub(2)), cut(title, columns.saturating_sub(2 + row.len())));
        writeln!(out, "  {shade}{row}{dim}{title}{plain}")?;
    }
    writeln!(out)?;
    let ready = best(&known, |state| state == State::Ready);
    writeln!(out, "Try it:   {bold}gemrun run {}{plain}", ready.map_or("demo", |model| model.name))?;
    let offered = best(&known, |state| state == State::Fits).filter(|_| ready.is_none());
    let asked = offered.filter(|_| std::io::stdin().is_terminal() && std::io::stdout().is_terminal());
    if let (Some(model), None) = (offered, asked) {
        let size = model.entry.bytes.map(|bytes| format!("  ({:.1} GB)", bytes as f64 / 1e9)).unwrap_or_default();
        writeln!(out, "Get one:  {bold}gemrun pull {}{plain}{size}", model.name)?;
    }
    writeln!(out)?;
    writeln!(out, "A path works as well: gemrun run ./model.gguf")?;
    writeln!(out, "All commands: gemrun --help")?;
    out.flush()?;
    drop(out);
    asked.map_or(Ok(()), |model| get(model.name))
}

/// Offers to download a model; if that was welcome, chats with it.
fn get(name: &str) -> Result {
    eprintln_quietly(format_args!(""));
    let interrupt = run::interrupt_flag()?;
    pull::offer(name, &Compute::default(), &interrupt)?;
    if !matches!(open::source(OsStr::new(name)), Ok(Source::File(path)) if path.is_file()) {
        return Ok(());
    }
    super::run(Cli::try_parse_from(["gemrun", "run", name])?.command)
}

/// Bytes a second that memory gives, as remembered or measured now.
fn bandwidth(threads: usize, usable: Option<u64>) -> Option<f64> {
    let home = registry::home();
    let before = home.as_deref().and_then(Measured::load).and_then(|measured| measured.read(threads));
    before.or_else(|| {
        let speed = Buffer::new(&Root::system(), usable).read_bandwidth(threads, TIME).ok()?;
        if let Some(home) = &home {
            Measured::save(home, &[(threads, speed)]);
        }
        Some(speed)
    })
}

/// All models of the table, with what is known of them here.
fn known(registry: &Registry, usable: Option<u64>, bandwidth: Option<f64>) -> Vec<Known<'_>> {
    let home = registry::home();
    let one = |(name, entry)| {
        let entry: &Entry = entry;
        let memory = entry.resident_bytes(CONTEXT);
        let fits = usable.zip(memory).map(|(usable, memory)| memory <= usable);
        let state = match (registry.find(name, home.as_deref()), fits) {
            (Ok(Source::Embedded(_)), _) => State::BuiltIn,
            (Ok(Source::File(_)), _) => State::Ready,
            (Err(_), Some(true)) => State::Fits,
            (Err(_), Some(false)) => State::TooLarge,
            (Err(_), None) => State::Unknown,
        };
        let token = entry.token_bytes().filter(|_| fits != Some(false));
        let speed = bandwidth.zip(token).map(|(bandwidth, bytes)| REACHED * bandwidth / bytes as f64);
        Known { name, entry, state, memory, speed }
    };
    let mut known: Vec<Known> = registry.models().map(one).collect();
    known.sort_by_key(|model| model.entry.bytes);
    known
}

/// The largest model of a state that a person can read along with; if there is none, the fastest.
fn best<'k>(known: &'k [Known<'k>], wanted: fn(State) -> bool) -> Option<&'k Known<'k>> {
    let speed = |model: &Known| model.speed.unwrap_or(0.0);
    let those = known.iter().filter(|model| wanted(model.state));
    let readable = those.clone().filter(|model| speed(model) >= READABLE);
    readable.max_by_key(|model| model.memory).or_else(|| those.max_by(|a, b| speed(a).total_cmp(&speed(b))))
}

/// The beginning of `text` that fits into so many columns.
fn cut(text: &str, columns: usize) -> String {
    text.chars().take(columns).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_to_get_fits_and_is_fast_enough() {
        let registry = Registry::builtin().unwrap();
        let advice = |gib: u64, gb_s: f64| {
            let mut known = known(&registry, Some(gib << 30), Some(gb_s * 1e9));
            // Whatever the store of this machine holds.
            for model in known.iter_mut().filter(|model| model.state == State::Ready) {
                model.state = State::Fits;
            }
            best(&known, |state| state == State::Fits).map(|model| model.name.to_string())
        };
        assert_eq!(advice(15, 40.0).as_deref(), Some("26b-a4b"), "few of many experts are read for a token");
        assert_eq!(advice(11, 40.0).as_deref(), Some("e4b"));
        assert_eq!(advice(11, 20.0).as_deref(), Some("e2b"));
        assert_eq!(advice(3, 12.0).as_deref(), Some("e2b"));
        assert_eq!(advice(1, 3.0).as_deref(), Some("e2b-mobile"));
        let too_small = known(&registry, Some(100 << 20), Some(1e9));
        assert!(
            too_small.iter().any(|model| model.name == "e2b" && model.state != State::Fits && model.speed.is_none())
        );
    }

    #[test]
    fn rows_are_cut_to_the_terminal() {
        assert_eq!((cut("abc  def", 5).as_str(), cut("äöü", 2).as_str(), cut("x", 0).as_str()), ("abc  ", "äö", ""));
    }
}
