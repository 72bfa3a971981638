//! The program on a terminal of its own, key by key.
//!
//! The terminal is a pseudo-terminal made by `script`, which Linux systems have. Each step waits for what the screen must show
//! before it types on, so nothing depends on speed.

#![allow(dead_code)] // each test uses what it needs

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// A program on a terminal.
pub struct Terminal {
    child: Child,
    keys: Option<ChildStdin>,
    output: Receiver<Vec<u8>>,
    screen: String,
    /// What has been waited for ends here.
    seen: usize,
}

impl Terminal {
    /// Starts a chat with the demo model and a seed; `None` without `script`.
    pub fn chat(home: &Path, arguments: &str) -> Option<Terminal> {
        Terminal::start(home, &format!("run demo --seed 1 {arguments}"))
    }

    /// Starts gemrun and waits for the prompt of a chat with the demo model; `None` without `script`.
    pub fn start(home: &Path, arguments: &str) -> Option<Terminal> {
        let mut terminal = Terminal::open(home, arguments)?;
        terminal.wait_for("demo> ");
        Some(terminal)
    }

    /// Starts gemrun; `None` without `script`.
    pub fn open(home: &Path, arguments: &str) -> Option<Terminal> {
        Terminal::open_with(home, arguments, &[])
    }

    /// The same with variables of the environment.
    pub fn open_with(home: &Path, arguments: &str, variables: &[(&str, &str)]) -> Option<Terminal> {
        // exec: a shell in between would turn an interrupt into an exit code of its own.
        let command = format!("exec '{}' {arguments}", env!("CARGO_BIN_EXE_gemrun"));
        let mut script = Command::new("script");
        script.args(["--quiet", "--return", "--flush", "--command", &command, "/dev/null"]);
        script.env("GEMRUN_HOME", home).env("TERM", "xterm").env("NO_COLOR", "1").env("SHELL", "/bin/sh");
        for variable in ["GEMRUN_KERNEL", "GEMRUN_THREADS", "GEMRUN_CHATS_BUDGET"] {
            script.env_remove(variable);
        }
        script.envs(variables.iter().copied());
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
        let keys = child.stdin.take();
        Some(Terminal { child, keys, output, screen: String::new(), seen: 0 })
    }

    /// Types.
    pub fn press(&mut self, keys: &str) {
        let pipe = self.keys.as_mut().unwrap();
        pipe.write_all(keys.as_bytes()).and_then(|()| pipe.flush()).unwrap();
    }

    /// All that was shown so far.
    pub fn screen(&self) -> &str {
        &self.screen
    }

    /// Waits for more to be shown; false when there is no more.
    pub fn more(&mut self, patience: Duration) -> bool {
        // The demo's answers are plain text: what is cut in two by a read is a colour or a cursor at most.
        let bytes = self.output.recv_timeout(patience);
        bytes.map(|bytes| self.screen.push_str(&String::from_utf8_lossy(&bytes))).is_ok()
    }

    /// What was shown since what was waited for.
    pub fn since(&self) -> &str {
        &self.screen[self.seen..]
    }

    /// Waits until `text` appears after what was waited for before; what stands between the two.
    pub fn wait_for(&mut self, text: &str) -> String {
        let start = Instant::now();
        loop {
            if let Some(at) = self.since().find(text) {
                let between = self.screen[self.seen..self.seen + at].to_string();
                self.seen += at + text.len();
                return between;
            }
            if !self.more(Duration::from_secs(60).saturating_sub(start.elapsed())) {
                panic!("{text:?} does not appear: {:?}", self.since());
            }
        }
    }

    /// Types a line, waits for `answer`, then for the next prompt.
    pub fn ask(&mut self, line: &str, answer: &str) {
        self.press(&format!("{line}\r"));
        self.wait_for(answer);
        self.wait_for("demo> ");
    }

    /// The exit code, at the end.
    pub fn end(&mut self) -> i32 {
        self.child.wait().unwrap().code().unwrap()
    }

    /// Kills the program, which hears nothing of it, and waits until it is gone.
    pub fn kill(&mut self) {
        let script = self.child.id();
        let child = || {
            std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
                let id: u32 = entry.file_name().to_str()?.parse().ok()?;
                let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
                let parent = stat.rsplit(')').next()?.split_whitespace().nth(1)?;
                (parent.parse() == Ok(script)).then_some(id)
            })
        };
        let gemrun = child().expect("a process on the terminal");
        assert!(Command::new("kill").args(["-9", &gemrun.to_string()]).status().unwrap().success());
        self.child.wait().unwrap();
    }

    /// What was shown since what was waited for, after the end.
    pub fn rest(&mut self) -> &str {
        while self.more(Duration::from_secs(60)) {}
        self.since()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
