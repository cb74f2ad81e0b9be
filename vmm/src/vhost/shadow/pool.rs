//! Room in a private memory: pieces of whole pages, the lowest that fits first.

use std::collections::BTreeMap;

/// Pieces are whole pages.
pub(super) const PAGE: u64 = 4096;

/// What is free of a stretch of memory. It is as long as it was made, whoever asks.
#[derive(Debug)]
pub(super) struct Pool {
    /// First byte and length of each free piece, no two of which touch.
    free: BTreeMap<u64, u64>,
    capacity: u64,
}

impl Pool {
    /// `bytes` from `start` on, all free. Both are whole pages.
    pub(super) fn new(start: u64, bytes: u64) -> Self {
        Self { free: BTreeMap::from([(start, bytes)]), capacity: bytes }
    }

    /// What is there when nobody has anything.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Takes a piece of so many bytes; where it begins, or nothing while there is none so long.
    pub(super) fn take(&mut self, bytes: u64) -> Option<u64> {
        let bytes = bytes.max(1).checked_next_multiple_of(PAGE)?;
        let (start, len) = self.free.iter().find(|(_, len)| **len >= bytes).map(|(start, len)| (*start, *len))?;
        self.free.remove(&start);
        if len > bytes {
            self.free.insert(start + bytes, len - bytes);
        }
        Some(start)
    }

    /// Gives back what [`Self::take`] has given for so many bytes.
    pub(super) fn give(&mut self, start: u64, bytes: u64) {
        let (mut start, mut len) = (start, bytes.max(1).next_multiple_of(PAGE));
        if let Some(behind) = self.free.remove(&(start + len)) {
            len += behind;
        }
        if let Some((before, its)) = self.free.range(..start).next_back().map(|(before, its)| (*before, *its))
            && before + its == start
        {
            self.free.remove(&before);
            (start, len) = (before, its + len);
        }
        self.free.insert(start, len);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 0x7000;
    const PAGES: u64 = 32;

    proptest! {
        /// Whatever is taken and given back: pieces lie inside, no two overlap, and in the end there is one piece again that is
        /// as long as all. What is refused does not fit anywhere.
        #[test]
        fn pieces_do_not_overlap(acts in prop::collection::vec((any::<bool>(), 0_u64..9 * PAGE, any::<prop::sample::Index>()), 1..200)) {
            let mut pool = Pool::new(START, PAGES * PAGE);
            let mut held: Vec<(u64, u64)> = Vec::new();
            let pages = |bytes: u64| bytes.max(1).div_ceil(PAGE);
            for (takes, bytes, which) in acts {
                if takes {
                    let mut used = [false; PAGES as usize];
                    for (start, bytes) in &held {
                        let first = (start - START) / PAGE;
                        (first..first + pages(*bytes)).for_each(|page| used[page as usize] = true);
                    }
                    match pool.take(bytes) {
                        Some(start) => {
                            let first = (start - START) / PAGE;
                            prop_assert!(start % PAGE == START % PAGE && first + pages(bytes) <= PAGES);
                            prop_assert!((first..first + pages(bytes)).all(|page| !used[page as usize]));
                            held.push((start, bytes));
                        }
                        None => {
                            let longest = used.split(|used| *used).map(<[bool]>::len).max().unwrap();
                            prop_assert!((longest as u64) < pages(bytes));
                        }
                    }
                } else if !held.is_empty() {
                    let (start, bytes) = held.swap_remove(which.index(held.len()));
                    pool.give(start, bytes);
                }
            }
            held.into_iter().for_each(|(start, bytes)| pool.give(start, bytes));
            prop_assert_eq!(&pool.free, &BTreeMap::from([(START, PAGES * PAGE)]));
            prop_assert_eq!(pool.capacity(), PAGES * PAGE);
        }
    }
}
