//! `gemrun pack`: the copy of a model that is read faster, made, checked or dropped.
//!
//! What a copy is, `gemrun::pack` tells. Here: a progress bar, Ctrl-C, and words. Standard output is the path of the copy.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use gemrun::gguf::Gguf;
use gemrun::model::Model;
use gemrun::pack::{self, Found, Packed};
use gemrun::registry::{self, Source};
use gemrun::weight::Numerics;
use gemrun::{Error, Kind};
use indicatif::{ProgressBar, ProgressStyle};

use super::run::interrupt_flag;
use super::terminal::eprintln_quietly;
use super::{Result, open};

/// Write a copy of a model's matrices in an order that is read faster
#[derive(Args)]
#[command(after_help = "Text is generated faster from the copy, with the same results bit for bit. It takes the room \
    of the model without its embedding tables, below packed/ in GEMRUN_HOME. run, bench and eval use it from then on; \
    without it they read the model's file. A copy whose model has changed is not used. Packing again replaces it, and \
    does nothing if the copy is whole.\n\n\
    Examples:\n  \
    gemrun pack e2b\n  \
    gemrun pack ./gemma-4-E2B_q4_0-it.gguf --drop")]
pub struct Pack {
    /// Model name or path of a GGUF file
    model: OsString,
    /// Remove the copy
    #[arg(long)]
    drop: bool,
    /// Read model and copy from end to end and compare their checksums; write nothing
    #[arg(long, conflicts_with = "drop")]
    check: bool,
}

impl Pack {
    pub fn run(self) -> Result {
        let model = gemrun::error::printable(&self.model.to_string_lossy());
        let Source::File(path) = open::source(&self.model)? else {
            return Err(Error::unsupported(format!("{model}: part of the program: expected a file to pack")).into());
        };
        let Some(store) = registry::home() else {
            let error = format!("{model}: no home directory to keep a packed copy in: set GEMRUN_HOME");
            return Err(Error::new(Kind::NotFound, error).into());
        };
        let none = || Error::new(Kind::NotFound, format!("{model}: no packed copy in {}", store.display()));
        if self.drop {
            let removed = pack::remove(&store, &path)?;
            if removed.is_empty() {
                return Err(none().into());
            }
            for path in removed {
                let path = gemrun::error::printable(&path.display().to_string());
                eprintln_quietly(format_args!("removed {path}"));
            }
            return Ok(());
        }

        let interrupt = interrupt_flag()?;
        let source = Gguf::open(&path)?;
        let found = pack::find(&store, &source);
        if self.check {
            return match found {
                Found::Copy(copy) => {
                    check(&copy, &source, &interrupt)?;
                    eprintln_quietly(format_args!("{}: as it was packed", gemrun::error::printable(copy.name())));
                    Ok(())
                }
                Found::Unusable(why) => Err(why.into()),
                Found::Nothing => Err(none().into()),
            };
        }
        // Whether it would run at all, before minutes of work; and which matrices it multiplies by.
        let loaded = Model::load(&source, &Numerics::default())?;
        if let Found::Copy(copy) = found {
            match check(&copy, &source, &interrupt) {
                Ok(()) => {
                    eprintln_quietly(format_args!("{model}: packed already"));
                    return print(&pack::directory(&store).join(copy.name()));
                }
                Err(error) if error.kind() == Kind::Interrupted => return Err(error.into()),
                Err(error) => eprintln_quietly(format_args!("note: {error}: packing again")),
            }
        }
        let mut shown = Shown::new("packing", &interrupt);
        let copy = pack::write(&store, &source, loaded.interleavable(), &mut |done, total| shown.at(done, total));
        shown.bar.finish_and_clear();
        let (copy, seconds) = (copy?, shown.start.elapsed().as_secs_f64());
        let bytes = std::fs::metadata(&copy).map_err(|e| Error::io(&copy, &e))?.len();
        eprintln_quietly(format_args!(
            "{model}: packed {:.2} GB in {seconds:.1} s; gemrun reads the copy from now on",
            bytes as f64 / 1e9
        ));
        print(&copy)
    }
}

/// The path of the copy.
fn print(path: &Path) -> Result {
    Ok(writeln!(std::io::stdout(), "{}", path.display())?)
}

/// Compares model and copy with what was packed.
fn check(copy: &Packed, source: &Gguf, interrupt: &AtomicBool) -> gemrun::Result<()> {
    let mut shown = Shown::new("checking", interrupt);
    let result = copy.check(source, &mut |done, total| shown.at(done, total));
    shown.bar.finish_and_clear();
    result
}

/// Progress as people see it: a bar on a terminal, elsewhere a line now and then.
struct Shown<'a> {
    what: &'static str,
    bar: ProgressBar,
    interrupt: &'a AtomicBool,
    start: Instant,
    /// When the next line is due.
    next: Duration,
}

/// Between lines.
const EVERY: Duration = Duration::from_secs(5);

impl<'a> Shown<'a> {
    fn new(what: &'static str, interrupt: &'a AtomicBool) -> Shown<'a> {
        let style = ProgressStyle::with_template("{msg} {bytes}/{total_bytes} {wide_bar} {bytes_per_sec}, {eta} left");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(0).with_style(style).with_message(what);
        Shown { what, bar, interrupt, start: Instant::now(), next: EVERY }
    }

    /// Shows that so many bytes are done; whether to go on.
    fn at(&mut self, done: u64, total: u64) -> ControlFlow<()> {
        if self.interrupt.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
        let elapsed = self.start.elapsed();
        if elapsed >= self.next && !std::io::stderr().is_terminal() {
            self.next = elapsed + EVERY;
            eprintln_quietly(format_args!("{}", line(self.what, done, total, elapsed)));
        }
        ControlFlow::Continue(())
    }
}

/// `packing: 1.20 of 3.35 GB, 240 MB/s, 9 s left`.
fn line(what: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let speed = done as f64 / elapsed.as_secs_f64();
    let left = total.saturating_sub(done) as f64 / speed;
    let (done, total, speed) = (done as f64 / 1e9, total as f64 / 1e9, speed / 1e6);
    format!("{what}: {done:.2} of {total:.2} GB, {speed:.0} MB/s, {left:.0} s left")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_without_a_terminal() {
        assert_eq!(
            line("packing", 1_200_000_000, 3_350_000_000, Duration::from_secs(5)),
            "packing: 1.20 of 3.35 GB, 240 MB/s, 9 s left"
        );
    }
}
