//! The bytes of requests, answers, faults and configuration (virtio 1.2, 5.13).
//!
//! A request's readable part is decoded as a whole before anything happens. One that is too short, or of a type that does
//! not exist, has no answer: its buffers go back unwritten, as the specification wants it.

use super::iova_map::{Access, IovaRange};

/// VIRTIO_IOMMU_F_INPUT_RANGE.
pub const F_INPUT_RANGE: u64 = 1 << 0;
/// VIRTIO_IOMMU_F_DOMAIN_RANGE.
pub const F_DOMAIN_RANGE: u64 = 1 << 1;
/// VIRTIO_IOMMU_F_MAP_UNMAP.
pub const F_MAP_UNMAP: u64 = 1 << 2;
/// VIRTIO_IOMMU_F_PROBE.
pub const F_PROBE: u64 = 1 << 4;
/// VIRTIO_IOMMU_F_BYPASS_CONFIG.
pub const F_BYPASS_CONFIG: u64 = 1 << 6;

/// VIRTIO_IOMMU_ATTACH_F_BYPASS.
pub const ATTACH_BYPASS: u32 = 1;
/// VIRTIO_IOMMU_MAP_F_READ.
pub const MAP_READ: u32 = 1;
/// VIRTIO_IOMMU_MAP_F_WRITE.
pub const MAP_WRITE: u32 = 2;

/// Bytes of `properties` in a PROBE request. More than one region takes; the size is frozen.
pub const PROBE_LEN: usize = 512;
/// Bytes of a request's tail.
pub const TAIL_LEN: usize = 4;
/// Bytes of a fault record.
pub const FAULT_LEN: usize = 24;
/// Bytes of configuration space.
pub const CONFIG_LEN: usize = 40;
/// Where `bypass` is in it.
pub const CONFIG_BYPASS: u32 = 36;

const TYPE_ATTACH: u8 = 1;
const TYPE_DETACH: u8 = 2;
const TYPE_MAP: u8 = 3;
const TYPE_UNMAP: u8 = 4;
const TYPE_PROBE: u8 = 5;

const PROPERTY_RESV_MEM: u16 = 1;
const RESV_MEM_LEN: u16 = 20;

const FAULT_READ: u32 = 1;
const FAULT_WRITE: u32 = 1 << 1;
const FAULT_ADDRESS: u32 = 1 << 8;

/// How a request ended (VIRTIO_IOMMU_S_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Not possible for this device.
    Unsupported = 2,
    /// The device itself failed: what was asked may not have come about.
    DeviceError = 3,
    /// Wrong parameters.
    Invalid = 4,
    /// Parameters out of range.
    Range = 5,
    /// No such endpoint or domain.
    NoEntry = 6,
    /// No room.
    NoMemory = 8,
}

/// What is in a reserved region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservedKind {
    /// Not to be used.
    Reserved,
    /// Where interrupts are sent.
    Msi,
}

/// Addresses that a driver cannot map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedRegion {
    /// Which.
    pub range: IovaRange,
    /// Why.
    pub kind: ReservedKind,
}

/// A request as the driver wrote it; nothing in it has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Put an endpoint into a domain.
    Attach {
        /// The domain.
        domain: u32,
        /// The endpoint.
        endpoint: u32,
        /// `ATTACH_*`.
        flags: u32,
        /// To be zero.
        reserved: u32,
    },
    /// Take it out.
    Detach {
        /// The domain.
        domain: u32,
        /// The endpoint.
        endpoint: u32,
    },
    /// Map a range.
    Map {
        /// In this domain.
        domain: u32,
        /// First I/O virtual address.
        virt_start: u64,
        /// Last one.
        virt_end: u64,
        /// Guest-physical address.
        phys_start: u64,
        /// `MAP_*`.
        flags: u32,
    },
    /// Unmap a range.
    Unmap {
        /// In this domain.
        domain: u32,
        /// First I/O virtual address.
        virt_start: u64,
        /// Last one.
        virt_end: u64,
        /// To be zero.
        reserved: u32,
    },
    /// Describe an endpoint.
    Probe {
        /// The endpoint.
        endpoint: u32,
    },
}

