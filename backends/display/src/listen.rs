//! Sockets that somebody else bound, at which viewers arrive. That they were bound elsewhere is why the address survives this
//! process.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketAddrAny, SocketType, getsockname, sockopt};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Why a descriptor is no place to listen at.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Not a listening stream socket.
    #[error("{0} is no listening socket: pass one that is bound and listens")]
    NotListening(&'static str),
    /// Neither UNIX nor IP.
    #[error("{0} is of address family {1:?}; pass a UNIX socket or one of TCP")]
    Family(&'static str, AddressFamily),
    /// The kernel's error.
    #[error("{0} cannot be listened at: {1}")]
    Io(&'static str, #[source] io::Error),
}

/// A place to arrive at.
#[derive(Debug)]
pub enum Place {
    /// Of this host, guarded by who may open its file.
    Unix(UnixListener),
    /// For whoever reaches the address.
    Tcp(TcpListener),
}

/// Who arrived.
#[derive(Debug)]
pub enum Arrival {
    /// At a UNIX socket.
    Unix(UnixStream),
    /// At a port.
    Tcp(TcpStream),
}

impl Place {
    /// What an option named. To be called inside a runtime.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn new(option: &'static str, fd: OwnedFd) -> Result<Self, ListenError> {
        let listens = sockopt::socket_acceptconn(&fd).is_ok_and(|listens| listens)
            && sockopt::socket_type(&fd).is_ok_and(|kind| kind == SocketType::STREAM);
        if !listens {
            return Err(ListenError::NotListening(option));
        }
        let failed = |error| ListenError::Io(option, error);
        let address: SocketAddrAny = getsockname(&fd).map_err(|errno| failed(errno.into()))?;
        rustix::io::ioctl_fionbio(&fd, true).map_err(|errno| failed(errno.into()))?;
        match address.address_family() {
            AddressFamily::UNIX => UnixListener::from_std(fd.into()).map(Self::Unix).map_err(failed),
            AddressFamily::INET | AddressFamily::INET6 => {
                TcpListener::from_std(fd.into()).map(Self::Tcp).map_err(failed)
            }
            other => Err(ListenError::Family(option, other)),
        }
    }

    /// Anybody of this host, or farther away, can reach it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self, Self::Tcp(_))
    }

    /// Waits for the next one.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn accept(&self) -> io::Result<Arrival> {
        match self {
            Self::Unix(listener) => Ok(Arrival::Unix(listener.accept().await?.0)),
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // What is typed is short and should not wait.
                stream.set_nodelay(true)?;
                Ok(Arrival::Tcp(stream))
            }
        }
    }
}
