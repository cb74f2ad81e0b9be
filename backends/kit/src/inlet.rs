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

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::chain::Chain;
use crate::device::Wait;
use crate::hand::Hand;
use crate::memory::{OutOfRange, Segment, Segments};
use crate::ring::{Ring, RingError, Taken};
use crate::stats::{Figures, Part, add};
use crate::worker::{Gate, QueuePulse, RingStart, wake};

/// Buffers that are published together while more are being filled. The guest reads the used index in a loop: each store
/// of it costs a cache line that travels between two processors.
const PUBLISH_AT: usize = 32;

/// A ring that others than its own thread may fill.
#[derive(Debug)]
pub struct Inlet<M: GuestMemory> {
    index: u16,
    gate: Arc<Gate>,
    pulse: Arc<QueuePulse>,
    /// Written by whoever is in, so by one thread at a time.
    figures: Part,
    open: Mutex<Option<Open<M>>>,
}

/// A running ring and the buffers in its hand.
#[derive(Debug)]
struct Open<M: GuestMemory> {
    ring: Ring<M>,
    err: Option<OwnedFd>,
    enabled: bool,
    broken: bool,
    hand: Hand,
    /// The writable parts of several chains, one after the other.
    joined: Vec<Segment>,
    /// Buffers that are filled and not yet in the used ring: whole frames.
    done: Vec<(u16, u32)>,
    /// What was filled since figures were written last: things, and bytes of them.
    filled: (u64, u64),
    malformed: u64,
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

