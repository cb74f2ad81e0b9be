//! TAP interfaces that are given by name: opened once, by a short-lived `atoll-net` (`--hand-over`), and held here.
//!
//! An interface that nobody made to stay goes with its last descriptor, and takes its Ethernet address, its routes and its
//! place in a bridge with it; a guest would go on sending to an address that nobody has. So each incarnation of the backend
//! gets copies of the same queues. Where the interface was taken away nevertheless, the next incarnation opens it anew.

use std::ffi::OsString;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use thiserror::Error;

use super::net::PAIRS_MAX;
use super::{Host, KindError};
use crate::backend::{CompanionSpec, PassedFd, SpawnError, Spawner};
use crate::lasted::Lasted;

/// How long opening may take: an interface that was in use may be free again within two seconds, and is waited for.
const OPEN_MAX: Duration = Duration::from_secs(5);
/// Most bytes of a reason.
const REASON_BYTES_MAX: usize = 1 << 10;

/// Why an interface cannot be had.
#[derive(Debug, Error)]
pub enum TapError {
    /// The program that opens it did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It said why.
    #[error("{0}")]
    Refused(String),
    /// It said nothing that could be used.
    #[error("{} did not open interface {name}: {reason}", .exe.display())]
    Silent {
        /// The program.
        exe: PathBuf,
        /// The interface.
        name: String,
        /// What went wrong.
        reason: String,
    },
    /// No socket to it.
    #[error("no socket to hand over interface {name}: {source}; raise the limit of open files")]
    Socket {
        /// The interface.
        name: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// An interface that is held.
pub(super) struct NamedTap {
    exe: PathBuf,
    args: Vec<OsString>,
    name: String,
    device: String,
    pairs: u16,
    spawner: Spawner,
    queues: Mutex<Vec<OwnedFd>>,
}

impl NamedTap {
    /// Opens it, with its host's end as `host_end` says in the words of `atoll-net`.
    pub(super) fn open(name: &str, pairs: u16, host_end: Vec<OsString>, host: &Host) -> Result<Self, KindError> {
        let mut args: Vec<OsString> =
            vec!["--tap".into(), name.into(), "--queue-pairs".into(), pairs.to_string().into()];
        args.extend(host_end);
        let (exe, device, spawner) = (host.program("atoll-net")?, host.name.clone(), host.spawner.clone());
        let tap = Self { exe, args, name: name.into(), device, pairs, spawner, queues: Mutex::default() };
        tap.queues()?;
        Ok(tap)
    }

    /// Copies of its queues for one incarnation.
    pub(super) fn queues(&self) -> Result<Vec<PassedFd>, TapError> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if queues.is_empty() || queues.iter().any(is_gone) {
            if !queues.is_empty() {
                tracing::warn!(
                    device = self.device,
                    tap = self.name,
                    "the interface was taken away; it is opened anew"
                );
            }
            queues.clear();
            *queues = self.ask()?;
        }
        let pass = |fd: &OwnedFd| Ok(PassedFd { flag: "--fd".into(), fd: fd.try_clone()? });
        let passed: std::io::Result<Vec<_>> = queues.iter().map(pass).collect();
        passed.map_err(|source| TapError::Socket { name: self.name.clone(), source })
    }

    fn ask(&self) -> Result<Vec<OwnedFd>, TapError> {
        let no_socket = |source| TapError::Socket { name: self.name.clone(), source };
        let (ours, theirs) = UnixStream::pair().map_err(no_socket)?;
        let fds = vec![PassedFd { flag: "--hand-over".into(), fd: theirs.into() }];
        let spec = CompanionSpec { name: self.device.clone(), exe: self.exe.clone(), args: self.args.clone(), fds };
        // Ends when this returns, if it has not by then.
        let _opener = self.spawner.companion(spec)?;
        let silent = |reason: String| TapError::Silent { exe: self.exe.clone(), name: self.name.clone(), reason };
        let (said, queues) = hear(&ours, Instant::now() + OPEN_MAX).map_err(silent)?;
        match said.as_slice() {
            [] => Err(silent("it ended without a word, which its log explains".into())),
            [0] if queues.len() == usize::from(self.pairs) => Ok(queues),
            [0] => Err(silent(format!("it handed over {} queues instead of {}", queues.len(), self.pairs))),
            reason => {
                let reason = String::from_utf8_lossy(reason);
                Err(TapError::Refused(reason.chars().filter(|c| !c.is_control()).collect()))
            }
        }
    }
}

/// Whether the interface behind a queue is not there any more.
fn is_gone(queue: &OwnedFd) -> bool {
    let mut watched = [PollFd::new(queue, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut watched, Some(&now)).is_ok() && watched.iter().any(|fd| fd.revents().contains(PollFlags::ERR))
}

/// The one message of the opener.
fn hear(socket: &UnixStream, deadline: Instant) -> Result<(Vec<u8>, Vec<OwnedFd>), String> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
    match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)) {
        Ok(1..) => {}
        Ok(0) => return Err(format!("nothing within {}", Lasted(OPEN_MAX))),
        Err(Errno::INTR) => return hear(socket, deadline),
        Err(errno) => return Err(errno.to_string()),
    }
    let mut said = vec![0; REASON_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PAIRS_MAX as usize))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut said)], &mut beside, flags);
    let mut queues = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            queues.extend(descriptors);
        }
    }
    said.truncate(received.map_err(|errno| errno.to_string())?.bytes);
    Ok((said, queues))
}
