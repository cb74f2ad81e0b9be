//! How a running virtqueue goes on: what is taken, what is completed, when to wake the guest and when to sleep.
//!
//! These are the rules of [`Ring`](crate::ring::Ring) without its memory: what the guest shares is behind [`Shared`], the
//! record of requests in flight behind [`Record`]. So the same code that serves guests is tried under every interleaving:
//! with loom for the order of memory accesses, and, together with the front end's recovery, in a model in which a process
//! dies between any two of its writes.

use std::collections::VecDeque;

use atoll_devices::virtio::notification::{self, Wish, Words};

use crate::inflight::{Record, Tracker};
use crate::memory::OutOfRange;
use crate::ring::RingError;
use crate::step::{Sabotage, Step, step, strikes};

/// Entries of the avail ring that are read together.
const HEADS_MAX: usize = 32;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// The words of a ring that guest and device share.
pub trait Shared {
    /// How far the guest has made requests available. What it wrote before is seen after it.
    ///
    /// # Errors
    /// Outside guest memory; so too below.
    fn avail_index(&self) -> Result<u16, OutOfRange>;
    /// The guest's flags: whether it wants interrupts, without EVENT_IDX.
    fn avail_flags(&self) -> Result<u16, OutOfRange>;
    /// The head that was made available as number `index`.
    fn avail_head(&self, index: u16) -> Result<u16, OutOfRange>;
    /// After which used index the guest wants an interrupt, with EVENT_IDX.
    fn used_event(&self) -> Result<u16, OutOfRange>;
    /// Says that everything before `index` is in the used ring. What was written before is seen before it.
    fn set_used_index(&mut self, index: u16) -> Result<(), OutOfRange>;
    /// Tells the guest whether kicks are wanted, without EVENT_IDX.
    fn set_used_flags(&mut self, flags: u16) -> Result<(), OutOfRange>;
    /// Tells the guest after which avail index a kick is wanted, with EVENT_IDX.
    fn set_avail_event(&mut self, index: u16) -> Result<(), OutOfRange>;
    /// Writes entries (head, bytes written) of the used ring, from number `first` on.
    fn set_used(&mut self, first: u16, done: &[(u16, u32)]) -> Result<(), OutOfRange>;
    /// A full fence.
    #[inline]
    fn fence(&self) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

/// The device's view of the words by which it and the guest wake each other.
struct Device<'a, S> {
    shared: &'a mut S,
    event_idx: bool,
}

impl<S: Shared> Words for Device<'_, S> {
    type Error = OutOfRange;
    #[inline]
    fn ask(&mut self, next: u16) -> Result<(), OutOfRange> {
        if self.event_idx { self.shared.set_avail_event(next) } else { self.shared.set_used_flags(0) }
    }
    #[inline]
    fn wish(&self) -> Result<Wish, OutOfRange> {
        Ok(if self.event_idx {
            Wish::Past(self.shared.used_event()?)
        } else {
            Wish::Always(self.shared.avail_flags()? & NO_INTERRUPT == 0)
        })
    }
    #[inline]
    fn shown(&self) -> Result<u16, OutOfRange> {
        self.shared.avail_index()
    }
    #[inline]
    fn fence(&self) {
        self.shared.fence();
    }
}

/// What a course begins with.
#[derive(Debug, Clone, Copy)]
pub struct Beginning {
    /// The queue.
    pub index: u16,
    /// Entries of the ring.
    pub size: u16,
    /// Index in the avail ring at which to start, as the front end gives it.
    pub base: u16,
    /// The used index in guest memory.
    pub used: u16,
    /// VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// The device completes in the order of taking, so that no request has to be marked in the record.
    pub in_order: bool,
}

/// Where one running virtqueue is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Course<R> {
    index: u16,
    size: u16,
    event_idx: bool,
    in_order: bool,
    tracker: Option<Tracker<R>>,
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
}

impl<R: Record> Course<R> {
    /// Starts, or goes on where a predecessor's record says.
    ///
    /// # Errors
    /// When the record, the used index and the front end's base do not fit together.
    pub fn begin(
        shared: &mut impl Shared,
        beginning: &Beginning,
        mut tracker: Option<Tracker<R>>,
    ) -> Result<Self, RingError> {
        let Beginning { index, size, used, event_idx, in_order, .. } = *beginning;
        let recover = |t: &mut Tracker<R>| if in_order { t.recover_in_order(used) } else { t.recover(used) };
        let recovered = tracker.as_mut().map(recover).transpose()?.unwrap_or_default();
        let in_flight = recovered.resubmit.len() as u16;
        let after = used.wrapping_add(in_flight);
        // A front end that knows the region gives used + in flight; one that restarts from what is completed
        // (QEMU) gives the used index. Without requests in flight its word is final.
        let base = if in_flight == 0 {
            beginning.base
        } else if beginning.base != after && beginning.base != used {
            return Err(RingError::Base { index, base: beginning.base, used, in_flight });
        } else if in_order {
            used
        } else {
            after
        };
        let base = base.wrapping_add(u16::from(in_flight > 0 && strikes(Sabotage::ReplayElsewhere)));
        let course = Self {
            index,
            size,
            event_idx,
            in_order,
            tracker,
            resubmit: if in_order { VecDeque::new() } else { recovered.resubmit.into() },
            taken: vec![false; usize::from(size)],
            in_flight: 0,
            next_avail: base,
            next_used: used,
            announced: used,
            armed: true,
            continued: recovered.continued,
            avail_seen: base,
            heads: Vec::with_capacity(HEADS_MAX),
        };
        // A predecessor may have died between the used ring and the interrupt, or between a write to the used
        // ring and its mark in the dirty log: say both again.
        shared.set_used_index(used).map_err(|e| broken(index, e))?;
        Ok(course)
    }

