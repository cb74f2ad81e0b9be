//! The page of figures ([`atoll_protocol::stats`]) as a device process writes it.
//!
//! The supervisor passes a page (`--stats-fd`) that outlives this process; what a predecessor counted stands in it, and
//! counting goes on from there. Without one the same code counts in memory of its own, so that nothing asks whether
//! anybody is interested. Each queue's part has one writer, the thread of that queue: an addition is a load and a store,
//! without a lock on the bus.
//!
//! The page is mapped before the jail closes. It must be sealed against shrinking, so that no access can fault.

#![allow(unsafe_code, reason = "a mapped page is looked at as the structure that it holds")]

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use atoll_protocol::stats::{self, PageHeader, QueueStats};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion};

/// Why a page was refused.
#[derive(Debug, Error)]
pub enum StatsError {
    /// It can be cut while it is mapped, or it is no memfd.
    #[error("the page of figures is not sealed against shrinking: pass a sealed memfd")]
    NotSealed,
    /// Another layout, or room for fewer queues.
    #[error("the page of figures is for {queues} queues in layout {version}, this device has {wanted} in layout {ours}", ours = stats::VERSION)]
    Layout {
        /// Queues that it has room for.
        queues: u64,
        /// Version of its layout.
        version: u64,
        /// Queues of the device.
        wanted: u16,
    },
    /// It cannot be mapped.
    #[error("cannot map the page of figures: {0}")]
    Map(String),
}

/// A mapped page.
#[derive(Debug)]
pub struct StatsPage {
    map: MmapRegion<()>,
    queues: u16,
}

impl StatsPage {
    /// Maps the page that the supervisor made for a device of `queues` queues.
    pub fn adopt(fd: OwnedFd, queues: u16) -> Result<Arc<Self>, StatsError> {
        let failed = |reason: &dyn std::fmt::Display| StatsError::Map(reason.to_string());
        if !fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
            return Err(StatsError::NotSealed);
        }
        let bytes = usize::try_from(fstat(&fd).map_err(|e| failed(&e))?.st_size).unwrap_or(0);
        let need = stats::page_bytes(queues);
        let layout = |queues, version| StatsError::Layout { queues, version, wanted: queues_of(need) };
        if bytes < need {
            return Err(layout(u64::from(queues_of(bytes)), stats::VERSION));
        }
        let map = MmapRegion::from_file(FileOffset::new(fd.into(), 0), need).map_err(|e| failed(&e))?;
        let page = Self { map, queues };
        let header = page.header();
        let of = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        if of(&header.magic) != stats::MAGIC || of(&header.version) != stats::VERSION {
            return Err(layout(of(&header.queues), of(&header.version)));
        }
        if of(&header.queues) < u64::from(queues) {
            return Err(layout(of(&header.queues), stats::VERSION));
        }
        Ok(Arc::new(page))
    }

    /// A page that nobody else sees.
    pub fn private(queues: u16) -> Result<Arc<Self>, StatsError> {
        let map = MmapRegion::new(stats::page_bytes(queues)).map_err(|e| StatsError::Map(e.to_string()))?;
        Ok(Arc::new(Self { map, queues }))
    }

    /// Queues that it has room for.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    fn header(&self) -> &PageHeader {
        // SAFETY: the mapping begins at a page's boundary, is longer than a header, stays as long as `self`, and is sealed
        // or our own; the header is made of atomics only, for which every bit pattern is a value.
        unsafe { &*self.map.as_ptr().cast::<PageHeader>() }
    }

    /// The part of a queue; none beyond the page's end.
    pub fn part(self: &Arc<Self>, index: u16) -> Option<Part> {
        (index < self.queues).then(|| Part { page: Arc::clone(self), index })
    }
}

/// One queue's part of a page. A copy leads to the same figures, and belongs to the same thread.
#[derive(Debug, Clone)]
pub struct Part {
    page: Arc<StatsPage>,
    /// Below the page's number of queues.
    index: u16,
}

impl Deref for Part {
    type Target = QueueStats;

