//! One conversation: messages, the tokens the cache holds, and the sampler.
//!
//! Every reply renders the whole message list with the file's own template and compares the result with the tokens
//! in the cache: what both begin with is kept, the rest is forgotten and computed anew. So undoing, editing the
//! system prompt and continuing are one mechanism, and a reply never depends on how the cache came to be. What files on the
//! disk hold of such tokens is taken from there ([`crate::kv::disk`]): own ones, or those of other conversations.
//! Generation stops at a stop token, a limit, the end of the context, or when asked to; the conversation stays usable
//! in every case. Showing text to people is the caller's business.

mod overflow;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::channel::{self, Channel, Place};
use crate::forward::{State, Want, forward};
use crate::gguf::Gguf;
use crate::guide::{Guide, Next, Rules, Schema};
use crate::kv::KvType;
use crate::kv::disk::{Key, Saved, common};
use crate::model::Model;
use crate::sample::{Sampler, Sampling};
use crate::team::Team;
use crate::template::{self, Template};
use crate::tokenizer::{Decoder, Tokenizer};
use crate::{Error, Result};

pub use overflow::Overflow;

/// How a conversation is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Positions the conversation may fill, at most what the model was made for.
    pub context: usize,
    /// Prompt tokens computed at once.
    pub batch: usize,
    /// How keys and values are stored.
    pub kv: KvType,
    /// Threads to compute with.
    pub threads: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Never choose a stop token.
    pub ignore_stops: bool,
    /// Ask the model to think before it answers.
    pub think: bool,
    /// Tokens of thought at most; then the thought is closed and the answer begins.
    pub think_budget: Option<usize>,
    /// Declarations of tools the model may call, in OpenAI's form.
    pub tools: Vec<Value>,
    /// What every answer must be.
    pub schema: Option<Schema>,
    /// The system prompt.
    pub system: Option<String>,
    /// What happens when the context is full.
    pub overflow: Overflow,
}

/// Progress of a reply.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event<'a> {
    /// So many of the prompt's new tokens have been computed; the first event of a reply says none.
    Prompt {
        /// Tokens computed.
        done: usize,
        /// Tokens to compute.
        total: usize,
    },
    /// What happens to the conversation, for people.
    Note(&'a str),
    /// More of the answer.
    Answer(&'a str),
    /// More of the model's thoughts.
    Thought(&'a str),
    /// The model wants a tool to be run.
    ToolCall {
        /// The tool.
        name: &'a str,
        /// An object.
        arguments: &'a Value,
    },
}

impl<'a> From<channel::Event<'a>> for Event<'a> {
    fn from(event: channel::Event<'a>) -> Event<'a> {
        match event {
            channel::Event::Answer(text) => Event::Answer(text),
            channel::Event::Thought(text) => Event::Thought(text),
            channel::Event::ToolCall { name, arguments } => Event::ToolCall { name, arguments },
        }
    }
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model was done.
    Stop,
    /// The token limit.
    Length,
    /// The context is full.
    Context,
    /// The caller asked for it.
    Interrupted,
}

impl End {
    /// `stop`, `length`, `context`, `interrupted`.
    pub fn name(self) -> &'static str {
        match self {
            End::Stop => "stop",
            End::Length => "length",
            End::Context => "context",
            End::Interrupted => "interrupted",
        }
    }
}

/// A finished reply.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The answer without thoughts and markers.
    pub answer: String,
    /// What the model thought.
    pub thought: String,
    /// The tools it wants to be run; [`Session::reply_to_calls`] goes on with what they returned.
    pub calls: Vec<Call>,
    /// Why it ended.
    pub end: End,
    /// What it cost.
    pub usage: Usage,
}

impl Reply {
    /// Whether anything was answered; else the message was taken back.
    pub fn answered(&self) -> bool {
        self.usage.generated > 0 || self.end != End::Interrupted
    }
}

/// A tool call.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The tool.
    pub name: String,
    /// An object.
    pub arguments: Value,
}

/// Tokens and times of a reply.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// Tokens of the prompt, whole conversation included.
    pub prompt: usize,
    /// Of those, tokens that were in the cache already.
    pub reused: usize,
    /// Tokens generated, thoughts included, a stop token not.
    pub generated: usize,
    /// Making tokens of the messages.
    pub tokenize_time: Duration,
    /// Computing the new tokens of the prompt.
    pub prompt_time: Duration,
    /// From the request to the first token.
    pub first_token: Duration,
    /// Tokens computed one at a time: the generated ones but those from which nothing followed.
    pub decoded: usize,
    /// Computing them and choosing what follows.
    pub decode_time: Duration,
}

