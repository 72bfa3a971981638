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

/// Starts reading the first of the weights of `model`, as far as they are missing, and does not wait for them.
pub fn begin(model: &Model) {
    let mut left = LITTLE;
    for stored in model.weights().map(Weight::stored).filter(|stored| stored.missing(PROBE) > 0) {
        if stored.len() > left {
            break;
        }
        left -= stored.len();
        stored.willneed();
    }
}

/// Reads the weights of `model` into memory, unless they are there or do not fit.
pub fn page_in(model: &Model, interrupt: &AtomicBool) {
    let all: usize = model.weights().map(|weight| weight.stored().len()).sum();
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
    for stored in model.weights().map(Weight::stored) {
        for start in (0..stored.len()).step_by(STEP) {
            if interrupt.load(Ordering::Relaxed) {
                break;
            }
            let step = start..stored.len().min(start + STEP);
            bar.inc(step.len() as u64);
            stored.slice(step).page_in();
        }
    }
    bar.finish_and_clear();
}
