//! Which device answers at an address: non-overlapping ranges of port or memory space, each with a value.
//!
//! A lookup runs on every exit of every vCPU, so it takes `&self`, tries the range that answered last and falls back to
//! a binary search of a sorted vector. Changes are rare (a BAR moves) and take `&mut self`; the owner holds the lock.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use thiserror::Error;

/// A non-empty range of addresses that does not wrap around.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressRange {
    base: u64,
    last: u64,
}

impl AddressRange {
    /// The range of `len` bytes from `base`.
    ///
    /// # Errors
    /// [`AddressMapError::BadRange`] when it is empty or runs past the end of the 64-bit space.
    pub fn new(base: u64, len: u64) -> Result<Self, AddressMapError> {
        match len.checked_sub(1).and_then(|more| base.checked_add(more)) {
            Some(last) => Ok(Self { base, last }),
            None => Err(AddressMapError::BadRange { base, len }),
        }
    }
    /// First address.
    pub fn base(self) -> u64 {
        self.base
    }
    /// Last address, inclusive.
    pub fn last(self) -> u64 {
        self.last
    }
    /// Length in bytes; saturates for the whole 64-bit space.
    pub fn len(self) -> u64 {
        (self.last - self.base).saturating_add(1)
    }
    /// Never: an empty range cannot be made.
    pub fn is_empty(self) -> bool {
        false
    }
    fn overlaps(self, other: Self) -> bool {
        self.base <= other.last && other.base <= self.last
    }
}

impl fmt::Debug for AddressRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:#x}..={:#x}", self.base, self.last)
    }
}

/// Why a change of an [`AddressMap`] was refused. The map is as it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AddressMapError {
    /// The range is empty or wraps.
    #[error("a range of {len:#x} bytes at {base:#x} is empty or runs past the end of the address space")]
    BadRange {
        /// Where it was to start.
        base: u64,
        /// How long it was to be, in bytes.
        len: u64,
    },
    /// Something else already answers there.
    #[error("{wanted:?} overlaps {taken:?}, which is already mapped: unmap that first or choose another address")]
    Overlap {
        /// The range asked for.
        wanted: AddressRange,
        /// The range that is in the way.
        taken: AddressRange,
    },
    /// No range starts at that address.
    #[error("nothing is mapped at {base:#x}")]
    NotMapped {
        /// The address asked for.
        base: u64,
    },
}

/// What a lookup found.
#[derive(Debug, PartialEq, Eq)]
pub struct Hit<'a, T> {
    /// Distance of the access from the start of the range, in bytes.
    pub offset: u64,
    /// The whole range.
    pub range: AddressRange,
    /// What is mapped there.
    pub value: &'a T,
}

/// Ranges of one address space and their values.
#[derive(Debug)]
pub struct AddressMap<T> {
    entries: Vec<(AddressRange, T)>,
    last_hit: AtomicUsize,
}

impl<T> Default for AddressMap<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), last_hit: AtomicUsize::new(0) }
    }
}

impl<T> AddressMap<T> {
    /// An empty space.
    pub fn new() -> Self {
        Self::default()
    }

