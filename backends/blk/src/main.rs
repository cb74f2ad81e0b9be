//! The command line of `atoll-blk`.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use atoll_blk::disk::Disk;
use atoll_blk::fence::ImageFence;
use atoll_blk::qcow2::image::Format;
use atoll_blk::storage::{Beneath, Source, Storage};
use atoll_blk::{ImageType, probe};
use atoll_kit::fence::{Fence, NoFence};
use atoll_kit::jail::Profile;
use atoll_kit::limit::{BucketConfig, Limiter};
use atoll_kit::program::{self, Program, ServeArgs, StartError};
use atoll_kit::sidecar::Reports;
use atoll_protocol::sidecar::DeviceClass;
use clap::{ArgGroup, Parser};

/// A virtio-blk device in a process of its own, served over vhost-user.
///
/// Any vhost-user front end can use it: Atoll starts it by itself; for QEMU start it with --socket and use
/// `-chardev socket,id=c,path=S,reconnect=1 -device vhost-user-blk-pci,chardev=c` with shared guest memory.
#[derive(Debug, Parser)]
#[command(name = "atoll-blk", version)]
#[command(group(ArgGroup::new("image").required(true).args(["path", "fd", "null"])))]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
    /// The image: a file or a block device
    #[arg(long, value_name = "FILE")]
    path: Option<PathBuf>,
    /// The image as an inherited descriptor, opened for this process alone
    #[arg(long, value_name = "N")]
    fd: Option<RawFd>,
    /// No image: requests succeed and move nothing (for measuring). SIZE in bytes, or with K, M, G, T
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    null: Option<u64>,
    /// What the image is; without it, one that begins with a qcow2 header is refused and anything else is raw
    #[arg(long, value_name = "TYPE", value_enum)]
    image_type: Option<ImageType>,
    /// A qcow2 image that the image stands on, as an inherited descriptor; again for what that one stands on
    #[arg(long, value_name = "N")]
    backing_qcow2: Vec<RawFd>,
    /// A raw image that they stand on, the last of them
    #[arg(long, value_name = "N")]
    backing_raw: Option<RawFd>,
    /// The file that a qcow2 image has its data in, as an inherited descriptor
    #[arg(long, value_name = "N")]
    data_fd: Option<RawFd>,
    /// Serve nobody: say what a qcow2 image needs, one line of JSON, and end
    #[arg(long, requires = "fd", conflicts_with = "transport")]
    probe: bool,
    /// Refuse writes; several processes may then share the image
    #[arg(long)]
    read_only: bool,
    /// Number of request queues
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: u16,
    /// Bypass the host's page cache (O_DIRECT)
    #[arg(long)]
    direct: bool,
    /// The disk's serial number, at most 20 bytes
    #[arg(long, value_name = "ID", default_value = "", value_parser = parse_serial)]
    serial: String,
    /// Limit the bytes of all queues together: BYTES tokens that come back within MS milliseconds, BURST more once
    #[arg(long, value_name = "BYTES,MS[,BURST]")]
    rate_bytes: Option<BucketConfig>,
    /// Limit the requests of all queues together, likewise
    #[arg(long, value_name = "REQUESTS,MS[,BURST]")]
    rate_ops: Option<BucketConfig>,
    /// A number of this device's own among all that share the image: it tells a predecessor's lock from others
    #[arg(long, value_name = "N")]
    lock_byte: Option<u32>,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (text.get(..text.len() - 1), 10),
        Some(b'M' | b'm') => (text.get(..text.len() - 1), 20),
        Some(b'G' | b'g') => (text.get(..text.len() - 1), 30),
        Some(b'T' | b't') => (text.get(..text.len() - 1), 40),
        _ => (Some(text), 0),
    };
    let number: u64 =
        digits.unwrap_or_default().parse().map_err(|_| format!("{text} is no size; write for example 64G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than 2^64 bytes"))
}

