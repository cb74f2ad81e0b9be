//! `atoll-blk` as a process, and a driver for it.

#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod guesses;
pub(crate) mod qemu_img;

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use atoll_kit::driver::disk::{self, Kind};
use atoll_kit::driver::{Driver, Options};

/// Guest address where test data may lie.
pub(crate) const DATA: u64 = 4 << 20;

/// A running `atoll-blk`; killed when dropped.
pub(crate) struct Blk {
    pub(crate) child: Child,
    pub(crate) socket: Option<PathBuf>,
}

impl Blk {
    /// Starts it with `--socket` in `folder`.
    pub(crate) fn listen(folder: &Path, args: &[&str]) -> Result<Self> {
        let socket = folder.join("blk.sock");
        let child = command().arg("--socket").arg(&socket).args(args).stderr(Stdio::inherit()).spawn()?;
        Ok(Self { child, socket: Some(socket) })
    }

    /// The same with descriptors that it inherits.
    pub(crate) fn listen_with(folder: &Path, args: &[&str], fds: &[(&str, OwnedFd)]) -> Result<Self> {
        let socket = folder.join("blk.sock");
        let mut command = command();
        command.arg("--socket").arg(&socket).args(args).stderr(Stdio::inherit());
        Ok(Self { child: with_fds(&mut command, fds).spawn()?, socket: Some(socket) })
    }

    /// Starts it on one end of a socket pair, as the VMM does; gives the other end.
    pub(crate) fn inherit(args: &[&str]) -> Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = with_fds(command().args(args), &[("--vhost-fd", theirs.into())]).spawn()?;
        Ok((Self { child, socket: None }, ours))
    }

    /// Connects, waiting for the process to listen.
    pub(crate) fn connect(&mut self) -> Result<UnixStream> {
        let socket = self.socket.clone().context("no socket")?;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => return Ok(stream),
                Err(e) if Instant::now() > deadline => return Err(e.into()),
                Err(_) => {}
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("atoll-blk ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A driver on a new connection.
    pub(crate) fn driver(&mut self, options: Options) -> Result<Driver> {
        Driver::connected(options, self.connect()?)
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
        bail!("atoll-blk did not end")
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-blk"));
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
    let mut child = command().args(args).stderr(Stdio::piped()).spawn().expect("atoll-blk starts");
    let mut text = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut text).expect("text");
    (child.wait().expect("a status"), text)
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
