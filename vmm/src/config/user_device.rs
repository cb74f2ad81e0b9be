//! PCI devices that another process serves over vfio-user: an NVMe disk of ours, and anybody's.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::care::{OnFailure, is_false};
use super::disk::{ImageType, image_type};

/// An NVMe disk: a controller on an image, in a process of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NvmeConfig {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Its image, byte for byte.
    pub path: PathBuf,
    /// `Raw`, said for an image that begins like qcow2 because a guest wrote that.
    #[serde(default, deserialize_with = "image_type", skip_serializing_if = "Option::is_none")]
    pub image_type: Option<ImageType>,
    /// The guest cannot write it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub readonly: bool,
    /// Most I/O queues of each kind; 4 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// What the guest reads as its serial number; its name when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// What becomes of it when its process cannot be had again.
    #[serde(default, skip_serializing_if = "OnFailure::is_default")]
    pub on_failure: OnFailure,
    /// Seconds for which commands may wait and none complete before its process is replaced; 0: for ever. 30 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_timeout: Option<u32>,
    /// Starts in a row that may fail before the device is given up; 0: any number. 20 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_attempts: Option<u32>,
}

impl NvmeConfig {
    /// Most I/O queues of each kind.
    pub fn queues(&self) -> u16 {
        self.num_queues.unwrap_or(NVME_QUEUES)
    }
}

/// I/O queues of an NVMe disk whose user says nothing of them.
const NVME_QUEUES: u16 = 4;

/// A PCI device that somebody else's process serves over vfio-user. Cloud Hypervisor's keys of it are known; those of them
/// that have no meaning here can ask for nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UserDeviceConfig {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Where the server listens.
    pub socket: PathBuf,
    /// The only PCI segment, 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_segment: Option<u16>,
    /// Its slot, which Atoll chooses: nothing can be said here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// It reaches all of guest memory: `false`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// What becomes of it when its server cannot be had again.
    #[serde(default, skip_serializing_if = "OnFailure::is_default")]
    pub on_failure: OnFailure,
}
