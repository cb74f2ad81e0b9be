//! The `atoll` command: reads the command line, makes a machine of it and runs it until it ends.

mod cli;
mod described;
mod machine;
mod report;
mod signals;
mod terminal;

use std::ffi::OsString;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command, LogForm, NOT_RUN, RunArgs};

/// What is logged unless ATOLL_LOG says otherwise: what goes wrong, and which CPU was taken and why.
const LOG_LEVEL: &str = "warn,atoll::machine=info";
/// Exit status of a machine that failed.
const FAILED: u8 = 1;
/// Exit status of a mistake on the command line.
const USAGE: u8 = 2;

/// The arguments with the command that is meant when none is given.
fn with_command(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.collect();
    let meant = arguments.get(1).is_some_and(|first| !NOT_RUN.iter().any(|known| first == known));
    if meant {
        arguments.insert(1, "run".into());
    }
    arguments
}

/// One line on standard error.
fn complain(text: &str) {
    // With standard error gone there is nobody left to tell.
    let _ = writeln!(stderr(), "atoll: {text}");
}

/// What clap has to say: help and version as they are, mistakes in one line.
fn usage(error: &clap::Error) -> ExitCode {
    let text = error.render().to_string();
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = stdout().write_all(text.as_bytes());
        return ExitCode::SUCCESS;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = stderr().write_all(text.as_bytes());
        return ExitCode::from(USAGE);
    }
    let first: Vec<&str> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    let first = first.join(" ");
    complain(&format!("{}; see atoll run --help", first.trim_start_matches("error: ")));
    ExitCode::from(USAGE)
}

fn start_log(args: &RunArgs) {
    let filter = EnvFilter::try_from_env("ATOLL_LOG").unwrap_or_else(|_| EnvFilter::new(LOG_LEVEL));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    match args.log {
        LogForm::Human => log.with_ansi(stderr().is_terminal()).with_target(false).init(),
        LogForm::Json => log.json().init(),
    }
}

fn main() -> ExitCode {
    let Command::Run(args) = match Cli::try_parse_from(with_command(std::env::args_os())) {
        Ok(cli) => cli.command,
        Err(error) => return usage(&error),
    };
    start_log(&args);
    let ended = machine::run(&args);
    terminal::restore();
    match ended {
        Ok(status) => ExitCode::from(status),
        Err(machine::RunError::Usage(error)) => {
            complain(&error.to_string());
            ExitCode::from(USAGE)
        }
        Err(machine::RunError::Failed(error)) => {
            complain(&error.to_string());
            ExitCode::from(FAILED)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &[&str]) -> Vec<OsString> {
        with_command(line.iter().map(OsString::from))
    }

    /// Clients of other machine monitors give the options alone.
    #[test]
    fn options_alone_mean_run() {
        assert_eq!(arguments(&["atoll", "--kernel", "k"]), ["atoll", "run", "--kernel", "k"]);
        assert_eq!(arguments(&["atoll", "run", "--kernel", "k"]), ["atoll", "run", "--kernel", "k"]);
        assert_eq!(arguments(&["atoll", "--version"]), ["atoll", "--version"]);
        assert_eq!(arguments(&["atoll"]), ["atoll"]);
    }
}
