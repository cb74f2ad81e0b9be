//! The display wire: what a virtio-gpu device shows, told to whoever has the screen.
//!
//! The protocol is that of QEMU's `docs/interop/vhost-user-gpu.rst`: a [`Header`] of 12 bytes, then what the message says, in
//! the byte order of the machine (little-endian here). The device asks and tells ([`Request`]), the screen answers
//! ([`Reply`]); either may be somebody else's, so both are decoded strictly, and what a length field says is believed only
//! below a ceiling that the receiver sets. [`Channel`] moves messages over a socket that somebody else opened, with a time
//! limit on every wait.
//!
//! Pictures as dmabufs (DMABUF_SCANOUT, DMABUF_UPDATE, DMABUF_SCANOUT2) are refused by a type of error of their own.
//!
//! # What is ours
//!
//! The document has no word by which a screen says that it was resized: QEMU's front end answers the guest's questions about
//! that by itself. With [`Features::CHANGES`] agreed on, which no other end knows, a screen sends [`Reply::Changed`] unasked,
//! and the device asks for the display information again.
//!
//! A picture in a message goes through a socket in a hundred pieces, and each wakes the other end up. With [`Features::FRAMES`]
//! agreed on, the device hands over memory once ([`Request::FrameMemory`], a memfd beside it), puts the pixels of a large update
//! at its beginning and says where they belong ([`Request::Frame`]); when the screen has read them it says so
//! ([`Reply::Taken`]), and no sooner is there another one. The screen reads them as it reads a file, so that what the device
//! does to its memory meanwhile is a wrong picture and nothing else.

mod channel;
pub mod control;
mod header;
mod reply;
mod request;
#[cfg(test)]
mod tests;

pub use channel::{Channel, ChannelError, Message};
pub use header::{HEADER_LEN, Header};
pub use reply::{DisplayInfo, EDID_MAX, Edid, Reply, SCANOUTS_MAX, Screen};
pub use request::{CURSOR_BYTES, CURSOR_SIDE, CursorPosition, Request, UPDATE_HEAD, begin_update, pixel_bytes};

use thiserror::Error;

/// Bytes of a pixel: blue, green, red, and alpha (of a cursor) or nothing.
pub const PIXEL_BYTES: usize = 4;
/// Most bytes of the pixels of one update; larger ones are told in parts.
pub const PIXELS_MAX: usize = 64 << 20;
/// Most bytes that follow the header of what a device says.
pub const REQUEST_MAX: u32 = (PIXELS_MAX + UPDATE_HEAD) as u32;
/// Most bytes that follow the header of what a screen says: an EDID and what is said about it.
pub const REPLY_MAX: u32 = 24 + 8 + EDID_MAX as u32;

/// Numbers of the messages.
pub mod code {
    /// GET_PROTOCOL_FEATURES.
    pub const GET_FEATURES: u32 = 1;
    /// SET_PROTOCOL_FEATURES.
    pub const SET_FEATURES: u32 = 2;
    /// GET_DISPLAY_INFO.
    pub const GET_DISPLAY_INFO: u32 = 3;
    /// CURSOR_POS.
    pub const CURSOR_POS: u32 = 4;
    /// CURSOR_POS_HIDE.
    pub const CURSOR_POS_HIDE: u32 = 5;
    /// CURSOR_UPDATE.
    pub const CURSOR_UPDATE: u32 = 6;
    /// SCANOUT.
    pub const SCANOUT: u32 = 7;
    /// UPDATE.
    pub const UPDATE: u32 = 8;
    /// DMABUF_SCANOUT.
    pub const DMABUF_SCANOUT: u32 = 9;
    /// DMABUF_UPDATE.
    pub const DMABUF_UPDATE: u32 = 10;
    /// GET_EDID.
    pub const GET_EDID: u32 = 11;
    /// DMABUF_SCANOUT2.
    pub const DMABUF_SCANOUT2: u32 = 12;
    /// What the screen asks for has changed: ours, out of the document's way.
    pub const CHANGED: u32 = 0x4154_0001;
    /// Memory for frames. Ours, as those that follow.
    pub const FRAME_MEMORY: u32 = 0x4154_0002;
    /// A frame is in the memory.
    pub const FRAME: u32 = 0x4154_0003;
    /// It was read.
    pub const TAKEN: u32 = 0x4154_0004;
}

