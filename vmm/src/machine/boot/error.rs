//! Why a guest could not be loaded.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::machine::layout::Span;

/// A kernel, an initramfs or a command line that cannot be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read {what} {path}: {source}")]
    Read {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The very file that the machine was booted from holds something else.
    #[error(
        "{what} {path} was written to since the machine was booted: it starts again only from what it was booted with; \
         shutdown and boot take the file as it is now"
    )]
    Changed {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The file is no kernel.
    #[error("{path} is not a kernel: it is neither an ELF vmlinux nor a bzImage; give a distribution's vmlinuz")]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// An ELF file without an entry point for us.
    #[error("{path} has no PVH entry point; build it with CONFIG_PVH=y or give the bzImage")]
    NoPvh {
        /// The file.
        path: PathBuf,
    },
    /// A bzImage without a 64-bit entry point.
    #[error("{path} is a bzImage without a 64-bit entry point; a kernel for x86-64 of version 3.8 or later is needed")]
    No64Bit {
        /// The file.
        path: PathBuf,
    },
    /// The kernel does not load.
    #[error("{path} cannot be loaded ({reason}); the file is damaged, or more memory is needed (--memory size=)")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the loader said.
        reason: String,
    },
    /// Too little RAM for the kernel.
    #[error("{path} needs memory up to {needed} MiB and the guest has {have} MiB; raise --memory size=")]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// MiB that the kernel reaches up to.
        needed: u64,
        /// MiB of RAM below the PCI hole.
        have: u64,
    },
    /// Too little RAM for the initramfs.
    #[error("initramfs {path} of {size} MiB does not fit: {room} MiB are free beside the kernel; raise --memory size=")]
    InitramfsTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in MiB, rounded up.
        size: u64,
        /// Free MiB.
        room: u64,
    },
    /// Too long a command line.
    #[error("the command line has {len} bytes and this kernel takes at most {max}; shorten --cmdline")]
    CommandLineTooLong {
        /// Its bytes.
        len: usize,
        /// The kernel's limit.
        max: usize,
    },
    /// A zero byte inside the command line.
    #[error("the command line holds a zero byte; remove it from --cmdline")]
    CommandLineZero,
    /// A fixed place is not RAM.
    #[error("no RAM at {:#x} for boot tables of {} bytes; raise --memory size=", .0.start, .0.len)]
    NoRam(Span),
}
