//! `gemrun run`: one answer, or a chat.
//!
//! With a prompt (argument, piped input, or both) it answers once: standard output is the answer and a line feed,
//! nothing else. Without one it is a chat, see `chat.rs`.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use gemrun::Error;
use gemrun::chats::{Chats, Opened, is_name};
use gemrun::facts;
use gemrun::kv::KvType;
use gemrun::machine;
use gemrun::registry::{self, Source};
use gemrun::sample::{Sampling, random_seed};
use gemrun::session::{self, Event, Options, Overflow, Session, Usage};
use gemrun::template::Template;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use xxhash_rust::xxh3::xxh3_64;

use super::format::{Format, Wanted, whole};
use super::keep::Keep;
use super::open::{Compute, Loaded, Threads};
use super::page_in::page_in;
use super::screen::Page;
use super::terminal::{Shown, Style, eprintln_quietly};
use super::think::Thinking;
use super::tools::{ToolFlags, Tools};
use super::{Result, chat, chats, keep, pull, text};

/// Chat with a model, or answer one prompt
#[derive(Args)]
#[command(after_help = "With PROMPT, or with piped input, the model answers once. With both, the input follows the \
    prompt after a blank line. Chats are saved as they go on; -C continues one, at once.\n\n\
    Tokens are chosen in this order: never-sampled tokens are masked, repetition penalty (over the last 64 tokens), \
    top-k, top-p, min-p, temperature, draw. The same file, prompt, flags and seed give the same text on every \
    computer.\n\n\
    Examples:\n  \
    gemrun run demo\n  \
    gemrun run demo \"Once upon a time\" --seed 7\n  \
    gemrun run -C\n  \
    git diff | gemrun run e2b \"Write a commit message, one line\"")]
pub struct Run {
    /// Model name or path of a GGUF file; with -C that of the conversation is the default
    #[arg(required_unless_present = "resume")]
    model: Option<OsString>,
    /// What to ask; without it, chat
    prompt: Option<OsString>,
    /// Continue the last conversation, or the one called ID (see gemrun chats), with its settings
    #[arg(short = 'C', long = "continue", value_name = "ID", num_args = 0..=1)]
    resume: Option<Option<OsString>>,
    /// Begin a new conversation, as without -C
    #[arg(long, overrides_with = "resume")]
    new: bool,
    /// Keep nothing of the conversation
    #[arg(long, conflicts_with = "resume")]
    no_save: bool,
    /// Without the facts that gemrun memory lists
    #[arg(long)]
    no_memory: bool,
    /// Begin with the text in FILE; gemrun warm has it read beforehand
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// When the context is full: stop, shift (leave out the oldest turns), or compact (have the model sum them up first)
    #[arg(long, value_name = "WHAT", default_value = "shift")]
    overflow: OnOverflow,
    /// Generate at most N tokens a reply [default: until the context is full]
    #[arg(short = 'n', long, value_name = "N")]
    predict: Option<usize>,
    /// Temperature; 0 always takes the likeliest token [default: the file's, else 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    temp: Option<f32>,
    /// Choose among the K likeliest tokens; 0 is all [default: the file's, else 64]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the likeliest tokens that together have probability P [default: the file's, else 0.95]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Leave out tokens less than P times as likely as the likeliest [default: the file's, else 0]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Divide the logits of recent tokens by X; 1 is off [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repeat_penalty: Option<f32>,
    /// Seed of the random choices [default: a new one each time, shown by --stats]
    #[arg(short, long, value_name = "N")]
    seed: Option<u64>,
    /// Tokens of conversation to hold [default: 32768, or less where the model or memory have no room]
    #[arg(short, long, value_name = "N")]
    ctx: Option<usize>,
    /// System prompt
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    thinking: Thinking,
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    tools: ToolFlags,
    /// No chat template: continue the prompt as it is, after <bos>; markers such as <|turn> in it count as markers
    #[arg(long)]
    raw: bool,
    /// Show text as it comes, without Markdown's looks and line breaks
    #[arg(long)]
    plain: bool,
    /// Never choose a token that ends the reply
    #[arg(long)]
    ignore_eos: bool,
    /// Print figures as one line of JSON on standard error at the end
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    threads: Threads,
    #[command(flatten)]
    compute: Compute,
}

