//! Other programs, run once for one test: llama-bench, or anything that takes its options and prints its JSON.
//!
//! The one idea: the process is the unit. It maps the file, warms up, measures one repetition and ends, gemrun no different
//! from the rest; seen from outside are the time until it ended and the memory it had resident at most. Whatever goes wrong
//! with somebody else's program becomes one line that says which and what. Nothing here looks at a model.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::str::FromStr;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use gemrun::kv::KvType;
use gemrun::{Error, Kind, Result, machine};
use serde_json::Value;

use super::Test;

/// What is asked for when only a name is given.
const USUAL: (&str, &str) = ("llama.cpp", "llama-bench");
/// How often a running process is asked for its memory, but at first more often. The last moments before its end are not
/// seen, but by then a model has long been loaded.
const EVERY: Duration = Duration::from_millis(20);

/// `NAME=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Other {
    pub name: String,
    path: PathBuf,
}

impl FromStr for Other {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Other, String> {
        let (name, path) = match text.split_once('=') {
            None if text == USUAL.0 => USUAL,
            Some((name, path)) if !name.is_empty() && !path.is_empty() => (name, path),
            _ => return Err("expected NAME=PATH, for example llama.cpp=/usr/local/bin/llama-bench".to_string()),
        };
        Ok(Other { name: gemrun::error::printable(name), path: path.into() })
    }
}

/// A program to measure, with everything on its command line but the test.
pub struct Program {
    pub name: String,
    path: PathBuf,
    first: Vec<OsString>,
    last: Vec<OsString>,
}

/// One run of a program.
#[derive(Debug, PartialEq)]
pub struct Run {
    /// Tokens a second, as the program measured them.
    pub speed: f64,
    /// From start to end of the process.
    pub seconds: f64,
    /// The most memory it had resident, in bytes; `None` where the system does not tell.
    pub peak_rss: Option<u64>,
    /// What it says of itself.
    pub build: Option<String>,
}

impl Program {
    /// This very program, on a file.
    pub fn gemrun(file: &Path, options: &[String]) -> Result<Program> {
        let path = std::env::current_exe().map_err(|e| Error::io(Path::new("gemrun"), &e))?;
        let mut first = vec!["bench".into(), "--no-limits".into()];
        first.extend(options.iter().map(OsString::from));
        Ok(Program { name: "gemrun".to_string(), path, first, last: vec!["--".into(), file.into()] })
    }

    /// Another one. It stores keys and values as gemrun does; llama.cpp has eight bits in blocks, and no mixture.
    ///
    /// # Errors
    /// If there is no such program.
    pub fn other(other: &Other, file: &Path, kv: KvType) -> Result<Program> {
        let Some(path) = find(&other.path) else {
            let error = format!("{}: {}: no such program", other.name, other.path.display());
            return Err(Error::new(Kind::NotFound, format!("{error}: expected a llama-bench")));
        };
        let first = vec!["-m".into(), file.into()];
        let kv = match kv {
            KvType::F32 | KvType::F16 => kv.name(),
            KvType::Int8 | KvType::Mixed => "q8_0",
        };
        let last = ["-fa", "1", "-ctk", kv, "-ctv", kv].map(OsString::from).to_vec();
        Ok(Program { name: other.name.clone(), path, first, last })
    }

    /// Runs `test` once, after another time to warm up if so asked.
    ///
    /// # Errors
    /// If the program does not start, fails, or prints something else than the result of this test.
    pub fn run(&self, test: Test, warm_up: bool) -> Result<Run> {
        let mut command = Command::new(&self.path);
        command.args(&self.first);
        let numbers = [("-p", test.prompt), ("-n", test.generate), ("-d", test.depth), ("-t", test.threads), ("-r", 1)];
        for (letter, number) in numbers {
            command.arg(letter).arg(number.to_string());
        }
        command.args(["-o", "json"]);
        if !warm_up {
            command.arg("--no-warmup");
        }
        command.args(&self.last);

        let start = Instant::now();
        let (output, peak_rss) = watch(&mut command).map_err(|error| {
            // The same words as for a file that cannot be read.
            Error::io(&self.path, &error).within(&self.name)
        })?;
        let seconds = start.elapsed().as_secs_f64();
        let failed = |what: String| {
            let path = self.path.display();
            Error::new(Kind::Other, format!("{}: {path}: {what}", self.name))
        };
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it said nothing");
            return Err(failed(format!("{}: {said}", output.status)));
        }
        let (speed, build) = result(&output.stdout, test).map_err(failed)?;
        Ok(Run { speed, seconds, peak_rss, build })
    }
}

