//! Whoever types says whatever it likes, in any pieces, to a device whose guest has buffers or not. Nothing may panic, the guest
//! gets whole reports of what the device has, and once everybody is gone no key is down.
#![no_main]

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::net::UnixStream;

use atoll_input::feed::Feed;
use atoll_input::shape;
use atoll_protocol::input::{FRAME_MAX, Frame, Hearer, InputKind};
use libfuzzer_sys::fuzz_target;

fn tell(feed: &mut Feed, guest: &mut BTreeSet<u16>, kind: InputKind, events_max: usize) {
    while let Some(report) = feed.next(events_max) {
        assert!(report.told().count() <= 32 && report.events().iter().all(|event| shape::has(kind, *event)));
        for (key, down) in report.events().iter().filter_map(|event| event.as_key()) {
            if down {
                guest.insert(key);
            } else {
                guest.remove(&key);
            }
        }
        feed.told(&report);
    }
}

fuzz_target!(|data: &[u8]| {
    let Some(([kind, size], rest)) = data.split_first_chunk::<2>() else { return };
    if let Ok(Some((frame, len))) = Frame::decode(rest) {
        assert!(len <= FRAME_MAX && frame.encode() == rest[..len]);
    }
    let kind = InputKind::ALL[usize::from(kind % 3)];
    let (mut feed, mut guest) = (Feed::new(kind), BTreeSet::new());
    let (mut peer, ours) = UnixStream::pair().expect("a pair");
    let mut hearer = Hearer::new(ours);
    for piece in rest.chunks(usize::from(size >> 2) + 1) {
        if peer.write_all(piece).is_err() {
            break;
        }
        loop {
            match hearer.try_hear() {
                Ok(Some(frame)) => feed.hear(frame),
                Ok(None) => break,
                Err(_) => {
                    feed.let_go();
                    tell(&mut feed, &mut guest, kind, usize::from(*size));
                    assert!(guest.is_empty());
                    return;
                }
            }
            match piece.first().map(|byte| byte % 3) {
                Some(0) => feed.drop_waiting(),
                Some(1) => tell(&mut feed, &mut guest, kind, usize::from(*size)),
                _ => {}
            }
            assert_eq!(feed.held(), &guest);
        }
    }
});
