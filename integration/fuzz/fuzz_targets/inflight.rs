//! An in-flight region in which a dying device, or a front end that means harm, left whatever it likes. Reading it may
//! not panic; what comes out are distinct heads of the ring; and the mended region is one that reads the same again.
#![no_main]

use std::collections::HashSet;

use atoll_kit::inflight::{Region, create, region_bytes};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [order, ring_order, queue, used_low, used_high, rest @ ..] = data else { return };
    let (queue_size, queues) = (1_u16 << (order % 9), 2_u16);
    let ring_size = 1_u16 << (ring_order % 10);
    let used = u16::from_le_bytes([*used_low, *used_high]);
    let bytes = region_bytes(queues, queue_size);
    let file = create(queues, queue_size).unwrap();
    let len = rest.len().min(bytes as usize);
    std::os::unix::fs::FileExt::write_all_at(&file, &rest[..len], 0).unwrap();
    let region = Region::map(file, 0, bytes, queues, queue_size).unwrap();
    let Ok(mut tracker) = region.tracker(u16::from(queue % 3), ring_size) else { return };
    let Ok(first) = tracker.recover(used) else { return };
    let distinct: HashSet<u16> = first.resubmit.iter().copied().collect();
    assert_eq!(distinct.len(), first.resubmit.len());
    assert!(first.resubmit.iter().all(|head| *head < ring_size));
    let again = region.tracker(u16::from(queue % 3), ring_size).unwrap().recover(used).unwrap();
    assert_eq!(again.resubmit, first.resubmit);
    // The record goes on from there: everything completes, and nothing is left.
    let mut used = used;
    for head in &first.resubmit {
        tracker.completing(*head);
        used = used.wrapping_add(1);
        tracker.completed([*head].into_iter(), used);
    }
    tracker.take(0);
    let last = region.tracker(u16::from(queue % 3), ring_size).unwrap().recover(used).unwrap();
    assert_eq!(last.resubmit, [0]);
});