/// `--overflow`.
#[derive(Clone, Copy, ValueEnum)]
enum OnOverflow {
    Stop,
    Shift,
    Compact,
}

impl Run {
    /// Whether a conversation is continued.
    pub fn goes_on(arguments: &clap::ArgMatches) -> bool {
        arguments.value_source("resume").is_some()
    }

    pub fn run(self) -> Result {
        let start = Instant::now();
        let asked = self.asked()?;
        let document = self.file.as_deref().map(text::from_file).transpose()?;
        let prompt = &asked.prompt;
        if self.raw && document.is_some() {
            return Err(Error::usage("raw: expected no --file: a prompt as it is has no parts").into());
        }
        if self.raw && prompt.is_none() {
            return Err(Error::usage("raw: expected a prompt: --raw has no chat").into());
        }
        let (batch, threads) = (self.compute.batch()?, self.threads.take()?);
        self.sampling(Sampling::default()).check()?;
        let (wanted, tools) = (self.format.read()?, self.tools.read()?);
        if self.raw && !tools.declarations().is_empty() {
            return Err(Error::usage("raw: with tools: expected a chat template to declare them").into());
        }
        if self.ignore_eos && !matches!(wanted, Wanted::Text) {
            return Err(Error::usage("ignore-eos: with JSON: expected an answer that can end").into());
        }
        let interrupt = interrupt_flag()?;

        if let Some(name) = asked.model.to_str() {
            pull::offer(name, &self.compute, &interrupt)?;
        }
        let loaded = self.compute.load(&asked.model)?;
        let batch = batch.unwrap_or(loaded.model.batch());
        // What is not said anew is as the conversation began.
        let before = asked.opened.as_ref().and_then(|(_, opened)| Some(&opened.chat().header()?.settings));
        let kv = self.compute.kv().or_else(|| KvType::of_name(&before?.kv));
        let kv = kv.unwrap_or_else(|| self.compute.kv_or_usual(&loaded.model.config));
        let context = self.ctx.or_else(|| Some(before?.context.min(loaded.model.config.context)));
        let context = context.unwrap_or_else(|| self.compute.context(&loaded, kv, batch));
        self.compute.check_fit(&loaded, kv, context.min(loaded.model.config.context), batch)?;
        let usual = match before {
            Some(before) => before.sampling,
            None => Sampling { seed: random_seed(), ..session::recommended(&loaded.gguf)? },
        };
        let sampling = self.sampling(usual);
        sampling.check()?;
        let options = Options {
            context,
            batch,
            kv,
            threads,
            sampling,
            ignore_stops: self.ignore_eos,
            think: self.thinking.on(),
            think_budget: self.thinking.budget(),
            tools: tools.declarations().to_vec(),
            schema: wanted.compile(&loaded.tokenizer)?,
            system: None,
            overflow: match self.overflow {
                OnOverflow::Stop => Overflow::Stop,
                OnOverflow::Shift => Overflow::Shift,
                OnOverflow::Compact => Overflow::Compact,
            },
        };
        let template = if self.raw { None } else { Some(Template::from_gguf(&loaded.gguf)?) };
        page_in(&loaded.model, &interrupt);
        let template_key = template.as_ref().map(|template| xxh3_64(template.source().as_bytes()));
        let mut session = Session::new(&loaded.model, &loaded.tokenizer, template, options)?;
        let chats = registry::home().map(|home| Chats::new(&home));
        let source = self.compute.identity(&loaded)?;
        if let (false, Some(chats)) = (self.raw, &chats) {
            session.identify(&source, chats.caches().into_iter().take(CACHES).collect());
        }
        let chats = chats.filter(|_| !self.no_save);
        let template_key = format!("{:016x}", template_key.unwrap_or(0));
        let mut keep = Keep::new(chats, model_name(&asked.model), source, template_key)?;
        let home = registry::home().filter(|_| !self.no_memory && !self.raw);
        keep.instruct(&mut session, self.system.clone(), home.map_or(Ok(Vec::new()), |home| facts::read(&home))?);
        let name = registry_name(&asked.model);
        if let Some((id, opened)) = asked.opened {
            let resumed = keep.resume(&id, opened, &mut session)?;
            if let Some(seed) = self.seed {
                session.set_seed(seed);
            }
            if prompt.is_none() {
                eprintln_quietly(format_args!("{}", resumed.line(keep.id().unwrap_or(&id))));
            }
            if let Some(system) = &self.system {
                keep.set_system(&mut session, Some(system.clone()));
            }
        }
        if !self.raw {
            self.thinking.settle(&mut session)?;
        }
        let limit = self.predict.unwrap_or(usize::MAX);
        let mut talk = Talk {
            session,
            loaded: &loaded,
            interrupt,
            limit,
            hide_thinking: self.thinking.hidden(),
            tools,
            plain: self.plain || self.raw || !matches!(wanted, Wanted::Text),
            totals: Usage::default(),
            last_end: None,
            keep,
            memory: !self.no_memory,
            notes: document.into_iter().collect(),
            sent: Vec::new(),
        };
        let result = match prompt {
            Some(prompt) => once(&mut talk, prompt, self.raw),
            None => chat::chat(&mut talk, &name),
        };
        if self.stats {
            eprintln_quietly(format_args!("{}", talk.stats(self.compute.act(), start.elapsed())));
        }
        result
    }