/// What both ends can do beyond the first version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// The screen has an EDID for each scanout.
    pub const EDID: Self = Self(1);
    /// Pictures as dmabufs with modifiers.
    pub const DMABUF2: Self = Self(1 << 1);
    /// The screen says when what it asks for has changed. Ours.
    pub const CHANGES: Self = Self(1 << 32);
    /// Large updates are told by memory. Ours.
    pub const FRAMES: Self = Self(1 << 33);

    /// Whether all bits of `other` are here.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    /// The bits that both have.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl std::ops::BitOr for Features {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A rectangle as virtio-gpu and this wire have it, in pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rect {
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// Bytes that are no message of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// Longer than anything that this end is told.
    #[error("a message of {0} bytes; this end takes {1}")]
    Length(u32, u32),
    /// Nobody has such a message, or not in this direction.
    #[error("message {0} is unknown here")]
    Code(u32),
    /// Pictures by dmabuf.
    #[error("message {0} is about dmabufs, which are not taken here: send UPDATE")]
    Dmabuf(u32),
    /// Shorter than it needs to be, or longer.
    #[error("message {code} has {found} bytes, not {needed}")]
    Size {
        /// Its number.
        code: u32,
        /// What follows its header.
        found: usize,
        /// What should.
        needed: usize,
    },
    /// A field has a value that it cannot have.
    #[error("message {code}: {what} cannot be {value:#x}")]
    Value {
        /// Its number.
        code: u32,
        /// Which field.
        what: &'static str,
        /// What it says.
        value: u32,
    },
}

/// A cursor over what follows the header.
struct Fields<'a> {
    code: u32,
    whole: usize,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn new(code: u32, bytes: &'a [u8]) -> Self {
        Self { code, whole: bytes.len(), rest: bytes }
    }
    fn chunk<const N: usize>(&mut self) -> Result<&'a [u8; N], WireError> {
        let Some((bytes, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(self.size(self.whole - self.rest.len() + N));
        };
        self.rest = rest;
        Ok(bytes)
    }
    fn u32(&mut self) -> Result<u32, WireError> {
        self.chunk().map(|bytes| u32::from_le_bytes(*bytes))
    }
    fn u64(&mut self) -> Result<u64, WireError> {
        self.chunk().map(|bytes| u64::from_le_bytes(*bytes))
    }
    fn rect(&mut self) -> Result<Rect, WireError> {
        Ok(Rect { x: self.u32()?, y: self.u32()?, width: self.u32()?, height: self.u32()? })
    }
    fn scanout(&mut self) -> Result<u32, WireError> {
        let scanout = self.u32()?;
        if (scanout as usize) < SCANOUTS_MAX { Ok(scanout) } else { Err(self.wrong("scanout", scanout)) }
    }
    /// The rest, which has this many bytes.
    fn exactly(&self, len: usize) -> Result<&'a [u8], WireError> {
        if self.rest.len() == len {
            return Ok(self.rest);
        }
        Err(self.size((self.whole - self.rest.len()).saturating_add(len)))
    }
    fn end(&self) -> Result<(), WireError> {
        self.exactly(0).map(drop)
    }
    fn size(&self, needed: usize) -> WireError {
        WireError::Size { code: self.code, found: self.whole, needed }
    }
    fn wrong(&self, what: &'static str, value: u32) -> WireError {
        WireError::Value { code: self.code, what, value }
    }
}

/// Appends numbers as the wire has them.
trait Put {
    fn words(&mut self, words: &[u32]);
    fn rect(&mut self, rect: Rect);
}

impl Put for Vec<u8> {
    fn words(&mut self, words: &[u32]) {
        self.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    }
    fn rect(&mut self, rect: Rect) {
        self.words(&[rect.x, rect.y, rect.width, rect.height]);
    }
}
