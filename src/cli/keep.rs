//! What a chat leaves on the disk: its transcript, line by line, and its cache, so that `run -C` goes on where it ended.
//!
//! A conversation gets its folder with its first message. That something cannot be saved is said once and is no reason to stop
//! talking. Not here: the files themselves (`gemrun::chats`, `gemrun::kv::disk`).

use std::time::{Duration, Instant};

use gemrun::chats::transcript::{Chat, Entry, Header, Settings, now, shortened};
use gemrun::chats::{Chats, Open, Opened};
use gemrun::facts;
use gemrun::session::{Reply, Session};
use gemrun::{Error, Result};

use super::terminal::eprintln_quietly;
use super::{config, open};

/// Bytes all caches of conversations may take, where nothing else is said.
const BUDGET: u64 = 2 << 30;

/// Whether and where a conversation is kept.
pub struct Keep {
    chats: Option<Chats>,
    /// What a new conversation's transcript begins with; its settings are taken from the session.
    header: Header,
    open: Option<Open>,
    budget: u64,
    /// The system prompt as the user gave it.
    system: Option<String>,
    /// What is remembered, as the conversation knows it.
    facts: Vec<String>,
}

/// What is known of a conversation that goes on.
pub struct Resumed {
    pub turns: usize,
    pub tokens: usize,
    pub time: Duration,
}

impl Resumed {
    /// The same for people.
    pub fn line(&self, id: &str) -> String {
        let Resumed { turns, tokens, time } = self;
        let turns = format!("{turns} turn{}", if *turns == 1 { "" } else { "s" });
        format!("Continuing {id}: {turns}, {tokens} tokens back in {:.0} ms.", time.as_secs_f64() * 1e3)
    }
}

impl Keep {
    /// Keeps conversations among `chats`, or nowhere.
    pub fn new(chats: Option<Chats>, model: String, source: String, template: String) -> Result<Keep> {
        let settings = Settings::default();
        let header = Header { chat: 0, created: now(), model, source, template, copy_of: None, settings };
        Ok(Keep { chats, header, open: None, budget: budget()?, system: None, facts: Vec::new() })
    }

    /// Sets the user's system prompt and the facts beside it, which together are the session's.
    pub fn instruct(&mut self, session: &mut Session, system: Option<String>, facts: Vec<String>) {
        (self.system, self.facts) = (system, facts);
        session.set_system(facts::system_prompt(self.system.as_deref(), &self.facts));
    }

    /// Changes the user's system prompt.
    pub fn set_system(&mut self, session: &mut Session, system: Option<String>) {
        self.add(Entry { system: Some(system.clone().unwrap_or_default()), ..Entry::now() });
        self.instruct(session, system, self.facts.clone());
    }

    /// The user's system prompt and the facts.
    pub fn instructions(&self) -> (Option<&str>, &[String]) {
        (self.system.as_deref(), &self.facts)
    }

    /// Takes up a conversation that was opened; one that another process has open is copied.
    pub fn resume(&mut self, id: &str, opened: Opened, session: &mut Session) -> Result<Resumed> {
        let start = Instant::now();
        let open = match opened {
            Opened::Ours(open) => open,
            Opened::Busy(chat) => {
                let Some(chats) = &self.chats else { return Err(Error::usage("nowhere to keep a copy")) };
                let settings = chat.header().map_or_else(|| self.settings(session), |header| header.settings.clone());
                let header = Header { copy_of: Some(id.to_string()), created: now(), settings, ..self.header.clone() };
                let open = chats.create(&header, &chat.title(), &chat.entries())?;
                let copy = &open.id;
                eprintln_quietly(format_args!("note: {id} is open in another gemrun: going on with a copy, {copy}"));
                session.borrow_first(chats.folder().join(id));
                open
            }
        };
        if let Some(damage) = open.chat().damage() {
            eprintln_quietly(format_args!("note: {}: {damage}", open.id));
        }
        let chat = open.chat();
        show_to(session, chat);
        let facts = chat.header().map_or(Vec::new(), |header| header.settings.facts.clone());
        let system = chat.system().map(str::to_string);
        (self.system, self.facts) = (system, facts);
        session.set_system(facts::system_prompt(self.system.as_deref(), &self.facts));
        let turns = chat.turns().len();
        let tokens = session.keep_in(open.folder())?;
        tell(session);
        self.open = Some(open);
        Ok(Resumed { turns, tokens, time: start.elapsed() })
    }

