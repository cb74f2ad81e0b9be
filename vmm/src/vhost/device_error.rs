//! Why a device could not be made, paused or switched.

use std::io;
use std::time::Duration;

use thiserror::Error;

use super::error::ConversationError;
use super::source::SourceError;
use crate::backend::BackendExit;
use crate::doorbell::DoorbellError;
use crate::lasted::Lasted;

/// The device could not be made.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// No backend.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A backend that will not do.
    #[error("{backend}: {source}")]
    Conversation {
        /// Which.
        backend: String,
        /// Why not.
        #[source]
        source: ConversationError,
        /// What its process wrote last, where it is ours.
        last_lines: Vec<String>,
    },
    /// No doorbell.
    #[error(transparent)]
    Doorbell(#[from] DoorbellError),
    /// No thread or descriptor.
    #[error("no thread or descriptor for the device ({0}); raise the limits (ulimit -u, -n)")]
    Resource(#[from] io::Error),
}

impl ConnectError {
    /// Whether trying again would end the same way.
    pub(super) fn is_hopeless(&self) -> bool {
        match self {
            Self::Source(SourceError::Start { hopeless, .. }) => *hopeless,
            Self::Conversation { source, .. } => !source.is_gone(),
            Self::Source(_) | Self::Doorbell(_) | Self::Resource(_) => false,
        }
    }
    /// How the process ended, where one of ours was tried.
    pub(super) fn ended(&self) -> Option<String> {
        match self {
            Self::Source(SourceError::Start { .. }) | Self::Conversation { .. } => Some(self.to_string()),
            Self::Source(_) | Self::Doorbell(_) | Self::Resource(_) => None,
        }
    }
    /// What it wrote last.
    pub(super) fn last_lines(&self) -> &[String] {
        match self {
            Self::Source(SourceError::Start { source, .. }) => {
                source.downcast_ref().map_or(&[], |exit: &BackendExit| &exit.last_stderr)
            }
            Self::Conversation { last_lines, .. } => last_lines,
            Self::Source(_) | Self::Doorbell(_) | Self::Resource(_) => &[],
        }
    }
}

/// A device did not pause or go on.
#[derive(Debug, Error)]
pub enum PauseError {
    /// The backend keeps the rings. The device goes on as if it had not been asked.
    #[error(
        "the backend did not give the rings back within {}: {in_flight} requests are in flight; try again when it is less busy",
        Lasted(*.waited)
    )]
    Late {
        /// How long it had.
        waited: Duration,
        /// Requests that it has not completed.
        in_flight: u32,
    },
    /// A vfio-user server does not say that it has let go of guest memory. The device goes on as if it had not been asked.
    #[error(
        "its server has not answered within {} that it lets go of guest memory; {in_flight}: if its process is stopped (SIGSTOP, a \
         debugger) or stuck, let it go on or end it, else try again when it is less busy",
        Lasted(*.waited)
    )]
    Silent {
        /// How long it had.
        waited: Duration,
        /// What it had not completed.
        in_flight: InFlight,
    },
    /// The device's thread has ended.
    #[error("the device has been stopped")]
    Stopped,
}

/// Requests that a server has not completed, where anybody but the server knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight(pub Option<u32>);

impl std::fmt::Display for InFlight {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(1) => formatter.write_str("1 request is in flight, as its record says"),
            Some(count) => write!(formatter, "{count} requests are in flight, as its record says"),
            None => formatter.write_str("how many requests are in flight is not known"),
        }
    }
}

/// A call's way could not be switched.
#[derive(Debug, Error)]
pub enum SwitchError {
    /// The device is not running, or has no such queue with a vector.
    #[error("queue {0} has no interrupt vector in use; start its driver first")]
    NotRunning(u16),
    /// The backend did not take it; the device recovers.
    #[error(transparent)]
    Conversation(#[from] ConversationError),
    /// No descriptor.
    #[error("no eventfd ({0}); raise the limit on open files (ulimit -n)")]
    Resource(#[from] io::Error),
    /// The device's thread is busy with something that takes longer than anything of its own may.
    #[error("no answer within {} s; try again when the device has recovered (`atoll info`)", .0.as_secs())]
    Late(Duration),
    /// The device's thread has ended.
    #[error("the device has been stopped")]
    Stopped,
}
