//! The config file, and `gemrun config`, which shows and changes it.
//!
//! The one idea: a setting is the default of the option with its name. So the file needs no options of its own and no checks
//! of its own, flags and environment variables come before it, and `--help` shows what is in force. Options that only say
//! how to compute are settings for every command; those of a conversation or a download for `run` and `pull` alone, so that
//! a setting never changes what is measured. The file keeps its comments when a setting is changed.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{ArgAction, Args, Command};
use gemrun::new_file::NewFile;
use gemrun::{Error, Kind, registry};
use toml_edit::{DocumentMut, Item, Value};

use super::{Result, one_line};

/// Show or change the config file
#[derive(Args)]
#[command(
    after_help = "Settings are named as the long options of run and pull: threads, cores, kernel, mem_limit, ctx, \
    kv, temp, system, ... Flags and environment variables come before them.\n\n\
    Examples:\n  \
    gemrun config\n  \
    gemrun config threads=4 ctx=8192\n  \
    gemrun config threads="
)]
pub struct Config {
    /// Set KEY to VALUE; without VALUE, remove it
    #[arg(value_name = "KEY=VALUE")]
    changes: Vec<String>,
    /// Print the path of the file
    #[arg(long, conflicts_with = "changes")]
    path: bool,
}

/// Options that say how to compute and never what: settings for every command.
const EVERYWHERE: [&str; 5] = ["threads", "cores", "kernel", "mem-limit", "allow-paging"];
/// The command whose threads are part of what it tests.
const OWN_THREADS: &str = "selftest";
/// Commands whose other options are settings, too.
const COMMANDS: [&str; 2] = ["run", "pull"];
/// Settings that are no options but environment variables.
const VARIABLES: [(&str, &str); 3] =
    [("hf_endpoint", "HF_ENDPOINT"), ("hf_token", "HF_TOKEN"), ("chats_budget", "GEMRUN_CHATS_BUDGET")];
/// Options that only make sense when they are typed.
const NEVER: [&str; 13] = [
    "help",
    "version",
    "stats",
    "raw",
    "continue",
    "new",
    "static",
    "json",
    "to",
    "seed",
    "tools",
    "json-schema",
    "file",
];

impl Config {
    pub fn run(self) -> Result {
        let path = path()?;
        let mut out = std::io::stdout().lock();
        if self.path {
            writeln!(out, "{}", path.display())?;
            return Ok(());
        }
        if !self.changes.is_empty() {
            let changes = self.changes.iter().map(|change| match change.split_once('=') {
                Some((key, value)) => Ok((key.trim(), value.trim())),
                None => Err(Error::usage(format!("{change}: expected KEY=VALUE"))),
            });
            return set(&changes.collect::<gemrun::Result<Vec<_>>>()?);
        }
        match read(&path)? {
            None => writeln!(out, "# no {} yet: gemrun config KEY=VALUE makes it", path.display())?,
            Some((text, _)) => write!(out, "# {}\n{text}", path.display())?,
        }
        Ok(())
    }
}

/// Where the config file is.
fn path() -> Result<PathBuf> {
    let path = registry::config_file();
    Ok(path.ok_or_else(|| Error::new(Kind::NotFound, "no home directory for a config file: set GEMRUN_HOME"))?)
}

/// The text of the file and what it says, if there is one.
fn read(path: &Path) -> gemrun::Result<Option<(String, DocumentMut)>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, &error)),
    };
    match text.parse::<DocumentMut>() {
        Ok(document) => Ok(Some((text, document))),
        Err(error) => {
            let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            let what = error.message().lines().next().unwrap_or_default();
            Err(Error::invalid(format!("{}: line {line}: {what}: expected KEY = VALUE", path.display())))
        }
    }
}

