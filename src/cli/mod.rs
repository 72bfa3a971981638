//! The command line: what can be asked for, and how a command ends.
//!
//! One file per command. Standard output carries data, standard error talks to people. An error
//! becomes one line and its exit code, a closed pipe is a quiet success, an interrupt is a quiet 130.

mod bench;
mod calibrate;
mod chat;
mod chats;
mod config;
mod convert;
mod doctor;
mod eval;
mod format;
mod input;
mod keep;
mod markdown;
mod memory;
mod notes;
mod open;
mod pack;
mod page_in;
mod pages;
mod progress;
mod pull;
mod run;
mod screen;
mod selftest;
mod show;
mod status;
mod store;
mod template;
mod terminal;
mod text;
mod think;
mod tokenize;
mod tools;
mod tune;
mod warm;
mod welcome;
mod wrap;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use gemrun::{Error, Kind};

/// Runs Gemma 4 GGUF files on this computer's CPU.
#[derive(Parser)]
#[command(
    name = "gemrun",
    version,
    max_term_width = 100,
    disable_help_subcommand = true,
    after_help = "MODEL is a name (demo, e2b, ...), the path of a GGUF file, or hf:OWNER/REPO[:FILE][@REVISION] once it is pulled.\n\n\
        Example: gemrun run demo \"Once upon a time\"\n\n\
        Environment:\n  \
        GEMRUN_HOME          where models and conversations are kept\n  \
        GEMRUN_THREADS       default of --threads\n  \
        GEMRUN_KERNEL        default of --kernel\n  \
        GEMRUN_CHATS_BUDGET  bytes the caches of all conversations may take [2G]\n  \
        HF_ENDPOINT          where models are downloaded from\n  \
        HF_TOKEN             access token for downloads\n  \
        NO_COLOR             no colours if set\n\n\
        Exit codes: 0 ok, 1 other failure, 2 usage, 3 not found, 4 does not fit in memory, 5 invalid file,\n\
        6 unsupported CPU, format or architecture, 10 self-test failed, 130 interrupted"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    Run(Box<run::Run>),
    Chats(chats::Chats),
    Pull(pull::Pull),
    List(store::List),
    Path(store::Locate),
    Verify(store::Verify),
    Rm(store::Rm),
    Import(store::Import),
    Memory(memory::Memory),
    Warm(warm::Warm),
    Show(show::Show),
    Tokenize(tokenize::Tokenize),
    Detokenize(tokenize::Detokenize),
    Template(template::Template),
    Eval(eval::Eval),
    Bench(bench::Bench),
    Calibrate(calibrate::Calibrate),
    Pack(pack::Pack),
    Convert(convert::Convert),
    Doctor(doctor::Doctor),
    Selftest(selftest::Selftest),
    Tune(tune::Tune),
    Config(config::Config),
    Completions(pages::Completions),
    Man(pages::ManPage),
}

/// What a command returns. An error in it is a [`gemrun::Error`], or the [`io::Error`] of a write to standard output:
/// only those may use `?`, files go through [`Error::io`], which knows their name.
pub type Result<T = ()> = anyhow::Result<T>;

/// The user stopped it.
fn interrupted() -> anyhow::Error {
    Error::new(Kind::Interrupted, "interrupted").into()
}

/// Parses the arguments, runs the command, reports how it ended.
pub fn main() -> ExitCode {
    let (matches, broken) = matches(false);
    let (matches, broken) = match matches {
        Ok(found) if found.subcommand_matches("run").is_some_and(run::Run::goes_on) => self::matches(true),
        found => (found, broken),
    };
    let end = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        // A broken config file stops everything but the command that mends it.
        Ok(cli) => match broken.filter(|_| !matches!(cli.command, Some(Command::Config(_)))) {
            Some(error) => Err(error.into()),
            None => run(cli.command),
        },
        // Help and version come as errors too.
        Err(help) if !help.use_stderr() => help.print().map_err(Into::into),
        Err(usage) => Err(Error::usage(one_line(&usage.render().to_string())).into()),
    };
    end.map_or_else(|error| report(&error), |()| ExitCode::SUCCESS)
}

