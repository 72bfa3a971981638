//! `gemrun` alone: what this is, what it runs on, what to type next.

use std::io::Write;

use gemrun::machine::cores::{Cores, Which};
use gemrun::machine::memory::Memory;
use gemrun::machine::{self, Root};
use gemrun::registry::{self, Source};

use super::terminal::Style;
use super::{Result, open};

/// Prints the first-run screen.
pub fn welcome() -> Result {
    let style = Style::stdout();
    let (bold, plain, dim) = (style.bold(), style.plain(), style.dim());
    let mut out = std::io::stdout().lock();
    writeln!(out, "{bold}gemrun {}{plain}  Gemma 4 on the CPU, from GGUF files", env!("CARGO_PKG_VERSION"))?;
    writeln!(out)?;
    let threads = Cores::read(&Root::system()).choose(&Which::Big)?.threads;
    let isa = gemrun_simd::Isa::best().name();
    writeln!(out, "  cpu     {}, {threads} thread{}, {isa}", machine::cpu_name(), if threads == 1 { "" } else { "s" })?;
    if let Some(memory) = Memory::read(&Root::system()) {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        writeln!(out, "  memory  {:.1} GiB, {:.1} GiB available", gib(memory.total), gib(memory.usable()))?;
    }
    writeln!(out)?;
    writeln!(out, "Try it:  {bold}gemrun run demo{plain}")?;
    writeln!(out)?;

    let home = registry::home();
    writeln!(out, "Models known by name:")?;
    let known = open::registry(home.as_deref())?;
    for (name, entry) in known.models() {
        let size = entry.bytes.map(|bytes| format!("{:>5.2} GB", bytes as f64 / 1e9)).unwrap_or_default();
        let state = match known.find(name, home.as_deref()) {
            Ok(Source::Embedded(_)) => "built in",
            Ok(Source::File(_)) => "ready",
            Err(_) => "not downloaded",
        };
        writeln!(out, "  {name:<11} {size:>8}  {dim}{state:<14}{plain}  {}", entry.title)?;
    }
    writeln!(out)?;
    writeln!(out, "A path works as well: gemrun run ./model.gguf. All commands: gemrun --help")?;
    Ok(out.flush()?)
}
