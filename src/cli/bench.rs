//! `gemrun bench`: how fast prompts are read (`pp`) and text is generated (`tg`).
//!
//! The letters, the test names and the columns are llama-bench's, so results can be laid side by side. Tokens are
//! pseudo-random and the same every time. Each test runs once unmeasured, then `-r` times; what the cache held before
//! the test (`-d`) is not measured either.

use std::ffi::OsString;
use std::io::Write;
use std::time::Instant;

use clap::{Args, ValueEnum};
use gemrun::Error;
use gemrun::forward::{State, Want, forward};
use gemrun::kv::KvType;
use gemrun::machine;
use gemrun::model::Model;
use gemrun::sample::uniform;
use gemrun::team::Team;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::Result;
use super::open::{Compute, Loaded, check_threads, default_threads};

/// Measure prompt and generation speed
#[derive(Args)]
#[command(after_help = "Lists are separated by commas; every combination is measured.\n\n\
    Example: gemrun bench e2b -p 128,512 -n 64 -d 0,4096 -t 1,2,4 -o json")]
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
    /// Threads [default: all this process may use]
    #[arg(short, long, value_name = "N", value_delimiter = ',', env = "GEMRUN_THREADS", hide_env_values = true)]
    threads: Vec<usize>,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Form of the result
    #[arg(short, long, value_name = "FORM", default_value = "md")]
    output: Form,
    #[command(flatten)]
    compute: Compute,
}

#[derive(Clone, Copy, ValueEnum)]
enum Form {
    Md,
    Json,
    Csv,
}

/// One thing to measure.
#[derive(Clone, Copy)]
struct Test {
    prompt: usize,
    generate: usize,
    depth: usize,
    threads: usize,
}

/// The speeds of its repetitions, in tokens per second.
struct Measured {
    test: Test,
    speeds: Vec<f64>,
    bytes_per_token: f64,
    peak_rss: Option<u64>,
}

impl Test {
    fn name(&self) -> String {
        if self.prompt > 0 { format!("pp{}", self.prompt) } else { format!("tg{}", self.generate) }
    }

    fn tokens(&self) -> usize {
        self.prompt + self.generate
    }
}

impl Measured {
    fn average(&self) -> f64 {
        self.speeds.iter().sum::<f64>() / self.speeds.len() as f64
    }

    /// Sample standard deviation.
    fn deviation(&self) -> f64 {
        let (mean, n) = (self.average(), self.speeds.len());
        let squares: f64 = self.speeds.iter().map(|speed| (speed - mean).powi(2)).sum();
        if n < 2 { 0.0 } else { (squares / (n - 1) as f64).sqrt() }
    }

    fn median(&self) -> f64 {
        let mut sorted = self.speeds.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
    }

    /// Weight traffic at the average speed.
    fn gigabytes_per_second(&self) -> f64 {
        self.bytes_per_token * self.average() / 1e9
    }
}

impl Bench {
    pub fn run(self) -> Result {
        let (kv, batch) = (self.compute.kv(KvType::F16)?, self.compute.batch()?);
        if !(1..=1000).contains(&self.repetitions) {
            return Err(Error::usage(format!("repetitions: {}: expected 1 to 1000", self.repetitions)).into());
        }
        let threads = if self.threads.is_empty() { vec![default_threads()] } else { self.threads.clone() };
        threads.iter().try_for_each(|&threads| check_threads(threads).map(drop))?;
        let tests = self.tests(&threads);
        let loaded = self.compute.load(&self.model)?;
        let longest = tests.iter().map(|test| test.depth.saturating_add(test.tokens())).max().unwrap_or(0);
        let trained = loaded.model.config.context;
        if longest > trained {
            let error = format!("{longest} tokens with depth: expected at most {trained}, the model's context");
            return Err(Error::usage(error).into());
        }

        let style = ProgressStyle::with_template("{msg} {pos}/{len}").unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new((tests.len() * (self.repetitions + 1)) as u64).with_style(style);
        let mut results = Vec::new();
        for test in tests {
            bar.set_message(test.name());
            let mut team = Team::new(test.threads)?;
            let mut state = State::new(&loaded.model, kv, (test.depth + test.tokens()).max(1), batch)?;
            let mut speeds = Vec::new();
            for repetition in 0..=self.repetitions {
                let speed = team.enter(|team| measure(&loaded.model, team, &mut state, test))?;
                if repetition > 0 {
                    speeds.push(speed);
                }
                bar.inc(1);
            }
            // A prompt's chunk reads the weights once for all its tokens.
            let shared_by = if test.prompt > 0 { batch.min(test.prompt) } else { 1 };
            let bytes_per_token = loaded.model.bytes_per_token() as f64 / shared_by as f64;
            results.push(Measured { test, speeds, bytes_per_token, peak_rss: machine::peak_rss() });
        }
        bar.finish_and_clear();

        let mut out = std::io::stdout().lock();
        match self.output {
            Form::Json => writeln!(out, "{:#}", json(&results, &loaded, kv.name()))?,
            Form::Csv => csv(&results, &loaded, kv.name(), &mut out)?,
            Form::Md => markdown(&results, &loaded, kv.name(), &mut out)?,
        }
        Ok(out.flush()?)
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
}

/// Runs `test` once; tokens per second.
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
            forward(model, team, state, chunk, if i == last { Want::Last } else { Want::Nothing })?;
        }
    } else {
        for token in tokens.chunks(1) {
            forward(model, team, state, token, Want::Last)?;
        }
    }
    Ok(test.tokens() as f64 / start.elapsed().as_secs_f64())
}

