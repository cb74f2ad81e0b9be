//! What a server is: asked once, frozen as what the guest is shown; each successor has to be the same.

use atoll_devices::pci::config_space::{BarKind, Identity};
use atoll_devices::pci::msix::{ENTRY_LEN, MSIX_ID, VECTORS_MAX};
use atoll_protocol::vfio_user::reply::{DeviceInfo, IO_FDS_MAX, IrqInfo, RegionInfo, RegionIoFds};
use atoll_protocol::vfio_user::{Command, Request, irq, region};
use thiserror::Error;

use super::conversation::{Conversation, TalkError};
use super::doorbells::Doorbells;

/// Configuration space that is looked at.
const CONFIG_LEN: usize = 256;
/// Longest BAR that finds a place.
const BAR_MAX: u64 = 1 << 38;
const CAPABILITY_VENDOR: u8 = 0x09;
/// Room for an answer.
const ROOM: u32 = 4096;

/// A device that cannot be shown to a guest.
#[derive(Debug, Error)]
pub enum ShapeError {
    /// The conversation failed.
    #[error(transparent)]
    Talk(#[from] TalkError),
    /// Not one that can be put on a bus.
    #[error("the device cannot be put on the PCI bus: {0}")]
    Unfit(String),
    /// A successor that is not what the guest was shown.
    #[error("it is not what the guest was shown: {0}")]
    Other(String),
}

impl ShapeError {
    /// Whether another server would do the same.
    pub fn is_hopeless(&self) -> bool {
        match self {
            Self::Talk(error) => error.is_hopeless(),
            Self::Unfit(_) | Self::Other(_) => true,
        }
    }
}

/// Where the table of vectors, or what of them is pending, is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// BAR.
    pub bar: u8,
    /// Offset in it.
    pub offset: u32,
}

/// What the guest is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Who it is.
    pub identity: Identity,
    /// BARs: number, kind, bytes.
    pub bars: Vec<(u8, BarKind, u64)>,
    /// MSI-X vectors.
    pub vectors: u16,
    /// Their table.
    pub table: Place,
    /// Their pending bits.
    pub pending: Place,
    /// Capabilities of its vendor's own, without id and link.
    pub vendor: Vec<Vec<u8>>,
}

fn unfit(what: impl Into<String>) -> ShapeError {
    ShapeError::Unfit(what.into())
}

impl Shape {
    /// Asks a server what it is.
    ///
    /// # Errors
    /// [`ShapeError`].
    pub(super) fn ask(talk: &mut Conversation) -> Result<Self, ShapeError> {
        let absurd = |command, error: &dyn std::fmt::Display| TalkError::Absurd { command, what: error.to_string() };
        let (payload, _) = talk.ask(&Request::DeviceInfo, &[])?;
        let info = DeviceInfo::decode(&payload).map_err(|error| absurd(Command::DeviceInfo, &error))?;
        if !info.pci || info.regions <= region::CONFIG || info.irqs <= irq::MSIX {
            return Err(unfit("it is no PCI device"));
        }
        let mut sizes = [0_u64; 6];
        for (index, size) in (region::BAR_0..).zip(&mut sizes) {
            let (payload, _) = talk.ask(&Request::RegionInfo { index, room: ROOM }, &[])?;
            let info = RegionInfo::decode(&payload).map_err(|error| absurd(Command::RegionInfo, &error))?;
            *size = info.size;
        }
        let (payload, _) = talk.ask(&Request::IrqInfo { index: irq::MSIX }, &[])?;
        let irqs = IrqInfo::decode(&payload).map_err(|error| absurd(Command::IrqInfo, &error))?;
        let mut config = [0; CONFIG_LEN];
        for (at, chunk) in (0..).step_by(64).zip(config.chunks_mut(64)) {
            talk.read(region::CONFIG, at, chunk)?;
        }
        Self::read(&config, sizes, irqs.count)
    }

