//! The device's side of a driver's split ring, for those parts of the front end that serve one themselves (virtio 1.2,
//! 2.7). Everything in it is the guest's: indices are checked where they are read, and what cannot be right is a
//! [`RingFault`], after which the ring is not touched again.
//!
//! Indices, used elements and notifications are `virtio-queue`'s. Chains are read here, because that crate walks only
//! those that it took from the available ring, and what a dead backend has taken is known by its head alone.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use atoll_devices::virtio::QueueConfig;
use thiserror::Error;
use virtio_bindings::virtio_ring as bits;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const EVENT_IDX: u64 = 1 << bits::VIRTIO_RING_F_EVENT_IDX;
const NEXT: u16 = bits::VRING_DESC_F_NEXT as u16;
const WRITE: u16 = bits::VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = bits::VRING_DESC_F_INDIRECT as u16;
const NO_INTERRUPT: u16 = bits::VRING_AVAIL_F_NO_INTERRUPT as u16;
/// Bytes of a descriptor, of the header of either ring, of an entry of the available ring.
const DESCRIPTOR: u64 = 16;
const HEADER: u64 = 4;
const AVAILABLE: u64 = 2;
/// Longest indirect table that is read.
const CHAIN_MAX: u32 = 1024;

/// What a driver has done to its ring.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum RingFault {
    /// Size or place of its parts.
    #[error("queue {0}: its size or its addresses cannot be right")]
    Layout(u16),
    /// The available index is further on than the ring is long.
    #[error("queue {index}: {waiting} entries are available in a ring of {size}")]
    Available {
        /// The queue.
        index: u16,
        /// How far on it is.
        waiting: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A chain begins outside the table.
    #[error("queue {index}: descriptor {head} is outside its table of {size}")]
    Head {
        /// The queue.
        index: u16,
        /// The head.
        head: u16,
        /// Entries of the table.
        size: u16,
    },
    /// A part of the ring is not in RAM any more.
    #[error("queue {0}: it is not in RAM")]
    Memory(u16),
}

/// A driver's ring.
pub(crate) struct GuestRing {
    index: u16,
    size: u16,
    queue: Queue,
    memory: Arc<GuestMemoryMmap>,
}

impl GuestRing {
    /// Takes a ring over where `next_avail` is the next entry to take; the next completion goes to the used index that is
    /// in memory.
    pub(crate) fn new(
        memory: &Arc<GuestMemoryMmap>,
        config: &QueueConfig,
        features: u64,
        next_avail: u16,
    ) -> Result<Self, RingFault> {
        let layout = |_| RingFault::Layout(config.index);
        let mut queue = Queue::new(config.size).map_err(layout)?;
        queue.try_set_desc_table_address(GuestAddress(config.descriptor_table)).map_err(layout)?;
        queue.try_set_avail_ring_address(GuestAddress(config.available_ring)).map_err(layout)?;
        queue.try_set_used_ring_address(GuestAddress(config.used_ring)).map_err(layout)?;
        queue.set_event_idx(features & EVENT_IDX != 0);
        queue.set_ready(true);
        if !queue.is_valid(memory.as_ref()) {
            return Err(RingFault::Layout(config.index));
        }
        let used = queue.used_idx(memory.as_ref(), Ordering::Acquire).map_err(layout)?;
        queue.set_next_used(used.0);
        queue.set_next_avail(next_avail);
        Ok(Self { index: config.index, size: config.size, queue, memory: Arc::clone(memory) })
    }

    pub(crate) fn index(&self) -> u16 {
        self.index
    }
    pub(crate) fn size(&self) -> u16 {
        self.size
    }
    /// The entry that [`Self::take`] gives next.
    pub(crate) fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }
    fn lost(&self) -> RingFault {
        RingFault::Memory(self.index)
    }

    /// The next head that the driver has made available.
    pub(crate) fn take(&mut self) -> Result<Option<u16>, RingFault> {
        let (index, size, next) = (self.index, self.size, self.queue.next_avail());
        let available = self.queue.avail_idx(self.memory.as_ref(), Ordering::Acquire).map_err(|_| self.lost())?.0;
        let waiting = available.wrapping_sub(next);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > size {
            return Err(RingFault::Available { index, waiting, size });
        }
        // Inside the ring, which was checked to lie in RAM: the sum cannot overflow.
        let address = self.queue.avail_ring() + HEADER + AVAILABLE * u64::from(next % size);
        let head: u16 = self.memory.load(GuestAddress(address), Ordering::Relaxed).map_err(|_| self.lost())?;
        let head = u16::from_le(head);
        if head >= size {
            return Err(RingFault::Head { index, head, size });
        }
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(Some(head))
    }

    /// Gives a chain back to the driver, with so many bytes written.
    pub(crate) fn complete(&mut self, head: u16, written: u32) -> Result<(), RingFault> {
        let (index, size) = (self.index, self.size);
        if head >= size {
            return Err(RingFault::Head { index, head, size });
        }
        self.queue.add_used(self.memory.as_ref(), head, written).map_err(|_| self.lost())
    }

    /// Whether the driver wants to be interrupted for what was completed since it was asked last.
    pub(crate) fn wants_call(&mut self) -> Result<bool, RingFault> {
        let wants = self.queue.needs_notification(self.memory.as_ref()).map_err(|_| self.lost())?;
        if self.queue.event_idx_enabled() {
            return Ok(wants);
        }
        let flags: u16 =
            self.memory.load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed).map_err(|_| self.lost())?;
        Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
    }

    /// Asks the driver to kick; whether there is something already.
    pub(crate) fn listen(&mut self) -> Result<bool, RingFault> {
        self.queue.enable_notification(self.memory.as_ref()).map_err(|_| self.lost())
    }

    /// What the chain at `head` consists of.
    pub(crate) fn chain(&self, head: u16) -> Option<Chain> {
        self.chain_by(self.memory.as_ref(), head)
    }
    /// The same where its descriptors hold addresses of another kind.
    pub(crate) fn chain_by(&self, buffers: &impl Reach, head: u16) -> Option<Chain> {
        Chain::read(self.memory.as_ref(), buffers, (self.queue.desc_table(), self.size), head)
    }
}

