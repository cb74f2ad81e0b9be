//! What is said over the wire comes back as it was, whatever a peer leaves out of it or puts into it is an error.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;

use super::reply::{self, DeviceInfo, IoFd, IoFdKind, IrqInfo, RegionInfo, RegionIoFds};
use super::*;

const SOON: Duration = Duration::from_secs(60);

fn requests() -> Vec<Request> {
    let access = RegionAccess { region: 0, offset: 0x14, count: 4 };
    let irqs = |action, count| Request::SetIrqs(IrqSet { index: irq::MSIX, start: 1, count, action });
    let capabilities = Capabilities { max_msg_fds: Some(8), ..Capabilities::default() };
    vec![
        Request::Version(Version { major: 0, minor: 1, capabilities }),
        Request::DmaMap(DmaMap { address: 1 << 32, len: 4096, offset: 0, readable: true, writable: true }),
        Request::DmaUnmap(DmaUnmap::One { address: 0, len: 4096 }),
        Request::DmaUnmap(DmaUnmap::All),
        Request::DeviceInfo,
        Request::RegionInfo { index: region::CONFIG, room: 32 },
        Request::RegionIoFds { index: 0, room: 16 },
        Request::IrqInfo { index: irq::MSIX },
        irqs(IrqAction::Signals, 2),
        irqs(IrqAction::Disable, 0),
        irqs(IrqAction::Raise(None), 1),
        irqs(IrqAction::Raise(Some(vec![true, false])), 2),
        irqs(IrqAction::Mask(true, None), 1),
        irqs(IrqAction::Mask(false, Some(vec![true])), 1),
        Request::RegionRead(access),
        Request::RegionWrite(access, vec![1, 2, 3, 4]),
        Request::DmaRead { address: 8, count: 3 },
        Request::DmaWrite { address: 8, data: vec![9; 3] },
        Request::Reset,
    ]
}

#[test]
fn every_word_comes_back_as_it_went_and_is_refused_when_it_is_cut() {
    for request in requests() {
        let bytes = request.encode();
        let number = request.command() as u16;
        assert_eq!(Request::decode(number, &bytes), Ok(request.clone()), "{request:?}");
        for len in 0..bytes.len() {
            // A version may stop after its numbers.
            let fine = matches!(request, Request::Version(_)) && len == 4;
            assert_eq!(Request::decode(number, &bytes[..len]).is_ok(), fine, "{request:?} cut at {len}");
        }
    }
    assert_eq!(Request::decode(14, &[]), Err(WireError::Command(14)));
    let regions = RegionInfo { index: 0, size: 0x4000, areas: vec![(0x1000, 0x1000)], ..RegionInfo::default() };
    assert_eq!(RegionInfo::decode(&regions.encode(4096)).unwrap().areas, [(0x1000, 0x1000)]);
    assert_eq!(regions.encode(32).len(), 32, "no more than there is room for");
    let way = |how| IoFd { offset: 0x1000, size: 4, event: 0, how };
    let ways = vec![
        way(IoFdKind::Shadow { memory: 1, offset: 0x1000 }),
        way(IoFdKind::Event(Some(7))),
        way(IoFdKind::Event(None)),
    ];
    let io_fds = RegionIoFds { index: 0, ways };
    assert_eq!(RegionIoFds::decode(&io_fds.encode(4096)), Ok((io_fds.clone(), io_fds.encoded_len())));
    let none = RegionIoFds { index: 0, ways: Vec::new() };
    assert_eq!(RegionIoFds::decode(&io_fds.encode(16)), Ok((none, io_fds.encoded_len())));
}

