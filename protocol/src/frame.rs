//! A frame: 16 bytes of header, then one message in postcard's encoding.
//!
//! | bytes | field | little-endian |
//! |---|---|---|
//! | 0..4 | magic | `A T O L` |
//! | 4..6 | version | [`PROTOCOL_VERSION`] |
//! | 6..8 | kind | [`Kind`] |
//! | 8..12 | length | bytes of body that follow, at most [`Kind::ceiling`] |
//! | 12..14 | descriptors | how many travel beside it, at most [`Kind::descriptors_max`] |
//! | 14..16 | zero | |
//!
//! There is no checksum: frames travel between processes of one host or inside TCP. Everything is checked here, once,
//! and nothing is allocated for a length that the kind does not allow.

use thiserror::Error;

use crate::PROTOCOL_VERSION;
use crate::message::{Kind, Message};

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"ATOL";
/// Bytes of a header.
pub const HEADER_LEN: usize = 16;
/// The longest body of any kind, in bytes.
pub const BODY_MAX: usize = 64 << 10;

/// What is wrong with bytes that should be a frame. After any of these the position in the stream is lost: the
/// connection is closed and, where the peer is a child, the child is killed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// Not our peer at all.
    #[error("a frame begins with {0:02x?} instead of \"ATOL\": the peer speaks another protocol")]
    Magic([u8; 4]),
    /// Another build.
    #[error("the peer speaks version {0} of the protocol, this build {PROTOCOL_VERSION}: use binaries of one release")]
    Version(u16),
    /// Unknown kind.
    #[error("a frame has the unknown kind {0}")]
    Kind(u16),
    /// Length above the kind's ceiling.
    #[error("a {kind:?} frame claims a body of {length} bytes, the ceiling is {}", .kind.ceiling())]
    Length {
        /// Its kind.
        kind: Kind,
        /// Its claim.
        length: u32,
    },
    /// More descriptors than the kind allows, or not as many as the header claims came.
    #[error("a {kind:?} frame came with {found} descriptors where {allowed} may be")]
    Descriptors {
        /// Its kind.
        kind: Kind,
        /// How many it has or claims.
        found: usize,
        /// How many it should have, or may have at most.
        allowed: usize,
    },
    /// The last two bytes are not zero.
    #[error("a frame's reserved field is {0:#06x} instead of 0")]
    Reserved(u16),
    /// Another conversation's message.
    #[error("a {found:?} frame came where a {wanted:?} frame belongs")]
    Unexpected {
        /// What this conversation has.
        wanted: Kind,
        /// What came.
        found: Kind,
    },
    /// The body is not the message of its kind.
    #[error("the body of a {kind:?} frame cannot be decoded: {reason}")]
    Body {
        /// The frame's kind.
        kind: Kind,
        /// The decoder's words.
        reason: String,
    },
    /// The body goes on after the message.
    #[error("the body of a {kind:?} frame has {extra} bytes after its message")]
    Trailing {
        /// The frame's kind.
        kind: Kind,
        /// How many bytes too many.
        extra: usize,
    },
    /// Our own message is longer than its kind allows.
    #[error("{name} takes {length} bytes, the ceiling of a {kind:?} frame is {}: shorten its text or lists", .kind.ceiling())]
    TooLong {
        /// The message's kind.
        kind: Kind,
        /// The message's name.
        name: &'static str,
        /// Its encoded length.
        length: usize,
    },
}

/// A header that has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    kind: Kind,
    length: usize,
    descriptors: usize,
}

impl FrameHeader {
    /// Kind of the body.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes of body that follow; never more than the kind's ceiling.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Descriptors beside the frame; never more than the kind allows.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Checks and reads a header.
    ///
    /// # Errors
    /// Everything in [`FrameError`] that a header alone can show.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let [m0, m1, m2, m3, v0, v1, k0, k1, l0, l1, l2, l3, d0, d1, r0, r1] = *bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(FrameError::Magic([m0, m1, m2, m3]));
        }
        let version = u16::from_le_bytes([v0, v1]);
        if version != PROTOCOL_VERSION {
            return Err(FrameError::Version(version));
        }
        let number = u16::from_le_bytes([k0, k1]);
        let kind = Kind::from_wire(number).ok_or(FrameError::Kind(number))?;
        let claimed = u32::from_le_bytes([l0, l1, l2, l3]);
        let length = usize::try_from(claimed).unwrap_or(usize::MAX);
        if length > kind.ceiling() {
            return Err(FrameError::Length { kind, length: claimed });
        }
        let descriptors = usize::from(u16::from_le_bytes([d0, d1]));
        if descriptors > kind.descriptors_max() {
            return Err(FrameError::Descriptors { kind, found: descriptors, allowed: kind.descriptors_max() });
        }
        let reserved = u16::from_le_bytes([r0, r1]);
        if reserved != 0 {
            return Err(FrameError::Reserved(reserved));
        }
        Ok(Self { kind, length, descriptors })
    }

    fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_wire().to_le_bytes());
        // Both fit: the ceilings are far below.
        bytes[8..12].copy_from_slice(&(self.length as u32).to_le_bytes());
        bytes[12..14].copy_from_slice(&(self.descriptors as u16).to_le_bytes());
        bytes
    }
}

/// Encodes a message as a whole frame that `descriptors` descriptors accompany.
///
/// # Errors
/// [`FrameError::TooLong`] and [`FrameError::Descriptors`].
pub fn encode<M: Message>(message: &M, descriptors: usize) -> Result<Vec<u8>, FrameError> {
    let kind = M::KIND;
    if descriptors > kind.descriptors_max() {
        return Err(FrameError::Descriptors { kind, found: descriptors, allowed: kind.descriptors_max() });
    }
    let bytes = postcard::to_extend(message, vec![0; HEADER_LEN])
        .map_err(|error| FrameError::Body { kind, reason: error.to_string() })?;
    finish(kind, message.name(), bytes, descriptors)
}

fn finish(kind: Kind, name: &'static str, mut bytes: Vec<u8>, descriptors: usize) -> Result<Vec<u8>, FrameError> {
    let length = bytes.len() - HEADER_LEN;
    if length > kind.ceiling() {
        return Err(FrameError::TooLong { kind, name, length });
    }
    bytes[..HEADER_LEN].copy_from_slice(&FrameHeader { kind, length, descriptors }.encode());
    Ok(bytes)
}

/// Decodes a frame's body.
///
/// # Errors
/// A kind that is not the message's, a body that is not one message and nothing else.
pub fn decode_body<M: Message>(kind: Kind, body: &[u8]) -> Result<M, FrameError> {
    if kind != M::KIND {
        return Err(FrameError::Unexpected { wanted: M::KIND, found: kind });
    }
    let (message, rest) = postcard::take_from_bytes(body)
        .map_err(|error: postcard::Error| FrameError::Body { kind, reason: error.to_string() })?;
    if rest.is_empty() { Ok(message) } else { Err(FrameError::Trailing { kind, extra: rest.len() }) }
}

/// Decodes one frame from the front of `bytes`, for traces and tests: the message, and what follows it. `None`: more
/// bytes are needed.
///
/// # Errors
/// As [`FrameHeader::decode`] and [`decode_body`].
pub fn decode<M: Message>(bytes: &[u8]) -> Result<Option<(M, &[u8])>, FrameError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
    let header = FrameHeader::decode(header)?;
    let Some((body, rest)) = rest.split_at_checked(header.length()) else { return Ok(None) };
    Ok(Some((decode_body(header.kind(), body)?, rest)))
}
