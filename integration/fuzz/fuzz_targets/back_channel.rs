//! A device process that asks what it likes on the channel for its own requests, in pieces of any length: nothing panics,
//! nothing waits, and an answer comes only to what was asked.
#![no_main]

use std::io::{Read, Write};

use atoll_vmm::vhost::BackChannel;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((piece, bytes)) = bytes.split_first() else { return };
    let Ok((mut channel, mut backend)) = BackChannel::new() else { return };
    backend.set_nonblocking(true).expect("a socket");
    let mut answers = 0;
    for part in bytes.chunks(usize::from(*piece).max(1)) {
        if backend.write_all(part).is_err() || channel.hear().is_err() {
            return;
        }
        let mut answer = [0; 4096];
        while let Ok(count @ 1..) = backend.read(&mut answer) {
            answers += count;
        }
    }
    // An answer has 20 bytes, a request at least 12.
    assert!(answers % 20 == 0 && answers / 20 <= bytes.len() / 12);
});
