//! One running virtqueue: avail and used ring (by `virtio-queue`), chains, requests in flight, notifications.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use crate::chain::{Chain, ChainError, Table};
use crate::inflight::{InflightError, Tracker};

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
    /// A chain that makes no sense; it has been given back unused.
    Malformed(ChainError),
}

/// A running virtqueue.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    queue: Queue,
    table: Table,
    tracker: Option<Tracker>,
    resubmit: VecDeque<u16>,
    taken: Vec<bool>,
    in_flight: u16,
    unannounced: bool,
    armed: bool,
    continued: bool,
    /// The descriptor that interrupts the guest; none when it polls.
    pub call: Option<EventFd>,
}

impl Ring {
    /// Checks what the front end said against guest memory and the record of requests in flight, and starts.
    pub fn start<M: GuestMemory>(mem: &M, config: RingConfig) -> Result<Self, RingError> {
        let index = config.index;
        let bad = |what| RingError::Config { index, what };
        let mut queue = Queue::new(config.size).map_err(|_| bad("its size is no power of two up to 32768"))?;
        queue.try_set_desc_table_address(config.desc).map_err(|_| bad("its descriptor table is misaligned"))?;
        queue.try_set_avail_ring_address(config.avail).map_err(|_| bad("its avail ring is misaligned"))?;
        queue.try_set_used_ring_address(config.used).map_err(|_| bad("its used ring is misaligned"))?;
        queue.set_event_idx(config.event_idx);
        queue.set_ready(true);
        if !queue.is_valid(mem) {
            return Err(bad("its rings lie outside guest memory"));
        }
        let used = queue.used_idx(mem, Ordering::Acquire).map_err(|e| broken(index, &e))?.0;
        queue.set_next_used(used);
        let mut tracker = config.tracker;
        let recovered = tracker.as_mut().map(|t| t.recover(used)).transpose()?.unwrap_or_default();
        let in_flight = recovered.resubmit.len() as u16;
        let after = used.wrapping_add(in_flight);
        // A front end that knows the region gives used + in flight; one that restarts from what is completed
        // (QEMU) gives the used index. Without requests in flight its word is final.
        let base = if in_flight == 0 {
            config.base
        } else if config.base == after || config.base == used {
            after
        } else {
            return Err(RingError::Base { index, base: config.base, used, in_flight });
        };
        queue.set_next_avail(base);
        // A predecessor may have died between the used ring and the interrupt, or between a write to the used
        // ring and its mark in the dirty log: say both again.
        let mut ring = Self {
            index,
            table: Table { addr: config.desc, size: config.size, indirect: config.indirect },
            queue,
            tracker,
            resubmit: recovered.resubmit.into(),
            taken: vec![false; usize::from(config.size)],
            in_flight: 0,
            unannounced: false,
            armed: true,
            continued: recovered.continued,
            call: None,
        };
        ring.touch_used(mem)?;
        Ok(ring)
    }

    fn touch_used<M: GuestMemory>(&mut self, mem: &M) -> Result<(), RingError> {
        let addr = GuestAddress(self.queue.used_ring() + 2);
        mem.store(self.queue.next_used().to_le(), addr, Ordering::Release)
            .map_err(|e| RingError::Broken { index: self.index, reason: e.to_string() })
    }

    /// A predecessor has served this ring: its last interrupt may have died with it.
    pub fn continued(&self) -> bool {
        self.continued
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.table.size
    }

    /// Requests taken and not completed.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Where a next owner of the ring has to go on, once nothing is in flight.
    pub fn next_avail(&self) -> u16 {
        // What was in flight before and has not been taken again goes back to the next owner.
        self.queue.next_avail().wrapping_sub(self.resubmit.len() as u16)
    }

    /// Takes the next request: first those that a predecessor left, then what the guest made available.
    pub fn take<M: GuestMemory>(&mut self, mem: &M, chain: &mut Chain) -> Result<Taken, RingError> {
        let head = match self.resubmit.pop_front() {
            Some(head) => head,
            None => {
                let index = self.index;
                let next = self.queue.iter(mem).map_err(|e| broken(index, &e))?.next();
                let Some(head) = next.map(|c| c.head_index()) else { return Ok(Taken::Empty) };
                match self.taken.get(usize::from(head)) {
                    None => return Err(RingError::Config { index, what: "a head lies outside the ring" }),
                    Some(true) => return Err(RingError::HeadTwice { index, head }),
                    Some(false) => {}
                }
                if let Some(tracker) = &mut self.tracker {
                    tracker.take(head);
                }
                head
            }
        };
        if let Some(taken) = self.taken.get_mut(usize::from(head)) {
            *taken = true;
        }
        self.in_flight += 1;
        match chain.read(mem, self.table, head) {
            Ok(()) => Ok(Taken::Request),
            Err(e) => {
                self.complete(mem, head, 0)?;
                Ok(Taken::Malformed(e))
            }
        }
    }

    /// Puts a finished request into the used ring. The guest hears of it from [`Ring::notify`].
    pub fn complete<M: GuestMemory>(&mut self, mem: &M, head: u16, written: u32) -> Result<(), RingError> {
        if let Some(tracker) = &mut self.tracker {
            tracker.completing(head);
        }
        self.queue.add_used(mem, head, written).map_err(|e| broken(self.index, &e))?;
        if let Some(tracker) = &mut self.tracker {
            tracker.completed(head, self.queue.next_used());
        }
        if let Some(taken) = self.taken.get_mut(usize::from(head)) {
            *taken = false;
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        self.unannounced = true;
        Ok(())
    }

    /// Interrupts the guest when there is something new and it wants to know; once per batch.
    pub fn notify<M: GuestMemory>(&mut self, mem: &M) -> Result<(), RingError> {
        if !self.unannounced {
            return Ok(());
        }
        self.unannounced = false;
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(mem).map_err(|e| broken(self.index, &e))?
        } else {
            const NO_INTERRUPT: u16 = 1;
            let flags: u16 = mem
                .load(GuestAddress(self.queue.avail_ring()), Ordering::SeqCst)
                .map_err(|e| RingError::Broken { index: self.index, reason: e.to_string() })?;
            u16::from_le(flags) & NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt();
        }
        Ok(())
    }

    /// Interrupts the guest without asking.
    pub fn interrupt(&self) {
        if let Some(call) = &self.call {
            // It fails only when 2^64 - 2 interrupts have not been taken.
            let _ = call.write(1);
        }
    }

    /// Asks the guest for a kick; true when it has made something available meanwhile.
    pub fn arm<M: GuestMemory>(&mut self, mem: &M) -> Result<bool, RingError> {
        self.armed = true;
        self.queue.enable_notification(mem).map_err(|e| broken(self.index, &e))
    }

    /// Tells the guest that kicks are not needed (a hint; with EVENT_IDX it is so by itself).
    pub fn disarm<M: GuestMemory>(&mut self, mem: &M) -> Result<(), RingError> {
        if std::mem::take(&mut self.armed) {
            self.queue.disable_notification(mem).map_err(|e| broken(self.index, &e))?;
        }
        Ok(())
    }

    /// True when a request waits to be taken.
    pub fn waiting<M: GuestMemory>(&self, mem: &M) -> bool {
        !self.resubmit.is_empty()
            || self.queue.avail_idx(mem, Ordering::Acquire).is_ok_and(|idx| idx.0 != self.queue.next_avail())
    }
}

fn broken(index: u16, error: &virtio_queue::Error) -> RingError {
    RingError::Broken { index, reason: error.to_string() }
}
