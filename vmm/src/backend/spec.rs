//! What to start.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use atoll_protocol::sidecar::DeviceClass;
use atoll_protocol::{DeviceId, Generation};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A descriptor for the child, and the flag that tells the child its number: `--fd 7`.
#[derive(Debug)]
pub struct PassedFd {
    /// The flag, with its dashes; one with `=` in it stands directly before the number, as in `--events-fd=mouse:`.
    pub flag: String,
    /// The VMM's copy, which is closed as soon as the child has its own.
    pub fd: OwnedFd,
}

/// How a device process is jailed (`--jail`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JailPolicy {
    /// In every layer, or there is no device.
    Strict,
    /// In every layer that this host has; what is missing is told.
    #[default]
    Default,
    /// Not at all, for debuggers and tracers.
    Off,
}

/// How long a child may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchLimits {
    /// From its start to its `Hello` and on to its `Ready`, for each.
    pub ready: Duration,
    /// Interval of its progress reports.
    pub progress: Duration,
    /// With requests in flight and none completed, before a queue counts as stalled; without a word, before the process
    /// is asked for one, and again as long for its answer.
    pub stall: Duration,
}

impl Default for WatchLimits {
    fn default() -> Self {
        Self { ready: Duration::from_secs(10), progress: Duration::from_secs(1), stall: Duration::from_secs(10) }
    }
}

/// One incarnation of a device's process.
///
/// The child gets the arguments, then the flag and number of each passed descriptor, then `--sidecar-fd N`. It has the
/// environment given here and no other, no terminal, its output in the VMM's log, and no descriptor that is not named.
#[derive(Debug)]
pub struct BackendSpec {
    /// Name of the device in its configuration, for errors and logs.
    pub name: String,
    /// The device.
    pub device: DeviceId,
    /// The incarnation.
    pub generation: Generation,
    /// What it must say that it serves.
    pub class: DeviceClass,
    /// The binary.
    pub exe: PathBuf,
    /// Arguments before those of the descriptors.
    pub args: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Descriptors to inherit.
    pub fds: Vec<PassedFd>,
    /// It is started beside one that serves the device: it locks nothing before it is given rings.
    pub beside: bool,
    /// Deadlines.
    pub limits: WatchLimits,
}

/// Where a backend's binary is expected: in the folder of the running one.
///
/// # Errors
/// The kernel does not say which binary is running.
pub fn beside_this_binary(name: &str) -> std::io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(name))
}