fn parse_serial(text: &str) -> Result<String, String> {
    if text.len() > atoll_blk::disk::SERIAL_BYTES {
        return Err(format!("a serial has at most 20 bytes, this one {}", text.len()));
    }
    Ok(text.to_owned())
}

impl Program for Cli {
    type Device = Disk;
    const NAME: &'static str = "atoll-blk";

    fn class(&self) -> DeviceClass {
        DeviceClass::Block
    }
    fn serve_args(&self) -> &ServeArgs {
        &self.serve
    }
    fn descriptors(&self) -> Vec<RawFd> {
        [self.fd, self.backing_raw, self.data_fd]
            .into_iter()
            .flatten()
            .chain(self.backing_qcow2.iter().copied())
            .collect()
    }
    fn profile(&self) -> &'static Profile {
        &Profile::BLK
    }
    fn writes_files(&self) -> bool {
        !self.read_only && self.null.is_none()
    }
    fn check(&self) -> Result<(), String> {
        match (self.probe, self.fd) {
            (true, Some(_)) => Ok(()),
            // clap does not see it where another image is given.
            (true, None) => Err("--probe reads an image on --fd".to_owned()),
            (false, _) => self.serve.check(),
        }
    }
    fn errand(&self) -> Option<Result<(), StartError>> {
        let fd = self.fd.filter(|_| self.probe)?;
        Some(probe::run(fd, self.serve.jail.mode()).map_err(Into::into))
    }
    fn open(&self, _: Option<&Reports>) -> Result<(Disk, Box<dyn Fence>), StartError> {
        let source = match (&self.path, self.fd, self.null) {
            (Some(path), ..) => Source::Path(path.clone()),
            (_, Some(fd), _) => Source::Fd(fd),
            (.., Some(bytes)) => Source::Null(bytes),
            _ => return Err("say what to serve: --path, --fd or --null".into()),
        };
        let storage = Arc::new(open(self, &source)?);
        let fence: Box<dyn Fence> = match storage.file() {
            None => Box::new(NoFence),
            Some(_) => {
                let device = device_byte(self);
                // A name that is this device's alone: others may stand on the same base.
                let beneath = device.filter(|_| self.lock_byte.is_some() || self.serve.socket.is_some());
                Box::new(ImageFence { storage: Arc::clone(&storage), device, beneath })
            }
        };
        let limiter = Limiter::new(self.rate_bytes, self.rate_ops);
        Ok((Disk::new(storage, self.num_queues, &self.serial).limited(limiter), fence))
    }
}

fn open(cli: &Cli, source: &Source) -> Result<Storage, StartError> {
    let backing = cli.backing_qcow2.iter().map(|fd| (*fd, Format::Qcow2));
    let backing = backing.chain(cli.backing_raw.map(|fd| (fd, Format::Raw))).collect();
    let beneath = Beneath { data: cli.data_fd, backing };
    if cli.image_type == Some(ImageType::Qcow2) {
        return Ok(Storage::open_qcow2(source, &beneath, cli.read_only, cli.direct)?);
    }
    if beneath.data.is_some() || !beneath.backing.is_empty() {
        return Err("only a qcow2 image stands on others: say --image-type qcow2".into());
    }
    let open = if cli.image_type.is_some() { Storage::open } else { Storage::guess };
    Ok(open(source, cli.read_only, cli.direct)?)
}

/// Which byte tells this device's incarnations from other users of the image. A writer is alone anyway; a reader on a
/// socket is known by its path; an unnamed reader has no predecessor that could be told from a neighbour.
fn device_byte(cli: &Cli) -> Option<u32> {
    if let Some(byte) = cli.lock_byte {
        return Some(byte);
    }
    match &cli.serve.socket {
        Some(path) => {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let text = path.as_os_str().as_encoded_bytes();
            // FNV-1a: stable over builds, unlike the standard library's hash.
            Some(text.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)))
        }
        None if cli.read_only => None,
        None => Some(0),
    }
}

fn main() -> ExitCode {
    program::main::<Cli>()
}
