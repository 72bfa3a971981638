//! The chat: a prompt, the answer as it comes, a line of figures.
//!
//! Ctrl-C ends a reply and keeps the chat; at the prompt, twice, it ends the program, as does Ctrl-D. Lines that
//! begin with a slash are commands. What was typed is remembered in a history file, what was answered is not.

use std::ops::ControlFlow;

use gemrun::chats::transcript::Entry;
use gemrun::session::Event;

use super::format::whole;
use super::input::Input;
use super::run::{Talk, Wait, reset, with_notes};
use super::screen::Screen;
use super::status::{self, Before};
use super::terminal::{Shown, Style, eprintln_quietly};
use super::{Result, keep, notes, think};

const HELP: &str = "\
/help            this list
/new             forget the conversation; the system prompt stays
/system TEXT     set the system prompt; without TEXT, remove it
/think on|off    let the model think before it answers; auto: if it is fast enough here
/think show|hide show what it thinks, or do not
/regen           another answer to the last message
/edit            change the last message and have it answered anew; /edit TEXT replaces it
/undo            take the last message and its answer back
/read FILE       begin the next message with the text in a file
/chats           saved conversations; gemrun run -C NAME continues one
/recall WORDS    begin the next message with what was said about them in another conversation
/remember FACT   conversations know it from now on; without FACT, list what they know
/forget WHICH    the opposite: a number of that list, or words
/compact         have the model sum up all turns but the last, and go on from that
/show            what the model is shown besides your messages
/stats           what the conversation holds
/exit            leave, as does Ctrl-D

\"\"\" begins a message of several lines and ends it. Ctrl-C stops an answer and keeps what was said.";

