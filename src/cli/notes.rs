//! What a chat brings into a conversation from elsewhere: files, facts, other conversations. Each command answers with a line.
//!
//! It becomes the beginning of the next message, where the user sees it in the transcript, and the model reads it once.

use std::path::Path;

use gemrun::chats::transcript;
use gemrun::facts;

use super::run::Talk;
use super::terminal::Shown;
use super::{chats, memory, text};

/// Characters of a turn that are brought in.
const LONGEST: usize = 2000;

/// `/read FILE`.
pub fn read(talk: &mut Talk, file: &str) -> String {
    if file.is_empty() {
        return "/read FILE: expected the name of a file".into();
    }
    match text::from_file(Path::new(file)) {
        Ok(document) => {
            let lines = document.lines().count();
            talk.notes.push(document);
            format!("Your next message begins with {} ({lines} lines).", shown(file))
        }
        Err(error) => error.to_string(),
    }
}

/// `/chats`.
pub fn chats() -> String {
    let listed = match chats::saved() {
        Ok(saved) => saved.list(),
        Err(error) => return error.to_string(),
    };
    let lines = listed.iter().take(10).map(|chat| format!("{}  {}", shown(&chat.id), chats::ago(chat.updated)));
    let lines: Vec<String> = lines.collect();
    match lines.is_empty() {
        true => "No conversations yet.".into(),
        false => lines.join("\n"),
    }
}

/// `/recall WORDS`: the newest turn with all of the words in one message.
pub fn recall(talk: &mut Talk, words: &str) -> String {
    let saved = match chats::saved() {
        Ok(saved) => saved,
        Err(error) => return error.to_string(),
    };
    let hits = saved.search(words);
    let Some(hit) = hits.iter().find(|hit| Some(hit.id.as_str()) != talk.keep.id()) else {
        return "Nothing found in other conversations.".into();
    };
    let Ok(chat) = saved.read(&hit.id) else { return format!("{}: cannot be read", shown(&hit.id)) };
    let messages = chat.turns().get(hit.turn - 1).map_or(&[][..], |turn| &turn.messages);
    let said = messages.iter().filter_map(|message| {
        let who = match message["role"].as_str()? {
            "user" => "I",
            "assistant" => "You",
            _ => return None,
        };
        let text = transcript::text(message);
        (!text.is_empty()).then(|| format!("{who}: {text}"))
    });
    let mut turn = said.collect::<Vec<_>>().join("\n");
    if let Some((end, _)) = turn.char_indices().nth(LONGEST) {
        turn.truncate(end);
        turn += " ...";
    }
    let more = hits.iter().filter(|other| other.id != hit.id).count();
    let more = if more > 0 { format!(" {more} more in others: gemrun chats search.") } else { String::new() };
    talk.notes.push(format!("From an earlier conversation of ours:\n{turn}"));
    format!("Your next message begins with, from {}: {}{more}", shown(&hit.id), shown(&hit.excerpt))
}

/// `/remember FACT`.
pub fn remember(talk: &mut Talk, fact: &str) -> String {
    let known = match memory::home() {
        Ok(home) if fact.is_empty() => facts::read(&home),
        Ok(home) => match facts::add(&home, fact) {
            Ok(()) => {
                // What a conversation begins with is settled; this one is told with the next message.
                talk.notes.push(format!("Remember: {fact}"));
                return "Remembered: conversations that begin from now on know it, and this one with your next message.".into();
            }
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    };
    match known {
        Ok(facts) if facts.is_empty() => "Nothing is remembered; /remember FACT changes that.".into(),
        Ok(facts) => list(&facts),
        Err(error) => error.to_string(),
    }
}

/// `/forget WHICH`.
pub fn forget(which: &str) -> String {
    if which.is_empty() {
        return "/forget WHICH: expected a number as /remember lists it, or words".into();
    }
    match memory::home().and_then(|home| facts::forget(&home, which)) {
        Ok(gone) => format!("Forgotten: {}. This conversation still knows it.", shown(&gone.join("; "))),
        Err(error) => error.to_string(),
    }
}

/// `/show`: what the model reads that the user did not just type.
pub fn show(talk: &Talk) -> String {
    let (system, facts) = talk.keep.instructions();
    let mut parts = vec![match system {
        Some(system) => format!("System prompt: {}", shown(system)),
        None => "No system prompt.".to_string(),
    }];
    parts.push(match facts {
        [] => "Nothing is remembered.".to_string(),
        facts => format!("Remembered when this conversation began:\n{}", list(facts)),
    });
    match talk.session.left_out() {
        (0, _) => {}
        (1, None) => parts.push("The first turn is left out.".into()),
        (turns, None) => parts.push(format!("The first {turns} turns are left out.")),
        (1, Some(summary)) => parts.push(format!("Instead of the first turn: {}", shown(summary))),
        (turns, Some(summary)) => parts.push(format!("Instead of the first {turns} turns: {}", shown(summary))),
    }
    for note in &talk.notes {
        let (first, count) = (note.lines().next().unwrap_or_default(), note.chars().count());
        parts.push(format!("With your next message, {count} characters: {}", shown(first)));
    }
    parts.push(match talk.keep.id() {
        Some(id) => format!("Saved as {}.", shown(id)),
        None => "Not saved yet.".into(),
    });
    parts.join("\n")
}

fn list(facts: &[String]) -> String {
    let lines = facts.iter().enumerate().map(|(i, fact)| format!("{:>3}  {}", i + 1, shown(fact)));
    lines.collect::<Vec<_>>().join("\n")
}

fn shown(text: &str) -> String {
    Shown::terminal().text(text)
}
