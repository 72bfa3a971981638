//! `gemrun eval`: numbers about a model rather than text from it.
//!
//! `logits` writes what the model says at every position, `ppl` how well it predicts a text, `kl` how far two models
//! (or two ways to compute one) are apart on a text. The last two cut the text into windows of `--ctx` tokens, each
//! beginning with `<bos>`, so every token is predicted exactly once, from nothing before its window.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use gemrun::Error;
use gemrun::forward::{State, Want, forward};
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::sample::{LogProbs, argmax};
use gemrun::team::Team;
use gemrun::tokenizer::Tokenizer;
use gemrun::windows::{predict, windows};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::open::{ActArg, Compute, KvArg, Loaded, Threads};
use super::{Result, text};

/// Measure what a model computes: raw logits, perplexity, divergence
#[derive(Args)]
#[command(after_help = "Example: gemrun eval ppl e2b --file story.txt")]
pub struct Eval {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Logits(Logits),
    Ppl(Ppl),
    Kl(Kl),
}

impl Eval {
    pub fn run(self) -> Result {
        match self.what {
            What::Logits(logits) => logits.run(),
            What::Ppl(ppl) => ppl.run(),
            What::Kl(kl) => kl.run(),
        }
    }
}

/// Write the raw next-token logits of every position
#[derive(Args)]
#[command(
    after_help = "FILE gets little-endian 32-bit floats, tokens x vocabulary, after the soft cap. The tokens are \
    taken as they are: no <bos> is added.\n\n\
    Example: gemrun eval logits demo --tokens 2,105,2364,107 -o logits.f32"
)]
struct Logits {
    /// Model name or path of a GGUF file
    model: OsString,
    /// Token ids, separated by commas
    #[arg(long, required = true, value_delimiter = ',', value_name = "IDS")]
    tokens: Vec<u32>,
    /// Where to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    compute: Compute,
}

impl Logits {
    fn run(self) -> Result {
        let Runner { loaded, mut team, kv, batch } =
            Runner::new(&self.model, &self.threads, &self.compute, self.tokens.len())?;
        let model = &loaded.model;
        check_context(model, self.tokens.len(), &format!("{} tokens", self.tokens.len()))?;
        if let Some(id) = self.tokens.iter().find(|&&id| id as usize >= model.config.vocab) {
            let vocab = model.config.vocab;
            let error = format!("token id {id}: expected less than {vocab}, the vocabulary of {}", loaded.gguf.name());
            return Err(Error::usage(error).into());
        }
        let mut state = State::new(model, kv, self.tokens.len(), batch)?;
        let failed = |e: std::io::Error| Error::io(&self.output, &e);
        let mut file = BufWriter::new(File::create(&self.output).map_err(failed)?);
        let written = team.enter(|team| -> gemrun::Result<()> {
            for chunk in self.tokens.chunks(batch) {
                let logits = forward(model, team, &mut state, chunk, Want::All)?;
                let mut bytes = Vec::with_capacity(model.config.vocab * 4);
                for row in logits.chunks(model.config.vocab) {
                    bytes.clear();
                    bytes.extend(row.iter().flat_map(|logit| logit.to_le_bytes()));
                    file.write_all(&bytes).map_err(failed)?;
                }
            }
            file.flush().map_err(failed)
        });
        Ok(written?)
    }
}

/// Measure how well a model predicts a text
#[derive(Args)]
#[command(
    after_help = "The text is cut into windows of --ctx tokens, each begun with <bos>; each token of the text is \
    predicted once. nll is the mean negative log-likelihood of a token in nats, ppl its exponential.\n\n\
    Example: gemrun eval ppl e2b --file story.txt --ctx 1024 --json"
)]
struct Ppl {
    /// Model name or path of a GGUF file
    model: OsString,
    /// The text; - is standard input
    #[arg(long, value_name = "TEXT")]
    file: PathBuf,
    /// Window length in tokens
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    ctx: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    compute: Compute,
}

impl Ppl {
    fn run(self) -> Result {
        let text = text::from_file(&self.file)?;
        let mut runner = Runner::new(&self.model, &self.threads, &self.compute, self.ctx)?;
        let tokens = runner.tokens(&text, self.ctx, &self.file)?;
        let mut nll = 0.0;
        let bar = progress(tokens.len());
        for window in windows(&tokens, self.ctx, runner.loaded.tokenizer.bos()) {
            runner.window(&window, |row, target| {
                nll -= LogProbs::new(row).of(target);
                bar.inc(1);
            })?;
        }
        bar.finish_and_clear();
        let nll = nll / tokens.len() as f64;
        let mut out = std::io::stdout().lock();
        match self.json {
            true => writeln!(out, "{}", json!({ "tokens": tokens.len(), "nll": nll, "ppl": nll.exp() }))?,
            false => writeln!(out, "perplexity {:.4} ({:.5} nats a token, {} tokens)", nll.exp(), nll, tokens.len())?,
        }
        Ok(out.flush()?)
    }
}

/// Measure how far a model is from another on a text
#[derive(Args)]
#[command(after_help = "KL is that of MODEL's next-token distribution from MODEL2's, in nats, over all tokens of the \
    text; top1 is how often both find the same token likeliest. Windows as in eval ppl. To compare two ways to compute \
    one model, name it twice: --act, --kv and --static apply to MODEL, --base-act and --base-kv to MODEL2.\n\n\
    Example: gemrun eval kl e2b --base e2b --base-act float --file story.txt")]
