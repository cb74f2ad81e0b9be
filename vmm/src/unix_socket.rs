//! UNIX sockets at paths that people choose: bound with errors that say what to do, taken away at the end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Most bytes of a socket's path (unix(7): 108 with the final zero).
pub const PATH_BYTES_MAX: usize = 107;

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
}

impl BoundSocket {
    /// Listens at `path`. A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// All of [`SocketError`]; what was at the path is untouched then.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let bytes = path.as_os_str().len();
        if bytes > PATH_BYTES_MAX {
            return Err(SocketError::TooLong { path: path.into(), bytes });
        }
        let refused = |source| SocketError::Bind { path: path.into(), source };
        match UnixListener::bind(path) {
            Ok(listener) => Ok(Self { listener, path: path.into() }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let there = std::fs::symlink_metadata(path).map_err(refused)?;
                if !there.file_type().is_socket() {
                    return Err(SocketError::NotASocket { path: path.into() });
                }
                match UnixStream::connect(path) {
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                    _ => return Err(SocketError::Taken { path: path.into() }),
                }
                std::fs::remove_file(path).map_err(refused)?;
                let listener = UnixListener::bind(path).map_err(refused)?;
                Ok(Self { listener, path: path.into() })
            }
            Err(source) => Err(refused(source)),
        }
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
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a crashed process has left is replaced; what a living one listens on, and what is no socket, is not touched.
    #[test]
    fn a_path_is_taken_only_where_nobody_needs_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the file, as a crash does");
        let bound = BoundSocket::bind(&path).unwrap();
        let taken = BoundSocket::bind(&path).unwrap_err();
        assert!(matches!(taken, SocketError::Taken { .. }), "{taken}");
        drop(bound);
        assert!(!path.exists());
        let plain = folder.path().join("plain");
        std::fs::write(&plain, "precious").unwrap();
        assert!(matches!(BoundSocket::bind(&plain).unwrap_err(), SocketError::NotASocket { .. }));
        assert_eq!(std::fs::read_to_string(plain).unwrap(), "precious");
        let long = folder.path().join("x".repeat(120));
        let error = BoundSocket::bind(&long).unwrap_err().to_string();
        assert!(error.contains("107") && error.contains("shorter"), "{error}");
    }
}
