//! Shadow rings: the VMM stands between a driver's rings and those that a backend sees, and so knows what is completed
//! whatever the backend keeps or does not keep (`track=shadow`); and may copy the requests themselves, so that the backend
//! sees nothing of the guest's memory (`isolation=copy`, [`copies`]).
//!
//! One thread for each device. What the driver makes available it notes and makes available to the backend; what the
//! backend completes it strikes out and completes for the driver. Kicks and calls pass it once a batch. When the backend
//! is gone, everything that it has published is carried over, and what is left is handed to its successor in fresh rings,
//! in the order in which the driver made it available; a request may be executed twice, it is never completed twice.
//!
//! What a backend completes is checked: it must be something that it has. A driver that gives the address of these rings
//! as that of a buffer can have the backend spoil them, and with them its own device and nothing else; not so where requests
//! are copied.
//!
//! Where the device is behind an IOMMU, a copy goes where the map leads while it is made. Who has changed the map waits for
//! the pass that may have begun before ([`Shadow::await_pass`]).

mod copies;
#[cfg(test)]
pub(super) mod copy_tests;
mod pool;
mod rings;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_devices::iommu::Fault;
use atoll_devices::virtio::QueueConfig;
use rustix::event::{PollFd, PollFlags, poll};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub(super) use copies::Terms;
pub(super) use rings::{Place, RingMemory};

use super::guest_ring::{GuestRing, RingFault};
use super::standin::Stock;
use super::window::Window;
use crate::doorbell::{borrowed, signal, take};
use crate::memory::GuestMemory;
use crate::seccomp::{self, ThreadClass};
use copies::{Carried, Copies};
use rings::{BackendFault, DriverRing};

/// Bytes for copies of one queue's requests. Linux makes none longer than two megabytes; only what is used is there.
pub(super) const ROOM: u64 = 16 << 20;
/// How often it is looked whether a pass is over.
const PASS_LOOK: Duration = Duration::from_micros(50);

const EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// One ring to shadow.
pub(super) struct ShadowRing {
    pub(super) queue: QueueConfig,
    /// What the driver signals.
    pub(super) kick: EventFd,
    /// What interrupts the driver.
    pub(super) call: EventFd,
    /// Where the last backend stopped.
    pub(super) stock: Stock,
    /// How its requests are copied, if they are. For all rings of a device or none.
    pub(super) copied: Option<Terms>,
}

/// What a backend is given instead of a driver's ring.
pub(super) struct Handed {
    pub(super) place: Place,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
}

/// What went wrong, and whose fault it is.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum ShadowFault {
    /// The backend is not to be believed any more.
    #[error("{0}")]
    Backend(String),
    /// The driver's ring is not served any more.
    #[error("{0}")]
    Driver(String),
}

impl From<BackendFault> for ShadowFault {
    fn from(fault: BackendFault) -> Self {
        Self::Backend(fault.to_string())
    }
}

impl From<RingFault> for ShadowFault {
    fn from(fault: RingFault) -> Self {
        Self::Driver(fault.to_string())
    }
}

/// One queue.
struct Lane {
    guest: GuestRing,
    back: DriverRing,
    /// What the driver signals, and what signals the backend.
    kicks: (EventFd, EventFd),
    /// What the backend signals.
    called: EventFd,
    /// What was taken and not completed, by head: when it came.
    out: Vec<Option<u64>>,
    counter: u64,
    /// Its requests, where they are copied.
    copies: Option<Copies>,
    /// Those that were taken and that the backend has not been handed yet: there was no room for copies.
    waiting: VecDeque<u16>,
}

impl Lane {
    /// Notes a head that was taken.
    fn note(&mut self, head: u16) -> Result<(), ShadowFault> {
        let queue = self.guest.index();
        let slot = self.out.get_mut(usize::from(head));
        let slot = slot.ok_or_else(|| ShadowFault::Driver(format!("queue {queue}: there is no descriptor {head}")))?;
        if slot.is_some() {
            return Err(ShadowFault::Driver(format!("queue {queue}: descriptor {head} was made available twice")));
        }
        *slot = Some(self.counter);
        self.counter += 1;
        self.waiting.push_back(head);
        Ok(())
    }

    /// Makes available to the backend what waits, as far as there is room; whether something was completed instead.
    fn hand(&mut self) -> Result<bool, ShadowFault> {
        let mut answered = false;
        while let Some(head) = self.waiting.front().copied() {
            let carried =
                self.copies.as_mut().map_or(Carried::Handed(head), |copies| copies.carry_in(&self.guest, head));
            match carried {
                Carried::Full => break,
                Carried::Handed(id) => self.back.push(id),
                Carried::Answered(written) => {
                    self.strike_out(head);
                    self.guest.complete(head, written)?;
                    answered = true;
                }
            }
            self.waiting.pop_front();
        }
        Ok(answered)
    }

    fn strike_out(&mut self, head: u16) -> Option<u64> {
        self.out.get_mut(usize::from(head)).and_then(Option::take)
    }

