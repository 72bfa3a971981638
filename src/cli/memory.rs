//! `gemrun memory`: what conversations begin with knowing.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command as Process;

use clap::{Args, Subcommand};
use gemrun::{Error, Kind, facts, registry};
use serde_json::json;

use super::terminal::{Shown, eprintln_quietly};
use super::{Result, text};

/// Facts that every conversation begins with knowing
#[derive(Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Nothing is remembered until you say so. Facts are lines of memory.md in GEMRUN_HOME; a conversation reads them when it \
    begins, unless it is run with --no-memory. /remember and /forget do the same in a chat.\n\n\
    Examples:\n  \
    gemrun memory add I live in Zurich\n  \
    gemrun memory\n  \
    gemrun memory forget zurich"
)]
pub struct Memory {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    list: List,
}

#[derive(Subcommand)]
enum Command {
    List(List),
    Add(Add),
    Forget(Forget),
    Edit(Edit),
}

/// List what is remembered
#[derive(Args)]
#[command(after_help = "Example: gemrun memory list --json")]
struct List {
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Remember a fact
#[derive(Args)]
#[command(after_help = "Example: gemrun memory add My name is Ann")]
struct Add {
    /// The fact
    #[arg(required = true)]
    fact: Vec<OsString>,
}

/// Forget facts: one by its number, or those with these words in them
#[derive(Args)]
#[command(after_help = "Example: gemrun memory forget 2")]
struct Forget {
    /// A number as list shows it, or words
    #[arg(required = true)]
    which: Vec<OsString>,
}

/// Change what is remembered in the editor that VISUAL or EDITOR names
#[derive(Args)]
#[command(after_help = "Example: EDITOR=nano gemrun memory edit")]
struct Edit {}

/// Where facts are.
pub fn home() -> gemrun::Result<PathBuf> {
    registry::home()
        .ok_or_else(|| Error::new(Kind::NotFound, "no home directory to remember anything in: set GEMRUN_HOME"))
}

impl Memory {
    pub fn run(self) -> Result {
        let home = home()?;
        match self.command {
            None => list(&home, self.list.json),
            Some(Command::List(options)) => list(&home, options.json),
            Some(Command::Add(options)) => Ok(facts::add(&home, &words("fact", &options.fact)?)?),
            Some(Command::Forget(options)) => {
                for fact in facts::forget(&home, &words("which", &options.which)?)? {
                    eprintln_quietly(format_args!("forgotten: {}", Shown::terminal().text(&fact)));
                }
                Ok(())
            }
            Some(Command::Edit(_)) => edit(&home),
        }
    }
}

fn list(home: &std::path::Path, as_json: bool) -> Result {
    let facts = facts::read(home)?;
    let mut out = std::io::stdout().lock();
    if as_json {
        return Ok(writeln!(out, "{}", json!(facts))?);
    }
    let shown = Shown::stdout();
    for (i, fact) in facts.iter().enumerate() {
        writeln!(out, "{:>3}  {}", i + 1, shown.text(fact))?;
    }
    if facts.is_empty() {
        eprintln_quietly(format_args!("Nothing is remembered; gemrun memory add FACT changes that."));
    }
    Ok(())
}

fn edit(home: &std::path::Path) -> Result {
    let path = facts::path(home);
    if !path.exists() {
        return Err(Error::new(Kind::NotFound, "nothing is remembered yet: gemrun memory add FACT").into());
    }
    let set = |name: &str| std::env::var_os(name).filter(|editor| !editor.is_empty());
    let editor = set("VISUAL").or_else(|| set("EDITOR")).unwrap_or_else(|| "vi".into());
    // Editors are named with their options: EDITOR="code --wait".
    let line = editor.to_string_lossy().into_owned();
    let mut words = line.split_whitespace();
    let status = Process::new(words.next().unwrap_or("vi")).args(words).arg(&path).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Error::new(Kind::Other, format!("{line}: {status}")).into()),
        Err(error) => Err(Error::io(std::path::Path::new(&line), &error).into()),
    }
}

fn words(name: &str, words: &[OsString]) -> gemrun::Result<String> {
    let words: Vec<String> = words.iter().map(|word| text::from_argument(name, word)).collect::<gemrun::Result<_>>()?;
    Ok(words.join(" "))
}
