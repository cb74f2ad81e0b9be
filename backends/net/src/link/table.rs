//! Which port an address was seen behind.
//!
//! The table is read for each frame, by the threads of all ports, without a lock; only a change takes one. It is bounded
//! twice: in all, and per port, so that a guest that sends from ever new addresses fills its own share and nothing else.
//! An address that does not fit is not learned, and frames to it go to all ports, as to any unknown one.
//!
//! Time is given by the caller, in seconds of a clock of its choice.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::filter::{Mac, is_group};

/// Seconds for which an address is believed after its last frame.
pub const AGE_MAX_S: u32 = 300;
/// Addresses of one port.
pub const PORT_ADDRESSES_MAX: u32 = 256;

const SLOTS: usize = 4096;
/// Slots that an address may be in.
const PROBES: usize = 16;
const NOTHING: u64 = 0;

#[derive(Debug, Default)]
struct Slot {
    /// Address, and port + 1 in the lowest 16 bits.
    entry: AtomicU64,
    seen_s: AtomicU32,
}

/// The table of one switch.
#[derive(Debug)]
pub struct Table {
    slots: Box<[Slot]>,
    /// Who changes an entry holds it.
    shares: Mutex<Shares>,
}

#[derive(Debug)]
struct Shares {
    /// Addresses of each port.
    counts: Vec<u32>,
    /// When old entries were looked for last.
    swept_s: Option<u32>,
}

fn key(mac: &Mac) -> u64 {
    mac.iter().fold(0, |all, byte| all << 8 | u64::from(*byte)) << 16
}

fn old(seen_s: u32, now_s: u32) -> bool {
    now_s.saturating_sub(seen_s) > AGE_MAX_S
}

impl Table {
    /// An empty table for so many ports.
    pub fn new(ports: usize) -> Self {
        let shares = Mutex::new(Shares { counts: vec![0; ports], swept_s: None });
        Self { slots: (0..SLOTS).map(|_| Slot::default()).collect(), shares }
    }

    fn probes(&self, key: u64) -> impl Iterator<Item = &Slot> {
        let first = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize;
        (0..PROBES).filter_map(move |n| self.slots.get((first + n) % SLOTS))
    }

    fn shares(&self) -> MutexGuard<'_, Shares> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The port behind which an address was seen lately.
    pub fn find(&self, mac: &Mac, now_s: u32) -> Option<usize> {
        let key = key(mac);
        let (slot, entry) = self.probes(key).find_map(|slot| {
            let entry = slot.entry.load(Ordering::Acquire);
            (entry & !0xffff == key && entry != NOTHING).then_some((slot, entry))
        })?;
        let port = (entry & 0xffff).checked_sub(1)?;
        (!old(slot.seen_s.load(Ordering::Relaxed), now_s)).then_some(port as usize)
    }

    /// An address was seen behind a port.
    pub fn learn(&self, mac: &Mac, port: usize, now_s: u32) {
        let wanted = key(mac) | (port as u64 + 1);
        let known = self.probes(wanted & !0xffff).find(|slot| slot.entry.load(Ordering::Acquire) == wanted);
        match known {
            Some(slot) => {
                if slot.seen_s.load(Ordering::Relaxed) != now_s {
                    slot.seen_s.store(now_s, Ordering::Relaxed);
                }
            }
            None if is_group(mac) => {}
            None => self.enter(wanted, port, now_s),
        }
    }

    fn enter(&self, wanted: u64, port: usize, now_s: u32) {
        let shares = &mut *self.shares();
        let counts = &mut shares.counts;
        let moved = self.probes(wanted & !0xffff).find(|slot| {
            let entry = slot.entry.load(Ordering::Relaxed);
            entry != NOTHING && entry & !0xffff == wanted & !0xffff
        });
        let full = |counts: &[u32]| counts.get(port).is_none_or(|count| *count >= PORT_ADDRESSES_MAX);
        if full(counts) {
            // It looks at every slot: a guest shall not have that done for each of its frames.
            if shares.swept_s.replace(now_s) != Some(now_s) {
                self.sweep(counts, now_s);
            }
            if full(counts) {
                return;
            }
        }
        let slot = moved.or_else(|| {
            self.probes(wanted & !0xffff).find(|slot| {
                slot.entry.load(Ordering::Relaxed) == NOTHING || old(slot.seen_s.load(Ordering::Relaxed), now_s)
            })
        });
        let Some(slot) = slot else { return };
        slot.seen_s.store(now_s, Ordering::Relaxed);
        let before = slot.entry.swap(wanted, Ordering::AcqRel);
        leave(counts, before);
        if let Some(count) = counts.get_mut(port) {
            *count += 1;
        }
    }