#[test]
fn what_cannot_be_is_refused() {
    let map = |address: u64, len: u64, flags: u32| {
        let mut bytes = Vec::new();
        bytes.p32(32);
        bytes.p32(flags);
        [0, address, len].into_iter().for_each(|word| bytes.p64(word));
        Request::decode(Command::DmaMap as u16, &bytes).is_ok()
    };
    assert!(map(0, 4096, 3) && !map(0, 0, 3) && !map(u64::MAX, 2, 3) && !map(0, 4096, 1 << 10));
    let access = |region: u32, offset: u64, count: u32| {
        let bytes = reply::encode_access(&RegionAccess { region, offset, count }, &[]);
        Request::decode(Command::RegionRead as u16, &bytes).is_ok()
    };
    assert!(access(0, 0, 4) && !access(9, 0, 4) && !access(0, u64::MAX, 4) && !access(0, 0, 0));
    assert!(!access(0, 0, DATA_MAX + 1));
    let asked = RegionAccess { region: 0, offset: 0, count: 2 };
    assert!(reply::decode_read(&asked, &reply::encode_access(&asked, &[1])).is_err());
    assert!(reply::decode_written(&RegionAccess { offset: 1, ..asked }, &reply::encode_access(&asked, &[])).is_err());
    for (length, flags) in [(15, 0), (16 + PAYLOAD_MAX + 1, 0), (16, 2), (16, 0x21 | 2), (16, 0x80), (16, 0x20)] {
        let mut bytes = [0; HEADER_LEN];
        bytes[4..8].copy_from_slice(&u32::to_le_bytes(length));
        bytes[8..12].copy_from_slice(&u32::to_le_bytes(flags));
        assert!(Header::decode(&bytes).is_err(), "{length} {flags:#x}");
    }
    assert_eq!(Version::decode(b"\0\0\x01\0{\"capabilities\":"), Err(WireError::Capabilities));
    let bytes = b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":3,\"migration\":{\"pgsize\":4096}}}\0";
    assert_eq!(Version::decode(bytes).unwrap().capabilities.descriptors(), 3);
}

/// A message in pieces, with descriptors beside it, and a peer that stops in the middle.
#[test]
fn messages_cross_a_socket_with_their_descriptors() {
    let (a, b) = UnixStream::pair().unwrap();
    let (mut here, mut there) = (Channel::new(a), Channel::new(b));
    let header = Header { id: 7, command: 2, payload: 0, kind: Kind::Command { reply: true } };
    let file = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    here.send(header, &[1, 2, 3], &[file.as_fd(), file.as_fd()], SOON).unwrap();
    let message = there.receive(SOON).unwrap();
    assert_eq!((message.payload.as_slice(), message.descriptors.len()), (&[1, 2, 3][..], 2));
    assert_eq!(message.header, Header { payload: 3, ..header });
    assert!(there.try_receive().unwrap().is_none());
    let nothing = there.receive(Duration::from_millis(5));
    assert!(matches!(nothing, Err(ChannelError::Timeout(_))));
    let bytes = Header { payload: 4, ..header }.encode();
    rustix::io::write(&here, &bytes[..9]).unwrap();
    assert!(there.try_receive().unwrap().is_none());
    rustix::io::write(&here, &bytes[9..]).unwrap();
    rustix::io::write(&here, &[5; 4]).unwrap();
    assert_eq!(there.receive(SOON).unwrap().payload, [5; 4]);
    rustix::io::write(&here, &bytes).unwrap();
    drop(here);
    assert!(there.receive(SOON).unwrap_err().is_hang_up());
}

proptest! {
    /// Whatever comes is refused or is a word that says the same when it is written again.
    #[test]
    fn anything_may_come(command in 0_u16..20, bytes in prop::collection::vec(any::<u8>(), 0..96), zeros in 0_usize..40) {
        let mut bytes = bytes;
        // Words of which much is zero get further.
        bytes.iter_mut().rev().take(zeros).for_each(|byte| *byte = 0);
        if let Ok(request) = Request::decode(command, &bytes) {
            prop_assert_eq!(Request::decode(command, &request.encode()), Ok(request.clone()));
        }
        let _ = RegionInfo::decode(&bytes).map(|info| info.areas.iter().for_each(|(at, len)| assert!(at + len <= info.size)));
        let _ = (RegionIoFds::decode(&bytes), DeviceInfo::decode(&bytes), IrqInfo::decode(&bytes));
    }
}
