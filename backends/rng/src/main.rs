//! `atoll-rng`: entropy for a guest (virtio 1.2, section 5.4). The model of a small device: a source is opened before the
//! jail closes, each request becomes one read of it on the queue's ring, and what was read goes into the guest's buffer.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use atoll_kit::chain::Chain;
use atoll_kit::device::Io;
use atoll_kit::fence::{Fence, NoFence};
use atoll_kit::jail::Profile;
use atoll_kit::limit::{BucketConfig, Limiter};
use atoll_kit::memory::Segment;
use atoll_kit::program::{self, Program, ServeArgs, StartError};
use atoll_kit::sidecar::Reports;
use atoll_kit::{ConfigError, Device, Progress, QueueHandler, QueueLayout, memory, serve};
use atoll_protocol::sidecar::DeviceClass;
use clap::Parser;
use io_uring::{opcode, types};
use vm_memory::GuestMemory;

/// Most bytes for one request; a driver that wants more asks again.
const READ_MAX: u64 = 64 << 10;
/// Virtio device type (virtio 1.2, section 5).
const ENTROPY: u32 = 4;

/// Serves entropy to a virtual machine as a vhost-user device
#[derive(Debug, Parser)]
#[command(name = "atoll-rng", version)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
    /// Where entropy comes from: a character device
    #[arg(long, value_name = "DEVICE", default_value = "/dev/urandom", conflicts_with = "fd")]
    src: PathBuf,
    /// The same as an inherited descriptor
    #[arg(long, value_name = "N")]
    fd: Option<RawFd>,
    /// Limit the entropy: BYTES tokens that come back within MS milliseconds, BURST more once
    #[arg(long, value_name = "BYTES,MS[,BURST]")]
    rate_bytes: Option<BucketConfig>,
}

impl Program for Cli {
    type Device = Rng;
    const NAME: &'static str = "atoll-rng";

    fn class(&self) -> DeviceClass {
        DeviceClass::Other(ENTROPY)
    }
    fn serve_args(&self) -> &ServeArgs {
        &self.serve
    }
    fn descriptors(&self) -> Vec<RawFd> {
        self.fd.into_iter().collect()
    }
    fn profile(&self) -> &'static Profile {
        &Profile::RNG
    }
    fn writes_files(&self) -> bool {
        false
    }
    fn open(&self, _: Option<&Reports>) -> Result<(Rng, Box<dyn Fence>), StartError> {
        let (source, name) = match self.fd {
            Some(fd) => (File::from(serve::inherited("--fd", fd)?), format!("--fd {fd}")),
            None => {
                let name = self.src.display().to_string();
                (File::open(&self.src).map_err(|error| format!("{name}: {error}; use /dev/urandom"))?, name)
            }
        };
        // A file ends, and a driver would ask for ever.
        if !source.metadata()?.file_type().is_char_device() {
            return Err(format!("{name} is no character device; use /dev/urandom").into());
        }
        Ok((Rng { source: Arc::new(source), limiter: Limiter::new(self.rate_bytes, None) }, Box::new(NoFence)))
    }
}

/// A device without configuration and features.
struct Rng {
    source: Arc<File>,
    limiter: Option<Arc<Limiter>>,
}

impl Device for Rng {
    type Queue = Requests;

    fn layout(&self) -> QueueLayout {
        QueueLayout { queues: 1, size_max: 256 }
    }
    fn features(&self) -> u64 {
        0
    }
    fn features_acked(&mut self, _features: u64) {}
    fn read_config(&self, _offset: u32, out: &mut [u8]) {
        out.fill(0);
    }
    fn write_config(&mut self, offset: u32, _data: &[u8]) -> Result<(), ConfigError> {
        Err(ConfigError { offset })
    }
    fn reset(&mut self) {}
    fn limiter(&self, _index: u16) -> Option<Arc<Limiter>> {
        self.limiter.clone()
    }
    fn queue(&mut self, _index: u16) -> Requests {
        Requests { source: Arc::clone(&self.source), reads: HashMap::new() }
    }
}

/// The one queue, and the reads that are under way: where their bytes will be, and where these go.
struct Requests {
    source: Arc<File>,
    reads: HashMap<u16, (Vec<u8>, Vec<Segment>)>,
}

impl QueueHandler for Requests {
    fn opcodes(&self) -> &'static [u8] {
        Profile::RNG.opcodes
    }
    fn started(&mut self, _size: u16) {}
    fn stopped(&mut self) {}
    fn request<M: GuestMemory>(&mut self, io: &mut Io<'_>, _mem: &M, chain: &Chain) -> Progress {
        let len = chain.writable().bytes().min(READ_MAX) as u32;
        let mut bytes = vec![0; len as usize];
        let entry = opcode::Read::new(types::Fd(self.source.as_raw_fd()), bytes.as_mut_ptr(), len).build();
        self.reads.insert(chain.head(), (bytes, chain.writable().0.to_vec()));
        #[allow(unsafe_code, reason = "the kernel writes where the entry points")]
        // SAFETY: the buffer is on the heap and stays in the table until the operation has ended; the file is ours.
        match unsafe { io.push(entry, chain.head()) } {
            Ok(()) => Progress::Pending,
            Err(_) => self.finish(io, None::<(&M, usize)>, chain.head()),
        }
    }
    fn completion<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, head: u16, result: i32) -> Progress {
        self.finish(io, usize::try_from(result).ok().map(|len| (mem, len)), head)
    }
}

impl Requests {
    /// Gives the guest what was read: nothing when reading failed.
    fn finish<M: GuestMemory>(&mut self, io: &Io<'_>, read: Option<(&M, usize)>, head: u16) -> Progress {
        let written = self.reads.remove(&head).zip(read).and_then(|((bytes, room), (mem, len))| {
            memory::Segments(&room).write_at(mem, 0, bytes.get(..len)?).ok()?;
            u32::try_from(len).ok()
        });
        match written {
            Some(written) => io.figures().read(written.into()),
            None => io.figures().failed(),
        }
        Progress::Done { written: written.unwrap_or(0) }
    }
}

fn main() -> ExitCode {
    program::main::<Cli>()
}
