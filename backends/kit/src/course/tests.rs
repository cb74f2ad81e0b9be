//! Nobody sleeps while work waits: the real rules of both sides under every order of memory accesses that the language
//! allows, tried by loom. Without any one of the fences there is an order in which a wake-up is lost, and loom finds it.
//!
//! An eventfd is a flag that is taken. Whoever finds none sleeps; a wake-up is lost when there is still none after the other
//! side has done all that it had to do.

use std::sync::atomic::AtomicBool as Flag;

use loom::model::Builder;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use loom::thread;

use super::*;
use crate::inflight::Part;

const SIZE: u16 = 4;
/// What both sides share: the ring's words, and what wakes each.
struct Ring {
    event_idx: bool,
    avail_flags: AtomicU16,
    avail_index: AtomicU16,
    heads: [AtomicU16; SIZE as usize],
    used_event: AtomicU16,
    used_flags: AtomicU16,
    used_index: AtomicU16,
    elements: [AtomicU16; SIZE as usize],
    avail_event: AtomicU16,
    kick: Event,
    call: Event,
}

struct Event(AtomicBool);

impl Event {
    fn signal(&self) {
        // As one step: loom does not order a plain store and a swap that nothing else orders.
        self.0.swap(true, Ordering::AcqRel);
    }
    fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

/// Who leaves out its fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Careless {
    Nobody,
    Device,
    Driver,
}

struct DeviceSide {
    ring: Arc<Ring>,
    fences: bool,
}

fn slot(cells: &[AtomicU16; SIZE as usize], index: u16) -> &AtomicU16 {
    &cells[usize::from(index % SIZE)]
}

impl Shared for DeviceSide {
    fn avail_index(&self) -> Result<u16, OutOfRange> {
        Ok(self.ring.avail_index.load(Ordering::Acquire))
    }
    fn avail_flags(&self) -> Result<u16, OutOfRange> {
        Ok(self.ring.avail_flags.load(Ordering::Relaxed))
    }
    fn avail_head(&self, index: u16) -> Result<u16, OutOfRange> {
        Ok(slot(&self.ring.heads, index).load(Ordering::Relaxed))
    }
    fn used_event(&self) -> Result<u16, OutOfRange> {
        Ok(self.ring.used_event.load(Ordering::Relaxed))
    }
    fn set_used_index(&mut self, index: u16) -> Result<(), OutOfRange> {
        self.ring.used_index.store(index, Ordering::Release);
        Ok(())
    }
    fn set_used_flags(&mut self, flags: u16) -> Result<(), OutOfRange> {
        self.ring.used_flags.store(flags, Ordering::Relaxed);
        Ok(())
    }
    fn set_avail_event(&mut self, index: u16) -> Result<(), OutOfRange> {
        self.ring.avail_event.store(index, Ordering::Relaxed);
        Ok(())
    }
    fn set_used(&mut self, first: u16, done: &[(u16, u32)]) -> Result<(), OutOfRange> {
        for (number, (head, _)) in (first..).zip(done) {
            slot(&self.ring.elements, number).store(*head, Ordering::Relaxed);
        }
        Ok(())
    }
    fn fence(&self) {
        if self.fences {
            fence(Ordering::SeqCst);
        }
    }
}

struct DriverSide {
    ring: Arc<Ring>,
    fences: bool,
}

impl Words for DriverSide {
    type Error = OutOfRange;
    fn ask(&mut self, next: u16) -> Result<(), OutOfRange> {
        if self.ring.event_idx {
            self.ring.used_event.store(next, Ordering::Relaxed);
        } else {
            self.ring.avail_flags.store(0, Ordering::Relaxed);
        }
        Ok(())
    }
    fn wish(&self) -> Result<Wish, OutOfRange> {
        Ok(if self.ring.event_idx {
            Wish::Past(self.ring.avail_event.load(Ordering::Relaxed))
        } else {
            Wish::Always(self.ring.used_flags.load(Ordering::Relaxed) & NO_NOTIFY == 0)
        })
    }
    fn shown(&self) -> Result<u16, OutOfRange> {
        Ok(self.ring.used_index.load(Ordering::Acquire))
    }
    fn fence(&self) {
        if self.fences {
            fence(Ordering::SeqCst);
        }
    }
}

fn ring(event_idx: bool) -> Arc<Ring> {
    let word = || AtomicU16::new(0);
    let words = || [word(), word(), word(), word()];
    Arc::new(Ring {
        event_idx,
        avail_flags: AtomicU16::new(NO_INTERRUPT),
        avail_index: word(),
        heads: words(),
        // Nobody has asked for a call yet.
        used_event: AtomicU16::new(u16::MAX - SIZE),
        used_flags: word(),
        used_index: word(),
        elements: words(),
        avail_event: word(),
        kick: Event(AtomicBool::new(false)),
        call: Event(AtomicBool::new(false)),
    })
}