    /// The name of the conversation, once it has one.
    pub fn id(&self) -> Option<&str> {
        self.open.as_ref().map(|open| open.id.as_str())
    }

    /// Makes a folder for a conversation about `about`, unless it has one; `titled` where that is not how its first message begins.
    pub fn begin(&mut self, session: &mut Session, about: &str, titled: bool) {
        let (Some(chats), None) = (&self.chats, &self.open) else { return };
        let header = Header { created: now(), settings: self.settings(session), ..self.header.clone() };
        let title = Entry { title: Some(shortened(about)), ..Entry::now() };
        let created = chats.create(&header, about, &vec![title; titled.into()]).and_then(|open| {
            session.keep_in(open.folder())?;
            Ok(open)
        });
        match created {
            Ok(open) => self.open = Some(open),
            Err(error) => self.give_up(&error),
        }
    }

    /// The next message begins a new conversation.
    pub fn end(&mut self, session: &mut Session) {
        session.keep_nowhere();
        self.close();
    }

    /// Lets go of the conversation, and of its folder if nothing was said in it.
    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        if let (true, Some(chats)) = (open.chat().is_blank(), &self.chats) {
            let id = open.id.clone();
            drop(open);
            // If that fails there is an empty conversation in the list.
            let _ = chats.remove(&id, false);
        }
    }

    /// Writes down the turn that was just finished; with `undo`, in place of so many before it.
    pub fn turn(&mut self, session: &Session, reply: &Reply, undo: Option<usize>) {
        let (turn, seed) = (Some(session.last_turn().to_vec()), Some(session.options().sampling.seed));
        self.add(Entry { undo, turn, seed, end: Some(reply.end.name().into()), ..Entry::now() });
    }

    /// Writes down which turns the model is no longer shown, if that has changed.
    pub fn left_out(&mut self, session: &Session) {
        let (left_out, summary) = session.left_out();
        if self.open.as_ref().is_some_and(|open| open.chat().left_out() != (left_out, summary)) {
            self.add(Entry { left_out: Some(left_out), summary: summary.map(str::to_string), ..Entry::now() });
        }
    }

    /// Writes down what happened, if the conversation has begun.
    pub fn add(&mut self, entry: Entry) {
        if let Some(open) = &mut self.open
            && let Err(error) = open.add(entry)
        {
            self.give_up(&error);
        }
    }

    /// Saves the cache.
    pub fn save(&mut self, session: &mut Session) {
        let (Some(chats), Some(open)) = (&self.chats, &self.open) else { return };
        match session.save() {
            Ok(()) => {
                chats.trim(self.budget, Some(open.folder()));
            }
            // The transcript is there: going on takes longer, that is all.
            Err(error) => {
                eprintln_quietly(format_args!("note: the cache is not saved: {error}"));
                session.keep_nowhere();
            }
        }
    }

    /// How `session` is run.
    fn settings(&self, session: &Session) -> Settings {
        let options = session.options();
        Settings {
            context: options.context,
            kv: options.kv.name().into(),
            sampling: options.sampling,
            think: options.think,
            system: self.system.clone(),
            facts: self.facts.clone(),
        }
    }

    fn give_up(&mut self, error: &Error) {
        eprintln_quietly(format_args!("note: the conversation is not saved from now on: {error}"));
        (self.chats, self.open) = (None, None);
    }
}

impl Drop for Keep {
    fn drop(&mut self) {
        self.close();
    }
}

/// Gives a session what was said, as far as the model is shown it.
fn show_to(session: &mut Session, chat: &Chat) {
    let messages = chat.turns().iter().flat_map(|turn| turn.messages.iter().cloned());
    session.set_history(messages.collect());
    let (turns, summary) = chat.left_out();
    session.leave_out(turns, summary.map(str::to_string));
    session.set_think(chat.think());
    if let Some(seed) = chat.seed() {
        session.set_seed(seed);
    }
}

/// Says what a session has to say.
pub fn tell(session: &mut Session) {
    for note in session.take_notes() {
        eprintln_quietly(format_args!("note: {note}"));
    }
}

/// `GEMRUN_CHATS_BUDGET`: bytes, or so many K, M, G of them.
pub fn budget() -> Result<u64> {
    match config::variable("GEMRUN_CHATS_BUDGET") {
        Some(text) => open::size(&text).map_err(|_| {
            let text = gemrun::error::printable(&text);
            Error::usage(format!("GEMRUN_CHATS_BUDGET: {text}: expected a number of bytes, such as 500M or 2G"))
        }),
        _ => Ok(BUDGET),
    }
}
