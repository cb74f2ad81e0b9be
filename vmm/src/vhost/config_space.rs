//! GET_CONFIG, spoken by hand.
//!
//! The `vhost` crate reads as many bytes as it asked for. A backend that refuses, or has a smaller configuration space,
//! answers with fewer (the specification has it answer with none), and the crate then waits for the rest for ever. This
//! is the one message where an answer's length is the answer, so it is read by its header here.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq;

use super::error::{ConversationError, Step};

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
/// Header: request, flags, size. Body: offset, size, flags; then the bytes.
const WORDS: usize = 3;
const PART: usize = 4 * WORDS;

/// Reads the first `len` bytes of the configuration space.
pub(super) fn read(socket: &UnixStream, len: u32) -> Result<Vec<u8>, ConversationError> {
    let step = Step::GetConfig;
    let gone = |error: io::Error| ConversationError::Gone { step, reason: error.to_string() };
    let absurd = |what: String| ConversationError::Absurd { step, what };
    let request = u32::from(FrontendReq::GET_CONFIG);
    let bytes = usize::try_from(len).map_err(|error| absurd(error.to_string()))?;

    let mut message = Vec::with_capacity(2 * PART + bytes);
    for word in [request, VERSION, 12 + len, 0, len, 0] {
        message.extend(word.to_le_bytes());
    }
    message.resize(2 * PART + bytes, 0);
    let mut stream = socket;
    stream.write_all(&message).map_err(gone)?;

    let [answered, flags, size] = words(stream).map_err(gone)?;
    if answered != request || flags & REPLY == 0 || flags & VERSION_MASK != VERSION {
        return Err(absurd(format!("a header of request {answered} with flags {flags:#x}")));
    }
    let payload = usize::try_from(size).ok().and_then(|size| size.checked_sub(PART));
    let Some(payload) = payload.filter(|payload| *payload <= bytes) else {
        return Err(absurd(format!("a message of {size} bytes, where {} were asked for", PART + bytes)));
    };
    let [offset, told, _flags] = words(stream).map_err(gone)?;
    let mut config = vec![0; payload];
    stream.read_exact(&mut config).map_err(gone)?;
    match told {
        0 => Err(ConversationError::Refused { step }),
        _ if told == len && payload == bytes && offset == 0 => Ok(config),
        _ => Err(absurd(format!("{told} bytes ({payload} present) from {offset}, where {len} from 0 were asked for"))),
    }
}

fn words(mut stream: &UnixStream) -> io::Result<[u32; WORDS]> {
    let mut bytes = [0; PART];
    stream.read_exact(&mut bytes)?;
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    Ok(words)
}
