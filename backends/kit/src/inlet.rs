//! A ring that is filled from outside: what comes in from a network, a keyboard or another port goes into buffers that
//! the guest has made available, when it comes.
//!
//! An [`Inlet`] is shared. The thread of its queue starts and stops it; whoever has something for the guest enters it,
//! which may be another port's queue thread: data then goes from one guest's memory to the other's with one copy, and
//! no thread is woken for it. Whoever is in holds the lock, so a ring never stops, and memory is never exchanged, in the
//! middle of a frame.
//!
//! Buffers are taken before it is known how many of them something needs. Those that were taken and not filled wait
//! *in the hand* for the next one. For the record of requests in flight they are taken: after a death the successor
//! takes them again, in the same order. When the ring stops they are given back, and what is completed is always a prefix
//! of what was taken.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::chain::Chain;
use crate::memory::{OutOfRange, Segment, Segments};
use crate::ring::{Ring, RingError, Taken};
use crate::stats::{Figures, Part, add};
use crate::worker::{Gate, QueuePulse, RingStart, wake};

/// Buffers that are published together while more are being filled. The guest reads the used index in a loop: each store
/// of it costs a cache line that travels between two processors.
const PUBLISH_AT: usize = 16;

/// A ring that others than its own thread may fill.
#[derive(Debug)]
pub struct Inlet<M> {
    index: u16,
    gate: Arc<Gate>,
    pulse: Arc<QueuePulse>,
    /// Written by whoever is in, so by one thread at a time.
    figures: Part,
    open: Mutex<Option<Open<M>>>,
}

/// A running ring and the buffers in its hand.
#[derive(Debug)]
struct Open<M> {
    mem: Arc<M>,
    ring: Ring,
    err: Option<OwnedFd>,
    enabled: bool,
    broken: bool,
    hand: VecDeque<Held>,
    /// Chains whose memory is used again.
    spare: Vec<Chain>,
    /// The writable parts of several chains, one after the other.
    joined: Vec<Segment>,
    /// Buffers that are filled and not yet in the used ring: whole frames.
    done: Vec<(u16, u32)>,
    malformed: u64,
}

#[derive(Debug)]
struct Held {
    chain: Chain,
    bytes: u64,
}

impl<M: GuestMemory> Inlet<M> {
    pub(crate) fn new(index: u16, gate: Arc<Gate>, pulse: Arc<QueuePulse>, figures: Part) -> Self {
        Self { index, gate, pulse, figures, open: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open<M>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the handler counts what the kit does not see: frames that were dropped, for example. Only to be used by who
    /// is in, see [`Inlet::enter`].
    pub(crate) fn figures(&self) -> Figures<'_> {
        Figures::new(&self.figures)
    }

    pub(crate) fn pulse(&self) -> &Arc<QueuePulse> {
        &self.pulse
    }

    /// Goes in, if the ring runs. Nobody else is in until the result is dropped.
    pub fn enter(&self) -> Option<Buffers<'_, M>> {
        let guard = self.lock();
        let serves = guard.as_ref().is_some_and(|open| open.enabled && !open.broken) && self.gate.is_open();
        serves.then_some(Buffers { inlet: self, guard, silent: false })
    }

    /// True when the ring runs and is enabled.
    pub fn runs(&self) -> bool {
        self.lock().as_ref().is_some_and(|open| open.enabled && !open.broken)
    }

    /// Announces to the guest what was filled by those who left without doing so.
    pub fn announce(&self) {
        if let Some(open) = &mut *self.lock() {
            self.tell(open);
        }
    }

    /// Puts what was filled into the used ring.
    fn publish(&self, open: &mut Open<M>) {
        if !open.done.is_empty() {
            let ended = open.ring.complete_together(&*open.mem, &open.done);
            open.done.clear();
            open.check(self.index, ended);
        }
    }

    fn tell(&self, open: &mut Open<M>) {
        self.publish(open);
        match open.ring.notify(&*open.mem) {
            Ok(false) => {}
            Ok(true) => add(&self.figures.calls, 1),
            Err(e) => open.check(self.index, Err(e)),
        }
    }

