//! What of a host function's configuration space the guest sees, and what of it is not the function's own.
//!
//! Bytes are *owned* (they are the board's: identity, BARs, the interrupt capabilities, the list of capabilities) or the
//! function's, whose reads and writes go to it. The list holds only capabilities that mean something to a guest: what would
//! let it make virtual functions, change the sizes of BARs or ask the IOMMU for translations is left out. On the root bus,
//! where there is no port above it, an endpoint is an integrated one without a link. Power states are the guest's to write
//! and have no effect, so that its registers stay where they are mapped.

use std::collections::BTreeMap;

use thiserror::Error;

use super::capabilities::{Capability, capabilities, extended_capabilities};
use super::msi::MsiPlace;
use crate::pci::config_space::{BarKind, CONFIG_LEN};
use crate::pci::msix::{ENTRY_LEN, VECTORS_MAX};

/// Length of configuration space with extended capabilities.
pub const EXTENDED_LEN: usize = 4096;

const HEADER_TYPE: usize = 0x0e;
const ROM: usize = 0x30;
const CAPABILITY_POINTER: usize = 0x34;
const HEADER_END: usize = 0x40;

const POWER: u8 = 0x01;
const VITAL_PRODUCT_DATA: u8 = 0x03;
const MSI: u8 = 0x05;
const VENDOR: u8 = 0x09;
const SUBSYSTEM: u8 = 0x0d;
const EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;
const ADVANCED: u8 = 0x13;
/// Capabilities that the guest sees.
const KEPT: [u8; 8] = [POWER, VITAL_PRODUCT_DATA, MSI, VENDOR, SUBSYSTEM, EXPRESS, MSIX, ADVANCED];

const SERIAL_NUMBER: u16 = 0x03;
const VENDOR_SPECIFIC: u16 = 0x0b;
/// Extended capabilities that the guest sees.
const KEPT_EXTENDED: [u16; 2] = [SERIAL_NUMBER, VENDOR_SPECIFIC];

/// Endpoint, legacy endpoint and integrated endpoint, in the type of the Express capability.
const ENDPOINTS: [u8; 2] = [0, 1];
const INTEGRATED: u8 = 9;

/// One BAR of the host's function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostBar {
    /// Its number.
    pub bar: u8,
    /// Its kind.
    pub kind: BarKind,
    /// Its length in bytes.
    pub len: u64,
}

/// Where a table is: a stretch of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The BAR.
    pub bar: u8,
    /// From its start, in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Stretch {
    /// Whether an access touches it.
    pub fn touches(&self, bar: u8, offset: u64, len: usize) -> bool {
        bar == self.bar && offset < self.offset + self.len && offset.saturating_add(len as u64) > self.offset
    }
}

/// The function's MSI-X.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixPlace {
    /// Where the capability is.
    pub capability: u8,
    /// Vectors.
    pub vectors: u16,
    /// Its table.
    pub table: Stretch,
    /// Its pending bits.
    pub pending: Stretch,
}

/// What the host says of the function beside its bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Lengths of the six BARs; 0 for none.
    pub bar_lens: [u64; 6],
    /// It can raise its pin.
    pub pin: bool,
    /// Messages that MSI may have; 0 for no MSI.
    pub msi: u16,
    /// Vectors that MSI-X may have; 0 for no MSI-X.
    pub msix: u16,
}

/// A function that cannot be shown to a guest.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ShownError {
    /// It does not answer.
    #[error("the function does not answer (its configuration space reads as ones): is it powered, and still there?")]
    Silent,
    /// A bridge.
    #[error("it is a bridge (header type {0:#x}): only endpoints can be passed through; pass what is behind it")]
    Bridge(u8),
    /// The configuration space is too short.
    #[error("its configuration space has {0} bytes, and 256 are the least")]
    Short(usize),
    /// MSI-X outside the BARs.
    #[error("its MSI-X table or pending bits lie outside BAR {bar}: the device contradicts itself")]
    Table {
        /// The BAR that it names.
        bar: u8,
    },
    /// A BAR of an impossible length.
    #[error("BAR {bar} of {len:#x} bytes: a BAR's length is a power of two")]
    Bar {
        /// Its number.
        bar: u8,
        /// Its length.
        len: u64,
    },
}

/// What the guest is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Owned bytes as they are at power-on.
    pub bytes: [u8; CONFIG_LEN],
    /// What software may change of them.
    pub writable: [u8; CONFIG_LEN],
    /// Which bytes are owned; the others are the function's.
    pub owned: [bool; CONFIG_LEN],
    /// The BARs.
    pub bars: Vec<HostBar>,
    /// MSI, where there is one.
    pub msi: Option<MsiPlace>,
    /// MSI-X, where there is one.
    pub msix: Option<MsixPlace>,
    /// It has a pin.
    pub pin: bool,
    /// Headers of extended capabilities, by their place; `None` where the function has none and ends after 256 bytes.
    pub extended: Option<BTreeMap<u16, u32>>,
}

