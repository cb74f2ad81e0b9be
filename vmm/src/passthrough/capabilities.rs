//! What a function's configuration space says about express ports and access control (PCIe 5.0, 7.5.3 and 7.7.8).
//!
//! The kernel shows 64 bytes of it to everybody and the rest to root. What cannot be read is unknown, not absent. The bytes
//! are a device's, which may be broken: lists are walked over at most as many entries as fit.

use serde::Serialize;

const STATUS: usize = 6;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const FIRST: usize = 0x34;
const ID_EXPRESS: u8 = 0x10;
const EXTENDED: usize = 0x100;
const ID_ACS: u16 = 0x0d;

/// Bits of the ACS registers that keep what is behind a port apart: source validation, request and completion redirect,
/// upstream forwarding.
const ISOLATING: u16 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4;

/// What a function is on the express fabric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortKind {
    /// A device.
    Endpoint,
    /// A device of the chipset or the processor.
    IntegratedEndpoint,
    /// A port of the root complex.
    RootPort,
    /// The side of a switch that faces the processor.
    Upstream,
    /// A side of a switch that faces devices.
    Downstream,
    /// A bridge to conventional PCI; what is behind it is one to the IOMMU.
    ToPci,
    /// Something else.
    Other,
}

/// Access control services of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Acs {
    /// All that isolates is switched on.
    On,
    /// It is there, and not all of it is switched on.
    Off,
    /// The port has none, or not all of it.
    Missing,
    /// Only root can read it.
    Unknown,
}

/// What was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// None for conventional PCI, and where it cannot be read.
    pub port: Option<PortKind>,
    /// None for what is no port of the fabric and needs none.
    pub acs: Option<Acs>,
}

fn word(config: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*config.get(at..)?.first_chunk()?))
}

fn express(config: &[u8]) -> Option<PortKind> {
    if config.get(STATUS)? & STATUS_CAPABILITIES == 0 {
        return None;
    }
    let mut at = usize::from(config.get(FIRST)? & 0xfc);
    for _ in 0..48 {
        let id = *config.get(at).filter(|_| at >= 0x40)?;
        if id == ID_EXPRESS {
            return Some(match word(config, at + 2)? >> 4 & 0xf {
                0 | 1 => PortKind::Endpoint,
                4 => PortKind::RootPort,
                5 => PortKind::Upstream,
                6 => PortKind::Downstream,
                7 => PortKind::ToPci,
                9 => PortKind::IntegratedEndpoint,
                _ => PortKind::Other,
            });
        }
        at = usize::from(config.get(at + 1)? & 0xfc);
    }
    None
}

fn acs(config: &[u8]) -> Acs {
    if config.len() <= EXTENDED {
        return Acs::Unknown;
    }
    let mut at = EXTENDED;
    for _ in 0..960 {
        let Some((id, link)) = word(config, at).zip(word(config, at + 2)) else { return Acs::Unknown };
        if id == ID_ACS {
            let Some((able, on)) = word(config, at + 4).zip(word(config, at + 6)) else { return Acs::Unknown };
            return match (able & ISOLATING == ISOLATING, on & ISOLATING == ISOLATING) {
                (false, _) => Acs::Missing,
                (true, false) => Acs::Off,
                (true, true) => Acs::On,
            };
        }
        at = usize::from(link >> 4);
        if at < EXTENDED {
            return Acs::Missing;
        }
    }
    Acs::Missing
}

impl Capabilities {
    /// Reads configuration space, as much of it as there is.
    pub fn read(config: &[u8]) -> Self {
        let port = express(config);
        let isolates = matches!(port, Some(PortKind::RootPort | PortKind::Downstream));
        Self { port, acs: isolates.then(|| acs(config)) }
    }
}
