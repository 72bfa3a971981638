//! What a person sees who has just installed the program: the first screen, and what becomes of models that are not here.

mod terminal;

use std::path::Path;
use std::process::Command;

use terminal::Terminal;

fn gemrun(home: &Path, arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
    command.args(arguments).env("GEMRUN_HOME", home).env_remove("GEMRUN_THREADS").output().unwrap()
}

/// Nobody is asked where nobody can answer.
#[test]
fn the_first_screen_in_a_pipe() {
    let home = tempfile::tempdir().unwrap();
    let output = gemrun(home.path(), &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    for expected in ["  cpu     ", "e2b ", "e4b ", "Try it:   gemrun run demo\n", "gemrun --help"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    // What was measured for it is remembered.
    assert!(home.path().join("bandwidth.json").is_file());
}

/// On a terminal the best model that fits is offered; no is an answer.
#[test]
fn the_first_screen_offers_a_model() {
    let home = tempfile::tempdir().unwrap();
    let Some(mut terminal) = Terminal::open(home.path(), "") else { return };
    terminal.wait_for("Try it:   gemrun run demo");
    if gemrun::machine::usable_memory().is_some_and(|bytes| bytes > 2 << 30) {
        terminal.wait_for("Download it");
        terminal.press("n\r");
    }
    terminal.rest();
    assert_eq!(terminal.end(), 0);
    assert!(!home.path().join("models").exists(), "nothing was fetched");
}

/// A model that does not fit is refused before it is downloaded, and another named.
#[test]
fn what_does_not_fit_is_not_downloaded() {
    let home = tempfile::tempdir().unwrap();
    let Some(mut terminal) = Terminal::open(home.path(), "run e4b --mem-limit 1200M") else { return };
    terminal.wait_for(
        "error: e4b: needs 2.8 GiB in memory: 1.2 GiB are available: try gemrun run e2b-mobile, or --allow-paging",
    );
    terminal.rest();
    assert_eq!(terminal.end(), 4);
}