/// A request's bytes from the front on.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }
    fn word(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }
    fn long(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

impl Request {
    /// Bytes of the longest readable part, that of PROBE. Nobody needs to read more of a chain.
    pub const READABLE_MAX: usize = 72;
    /// Bytes of the longest writable part, that of PROBE.
    pub const WRITABLE_MAX: usize = PROBE_LEN + TAIL_LEN;

    /// Reads a request's readable part; `None` when it is too short or of no known type. What follows it is ignored.
    pub fn decode(readable: &[u8]) -> Option<Self> {
        let mut fields = Fields(readable);
        let [kind, _, _, _] = fields.take()?;
        let request = match kind {
            TYPE_ATTACH => Self::Attach {
                domain: fields.word()?,
                endpoint: fields.word()?,
                flags: fields.word()?,
                reserved: fields.word()?,
            },
            TYPE_DETACH => {
                let request = Self::Detach { domain: fields.word()?, endpoint: fields.word()? };
                fields.take::<8>()?;
                request
            }
            TYPE_MAP => Self::Map {
                domain: fields.word()?,
                virt_start: fields.long()?,
                virt_end: fields.long()?,
                phys_start: fields.long()?,
                flags: fields.word()?,
            },
            TYPE_UNMAP => Self::Unmap {
                domain: fields.word()?,
                virt_start: fields.long()?,
                virt_end: fields.long()?,
                reserved: fields.word()?,
            },
            TYPE_PROBE => {
                let request = Self::Probe { endpoint: fields.word()? };
                fields.take::<64>()?;
                request
            }
            _ => return None,
        };
        Some(request)
    }

    /// The request as a driver writes it.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::READABLE_MAX);
        let head = |bytes: &mut Vec<u8>, kind: u8| bytes.extend([kind, 0, 0, 0]);
        match *self {
            Self::Attach { domain, endpoint, flags, reserved } => {
                head(&mut bytes, TYPE_ATTACH);
                bytes.extend([domain, endpoint, flags, reserved].map(u32::to_le_bytes).concat());
            }
            Self::Detach { domain, endpoint } => {
                head(&mut bytes, TYPE_DETACH);
                bytes.extend([domain, endpoint, 0, 0].map(u32::to_le_bytes).concat());
            }
            Self::Map { domain, virt_start, virt_end, phys_start, flags } => {
                head(&mut bytes, TYPE_MAP);
                bytes.extend(domain.to_le_bytes());
                bytes.extend([virt_start, virt_end, phys_start].map(u64::to_le_bytes).concat());
                bytes.extend(flags.to_le_bytes());
            }
            Self::Unmap { domain, virt_start, virt_end, reserved } => {
                head(&mut bytes, TYPE_UNMAP);
                bytes.extend(domain.to_le_bytes());
                bytes.extend([virt_start, virt_end].map(u64::to_le_bytes).concat());
                bytes.extend(reserved.to_le_bytes());
            }
            Self::Probe { endpoint } => {
                head(&mut bytes, TYPE_PROBE);
                bytes.extend(endpoint.to_le_bytes());
                bytes.extend([0; 64]);
            }
        }
        bytes
    }
}

/// A request's tail.
pub(super) fn tail(status: Status) -> [u8; TAIL_LEN] {
    [status as u8, 0, 0, 0]
}

/// The list of properties of an endpoint; as many regions as fit.
pub(super) fn properties(regions: &[ReservedRegion]) -> Vec<u8> {
    let mut list = Vec::with_capacity(PROBE_LEN);
    for region in regions {
        let subtype = match region.kind {
            ReservedKind::Reserved => 0,
            ReservedKind::Msi => 1,
        };
        if list.len() + usize::from(RESV_MEM_LEN) + 4 > PROBE_LEN {
            break;
        }
        list.extend(PROPERTY_RESV_MEM.to_le_bytes());
        list.extend(RESV_MEM_LEN.to_le_bytes());
        list.extend([subtype, 0, 0, 0]);
        list.extend(region.range.first().to_le_bytes());
        list.extend(region.range.last().to_le_bytes());
    }
    list.resize(PROBE_LEN, 0);
    list
}

/// Why an access was refused (VIRTIO_IOMMU_FAULT_R_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FaultReason {
    /// The endpoint is in no domain.
    Domain = 1,
    /// Nothing that permits it is mapped there.
    Mapping = 2,
}

/// An access that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Why.
    pub reason: FaultReason,
    /// Whose access it was.
    pub endpoint: u32,
    /// Where.
    pub address: u64,
    /// What it was to do.
    pub access: Access,
}

impl Fault {
    /// The record of the event queue.
    pub fn encode(&self) -> [u8; FAULT_LEN] {
        let access = match self.access {
            Access::Read => FAULT_READ,
            Access::Write => FAULT_WRITE,
        };
        let mut record = [0; FAULT_LEN];
        record[0] = self.reason as u8;
        record[4..8].copy_from_slice(&(FAULT_ADDRESS | access).to_le_bytes());
        record[8..12].copy_from_slice(&self.endpoint.to_le_bytes());
        record[16..24].copy_from_slice(&self.address.to_le_bytes());
        record
    }
}
