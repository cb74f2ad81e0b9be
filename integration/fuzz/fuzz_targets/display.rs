//! What either end of the display wire may be sent: a device's message, a screen's, and any row of them in any pieces. Nothing
//! may panic, what is taken says the same when it is written again, and what is announced is not believed.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;

use atoll_protocol::display::{Channel, HEADER_LEN, Header, REPLY_MAX, REQUEST_MAX, Reply, Request};
use libfuzzer_sys::fuzz_target;

fn again(header: &Header, payload: &[u8]) {
    let mut bytes = Vec::new();
    if let Ok(request) = Request::decode(header.code, payload) {
        request.put(&mut bytes);
        assert_eq!(Request::decode(header.code, &bytes[HEADER_LEN..]), Ok(request));
        bytes.clear();
    }
    if let Ok(reply) = Reply::decode(header, payload) {
        reply.put(&mut bytes);
        assert_eq!(Reply::decode(header, &bytes[HEADER_LEN..]), Ok(reply));
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    if let Some((head, payload)) = rest.split_first_chunk::<HEADER_LEN>()
        && let Ok(header) = Header::decode(head, REQUEST_MAX)
    {
        assert_eq!(Header::decode(&header.encode(), REQUEST_MAX), Ok(header));
        again(&Header { code: header.code % 14, ..header }, payload);
    }
    let (mut peer, ours) = UnixStream::pair().expect("a pair");
    let mut channel = Channel::new(ours, if first & 1 == 0 { REQUEST_MAX } else { REPLY_MAX });
    for piece in rest.chunks(usize::from(first >> 1) + 1) {
        if peer.write_all(piece).is_err() {
            return;
        }
        loop {
            match channel.try_receive() {
                Ok(Some(message)) => again(&message.header, &message.payload),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
