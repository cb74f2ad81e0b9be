//! Doorbells under load: no kick is lost while the route changes, and the address table follows the BARs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::relay::{signal, take};
use super::*;
use crate::cpu::{CpuError, DoorbellWatch, Space};

/// Waits for a count to arrive; the deadline is generous, the machine may be busy.
fn await_count(event: &EventFd, expected: u64) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut count = 0;
    while count < expected && Instant::now() < deadline {
        count += take(event);
        thread::yield_now();
    }
    count
}

/// A guest that never stops kicking, while an operator switches the path back and forth: the backend hears exactly as
/// many kicks as the guest gave. An eventfd counts, so nothing can hide in a coalesced wake-up.
#[test]
fn switching_loses_no_kick() {
    let relay = Relay::new().unwrap();
    let bell = Doorbell::new(&relay).unwrap();
    let table = Arc::new(DoorbellTable::new(None));
    table.insert(Space::Mmio, 0xc000_3000, Arc::clone(&bell)).unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let guest = {
        let (table, ended) = (Arc::clone(&table), Arc::clone(&ended));
        thread::spawn(move || {
            let mut kicks = 0;
            while !ended.load(Ordering::Relaxed) {
                assert!(table.write(Space::Mmio, 0xc000_3000));
                kicks += 1;
            }
            kicks
        })
    };
    let mut relayed = 0;
    for _ in 0..200 {
        bell.interpose(Arc::new(PassThrough)).unwrap();
        assert_eq!(bell.path(), Path::Interposed);
        thread::yield_now();
        relayed += bell.count().unwrap();
        bell.make_direct().unwrap();
        assert_eq!((bell.path(), bell.count()), (Path::Direct, None));
    }
    ended.store(true, Ordering::Relaxed);
    let kicks: u64 = guest.join().unwrap();
    assert_eq!(await_count(bell.backend_event(), kicks), kicks);
    assert!(relayed <= kicks);
    assert!(!table.write(Space::Pio, 0xc000_3000));
    table.remove(Space::Mmio, 0xc000_3000, &Doorbell::new(&relay).unwrap());
    assert!(table.write(Space::Mmio, 0xc000_3000), "another's doorbell does not take this one away");
    table.remove(Space::Mmio, 0xc000_3000, &bell);
    assert!(!table.write(Space::Mmio, 0xc000_3000));
}

/// A processor that watches addresses, as KVM does: one eventfd an address.
#[derive(Default)]
struct Watch {
    watched: Mutex<Vec<(u64, EventFd)>>,
}

impl Watch {
    /// The guest writes: signals the watched eventfd, or says that the write came out.
    fn guest_writes(&self, address: u64) -> bool {
        let watched = self.watched.lock().unwrap();
        match watched.iter().find(|(at, _)| *at == address) {
            Some((_, event)) => {
                signal(event, 1);
                true
            }
            None => false,
        }
    }
}

impl DoorbellWatch for Watch {
    fn watch(&self, space: Space, address: u64, event: &EventFd) -> Result<(), CpuError> {
        let mut watched = self.watched.lock().unwrap();
        if watched.iter().any(|(at, _)| *at == address) {
            return Err(CpuError::Unsupported(format!("{space:?} {address:#x} is watched already")));
        }
        watched.push((address, event.try_clone().unwrap()));
        Ok(())
    }
    fn unwatch(&self, _space: Space, address: u64, _event: &EventFd) -> Result<(), CpuError> {
        self.watched.lock().unwrap().retain(|(at, _)| *at != address);
        Ok(())
    }
}

/// With a processor that watches, kicks bypass the bus except in the moment between two paths; a BAR that moves takes
/// its doorbell along. All kicks arrive.
#[test]
fn watched_doorbell_switches_and_moves() {
    let relay = Relay::new().unwrap();
    let watch = Arc::new(Watch::default());
    let table = Arc::new(DoorbellTable::new(Some(Arc::clone(&watch) as _)));
    let bell = Doorbell::new(&relay).unwrap();
    table.insert(Space::Mmio, 0x1000, Arc::clone(&bell)).unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let guest = {
        let (table, watch, ended) = (Arc::clone(&table), Arc::clone(&watch), Arc::clone(&ended));
        thread::spawn(move || {
            let mut kicks = 0;
            while !ended.load(Ordering::Relaxed) {
                assert!(watch.guest_writes(0x1000) || table.write(Space::Mmio, 0x1000));
                kicks += 1;
            }
            kicks
        })
    };
    for _ in 0..100 {
        bell.interpose(Arc::new(PassThrough)).unwrap();
        bell.make_direct().unwrap();
    }
    ended.store(true, Ordering::Relaxed);
    let kicks: u64 = guest.join().unwrap();
    assert_eq!(await_count(bell.backend_event(), kicks), kicks);

    table.remove(Space::Mmio, 0x1000, &bell);
    table.insert(Space::Mmio, 0x2000, Arc::clone(&bell)).unwrap();
    assert!(!watch.guest_writes(0x1000) && watch.guest_writes(0x2000));
    assert_eq!(take(bell.backend_event()), 1);
    drop((table, bell));
    assert!(watch.watched.lock().unwrap().is_empty(), "a doorbell that is gone is watched no more");
}

/// What a test does to a data path: counts, drops each third signal, delays the rest.
struct Lossy {
    seen: AtomicU64,
}

impl Interposer for Lossy {
    fn signalled(&self, count: u64) -> Verdict {
        match self.seen.fetch_add(count, Ordering::Relaxed) % 3 {
            2 => Verdict::Drop,
            1 => Verdict::Delay(Duration::from_millis(20)),
            _ => Verdict::Pass,
        }
    }
}

/// An interposer may hold signals back; ending the interposition lets go of them at once rather than losing them.
#[test]
fn held_signals_survive_the_interposer() {
    let relay = Relay::new().unwrap();
    let bell = Doorbell::new(&relay).unwrap();
    bell.interpose(Arc::new(Lossy { seen: AtomicU64::new(0) })).unwrap();
    for expected in 1..=3 {
        bell.ring();
        while bell.count().unwrap() < expected {
            thread::yield_now();
        }
    }
    assert_eq!(await_count(bell.backend_event(), 2), 2, "one passed, one came late, one was dropped");
    bell.ring();
    bell.ring();
    bell.make_direct().unwrap();
    assert!(await_count(bell.backend_event(), 1) >= 1);
    bell.nudge();
    assert_eq!(await_count(bell.backend_event(), 1), 1);
}
