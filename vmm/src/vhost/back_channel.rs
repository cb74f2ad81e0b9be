//! Requests of the backend's own (vhost-user, "Back-end communication"): that its configuration space has changed.
//!
//! Heard by the device's thread in its poll loop, never waited for: what is there is read, whole messages are taken out of
//! it, the rest waits for more. The `vhost` crate's server for this channel blocks in the middle of a message, which a
//! hostile backend could make last for ever. Descriptors that come along are not received, so the kernel closes them.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use thiserror::Error;
use vhost::vhost_user::message::BackendReq;

use super::iotlb::Miss;

/// Header: request, flags, size.
const HEADER: usize = 12;
/// Longest body that any request has.
const BODY_MAX: u32 = 4096;
/// Bytes that are taken at a time; who sends more is heard again later.
const TAKEN_MAX: usize = 16 << 10;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// What came is no request, or its sender does not take answers.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// Not a request.
    #[error("a header of request {request} with flags {flags:#x} and {size} bytes")]
    Header {
        /// Its request.
        request: u32,
        /// Its flags.
        flags: u32,
        /// The length that it claims for what follows.
        size: u32,
    },
    /// Nobody reads the answers.
    #[error("it does not take the answers to its requests ({0})")]
    Answer(#[source] io::Error),
}

/// What was heard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// The configuration space has changed, at least once.
    pub config_changed: bool,
    /// The backend has closed the channel.
    pub closed: bool,
}

/// The front end's end.
#[derive(Debug)]
pub struct BackChannel {
    socket: UnixStream,
    /// The beginning of a message.
    pending: Vec<u8>,
}

impl BackChannel {
    /// A channel, and the backend's end of it.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<(Self, UnixStream)> {
        let (socket, backends) = UnixStream::pair()?;
        socket.set_nonblocking(true)?;
        Ok((Self { socket, pending: Vec::new() }, backends))
    }

    /// To be polled.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Reads and answers what is there.
    ///
    /// # Errors
    /// All of [`ChannelError`]; the channel is of no use then.
    pub fn hear(&mut self) -> Result<Heard, ChannelError> {
        self.hear_with(&mut |_| false)
    }

    /// The same for a device behind an IOMMU: `judge` says yes or no to each question for a translation.
    ///
    /// # Errors
    /// All of [`ChannelError`]; the channel is of no use then.
    pub fn hear_with(&mut self, judge: &mut dyn FnMut(Miss) -> bool) -> Result<Heard, ChannelError> {
        let mut heard = Heard::default();
        let mut bytes = [0; 4096];
        let mut taken = 0;
        while taken < TAKEN_MAX {
            match self.socket.read(&mut bytes) {
                Ok(0) => {
                    heard.closed = true;
                    break;
                }
                Ok(count) => {
                    taken += count;
                    self.pending.extend(bytes.iter().take(count));
                    self.take_messages(&mut heard, judge)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    heard.closed = true;
                    break;
                }
            }
        }
        Ok(heard)
    }

    fn take_messages(&mut self, heard: &mut Heard, judge: &mut dyn FnMut(Miss) -> bool) -> Result<(), ChannelError> {
        while let Some(header) = self.pending.first_chunk::<HEADER>() {
            let mut words = header.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
            let mut word = || words.next().unwrap_or(0);
            let (request, flags, size) = (word(), word(), word());
            if flags & VERSION_MASK != VERSION || flags & REPLY != 0 || size > BODY_MAX {
                return Err(ChannelError::Header { request, flags, size });
            }
            let whole = HEADER + size as usize;
            if self.pending.len() < whole {
                return Ok(());
            }
            let body = self.pending.get(HEADER..whole).unwrap_or_default();
            let miss = if request == u32::from(BackendReq::IOTLB_MSG) { Miss::decode(body) } else { None };
            self.pending.drain(..whole);
            let changed = request == u32::from(BackendReq::CONFIG_CHANGE_MSG) && size == 0;
            heard.config_changed |= changed;
            let known = changed || miss.is_some_and(&mut *judge);
            if flags & NEED_REPLY != 0 {
                self.answer(request, u64::from(!known))?;
            }
        }
        Ok(())
    }

    /// Zero is yes.
    fn answer(&mut self, request: u32, value: u64) -> Result<(), ChannelError> {
        let mut message = Vec::with_capacity(HEADER + 8);
        for word in [request, VERSION | REPLY, 8] {
            message.extend(word.to_le_bytes());
        }
        message.extend(value.to_le_bytes());
        self.socket.write_all(&message).map_err(ChannelError::Answer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(number: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        let words = [number, flags, body.len() as u32];
        words.iter().flat_map(|word| word.to_le_bytes()).chain(body.iter().copied()).collect()
    }

    /// Messages come in pieces and several at a time; unknown ones are refused where an answer is wanted, and passed over.
    #[test]
    fn requests_in_pieces_are_heard() {
        let (mut channel, backend) = BackChannel::new().unwrap();
        let bytes = [request(3, 1, &[7; 40]), request(8, 9, &[1; 16]), request(2, 9, &[])].concat();
        for byte in &bytes[..bytes.len() - 1] {
            (&backend).write_all(&[*byte]).unwrap();
            assert_eq!(channel.hear().unwrap(), Heard::default());
        }
        (&backend).write_all(&bytes[bytes.len() - 1..]).unwrap();
        assert_eq!(channel.hear().unwrap(), Heard { config_changed: true, closed: false });
        let mut answers = [0; 40];
        (&backend).read_exact(&mut answers).unwrap();
        let words: Vec<u32> = answers.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        assert_eq!(words, [8, 5, 8, 1, 0, 2, 5, 8, 0, 0]);
        drop(backend);
        assert!(channel.hear().unwrap().closed);
    }

    #[test]
    fn nonsense_and_floods_end_the_channel() {
        for bytes in [request(2, 0, &[]), request(2, 5, &[]), [2, 1, u32::MAX].map(u32::to_le_bytes).concat()] {
            let (mut channel, backend) = BackChannel::new().unwrap();
            (&backend).write_all(&bytes).unwrap();
            assert!(matches!(channel.hear(), Err(ChannelError::Header { .. })));
        }
        let (mut channel, backend) = BackChannel::new().unwrap();
        backend.set_nonblocking(true).unwrap();
        let flood = request(2, 9, &[]).repeat(1000);
        let ended = (0..1000).any(|_| {
            let _ = (&backend).write(&flood);
            matches!(channel.hear(), Err(ChannelError::Answer(_)))
        });
        assert!(ended, "answers that nobody reads are not kept");
    }

    proptest! {
        /// Whatever comes, in whatever pieces: it is heard the same, and no more than one message is kept.
        #[test]
        fn pieces_make_no_difference(
            words in prop::collection::vec(prop_oneof![0_u32..12, Just(1), Just(9), any::<u32>()], 0..60),
            piece in 1_usize..40,
        ) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let outcome = |piece: usize| {
                let (mut channel, backend) = BackChannel::new().unwrap();
                let mut heard = Heard::default();
                for part in bytes.chunks(piece) {
                    (&backend).write_all(part).unwrap();
                    match channel.hear() {
                        Ok(more) => heard.config_changed |= more.config_changed,
                        Err(error) => return (heard, Some(error.to_string())),
                    }
                }
                assert!(channel.pending.len() < HEADER + BODY_MAX as usize);
                (heard, None)
            };
            prop_assert_eq!(outcome(piece).1, outcome(1).1);
            if outcome(1).1.is_none() {
                prop_assert_eq!(outcome(piece).0, outcome(1).0);
            }
        }
    }
}
