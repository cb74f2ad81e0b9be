//! SET_VRING_ENABLE before SET_FEATURES. QEMU's network card sends it when the card is made, long before a driver has
//! chosen features; the `vhost` crate ends the conversation then, as the request needs a feature that nobody has agreed to
//! yet. All other backends obey, and so does this one: the message is taken from the socket before the crate sees it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// Header (request, flags, size) and payload (index, state).
const WORDS: usize = 5;

/// What was asked: a ring, and whether it is to be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Enable {
    pub(crate) index: u32,
    pub(crate) on: bool,
    needs_answer: bool,
}

/// Takes the message, which is next on the socket.
pub(crate) fn take(mut stream: &UnixStream) -> io::Result<Enable> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("SET_VRING_ENABLE {what}"));
    let mut bytes = [0; 4 * WORDS];
    stream.read_exact(&mut bytes)?;
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    let [_, flags, size, index, state] = words;
    if flags & VERSION_MASK != VERSION || flags & REPLY != 0 || size != 8 {
        return Err(wrong("has a header that cannot be right"));
    }
    let on = match state {
        0 => false,
        1 => true,
        _ => return Err(wrong("is neither on nor off")),
    };
    Ok(Enable { index, on, needs_answer: flags & NEED_REPLY != 0 })
}

impl Enable {
    /// Answers, if that was asked for.
    pub(crate) fn answer(self, mut stream: &UnixStream, done: bool) -> io::Result<()> {
        if !self.needs_answer {
            return Ok(());
        }
        let words = [u32::from(FrontendReq::SET_VRING_ENABLE), VERSION | REPLY, 8, u32::from(!done), 0];
        stream.write_all(&words.map(u32::to_le_bytes).concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(words: &[u32]) -> (UnixStream, UnixStream) {
        let (mut front, back) = UnixStream::pair().unwrap();
        front.write_all(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>()).unwrap();
        (front, back)
    }

    #[test]
    fn it_is_taken_and_answered() {
        let (mut front, back) = said(&[18, VERSION | NEED_REPLY, 8, 3, 1]);
        let enable = take(&back).unwrap();
        assert_eq!((enable.index, enable.on), (3, true));
        enable.answer(&back, true).unwrap();
        let mut answer = [0; 20];
        front.read_exact(&mut answer).unwrap();
        assert_eq!(answer.to_vec(), [18_u32, 5, 8, 0, 0].map(u32::to_le_bytes).concat());
    }

    #[test]
    fn what_cannot_be_right_is_refused() {
        for words in [[18, 2, 8, 0, 1], [18, 1, 4, 0, 1], [18, 5, 8, 0, 1], [18, 1, 8, 0, 2]] {
            let (_front, back) = said(&words);
            assert!(take(&back).is_err(), "{words:?}");
        }
    }
}
