//! A guest that sends any header before any frame, and any command: what passes the checks lies within the frame, and
//! segments carry the frame's payload, whole and in order. Nothing may panic.
#![no_main]

use atoll_net::control::Command;
use atoll_net::filter::{Rules, TABLE_MAX, is_group};
use atoll_net::header::{HEADER_BYTES, Header, NEEDS_CSUM, Offloads, Work};
use atoll_net::offload;
use libfuzzer_sys::fuzz_target;

fn command(data: &[u8]) {
    let mut rules = Rules::default();
    if let Ok(command) = Command::parse(data, 8) {
        command.apply(&mut rules);
    }
    assert!(rules.single.len() <= TABLE_MAX && rules.groups.len() <= TABLE_MAX && !is_group(&rules.own));
}

fn frame(data: &[u8]) {
    let Some((raw, frame)) = data.split_first_chunk::<HEADER_BYTES>() else { return };
    offload::flow(frame);
    let Ok(header) = Header::parse(raw).check(Offloads::ALL, frame.len() as u64) else { return };
    if header.flags & NEEDS_CSUM != 0 {
        assert!(offload::complete(&mut frame.to_vec(), &header).is_some(), "it was said to lie within the frame");
    }
    if header.work_for(Offloads::NONE) != Work::Segment {
        return;
    }
    let mut stream = Vec::new();
    let whole = offload::segment(frame, &header, |segment| {
        assert!(segment.len() <= frame.len());
        let tcp = usize::from(header.csum_start);
        let payload = tcp + usize::from(segment[tcp + 12] >> 4) * 4;
        assert!(segment.len() - payload <= usize::from(header.gso_size));
        stream.extend_from_slice(&segment[payload..]);
        true
    });
    if whole {
        assert!(frame.ends_with(&stream) && !stream.is_empty());
    }
}

fuzz_target!(|data: &[u8]| {
    match data.split_first() {
        Some((0, rest)) => command(rest),
        Some((_, rest)) => frame(rest),
        None => {}
    }
});
