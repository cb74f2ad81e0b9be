//! What an operator is told about a machine and its devices.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{DeviceKind, VmConfig};
use crate::machine::LinkState;
use crate::metrics::CountedBy;

/// State of a machine, in Cloud Hypervisor's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VmState {
    /// There is a configuration and no machine.
    Created,
    /// vCPUs run.
    Running,
    /// The machine was switched off; it can boot again.
    Shutdown,
    /// vCPUs stand.
    Paused,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmInfo {
    /// As the user gave it, with what was plugged since.
    pub config: VmConfig,
    /// Its state.
    pub state: VmState,
    /// RAM in bytes.
    pub memory_actual_size: u64,
}

/// State of a device and its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// A backend is there; no driver has started the device.
    Idle,
    /// The backend serves the driver.
    Running,
    /// The backend is gone; another one is on its way.
    Recovering,
    /// The backend is gone, and none is to be had; it is waited for without limit.
    Waiting,
    /// No backend serves the driver until it resets the device or an operator acts.
    Quarantined,
    /// The guest was asked to let the device go.
    Unplugging,
    /// The machine has stopped it.
    Stopped,
}

/// How completely a device survives its backend's death.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RecoveryClass {
    /// Every request completes exactly once.
    Full,
    /// Every request completes exactly once, but what was made in the process beside them is lost and is made anew: contexts of a GPU
    /// in 3D, connections and recordings of a display.
    ContextLoss,
    /// Only when nothing was in flight.
    IdleOnly,
    /// Not at all.
    None,
}

/// One queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct QueueReport {
    /// Its number.
    pub index: u16,
    /// Descriptors.
    pub size: u16,
    /// Requests made available and not yet used, as the rings in guest memory say.
    pub in_flight: u16,
    /// Kicks that went through the VMM; `None` where they go straight to the backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kicks: Option<u64>,
    /// Calls that went through the VMM; `None` where they go straight to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls: Option<u64>,
}

/// A spare process of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Standby {
    /// It is being started.
    Coming,
    /// It waits.
    Ready,
}

/// What an upgrade has come to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Upgraded {
    /// Which incarnation of the backend serves the device now.
    pub generation: u64,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceReport {
    /// Its name.
    pub id: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Its place, `0000:00:05.0`; none before boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bdf: Option<String>,
    /// What it is at.
    pub state: DeviceState,
    /// Why, where the state has a reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Which incarnation of its backend serves it, from 1.
    pub generation: u64,
    /// Backends that it has lost.
    pub restarts: u64,
    /// Successors that could not be started, or did not get ready.
    #[serde(default)]
    pub failed_starts: u64,
    /// What became of the last upgrade, while that is news: on probation, or rolled back and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<String>,
    /// Whether the cable of a network card is plugged in (`vm.set-link`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkState>,
    /// What happens when it loses this one.
    pub recovery: RecoveryClass,
    /// Who counts what it does: `process` (requests, bytes, errors, latencies) or `rings` (completed requests, and nothing
    /// else); none where nobody does: before boot, or behind registers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counted: Option<CountedBy>,
    /// Process id of the backend, where it is ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The program that serves it, where that is ours; an upgrade changes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exe: Option<String>,
    /// The spare process that waits for the death of the one that serves, where one is wanted (`standby=on`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<Standby>,
    /// What became of each layer of the backend's jail: applied, kernel-lacks-it, not-permitted or off. Left out where
    /// nobody knows: somebody else's program, or none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub jail: BTreeMap<String, String>,
    /// How the last one ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<String>,
    /// What it wrote last, the newest line last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub last_lines: Vec<String>,
    /// Its queues, while a driver runs it.
    pub queues: Vec<QueueReport>,
}
