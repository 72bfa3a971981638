//! Tools: declared in a file, called by the model, run by a program of the user's.
//!
//! The program is started once for each call, with the tool's name as its argument and the call as JSON on its standard
//! input; what it writes is the result. It is the user's program with the user's rights, so it is not run before the user
//! has said yes. Whatever goes wrong becomes a result the model can read.

use std::ffi::OsString;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use clap::Args;
use gemrun::error::printable;
use gemrun::session::{Call, End, Reply};
use gemrun::{Error, Kind};
use serde_json::{Value, json};

use super::terminal::{Shown, Style, eprintln_quietly};
use super::text;

/// Flags on tools.
#[derive(Args)]
pub struct ToolFlags {
    /// Declare the tools in FILE to the model: a JSON array in OpenAI's form
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
    /// Run PROGRAM for each call: the tool's name is its argument, the call its standard input, its standard output the
    /// result; asks first
    #[arg(long, value_name = "PROGRAM", requires = "tools")]
    tool_cmd: Option<OsString>,
    /// Run it without asking
    #[arg(long, requires = "tool_cmd")]
    allow_tools: bool,
    /// Seconds a call may take
    #[arg(long, value_name = "N", default_value_t = 60, requires = "tool_cmd")]
    tool_timeout: u64,
}

/// Bytes of a result at most: far more than a model reads in a minute.
const MAX_RESULT: u64 = 64 << 10;
/// Of what a program says on standard error, so much is looked at.
const MAX_COMPLAINT: u64 = 4 << 10;
/// Replies that only call tools, in a row.
const MAX_ROUNDS: usize = 10;
/// How often a running program is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// How long a program that has ended may leave its output open to programs it started.
const GRACE: Duration = Duration::from_secs(1);

/// The tools of a conversation.
pub struct Tools {
    declarations: Vec<Value>,
    program: Option<OsString>,
    allowed: bool,
    limit: Duration,
}

impl ToolFlags {
    /// Reads the declarations.
    pub fn read(&self) -> gemrun::Result<Tools> {
        let declarations = self.tools.as_deref().map(declarations).transpose()?.unwrap_or_default();
        if let Some(program) = &self.tool_cmd
            && Path::new(program).components().count() > 1
            && !Path::new(program).exists()
        {
            let name = Path::new(program).display();
            return Err(Error::new(Kind::NotFound, format!("{name}: no such file: expected the program for tools")));
        }
        let limit = Duration::from_secs(self.tool_timeout);
        Ok(Tools { declarations, program: self.tool_cmd.clone(), allowed: self.allow_tools, limit })
    }
}

/// The declarations in a file.
fn declarations(path: &Path) -> gemrun::Result<Vec<Value>> {
    let wrong = |what: String| Error::usage(format!("{}: {what}", path.display()));
    let tools: Vec<Value> = serde_json::from_str(&text::from_file(path)?)
        .map_err(|e| wrong(format!("{e}: expected a JSON array of tools")))?;
    for (i, tool) in tools.iter().enumerate() {
        let function = &tool["function"];
        if function["name"].as_str().is_none_or(str::is_empty) {
            let expected = "expected {\"type\": \"function\", \"function\": {\"name\": ...}}";
            return Err(wrong(format!("tool {}: has no function with a name: {expected}", i + 1)));
        }
        if !matches!(function["parameters"], Value::Null | Value::Object(_)) {
            return Err(wrong(format!("tool {}: parameters: expected a JSON schema", i + 1)));
        }
    }
    Ok(tools)
}

impl Tools {
    /// As the template wants them.
    pub fn declarations(&self) -> &[Value] {
        &self.declarations
    }

    /// Whether calls are run; else they are only shown.
    pub fn run(&self) -> bool {
        self.program.is_some()
    }

    /// Runs what `reply` calls, after `round` replies that did so. `None` where there is nothing to go on with: no calls,
    /// no program, too many rounds, or the user has had enough.
    pub fn results(&mut self, reply: &Reply, round: usize, interrupt: &AtomicBool) -> Option<Vec<Value>> {
        let program = self.program.clone()?;
        if reply.calls.is_empty() || reply.end != End::Stop {
            return None;
        }
        if round >= MAX_ROUNDS {
            eprintln_quietly(format_args!(
                "note: {MAX_ROUNDS} replies in a row called tools: the last calls are not run"
            ));
            return None;
        }
        let mut results = Vec::new();
        for call in &reply.calls {
            let result = self.result(&program, call, interrupt);
            if interrupt.load(Ordering::Relaxed) {
                return None;
            }
            let result = result.unwrap_or_else(|error| json!({ "error": error }));
            let style = Style::stderr();
            let said: String = printable(&result.to_string()).chars().take(200).collect();
            eprintln_quietly(format_args!("{}{}: {said}{}", style.dim(), printable(&call.name), style.plain()));
            results.push(result);
        }
        Some(results)
    }

    fn result(&mut self, program: &OsString, call: &Call, interrupt: &AtomicBool) -> Result<Value, String> {
        if !self.declarations.iter().any(|tool| tool["function"]["name"] == call.name.as_str()) {
            return Err("there is no such tool".into());
        }
        if !self.allowed {
            match ask(call) {
                Said::Yes => {}
                Said::Always => self.allowed = true,
                Said::No => return Err("the user does not want this call to be run".into()),
            }
        }
        execute(program, call, self.limit, interrupt)
    }
}

