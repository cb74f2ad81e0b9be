//! The capability lists of a function's configuration space (PCI 3.0, 6.7; PCI Express 4.0, 7.6), of whatever device: a list
//! that turns in circles, or leads out of the space, ends where it does so.

/// First byte that a capability can have; the header is before it.
const FIRST: u8 = 0x40;
/// Where the list begins.
const POINTER: usize = 0x34;
/// Bit of the status register that says there is one.
const LIST: u8 = 1 << 4;
/// Where extended capabilities begin.
const EXTENDED: u16 = 0x100;
/// Length of all of it, with them.
const EXTENDED_END: u16 = 0x1000;

/// One capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// What it is.
    pub id: u8,
    /// Where it is.
    pub offset: u8,
}

/// One extended capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedCapability {
    /// What it is.
    pub id: u16,
    /// Version of its layout, 0 to 15.
    pub version: u8,
    /// Where it is.
    pub offset: u16,
}

/// The capabilities in the order of the list.
pub fn capabilities(config: &[u8]) -> Vec<Capability> {
    let byte = |at: usize| config.get(at).copied().unwrap_or(0);
    let mut found: Vec<Capability> = Vec::new();
    if byte(6) & LIST == 0 {
        return found;
    }
    let mut next = byte(POINTER) & !3;
    while next >= FIRST && found.iter().all(|capability| capability.offset != next) {
        let at = usize::from(next);
        let id = byte(at);
        // Nothing is there: a device that does not answer.
        if id == 0xff {
            break;
        }
        found.push(Capability { id, offset: next });
        next = byte(at + 1) & !3;
    }
    found
}

/// The extended capabilities in the order of the list; none of a conventional function.
pub fn extended_capabilities(config: &[u8]) -> Vec<ExtendedCapability> {
    let header = |at: u16| {
        let bytes = config.get(usize::from(at)..)?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*bytes)).filter(|header| !matches!(*header, 0 | u32::MAX))
    };
    let mut found: Vec<ExtendedCapability> = Vec::new();
    let mut next = EXTENDED;
    while let Some(header) = header(next)
        && found.iter().all(|capability| capability.offset != next)
    {
        found.push(ExtendedCapability { id: header as u16, version: (header >> 16) as u8 & 0xf, offset: next });
        next = (header >> 20) as u16 & 0xffc;
        if !(EXTENDED..EXTENDED_END).contains(&next) {
            break;
        }
    }
    found
}
