//! Deaths at any moment, and rings that lie in awkward places.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{Bytes, FileOffset, GuestMemoryMmap};

use super::*;
use crate::dirty::DirtyLog;
use crate::inflight::{Region, create, region_bytes};
use crate::memory::MemoryTable;

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

fn memory() -> (Arc<GuestMemoryMmap<Camera>>, File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY_BYTES as u64).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let ranges = [(GuestAddress(0), MEMORY_BYTES, Some(offset))];
    (Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()), file)
}

fn config(tracker: impl Into<Option<Tracker>>) -> RingConfig {
    RingConfig {
        index: 0,
        size: SIZE,
        desc: GuestAddress(0),
        avail: GuestAddress(0x1000),
        used: GuestAddress(USED),
        base: 0,
        event_idx: false,
        indirect: false,
        tracker: tracker.into(),
        in_order: false,
    }
}

/// Dies at each moment of a short life in turn: what has been taken is either in the used ring or will be
/// submitted again, never both and never neither.
#[test]
fn a_death_at_any_moment_leaves_each_request_in_exactly_one_place() {
    let (mem, memory_file) = memory();
    let region_file = create(1, SIZE).unwrap();
    let region = Region::map(region_file.try_clone().unwrap(), 0, region_bytes(1, SIZE), 1, SIZE).unwrap();
    let mut ring = Ring::start(Arc::clone(&mem), config(region.tracker(0, SIZE).unwrap())).unwrap();
    for head in 0..5_u16 {
        mem.store(head, GuestAddress(0x1004 + 2 * u64::from(head)), Ordering::Relaxed).unwrap();
    }
    mem.store(5_u16, GuestAddress(0x1002), Ordering::Release).unwrap();
    WATCHED.set(Some((memory_file, region_file)));
    let mut chain = Chain::default();
    for _ in 0..5 {
        assert_eq!(ring.take(&mut chain).unwrap(), Taken::Request);
    }
    for together in [vec![(2, 1)], vec![(0, 1), (4, 1), (1, 1)]] {
        picture();
        ring.complete_together(&together).unwrap();
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
        let mut ring = Ring::start(Arc::clone(&mem), RingConfig { base, ..config(tracker) }).unwrap();
        let mut heads = Vec::new();
        for _ in 0..take {
            assert_eq!(ring.take(&mut chain).unwrap(), Taken::Request);
            heads.push(chain.head());
        }
        (ring, heads)
    };
    // Dies with four taken; its successor takes two of them again, completes one and stops.
    drop(start(0, 4));
    let (mut ring, heads) = start(4, 2);
    assert_eq!(heads, [5, 4]);
    ring.complete(5, 1).unwrap();
    ring.give_back(&[4]);
    assert_eq!((ring.next_avail(), ring.in_flight()), (1, 0));
    let (_, heads) = start(1, 5);
    assert_eq!(heads, [4, 3, 2, 1, 0]);
}

/// Makes eight heads available in a ring at these addresses, takes and completes five of them, and gives back what the used
/// ring holds then.
fn short_life<M: GuestMemory>(mem: &Arc<M>, [desc, avail, used]: [u64; 3]) -> Vec<(u32, u32)> {
    for head in 0..SIZE {
        let at = desc + 16 * u64::from(head);
        mem.write_slice(&(0x100 * u64::from(head)).to_le_bytes(), GuestAddress(at)).unwrap();
        mem.write_slice(&u64::from(head + 1).to_le_bytes(), GuestAddress(at + 8)).unwrap();
        mem.write_slice(&(SIZE - 1 - head).to_le_bytes(), GuestAddress(avail + 4 + 2 * u64::from(head))).unwrap();
    }
    mem.write_slice(&SIZE.to_le_bytes(), GuestAddress(avail + 2)).unwrap();
    let addresses = [desc, avail, used].map(GuestAddress);
    let [desc, avail, used_at] = addresses;
    let config = RingConfig {
        index: 0,
        size: SIZE,
        desc,
        avail,
        used: used_at,
        base: 0,
        event_idx: true,
        indirect: false,
        tracker: None,
        in_order: false,
    };
    let mut ring = Ring::start(Arc::clone(mem), config).unwrap();
    let mut chain = Chain::default();
    for expected in (0..SIZE).rev().take(5) {
        assert_eq!(ring.take(&mut chain).unwrap(), Taken::Request);
        assert_eq!((chain.head(), chain.readable_bytes()), (expected, u64::from(expected) + 1));
    }
    ring.complete_together(&[(5, 50), (7, 70)]).unwrap();
    ring.complete_together(&[(6, 60), (4, 40), (3, 30)]).unwrap();
    assert!(ring.arm().unwrap(), "three more are there");
    let word = |at: u64| {
        let mut bytes = [0; 4];
        mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        u32::from_le_bytes(bytes)
    };
    let mut index = [0; 2];
    mem.read_slice(&mut index, GuestAddress(used + 2)).unwrap();
    (0..u64::from(u16::from_le_bytes(index))).map(|n| (word(used + 4 + 8 * n), word(used + 8 + 8 * n))).collect()
}