impl Usage {
    /// Prompt tokens computed per second; 0 where nothing was computed.
    pub fn prompt_speed(&self) -> f64 {
        per_second(self.prompt - self.reused, self.prompt_time)
    }

    /// Tokens generated per second, after the first one, which comes with the prompt.
    pub fn decode_speed(&self) -> f64 {
        per_second(self.decoded, self.decode_time)
    }
}

/// `count / time`, 0 where there was nothing to do.
fn per_second(count: usize, time: Duration) -> f64 {
    if count == 0 || time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

/// The sampling parameters a file recommends (`general.sampling.*`), else Gemma 4's.
pub fn recommended(gguf: &Gguf) -> Result<Sampling> {
    let mut sampling = Sampling::default();
    let number = |key: &str| match gguf.get(key).and_then(|value| value.as_int()) {
        Some(int) => Ok(Some(int as f32)),
        None => gguf.float(key),
    };
    if let Some(temperature) = number("general.sampling.temp")? {
        sampling.temperature = temperature;
    }
    if let Some(top_p) = number("general.sampling.top_p")? {
        sampling.top_p = top_p;
    }
    if let Some(min_p) = number("general.sampling.min_p")? {
        sampling.min_p = min_p;
    }
    if let Some(top_k) = gguf.uint("general.sampling.top_k")? {
        sampling.top_k = usize::try_from(top_k).unwrap_or(0);
    }
    sampling.check().map_err(|e| Error::invalid(format!("{}: general.sampling: {e}", gguf.name())))?;
    Ok(sampling)
}

/// A message about a document: what was read stays the same whatever is asked of it.
pub fn before(document: &str, question: &str) -> String {
    format!("{}\n\n{question}", document.trim_end())
}

/// Counts the changes to the arithmetic by which any bit of a key or value became another: caches of another count are computed anew.
const NUMERICS: u32 = 1;

/// A conversation with a model.
pub struct Session<'m> {
    model: &'m Model,
    tokenizer: &'m Tokenizer,
    template: Option<Template>,
    team: Team,
    state: State,
    sampler: Sampler,
    options: Options,
    /// The tokens whose keys and values are in the cache.
    held: Vec<u32>,
    /// Messages of user, assistant and tools, as the template wants them.
    messages: Vec<Value>,
    /// The first of them that the model is shown.
    first: usize,
    /// What it is shown instead of those before.
    summary: Option<String>,
    /// What the cache is of, once that was said.
    key: Option<Key>,
    /// Where the cache is kept.
    saved: Option<Saved>,
    /// Folders whose files may begin with the same tokens.
    others: Vec<PathBuf>,
    /// Positions worth returning to.
    marks: Vec<usize>,
    /// What people should be told.
    notes: Vec<String>,
    /// Tokens that came back from files, and how long that took.
    restored: (usize, Duration),
}

/// Prompt tokens that are computed rather than looked for in files.
const FEW: usize = 16;

/// Tokens of a reply after which the cache is saved, so that the place where the reply began stays reachable: sliding layers soon
/// forget it.
const LONG_REPLY: usize = 256;

