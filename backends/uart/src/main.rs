//! A 16550 serial port in a process of its own, on the bus. See README.md.

mod line;
mod port;
mod serve;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use atoll_kit::jail::{self, Jail, Profile};
use atoll_kit::program::JailArgs;
use atoll_kit::serve::{inherited, tell_jail};
use atoll_kit::sidecar::{Orders, Reports, Sidecar};
use atoll_kit::{logging, signals};
use atoll_protocol::FrameSocket;
use atoll_protocol::sidecar::{DeviceClass, GoodbyeReason, LogLevel, SidecarFeatures, SidecarReport};
use clap::{Args, Parser};

use crate::line::Line;
use crate::serve::{ServeError, Server};

/// Serves a 16550 serial port over Atoll's bus.
#[derive(Parser)]
#[command(name = "atoll-uart", version)]
struct Options {
    /// A connected socket to the VMM.
    #[arg(long, value_name = "N")]
    bus_fd: RawFd,
    #[command(flatten)]
    output: Output,
    /// The supervisor's socket; without it, the process serves unsupervised.
    #[arg(long, value_name = "N")]
    sidecar_fd: Option<RawFd>,
    #[command(flatten)]
    jail: JailArgs,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Output {
    /// Append what the guest prints to this file.
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// Write it to this descriptor; a terminal is read from too.
    #[arg(long, value_name = "N")]
    output_fd: Option<RawFd>,
    /// Make a pseudo-terminal and log its name.
    #[arg(long)]
    pty: bool,
}

/// There is nothing in flight in a serial port, so every order is carried out at once.
struct AtOnce;

impl Orders for AtOnce {
    fn quiesce(&self) {}

    fn exit(&self, reports: &Reports) -> ! {
        reports.goodbye(GoodbyeReason::Asked);
        std::process::exit(0)
    }

    fn orphaned(&self) -> ! {
        std::process::exit(atoll_kit::EXIT_ORPHANED)
    }
}

fn main() -> ExitCode {
    signals::hold();
    match start(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(options: &Options) -> anyhow::Result<()> {
    let passed = [Some(options.bus_fd), options.output.output_fd, options.sidecar_fd];
    jail::begin(&passed.into_iter().flatten().collect::<Vec<_>>(), options.sidecar_fd.is_some())?;
    let sidecar = options.sidecar_fd.map(|fd| inherited("--sidecar-fd", fd)).transpose()?;
    let sidecar = sidecar.map(|fd| Sidecar::introduce(fd, DeviceClass::Uart, SidecarFeatures::QUIESCE)).transpose()?;
    let reports = sidecar.as_ref().map(|sidecar| sidecar.reports().clone());
    logging::start(reports.clone());
    let outcome = serve(options, sidecar, reports.as_ref());
    if let (Err(error), Some(reports)) = (&outcome, &reports) {
        let text = format!("{error:#}");
        reports.goodbye(match error.downcast_ref() {
            Some(ServeError::Bus(_) | ServeError::Lane(_)) => GoodbyeReason::Peer(text),
            Some(ServeError::Poll(_)) => GoodbyeReason::Resource(text),
            None => GoodbyeReason::Config(text),
        });
    }
    outcome
}

fn serve(options: &Options, sidecar: Option<Sidecar>, reports: Option<&Reports>) -> anyhow::Result<()> {
    let bus = FrameSocket::new(inherited("--bus-fd", options.bus_fd)?);
    let line = line(&options.output, reports)?;
    let (mode, supervised, writes_files) = (options.jail.mode(), sidecar.is_some(), !options.output.pty);
    let jail = Jail { mode, profile: &Profile::UART, supervised, writes_files }.confine(None)?;
    signals::end_on_signal(|| std::process::exit(0)).context("no thread for signals")?;
    // The supervisor must be heard while we wait for anything else, so its thread comes first.
    let started = sidecar.map(|sidecar| sidecar.attend(Vec::new(), AtOnce)).transpose().context("no thread")?;
    // Before a word of the guest's comes in.
    tell_jail(jail.lock(0)?, reports)?;
    let started = started.map(|started| started.recv().context("the supervisor never said start")).transpose()?;
    if let (Some(started), Some(reports)) = (started, reports) {
        reports.send(&SidecarReport::Ready { generation: started.generation })?;
    }
    Ok(Server::new(bus, line)?.run()?)
}

fn line(output: &Output, reports: Option<&Reports>) -> anyhow::Result<Line> {
    match output {
        Output { output: Some(path), .. } => Ok(Line::file(path)?),
        Output { output_fd: Some(fd), .. } => Ok(Line::descriptor(inherited("--output-fd", *fd)?)?),
        Output { .. } => {
            let (line, name) = Line::pty()?;
            // Wanted news whatever the log's level is.
            match reports {
                Some(reports) => reports.log(LogLevel::Info, &format!("the serial port is at {name}")),
                None => tracing::warn!("the serial port is at {name}"),
            }
            Ok(line)
        }
    }
}
