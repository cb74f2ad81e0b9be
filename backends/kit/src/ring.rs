//! One running virtqueue: avail and used ring, chains, requests in flight, notifications.
//!
//! `virtio-queue` checks what the front end said of a ring. It does not drive it: its accessors look an address up in guest
//! memory for each index and entry, which was most of the cost of a short request. Here a ring is reached by pointers that
//! are checked at its start, see `areas.rs`; the rules by which it goes on are in `course.rs`, over words that may lie anywhere.

use std::sync::Arc;

use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use crate::areas::{Addresses, Areas};
use crate::chain::{Chain, ChainError};
use crate::course::{Beginning, Course, broken};
use crate::inflight::{InflightError, Part, Tracker};
use crate::step::{Sabotage, Step, step, strikes};

/// What a ring is told at its start.
#[derive(Debug)]
pub struct RingConfig {
    /// Its index.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Descriptor table.
    pub desc: GuestAddress,
    /// Avail ring.
    pub avail: GuestAddress,
    /// Used ring.
    pub used: GuestAddress,
    /// Index in the avail ring at which to start, as the front end gives it.
    pub base: u16,
    /// VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// The record of requests in flight, when the front end gave a region for it.
    pub tracker: Option<Tracker>,
    /// The device completes in the order of taking, so that no request has to be marked in that record.
    pub in_order: bool,
}

/// Why a ring cannot start or go on. The guest's driver or the front end is at fault; a new start mends it.
#[derive(Debug, Error)]
pub enum RingError {
    /// Size or addresses are impossible.
    #[error("queue {index}: {what}")]
    Config {
        /// The queue.
        index: u16,
        /// What is wrong.
        what: &'static str,
    },
    /// The region of requests in flight was refused.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// The front end's base fits neither the used index nor the requests in flight.
    #[error("queue {index}: base {base} fits neither the used index {used} nor {in_flight} requests in flight")]
    Base {
        /// The queue.
        index: u16,
        /// What the front end gave.
        base: u16,
        /// The used index in guest memory.
        used: u16,
        /// Requests in flight by the region.
        in_flight: u16,
    },
    /// The ring itself is damaged or out of memory.
    #[error("queue {index}: {reason}")]
    Broken {
        /// The queue.
        index: u16,
        /// What `virtio-queue` said.
        reason: String,
    },
    /// A head was made available while it was in flight.
    #[error("queue {index}: descriptor {head} was made available twice")]
    HeadTwice {
        /// The queue.
        index: u16,
        /// The head.
        head: u16,
    },
}

/// What [`Ring::take`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// Nothing.
    Empty,
    /// A request; the chain is filled.
    Request,
    /// A chain that makes no sense; it is empty, and to be completed with nothing written when its turn has come.
    Malformed(ChainError),
}

/// A running virtqueue.
#[derive(Debug)]
pub struct Ring<M: GuestMemory> {
    areas: Areas<M>,
    course: Course<Part>,
    indirect: bool,
    /// The descriptor that interrupts the guest; none when it polls.
    pub call: Option<EventFd>,
}

impl<M: GuestMemory> Ring<M> {
    /// Checks what the front end said against guest memory and the record of requests in flight, and starts.
    pub fn start(mem: Arc<M>, config: RingConfig) -> Result<Self, RingError> {
        let (index, size) = (config.index, config.size);
        let bad = |what| RingError::Config { index, what };
        let mut queue = Queue::new(size).map_err(|_| bad("its size is no power of two up to 32768"))?;
        queue.try_set_desc_table_address(config.desc).map_err(|_| bad("its descriptor table is misaligned"))?;
        queue.try_set_avail_ring_address(config.avail).map_err(|_| bad("its avail ring is misaligned"))?;
        queue.try_set_used_ring_address(config.used).map_err(|_| bad("its used ring is misaligned"))?;
        queue.set_ready(true);
        if !queue.is_valid(&*mem) {
            return Err(bad("its rings lie outside guest memory"));
        }
        let addresses = Addresses { size, desc: config.desc, avail: config.avail, used: config.used };
        let mut areas = Areas::find(mem, addresses);
        let used = areas.used_index().map_err(|e| broken(index, e))?;
        let RingConfig { base, event_idx, in_order, .. } = config;
        let beginning = Beginning { index, size, base, used, event_idx, in_order };
        let course = Course::begin(&mut areas, &beginning, config.tracker)?;
        Ok(Self { areas, course, indirect: config.indirect, call: None })
    }

