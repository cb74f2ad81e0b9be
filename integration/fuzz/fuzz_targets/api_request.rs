//! A client of the operator's socket that sends whatever it likes, in pieces of whatever size. Nothing may panic or loop;
//! no request is longer than the ceilings; what is left over is never more than what came; and the same bytes in one
//! piece make the same requests.
#![no_main]

use atoll_vmm::api::request::{Assembler, BODY_MAX, HEAD_MAX, Head, Malformed, Step};
use libfuzzer_sys::fuzz_target;

type Found = (Vec<(Head, Vec<u8>)>, Option<Malformed>);

fn assemble(bytes: &[u8], mut piece: impl FnMut() -> usize) -> Found {
    let mut assembler = Assembler::default();
    let (mut rest, mut found, mut invited) = (bytes, Vec::new(), false);
    loop {
        match assembler.step() {
            Err(malformed) => return (found, Some(malformed)),
            Ok(Step::Whole(head, body)) => {
                assert!(body.len() == head.length && head.length <= BODY_MAX);
                assert!(head.path.starts_with('/') && head.path.len() <= HEAD_MAX);
                found.push((head, body));
                invited = false;
            }
            Ok(step) => {
                assert!(step != Step::Invite || !std::mem::replace(&mut invited, true), "invited twice");
                if rest.is_empty() {
                    return (found, None);
                }
                let room = assembler.room();
                assert!(room > 0 && room <= BODY_MAX.max(HEAD_MAX));
                let (now, later) = rest.split_at(piece().clamp(1, room).min(rest.len()));
                assembler.bytes().extend(now);
                rest = later;
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((sizes, bytes)) = data.split_at_checked(8) else { return };
    let mut sizes = sizes.iter().cycle();
    let pieces = assemble(bytes, || usize::from(*sizes.next().unwrap_or(&1)));
    let whole = assemble(bytes, || usize::MAX);
    // A line is looked at when its end is there, so a mistake in the last one may show in one piece only.
    assert_eq!(pieces.0, whole.0);
    assert!(pieces.1.is_none() || whole.1.is_some());
});