    pub(crate) fn start(&self, start: RingStart<M>) -> Result<OwnedFd, RingError> {
        let mut ring = Ring::start(&*start.mem, start.config)?;
        ring.call = start.call;
        if ring.continued() {
            ring.interrupt();
        }
        // Kicks say that there are new buffers, which is of interest only to who waits for some.
        ring.disarm(&*start.mem)?;
        *self.lock() = Some(Open {
            mem: start.mem,
            ring,
            err: start.err,
            enabled: start.enabled,
            broken: false,
            hand: VecDeque::new(),
            spare: Vec::new(),
            joined: Vec::new(),
            done: Vec::new(),
            malformed: 0,
        });
        Ok(start.kick)
    }

    /// Stops the ring and says where its next owner goes on.
    pub(crate) fn stop(&self) -> Option<u16> {
        let mut open = self.lock().take()?;
        self.tell(&mut open);
        let heads: Vec<u16> = open.hand.iter().map(|held| held.chain.head()).collect();
        open.ring.give_back(&heads);
        Some(open.ring.next_avail())
    }

    pub(crate) fn set_memory(&self, mem: Arc<M>) {
        if let Some(open) = &mut *self.lock() {
            open.mem = mem;
        }
    }

    pub(crate) fn set_call(&self, call: Option<EventFd>) {
        if let Some(open) = &mut *self.lock() {
            open.ring.call = call;
            // What was announced to the old descriptor may have been lost with it.
            open.ring.interrupt();
        }
    }

    pub(crate) fn set_enabled(&self, enabled: bool) {
        if let Some(open) = &mut *self.lock() {
            open.enabled = enabled;
        }
    }

    pub(crate) fn break_off(&self, error: RingError) {
        if let Some(open) = &mut *self.lock() {
            open.check(self.index, Err(error));
        }
    }
}

impl<M: GuestMemory> Open<M> {
    /// A ring error stops the ring, not the process.
    fn check(&mut self, index: u16, result: Result<(), RingError>) {
        if let Err(e) = result
            && !self.broken
        {
            self.broken = true;
            if let Some(err) = &self.err {
                wake(err);
            }
            tracing::warn!(queue = index, error = %e, "the ring is broken and is not served until it is reset");
        }
    }
}

/// A ring that is open for filling. Dropping it announces to the guest what was filled.
#[derive(Debug)]
pub struct Buffers<'a, M: GuestMemory> {
    inlet: &'a Inlet<M>,
    guard: MutexGuard<'a, Option<Open<M>>>,
    silent: bool,
}

