//! Deaths at any moment, and rings that lie in awkward places.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{Bytes, FileOffset, GuestMemoryMmap};

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

fn memory() -> (Arc<GuestMemoryMmap<Camera>>, File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY_BYTES as u64).unwrap();
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let ranges = [(GuestAddress(0), MEMORY_BYTES, Some(offset))];
    (Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()), file)
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