/// The arguments beside the settings of the config file, and what is wrong with it, if anything is.
fn matches(goes_on: bool) -> (std::result::Result<clap::ArgMatches, clap::Error>, Option<Error>) {
    match config::with_settings(Cli::command(), goes_on) {
        Ok(command) => (command.try_get_matches(), None),
        Err(error) => (Cli::command().try_get_matches(), Some(error)),
    }
}

/// Tells people what went wrong, in one line; the exit code of it.
fn report(error: &anyhow::Error) -> ExitCode {
    let error = match (error.downcast_ref::<Error>(), error.downcast_ref::<io::Error>()) {
        (Some(error), _) => error.clone(),
        (None, Some(error)) if error.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        (None, Some(error)) => Error::io(std::path::Path::new("standard output"), error),
        (None, None) => Error::new(Kind::Other, error.to_string()),
    };
    if error.kind() != Kind::Interrupted {
        terminal::error(&error);
    }
    ExitCode::from(error.exit_code())
}

/// What is wrong according to clap, without its paragraphs on usage.
fn one_line(message: &str) -> String {
    let paragraphs = message.trim().split("\n\n");
    let telling = paragraphs.filter(|text| !text.starts_with("Usage:") && !text.starts_with("For more information"));
    let lines: Vec<String> = telling.map(|text| text.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let text = lines.join("; ");
    format!("{}; see --help", text.strip_prefix("error: ").unwrap_or(&text))
}

fn run(command: Option<Command>) -> Result {
    match command {
        None => welcome::welcome(),
        Some(Command::Run(run)) => run.run(),
        Some(Command::Chats(chats)) => chats.run(),
        Some(Command::Pull(pull)) => pull.run(),
        Some(Command::List(list)) => list.run(),
        Some(Command::Path(path)) => path.run(),
        Some(Command::Verify(verify)) => verify.run(),
        Some(Command::Rm(rm)) => rm.run(),
        Some(Command::Import(import)) => import.run(),
        Some(Command::Memory(memory)) => memory.run(),
        Some(Command::Warm(warm)) => warm.run(),
        Some(Command::Show(show)) => show.run(),
        Some(Command::Tokenize(tokenize)) => tokenize.run(),
        Some(Command::Detokenize(detokenize)) => detokenize.run(),
        Some(Command::Template(template)) => template.run(),
        Some(Command::Eval(eval)) => eval.run(),
        Some(Command::Bench(bench)) => bench.run(),
        Some(Command::Calibrate(calibrate)) => calibrate.run(),
        Some(Command::Pack(pack)) => pack.run(),
        Some(Command::Convert(convert)) => convert.run(),
        Some(Command::Doctor(doctor)) => doctor.run(),
        Some(Command::Selftest(selftest)) => selftest.run(),
        Some(Command::Tune(tune)) => tune.run(),
        Some(Command::Config(config)) => config.run(),
        Some(Command::Completions(completions)) => completions.run(),
        Some(Command::Man(man)) => man.run(),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    #[test]
    fn arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn usage_errors_are_one_line() {
        let error = |arguments: &[&str]| match super::Cli::try_parse_from(arguments) {
            Err(error) => super::one_line(&error.render().to_string()),
            Ok(_) => panic!("{arguments:?} were accepted"),
        };
        assert_eq!(
            error(&["gemrun", "run", "demo", "hi", "--temp", "warm"]),
            "invalid value 'warm' for '--temp <X>': invalid float literal; see --help"
        );
        assert_eq!(
            error(&["gemrun", "show", "--jsn", "demo"]),
            "unexpected argument '--jsn' found; tip: a similar argument exists: '--json'; see --help"
        );
    }

    /// The help texts, as people see them. Every command shows an example.
    #[test]
    fn help() {
        let mut command = super::Cli::command();
        command.build();
        let mut pages = Vec::new();
        let mut visit = vec![command];
        while let Some(mut command) = visit.pop() {
            visit.extend(command.get_subcommands().filter(|sub| sub.get_name() != "help").cloned());
            let (name, page) = (command.get_display_name().unwrap_or("gemrun").to_string(), command.render_help());
            let page = page.to_string();
            assert!(page.contains("Example"), "{name} --help shows no example");
            pages.push(format!("==== {name}\n{page}"));
        }
        pages.sort();
        insta::assert_snapshot!(pages.join("\n"));
    }
}
