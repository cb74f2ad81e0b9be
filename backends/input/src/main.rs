//! The command line of `atoll-input`.

use std::os::fd::RawFd;
use std::process::ExitCode;

use atoll_devices::virtio::input_config::PAGE_MAX;
use atoll_input::device::InputDevice;
use atoll_kit::fence::{Fence, NoFence};
use atoll_kit::jail::Profile;
use atoll_kit::program::{self, Program, ServeArgs, StartError};
use atoll_kit::serve::inherited;
use atoll_kit::sidecar::Reports;
use atoll_protocol::input::InputKind;
use atoll_protocol::sidecar::DeviceClass;
use clap::Parser;

/// Virtio device type (virtio 1.2, section 5).
const INPUT: u32 = 18;

/// A keyboard, a tablet or a mouse for a guest (virtio-input), in a process of its own, served over vhost-user
///
/// What is typed comes over a socket from whoever has the screen: frames of Atoll's input wire.
#[derive(Debug, Parser)]
#[command(name = "atoll-input", version)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
    /// What it is: keyboard, tablet (a pointer that says where it is) or mouse (one that says how far it went)
    #[arg(long, value_name = "KIND")]
    kind: InputKind,
    /// Where it hears what happens: an inherited, connected socket, best one of a SOCK_SEQPACKET pair
    #[arg(long, value_name = "N")]
    events_fd: RawFd,
    /// A serial number for the guest, by which it tells devices of one kind apart
    #[arg(long, value_name = "TEXT", default_value = "")]
    serial: String,
}

impl Program for Cli {
    type Device = InputDevice;
    const NAME: &'static str = "atoll-input";

    fn class(&self) -> DeviceClass {
        DeviceClass::Other(INPUT)
    }
    fn serve_args(&self) -> &ServeArgs {
        &self.serve
    }
    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.events_fd]
    }
    fn profile(&self) -> &'static Profile {
        &Profile::INPUT
    }
    fn writes_files(&self) -> bool {
        false
    }
    fn check(&self) -> Result<(), String> {
        if self.serial.len() > PAGE_MAX {
            return Err(format!("a serial number of {} bytes; there is room for {PAGE_MAX}", self.serial.len()));
        }
        self.serve.check()
    }
    fn open(&self, _: Option<&Reports>) -> Result<(InputDevice, Box<dyn Fence>), StartError> {
        let events = inherited("--events-fd", self.events_fd)?;
        rustix::net::sockopt::socket_type(&events)
            .map_err(|error| format!("--events-fd {}: {error}; pass one end of a pair of sockets", self.events_fd))?;
        Ok((InputDevice::new(self.kind, &self.serial, events), Box::new(NoFence)))
    }
}

fn main() -> ExitCode {
    program::main::<Cli>()
}
