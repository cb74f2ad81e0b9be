//! The 12 bytes before everything.

use super::WireError;

/// Bytes of a header.
pub const HEADER_LEN: usize = 12;

const REPLY: u32 = 1 << 2;

/// What stands before every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Number of the message; an answer has its question's.
    pub code: u32,
    /// It is an answer.
    pub reply: bool,
    /// Bytes that follow.
    pub payload: u32,
}

impl Header {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let words = [self.code, if self.reply { REPLY } else { 0 }, self.payload];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// From bytes, for an end that takes `payload_max` bytes behind it. Only the flag of answers is looked at: the others have no
    /// meaning, and QEMU's `vhost-user-gpu` does not write the field of an update at all, so that anything is there. For that reason
    /// an end that is never answered must not trust that flag either.
    ///
    /// # Errors
    /// [`WireError::Length`].
    pub fn decode(bytes: &[u8; HEADER_LEN], payload_max: u32) -> Result<Self, WireError> {
        let [c0, c1, c2, c3, f0, f1, f2, f3, p0, p1, p2, p3] = *bytes;
        let code = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let payload = u32::from_le_bytes([p0, p1, p2, p3]);
        if payload > payload_max {
            return Err(WireError::Length(payload, payload_max));
        }
        Ok(Self { code, reply: flags & REPLY != 0, payload })
    }
}
