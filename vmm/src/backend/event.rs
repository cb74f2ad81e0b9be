//! What happens to children, in words.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use atoll_protocol::jail::JailedLayer;
use atoll_protocol::sidecar::{GoodbyeReason, QueueProgress, SidecarFeatures};
use atoll_protocol::{DeviceId, Generation, QueueIndex};
use thiserror::Error;
use tokio::sync::mpsc;

use crate::lasted::Lasted;

/// Something that the spawner saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendEvent {
    /// Whose process.
    pub device: DeviceId,
    /// Which incarnation.
    pub generation: Generation,
    /// What.
    pub kind: EventKind,
}

/// What the spawner saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The device can be driven.
    Ready {
        /// What its process can do.
        features: SidecarFeatures,
        /// How its jail came out; empty for one that did not say.
        jail: Vec<JailedLayer>,
    },
    /// How far its queues are. A newer report replaces one that nobody has taken yet.
    Progress {
        /// The queues of one report.
        queues: Vec<QueueProgress>,
    },
    /// Nothing was completed by the deadline; once until there is progress again.
    Stalled {
        /// The queue, or none when the process reports nothing at all.
        queue: Option<QueueIndex>,
    },
    /// It has nothing in flight and takes nothing new.
    Quiesced,
    /// It answered a ping.
    Pong {
        /// The ping's.
        nonce: u64,
    },
    /// It looked what size its device has.
    Measured {
        /// Bytes.
        bytes: u64,
    },
    /// It is gone and reaped. Always the last event of an incarnation.
    Exited(BackendExit),
}

/// How a process ended, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// By exit, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            // Seccomp ends a process so.
            Self::Signal(libc::SIGSYS) => write!(f, "signal 31, for a system call that its jail forbids"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Why a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitCause {
    /// Nobody here knows: a crash, or somebody else's signal.
    Unknown,
    /// It said goodbye first.
    Goodbye(GoodbyeReason),
    /// It was told to.
    Asked,
    /// It did not say hello in time, and was killed.
    NeverHello(Duration),
    /// It did not get ready in time, and was killed.
    NeverReady(Duration),
    /// It said something that cannot be right, and was killed.
    Wrong(String),
    /// It closed its sidecar and went on, and was killed.
    HungUp,
    /// Its jail was to be strict and lacks these layers (all of them, if none is named), and it was killed.
    Unjailed(Vec<JailedLayer>),
}

/// The end of an incarnation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendExit {
    /// Name of the device.
    pub name: String,
    /// Why.
    pub cause: ExitCause,
    /// How.
    pub status: ExitStatus,
    /// Whether it had been ready.
    pub was_ready: bool,
    /// The last lines of its output.
    pub last_stderr: Vec<String>,
}

impl fmt::Display for BackendExit {
    /// One line that names the thing and, where there is one, the remedy.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let when = if self.was_ready { "" } else { " before it was ready" };
        write!(f, "the process of {} ", self.name)?;
        match &self.cause {
            ExitCause::Unknown => write!(f, "ended with {}{when}", self.status)?,
            ExitCause::Asked => write!(f, "was told to end ({})", self.status)?,
            ExitCause::Goodbye(GoodbyeReason::Asked) => write!(f, "ended as asked{when}")?,
            ExitCause::Goodbye(
                GoodbyeReason::Config(reason) | GoodbyeReason::Resource(reason) | GoodbyeReason::Peer(reason),
            ) => return write!(f, "ended{when}: {reason}"),
            ExitCause::NeverHello(waited) => {
                write!(
                    f,
                    "said nothing within {} and was killed: is its binary a backend of this release?",
                    Lasted(*waited)
                )?;
            }
            ExitCause::NeverReady(waited) => {
                write!(f, "was not ready within {} and was killed: look at its log", Lasted(*waited))?;
            }
            ExitCause::Wrong(what) => write!(f, "was killed{when} because {what}")?,
            ExitCause::HungUp => write!(f, "closed its sidecar{when} and was killed")?,
            ExitCause::Unjailed(missing) => {
                write!(f, "was refused, because with --jail=strict its jail must be whole and ")?;
                return match missing.as_slice() {
                    [] => write!(f, "it did not say that it has one"),
                    [first, ..] => {
                        let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
                        write!(f, "this host lacks {}: {}; or take --jail=default", names.join(", "), first.remedy())
                    }
                };
            }
        }
        match self.last_stderr.as_slice() {
            [] if self.cause == ExitCause::Unknown && !self.was_ready => {
                write!(f, " and said nothing: is its binary a backend of this release?")
            }
            [] => Ok(()),
            [.., last] => write!(f, "; its last words: {last}"),
        }
    }
}

impl std::error::Error for BackendExit {}

/// Why a process could not even be started.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// No such binary.
    #[error("the backend of {name} is missing: there is no {}; install it beside atoll", .exe.display())]
    Missing {
        /// Name of the device.
        name: String,
        /// Where it should be.
        exe: PathBuf,
    },
    /// The kernel would not execute it.
    #[error("the backend of {name} cannot be started: {}: {source}", .exe.display())]
    Exec {
        /// Name of the device.
        name: String,
        /// What was executed.
        exe: PathBuf,
        /// The kernel's error.
        #[source]
        source: std::io::Error,
    },
    /// No descriptors or memory left for pipes and sockets.
    #[error("no sidecar for the backend of {name}: {source}; raise the limit of open files")]
    Plumbing {
        /// Name of the device.
        name: String,
        /// The kernel's error.
        #[source]
        source: std::io::Error,
    },
    /// The VMM is ending.
    #[error("the backend of {name} is not started, the VMM is ending")]
    Ending {
        /// Name of the device.
        name: String,
    },
}

/// What became of an event that was offered.
#[derive(Debug)]
pub enum Offer {
    /// It was taken.
    Taken,
    /// There is no room now; it is offered again, before any later one.
    Full(BackendEvent),
    /// Nobody listens any more.
    Gone,
}

/// Who takes the events of a child. Called on the spawner's thread, so it must not wait.
pub trait EventSink: Send {
    /// Takes an event if there is room.
    fn offer(&self, event: BackendEvent) -> Offer;
}

impl EventSink for mpsc::Sender<BackendEvent> {
    fn offer(&self, event: BackendEvent) -> Offer {
        match self.try_send(event) {
            Ok(()) => Offer::Taken,
            Err(mpsc::error::TrySendError::Full(event)) => Offer::Full(event),
            Err(mpsc::error::TrySendError::Closed(_)) => Offer::Gone,
        }
    }
}
