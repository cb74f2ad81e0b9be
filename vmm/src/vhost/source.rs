//! Where a device's backend comes from: a process that the VMM starts, or somebody else's socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use atoll_protocol::jail::JailedLayer;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

use super::patience::Patience;
use super::upgrade::Lone;
use super::worker::ResizeError;
use crate::backend::Ending;

/// No backend could be reached. Whether it is worth trying again is for the one who asked to judge: at the machine's
/// start it is not, in a recovery it is.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The process could not be started, ended at once or did not get ready.
    #[error("{source}")]
    Start {
        /// Another incarnation would fail the same way.
        hopeless: bool,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Nobody listens.
    #[error("nobody listens at {path} ({source}); {}", remedy(.path))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Not something to connect to.
    #[error("{path} cannot be a socket's name ({source}); it has at most 107 bytes")]
    Name {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// How to have somebody listen: a switch of this user's is started by name.
fn remedy(path: &Path) -> String {
    let folder = path.parent().and_then(Path::file_name);
    match path.file_stem().filter(|_| folder.is_some_and(|folder| folder == "switches")) {
        Some(name) => format!("start it with: atoll switch {} &", name.display()),
        None => "start the backend first, or name its socket with socket=".to_owned(),
    }
}

/// One life of a backend.
pub struct Incarnation {
    /// Connected to it.
    pub socket: UnixStream,
    /// Its process, where it is ours.
    pub process: Option<Box<dyn BackendProcess>>,
}

/// How an incarnation is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// After its predecessor: it is not ready before nothing of that one is under way.
    Alone,
    /// Beside one that serves: it is ready when everything is but that, and touches nothing that both would.
    Beside {
        /// Another program than that of the others.
        exe: Option<PathBuf>,
    },
}

/// The program that a device's processes are made of; an upgrade makes it another one.
#[derive(Debug)]
pub struct Build(Mutex<PathBuf>);

impl Build {
    /// The program at `exe`.
    pub fn new(exe: PathBuf) -> Arc<Self> {
        Arc::new(Self(Mutex::new(exe)))
    }
    /// Where it is.
    pub fn exe(&self) -> PathBuf {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
    /// Another one from now on; gives the one before.
    pub(super) fn set(&self, exe: PathBuf) -> PathBuf {
        std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), exe)
    }
}

/// A backend process that the VMM started.
pub trait BackendProcess: Send {
    /// Its process id.
    fn id(&self) -> u32;
    /// How its jail came out; empty for a program of somebody else's.
    fn jail(&self) -> &[JailedLayer] {
        &[]
    }
    /// Readable once the process has ended.
    fn ended(&self) -> BorrowedFd<'_>;
    /// Kills it, if it still lives, and waits for its end by `deadline`. Says how it ended, in words.
    fn kill(&mut self, deadline: Instant) -> String;
    /// How it ended, as a restart sees it.
    fn ending(&self) -> Ending {
        Ending::Crash { idle: false }
    }
    /// What it wrote last, once it has ended, the newest line last.
    fn last_lines(&self) -> Vec<String> {
        Vec::new()
    }
    /// What it says of itself stands, since this was asked last.
    fn take_stall(&mut self) -> Option<String> {
        None
    }
    /// Has it look what size its device has now, in bytes.
    ///
    /// # Errors
    /// In words, when it does not say so while `patience` lasts.
    fn measure(&mut self, patience: &mut Patience) -> Result<u64, String>;
    /// Asks it to end; kills it at `deadline`. Says how it ended, in words.
    fn finish(&mut self, deadline: Instant) -> String;
}

/// Whether something of a dead backend is still under way: after SIGKILL and reap its I/O can still land in a file and in
/// guest memory.
pub trait Fence: Send + Sync {
    /// Whether nothing is; `None` when it cannot be seen from here.
    fn is_quiet(&self) -> Option<bool>;
}

/// For processes whose every write is a copy by the processor: nothing of it outlives them.
#[derive(Clone, Copy, Debug)]
pub struct EndIsEnough;

