//! Requests in a memory of their own (`isolation=copy`): what the driver has for the device is copied there before the
//! backend hears of the request, what the backend has for the driver is copied back when it completes it, and a backend
//! reaches nothing else.
//!
//! A request keeps the form that the driver gave it, part by part. Its parts lie in one piece of the queue's [`Pool`], small
//! ones side by side and others at the beginning of pages, behind a table of descriptors where it has more than one part and
//! the driver uses such tables too. While there is no room it waits, and so do those behind it. One that would not fit into
//! the whole pool, or points to where the device may not reach, is answered as when no backend is there
//! ([`Answer`]); no backend hears of it.
//!
//! What a backend says is an identifier and a length: the first must be that of a request that it has, the second is cut at
//! what the request has room for. What it writes beside that it does to itself.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::pool::{PAGE, Pool};
use super::rings::{CopyPlace, RingMemory};
use crate::vhost::guest_ring::{Chain, GuestRing};
use crate::vhost::standin::Answer;
use crate::vhost::window::Window;

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: u64 = 16;
const NEXT: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_NEXT as u16;
const WRITE: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT as u16;
/// Parts that are at least so long begin at a page: a backend may read a file straight into them.
const LONG: u32 = 512;
/// What short ones are aligned to.
const SHORT_ALIGN: u64 = 16;

/// What the requests of one queue are copied by.
pub(in crate::vhost) struct Terms {
    pub(in crate::vhost) window: Arc<Window>,
    /// What is said to requests that cannot be copied.
    pub(in crate::vhost) answer: Answer,
    /// The last byte is a status, written also where the length says that nothing was.
    pub(in crate::vhost) status_last: bool,
    /// The driver, and so the backend, knows tables of descriptors.
    pub(in crate::vhost) indirect: bool,
}

/// What came of a request of the driver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carried {
    /// The backend can have it, by this head.
    Handed(u16),
    /// There is no room at the moment.
    Full,
    /// It was answered, with so many bytes.
    Answered(u32),
}

/// Bytes of a request: where the driver has them, and where the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    theirs: u64,
    ours: u64,
    len: u32,
    write: bool,
}

/// A request that the backend has.
#[derive(Debug)]
struct Held {
    head: u16,
    room: (u64, u64),
    descriptors: Vec<u16>,
    chain: Chain,
    writable: Vec<Part>,
}

/// The requests of one queue.
pub(super) struct Copies {
    terms: Terms,
    memory: Arc<RingMemory>,
    table: u64,
    pool: Pool,
    /// Descriptors that nobody uses.
    free: Vec<u16>,
    /// By head, as the backend has it.
    held: Vec<Option<Held>>,
    /// It was told in the log that a request was not copied.
    told: bool,
}

impl Copies {
    /// None yet, of a queue with so many descriptors.
    pub(super) fn new(terms: Terms, memory: &Arc<RingMemory>, place: CopyPlace, size: u16) -> Self {
        let pool = Pool::new(place.pool, place.pool_bytes);
        let (free, held) = ((0..size).rev().collect(), (0..size).map(|_| None).collect());
        Self { terms, memory: Arc::clone(memory), table: place.table, pool, free, held, told: false }
    }

    /// Copies a request for the backend.
    pub(super) fn carry_in(&mut self, guest: &GuestRing, head: u16) -> Carried {
        let Some(chain) = guest.chain_by(self.terms.window.as_ref(), head) else { return Carried::Answered(0) };
        let (parts, bytes) = lay_out(&chain, self.terms.indirect);
        let tabled = self.terms.indirect && parts.len() > 1;
        let needed = if tabled { 1 } else { parts.len() };
        if needed > self.held.len() || bytes > self.pool.capacity() {
            return self.refuse(guest, &chain, "it is larger than the room for copies of this queue");
        }
        if self.free.len() < needed {
            return Carried::Full;
        }
        let Some(start) = self.pool.take(bytes) else { return Carried::Full };
        let parts: Vec<Part> = parts.into_iter().map(|part| Part { ours: start + part.ours, ..part }).collect();
        let there = parts.iter().filter(|part| !part.write).all(|part| {
            let ours = self.slice(part.ours, part.len as usize);
            ours.is_some_and(|ours| self.terms.window.copy_in(part.theirs, part.len as usize, &ours))
        });
        if !there {
            self.pool.give(start, bytes);
            return self.refuse(guest, &chain, "it points to where the device may not read");
        }
        let at = self.free.len() - needed;
        let descriptors = self.free.split_off(at);
        let Some(id) = descriptors.first().copied() else {
            self.pool.give(start, bytes);
            return Carried::Answered(0);
        };
        if tabled {
            self.describe(start, &parts, &(0..).take(parts.len()).collect::<Vec<u16>>());
            let table = Part { theirs: 0, ours: start, len: (DESCRIPTOR * parts.len() as u64) as u32, write: false };
            self.write_descriptor(self.table + DESCRIPTOR * u64::from(id), table, INDIRECT, 0);
        } else {
            self.describe(self.table, &parts, &descriptors);
        }
        let writable = parts.into_iter().filter(|part| part.write).collect();
        if let Some(slot) = self.held.get_mut(usize::from(id)) {
            *slot = Some(Held { head, room: (start, bytes), descriptors, chain, writable });
        }
        Carried::Handed(id)
    }

