//! A device process that was taken over: it serves entropy, and answers each request with what it finds of a canary in
//! every descriptor that it holds, each mapped whole. For tests of what a device process has of its guest's memory.

#![allow(unsafe_code, reason = "it maps what it finds")]

use std::fs::File;
use std::os::fd::{BorrowedFd, RawFd};
use std::process::ExitCode;

use atoll_integration::canary::{CANARY, Found};
use atoll_kit::chain::Chain;
use atoll_kit::device::Io;
use atoll_kit::fence::{Fence, NoFence};
use atoll_kit::program::{self, Program, ServeArgs, StartError};
use atoll_kit::serve;
use atoll_kit::sidecar::Reports;
use atoll_kit::{ConfigError, Device, Progress, QueueHandler, QueueLayout, memory};
use atoll_protocol::sidecar::DeviceClass;
use clap::Parser;
use vm_memory::GuestMemory;

const ENTROPY: u32 = 4;
/// No process of ours has so many.
const DESCRIPTORS_MAX: RawFd = 512;

/// The options of atoll-rng.
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    serve: ServeArgs,
    #[arg(long)]
    fd: Option<RawFd>,
}

impl Program for Cli {
    type Device = Spy;
    const NAME: &'static str = "canary-rng";

    fn class(&self) -> DeviceClass {
        DeviceClass::Other(ENTROPY)
    }
    fn serve_args(&self) -> &ServeArgs {
        &self.serve
    }
    fn descriptors(&self) -> Vec<RawFd> {
        self.fd.into_iter().collect()
    }
    fn open(&self, _: Option<&Reports>) -> Result<(Spy, Box<dyn Fence>), StartError> {
        let source = self.fd.map(|fd| serve::inherited("--fd", fd).map(File::from)).transpose()?;
        Ok((Spy { _source: source }, Box::new(NoFence)))
    }
}

struct Spy {
    _source: Option<File>,
}

impl Device for Spy {
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
    fn queue(&mut self, _index: u16) -> Requests {
        Requests
    }
}

struct Requests;

impl QueueHandler for Requests {
    fn opcodes(&self) -> &'static [u8] {
        &[]
    }
    fn started(&mut self, _size: u16) {}
    fn stopped(&mut self) {}
    fn request<M: GuestMemory>(&mut self, _io: &mut Io<'_>, mem: &M, chain: &Chain) -> Progress {
        let answer = scan().encode();
        let written = memory::Segments(chain.writable().0).write_at(mem, 0, &answer);
        Progress::Done { written: if written.is_ok() { answer.len() as u32 } else { 0 } }
    }
    fn completion<M: GuestMemory>(&mut self, _io: &mut Io<'_>, _mem: &M, _head: u16, _result: i32) -> Progress {
        Progress::Done { written: 0 }
    }
}

/// Maps and reads everything that can be.
fn scan() -> Found {
    let mut found = Found::default();
    for fd in 0..DESCRIPTORS_MAX {
        // SAFETY: the kernel is asked what the number names, and says when that is nothing; nobody closes descriptors here.
        let Ok(about) = rustix::fs::fstat(unsafe { BorrowedFd::borrow_raw(fd) }) else { continue };
        let len = usize::try_from(about.st_size).unwrap_or_default();
        if len == 0 {
            continue;
        }
        found.descriptors += 1;
        // SAFETY: a mapping of its own, read only, of what is there for so long as the test lasts.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
        if start == libc::MAP_FAILED {
            continue;
        }
        found.bytes += len as u64;
        for at in (0..len.saturating_sub(CANARY.len() - 1)).step_by(CANARY.len()) {
            let mut piece = [0_u8; CANARY.len()];
            // SAFETY: inside the mapping; copied out before it is looked at, because others may write there.
            unsafe { std::ptr::copy_nonoverlapping(start.cast::<u8>().add(at), piece.as_mut_ptr(), piece.len()) };
            found.canaries += u64::from(piece == CANARY);
        }
        // SAFETY: what was mapped above.
        unsafe { libc::munmap(start, len) };
    }
    found
}

fn main() -> ExitCode {
    program::main::<Cli>()
}
