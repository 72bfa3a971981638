//! One conversation: messages, the tokens the cache holds, and the sampler.
//!
//! Every reply renders the whole message list with the file's own template and compares the result with the tokens
//! in the cache: what both begin with is kept, the rest is forgotten and computed anew. So undoing, editing the
//! system prompt and continuing are one mechanism, and a reply never depends on how the cache came to be.
//! Generation stops at a stop token, a limit, the end of the context, or when asked to; the conversation stays usable
//! in every case. Showing text to people is the caller's business.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::channel::{self, Channel, Place};
use crate::forward::{State, Want, forward};
use crate::gguf::Gguf;
use crate::guide::{Guide, Next, Rules, Schema};
use crate::kv::KvType;
use crate::model::Model;
use crate::sample::{Sampler, Sampling};
use crate::team::Team;
use crate::template::{self, Template};
use crate::tokenizer::{Decoder, Tokenizer};
use crate::{Error, Result};

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
}

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
        })
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

    /// Sets the system prompt, from the next reply on.
    pub fn set_system(&mut self, system: Option<String>) {
        self.options.system = system;
    }

    /// Turns thinking on or off, from the next reply on.
    pub fn set_think(&mut self, think: bool) {
        self.options.think = think;
    }

    /// Forgets all messages; the system prompt stays.
    pub fn clear(&mut self) {
        self.messages.clear();
    }

    /// Forgets the last user message and what was answered; returns the message.
    pub fn undo(&mut self) -> Option<String> {
        let user = self.messages.iter().rposition(|message| message["role"] == "user")?;
        let message = self.messages.drain(user..).next()?;
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
        self.answer_calls(&[]);
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
        self.answer_calls(results);
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
        let reply = self
            .prompt_tokens()
            .and_then(|(tokens, channel)| self.generate(&tokens, channel, start, limit, interrupt, on));
        match &reply {
            Ok(said) if said.usage.generated > 0 || said.end != End::Interrupted => {
                let calls = self.messages.iter().map(|message| calls(message).len()).sum();
                self.messages.extend(messages(said, calls));
                (reply, true)
            }
            _ => (reply, false),
        }
    }

    /// Adds `results` to the messages if the last of them calls tools.
    fn answer_calls(&mut self, results: &[Value]) {
        let calls = self.messages.last().map_or(&[][..], calls);
        let mut results = results.iter();
        let answers: Vec<Value> = calls
            .iter()
            .map(|call| {
                let content = match results.next() {
                    Some(Value::Array(items)) => json!({ "value": items }), // a list would be parts of a message
                    Some(result) => result.clone(),
                    None => json!({ "error": "not run" }),
                };
                let (id, name) = (&call["id"], &call["function"]["name"]);
                json!({ "role": "tool", "tool_call_id": id, "name": name, "content": content })
            })
            .collect();
        self.messages.extend(answers);
    }

    /// Another answer to the last user message. The seed is counted up, or it would be the same one.
    /// `None` where there is no such message.
    pub fn regenerate(
        &mut self,
        limit: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Option<Result<Reply>> {
        let before = self.messages.clone();
        let prompt = self.undo()?;
        self.options.sampling.seed = self.options.sampling.seed.wrapping_add(1);
        self.sampler.set_seed(self.options.sampling.seed);
        let kept = self.messages.len();
        let reply = self.reply(&prompt, limit, interrupt, on);
        if self.messages.len() == kept {
            self.messages = before; // no new answer: the old one stays
        }
        Some(reply)
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
        self.generate(&tokens, Output::raw(), start, limit, interrupt, on)
    }

    /// The tokens of the conversation with the beginning of the model's turn, and how to read what it generates.
    fn prompt_tokens(&self) -> Result<(Vec<u32>, Output)> {
        let Some(template) = &self.template else {
            return Err(Error::usage("the conversation has no chat template"));
        };
        let system = self.options.system.iter().map(|text| json!({ "role": "system", "content": text }));
        let messages: Vec<Value> = system.chain(self.messages.iter().cloned()).collect();
        let options = template::Options { enable_thinking: self.options.think, ..Default::default() };
        let tokens = template.encode(self.tokenizer, &messages, &self.options.tools, options)?;
        let channel = Channel::after(self.tokenizer, &tokens);
        Ok((tokens, Output::Channel(channel)))
    }

    /// Brings the cache to `prompt`, then generates.
    fn generate(
        &mut self,
        prompt: &[u32],
        mut output: Output,
        start: Instant,
        limit: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply> {
        let Session { model, tokenizer, team, state, sampler, options, held, .. } = self;
        let (model, tokenizer) = (*model, *tokenizer);
        let n = prompt.len();
        if n > options.context {
            return Err(Error::usage(format!("prompt: {n} tokens: expected at most {}, the context", options.context)));
        }
        let mut usage = Usage { prompt: n, tokenize_time: start.elapsed(), ..Usage::default() };
        let (mut answer, mut thought, mut calls) = (String::new(), String::new(), Vec::new());
        let rules = Rules {
            think_budget: options.think_budget,
            schema: options.schema.as_ref(),
            think: options.think,
            tools: !options.tools.is_empty(),
        };
        let mut guide = Guide::new(tokenizer, output.place(), rules);

        // The last token is always computed, for its logits.
        let common =
            held.iter().zip(prompt).take_while(|(held, prompt)| held == prompt).count().min(n.saturating_sub(1));
        let kept = state.truncate(model, common);
        held.truncate(kept);
        usage.reused = kept;

        let end = team.enter(|team| -> Result<End> {
            let mut emit = |event: Event| {
                match event {
                    Event::Answer(text) => answer.push_str(text),
                    Event::Thought(text) => thought.push_str(text),
                    Event::ToolCall { name, arguments } => {
                        calls.push(Call { name: name.to_string(), arguments: arguments.clone() });
                    }
                    Event::Prompt { .. } => {}
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
