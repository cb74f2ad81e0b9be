//! Numbers from a seed: SplitMix64, which may be started anywhere, so that operation `n` of a load costs the same as
//! operation 0.

/// A generator.
#[derive(Debug, Clone)]
pub struct Dice(u64);

/// Mixes two numbers into a seed.
pub fn mix(a: u64, b: u64) -> u64 {
    Dice::new(a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32)).word()
}

impl Dice {
    /// Starts at a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`, which is taken as 1 when it is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.word()) * u128::from(bound.max(1))) >> 64) as u64
    }
}
