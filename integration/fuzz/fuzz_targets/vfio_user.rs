//! What either end of vfio-user may be sent: a question of a client's, an answer of a server's. Nothing of it may panic, what is
//! taken says the same when it is written again, and what is shown to a guest fits on the bus.
#![no_main]

use atoll_protocol::vfio_user::reply::{DeviceInfo, IrqInfo, RegionInfo, RegionIoFds};
use atoll_protocol::vfio_user::{Header, Request};
use atoll_vmm::vfio_user::Shape;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_first_chunk::<16>() else { return };
    if let Ok(header) = Header::decode(head) {
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }
    let command = u16::from(head[2] % 20);
    if let Ok(request) = Request::decode(command, rest) {
        assert_eq!(Request::decode(command, &request.encode()), Ok(request));
    }
    if let Ok(info) = RegionInfo::decode(rest) {
        assert!(info.areas.iter().all(|(at, len)| at + len <= info.size));
    }
    let _ = (DeviceInfo::decode(rest), IrqInfo::decode(rest), RegionIoFds::decode(rest));
    if let Some((config, rest)) = rest.split_first_chunk::<256>() {
        let mut sizes = [0; 6];
        for (size, byte) in sizes.iter_mut().zip(rest) {
            *size = 1_u64.checked_shl(u32::from(*byte)).unwrap_or(u64::from(*byte));
        }
        if let Ok(shape) = Shape::read(config, sizes, 64) {
            assert!(shape.vectors > 0 && shape.bars.iter().all(|(_, _, len)| len.is_power_of_two()));
        }
    }
});
