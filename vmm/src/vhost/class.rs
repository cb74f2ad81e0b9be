//! What differs between kinds of devices: which configuration space a backend is asked for, what of its answers the guest is
//! offered, and what may change while the guest runs.

use std::ops::Range;

use atoll_devices::virtio::{DeviceOffer, device_class};

use super::error::ConversationError;
use super::session::Capabilities;

/// Feature bit of a GPU in 3D (virtio 1.2, 5.7.3).
const GPU_VIRGL: u64 = 1;

/// The configuration space that a backend is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigWish {
    /// None: the front end makes it up, or the device has none.
    Nothing,
    /// This many bytes; a backend that does not have them cannot serve.
    Needed(u32),
    /// The first of these lengths that the backend has. Nothing, where it has none or no CONFIG.
    AnyOf(&'static [u32]),
    /// All pages of an input device, each selected and read (virtio 1.2, 5.8.4).
    Pages,
}

/// What differs between kinds of devices.
pub trait DeviceClass: Send + Sync {
    /// Virtio device type (virtio 1.2, section 5).
    fn device_type(&self) -> u16;
    /// Which configuration space to read from the backend.
    fn config(&self) -> ConfigWish;
    /// What to offer to the guest on top of such a backend.
    ///
    /// # Errors
    /// If the backend's answers cannot be right, or it lacks something that the user asked for.
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError>;
    /// Queues that are handed to such a backend, counted from the first. The guest may be shown more: nobody serves the
    /// others.
    fn served(&self, _backend: &Capabilities) -> u16 {
        u16::MAX
    }
    /// What to write into the backend's configuration space once it is greeted: an offset and bytes.
    fn imprint(&self, _backend: &Capabilities) -> Option<(u32, Vec<u8>)> {
        None
    }
    /// Every backend of this kind is known to complete requests in their order, and to do one twice does no harm: then a
    /// successor can go on from the used index without a record of what was in flight.
    fn in_order(&self) -> bool {
        false
    }
}

/// Whether a device of this type answers each request of the queue by itself. Other queues hold buffers for what comes from
/// outside, or requests that may rightly wait for somebody: that nothing moves there says nothing.
pub(super) fn answers(device_type: u16, queue: u16) -> bool {
    match device_type {
        device_class::BLOCK | device_class::ENTROPY => true,
        // What the guest sends, and its orders.
        device_class::NET => !queue.is_multiple_of(2),
        _ => false,
    }
}

/// Whether a driver of such a device makes things in its backend that no successor has: contexts of a GPU in 3D (virtio 1.2, 5.7.6).
pub(super) fn forgets(offer: &DeviceOffer) -> bool {
    offer.device_type == device_class::GPU && offer.features & GPU_VIRGL != 0
}

/// Whether a queue of a device of this type holds requests, rather than buffers for what may come from outside.
pub(super) fn holds_requests(device_type: u16, queue: u16) -> bool {
    match device_type {
        device_class::NET | device_class::CONSOLE => !queue.is_multiple_of(2),
        // The others are for what the device has to say.
        device_class::VSOCK | device_class::INPUT => queue == 1,
        _ => true,
    }
}

/// The error for a backend with too few queues.
pub(super) fn too_few_queues(needed: usize, has: u16) -> ConversationError {
    ConversationError::Lacks { what: format!("{needed} queues (it has {has})") }
}

/// Bytes of the configuration space that a device may change while its driver runs (virtio 1.2, section 5; the rest is
/// fixed once the driver has seen it).
pub(super) fn changeable(device_type: u16) -> Range<usize> {
    match device_type {
        // status; max_virtqueue_pairs and mtu behind it stay
        device_class::NET => 6..8,
        // capacity
        device_class::BLOCK => 0..8,
        // cols, rows
        device_class::CONSOLE => 0..4,
        device_class::ENTROPY | device_class::FS | device_class::INPUT => 0..0,
        // guest_cid, after a transport reset
        device_class::VSOCK => 0..8,
        // events_read
        device_class::GPU => 0..4,
        // Whatever the specification says of it is not known here.
        _ => 0..usize::MAX,
    }
}

/// Where a configuration space tells of events, and where a driver says which of them it knows of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EventFields {
    /// A bit for each event that nobody has taken note of.
    pub(super) told: Range<usize>,
    /// The driver writes the bits that it has seen here. They leave the other field, and stay nowhere.
    pub(super) acknowledged: Range<usize>,
}

/// The fields for events of a device type that has such (virtio 1.2, section 5).
pub(super) fn event_fields(device_type: u16) -> Option<EventFields> {
    match device_type {
        // events_read, events_clear
        device_class::GPU => Some(EventFields { told: 0..4, acknowledged: 4..8 }),
        _ => None,
    }
}

/// How long a device type's configuration space is; for types that are not known here, what lengths are worth a try.
pub(super) fn config_lengths(device_type: u16) -> &'static [u32] {
    match device_type {
        // Up to and with mtu; status.
        device_class::NET => &[12, 8],
        // Up to and with write zeroes; wce and num_queues.
        device_class::BLOCK => &[60, 36],
        device_class::CONSOLE => &[12, 8],
        device_class::ENTROPY => &[],
        device_class::GPU => &[16, 12],
        device_class::INPUT => &[136],
        device_class::VSOCK => &[8],
        device_class::IOMMU => &[40],
        device_class::SOUND => &[16, 12],
        device_class::FS => &[44, 40],
        // The protocol carries 256 bytes at most.
        _ => &[256, 128, 64, 56, 48, 40, 36, 32, 24, 16, 12, 8, 4],
    }
}