    /// What answers an access of `width` bytes at `address`. An access that leaves its range hits nothing.
    pub fn lookup(&self, address: u64, width: u64) -> Option<Hit<'_, T>> {
        let end = address.checked_add(width.max(1) - 1)?;
        let guess = self.last_hit.load(Ordering::Relaxed);
        let hit = |entry: &'_ (AddressRange, T)| entry.0.base <= address && end <= entry.0.last;
        let entry = match self.entries.get(guess) {
            Some(entry) if hit(entry) => entry,
            _ => {
                let index = self.entries.partition_point(|entry| entry.0.last < address);
                let entry = self.entries.get(index).filter(|entry| hit(entry))?;
                self.last_hit.store(index, Ordering::Relaxed);
                entry
            }
        };
        Some(Hit { offset: address - entry.0.base, range: entry.0, value: &entry.1 })
    }

    /// Maps `value` at `range`.
    ///
    /// # Errors
    /// [`AddressMapError::Overlap`] when any byte of it is taken.
    pub fn insert(&mut self, range: AddressRange, value: T) -> Result<(), AddressMapError> {
        let index = self.entries.partition_point(|entry| entry.0.last < range.base);
        match self.entries.get(index) {
            Some((taken, _)) if taken.overlaps(range) => Err(AddressMapError::Overlap { wanted: range, taken: *taken }),
            _ => {
                self.entries.insert(index, (range, value));
                Ok(())
            }
        }
    }

    /// Unmaps the range that starts at `base` and returns it with its value.
    ///
    /// # Errors
    /// [`AddressMapError::NotMapped`] when no range starts there.
    pub fn remove(&mut self, base: u64) -> Result<(AddressRange, T), AddressMapError> {
        let index = self
            .entries
            .binary_search_by_key(&base, |entry| entry.0.base)
            .map_err(|_| AddressMapError::NotMapped { base })?;
        Ok(self.entries.remove(index))
    }

    /// Moves the range that starts at `base`, keeping its length and value. When the new place is refused the range
    /// stays where it was.
    ///
    /// # Errors
    /// As of [`insert`](Self::insert), [`remove`](Self::remove) and [`AddressRange::new`].
    pub fn relocate(&mut self, base: u64, new_base: u64) -> Result<(), AddressMapError> {
        let (old, value) = self.remove(base)?;
        let wanted = match AddressRange::new(new_base, old.len()) {
            Ok(wanted) => wanted,
            Err(error) => {
                self.insert(old, value)?;
                return Err(error);
            }
        };
        let taken = self.entries.iter().map(|entry| entry.0).find(|taken| taken.overlaps(wanted));
        match taken {
            Some(taken) => {
                self.insert(old, value)?;
                Err(AddressMapError::Overlap { wanted, taken })
            }
            None => self.insert(wanted, value),
        }
    }

    /// All ranges in order of address.
    pub fn iter(&self) -> impl Iterator<Item = (AddressRange, &T)> {
        self.entries.iter().map(|entry| (entry.0, &entry.1))
    }

    /// All ranges in order of address, their values changeable.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (AddressRange, &mut T)> {
        self.entries.iter_mut().map(|entry| (entry.0, &mut entry.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(base: u64, len: u64) -> AddressRange {
        AddressRange::new(base, len).unwrap()
    }

    /// The bytes around each range belong to nobody, also right after a hit in the range (the cached guess).
    #[test]
    fn lookups_end_where_ranges_end() {
        let mut map = AddressMap::new();
        map.insert(range(0x3f8, 8), "serial").unwrap();
        map.insert(range(0x60, 1), "keyboard").unwrap();
        map.insert(range(u64::MAX - 7, 8), "top").unwrap();
        assert_eq!(map.lookup(0x3ff, 1).map(|hit| (hit.offset, *hit.value)), Some((7, "serial")));
        assert_eq!(map.lookup(0x3f7, 1), None);
        assert_eq!(map.lookup(0x400, 1), None);
        assert_eq!(map.lookup(0x3ff, 2), None, "an access must not leave its range");
        assert_eq!(map.lookup(0x60, 1).map(|hit| *hit.value), Some("keyboard"));
        assert_eq!(map.lookup(0x61, 1), None);
        assert_eq!(map.lookup(u64::MAX, 1).map(|hit| hit.offset), Some(7));
        assert_eq!(map.lookup(u64::MAX, 2), None);
    }

    #[test]
    fn overlap_is_refused_and_changes_nothing() {
        let mut map = AddressMap::new();
        map.insert(range(0x1000, 0x1000), 1).unwrap();
        map.insert(range(0x3000, 0x1000), 2).unwrap();
        for wanted in [range(0x1fff, 1), range(0xfff, 2), range(0x2800, 0x801), range(0, 0x1_0000)] {
            assert!(matches!(map.insert(wanted, 3), Err(AddressMapError::Overlap { .. })), "{wanted:?}");
        }
        map.insert(range(0x2000, 0x1000), 3).unwrap();
        assert_eq!(map.iter().map(|(_, value)| *value).collect::<Vec<_>>(), [1, 3, 2]);
        assert!(AddressRange::new(1, 0).is_err());
        assert!(AddressRange::new(u64::MAX, 2).is_err());
    }

    /// A BAR that the guest moves onto another device must still answer at its old place.
    #[test]
    fn refused_move_leaves_the_range() {
        let mut map = AddressMap::new();
        map.insert(range(0x1000, 0x1000), 1).unwrap();
        map.insert(range(0x8000, 0x1000), 2).unwrap();
        assert!(map.relocate(0x1000, 0x7800).is_err());
        assert!(map.relocate(0x1000, u64::MAX).is_err());
        assert_eq!(map.lookup(0x1004, 4).map(|hit| *hit.value), Some(1));
        map.relocate(0x1000, 0x1800).unwrap();
        assert_eq!(map.lookup(0x1004, 4), None);
        assert_eq!(map.lookup(0x2004, 4).map(|hit| hit.offset), Some(0x804));
        assert_eq!(map.remove(0x1000), Err(AddressMapError::NotMapped { base: 0x1000 }));
    }
}
