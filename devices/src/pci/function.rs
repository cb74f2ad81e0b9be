//! What the root bus and the board ask of a PCI function, and what a function tells the board.

use std::sync::{Arc, Mutex};

use thiserror::Error;

use super::config_space::BarKind;
use crate::access::Answer;

/// Device and function number on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevFn(u8);

impl DevFn {
    /// Function `function` (0 to 7) of slot `slot` (0 to 31); `None` when either is out of range.
    pub const fn new(slot: u8, function: u8) -> Option<Self> {
        if slot < 32 && function < 8 { Some(Self(slot << 3 | function)) } else { None }
    }
    /// From the byte that configuration addresses carry.
    pub const fn from_byte(byte: u8) -> Self {
        Self(byte)
    }
    /// Slot, 0 to 31.
    pub const fn slot(self) -> u8 {
        self.0 >> 3
    }
    /// Function, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

/// Address space of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BarSpace {
    /// Port I/O.
    Io,
    /// Memory.
    Memory,
}

/// Follows a function's BARs: the board's address map and the doorbells.
///
/// Called in the middle of the guest's configuration write, with the function's lock held; it must not call the function.
/// A BAR that moves is unmapped at the old place first. Several BARs may overlap while a guest sizes or moves them with
/// decoding on: the board refuses what overlaps and the BAR then answers nowhere until it is moved again.
pub trait BarMapping: Send + Sync {
    /// BAR `bar` now answers at `base`.
    fn map(&self, bar: u8, space: BarSpace, base: u64, len: u64);
    /// BAR `bar` no longer answers at `base`.
    fn unmap(&self, bar: u8, space: BarSpace, base: u64, len: u64);
}

/// One PCI function.
pub trait PciFunction: Send {
    /// Reads 1, 2 or 4 bytes at `offset` of the 4096 bytes of configuration space; never crosses a doubleword.
    fn config_read(&mut self, offset: u16, data: &mut [u8]) -> Answer;
    /// Writes likewise.
    fn config_write(&mut self, offset: u16, data: &[u8]) -> Answer;
    /// Reads inside BAR `bar`.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) -> Answer;
    /// Writes inside BAR `bar`.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) -> Answer;
    /// Machine reset: back to the state at power-on, BAR addresses included. [`Answer::Later`] when something behind the
    /// function must stop first.
    fn reset(&mut self) -> Answer;
    /// The BARs that the board assigns addresses to before the guest starts: number, kind, length in bytes.
    fn bars(&self) -> Vec<(u8, BarKind, u64)>;
    /// Puts BAR `bar` at `base`, as firmware would.
    ///
    /// # Errors
    /// [`BarError`] when there is no such BAR or `base` does not suit it.
    fn assign_bar(&mut self, bar: u8, base: u64) -> Result<(), BarError>;
}

/// A function as the root bus and the board's address map share it.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// Why a BAR was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BarError {
    /// The function has no such BAR.
    #[error("the function has no BAR {bar}")]
    NoSuchBar {
        /// The number asked for.
        bar: u8,
    },
    /// The slot of the BAR is taken, or BAR 5 was to be 64 bits wide.
    #[error("BAR {bar} is taken or has no room for a 64-bit address")]
    Taken {
        /// The number asked for.
        bar: u8,
    },
    /// Lengths of BARs are powers of two: 16 bytes (memory) or 4 to 256 bytes (I/O) at least.
    #[error("BAR {bar} cannot be {len:#x} bytes long: a power of two is needed, 16 or more (I/O: 4 to 256)")]
    BadLength {
        /// The BAR.
        bar: u8,
        /// The length in bytes.
        len: u64,
    },
    /// The address is not a multiple of the length, or too high for the BAR's width.
    #[error("BAR {bar} cannot be at {base:#x}: the address must be a multiple of {len:#x} within the BAR's width")]
    BadAddress {
        /// The BAR.
        bar: u8,
        /// The address asked for.
        base: u64,
        /// The BAR's length in bytes.
        len: u64,
    },
}
