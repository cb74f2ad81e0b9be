//! What is asked.

use super::{Command, DATA_MAX, Fields, Put, Version, WireError, irq, region};

const MAP_READ: u32 = 1;
const MAP_WRITE: u32 = 2;
/// Ways to reach it, which libvfio-user's clients say and a descriptor beside the message implies.
const MAP_HINTS: u32 = 4 | 8;
const UNMAP_ALL: u32 = 2;

const DATA_NONE: u32 = 1;
const DATA_BOOL: u32 = 2;
const DATA_EVENTFD: u32 = 4;
const ACTION_MASK: u32 = 8;
const ACTION_UNMASK: u32 = 16;
const ACTION_TRIGGER: u32 = 32;

/// Vectors of the largest function.
const IRQS_MAX: u32 = 2048;

/// Memory that the device may reach; its descriptor, if there is one, is beside the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaMap {
    /// First address, as the device says it.
    pub address: u64,
    /// Bytes, at least one; the last address does not wrap.
    pub len: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// The device may read it.
    pub readable: bool,
    /// The device may write it.
    pub writable: bool,
}

/// Memory that the device may reach no more: when it is answered, the device touches it no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaUnmap {
    /// One that was mapped, whole.
    One {
        /// Its first address.
        address: u64,
        /// Its bytes.
        len: u64,
    },
    /// All of it.
    All,
}

/// Registers in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAccess {
    /// Which region.
    pub region: u32,
    /// Where in it.
    pub offset: u64,
    /// How many bytes.
    pub count: u32,
}

/// What is done to interrupts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Each is signalled by one of the descriptors beside the message; none switches them off.
    Signals,
    /// Nothing is done to any; with a count of zero all of the kind are switched off.
    Disable,
    /// They are raised now: all of them, or those that say yes.
    Raise(Option<Vec<bool>>),
    /// They are held back, or let go: all of them, or those that say yes. True holds back.
    Mask(bool, Option<Vec<bool>>),
}

/// What is done to which interrupts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IrqSet {
    /// Their kind.
    pub index: u32,
    /// The first of them.
    pub start: u32,
    /// How many.
    pub count: u32,
    /// What.
    pub action: IrqAction,
}

/// A question with all that it says, descriptors apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// VERSION.
    Version(Version),
    /// DMA_MAP.
    DmaMap(DmaMap),
    /// DMA_UNMAP.
    DmaUnmap(DmaUnmap),
    /// DEVICE_GET_INFO.
    DeviceInfo,
    /// DEVICE_GET_REGION_INFO.
    RegionInfo {
        /// Which region.
        index: u32,
        /// Room for the answer, in bytes.
        room: u32,
    },
    /// DEVICE_GET_REGION_IO_FDS.
    RegionIoFds {
        /// Which region.
        index: u32,
        /// Room for the answer, in bytes.
        room: u32,
    },
    /// DEVICE_GET_IRQ_INFO.
    IrqInfo {
        /// Which kind.
        index: u32,
    },
    /// DEVICE_SET_IRQS.
    SetIrqs(IrqSet),
    /// REGION_READ.
    RegionRead(RegionAccess),
    /// REGION_WRITE.
    RegionWrite(RegionAccess, Vec<u8>),
    /// DMA_READ.
    DmaRead {
        /// Where.
        address: u64,
        /// How many bytes.
        count: u32,
    },
    /// DMA_WRITE.
    DmaWrite {
        /// Where.
        address: u64,
        /// What.
        data: Vec<u8>,
    },
    /// DEVICE_RESET.
    Reset,
}

impl Request {
    /// Its command.
    #[must_use]
    pub fn command(&self) -> Command {
        match self {
            Self::Version(_) => Command::Version,
            Self::DmaMap(_) => Command::DmaMap,
            Self::DmaUnmap(_) => Command::DmaUnmap,
            Self::DeviceInfo => Command::DeviceInfo,
            Self::RegionInfo { .. } => Command::RegionInfo,
            Self::RegionIoFds { .. } => Command::RegionIoFds,
            Self::IrqInfo { .. } => Command::IrqInfo,
            Self::SetIrqs(_) => Command::SetIrqs,
            Self::RegionRead(_) => Command::RegionRead,
            Self::RegionWrite(..) => Command::RegionWrite,
            Self::DmaRead { .. } => Command::DmaRead,
            Self::DmaWrite { .. } => Command::DmaWrite,
            Self::Reset => Command::Reset,
        }
    }

