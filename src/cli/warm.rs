//! `gemrun warm`: a document read once, for all the conversations that begin with it.

use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use gemrun::chats::Chats;
use gemrun::facts;
use gemrun::kv::disk;
use gemrun::session::{self, Event, Options, Overflow, Session};
use gemrun::template::Template;
use xxhash_rust::xxh3::xxh3_64;

use super::keep::budget;
use super::open::{Compute, Threads};
use super::page_in::page_in;
use super::run::{Wait, interrupt_flag};
use super::terminal::eprintln_quietly;
use super::{Result, memory, text};

/// Read a document once, so that asking about it begins at once
#[derive(Args)]
#[command(
    after_help = "What the model makes of the document is kept in GEMRUN_HOME, within the budget of conversations \
    (GEMRUN_CHATS_BUDGET). run --file FILE and /read FILE find it there, if model, --kv, system prompt and facts are the same.\n\n\
    Example:\n  \
    gemrun warm e2b manual.txt\n  \
    gemrun run e2b --file manual.txt \"How do I reset it?\""
)]
pub struct Warm {
    /// Model name or path of a GGUF file
    model: OsString,
    /// The document, UTF-8 text
    file: PathBuf,
    /// System prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Without the facts that gemrun memory lists
    #[arg(long)]
    no_memory: bool,
    /// Tokens of conversation to hold [default: as run]
    #[arg(short, long, value_name = "N")]
    ctx: Option<usize>,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    compute: Compute,
}

impl Warm {
    pub fn run(self) -> Result {
        let (batch, threads) = (self.compute.batch()?, self.threads.take()?);
        let (home, budget) = (memory::home()?, budget()?);
        let document = text::from_file(&self.file)?;
        let known = if self.no_memory { Vec::new() } else { facts::read(&home)? };
        let interrupt = interrupt_flag()?;
        let loaded = self.compute.load(&self.model)?;
        let batch = batch.unwrap_or(loaded.model.batch());
        let kv = self.compute.kv_or_usual(&loaded.model.config);
        let context = self.ctx.unwrap_or_else(|| self.compute.context(&loaded, kv, batch));
        self.compute.check_fit(&loaded, kv, context.min(loaded.model.config.context), batch)?;
        let options = Options {
            context,
            batch,
            kv,
            threads,
            sampling: session::recommended(&loaded.gguf)?,
            ignore_stops: false,
            think: false,
            think_budget: None,
            tools: Vec::new(),
            schema: None,
            system: facts::system_prompt(self.system.as_deref(), &known),
            overflow: Overflow::Stop,
        };
        page_in(&loaded.model, &interrupt);
        let template = Template::from_gguf(&loaded.gguf)?;
        let mut session = Session::new(&loaded.model, &loaded.tokenizer, Some(template), options)?;
        let chats = Chats::new(&home);
        let source = self.compute.identity(&loaded)?;
        session.identify(&source, chats.caches());

        let start = Instant::now();
        let tokens = session.document_tokens(&document)?;
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let name = format!("{:016x}-{}", xxh3_64(&[source.as_bytes(), &bytes].concat()), kv.name());
        let folder = chats.prefix(&name)?;
        session.keep_in(&folder)?;
        let mut wait = Wait::new();
        let mut on = |event: Event| {
            wait.on(&event);
            ControlFlow::Continue(())
        };
        let read = session.read_document(&document, &interrupt, &mut on);
        wait.done();
        let usage = read?;
        session.save()?;
        let seconds = start.elapsed().as_secs_f64();
        let megabytes = disk::usage(&folder).map_or(0.0, |(bytes, _)| bytes as f64 / 1e6);
        let (tokens, file) = (usage.prompt, gemrun::error::printable(&self.file.to_string_lossy()));
        let new = tokens - usage.reused;
        eprintln_quietly(format_args!(
            "{file}: {tokens} tokens, {new} of them read now in {seconds:.1} s; kept in {megabytes:.1} MB"
        ));
        chats.trim(budget, Some(&folder));
        Ok(())
    }
}
