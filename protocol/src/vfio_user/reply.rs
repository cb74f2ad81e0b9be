//! What is answered.

use super::{Command, Fields, Put, RegionAccess, WireError};

const DEVICE_RESET: u32 = 1;
const DEVICE_PCI: u32 = 2;

const REGION_READ: u32 = 1;
const REGION_WRITE: u32 = 2;
const REGION_MMAP: u32 = 4;
const REGION_CAPS: u32 = 8;
/// Bytes of what is said of every region; capabilities follow.
const REGION_LEN: usize = 32;
const SPARSE_MMAP: u16 = 1;
/// Areas of a region that are taken note of.
const AREAS_MAX: u32 = 256;
/// Capabilities of a region that are looked at.
const CAPS_MAX: usize = 16;

const IRQ_EVENTFD: u32 = 1;

/// Bytes of one way to reach registers without messages, as libvfio-user has it. The document has none with memory, and one
/// word less.
const IO_FD_LEN: usize = 48;
const IO_FD_LEN_SHORT: usize = 40;
const IO_FD_HEAD: usize = 16;
/// Most of them in an answer.
pub const IO_FDS_MAX: u32 = 1024;
const TYPE_EVENTFD: u32 = 0;
const TYPE_REGIONFD: u32 = 1;
const TYPE_SHADOW: u32 = 2;
const FLAG_DATAMATCH: u32 = 1;

/// DEVICE_GET_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// It can be reset.
    pub resets: bool,
    /// It is a PCI device.
    pub pci: bool,
    /// How many regions it has.
    pub regions: u32,
    /// How many kinds of interrupts it has.
    pub irqs: u32,
}

impl DeviceInfo {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let flags = if self.resets { DEVICE_RESET } else { 0 } | if self.pci { DEVICE_PCI } else { 0 };
        [16, flags, self.regions, self.irqs].into_iter().for_each(|word| out.p32(word));
        out
    }
    /// From bytes.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Command::DeviceInfo, payload);
        fields.argsz()?;
        let (flags, regions, irqs) = (fields.u32()?, fields.u32()?, fields.u32()?);
        fields.end()?;
        Ok(Self { resets: flags & DEVICE_RESET != 0, pci: flags & DEVICE_PCI != 0, regions, irqs })
    }
}

/// DEVICE_GET_REGION_INFO.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Which region.
    pub index: u32,
    /// It can be read.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// It can be mapped from the descriptor beside the message: where these say, or all of it.
    pub mappable: bool,
    /// Parts that can be mapped: offset and bytes, within the region.
    pub areas: Vec<(u64, u64)>,
    /// Its bytes; zero for one that is not there.
    pub size: u64,
    /// Where it begins in that descriptor.
    pub offset: u64,
}

impl RegionInfo {
    /// How many bytes it takes.
    #[must_use]
    pub fn encoded_len(&self) -> u32 {
        (REGION_LEN + if self.areas.is_empty() { 0 } else { 16 + 16 * self.areas.len() }) as u32
    }
    /// As bytes, for a sender with room for so many: one that has too little is told how much is needed.
    #[must_use]
    pub fn encode(&self, room: u32) -> Vec<u8> {
        let whole = self.encoded_len();
        let fits = whole <= room && !self.areas.is_empty();
        let bits = [(self.readable, REGION_READ), (self.writable, REGION_WRITE), (self.mappable, REGION_MMAP)];
        let flags = bits.into_iter().filter(|(set, _)| *set).fold(0, |flags, (_, bit)| flags | bit);
        // QEMU takes the flag without a capability for an error, before it looks at how much room is needed.
        let caps = if fits { REGION_CAPS } else { 0 };
        let mut out = Vec::new();
        let head = [whole, flags | caps, self.index, if fits { REGION_LEN as u32 } else { 0 }];
        head.into_iter().for_each(|word| out.p32(word));
        out.p64(self.size);
        out.p64(self.offset);
        if fits {
            out.p16(SPARSE_MMAP);
            out.p16(1);
            [0, self.areas.len() as u32, 0].into_iter().for_each(|word| out.p32(word));
            for (offset, len) in &self.areas {
                out.p64(*offset);
                out.p64(*len);
            }
        }
        out
    }
    /// From bytes; areas outside of the region are an error.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Command::RegionInfo, payload);
        fields.argsz()?;
        let (flags, index, cap) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let (size, offset) = (fields.u64()?, fields.u64()?);
        let mut areas = Vec::new();
        let mut next = if flags & REGION_CAPS != 0 { cap } else { 0 };
        for _ in 0..CAPS_MAX {
            if next == 0 {
                break;
            }
            let Some(rest) = payload.get(next as usize..).filter(|_| next as usize >= REGION_LEN) else {
                return Err(fields.wrong("capability", next));
            };
            let mut cap = Fields { rest, ..fields };
            let (id, _version) = (cap.u16()?, cap.u16()?);
            next = cap.u32()?;
            if id == SPARSE_MMAP {
                let count = cap.u32()?;
                cap.u32()?;
                if count > AREAS_MAX {
                    return Err(fields.wrong("areas", count));
                }
                for _ in 0..count {
                    let (at, len) = (cap.u64()?, cap.u64()?);
                    if at.checked_add(len).is_none_or(|end| end > size) {
                        return Err(fields.wrong("area", at));
                    }
                    areas.push((at, len));
                }
            }
        }
        let (readable, writable) = (flags & REGION_READ != 0, flags & REGION_WRITE != 0);
        Ok(Self { index, readable, writable, mappable: flags & REGION_MMAP != 0, areas, size, offset })
    }
}

