//! The command line of `atoll-nvme`.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use atoll_blk::fence::ImageFence;
use atoll_blk::storage::{Source, Storage};
use atoll_kit::fence::{Fence, NoFence};
use atoll_kit::jail::Profile;
use atoll_kit::program::{self, Program, ServeArgs, StartError};
use atoll_kit::serve::inherited;
use atoll_kit::sidecar::Reports;
use atoll_kit::vfio_user::VfioUser;
use atoll_nvme::device::Nvme;
use atoll_nvme::record::Record;
use atoll_protocol::sidecar::DeviceClass;
use clap::{ArgGroup, Parser};

/// What its supervisor knows it by: the PCI class of its function.
const CLASS: u32 = 0x0001_0802;

/// An NVMe controller on a raw image, in a process of its own, served over vfio-user.
///
/// Any vfio-user client can use it: Atoll starts it by itself; for QEMU (10.1 and newer) start it with --socket and use
/// `-device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"S"}}'` with shared guest memory.
#[derive(Debug, Parser)]
#[command(name = "atoll-nvme", version)]
#[command(group(ArgGroup::new("image").required(true).args(["path", "fd"])))]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
    /// The image: a file or a block device
    #[arg(long, value_name = "FILE")]
    path: Option<PathBuf>,
    /// The image as an inherited descriptor, opened for this process alone
    #[arg(long, value_name = "N")]
    fd: Option<RawFd>,
    /// What outlives this process, as an inherited, sealed memfd: its successor goes on from there
    #[arg(long, value_name = "N")]
    record_fd: Option<RawFd>,
    /// Refuse writes; several processes may then share the image
    #[arg(long)]
    read_only: bool,
    /// Most I/O queues of each kind
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: u16,
    /// The controller's serial number, at most 20 bytes
    #[arg(long, value_name = "ID", default_value = "atoll", value_parser = parse_serial)]
    serial: String,
    /// A number of this device's own among all that share the image: it tells a predecessor's lock from others
    #[arg(long, value_name = "N")]
    lock_byte: Option<u32>,
}

fn parse_serial(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 20 || !text.chars().all(|c| c.is_ascii_graphic()) {
        return Err("a serial number has 1 to 20 printable ASCII characters".to_owned());
    }
    Ok(text.to_owned())
}

impl Program for Cli {
    type Device = VfioUser<Nvme>;
    const NAME: &'static str = "atoll-nvme";

    fn class(&self) -> DeviceClass {
        DeviceClass::Other(CLASS)
    }
    fn serve_args(&self) -> &ServeArgs {
        &self.serve
    }
    fn descriptors(&self) -> Vec<RawFd> {
        self.fd.into_iter().chain(self.record_fd).collect()
    }
    fn profile(&self) -> &'static Profile {
        &Profile::NVME
    }
    fn writes_files(&self) -> bool {
        !self.read_only
    }
    fn open(&self, _: Option<&Reports>) -> Result<(VfioUser<Nvme>, Box<dyn Fence>), StartError> {
        let source = match (&self.path, self.fd) {
            (Some(path), _) => Source::Path(path.clone()),
            (None, Some(fd)) => Source::Fd(fd),
            (None, None) => return Err("say what to serve: --path or --fd".into()),
        };
        let storage = Arc::new(Storage::open(&source, self.read_only, false)?);
        let record = match self.record_fd {
            Some(fd) => Record::map(inherited("--record-fd", fd)?)?,
            None => Record::new()?,
        };
        // A writer is alone anyway; a reader without a name has no predecessor that could be told from a neighbour.
        let device = self.lock_byte.or((!self.read_only).then_some(0));
        let fence: Box<dyn Fence> = match storage.file() {
            Some(_) => Box::new(ImageFence { storage: Arc::clone(&storage), device, beneath: None }),
            None => Box::new(NoFence),
        };
        Ok((VfioUser(Nvme::new(storage, record, self.num_queues, &self.serial)?), fence))
    }
}

fn main() -> ExitCode {
    program::main::<Cli>()
}
