//! `atoll-blk` as a process, and a driver for it.

#![allow(dead_code, unused_imports, reason = "each test file uses a part")]

pub(crate) mod guesses;
pub(crate) mod qemu_img;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::Result;
use atoll_kit::driver::Driver;
use atoll_kit::driver::disk::{self, Kind};
pub(crate) use atoll_kit::driver::process::{Process, with_fds};

/// Guest address where test data may lie.
pub(crate) const DATA: u64 = 4 << 20;

const PROGRAM: &str = env!("CARGO_BIN_EXE_atoll-blk");

/// Starts it with `--socket` in `folder`.
pub(crate) fn listen(folder: &Path, args: &[&str]) -> Result<Process> {
    Process::listen(PROGRAM, folder, args, &[])
}

/// The same with descriptors that it inherits.
pub(crate) fn listen_with(folder: &Path, args: &[&str], fds: &[(&str, OwnedFd)]) -> Result<Process> {
    Process::listen(PROGRAM, folder, args, fds)
}

/// Starts it on one end of a socket pair, as the VMM does; gives the other end.
pub(crate) fn inherit(args: &[&str]) -> Result<(Process, UnixStream)> {
    Process::inherit(PROGRAM, args)
}

pub(crate) fn command() -> Command {
    atoll_kit::driver::process::command(PROGRAM)
}

/// Runs it to its end, for mistakes on the command line: status and standard error.
pub(crate) fn fails(args: &[&str]) -> (ExitStatus, String) {
    atoll_kit::driver::process::fails(PROGRAM, args)
}

/// One request on queue 0.
pub(crate) fn run(driver: &mut Driver, kind: Kind, sector: u64, data: &[(u64, u32)]) -> Result<(u8, u32)> {
    let (queue, guest) = driver.queue(0)?;
    disk::run(queue, guest, kind, sector, data)
}

/// Bytes that differ from sector to sector and from seed to seed.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// An image of `bytes` zeroes in `folder`.
pub(crate) fn image(folder: &Path, bytes: u64) -> Result<PathBuf> {
    let path = folder.join("disk.img");
    std::fs::File::create(&path)?.set_len(bytes)?;
    Ok(path)
}

/// Lets a command inherit a descriptor that it is not told of.
pub(crate) fn keep_open(command: &mut Command, fd: std::os::fd::RawFd) {
    #[allow(unsafe_code, reason = "a descriptor is made inheritable in the child only")]
    // SAFETY: fcntl is async-signal-safe and touches only the child's table.
    unsafe {
        command.pre_exec(move || {
            if libc::fcntl(fd, libc::F_SETFD, 0) == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        })
    };
}
