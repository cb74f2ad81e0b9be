//! Descriptor chains of a split virtqueue (virtio 1.2, section 2.7), read as hostile input.
//!
//! A chain is walked once, each descriptor is read once, and what comes out is a list of readable ranges
//! followed by a list of writable ones. Loops, tables that lie outside memory, nested or misplaced indirect tables
//! and writable-before-readable are errors, never a shorter chain. Whether the ranges themselves lie in guest
//! memory is checked where they are used.

use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::areas::{Areas, DESCRIPTOR_BYTES};
use crate::memory::{Segment, Segments};

/// Longest chain that is accepted, indirect descriptors included.
pub const CHAIN_MAX: usize = 1024;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// What is wrong with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChainError {
    /// An index is not below the size of its table.
    #[error("descriptor {index} is outside its table of {size}")]
    Index {
        /// The index.
        index: u16,
        /// Entries in the table.
        size: u16,
    },
    /// A descriptor table lies outside guest memory.
    #[error("the descriptor table at {0:#x} is outside guest memory")]
    Table(u64),
    /// More descriptors than the table has, or than [`CHAIN_MAX`].
    #[error("the descriptor chain loops or is longer than {CHAIN_MAX}")]
    TooLong,
    /// An indirect descriptor with NEXT, inside an indirect table, or without the feature.
    #[error("an indirect descriptor is not allowed there")]
    Indirect,
    /// An indirect table that is empty, no multiple of 16 bytes or longer than [`CHAIN_MAX`].
    #[error("an indirect table has {0} bytes")]
    IndirectSize(u32),
    /// A readable descriptor behind a writable one.
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// More than 2^32 bytes in one chain.
    #[error("the chain has more than 2^32 bytes")]
    Bytes,
}

