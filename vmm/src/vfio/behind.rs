//! A function behind the guest's IOMMU: what the guest has mapped for it is mapped for the real one, ahead of any access.
//!
//! Until a driver of the guest's has attached it, all of RAM is at its own addresses (bypass). Each change is carried out
//! before the guest's request is answered: no mapping that is lost can be used any more, and each that is gained can be.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use atoll_devices::iommu::{Access, Change, IovaRange, Mapping};

use super::space::{DmaSpace, PAGE};
use crate::iommu::{Endpoint, Unconfirmed, Unit};
use crate::metrics::{DeviceMeter, TranslationEvent};

/// What is mapped for the function now, by first address.
type Mapped = BTreeMap<u64, Mapping>;

/// The function, as its IOMMU knows it.
pub(super) struct Behind {
    unit: Arc<Unit>,
    endpoint: u32,
    /// Its addresses, as long as it is open.
    space: Weak<DmaSpace>,
    mapped: Mutex<Mapped>,
    meter: Arc<DeviceMeter>,
}

/// Bytes from the first to the last address of a range; a range of all 2^64 is one page short, which nobody maps.
fn len(range: IovaRange) -> u64 {
    (range.last() - range.first()).saturating_add(1) & !(PAGE - 1)
}

impl Behind {
    /// Of the device with this number, whose memory is reached through `space`.
    pub(super) fn new(unit: Arc<Unit>, endpoint: u32, space: &Arc<DmaSpace>, meter: Arc<DeviceMeter>) -> Self {
        Self { unit, endpoint, space: Arc::downgrade(space), mapped: Mutex::default(), meter }
    }

    /// It is gone.
    pub(super) fn leave(&self) {
        self.unit.leave(self.endpoint);
    }

    /// Makes what is mapped in a range that which the IOMMU says.
    ///
    /// # Errors
    /// When the host's IOMMU refuses.
    pub(super) fn follow(&self, range: IovaRange) -> Result<(), Unconfirmed> {
        // A function that is closed reaches nothing.
        let Some(space) = self.space.upgrade() else { return Ok(()) };
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted: Mapped = self
            .unit
            .mappings(self.endpoint, range)
            .into_iter()
            .map(|mapping| (mapping.iova().first(), mapping))
            .collect();
        // Mappings do not overlap: of those before the range only the last one can reach into it.
        let before = mapped.range(..range.first()).next_back().map_or(range.first(), |(first, _)| *first);
        let lost: Vec<Mapping> = mapped
            .range(before..=range.last())
            .map(|(_, mapping)| mapping)
            .filter(|mapping| mapping.iova().overlaps(range) && wanted.get(&mapping.iova().first()) != Some(mapping))
            .copied()
            .collect();
        for mapping in lost {
            let iova = mapping.iova();
            space
                .unmap(iova.first(), len(iova))
                .map_err(|error| Unconfirmed(format!("the host did not unmap {iova:?}: {error}")))?;
            mapped.remove(&iova.first());
            self.meter.translation().add(TranslationEvent::Unmap, 1);
        }
        for (first, mapping) in wanted {
            if mapped.contains_key(&first) {
                continue;
            }
            // The host's IOMMU has none that can only be written.
            let writable = mapping.rights.permit(Access::Write);
            space.map(first, mapping.gpa(), len(mapping.iova()), writable).map_err(|error| {
                // Of several stretches of memory one may have been.
                let _ = space.unmap(first, len(mapping.iova()));
                Unconfirmed(format!("the host did not map {:?}: {error}", mapping.iova()))
            })?;
            mapped.insert(first, mapping);
            self.meter.translation().add(TranslationEvent::Map, 1);
        }
        Ok(())
    }
}

impl Endpoint for Behind {
    fn changed(&self, change: Change, _deadline: Instant) -> Result<(), Unconfirmed> {
        let (Change::Lost { range, .. } | Change::Gained { range, .. }) = change;
        self.follow(range)
    }
}
