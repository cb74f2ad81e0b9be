//! Rings that the VMM drives: available and used rings in a memory of their own, beside the guest's in the backend's table.
//!
//! Where only rings are shadowed, descriptors and buffers stay in the guest's RAM, so a head means the same on both sides.
//! Where requests are copied, descriptor tables and the room for copies are here too, and there is nothing beside it.
//! Each incarnation of a backend gets a fresh memory: what a dead one still writes goes nowhere.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use atoll_devices::virtio::notification::{self, Wish, Words};
use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::copies::DESCRIPTOR;
use super::pool;
use crate::memory::{RamRange, backend_address};

/// Where it lies for the backend: far above any RAM of a guest, which ends below 2^40.
const PLACE: u64 = 1 << 45;
/// What both rings begin with: flags and index.
const HEADER: u64 = 4;
const INDEX: u64 = 2;
/// So that no two rings share a line of the cache.
const ALIGN: u64 = 64;
const PAGE: u64 = pool::PAGE;
const NO_NOTIFY: u16 = virtio_bindings::virtio_ring::VRING_USED_F_NO_NOTIFY as u16;

/// What a backend has done to a ring.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum BackendFault {
    /// More completions than there are requests.
    #[error("queue {queue}: the backend says that it has completed {completed} requests, and has {taken}")]
    Used {
        /// The queue.
        queue: u16,
        /// How many it says.
        completed: u16,
        /// How many it has.
        taken: u16,
    },
    /// A request that it does not have.
    #[error("queue {queue}: the backend completes request {head}, which it does not have")]
    Head {
        /// The queue.
        queue: u16,
        /// What it says.
        head: u32,
    },
}

/// Where the rings of one queue are.
#[derive(Clone, Copy, Debug)]
pub(in crate::vhost) struct Place {
    /// Address of the available ring, as the backend's memory table has it.
    pub(in crate::vhost) available_ring: u64,
    /// That of the used ring.
    pub(in crate::vhost) used_ring: u64,
    /// Where the queue's requests are copied to.
    pub(in crate::vhost) copies: Option<CopyPlace>,
}

/// Where the requests of one queue are copied to.
#[derive(Clone, Copy, Debug)]
pub(in crate::vhost) struct CopyPlace {
    /// Address of the descriptor table.
    pub(in crate::vhost) table: u64,
    /// Address of the room for requests, a page's.
    pub(in crate::vhost) pool: u64,
    /// How long that is: whole pages.
    pub(in crate::vhost) pool_bytes: u64,
}

/// The memory of all rings of a device.
#[derive(Debug)]
pub(in crate::vhost) struct RingMemory {
    file: Arc<File>,
    len: u64,
    mapped: GuestMemoryMmap,
}

impl RingMemory {
    /// Makes empty rings of these sizes beside RAM at `ram`, each with so many bytes for copies of requests, if any.
    pub(super) fn new(sizes: &[u16], ram: &[RamRange], room: Option<u64>) -> io::Result<(Arc<Self>, Vec<Place>)> {
        let mut end = PLACE;
        let mut take = |bytes: u64, align: u64| {
            let start = end.next_multiple_of(align);
            end = start + bytes;
            start
        };
        let places = sizes.iter().map(|size| {
            let size = u64::from(*size);
            let (available_ring, used_ring) = (take(HEADER + 2 * size + 2, ALIGN), take(HEADER + 8 * size + 2, ALIGN));
            let table = room.map(|_| take(DESCRIPTOR * size, ALIGN));
            Place { available_ring, used_ring, copies: table.map(|table| CopyPlace { table, pool: 0, pool_bytes: 0 }) }
        });
        let mut places: Vec<Place> = places.collect();
        for (copies, bytes) in places.iter_mut().filter_map(|place| place.copies.as_mut()).zip(room.into_iter().cycle())
        {
            (copies.pool, copies.pool_bytes) = (take(bytes, PAGE), bytes);
        }
        let len = (end - PLACE).next_multiple_of(PAGE);
        if ram.iter().any(|range| range.gpa.saturating_add(range.len) > PLACE) {
            return Err(io::Error::other("the guest's RAM lies where its shadow rings go"));
        }
        let memfd = rustix::fs::memfd_create("atoll-shadow", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memfd, len)?;
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let file = Arc::new(File::from(memfd));
        let backing = FileOffset::from_arc(Arc::clone(&file), 0);
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        let region = GuestRegionMmap::from_range(GuestAddress(PLACE), bytes, Some(backing));
        let mapped = GuestMemoryMmap::from_regions(vec![region.map_err(io::Error::other)?]);
        let mapped = mapped.map_err(io::Error::other)?;
        Ok((Arc::new(Self { file, len, mapped }), places))
    }

