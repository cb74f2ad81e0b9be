//! What can be asked of a virtual machine.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::{ErrorKind, VmError};
use super::report::{DeviceReport, VmInfo};
use crate::config::{DeviceConfig, VmConfig};
use crate::machine::{LinkState, NewSize};
use crate::screen::WhereToLook;
use crate::vhost::{Fault, UpgradeOrder};

/// Name of a device: the user's, or one that Atoll made up.
pub type DeviceId = String;

/// Where a device was plugged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Plugged {
    /// Its name.
    pub id: DeviceId,
    /// Its place: `0000:00:05.0`.
    pub bdf: String,
}

/// One virtual machine, or the place for one. Safe to call from many threads: requests are carried out one after the other,
/// and none waits for a device that another has asked for and that takes its time.
pub trait VmControl: Send + Sync {
    /// Keeps a checked configuration. Nothing is opened before [`boot`](Self::boot).
    fn create(&self, config: VmConfig) -> Result<(), VmError>;
    /// Builds the machine, starts its device processes and its vCPUs. When anything fails, nothing of it is left. Meanwhile
    /// others are answered; a shutdown, a delete or the end of the process gives the boot up.
    fn boot(&self) -> Result<(), VmError>;
    /// Stops the vCPUs with no exit half done, drains the devices.
    fn pause(&self) -> Result<(), VmError>;
    /// Lets them run.
    fn resume(&self) -> Result<(), VmError>;
    /// Presses the reset button: the guest starts again, device processes stay. A paused machine runs then.
    fn reset(&self) -> Result<(), VmError>;
    /// Presses the power button; the guest decides.
    fn power_button(&self) -> Result<(), VmError>;
    /// Switches the machine off; the configuration stays.
    fn shutdown(&self) -> Result<(), VmError>;
    /// Forgets the configuration, switching the machine off first if need be.
    fn delete(&self) -> Result<(), VmError>;
    /// Sends a non-maskable interrupt to every vCPU.
    fn nmi(&self) -> Result<(), VmError>;
    /// Plugs a device in. Before boot it is added to the configuration, and there is no place yet.
    fn add_device(&self, device: DeviceConfig) -> Result<Option<Plugged>, VmError>;
    /// Pulls a device out. Returns when the guest has been asked; the device goes when the guest lets it go, or an event
    /// says that it did not within the deadline.
    fn remove_device(&self, id: &str) -> Result<(), VmError>;
    /// Changes the size of a disk; the guest is told.
    fn resize_disk(&self, id: &str, size: NewSize) -> Result<(), VmError>;
    /// Plugs the cable of a network card in or out; the guest is told.
    fn set_link(&self, id: &str, link: LinkState) -> Result<(), VmError>;
    /// Gives a device that was quarantined, or that waits for its backend, another chance at once. Nothing happens to one that
    /// is well.
    fn revive_device(&self, id: &str) -> Result<(), VmError>;
    /// Puts a process of another program in the place of the one that serves a device, without the guest noticing. Returns
    /// when it has served for a while, with its generation; on any failure the old one carries on.
    fn upgrade_device(&self, id: &str, order: UpgradeOrder) -> Result<u64, VmError>;
    /// Does to a device what the world may do; only where the machine was started with leave for it.
    fn fault_device(&self, id: &str, fault: Fault, seed: u64) -> Result<(), VmError>;
    /// Where people look at the machine.
    fn where_to_look(&self) -> Result<WhereToLook, VmError>;
    /// What a head shows, as a PNG.
    fn screenshot(&self, head: u32) -> Result<Vec<u8>, VmError>;
    /// Gives a head another size; the guest is told.
    fn resize_display(&self, head: u32, width: u32, height: u32) -> Result<(), VmError>;
    /// Records what a head shows to a file (animated PNG), until [`stop_record`](Self::stop_record).
    fn record(&self, head: u32, file: OwnedFd) -> Result<(), VmError>;
    /// Ends a recording; how many pictures are in it.
    fn stop_record(&self, head: u32) -> Result<u32, VmError>;
    /// The configuration as it is now, and the state.
    fn info(&self) -> Result<VmInfo, VmError>;
    /// Every device with the state of its process.
    fn devices(&self) -> Result<Vec<DeviceReport>, VmError>;
    /// Counters by device (or vCPU) and name.
    fn counters(&self) -> Result<BTreeMap<String, BTreeMap<String, u64>>, VmError>;
    /// All figures of devices and vCPUs in Prometheus' text format. They are there whatever state the machine is in.
    fn metrics(&self) -> Result<String, VmError> {
        Err(VmError::new(ErrorKind::Unsupported, "this machine has no figures"))
    }
    /// The live tree: actors, devices, queues, vCPUs, as nested JSON objects; `path` chooses a part (`devices/_disk0`).
    fn inspect(&self, path: &str) -> Result<serde_json::Value, VmError>;
    /// Ends the process after the answer was sent.
    fn shutdown_vmm(&self) -> Result<(), VmError>;
}