    #[inline]
    fn deref(&self) -> &QueueStats {
        // SAFETY: the offset of a queue below `queues` lies with all its bytes within the mapping (`page_bytes`) and is a
        // multiple of 64; for the rest see `StatsPage::header`.
        unsafe { &*self.page.map.as_ptr().add(stats::queue_at(self.index)).cast::<QueueStats>() }
    }
}

/// How many queues fit into so many bytes.
fn queues_of(bytes: usize) -> u16 {
    u16::try_from(bytes.saturating_sub(stats::HEADER_BYTES) / stats::QUEUE_BYTES).unwrap_or(u16::MAX)
}

/// Adds to a figure that only the calling thread writes.
#[inline]
pub fn add(cell: &AtomicU64, count: u64) {
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}

/// What a device's handler counts of its requests; the kit counts the rest.
#[derive(Debug, Clone, Copy)]
pub struct Figures<'a>(&'a QueueStats);

impl<'a> Figures<'a> {
    /// Counts in `stats`. To be used by the thread of that queue.
    #[inline]
    pub fn new(stats: &'a QueueStats) -> Self {
        Self(stats)
    }

    /// A request has moved `bytes` to the guest.
    #[inline]
    pub fn read(self, bytes: u64) {
        add(&self.0.reads, 1);
        add(&self.0.read_bytes, bytes);
    }

    /// So many requests have moved `bytes` to the guest.
    #[inline]
    pub fn read_several(self, requests: u64, bytes: u64) {
        add(&self.0.reads, requests);
        add(&self.0.read_bytes, bytes);
    }

    /// So many requests have moved `bytes` from the guest.
    #[inline]
    pub fn written_several(self, requests: u64, bytes: u64) {
        add(&self.0.writes, requests);
        add(&self.0.write_bytes, bytes);
    }

    /// A request has moved `bytes` from the guest.
    #[inline]
    pub fn written(self, bytes: u64) {
        add(&self.0.writes, 1);
        add(&self.0.write_bytes, bytes);
    }

    /// A request was completed with an error.
    #[inline]
    pub fn failed(self) {
        add(&self.0.errors, 1);
    }

    /// Counts in the class's counter of this number, see [`stats::class_counters`].
    pub fn class(self, number: usize, count: u64) {
        if let Some(cell) = self.0.class.get(number) {
            add(cell, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    fn memfd(bytes: usize, seals: SealFlags, header: [u64; 3]) -> OwnedFd {
        let fd = memfd_create(c"stats", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, bytes as u64).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        let file = File::from(fd);
        let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all_at(&bytes, 0).unwrap();
        file.into()
    }

    /// A process dies and its successor gets the same page: figures go on where they were.
    #[test]
    fn figures_survive_their_process() {
        let page = memfd(stats::page_bytes(2), SealFlags::SHRINK, [stats::MAGIC, stats::VERSION, 2]);
        for lives in 1..=3 {
            let adopted = StatsPage::adopt(page.try_clone().unwrap(), 2).unwrap();
            let queue = adopted.part(1).unwrap();
            Figures::new(&queue).read(4096);
            assert_eq!(queue.read_bytes.load(Ordering::Relaxed), lives * 4096);
            assert_eq!(adopted.part(0).unwrap().reads.load(Ordering::Relaxed), 0);
            assert!(adopted.part(2).is_none());
        }
    }

    #[test]
    fn a_page_that_does_not_fit_is_refused() {
        let good = [stats::MAGIC, stats::VERSION, 2];
        let full = stats::page_bytes(2);
        let refused = |bytes, seals, header| StatsPage::adopt(memfd(bytes, seals, header), 2).unwrap_err();
        assert!(matches!(refused(full, SealFlags::GROW, good), StatsError::NotSealed));
        assert!(matches!(refused(full - 1, SealFlags::SHRINK, good), StatsError::Layout { queues: 1, wanted: 2, .. }));
        let cases = [[0, stats::VERSION, 2], [stats::MAGIC, 99, 2], [stats::MAGIC, stats::VERSION, 1]];
        for header in cases {
            let error = refused(full, SealFlags::SHRINK, header);
            assert!(matches!(error, StatsError::Layout { .. }), "{header:?}: {error}");
        }
    }
}