#[derive(Debug, Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// A descriptor out of its two words.
    #[inline]
    fn of([addr, rest]: [u64; 2]) -> Self {
        Self { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// One chain, taken apart. Reused from request to request.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable: usize,
    bytes: u64,
    readable_bytes: u64,
}

impl Chain {
    /// Index of the first descriptor: the name of the request until it is used.
    #[inline]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver gave to the device.
    #[inline]
    pub fn readable(&self) -> Segments<'_> {
        Segments(self.segments.get(..self.readable).unwrap_or_default())
    }

    /// What the device may write.
    #[inline]
    pub fn writable(&self) -> Segments<'_> {
        Segments(self.segments.get(self.readable..).unwrap_or_default())
    }

    /// Bytes of what the driver gave.
    #[inline]
    pub fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    /// Bytes of what the device may write.
    #[inline]
    pub fn writable_bytes(&self) -> u64 {
        self.bytes - self.readable_bytes
    }

    #[cfg(test)]
    pub(crate) fn named(head: u16) -> Self {
        Self { head, ..Self::default() }
    }

    fn clear(&mut self) {
        self.segments.clear();
        (self.readable, self.bytes, self.readable_bytes) = (0, 0, 0);
    }

    /// Reads the chain that starts at `head`. One that makes no sense is left empty.
    #[inline]
    pub(crate) fn read<M: GuestMemory>(
        &mut self,
        areas: &Areas<M>,
        indirect: bool,
        head: u16,
    ) -> Result<(), ChainError> {
        self.head = head;
        self.clear();
        let first = descriptor(areas, head)?;
        let read =
            if first.flags & (NEXT | INDIRECT) == 0 { self.add(first) } else { self.follow(areas, indirect, first) };
        read.inspect_err(|_| self.clear())
    }

    /// Adds the range of one descriptor.
    #[inline]
    fn add(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        let len = u64::from(descriptor.len);
        self.bytes += len;
        if self.bytes > 1 << 32 {
            return Err(ChainError::Bytes);
        }
        if descriptor.flags & WRITE == 0 {
            if self.readable != self.segments.len() {
                return Err(ChainError::Order);
            }
            self.readable += 1;
            self.readable_bytes += len;
        }
        self.segments.push(Segment { addr: GuestAddress(descriptor.addr), len: descriptor.len });
        Ok(())
    }

    /// Walks a chain of several descriptors.
    fn follow<M: GuestMemory>(
        &mut self,
        areas: &Areas<M>,
        indirect: bool,
        mut descriptor: Descriptor,
    ) -> Result<(), ChainError> {
        // As many as the table has, the first of which has been read.
        let mut left = areas.size();
        while descriptor.flags & INDIRECT == 0 {
            self.add(descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            left -= 1;
            if left == 0 || self.segments.len() >= CHAIN_MAX {
                return Err(ChainError::TooLong);
            }
            descriptor = self::descriptor(areas, descriptor.next)?;
        }
        if !indirect || descriptor.flags & NEXT != 0 {
            return Err(ChainError::Indirect);
        }
        self.follow_indirect(&**areas.memory(), descriptor)
    }

    /// Walks an indirect table, with which a chain ends.
    fn follow_indirect<M: GuestMemory>(&mut self, mem: &M, table: Descriptor) -> Result<(), ChainError> {
        let (len, entry) = (table.len, DESCRIPTOR_BYTES as u32);
        if len == 0 || !len.is_multiple_of(entry) || len / entry > CHAIN_MAX as u32 {
            return Err(ChainError::IndirectSize(len));
        }
        let (size, addr) = ((len / entry) as u16, table.addr);
        let (mut index, mut left) = (0, size);
        loop {
            if index >= size {
                return Err(ChainError::Index { index, size });
            }
            if left == 0 || self.segments.len() >= CHAIN_MAX {
                return Err(ChainError::TooLong);
            }
            left -= 1;
            let descriptor = indirect_descriptor(mem, addr, index)?;
            if descriptor.flags & INDIRECT != 0 {
                return Err(ChainError::Indirect);
            }
            self.add(descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }
}

/// A descriptor of the ring's own table.
#[inline]
fn descriptor<M: GuestMemory>(areas: &Areas<M>, index: u16) -> Result<Descriptor, ChainError> {
    let size = areas.size();
    if index >= size {
        return Err(ChainError::Index { index, size });
    }
    areas.descriptor(index).map(Descriptor::of).map_err(|_| ChainError::Table(areas.table().0))
}

/// A descriptor of an indirect table.
fn indirect_descriptor<M: GuestMemory>(mem: &M, table: u64, index: u16) -> Result<Descriptor, ChainError> {
    let outside = ChainError::Table(table);
    let addr = table.checked_add(u64::from(index) * DESCRIPTOR_BYTES).ok_or(outside)?;
    let mut raw = [0_u8; DESCRIPTOR_BYTES as usize];
    mem.read_slice(&mut raw, GuestAddress(addr)).map_err(|_| outside)?;
    let (addr, rest) = raw.split_at(8);
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    Ok(Descriptor::of([word(addr), word(rest)]))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::areas::Addresses;

    type Ram = GuestMemoryMmap<()>;

    fn ram() -> Ram {
        Ram::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    fn put(mem: &Ram, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        let bytes = [addr.to_le_bytes(), rest.to_le_bytes()].concat();
        mem.write_slice(&bytes, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }

    fn read(mem: &Ram, head: u16) -> Result<Chain, ChainError> {
        let (desc, avail, used) = (GuestAddress(0), GuestAddress(0x400), GuestAddress(0x800));
        let areas = Areas::find(Arc::new(mem.clone()), Addresses { size: 8, desc, avail, used });
        let mut chain = Chain::default();
        chain.read(&areas, true, head).map(|()| chain)
    }

    #[test]
    fn a_request_with_header_data_and_status_is_taken_apart() {
        let mem = ram();
        put(&mem, 0, 2, 0x1000, 16, NEXT, 5);
        put(&mem, 0, 5, 0x2000, 512, NEXT | WRITE, 1);
        put(&mem, 0, 1, 0x3000, 1, WRITE, 0);
        let chain = read(&mem, 2).unwrap();
        assert_eq!(chain.readable().0, [Segment { addr: GuestAddress(0x1000), len: 16 }]);
        assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (16, 513));
        assert_eq!(chain.writable().bytes(), 513);
    }

    #[test]
    fn an_indirect_table_may_end_a_chain() {
        let mem = ram();
        put(&mem, 0, 0, 0x1000, 16, NEXT, 1);
        put(&mem, 0, 1, 0x8000, 32, INDIRECT, 0);
        put(&mem, 0x8000, 0, 0x2000, 512, NEXT | WRITE, 1);
        put(&mem, 0x8000, 1, 0x3000, 1, WRITE, 0);
        let chain = read(&mem, 0).unwrap();
        assert_eq!((chain.readable().0.len(), chain.writable().0.len()), (1, 2));
    }

    #[test]
    fn malformed_chains_are_errors_and_not_shorter_chains() {
        type Case = (&'static str, fn(&Ram), u16, ChainError);
        let cases: &[Case] = &[
            ("head outside", |_| (), 8, ChainError::Index { index: 8, size: 8 }),
            ("next outside", |m| put(m, 0, 0, 0, 1, NEXT, 99), 0, ChainError::Index { index: 99, size: 8 }),
            (
                "loop",
                |m| {
                    put(m, 0, 0, 0, 1, NEXT, 1);
                    put(m, 0, 1, 0, 1, NEXT, 0);
                },
                0,
                ChainError::TooLong,
            ),
            ("indirect with next", |m| put(m, 0, 0, 0x8000, 16, NEXT | INDIRECT, 1), 0, ChainError::Indirect),
            ("indirect of 8 bytes", |m| put(m, 0, 0, 0x8000, 8, INDIRECT, 0), 0, ChainError::IndirectSize(8)),
            ("empty indirect", |m| put(m, 0, 0, 0x8000, 0, INDIRECT, 0), 0, ChainError::IndirectSize(0)),
            (
                "nested indirect",
                |m| {
                    put(m, 0, 0, 0x8000, 16, INDIRECT, 0);
                    put(m, 0x8000, 0, 0x9000, 16, INDIRECT, 0);
                },
                0,
                ChainError::Indirect,
            ),
            (
                "indirect table outside memory",
                |m| put(m, 0, 0, 0xf_0000, 16, INDIRECT, 0),
                0,
                ChainError::Table(0xf_0000),
            ),
            (
                "indirect table at the end of the address space",
                |m| put(m, 0, 0, u64::MAX - 8, 32, INDIRECT, 0),
                0,
                ChainError::Table(u64::MAX - 8),
            ),
            (
                "readable behind writable",
                |m| {
                    put(m, 0, 0, 0, 1, NEXT | WRITE, 1);
                    put(m, 0, 1, 0, 1, 0, 0);
                },
                0,
                ChainError::Order,
            ),
            (
                "more than 4 GiB",
                |m| {
                    for i in 0..3 {
                        put(m, 0, i, 0, u32::MAX, NEXT, i + 1);
                    }
                },
                0,
                ChainError::Bytes,
            ),
        ];
        for (name, prepare, head, expected) in cases {
            let mem = ram();
            prepare(&mem);
            assert_eq!(read(&mem, *head).map(|_| ()), Err(*expected), "{name}");
        }
    }
}