    /// What follows the header.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Version(version) => return version.encode(),
            Self::DmaMap(map) => {
                let flags = if map.readable { MAP_READ } else { 0 } | if map.writable { MAP_WRITE } else { 0 };
                out.p32(32);
                out.p32(flags);
                [map.offset, map.address, map.len].into_iter().for_each(|word| out.p64(word));
            }
            Self::DmaUnmap(unmap) => {
                let (flags, address, len) = match *unmap {
                    DmaUnmap::One { address, len } => (0, address, len),
                    DmaUnmap::All => (UNMAP_ALL, 0, 0),
                };
                out.p32(24);
                out.p32(flags);
                out.p64(address);
                out.p64(len);
            }
            Self::DeviceInfo => [16, 0, 0, 0].into_iter().for_each(|word| out.p32(word)),
            Self::RegionInfo { index, room } => {
                [*room, 0, *index, 0].into_iter().for_each(|word| out.p32(word));
                out.p64(0);
                out.p64(0);
            }
            Self::RegionIoFds { index, room } => [*room, 0, *index, 0].into_iter().for_each(|word| out.p32(word)),
            Self::IrqInfo { index } => [16, 0, *index, 0].into_iter().for_each(|word| out.p32(word)),
            Self::SetIrqs(set) => {
                let (flags, data) = match &set.action {
                    IrqAction::Signals => (DATA_EVENTFD | ACTION_TRIGGER, None),
                    IrqAction::Disable | IrqAction::Raise(None) => (DATA_NONE | ACTION_TRIGGER, None),
                    IrqAction::Raise(Some(which)) => (DATA_BOOL | ACTION_TRIGGER, Some(which)),
                    IrqAction::Mask(hold, which) => {
                        let action = if *hold { ACTION_MASK } else { ACTION_UNMASK };
                        (action | if which.is_some() { DATA_BOOL } else { DATA_NONE }, which.as_ref())
                    }
                };
                let data: Vec<u8> = data.into_iter().flatten().map(|yes| u8::from(*yes)).collect();
                let argsz = 20 + data.len() as u32;
                [argsz, flags, set.index, set.start, set.count].into_iter().for_each(|word| out.p32(word));
                out.extend(data);
            }
            Self::RegionRead(access) => put_access(&mut out, access),
            Self::RegionWrite(access, data) => {
                put_access(&mut out, access);
                out.extend(data);
            }
            Self::DmaRead { address, count } => {
                out.p64(*address);
                out.p64(u64::from(*count));
            }
            Self::DmaWrite { address, data } => {
                out.p64(*address);
                out.p64(data.len() as u64);
                out.extend(data);
            }
            Self::Reset => {}
        }
        out
    }

    /// From the number of a command and what follows the header.
    ///
    /// # Errors
    /// [`WireError`]: nothing that cannot be right gets past here.
    pub fn decode(command: u16, payload: &[u8]) -> Result<Self, WireError> {
        let command = Command::from_number(command)?;
        let mut fields = Fields::new(command, payload);
        Ok(match command {
            Command::Version => Self::Version(Version::decode(payload)?),
            Command::DmaMap => Self::DmaMap(dma_map(fields)?),
            Command::DmaUnmap => Self::DmaUnmap(dma_unmap(fields)?),
            Command::DeviceInfo => {
                fields.argsz()?;
                fields.exactly(12)?;
                Self::DeviceInfo
            }
            Command::RegionInfo => {
                let room = fields.argsz()?;
                fields.u32()?;
                let index = fields.u32()?;
                fields.exactly(20)?;
                Self::RegionInfo { index, room }
            }
            Command::RegionIoFds => {
                let room = fields.argsz()?;
                let flags = fields.u32()?;
                if flags != 0 {
                    return Err(fields.wrong("flags", flags));
                }
                let index = fields.u32()?;
                fields.exactly(4)?;
                Self::RegionIoFds { index, room }
            }
            Command::IrqInfo => {
                fields.argsz()?;
                fields.u32()?;
                let index = fields.u32()?;
                fields.exactly(4)?;
                Self::IrqInfo { index }
            }
            Command::SetIrqs => Self::SetIrqs(irq_set(fields)?),
            Command::RegionRead => {
                let access = access(&mut fields)?;
                fields.end()?;
                Self::RegionRead(access)
            }
            Command::RegionWrite => {
                let access = access(&mut fields)?;
                Self::RegionWrite(access, fields.exactly(access.count as usize)?.to_vec())
            }
            Command::DmaRead => {
                let (address, count) = (fields.u64()?, fields.u64()?);
                let count = data_len(&fields, count)?;
                fields.end()?;
                Self::DmaRead { address, count }
            }
            Command::DmaWrite => {
                let (address, count) = (fields.u64()?, fields.u64()?);
                let count = data_len(&fields, count)?;
                Self::DmaWrite { address, data: fields.exactly(count as usize)?.to_vec() }
            }
            Command::Reset => {
                fields.end()?;
                Self::Reset
            }
        })
    }
}

