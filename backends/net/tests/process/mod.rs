//! `atoll-net` as a process, and guests for it.

#![allow(dead_code, reason = "each test file uses a part")]

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use atoll_kit::driver::net::{HEADER_BYTES, NetGuest, NetOptions};

/// A header that asks for nothing.
pub(crate) const PLAIN: [u8; HEADER_BYTES] = [0; HEADER_BYTES];

/// A running `atoll-net`; killed when dropped.
pub(crate) struct Net {
    pub(crate) child: Child,
    pub(crate) socket: PathBuf,
}

impl Net {
    /// Starts it with `--socket` in `folder`.
    pub(crate) fn listen(folder: &Path, args: &[&str]) -> Result<Self> {
        Self::listen_with(folder, args, &[])
    }

    /// The same, with descriptors that it inherits.
    pub(crate) fn listen_with(folder: &Path, args: &[&str], fds: &[(&str, OwnedFd)]) -> Result<Self> {
        let socket = folder.join("net.sock");
        let mut command = command();
        command.arg("--socket").arg(&socket).args(args).stderr(Stdio::inherit());
        let child = with_fds(&mut command, fds).spawn()?;
        Ok(Self { child, socket })
    }

    /// Connects, waiting for the process to listen.
    pub(crate) fn connect(&mut self) -> Result<UnixStream> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => return Ok(stream),
                Err(e) if Instant::now() > deadline => return Err(e.into()),
                Err(_) => {}
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("atoll-net ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A guest on a new connection.
    pub(crate) fn guest(&mut self, options: NetOptions) -> Result<NetGuest> {
        NetGuest::connected(options, self.connect()?)
    }

    /// Waits for its end.
    pub(crate) fn end(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        bail!("atoll-net did not end")
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-net"));
    command.stdin(Stdio::null());
    command
}

/// Lets a command inherit descriptors and names them on its command line.
pub(crate) fn with_fds<'a>(command: &'a mut Command, fds: &[(&str, OwnedFd)]) -> &'a mut Command {
    let mut keep = Vec::new();
    for (option, fd) in fds {
        let copy = rustix::io::fcntl_dupfd_cloexec(fd, 100).expect("a copy of the descriptor");
        command.arg(option).arg(copy.as_raw_fd().to_string());
        keep.push(copy);
    }
    #[allow(unsafe_code, reason = "descriptors are made inheritable in the child only")]
    // SAFETY: fcntl is async-signal-safe and touches only the child's table.
    unsafe {
        command.pre_exec(move || {
            for fd in &keep {
                rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
            }
            Ok(())
        })
    }
}

/// Runs it to its end, for mistakes on the command line: status and standard error.
pub(crate) fn fails(args: &[&str]) -> (ExitStatus, String) {
    let mut child = command().args(args).stderr(Stdio::piped()).spawn().expect("atoll-net starts");
    let mut text = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut text).expect("text");
    (child.wait().expect("a status"), text)
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