/// What a user says to a call.
enum Said {
    Yes,
    Always,
    No,
}

fn ask(call: &Call) -> Said {
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        eprintln_quietly(format_args!(
            "note: {} is not run: nobody can be asked; see --allow-tools",
            printable(&call.name)
        ));
        return Said::No;
    }
    let call = Shown::terminal().text(&printable(&format!("{}{}", call.name, call.arguments)));
    let _ = write!(std::io::stderr(), "run {call}? [y]es, [a]lways, [N]o ");
    let mut line = String::new();
    match std::io::stdin().read_line(&mut line).map(|_| line.trim().to_ascii_lowercase()).as_deref() {
        Ok("y" | "yes") => Said::Yes,
        Ok("a" | "always") => Said::Always,
        _ => Said::No,
    }
}

/// Runs `program` for `call`.
fn execute(program: &OsString, call: &Call, limit: Duration, interrupt: &AtomicBool) -> Result<Value, String> {
    let name = Path::new(program).display();
    let pipe = Stdio::piped;
    let mut child = Command::new(program)
        .arg(&call.name)
        .stdin(pipe())
        .stdout(pipe())
        .stderr(pipe())
        .spawn()
        .map_err(|e| format!("cannot run {name}: {e}"))?;
    let request = json!({ "name": call.name, "arguments": call.arguments }).to_string() + "\n";
    if let Some(mut stdin) = child.stdin.take() {
        // A thread of its own: a program need not read before it writes. That it does not read at all is no error.
        std::thread::spawn(move || stdin.write_all(request.as_bytes()));
    }
    let output = child.stdout.take().map(|from| read(from, MAX_RESULT));
    let complaint = child.stderr.take().map(|from| read(from, MAX_COMPLAINT));

    let status = wait(&mut child, limit, interrupt)?;
    let take =
        |from: Option<Receiver<Vec<u8>>>| from.and_then(|from| from.recv_timeout(GRACE).ok()).unwrap_or_default();
    let (output, complaint) = (take(output), take(complaint));
    if !status.success() {
        let complaint = String::from_utf8_lossy(&complaint);
        let line = complaint.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason given");
        return Err(format!("{name}: {status}: {line}"));
    }
    if output.len() as u64 > MAX_RESULT {
        return Err(format!("the result is longer than {} KiB", MAX_RESULT >> 10));
    }
    let text = String::from_utf8(output).map_err(|_| "the result is not UTF-8".to_string())?;
    Ok(serde_json::from_str(&text).unwrap_or_else(|_| Value::String(text.trim_end().to_string())))
}

/// Waits until `child` ends, its time is up or the user has had enough.
fn wait(child: &mut Child, limit: Duration, interrupt: &AtomicBool) -> Result<std::process::ExitStatus, String> {
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) => {}
            Err(error) => return Err(error.to_string()),
        }
        let stopped = interrupt.load(Ordering::Relaxed);
        if stopped || start.elapsed() >= limit {
            let _ = child.kill();
            let _ = child.wait();
            return Err(match stopped {
                true => "stopped by the user".into(),
                false => format!("no result after {} s", limit.as_secs()),
            });
        }
        std::thread::sleep(LOOK);
    }
}

/// Reads `from` to its end in a thread of its own; more than `limit` bytes and one are thrown away.
fn read(mut from: impl Read + Send + 'static, limit: u64) -> Receiver<Vec<u8>> {
    let (done, waiting) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.by_ref().take(limit + 1).read_to_end(&mut bytes);
        let _ = std::io::copy(&mut from, &mut std::io::sink());
        let _ = done.send(bytes);
    });
    waiting
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// Runs a shell script as the program for a call of `f`.
    fn run(script: &str, limit: Duration, stopped: bool) -> Result<Value, String> {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("tool");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let call = Call { name: "f".into(), arguments: json!({"city": "Zürich"}) };
        execute(&program.into(), &call, limit, &AtomicBool::new(stopped))
    }

    #[test]
    fn results_and_failures() {
        let limit = Duration::from_secs(20);
        let ok = |script: &str| run(script, limit, false).unwrap();
        assert_eq!(ok("cat"), json!({"name": "f", "arguments": {"city": "Zürich"}}));
        assert_eq!(ok("echo \"[1, \\\"$1\\\"]\""), json!([1, "f"]));
        assert_eq!(ok("echo 20 degrees"), json!("20 degrees"));
        assert_eq!(ok("true"), json!(""));
        // A child that keeps the output open does not hold the result up for ever.
        assert_eq!(ok("echo 1; sleep 30 >/dev/null 2>&1 &"), json!(1));
        let error = |script: &str| run(script, limit, false).unwrap_err();
        assert!(error("echo broken >&2; exit 3").ends_with("exit status: 3: broken"));
        assert!(error("exit 1").ends_with("no reason given"));
        assert_eq!(error("head -c 70000 /dev/zero"), "the result is longer than 64 KiB");
        assert_eq!(error("printf '\\377'"), "the result is not UTF-8");
        assert_eq!(run("sleep 30", Duration::ZERO, false).unwrap_err(), "no result after 0 s");
        let call = Call { name: "f".into(), arguments: json!({}) };
        let none = execute(&"/nowhere/tool".into(), &call, limit, &AtomicBool::new(false));
        assert!(none.unwrap_err().starts_with("cannot run /nowhere/tool: "));
        assert_eq!(run("sleep 30", limit, true).unwrap_err(), "stopped by the user");
    }
}