/// Pointers are for areas that lie in one region at an even address; others are reached the long way, with the same result.
#[test]
fn a_ring_over_the_edge_of_a_region_works_like_any_other() {
    let expected = [(5, 50), (7, 70), (6, 60), (4, 40), (3, 30)];
    let places: [[u64; 3]; 4] = [
        [0x1000, 0x1800, 0x1900],
        // Each area in turn begins in the lower region and ends in the upper one.
        [0x1fc0, 0x2800, 0x2900],
        [0x1000, 0x1ff8, 0x2900],
        [0x1000, 0x1800, 0x1fe8],
    ];
    for place in places {
        let ranges = [(GuestAddress(0), 0x2000), (GuestAddress(0x2000), 0x2000)];
        let mem = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
        assert_eq!(short_life(&mem, place), expected, "{place:x?}");
    }
    // A region that begins at an odd address has no aligned pointers.
    let mem = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x0ffe), 0x3000)]).unwrap());
    assert_eq!(short_life(&mem, [0x1000, 0x1800, 0x1900]), expected);
}

/// The front end replaces the memory table under a running ring: from then on the ring is in the new memory. One in which
/// there is no place for it breaks it, and touches nothing.
#[test]
fn a_ring_follows_its_memory_and_breaks_when_that_has_shrunk() {
    let memory = |bytes| Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), bytes)]).unwrap());
    let (first, second, small) = (memory(MEMORY_BYTES), memory(MEMORY_BYTES), memory(0x1000));
    let mut ring = Ring::start(Arc::clone(&first), config(None)).unwrap();
    for mem in [&first, &second] {
        mem.store(1_u16, GuestAddress(0x1002), Ordering::Release).unwrap();
    }
    let mut chain = Chain::default();
    assert_eq!(ring.take(&mut chain).unwrap(), Taken::Request);
    ring.set_memory(Arc::clone(&second));
    ring.complete(0, 9).unwrap();
    let used = |mem: &GuestMemoryMmap<()>| mem.load::<u16>(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
    assert_eq!((used(&first), used(&second)), (0, 1));
    drop((first, second));
    ring.set_memory(small);
    assert!(matches!(ring.take(&mut chain), Err(RingError::Broken { .. })));
    assert!(matches!(ring.complete(0, 0), Err(RingError::Broken { .. })));
    assert!(matches!(ring.arm(), Err(RingError::Broken { .. })));
    assert!(!ring.waiting());
}

/// What a ring writes by its pointers is in the dirty log, as everything else is, while it is switched on.
#[test]
fn used_entries_are_logged_while_the_log_is_on() {
    let memfd = |bytes| {
        let fd = rustix::fs::memfd_create(c"test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, bytes).unwrap();
        File::from(fd)
    };
    let log = Arc::new(DirtyLog::default());
    let pages = memfd(4096);
    log.set_base(pages.try_clone().unwrap(), 0, 4096).unwrap();
    let mut table = MemoryTable::default();
    let region =
        VhostUserMemoryRegion { guest_phys_addr: 0, memory_size: MEMORY_BYTES as u64, user_addr: 0, mmap_offset: 0 };
    table.replace(&[region], vec![memfd(MEMORY_BYTES as u64)], &log).unwrap();
    let mem = table.ram().unwrap();
    let dirty = || {
        let mut byte = [0];
        pages.read_exact_at(&mut byte, 0).unwrap();
        byte[0]
    };
    // Descriptors, avail ring and used ring on a page each.
    let mut ring = Ring::start(Arc::clone(mem), config(None)).unwrap();
    ring.complete(3, 1).unwrap();
    assert_eq!(dirty(), 0, "the log is off");
    log.switch(true);
    ring.complete(4, 1).unwrap();
    assert_eq!(dirty(), 1 << (USED >> 12));
    ring.arm().unwrap();
    assert_eq!(dirty(), 1 << (USED >> 12));
}

/// A device that completes in order dies with some taken: its record says that nothing is in flight, and its successor
/// takes the rest from the used index on, whichever base the front end gives.
#[test]
fn a_successor_in_order_goes_on_from_the_used_index() {
    let (mem, _) = memory();
    let region = Region::map(create(1, SIZE).unwrap(), 0, region_bytes(1, SIZE), 1, SIZE).unwrap();
    for head in 0..6_u16 {
        mem.store(5 - head, GuestAddress(0x1004 + 2 * u64::from(head)), Ordering::Relaxed).unwrap();
    }
    mem.store(6_u16, GuestAddress(0x1002), Ordering::Release).unwrap();
    let mut chain = Chain::default();
    let mut life = |in_order, base| {
        let tracker = region.tracker(0, SIZE).unwrap();
        let mut ring = Ring::start(Arc::clone(&mem), RingConfig { base, in_order, ..config(Some(tracker)) }).unwrap();
        let mut heads = Vec::new();
        for _ in 0..2 {
            assert_eq!(ring.take(&mut chain).unwrap(), Taken::Request);
            heads.push(chain.head());
        }
        ring.complete(heads[0], 0).unwrap();
        heads
    };
    assert_eq!(life(true, 0), [5, 4]);
    assert_eq!(life(true, 1), [4, 3]);
    // One that keeps marks comes in between.
    assert_eq!(life(false, 2), [3, 2]);
    assert_eq!(life(true, 4), [2, 1], "the front end counts the one in flight, the ring begins before it");
    assert!(region.tracker(0, SIZE).unwrap().recover(4).unwrap().resubmit.is_empty());
}
