//! vfio-user: the words between a PCI device's process and whoever puts it into a machine.
//!
//! The protocol is that of QEMU's `docs/interop/vfio-user.rst` and of libvfio-user, major version 0: a [`Header`] of 16 bytes,
//! then what the command says, descriptors beside it. Requests are [`Request`]s, answers the types of [`reply`]; both are
//! decoded strictly, because either end may be somebody else's. [`Channel`] moves them over a socket that somebody else
//! opened, with a time limit on every wait.
//!
//! # Why not the crate `vfio_user`
//!
//! It (0.1.7, rust-vmm) has both ends in blocking reads without a limit on an owned, path-connected stream: a server that
//! says nothing hangs its client for good, and nothing can be put between its loop and the socket. Lengths that the other
//! side says are allocated as they come, a reply's number and command are not compared with the question's, an error reply is
//! read as an answer, and requests that a server makes by itself have no place. Deadlines, hostile answers and a socket
//! that is exchanged when a process dies are what this room is for.

mod channel;
mod header;
pub mod reply;
mod request;
mod version;

pub use channel::{Channel, ChannelError, Message};
pub use header::{Command, HEADER_LEN, Header, Kind, PAYLOAD_MAX};
pub use request::{DmaMap, DmaUnmap, IrqAction, IrqSet, RegionAccess, Request};
pub use version::{Capabilities, Version};

use thiserror::Error;

/// Largest piece of data in one message that both ends here take (`max_data_xfer_size`).
pub const DATA_MAX: u32 = 1 << 20;
/// Most descriptors beside one message that both ends here take (`max_msg_fds`).
pub const DESCRIPTORS_MAX: usize = crate::stream::DESCRIPTORS_MAX;

/// Regions of a PCI device, by VFIO's numbers.
pub mod region {
    /// The first of six BARs.
    pub const BAR_0: u32 = 0;
    /// The last of them.
    pub const BAR_5: u32 = 5;
    /// Expansion ROM.
    pub const ROM: u32 = 6;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
    /// How many there are, the legacy VGA region included.
    pub const COUNT: u32 = 9;
}

/// Kinds of interrupts of a PCI device, by VFIO's numbers.
pub mod irq {
    /// The pin.
    pub const INTX: u32 = 0;
    /// Messages.
    pub const MSI: u32 = 1;
    /// Messages with a table.
    pub const MSIX: u32 = 2;
    /// How many kinds there are (errors and requests of the device being the last two).
    pub const COUNT: u32 = 5;
}

/// Bytes that are no message of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// A length that no message has.
    #[error("a message of {0} bytes: 16 to {max} are possible", max = HEADER_LEN as u32 + PAYLOAD_MAX)]
    Length(u32),
    /// Bits that mean nothing.
    #[error("message flags {0:#x} have no meaning")]
    Flags(u32),
    /// A command that is not served.
    #[error("command {0} is unknown")]
    Command(u16),
    /// The message is shorter than its command needs, or longer.
    #[error("{command:?} with {found} bytes, which needs {needed}")]
    Size {
        /// The command.
        command: Command,
        /// What it has after the header.
        found: usize,
        /// What it needs.
        needed: usize,
    },
    /// A field has a value that it cannot have.
    #[error("{command:?}: {what} cannot be {value:#x}")]
    Value {
        /// The command.
        command: Command,
        /// Which field.
        what: &'static str,
        /// What it says.
        value: u64,
    },
    /// What is to be text is none.
    #[error("the version's capabilities are no JSON object that ends with a zero byte")]
    Capabilities,
}

/// A cursor over what follows the header.
#[derive(Clone, Copy)]
struct Fields<'a> {
    command: Command,
    whole: usize,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn new(command: Command, bytes: &'a [u8]) -> Self {
        Self { command, whole: bytes.len(), rest: bytes }
    }
    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let Some((bytes, rest)) = self.rest.split_first_chunk::<N>() else {
            let needed = self.whole - self.rest.len() + N;
            return Err(WireError::Size { command: self.command, found: self.whole, needed });
        };
        self.rest = rest;
        Ok(*bytes)
    }
    fn u16(&mut self) -> Result<u16, WireError> {
        self.take().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Result<u32, WireError> {
        self.take().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Result<u64, WireError> {
        self.take().map(u64::from_le_bytes)
    }
    /// `argsz`: how much room its sender has, the header not counted. Some say more than they send.
    fn argsz(&mut self) -> Result<u32, WireError> {
        self.u32()
    }
    /// Nothing may follow.
    fn end(self) -> Result<(), WireError> {
        self.exactly(0).map(drop)
    }
    /// The rest, which has this many bytes.
    fn exactly(self, len: usize) -> Result<&'a [u8], WireError> {
        if self.rest.len() == len {
            return Ok(self.rest);
        }
        let needed = (self.whole - self.rest.len()).saturating_add(len);
        Err(WireError::Size { command: self.command, found: self.whole, needed })
    }
    fn wrong(&self, what: &'static str, value: impl Into<u64>) -> WireError {
        WireError::Value { command: self.command, what, value: value.into() }
    }
}

/// Appends numbers as the wire has them.
trait Put {
    fn p16(&mut self, value: u16);
    fn p32(&mut self, value: u32);
    fn p64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn p16(&mut self, value: u16) {
        self.extend(value.to_le_bytes());
    }
    fn p32(&mut self, value: u32) {
        self.extend(value.to_le_bytes());
    }
    fn p64(&mut self, value: u64) {
        self.extend(value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests;
