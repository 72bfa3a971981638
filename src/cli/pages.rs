//! `gemrun completions` and `gemrun man`: what shells and `man` want to know of the command line.
//!
//! Both are made from the same definitions as `--help`, so they are never out of date.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use gemrun::Error;

use super::{Cli, Result};

/// Print what a shell needs to complete gemrun's commands and options
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    gemrun completions bash > ~/.local/share/bash-completion/completions/gemrun\n  \
    gemrun completions zsh > ~/.zfunc/_gemrun\n  \
    gemrun completions fish > ~/.config/fish/completions/gemrun.fish")]
pub struct Completions {
    /// The shell
    shell: Shell,
}

/// Print the manual page of gemrun or one of its commands
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    gemrun man | man -l -\n  \
    gemrun man run | man -l -\n  \
    gemrun man --dir ~/.local/share/man/man1")]
pub struct ManPage {
    /// The command; without it, gemrun itself
    command: Option<String>,
    /// Write all pages into a directory
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    dir: Option<PathBuf>,
}

impl Completions {
    pub fn run(self) -> Result {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "gemrun", &mut text);
        Ok(std::io::stdout().write_all(&text)?)
    }
}

impl ManPage {
    pub fn run(self) -> Result {
        let mut command = Cli::command();
        command.build();
        if let Some(directory) = &self.dir {
            std::fs::create_dir_all(directory).map_err(|e| Error::io(directory, &e))?;
            return write_all(command, directory);
        }
        let command = match &self.command {
            None => &command,
            Some(name) => command.find_subcommand(name).ok_or_else(|| {
                let names: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
                Error::usage(format!("{name}: no such command: expected one of {}", names.join(", ")))
            })?,
        };
        Ok(std::io::stdout().write_all(&page(command)?)?)
    }
}

/// A page in roff.
fn page(command: &clap::Command) -> Result<Vec<u8>> {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_string();
    let mut text = Vec::new();
    Man::new(command.clone()).title(name.to_uppercase()).render(&mut text)?;
    Ok(text)
}

/// Writes the page of `command` and those of the commands below it.
fn write_all(command: clap::Command, directory: &Path) -> Result {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let path = directory.join(format!("{name}.1"));
    std::fs::write(&path, page(&command)?).map_err(|e| Error::io(&path, &e))?;
    command.get_subcommands().try_for_each(|sub| write_all(sub.clone(), directory))
}
