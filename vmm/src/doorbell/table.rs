//! Which doorbell rings at which address.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use super::bell::{Doorbell, DoorbellError};
use crate::cpu::{DoorbellWatch, Space};

/// The doorbells of a machine by address. A bus asks it about each write before it looks for a register.
#[derive(Default)]
pub struct DoorbellTable {
    watch: Option<Arc<dyn DoorbellWatch>>,
    bells: RwLock<HashMap<(Space, u64), Arc<Doorbell>>>,
}

impl DoorbellTable {
    /// An empty table. With `watch`, the processor notices most writes by itself and the bus sees none of them.
    pub fn new(watch: Option<Arc<dyn DoorbellWatch>>) -> Self {
        Self { watch, bells: RwLock::default() }
    }
    /// Puts a doorbell at an address, in place of what was there.
    ///
    /// # Errors
    /// If the processor cannot watch the address. The doorbell is in the table all the same: the bus rings it.
    pub fn insert(&self, space: Space, address: u64, bell: Arc<Doorbell>) -> Result<(), DoorbellError> {
        let watched = match &self.watch {
            Some(watch) => {
                // The processor watches an address for one doorbell.
                let old = self.bells.write().unwrap_or_else(PoisonError::into_inner).remove(&(space, address));
                if let Some(old) = old {
                    old.displace()?;
                }
                bell.place(Arc::clone(watch), space, address)
            }
            None => Ok(()),
        };
        self.bells.write().unwrap_or_else(PoisonError::into_inner).insert((space, address), bell);
        watched
    }
    /// Takes a doorbell away from an address: its BAR has moved, or its device is gone. One that another doorbell has
    /// taken the place of is not there any more.
    pub fn remove(&self, space: Space, address: u64, bell: &Arc<Doorbell>) {
        let mut bells = self.bells.write().unwrap_or_else(PoisonError::into_inner);
        if bells.get(&(space, address)).is_none_or(|there| !Arc::ptr_eq(there, bell)) {
            return;
        }
        bells.remove(&(space, address));
        drop(bells);
        if let Err(error) = bell.displace() {
            tracing::warn!(%error, "the processor goes on watching a doorbell that was taken away");
        }
    }
    /// A guest's write. Whether it rang a doorbell; whatever was written, the address says which.
    pub fn write(&self, space: Space, address: u64) -> bool {
        let bells = self.bells.read().unwrap_or_else(PoisonError::into_inner);
        bells.get(&(space, address)).map(|bell| bell.ring()).is_some()
    }
}
