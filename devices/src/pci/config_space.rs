//! The first 256 bytes of a function's configuration space (PCI 3.0, chapter 6): a type 0 header and capabilities.
//!
//! What software may change is a mask of the same 256 bytes, so a write of anything anywhere changes exactly the bits that
//! it may. BARs are bytes like the others; after each write that touches them or the command register the space works out
//! where they answer now, and tells a [`BarMapping`] what has changed.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

use super::function::{BarError, BarMapping, BarSpace};

/// Bytes of configuration space that are modelled; above them everything reads as all ones.
pub const CONFIG_LEN: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR_0: usize = 0x10;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// What a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass and programming interface: 0xCCSSPP.
    pub class: u32,
    /// Vendor of the board.
    pub subsystem_vendor: u16,
    /// Board.
    pub subsystem: u16,
}

/// Kind of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two slots.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

impl BarKind {
    /// Address space.
    pub fn space(self) -> BarSpace {
        match self {
            Self::Io => BarSpace::Io,
            Self::Memory32 | Self::Memory64 { .. } => BarSpace::Memory,
        }
    }
    fn flags(self) -> u8 {
        match self {
            Self::Io => 1,
            Self::Memory32 => 0,
            Self::Memory64 { prefetchable } => 4 | u8::from(prefetchable) << 3,
        }
    }
    fn wide(self) -> bool {
        matches!(self, Self::Memory64 { .. })
    }
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    len: u64,
    /// Where the board has been told that it answers.
    mapped: Option<u64>,
}

/// There is no room for another capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a capability of {len} bytes does not fit into what is left of configuration space")]
pub struct CapabilityError {
    /// Its length in bytes.
    pub len: usize,
}

/// A function's configuration space.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_LEN],
    writable: [u8; CONFIG_LEN],
    /// What a reset puts back.
    power_on: [u8; CONFIG_LEN],
    bars: [Option<Bar>; 6],
    next_capability: usize,
    last_pointer: usize,
    mapping: Arc<dyn BarMapping>,
}