fn course(shared: &mut DeviceSide) -> Course<Part> {
    let event_idx = shared.ring.event_idx;
    let beginning = Beginning { index: 0, size: SIZE, base: 0, used: 0, event_idx, in_order: false };
    Course::begin(shared, &beginning, None).unwrap()
}

fn make_available(ring: &Ring, number: u16) {
    slot(&ring.heads, number).store(number, Ordering::Relaxed);
    ring.avail_index.store(number + 1, Ordering::Release);
}

/// What is tried: so many requests, each made available and completed by itself, and who leaves out a fence.
#[derive(Clone, Copy, Debug)]
struct Trial {
    requests: u16,
    event_idx: bool,
    careless: Careless,
}

/// Whether `run` loses a wake-up in any order.
fn in_any_order(trial: Trial, run: impl Fn() -> bool + Send + Sync + 'static) -> bool {
    let lost = std::sync::Arc::new(Flag::new(false));
    let found = std::sync::Arc::clone(&lost);
    let mut builder = Builder::new();
    // One request in all orders; of several those in which a thread is interrupted a few times.
    builder.preemption_bound = (trial.requests > 1).then_some(3);
    builder.check(move || {
        found.fetch_or(run(), Ordering::Relaxed);
    });
    lost.load(Ordering::Relaxed)
}

/// The driver makes requests available one by one and kicks where it is asked to; a queue's thread takes them, and sleeps
/// when there are none.
fn loses_a_kick(trial: Trial) -> bool {
    let Trial { requests, event_idx, careless } = trial;
    in_any_order(trial, move || {
        let ring = ring(event_idx);
        let mut shared = DeviceSide { ring: Arc::clone(&ring), fences: careless != Careless::Device };
        let mut course = course(&mut shared);
        let driver = DriverSide { ring: Arc::clone(&ring), fences: careless != Careless::Driver };
        let driver = thread::spawn(move || {
            for number in 0..requests {
                make_available(&driver.ring, number);
                if notification::is_to_be_woken(&driver, number, number + 1).unwrap() {
                    driver.ring.kick.signal();
                }
            }
        });
        let mut taken = 0;
        let sleeps = loop {
            while let Some(head) = course.take(&shared).unwrap() {
                assert_eq!(head, taken, "in the order of the ring");
                course.disarm(&mut shared).unwrap();
                taken += 1;
            }
            if taken == requests {
                break false;
            }
            if !course.arm(&mut shared).unwrap() && !ring.kick.take() {
                break true;
            }
        };
        driver.join().unwrap();
        sleeps && !ring.kick.take()
    })
}

/// A queue's thread completes requests one by one and calls where it is asked to; the driver takes them, and sleeps when
/// there are none.
fn loses_a_call(trial: Trial) -> bool {
    let Trial { requests, event_idx, careless } = trial;
    in_any_order(trial, move || {
        let ring = ring(event_idx);
        (0..requests).for_each(|number| make_available(&ring, number));
        let mut shared = DeviceSide { ring: Arc::clone(&ring), fences: careless != Careless::Device };
        let mut course = course(&mut shared);
        let device = thread::spawn(move || {
            while let Some(head) = course.take(&shared).unwrap() {
                course.complete_together(&mut shared, &[(head, 0)]).unwrap();
                if course.notify(&mut shared).unwrap() {
                    shared.ring.call.signal();
                }
            }
        });
        let mut driver = DriverSide { ring: Arc::clone(&ring), fences: careless != Careless::Driver };
        let mut next = 0;
        let sleeps = loop {
            while next < driver.shown().unwrap() {
                assert_eq!(slot(&ring.elements, next).load(Ordering::Relaxed), next, "written before the index");
                next += 1;
            }
            if next == requests {
                break false;
            }
            if !notification::ask_to_be_woken(&mut driver, next).unwrap() && !ring.call.take() {
                break true;
            }
        };
        device.join().unwrap();
        sleeps && !ring.call.take()
    })
}

fn trials(requests: u16, careless: Careless) -> impl Iterator<Item = Trial> {
    [true, false].into_iter().map(move |event_idx| Trial { requests, event_idx, careless })
}

#[test]
fn no_wake_up_is_lost() {
    for trial in trials(1, Careless::Nobody).chain(trials(2, Careless::Nobody)) {
        assert!(!loses_a_kick(trial), "a kick: {trial:?}");
        assert!(!loses_a_call(trial), "a call: {trial:?}");
    }
}

/// Each of the four fences is needed, in both ways of asking: without it there is an order that loses a wake-up, and it is
/// found.
#[test]
fn without_any_one_fence_a_wake_up_is_lost() {
    // Of the first request a kick is wanted from the start: it takes a second one.
    for trial in trials(2, Careless::Device).chain(trials(2, Careless::Driver)) {
        assert!(loses_a_kick(trial), "a kick: {trial:?}");
        assert!(loses_a_call(trial), "a call: {trial:?}");
    }
}