impl<'m> Session<'m> {
    /// An empty conversation. Without a template only [`Session::complete`] works.
    pub fn new(
        model: &'m Model,
        tokenizer: &'m Tokenizer,
        template: Option<Template>,
        options: Options,
    ) -> Result<Session<'m>> {
        let trained = model.config.context;
        if !(1..=trained).contains(&options.context) {
            let error = format!("context: {}: expected 1 to {trained}, what the model was made for", options.context);
            return Err(Error::usage(error));
        }
        let stops = if options.ignore_stops { tokenizer.stop_tokens() } else { &[] };
        let masked = tokenizer.never_sample().iter().chain(stops).chain(&model.config.suppress);
        Ok(Session {
            team: Team::new(options.threads)?,
            state: State::new(model, options.kv, options.context, options.batch)?,
            sampler: Sampler::new(options.sampling, masked.copied())?,
            model,
            tokenizer,
            template,
            options,
            held: Vec::new(),
            messages: Vec::new(),
            first: 0,
            summary: None,
            key: None,
            saved: None,
            others: Vec::new(),
            marks: Vec::new(),
            notes: Vec::new(),
            restored: Default::default(),
        })
    }

    /// Says what the model and the flags that change its numbers are, without which no cache can be kept or taken from files; and the
    /// folders whose files may begin with the same tokens, best first.
    pub fn identify(&mut self, source: &str, others: Vec<PathBuf>) {
        self.key = Some(Key::new(&format!("{NUMERICS}/{source}"), &self.state.kv));
        self.others = others;
    }

    /// Keeps the cache in `folder` from now on ([`Session::save`]). What files there hold is taken over if the conversation is
    /// empty; how many tokens that is. Files that cannot be used are a note ([`Session::take_notes`]), and replaced by the next save.
    ///
    /// # Errors
    /// [`crate::Kind::Usage`] before [`Session::identify`].
    pub fn keep_in(&mut self, folder: &Path) -> Result<usize> {
        let Some(key) = self.key else { return Err(Error::usage("the conversation's model has no name")) };
        let start = Instant::now();
        self.others.retain(|other| other != folder);
        let window = self.model.config.window;
        let found = Saved::open(folder, &key, &self.state.kv).and_then(|saved| {
            let Some(saved) = saved.filter(|_| self.held.is_empty()) else { return Ok(None) };
            let len = saved.reach(self.options.context, window);
            self.check_tokens(saved.tokens())?;
            Ok(Some((saved.restore(&self.state.kv, len, window)?, saved)))
        });
        match found {
            Ok(Some((kv, saved))) => {
                self.held = saved.tokens()[..kv.len()].to_vec();
                self.state.kv = kv;
                self.saved = Some(saved);
                self.count_restored(start);
            }
            Ok(None) => self.saved = Some(Saved::empty(folder, &key, &self.state.kv)),
            Err(error) => {
                self.notes.push(format!("the saved cache is not used: {error}"));
                self.saved = Some(Saved::empty(folder, &key, &self.state.kv));
            }
        }
        Ok(self.held.len())
    }

    /// Keeps the cache nowhere any more.
    pub fn keep_nowhere(&mut self) {
        self.saved = None;
    }

    /// Brings the files of the cache up to date; nothing happens where none are kept.
    ///
    /// # Errors
    /// [`crate::Kind::Other`] if the disk is full or fails. The conversation goes on as if nothing had been asked.
    pub fn save(&mut self) -> Result<()> {
        save(&mut self.saved, &self.state, &self.held, &self.marks, self.model)
    }

    /// Looks into the files in `folder`, before those of others, for what a conversation begins with.
    pub fn borrow_first(&mut self, folder: PathBuf) {
        self.others.insert(0, folder);
    }

    /// What happened since the last time that people should know, a line each.
    pub fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// Tokens that came back from files so far, and the time from looking for them to having them.
    pub fn restored(&self) -> (usize, Duration) {
        self.restored
    }

    fn count_restored(&mut self, start: Instant) {
        self.restored.0 += self.held.len();
        self.restored.1 += start.elapsed();
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        match tokens.iter().find(|token| **token as usize >= self.model.config.vocab) {
            Some(token) => Err(Error::invalid(format!("kv.index: token {token}: not in the vocabulary"))),
            None => Ok(()),
        }
    }

    /// What the conversation was set up with, as changed since.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Tokens in the cache.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Bytes of keys and values in the cache.
    pub fn cache_bytes(&self) -> usize {
        self.state.kv.bytes(self.held.len())
    }

    /// Messages of user, assistant and tools so far.
    pub fn messages(&self) -> usize {
        self.messages.len()
    }

    /// The last user message and all that followed it.
    pub fn last_turn(&self) -> &[Value] {
        let user = self.messages.iter().rposition(|message| message["role"] == "user");
        &self.messages[user.unwrap_or(self.messages.len())..]
    }

    /// The messages, as the template gets them.
    pub fn history(&self) -> &[Value] {
        &self.messages
    }

    /// Puts other messages in place of those so far.
    pub fn set_history(&mut self, messages: Vec<Value>) {
        self.messages = messages;
        (self.first, self.summary) = (0, None);
    }

    /// Sets the seed of the random choices, from the next reply on.
    pub fn set_seed(&mut self, seed: u64) {
        self.options.sampling.seed = seed;
        self.sampler.set_seed(seed);
    }

    /// Sets the system prompt, from the next reply on.
    pub fn set_system(&mut self, system: Option<String>) {
        self.options.system = system;
    }

    /// Turns thinking on or off, from the next reply on.
    pub fn set_think(&mut self, think: bool) {
        self.options.think = think;
    }

    /// Tokens generated per second here and now: a few are computed in a cache of their own. The first one is not
    /// timed, since weights may still come from the disk.
    pub fn decode_speed(&mut self) -> Result<f64> {
        const TIMED: usize = 8;
        const ENOUGH: Duration = Duration::from_secs(1);
        let Session { model, team, options, .. } = self;
        let context = options.context.min(TIMED + 1);
        let mut state = State::new(model, options.kv, context, 1)?;
        let token = [self.tokenizer.bos()];
        team.enter(|team| {
            let (mut timed, mut time) = (0, Duration::ZERO);
            for i in 0..context {
                let start = Instant::now();
                forward(model, team, &mut state, &token, Want::Last)?;
                if i > 0 || context == 1 {
                    (timed, time) = (timed + 1, time + start.elapsed());
                }
                if time > ENOUGH {
                    break;
                }
            }
            Ok(per_second(timed, time))
        })
    }

    /// Forgets all messages; the system prompt stays.
    pub fn clear(&mut self) {
        self.set_history(Vec::new());
    }

    /// Forgets the last user message and what was answered; returns the message.
    pub fn undo(&mut self) -> Option<String> {
        let user = self.messages.iter().rposition(|message| message["role"] == "user")?;
        let message = self.messages.drain(user..).next()?;
        if self.first > user {
            (self.first, self.summary) = (0, None);
        }
        message["content"].as_str().map(str::to_string)
    }

    /// Replies to `prompt`, with at most `limit` tokens. `on` hears of every step and may end the reply, as may
    /// `interrupt`; what was said until then counts as the answer. A reply that ends before its first token, or in an
    /// error, leaves the conversation as it was.
    pub fn reply(
        &mut self,
        prompt: &str,
        limit: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply> {
        let before = self.messages.len();
        self.messages.push(json!({ "role": "user", "content": prompt }));
        let (reply, said) = self.go_on(limit, interrupt, on);
        if !said {
            self.messages.truncate(before);
        }
        reply
    }

    /// Goes on after a reply with tool calls. `results` are what the tools returned, in the order of the calls; a call
    /// without one counts as not run. They stay in the conversation, whatever becomes of the reply.
    pub fn reply_to_calls(
        &mut self,
        results: &[Value],
        limit: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply> {
        let answers = self.messages.last().map_or_else(Vec::new, |message| answers(message, results));
        self.messages.extend(answers);
        self.go_on(limit, interrupt, on).0
    }

    /// Has the model speak next, and adds what it says to the messages. Whether there is anything.
    fn go_on(
        &mut self,
        limit: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> (Result<Reply>, bool) {
        let start = Instant::now();
        let reply = self.fitting_prompt(limit, interrupt, on).and_then(|(tokens, channel)| {
            let system = self.system_tokens(&tokens);
            self.generate(&tokens, channel, system, start, limit, interrupt, on)
        });
        match &reply {
            Ok(said) if said.answered() => {
                let calls = self.messages.iter().map(|message| calls(message).len()).sum();
                self.messages.extend(messages(said, calls));
                (reply, true)
            }
            _ => (reply, false),
        }
    }

    /// Another answer to the last user message. The seed is counted up, or it would be the same one.
    /// `None` where there is no such message.
    pub fn regenerate(
        &mut self,
        limit: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Option<Result<Reply>> {
        let prompt = self.last_prompt()?.to_string();
        self.set_seed(self.options.sampling.seed.wrapping_add(1));
        Some(self.instead(&prompt, limit, interrupt, on))
    }

    /// Replies to `prompt` in place of the last user message and its answer; without a new answer they stay.
    pub fn instead(
        &mut self,
        prompt: &str,
        limit: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply> {
        let before = (self.messages.clone(), self.first, self.summary.clone());
        self.undo();
        let kept = self.messages.len();
        let reply = self.reply(prompt, limit, interrupt, on);
        if self.messages.len() == kept {
            (self.messages, self.first, self.summary) = before; // no new answer: the old one stays
        }
        reply
    }

    /// The last user message.
    pub fn last_prompt(&self) -> Option<&str> {
        let user = self.messages.iter().rfind(|message| message["role"] == "user")?;
        user["content"].as_str()
    }

    /// Computes the beginning of a conversation whose first message begins with `document`, so that it can be kept
    /// ([`Session::keep_in`], [`Session::save`]); how many tokens that is.
    ///
    /// # Errors
    /// [`crate::Kind::Usage`] if it does not fit in the context, [`crate::Kind::Interrupted`] if it was interrupted.
    pub fn read_document(
        &mut self,
        document: &str,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Usage> {
        let start = Instant::now();
        let tokens = self.document_tokens(document)?;
        let reply = self.generate(&tokens, Output::raw(), 0, start, 0, interrupt, on)?;
        match reply.end {
            End::Interrupted => Err(Error::new(crate::Kind::Interrupted, "interrupted")),
            _ => Ok(reply.usage),
        }
    }

    /// The tokens of a conversation whose first message begins with `document`, as far as they do not depend on what follows.
    pub fn document_tokens(&mut self, document: &str) -> Result<Vec<u32>> {
        let mut with = |question: &str| {
            let message = json!({ "role": "user", "content": before(document, question) });
            let messages = std::mem::replace(&mut self.messages, vec![message]);
            let first = std::mem::take(&mut self.first);
            let tokens = self.prompt_tokens();
            (self.messages, self.first) = (messages, first);
            Ok(tokens?.0)
        };
        let (mut tokens, other) = (with("A?")?, with("1.")?);
        tokens.truncate(common(&tokens, &other));
        Ok(tokens)
    }

    /// Continues `prompt` as it is, without a template; marker texts in it are markers.
    pub fn complete(
        &mut self,
        prompt: &str,
        limit: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply> {
        let start = Instant::now();
        let tokens = self.tokenizer.encode_with_bos(prompt, true);
        self.generate(&tokens, Output::raw(), 0, start, limit, interrupt, on)
    }

    /// Of the prompt `tokens`, those up to the end of the system prompt: other conversations may begin with them.
    fn system_tokens(&self, tokens: &[u32]) -> usize {
        let (Some(template), Some(system)) = (&self.template, self.system_message()) else { return 0 };
        let options = template::Options {
            add_generation_prompt: false,
            enable_thinking: self.options.think,
            ..Default::default()
        };
        template
            .encode(self.tokenizer, &[system], &self.options.tools, options)
            .map_or(0, |system| common(&system, tokens))
    }

    /// Brings the cache as far into `prompt` as can be without computing: by what it holds, or from files. How far that is.
    fn recall(&mut self, prompt: &[u32]) -> usize {
        let (window, start) = (self.model.config.window, Instant::now());
        // The last token is always computed, for its logits.
        let most = |tokens: &[u32]| common(tokens, prompt).min(prompt.len().saturating_sub(1));
        let here = self.state.kv.reach(most(&self.held), window);
        if let (Some(key), true) = (self.key, prompt.len() > here + FEW) {
            let opened = |folder: &PathBuf| Saved::open(folder, &key, &self.state.kv).ok().flatten();
            let found = self.saved.iter().cloned().chain(self.others.iter().filter_map(opened));
            let found = found.map(|saved| (saved.reach(most(saved.tokens()), window), saved));
            // Of equals the first.
            let best = found.fold(None, |best: Option<(usize, Saved)>, found| match best {
                Some(best) if best.0 >= found.0 => Some(best),
                _ => Some(found),
            });
            if let Some((len, saved)) = best.filter(|(len, _)| *len > here + FEW) {
                let tokens = &saved.tokens()[..len];
                let restored = self.check_tokens(tokens).and_then(|()| saved.restore(&self.state.kv, len, window));
                match restored {
                    Ok(kv) => {
                        self.held = tokens.to_vec();
                        self.state.kv = kv;
                        self.count_restored(start);
                        self.marks.retain(|mark| *mark <= len);
                        return len;
                    }
                    Err(error) => self.notes.push(format!("a saved cache is not used: {error}")),
                }
            }
        }
        let kept = self.state.truncate(self.model, most(&self.held));
        self.held.truncate(kept);
        kept
    }

    /// The tokens of the conversation with the beginning of the model's turn, and how to read what it generates.
    fn prompt_tokens(&self) -> Result<(Vec<u32>, Output)> {
        let Some(template) = &self.template else {
            return Err(Error::usage("the conversation has no chat template"));
        };
        let mut messages: Vec<Value> = self.system_message().into_iter().collect();
        let shown = &self.messages[self.first..];
        for (i, message) in shown.iter().enumerate() {
            messages.push(message.clone());
            if shown.get(i + 1).is_some_and(|next| next["role"] != "tool") {
                messages.extend(answers(message, &[]));
            }
        }
        let options = template::Options { enable_thinking: self.options.think, ..Default::default() };
        let tokens = template.encode(self.tokenizer, &messages, &self.options.tools, options)?;
        let channel = Channel::after(self.tokenizer, &tokens);
        Ok((tokens, Output::Channel(channel)))
    }

    /// Brings the cache to `prompt`, of which the first `system` tokens are the system prompt's, then generates.
    #[allow(clippy::too_many_arguments)]
    fn generate(
        &mut self,
        prompt: &[u32],
        mut output: Output,
        system: usize,
        start: Instant,
        limit: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply> {
        let (n, context) = (prompt.len(), self.options.context);
        if n > context {
            return Err(Error::usage(format!("prompt: {n} tokens: expected at most {context}, the context")));
        }
        let tokenize_time = start.elapsed();
        let kept = self.recall(prompt);
        // Later prompts are likely to depart from this one where it departed from the last, at its end, or behind the system prompt.
        self.marks.retain(|mark| *mark <= kept);
        self.marks.extend([system, kept, n.saturating_sub(1)]);
        let Session { model, tokenizer, team, state, sampler, options, held, saved, marks, notes, .. } = self;
        let (model, tokenizer) = (*model, *tokenizer);
        let mut usage = Usage { prompt: n, reused: kept, tokenize_time, ..Usage::default() };
        let (mut answer, mut thought, mut calls) = (String::new(), String::new(), Vec::new());
        let rules = Rules {
            think_budget: options.think_budget,
            schema: options.schema.as_ref(),
            think: options.think,
            tools: !options.tools.is_empty(),
        };
        let mut guide = Guide::new(tokenizer, output.place(), rules);

        let end = team.enter(|team| -> Result<End> {
            let mut emit = |event: Event| {
                match event {
                    Event::Answer(text) => answer.push_str(text),
                    Event::Thought(text) => thought.push_str(text),
                    Event::ToolCall { name, arguments } => {
                        calls.push(Call { name: name.to_string(), arguments: arguments.clone() });
                    }
                    Event::Prompt { .. } | Event::Note(_) => {}
                }
                on(event).is_break()
            };
            let stopped = || interrupt.load(Ordering::Relaxed);
            let prompt_start = Instant::now();
            let mut next = None;
            if emit(Event::Prompt { done: 0, total: n - kept }) {
                return Ok(End::Interrupted);
            }
            model.read_ahead(&prompt[kept..]);
            for chunk in prompt[kept..].chunks(state.batch()) {
                if stopped() {
                    return Ok(End::Interrupted);
                }
                let last = held.len() + chunk.len() == n;
                let follows = if last && limit > 0 { Some(guide.follows()?) } else { None };
                let logits =
                    forward(model, team, state, chunk, follows.map_or(Want::Nothing, |next| want(sampler, next)))?;
                held.extend_from_slice(chunk);
                usage.prompt_time = prompt_start.elapsed();
                next = follows.map(|next| choose(sampler, next, logits, held)).transpose()?;
                if emit(Event::Prompt { done: held.len() - kept, total: n - kept }) {
                    return Ok(End::Interrupted);
                }
            }
            usage.first_token = start.elapsed();
            let decode_start = Instant::now();
            let end = loop {
                let Some(token) = next else { break End::Length };
                if tokenizer.stop_tokens().contains(&token) {
                    break End::Stop;
                }
                usage.generated += 1;
                if output.push(tokenizer, token, &mut emit) {
                    break End::Interrupted;
                }
                guide.push(token, output.place())?;
                if guide.done() {
                    break End::Stop;
                }
                if usage.generated >= limit {
                    break End::Length;
                }
                if held.len() == options.context {
                    break End::Context;
                }
                if stopped() {
                    break End::Interrupted;
                }
                let follows = guide.follows()?;
                let logits = forward(model, team, state, &[token], want(sampler, follows))?;
                held.push(token);
                next = Some(choose(sampler, follows, logits, held)?);
                usage.decoded += 1;
                usage.decode_time = decode_start.elapsed();
                if usage.decoded == LONG_REPLY
                    && let Err(error) = save(saved, state, held, marks, model)
                {
                    notes.push(error.to_string());
                }
            };
            output.finish(&mut emit);
            Ok(end)
        })?;
        Ok(Reply { answer, thought, calls, end, usage })
    }
}

/// The logits that choosing `next` takes.
fn want(sampler: &Sampler, next: Next) -> Want {
    match next {
        Next::Forced(_) => Want::Nothing,
        Next::Drawn(allowed) => sampler.deciding(allowed).map_or(Want::Last, Want::Best),
    }
}

/// The token that follows `held`.
fn choose(sampler: &mut Sampler, next: Next, logits: &[f32], held: &[u32]) -> Result<u32> {
    match next {
        Next::Forced(token) => Ok(token),
        Next::Drawn(allowed) => sampler.sample(logits, held, held.len(), allowed),
    }
}

/// The tool calls of a message.
fn calls(message: &Value) -> &[Value] {
    message["tool_calls"].as_array().map_or(&[], Vec::as_slice)
}

/// Messages with the results of the calls in `message`, in order; a call without one counts as not run.
fn answers(message: &Value, results: &[Value]) -> Vec<Value> {
    let results = results.iter().map(Some).chain(std::iter::repeat(None));
    let answer = |(call, result): (&Value, Option<&Value>)| {
        let content = match result {
            Some(Value::Array(items)) => json!({ "value": items }), // a list would be parts of a message
            Some(result) => result.clone(),
            None => json!({ "error": "not run" }),
        };
        let (id, name) = (&call["id"], &call["function"]["name"]);
        json!({ "role": "tool", "tool_call_id": id, "name": name, "content": content })
    };
    calls(message).iter().zip(results).map(answer).collect()
}

/// What the model said, as messages; `calls` tools have been called before.
///
/// Templates put the text of a message behind its calls, so text in front of them is a message of its own. With calls
/// the turn goes on, and what was thought in it is part of it; whether it is shown again is up to the template.
fn messages(reply: &Reply, calls: usize) -> Vec<Value> {
    let said = json!({ "role": "assistant", "content": reply.answer });
    if reply.calls.is_empty() {
        return vec![said];
    }
    let list = reply.calls.iter().zip(calls + 1..).map(|(call, n)| {
        let function = json!({ "name": call.name, "arguments": call.arguments });
        json!({ "id": format!("call-{n}"), "type": "function", "function": function })
    });
    let mut messages = vec![json!({ "role": "assistant", "tool_calls": list.collect::<Vec<_>>() })];
    if !reply.answer.trim().is_empty() {
        messages.insert(0, said);
    }
    if !reply.thought.is_empty() {
        messages[0]["reasoning"] = json!(reply.thought);
    }
    messages
}

/// Brings the files of a cache up to date, if it is kept. Damaged ones are written anew.
fn save(saved: &mut Option<Saved>, state: &State, held: &[u32], marks: &[usize], model: &Model) -> Result<()> {
    let Some(saved) = saved else { return Ok(()) };
    let window = model.config.window;
    match saved.update(&state.kv, held, marks, window) {
        Err(error) if error.kind() == crate::Kind::Invalid => {
            *saved = saved.cleared(&state.kv);
            saved.update(&state.kv, held, marks, window)
        }
        done => done,
    }
}

/// How generated tokens become text.
enum Output {
    /// As they are, markers included.
    Raw(Decoder),
    /// Thoughts, calls and the answer told apart.
    Channel(Channel),
}

impl Output {
    fn raw() -> Output {
        Output::Raw(Decoder::new(true))
    }

    /// Where the next token stands.
    fn place(&self) -> Place {
        match self {
            Output::Raw(_) => Place::Answer,
            Output::Channel(channel) => channel.place(),
        }
    }

    /// Emits what `token` completes; whether `emit` wants no more.
    fn push(&mut self, tokenizer: &Tokenizer, token: u32, emit: &mut dyn FnMut(Event) -> bool) -> bool {
        match self {
            Output::Raw(decoder) => {
                let text = decoder.push(tokenizer, token);
                !text.is_empty() && emit(Event::Answer(&text))
            }
            Output::Channel(channel) => channel.push(tokenizer, token, &mut |event| emit(event.into())),
        }
    }

    /// Emits what is left.
    fn finish(&mut self, emit: &mut dyn FnMut(Event) -> bool) {
        match self {
            Output::Raw(decoder) => {
                let text = decoder.finish();
                if !text.is_empty() {
                    emit(Event::Answer(&text));
                }
            }
            Output::Channel(channel) => {
                channel.finish(&mut |event| emit(event.into()));
            }
        }
    }
}
