//! A device's program as a process of its own, for tests: started on a socket that it listens at or on one end of a pair,
//! connected to, awaited, and gone when the test is.

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::net::{NetGuest, NetOptions};
use super::{Driver, Options};

/// How long it may take until it listens.
const LISTEN_MAX: Duration = Duration::from_secs(10);
/// How long it may take to end.
const END_MAX: Duration = Duration::from_secs(20);
/// How long it may take to say why it does not serve.
const FAIL_MAX: Duration = Duration::from_secs(60);

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Process {
    /// The process.
    pub child: Child,
    /// Where it listens, if it does.
    pub socket: Option<PathBuf>,
}

impl Process {
    /// Starts `program` with a socket in `folder`, arguments, and descriptors that it inherits under these options.
    ///
    /// # Errors
    /// It does not start.
    pub fn listen(program: impl AsRef<OsStr>, folder: &Path, args: &[&str], fds: &[(&str, OwnedFd)]) -> Result<Self> {
        let socket = folder.join("device.sock");
        let mut command = command(program);
        command.arg("--socket").arg(&socket).args(args).stderr(Stdio::inherit());
        Ok(Self { child: with_fds(&mut command, fds).spawn()?, socket: Some(socket) })
    }

    /// Starts it on one end of a socket pair, as the VMM does; gives the other end.
    ///
    /// # Errors
    /// It does not start.
    pub fn inherit(program: impl AsRef<OsStr>, args: &[&str]) -> Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = with_fds(command(program).args(args), &[("--vhost-fd", theirs.into())]).spawn()?;
        Ok((Self { child, socket: None }, ours))
    }

    /// Connects, waiting for the process to listen.
    ///
    /// # Errors
    /// It ends, or does not listen in time.
    pub fn connect(&mut self) -> Result<UnixStream> {
        let socket = self.socket.clone().context("no socket")?;
        let deadline = Instant::now() + LISTEN_MAX;
        loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => return Ok(stream),
                Err(e) if Instant::now() > deadline => return Err(e.into()),
                Err(_) => {}
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended: {status}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A driver on a new connection.
    ///
    /// # Errors
    /// As [`Process::connect`] and [`Driver::connected`].
    pub fn driver(&mut self, options: Options) -> Result<Driver> {
        Driver::connected(options, self.connect()?)
    }

    /// A guest with a card, on a new connection.
    ///
    /// # Errors
    /// As [`Process::connect`] and [`NetGuest::connected`].
    pub fn guest(&mut self, options: NetOptions) -> Result<NetGuest> {
        NetGuest::connected(options, self.connect()?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn end(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + END_MAX;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        bail!("it did not end")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program that has nobody to ask.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    command
}

/// Lets a command inherit descriptors and names them on its command line: behind the option, or, where that ends with `=` or
/// `:`, as a part of it.
///
/// # Panics
/// There is no descriptor left.
pub fn with_fds<'a>(command: &'a mut Command, fds: &[(&str, OwnedFd)]) -> &'a mut Command {
    let mut keep = Vec::new();
    for (option, fd) in fds {
        let copy = rustix::io::fcntl_dupfd_cloexec(fd, 100).expect("a copy of the descriptor");
        let number = copy.as_raw_fd().to_string();
        if option.ends_with([':', '=']) {
            command.arg(format!("{option}{number}"));
        } else {
            command.arg(option).arg(number);
        }
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
///
/// # Panics
/// It does not start, does not end, or says what is no text.
pub fn fails(program: impl AsRef<OsStr>, args: &[&str]) -> (ExitStatus, String) {
    let mut child = command(program).args(args).stderr(Stdio::piped()).spawn().expect("the program starts");
    let deadline = Instant::now() + FAIL_MAX;
    // What it says fits into a pipe.
    let status = loop {
        match child.try_wait().expect("a status") {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("with {args:?} it serves instead of failing");
            }
        }
    };
    let mut text = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut text).expect("text");
    (status, text)
}