impl ConfigSpace {
    /// A type 0 header without BARs and capabilities. `mapping` follows the BARs.
    pub fn new(identity: Identity, mapping: Arc<dyn BarMapping>) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_LEN],
            writable: [0; CONFIG_LEN],
            power_on: [0; CONFIG_LEN],
            bars: [None; 6],
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITY_POINTER,
            mapping,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        // Cache line size and latency timer: writable everywhere, without effect.
        space.writable[0x0c..0x0e].fill(0xff);
        space.allow_command(COMMAND_BUS_MASTER);
        space
    }

    /// The header and capabilities of another function: its `bytes` at power-on and what of them software may change. BARs are
    /// added as to an empty one.
    pub fn of(mut bytes: [u8; CONFIG_LEN], mut writable: [u8; CONFIG_LEN], mapping: Arc<dyn BarMapping>) -> Self {
        bytes[BAR_0..BAR_0 + 24].fill(0);
        writable[BAR_0..BAR_0 + 24].fill(0);
        // Decoding is off at power-on, and goes on only where there are BARs.
        bytes[COMMAND..COMMAND + 2].fill(0);
        let mut space = Self {
            bytes,
            writable,
            power_on: bytes,
            bars: [None; 6],
            // Nobody appends to somebody else's list.
            next_capability: CONFIG_LEN,
            last_pointer: CAPABILITY_POINTER,
            mapping,
        };
        space.allow_command(COMMAND_BUS_MASTER);
        space
    }

    /// Sets bytes as they are at power-on.
    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            if at + index < CONFIG_LEN {
                self.bytes[at + index] = *byte;
                self.power_on[at + index] = *byte;
            }
        }
    }

    fn allow_command(&mut self, bits: u16) {
        let [low, high] = bits.to_le_bytes();
        self.writable[COMMAND] |= low;
        self.writable[COMMAND + 1] |= high;
    }

    /// Adds BAR `bar` of `len` bytes.
    ///
    /// # Errors
    /// [`BarError`] for a slot that is taken or a length that no BAR can have.
    pub fn add_bar(&mut self, bar: u8, kind: BarKind, len: u64) -> Result<(), BarError> {
        let index = usize::from(bar);
        let slots = if kind.wide() { 2 } else { 1 };
        let upper_half = index > 0 && self.bars.get(index - 1).is_some_and(|b| b.is_some_and(|b| b.kind.wide()));
        if upper_half || !(index..index + slots).all(|slot| self.bars.get(slot).is_some_and(Option::is_none)) {
            return Err(BarError::Taken { bar });
        }
        let longest = match kind {
            BarKind::Io => 256,
            BarKind::Memory32 => 1 << 31,
            BarKind::Memory64 { .. } => 1 << 62,
        };
        let shortest = if kind == BarKind::Io { 4 } else { 16 };
        if !len.is_power_of_two() || !(shortest..=longest).contains(&len) {
            return Err(BarError::BadLength { bar, len });
        }
        self.bars[index] = Some(Bar { kind, len, mapped: None });
        let at = BAR_0 + 4 * index;
        self.put(at, &[kind.flags()]);
        let mask = !(len - 1);
        self.writable[at..at + 4].copy_from_slice(&(mask as u32).to_le_bytes());
        if kind.wide() {
            self.writable[at + 4..at + 8].copy_from_slice(&((mask >> 32) as u32).to_le_bytes());
        }
        self.allow_command(match kind.space() {
            BarSpace::Io => COMMAND_IO,
            BarSpace::Memory => COMMAND_MEMORY,
        });
        Ok(())
    }

    /// Appends a capability: its id and what follows the pointer to the next one. `writable` masks those bytes; what it
    /// does not cover is read-only. Gives the capability's offset.
    ///
    /// # Errors
    /// [`CapabilityError`] when it does not fit.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, CapabilityError> {
        let at = self.next_capability;
        let len = body.len().saturating_add(2);
        let end = at.saturating_add(len);
        let (Ok(offset), true) = (u8::try_from(at), end <= CONFIG_LEN) else {
            return Err(CapabilityError { len });
        };
        self.put(self.last_pointer, &[offset]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        for (mask, bits) in self.writable[at + 2..end].iter_mut().zip(writable) {
            *mask = *bits;
        }
        self.put(STATUS, &[self.power_on[STATUS] | STATUS_CAPABILITIES]);
        self.last_pointer = at + 1;
        self.next_capability = end.next_multiple_of(4);
        Ok(offset)
    }

    /// Gives the function an interrupt pin, 1 (INTA#) to 4, and the line that firmware would have written for it.
    pub fn set_interrupt(&mut self, pin: u8, line: u8) {
        self.put(INTERRUPT_LINE, &[line, pin]);
        self.writable[INTERRUPT_LINE] = 0xff;
        self.allow_command(COMMAND_INTX_DISABLE);
    }

    /// Reads; above the modelled bytes all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let start = usize::from(offset);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(start + index).copied().unwrap_or(0xff);
        }
    }

    /// Writes what is writable and moves BARs accordingly.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let start = usize::from(offset);
        for (index, byte) in data.iter().enumerate() {
            if let (Some(to), Some(mask)) = (self.bytes.get_mut(start + index), self.writable.get(start + index)) {
                *to = *to & !mask | byte & mask;
            }
        }
        self.remap();
    }

    /// Overwrites one byte that is the device's to change: a status bit, a data window.
    pub fn set_byte(&mut self, offset: u8, value: u8) {
        self.bytes[usize::from(offset)] = value;
    }

    /// Whether `offset..offset + len` touches the `width` bytes at `at`.
    pub fn touches(offset: u16, len: usize, at: u8, width: usize) -> bool {
        let (start, at) = (usize::from(offset), usize::from(at));
        start < at + width && at < start + len
    }

    /// What the command register is after a write.
    pub fn command_after(&self, offset: u16, data: &[u8]) -> u16 {
        let mut command = self.command().to_le_bytes();
        for (byte, at) in data.iter().zip(usize::from(offset)..) {
            if let Some(index) = at.checked_sub(COMMAND).filter(|index| *index < 2) {
                let mask = self.writable[at];
                command[index] = command[index] & !mask | byte & mask;
            }
        }
        u16::from_le_bytes(command)
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    /// Whether the function may master the bus.
    pub fn bus_master(&self) -> bool {
        self.command() & COMMAND_BUS_MASTER != 0
    }

    /// Whether software has forbidden INTx.
    pub fn intx_disabled(&self) -> bool {
        self.command() & COMMAND_INTX_DISABLE != 0
    }

    /// Sets the interrupt bit of the status register.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        self.bytes[STATUS] = self.bytes[STATUS] & !STATUS_INTERRUPT | if pending { STATUS_INTERRUPT } else { 0 };
    }

    /// Interrupt pin: 0 none, 1 to 4 INTA# to INTD#.
    pub fn interrupt_pin(&self) -> u8 {
        self.bytes[INTERRUPT_PIN]
    }

    /// Number, kind and length of the BARs.
    pub fn bars(&self) -> impl Iterator<Item = (u8, BarKind, u64)> {
        self.bars.iter().zip(0u8..).filter_map(|(bar, index)| bar.as_ref().map(|bar| (index, bar.kind, bar.len)))
    }

    /// Where BAR `bar` answers now.
    pub fn mapped(&self, bar: u8) -> Option<u64> {
        self.bars.get(usize::from(bar)).copied().flatten()?.mapped
    }

    /// The address that a BAR's bytes say.
    fn bar_address(&self, index: usize, bar: &Bar) -> u64 {
        let at = BAR_0 + 4 * index;
        let dword = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&self.bytes[at..at + 4]);
            u64::from(u32::from_le_bytes(bytes))
        };
        let high = if bar.kind.wide() { dword(at + 4) << 32 } else { 0 };
        let address = (high | dword(at)) & !(bar.len - 1);
        if bar.kind == BarKind::Io { address & 0xffff } else { address }
    }

    /// Where a BAR answers: `None` while decoding is off. Address zero is one that nobody has assigned.
    fn decoded(&self, index: usize, bar: &Bar) -> Option<u64> {
        let enable = match bar.kind.space() {
            BarSpace::Io => COMMAND_IO,
            BarSpace::Memory => COMMAND_MEMORY,
        };
        (self.command() & enable != 0).then(|| self.bar_address(index, bar)).filter(|address| *address != 0)
    }

    fn remap(&mut self) {
        for index in 0..self.bars.len() {
            let Some(bar) = self.bars[index] else { continue };
            let wanted = self.decoded(index, &bar);
            if wanted == bar.mapped {
                continue;
            }
            let number = index as u8;
            if let Some(base) = bar.mapped {
                self.mapping.unmap(number, bar.kind.space(), base, bar.len);
            }
            if let Some(base) = wanted {
                self.mapping.map(number, bar.kind.space(), base, bar.len);
            }
            self.bars[index] = Some(Bar { mapped: wanted, ..bar });
        }
    }

    /// Puts a BAR at `base`, as firmware would; a reset puts it there again.
    ///
    /// # Errors
    /// [`BarError`] when there is no such BAR or the address does not suit it.
    pub fn assign_bar(&mut self, bar: u8, base: u64) -> Result<(), BarError> {
        let index = usize::from(bar);
        let Some(Some(Bar { kind, len, .. })) = self.bars.get(index).copied() else {
            return Err(BarError::NoSuchBar { bar });
        };
        let width_mask = match kind {
            BarKind::Io => 0xffff,
            BarKind::Memory32 => 0xffff_ffff,
            BarKind::Memory64 { .. } => u64::MAX,
        };
        if base & (len - 1) != 0 || base & !width_mask != 0 || base == 0 {
            return Err(BarError::BadAddress { bar, base, len });
        }
        let bytes = (base | u64::from(kind.flags())).to_le_bytes();
        let at = BAR_0 + 4 * index;
        self.put(at, &bytes[..if kind.wide() { 8 } else { 4 }]);
        self.remap();
        Ok(())
    }

    /// Back to the state at power-on.
    pub fn reset(&mut self) {
        self.bytes = self.power_on;
        self.remap();
    }

    /// The bytes as they are, for whoever saves them.
    pub fn bytes(&self) -> &[u8; CONFIG_LEN] {
        &self.bytes
    }

    /// Puts saved bytes back. What software cannot change stays as this function has it.
    pub fn restore(&mut self, saved: &[u8; CONFIG_LEN]) {
        for ((to, mask), from) in self.bytes.iter_mut().zip(&self.writable).zip(saved) {
            *to = *to & !mask | from & mask;
        }
        self.remap();
    }
}

impl Drop for ConfigSpace {
    /// A function that is removed answers nowhere.
    fn drop(&mut self) {
        self.bytes[COMMAND..COMMAND + 2].fill(0);
        self.remap();
    }
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ConfigSpace")
            .field("bytes", &self.bytes)
            .field("bars", &self.bars)
            .finish_non_exhaustive()
    }
}
