//! `atoll-net` as a process, and guests for it.

#![allow(dead_code, unused_imports, reason = "each test file uses a part")]

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use atoll_kit::driver::net::HEADER_BYTES;
pub(crate) use atoll_kit::driver::process::{Process, with_fds};

/// A header that asks for nothing.
pub(crate) const PLAIN: [u8; HEADER_BYTES] = [0; HEADER_BYTES];

const PROGRAM: &str = env!("CARGO_BIN_EXE_atoll-net");

/// Starts it with `--socket` in `folder`.
pub(crate) fn listen(folder: &Path, args: &[&str]) -> Result<Process> {
    Process::listen(PROGRAM, folder, args, &[])
}

/// The same, with descriptors that it inherits.
pub(crate) fn listen_with(folder: &Path, args: &[&str], fds: &[(&str, OwnedFd)]) -> Result<Process> {
    Process::listen(PROGRAM, folder, args, fds)
}

pub(crate) fn command() -> Command {
    atoll_kit::driver::process::command(PROGRAM)
}

/// Runs it to its end, for mistakes on the command line: status and standard error.
pub(crate) fn fails(args: &[&str]) -> (ExitStatus, String) {
    atoll_kit::driver::process::fails(PROGRAM, args)
}

/// The address of a guest's card.
pub(crate) fn mac(guest: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, guest]
}

/// To everybody.
pub(crate) const ALL: [u8; 6] = [0xff; 6];

/// A frame of `len` bytes with contents that differ from number to number.
pub(crate) fn frame(to: [u8; 6], from: [u8; 6], number: u32, len: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from[..], &[0x88, 0xb5], &number.to_be_bytes()].concat();
    let start = frame.len();
    frame.extend((start..len).map(|at| (at as u32).wrapping_mul(31).wrapping_add(number.wrapping_mul(7)) as u8));
    frame
}

/// Waits until something is so.
pub(crate) fn until(what: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !so().context(what.to_owned())? {
        if Instant::now() > deadline {
            bail!("{what}: not in time");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