    /// The backend has completed what it calls `id`, with so many bytes, which are copied to the driver: the driver's head,
    /// and how many bytes there can have been. Where not all of them can be copied, the request has failed. `None` when the
    /// backend has no such request.
    pub(super) fn carry_out(&mut self, id: u32, written: u32) -> Option<(u16, u32)> {
        let held = self.held.get_mut(usize::try_from(id).ok()?)?.take()?;
        let (mut left, mut all) = (written, true);
        let last = held.writable.iter().rfind(|part| part.len > 0);
        for part in &held.writable {
            let here = left.min(part.len);
            left -= here;
            all &= self.copy_out(*part, 0, here);
            if self.terms.status_last && here < part.len && last == Some(part) {
                all &= self.copy_out(*part, part.len - 1, 1);
            }
        }
        let (start, bytes) = held.room;
        self.pool.give(start, bytes);
        self.free.extend(held.descriptors);
        let written =
            if all { written - left } else { self.terms.answer.write(self.terms.window.as_ref(), Some(&held.chain)) };
        Some((held.head, written))
    }

    /// Whether the device may write there; the window keeps note of it where it may not.
    fn copy_out(&self, part: Part, from: u32, len: u32) -> bool {
        let ours = self.slice(part.ours + u64::from(from), len as usize);
        let theirs = part.theirs.checked_add(u64::from(from));
        ours.zip(theirs).is_some_and(|(ours, theirs)| self.terms.window.copy_out(theirs, len as usize, &ours))
    }

    fn refuse(&mut self, guest: &GuestRing, chain: &Chain, why: &str) -> Carried {
        if !std::mem::replace(&mut self.told, true) {
            let queue = guest.index();
            tracing::warn!(queue, why, "a request is answered with an error; others like it follow without a word");
        }
        Carried::Answered(self.terms.answer.write(self.terms.window.as_ref(), Some(chain)))
    }

    /// Writes a chain of descriptors into the table at `table`, in the places given.
    fn describe(&self, table: u64, parts: &[Part], places: &[u16]) {
        let mut behind = places.iter().skip(1);
        for (part, place) in parts.iter().zip(places) {
            let next = behind.next();
            let flags = if next.is_some() { NEXT } else { 0 };
            let at = table + DESCRIPTOR * u64::from(*place);
            self.write_descriptor(at, *part, flags, next.copied().unwrap_or(0));
        }
    }

    fn write_descriptor(&self, at: u64, part: Part, flags: u16, next: u16) {
        let mut bytes = [0; DESCRIPTOR as usize];
        bytes[..8].copy_from_slice(&part.ours.to_le_bytes());
        bytes[8..12].copy_from_slice(&part.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&(flags | if part.write { WRITE } else { 0 }).to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        // Inside the mapping: tables were laid out there, and pieces of the pool are too.
        let _ = self.memory.mapped().write_slice(&bytes, GuestAddress(at));
    }

    fn slice(&self, at: u64, len: usize) -> Option<VolatileSlice<'_>> {
        self.memory.mapped().get_slice(GuestAddress(at), len).ok()
    }
}

/// Where the parts of a request go, from the beginning of its room, and how long that is. A table of descriptors comes first.
fn lay_out(chain: &Chain, indirect: bool) -> (Vec<Part>, u64) {
    let readable = chain.readable.iter().map(|range| (range, false));
    let ranges = readable.chain(chain.writable.iter().map(|range| (range, true)));
    let mut parts: Vec<Part> = ranges.map(|(&(theirs, len), write)| Part { theirs, ours: 0, len, write }).collect();
    // There are 1024 parts at most, each shorter than 2^32: no sum overflows.
    let mut end = if indirect && parts.len() > 1 { DESCRIPTOR * parts.len() as u64 } else { 0 };
    for part in parts.iter_mut().filter(|part| part.len < LONG) {
        part.ours = end;
        end = (end + u64::from(part.len)).next_multiple_of(SHORT_ALIGN);
    }
    for part in parts.iter_mut().filter(|part| part.len >= LONG) {
        part.ours = end.next_multiple_of(PAGE);
        end = part.ours + u64::from(part.len);
    }
    (parts, end)
}
