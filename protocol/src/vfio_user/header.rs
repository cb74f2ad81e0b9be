//! The 16 bytes before everything.

use super::{DATA_MAX, WireError};

/// Bytes of a header.
pub const HEADER_LEN: usize = 16;
/// Most bytes that follow one: the largest piece of data, and what is said about it.
pub const PAYLOAD_MAX: u32 = DATA_MAX + 64;

const TYPE_MASK: u32 = 0xf;
const TYPE_REPLY: u32 = 1;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Command {
    /// Versions and what each end can take; the first.
    Version = 1,
    /// Memory that the device may reach.
    DmaMap = 2,
    /// That it may reach no more.
    DmaUnmap = 3,
    /// What the device is.
    DeviceInfo = 4,
    /// One of its regions.
    RegionInfo = 5,
    /// Descriptors by which a region is reached without messages.
    RegionIoFds = 6,
    /// One kind of interrupt.
    IrqInfo = 7,
    /// Where interrupts go.
    SetIrqs = 8,
    /// Reads registers.
    RegionRead = 9,
    /// Writes registers.
    RegionWrite = 10,
    /// The device reads memory that was mapped without a descriptor.
    DmaRead = 11,
    /// The device writes such memory.
    DmaWrite = 12,
    /// The device as after power-on.
    Reset = 13,
}

impl Command {
    /// By its number.
    ///
    /// # Errors
    /// [`WireError::Command`] for one that is not served.
    pub fn from_number(number: u16) -> Result<Self, WireError> {
        Ok(match number {
            1 => Self::Version,
            2 => Self::DmaMap,
            3 => Self::DmaUnmap,
            4 => Self::DeviceInfo,
            5 => Self::RegionInfo,
            6 => Self::RegionIoFds,
            7 => Self::IrqInfo,
            8 => Self::SetIrqs,
            9 => Self::RegionRead,
            10 => Self::RegionWrite,
            11 => Self::DmaRead,
            12 => Self::DmaWrite,
            13 => Self::Reset,
            other => return Err(WireError::Command(other)),
        })
    }
}

/// Question or answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Asks.
    Command {
        /// An answer is waited for.
        reply: bool,
    },
    /// It was done.
    Reply,
    /// It was not, for the reason of this error number.
    Failed(u32),
}

/// What stands before every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Tells questions apart; an answer has its question's.
    pub id: u16,
    /// Number of the command: one that is not known still gets an answer.
    pub command: u16,
    /// Bytes that follow.
    pub payload: u32,
    /// Question or answer.
    pub kind: Kind,
}

impl Header {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let (flags, error) = match self.kind {
            Kind::Command { reply: true } => (0, 0),
            Kind::Command { reply: false } => (NO_REPLY, 0),
            Kind::Reply => (TYPE_REPLY, 0),
            Kind::Failed(errno) => (TYPE_REPLY | ERROR, errno),
        };
        let mut bytes = [0; HEADER_LEN];
        let words = [
            u32::from(self.id) | u32::from(self.command) << 16,
            self.payload.saturating_add(HEADER_LEN as u32),
            flags,
            error,
        ];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`WireError::Length`] and [`WireError::Flags`].
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(word)
        };
        let (length, flags, error) = (word(4), word(8), word(12));
        let payload = length.checked_sub(HEADER_LEN as u32).filter(|payload| *payload <= PAYLOAD_MAX);
        let payload = payload.ok_or(WireError::Length(length))?;
        if flags & !(TYPE_MASK | NO_REPLY | ERROR) != 0 {
            return Err(WireError::Flags(flags));
        }
        let kind = match (flags & TYPE_MASK, flags & ERROR != 0) {
            (0, false) => Kind::Command { reply: flags & NO_REPLY == 0 },
            (TYPE_REPLY, false) => Kind::Reply,
            (TYPE_REPLY, true) => Kind::Failed(error),
            _ => return Err(WireError::Flags(flags)),
        };
        Ok(Self { id: word(0) as u16, command: (word(0) >> 16) as u16, payload, kind })
    }
}