    /// A predecessor has served this ring: its last interrupt may have died with it.
    pub fn continued(&self) -> bool {
        self.continued
    }

    /// The queue.
    pub fn index(&self) -> u16 {
        self.index
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

    /// Gives the record away.
    pub fn into_record(self) -> Option<R> {
        self.tracker.map(Tracker::into_record)
    }

    /// Takes the head of the next request: first those that a predecessor left, then what the guest made available.
    #[inline]
    pub fn take(&mut self, shared: &impl Shared) -> Result<Option<u16>, RingError> {
        let index = self.index;
        let again = if self.resubmit.is_empty() { None } else { self.resubmit.pop_front() };
        let head = match again {
            Some(head) => {
                step(Step::Replay);
                head
            }
            None => {
                let Some(head) = self.next_head(shared)? else { return Ok(None) };
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
        Ok(Some(head))
    }

    /// The next head in the avail ring. Its index, which the guest writes for each batch, is read only when what it said
    /// last has been taken.
    #[inline]
    fn next_head(&mut self, shared: &impl Shared) -> Result<Option<u16>, RingError> {
        let (index, next) = (self.index, self.next_avail);
        if next == self.avail_seen {
            let seen = shared.avail_index().map_err(|e| broken(index, e))?;
            if seen.wrapping_sub(next) > self.size {
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
                self.heads.push(shared.avail_head(next.wrapping_add(number)).map_err(|e| broken(index, e))?);
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

    /// Puts finished requests, each a head and the bytes written, into the used ring with one step of its index: the
    /// guest sees all of them or none, also when this process dies in between. At most a ring full.
    pub fn complete_together(&mut self, shared: &mut impl Shared, done: &[(u16, u32)]) -> Result<(), RingError> {
        let (index, size) = (self.index, self.size);
        if done.len() > usize::from(size) || done.iter().any(|(head, _)| *head >= size) {
            return Err(RingError::Config { index, what: "a head lies outside the ring" });
        }
        let marks = if self.in_order { None } else { self.tracker.as_mut() };
        if let Some(tracker) = marks {
            done.iter().for_each(|(head, _)| tracker.completing(*head));
        }
        shared.set_used(self.next_used, done).map_err(|e| broken(index, e))?;
        step(Step::UsedElement);
        let next = self.next_used.wrapping_add(done.len() as u16);
        shared.set_used_index(next).map_err(|e| broken(index, e))?;
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

    /// Whether the guest is to be interrupted for what was completed since it was asked last; once per batch.
    #[inline]
    pub fn notify(&mut self, shared: &mut impl Shared) -> Result<bool, RingError> {
        let used = self.next_used;
        let before = std::mem::replace(&mut self.announced, used);
        let words = Device { shared, event_idx: self.event_idx };
        notification::is_to_be_woken(&words, before, used).map_err(|e| broken(self.index, e))
    }

    /// Something was completed of which the guest was not told, and was not asked about either.
    pub fn is_unannounced(&self) -> bool {
        self.announced != self.next_used
    }

    /// How many finished requests the guest has not seen yet, where it says how far it has looked (EVENT_IDX).
    pub fn unseen(&self, shared: &impl Shared) -> Option<u16> {
        let event = self.event_idx.then(|| shared.used_event().ok())??;
        Some(self.next_used.wrapping_sub(event)).filter(|unseen| *unseen <= self.size)
    }

    /// Asks the guest for a kick; true when it has made something available meanwhile.
    pub fn arm(&mut self, shared: &mut impl Shared) -> Result<bool, RingError> {
        self.armed = true;
        let mut words = Device { shared, event_idx: self.event_idx };
        notification::ask_to_be_woken(&mut words, self.next_avail).map_err(|e| broken(self.index, e))
    }

    /// Tells the guest that kicks are not needed (a hint; with EVENT_IDX it is so by itself).
    #[inline]
    pub fn disarm(&mut self, shared: &mut impl Shared) -> Result<(), RingError> {
        if std::mem::take(&mut self.armed) && !self.event_idx {
            shared.set_used_flags(NO_NOTIFY).map_err(|e| broken(self.index, e))?;
        }
        Ok(())
    }

    /// True when a request waits to be taken.
    #[inline]
    pub fn waiting(&self, shared: &impl Shared) -> bool {
        !self.resubmit.is_empty() || shared.avail_index().is_ok_and(|seen| seen != self.next_avail)
    }
}

pub(crate) fn broken(index: u16, _: OutOfRange) -> RingError {
    RingError::Broken { index, reason: "it lies outside guest memory".to_owned() }
}

#[cfg(test)]
mod tests;
