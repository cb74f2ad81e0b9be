//! The page of figures: counters and latency histograms per queue, in memory that a VMM and one backend share.
//!
//! The VMM makes the memory (a sealed memfd), fills in the header and gives the same page to each incarnation of a device's
//! process, so that figures outlive a crash; the process adds to what it finds. Each queue has one writer, the thread of
//! that queue, which stores without locks; the VMM only reads, and to it everything in the page is a number that may be
//! wrong. Numbers only grow, and wrap. All fields are little endian (the host's order on x86-64), all accesses atomic.

use std::mem::{offset_of, size_of};
use std::sync::atomic::AtomicU64;

use crate::sidecar::DeviceClass;

/// The first eight bytes of a page: `ATOLSTAT`.
pub const MAGIC: u64 = u64::from_le_bytes(*b"ATOLSTAT");
/// Version of the layout.
pub const VERSION: u64 = 1;
/// The most queues that a page may have.
pub const QUEUES_MAX: u16 = 256;

/// Latencies below this many nanoseconds are in the first bucket.
pub const BUCKET_FIRST_NS: u64 = 1 << BUCKET_FIRST_SHIFT;
const BUCKET_FIRST_SHIFT: u32 = 8;
/// Buckets per doubling of the latency.
pub const BUCKETS_PER_OCTAVE: usize = 4;
/// Doublings that are told apart: from 256 ns to 17 s.
pub const OCTAVES: usize = 26;
/// Buckets: one below, one above, and the octaves.
pub const BUCKETS: usize = OCTAVES * BUCKETS_PER_OCTAVE + 2;
/// Counters whose meaning depends on the device's class, see [`class_counters`].
pub const CLASS_COUNTERS: usize = 8;

/// The bucket of a latency.
#[must_use]
pub fn bucket(ns: u64) -> usize {
    let Some(octave) = ns.checked_ilog2().and_then(|log| log.checked_sub(BUCKET_FIRST_SHIFT)) else { return 0 };
    let quarter = (ns >> (octave + BUCKET_FIRST_SHIFT - 2)) as usize & (BUCKETS_PER_OCTAVE - 1);
    (1 + octave as usize * BUCKETS_PER_OCTAVE + quarter).min(BUCKETS - 1)
}

/// Every latency in the bucket is below this many nanoseconds; none for the last one.
#[must_use]
pub fn bucket_end(bucket: usize) -> Option<u64> {
    let Some(above) = bucket.checked_sub(1) else { return Some(BUCKET_FIRST_NS) };
    let octave = above / BUCKETS_PER_OCTAVE;
    let quarters = (above % BUCKETS_PER_OCTAVE) as u64 + 5;
    (octave < OCTAVES).then(|| (BUCKET_FIRST_NS / BUCKETS_PER_OCTAVE as u64 * quarters) << octave)
}

/// What precedes the queues.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct PageHeader {
    /// [`MAGIC`].
    pub magic: AtomicU64,
    /// [`VERSION`].
    pub version: AtomicU64,
    /// How many queues follow.
    pub queues: AtomicU64,
}

/// Names and meanings of a queue's counters, in their order, for whoever lays them out or reads them: `$with` is a macro that
/// takes the list as fields.
#[macro_export]
macro_rules! queue_counters {
    ($with:ident) => {
        $with! {
            /// Requests completed, also with an error.
            requests,
            /// Requests completed with an error.
            errors,
            /// Requests that moved data to the guest: reads of a disk, frames received.
            reads,
            /// Their bytes.
            read_bytes,
            /// Requests that moved data from the guest: writes of a disk, frames sent.
            writes,
            /// Their bytes.
            write_bytes,
            /// Descriptor chains that made no sense.
            malformed,
            /// Sleeps of the queue that ended, by a kick or anything else.
            wakeups,
            /// Spins in which work came, and which so saved a sleep.
            spins,
            /// Interrupts sent to the guest.
            calls,
            /// Requests that waited because of a rate limit.
            throttled,
            /// How long they waited in all, in nanoseconds.
            throttled_ns,
            /// Sum of all latencies in nanoseconds.
            latency_sum_ns,
        }
    };
}

