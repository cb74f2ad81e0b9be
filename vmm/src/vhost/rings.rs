//! What the front end reads of a driver's rings: the indices, and nothing else.

use std::sync::atomic::Ordering;

use atoll_devices::virtio::QueueConfig;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Offset of `idx` in both the available and the used ring (virtio 1.2, 2.7.6 and 2.7.8).
const INDEX: u64 = 2;

/// How far both sides of a ring are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingPosition {
    /// Where the driver puts its next request.
    pub(super) available: u16,
    /// Where the device puts its next completion.
    pub(super) used: u16,
}

impl RingPosition {
    /// Reads it; `None` when the ring lies outside RAM.
    pub(super) fn read(memory: &GuestMemoryMmap, queue: &QueueConfig) -> Option<Self> {
        let index = |ring: u64| {
            let address = GuestAddress(ring.checked_add(INDEX)?);
            memory.load::<u16>(address, Ordering::Acquire).ok().map(u16::from_le)
        };
        // Used first: what completes between the two reads makes the ring look busier, never idler.
        let used = index(queue.used_ring)?;
        let available = index(queue.available_ring)?;
        Some(Self { available, used })
    }
    /// Whether every request is completed.
    pub(super) fn is_idle(self) -> bool {
        self.available == self.used
    }
}

/// Whether all of a queue lies in RAM, so that a backend can reach it.
pub(super) fn in_ram(memory: &GuestMemoryMmap, queue: &QueueConfig) -> bool {
    use vm_memory::GuestMemoryBackend;
    let size = usize::from(queue.size);
    [(queue.descriptor_table, 16 * size), (queue.available_ring, 6 + 2 * size), (queue.used_ring, 6 + 8 * size)]
        .into_iter()
        .all(|(start, len)| memory.check_range(GuestAddress(start), len))
}