fn json(results: &[Measured], loaded: &Loaded, kv: &str) -> serde_json::Value {
    let result = |result: &Measured| {
        let test = result.test;
        json!({
            "model": loaded.gguf.name(),
            "test": test.name(),
            "n_prompt": test.prompt,
            "n_gen": test.generate,
            "n_depth": test.depth,
            "n_threads": test.threads,
            "avg_ts": result.average(),
            "stddev_ts": result.deviation(),
            "median_ts": result.median(),
            "samples_ts": result.speeds,
            "bytes_per_token": result.bytes_per_token,
            "gb_per_s": result.gigabytes_per_second(),
            "peak_rss_bytes": result.peak_rss,
            "kernel": loaded.model.kernels(),
            "kv": kv,
        })
    };
    results.iter().map(result).collect()
}

fn csv(results: &[Measured], loaded: &Loaded, kv: &str, out: &mut impl Write) -> Result {
    writeln!(
        out,
        "model,test,n_prompt,n_gen,n_depth,n_threads,avg_ts,stddev_ts,median_ts,bytes_per_token,gb_per_s,peak_rss_bytes,kv"
    )?;
    let name = gemrun::error::printable(loaded.gguf.name()).replace('"', "\"\"");
    for r in results {
        let (test, rss) = (r.test, r.peak_rss.map_or(String::new(), |bytes| bytes.to_string()));
        writeln!(
            out,
            "\"{name}\",{},{},{},{},{},{:.4},{:.4},{:.4},{:.0},{:.4},{rss},{kv}",
            test.name(),
            test.prompt,
            test.generate,
            test.depth,
            test.threads,
            r.average(),
            r.deviation(),
            r.median(),
            r.bytes_per_token,
            r.gigabytes_per_second()
        )?;
    }
    Ok(())
}

fn markdown(results: &[Measured], loaded: &Loaded, kv: &str, out: &mut impl Write) -> Result {
    let name = gemrun::error::printable(loaded.gguf.name());
    writeln!(out, "| model | threads | kv | test | t/s | median | GB/s |")?;
    writeln!(out, "| --- | ---: | --- | ---: | ---: | ---: | ---: |")?;
    for r in results {
        let test = match r.test.depth {
            0 => r.test.name(),
            depth => format!("{} @ d{depth}", r.test.name()),
        };
        writeln!(
            out,
            "| {name} | {} | {kv} | {test} | {:.2} ± {:.2} | {:.2} | {:.2} |",
            r.test.threads,
            r.average(),
            r.deviation(),
            r.median(),
            r.gigabytes_per_second()
        )?;
    }
    let kernels: Vec<String> = loaded.model.kernels().values().map(ToString::to_string).collect();
    writeln!(out, "\nkernels: {}", kernels.join(", "))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics() {
        let test = Test { prompt: 0, generate: 8, depth: 0, threads: 1 };
        let measured = Measured { test, speeds: vec![4.0, 1.0, 3.0, 2.0], bytes_per_token: 1e9, peak_rss: None };
        assert_eq!((measured.average(), measured.median()), (2.5, 2.5));
        assert!((measured.deviation() - (5.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(measured.gigabytes_per_second(), 2.5);
        let single = Measured { speeds: vec![3.0], ..measured };
        assert_eq!((single.median(), single.deviation()), (3.0, 0.0));
    }
}