impl<M: GuestMemory> Buffers<'_, M> {
    /// Takes buffers until the first `chains_max` of those in the hand have room for `bytes`; false when the guest has
    /// not made enough available. Buffers with less room than `least` are given back unused.
    pub fn gather(&mut self, bytes: u64, chains_max: usize, least: u64) -> bool {
        let Some(open) = &mut *self.guard else { return false };
        let mut room = 0;
        let mut position = 0;
        loop {
            if open.hand.front().is_some_and(|held| held.bytes < least) {
                self.inlet.finish(open, 1, 0);
                (room, position) = (0, 0);
                continue;
            }
            if room >= bytes && position > 0 {
                return true;
            }
            if position == chains_max {
                return false;
            }
            if open.hand.len() == position && !self.inlet.take(open) {
                return false;
            }
            room += open.hand.get(position).map_or(0, |held| held.bytes);
            position += 1;
        }
    }

    /// Takes one request for a handler that serves each by itself: it is finished by [`Buffers::finish`] before the next
    /// is taken.
    pub fn take_one(&mut self) -> Option<(&M, &Chain)> {
        let open = self.guard.as_mut()?;
        if open.hand.is_empty() && !self.inlet.take(open) {
            return None;
        }
        let open = self.guard.as_ref()?;
        Some((&*open.mem, &open.hand.front()?.chain))
    }

    /// How many of the buffers in the hand `bytes` will take: at least one.
    pub fn count(&self, bytes: u64) -> usize {
        let Some(open) = &*self.guard else { return 0 };
        let mut room = 0;
        let filled = open.hand.iter().take_while(|held| {
            let needed = room < bytes;
            room += held.bytes;
            needed
        });
        filled.count().max(1)
    }

    /// Guest memory and the writable parts of the first `chains` buffers in the hand, one after the other.
    pub fn room(&mut self, chains: usize) -> Option<(&M, Segments<'_>)> {
        let open = self.guard.as_mut()?;
        if chains > 1 {
            open.joined.clear();
            for held in open.hand.iter().take(chains) {
                open.joined.extend_from_slice(held.chain.writable().0);
            }
        }
        let open = &*open;
        let room = if chains > 1 { Segments(&open.joined) } else { open.hand.front()?.chain.writable() };
        Some((&*open.mem, room))
    }

    /// Completes the first `chains` buffers in the hand, over which `bytes` were written from the first one on.
    pub fn finish(&mut self, chains: usize, bytes: u64) {
        if let Some(open) = &mut *self.guard {
            self.inlet.finish(open, chains, bytes);
        }
    }

    /// Where to count what the kit does not see, such as frames that were dropped.
    pub fn figures(&self) -> Figures<'_> {
        self.inlet.figures()
    }

    /// Writes `data` at `offset` of the first `chains` buffers in the hand.
    pub fn write(&mut self, chains: usize, offset: u64, data: &[u8]) -> Result<(), OutOfRange> {
        let (mem, room) = self.room(chains).ok_or(OutOfRange)?;
        room.write_at(mem, offset, data)
    }

    /// Leaves without announcing anything: [`Inlet::announce`] is called when more has been filled.
    pub fn leave(mut self) {
        self.silent = true;
    }

    /// Asks the guest for a kick when it makes something available; true when it has done so meanwhile.
    pub(crate) fn arm(&mut self) -> bool {
        let Some(open) = &mut *self.guard else { return false };
        match open.ring.arm(&*open.mem) {
            Ok(more) => more,
            Err(e) => {
                open.check(self.inlet.index, Err(e));
                false
            }
        }
    }

    /// Tells the guest that kicks are of no use now.
    pub(crate) fn disarm(&mut self) {
        if let Some(open) = &mut *self.guard {
            let told = open.ring.disarm(&*open.mem);
            open.check(self.inlet.index, told);
        }
    }
}

impl<M: GuestMemory> Drop for Buffers<'_, M> {
    fn drop(&mut self) {
        if let Some(open) = &mut *self.guard
            && !self.silent
        {
            self.inlet.tell(open);
        }
    }
}

impl<M: GuestMemory> Inlet<M> {
    /// Takes one buffer into the hand.
    fn take(&self, open: &mut Open<M>) -> bool {
        // A ring full of malformed chains, and then somebody else's turn.
        for _ in 0..=open.ring.size() {
            if open.broken {
                return false;
            }
            let mut chain = open.spare.pop().unwrap_or_default();
            match open.ring.take(&*open.mem, &mut chain) {
                Ok(Taken::Request) => {
                    let bytes = chain.writable().bytes();
                    open.hand.push_back(Held { chain, bytes });
                    return true;
                }
                Ok(Taken::Empty) => {
                    open.spare.push(chain);
                    return false;
                }
                Ok(Taken::Malformed(e)) => {
                    open.spare.push(chain);
                    open.malformed += 1;
                    add(&self.figures.malformed, 1);
                    // The guest decides how often this happens: say it at each power of two.
                    if open.malformed.is_power_of_two() {
                        tracing::warn!(queue = self.index, count = open.malformed, error = %e, "malformed buffer");
                    }
                }
                Err(e) => open.check(self.index, Err(e)),
            }
        }
        false
    }

    fn finish(&self, open: &mut Open<M>, chains: usize, bytes: u64) {
        let mut left = bytes;
        let before = open.done.len();
        for _ in 0..chains {
            let Some(held) = open.hand.pop_front() else { break };
            let written = held.bytes.min(left);
            left -= written;
            open.done.push((held.chain.head(), written.try_into().unwrap_or(u32::MAX)));
            open.spare.push(held.chain);
        }
        let count = (open.done.len() - before) as u64;
        // A buffer that waits for something to come is no request that waits for this process: it counts once it is filled.
        add(&self.pulse.taken, count);
        add(&self.pulse.completed, count);
        add(&self.figures.requests, count);
        if bytes > 0 {
            Figures::new(&self.figures).read(bytes);
        }
        if open.done.len() >= PUBLISH_AT {
            self.publish(open);
        }
    }
}
