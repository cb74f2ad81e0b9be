//! The page of figures that a device process writes ([`atoll_protocol::stats`]), as the VMM makes and reads it.
//!
//! Whatever stands in the page is a number: a hostile process can lie about its own figures and do nothing else. The memory
//! cannot be resized by anybody, so reading it cannot fault.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use atoll_protocol::queue_counters;
use atoll_protocol::stats::{self, BUCKETS, CLASS_COUNTERS, QUEUES_MAX, QueueStats};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::histogram::Histogram;

/// The page of one device.
#[derive(Debug)]
pub struct StatsPage {
    file: File,
    map: MmapRegion<()>,
    queues: u16,
}

macro_rules! figures {
    ($($(#[$meta:meta])* $field:ident,)*) => {
        /// One queue's figures at one moment.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct QueueFigures {
            $($(#[$meta])* pub $field: u64,)*
            /// Counters of the device's class, see [`stats::class_counters`].
            pub class: [u64; CLASS_COUNTERS],
            /// Requests by the time from taken to completed.
            pub latency: Histogram,
        }

        impl QueueFigures {
            fn set(&mut self, name: &str, value: u64) {
                match name {
                    $(stringify!($field) => self.$field = value,)*
                    _ => {}
                }
            }

            /// Adds those of another queue.
            pub fn add(&mut self, other: &Self) {
                $(self.$field = self.$field.wrapping_add(other.$field);)*
                for (sum, count) in self.class.iter_mut().zip(other.class) {
                    *sum = sum.wrapping_add(count);
                }
                self.latency.add(&other.latency);
            }
        }
    };
}

queue_counters!(figures);

impl StatsPage {
    /// An empty page for a device of `queues` queues; more than a page can have are not counted.
    ///
    /// # Errors
    /// When there is no memory or descriptor left.
    pub fn new(queues: u16) -> io::Result<Self> {
        let queues = queues.min(QUEUES_MAX);
        let bytes = stats::page_bytes(queues);
        let memfd = memfd_create(c"atoll-stats", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&memfd, bytes as u64)?;
        fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let file = File::from(memfd);
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), bytes).map_err(io::Error::other)?;
        let page = Self { file, map, queues };
        for (offset, value) in [(0, stats::MAGIC), (8, stats::VERSION), (16, u64::from(queues))] {
            if let Some(cell) = page.cell(offset) {
                cell.store(value, Ordering::Relaxed);
            }
        }
        Ok(page)
    }

    /// A descriptor for an incarnation of the device's process.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn pass(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Queues that it has room for.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    fn cell(&self, offset: usize) -> Option<&AtomicU64> {
        self.map.get_atomic_ref::<AtomicU64>(offset).ok()
    }

    fn load(&self, offset: usize) -> u64 {
        self.cell(offset).map_or(0, |cell| cell.load(Ordering::Relaxed))
    }

    /// The figures of one queue; zeroes beyond the last.
    pub fn queue(&self, queue: u16) -> QueueFigures {
        let mut figures = QueueFigures::default();
        if queue >= self.queues {
            return figures;
        }
        let at = stats::queue_at(queue);
        for (name, offset) in QueueStats::COUNTERS {
            figures.set(name, self.load(at + offset));
        }
        let word = |from: usize, number: usize| self.load(at + from + 8 * number);
        figures.class = std::array::from_fn(|number| word(stats::CLASS_AT, number));
        figures.latency =
            Histogram::new(std::array::from_fn::<u64, BUCKETS, _>(|number| word(stats::LATENCY_AT, number)));
        figures
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// What a process writes at the pinned offsets is read under the right names, and nobody can take the page away.
    #[test]
    fn a_page_is_read_as_it_is_laid_out() {
        let page = StatsPage::new(2).unwrap();
        let file = File::from(page.pass().unwrap());
        assert!(file.set_len(0).is_err(), "sealed");
        for (number, (_, offset)) in QueueStats::COUNTERS.iter().enumerate() {
            file.write_all_at(&(number as u64 + 1).to_le_bytes(), (stats::queue_at(1) + offset) as u64).unwrap();
        }
        let bucket = stats::bucket(5_000_000);
        file.write_all_at(&u64::MAX.to_le_bytes(), (stats::queue_at(1) + stats::LATENCY_AT + 8 * bucket) as u64)
            .unwrap();
        file.write_all_at(&7_u64.to_le_bytes(), (stats::queue_at(1) + stats::CLASS_AT) as u64).unwrap();
        let figures = page.queue(1);
        assert_eq!((figures.requests, figures.errors, figures.read_bytes, figures.latency_sum_ns), (1, 2, 4, 13));
        assert_eq!((figures.class[0], figures.latency.count()), (7, u64::MAX));
        assert_eq!(page.queue(0), QueueFigures::default());
        assert_eq!(page.queue(2), QueueFigures::default());
        // A liar overflows nothing.
        let mut sum = figures.clone();
        sum.add(&figures);
        assert_eq!(sum.latency.count(), u64::MAX);
    }
}
