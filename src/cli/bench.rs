//! `gemrun bench`: how fast prompts are read (`pp`) and text is generated (`tg`), beside what this computer gives at best
//! and beside other programs.
//!
//! The letters, the test names and the columns are llama-bench's, so results can be laid side by side. Tokens are
//! pseudo-random and the same every time. Each test runs once unmeasured, then `-r` times; what the cache held before
//! the test (`-d`) is not measured either. With `--vs` every repetition of every program, gemrun's too, is a process of its
//! own, and programs take turns, so that nobody gets the quiet minute of a busy machine.
//!
//! | file | what is there |
//! |---|---|
//! | `bench/program.rs` | running llama-bench, or anything that speaks its language, once |
//! | `bench/report.rs` | figures, and their JSON, CSV and Markdown |
//! | `bench/chart.rs` | the comparison as a picture |

mod chart;
mod program;
mod report;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use gemrun::Error;
use gemrun::forward::{State, Want, forward};
use gemrun::kv::KvType;
use gemrun::machine;
use gemrun::machine::memory::Memory;
use gemrun::machine::speed::{self, Buffer};
use gemrun::model::Model;
use gemrun::registry::Source;
use gemrun::sample::uniform;
use gemrun::team::Team;
use indicatif::{ProgressBar, ProgressStyle};

use self::program::{Other, Program};
use self::report::{Figures, Limits, Measured, Report, Samples};
use super::Result;
use super::open::{self, Compute, CoresArg, Loaded};

/// Measure prompt and generation speed
#[derive(Args)]
#[command(
    after_help = "Lists are separated by commas; every combination is measured. Shares are of what this computer gives \
    at best, measured in the same run with as many threads: reading memory, for generation; multiplying and adding bytes, for \
    the multiplications a prompt cannot do without.\n\n\
    With --vs, programs that speak llama-bench's command line (-m -p -n -d -t -r -fa -ctk -ctv -o json, --no-warmup) measure the \
    same tests in turns with gemrun. To give one more options, name a script that ends in: exec llama-bench \"$@\" OPTIONS\n\n\
    Examples:\n  \
    gemrun bench e2b -p 128,512 -n 64 -d 0,4096 -t 1,2,4 -o json\n  \
    gemrun bench e2b --vs llama.cpp=/usr/local/bin/llama-bench --chart comparison.svg"
)]
pub struct Bench {
    /// Model name or path of a GGUF file
    model: OsString,
    /// Prompt lengths; 0 leaves the test out
    #[arg(short = 'p', long = "prompt", value_name = "N", value_delimiter = ',', default_value = "512")]
    prompt: Vec<usize>,
    /// Numbers of tokens to generate; 0 leaves the test out
    #[arg(short = 'n', long = "gen", value_name = "N", value_delimiter = ',', default_value = "64")]
    generate: Vec<usize>,
    /// Tokens in the cache before the test
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Threads [default: as many as there are fast cores]
    #[arg(short, long, value_name = "N", value_delimiter = ',', env = "GEMRUN_THREADS", hide_env_values = true)]
    threads: Vec<usize>,
    #[command(flatten)]
    cores: CoresArg,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Compare with another program that speaks llama-bench's command line; can be given more than once
    #[arg(long, value_name = "NAME=PATH")]
    vs: Vec<Other>,
    /// Form of the result
    #[arg(short, long, value_name = "FORM", default_value = "md")]
    output: Form,
    /// Draw the result as an SVG picture, too
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// Leave out the first, unmeasured repetition
    #[arg(long)]
    no_warmup: bool,
    /// Do not measure what this computer gives at best
    #[arg(long)]
    no_limits: bool,
    #[command(flatten)]
    compute: Compute,
}

#[derive(Clone, Copy, ValueEnum)]
enum Form {
    Md,
    Json,
    Csv,
}

/// One thing to measure: a prompt, or a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Test {
    prompt: usize,
    generate: usize,
    depth: usize,
    threads: usize,
}

impl Test {
    fn name(&self) -> String {
        if self.prompt > 0 { format!("pp{}", self.prompt) } else { format!("tg{}", self.generate) }
    }

    /// The name with the depth: `tg64 @ d4096`.
    fn label(&self) -> String {
        if self.depth == 0 { self.name() } else { format!("{} @ d{}", self.name(), self.depth) }
    }

    fn tokens(&self) -> usize {
        self.prompt + self.generate
    }

    /// Whether a process that does only this ends with the first token of an answer.
    fn is_start(&self) -> bool {
        self.prompt > 0 && self.depth == 0
    }
}

/// Processes that are timed from start to first token, of each program in a comparison.
const STARTS: usize = 3;
/// How long memory is read, for each number of threads.
const TIME: Duration = Duration::from_millis(700);