/// What a line asks for.
#[derive(Debug, PartialEq)]
enum Line<'a> {
    Nothing,
    Say(&'a str),
    Help,
    New,
    System(&'a str),
    Think(&'a str),
    Regenerate,
    Edit(&'a str),
    Read(&'a str),
    Chats,
    Recall(&'a str),
    Remember(&'a str),
    Forget(&'a str),
    Compact,
    Show,
    Undo,
    Stats,
    Exit,
    Unknown(&'a str),
}

impl Line<'_> {
    fn parse(line: &str) -> Line<'_> {
        let line = line.trim();
        if line.is_empty() {
            return Line::Nothing;
        }
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        // `/usr/bin is full` is something to say.
        let is_command = word.strip_prefix('/').is_some_and(|name| !name.contains('/'));
        match word {
            _ if !is_command => Line::Say(line),
            "/help" | "/?" => Line::Help,
            "/new" | "/clear" => Line::New,
            "/system" => Line::System(rest),
            "/think" => Line::Think(rest),
            "/regen" => Line::Regenerate,
            "/edit" => Line::Edit(rest),
            "/read" => Line::Read(rest),
            "/chats" => Line::Chats,
            "/recall" => Line::Recall(rest),
            "/remember" => Line::Remember(rest),
            "/forget" => Line::Forget(rest),
            "/compact" => Line::Compact,
            "/show" => Line::Show,
            "/undo" => Line::Undo,
            "/stats" => Line::Stats,
            "/exit" | "/bye" | "/quit" => Line::Exit,
            _ => Line::Unknown(word),
        }
    }
}

/// Talks until the user leaves.
pub fn chat(talk: &mut Talk, name: &str) -> Result {
    let style = Style::stderr();
    let say = |text: &str| eprintln_quietly(format_args!("{}{text}{}", style.dim(), style.plain()));
    let mut input = Input::new(name)?;
    let options = talk.session.options();
    let threads = if options.threads == 1 { "1 thread".into() } else { format!("{} threads", options.threads) };
    say(&format!("{name}, context {}, {threads}. /help lists the commands, Ctrl-D leaves.", options.context));

    while let Some(line) = input.read(style)? {
        match Line::parse(&line) {
            Line::Nothing => {}
            Line::Say(prompt) => answer(talk, style, Ask::New(prompt))?,
            Line::Regenerate => answer(talk, style, Ask::Again)?,
            Line::Edit(text) => {
                let Some(last) = talk.session.last_prompt().map(str::to_string) else {
                    say("There is no message to edit.");
                    continue;
                };
                let edited = match text {
                    "" => input.edit(&last)?,
                    text => Some(text.to_string()),
                };
                match edited.filter(|edited| !edited.trim().is_empty()) {
                    Some(edited) => answer(talk, style, Ask::Instead(&edited))?,
                    None => say("The message stays as it was."),
                }
            }
            Line::Help => say(HELP),
            Line::New => {
                talk.begin_anew();
                say("A new conversation.");
            }
            Line::System(text) => {
                talk.keep.set_system(&mut talk.session, (!text.is_empty()).then(|| text.to_string()));
                say(if text.is_empty() { "No system prompt from now on." } else { "System prompt set." });
            }
            Line::Think(word) => say(&think(talk, word)?),
            Line::Undo => match talk.session.undo() {
                Some(message) => {
                    talk.keep.add(Entry { undo: Some(1), ..Entry::now() });
                    // What the message began with goes before the next one; what was typed is what was taken back.
                    let notes = std::mem::take(&mut talk.sent);
                    let typed = message.strip_prefix(&with_notes(&notes, "")).unwrap_or(&message);
                    say(&format!("Taken back: {}", first_words(typed)));
                    talk.notes.splice(0..0, notes);
                }
                None => say("There is nothing to take back."),
            },
            Line::Read(file) => say(&notes::read(talk, file)),
            Line::Chats => say(&notes::chats()),
            Line::Recall(words) => say(&notes::recall(talk, words)),
            Line::Remember(fact) => say(&notes::remember(talk, fact)),
            Line::Forget(which) => say(&notes::forget(which)),
            Line::Show => say(&notes::show(talk)),
            Line::Compact => compact(talk, style)?,
            Line::Stats => say(&status::stats(talk)),
            Line::Exit => break,
            Line::Unknown(word) => say(&format!("{word}: no such command; /help lists them")),
        }
    }
    if let Some(id) = talk.keep.id() {
        say(&format!("Saved as {id}; gemrun run -C goes on with it."));
    }
    Ok(())
}

/// Has the model sum up the conversation.
fn compact(talk: &mut Talk, style: Style) -> Result {
    reset(&talk.interrupt);
    let mut wait = Wait::new();
    let mut on = |event: Event| {
        wait.on(&event);
        ControlFlow::Continue(())
    };
    let turns = talk.session.compact(1, &talk.interrupt, &mut on);
    wait.done();
    let note = match turns {
        Ok(0) => "There is nothing to sum up: the last turn stays as it is.".to_string(),
        Ok(_) => match talk.session.left_out() {
            (_, Some(summary)) => Shown::terminal().text(summary),
            (turns, None) => format!("{turns} turns are left out from now on."),
        },
        Err(error) => error.to_string(),
    };
    keep::tell(&mut talk.session);
    talk.keep.left_out(&talk.session);
    talk.keep.save(&mut talk.session);
    eprintln_quietly(format_args!("{}{note}{}", style.dim(), style.plain()));
    Ok(())
}

/// `/think`: does what `word` says, and says what has been done.
fn think(talk: &mut Talk, word: &str) -> Result<String> {
    let said = match word {
        "on" | "off" => {
            set_think(talk, word == "on");
            if word == "on" { "The model thinks before it answers." } else { "The model answers at once." }
        }
        "auto" => {
            let said = think::auto(&mut talk.session)?;
            let on = talk.session.options().think;
            set_think(talk, on);
            return Ok(said);
        }
        "show" | "hide" => {
            talk.hide_thinking = word == "hide";
            if talk.hide_thinking { "Thoughts are hidden." } else { "Thoughts are shown." }
        }
        "" if talk.session.options().think => "Thinking is on; /think off turns it off.",
        "" => "Thinking is off; /think on turns it on.",
        _ => "/think is followed by on, off, auto, show or hide",
    };
    Ok(said.to_string())
}

fn set_think(talk: &mut Talk, on: bool) {
    talk.session.set_think(on);
    talk.keep.add(Entry { think: Some(on), ..Entry::now() });
}

/// What the model is to reply to.
#[derive(Clone, Copy)]
enum Ask<'a> {
    /// A message.
    New(&'a str),
    /// The last message, once more.
    Again,
    /// A message in place of the last one.
    Instead(&'a str),
}

/// Has the model reply and shows it.
fn answer(talk: &mut Talk, style: Style, ask: Ask) -> Result {
    if let Ask::New(prompt) = ask {
        talk.keep.begin(&mut talk.session, prompt, !talk.notes.is_empty());
    }
    reset(&talk.interrupt);
    let with_notes = |message: &str| with_notes(&talk.notes, message);
    let message = match ask {
        Ask::New(message) | Ask::Instead(message) => with_notes(message),
        Ask::Again => String::new(),
    };
    let before = Before::now();
    let mut screen = Screen::new(talk.hide_thinking, talk.plain, style);
    let mut written = Ok(());
    let mut on = |event: Event| {
        written = screen.on(event);
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let reply = match ask {
        Ask::New(_) => Some(talk.session.reply(&message, talk.limit, &talk.interrupt, &mut on)),
        Ask::Instead(_) => Some(talk.session.instead(&message, talk.limit, &talk.interrupt, &mut on)),
        Ask::Again => talk.session.regenerate(talk.limit, &talk.interrupt, &mut on),
    };
    let reply = match reply {
        Some(Ok(reply)) => {
            if reply.answered() {
                talk.keep.turn(&talk.session, &reply, (!matches!(ask, Ask::New(_))).then_some(1));
            }
            Some(talk.go_on(reply, &mut on))
        }
        other => other,
    };
    written?;
    screen.finish()?;
    keep::tell(&mut talk.session);
    let note = match &reply {
        None => Some("There is no message to answer again.".to_string()),
        Some(Err(error)) if error.kind() == gemrun::Kind::Usage => Some(format!("{error}; /new starts over")),
        Some(Err(error)) if error.kind() == gemrun::Kind::Interrupted => Some("Stopped, message taken back.".into()),
        Some(Err(error)) => return Err(error.clone().within(talk.loaded.gguf.name()).into()),
        Some(Ok(reply)) => {
            talk.count(reply);
            if talk.session.options().schema.is_some()
                && let Err(error) = whole(reply)
            {
                eprintln_quietly(format_args!("note: {error}"));
            }
            if reply.answered() {
                let earlier = if matches!(ask, Ask::New(_)) { Vec::new() } else { std::mem::take(&mut talk.sent) };
                talk.sent = std::mem::take(&mut talk.notes);
                talk.sent.extend(earlier);
            }
            Some(before.line(talk, reply))
        }
    };
    if let Some(note) = note {
        eprintln_quietly(format_args!("{}{note}{}\n", style.dim(), style.plain()));
    }
    talk.keep.left_out(&talk.session);
    talk.keep.save(&mut talk.session);
    Ok(())
}

/// The beginning of a message, on one line.
fn first_words(message: &str) -> String {
    let line = gemrun::error::printable(message.lines().next().unwrap_or_default());
    let short: String = line.chars().take(50).collect();
    if short.len() < message.len() { format!("{short}...") } else { short }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        assert_eq!(Line::parse("  "), Line::Nothing);
        assert_eq!(Line::parse(" hi there "), Line::Say("hi there"));
        assert_eq!(Line::parse("/system  be brief "), Line::System("be brief"));
        assert_eq!(Line::parse("/system"), Line::System(""));
        assert_eq!(Line::parse("/think on"), Line::Think("on"));
        assert_eq!(Line::parse("/bye"), Line::Exit);
        assert_eq!(Line::parse("/dance now"), Line::Unknown("/dance"));
        assert_eq!(Line::parse("/usr/bin is full"), Line::Say("/usr/bin is full"));
    }
}
