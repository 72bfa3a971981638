//! Saved conversations as people and scripts meet them: continued, copied, killed, damaged, listed, searched.
//!
//! Conversations are made by `run` on a terminal (`script`, which Linux systems have); without it these tests say so and pass.

#![cfg(target_os = "linux")]

mod terminal;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use terminal::Terminal;

/// What decides over an answer, so that it is the same in every run.
const EXACT: &str = "--temp 0 -n 12";

fn gemrun(home: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
    command.args(arguments).stdin(Stdio::null()).env("GEMRUN_HOME", home);
    for variable in ["GEMRUN_THREADS", "GEMRUN_KERNEL", "GEMRUN_CHATS_BUDGET", "NO_COLOR"] {
        command.env_remove(variable);
    }
    command.output().unwrap()
}

fn ok(home: &Path, arguments: &[&str]) -> String {
    let output = gemrun(home, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn list(home: &Path) -> Vec<Value> {
    serde_json::from_str(&ok(home, &["chats", "list", "--json"])).unwrap()
}

/// What was said, message by message.
fn said(home: &Path, id: &str) -> Vec<String> {
    let messages: Vec<Value> = serde_json::from_str(&ok(home, &["chats", "export", id, "--format", "json"])).unwrap();
    messages.iter().map(|message| message["content"].as_str().unwrap().to_string()).collect()
}

/// The file of a cache that holds its records.
fn data(chat: &Path) -> PathBuf {
    let files = fs::read_dir(chat).unwrap().map(|entry| entry.unwrap().path());
    let data = |path: &PathBuf| path.extension().is_some_and(|e| e.to_str().unwrap().parse::<u64>().is_ok());
    files.into_iter().find(data).unwrap()
}

/// A conversation of two turns in `home`; false without a terminal.
fn two_turns(home: &Path) -> bool {
    let Some(mut terminal) = Terminal::chat(home, EXACT) else { return false };
    terminal.ask("What is gemrun?", " ]");
    terminal.ask("And then?", " ]");
    terminal.press("/exit\r");
    assert_eq!(terminal.end(), 0);
    true
}

#[test]
fn a_chat_goes_on_as_if_it_had_never_stopped() {
    let (stopped, whole) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    if !two_turns(stopped.path()) {
        return;
    }
    // The third turn by a new process, which reads nothing anew but the message.
    let output = gemrun(stopped.path(), &["run", "-C", "Tell me more", "--stats"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let stats: Value = serde_json::from_str(stderr(&output).lines().last().unwrap()).unwrap();
    let (prompt, reused) = (stats["prompt_tokens"].as_u64().unwrap(), stats["reused_tokens"].as_u64().unwrap());
    assert!(reused > 30 && prompt - reused < 24, "{stats}");
    // And by one that never stopped.
    let mut terminal = Terminal::chat(whole.path(), EXACT).unwrap();
    ["What is gemrun?", "And then?", "Tell me more"].iter().for_each(|line| terminal.ask(line, " ]"));
    terminal.press("/exit\r");
    terminal.end();
    let expected = said(whole.path(), "what-is-gemrun");
    assert_eq!(expected.len(), 6);
    // -n is not a setting of a conversation: compare what both said.
    let ours = said(stopped.path(), "what-is-gemrun");
    assert_eq!(ours[..5], expected[..5]);
    assert!(ours[5].starts_with(expected[5].trim_end()), "{ours:?}");

    // On a terminal it says what it continues, and takes turns back.
    let mut terminal = Terminal::start(stopped.path(), &format!("run demo -C what {EXACT}")).unwrap();
    assert!(terminal.screen().contains("Continuing what-is-gemrun: 3 turns, "), "{}", terminal.screen());
    terminal.ask("/undo", "Taken back: Tell me more");
    terminal.ask("/edit Why?", " ]");
    terminal.press("/edit\r");
    terminal.wait_for("Why?");
    terminal.press("\x08\x08\x08\x08Who?\r");
    terminal.wait_for(" ]");
    terminal.ask("/new", "A new conversation.");
    terminal.ask("Hello", " ]");
    terminal.press("/exit\r");
    terminal.end();
    let ours = said(stopped.path(), "what-is-gemrun");
    assert_eq!((ours.len(), ours[0].as_str(), ours[2].as_str()), (4, "What is gemrun?", "Who?"));
    let names: Vec<String> = list(stopped.path()).iter().map(|row| row["id"].as_str().unwrap().to_string()).collect();
    assert_eq!(names, ["hello", "what-is-gemrun"]);
    // The last one is what -C without a name means.
    ok(stopped.path(), &["run", "-C", "And you?", "-n", "4"]);
    assert_eq!(said(stopped.path(), "hello").len(), 4);
}

#[test]
fn damage_costs_time_and_nothing_else() {
    let home = tempfile::tempdir().unwrap();
    if !two_turns(home.path()) {
        return;
    }
    let chat = home.path().join("chats/what-is-gemrun");
    let (transcript, index, data) = (chat.join("transcript.jsonl"), chat.join("kv.index"), data(&chat));
    let before = [&transcript, &index, &data].map(|path| fs::read(path).unwrap());
    let go_on = || {
        let output = gemrun(home.path(), &["run", "-C", "Tell me more", "-n", "12"]);
        assert!(output.status.success(), "{}", stderr(&output));
        (String::from_utf8(output.stdout.clone()).unwrap(), stderr(&output))
    };
    let (answer, notes) = go_on();
    assert_eq!(notes, "");
    let restore = || {
        for (path, bytes) in [&transcript, &index, &data].into_iter().zip(&before) {
            fs::write(path, bytes).unwrap();
        }
    };
    let spoil = |path: &Path, change: &dyn Fn(&mut Vec<u8>)| {
        restore();
        let mut bytes = fs::read(path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
        let (spoilt, notes) = go_on();
        assert_eq!(spoilt, answer, "{}", path.display());
        notes
    };
    let flip = |at: usize| move |bytes: &mut Vec<u8>| bytes[at] ^= 4;
    let note = "note: the saved cache is not used: ";
    assert_eq!(spoil(&index, &flip(100)), format!("{note}kv.index: damaged\n"));
    assert_eq!(spoil(&index, &|bytes| bytes.truncate(9)), format!("{note}kv.index: damaged\n"));
    assert_eq!(spoil(&data, &flip(5000)), format!("{note}kv.1: record 0: damaged\n"));
    assert_eq!(spoil(&data, &|bytes| bytes.truncate(bytes.len() - 7)), format!("{note}kv.1: cut short by 7 bytes\n"));
    // What another version wrote.
    let other = |bytes: &mut Vec<u8>| {
        bytes[8] = 9;
        let end = bytes.len() - 8;
        let hash = xxhash_rust::xxh3::xxh3_64(&bytes[..end]).to_le_bytes();
        bytes[end..].copy_from_slice(&hash);
    };
    assert_eq!(spoil(&index, &other), format!("{note}kv.index: made by another version of gemrun\n"));
    restore();
    fs::remove_file(&index).unwrap();
    assert_eq!(go_on(), (answer.clone(), format!("{note}kv.index: missing\n")));
    // Another way to store keys and values than the conversation's.
    restore();
    let output = gemrun(home.path(), &["run", "-C", "Tell me more", "-n", "12", "--kv", "f32"]);
    assert_eq!(stderr(&output), format!("{note}kv.index: made by another model, or with other settings\n"));
    // A turn that a crash cut in two is not there.
    restore();
    let mut bytes = fs::read(&transcript).unwrap();
    bytes.extend(b"{\"time\":\"2026-11-21T18:01:52Z\",\"turn\":[{\"role\":\"user\"");
    fs::write(&transcript, bytes).unwrap();
    assert_eq!(go_on(), (answer, "note: what-is-gemrun: its last line is cut short and left out\n".to_string()));
    assert_eq!(list(home.path())[0]["turns"], 3);
}

#[test]
fn a_second_process_goes_on_with_a_copy() {
    let home = tempfile::tempdir().unwrap();
    let Some(mut first) = Terminal::chat(home.path(), EXACT) else { return };
    first.ask("What is gemrun?", " ]");
    first.ask("Tell me more about the program", " ]");
    let output = gemrun(home.path(), &["run", "-C", "And then?", "-n", "8", "--stats"]);
    let notes = stderr(&output);
    let note = "note: what-is-gemrun is open in another gemrun: going on with a copy, what-is-gemrun-2\n";
    assert!(notes.starts_with(note), "{notes}");
    let stats: Value = serde_json::from_str(notes.lines().last().unwrap()).unwrap();
    assert!(stats["reused_tokens"].as_u64().unwrap() > 50, "{stats}");
    let removed = gemrun(home.path(), &["chats", "rm", "what-is-gemrun"]);
    assert_eq!(removed.status.code(), Some(1));
    assert!(stderr(&removed).contains("what-is-gemrun: open in another gemrun"), "{}", stderr(&removed));
    first.ask("Who are you?", " ]");
    first.press("/exit\r");
    first.end();
    let (ours, copy) = (said(home.path(), "what-is-gemrun"), said(home.path(), "what-is-gemrun-2"));
    assert_eq!((ours[4].as_str(), copy[4].as_str()), ("Who are you?", "And then?"));
    assert_eq!(ours[..4], copy[..4]);
    ok(home.path(), &["chats", "rm", "what-is-gemrun-2"]);
    assert_eq!(list(home.path()).len(), 1);
}

/// Killed at any time, a chat keeps every turn whose figures were shown, and goes on. `GEMRUN_TEST_KILLS` is how many times.
#[test]
fn a_killed_chat_keeps_its_finished_turns() {
    let kills: u64 = std::env::var("GEMRUN_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(8);
    let home = tempfile::tempdir().unwrap();
    if !two_turns(home.path()) {
        return;
    }
    let mut turns = 2;
    for kill in 0..kills {
        let mut terminal = Terminal::start(home.path(), "run -C --temp 0 -n 40").unwrap();
        let notes = terminal.screen().to_string();
        assert!(
            !notes.contains("kv.") && notes.contains(&format!("Continuing what-is-gemrun: {turns} turn")),
            "{notes}"
        );
        // Once in a while from the beginning, or answers would run out of context.
        for _ in 0..turns - 1 {
            terminal.ask("/undo", "Taken back: ");
        }
        // A finished turn, then death at some moment of the second or third.
        terminal.ask(&format!("Question {kill}"), " ]");
        terminal.press("Tell me a story about a lamp\rAnd another one\r");
        std::thread::sleep(Duration::from_micros(kill * 7919 % 100 * 2500));
        terminal.kill();
        let finished = 2 + terminal.rest().matches(" tok/s | first").count();
        let messages = said(home.path(), "what-is-gemrun");
        turns = messages.len() / 2;
        // A turn may be on the disk before its figures are on the screen.
        assert!(
            messages.len().is_multiple_of(2) && turns >= finished && turns <= 4,
            "kill {kill}: {finished} finished: {messages:?}"
        );
        assert_eq!(messages[0], "What is gemrun?");
        assert_eq!(messages[2], format!("Question {kill}"));
        ok(home.path(), &["run", "-C", "Go on", "-n", "4"]);
        assert_eq!(list(home.path())[0]["damage"], Value::Null);
        turns += 1;
    }
    println!("{kills} times killed");
}

#[test]
fn lists_searches_exports() {
    let home = tempfile::tempdir().unwrap();
    let empty = gemrun(home.path(), &["run", "-C"]);
    assert_eq!(empty.status.code(), Some(3), "{}", stderr(&empty));
    assert!(ok(home.path(), &["chats"]).is_empty());
    if !two_turns(home.path()) {
        return;
    }
    let row = &list(home.path())[0];
    assert_eq!((row["id"].as_str(), row["title"].as_str()), (Some("what-is-gemrun"), Some("What is gemrun?")));
    assert!(row["turns"] == 2 && row["model"] == "demo" && row["kv_bytes"].as_u64().unwrap() > 10_000, "{row}");
    let hits: Vec<Value> =
        serde_json::from_str(&ok(home.path(), &["chats", "search", "GEMRUN", "what", "--json"])).unwrap();
    assert_eq!((hits.len(), hits[0]["role"].as_str(), &hits[0]["turn"]), (1, Some("user"), &Value::from(1)));
    assert!(ok(home.path(), &["chats", "search", "zeppelin"]).is_empty());
    let shown = ok(home.path(), &["chats", "show"]);
    assert!(shown.contains("> What is gemrun?") && shown.contains("> And then?"), "{shown}");
    let file = home.path().join("sky.md");
    ok(home.path(), &["chats", "export", "what", "-o", file.to_str().unwrap()]);
    let exported = fs::read_to_string(&file).unwrap();
    assert!(exported.starts_with("# What is gemrun?\n") && exported.contains("**You:** And then?"), "{exported}");
    for (arguments, code) in [(["chats", "show", "nope"], 3), (["chats", "rm", "../x"], 3), (["run", "-C", "nope"], 3)]
    {
        assert_eq!(gemrun(home.path(), &arguments).status.code(), Some(code), "{arguments:?}");
    }
    ok(home.path(), &["chats", "rm", "--cache", "what-is-gemrun"]);
    assert_eq!(list(home.path())[0]["kv_bytes"], 0);
    ok(home.path(), &["run", "-C", "Tell me more", "-n", "4"]);
    assert!(list(home.path())[0]["kv_bytes"].as_u64().unwrap() > 10_000);
    // No room for caches: the oldest goes, the one in use stays.
    let mut terminal = Terminal::start(home.path(), "run demo -n 4").unwrap();
    terminal.ask("Hello", " ]");
    terminal.press("/exit\r");
    terminal.end();
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
    command.args(["run", "-C", "hello", "Say it again", "-n", "4"]).env("GEMRUN_HOME", home.path());
    assert!(command.env("GEMRUN_CHATS_BUDGET", "1K").stdin(Stdio::null()).output().unwrap().status.success());
    let rows = list(home.path());
    let bytes = |id: &str| rows.iter().find(|row| row["id"] == id).unwrap()["kv_bytes"].as_u64().unwrap();
    assert!(bytes("what-is-gemrun") == 0 && bytes("hello") > 0, "{rows:?}");
    // Nor is anything left of a chat in which nothing was said.
    let mut terminal = Terminal::start(home.path(), "run demo --ctx 50").unwrap();
    terminal.ask(&"lamps and ships ".repeat(20), "expected at most 50, the context");
    terminal.press("/exit\r");
    terminal.end();
    assert_eq!(list(home.path()).len(), 2);
    // Nothing is left of a chat that is not to be saved.
    let mut terminal = Terminal::start(home.path(), "run demo -n 4 --no-save").unwrap();
    terminal.ask("Secret", " ]");
    terminal.press("/exit\r");
    terminal.end();
    assert_eq!(list(home.path()).len(), 2);
}

#[test]
fn what_is_remembered_recalled_and_read() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path();
    assert!(ok(path, &["memory"]).is_empty());
    if !two_turns(path) {
        return;
    }
    assert!(!path.join("memory.md").exists(), "off until used");
    ok(path, &["memory", "add", "My", "lamp is green"]);
    ok(path, &["memory", "add", "I keep a lighthouse"]);
    let output = gemrun(path, &["memory", "forget", "LIGHTHOUSE"]);
    assert_eq!(stderr(&output), "forgotten: I keep a lighthouse\n");
    assert_eq!(gemrun(path, &["memory", "forget", "7"]).status.code(), Some(3));
    assert_eq!(ok(path, &["memory", "list", "--json"]), "[\"My lamp is green\"]\n");
    let document = path.join("lamps.txt");
    fs::write(&document, "Lamps are lit at dusk.\nShips see them.\n").unwrap();
    let document = document.to_str().unwrap();

    let mut terminal = Terminal::start(path, "run demo --temp 0 -n 8 --system Kindly").unwrap();
    terminal.ask("/show", "Not saved yet.");
    assert!(terminal.screen().contains("System prompt: Kindly") && terminal.screen().contains("  1  My lamp is green"));
    terminal.ask("/remember Ships are late", "Remembered: ");
    terminal.ask("/remember", "  2  Ships are late");
    terminal.ask("/recall GEMRUN what", "Your next message begins with, from what-is-gemrun: What is gemrun?");
    terminal.ask("/recall zeppelins", "Nothing found in other conversations.");
    terminal.ask(&format!("/read {document}"), "(2 lines).");
    terminal.ask("/read /nonexistent", "no such file");
    terminal.ask("Is it late?", " ]");
    terminal.ask("/forget late", "Forgotten: Ships are late.");
    terminal.ask("/chats", "is-it-late  just now");
    terminal.ask("/compact", "There is nothing to sum up");
    terminal.ask("And now?", " ]");
    terminal.ask("/compact", "\r\n");
    terminal.ask("/show", "Instead of the first turn: ");
    terminal.ask("And then?", " ]");
    terminal.press("/exit\r");
    assert_eq!(terminal.end(), 0);
    // All of it stands in the transcript.
    let messages = said(path, "is-it-late");
    let (system, first) = (&messages[0], &messages[1]);
    assert_eq!(system, "Kindly");
    assert!(
        first.starts_with(
            "Remember: Ships are late\n\nFrom an earlier conversation of ours:\nI: What is gemrun?\nYou: "
        )
    );
    assert!(first.ends_with("\n\nLamps are lit at dusk.\nShips see them.\n\nIs it late?"), "{first:?}");
    let shown: Value = serde_json::from_str(&ok(path, &["chats", "show", "is-it-late", "--json"])).unwrap();
    assert_eq!(shown["header"]["settings"]["facts"][0], "My lamp is green");
    assert!(shown["left_out"] == 1 && shown["title"] == "Is it late?" && shown["summary"].is_string(), "{shown}");
    // A conversation goes on with what it knew.
    ok(path, &["memory", "forget", "1"]);
    let output = gemrun(path, &["run", "-C", "Go on now", "-n", "4", "--stats"]);
    let stats: Value = serde_json::from_str(stderr(&output).lines().last().unwrap()).unwrap();
    let (prompt, reused) = (stats["prompt_tokens"].as_u64().unwrap(), stats["reused_tokens"].as_u64().unwrap());
    assert!(prompt - reused < 24, "{stats}");

    // A document that was read beforehand.
    fs::write(document, "Lamps are lit at dusk. Ships see them. ".repeat(20)).unwrap();
    let output = gemrun(path, &["warm", "demo", document]);
    assert!(output.status.success() && stderr(&output).contains(" tokens, "), "{}", stderr(&output));
    let again = stderr(&gemrun(path, &["warm", "demo", document]));
    assert!(again.contains(" tokens, 1 of them read now"), "{again}");
    let output = gemrun(path, &["run", "demo", "--file", document, "When?", "-n", "4", "--stats"]);
    let stats: Value = serde_json::from_str(stderr(&output).lines().last().unwrap()).unwrap();
    let (prompt, reused) = (stats["prompt_tokens"].as_u64().unwrap(), stats["reused_tokens"].as_u64().unwrap());
    assert!(reused > 150 && prompt - reused < 20, "{stats}");
}

/// The context is too small for the conversation: it says so and goes on, or stops, as asked.
/// What a message began with does not go with the message.
#[test]
fn notes_survive_undo() {
    let home = tempfile::tempdir().unwrap();
    let Some(mut terminal) = Terminal::chat(home.path(), EXACT) else { return };
    terminal.ask("/remember I live in a lighthouse", "Remembered");
    terminal.ask("Who are you?", "tok");
    terminal.ask("/undo", "Taken back: Who are you?");
    terminal.ask("What is gemrun?", "tok");
    terminal.ask("/undo", "Taken back: What is gemrun?");
    terminal.ask("What is a GGUF file?", "tok");
    terminal.press("/exit\r");
    terminal.wait_for("Saved as ");
    assert_eq!(terminal.end(), 0);
    let chat = fs::read_dir(home.path().join("chats")).unwrap().next().unwrap().unwrap().path();
    let transcript = fs::read_to_string(chat.join("transcript.jsonl")).unwrap();
    assert_eq!(transcript.matches("I live in a lighthouse").count(), 3, "{transcript}");
}

#[test]
fn a_full_context_is_seen() {
    let home = tempfile::tempdir().unwrap();
    let Some(mut terminal) = Terminal::chat(home.path(), "--temp 0 -n 40 --ctx 150 --ignore-eos") else { return };
    terminal.ask("What is gemrun?", " ]");
    terminal.ask("And then?", " ]");
    terminal.ask("And then?", "| the context of 150 tok is full ]");
    terminal.ask("And then?", "the context is full: the oldest 2 turns are left out");
    terminal.press("/exit\r");
    terminal.end();
    let mut terminal = Terminal::start(home.path(), "run -C -n 4").unwrap();
    terminal.ask("/show", "The first 2 turns are left out.");
    terminal.press("/exit\r");
    terminal.end();
    let long = "lamp ship ".repeat(20);
    let output = gemrun(home.path(), &["run", "-C", "--overflow", "stop", &long, "-n", "4"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains(" tokens: expected at most 150, the context"), "{}", stderr(&output));
    let output = gemrun(home.path(), &["run", "-C", &long, "-n", "4"]);
    assert!(
        output.status.success() && stderr(&output).contains("note: the context is full: the oldest "),
        "{}",
        stderr(&output)
    );
}
