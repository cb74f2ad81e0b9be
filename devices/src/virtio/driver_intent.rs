//! The seam between a virtio transport and whatever stands behind it (the vhost-user front end).
//!
//! The transport decodes and checks everything that the guest's driver writes and turns it into [`Intent`]s. Intents that
//! need another process are answered later: the guest's register write completes when the intent is done.

use super::input_config::Pages;
use crate::access::Answer;

/// What a device offers to the guest; frozen for the life of the VM (a successor process must offer at least this).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOffer {
    /// Virtio device type (virtio 1.2, section 5): 1 net, 2 block, 3 console, 4 entropy, …
    pub device_type: u16,
    /// Feature bits offered to the driver, transport bits (VERSION_1, …) included.
    pub features: u64,
    /// Largest size of each queue; its length is the number of queues. Powers of two up to 32768.
    pub queue_sizes: Vec<u16>,
    /// Device-specific configuration space at power-on. Guest reads are answered from the transport's copy of it.
    pub config: Vec<u8>,
    /// Pages that the driver chooses from (virtio 1.2, 5.8.4); none, where the configuration space is just bytes. The
    /// transport turns them itself.
    pub pages: Pages,
}

/// One queue as the driver set it up, already checked: size a power of two within the offer, addresses aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// Queue number.
    pub index: u16,
    /// Number of descriptors.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest-physical address of the available ring.
    pub available_ring: u64,
    /// Guest-physical address of the used ring.
    pub used_ring: u64,
    /// MSI-X vector of the queue; `None` is VIRTIO_MSI_NO_VECTOR.
    pub vector: Option<u16>,
}

/// What the driver wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Intent {
    /// DRIVER_OK: features are final, these queues are enabled.
    Activate {
        /// Accepted features: a subset of the offer.
        features: u64,
        /// Enabled queues in order of index.
        queues: Vec<QueueConfig>,
        /// Vector of configuration changes.
        config_vector: Option<u16>,
    },
    /// Status was written as zero: stop every queue, forget everything.
    Reset,
    /// Device-specific configuration was written (the transport has updated its copy).
    ConfigWrite {
        /// Offset in the configuration space.
        offset: u32,
        /// Bytes written.
        data: Vec<u8>,
    },
}

/// What stands behind a transport.
pub trait VirtioFrontend: Send {
    /// Carries out an intent; [`Answer::Later`] keeps the guest's register write pending until it is done.
    fn intent(&mut self, intent: Intent) -> Answer;
    /// The guest rang queue `index` by a register write that no eventfd intercepted.
    fn notify(&mut self, index: u16);
}

/// Follows the places at which a driver rings its queues, so that doorbells can listen there.
pub trait NotifyPlacement: Send {
    /// Queue `index` is now rung by a write at guest-physical `address`; `None` while its BAR answers nowhere. Called for
    /// every queue at every change, under the function's lock.
    fn placed(&mut self, index: u16, address: Option<u64>);
}

/// Nothing listens: every ring comes through [`VirtioFrontend::notify`].
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDoorbells;

impl NotifyPlacement for NoDoorbells {
    fn placed(&mut self, _index: u16, _address: Option<u64>) {}
}