    /// What the arguments mean together.
    fn asked(&self) -> Result<Asked> {
        let (mut model, mut prompt) = (self.model.clone(), self.prompt.clone());
        let mut id = self.resume.clone().flatten();
        if self.resume.is_some() && prompt.is_none() {
            // `run -C "and then?"`, `run -C ID "and then?"`: what has spaces in it is something to say.
            let says = |word: &OsString| !is_name(word) && !Path::new(word).exists();
            prompt = match id.take_if(|id| says(id)) {
                Some(said) => Some(said),
                None => model.take_if(|model| says(model)),
            };
        }
        if self.resume.is_none() {
            return match model {
                Some(model) => Ok(Asked { model, prompt: Run::prompt(prompt.as_ref())?, opened: None }),
                None => Err(Error::usage("model: expected a name or a path").into()),
            };
        }
        let saved = chats::saved()?;
        let id = match id {
            Some(id) => saved.find(&text::from_argument("continue", &id)?)?,
            None => saved.newest(model.as_ref().map(model_name).as_deref()).ok_or_else(|| {
                let of = model.as_ref().map(|model| format!(" with {}", model_name(model))).unwrap_or_default();
                Error::new(gemrun::Kind::NotFound, format!("no conversation{of} to continue: gemrun chats lists them"))
            })?,
        };
        let opened = saved.open(&id)?;
        let model = match (model, opened.chat().header()) {
            (Some(model), _) => model,
            (None, Some(header)) => OsString::from(&header.model),
            (None, None) => {
                return Err(Error::usage(format!("{id}: does not say with which model: expected one beside -C")).into());
            }
        };
        Ok(Asked { model, prompt: Run::prompt(prompt.as_ref())?, opened: Some((id, opened)) })
    }

    /// The prompt, if there is one: the argument, piped standard input, or one after the other.
    fn prompt(argument: Option<&OsString>) -> Result<Option<String>> {
        let prompt = match argument {
            Some(prompt) => {
                let argument = text::from_argument("prompt", prompt)?;
                match text::piped_beside_prompt()? {
                    Some(piped) if !piped.is_empty() => Some(format!("{argument}\n\n{piped}")),
                    _ => Some(argument),
                }
            }
            None if std::io::stdin().is_terminal() => None,
            None => Some(text::from_stdin()?),
        };
        match prompt {
            Some(prompt) if prompt.trim().is_empty() => Err(Error::usage("prompt: empty: expected text").into()),
            prompt => Ok(prompt),
        }
    }