fn put_access(out: &mut Vec<u8>, access: &RegionAccess) {
    out.p64(access.offset);
    out.p32(access.region);
    out.p32(access.count);
}

fn data_len(fields: &Fields<'_>, count: u64) -> Result<u32, WireError> {
    u32::try_from(count).ok().filter(|count| (1..=DATA_MAX).contains(count)).ok_or(fields.wrong("count", count))
}

fn access(fields: &mut Fields<'_>) -> Result<RegionAccess, WireError> {
    let (offset, region, count) = (fields.u64()?, fields.u32()?, fields.u32()?);
    if region >= region::COUNT {
        return Err(fields.wrong("region", region));
    }
    let count = data_len(fields, count.into())?;
    if offset.checked_add(count.into()).is_none() {
        return Err(fields.wrong("offset", offset));
    }
    Ok(RegionAccess { region, offset, count })
}

fn dma_map(mut fields: Fields<'_>) -> Result<DmaMap, WireError> {
    fields.argsz()?;
    let flags = fields.u32()?;
    let (offset, address, len) = (fields.u64()?, fields.u64()?, fields.u64()?);
    if flags & !(MAP_READ | MAP_WRITE | MAP_HINTS) != 0 {
        return Err(fields.wrong("flags", flags));
    }
    if len == 0 || address.checked_add(len - 1).is_none() || offset.checked_add(len).is_none() {
        return Err(fields.wrong("size", len));
    }
    fields.end()?;
    Ok(DmaMap { address, len, offset, readable: flags & MAP_READ != 0, writable: flags & MAP_WRITE != 0 })
}

fn dma_unmap(mut fields: Fields<'_>) -> Result<DmaUnmap, WireError> {
    fields.argsz()?;
    let flags = fields.u32()?;
    let (address, len) = (fields.u64()?, fields.u64()?);
    let unmap = match flags {
        0 if len == 0 || address.checked_add(len - 1).is_none() => return Err(fields.wrong("size", len)),
        0 => DmaUnmap::One { address, len },
        UNMAP_ALL if address == 0 && len == 0 => DmaUnmap::All,
        other => return Err(fields.wrong("flags", other)),
    };
    fields.end()?;
    Ok(unmap)
}

fn irq_set(mut fields: Fields<'_>) -> Result<IrqSet, WireError> {
    fields.argsz()?;
    let (flags, index, start, count) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
    if index >= irq::COUNT {
        return Err(fields.wrong("index", index));
    }
    if start.checked_add(count).is_none_or(|end| end > IRQS_MAX) {
        return Err(fields.wrong("count", count));
    }
    let which = match flags & (DATA_NONE | DATA_BOOL | DATA_EVENTFD) {
        DATA_NONE | DATA_EVENTFD => {
            fields.end()?;
            None
        }
        DATA_BOOL => Some(fields.exactly(count as usize)?.iter().map(|byte| *byte != 0).collect()),
        _ => return Err(fields.wrong("flags", flags)),
    };
    let signals = flags & DATA_EVENTFD != 0;
    let action = match flags & !(DATA_NONE | DATA_BOOL | DATA_EVENTFD) {
        ACTION_TRIGGER if signals => IrqAction::Signals,
        ACTION_TRIGGER if which.is_none() && count == 0 => IrqAction::Disable,
        ACTION_TRIGGER => IrqAction::Raise(which),
        ACTION_MASK if !signals => IrqAction::Mask(true, which),
        ACTION_UNMASK if !signals => IrqAction::Mask(false, which),
        _ => return Err(fields.wrong("flags", flags)),
    };
    Ok(IrqSet { index, start, count, action })
}
