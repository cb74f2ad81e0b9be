//! The stand-in: who takes the rings of a device that no backend serves any more.
//!
//! Stock drivers ignore DEVICE_NEEDS_RESET and wait for their requests for ever, and with them whatever the guest does
//! next, an unplug or a reboot included. So somebody must answer. A [`StandIn`] is one thread, which first answers what
//! the dead backend had taken and not completed, in the order in which it was taken and each exactly once, and then what
//! the driver asks from then on, as [`Trade`] says. It ends on order and leaves rings in which nothing is in flight, where
//! any backend can go on. [`settle`] does the first half only: the next backend goes on behind what is answered.
//!
//! It is given rings after the fence: nothing of the dead backend is written any more. What a driver has done to a ring
//! that cannot be right ends its service, and the others go on. Behind an IOMMU it reaches requests by the map, like the
//! backend in whose place it is ([`Window`]); a change of the map ends it, and another one goes on by the new map, so that
//! nothing is written by an old one after the guest has heard that it is gone.

mod record;
mod trade;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use atoll_devices::iommu;
use atoll_devices::virtio::QueueConfig;
use rustix::event::{PollFd, PollFlags, poll};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use record::{RecordError, unfinished};

pub(super) use record::settle as settle_record;
pub(super) use trade::{Answer, Trade};

use super::guest_ring::{GuestRing, RingFault};
use super::window::Window;
use crate::doorbell::{borrowed, signal, take};
use crate::seccomp::{self, ThreadClass};

#[cfg(test)]
mod tests;

/// What a dead backend had taken of a ring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stock {
    /// The entry of the available ring that it would have taken next.
    pub(super) next_avail: u16,
    /// Heads that it has not completed, in the order in which it took them.
    pub(super) unfinished: Vec<u16>,
}

/// One ring for a stand-in.
pub(super) struct StandInRing {
    pub(super) queue: QueueConfig,
    /// What the driver signals.
    pub(super) kick: EventFd,
    /// What interrupts the driver.
    pub(super) call: EventFd,
    pub(super) stock: Stock,
}

/// Everything that a stand-in gets.
pub(super) struct StandInParts {
    /// The device's name: its thread is named after it.
    pub(super) name: String,
    /// Where the rings are.
    pub(super) memory: Arc<GuestMemoryMmap>,
    /// What is reached by the addresses in their descriptors.
    pub(super) window: Arc<Window>,
    /// What the driver accepted.
    pub(super) features: u64,
    pub(super) trade: Trade,
    pub(super) rings: Vec<StandInRing>,
}

/// A ring that is being served.
struct Desk {
    ring: GuestRing,
    window: Arc<Window>,
    answer: Answer,
    kick: EventFd,
    call: EventFd,
    answered: u64,
}

impl Desk {
    fn open(room: &Room, ring: StandInRing, answer: Answer) -> Result<Self, Fault> {
        let StandInRing { queue, kick, call, stock } = ring;
        let ring = GuestRing::new(&room.memory, &queue, room.features, stock.next_avail)?;
        let mut desk = Self { ring, window: Arc::clone(&room.window), answer, kick, call, answered: 0 };
        for head in stock.unfinished {
            desk.answer(head)?;
        }
        // The last call of the dead backend may have died with it.
        desk.ring.wants_call()?;
        signal(&desk.call, 1);
        Ok(desk)
    }

    fn answer(&mut self, head: u16) -> Result<(), RingFault> {
        let chain = self.ring.chain_by(self.window.as_ref(), head);
        let written = self.answer.write(self.window.as_ref(), chain.as_ref());
        self.ring.complete(head, written)?;
        self.answered += 1;
        Ok(())
    }

    /// Answers what is there, at most a ring full; whether there may be more.
    fn serve(&mut self) -> Result<bool, RingFault> {
        take(&self.kick);
        let mut answered = 0;
        while answered < self.ring.size() {
            let Some(head) = self.ring.take()? else { break };
            self.answer(head)?;
            answered += 1;
        }
        if answered > 0 && self.ring.wants_call()? {
            signal(&self.call, 1);
        }
        self.ring.listen()
    }
}

/// Why a ring is not served.
type Fault = RingFault;

/// What the desks have in common.
struct Room {
    memory: Arc<GuestMemoryMmap>,
    window: Arc<Window>,
    features: u64,
}

/// Opens the rings to which there is something to say. Says what it found wrong with others in the log.
fn open(name: &str, room: &Room, rings: impl IntoIterator<Item = (StandInRing, Answer)>) -> Vec<Desk> {
    let desks = rings.into_iter().filter(|(_, answer)| *answer != Answer::Leave);
    desks
        .filter_map(|(ring, answer)| {
            let opened = Desk::open(room, ring, answer);
            opened.map_err(|fault| tracing::warn!(device = name, %fault, "a ring cannot be served")).ok()
        })
        .collect()
}

