//! One running virtqueue: avail and used ring, chains, requests in flight, notifications.
//!
//! `virtio-queue` checks what the front end said of a ring. It does not drive it: its accessors look an address up in guest
//! memory for each index and entry, which was most of the cost of a short request. Here a ring is reached by pointers that
//! are checked at its start, see `areas.rs`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use crate::areas::{Addresses, Areas};
use crate::chain::{Chain, ChainError};
use crate::inflight::{InflightError, Tracker};
use crate::memory::OutOfRange;
use crate::step::{Sabotage, Step, step, strikes};

/// Entries of the avail ring that are read together.
const HEADS_MAX: usize = 32;

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
    index: u16,
    areas: Areas<M>,
    event_idx: bool,
    indirect: bool,
    in_order: bool,
    tracker: Option<Tracker>,
    resubmit: VecDeque<u16>,
    taken: Vec<bool>,
    in_flight: u16,
    next_avail: u16,
    next_used: u16,
    /// The used index when the guest was last told of it, or last chose not to be.
    announced: u16,
    armed: bool,
    continued: bool,
    /// The avail index as it was read last.
    avail_seen: u16,
    /// Heads that were read together, the next one last: the guest goes on writing into the same cache line, which is
    /// then fetched once for many.
    heads: Vec<u16>,
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
        let areas = Areas::find(mem, addresses);
        let used = areas.used_index().map_err(|e| broken(index, e))?;
        let mut tracker = config.tracker;
        let recover = |t: &mut Tracker| if config.in_order { t.recover_in_order(used) } else { t.recover(used) };
        let recovered = tracker.as_mut().map(recover).transpose()?.unwrap_or_default();
        let in_flight = recovered.resubmit.len() as u16;
        let after = used.wrapping_add(in_flight);
        // A front end that knows the region gives used + in flight; one that restarts from what is completed
        // (QEMU) gives the used index. Without requests in flight its word is final.
        let base = if in_flight == 0 {
            config.base
        } else if config.base != after && config.base != used {
            return Err(RingError::Base { index, base: config.base, used, in_flight });
        } else if config.in_order {
            used
        } else {
            after
        };
        let base = base.wrapping_add(u16::from(in_flight > 0 && strikes(Sabotage::ReplayElsewhere)));
        let ring = Self {
            index,
            areas,
            event_idx: config.event_idx,
            indirect: config.indirect,
            in_order: config.in_order,
            tracker,
            resubmit: if config.in_order { VecDeque::new() } else { recovered.resubmit.into() },
            taken: vec![false; usize::from(size)],
            in_flight: 0,
            next_avail: base,
            next_used: used,
            announced: used,
            armed: true,
            continued: recovered.continued,
            avail_seen: base,
            heads: Vec::with_capacity(HEADS_MAX),
            call: None,
        };
        // A predecessor may have died between the used ring and the interrupt, or between a write to the used
        // ring and its mark in the dirty log: say both again.
        ring.areas.set_used_index(used).map_err(|e| broken(index, e))?;
        Ok(ring)
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
        self.continued
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.areas.size()
    }

    /// Requests taken and not completed.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Where a next owner of the ring has to go on, once nothing is in flight.
    pub fn next_avail(&self) -> u16 {
        // What was in flight before and has not been taken again goes back to the next owner.
        self.next_avail.wrapping_sub(self.resubmit.len() as u16)
    }

    /// Takes the next request: first those that a predecessor left, then what the guest made available.
    #[inline]
    pub fn take(&mut self, chain: &mut Chain) -> Result<Taken, RingError> {
        let index = self.index;
        let again = if self.resubmit.is_empty() { None } else { self.resubmit.pop_front() };
        let head = match again {
            Some(head) => {
                step(Step::Replay);
                head
            }
            None => {
                let Some(head) = self.next_head()? else { return Ok(Taken::Empty) };
                match self.taken.get(usize::from(head)) {
                    None => return Err(RingError::Config { index, what: "a head lies outside the ring" }),
                    Some(true) => return Err(RingError::HeadTwice { index, head }),
                    Some(false) => {}
                }
                step(Step::Fetch);
                if !self.in_order
                    && let Some(tracker) = &mut self.tracker
                {
                    tracker.take(head);
                }
                step(Step::Mark);
                head
            }
        };
        if let Some(taken) = self.taken.get_mut(usize::from(head)) {
            *taken = true;
        }
        self.in_flight += 1;
        match chain.read(&self.areas, self.indirect, head) {
            Ok(()) => Ok(Taken::Request),
            Err(e) => Ok(Taken::Malformed(e)),
        }
    }

    /// The next head in the avail ring. Its index, which the guest writes for each batch, is read only when what it said
    /// last has been taken.
    #[inline]
    fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        let (index, next) = (self.index, self.next_avail);
        if next == self.avail_seen {
            let seen = self.areas.avail_index().map_err(|e| broken(index, e))?;
            if seen.wrapping_sub(next) > self.size() {
                return Err(RingError::Config { index, what: "its avail index is further on than the ring is long" });
            }
            self.avail_seen = seen;
            if seen == next {
                return Ok(None);
            }
        }
        if self.heads.is_empty() {
            let count = self.avail_seen.wrapping_sub(next).min(HEADS_MAX as u16);
            for number in (0..count).rev() {
                self.heads.push(self.areas.avail_head(next.wrapping_add(number)).map_err(|e| broken(index, e))?);
            }
        }
        self.next_avail = next.wrapping_add(1);
        Ok(self.heads.pop())
    }

    /// Takes back that `head`, the last one, was taken: it is the next one to be taken. For the record of requests in
    /// flight it stays taken, so that a successor takes it in its turn.
    pub fn put_back(&mut self, head: u16) {
        if let Some(taken) = self.taken.get_mut(usize::from(head)) {
            *taken = false;
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        self.resubmit.push_front(head);
    }

    /// Puts a finished request into the used ring. The guest hears of it from [`Ring::notify`].
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        self.complete_together(&[(head, written)])
    }

    /// Puts finished requests, each a head and the bytes written, into the used ring with one step of its index: the
    /// guest sees all of them or none, also when this process dies in between. At most a ring full.
    pub fn complete_together(&mut self, done: &[(u16, u32)]) -> Result<(), RingError> {
        let (index, size) = (self.index, self.size());
        if done.len() > usize::from(size) || done.iter().any(|(head, _)| *head >= size) {
            return Err(RingError::Config { index, what: "a head lies outside the ring" });
        }
        let marks = if self.in_order { None } else { self.tracker.as_mut() };
        if let Some(tracker) = marks {
            done.iter().for_each(|(head, _)| tracker.completing(*head));
        }
        self.areas.set_used(self.next_used, done).map_err(|e| broken(index, e))?;
        step(Step::UsedElement);
        let next = self.next_used.wrapping_add(done.len() as u16);
        self.areas.set_used_index(next).map_err(|e| broken(index, e))?;
        step(Step::UsedIndex);
        self.next_used = next;
        match &mut self.tracker {
            Some(tracker) if self.in_order => tracker.settled(next),
            Some(tracker) => tracker.completed(done.iter().map(|(head, _)| *head), next),
            None => {}
        }
        step(Step::Unmarked);
        for (head, _) in done {
            if let Some(taken) = self.taken.get_mut(usize::from(*head)) {
                *taken = false;
            }
        }
        self.in_flight = self.in_flight.saturating_sub(done.len() as u16);
        Ok(())
    }

    /// Takes back that `heads` were taken, the last ones first: they, and what a predecessor left and nobody has taken
    /// yet, are available again for the next owner of the ring. Only for a device that completes in order.
    pub fn give_back(&mut self, heads: &[u16]) {
        let again = heads.iter().copied().chain(std::mem::take(&mut self.resubmit));
        let again: Vec<u16> = again.collect();
        for head in again.iter().rev() {
            if let Some(tracker) = &mut self.tracker {
                tracker.give_back(*head);
            }
            if let Some(taken) = self.taken.get_mut(usize::from(*head)) {
                *taken = false;
            }
        }
        self.in_flight = self.in_flight.saturating_sub(heads.len() as u16);
        self.next_avail = self.next_avail.wrapping_sub(again.len() as u16);
        self.avail_seen = self.next_avail;
        self.heads.clear();
    }

    /// Interrupts the guest when there is something new and it wants to know; once per batch. Whether it did.
    pub fn notify(&mut self) -> Result<bool, RingError> {
        let used = self.next_used;
        let before = std::mem::replace(&mut self.announced, used);
        if used == before {
            return Ok(false);
        }
        // What was put into the used ring must be seen before the guest's wish is read.
        fence(Ordering::SeqCst);
        let failed = |e| broken(self.index, e);
        let wanted = if self.event_idx {
            let event = self.areas.used_event().map_err(failed)?;
            used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before)
        } else {
            const NO_INTERRUPT: u16 = 1;
            self.areas.avail_flags().map_err(failed)? & NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt();
        }
        Ok(wanted)
    }

    /// How many finished requests the guest has not seen yet, where it says how far it has looked (EVENT_IDX).
    pub fn unseen(&self) -> Option<u16> {
        let event = self.event_idx.then(|| self.areas.used_event().ok())??;
        Some(self.next_used.wrapping_sub(event)).filter(|unseen| *unseen <= self.size())
    }

    /// Interrupts the guest without asking.
    pub fn interrupt(&self) {
        if self.continued && strikes(Sabotage::ForgetCall) {
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
        self.armed = true;
        let failed = |e| broken(self.index, e);
        if self.event_idx {
            self.areas.set_avail_event(self.next_avail).map_err(failed)?;
        } else {
            self.areas.set_used_flags(0).map_err(failed)?;
        }
        // The wish must be seen before it is looked whether the guest has been faster.
        fence(Ordering::SeqCst);
        Ok(self.areas.avail_index().map_err(failed)? != self.next_avail)
    }

    /// Tells the guest that kicks are not needed (a hint; with EVENT_IDX it is so by itself).
    pub fn disarm(&mut self) -> Result<(), RingError> {
        const NO_NOTIFY: u16 = 1;
        if std::mem::take(&mut self.armed) && !self.event_idx {
            self.areas.set_used_flags(NO_NOTIFY).map_err(|e| broken(self.index, e))?;
        }
        Ok(())
    }

    /// True when a request waits to be taken.
    pub fn waiting(&self) -> bool {
        !self.resubmit.is_empty() || self.areas.avail_index().is_ok_and(|seen| seen != self.next_avail)
    }
}

fn broken(index: u16, _: OutOfRange) -> RingError {
    RingError::Broken { index, reason: "it lies outside guest memory".to_owned() }
}

#[cfg(test)]
mod tests;
