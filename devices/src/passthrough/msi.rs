//! MSI (PCI 3.0, 6.8.1): what the guest has written into the capability, as messages of up to 32 vectors.

use crate::interrupt::MsiMessage;
use crate::pci::config_space::CONFIG_LEN;

const ENABLE: u8 = 1;
const WIDE: u8 = 1 << 7;
const MASKABLE: u8 = 1;

/// Where things are in one function's MSI capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiPlace {
    offset: usize,
    wide: bool,
    maskable: bool,
    /// Messages that the function can send, as a power of two: 0 to 5.
    capable: u8,
}

impl MsiPlace {
    /// Reads the capability at `offset`, which ends before the space does, else there is none. At most 2^`most` messages.
    pub fn read(config: &[u8; CONFIG_LEN], offset: u8, most: u8) -> Option<Self> {
        let offset = usize::from(offset);
        let (low, high) = (*config.get(offset + 2)?, *config.get(offset + 3)?);
        let capable = (low >> 1 & 7).min(5).min(most);
        let place = Self { offset, wide: low & WIDE != 0, maskable: high & MASKABLE != 0, capable };
        (offset + place.len() <= CONFIG_LEN).then_some(place)
    }

    /// Bytes of the capability.
    pub fn len(&self) -> usize {
        let masks = if self.maskable { 10 } else { 0 };
        10 + if self.wide { 4 } else { 0 } + masks
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Where it begins.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Vectors that it can have.
    pub fn vectors(&self) -> u16 {
        1 << self.capable
    }

    /// Bits of the first control byte that say how many messages the function can send.
    pub(super) fn capable_bits(&self) -> u8 {
        self.capable << 1
    }

    fn data(&self) -> usize {
        self.offset + if self.wide { 12 } else { 8 }
    }

    /// The mask bits, where there are any.
    fn mask(&self) -> Option<usize> {
        self.maskable.then_some(self.data() + 4)
    }

    /// The pending bits, where there are any.
    pub(super) fn pending(&self) -> Option<usize> {
        self.maskable.then_some(self.data() + 8)
    }

    /// What software may change of the capability, from its first byte on.
    pub(super) fn writable(&self) -> Vec<u8> {
        let mut mask = vec![0; self.len()];
        let mut allow = |at: usize, bits: &[u8]| {
            let at = at - self.offset;
            if let Some(room) = mask.get_mut(at..at + bits.len()) {
                room.copy_from_slice(bits);
            }
        };
        allow(self.offset + 2, &[ENABLE | 0x70]);
        allow(self.offset + 4, &[0xfc, 0xff, 0xff, 0xff]);
        if self.wide {
            allow(self.offset + 8, &[0xff; 4]);
        }
        allow(self.data(), &[0xff; 2]);
        if let Some(at) = self.mask() {
            allow(at, &[0xff; 4]);
        }
        mask
    }

    /// How many vectors are enabled; none while MSI is off. No more than it can have, whatever was written.
    pub fn enabled(&self, config: &[u8; CONFIG_LEN]) -> Option<u16> {
        let control = config.get(self.offset + 2).copied().unwrap_or(0);
        (control & ENABLE != 0).then(|| 1 << (control >> 4 & 7).min(self.capable))
    }

    /// What a vector sends; `None` while it is off or masked.
    pub fn message(&self, config: &[u8; CONFIG_LEN], vector: u16) -> Option<MsiMessage> {
        let count = self.enabled(config).filter(|count| vector < *count)?;
        let dword = |at: usize| {
            let bytes = config.get(at..).and_then(<[u8]>::first_chunk::<4>);
            bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        if self.mask().is_some_and(|at| dword(at) >> vector & 1 == 1) {
            return None;
        }
        let high = if self.wide { u64::from(dword(self.offset + 8)) << 32 } else { 0 };
        let address = high | u64::from(dword(self.offset + 4) & !3);
        let data = dword(self.data()) & 0xffff;
        // The low bits say which vector it is.
        Some(MsiMessage { address, data: data & !u32::from(count - 1) | u32::from(vector) })
    }
}