/// Whoever reaches a driver's buffers at the addresses that its descriptors hold.
pub(crate) trait Reach {
    /// Reads what is at `address`; whether all of it is there.
    fn fetch(&self, address: u64, bytes: &mut [u8]) -> bool;
    /// Writes `bytes` to `address`; whether there is room for all of them.
    fn put(&self, address: u64, bytes: &[u8]) -> bool;
}

/// Descriptors that hold guest-physical addresses.
impl Reach for GuestMemoryMmap {
    fn fetch(&self, address: u64, bytes: &mut [u8]) -> bool {
        self.read_slice(bytes, GuestAddress(address)).is_ok()
    }
    fn put(&self, address: u64, bytes: &[u8]) -> bool {
        self.write_slice(bytes, GuestAddress(address)).is_ok()
    }
}

/// Where the bytes of a request are.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Ranges that the device reads: address and bytes.
    pub(crate) readable: Vec<(u64, u32)>,
    /// Ranges that it writes, behind those.
    pub(crate) writable: Vec<(u64, u32)>,
}

impl Chain {
    /// Reads a chain from a table in `memory` with so many entries; indirect tables are among the `buffers`. `None` for one
    /// that makes no sense: a loop, a table outside RAM, an indirect table where none may be, readable behind writable.
    pub(crate) fn read(
        memory: &GuestMemoryMmap,
        buffers: &impl Reach,
        (table, size): (u64, u16),
        head: u16,
    ) -> Option<Self> {
        let mut chain = Self::default();
        let (mut table, mut entries, mut next) = (table, u32::from(size), u32::from(head));
        let (mut indirect, mut left) = (false, entries);
        loop {
            if next >= entries {
                return None;
            }
            left = left.checked_sub(1)?;
            let address = table.checked_add(DESCRIPTOR * u64::from(next))?;
            let mut bytes = [0; DESCRIPTOR as usize];
            let there = if indirect { buffers.fetch(address, &mut bytes) } else { memory.fetch(address, &mut bytes) };
            if !there {
                return None;
            }
            let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
            let start = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
            let len = u32::from_le_bytes([l0, l1, l2, l3]);
            let flags = u16::from_le_bytes([f0, f1]);
            if flags & INDIRECT != 0 {
                let rows = len / DESCRIPTOR as u32;
                let whole = rows > 0 && len.is_multiple_of(DESCRIPTOR as u32) && rows <= CHAIN_MAX;
                if indirect || !whole || flags & NEXT != 0 {
                    return None;
                }
                (table, entries, next, left, indirect) = (start, rows, 0, rows, true);
                continue;
            }
            match flags & WRITE != 0 {
                true => chain.writable.push((start, len)),
                false if chain.writable.is_empty() => chain.readable.push((start, len)),
                false => return None,
            }
            if flags & NEXT == 0 {
                return Some(chain);
            }
            next = u32::from(u16::from_le_bytes([n0, n1]));
        }
    }

    /// Writes `byte` where the device's last one goes; whether there is such a place.
    pub(crate) fn write_last(&self, memory: &impl Reach, byte: u8) -> bool {
        let last = self.writable.iter().rev().find(|(_, len)| *len > 0);
        let address = last.and_then(|(start, len)| start.checked_add(u64::from(*len) - 1));
        address.is_some_and(|address| memory.put(address, &[byte]))
    }

    /// The first `N` bytes for the device.
    pub(crate) fn first<const N: usize>(&self, memory: &impl Reach) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let mut at = 0;
        for (start, len) in &self.readable {
            let rest = bytes.get_mut(at..)?;
            let here = rest.len().min(usize::try_from(*len).ok()?);
            if !memory.fetch(*start, rest.get_mut(..here)?) {
                return None;
            }
            at += here;
        }
        (at == N).then_some(bytes)
    }

    /// The first bytes for the device: all that there are, up to `most`. Fewer where they are not in RAM.
    pub(crate) fn gather(&self, memory: &impl Reach, most: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (start, len) in &self.readable {
            let here = (most - bytes.len()).min(usize::try_from(*len).unwrap_or(usize::MAX));
            let mut part = vec![0; here];
            if here == 0 || !memory.fetch(*start, &mut part) {
                break;
            }
            bytes.extend(part);
        }
        bytes
    }

    /// How many bytes the device may write, up to `most`.
    pub(crate) fn room(&self, most: usize) -> usize {
        let room: u64 = self.writable.iter().map(|(_, len)| u64::from(*len)).sum();
        usize::try_from(room).unwrap_or(usize::MAX).min(most)
    }

    /// Writes `bytes` where the device's first ones go; whether there is room for all.
    pub(crate) fn write_first(&self, memory: &impl Reach, mut bytes: &[u8]) -> bool {
        for (start, len) in &self.writable {
            let (here, later) = bytes.split_at(bytes.len().min(usize::try_from(*len).unwrap_or(usize::MAX)));
            if !memory.put(*start, here) {
                return false;
            }
            bytes = later;
        }
        bytes.is_empty()
    }
}