    /// What configuration space and lengths of regions say.
    ///
    /// # Errors
    /// [`ShapeError::Unfit`].
    pub fn read(config: &[u8; CONFIG_LEN], sizes: [u64; 6], irqs: u32) -> Result<Self, ShapeError> {
        let word = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
        let class = u32::from(config[0x09]) | u32::from(config[0x0a]) << 8 | u32::from(config[0x0b]) << 16;
        if config[0x0e] & 0x7f != 0 || word(0) == 0xffff {
            return Err(unfit("its header is not that of a device"));
        }
        let identity = Identity {
            vendor: word(0x00),
            device: word(0x02),
            revision: config[0x08],
            class,
            subsystem_vendor: word(0x2c),
            subsystem: word(0x2e),
        };
        let (mut bars, mut upper) = (Vec::new(), false);
        for (bar, size) in (0_u8..).zip(sizes) {
            if std::mem::take(&mut upper) || size == 0 {
                continue;
            }
            let kind = match config[0x10 + 4 * usize::from(bar)] & 0xf {
                flags if flags & 1 != 0 => BarKind::Io,
                flags if flags & 6 == 4 => BarKind::Memory64 { prefetchable: flags & 8 != 0 },
                _ => BarKind::Memory32,
            };
            upper = matches!(kind, BarKind::Memory64 { .. });
            if size > BAR_MAX {
                return Err(unfit(format!("its BAR {bar} has {size:#x} bytes, and no room is that long")));
            }
            // What a server says may be less than a BAR can be.
            let least = if kind == BarKind::Io { 4 } else { 4096 };
            bars.push((bar, kind, size.next_power_of_two().max(least)));
        }
        let (mut found, mut vendor) = (None, Vec::new());
        let mut at = if config[0x06] & 0x10 != 0 { config[0x34] & !3 } else { 0 };
        // A list that runs in a circle ends too.
        for _ in 0..48 {
            let start = usize::from(at);
            let Some(body) = config.get(start..).filter(|body| start >= 0x40 && body.len() >= 4) else { break };
            match body[0] {
                MSIX_ID => found = body.get(2..12),
                CAPABILITY_VENDOR => vendor.extend(body.get(2..usize::from(body[2]).max(3)).map(<[u8]>::to_vec)),
                _ => {}
            }
            at = body[1] & !3;
        }
        let Some(msix) = found.filter(|_| irqs > 0) else {
            return Err(unfit("it has no MSI-X interrupts, and no others are passed on"));
        };
        let vectors = (u16::from_le_bytes([msix[0], msix[1]]) & (VECTORS_MAX - 1)) + 1;
        let vectors = vectors.min(u16::try_from(irqs).unwrap_or(VECTORS_MAX));
        let place = |at: usize| {
            let value = u32::from_le_bytes([msix[at], msix[at + 1], msix[at + 2], msix[at + 3]]);
            Place { bar: (value & 7) as u8, offset: value & !7 }
        };
        let (table, pending) = (place(2), place(6));
        let fits = |place: Place, len: u64| {
            let bar = bars.iter().find(|bar: &&(u8, BarKind, u64)| bar.0 == place.bar && bar.1 != BarKind::Io);
            bar.is_some_and(|bar| u64::from(place.offset) + len <= bar.2)
        };
        if !fits(table, ENTRY_LEN * u64::from(vectors)) || !fits(pending, u64::from(vectors).div_ceil(64) * 8) {
            return Err(unfit("its table of MSI-X vectors is in no BAR"));
        }
        Ok(Self { identity, bars, vectors, table, pending, vendor })
    }

    /// What differs from what the guest was shown.
    ///
    /// # Errors
    /// [`ShapeError::Other`].
    pub(super) fn compare(&self, shown: &Self) -> Result<(), ShapeError> {
        let what = match () {
            () if self.identity != shown.identity => format!("{:x?} instead of {:x?}", self.identity, shown.identity),
            () if self.bars != shown.bars => format!("BARs {:x?} instead of {:x?}", self.bars, shown.bars),
            () if self.vectors < shown.vectors => format!("{} vectors instead of {}", self.vectors, shown.vectors),
            () if (self.table, self.pending) != (shown.table, shown.pending) => "another table of vectors".to_owned(),
            () => return Ok(()),
        };
        Err(ShapeError::Other(what))
    }

    /// The ways past the conversation; a server without any has none.
    ///
    /// # Errors
    /// [`TalkError`] when it does not answer.
    pub(super) fn ask_doorbells(&self, talk: &mut Conversation) -> Result<Doorbells, TalkError> {
        let mut doorbells = Doorbells::default();
        for (bar, _, _) in &self.bars {
            let mut room = ROOM;
            for _ in 0..2 {
                let asked = Request::RegionIoFds { index: u32::from(*bar), room };
                let (payload, beside) = match talk.ask(&asked, &[]) {
                    Ok(answer) => answer,
                    // It has no such thing.
                    Err(TalkError::Refused { .. }) => break,
                    Err(error) => return Err(error),
                };
                let Ok((ways, needed)) = RegionIoFds::decode(&payload) else { break };
                if needed > room && needed <= 16 + 48 * IO_FDS_MAX {
                    room = needed;
                    continue;
                }
                doorbells.add(*bar, &ways.ways, beside);
                break;
            }
        }
        Ok(doorbells)
    }
}
