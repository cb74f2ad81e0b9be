//! Why a display is not to be had, or does not do as it is asked.

use std::path::PathBuf;

use atoll_protocol::socket::SocketError;
use thiserror::Error;

use crate::unix_socket::SocketError as BindError;

/// Why there is no line for a display, or why it does not do as it is asked.
#[derive(Debug, Error)]
pub enum DisplayError {
    /// A UNIX socket.
    #[error("display: {0}")]
    Socket(#[from] BindError),
    /// A TCP port.
    #[error("display: cannot listen at {place}: {source}; choose another port, or 0 for any")]
    Port {
        /// Where.
        place: String,
        /// The kernel's reason.
        #[source]
        source: std::io::Error,
    },
    /// The password.
    #[error("display: the password in {}: {what}", .path.display())]
    Secret {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The folder of noVNC.
    #[error(
        "display: novnc={} has no core/rfb.js: name noVNC's folder, as /usr/share/novnc of the package novnc, or leave novnc out",
        .0.display()
    )]
    Novnc(PathBuf),
    /// No descriptors left.
    #[error("display: {0}")]
    Host(#[from] std::io::Error),
    /// There is no process at the moment.
    #[error("the display's process has died, and its successor is not there yet: ask again")]
    Nobody,
    /// There will be none.
    #[error("the display has no process any more: 'info' says why, and 'revive' of _display starts another")]
    GivenUp,
    /// It does not answer.
    #[error("the display's process does not answer ({0}) and is replaced: ask again")]
    Silent(#[from] SocketError),
    /// Who recorded is gone.
    #[error(
        "the display's process has ended, and the recording of head {0} with it: the file is whole and has what was seen until a \
         few seconds before; begin another, to another file"
    )]
    Cut(u32),
    /// It says no.
    #[error("{0}")]
    Refused(String),
    /// What it says cannot be right.
    #[error("the display's process answers something else: {0}")]
    Absurd(&'static str),
}
