//! Where the operator's socket comes from: a path that is bound here, or a listening socket that was inherited.
#![allow(unsafe_code, reason = "a descriptor that is named by its number on the command line becomes ours")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, fchmod, flock};
use rustix::io::{Errno, FdFlags, fcntl_setfd, ioctl_fionbio};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use thiserror::Error;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// How long another process may hold the folder's lock, which it needs for a few system calls.
const FOLDER_PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of a socket's path at most (`sockaddr_un`, with the zero behind them).
const PATH_MAX: usize = 107;

/// Why nobody can be listened to.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Longer than the kernel takes.
    #[error("the socket path {0} is too long: it may have {PATH_MAX} bytes; choose a shorter folder")]
    PathTooLong(PathBuf),
    /// Somebody listens there.
    #[error("{0} is taken: another process listens there; choose another path or end that process")]
    Taken(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is no socket: choose another path")]
    NotASocket(PathBuf),
    /// The folder cannot be used.
    #[error("a socket cannot be made in {folder}: {source}; choose a folder that exists and is writable")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The descriptor is not what it should be.
    #[error("descriptor {fd} {what}: give fd=N of a UNIX stream socket that listens")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What is the matter with it.
        what: &'static str,
    },
    /// Neither path nor descriptor.
    #[error("'{0}' is neither PATH, path=PATH nor fd=N")]
    Syntax(String),
    /// The kernel's error.
    #[error("{path} cannot be listened at: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What it says.
        source: io::Error,
    },
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
        if let Some(fd) = text.strip_prefix("fd=") {
            return fd.parse().ok().filter(|fd| *fd >= 0).map(Self::Descriptor).ok_or_else(syntax);
        }
        let path = text.strip_prefix("path=").unwrap_or(text);
        if path.is_empty() { Err(syntax()) } else { Ok(Self::Path(path.into())) }
    }
}

/// A socket that connections come in at. Its file goes with it.
#[derive(Debug)]
pub struct Listener {
    pub(super) socket: UnixListener,
    bound: Option<Bound>,
}

impl Listener {
    /// The path at which it was bound.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.bound.as_ref().map(|bound| bound.path.as_path())
    }
}

#[derive(Debug)]
struct Bound {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Another process may have put its own there since.
        if inode(&self.path).is_ok_and(|inode| inode == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    path.symlink_metadata().map(|found| (found.dev(), found.ino()))
}

impl ListenAt {
    /// Begins to listen. A socket that is made here is for its owner only (mode 0600).
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn open(&self) -> Result<Listener, ListenError> {
        let listener = match self {
            Self::Path(path) => bind_path(path)?,
            Self::Descriptor(fd) => Listener { socket: inherit(*fd)?, bound: None },
        };
        Ok(listener)
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

fn bind_path(path: &Path) -> Result<Listener, ListenError> {
    if path.as_os_str().len() > PATH_MAX {
        return Err(ListenError::PathTooLong(path.into()));
    }
    let address = SocketAddrUnix::new(path).map_err(|_| ListenError::PathTooLong(path.into()))?;
    let io = |errno: Errno| ListenError::Io { path: path.into(), source: errno.into() };
    // Looking whether somebody listens and taking the path are two steps; whoever holds this lock does both.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let _lock = lock_folder(folder)?;
    make_way(path, &address)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(io)?;
    // The file gets the mode of the socket that is bound, so there is no moment in which others can connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(io)?;
    bind(&socket, &address).map_err(|errno| match errno {
        Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::NOENT | Errno::NOSPC => {
            ListenError::Folder { folder: folder.into(), source: errno.into() }
        }
        errno => io(errno),
    })?;
    let inode = inode(path).map_err(|source| ListenError::Io { path: path.into(), source })?;
    let bound = Bound { path: path.into(), inode };
    listen(&socket, BACKLOG).map_err(io)?;
    Ok(Listener { socket: UnixListener::from(socket), bound: Some(bound) })
}

fn lock_folder(folder: &Path) -> Result<File, ListenError> {
    let failed = |errno: Errno| ListenError::Folder { folder: folder.into(), source: errno.into() };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let lock = rustix::fs::open(folder, flags, Mode::empty()).map_err(failed)?;
    let deadline = Instant::now() + FOLDER_PATIENCE;
    loop {
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(File::from(lock)),
            // A file system without locks has no two starters either, as far as can be told.
            Err(Errno::NOTSUP | Errno::NOLCK) => return Ok(File::from(lock)),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(errno) => return Err(failed(errno)),
        }
    }
}

/// Removes a socket that nobody listens at.
fn make_way(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let io = |source: io::Error| ListenError::Io { path: path.into(), source };
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NotASocket(path.into())),
        Ok(_) => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(|errno| io(errno.into()))?;
    match connect(probe.as_fd(), address) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(io),
        Err(Errno::NOENT) => Ok(()),
        // A full backlog, a socket of another type or one that we may not open is alive.
        _ => Err(ListenError::Taken(path.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_command_line_says_where() {
        assert_eq!("/run/a.sock".parse::<ListenAt>().unwrap(), ListenAt::Path("/run/a.sock".into()));
        assert_eq!("path=a".parse::<ListenAt>().unwrap(), ListenAt::Path("a".into()));
        assert_eq!("fd=7".parse::<ListenAt>().unwrap(), ListenAt::Descriptor(7));
        for text in ["", "path=", "fd=", "fd=-1", "fd=x"] {
            assert!(matches!(text.parse::<ListenAt>(), Err(ListenError::Syntax(_))), "{text}");
        }
    }

    /// A socket whose process is gone is replaced, one whose process lives is not, and the file goes with its listener.
    #[test]
    fn a_path_belongs_to_who_listens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let at = ListenAt::Path(path.clone());
        let first = at.open().unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(at.open(), Err(ListenError::Taken(_))));
        UnixStream::connect(&path).unwrap();
        drop(first);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a dead socket stays behind");
        drop(at.open().unwrap());
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(at.open(), Err(ListenError::NotASocket(_))));
        let nowhere = ListenAt::Path(folder.path().join("no/api.sock"));
        assert!(matches!(nowhere.open(), Err(ListenError::Folder { .. })));
        let long = ListenAt::Path(folder.path().join("x".repeat(100)));
        assert!(matches!(long.open(), Err(ListenError::PathTooLong(_))));
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
