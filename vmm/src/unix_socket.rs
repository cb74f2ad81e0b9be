//! UNIX sockets at paths that people choose: bound with errors that say what to do, taken away at the end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, fchmod, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use thiserror::Error;

/// Most bytes of a socket's path (unix(7): 108 with the final zero).
pub const PATH_BYTES_MAX: usize = 107;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// How long another process may hold the folder's lock, which it needs for a few system calls.
const FOLDER_PATIENCE: Duration = Duration::from_secs(2);

/// Why there is no socket at a path.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Longer than the kernel's address.
    #[error(
        "the socket path {} has {bytes} bytes and a UNIX socket holds {PATH_BYTES_MAX}; choose a shorter one",
        .path.display()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// Somebody listens there.
    #[error("the socket {} is taken: another process listens on it; choose another path or end that process", .path.display())]
    Taken {
        /// The path.
        path: PathBuf,
    },
    /// A file that is no socket.
    #[error("{} is there and is no socket; choose another path", .path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The kernel refuses.
    #[error("cannot listen on {}: {source}; choose a path in a folder that can be written", .path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// Its reason.
        #[source]
        source: io::Error,
    },
}

/// A listening socket whose file goes when it does.
#[derive(Debug)]
pub struct BoundSocket {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
}

impl BoundSocket {
    /// Listens at `path`, for its owner only (mode 0600). A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// All of [`SocketError`]; what was at the path is untouched then.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let bytes = path.as_os_str().len();
        let too_long = || SocketError::TooLong { path: path.into(), bytes };
        if bytes > PATH_BYTES_MAX {
            return Err(too_long());
        }
        let address = SocketAddrUnix::new(path).map_err(|_| too_long())?;
        let refused = |source: io::Error| SocketError::Bind { path: path.into(), source };
        // Looking whether somebody listens and taking the path are two steps; whoever holds this lock does both.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let _lock = lock_folder(folder).map_err(|errno| refused(errno.into()))?;
        make_way(path, &address)?;
        let listener = listen_at(&address).map_err(|errno| refused(errno.into()))?;
        let inode = inode(path).map_err(refused)?;
        Ok(Self { listener, path: path.into(), inode })
    }

    /// The listener.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for BoundSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for BoundSocket {
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

fn lock_folder(folder: &Path) -> Result<OwnedFd, Errno> {
    let lock = rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let deadline = Instant::now() + FOLDER_PATIENCE;
    loop {
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            // Where there are no locks, two that start at the same moment may take each other's path.
            Ok(()) | Err(Errno::NOTSUP | Errno::NOLCK) => return Ok(lock),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(errno) => return Err(errno),
        }
    }
}

/// Removes a socket that nobody listens on.
fn make_way(path: &Path, address: &SocketAddrUnix) -> Result<(), SocketError> {
    let refused = |source: io::Error| SocketError::Bind { path: path.into(), source };
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refused(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotASocket { path: path.into() }),
        Ok(_) => {}
    }
    let probe = stream_socket(SocketFlags::NONBLOCK).map_err(|errno| refused(errno.into()))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(refused),
        Err(Errno::NOENT) => Ok(()),
        // A full backlog, a socket of another type or one that we may not open is alive.
        _ => Err(SocketError::Taken { path: path.into() }),
    }
}

fn stream_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags | SocketFlags::CLOEXEC, None)
}

fn listen_at(address: &SocketAddrUnix) -> Result<UnixListener, Errno> {
    let socket = stream_socket(SocketFlags::empty())?;
    // The file gets the mode of the socket that is bound, so there is no moment in which others can connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, address)?;
    listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// What a crashed process has left is replaced; what a living one listens on, and what is no socket, is not touched.
    #[test]
    fn a_path_is_taken_only_where_nobody_needs_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the file, as a crash does");
        let bound = BoundSocket::bind(&path).unwrap();
        assert_eq!(mode(&path), 0o600, "for its owner only");
        let taken = BoundSocket::bind(&path).unwrap_err();
        assert!(matches!(taken, SocketError::Taken { .. }), "{taken}");
        drop(bound);
        assert!(!path.exists());
        let nowhere = BoundSocket::bind(&folder.path().join("no/api.sock")).unwrap_err();
        assert!(matches!(nowhere, SocketError::Bind { .. }), "{nowhere}");
        let replaced = BoundSocket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let successor = UnixListener::bind(&path).unwrap();
        drop(replaced);
        assert!(path.exists(), "a file is taken away by whoever made it");
        drop(successor);
        let plain = folder.path().join("plain");
        std::fs::write(&plain, "precious").unwrap();
        assert!(matches!(BoundSocket::bind(&plain).unwrap_err(), SocketError::NotASocket { .. }));
        assert_eq!(std::fs::read_to_string(plain).unwrap(), "precious");
        let long = folder.path().join("x".repeat(120));
        let error = BoundSocket::bind(&long).unwrap_err().to_string();
        assert!(error.contains("107") && error.contains("shorter"), "{error}");
    }
}