struct Kl {
    /// Model name or path of a GGUF file
    model: OsString,
    /// The model to compare with
    #[arg(long, value_name = "MODEL2")]
    base: OsString,
    /// As --act, for MODEL2
    #[arg(long, value_name = "MODE", default_value = "auto")]
    base_act: ActArg,
    /// As --kv, for MODEL2 [default: what --kv says]
    #[arg(long, value_name = "TYPE")]
    base_kv: Option<KvArg>,
    /// The text; - is standard input
    #[arg(long, value_name = "TEXT")]
    file: PathBuf,
    /// Window length in tokens
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    ctx: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    compute: Compute,
}

impl Kl {
    fn run(self) -> Result {
        let text = text::from_file(&self.file)?;
        let mut runner = Runner::new(&self.model, &self.threads, &self.compute, self.ctx)?;
        let base_compute = self.compute.with(self.base_act, self.base_kv);
        let mut base = Runner::new(&self.base, &self.threads, &base_compute, self.ctx)?;
        let tokens = runner.tokens(&text, self.ctx, &self.file)?;
        if tokens != base.tokens(&text, self.ctx, &self.file)? || runner.vocab() != base.vocab() {
            let (name, base) = (runner.loaded.gguf.name(), base.loaded.gguf.name());
            return Err(Error::usage(format!("{name} and {base}: vocabularies differ: expected equal ones")).into());
        }

        let mut divergences = Vec::with_capacity(tokens.len());
        let (mut nll, mut nll_base, mut agree) = (0.0, 0.0, 0usize);
        let bar = progress(tokens.len());
        for window in windows(&tokens, self.ctx, runner.loaded.tokenizer.bos()) {
            let mut rows = Vec::with_capacity(window.len() - 1);
            base.window(&window, |row, _| rows.push(row.to_vec()))?;
            let mut rows = rows.iter();
            runner.window(&window, |row, target| {
                let Some(base_row) = rows.next() else { return };
                let (p, q) = (LogProbs::new(base_row), LogProbs::new(row));
                divergences.push(p.kl_from(&q));
                nll -= q.of(target);
                nll_base -= p.of(target);
                agree += usize::from(argmax(row) == argmax(base_row));
                bar.inc(1);
            })?;
        }
        bar.finish_and_clear();

        let n = tokens.len() as f64;
        let mean = divergences.iter().sum::<f64>() / n;
        divergences.sort_by(f64::total_cmp);
        // The smallest value that at least 99 % of tokens do not exceed.
        let p99 = divergences[(divergences.len() * 99).div_ceil(100).saturating_sub(1)];
        let (top1, ppl, ppl_base) = (agree as f64 / n, (nll / n).exp(), (nll_base / n).exp());
        let mut out = std::io::stdout().lock();
        if self.json {
            let result = json!({
                "tokens": tokens.len(), "kl_mean": mean, "kl_p99": p99, "top1": top1, "ppl": ppl, "ppl_base": ppl_base,
            });
            writeln!(out, "{result}")?;
        } else {
            writeln!(out, "tokens      {}", tokens.len())?;
            writeln!(out, "KL mean     {mean:.6} nats")?;
            writeln!(out, "KL 99 %     {p99:.6} nats")?;
            writeln!(out, "same top-1  {:.2} %", top1 * 100.0)?;
            writeln!(out, "perplexity  {ppl:.4}, base {ppl_base:.4}, ratio {:.5}", ppl / ppl_base)?;
        }
        Ok(out.flush()?)
    }
}

/// A loaded model and what it takes to run it over windows of text.
struct Runner {
    loaded: Loaded,
    team: Team,
    kv: KvType,
    batch: usize,
}

impl Runner {
    /// For windows of `context` tokens.
    fn new(model: &OsString, threads: &Threads, compute: &Compute, context: usize) -> gemrun::Result<Runner> {
        let (batch, threads) = (compute.batch()?, threads.take()?);
        let loaded = compute.load(model)?;
        let kv = compute.kv().unwrap_or(KvType::F32);
        let batch = batch.unwrap_or(loaded.model.batch());
        compute.check_fit(&loaded, kv, context.clamp(1, loaded.model.config.context), batch)?;
        Ok(Runner { loaded, team: Team::new(threads)?, kv, batch })
    }

    fn vocab(&self) -> usize {
        self.loaded.model.config.vocab
    }

    /// The tokens of `text`, taken as plain text; checks that there are any and that windows of `ctx` are possible.
    fn tokens(&self, text: &str, ctx: usize, file: &std::path::Path) -> gemrun::Result<Vec<u32>> {
        if ctx < 2 {
            return Err(Error::usage(format!("ctx: {ctx}: expected at least 2, <bos> and a token")));
        }
        check_context(&self.loaded.model, ctx, &format!("ctx: {ctx}"))?;
        let tokens = Tokenizer::encode(&self.loaded.tokenizer, text, false);
        match tokens.is_empty() {
            true => Err(Error::usage(format!("{}: empty: expected text", file.display()))),
            false => Ok(tokens),
        }
    }

    /// Calls `each` with the logits before each token of `window` but the first, and that token.
    fn window(&mut self, window: &[u32], each: impl FnMut(&[f32], u32)) -> gemrun::Result<()> {
        predict(self.loaded.gguf.name(), &self.loaded.model, &mut self.team, (self.kv, self.batch), window, each)
    }
}

fn check_context(model: &Model, tokens: usize, what: &str) -> gemrun::Result<()> {
    match tokens <= model.config.context {
        true => Ok(()),
        false => Err(Error::usage(format!("{what}: expected at most {}, the model's context", model.config.context))),
    }
}

/// A bar on standard error, if that is a terminal.
fn progress(tokens: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{pos}/{len} tokens {wide_bar} {eta}");
    ProgressBar::new(tokens as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