    #[cfg(test)]
    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Its row of a backend's memory table. The descriptor in it is borrowed.
    pub(in crate::vhost) fn table_entry(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: PLACE,
            memory_size: self.len,
            userspace_addr: backend_address(PLACE),
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// It, at the addresses of [`Place`].
    pub(super) fn mapped(&self) -> &GuestMemoryMmap {
        &self.mapped
    }

    fn load(&self, address: u64, order: Ordering) -> u16 {
        // All addresses are of rings that were laid out inside the mapping.
        self.mapped.load::<u16>(GuestAddress(address), order).map_or(0, u16::from_le)
    }
    fn store(&self, address: u64, value: u16, order: Ordering) {
        // As above.
        let _ = self.mapped.store(value.to_le(), GuestAddress(address), order);
    }
}

/// The driver's side of a queue's rings.
pub(super) struct DriverRing {
    memory: Arc<RingMemory>,
    place: Place,
    queue: u16,
    size: u16,
    event_idx: bool,
    /// Entries that were made available, those of them that the backend was told of, and those that came back.
    pushed: u16,
    published: u16,
    popped: u16,
}

impl DriverRing {
    pub(super) fn new(memory: &Arc<RingMemory>, place: Place, queue: u16, size: u16, event_idx: bool) -> Self {
        let memory = Arc::clone(memory);
        Self { memory, place, queue, size, event_idx, pushed: 0, published: 0, popped: 0 }
    }

    /// Makes a request available; the backend sees it after [`Self::publish`]. At most as many as the ring is long may be
    /// out.
    pub(super) fn push(&mut self, head: u16) {
        let slot = u64::from(self.pushed % self.size);
        self.memory.store(self.place.available_ring + HEADER + 2 * slot, head, Ordering::Relaxed);
        self.pushed = self.pushed.wrapping_add(1);
    }

    /// Shows the backend what was pushed; whether it wants to be kicked for it.
    pub(super) fn publish(&mut self) -> bool {
        let before = std::mem::replace(&mut self.published, self.pushed);
        if before == self.pushed {
            return false;
        }
        self.memory.store(self.place.available_ring + INDEX, self.pushed, Ordering::Release);
        let Ok(wanted) = notification::is_to_be_woken(self, before, self.pushed);
        wanted
    }

    /// The next completion: what the backend calls its head, and the bytes written.
    pub(super) fn pop(&mut self) -> Result<Option<(u32, u32)>, BackendFault> {
        let completed = self.memory.load(self.place.used_ring + INDEX, Ordering::Acquire).wrapping_sub(self.popped);
        let taken = self.published.wrapping_sub(self.popped);
        if completed == 0 {
            return Ok(None);
        }
        if completed > taken {
            return Err(BackendFault::Used { queue: self.queue, completed, taken });
        }
        let slot = u64::from(self.popped % self.size);
        let at = self.place.used_ring + HEADER + 8 * slot;
        self.popped = self.popped.wrapping_add(1);
        Ok(Some((self.load_u32(at), self.load_u32(at + 4))))
    }

    /// Reads what the backend wrote, once. An element is aligned to four bytes and not to eight.
    fn load_u32(&self, address: u64) -> u32 {
        // Inside the mapping, as all rings are.
        self.memory.mapped.load::<u32>(GuestAddress(address), Ordering::Relaxed).map_or(u32::MAX, u32::from_le)
    }

    /// Asks to be called for the next completion; whether there is one already.
    pub(super) fn listen(&mut self) -> bool {
        let popped = self.popped;
        let Ok(already) = notification::ask_to_be_woken(self, popped);
        already
    }
}

impl Words for DriverRing {
    type Error = Infallible;
    fn ask(&mut self, next: u16) -> Result<(), Infallible> {
        if self.event_idx {
            let at = self.place.available_ring + HEADER + 2 * u64::from(self.size);
            self.memory.store(at, next, Ordering::Relaxed);
        }
        Ok(())
    }
    fn wish(&self) -> Result<Wish, Infallible> {
        Ok(if self.event_idx {
            let at = self.place.used_ring + HEADER + 8 * u64::from(self.size);
            Wish::Past(self.memory.load(at, Ordering::Relaxed))
        } else {
            Wish::Always(self.memory.load(self.place.used_ring, Ordering::Relaxed) & NO_NOTIFY == 0)
        })
    }
    fn shown(&self) -> Result<u16, Infallible> {
        Ok(self.memory.load(self.place.used_ring + INDEX, Ordering::Acquire))
    }
}