fn dword(config: &[u8], at: usize) -> u32 {
    config.get(at..).and_then(<[u8]>::first_chunk::<4>).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn bars(config: &[u8], lens: &[u64; 6]) -> Result<Vec<HostBar>, ShownError> {
    let mut found = Vec::new();
    let mut upper_half = false;
    for (bar, len) in (0_u8..).zip(lens) {
        if std::mem::take(&mut upper_half) || *len == 0 {
            continue;
        }
        let flags = dword(config, 0x10 + 4 * usize::from(bar));
        let kind = match flags {
            _ if flags & 1 == 1 => BarKind::Io,
            _ if flags >> 1 & 3 == 2 => BarKind::Memory64 { prefetchable: flags & 8 != 0 },
            _ => BarKind::Memory32,
        };
        if !len.is_power_of_two() {
            return Err(ShownError::Bar { bar, len: *len });
        }
        upper_half = matches!(kind, BarKind::Memory64 { .. });
        found.push(HostBar { bar, kind, len: *len });
    }
    Ok(found)
}

/// Under construction.
struct Work<'a> {
    config: &'a [u8],
    shown: Shown,
}

impl Work<'_> {
    /// Takes bytes, as they are, for the board; bits of `writable` may be changed.
    fn own(&mut self, at: usize, len: usize, writable: u8) {
        for byte in at..at + len {
            if byte < CONFIG_LEN {
                self.shown.owned[byte] = true;
                self.shown.bytes[byte] = self.config.get(byte).copied().unwrap_or(0);
                self.shown.writable[byte] = writable;
            }
        }
    }
    /// Takes bytes, with another value than theirs.
    fn put(&mut self, at: usize, value: &[u8]) {
        self.own(at, value.len(), 0);
        for (byte, value) in (at..).zip(value) {
            if byte < CONFIG_LEN {
                self.shown.bytes[byte] = *value;
            }
        }
    }
    fn header(&mut self) {
        self.own(0, HEADER_END, 0);
        // What it has to say about errors is its own.
        self.shown.owned[6..8].fill(false);
        // Parity and system errors, which only the function itself knows what to do with; the rest as there are BARs.
        self.shown.writable[4..6].copy_from_slice(&[0x40, 0x01]);
        self.shown.writable[0x0c..0x0e].fill(0xff);
        let kind = self.config.get(HEADER_TYPE).copied().unwrap_or(0);
        self.put(HEADER_TYPE, &[kind & 0x7f, 0]);
        self.put(ROM, &[0; 4]);
        self.put(0x35, &[0; 7]);
        self.put(0x3c, &[0, 0]);
    }
    fn power(&mut self, at: usize) {
        self.own(at + 2, 4, 0);
        // No power management events.
        if let Some(byte) = self.shown.bytes.get_mut(at + 3) {
            *byte &= 0x07;
        }
        let state = self.config.get(at + 4).copied().unwrap_or(0) & !3;
        self.put(at + 4, &[state, 0]);
        if let Some(mask) = self.shown.writable.get_mut(at + 4) {
            *mask = 3;
        }
    }
    fn express(&mut self, at: usize) {
        let flags = self.config.get(at + 2).copied().unwrap_or(0);
        self.own(at + 2, 2, 0);
        if !ENDPOINTS.contains(&(flags >> 4)) {
            return;
        }
        self.put(at + 2, &[flags & 0x0f | INTEGRATED << 4]);
        // No link. From the second version on there are slot, root and second link registers, too.
        self.put(at + 0x0c, &[0; 8]);
        if flags & 0x0f >= 2 {
            self.put(at + 0x14, &[0; 16]);
            self.put(at + 0x2c, &[0; 8]);
        }
    }
    fn msi(&mut self, offset: u8, most: u16) {
        let Some(config) = self.config.first_chunk::<CONFIG_LEN>() else { return };
        let Some(place) = MsiPlace::read(config, offset, most.max(1).ilog2() as u8) else { return };
        let writable = place.writable();
        self.own(place.offset() + 2, place.len() - 2, 0);
        let control = self.shown.bytes[place.offset() + 2] & 0x80 | place.capable_bits();
        self.put(place.offset() + 2, &[control]);
        self.put(place.offset() + 4, &vec![0; place.len() - 4]);
        for (at, bits) in (place.offset()..).zip(writable).skip(2) {
            if let Some(mask) = self.shown.writable.get_mut(at) {
                *mask = bits;
            }
        }
        self.shown.msi = Some(place);
    }
    fn msix(&mut self, offset: u8, most: u16) -> Result<(), ShownError> {
        let at = usize::from(offset);
        if at + 12 > CONFIG_LEN {
            return Ok(());
        }
        let vectors = (dword(self.config, at) >> 16) as u16 & (VECTORS_MAX - 1);
        let vectors = (vectors + 1).min(most);
        let place = |at: usize, len: u64| {
            let value = dword(self.config, at);
            let stretch = Stretch { bar: value as u8 & 7, offset: u64::from(value & !7), len };
            let bar = self.shown.bars.iter().find(|bar| bar.bar == stretch.bar && bar.kind != BarKind::Io);
            match bar {
                Some(bar) if stretch.offset + len <= bar.len => Ok(stretch),
                _ => Err(ShownError::Table { bar: stretch.bar }),
            }
        };
        let table = place(at + 4, ENTRY_LEN * u64::from(vectors))?;
        let pending = place(at + 8, u64::from(vectors.div_ceil(64)) * 8)?;
        self.own(at + 2, 10, 0);
        self.put(at + 2, &(vectors - 1).to_le_bytes());
        self.shown.writable[at + 3] = 0xc0;
        self.shown.msix = Some(MsixPlace { capability: offset, vectors, table, pending });
        Ok(())
    }
    /// How many bytes of a capability are the board's.
    fn len(&self, capability: Capability) -> usize {
        let at = usize::from(capability.offset);
        match capability.id {
            POWER => 6,
            EXPRESS if self.config.get(at + 2).is_some_and(|flags| flags & 0x0f >= 2) => 0x34,
            EXPRESS => 0x14,
            MSI => {
                let config = self.config.first_chunk::<CONFIG_LEN>();
                config
                    .and_then(|config| MsiPlace::read(config, capability.offset, 0))
                    .map_or(CONFIG_LEN, |place| place.len())
            }
            MSIX => 12,
            _ => 2,
        }
    }
    /// The list again, with what is kept of it.
    fn list(&mut self, facts: &HostFacts) -> Result<(), ShownError> {
        let mut pointer = CAPABILITY_POINTER;
        self.put(pointer, &[0]);
        let all = capabilities(self.config);
        for capability in &all {
            let at = usize::from(capability.offset);
            self.own(at, 2, 0);
            let served = match capability.id {
                MSI => facts.msi > 0 && self.shown.msi.is_none(),
                MSIX => facts.msix > 0 && self.shown.msix.is_none(),
                id => KEPT.contains(&id),
            };
            // One that reaches into another, or beyond the space, cannot be right: what is put there would be read as the other's.
            let end = at + self.len(*capability);
            let other = |other: &Capability| (at + 1..end).contains(&usize::from(other.offset));
            let runs_over = end > CONFIG_LEN || all.iter().any(other);
            if !served || runs_over {
                // It cannot be found any more, and who knows where it was finds nothing.
                self.put(at, &[0, 0]);
                continue;
            }
            match capability.id {
                POWER => self.power(at),
                EXPRESS => self.express(at),
                MSI => self.msi(capability.offset, facts.msi),
                MSIX => self.msix(capability.offset, facts.msix)?,
                _ => {}
            }
            self.put(at + 1, &[0]);
            self.put(pointer, &[capability.offset]);
            pointer = at + 1;
        }
        Ok(())
    }
    fn extended(&mut self) {
        if self.config.len() < EXTENDED_LEN {
            return;
        }
        let mut headers = BTreeMap::new();
        let all = extended_capabilities(self.config);
        let mut last: Option<u16> = None;
        for capability in &all {
            let kept = KEPT_EXTENDED.contains(&capability.id);
            let first = capability.offset == 0x100;
            // The first one is where the list begins: it stays as a place without a meaning.
            let header = if kept { u32::from(capability.id) | u32::from(capability.version) << 16 } else { 0 };
            headers.insert(capability.offset, header);
            if kept || first {
                if let Some(header) = last.and_then(|last| headers.get_mut(&last)).filter(|_| kept) {
                    *header |= u32::from(capability.offset) << 20;
                }
                last = Some(capability.offset);
            }
        }
        headers.entry(0x100).or_insert(0);
        self.shown.extended = Some(headers);
    }
}

