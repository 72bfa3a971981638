//! The chat as people meet it: on a terminal, key by key.
//!
//! Without `script`, which makes the terminal, these tests say so and pass.

#![cfg(target_os = "linux")]

mod terminal;

use std::time::Duration;

use terminal::Terminal;

#[test]
fn a_conversation() {
    let home = tempfile::tempdir().unwrap();
    let Some(mut terminal) = Terminal::chat(home.path(), "--temp 0 -n 12") else { return };
    terminal.press("What is gemrun?\r");
    let answer = terminal.wait_for("[ ");
    assert!(answer.split_once('\n').is_some_and(|(_, answer)| answer.trim().len() > 3), "{answer:?}");
    let figures = terminal.wait_for(" ]");
    assert!(figures.contains(" tok/s | first token ") && !figures.contains("reused"), "{figures}");
    terminal.wait_for("demo> ");
    // The second message finds the first in the cache.
    terminal.press("And then?\r");
    terminal.wait_for("[ ");
    let figures = terminal.wait_for(" ]");
    assert!(figures.contains(" reused"), "{figures}");
    terminal.wait_for("demo> ");
    terminal.ask("/stats", "4 messages, ");
    terminal.ask("/regen", " ]");
    terminal.ask("/undo", "Taken back: And then?");
    terminal.ask("/undo", "Taken back: What is gemrun?");
    terminal.ask("/undo", "There is nothing to take back.");
    terminal.ask("/regen", "There is no message to answer again.");
    terminal.press("\"\"\"\r");
    terminal.wait_for("... ");
    terminal.press("two\r");
    terminal.wait_for("... ");
    terminal.ask("lines\"\"\"", " ]");
    terminal.ask("/undo", "Taken back: two...");
    terminal.ask("/system be brief", "System prompt set.");
    terminal.ask("/think on", "The model thinks before it answers.");
    terminal.ask("/new", "A new conversation.");
    terminal.ask("/stats", "0 messages, ");
    terminal.ask("/dance", "/dance: no such command; /help lists them");
    terminal.ask("/help", "/regen");
    terminal.press("/exit\r");
    assert_eq!(terminal.end(), 0);
    let history = std::fs::read_to_string(home.path().join("history.txt")).unwrap();
    assert!(history.contains("What is gemrun?") && history.contains("/dance"), "{history}");
}

#[test]
fn an_interrupt_ends_the_answer_and_keeps_the_chat() {
    let home = tempfile::tempdir().unwrap();
    let Some(mut terminal) = Terminal::chat(home.path(), "--ignore-eos --kernel scalar -t 1 --batch 1") else { return };
    terminal.press("Tell me a story\r");
    terminal.wait_for("\n");
    // The answer has begun when something stands in its line that is not the bar of a slow prompt, which clears the line before
    // it is drawn or goes.
    let begun = |shown: &str| {
        let line = shown.rsplit("\x1b[2K").next().unwrap_or_default().trim();
        !line.is_empty() && !line.starts_with("reading the prompt")
    };
    while !begun(terminal.since()) {
        assert!(terminal.more(Duration::from_secs(60)));
    }
    terminal.press("\x03");
    terminal.wait_for(" | stopped ]");
    terminal.wait_for("demo> ");
    terminal.ask("/stats", "2 messages, ");
    terminal.press("\x04");
    assert_eq!(terminal.end(), 0);
}

#[test]
fn two_interrupts_at_the_prompt_leave() {
    let home = tempfile::tempdir().unwrap();
    let Some(mut terminal) = Terminal::chat(home.path(), "") else { return };
    terminal.press("\x03");
    terminal.wait_for("Ctrl-C again leaves");
    terminal.wait_for("demo> ");
    terminal.press("\x03");
    assert_eq!(terminal.end(), 130);
}
