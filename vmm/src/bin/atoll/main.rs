//! The `atoll` command: reads the command line, makes a machine of it and runs it until it ends.

mod cli;
mod console;
mod described;
mod doctor;
mod figures;
mod operate;
mod report;
mod run;
mod screen;
mod signals;
mod switch;
mod table;
mod target;
mod terminal;
mod top;
mod vfio;

use std::ffi::OsString;
use std::fs::File;
use std::io::{IsTerminal, Write, stderr, stdout};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;

use atoll_vmm::api::SPOKEN_VERSION;
use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command, LogForm, NOT_RUN, Plug, RunArgs, VfioCommand};
use run::RunError;

/// What is logged unless ATOLL_LOG says otherwise: what goes wrong, and which CPU was taken and why.
const LOG_LEVEL: &str = "warn,atoll::machine=info";
/// Exit status of a machine that failed.
const FAILED: u8 = 1;
/// Exit status of a mistake on the command line.
const USAGE: u8 = 2;

/// The name under which clients of Cloud Hypervisor start it.
const ALIAS: &str = "cloud-hypervisor";

/// Flags of Cloud Hypervisor's for what is not there, and what there is instead.
const NOT_SERVED: &[(&str, &str)] = &[
    ("--vdpa", "vDPA devices are not supported; --generic-vhost-user takes vhost-user ones"),
    ("--firmware", "firmware is not supported; boot a kernel directly with --kernel"),
    ("--pmem", "persistent memory is not supported; use --disk"),
    ("--balloon", "a balloon is not supported"),
    ("--tpm", "a TPM is not supported"),
    ("--numa", "NUMA nodes are not supported"),
    ("--memory-zone", "memory zones are not supported; give all of it with --memory size="),
    ("--rate-limit-group", "groups of rate limits are not supported; give each device its own"),
    ("--restore", "snapshots are not supported"),
    ("--watchdog", "a watchdog is not supported"),
    ("--pvpanic", "pvpanic is not supported"),
    ("--platform", "platform settings are not supported"),
    ("--gdb", "a debugger's socket is not supported"),
];

/// The arguments with the command that is meant when none is given.
fn with_command(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.collect();
    let meant = arguments
        .get(1)
        .is_some_and(|first| first.as_encoded_bytes().starts_with(b"-") && !NOT_RUN.iter().any(|known| first == known));
    if meant {
        arguments.insert(1, "run".into());
    }
    arguments
}

/// What a client that was told the name `cloud-hypervisor` asks for first, if that is what is asked here.
fn alias_version(arguments: &[OsString]) -> Option<String> {
    let called = Path::new(arguments.first()?).file_name()?;
    let asked = matches!(arguments.get(1)?.to_str()?, "-V" | "--version");
    (called == ALIAS && asked).then(|| format!("{ALIAS} v{SPOKEN_VERSION}\n"))
}

/// One line on standard error.
fn complain(text: &str) {
    // With standard error gone there is nobody left to tell.
    let _ = writeln!(stderr(), "atoll: {text}");
}

/// An error and its causes, each once: many tell their cause themselves.
fn told(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match told.as_str() {
        "" => cause,
        text if text.contains(&cause) => told,
        text => format!("{text}: {cause}"),
    })
}

/// The command whose help is of use after a mistake: `atoll add-disk`, or `atoll` where there is no such command.
fn verb_of(arguments: &[OsString]) -> String {
    let known = <Cli as clap::CommandFactory>::command();
    let verb = arguments.get(1).and_then(|word| known.find_subcommand(word));
    verb.map_or_else(|| "atoll".to_owned(), |verb| format!("atoll {}", verb.get_name()))
}

/// What clap has to say: help and version as they are, mistakes in one line.
fn usage(error: &clap::Error, arguments: &[OsString]) -> ExitCode {
    let text = error.render().to_string();
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = stdout().write_all(text.as_bytes());
        return ExitCode::SUCCESS;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = stderr().write_all(text.as_bytes());
        return ExitCode::from(USAGE);
    }
    if let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg)
        && let Some((flag, why)) = NOT_SERVED.iter().find(|(known, _)| known == flag)
    {
        complain(&format!("{flag}: {why}"));
        return ExitCode::from(USAGE);
    }
    let first: Vec<&str> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    let first = first.join(" ");
    complain(&format!("{}; see {} --help", first.trim_start_matches("error: "), verb_of(arguments)));
    ExitCode::from(USAGE)
}

/// What `-v` asks for.
fn level(verbose: u8) -> &'static str {
    match verbose {
        0 => LOG_LEVEL,
        1 => "info",
        2 => "debug",
        _ => "trace",
    }
}

fn start_log(args: &RunArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_env("ATOLL_LOG").unwrap_or_else(|_| EnvFilter::new(level(args.verbose)));
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    let colour = args.log_file.is_none() && stderr().is_terminal();
    match &args.log_file {
        None => match args.log {
            LogForm::Human => log.with_writer(stderr).with_ansi(colour).with_target(false).init(),
            LogForm::Json => log.with_writer(stderr).json().init(),
        },
        Some(path) => {
            let file = File::options().create(true).append(true).open(path).map_err(|error| {
                anyhow::anyhow!("cannot write --log-file {}: {error}; choose another file", path.display())
            })?;
            match args.log {
                LogForm::Human => log.with_writer(Mutex::new(file)).with_ansi(false).with_target(false).init(),
                LogForm::Json => log.with_writer(Mutex::new(file)).json().init(),
            }
        }
    }
    Ok(())
}

