//! The command line of `atoll-gpu`.

use std::os::fd::RawFd;
use std::process::ExitCode;

use atoll_gpu::device::GpuDevice;
use atoll_gpu::edid::{MODE_MAX, MODE_MIN};
use atoll_gpu::record::{ARENA_MAX, ARENA_MIN, Record};
use atoll_gpu::state::Wishes;
use atoll_gpu::virgl::library::Library;
use atoll_kit::fence::{Fence, NoFence};
use atoll_kit::jail::Profile;
use atoll_kit::program::{self, Program, ServeArgs, StartError};
use atoll_kit::serve::inherited;
use atoll_kit::sidecar::Reports;
use atoll_protocol::display::SCANOUTS_MAX;
use atoll_protocol::sidecar::DeviceClass;
use clap::Parser;

/// Columns and rows of a screen that says nothing.
const MODE: (u32, u32) = (1280, 800);

/// A display for a guest (virtio-gpu: 2D, and 3D with --virgl), in a process of its own, served over vhost-user.
///
/// What it shows goes to whoever has the screen, over the socket that the front end hands over (VHOST_USER_GPU_SET_SOCKET).
/// Without one everything works and nothing is shown. With QEMU: --socket PATH here, and there
/// `-chardev socket,id=c,path=PATH -device vhost-user-gpu-pci,chardev=c` with shared guest memory.
#[derive(Debug, Parser)]
#[command(name = "atoll-gpu", version)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
    /// Screens that can be connected
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=SCANOUTS_MAX as i64))]
    scanouts: u16,
    /// The mode of a screen before anybody says what it wants: the first, the second, …; default 1280x800
    #[arg(long, value_name = "WIDTHxHEIGHT", value_parser = parse_mode)]
    mode: Vec<(u32, u32)>,
    /// Memory for the guest's pictures, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range((ARENA_MIN >> 20)..=(ARENA_MAX >> 20)), conflicts_with = "record_fd")]
    memory: u64,
    /// What outlives this process, as an inherited, sealed memfd: its successor goes on from there. Its length says how much
    /// memory there is for pictures
    #[arg(long, value_name = "N")]
    record_fd: Option<RawFd>,
    /// Serve 3D, too, drawn on this host's processors by libvirglrenderer and Mesa, which have to be installed
    #[arg(long)]
    virgl: bool,
}

fn parse_mode(text: &str) -> Result<(u32, u32), String> {
    let sides = text.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
    sides
        .filter(|(width, height)| [*width, *height].iter().all(|side| (MODE_MIN..=MODE_MAX).contains(side)))
        .ok_or_else(|| format!("a mode is WIDTHxHEIGHT, each from {MODE_MIN} to {MODE_MAX}, as in 1280x800"))
}

impl Program for Cli {
    type Device = GpuDevice;
    const NAME: &'static str = "atoll-gpu";

    fn class(&self) -> DeviceClass {
        DeviceClass::Gpu
    }
    fn serve_args(&self) -> &ServeArgs {
        &self.serve
    }
    fn descriptors(&self) -> Vec<RawFd> {
        self.record_fd.into_iter().collect()
    }
    fn profile(&self) -> &'static Profile {
        if self.virgl { &Profile::GPU_VIRGL } else { &Profile::GPU }
    }
    fn writes_files(&self) -> bool {
        false
    }
    fn check(&self) -> Result<(), String> {
        if self.mode.len() > usize::from(self.scanouts) {
            return Err(format!("{} modes for {} screens: give --scanouts", self.mode.len(), self.scanouts));
        }
        self.serve.check()
    }
    /// A picture that was being copied dies with the process that copied it: there is nothing for a successor to wait for.
    fn open(&self, _: Option<&Reports>) -> Result<(GpuDevice, Box<dyn Fence>), StartError> {
        let record = match self.record_fd {
            Some(fd) => Record::map(inherited("--record-fd", fd)?)?,
            None => Record::new(self.memory << 20)?,
        };
        let modes = (0..usize::from(self.scanouts)).map(|number| self.mode.get(number).copied().unwrap_or(MODE));
        // As a machine's first screen is on and the others are plugged in.
        let wishes = Wishes { modes: modes.collect(), enabled: self.mode.len().max(1) };
        let device = GpuDevice::new(record, self.record_fd.is_some(), &wishes)?;
        let device = if self.virgl { device.with_virgl(Library::load()?) } else { device };
        Ok((device, Box::new(NoFence)))
    }
}

fn main() -> ExitCode {
    program::main::<Cli>()
}