impl Bench {
    pub fn run(self) -> Result {
        let batch = self.compute.batch()?;
        if !(1..=1000).contains(&self.repetitions) {
            return Err(Error::usage(format!("repetitions: {}: expected 1 to 1000", self.repetitions)).into());
        }
        let threads = self.cores.take(&self.threads)?;
        let tests = self.tests(&threads);
        let load_average = machine::load_average();
        let loaded = self.compute.load(&self.model)?;
        let kv = self.compute.kv_or_usual(&loaded.model.config);
        let programs = self.programs(kv)?;
        let batch = batch.unwrap_or(loaded.model.batch());
        let longest = tests.iter().map(|test| test.depth.saturating_add(test.tokens())).max().unwrap_or(0);
        let trained = loaded.model.config.context;
        if longest > trained {
            let error = format!("{longest} tokens with depth: expected at most {trained}, the model's context");
            return Err(Error::usage(error).into());
        }
        self.compute.check_fit(&loaded, kv, longest.max(1), batch)?;

        let bar = bar(tests.len() * self.runs(&programs));
        let rows: gemrun::Result<Vec<Measured>> = tests
            .iter()
            .map(|&test| {
                bar.set_message(test.label());
                let (bytes_per_token, multiply_adds) = work(&loaded.model, test, batch);
                let (figures, others) = match &programs[..] {
                    [] => (self.alone(&loaded, test, kv, batch, &bar)?, Vec::new()),
                    programs => self.compare(programs, test, &bar)?,
                };
                Ok(Measured { test, bytes_per_token, multiply_adds, figures, others })
            })
            .collect();
        bar.finish_and_clear();
        let report = Report {
            model: gemrun::error::printable(loaded.gguf.name()),
            kv: kv.name(),
            isa: self.compute.numerics()?.kernel.isa.name(),
            kernels: loaded.model.kernels(),
            packed: loaded.model.packed(),
            rows: rows?,
            load_average,
            // Memory to read from would be part of the peak, so it comes last.
            limits: if self.no_limits { Vec::new() } else { self.limits(&threads)? },
        };

        let mut out = std::io::stdout().lock();
        match self.output {
            Form::Json => writeln!(out, "{:#}", report.json())?,
            Form::Csv => report.csv(&mut out)?,
            Form::Md => report.markdown(&mut out)?,
        }
        out.flush()?;
        if let Some(path) = &self.chart {
            std::fs::write(path, chart::svg(&report)).map_err(|e| Error::io(path, &e))?;
        }
        Ok(())
    }

    fn tests(&self, threads: &[usize]) -> Vec<Test> {
        let mut tests = Vec::new();
        for &threads in threads {
            for &depth in &self.depth {
                let prompts = self.prompt.iter().map(|&prompt| (prompt, 0));
                for (prompt, generate) in prompts.chain(self.generate.iter().map(|&generate| (0, generate))) {
                    if prompt + generate > 0 {
                        tests.push(Test { prompt, generate, depth, threads });
                    }
                }
            }
        }
        tests
    }

    /// gemrun and the programs it is compared with; none without `--vs`.
    fn programs(&self, kv: KvType) -> gemrun::Result<Vec<Program>> {
        if self.vs.is_empty() {
            return Ok(Vec::new());
        }
        let Source::File(file) = open::source(&self.model)? else {
            let model = self.model.to_string_lossy();
            return Err(Error::usage(format!(
                "{model}: is part of gemrun: expected a file that other programs can read"
            )));
        };
        let mut programs = vec![Program::gemrun(&file, &self.compute.arguments())?];
        for other in &self.vs {
            if programs.iter().any(|program| program.name == other.name) {
                return Err(Error::usage(format!("--vs: {}: expected a name of its own for each program", other.name)));
            }
            programs.push(Program::other(other, &file, kv)?);
        }
        Ok(programs)
    }

    /// Steps of the progress bar for one test.
    fn runs(&self, programs: &[Program]) -> usize {
        match programs.len() {
            0 => self.repetitions + usize::from(!self.no_warmup),
            n => n * (self.repetitions + self.repetitions.min(STARTS)),
        }
    }

    /// Measures in this process.
    fn alone(
        &self,
        loaded: &Loaded,
        test: Test,
        kv: KvType,
        batch: usize,
        bar: &ProgressBar,
    ) -> gemrun::Result<Figures> {
        let mut team = Team::new(test.threads)?;
        let mut state = State::new(&loaded.model, kv, (test.depth + test.tokens()).max(1), batch)?;
        let mut times = Vec::new();
        for repetition in usize::from(self.no_warmup)..=self.repetitions {
            let time = team.enter(|team| measure(&loaded.model, team, &mut state, test))?;
            if repetition > 0 {
                times.push(time);
            }
            bar.inc(1);
        }
        let first_token = (loaded.times.map + loaded.times.load).as_secs_f64() + Samples(times.clone()).median();
        Ok(Figures {
            speeds: Samples(times.into_iter().map(|time| test.tokens() as f64 / time).collect()),
            peak_rss: machine::peak_rss(),
            first_token: test.is_start().then_some(first_token),
        })
    }