    /// Forgets what is too old.
    fn sweep(&self, counts: &mut [u32], now_s: u32) {
        for slot in &self.slots {
            if old(slot.seen_s.load(Ordering::Relaxed), now_s) {
                leave(counts, slot.entry.swap(NOTHING, Ordering::AcqRel));
            }
        }
    }

    /// Forgets what was seen behind a port.
    pub fn forget(&self, port: usize) {
        let counts = &mut self.shares().counts;
        for slot in &self.slots {
            let entry = slot.entry.load(Ordering::Relaxed);
            if entry & 0xffff == port as u64 + 1 {
                slot.entry.store(NOTHING, Ordering::Release);
                leave(counts, entry);
            }
        }
    }
}

fn leave(counts: &mut [u32], entry: u64) {
    if let Some(port) = (entry & 0xffff).checked_sub(1)
        && let Some(count) = counts.get_mut(port as usize)
    {
        *count = count.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn mac(number: u32) -> Mac {
        let [a, b, c, d] = number.to_be_bytes();
        [2, 0, a, b, c, d]
    }

    #[test]
    fn addresses_are_learned_moved_aged_and_forgotten() {
        let table = Table::new(3);
        assert_eq!(table.find(&mac(1), 0), None);
        table.learn(&mac(1), 0, 10);
        table.learn(&mac(2), 1, 10);
        assert_eq!((table.find(&mac(1), 10), table.find(&mac(2), 10)), (Some(0), Some(1)));
        table.learn(&mac(1), 2, 11);
        assert_eq!(table.find(&mac(1), 11), Some(2), "it moved");
        assert_eq!(table.find(&mac(2), 10 + AGE_MAX_S), Some(1));
        assert_eq!(table.find(&mac(2), 11 + AGE_MAX_S), None, "it is too old");
        table.forget(2);
        assert_eq!(table.find(&mac(1), 11), None);
        table.learn(&[1, 0, 0x5e, 0, 0, 1], 0, 11);
        assert_eq!(table.find(&[1, 0, 0x5e, 0, 0, 1], 11), None, "a group is behind no port");
    }

    /// A guest that sends from ever new addresses must not push out those of others.
    #[test]
    fn a_port_fills_only_its_own_share_and_gets_it_back_with_time() {
        let table = Table::new(2);
        table.learn(&mac(1), 0, 0);
        (0..100_000).for_each(|n| table.learn(&mac(1000 + n), 1, 1));
        assert_eq!(table.find(&mac(1), 1), Some(0));
        assert!(table.shares().counts.iter().all(|count| *count <= PORT_ADDRESSES_MAX));
        table.learn(&mac(7), 1, 1);
        assert_eq!(table.find(&mac(7), 1), None);
        table.learn(&mac(7), 1, 2 + AGE_MAX_S);
        assert_eq!(table.find(&mac(7), 2 + AGE_MAX_S), Some(1));
    }

    proptest! {
        #[test]
        fn what_it_finds_is_what_was_seen_last(steps in proptest::collection::vec((0..40_u32, 0..4_usize, 0..30_u32), 0..300)) {
            let table = Table::new(4);
            let mut seen = HashMap::new();
            let mut now = 0;
            for (number, port, pause) in steps {
                now += pause;
                table.learn(&mac(number), port, now);
                seen.insert(number, (port, now));
                for (number, (port, when)) in &seen {
                    let expected = (now - when <= AGE_MAX_S).then_some(*port);
                    prop_assert_eq!(table.find(&mac(*number), now), expected);
                }
            }
            let live = table.slots.iter().filter(|slot| slot.entry.load(Ordering::Relaxed) != NOTHING).count();
            prop_assert_eq!(table.shares().counts.iter().sum::<u32>() as usize, live);
        }
    }
}
