//! `gemrun pack`: the copy of a model that is read faster, made, checked or dropped.
//!
//! What a copy is, `gemrun::pack` tells. Here: a progress bar, Ctrl-C, and words. Standard output is the path of the copy.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use clap::Args;
use gemrun::gguf::Gguf;
use gemrun::model::Model;
use gemrun::pack::{self, Found, Packed};
use gemrun::registry::{self, Source};
use gemrun::weight::Numerics;
use gemrun::{Error, Kind};

use super::progress::Shown;
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
        let seconds = shown.end().as_secs_f64();
        let copy = copy?;
        let bytes = std::fs::metadata(&copy).map_err(|e| Error::io(&copy, &e))?.len();
        eprintln_quietly(format_args!(
            "{model}: packed {:.2} GB in {seconds:.1} s; gemrun reads the copy from now on",
            bytes as f64 / 1e9
        ));
        print(&copy)
    }
}

/// Writes a packed copy of a model that has just arrived, if it pays and there is room. A model is complete without one, so what
/// stands in the way is said and no failure; but for Ctrl-C.
pub fn after_pull(model: &str, path: &Path, interrupt: &AtomicBool) -> Result {
    let Some(store) = registry::home() else { return Ok(()) };
    let model = gemrun::error::printable(model);
    let packed = Gguf::open(path).and_then(|source| {
        if matches!(pack::find(&store, &source), Found::Copy(_)) {
            return Ok(None);
        }
        let loaded = Model::load(&source, &Numerics::default())?;
        if loaded.interleavable().is_empty() {
            return Ok(None);
        }
        let mut shown = Shown::new("packing", interrupt);
        let copy = pack::write(&store, &source, loaded.interleavable(), &mut |done, total| shown.at(done, total));
        shown.end();
        copy.map(Some)
    });
    match packed {
        Ok(None) => Ok(()),
        Ok(Some(_)) => {
            eprintln_quietly(format_args!("{model}: packed, for faster text"));
            Ok(())
        }
        Err(error) if error.kind() == Kind::Interrupted => Err(error.into()),
        Err(error) => {
            eprintln_quietly(format_args!("note: {model}: no packed copy: {error}"));
            Ok(())
        }
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
    shown.end();
    result
}
