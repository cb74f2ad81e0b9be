//! What an operator may ask of a device's programs, and hears.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use thiserror::Error;

/// A new program for a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpgradeOrder {
    /// Where it is.
    pub exe: PathBuf,
    /// How long it may take for each word while the guest waits.
    pub step: Duration,
}

/// Where the outcome of an upgrade comes: the generation that serves, or why the old one does.
pub type UpgradeOutcome = Receiver<Result<u64, UpgradeError>>;

/// How long a new build may take for each word while the guest waits, unless the operator says otherwise.
pub const SWITCH_STEP: Duration = Duration::from_millis(40);

/// The old build carries on.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum UpgradeError {
    /// It is no process of this VMM's, or one that there can be only one of.
    #[error(
        "its backend cannot be replaced from here: it is somebody else's, or cannot be started beside itself; restart it where \
         it runs"
    )]
    NotOurs,
    /// One at a time.
    #[error("it is being upgraded already; wait for that")]
    Busy,
    /// The program is not there.
    #[error("{} cannot be run: {reason}", .exe.display())]
    Program {
        /// Where it should be.
        exe: PathBuf,
        /// What the kernel says.
        reason: String,
    },
    /// It was tried, and will not do.
    #[error("the old build carries on: {0}")]
    Refused(String),
    /// The device's thread has ended.
    #[error("the device has been stopped")]
    Stopped,
}
