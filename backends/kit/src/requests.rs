//! The requests of one turn of a queue thread, as a handler gets them: one after the other, until there are no more, or a
//! rate limit stands in the way, or others are to have their turn.
//!
//! A handler with something to do once for many requests (a lock, a look at what was negotiated) takes them from here by
//! itself ([`QueueHandler::requests`](crate::device::QueueHandler::requests)); others get each by itself.

use std::time::Duration;

use vm_memory::GuestMemory;

use crate::chain::Chain;
use crate::limit::{Cost, Toll};
use crate::meter::Meter;
use crate::ring::{Ring, RingError, Taken};
use crate::stats::add;
use crate::step::{Sabotage, Step, step, strikes, write_late};
use crate::worker::QueuePulse;

/// Requests of one turn, after which the conversation and completions are heard, and the guest is notified.
const TURN_MAX: u16 = 64;
/// Completions that are published together. The guest reads the used index in a loop: each store of it costs a cache line
/// that travels between two processors, and more than the rest of a short request.
pub(crate) const PUBLISH_AT: usize = 32;

/// What a queue thread lends for one turn.
pub(crate) struct Turn<'a, M: GuestMemory> {
    pub(crate) index: u16,
    pub(crate) ring: &'a mut Ring<M>,
    pub(crate) chain: &'a mut Chain,
    /// Requests that are done and not yet in the used ring.
    pub(crate) done: &'a mut Vec<(u16, u32)>,
    pub(crate) toll: &'a mut Toll,
    pub(crate) meter: &'a mut Meter,
    pub(crate) pulse: &'a QueuePulse,
    pub(crate) malformed: &'a mut u64,
    /// Requests are thrown away, at no cost.
    pub(crate) discards: bool,
}

/// The requests of one turn.
pub struct Requests<'a, M: GuestMemory> {
    turn: Turn<'a, M>,
    count: u16,
    failed: Option<RingError>,
}

impl<'a, M: GuestMemory> Requests<'a, M> {
    pub(crate) fn new(turn: Turn<'a, M>) -> Self {
        Self { turn, count: 0, failed: None }
    }

    /// Goes on to the next request; false when there is none for the moment. `cost` says what it takes from the limits of
    /// its queue. Each request is ended by [`Requests::done`] or [`Requests::pending`] before the next is taken.
    #[inline]
    pub fn advance(&mut self, cost: impl FnOnce(&Chain) -> Cost) -> bool {
        let turn = &mut self.turn;
        while self.count < TURN_MAX && self.failed.is_none() {
            match turn.ring.take(turn.chain) {
                Ok(Taken::Request) => {
                    if self.count == 0 {
                        self.failed = turn.ring.disarm().err();
                        turn.meter.batch();
                    }
                    if !turn.discards {
                        match turn.toll.pay(|| cost(turn.chain)) {
                            Some(Duration::ZERO) => {}
                            Some(waited) => turn.meter.throttled(waited.as_nanos() as u64),
                            None => {
                                turn.ring.put_back(turn.chain.head());
                                return false;
                            }
                        }
                    }
                    self.count += 1;
                    add(&turn.pulse.taken, 1);
                    step(Step::Submit);
                    return true;
                }
                Ok(Taken::Empty) => return false,
                Ok(Taken::Malformed(e)) => {
                    self.count += 1;
                    *turn.malformed += 1;
                    turn.meter.malformed();
                    // The guest decides how often this happens: say it at each power of two.
                    if turn.malformed.is_power_of_two() {
                        tracing::warn!(queue = turn.index, count = *turn.malformed, error = %e, "malformed request");
                    }
                    turn.done.push((turn.chain.head(), 0));
                }
                Err(e) => self.failed = Some(e),
            }
        }
        false
    }

    /// The present request, and the memory that it points to.
    #[inline]
    pub fn current(&self) -> (&M, &Chain) {
        (&**self.turn.ring.memory(), self.turn.chain)
    }

    /// The present request is finished; so many bytes of its writable part were written.
    #[inline]
    pub fn done(&mut self, written: u32) {
        let turn = &mut self.turn;
        step(Step::Done);
        if strikes(Sabotage::WriteLate) {
            write_late(&**turn.ring.memory(), turn.chain);
        }
        add(&turn.pulse.completed, 1);
        turn.done.push((turn.chain.head(), written));
        turn.meter.finished();
        if turn.done.len() >= PUBLISH_AT {
            self.publish();
        }
    }

    /// The present request waits for an operation that was pushed.
    #[inline]
    pub fn pending(&mut self) {
        self.turn.meter.pending(self.turn.chain.head());
    }

    fn publish(&mut self) {
        let published = publish(self.turn.ring, self.turn.done);
        self.failed = self.failed.take().or(published.err());
    }

    /// The turn is over: how many requests it had, and what went wrong with the ring.
    pub(crate) fn end(mut self) -> (u16, Result<(), RingError>) {
        self.publish();
        self.turn.meter.settle();
        (self.count, self.failed.map_or(Ok(()), Err))
    }
}

/// Puts what is done into the used ring, all of it under one index.
pub(crate) fn publish<M: GuestMemory>(ring: &mut Ring<M>, done: &mut Vec<(u16, u32)>) -> Result<(), RingError> {
    if done.is_empty() {
        return Ok(());
    }
    if strikes(Sabotage::CompleteTwice) {
        done.extend_from_within(..1);
    }
    let result = ring.complete_together(done);
    done.clear();
    result
}