impl Fence for EndIsEnough {
    fn is_quiet(&self) -> Option<bool> {
        Some(true)
    }
}

/// For backends of others.
#[derive(Clone, Copy, Debug)]
pub struct Unseen;

impl Fence for Unseen {
    fn is_quiet(&self) -> Option<bool> {
        None
    }
}

/// Makes one incarnation after the other.
pub trait BackendSource: Send {
    /// Starts or reaches a backend. Any earlier one has been given up.
    ///
    /// # Errors
    /// If there is none while `patience` lasts.
    fn connect(&mut self, generation: u64, patience: &mut Patience) -> Result<Incarnation, SourceError>;
    /// Starts one beside an earlier one that serves, of the present build or of the one at `exe`.
    ///
    /// # Errors
    /// If there is none while `patience` lasts, or there cannot be two.
    fn connect_beside(
        &mut self,
        _generation: u64,
        _exe: Option<&Path>,
        _patience: &mut Patience,
    ) -> Result<Incarnation, SourceError> {
        let source = "a second process cannot be started beside the one that serves this device".into();
        Err(SourceError::Start { hopeless: true, source })
    }
    /// What its processes are made of, where one can be started beside another.
    ///
    /// # Errors
    /// Why not.
    fn build(&self) -> Result<Arc<Build>, Lone> {
        Err(Lone::Foreign)
    }
    /// How to name it in a log.
    fn describe(&self) -> String;
    /// How to see that the last writes of one that has ended are done.
    fn fence(&self) -> Arc<dyn Fence> {
        Arc::new(Unseen)
    }
    /// Whether it is somebody else's: it comes when it comes, however long that takes.
    fn is_foreign(&self) -> bool {
        false
    }
    /// Changes the size of what the backends serve; gives the size that it has afterwards.
    ///
    /// # Errors
    /// When it is not ours, or cannot be changed.
    fn resize(&mut self, _bytes: u64) -> Result<u64, ResizeError> {
        Err(ResizeError::NotOurs)
    }
}

/// How many slices of patience a socket is worth at which nobody listens.
const REFUSALS_MAX: u32 = 50;

/// Somebody else's backend behind a socket in the file system.
#[derive(Clone, Debug)]
pub struct ExternalSocket {
    path: PathBuf,
}

impl ExternalSocket {
    /// The backend that listens at `path`.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self { path: path.as_ref().to_owned() }
    }
    fn attempt(&self, address: &SocketAddrUnix) -> io::Result<UnixStream> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, address)?;
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(false)?;
        Ok(socket)
    }
}

impl BackendSource for ExternalSocket {
    fn connect(&mut self, _generation: u64, patience: &mut Patience) -> Result<Incarnation, SourceError> {
        let address = SocketAddrUnix::new(&self.path)
            .map_err(|errno| SourceError::Name { path: self.path.clone(), source: errno.into() })?;
        let mut refusals = REFUSALS_MAX;
        loop {
            let source = match self.attempt(&address) {
                Ok(socket) => return Ok(Incarnation { socket, process: None }),
                Err(source) => source,
            };
            let worth_waiting = match source.kind() {
                // A listener whose backlog is full.
                io::ErrorKind::WouldBlock => true,
                // One that has its name and does not listen yet; or a name that somebody left behind.
                io::ErrorKind::ConnectionRefused => {
                    refusals = u32::saturating_sub(refusals, 1);
                    refusals > 0
                }
                _ => false,
            };
            match patience.slice().filter(|_| worth_waiting) {
                Some(slice) => std::thread::sleep(slice),
                None => return Err(SourceError::Connect { path: self.path.clone(), source }),
            }
        }
    }
    fn describe(&self) -> String {
        format!("socket {}", self.path.display())
    }
    fn is_foreign(&self) -> bool {
        true
    }
}

/// Whether something has happened that one waits for: a socket hung up, a process ended.
pub(crate) fn is_readable(descriptor: impl AsFd) -> bool {
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(descriptor.as_fd(), rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(1))
}
