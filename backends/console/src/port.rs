//! The host's end of a port: a terminal, a file, or whoever is connected to a socket. Nothing here waits: a host that does
//! not read loses what the guest prints, because a guest's kernel stands still while its console takes nothing.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use atoll_kit::program::StartError;
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// A port.
#[derive(Debug)]
pub(crate) struct Port {
    /// What the guest calls it.
    pub(crate) name: String,
    stream: Mutex<Option<Arc<OwnedFd>>>,
    listener: Option<OwnedFd>,
    /// A pseudo-terminal hangs up when nobody holds its other side.
    _other_side: Option<OwnedFd>,
}

/// What came of looking for input.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// So many bytes.
    Bytes(usize),
    /// None now.
    Nothing,
    /// None any more, ever.
    Ended,
    /// A client has come, or the one that was there has gone.
    Connected(bool),
}

fn never_wait(fd: &OwnedFd) -> rustix::io::Result<()> {
    fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)
}

impl Port {
    /// A port that is `fd`.
    pub(crate) fn stream(name: &str, fd: OwnedFd) -> Result<Self, StartError> {
        never_wait(&fd)?;
        Ok(Self { name: name.into(), stream: Mutex::new(Some(Arc::new(fd))), listener: None, _other_side: None })
    }
    /// A port that clients of a listening socket have, one at a time.
    pub(crate) fn listening(name: &str, listener: OwnedFd) -> Result<Self, StartError> {
        never_wait(&listener)?;
        Ok(Self { name: name.into(), stream: Mutex::default(), listener: Some(listener), _other_side: None })
    }
    /// A port as it is named on the command line.
    pub(crate) fn open(text: &str) -> Result<Self, StartError> {
        let (name, place) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(|| {
            format!("--port {text}: a name is missing, as in NAME=pty, NAME=file:PATH or NAME=unix:PATH")
        })?;
        let failed = |error: &dyn std::fmt::Display| format!("--port {text}: {error}; choose another path");
        match place.split_once(':') {
            None if place == "pty" => Self::terminal(name),
            Some(("file", path)) => {
                let file = OpenOptions::new().append(true).create(true).open(path).map_err(|error| failed(&error))?;
                Self::stream(name, file.into())
            }
            Some(("unix", path)) => {
                // Left behind by a process that is gone: nobody answers.
                if UnixStream::connect(path).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused) {
                    std::fs::remove_file(path)?;
                }
                Self::listening(name, UnixListener::bind(Path::new(path)).map_err(|error| failed(&error))?.into())
            }
            _ => Err(format!("--port {text}: give {name}=pty, {name}=file:PATH or {name}=unix:PATH").into()),
        }
    }
    fn terminal(name: &str) -> Result<Self, StartError> {
        let end = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&end)?;
        unlockpt(&end)?;
        let path = ptsname(&end, Vec::new())?;
        let other = rustix::fs::open(&path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        let mut attributes = tcgetattr(&other)?;
        attributes.make_raw();
        tcsetattr(&other, OptionalActions::Now, &attributes)?;
        tracing::info!(port = name, "at {}", path.to_string_lossy());
        Ok(Self { _other_side: Some(other), ..Self::stream(name, end)? })
    }

    fn peer(&self) -> Option<Arc<OwnedFd>> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
    fn set_peer(&self, peer: Option<OwnedFd>) {
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = peer.map(Arc::new);
    }
    /// Somebody is there to hear and to speak.
    pub(crate) fn is_open(&self) -> bool {
        self.peer().is_some()
    }
    /// What says that there may be input; to be held as long as it is waited for.
    pub(crate) fn source(&self) -> Option<Arc<OwnedFd>> {
        self.peer()
    }
    /// Where clients come from while there is none.
    pub(crate) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }
    /// Takes what there is from the host.
    pub(crate) fn read(&self, bytes: &mut [u8]) -> Input {
        match (self.peer(), &self.listener) {
            (Some(peer), listener) => match rustix::io::read(&peer, bytes) {
                Ok(count) if count > 0 => Input::Bytes(count),
                Err(Errno::AGAIN | Errno::INTR) => Input::Nothing,
                _ if listener.is_some() => {
                    self.set_peer(None);
                    Input::Connected(false)
                }
                // A file that is only written, an end of input.
                _ => Input::Ended,
            },
            (None, Some(listener)) => match accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(client) => {
                    self.set_peer(Some(client));
                    Input::Connected(true)
                }
                Err(_) => Input::Nothing,
            },
            (None, None) => Input::Ended,
        }
    }
    /// Hands the host what the guest has written; says how much of it was taken.
    pub(crate) fn write(&self, bytes: &[u8]) -> usize {
        self.peer().map_or(0, |peer| rustix::io::write(&peer, bytes).unwrap_or(0))
    }
}
