//! The chat as people meet it: on a terminal, key by key.
//!
//! The terminal is a pseudo-terminal made by `script`, which Linux systems have; without it these tests say so and
//! pass. Each step waits for what the screen must show before it types on, so nothing depends on speed.

#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// A program on a terminal of its own.
struct Terminal {
    child: Child,
    keys: Option<ChildStdin>,
    output: Receiver<Vec<u8>>,
    screen: String,
    /// What has been waited for ends here.
    seen: usize,
    _home: tempfile::TempDir,
    history: std::path::PathBuf,
}

impl Terminal {
    /// Starts a chat with the demo model; `None` without `script`.
    fn chat(arguments: &str) -> Option<Terminal> {
        let home = tempfile::tempdir().unwrap();
        // exec: a shell in between would turn an interrupt into an exit code of its own.
        let command = format!("exec '{}' run demo --seed 1 {arguments}", env!("CARGO_BIN_EXE_gemrun"));
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--flush", "--command", &command, "/dev/null"]);
        script.env("GEMRUN_HOME", home.path()).env("TERM", "xterm").env("NO_COLOR", "1").env("SHELL", "/bin/sh");
        script.env_remove("GEMRUN_KERNEL").env_remove("GEMRUN_THREADS");
        let Ok(mut child) = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
            println!("skipped: no script command");
            return None;
        };
        let (sender, output) = channel();
        let mut stdout = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        let (keys, history) = (child.stdin.take(), home.path().join("history.txt"));
        let mut terminal = Terminal { child, keys, output, screen: String::new(), seen: 0, _home: home, history };
        terminal.wait_for("demo> ");
        Some(terminal)
    }

    fn press(&mut self, keys: &str) {
        let pipe = self.keys.as_mut().unwrap();
        pipe.write_all(keys.as_bytes()).and_then(|()| pipe.flush()).unwrap();
    }

    /// Waits until `text` appears after what was waited for before; what stands between the two.
    fn wait_for(&mut self, text: &str) -> String {
        let start = Instant::now();
        loop {
            if let Some(at) = self.screen[self.seen..].find(text) {
                let between = self.screen[self.seen..self.seen + at].to_string();
                self.seen += at + text.len();
                return between;
            }
            match self.output.recv_timeout(Duration::from_secs(60).saturating_sub(start.elapsed())) {
                // The demo's answers are plain text: what is cut in two by a read is a colour or a cursor at most.
                Ok(bytes) => self.screen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("{text:?} does not appear: {:?}", &self.screen[self.seen..]),
            }
        }
    }

    /// Types a line, waits for `answer`, then for the next prompt.
    fn ask(&mut self, line: &str, answer: &str) {
        self.press(&format!("{line}\r"));
        self.wait_for(answer);
        self.wait_for("demo> ");
    }

    /// The exit code, at the end.
    fn end(&mut self) -> i32 {
        self.child.wait().unwrap().code().unwrap()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_conversation() {
    let Some(mut terminal) = Terminal::chat("--temp 0 -n 12") else { return };
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
    let history = std::fs::read_to_string(&terminal.history).unwrap();
    assert!(history.contains("What is gemrun?") && history.contains("/dance"), "{history}");
}

#[test]
fn an_interrupt_ends_the_answer_and_keeps_the_chat() {
    let Some(mut terminal) = Terminal::chat("--ignore-eos --kernel scalar -t 1 --batch 1") else { return };
    terminal.press("Tell me a story\r");
    terminal.wait_for("\n");
    // The answer has begun when something stands in its line.
    while terminal.screen[terminal.seen..].trim().is_empty() {
        let bytes = terminal.output.recv_timeout(Duration::from_secs(60)).unwrap();
        terminal.screen.push_str(&String::from_utf8_lossy(&bytes));
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
    let Some(mut terminal) = Terminal::chat("") else { return };
    terminal.press("\x03");
    terminal.wait_for("Ctrl-C again leaves");
    terminal.wait_for("demo> ");
    terminal.press("\x03");
    assert_eq!(terminal.end(), 130);
}