/// Where a program lies: a path is a path, a mere name is looked for where a shell would.
fn find(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_path_buf());
    }
    let paths = std::env::var_os("PATH")?;
    std::env::split_paths(&paths).map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// Runs to the end; what it wrote, and the most memory it had resident.
fn watch(command: &mut Command) -> std::io::Result<(Output, Option<u64>)> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let id = child.id();
    let (running, ended) = channel::<()>();
    std::thread::scope(|scope| {
        let watcher = scope.spawn(move || {
            let (mut peak, mut pause) = (None, Duration::from_millis(1));
            loop {
                peak = machine::peak_rss_of(id).or(peak);
                if ended.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                    return peak;
                }
                pause = (2 * pause).min(EVERY);
            }
        });
        let output = child.wait_with_output();
        drop(running);
        let peak = watcher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((output?, peak))
    })
}

/// Speed and build in what llama-bench prints: a list of results, of which there should be one. The error says what is wrong
/// and what was expected.
fn result(stdout: &[u8], test: Test) -> std::result::Result<(f64, Option<String>), String> {
    let expected = "expected the JSON of llama-bench";
    let list: Vec<Value> =
        serde_json::from_slice(stdout).map_err(|e| format!("its output makes no sense: {e}: {expected}"))?;
    let [result] = &list[..] else {
        return Err(format!(
            "{} results in its output: expected one, {} with {} threads",
            list.len(),
            test.label(),
            test.threads
        ));
    };
    let asked =
        [("n_prompt", test.prompt), ("n_gen", test.generate), ("n_depth", test.depth), ("n_threads", test.threads)];
    for (key, asked) in asked {
        // Old versions know nothing of depth.
        let found = result.get(key).map_or(Some(0), Value::as_u64);
        if found != Some(asked as u64) {
            let found = found.map_or("no number".to_string(), |found| found.to_string());
            return Err(format!("{key} in its output: {found}: expected {asked}, as asked for"));
        }
    }
    let speed = result.get("avg_ts").and_then(Value::as_f64).filter(|speed| *speed > 0.0);
    let speed = speed.ok_or_else(|| format!("avg_ts in its output: missing or not above 0: {expected}"))?;
    let commit = result.get("build_commit").and_then(Value::as_str).map(gemrun::error::printable);
    let number = result.get("build_number").and_then(Value::as_u64);
    let build = commit.map(|commit| number.map_or(commit.clone(), |number| format!("{number} ({commit})")));
    Ok((speed, build))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEST: Test = Test { prompt: 0, generate: 8, depth: 16, threads: 2 };

    #[test]
    fn names_and_paths() {
        let other = |text: &str| text.parse::<Other>();
        assert_eq!(other("a=b=c"), Ok(Other { name: "a".into(), path: "b=c".into() }));
        assert_eq!(other("llama.cpp").unwrap().path, Path::new("llama-bench"));
        assert_eq!(other("a\x1b=b").unwrap().name, "a\\u{1b}");
        for nonsense in ["", "=", "x", "=path", "name="] {
            assert!(other(nonsense).unwrap_err().starts_with("expected NAME=PATH"), "{nonsense}");
        }
    }

    #[test]
    fn results_of_llama_bench() {
        let text = |speed: &str| {
            format!(
                r#"[{{"build_commit": "0c1\u001be", "build_number": 7, "n_prompt": 0, "n_gen": 8, "n_depth": 16,
                "n_threads": 2, "avg_ts": {speed}}}]"#
            )
        };
        assert_eq!(result(text("2.5").as_bytes(), TEST), Ok((2.5, Some("7 (0c1\\u{1b}e)".into()))));
        let old = r#"[{"n_prompt": 0, "n_gen": 8, "n_threads": 2, "avg_ts": 1}]"#;
        assert_eq!(result(old.as_bytes(), Test { depth: 0, ..TEST }), Ok((1.0, None)));
        let wrong = |text: &str| result(text.as_bytes(), TEST).unwrap_err();
        for speed in ["0", "-1", "null", "\"x\""] {
            assert!(wrong(&text(speed)).starts_with("avg_ts in its output: missing or not above 0"), "{speed}");
        }
        assert!(wrong("[]").starts_with("0 results in its output: expected one, tg8 @ d16 with 2 threads"));
        assert!(
            wrong(&text("1").replace("\"n_gen\": 8", "\"n_gen\": 9")).starts_with("n_gen in its output: 9: expected 8")
        );
        assert!(wrong(&text("1").replace("16", "\"16\"")).starts_with("n_depth in its output: no number"));
        for garbage in ["", "error", "{}", "[", "[1]", "\u{1}", "null"] {
            assert!(wrong(garbage).contains("in its output") || wrong(garbage).contains("makes no sense"), "{garbage}");
        }
    }
}
