//! One running virtqueue: avail and used ring (by `virtio-queue`), chains, requests in flight, notifications.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use crate::chain::{Chain, ChainError, Table};
use crate::inflight::{InflightError, Tracker};

/// Entries of a ring that are read or written together.
const RUN_MAX: usize = 32;

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
    /// The used index when the guest was last told of it, or last chose not to be.
    announced: u16,
    armed: bool,
    continued: bool,
    /// The avail index as it was read last.
    avail_seen: u16,
    /// Entries of the avail ring that were read together, and the index of the first.
    heads: Vec<u16>,
    heads_from: u16,
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
            announced: used,
            armed: true,
            continued: recovered.continued,
            avail_seen: base,
            heads: Vec::with_capacity(RUN_MAX),
            heads_from: base,
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
                let Some(head) = self.next_head(mem)? else { return Ok(Taken::Empty) };
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

    /// The next head in the avail ring. Its index, which the guest writes for each batch, is read only when what it said
    /// last has been taken.
    fn next_head<M: GuestMemory>(&mut self, mem: &M) -> Result<Option<u16>, RingError> {
        let (index, next) = (self.index, self.queue.next_avail());
        if next == self.avail_seen {
            let seen = self.queue.avail_idx(mem, Ordering::Acquire).map_err(|e| broken(index, &e))?.0;
            if seen.wrapping_sub(next) > self.table.size {
                return Err(RingError::Config { index, what: "its avail index is further on than the ring is long" });
            }
            self.avail_seen = seen;
            if seen == next {
                return Ok(None);
            }
        }
        if next.wrapping_sub(self.heads_from) >= self.heads.len() as u16 {
            // As many as lie side by side.
            let slot = next % self.table.size;
            let run = self.avail_seen.wrapping_sub(next).min(self.table.size - slot).min(RUN_MAX as u16);
            let mut bytes = [0; 2 * RUN_MAX];
            let bytes = bytes.get_mut(..2 * usize::from(run)).unwrap_or_default();
            mem.read_slice(bytes, GuestAddress(self.queue.avail_ring() + 4 + 2 * u64::from(slot)))
                .map_err(|e| RingError::Broken { index, reason: e.to_string() })?;
            self.heads.clear();
            self.heads.extend(bytes.as_chunks::<2>().0.iter().map(|head| u16::from_le_bytes(*head)));
            self.heads_from = next;
        }
        let head = self.heads.get(usize::from(next.wrapping_sub(self.heads_from))).copied();
        let head = head.ok_or(RingError::Config { index, what: "its avail index went back" })?;
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(Some(head))
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
    pub fn complete<M: GuestMemory>(&mut self, mem: &M, head: u16, written: u32) -> Result<(), RingError> {
        self.complete_together(mem, &[(head, written)])
    }

    /// Puts finished requests, each a head and the bytes written, into the used ring with one step of its index: the
    /// guest sees all of them or none, also when this process dies in between. At most a ring full.
    pub fn complete_together<M: GuestMemory>(&mut self, mem: &M, done: &[(u16, u32)]) -> Result<(), RingError> {
        let size = self.table.size;
        let failed = |e: &dyn std::fmt::Display| RingError::Broken { index: self.index, reason: e.to_string() };
        for (head, _) in done {
            if *head >= size {
                return Err(RingError::Config { index: self.index, what: "a head lies outside the ring" });
            }
            if let Some(tracker) = &mut self.tracker {
                tracker.completing(*head);
            }
        }
        let (mut next, mut rest) = (self.queue.next_used(), done);
        while !rest.is_empty() {
            // As many as lie side by side.
            let slot = next % size;
            let run = rest.len().min(usize::from(size - slot)).min(RUN_MAX);
            let (now, later) = rest.split_at(run);
            let mut bytes = [0; 8 * RUN_MAX];
            for (to, (head, written)) in bytes.chunks_exact_mut(8).zip(now) {
                to.copy_from_slice(&(u64::from(*head) | u64::from(*written) << 32).to_le_bytes());
            }
            let entry = self.queue.used_ring() + 4 + 8 * u64::from(slot);
            let bytes = bytes.get(..8 * run).unwrap_or_default();
            mem.write_slice(bytes, GuestAddress(entry)).map_err(|e| failed(&e))?;
            next = next.wrapping_add(run as u16);
            rest = later;
        }
        mem.store(next.to_le(), GuestAddress(self.queue.used_ring() + 2), Ordering::Release).map_err(|e| failed(&e))?;
        self.queue.set_next_used(next);
        if let Some(tracker) = &mut self.tracker {
            tracker.completed(done.iter().map(|(head, _)| *head), next);
        }
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
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(again.len() as u16));
    }

    /// Interrupts the guest when there is something new and it wants to know; once per batch. Whether it did.
    pub fn notify<M: GuestMemory>(&mut self, mem: &M) -> Result<bool, RingError> {
        let used = self.queue.next_used();
        let before = std::mem::replace(&mut self.announced, used);
        if used == before {
            return Ok(false);
        }
        // What was put into the used ring must be seen before the guest's wish is read.
        fence(Ordering::SeqCst);
        let avail = self.queue.avail_ring();
        let load = |addr: u64| -> Result<u16, RingError> {
            let value: u16 = mem
                .load(GuestAddress(addr), Ordering::Relaxed)
                .map_err(|e| RingError::Broken { index: self.index, reason: e.to_string() })?;
            Ok(u16::from_le(value))
        };
        let wanted = if self.queue.event_idx_enabled() {
            let event = load(avail + 4 + 2 * u64::from(self.table.size))?;
            used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(before)
        } else {
            const NO_INTERRUPT: u16 = 1;
            load(avail)? & NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt();
        }
        Ok(wanted)
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
    use vm_memory::mmap::NewBitmap;
    use vm_memory::{FileOffset, GuestMemoryMmap};

    use super::*;
    use crate::inflight::{Region, create, region_bytes};

    const SIZE: u16 = 8;
    const MEMORY_BYTES: usize = 0x4000;
    const USED: u64 = 0x2000;

    /// What a successor finds when the device dies at one moment: guest memory and the in-flight region.
    type Remains = (Vec<u8>, Vec<u8>);

    thread_local! {
        static WATCHED: RefCell<Option<(File, File)>> = const { RefCell::new(None) };
        static MOMENTS: RefCell<Vec<Remains>> = const { RefCell::new(Vec::new()) };
    }

    /// A dirty bitmap that takes a picture after each write to guest memory.
    #[derive(Debug, Clone, Default)]
    struct Camera;

    impl Bitmap for Camera {
        fn mark_dirty(&self, _offset: usize, _len: usize) {
            picture();
        }
        fn dirty_at(&self, _offset: usize) -> bool {
            false
        }
        fn slice_at(&self, _offset: usize) -> Self {
            Self
        }
    }
    impl WithBitmapSlice<'_> for Camera {
        type S = Self;
    }
    impl BitmapSlice for Camera {}
    impl NewBitmap for Camera {
        fn with_len(_len: usize) -> Self {
            Self
        }
    }

    fn picture() {
        WATCHED.with_borrow(|watched| {
            let Some((memory, region)) = watched else { return };
            let all = |file: &File| {
                let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
                file.read_exact_at(&mut bytes, 0).unwrap();
                bytes
            };
            MOMENTS.with_borrow_mut(|moments| moments.push((all(memory), all(region))));
        });
    }

    fn memory() -> (GuestMemoryMmap<Camera>, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY_BYTES as u64).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        (GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY_BYTES, Some(offset))]).unwrap(), file)
    }

    fn config(tracker: Tracker) -> RingConfig {
        RingConfig {
            index: 0,
            size: SIZE,
            desc: GuestAddress(0),
            avail: GuestAddress(0x1000),
            used: GuestAddress(USED),
            base: 0,
            event_idx: false,
            indirect: false,
            tracker: Some(tracker),
        }
    }

    /// Dies at each moment of a short life in turn: what has been taken is either in the used ring or will be
    /// submitted again, never both and never neither.
    #[test]
    fn a_death_at_any_moment_leaves_each_request_in_exactly_one_place() {
        let (mem, memory_file) = memory();
        let region_file = create(1, SIZE).unwrap();
        let region = Region::map(region_file.try_clone().unwrap(), 0, region_bytes(1, SIZE), 1, SIZE).unwrap();
        let mut ring = Ring::start(&mem, config(region.tracker(0, SIZE).unwrap())).unwrap();
        for head in 0..5_u16 {
            mem.store(head, GuestAddress(0x1004 + 2 * u64::from(head)), Ordering::Relaxed).unwrap();
        }
        mem.store(5_u16, GuestAddress(0x1002), Ordering::Release).unwrap();
        WATCHED.set(Some((memory_file, region_file)));
        let mut chain = Chain::default();
        for _ in 0..5 {
            assert_eq!(ring.take(&mem, &mut chain).unwrap(), Taken::Request);
        }
        for together in [vec![(2, 1)], vec![(0, 1), (4, 1), (1, 1)]] {
            picture();
            ring.complete_together(&mem, &together).unwrap();
        }
        picture();
        WATCHED.set(None);
        let moments = MOMENTS.take();
        assert!(moments.len() > 6, "only {} moments", moments.len());
        for (moment, (memory_bytes, region_bytes_then)) in moments.iter().enumerate() {
            let (mem, file) = memory();
            file.write_all_at(memory_bytes, 0).unwrap();
            let file = create(1, SIZE).unwrap();
            file.write_all_at(region_bytes_then, 0).unwrap();
            let region = Region::map(file, 0, region_bytes(1, SIZE), 1, SIZE).unwrap();
            let used: u16 = mem.load(GuestAddress(USED + 2), Ordering::Relaxed).unwrap();
            let finished: BTreeSet<u16> = (0..used)
                .map(|n| mem.load::<u32>(GuestAddress(USED + 4 + 8 * u64::from(n)), Ordering::Relaxed).unwrap() as u16)
                .collect();
            let again = region.tracker(0, SIZE).unwrap().recover(used).unwrap().resubmit;
            let both: BTreeSet<u16> = again.iter().copied().chain(finished.iter().copied()).collect();
            assert_eq!(both, (0..5).collect(), "moment {moment}: none is lost");
            assert_eq!(again.len() + finished.len(), 5, "moment {moment}: none is in both places");
            assert!(again.is_sorted(), "moment {moment}: in the order of taking");
            assert!([0, 1, 4].contains(&used), "moment {moment}: the last three are seen together");
        }
    }

    /// Buffers that were taken and not filled are there for the next owner, as are those of a predecessor that nobody
    /// has taken again.
    #[test]
    fn what_is_given_back_is_taken_again_in_the_same_order() {
        let (mem, _) = memory();
        let region = Region::map(create(1, SIZE).unwrap(), 0, region_bytes(1, SIZE), 1, SIZE).unwrap();
        for head in 0..6_u16 {
            mem.store(5 - head, GuestAddress(0x1004 + 2 * u64::from(head)), Ordering::Relaxed).unwrap();
        }
        mem.store(6_u16, GuestAddress(0x1002), Ordering::Release).unwrap();
        let mut chain = Chain::default();
        let mut start = |base, take: usize| {
            let tracker = region.tracker(0, SIZE).unwrap();
            let mut ring = Ring::start(&mem, RingConfig { base, ..config(tracker) }).unwrap();
            let mut heads = Vec::new();
            for _ in 0..take {
                assert_eq!(ring.take(&mem, &mut chain).unwrap(), Taken::Request);
                heads.push(chain.head());
            }
            (ring, heads)
        };
        // Dies with four taken; its successor takes two of them again, completes one and stops.
        drop(start(0, 4));
        let (mut ring, heads) = start(4, 2);
        assert_eq!(heads, [5, 4]);
        ring.complete(&mem, 5, 1).unwrap();
        ring.give_back(&[4]);
        assert_eq!((ring.next_avail(), ring.in_flight()), (1, 0));
        let (_, heads) = start(1, 5);
        assert_eq!(heads, [4, 3, 2, 1, 0]);
    }
}