    /// Guest memory, in which the ring and what its chains point to lie.
    #[inline]
    pub fn memory(&self) -> &Arc<M> {
        self.areas.memory()
    }

    /// Exchanges guest memory. A ring that does not lie in it breaks when it is touched next.
    pub fn set_memory(&mut self, mem: Arc<M>) {
        self.areas.exchange(mem);
    }

    /// A predecessor has served this ring: its last interrupt may have died with it.
    pub fn continued(&self) -> bool {
        self.course.continued()
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.areas.size()
    }

    /// Requests taken and not completed.
    pub fn in_flight(&self) -> u16 {
        self.course.in_flight()
    }

    /// Where a next owner of the ring has to go on, once nothing is in flight.
    pub fn next_avail(&self) -> u16 {
        self.course.next_avail()
    }

    /// Takes the next request: first those that a predecessor left, then what the guest made available.
    #[inline]
    pub fn take(&mut self, chain: &mut Chain) -> Result<Taken, RingError> {
        let Some(head) = self.course.take(&self.areas)? else { return Ok(Taken::Empty) };
        match chain.read(&self.areas, self.indirect, head) {
            Ok(()) => Ok(Taken::Request),
            Err(e) => Ok(Taken::Malformed(e)),
        }
    }

    /// Takes back that `head`, the last one, was taken ([`Course::put_back`]).
    pub fn put_back(&mut self, head: u16) {
        self.course.put_back(head);
    }

    /// Puts a finished request into the used ring. The guest hears of it from [`Ring::notify`].
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        self.complete_together(&[(head, written)])
    }

    /// Puts finished requests into the used ring together ([`Course::complete_together`]).
    pub fn complete_together(&mut self, done: &[(u16, u32)]) -> Result<(), RingError> {
        self.course.complete_together(&mut self.areas, done)
    }

    /// Takes back that `heads` were taken ([`Course::give_back`]).
    pub fn give_back(&mut self, heads: &[u16]) {
        self.course.give_back(heads);
    }

    /// Interrupts the guest when there is something new and it wants to know; once per batch. Whether it did.
    pub fn notify(&mut self) -> Result<bool, RingError> {
        let wanted = self.course.notify(&mut self.areas)?;
        if wanted {
            self.interrupt();
        }
        Ok(wanted)
    }

    /// How many finished requests the guest has not seen yet, where it says how far it has looked (EVENT_IDX).
    pub fn unseen(&self) -> Option<u16> {
        self.course.unseen(&self.areas)
    }

    /// Interrupts the guest without asking.
    pub fn interrupt(&self) {
        if self.course.continued() && strikes(Sabotage::ForgetCall) {
            return;
        }
        if let Some(call) = &self.call {
            // It fails only when 2^64 - 2 interrupts have not been taken.
            let _ = call.write(1);
            step(Step::Call);
        }
    }

    /// Asks the guest for a kick; true when it has made something available meanwhile.
    pub fn arm(&mut self) -> Result<bool, RingError> {
        self.course.arm(&mut self.areas)
    }

    /// Tells the guest that kicks are not needed (a hint; with EVENT_IDX it is so by itself).
    pub fn disarm(&mut self) -> Result<(), RingError> {
        self.course.disarm(&mut self.areas)
    }

    /// True when a request waits to be taken.
    pub fn waiting(&self) -> bool {
        self.course.waiting(&self.areas)
    }
}

#[cfg(test)]
mod tests;