/// How some registers are written without a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoFd {
    /// Where in the region.
    pub offset: u64,
    /// How many bytes; zero for any width.
    pub size: u64,
    /// Which of the descriptors beside the message is signalled.
    pub event: u32,
    /// What stands behind it.
    pub how: IoFdKind,
}

/// What a signalled descriptor means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoFdKind {
    /// A write of this value, or of any.
    Event(Option<u64>),
    /// A write whose value was put into memory first.
    Shadow {
        /// Which of the descriptors has the memory.
        memory: u32,
        /// Where in it.
        offset: u64,
    },
    /// A kind that is not used here.
    Other(u32),
}

/// DEVICE_GET_REGION_IO_FDS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionIoFds {
    /// Which region.
    pub index: u32,
    /// The ways.
    pub ways: Vec<IoFd>,
}

impl RegionIoFds {
    /// How many bytes it takes.
    #[must_use]
    pub fn encoded_len(&self) -> u32 {
        (IO_FD_HEAD + IO_FD_LEN * self.ways.len()) as u32
    }
    /// As bytes, for a sender with room for so many: one that has too little is told how much is needed.
    #[must_use]
    pub fn encode(&self, room: u32) -> Vec<u8> {
        let whole = self.encoded_len();
        let ways = if whole <= room { self.ways.as_slice() } else { &[] };
        let mut out = Vec::new();
        [whole, 0, self.index, ways.len() as u32].into_iter().for_each(|word| out.p32(word));
        for way in ways {
            let (kind, flags, memory, shadow, value) = match way.how {
                IoFdKind::Event(None) => (TYPE_EVENTFD, 0, 0, 0, 0),
                IoFdKind::Event(Some(value)) => (TYPE_EVENTFD, FLAG_DATAMATCH, 0, 0, value),
                IoFdKind::Shadow { memory, offset } => (TYPE_SHADOW, 0, memory, offset, 0),
                IoFdKind::Other(kind) => (kind, 0, 0, 0, 0),
            };
            out.p64(way.offset);
            out.p64(way.size);
            [way.event, kind, flags, memory].into_iter().for_each(|word| out.p32(word));
            out.p64(shadow);
            out.p64(value);
        }
        out
    }
    /// From bytes: the ways, and how much room an answer with all of them needs.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(payload: &[u8]) -> Result<(Self, u32), WireError> {
        let mut fields = Fields::new(Command::RegionIoFds, payload);
        let (needed, _flags, index, count) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
        if count > IO_FDS_MAX {
            return Err(fields.wrong("count", count));
        }
        let mut ways = Vec::new();
        let short = fields.rest.len() == count as usize * IO_FD_LEN_SHORT;
        for _ in 0..count {
            let (offset, size) = (fields.u64()?, fields.u64()?);
            let (event, kind, flags, memory) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
            let shadow = if short { 0 } else { fields.u64()? };
            let value = fields.u64()?;
            if !matches!(size, 0 | 1 | 2 | 4 | 8) {
                return Err(fields.wrong("size", size));
            }
            let how = match kind {
                TYPE_EVENTFD => IoFdKind::Event((flags & FLAG_DATAMATCH != 0).then_some(value)),
                TYPE_SHADOW if !short => IoFdKind::Shadow { memory, offset: shadow },
                TYPE_REGIONFD => IoFdKind::Other(TYPE_REGIONFD),
                other => return Err(fields.wrong("type", other)),
            };
            ways.push(IoFd { offset, size, event, how });
        }
        fields.end()?;
        Ok((Self { index, ways }, needed))
    }
}

/// DEVICE_GET_IRQ_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// Which kind.
    pub index: u32,
    /// They are signalled by descriptors.
    pub eventfd: bool,
    /// How many there are.
    pub count: u32,
}

impl IrqInfo {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let flags = if self.eventfd { IRQ_EVENTFD } else { 0 };
        [16, flags, self.index, self.count].into_iter().for_each(|word| out.p32(word));
        out
    }
    /// From bytes.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Command::IrqInfo, payload);
        fields.argsz()?;
        let (flags, index, count) = (fields.u32()?, fields.u32()?, fields.u32()?);
        fields.end()?;
        Ok(Self { index, eventfd: flags & IRQ_EVENTFD != 0, count })
    }
}

/// REGION_READ and REGION_WRITE: which registers, and what a read found.
#[must_use]
pub fn encode_access(access: &RegionAccess, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + data.len());
    out.p64(access.offset);
    out.p32(access.region);
    out.p32(access.count);
    out.extend(data);
    out
}

/// What a read of `asked` found.
///
/// # Errors
/// [`WireError`] when it is not the answer to that.
pub fn decode_read<'a>(asked: &RegionAccess, payload: &'a [u8]) -> Result<&'a [u8], WireError> {
    let fields = same(Command::RegionRead, asked, payload)?;
    fields.exactly(asked.count as usize)
}

/// Whether a write of `asked` was answered.
///
/// # Errors
/// [`WireError`] when it is not the answer to that.
pub fn decode_written(asked: &RegionAccess, payload: &[u8]) -> Result<(), WireError> {
    same(Command::RegionWrite, asked, payload)?.end()
}

fn same<'a>(command: Command, asked: &RegionAccess, payload: &'a [u8]) -> Result<Fields<'a>, WireError> {
    let mut fields = Fields::new(command, payload);
    let (offset, region, count) = (fields.u64()?, fields.u32()?, fields.u32()?);
    match () {
        () if offset != asked.offset => Err(fields.wrong("offset", offset)),
        () if region != asked.region => Err(fields.wrong("region", region)),
        () if count != asked.count => Err(fields.wrong("count", count)),
        () => Ok(fields),
    }
}