    /// From the driver to the backend, at most a ring full; whether something was completed for the driver.
    fn forward(&mut self) -> Result<bool, ShadowFault> {
        let mut any = self.hand()?;
        for _ in 0..self.guest.size() {
            if !self.waiting.is_empty() {
                break;
            }
            let Some(head) = self.guest.take()? else { break };
            self.note(head)?;
            any |= self.hand()?;
        }
        if self.back.publish() {
            signal(&self.kicks.1, 1);
        }
        Ok(any)
    }

    /// From the backend to the driver, at most a ring full; whether something was completed.
    fn backward(&mut self) -> Result<bool, ShadowFault> {
        let mut any = false;
        for _ in 0..self.guest.size() {
            let Some((id, written)) = self.back.pop()? else { break };
            let done = match &mut self.copies {
                Some(copies) => copies.carry_out(id, written),
                None => u16::try_from(id).ok().filter(|head| *head < self.guest.size()).map(|head| (head, written)),
            };
            let known = done.filter(|(head, _)| self.strike_out(*head).is_some());
            let Some((head, written)) = known else {
                return Err(BackendFault::Head { queue: self.guest.index(), head: id }.into());
            };
            self.guest.complete(head, written)?;
            any = true;
        }
        Ok(any)
    }

    /// What the backend has, when it is gone.
    fn stock(&self) -> Stock {
        let out = (0..).zip(&self.out).filter_map(|(head, since): (u16, _)| Some(((*since)?, head)));
        // By when they came.
        let out: BTreeMap<u64, u16> = out.collect();
        Stock { next_avail: self.guest.next_avail(), unfinished: out.into_values().collect() }
    }
}

struct Shared {
    /// Odd while the thread carries.
    pass: AtomicU64,
    /// Nothing is carried any more.
    halted: AtomicBool,
    /// The thread is to end.
    ending: AtomicBool,
    /// By which requests are copied.
    window: Option<Arc<Window>>,
    /// What interrupts the driver, by queue: it may be switched at any time.
    calls: Mutex<BTreeMap<u16, EventFd>>,
    fault: Mutex<Option<ShadowFault>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn interrupt(&self, queue: u16) {
        if let Some(call) = lock(&self.calls).get(&queue) {
            signal(call, 1);
        }
    }
}

/// A thread that shadows the rings of a device. Dropping it ends it.
pub(super) struct Shadow {
    shared: Arc<Shared>,
    memory: Arc<RingMemory>,
    order: EventFd,
    thread: Option<JoinHandle<Vec<Lane>>>,
}

