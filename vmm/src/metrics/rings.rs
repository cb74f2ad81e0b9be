//! What devices do whose processes do not count: the used indices of their rings, looked at now and then.
//!
//! Somebody else's backend, passt and a switch of ours have no page of figures. How many requests of each queue they have
//! completed stands in guest memory, as an index of sixteen bits, so one thread looks at all of those rings fifty times a
//! second, as long as there is such a device. More than 65,535 completions of one queue between two looks are counted
//! short. Bytes and latencies are in nobody's memory, and are not counted: that is what [`CountedBy`] says.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use atoll_devices::virtio::QueueConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::device::DeviceMeter;
use super::registry::Known;
use crate::seccomp::{self, ThreadClass};

/// Between two looks at rings that are in use, and at rings that are not.
const LOOK: Duration = Duration::from_millis(20);
const IDLE_LOOK: Duration = Duration::from_millis(250);
/// Where the index stands in a used ring (virtio 1.2, 2.7.8).
const INDEX_AT: u64 = 2;

/// Who counts what a device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CountedBy {
    /// Its process: requests, bytes, errors, latencies.
    Process,
    /// The VMM, which sees in the rings (of an NVMe disk: in the account of its queues) how many requests each queue has
    /// completed. Bytes, errors and latencies are not
    /// counted.
    Rings,
    /// Nobody: the guest drives it by itself.
    Nobody,
}

/// A ring in use.
#[derive(Debug)]
struct Ring {
    queue: u16,
    index: GuestAddress,
    seen: u16,
}

#[derive(Debug, Default)]
struct State {
    /// Held only while a driver runs the device.
    memory: Option<Arc<GuestMemoryMmap>>,
    rings: Vec<Ring>,
    completed: BTreeMap<u16, u64>,
}

impl State {
    fn look(&mut self) {
        let Some(memory) = &self.memory else { return };
        for ring in &mut self.rings {
            let Ok(used) = memory.load::<u16>(ring.index, Ordering::Relaxed) else { continue };
            let used = u16::from_le(used);
            let new = used.wrapping_sub(std::mem::replace(&mut ring.seen, used));
            let completed = self.completed.entry(ring.queue).or_default();
            *completed = completed.wrapping_add(new.into());
        }
    }
}

/// The rings of one device.
#[derive(Debug, Default)]
pub(super) struct Rings(Mutex<State>);

impl Rings {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A driver has set these queues up; what they complete from now on counts.
    pub(super) fn begin(&self, memory: &Arc<GuestMemoryMmap>, queues: &[QueueConfig]) {
        let mut state = self.lock();
        state.look();
        let ring = |queue: &QueueConfig| {
            let index = GuestAddress(queue.used_ring.checked_add(INDEX_AT)?);
            let seen = u16::from_le(memory.load(index, Ordering::Relaxed).ok()?);
            Some(Ring { queue: queue.index, index, seen })
        };
        state.rings = queues.iter().filter_map(ring).collect();
        state.memory = Some(Arc::clone(memory));
    }

    /// The driver is about to go: its rings are not looked at any more.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.look();
        state.rings.clear();
        state.memory = None;
    }

    /// Requests completed by each queue.
    pub(super) fn completed(&self) -> BTreeMap<u16, u64> {
        let mut state = self.lock();
        state.look();
        state.completed.clone()
    }

    /// Looks; whether a driver runs the device.
    fn look(&self) -> bool {
        let mut state = self.lock();
        state.look();
        state.memory.is_some()
    }
}

/// Starts the thread that looks, for a registry that has the first such device.
pub(super) fn watch(known: &Arc<Mutex<Known>>) -> std::io::Result<()> {
    let known = Arc::downgrade(known);
    std::thread::Builder::new().name("ring-counter".into()).spawn(move || run(&known)).map(drop)
}

fn run(known: &Weak<Mutex<Known>>) {
    seccomp::enter(ThreadClass::Events);
    loop {
        let meters: Vec<Arc<DeviceMeter>> = {
            let Some(known) = known.upgrade() else { return };
            let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
            let meters: Vec<_> = known.devices.values().filter_map(Weak::upgrade).collect();
            let meters: Vec<_> = meters.into_iter().filter(|meter| meter.rings().is_some()).collect();
            known.rings_watched = !meters.is_empty();
            meters
        };
        if meters.is_empty() {
            return;
        }
        let busy = meters.iter().filter_map(|meter| meter.rings()).filter(|rings| rings.look()).count() > 0;
        drop(meters);
        std::thread::sleep(if busy { LOOK } else { IDLE_LOOK });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Indices wrap, drivers come and go with rings of their own, and nothing of it is counted twice or backwards.
    #[test]
    fn completions_are_counted_over_drivers() {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap());
        let ring = |index, used_ring| QueueConfig {
            index,
            size: 4,
            descriptor_table: 0,
            available_ring: 0,
            used_ring,
            vector: None,
        };
        let used = |at: u64, value: u16| memory.store(value.to_le(), GuestAddress(at + 2), Ordering::Relaxed).unwrap();
        let rings = Rings::default();
        assert!(!rings.look() && rings.completed().is_empty());
        used(0x1000, u16::MAX);
        rings.begin(&memory, &[ring(0, 0x1000), ring(1, 0x2000), ring(2, u64::MAX)]);
        used(0x1000, 1);
        assert!(rings.look());
        used(0x2000, 7);
        assert_eq!(rings.completed(), BTreeMap::from([(0, 2), (1, 7)]));
        used(0x2000, 9);
        rings.end();
        used(0x2000, 100);
        used(0x1000, 0);
        rings.begin(&memory, &[ring(0, 0x1000)]);
        used(0x1000, 3);
        assert_eq!(rings.completed(), BTreeMap::from([(0, 5), (1, 9)]));
    }
}
