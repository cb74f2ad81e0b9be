//! `atoll-console`: a multiport console for a guest (virtio 1.2, section 5.3). This file is the command line; `port` is the
//! host's end of a port, `console` the device in between.

mod console;
mod port;

use std::os::fd::RawFd;
use std::process::ExitCode;

use atoll_kit::fence::{Fence, NoFence};
use atoll_kit::jail::Profile;
use atoll_kit::program::{self, Program, ServeArgs, StartError};
use atoll_kit::serve;
use atoll_kit::sidecar::Reports;
use atoll_protocol::sidecar::DeviceClass;
use clap::Parser;

use console::{Console, PORTS_MAX};
use port::Port;

/// Virtio device type (virtio 1.2, section 5).
const CONSOLE: u32 = 3;

/// Serves a console with one or more ports to a virtual machine as a vhost-user device
///
/// The first port is the guest's console (hvc0); the others are /dev/virtio-ports/NAME there.
#[derive(Debug, Parser)]
#[command(name = "atoll-console", version)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
    /// The first port is this inherited descriptor: a terminal, a file or a connected socket
    #[arg(long, value_name = "N", conflicts_with = "listen_fd")]
    port_fd: Option<RawFd>,
    /// Clients of the first port come, one at a time, to this inherited listening socket
    #[arg(long, value_name = "N")]
    listen_fd: Option<RawFd>,
    /// One more port: NAME=pty, NAME=file:PATH or NAME=unix:PATH (a socket that one client at a time connects to)
    #[arg(long, value_name = "NAME=WHERE")]
    port: Vec<String>,
}

impl Program for Cli {
    type Device = Console;
    const NAME: &'static str = "atoll-console";

    fn class(&self) -> DeviceClass {
        DeviceClass::Other(CONSOLE)
    }
    fn serve_args(&self) -> &ServeArgs {
        &self.serve
    }
    fn descriptors(&self) -> Vec<RawFd> {
        self.port_fd.into_iter().chain(self.listen_fd).collect()
    }
    fn profile(&self) -> &'static Profile {
        &Profile::CONSOLE
    }
    fn open(&self, _: Option<&Reports>) -> Result<(Console, Box<dyn Fence>), StartError> {
        let mut ports = Vec::new();
        if let Some(fd) = self.port_fd {
            ports.push(Port::stream("console", serve::inherited("--port-fd", fd)?)?);
        }
        if let Some(fd) = self.listen_fd {
            ports.push(Port::listening("console", serve::inherited("--listen-fd", fd)?)?);
        }
        for text in &self.port {
            ports.push(Port::open(text)?);
        }
        if !(1..=PORTS_MAX).contains(&ports.len()) {
            return Err(format!("{} ports: give 1 to {PORTS_MAX}, with --port NAME=WHERE", ports.len()).into());
        }
        Ok((Console::new(ports)?, Box::new(NoFence)))
    }
}

fn main() -> ExitCode {
    program::main::<Cli>()
}