fn bases(desks: &[Desk]) -> Vec<(u16, u16)> {
    desks.iter().map(|desk| (desk.ring.index(), desk.ring.next_avail())).collect()
}

/// Answers what a dead backend has not finished, once; what comes behind it is for the next backend. Gives each queue with
/// the entry to go on with.
///
/// # Errors
/// When there is a queue with unfinished requests of which nobody can tell what to say to them. Nothing was said then.
pub(super) fn settle(parts: StandInParts) -> Result<Vec<(u16, u16)>, u16> {
    let StandInParts { name, memory, window, features, trade, rings } = parts;
    let room = Room { memory, window, features };
    let mut judged = Vec::new();
    for ring in rings {
        let answer = match trade.verdict(ring.queue.index) {
            Some(answer) => answer,
            None if ring.stock.unfinished.is_empty() => continue,
            None => return Err(ring.queue.index),
        };
        judged.push((ring, answer));
    }
    let count: usize = judged.iter().map(|(ring, _)| ring.stock.unfinished.len()).sum();
    let mut desks = open(&name, &room, judged);
    // The dead backend had asked for a kick at an entry that is behind now, and a successor that finds nothing to do may
    // leave it at that.
    desks.retain_mut(|desk| desk.ring.listen().is_ok());
    tracing::warn!(device = name, requests = count, "requests that a dead backend had not finished are given up");
    Ok(bases(&desks))
}

/// A thread that answers for a device. Dropping it ends it.
pub(super) struct StandIn {
    order: EventFd,
    window: Arc<Window>,
    thread: Option<JoinHandle<Vec<(u16, u16)>>>,
}

impl StandIn {
    /// Starts to answer. `alarm` is signalled when [`Self::refused`] has something to say.
    ///
    /// # Errors
    /// If there is no thread or descriptor left.
    pub(super) fn start(parts: StandInParts, alarm: OwnedFd) -> io::Result<Self> {
        let order = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let heard = order.try_clone()?;
        let thread = std::thread::Builder::new().name(format!("standin-{}", parts.name));
        let window = Arc::clone(&parts.window);
        let thread = thread.spawn(move || stand_in(parts, &heard, &alarm))?;
        Ok(Self { order, window, thread: Some(thread) })
    }

    /// Accesses that the IOMMU has refused since one asked last.
    pub(super) fn refused(&self) -> Vec<iommu::Fault> {
        self.window.refused()
    }

    /// Ends it. Gives each queue that it has served with the entry to go on with, which is its used index: nothing is in
    /// flight. The others are as they were.
    pub(super) fn stop(mut self) -> Vec<(u16, u16)> {
        self.end()
    }

    fn end(&mut self) -> Vec<(u16, u16)> {
        signal(&self.order, 1);
        // It only fails if the thread panicked, which its hook has reported.
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.end();
    }
}

/// The thread.
fn stand_in(parts: StandInParts, order: &EventFd, alarm: &OwnedFd) -> Vec<(u16, u16)> {
    seccomp::enter(ThreadClass::Events);
    let StandInParts { name, memory, window, features, trade, rings } = parts;
    let room = Room { memory, window, features };
    let judged = rings.into_iter().map(|ring| {
        let answer = trade.answer(ring.queue.index);
        (ring, answer)
    });
    let mut desks = open(&name, &room, judged);
    let unfinished: u64 = desks.iter().map(|desk| desk.answered).sum();
    tracing::info!(device = name, queues = desks.len(), unfinished, "a stand-in answers for the device");
    loop {
        let mut more = false;
        desks.retain_mut(|desk| match desk.serve() {
            Ok(busy) => {
                more |= busy;
                true
            }
            Err(fault) => {
                tracing::warn!(device = name, %fault, "a ring is not served any more");
                false
            }
        });
        if room.window.has_refused() {
            // Full: it is awake, or will be.
            let _ = rustix::io::write(alarm, &1_u64.to_ne_bytes());
        }
        let mut fds: Vec<PollFd> = vec![PollFd::from_borrowed_fd(borrowed(order), PollFlags::IN)];
        fds.extend(desks.iter().map(|desk| PollFd::from_borrowed_fd(borrowed(&desk.kick), PollFlags::IN)));
        let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        // An error (a signal) is a wake-up like any other.
        let _ = poll(&mut fds, more.then_some(&at_once));
        if fds.first().is_some_and(|order| !order.revents().is_empty()) {
            break;
        }
    }
    let answered: u64 = desks.iter().map(|desk| desk.answered).sum();
    tracing::info!(device = name, answered, "the stand-in goes");
    bases(&desks)
}
