//! `gemrun chats`: saved conversations listed, read, searched, exported, removed.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand, ValueEnum};
use gemrun::chats::transcript::{self, Chat};
use gemrun::chats::{Chats as Saved, Listed};
use gemrun::{Error, Kind, registry};
use serde_json::{Value, json};

use super::terminal::{Shown, Style};
use super::{Result, text};

/// List saved conversations; show, search, export, remove them
#[derive(Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "An ID is the name of a conversation, or the beginning of it and of no other.\n\n\
    Examples:\n  \
    gemrun chats\n  \
    gemrun chats search blue sky\n  \
    gemrun chats export why-is-the-sky-blue -o sky.md\n  \
    gemrun run -C why-is"
)]
pub struct Chats {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    list: List,
}

#[derive(Subcommand)]
enum Command {
    List(List),
    Show(Show),
    Search(Search),
    Export(Export),
    Rm(Rm),
}

/// List conversations, the newest first
#[derive(Args)]
#[command(after_help = "Example: gemrun chats list --json")]
struct List {
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Show what was said
#[derive(Args)]
#[command(after_help = "Example: gemrun chats show why-is-the-sky-blue")]
struct Show {
    /// Name of the conversation, or its beginning [default: the newest]
    id: Option<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Find messages with all of the words in them
#[derive(Args)]
#[command(after_help = "Example: gemrun chats search blue sky")]
struct Search {
    /// Words, in any order and case
    #[arg(required = true)]
    words: Vec<OsString>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Write a conversation as Markdown, or as the JSON messages that gemrun template reads
#[derive(Args)]
#[command(after_help = "Example: gemrun chats export why-is-the-sky-blue --format json -o sky.json")]
struct Export {
    /// Name of the conversation, or its beginning
    id: String,
    /// What to write
    #[arg(long, value_name = "FORMAT", default_value = "md")]
    format: Format,
    /// Where to [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Md,
    Json,
}

/// Remove conversations
#[derive(Args)]
#[command(after_help = "Example: gemrun chats rm why-is-the-sky-blue")]
struct Rm {
    /// Names of conversations, or their beginnings
    #[arg(required = true)]
    ids: Vec<String>,
    /// Remove the caches only; what was said stays, and going on takes longer
    #[arg(long)]
    cache: bool,
}

/// The saved conversations.
pub fn saved() -> gemrun::Result<Saved> {
    let home = registry::home()
        .ok_or_else(|| Error::new(Kind::NotFound, "no home directory to look for conversations in: set GEMRUN_HOME"))?;
    Ok(Saved::new(&home))
}

impl Chats {
    pub fn run(self) -> Result {
        let saved = saved()?;
        match self.command {
            None => list(&saved, self.list.json),
            Some(Command::List(options)) => list(&saved, options.json),
            Some(Command::Show(options)) => show(&saved, options.id, options.json),
            Some(Command::Search(options)) => search(&saved, &options),
            Some(Command::Export(options)) => export(&saved, &options),
            Some(Command::Rm(options)) => {
                let ids: Vec<String> = options.ids.iter().map(|id| saved.find(id)).collect::<gemrun::Result<_>>()?;
                ids.iter().try_for_each(|id| saved.remove(id, options.cache))?;
                Ok(())
            }
        }
    }
}

fn list(saved: &Saved, as_json: bool) -> Result {
    let mut out = std::io::stdout().lock();
    let chats = saved.list();
    if as_json {
        let rows: Vec<Value> = chats.iter().map(row).collect();
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?);
    }
    if chats.is_empty() {
        super::terminal::eprintln_quietly(format_args!("No conversations yet; gemrun run demo begins one."));
    }
    let (style, shown) = (Style::stdout(), Shown::stdout());
    let width = chats.iter().map(|chat| chat.id.len()).max().unwrap_or(0);
    for chat in &chats {
        let Listed { id, chat, updated, .. } = chat;
        let turns = chat.turns().len();
        let model = chat.header().map_or("?", |header| &header.model);
        let model = shown.text(model.rsplit(std::path::is_separator).next().unwrap_or(model));
        let turns = format!("{turns} turn{}", if turns == 1 { "" } else { "s" });
        let (bold, dim, plain) = (style.bold(), style.dim(), style.plain());
        let id = shown.text(id);
        writeln!(out, "{bold}{id:width$}{plain}  {:>9}  {turns:>8}  {dim}{model}{plain}", ago(*updated))?;
    }
    Ok(())
}

/// A conversation as one entry of `list --json`.
fn row(listed: &Listed) -> Value {
    let Listed { id, chat, updated, transcript_bytes, kv_bytes } = listed;
    let header = chat.header();
    json!({
        "id": id,
        "title": chat.title(),
        "model": header.map(|header| &header.model),
        "created": header.map(|header| &header.created),
        "updated": humantime::format_rfc3339_seconds(*updated).to_string(),
        "turns": chat.turns().len(),
        "transcript_bytes": transcript_bytes,
        "kv_bytes": kv_bytes,
        "damage": chat.damage(),
    })
}

/// How long ago something was, in the largest unit.
pub fn ago(time: SystemTime) -> String {
    let seconds = time.elapsed().unwrap_or(Duration::ZERO).as_secs();
    match seconds {
        0..60 => "just now".into(),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

fn show(saved: &Saved, id: Option<String>, as_json: bool) -> Result {
    let id = match id {
        Some(id) => saved.find(&id)?,
        None => saved.names().into_iter().next().ok_or_else(none)?,
    };
    let chat = saved.read(&id)?;
    if let Some(damage) = chat.damage() {
        super::terminal::eprintln_quietly(format_args!("note: {id}: {damage}"));
    }
    let mut out = std::io::stdout().lock();
    if as_json {
        let (left_out, summary) = chat.left_out();
        let turns = chat.turns().iter().map(|turn| json!({ "time": turn.time, "messages": turn.messages }));
        let shown = json!({
            "id": id,
            "title": chat.title(),
            "header": chat.header(),
            "system": chat.system(),
            "turns": turns.collect::<Vec<Value>>(),
            "left_out": left_out,
            "summary": summary,
            "damage": chat.damage(),
        });
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&shown)?)?);
    }
    let (style, shown) = (Style::stdout(), Shown::stdout());
    let (bold, dim, plain) = (style.bold(), style.dim(), style.plain());
    let model = chat.header().map_or("?", |header| &header.model);
    writeln!(out, "{dim}{}, {}{plain}", shown.text(&id), shown.text(model))?;
    if let Some(system) = chat.system() {
        writeln!(out, "\n{dim}system: {}{plain}", shown.text(system))?;
    }
    for message in chat.turns().iter().flat_map(|turn| &turn.messages) {
        let said = shown.text(&said(message));
        match message["role"].as_str() {
            Some("user") => writeln!(out, "\n{bold}> {said}{plain}")?,
            Some("assistant") => writeln!(out, "\n{said}")?,
            role => writeln!(out, "\n{dim}{}: {said}{plain}", shown.text(role.unwrap_or("?")))?,
        }
    }
    Ok(())
}

/// A message as text: what was said, or the tools it calls.
fn said(message: &Value) -> String {
    match (transcript::text(message), message.get("tool_calls")) {
        (text, Some(calls)) => format!("{text}{}{calls}", if text.is_empty() { "" } else { "\n" }),
        (text, None) => text.to_string(),
    }
}

fn none() -> Error {
    Error::new(Kind::NotFound, "no conversations yet: gemrun run demo begins one")
}

fn search(saved: &Saved, options: &Search) -> Result {
    let words: Vec<String> =
        options.words.iter().map(|word| text::from_argument("words", word)).collect::<gemrun::Result<_>>()?;
    let hits = saved.search(&words.join(" "));
    let mut out = std::io::stdout().lock();
    if options.json {
        let hit = |hit: &gemrun::chats::Hit| json!({ "id": hit.id, "title": hit.title, "turn": hit.turn, "role": hit.role, "excerpt": hit.excerpt });
        let hits: Vec<Value> = hits.iter().map(hit).collect();
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&hits)?)?);
    }
    let (style, shown) = (Style::stdout(), Shown::stdout());
    for hit in &hits {
        let (bold, plain) = (style.bold(), style.plain());
        let who = if hit.role == "user" { "you" } else { "it" };
        writeln!(out, "{bold}{}{plain} {}, {who}: {}", shown.text(&hit.id), hit.turn, shown.text(&hit.excerpt))?;
    }
    if hits.is_empty() {
        super::terminal::eprintln_quietly(format_args!("Nothing found."));
    }
    Ok(())
}

