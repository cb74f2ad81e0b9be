//! A small seeded generator (xoshiro256**), so that a seed and a number are enough to make a case again, and the values
//! that find bugs in arithmetic.

/// Random numbers from a seed.
pub(super) struct Random {
    state: [u64; 4],
}

impl Random {
    /// A generator for item `index` of stream `stream` under `seed`.
    pub(super) fn new(seed: u64, stream: u64, index: u64) -> Self {
        // SplitMix64 spreads the three numbers over the state.
        let mut x = seed ^ stream.wrapping_mul(0xd605_bbb5_8c8a_bbfd) ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let state = std::array::from_fn(|_| {
            x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = x;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        });
        Self { state }
    }

    pub(super) fn u64(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let result = b.wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= t;
        *d = d.rotate_left(45);
        result
    }

    /// A number below `bound`, which must not be zero.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.u64()) * u128::from(bound)) >> 64) as u64
    }

    /// True once in `times` calls.
    pub(super) fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub(super) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }

    /// An integer near which carries, signs and sizes change, or any.
    pub(super) fn integer(&mut self) -> u64 {
        match self.below(8) {
            0 => *self.pick(&[0, 1, 2, u64::MAX, u64::MAX - 1, 0x7f, 0x80, 0xff]),
            1 => *self.pick(&[0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, i64::MAX as u64, 1 << 63]),
            2 => (1u64 << self.below(64)).wrapping_add(self.below(3)).wrapping_sub(1),
            3 => self.below(64),
            4 => !0 << self.below(64),
            5 => u64::from(self.u64() as u32),
            _ => self.u64(),
        }
    }

    /// The bits of a double that arithmetic treats in a special way, or of any, or of two such floats.
    pub(super) fn double(&mut self) -> u64 {
        match self.below(8) {
            0 => u64::from(self.float()) << 32 | u64::from(self.float()),
            1 => self.u64(),
            2 => *self.pick(&[0, 1 << 63, 1.0f64.to_bits(), (-1.0f64).to_bits(), f64::INFINITY.to_bits(), 1]),
            3 => *self.pick(&[
                f64::NEG_INFINITY.to_bits(),
                f64::MAX.to_bits(),
                f64::MIN_POSITIVE.to_bits(),
                0x000f_ffff_ffff_ffff,
                0x7ff8_0000_0000_0000,
                0xfff0_0000_0000_0001,
                0x41df_ffff_ffc0_0000,
                0x43e0_0000_0000_0000,
            ]),
            4 => ((self.integer() as i64) as f64).to_bits(),
            5 => (f64::from(self.u64() as i32) / 16.0).to_bits(),
            // Near one another, so that sums cancel.
            6 => (1.0f64.to_bits() & !0xffff_ffff) | self.below(1 << 32),
            _ => (self.u64() & !(0x7ff << 52)) | (1023 - 64 + self.below(128)) << 52,
        }
    }

    /// The same for single precision.
    pub(super) fn float(&mut self) -> u32 {
        match self.below(6) {
            0 => self.u64() as u32,
            1 => {
                *self.pick(&[0, 1 << 31, 1.0f32.to_bits(), f32::INFINITY.to_bits(), f32::MAX.to_bits(), 1, 0x7fc0_0000])
            }
            2 => *self.pick(&[0xff80_0001, 0x007f_ffff, f32::MIN_POSITIVE.to_bits(), 0x4eff_ffff, 0x4f00_0000]),
            3 => ((self.integer() as i32) as f32).to_bits(),
            4 => (f32::from(self.u64() as i16) / 4.0).to_bits(),
            _ => (self.u64() as u32 & !(0xff << 23)) | (127 - 16 + self.below(32) as u32) << 23,
        }
    }
}
