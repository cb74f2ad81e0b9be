//! What happens between a device and the addresses that its driver has given it.

use std::sync::atomic::{AtomicU64, Ordering};

/// One kind of event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TranslationEvent {
    /// The guest has mapped something for the device.
    Map,
    /// The guest has taken a range back.
    Unmap,
    /// The device wanted what it may not.
    Fault,
    /// Its backend asked for a translation.
    Miss,
    /// Its backend was told to forget one.
    Invalidation,
}

impl TranslationEvent {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Map, Self::Unmap, Self::Fault, Self::Miss, Self::Invalidation];

    /// As clients see it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::Unmap => "unmap",
            Self::Fault => "fault",
            Self::Miss => "miss",
            Self::Invalidation => "invalidation",
        }
    }
}

/// How often each has happened to a device behind the IOMMU.
#[derive(Debug, Default)]
pub struct TranslationCounters([AtomicU64; TranslationEvent::ALL.len()]);

impl TranslationCounters {
    /// It has happened so many times more.
    pub fn add(&self, event: TranslationEvent, times: usize) {
        if let Some(counter) = self.0.get(event as usize) {
            counter.fetch_add(times as u64, Ordering::Relaxed);
        }
    }

    /// Each with its name.
    pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
        let of = |(event, counter): (&TranslationEvent, &AtomicU64)| (event.name(), counter.load(Ordering::Relaxed));
        TranslationEvent::ALL.iter().zip(&self.0).map(of).collect()
    }
}
