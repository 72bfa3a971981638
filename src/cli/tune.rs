//! `gemrun tune`: which cores and how many threads are fastest here, measured, and written into the config file.
//!
//! The one idea: candidates take turns, so that a machine that slows down or is used by others slows all of them alike. What
//! counts is generating, which reads memory; of those that are as good at it as the best, the one that reads prompts fastest,
//! and of equals the one with fewer threads.

use std::ffi::OsString;
use std::io::Write;
use std::time::{Duration, Instant};

use clap::Args;
use gemrun::forward::{State, Want, forward};
use gemrun::kv::KvType;
use gemrun::machine::cores::{Chosen, Cores, Which, confine};
use gemrun::machine::memory::Memory;
use gemrun::machine::speed::{self, Buffer, Measured};
use gemrun::machine::{Root, ranges};
use gemrun::team::{MAX_THREADS, Team};
use indicatif::{ProgressBar, ProgressStyle};

use super::open::{Compute, Loaded};
use super::terminal::{Style, eprintln_quietly};
use super::{Result, config};

/// Measure how many threads on which cores are fastest, and remember it
#[derive(Args)]
#[command(after_help = "With MODEL, that model generates and reads prompts. Without, memory is read and integers are \
    multiplied, which is nearly the same and needs no model. The result becomes threads and cores in the config file.\n\n\
    Examples:\n  \
    gemrun tune\n  \
    gemrun tune e2b --dry-run")]
pub struct Tune {
    /// Model name or path of a GGUF file
    model: Option<OsString>,
    /// Only measure and print
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    compute: Compute,
}

/// Turns of each candidate, and how long one lasts.
const ROUNDS: usize = 3;
const TURN: Duration = Duration::from_millis(400);
/// Shares of the best speed that are as good as it.
const AS_GOOD: f64 = 0.97;

/// A way to compute, and how fast it was at best.
struct Candidate {
    which: &'static str,
    cpus: Vec<usize>,
    threads: usize,
    /// Tokens, or bytes, a second.
    decode: f64,
    /// Tokens, or products, a second.
    prompt: f64,
}

/// What a turn of generating, or of reading a prompt, does: its speed with a team.
trait Work {
    /// Tokens or bytes generated or read a second.
    fn decode(&mut self, threads: usize) -> Result<f64>;
    /// Tokens of a prompt, or products, a second.
    fn prompt(&mut self, threads: usize) -> Result<f64>;
    /// Names and divisors of the two.
    fn units(&self) -> [(&'static str, f64); 2];
}

impl Tune {
    pub fn run(self) -> Result {
        let cores = Cores::read(&Root::system());
        let mut candidates = candidates(&cores)?;
        let all = cores.choose(&Which::All)?.cpus;
        let loaded = self.model.as_ref().map(|model| self.compute.load(model)).transpose()?;
        let isa = self.compute.numerics()?.kernel.isa;
        let mut work: Box<dyn Work + '_> = match &loaded {
            Some(loaded) => Box::new(Running::new(loaded, &self.compute)?),
            None => {
                let memory = Memory::read(&Root::system()).map(|memory| memory.usable());
                Box::new(Reading { buffer: Buffer::new(&Root::system(), memory), isa })
            }
        };
        let style = ProgressStyle::with_template("measuring {wide_bar} {eta}").unwrap_or(ProgressStyle::default_bar());
        let bar = ProgressBar::new((ROUNDS * candidates.len()) as u64).with_style(style);
        for _ in 0..ROUNDS {
            for candidate in &mut candidates {
                confine(&candidate.cpus);
                candidate.decode = candidate.decode.max(work.decode(candidate.threads)?);
                candidate.prompt = candidate.prompt.max(work.prompt(candidate.threads)?);
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        confine(&all);
        if let (None, Some(home)) = (&loaded, gemrun::registry::home()) {
            let read: Vec<_> = candidates.iter().map(|c| (c.threads, c.decode)).collect();
            Measured::save(&home, &read);
        }

        let best = best(&candidates);
        let units = work.units();
        report(&candidates, best, units)?;
        let Candidate { which, threads, .. } = &candidates[best];
        if !self.dry_run {
            config::set(&[("threads", &threads.to_string()), ("cores", which)])?;
            eprintln_quietly(format_args!("threads = {threads} and cores = \"{which}\" are in the config file now"));
        }
        Ok(())
    }
}

/// Numbers of threads on the fast cores, and on all where those are more.
fn candidates(cores: &Cores) -> Result<Vec<Candidate>> {
    let (big, all) = (cores.choose(&Which::Big)?, cores.choose(&Which::All)?);
    let candidate = |which, chosen: &Chosen, threads| Candidate {
        which,
        cpus: chosen.cpus.clone(),
        threads,
        decode: 0.0,
        prompt: 0.0,
    };
    // One, two, three, four, six, eight, twelve, … threads, up to one a core.
    let steps = |most: usize| {
        let powers = (0..8).map(|power| 1 << power);
        let mut steps: Vec<usize> = powers.flat_map(|n: usize| [n, n + n / 2]).filter(|n| *n <= most).collect();
        steps.push(most);
        steps.sort_unstable();
        steps.dedup();
        steps
    };
    let mut candidates: Vec<Candidate> =
        steps(big.threads.min(MAX_THREADS)).into_iter().map(|threads| candidate("big", &big, threads)).collect();
    // Slower cores, and second hardware threads of a core.
    let quota = cores.quota.map_or(usize::MAX, |quota| (quota as usize).max(1));
    let mut more = vec![all.threads, all.cpus.len().min(quota)];
    more.retain(|threads| (big.threads + 1..=MAX_THREADS).contains(threads));
    more.dedup();
    candidates.extend(more.into_iter().map(|threads| candidate("all", &all, threads)));
    Ok(candidates)
}

/// Which candidate to take.
fn best(candidates: &[Candidate]) -> usize {
    let decode = candidates.iter().map(|c| c.decode).fold(0.0, f64::max);
    let good = candidates.iter().enumerate().filter(|(_, c)| c.decode >= AS_GOOD * decode);
    let prompt = good.clone().map(|(_, c)| c.prompt).fold(0.0, f64::max);
    let good = good.filter(|(_, c)| c.prompt >= AS_GOOD * prompt);
    good.min_by_key(|(_, c)| c.threads).map_or(0, |(i, _)| i)
}

fn report(candidates: &[Candidate], best: usize, [decode, prompt]: [(&str, f64); 2]) -> Result {
    let style = Style::stdout();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{:>7}  {:<16} {:>16} {:>20}", "threads", "cores", decode.0, prompt.0)?;
    for (i, c) in candidates.iter().enumerate() {
        let (bold, plain, mark) = if i == best { (style.bold(), style.plain(), "  *") } else { ("", "", "") };
        let cores = match c.cpus.is_empty() {
            true => c.which.to_string(),
            false => format!("{} ({})", c.which, ranges(&c.cpus)),
        };
        let (d, p) = (c.decode / decode.1, c.prompt / prompt.1);
        writeln!(out, "{bold}{:>7}  {cores:<16} {d:>16.1} {p:>20.1}{mark}{plain}", c.threads)?;
    }
    Ok(out.flush()?)
}

/// Memory that is read and integers that are multiplied.
struct Reading {
    buffer: Buffer,
    isa: gemrun_simd::Isa,
}

impl Work for Reading {
    fn decode(&mut self, threads: usize) -> Result<f64> {
        Ok(self.buffer.read_bandwidth(threads, TURN)?)
    }

    fn prompt(&mut self, threads: usize) -> Result<f64> {
        Ok(speed::int8_products(self.isa, threads, TURN / 4)?.unwrap_or(0.0))
    }

    fn units(&self) -> [(&'static str, f64); 2] {
        [("GB/s read", 1e9), ("G products/s", 1e9)]
    }
}

/// A model that generates and reads prompts.
struct Running<'m> {
    loaded: &'m Loaded,
    state: State,
}

impl Running<'_> {
    fn new<'m>(loaded: &'m Loaded, compute: &Compute) -> Result<Running<'m>> {
        let model = &loaded.model;
        let (kv, batch): (KvType, usize) = (compute.kv_or_usual(&model.config), model.batch());
        let context = model.config.context.min(2 * batch);
        compute.check_fit(loaded, kv, context, batch)?;
        let mut running = Running { loaded, state: State::new(model, kv, context, batch)? };
        // Weights that are not in memory yet are read now, not in somebody's turn.
        let threads = gemrun::machine::threads().min(MAX_THREADS);
        running.prompt(threads)?;
        Ok(running)
    }

