//! What is said over the input wire comes back as it was; what cannot be is an error; nobody waits.

use proptest::prelude::*;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

use super::*;

fn pair(kind: SocketType) -> (Speaker, Hearer) {
    let (a, b) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    (Speaker::new(a), Hearer::new(b))
}

fn report(keys: &[(u16, bool)]) -> Frame {
    Frame::Report(Report::new(keys.iter().map(|(key, down)| Event::key(*key, *down).unwrap()).collect()).unwrap())
}

/// The bytes of an event are those of virtio-input's structure, and a report is the document's: its end is in it.
#[test]
fn numbers_stand_where_a_guest_looks_for_them() {
    let events = vec![Event::absolute(code::Y, 0x1234).unwrap(), Event::relative(code::WHEEL, -1).unwrap()];
    let bytes = Frame::Report(Report::new(events).unwrap()).encode();
    let expected = [2, 0, 3, 0, 3, 0, 1, 0, 0x34, 0x12, 0, 0, 2, 0, 8, 0, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(bytes, expected);
    assert_eq!(Frame::Begin.encode(), [1, 0, 0, 0]);
}

#[test]
fn what_cannot_be_is_refused() {
    assert!(Event::key(code::KEY_MAX + 1, true).is_err() && Event::absolute(code::X, AXIS_MAX + 1).is_err());
    assert_eq!(Report::new(Vec::new()), Err(WireError::Count(0)));
    let many = vec![Event::key(30, true).unwrap(); REPORT_MAX + 1];
    assert_eq!(Report::new(many), Err(WireError::Count(REPORT_MAX + 1)));
    let good = report(&[(30, true)]).encode();
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        Frame::decode(&bytes)
    };
    assert_eq!(changed(0, 9), Err(WireError::Kind(9)));
    assert_eq!(changed(2, 1), Err(WireError::Count(0)), "SYN alone says nothing");
    assert_eq!(changed(3, 1), Err(WireError::Count(257)));
    assert_eq!(changed(4, 0), Err(WireError::Event { kind: 0, code: 30, value: 1 }), "a SYN in the middle");
    assert_eq!(changed(8, 2), Err(WireError::Event { kind: 1, code: 30, value: 2 }), "repetition is the guest's");
    assert_eq!(changed(12, 1), Err(WireError::Open));
    assert!((0..good.len()).all(|len| Frame::decode(&good[..len]) == Ok(None)));
}

/// A speaker is announced, one that is not listened to loses what it says and begins anew, the end of it is heard.
#[test]
fn nobody_waits_for_anybody() {
    for kind in [SocketType::SEQPACKET, SocketType::STREAM] {
        let (mut speaker, mut hearer) = pair(kind);
        assert!(hearer.try_hear().unwrap().is_none());
        speaker.say(&report(&[(30, true)])).unwrap();
        assert_eq!(hearer.try_hear().unwrap(), Some(Frame::Begin));
        assert_eq!(hearer.try_hear().unwrap(), Some(report(&[(30, true)])));
        let mut sent = 0;
        while speaker.say(&report(&[(31, true), (32, true)])).unwrap() == Spoken::Sent {
            sent += 1;
        }
        assert!(speaker.owes_begin() && sent > 10);
        for _ in 0..sent {
            assert_eq!(hearer.try_hear().unwrap(), Some(report(&[(31, true), (32, true)])));
        }
        assert!(hearer.try_hear().unwrap().is_none());
        assert_eq!(speaker.say(&report(&[(32, false)])).unwrap(), Spoken::Sent);
        assert_eq!(hearer.try_hear().unwrap(), Some(Frame::Begin), "what was held is let go");
        assert_eq!(hearer.try_hear().unwrap(), Some(report(&[(32, false)])));
        drop(speaker);
        assert!(matches!(hearer.try_hear(), Err(InputError::Closed)));
    }
    let (mut speaker, hearer) = pair(SocketType::STREAM);
    hearer.hang_up();
    assert!(matches!(speaker.begin(), Err(InputError::Closed)));
}

/// A stream that ends in the middle of a frame says so; a packet is a frame, also for the one who comes later.
#[test]
fn a_torn_stream_is_noticed() {
    let (speaker, mut hearer) = pair(SocketType::STREAM);
    let bytes = report(&[(30, true)]).encode();
    send(&speaker, &bytes[..7], SendFlags::empty()).unwrap();
    assert!(hearer.try_hear().unwrap().is_none());
    drop(speaker);
    assert!(matches!(hearer.try_hear(), Err(InputError::Torn)));
}

proptest! {
    /// Whatever comes is refused, incomplete, or a frame that says the same when it is written again.
    #[test]
    fn anything_may_come(mut bytes in prop::collection::vec(any::<u8>(), 0..80), zeros in 0_usize..40, kind in 0_u8..4, count in 0_u8..9) {
        // Small numbers get further.
        bytes.iter_mut().rev().take(zeros).for_each(|byte| *byte = 0);
        bytes.splice(..bytes.len().min(4), [kind, 0, count, 0]);
        if let Ok(Some((frame, len))) = Frame::decode(&bytes) {
            prop_assert!(len <= bytes.len() && len <= FRAME_MAX);
            prop_assert_eq!(frame.encode(), &bytes[..len]);
        }
    }
}
