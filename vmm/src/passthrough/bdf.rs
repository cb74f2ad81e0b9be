//! Where a PCI function is.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use thiserror::Error;

/// Segment, bus, device and function; written `0000:01:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    segment: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// Not a place of a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is no PCI function; write it as lspci does: 0000:01:00.0, or 01:00.0")]
pub struct BdfError(String);

impl Bdf {
    /// The bus number.
    pub fn bus(self) -> u8 {
        self.bus
    }
    /// Whether both are functions of one device.
    pub fn is_sibling(self, other: Self) -> bool {
        (self.segment, self.bus, self.device) == (other.segment, other.bus, other.device)
    }
}

impl FromStr for Bdf {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, BdfError> {
        let read = || {
            // A segment has four digits, behind Intel's VMD five or more; everything else is as wide as lspci writes it.
            let number = |text: &str, digits: std::ops::RangeInclusive<usize>| {
                let fits = digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
                fits.then(|| u32::from_str_radix(text, 16).ok()).flatten()
            };
            let (place, function) = text.rsplit_once('.')?;
            let (place, device) = place.rsplit_once(':')?;
            let (segment, bus) = place.rsplit_once(':').unwrap_or(("0000", place));
            let device = number(device, 2..=2).filter(|device| *device < 32)?;
            let function = number(function, 1..=1).filter(|function| *function < 8)?;
            let bus = number(bus, 2..=2)?;
            let segment = number(segment, 4..=8)?;
            Some(Self { segment, bus: bus as u8, device: device as u8, function: function as u8 })
        };
        read().ok_or_else(|| BdfError(text.chars().take(40).collect()))
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:04x}:{:02x}:{:02x}.{}", self.segment, self.bus, self.device, self.function)
    }
}

impl Serialize for Bdf {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