    /// `base` with what the flags say.
    fn sampling(&self, base: Sampling) -> Sampling {
        Sampling {
            temperature: self.temp.unwrap_or(base.temperature),
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repeat_penalty: self.repeat_penalty.unwrap_or(base.repeat_penalty),
            seed: self.seed.unwrap_or(base.seed),
        }
    }
}

/// Caches that are looked into for what a conversation begins with.
const CACHES: usize = 64;

/// What the arguments mean together.
struct Asked {
    model: OsString,
    prompt: Option<String>,
    /// The conversation to continue and its name.
    opened: Option<(String, Opened)>,
}

/// A model argument as it means the same in any folder.
fn model_name(model: &OsString) -> String {
    let path = matches!(super::open::source(model), Ok(Source::File(_))) && Path::new(model).exists();
    let absolute = std::path::absolute(model).ok().filter(|_| path);
    absolute.map_or_else(|| model.to_string_lossy().into_owned(), |path| path.to_string_lossy().into_owned())
}

/// What to call the model at the chat prompt: its name, or the file's without folder and extension.
fn registry_name(model: &OsString) -> String {
    let stem = std::path::Path::new(model).file_stem().unwrap_or(model);
    gemrun::error::printable(&stem.to_string_lossy()).chars().take(24).collect()
}

/// A session and what surrounds it.
pub struct Talk<'m> {
    pub session: Session<'m>,
    pub loaded: &'m Loaded,
    pub interrupt: Arc<AtomicBool>,
    pub limit: usize,
    pub hide_thinking: bool,
    /// Whether answers are shown as they come.
    pub plain: bool,
    pub tools: Tools,
    pub totals: Usage,
    pub last_end: Option<session::End>,
    pub keep: Keep,
    /// Whether conversations begin with what is remembered.
    pub memory: bool,
    /// What the next message begins with: documents, facts, excerpts.
    pub notes: Vec<String>,
    /// What the last message began with.
    pub sent: Vec<String>,
}

impl Talk<'_> {
    /// Begins a new conversation: nothing of the old one is left but the system prompt.
    pub fn begin_anew(&mut self) {
        self.session.clear();
        self.notes.clear();
        self.sent.clear();
        self.keep.end(&mut self.session);
        let home = registry::home().filter(|_| self.memory);
        let facts = home.and_then(|home| facts::read(&home).ok()).unwrap_or_default();
        let system = self.keep.instructions().0.map(str::to_string);
        self.keep.instruct(&mut self.session, system, facts);
    }

    /// Runs what `reply` calls and has the model go on, until nothing more is to be run.
    pub fn go_on(
        &mut self,
        mut reply: session::Reply,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> gemrun::Result<session::Reply> {
        let mut round = 0;
        while let Some(results) = self.tools.results(&reply, round, &self.interrupt) {
            self.count(&reply);
            let next = self.session.reply_to_calls(&results, self.limit, &self.interrupt, on);
            // What the tools returned is said, whatever becomes of the reply.
            self.keep.turn(&self.session, next.as_ref().unwrap_or(&reply), Some(1));
            reply = next?;
            round += 1;
        }
        Ok(reply)
    }

    /// Adds a reply to the figures of `--stats`.
    pub fn count(&mut self, reply: &session::Reply) {
        let (totals, usage) = (&mut self.totals, &reply.usage);
        if totals.first_token.is_zero() {
            totals.first_token = usage.first_token;
        }
        totals.prompt += usage.prompt;
        totals.reused += usage.reused;
        totals.generated += usage.generated;
        totals.tokenize_time += usage.tokenize_time;
        totals.prompt_time += usage.prompt_time;
        totals.decode_time += usage.decode_time;
        totals.decoded += usage.decoded;
        self.last_end = Some(reply.end);
    }

    fn stats(&self, act: &str, total: Duration) -> serde_json::Value {
        let (totals, options) = (&self.totals, self.session.options());
        json!({
            "model": self.loaded.gguf.name(),
            "seed": options.sampling.seed,
            "prompt_tokens": totals.prompt,
            "reused_tokens": totals.reused,
            "restored_tokens": self.session.restored().0,
            "generated_tokens": totals.generated,
            "end": self.last_end.map(session::End::name),
            "seconds": {
                "map": self.loaded.times.map.as_secs_f64(),
                "load": self.loaded.times.load.as_secs_f64(),
                "restore": self.session.restored().1.as_secs_f64(),
                "tokenize": totals.tokenize_time.as_secs_f64(),
                "prefill": totals.prompt_time.as_secs_f64(),
                "first_token": totals.first_token.as_secs_f64(),
                "decode": totals.decode_time.as_secs_f64(),
                "total": total.as_secs_f64(),
            },
            "prompt_tok_s": totals.prompt_speed(),
            "tok_s": totals.decode_speed(),
            "context": options.context,
            "kv": options.kv.name(),
            "act": act,
            "threads": options.threads,
            "kernels": self.loaded.model.kernels(),
            "packed": self.loaded.model.packed(),
            "peak_rss_bytes": machine::peak_rss(),
        })
    }
}