/// The log of commands that are not `run`.
fn start_plain_log() {
    let filter = EnvFilter::try_from_env("ATOLL_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .with_target(false)
        .init();
}

/// Carries a command out; the exit status.
fn carry_out(command: &Command) -> Result<u8, RunError> {
    let done = |result: anyhow::Result<()>| result.map(|()| 0).map_err(RunError::Failed);
    let plug = |command, Plug { vm, keys }: &Plug| operate::add(command, &vm.name, keys).map(|()| 0);
    match command {
        Command::Run(args) => {
            start_log(args)?;
            run::run(args)
        }
        Command::Ps { json } => done(operate::ps(*json)),
        Command::Info { vm, json } => done(operate::info(&vm.name, *json)),
        Command::Boot(vm) => done(operate::put(&vm.name, "vm.boot")),
        Command::Pause(vm) => done(operate::put(&vm.name, "vm.pause")),
        Command::Resume(vm) => done(operate::put(&vm.name, "vm.resume")),
        Command::Reset(vm) => done(operate::put(&vm.name, "vm.reboot")),
        Command::PowerButton(vm) => done(operate::put(&vm.name, "vm.power-button")),
        Command::Shutdown { vm, keep } => {
            done(if *keep { operate::put(&vm.name, "vm.shutdown") } else { operate::end(&vm.name) })
        }
        Command::Display { vm, json } => done(screen::display(&vm.name, *json)),
        Command::Screenshot { vm, out, head } => done(screen::screenshot(&vm.name, *head, out)),
        Command::Record { vm, out: Some(out), head, seconds, .. } => {
            done(screen::record(&vm.name, *head, *seconds, out))
        }
        Command::Record { vm, head, .. } => done(screen::stop_record(&vm.name, *head)),
        Command::ResizeDisplay { vm, mode, head } => done(screen::resize(&vm.name, *head, *mode)),
        Command::AddDisk(device) => plug("add-disk", device),
        Command::AddNet(device) => plug("add-net", device),
        Command::AddFs(device) => plug("add-fs", device),
        Command::AddNvme(device) => plug("add-nvme", device),
        Command::AddUserDevice(device) => plug("add-user-device", device),
        Command::AddVsock(device) => plug("add-vsock", device),
        Command::AddDevice(device) => plug("add-device", device),
        Command::Remove { vm, id, wait } => done(operate::remove(&vm.name, id, *wait)),
        Command::Revive { vm, id } => done(operate::revive(&vm.name, id)),
        Command::Upgrade { vm, id, exe, step_ms } => done(operate::upgrade(&vm.name, id, exe, *step_ms)),
        Command::Fault { vm, id, fault, seed } => done(operate::fault(&vm.name, id, *fault, *seed)),
        Command::Link { vm, id, link } => done(operate::link(&vm.name, id, *link)),
        Command::ResizeDisk { vm, id, size, shrink } => operate::resize_disk(&vm.name, id, size, *shrink).map(|()| 0),
        Command::Events(vm) => done(operate::events(&vm.name)),
        Command::Inspect { vm, path } => done(operate::inspect(&vm.name, path)),
        Command::Top { vm, once } => done(top::top(vm.as_deref(), *once)),
        Command::Console { vm, wait } => done(console::console(&vm.name, *wait)),
        Command::Doctor { json } => Ok(doctor::doctor(*json)?),
        Command::Vfio(VfioCommand::Check { bdf, json, tree }) => Ok(vfio::check(*bdf, *json, tree)?),
        Command::Vfio(VfioCommand::Record { folder }) => done(vfio::record(folder)),
        Command::Vfio(VfioCommand::Bind { bdf }) => {
            start_plain_log();
            done(vfio::bind(*bdf))
        }
        Command::Vfio(VfioCommand::Unbind { bdf }) => {
            start_plain_log();
            done(vfio::unbind(*bdf))
        }
        Command::Switch(args) => {
            start_plain_log();
            switch::switch(args)
        }
    }
}

fn main() -> ExitCode {
    let arguments = with_command(std::env::args_os());
    if let Some(version) = alias_version(&arguments) {
        let _ = stdout().write_all(version.as_bytes());
        return ExitCode::SUCCESS;
    }
    let command = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli.command,
        Err(error) => return usage(&error, &arguments),
    };
    let ended = carry_out(&command);
    terminal::restore();
    match ended {
        Ok(status) => ExitCode::from(status),
        Err(RunError::Usage(error)) => {
            complain(&error.to_string());
            ExitCode::from(USAGE)
        }
        Err(RunError::Failed(error)) => {
            complain(&told(&error));
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
        assert_eq!(arguments(&["atoll", "ps"]), ["atoll", "ps"]);
        assert_eq!(arguments(&["atoll"]), ["atoll"]);
    }
    /// A mistake points to the help of the command that it was made in.
    #[test]
    fn mistakes_point_to_their_own_help() {
        assert_eq!(verb_of(&arguments(&["atoll", "add-disk", "--wrong"])), "atoll add-disk");
        assert_eq!(verb_of(&arguments(&["atoll", "--wrong"])), "atoll run");
        assert_eq!(verb_of(&arguments(&["atoll", "walk"])), "atoll");
    }
    /// Clients gate features by this line.
    #[test]
    fn the_alias_tells_the_version_that_it_speaks() {
        let version = |line: &[&str]| alias_version(&line.iter().map(OsString::from).collect::<Vec<_>>());
        let told = version(&["/usr/bin/cloud-hypervisor", "--version"]).unwrap();
        assert_eq!(told, format!("cloud-hypervisor v{SPOKEN_VERSION}\n"));
        assert_eq!(version(&["/usr/bin/atoll", "--version"]), None);
        assert_eq!(version(&["cloud-hypervisor", "--kernel"]), None);
    }
}
