//! What a dead backend left as its record of requests in flight, as the front end's stand-in reads it: an error, or
//! distinct heads of the ring; and where the kit's own reader understands it too, both find the same.
#![no_main]

use std::collections::HashSet;

use atoll_kit::inflight::{Region, create, region_bytes};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [order, used_low, used_high, record @ ..] = data else { return };
    let (size, used) = (1_u16 << (order % 9), u16::from_le_bytes([*used_low, *used_high]));
    let bytes = region_bytes(1, size);
    let mut part = record.to_vec();
    let found = atoll_vmm::vhost::unfinished(&part, size, used);
    if let Ok(heads) = &found {
        assert!(heads.iter().all(|head| *head < size));
        assert_eq!(heads.iter().collect::<HashSet<_>>().len(), heads.len());
    }
    part.resize(bytes as usize, 0);
    // A mark behind the ring's last entry is refused by the front end; to the kit it is padding.
    part.get_mut(16 + 16 * usize::from(size)..).unwrap_or_default().fill(0);
    let found = atoll_vmm::vhost::unfinished(&part, size, used);
    let file = create(1, size).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &part, 0).unwrap();
    let region = Region::map(file, 0, bytes, 1, size).unwrap();
    // The kit also wants the record to be of the ring's size.
    if let Ok(recovered) = region.tracker(0, size).unwrap().recover(used) {
        assert_eq!(found, Ok(recovered.resubmit));
    }
});