    /// Computes chunks of `tokens` tokens for a turn, at least one; tokens a second.
    fn turn(&mut self, threads: usize, tokens: usize) -> Result<f64> {
        let model = &self.loaded.model;
        let chunk: Vec<u32> =
            (0..tokens.min(self.state.batch()) as u32).map(|i| i % model.config.vocab as u32).collect();
        let mut done = 0;
        let state = &mut self.state;
        let seconds = Team::new(threads)?.enter(|team| -> gemrun::Result<f64> {
            let start = Instant::now();
            while done == 0 || start.elapsed() < TURN {
                if state.kv.len() + chunk.len() > state.kv.context() {
                    state.truncate(model, 0);
                }
                forward(model, team, state, &chunk, Want::Best(1))?;
                done += chunk.len();
            }
            Ok(start.elapsed().as_secs_f64())
        })?;
        Ok(done as f64 / seconds)
    }
}

impl Work for Running<'_> {
    fn decode(&mut self, threads: usize) -> Result<f64> {
        self.turn(threads, 1)
    }

    fn prompt(&mut self, threads: usize) -> Result<f64> {
        self.turn(threads, usize::MAX)
    }

    fn units(&self) -> [(&'static str, f64); 2] {
        [("tok/s generated", 1.0), ("tok/s of prompts", 1.0)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_generates_fastest_and_reads_prompts_well() {
        let candidate = |threads, decode, prompt| Candidate { which: "big", cpus: Vec::new(), threads, decode, prompt };
        let chosen = |candidates: &[Candidate]| candidates[best(candidates)].threads;
        // Memory is the limit from two threads on, arithmetic is not.
        assert_eq!(chosen(&[candidate(1, 5.0, 10.0), candidate(2, 8.0, 20.0), candidate(4, 7.9, 39.0)]), 4);
        // Slow cores are waited for.
        assert_eq!(chosen(&[candidate(4, 8.0, 40.0), candidate(8, 5.0, 55.0)]), 4);
        // Twice the threads for nothing.
        assert_eq!(chosen(&[candidate(8, 8.0, 40.0), candidate(16, 8.1, 40.5)]), 8);
    }

    #[test]
    fn candidates_are_different() {
        let ways: Vec<_> =
            candidates(&Cores::read(&Root::system())).unwrap().iter().map(|c| (c.which, c.threads)).collect();
        let mut different = ways.clone();
        different.dedup();
        assert!(!ways.is_empty() && ways[0] == ("big", 1) && ways == different);
    }
}