/// Changes settings; an empty value removes one. Nothing is written if one of them makes no sense.
pub fn set(changes: &[(&str, &str)]) -> Result {
    let path = path()?;
    let mut document = read(&path)?.map(|(_, document)| document).unwrap_or_default();
    let mut changed = DocumentMut::new(); // what is new is checked; what was there is not this command's business
    for (key, value) in changes {
        let key = key.replace('-', "_");
        if value.is_empty() {
            document.remove(&key);
            continue;
        }
        let value = match value.parse::<Value>() {
            Ok(value @ (Value::Integer(_) | Value::Float(_) | Value::Boolean(_))) => value,
            _ => Value::from(*value),
        };
        changed[&key] = Item::Value(value.clone());
        match document.get_mut(&key).and_then(Item::as_value_mut) {
            Some(old) => {
                let decor = old.decor().clone();
                *old = value;
                *old.decor_mut() = decor;
            }
            None => document[&key] = Item::Value(value),
        }
    }
    apply(<super::Cli as clap::CommandFactory>::command(), &path, &changed)?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, &e))?;
    }
    let mut file = NewFile::create(&path)?;
    file.write_all(document.to_string().as_bytes()).map_err(|e| Error::io(file.part(), &e))?;
    Ok(file.finish()?)
}

/// `command` with the settings as defaults of its options; for a conversation that goes on with its own settings, only those that
/// say how to compute.
pub fn with_settings(command: Command, goes_on: bool) -> gemrun::Result<Command> {
    let Some(path) = registry::config_file() else { return Ok(command) };
    let Some((_, mut document)) = read(&path)? else { return Ok(command) };
    if goes_on {
        document.retain(|key, _| EVERYWHERE.contains(&key.replace('_', "-").as_str()));
    }
    apply(command, &path, &document)
}

/// What an environment variable says or, if it is not set, the config file.
pub fn variable(name: &str) -> Option<String> {
    let set = std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    set.or_else(|| {
        let (key, _) = VARIABLES.iter().find(|(_, variable)| *variable == name)?;
        let (_, document) = read(&registry::config_file()?).ok()??;
        text(document.get(key)?.as_value()?)
    })
}

/// A setting as it would be typed.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.value().clone()),
        Value::Integer(number) => Some(number.value().to_string()),
        Value::Float(number) => Some(number.value().to_string()),
        Value::Boolean(flag) => Some(flag.value().to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::InlineTable(_) => None,
    }
}

fn apply(mut command: Command, path: &Path, document: &DocumentMut) -> gemrun::Result<Command> {
    for (key, item) in document.iter() {
        let invalid = |what: String| Error::invalid(format!("{}: {key}: {what}", path.display()));
        let Some(value) = item.as_value().and_then(text) else {
            return Err(invalid("expected a text, a number, true or false".into()));
        };
        let long = key.replace('_', "-");
        let mut known = VARIABLES.iter().any(|(setting, _)| *setting == key);
        let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_string()).collect();
        for name in names {
            let everywhere = EVERYWHERE.contains(&long.as_str()) && name != OWN_THREADS;
            let of_this = everywhere || COMMANDS.contains(&name.as_str()) && !NEVER.contains(&long.as_str());
            if let Some(sub) = command.find_subcommand_mut(&name).filter(|_| of_this) {
                known |= default_in(sub, &long, &value).map_err(invalid)?;
            }
        }
        if !known {
            return Err(invalid("no such setting: expected a long option of gemrun run or pull".into()));
        }
    }
    Ok(command)
}

/// Makes `value` the default of `--long` in `command` and the commands below it. Whether any has it; what is wrong with the value.
fn default_in(command: &mut Command, long: &str, value: &str) -> std::result::Result<bool, String> {
    let mut known = false;
    let found = command.get_arguments().find(|arg| arg.get_long() == Some(long)).cloned();
    if let Some(arg) = found {
        known = true;
        let (id, flag) = (arg.get_id().clone(), matches!(arg.get_action(), ArgAction::SetTrue));
        // What is wrong with a default is found out here, where the file is known, not when the option is used.
        match (flag, value) {
            (true, "true" | "false") => {}
            (true, _) => return Err(format!("{value}: expected true or false")),
            (false, _) => {
                let alone = Command::new("config").arg(arg.required(false));
                let tried = alone.try_get_matches_from(["config".to_string(), format!("--{long}={value}")]);
                tried.map_err(|error| one_line(&error.render().to_string()).replace("; see --help", ""))?;
            }
        }
        let taken = std::mem::take(command);
        *command = taken.mut_arg(id, |arg| arg.default_value(value.to_string()));
    }
    for sub in command.get_subcommands_mut() {
        known |= default_in(sub, long, value)?;
    }
    Ok(known)
}
