//! What a device is at, for who asks.

use std::path::PathBuf;
use std::time::Duration;

use atoll_protocol::jail::JailedLayer;

use crate::machine::LinkState;

/// How completely the device survives its backend's death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Every request completes exactly once.
    Full,
    /// Only when nothing was in flight: the backend keeps no record.
    IdleOnly,
}

/// What the device is at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// A backend is there; the driver has not started the device.
    Idle,
    /// The backend serves the driver.
    Running,
    /// The backend is gone; another one is on its way.
    Recovering {
        /// What became of it.
        why: String,
    },
    /// The backend is gone, and none is to be had; it is waited for without limit.
    Waiting {
        /// Why there is none.
        why: String,
    },
    /// No backend serves the driver until it resets the device.
    Quarantined {
        /// Why.
        why: String,
    },
    /// The machine has stopped it.
    Stopped,
}

impl DeviceState {
    /// In one word.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Running => "running",
            Self::Recovering { .. } => "recovering",
            Self::Waiting { .. } => "waiting",
            Self::Quarantined { .. } => "quarantined",
            Self::Stopped => "stopped",
        }
    }
}

/// A process that waits for the death of the one that serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spare {
    /// None is wanted.
    Off,
    /// It is being made.
    Coming,
    /// It waits.
    Ready {
        /// Which incarnation it is.
        generation: u64,
    },
}

/// The device's state for an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// What it is at.
    pub state: DeviceState,
    /// Which incarnation of the backend serves it, from 1.
    pub generation: u64,
    /// Backends that it has lost.
    pub lost: u64,
    /// Successors that could not be started or greeted.
    pub failed_starts: u64,
    /// The spare that waits beside it.
    pub spare: Spare,
    /// The program that it is served by, where that is ours.
    pub exe: Option<PathBuf>,
    /// What became of the last upgrade, while that is news: on probation, or rolled back and why.
    pub upgrade: Option<String>,
    /// Whether its cable is plugged in, where it is a network card.
    pub link: Option<LinkState>,
    /// What happens when it loses this one.
    pub recovery: Recovery,
    /// Process id of the backend, where it is ours and there is one.
    pub pid: Option<u32>,
    /// How the backend's jail came out; empty where nobody knows.
    pub jail: Vec<JailedLayer>,
    /// How long after the end of the last one that had the rings something of it was seen to be under way.
    pub fence_wait: Duration,
    /// How the last one ended.
    pub last_exit: Option<String>,
    /// What it wrote last, the newest line last.
    pub last_lines: Vec<String>,
}