/// Answers `prompt` on standard output.
fn once(talk: &mut Talk, prompt: &str, raw: bool) -> Result {
    let mut out = std::io::stdout().lock();
    let shown = Shown::stdout();
    let mut page = Page::new(talk.plain);
    let style = Style::stderr();
    let show_thoughts = !talk.hide_thinking && std::io::stderr().is_terminal();
    let mut thinking = false;
    let runs_tools = talk.tools.run();
    let mut before: Option<bool> = None; // was what was printed last a tool call?
    let mut wait = Wait::new();
    let mut written = Ok(());
    let mut on = |event: Event| {
        wait.on(&event);
        match event {
            Event::Prompt { .. } => {}
            Event::Note(note) => eprintln_quietly(format_args!("note: {note}")),
            Event::Thought(thought) if show_thoughts => {
                let _ = write!(std::io::stderr(), "{}{}{}", style.dim(), terminal_text(thought), style.plain());
                thinking = true;
            }
            Event::Thought(_) => {}
            // A call that is run is no part of the answer.
            Event::ToolCall { name, arguments } if runs_tools => {
                let line = terminal_text(&tool_call(name, arguments));
                let end = if std::mem::take(&mut thinking) { "\n\n" } else { "" };
                eprintln_quietly(format_args!("{end}{}{line}{}", style.dim(), style.plain()));
                before = before.map(|_| true);
            }
            Event::Answer(_) | Event::ToolCall { .. } => {
                if std::mem::take(&mut thinking) {
                    eprintln_quietly(format_args!("\n"));
                }
                let (text, call) = match event {
                    Event::ToolCall { name, arguments } => {
                        (page.end() + gap(before, true) + &shown.text(&tool_call(name, arguments)), true)
                    }
                    Event::Answer(answer) => (gap(before, false).to_string() + &page.answer(answer), false),
                    Event::Prompt { .. } | Event::Note(_) | Event::Thought(_) => return ControlFlow::Continue(()),
                };
                before = Some(call);
                written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            }
        }
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let message = with_notes(&talk.notes, prompt);
    let reply = match raw {
        true => talk.session.complete(prompt, talk.limit, &talk.interrupt, &mut on),
        false => talk.session.reply(&message, talk.limit, &talk.interrupt, &mut on),
    };
    let reply = reply.and_then(|reply| {
        if reply.answered() {
            talk.keep.turn(&talk.session, &reply, None);
        }
        talk.go_on(reply, &mut on)
    });
    wait.done();
    let reply =
        reply.map_err(|e| if e.kind() == gemrun::Kind::Invalid { e.within(talk.loaded.gguf.name()) } else { e })?;
    talk.count(&reply);
    written?;
    writeln!(out, "{}", page.end())?;
    out.flush()?;
    keep::tell(&mut talk.session);
    if reply.answered() {
        talk.keep.left_out(&talk.session);
        talk.keep.save(&mut talk.session);
    }
    if talk.session.options().schema.is_some() {
        whole(&reply)?;
    }
    match reply.end {
        session::End::Interrupted => Err(super::interrupted()),
        session::End::Context => {
            let context = talk.session.options().context;
            eprintln_quietly(format_args!("note: the context of {context} tokens is full; see --ctx"));
            Ok(())
        }
        session::End::Stop | session::End::Length => Ok(()),
    }
}

/// A message that begins with notes.
pub fn with_notes(notes: &[String], message: &str) -> String {
    notes.iter().rev().fold(message.to_string(), |message, note| session::before(note, &message))
}

/// What stands between two parts of an answer: a call has a line to itself.
fn gap(before_call: Option<bool>, call: bool) -> &'static str {
    if before_call.is_some_and(|before_call| call || before_call) { "\n" } else { "" }
}

