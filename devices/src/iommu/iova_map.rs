//! What one domain has mapped: ranges of I/O virtual addresses onto ranges of guest-physical ones.
//!
//! Ends are inclusive, so that the whole 64-bit space is a range like any other and no end overflows. A mapping is what one
//! request made; it comes whole and goes whole.

use std::collections::BTreeMap;

use thiserror::Error;

/// A range of I/O virtual addresses, both ends included; never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaRange {
    first: u64,
    last: u64,
}

impl IovaRange {
    /// Every address.
    pub const ALL: Self = Self { first: 0, last: u64::MAX };

    /// From `first` to `last`, both included; `None` when `last` lies before `first`.
    pub const fn new(first: u64, last: u64) -> Option<Self> {
        if first <= last { Some(Self { first, last }) } else { None }
    }
    /// `len` bytes from `first` on; `None` when there are none, or some beyond the end of the address space.
    pub fn of_len(first: u64, len: u64) -> Option<Self> {
        Self::new(first, first.checked_add(len.checked_sub(1)?)?)
    }
    /// The first address.
    pub const fn first(self) -> u64 {
        self.first
    }
    /// The last address.
    pub const fn last(self) -> u64 {
        self.last
    }
    /// How far the last address is from the first: one less than the number of bytes, which may not fit.
    pub const fn reach(self) -> u64 {
        self.last - self.first
    }
    /// Whether `address` is in it.
    pub const fn contains(self, address: u64) -> bool {
        self.first <= address && address <= self.last
    }
    /// Whether all of `other` is in it.
    pub const fn covers(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }
    /// Whether they have an address in common.
    pub const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// What a device wants to do to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Write it.
    Write,
}

/// What a mapping permits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

impl Rights {
    /// Both.
    pub const ALL: Self = Self { read: true, write: true };

    /// Whether `access` is permitted.
    pub const fn permit(self, access: Access) -> bool {
        match access {
            Access::Read => self.read,
            Access::Write => self.write,
        }
    }
}

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    iova: IovaRange,
    gpa: u64,
    /// What it permits.
    pub rights: Rights,
}

impl Mapping {
    /// Maps `iova` onto as many bytes from guest-physical `gpa` on; `None` when those would go beyond the address space.
    pub fn new(iova: IovaRange, gpa: u64, rights: Rights) -> Option<Self> {
        gpa.checked_add(iova.reach())?;
        Some(Self { iova, gpa, rights })
    }
    /// The addresses that a device uses.
    pub const fn iova(&self) -> IovaRange {
        self.iova
    }
    /// Where the first of them leads.
    pub const fn gpa(&self) -> u64 {
        self.gpa
    }
    /// Where `iova` leads; `None` for an address that is not of this mapping.
    pub const fn translate(&self, iova: u64) -> Option<u64> {
        // Neither can overflow: the address is in the range, and the range fits behind `gpa`.
        if self.iova.contains(iova) { Some(self.gpa + (iova - self.iova.first)) } else { None }
    }
}

/// A mapping was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MapError {
    /// Something is mapped there.
    #[error("something is mapped there already")]
    Taken,
    /// There are as many as there may be.
    #[error("the domain has as many mappings as it may have")]
    Full,
}

/// Nothing was unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the range begins or ends within a mapping, which goes only as a whole")]
pub struct SplitError;

/// An address at which a device may not do what it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("nothing that permits it is mapped at {address:#x}")]
pub struct Unmapped {
    /// The first such address.
    pub address: u64,
}

/// A stretch of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
}

/// The mappings of one domain: disjoint, in order, and no more than a fixed number.
#[derive(Clone, Debug)]
pub struct IovaMap {
    /// By first address.
    mappings: BTreeMap<u64, Mapping>,
    mappings_max: usize,
}

impl IovaMap {
    /// An empty one, for at most so many mappings.
    pub fn new(mappings_max: usize) -> Self {
        Self { mappings: BTreeMap::new(), mappings_max }
    }
    /// How many there are.
    pub fn len(&self) -> usize {
        self.mappings.len()
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.mappings.is_empty()
    }
    /// All, in order of address.
    pub fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.values()
    }
    /// Those that have an address in `range`, in order.
    pub fn within(&self, range: IovaRange) -> impl Iterator<Item = &Mapping> {
        // The one before may reach into the range; no other one before it can, as they are disjoint.
        let before = self.mappings.range(..range.first).next_back().map(|(_, mapping)| mapping);
        let from = self.mappings.range(range.first..=range.last).map(|(_, mapping)| mapping);
        before.into_iter().filter(move |mapping| mapping.iova.overlaps(range)).chain(from)
    }
    /// The one that `address` is of.
    pub fn find(&self, address: u64) -> Option<&Mapping> {
        let (_, mapping) = self.mappings.range(..=address).next_back()?;
        Some(mapping).filter(|mapping| mapping.iova.contains(address))
    }
    /// Adds a mapping.
    ///
    /// # Errors
    /// When its place is taken, or there are too many; then nothing has changed.
    pub fn map(&mut self, mapping: Mapping) -> Result<(), MapError> {
        if self.within(mapping.iova).next().is_some() {
            return Err(MapError::Taken);
        }
        if self.mappings.len() >= self.mappings_max {
            return Err(MapError::Full);
        }
        self.mappings.insert(mapping.iova.first, mapping);
        Ok(())
    }
    /// Removes all mappings in `range`; how many there were. What of it is not mapped does not matter.
    ///
    /// # Errors
    /// When a mapping lies only partly in it; then nothing has changed.
    pub fn unmap(&mut self, range: IovaRange) -> Result<usize, SplitError> {
        if self.within(range).any(|mapping| !range.covers(mapping.iova)) {
            return Err(SplitError);
        }
        let before = self.mappings.len();
        let mut rest = self.mappings.split_off(&range.first);
        if let Some(beyond) = range.last.checked_add(1) {
            self.mappings.append(&mut rest.split_off(&beyond));
        }
        Ok(before - self.mappings.len())
    }
    /// Where `len` bytes from `first` on are in guest-physical memory, in order, for a device that wants to do `access`.
    ///
    /// # Errors
    /// The first address that is not mapped or does not permit it; the end of the address space is not mapped.
    pub fn translate(&self, first: u64, len: u64, access: Access) -> Result<Vec<Piece>, Unmapped> {
        let mut pieces: Vec<Piece> = Vec::new();
        let (mut address, mut left) = (first, len);
        while left > 0 {
            let mapping = self.find(address).filter(|mapping| mapping.rights.permit(access));
            let mapping = mapping.ok_or(Unmapped { address })?;
            let gpa = mapping.translate(address).ok_or(Unmapped { address })?;
            // At most the whole space less one byte, unless all of it is one mapping and was asked for.
            let len = left.min((mapping.iova.last - address).saturating_add(1));
            match pieces.last_mut() {
                Some(piece) if piece.gpa.checked_add(piece.len) == Some(gpa) => piece.len += len,
                _ => pieces.push(Piece { gpa, len }),
            }
            left -= len;
            match address.checked_add(len) {
                Some(next) => address = next,
                None if left == 0 => break,
                None => return Err(Unmapped { address: u64::MAX }),
            }
        }
        Ok(pieces)
    }
}
