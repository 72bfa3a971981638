//! How far minutes of work are: a bar on a terminal, elsewhere a line now and then; and Ctrl-C.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::terminal::{self, eprintln_quietly};

/// Progress as people see it.
pub struct Shown<'a> {
    what: &'static str,
    bar: ProgressBar,
    interrupt: &'a AtomicBool,
    start: Instant,
    /// What was done at the start.
    begun: Option<u64>,
    /// When the next line is due.
    next: Duration,
}

/// Columns in which there is room for a bar.
const WIDE: usize = 64;
/// Between lines.
const EVERY: Duration = Duration::from_secs(5);

impl<'a> Shown<'a> {
    /// A bar that says `what` is done, for work to be stopped by `interrupt`.
    pub fn new(what: &'static str, interrupt: &'a AtomicBool) -> Shown<'a> {
        let template = match terminal::columns() {
            Some(columns) if columns < WIDE => "{msg} {percent} %, {decimal_bytes_per_sec}, {eta} left",
            _ => "{msg} {decimal_bytes}/{decimal_total_bytes} {wide_bar} {decimal_bytes_per_sec}, {eta} left",
        };
        let style = ProgressStyle::with_template(template);
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(0).with_style(style).with_message(what);
        Shown { what, bar, interrupt, start: Instant::now(), begun: None, next: EVERY }
    }

    /// Shows that so many bytes are done; whether to go on.
    pub fn at(&mut self, done: u64, total: u64) -> ControlFlow<()> {
        if self.interrupt.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        let begun = *self.begun.get_or_insert_with(|| {
            // What another process did counts as done, but not as speed.
            self.bar.set_position(done);
            self.bar.reset_eta();
            done
        });
        self.bar.set_length(total);
        self.bar.set_position(done);
        let elapsed = self.start.elapsed();
        if elapsed >= self.next && !std::io::stderr().is_terminal() {
            self.next = elapsed + EVERY;
            eprintln_quietly(format_args!("{}", line(self.what, begun, done, total, elapsed)));
        }
        ControlFlow::Continue(())
    }

    /// Takes the bar away; how long it was there.
    pub fn end(&mut self) -> Duration {
        self.bar.finish_and_clear();
        self.start.elapsed()
    }
}

/// `packing: 1.20 of 3.35 GB, 240 MB/s, 9 s left`.
fn line(what: &str, begun: u64, done: u64, total: u64, elapsed: Duration) -> String {
    let speed = done.saturating_sub(begun) as f64 / elapsed.as_secs_f64();
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
            line("packing", 0, 1_200_000_000, 3_350_000_000, Duration::from_secs(5)),
            "packing: 1.20 of 3.35 GB, 240 MB/s, 9 s left"
        );
    }
}