    /// Measures in processes of all programs, in turns.
    fn compare(
        &self,
        programs: &[Program],
        test: Test,
        bar: &ProgressBar,
    ) -> gemrun::Result<(Figures, Vec<report::Other>)> {
        let mut runs: Vec<Vec<program::Run>> = programs.iter().map(|_| Vec::new()).collect();
        let mut starts: Vec<Vec<f64>> = programs.iter().map(|_| Vec::new()).collect();
        for _ in 0..self.repetitions {
            for (program, runs) in programs.iter().zip(&mut runs) {
                runs.push(program.run(test, !self.no_warmup)?);
                bar.inc(1);
            }
        }
        for _ in 0..self.repetitions.min(STARTS) {
            for (program, starts) in programs.iter().zip(&mut starts) {
                if test.is_start() {
                    starts.push(program.run(test, false)?.seconds);
                }
                bar.inc(1);
            }
        }
        let figures = runs.iter().zip(starts).map(|(runs, starts)| Figures {
            speeds: Samples(runs.iter().map(|run| run.speed).collect()),
            peak_rss: runs.iter().filter_map(|run| run.peak_rss).max(),
            first_token: (!starts.is_empty()).then(|| Samples(starts).median()),
        });
        let mut figures = figures.collect::<Vec<_>>().into_iter();
        let ours = figures.next().expect("gemrun is the first program");
        let others = programs.iter().zip(&runs).skip(1).zip(figures).map(|((program, runs), figures)| report::Other {
            name: program.name.clone(),
            build: runs.iter().find_map(|run| run.build.clone()),
            figures,
        });
        Ok((ours, others.collect()))
    }

    /// What this computer gives at best, for each number of threads.
    fn limits(&self, threads: &[usize]) -> Result<Vec<Limits>> {
        let root = machine::Root::system();
        let buffer = Buffer::new(&root, Memory::read(&root).map(|memory| memory.usable()));
        let isa = self.compute.numerics()?.kernel.isa;
        let limits = threads.iter().map(|&threads| {
            let read = buffer.read_bandwidth(threads, TIME)?;
            Ok(Limits { threads, read, int8: speed::int8_products(isa, threads, TIME / 4)? })
        });
        limits.collect()
    }
}

fn bar(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {pos}/{len}").unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps as u64).with_style(style)
}

/// Bytes of weights that a token of `test` has to read, and multiply-adds it cannot do without; both on average.
fn work(model: &Model, test: Test, batch: usize) -> (f64, f64) {
    if test.prompt == 0 {
        return (model.bytes_per_token() as f64, model.multiply_adds(true) as f64);
    }
    let tokens = test.prompt;
    // A chunk reads the weights once for all its tokens. Only the last token goes all the way to its logits.
    let chunks = (0..tokens).step_by(batch).map(|at| batch.min(tokens - at));
    let bytes: usize = chunks.map(|chunk| model.bytes_read(chunk, false)).sum();
    let bytes = bytes + (model.bytes_read(1, true) - model.bytes_read(1, false));
    let multiply_adds = (tokens - 1) * model.multiply_adds(false) + model.multiply_adds(true);
    (bytes as f64 / tokens as f64, multiply_adds as f64 / tokens as f64)
}

/// What a chat asks for, with the usual sampling.
const WANT: Want = Want::Best(64);

/// Runs `test` once; seconds.
fn measure(model: &Model, team: &Team, state: &mut State, test: Test) -> gemrun::Result<f64> {
    let token = |i: usize| (uniform(0, i as u64) * model.config.vocab as f64) as u32;
    let batch = state.batch();
    // What the last repetition left at this depth is as good as computing it again.
    let kept = state.truncate(model, test.depth.min(state.kv.len()));
    let filler: Vec<u32> = (kept..test.depth).map(token).collect();
    for chunk in filler.chunks(batch) {
        forward(model, team, state, chunk, Want::Nothing)?;
    }

    let tokens: Vec<u32> = (test.depth..test.depth + test.tokens()).map(token).collect();
    let start = Instant::now();
    if test.prompt > 0 {
        let chunks = tokens.chunks(batch);
        let last = chunks.len() - 1;
        for (i, chunk) in chunks.enumerate() {
            forward(model, team, state, chunk, if i == last { WANT } else { Want::Nothing })?;
        }
    } else {
        for token in tokens.chunks(1) {
            forward(model, team, state, token, WANT)?;
        }
    }
    Ok(start.elapsed().as_secs_f64())
}
