//! The program around a device: what every device process does between its first line and [`serve::run`](crate::serve::run).
//!
//! A device says what it is called, which descriptors its own options name and how to open itself; the options that all have, the order
//! of the jail's steps, the supervisor's channel and the one line that says why the process ends are here.

use std::error::Error;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use atoll_protocol::sidecar::{DeviceClass, GoodbyeReason};
use clap::{Args, Parser};

use crate::device::Device;
use crate::fence::Fence;
use crate::jail::{self, Jail, Mode, Profile};
use crate::serve::{self, Listening, ServeError, Service, Transport};
use crate::sidecar::{Reports, Sidecar};
use crate::{logging, signals};

/// Why a device process cannot begin; the text names the thing and the remedy.
pub type StartError = Box<dyn Error + Send + Sync>;

const NOWHERE: &str = "say where the front end is: --socket PATH or --vhost-fd N";

/// The options of every device process.
#[derive(Debug, Args)]
#[group(id = "transport", args = ["socket", "vhost_fd"])]
pub struct ServeArgs {
    /// Listen on this UNIX socket and serve one front end after another
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Serve the front end (of a PCI device: the client) on this inherited, connected socket, and end with it
    #[arg(long, value_name = "N", conflicts_with = "socket")]
    pub vhost_fd: Option<RawFd>,
    /// The supervisor's channel as an inherited descriptor
    #[arg(long, value_name = "N")]
    pub sidecar_fd: Option<RawFd>,
    /// A page of figures as an inherited, sealed memfd; who passed it reads what this process counts
    #[arg(long, value_name = "N")]
    pub stats_fd: Option<RawFd>,
    /// The jail.
    #[command(flatten)]
    pub jail: JailArgs,
}

/// The options of the jail.
#[derive(Debug, Clone, Copy, Args)]
pub struct JailArgs {
    /// Serve in every layer of the jail or not at all (strict), in those that this host has (default), or in none (off)
    #[arg(long, value_name = "HOW", default_value = "default")]
    jail: Mode,
    /// As --jail=off (for debuggers and tracers)
    #[arg(long, conflicts_with = "jail")]
    no_jail: bool,
}

impl JailArgs {
    /// How the jail is meant.
    pub fn mode(self) -> Mode {
        if self.no_jail { Mode::Off } else { self.jail }
    }
}

impl ServeArgs {
    /// Refuses a command line that does not say where the front end is.
    ///
    /// # Errors
    /// It says so.
    pub fn check(&self) -> Result<(), String> {
        if self.socket.is_none() && self.vhost_fd.is_none() { Err(NOWHERE.to_owned()) } else { Ok(()) }
    }
}

/// What a process can serve: a device, or what stands for several.
pub trait Served {
    /// Serves until there is nobody left to serve.
    ///
    /// # Errors
    /// As [`serve::run`].
    fn serve(self, service: Service) -> Result<(), ServeError>;
}

impl<D: Device> Served for D {
    fn serve(self, service: Service) -> Result<(), ServeError> {
        serve::run(self, service)
    }
}

/// A device that is a process.
pub trait Program: Parser {
    /// Its device.
    type Device: Served;
    /// Its name on the command line.
    const NAME: &'static str;

    /// What it says to its supervisor that it serves.
    fn class(&self) -> DeviceClass;
    /// The options that all have.
    fn serve_args(&self) -> &ServeArgs;
    /// The descriptors that its own options name.
    fn descriptors(&self) -> Vec<RawFd>;
    /// What its jail leaves open.
    fn profile(&self) -> &'static Profile {
        &Profile::GENERIC
    }
    /// It writes files of the host, of any length.
    fn writes_files(&self) -> bool {
        true
    }
    /// What contradicts itself on its command line beyond what clap can see.
    ///
    /// # Errors
    /// The mistake, in a line.
    fn check(&self) -> Result<(), String> {
        self.serve_args().check()
    }
    /// Something else that was asked for than to serve, done in a process that holds nothing but the descriptors named.
    fn errand(&self) -> Option<Result<(), StartError>> {
        None
    }
    /// Opens what it serves, and says how to know that a predecessor's I/O on it is over. `reports` goes to the supervisor, if
    /// there is one.
    ///
    /// # Errors
    /// When it cannot be served.
    fn open(&self, reports: Option<&Reports>) -> Result<(Self::Device, Box<dyn Fence>), StartError>;
}

/// Runs a device process to its end; the exit status is 2 for a mistake on the command line.
pub fn main<P: Program>() -> ExitCode {
    let program = match P::try_parse() {
        Ok(program) => program,
        Err(error) => return usage(P::NAME, &error),
    };
    if let Err(mistake) = program.check() {
        report(P::NAME, &format!("{mistake}; see {} --help", P::NAME));
        return ExitCode::from(2);
    }
    signals::hold();
    match start(&program) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(P::NAME, &error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// What clap has to say: help and version as they are, mistakes in one line.
fn usage(name: &str, error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // With standard output gone there is nobody left to tell.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    let first: Vec<&str> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    report(name, &format!("{}; see {name} --help", first.join(" ").trim_start_matches("error: ")));
    ExitCode::from(2)
}

/// Writes the one line that says why a program ends.
#[allow(clippy::print_stderr, reason = "the one line that says why the program ends")]
pub fn report(name: &str, line: &str) {
    eprintln!("{name}: {line}");
}

fn start<P: Program>(program: &P) -> Result<(), StartError> {
    let args = program.serve_args();
    let supervised = args.sidecar_fd.is_some();
    let common = [args.vhost_fd, args.sidecar_fd, args.stats_fd].into_iter().flatten();
    let keep: Vec<RawFd> = common.chain(program.descriptors()).collect();
    jail::begin(&keep, supervised)?;
    if let Some(outcome) = program.errand() {
        return outcome;
    }
    let hello = |fd| -> Result<Sidecar, StartError> {
        Ok(Sidecar::hello(serve::inherited("--sidecar-fd", fd)?, program.class())?)
    };
    let sidecar = args.sidecar_fd.map(hello).transpose()?;
    let reports = sidecar.as_ref().map(|sidecar| sidecar.reports().clone());
    logging::start(reports.clone());
    let prepared = program.open(reports.as_ref()).and_then(|opened| Ok((opened, transport(args)?)));
    if let (Err(error), Some(reports)) = (&prepared, &reports) {
        reports.goodbye(GoodbyeReason::Config(error.to_string()));
    }
    let ((device, fence), transport) = prepared?;
    let (mode, profile) = (args.jail.mode(), program.profile());
    let jail = Jail { mode, profile, supervised, writes_files: program.writes_files() };
    let stats = args.stats_fd.map(|fd| serve::inherited("--stats-fd", fd)).transpose()?;
    Ok(device.serve(Service { transport, sidecar, fence, jail, stats })?)
}

fn transport(args: &ServeArgs) -> Result<Transport, StartError> {
    match (&args.socket, args.vhost_fd) {
        (Some(path), _) => Ok(Transport::Listen(Listening::bind(path)?)),
        (None, Some(fd)) => Ok(Transport::Connected(serve::inherited("--vhost-fd", fd)?.into())),
        (None, None) => Err(NOWHERE.into()),
    }
}
