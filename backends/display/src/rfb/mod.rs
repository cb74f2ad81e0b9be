//! The remote framebuffer protocol (RFC 6143, and the extensions that viewers of today have), without sockets: bytes of a viewer
//! become words, words for it become bytes.
//!
//! [`hello`] is the beginning of a conversation, [`message`] what a viewer says after it, [`format`] and [`tight`] how pixels
//! are told, [`update`] what is put around them, [`auth`] its password.

pub mod auth;
pub mod format;
pub mod hello;
pub mod message;
pub mod tight;
pub mod update;

use thiserror::Error;

/// Encodings and pseudo-encodings that are served.
pub mod encoding {
    /// Pixels as they are.
    pub const RAW: i32 = 0;
    /// Tight: colours of a few, or zlib.
    pub const TIGHT: i32 = 7;
    /// The size has changed.
    pub const DESKTOP_SIZE: i32 = -223;
    /// What the pointer looks like.
    pub const CURSOR: i32 = -239;
    /// Keys with the number of the key, not only with what is printed on it.
    pub const QEMU_KEY: i32 = -258;
    /// The size has changed, or may be changed.
    pub const EXTENDED_DESKTOP_SIZE: i32 = -308;
}

/// Why a viewer is given up.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RfbError {
    /// Not RFB, or not this version of it.
    #[error("it says {0:?} instead of a version from RFB 003.008 on")]
    Version(String),
    /// A security type that was not offered.
    #[error("it chooses security type {0}, which was not offered")]
    Security(u8),
    /// A wrong password.
    #[error("its password is wrong")]
    Password,
    /// Pixels that cannot be made.
    #[error("it wants pixels of {bits} bits (true colour: {true_colour}); there are true colours of 8, 16 and 32")]
    Format {
        /// Bits of a pixel.
        bits: u8,
        /// Not by a palette.
        true_colour: bool,
    },
    /// No such message.
    #[error("it sends message {0}, which is unknown here")]
    Message(u8),
    /// A field that cannot be.
    #[error("in message {message}, {what} cannot be {value}")]
    Value {
        /// Which message.
        message: u8,
        /// Which field.
        what: &'static str,
        /// What it says.
        value: u32,
    },
}