fn export(saved: &Saved, options: &Export) -> Result {
    let id = saved.find(&options.id)?;
    let chat = saved.read(&id)?;
    let exported = match options.format {
        Format::Md => markdown(&id, &chat),
        Format::Json => {
            let system = chat.system().map(|text| json!({ "role": "system", "content": text }));
            let messages = chat.turns().iter().flat_map(|turn| turn.messages.iter().cloned());
            let messages: Vec<Value> = system.into_iter().chain(messages).collect();
            serde_json::to_string_pretty(&messages)? + "\n"
        }
    };
    match &options.output {
        Some(path) => Ok(std::fs::write(path, exported).map_err(|e| Error::io(path, &e))?),
        None => Ok(std::io::stdout().lock().write_all(exported.as_bytes())?),
    }
}

fn markdown(id: &str, chat: &Chat) -> String {
    let mut out = format!("# {}\n\n", chat.title());
    if let Some(header) = chat.header() {
        out += &format!("{id}, {}, {}\n\n", header.model, header.created);
    }
    if let Some(system) = chat.system() {
        out += &format!("**System:** {system}\n\n");
    }
    for message in chat.turns().iter().flat_map(|turn| &turn.messages) {
        let role = match message["role"].as_str() {
            Some("user") => "You",
            Some("assistant") => "Model",
            _ => "Tool",
        };
        out += &format!("**{role}:** {}\n\n", said(message));
    }
    out.truncate(out.trim_end().len());
    out + "\n"
}
