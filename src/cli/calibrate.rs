//! `gemrun calibrate`: static activation scales for a model that has none, and what they cost.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use gemrun::Error;
use gemrun::calibrate::{self, Calibrated};
use gemrun::config::{Config, ROLES};
use gemrun::team::Team;
use gemrun::tokenizer::Tokenizer;
use gemrun::windows::windows;
use indicatif::{ProgressBar, ProgressStyle};

use super::open::{self, Threads};
use super::terminal::eprintln_quietly;
use super::{Result, text};

/// Above this, static scales change what a model says.
const GOOD: f64 = 0.01;

/// Find static activation scales for a model that has none
#[derive(Args)]
#[command(
    after_help = "Runs the text through the model and chooses one scale for the inputs of each matrix, then says what that \
    costs: KL is the divergence of the model's predictions from those with a scale for each 32 values, which is what runs without \
    --static. A few thousand tokens of ordinary text do.\n\n\
    Example: gemrun calibrate e2b --file story.txt -o e2b.static.gguf && gemrun run e2b --static e2b.static.gguf"
)]
pub struct Calibrate {
    /// Model name or path of a GGUF file
    model: OsString,
    /// The text; - is standard input
    #[arg(long, value_name = "TEXT")]
    file: PathBuf,
    /// Where to write the scales
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Window length in tokens
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    ctx: usize,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    kernel: open::KernelName,
}

impl Calibrate {
    pub fn run(self) -> Result {
        let text = text::from_file(&self.file)?;
        let numerics = gemrun::weight::Numerics { kernel: self.kernel.choice()?, ..Default::default() };
        let mut team = Team::new(self.threads.take()?)?;
        let gguf = open::gguf(&self.model)?;
        let tokenizer = open::tokenizer(&gguf)?;
        let context = Config::from_gguf(&gguf)?.context;
        if !(2..=context).contains(&self.ctx) {
            return Err(Error::usage(format!("ctx: {}: expected 2 to {context}, the model's context", self.ctx)).into());
        }
        let tokens = Tokenizer::encode(&tokenizer, &text, false);
        let windows: Vec<Vec<u32>> = windows(&tokens, self.ctx, tokenizer.bos()).collect();
        let bar = steps();
        let found = calibrate::calibrate(&gguf, &numerics, &mut team, &windows, &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        calibrate::write(&self.output, &gguf, &found)?;
        self.report(&found)
    }

    fn report(&self, found: &Calibrated) -> Result {
        let mut out = std::io::stdout().lock();
        for (role, quantile) in ROLES.iter().zip(found.quantiles) {
            match quantile < 1.0 {
                true => writeln!(out, "{role:<12} the largest {:.2} % clipped", (1.0 - quantile) * 100.0)?,
                false => writeln!(out, "{role:<12} nothing clipped")?,
            }
        }
        writeln!(out, "KL           {:.6} nats a token on {} held-out tokens", found.kl, found.held_out)?;
        writeln!(out, "perplexity   {:.4} static, {:.4} dynamic", found.ppl, found.ppl_dynamic)?;
        if found.kl > GOOD {
            let note = "note: static scales change what this model says: a KL above 0.01 is felt";
            eprintln_quietly(format_args!("{note}"));
        }
        Ok(out.flush()?)
    }
}

/// A bar of steps on standard error, if that is a terminal.
fn steps() -> ProgressBar {
    let style = ProgressStyle::with_template("calibrating {wide_bar} {eta}");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
