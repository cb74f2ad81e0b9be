//! What an operator may ask of a device's programs, and hears.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
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

/// A net below the deadlines of each step: two processes that are started (ten seconds each, where they hang), the fence
/// of the old one, the words and the time of probation.
pub(crate) const UPGRADE_MAX: Duration = Duration::from_secs(120);

/// Waits for the outcome.
pub(crate) fn await_outcome(coming: &UpgradeOutcome, limit: Duration) -> Result<u64, UpgradeError> {
    coming.recv_timeout(limit).unwrap_or_else(|error| {
        Err(match error {
            RecvTimeoutError::Timeout => UpgradeError::Late(limit),
            RecvTimeoutError::Disconnected => UpgradeError::Stopped,
        })
    })
}

/// How long a new build is on probation when it serves: its death within that time brings the old one back.
pub const UPGRADE_TRIAL: Duration = Duration::from_secs(10);

/// How long a new build may take for each word while the guest waits, unless the operator says otherwise.
pub const SWITCH_STEP: Duration = Duration::from_millis(25);

/// Why a device has one process at a time, so that none can be made ready beside it, and what to do instead.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Lone {
    /// Somebody else starts it.
    #[error(
        "it is somebody else's process; start the new one where the old one listened, and the device goes on with it"
    )]
    Foreign,
    /// A card's way to the world.
    #[error(
        "the card has a passt of its own, which serves one process at a time; put the new program where the old one lies and \
         kill the process (its successor is of the new one), or unplug the card and plug it in again (atoll remove-device, \
         atoll add-net)"
    )]
    User,
}

/// The old build carries on.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum UpgradeError {
    /// There is one process of it at a time.
    #[error("its backend cannot be replaced while it serves: {0}")]
    Lone(#[from] Lone),
    /// One at a time.
    #[error("it is being upgraded already; wait for that")]
    Busy,
    /// The program is not there.
    #[error("{}: {reason}", .exe.display())]
    Program {
        /// Where it should be.
        exe: PathBuf,
        /// What the kernel says.
        reason: String,
    },
    /// It was tried, and will not do.
    #[error("the old build stays: {0}")]
    Refused(String),
    /// No outcome in time.
    #[error(
        "nothing is known of it after {} s, which is a fault of the device's thread: see what serves with `atoll info`", .0.as_secs()
    )]
    Late(Duration),
    /// The device's thread has ended.
    #[error("the device has been stopped")]
    Stopped,
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    /// An operator who asked for an upgrade waited for ever when nobody answered.
    #[test]
    fn an_outcome_that_does_not_come() {
        let (answer, coming) = sync_channel(1);
        let limit = Duration::from_millis(20);
        assert_eq!(await_outcome(&coming, limit), Err(UpgradeError::Late(limit)));
        answer.send(Ok(7)).unwrap();
        assert_eq!(await_outcome(&coming, limit), Ok(7));
        drop(answer);
        assert_eq!(await_outcome(&coming, limit), Err(UpgradeError::Stopped));
    }
}