    /// Goes in, lets `fill` do its work and prepares what it waits for: whether the guest kicks when it makes buffers
    /// available. What is left to wait for; `None` when the ring does not run.
    pub fn fill(&self, fill: impl FnOnce(&mut Buffers<'_, M>) -> Wait) -> Option<Wait> {
        let mut buffers = self.enter()?;
        let wait = fill(&mut buffers);
        match wait {
            Wait::Buffers if buffers.arm() => return Some(Wait::Again),
            Wait::Source | Wait::Until(_) => buffers.disarm(),
            Wait::Buffers | Wait::Again | Wait::Nothing => {}
        }
        Some(wait)
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
        let count = open.done.len() as u64;
        if count == 0 {
            return;
        }
        let ended = open.ring.complete_together(&open.done);
        open.done.clear();
        open.check(self.index, ended);
        // A buffer that waits for something to come is no request that waits for this process: it counts once it is filled.
        add(&self.pulse.taken, count);
        add(&self.pulse.completed, count);
        add(&self.figures.requests, count);
        let (things, bytes) = std::mem::take(&mut open.filled);
        Figures::new(&self.figures).read_several(things, bytes);
    }

    fn tell(&self, open: &mut Open<M>) {
        self.publish(open);
        match open.ring.notify() {
            Ok(false) => {}
            Ok(true) => add(&self.figures.calls, 1),
            Err(e) => open.check(self.index, Err(e)),
        }
    }

    /// Starts the ring: what kicks it, how many buffers were taken before, and whether somebody has served it before.
    pub(crate) fn start(&self, start: RingStart<M>) -> Result<(OwnedFd, u16, Option<bool>), RingError> {
        let recorded = start.config.tracker.is_some();
        let mut ring = Ring::start(start.mem, start.config)?;
        ring.call = start.call;
        if ring.continued() {
            ring.interrupt();
        }
        // Kicks say that there are new buffers, which is of interest only to who waits for some.
        ring.disarm()?;
        let (taken, served) = (ring.next_avail(), recorded.then(|| ring.continued()));
        *self.lock() = Some(Open {
            ring,
            err: start.err,
            enabled: start.enabled,
            broken: false,
            hand: Hand::default(),
            joined: Vec::new(),
            done: Vec::new(),
            filled: (0, 0),
            malformed: 0,
        });
        Ok((start.kick, taken, served))
    }

    /// Stops the ring and says where its next owner goes on.
    pub(crate) fn stop(&self) -> Option<u16> {
        let mut open = self.lock().take()?;
        self.tell(&mut open);
        let heads: Vec<u16> = open.hand.iter().map(Chain::head).collect();
        open.ring.give_back(&heads);
        Some(open.ring.next_avail())
    }

    pub(crate) fn set_memory(&self, mem: Arc<M>) {
        if let Some(open) = &mut *self.lock() {
            open.ring.set_memory(mem);
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
    #[inline]
    pub fn gather(&mut self, bytes: u64, chains_max: usize, least: u64) -> bool {
        let Some(open) = &mut *self.guard else { return false };
        if open.hand.is_empty() && !self.inlet.take(open) {
            return false;
        }
        // Nearly always one is enough.
        let room = open.hand.front().map_or(0, Chain::writable_bytes);
        room >= bytes.max(least) && chains_max > 0 || self.gather_several(bytes, chains_max, least)
    }

    /// Takes buffers until there are `count` in the hand, each with room for `least` bytes; false when the guest has not made
    /// enough available. One with less room is given back unused, with those before it.
    pub fn gather_each(&mut self, count: usize, least: u64) -> bool {
        let Some(open) = &mut *self.guard else { return false };
        // No guest keeps us here by offering ever more that is of no use.
        let mut useless = open.ring.size();
        loop {
            while open.hand.len() < count {
                if !self.inlet.take(open) {
                    return false;
                }
            }
            let fits = |at: usize| open.hand.get(at).is_some_and(|chain| chain.writable_bytes() >= least);
            if (0..count).all(fits) {
                return true;
            }
            if useless == 0 {
                return false;
            }
            useless -= 1;
            self.inlet.finish(open, 1, 0);
        }
    }

    fn gather_several(&mut self, bytes: u64, chains_max: usize, least: u64) -> bool {
        let Some(open) = &mut *self.guard else { return false };
        // No guest keeps us here by offering ever more that is of no use.
        let mut useless = open.ring.size();
        let mut room = 0;
        let mut position = 0;
        loop {
            if open.hand.front().is_some_and(|chain| chain.writable_bytes() < least) {
                if useless == 0 {
                    return false;
                }
                useless -= 1;
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
            room += open.hand.get(position).map_or(0, Chain::writable_bytes);
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
        Some((&**open.ring.memory(), open.hand.front()?))
    }

    /// How many of the buffers in the hand `bytes` will take: at least one.
    #[inline]
    pub fn count(&self, bytes: u64) -> usize {
        let Some(open) = &*self.guard else { return 0 };
        let mut room = open.hand.front().map_or(0, Chain::writable_bytes);
        let mut chains = 1;
        while room < bytes
            && let Some(chain) = open.hand.get(chains)
        {
            room += chain.writable_bytes();
            chains += 1;
        }
        chains
    }

    /// Guest memory and the writable parts of the first `chains` buffers in the hand, one after the other.
    #[inline]
    pub fn room(&mut self, chains: usize) -> Option<(&M, Segments<'_>)> {
        let open = self.guard.as_mut()?;
        if chains > 1 {
            open.joined.clear();
            for chain in open.hand.iter().take(chains) {
                open.joined.extend_from_slice(chain.writable().0);
            }
        }
        let open = &*open;
        let room = if chains > 1 { Segments(&open.joined) } else { open.hand.front()?.writable() };
        Some((&**open.ring.memory(), room))
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
    fn arm(&mut self) -> bool {
        let Some(open) = &mut *self.guard else { return false };
        match open.ring.arm() {
            Ok(more) => more,
            Err(e) => {
                open.check(self.inlet.index, Err(e));
                false
            }
        }
    }

    /// Tells the guest that kicks are of no use now.
    fn disarm(&mut self) {
        if let Some(open) = &mut *self.guard {
            let told = open.ring.disarm();
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
    /// Takes one buffer into the hand. One that makes no sense has no room, and is given back when its turn comes.
    #[inline]
    fn take(&self, open: &mut Open<M>) -> bool {
        if open.broken {
            return false;
        }
        let ring = &mut open.ring;
        let taken = open.hand.add(|chain| {
            let taken = ring.take(chain);
            (matches!(taken, Ok(Taken::Request | Taken::Malformed(_))), taken)
        });
        match taken {
            Some(Ok(Taken::Request)) => true,
            Some(Ok(Taken::Malformed(e))) => {
                open.malformed += 1;
                add(&self.figures.malformed, 1);
                // The guest decides how often this happens: say it at each power of two.
                if open.malformed.is_power_of_two() {
                    tracing::warn!(queue = self.index, count = open.malformed, error = %e, "malformed buffer");
                }
                true
            }
            Some(Ok(Taken::Empty)) | None => false,
            Some(Err(e)) => {
                open.check(self.index, Err(e));
                false
            }
        }
    }

    #[inline]
    fn finish(&self, open: &mut Open<M>, chains: usize, bytes: u64) {
        let mut left = bytes;
        for _ in 0..chains {
            let Some((head, room)) = open.hand.remove() else { break };
            let written = room.min(left);
            left -= written;
            open.done.push((head, written.try_into().unwrap_or(u32::MAX)));
        }
        open.filled.0 += u64::from(bytes > 0);
        open.filled.1 += bytes;
        if open.done.len() >= PUBLISH_AT {
            self.publish(open);
        }
    }
}