/// A tool call as one line of JSON.
pub fn tool_call(name: &str, arguments: &serde_json::Value) -> String {
    json!({ "tool_call": { "name": name, "arguments": arguments } }).to_string()
}

/// `text` as a terminal may get it, whatever standard output is.
fn terminal_text(text: &str) -> String {
    Shown::terminal().text(text)
}

/// A progress bar for prompts that take longer than people like to wait without a sign.
pub struct Wait {
    shown: Option<Shower>,
}

/// The bar, hidden at first, and the thread that shows it when patience ends.
struct Shower {
    bar: ProgressBar,
    /// Dropped to end the thread.
    done: mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

/// Shorter prompts show no bar.
const PATIENCE: Duration = Duration::from_millis(500);

impl Wait {
    pub fn new() -> Wait {
        Wait { shown: None }
    }

    /// Starts waiting, moves the bar or removes it.
    pub fn on(&mut self, event: &Event) {
        match *event {
            Event::Prompt { done, total } if done < total => {
                let shown = self.shown.get_or_insert_with(|| Shower::new(total));
                shown.bar.set_position(done as u64);
            }
            _ => self.done(),
        }
    }

    /// Removes the bar.
    pub fn done(&mut self) {
        if let Some(Shower { bar, done, thread }) = self.shown.take() {
            drop(done);
            let _ = thread.join();
            bar.finish_and_clear();
        }
    }
}

impl Shower {
    fn new(total: usize) -> Shower {
        let style = ProgressStyle::with_template("reading the prompt {pos}/{len} {wide_bar} {eta}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::hidden()).with_style(style);
        let (done, waiting) = mpsc::channel();
        let hidden = bar.clone();
        let thread = std::thread::spawn(move || {
            if waiting.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                hidden.set_draw_target(ProgressDrawTarget::stderr());
                hidden.tick();
            }
        });
        Shower { bar, done, thread }
    }
}

/// The flag that Ctrl-C sets, the same for the whole program. While it is set, another Ctrl-C ends the program at once.
pub fn interrupt_flag() -> Result<Arc<AtomicBool>> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    if let Some(flag) = FLAG.get() {
        return Ok(Arc::clone(flag));
    }
    let flag = Arc::new(AtomicBool::new(false));
    let sigint = signal_hook::consts::SIGINT;
    // Order matters: the first Ctrl-C must find the flag unset when this one looks at it.
    let registered = signal_hook::flag::register_conditional_shutdown(sigint, 130, Arc::clone(&flag))
        .and_then(|_| signal_hook::flag::register(sigint, Arc::clone(&flag)));
    match registered {
        Ok(_) => Ok(Arc::clone(FLAG.get_or_init(|| flag))),
        Err(error) => Err(Error::new(gemrun::Kind::Other, format!("cannot listen for Ctrl-C: {error}")).into()),
    }
}

/// Forgets a Ctrl-C that has been acted upon.
pub fn reset(flag: &AtomicBool) {
    flag.store(false, Ordering::SeqCst);
}

/// Where the chat's input history is kept.
pub fn history_file() -> Option<std::path::PathBuf> {
    Some(registry::home()?.join("history.txt"))
}
