//! A set of interrupt vectors, as IRR, ISR and TMR are: 256 bits whose highest member is found in four steps.

/// A set of vectors 0 to 255.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VectorSet {
    words: [u64; 4],
}

impl VectorSet {
    /// Adds a vector; tells whether it was new.
    pub fn insert(&mut self, vector: u8) -> bool {
        let (word, bit) = Self::place(vector);
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }
    /// Removes a vector; tells whether it was there.
    pub fn remove(&mut self, vector: u8) -> bool {
        let (word, bit) = Self::place(vector);
        let there = self.words[word] & bit != 0;
        self.words[word] &= !bit;
        there
    }
    /// Whether the vector is in the set.
    pub fn contains(&self, vector: u8) -> bool {
        let (word, bit) = Self::place(vector);
        self.words[word] & bit != 0
    }
    /// The highest vector.
    pub fn highest(&self) -> Option<u8> {
        (0..4usize).rev().find(|&word| self.words[word] != 0).map(|word| {
            let bit = 63 - self.words[word].leading_zeros();
            (word as u8) << 6 | bit as u8
        })
    }
    /// Bits `32 * index` to `32 * index + 31`, as the registers show them; `index` is taken modulo 8.
    pub fn word32(&self, index: usize) -> u32 {
        (self.words[index / 2 % 4] >> (32 * (index % 2))) as u32
    }
    fn place(vector: u8) -> (usize, u64) {
        (usize::from(vector >> 6), 1 << (vector & 63))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn highest_of_every_pair() {
        for low in 0..=255u8 {
            let mut set = VectorSet::default();
            assert_eq!(set.highest(), None);
            assert!(set.insert(low) && !set.insert(low));
            assert_eq!(set.highest(), Some(low));
            assert_eq!(set.word32(usize::from(low / 32)), 1 << (low % 32));
            if let Some(high) = low.checked_add(37) {
                set.insert(high);
                assert_eq!(set.highest(), Some(high));
                assert!(set.remove(high) && !set.remove(high) && set.contains(low));
            }
            assert_eq!(set.highest(), Some(low));
        }
    }
}