macro_rules! layout {
    ($($(#[$meta:meta])* $field:ident,)*) => {
        /// What one queue has done since the device was made.
        #[derive(Debug)]
        #[repr(C, align(64))]
        pub struct QueueStats {
            $($(#[$meta])* pub $field: AtomicU64,)*
            /// Left for later; zero.
            pub reserved: AtomicU64,
            /// What only devices of this class have, see [`class_counters`].
            pub class: [AtomicU64; CLASS_COUNTERS],
            /// Requests by the time from taken to completed, see [`bucket`].
            pub latency: [AtomicU64; BUCKETS],
        }

        impl QueueStats {
            /// The counters by name, with their offset in bytes; those of the class and the histogram come behind them.
            pub const COUNTERS: &'static [(&'static str, usize)] =
                &[$((stringify!($field), offset_of!(QueueStats, $field)),)* ("reserved", offset_of!(QueueStats, reserved))];
        }

        impl Default for QueueStats {
            fn default() -> Self {
                let zero = || AtomicU64::new(0);
                Self {
                    $($field: zero(),)*
                    reserved: zero(),
                    class: std::array::from_fn(|_| zero()),
                    latency: std::array::from_fn(|_| zero()),
                }
            }
        }
    };
}

queue_counters!(layout);

/// Where the histogram begins within [`QueueStats`].
pub const LATENCY_AT: usize = offset_of!(QueueStats, latency);
/// Where the class's counters begin within [`QueueStats`].
pub const CLASS_AT: usize = offset_of!(QueueStats, class);
/// Bytes of the header.
pub const HEADER_BYTES: usize = size_of::<PageHeader>();
/// Bytes of one queue.
pub const QUEUE_BYTES: usize = size_of::<QueueStats>();

/// Bytes of a page for so many queues.
#[must_use]
pub fn page_bytes(queues: u16) -> usize {
    HEADER_BYTES + QUEUE_BYTES * usize::from(queues)
}

/// Where a queue begins in the page.
#[must_use]
pub fn queue_at(queue: u16) -> usize {
    HEADER_BYTES + QUEUE_BYTES * usize::from(queue)
}

/// Names of the class's counters, in their order; at most [`CLASS_COUNTERS`].
#[must_use]
pub fn class_counters(class: DeviceClass) -> &'static [&'static str] {
    match class {
        DeviceClass::Block => &["flush_ops", "discard_ops", "write_zeroes_ops"],
        DeviceClass::Net => &["dropped_frames", "dropped_bytes", "control_commands"],
        DeviceClass::Gpu | DeviceClass::Uart | DeviceClass::Display | DeviceClass::Other(_) => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each latency lies in the bucket whose bounds say so, and bounds are never more than a quarter apart.
    #[test]
    fn buckets_meet_without_gap_or_overlap() {
        let mut start = 0;
        for index in 0..BUCKETS {
            assert_eq!(bucket(start), index, "{start} ns");
            let Some(end) = bucket_end(index) else {
                assert_eq!(index, BUCKETS - 1);
                assert_eq!(bucket(u64::MAX), index);
                break;
            };
            assert_eq!(bucket(end - 1), index, "{} ns", end - 1);
            assert!(start == 0 || (end - start) * 4 <= start, "{start}..{end}");
            start = end;
        }
        assert!((10_000_000_000..20_000_000_000).contains(&start), "ten seconds have a bucket of their own: {start}");
    }

    #[test]
    fn the_page_has_no_holes() {
        assert_eq!((HEADER_BYTES, QUEUE_BYTES, CLASS_AT, LATENCY_AT), (64, 1024, 112, 176));
        assert_eq!(QueueStats::COUNTERS.len() * 8, CLASS_AT);
        assert_eq!(page_bytes(2), queue_at(2));
        for class in [DeviceClass::Block, DeviceClass::Net, DeviceClass::Other(7)] {
            assert!(class_counters(class).len() <= CLASS_COUNTERS);
        }
    }
}