impl Shadow {
    /// Takes the driver's rings, and makes others for a backend. `alarm` is signalled when [`Self::fault`] has something to
    /// tell.
    ///
    /// # Errors
    /// If there is no thread, descriptor or memory left, or a ring of the driver's cannot be right.
    pub(super) fn start(
        name: &str,
        memory: &GuestMemory,
        features: u64,
        rings: Vec<ShadowRing>,
        alarm: OwnedFd,
    ) -> io::Result<(Self, Vec<Handed>)> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let sizes: Vec<u16> = rings.iter().map(|ring| ring.queue.size).collect();
        let window = rings.iter().find_map(|ring| ring.copied.as_ref().map(|terms| Arc::clone(&terms.window)));
        let room = window.as_ref().map(|_| ROOM);
        let (ring_memory, places) = RingMemory::new(&sizes, memory.ranges(), room)?;
        let (mut lanes, mut handed, mut calls) = (Vec::new(), Vec::new(), BTreeMap::new());
        for (ring, place) in rings.into_iter().zip(places) {
            let ShadowRing { queue, kick, call, stock, copied } = ring;
            let guest =
                GuestRing::new(memory.mapped(), &queue, features, stock.next_avail).map_err(io::Error::other)?;
            let back = DriverRing::new(&ring_memory, place, queue.index, queue.size, features & EVENT_IDX != 0);
            let (to_backend, from_backend) = (event()?, event()?);
            let given = (to_backend.try_clone()?, from_backend.try_clone()?);
            handed.push(Handed { place, kick: given.0, call: given.1 });
            let copied = copied.zip(place.copies);
            let mut lane = Lane {
                guest,
                back,
                kicks: (kick, to_backend),
                called: from_backend,
                out: vec![None; usize::from(queue.size)],
                counter: 0,
                copies: copied.map(|(terms, place)| Copies::new(terms, &ring_memory, place, queue.size)),
                waiting: VecDeque::new(),
            };
            for head in stock.unfinished {
                lane.note(head).map_err(io::Error::other)?;
            }
            if lane.hand().map_err(io::Error::other)? {
                signal(&call, 1);
            }
            lane.back.publish();
            // Whatever it wants: it is new.
            signal(&lane.kicks.1, 1);
            calls.insert(queue.index, call);
            lanes.push(lane);
        }
        let shared = Arc::new(Shared {
            pass: AtomicU64::new(0),
            halted: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            window,
            calls: Mutex::new(calls),
            fault: Mutex::default(),
        });
        let order = event()?;
        let (told, heard) = (Arc::clone(&shared), order.try_clone()?);
        let thread = std::thread::Builder::new().name(format!("shadow-{name}"));
        let thread = thread.spawn(move || serve(lanes, &told, &heard, &alarm))?;
        Ok((Self { shared, memory: ring_memory, order, thread: Some(thread) }, handed))
    }

    /// Where the backend's rings are.
    pub(super) fn memory(&self) -> &Arc<RingMemory> {
        &self.memory
    }

    /// What has gone wrong since one asked last.
    pub(super) fn fault(&self) -> Option<ShadowFault> {
        lock(&self.shared.fault).take()
    }

    /// Accesses that the IOMMU has refused since one asked last.
    pub(super) fn refused(&self) -> Vec<Fault> {
        self.shared.window.as_ref().map(|window| window.refused()).unwrap_or_default()
    }

    /// Lets a queue interrupt the driver by another eventfd from now on.
    pub(super) fn set_call(&self, queue: u16, call: EventFd) {
        lock(&self.shared.calls).insert(queue, call);
    }

    /// Waits until nothing is carried that had begun before this was called; whether that came by `deadline`.
    pub(super) fn await_pass(&self, deadline: Instant) -> bool {
        let began = self.shared.pass.load(Ordering::SeqCst);
        while began % 2 == 1 && self.shared.pass.load(Ordering::SeqCst) == began {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(PASS_LOOK);
        }
        true
    }

    /// Carries nothing any more from the next pass on: the driver's rings are not where they were.
    pub(super) fn halt(&self) {
        self.shared.halted.store(true, Ordering::SeqCst);
        signal(&self.order, 1);
    }

    /// Ends it, when the backend touches its rings no more: what it has published is carried over. Gives for each queue
    /// what it had taken.
    pub(super) fn close(mut self) -> Vec<(u16, Stock)> {
        let mut lanes = self.finish();
        let halted = self.shared.halted.load(Ordering::SeqCst);
        for lane in lanes.iter_mut().filter(|_| !halted) {
            let carried = lane.backward();
            match carried.and_then(|any| Ok(any && lane.guest.wants_call()?)) {
                Ok(true) => self.shared.interrupt(lane.guest.index()),
                Ok(false) => {}
                // The backend is gone, and so is what it says.
                Err(fault) => tracing::debug!(%fault, "a ring that is left behind"),
            }
        }
        lanes.iter().map(|lane| (lane.guest.index(), lane.stock())).collect()
    }

    fn finish(&mut self) -> Vec<Lane> {
        self.shared.ending.store(true, Ordering::SeqCst);
        signal(&self.order, 1);
        // It only fails if the thread panicked, which its hook has reported.
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Carries both ways; whether there is more to do already.
fn pass(lane: &mut Lane, shared: &Shared) -> Result<bool, ShadowFault> {
    take(&lane.kicks.0);
    take(&lane.called);
    let answered = lane.forward()?;
    let completed = lane.backward()?;
    if (answered || completed) && lane.guest.wants_call()? {
        shared.interrupt(lane.guest.index());
    }
    // Both, whatever the first says.
    let (kicked, called) = (lane.guest.listen()?, lane.back.listen());
    // Who waits for room has it when the backend has completed something.
    Ok(called || if lane.waiting.is_empty() { kicked } else { completed })
}

/// The thread.
fn serve(mut lanes: Vec<Lane>, shared: &Shared, order: &EventFd, alarm: &OwnedFd) -> Vec<Lane> {
    seccomp::enter(ThreadClass::Events);
    // Lanes that are not served any more keep what they know.
    let mut blocked = vec![false; lanes.len()];
    loop {
        let mut more = false;
        shared.pass.fetch_add(1, Ordering::SeqCst);
        if shared.halted.load(Ordering::SeqCst) {
            blocked.fill(true);
        }
        for (lane, blocked) in lanes.iter_mut().zip(&mut blocked).filter(|(_, blocked)| !**blocked) {
            match pass(lane, shared) {
                Ok(busy) => more |= busy,
                Err(fault) => {
                    *blocked = true;
                    lock(&shared.fault).get_or_insert(fault);
                    // Fails only when the count is full, and then it is heard.
                    let _ = rustix::io::write(alarm, &1_u64.to_ne_bytes());
                }
            }
        }
        shared.pass.fetch_add(1, Ordering::SeqCst);
        if shared.window.as_ref().is_some_and(|window| window.has_refused()) {
            let _ = rustix::io::write(alarm, &1_u64.to_ne_bytes());
        }
        let mut fds = vec![PollFd::from_borrowed_fd(borrowed(order), PollFlags::IN)];
        for (lane, _) in lanes.iter().zip(&blocked).filter(|(_, blocked)| !**blocked) {
            fds.push(PollFd::from_borrowed_fd(borrowed(&lane.kicks.0), PollFlags::IN));
            fds.push(PollFd::from_borrowed_fd(borrowed(&lane.called), PollFlags::IN));
        }
        let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        // An error (a signal) is a wake-up like any other.
        let _ = poll(&mut fds, more.then_some(&at_once));
        drop(fds);
        // The signal first: one that comes after the look at what it announces must stay.
        take(order);
        if shared.ending.load(Ordering::SeqCst) {
            return lanes;
        }
    }
}
