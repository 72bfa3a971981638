//! Weights that are not in memory yet, read before they are needed.
//!
//! A file that was not used lately is on the disk. Computing would fault its pages in one by one, for minutes on a board with a
//! memory card, and nothing would show. So what a token needs is read in the order of the file, with a bar.

use std::sync::atomic::{AtomicBool, Ordering};

use gemrun::machine;
use gemrun::model::Model;
use gemrun::weight::Weight;
use indicatif::{ProgressBar, ProgressStyle};

/// A page of so many bytes is looked at.
const PROBE: usize = 1 << 20;

/// Less is not worth a bar.
const LITTLE: usize = 64 << 20;

/// Bytes between two looks at the interrupt flag.
const STEP: usize = 16 << 20;

/// Reads the weights of `model` into memory, unless they are there or do not fit.
pub fn page_in(model: &Model, interrupt: &AtomicBool) {
    let all: usize = model.weights().map(Weight::bytes).sum();
    let missing: usize = model.weights().map(|weight| weight.stored().missing(PROBE)).sum();
    if missing < LITTLE || machine::usable_memory().is_none_or(|usable| missing as u64 > usable) {
        return;
    }
    let bar = ProgressBar::new(all as u64);
    if let Ok(style) =
        ProgressStyle::with_template("reading weights {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
    {
        bar.set_style(style);
    }
    for weight in model.weights() {
        for start in (0..weight.bytes()).step_by(STEP) {
            if interrupt.load(Ordering::Relaxed) {
                break;
            }
            let step = start..weight.bytes().min(start + STEP);
            bar.inc(step.len() as u64);
            weight.stored().slice(step).page_in();
        }
    }
    bar.finish_and_clear();
}
