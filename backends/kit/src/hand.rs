//! Buffers that were taken from a ring and not filled yet, in the order of taking.

use crate::chain::Chain;

/// A queue of chains whose memory is used again: none is moved when it is taken or filled.
#[derive(Debug, Default)]
pub(crate) struct Hand {
    /// A power of two of them, or none yet.
    chains: Vec<Chain>,
    first: usize,
    len: usize,
}

impl Hand {
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The chain at this place.
    #[inline]
    pub(crate) fn get(&self, place: usize) -> Option<&Chain> {
        let mask = self.chains.len().wrapping_sub(1);
        if place < self.len { self.chains.get(self.first.wrapping_add(place) & mask) } else { None }
    }

    /// The chain that was taken first.
    #[inline]
    pub(crate) fn front(&self) -> Option<&Chain> {
        self.get(0)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Chain> {
        (0..self.len).filter_map(|place| self.get(place))
    }

    /// Fills a place behind the last one; it counts if `fill` says so.
    #[inline]
    pub(crate) fn add<T>(&mut self, fill: impl FnOnce(&mut Chain) -> (bool, T)) -> Option<T> {
        if self.len == self.chains.len() {
            self.grow();
        }
        let mask = self.chains.len().wrapping_sub(1);
        let place = self.chains.get_mut(self.first.wrapping_add(self.len) & mask)?;
        let (counts, result) = fill(place);
        self.len += usize::from(counts);
        Some(result)
    }

    #[cold]
    fn grow(&mut self) {
        self.chains.rotate_left(self.first);
        self.first = 0;
        self.chains.resize_with((2 * self.len).max(4), Chain::default);
    }

    /// Lets go of the first chain: its head and its room.
    #[inline]
    pub(crate) fn remove(&mut self) -> Option<(u16, u64)> {
        let chain = self.front()?;
        let removed = (chain.head(), chain.writable_bytes());
        self.first = self.first.wrapping_add(1) & self.chains.len().wrapping_sub(1);
        self.len -= 1;
        Some(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Heads go in and out in turn, so that places are used again and the hand grows when its first place is anywhere.
    #[test]
    fn chains_leave_in_the_order_in_which_they_came() {
        let mut hand = Hand::default();
        let (mut next, mut expected) = (0_u16, 0_u16);
        for round in 0..200 {
            for _ in 0..round % 7 {
                hand.add(|chain| {
                    *chain = Chain::named(next);
                    (true, ())
                });
                next += 1;
            }
            hand.add(|chain| {
                *chain = Chain::named(9999);
                (false, ())
            });
            assert!(hand.iter().map(Chain::head).eq(expected..next));
            for _ in 0..round % 5 {
                if let Some((head, 0)) = hand.remove() {
                    assert_eq!(head, expected);
                    expected += 1;
                }
            }
            assert_eq!((hand.len(), hand.is_empty()), (usize::from(next - expected), next == expected));
        }
        assert!(next > 500);
    }
}