impl Shown {
    /// Of a function with this configuration space, 256 or 4096 bytes of it, as it is before a guest has written to it.
    ///
    /// # Errors
    /// When it cannot be passed through.
    pub fn of(config: &[u8], facts: &HostFacts) -> Result<Self, ShownError> {
        if config.len() < CONFIG_LEN {
            return Err(ShownError::Short(config.len()));
        }
        if config.iter().take(4).all(|byte| *byte == 0xff) {
            return Err(ShownError::Silent);
        }
        let header = config.get(HEADER_TYPE).copied().unwrap_or(0) & 0x7f;
        if header != 0 {
            return Err(ShownError::Bridge(header));
        }
        let shown = Self {
            bytes: [0; CONFIG_LEN],
            writable: [0; CONFIG_LEN],
            owned: [false; CONFIG_LEN],
            bars: bars(config, &facts.bar_lens)?,
            msi: None,
            msix: None,
            pin: facts.pin,
            extended: None,
        };
        let mut work = Work { config, shown };
        work.header();
        work.list(facts)?;
        work.extended();
        Ok(work.shown)
    }

    /// Vectors that MSI or MSI-X have at most.
    pub fn vectors(&self) -> u16 {
        let msi = self.msi.map_or(0, |place| place.vectors());
        self.msix.map_or(0, |place| place.vectors).max(msi)
    }

    /// The extended capability in which an offset lies, if the guest sees it.
    pub(super) fn kept_at(&self, offset: u16) -> bool {
        let last = self.extended.as_ref().and_then(|headers| headers.range(..=offset).next_back());
        last.is_some_and(|(_, header)| header & 0xffff != 0)
    }
}
