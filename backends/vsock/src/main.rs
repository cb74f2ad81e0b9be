//! `atoll-vsock`: sockets between a guest and programs of the host (virtio 1.2, section 5.10), each end of which is a UNIX
//! socket here. This file is the command line; `device` the queues, `hub` all connections, `connection` one of them,
//! `client` what a program of the host says first, `header` the header of a packet.

mod client;
mod connection;
mod device;
mod header;
mod hub;

use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;

use atoll_kit::fence::{Fence, NoFence};
use atoll_kit::jail::Profile;
use atoll_kit::program::{self, Program, ServeArgs, StartError};
use atoll_kit::serve;
use atoll_kit::sidecar::Reports;
use atoll_protocol::sidecar::DeviceClass;
use clap::Parser;

use device::Vsock;
use hub::Hub;

/// Virtio device type (virtio 1.2, section 5).
const VSOCK: u32 = 19;

/// Serves sockets between a virtual machine and programs of this host as a vhost-user device
///
/// A program connects to the listening socket, says "CONNECT port" and a line feed, and is answered "OK port" when the guest
/// listens there. A guest that connects to port P of the host (context id 2) reaches who listens at PATH_P.
#[derive(Debug, Parser)]
#[command(name = "atoll-vsock", version)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
    /// The guest's context id: 3 or more
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(3..u64::from(u32::MAX)))]
    cid: u64,
    /// Who listens for the guest is at this path, an underscore and the port
    #[arg(long, value_name = "PATH")]
    path: PathBuf,
    /// Programs of the host come to this inherited listening socket; by default one is made at --path
    #[arg(long, value_name = "N")]
    listen_fd: Option<RawFd>,
}

impl Program for Cli {
    type Device = Vsock;
    const NAME: &'static str = "atoll-vsock";

    fn class(&self) -> DeviceClass {
        DeviceClass::Other(VSOCK)
    }
    fn serve_args(&self) -> &ServeArgs {
        &self.serve
    }
    fn descriptors(&self) -> Vec<RawFd> {
        self.listen_fd.into_iter().collect()
    }
    fn profile(&self) -> &'static Profile {
        &Profile::VSOCK
    }
    fn writes_files(&self) -> bool {
        false
    }
    fn open(&self, _: Option<&Reports>) -> Result<(Vsock, Box<dyn Fence>), StartError> {
        let listener: OwnedFd = match self.listen_fd {
            Some(fd) => serve::inherited("--listen-fd", fd)?,
            None => std::os::unix::net::UnixListener::bind(&self.path)
                .map_err(|error| format!("--path {}: {error}; choose a path that is free", self.path.display()))?
                .into(),
        };
        let hub = Hub::new(self.cid, &self.path, listener.into())
            .map_err(|error| format!("--path {}: {error}; its folder must be there", self.path.display()))?;
        Ok((Vsock::new(hub)?, Box::new(NoFence)))
    }
}

fn main() -> ExitCode {
    program::main::<Cli>()
}
