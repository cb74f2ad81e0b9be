//! The envelope of saved state: postcard has no field tags, so each saved value says what it is, in which version, how
//! long it is, and carries a checksum.
//!
//! | bytes | field | little-endian |
//! |---|---|---|
//! | 0..4 | magic | `A S A V` |
//! | 4..8 | type | [`SavedType`], never reused |
//! | 8..10 | version | of that type |
//! | 10..12 | zero | |
//! | 12..16 | length | bytes of body |
//! | 16..20 | CRC-32 | (IEEE) of bytes 0..16 and the body |
//! | 20.. | body | postcard |

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// First bytes of every envelope.
pub const MAGIC: [u8; 4] = *b"ASAV";
/// Bytes before the body.
pub const ENVELOPE_LEN: usize = 20;
/// The longest body, in bytes. Guest RAM is not saved in envelopes.
pub const BODY_MAX: usize = 16 << 20;

/// Number of a type of saved state; its owner picks it once and never reuses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SavedType(pub u32);

/// A value that is saved. Its fields are the wire: a change makes a new version, and the old one stays readable.
pub trait Saved: Serialize + DeserializeOwned {
    /// Number of this type.
    const TYPE: SavedType;
    /// Version that this build writes.
    const VERSION: u16;

    /// Reads the body of an older version. `None`: no such version was ever written, or it is no longer read.
    ///
    /// # Errors
    /// The body is not what that version was.
    fn from_older(version: u16, body: &[u8]) -> Option<Result<Self, postcard::Error>> {
        let _ = (version, body);
        None
    }
}

/// What is wrong with bytes that should be saved state.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SavedError {
    /// Cut off.
    #[error("saved state ends after {found} bytes where {wanted} are needed: the file is cut off")]
    Short {
        /// Bytes there.
        found: usize,
        /// Bytes needed.
        wanted: usize,
    },
    /// Not an envelope.
    #[error("saved state begins with {0:02x?} instead of \"ASAV\"")]
    Magic([u8; 4]),
    /// Reserved bytes used.
    #[error("saved state has {0:#06x} in a field that is 0 in this version of the envelope")]
    Reserved(u16),
    /// Length above the limit.
    #[error("saved state claims {0} bytes, the limit is {BODY_MAX}")]
    Length(usize),
    /// Damaged.
    #[error("saved state of type {} is damaged: its checksum is {found:#010x}, it should be {wanted:#010x}", .kind.0)]
    Checksum {
        /// Its type, if that is not what was damaged.
        kind: SavedType,
        /// Computed.
        found: u32,
        /// Written.
        wanted: u32,
    },
    /// Another type.
    #[error("saved state of type {} stands where type {} belongs", .found.0, .wanted.0)]
    Type {
        /// Expected.
        wanted: SavedType,
        /// Found.
        found: SavedType,
    },
    /// A version that this build does not read.
    #[error("saved state of type {} has version {found}, this build reads up to {newest}: restore it with the build that wrote it", .kind.0)]
    Version {
        /// Its type.
        kind: SavedType,
        /// Its version.
        found: u16,
        /// The newest that this build knows.
        newest: u16,
    },
    /// The body is not a value of its type.
    #[error("saved state of type {} version {version} cannot be decoded: {reason}", .kind.0)]
    Body {
        /// Its type.
        kind: SavedType,
        /// Its version.
        version: u16,
        /// The decoder's words.
        reason: String,
    },
}

/// An envelope whose checksum was right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// Type of the body.
    pub kind: SavedType,
    /// Version of the body.
    pub version: u16,
    /// The encoded value.
    pub body: &'a [u8],
}

/// Appends a value in its envelope.
///
/// # Errors
/// The value cannot be encoded, or is longer than [`BODY_MAX`].
pub fn save<S: Saved>(value: &S, mut into: Vec<u8>) -> Result<Vec<u8>, SavedError> {
    let start = into.len();
    into.resize(start + ENVELOPE_LEN, 0);
    let mut bytes = postcard::to_extend(value, into).map_err(|error| SavedError::Body {
        kind: S::TYPE,
        version: S::VERSION,
        reason: error.to_string(),
    })?;
    let length = bytes.len() - start - ENVELOPE_LEN;
    if length > BODY_MAX {
        return Err(SavedError::Length(length));
    }
    let (head, body) = bytes[start..].split_at_mut(ENVELOPE_LEN);
    head[0..4].copy_from_slice(&MAGIC);
    head[4..8].copy_from_slice(&S::TYPE.0.to_le_bytes());
    head[8..10].copy_from_slice(&S::VERSION.to_le_bytes());
    head[12..16].copy_from_slice(&(length as u32).to_le_bytes());
    let sum = checksum(&head[..16], body);
    head[16..20].copy_from_slice(&sum.to_le_bytes());
    Ok(bytes)
}

/// Checks the envelope at the front of `bytes`; the second value is what follows it.
///
/// # Errors
/// Anything but the type, version and body, which the caller judges.
pub fn open(bytes: &[u8]) -> Result<(Envelope<'_>, &[u8]), SavedError> {
    let Some((head, rest)) = bytes.split_first_chunk::<ENVELOPE_LEN>() else {
        return Err(SavedError::Short { found: bytes.len(), wanted: ENVELOPE_LEN });
    };
    let [m0, m1, m2, m3, t0, t1, t2, t3, v0, v1, r0, r1, l0, l1, l2, l3, c0, c1, c2, c3] = *head;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(SavedError::Magic([m0, m1, m2, m3]));
    }
    let reserved = u16::from_le_bytes([r0, r1]);
    if reserved != 0 {
        return Err(SavedError::Reserved(reserved));
    }
    let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
    if length > BODY_MAX {
        return Err(SavedError::Length(length));
    }
    let Some((body, rest)) = rest.split_at_checked(length) else {
        return Err(SavedError::Short { found: bytes.len(), wanted: ENVELOPE_LEN + length });
    };
    let kind = SavedType(u32::from_le_bytes([t0, t1, t2, t3]));
    let wanted = u32::from_le_bytes([c0, c1, c2, c3]);
    let found = checksum(&head[..16], body);
    if found != wanted {
        return Err(SavedError::Checksum { kind, found, wanted });
    }
    Ok((Envelope { kind, version: u16::from_le_bytes([v0, v1]), body }, rest))
}

/// Reads a value from the front of `bytes`, in its present or an older version; the second value is what follows it.
///
/// # Errors
/// All of [`SavedError`].
pub fn restore<S: Saved>(bytes: &[u8]) -> Result<(S, &[u8]), SavedError> {
    let (envelope, rest) = open(bytes)?;
    let kind = envelope.kind;
    if kind != S::TYPE {
        return Err(SavedError::Type { wanted: S::TYPE, found: kind });
    }
    let version = envelope.version;
    let decoded = if version == S::VERSION {
        postcard::take_from_bytes(envelope.body).and_then(|(value, rest)| {
            if rest.is_empty() { Ok(value) } else { Err(postcard::Error::DeserializeBadEncoding) }
        })
    } else {
        match S::from_older(version, envelope.body) {
            Some(decoded) if version < S::VERSION => decoded,
            _ => return Err(SavedError::Version { kind, found: version, newest: S::VERSION }),
        }
    };
    let value = decoded.map_err(|error| SavedError::Body { kind, version, reason: error.to_string() })?;
    Ok((value, rest))
}

fn checksum(head: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(body);
    hasher.finalize()
}
