//! Where the operator's socket comes from: a path that is bound here, or a listening socket that was inherited.
#![allow(unsafe_code, reason = "a descriptor that is named by its number on the command line becomes ours")]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::io::{FdFlags, fcntl_setfd, ioctl_fionbio};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use thiserror::Error;

use crate::config::{KeyError, PathOrFd};
use crate::unix_socket::{BoundSocket, SocketError};

/// Why nobody can be listened to.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The path.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The descriptor is not what it should be.
    #[error("descriptor {fd} {what}: give fd=N of a UNIX stream socket that listens")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What is the matter with it.
        what: &'static str,
    },
    /// A key that there is not, or none of its value.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// Neither path nor descriptor.
    #[error("'{0}' is neither PATH, path=PATH nor fd=N")]
    Syntax(String),
}

/// What `--api-socket` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAt {
    /// A path; a socket there that nobody listens at is replaced.
    Path(PathBuf),
    /// An inherited descriptor.
    Descriptor(RawFd),
}

impl FromStr for ListenAt {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let syntax = || ListenError::Syntax(text.into());
        match PathOrFd::read(text)? {
            Some(PathOrFd::Path(path)) => Ok(Self::Path(path)),
            Some(PathOrFd::Fd(fd)) => Ok(Self::Descriptor(fd)),
            // A path alone, with whatever is in it.
            None if text.is_empty() => Err(syntax()),
            None => Ok(Self::Path(text.into())),
        }
    }
}

/// A socket that connections come in at. A file that was made for it goes with it.
#[derive(Debug)]
pub struct Listener(Kind);

#[derive(Debug)]
enum Kind {
    Bound(BoundSocket),
    Inherited(UnixListener),
}

impl Listener {
    /// The path at which it was bound.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match &self.0 {
            Kind::Bound(socket) => Some(socket.path()),
            Kind::Inherited(_) => None,
        }
    }

    /// The socket, which does not block.
    pub(super) fn socket(&self) -> &UnixListener {
        match &self.0 {
            Kind::Bound(socket) => socket.listener(),
            Kind::Inherited(socket) => socket,
        }
    }
}

impl ListenError {
    /// Whether the command line is at fault: nobody could listen there.
    #[must_use]
    pub fn is_mistake(&self) -> bool {
        !matches!(self, Self::Socket(error) if !matches!(error, SocketError::TooLong { .. }))
    }
}

impl ListenAt {
    /// Begins to listen. A socket that is made here is for its owner only (mode 0600).
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn open(&self) -> Result<Listener, ListenError> {
        match self {
            Self::Path(path) => {
                let socket = BoundSocket::bind(path)?;
                let failed = |source| SocketError::Bind { path: path.clone(), source };
                socket.listener().set_nonblocking(true).map_err(failed)?;
                Ok(Listener(Kind::Bound(socket)))
            }
            Self::Descriptor(fd) => Ok(Listener(Kind::Inherited(inherit(*fd)?))),
        }
    }
}

fn inherit(fd: RawFd) -> Result<UnixListener, ListenError> {
    let wrong = |what| ListenError::Descriptor { fd, what };
    if fd <= libc::STDERR_FILENO {
        return Err(wrong("is standard input, output or error"));
    }
    let socket = own(fd).ok_or_else(|| wrong("is not open"))?;
    let checked = match (socket_domain(&socket), socket_type(&socket), socket_acceptconn(&socket)) {
        (Ok(AddressFamily::UNIX), Ok(SocketType::STREAM), Ok(true)) => Ok(()),
        (Ok(AddressFamily::UNIX), Ok(SocketType::STREAM), _) => Err("does not listen"),
        (Ok(_), ..) => Err("is another kind of socket"),
        (Err(_), ..) => Err("is no socket"),
    };
    // Between waiting for a connection and taking it, another holder of the socket may be faster.
    let ready = checked.and_then(|()| {
        let cloexec = fcntl_setfd(&socket, FdFlags::CLOEXEC);
        cloexec.and_then(|()| ioctl_fionbio(&socket, true)).map_err(|_| "cannot be made ready")
    });
    match ready {
        Ok(()) => Ok(UnixListener::from(socket)),
        Err(what) => {
            // It is not what was meant, so it may be somebody else's.
            std::mem::forget(socket);
            Err(wrong(what))
        }
    }
}

/// Takes an inherited descriptor; `None` when it is not open. It is closed on exec from then on, and each number can be
/// taken once only.
pub fn own(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: F_GETFD takes no pointer and changes nothing, whatever the number is.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: it is open, and the user has named it as one that this process was started with in order to own it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_command_line_says_where() {
        assert_eq!("/run/a.sock".parse::<ListenAt>().unwrap(), ListenAt::Path("/run/a.sock".into()));
        assert_eq!("path=a".parse::<ListenAt>().unwrap(), ListenAt::Path("a".into()));
        assert_eq!("fd=7".parse::<ListenAt>().unwrap(), ListenAt::Descriptor(7));
        assert_eq!("/run/a,b=c".parse::<ListenAt>().unwrap(), ListenAt::Path("/run/a,b=c".into()));
        assert_eq!("path=\"a,b\"".parse::<ListenAt>().unwrap(), ListenAt::Path("a,b".into()));
        for text in ["", "path=", "fd=", "fd=-1", "fd=x", "path=a,foo=1", "fd=3,path=a", "path=a,path=b"] {
            assert!(text.parse::<ListenAt>().is_err(), "{text}");
        }
        assert!("path=a,foo=1".parse::<ListenAt>().unwrap_err().to_string().contains("no key 'foo'"));
    }

    #[test]
    fn an_inherited_descriptor_must_listen() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let opened = ListenAt::Descriptor(listener.into_raw_fd()).open().unwrap();
        assert!(opened.path().is_none());
        let stream = UnixStream::pair().unwrap().0;
        let file = File::open("/dev/null").unwrap();
        for fd in [0, 1_000_000, file.as_raw_fd(), stream.as_raw_fd()] {
            assert!(matches!(ListenAt::Descriptor(fd).open(), Err(ListenError::Descriptor { .. })), "{fd}");
        }
        file.metadata().unwrap();
    }
}
