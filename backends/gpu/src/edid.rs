//! What a screen says of itself (VESA E-EDID 1.4, one block of 128 bytes): its preferred mode with the timing of CVT's reduced
//! blanking, the modes that every driver knows, and a size at which a pixel is about a quarter of a millimetre.

use atoll_protocol::display::Edid;

/// Most columns and rows of a mode: what fits into a detailed timing.
pub const MODE_MAX: u32 = 4095;
/// Least of them.
pub const MODE_MIN: u32 = 64;

/// Most of a detailed timing's clock, in units of 10 kHz.
const CLOCK_MAX: u64 = 65_535;
/// Frames a second, where the clock can do them.
const REFRESH: u64 = 60;
/// Columns that are not seen: front porch, pulse, back porch.
const H_FRONT: u32 = 48;
const H_SYNC: u32 = 32;
const H_BLANK: u32 = 160;
/// Rows of the front porch, and least ones of the back porch.
const V_FRONT: u32 = 3;
const V_BACK_MIN: u32 = 6;
/// Microseconds that a frame is dark at least.
const BLANK_US_MIN: u64 = 460;
/// Pixels of a metre, nearly: 100 of an inch.
const PIXELS_A_METRE: u32 = 3937;

/// Modes besides the preferred one: columns, aspect's bits, at 60 Hz.
const STANDARD: [(u32, u8); 8] = [
    (1280, WIDE),
    (1280, FIVE_FOUR),
    (1440, WIDE),
    (1600, SIXTEEN_NINE),
    (1680, WIDE),
    (1920, SIXTEEN_NINE),
    (1920, WIDE),
    (1280, SIXTEEN_NINE),
];
const WIDE: u8 = 0;
const FIVE_FOUR: u8 = 2;
const SIXTEEN_NINE: u8 = 3;

/// A mode's timing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timing {
    width: u32,
    height: u32,
    /// Rows that are not seen.
    v_blank: u32,
    v_sync: u32,
    /// In units of 10 kHz.
    clock: u64,
}

impl Timing {
    /// CVT with reduced blanking, version 1; slower than 60 Hz where the clock could not be written down.
    fn reduced(width: u32, height: u32) -> Self {
        let is = |across: u32, down: u32| u64::from(width) * u64::from(down) == u64::from(height) * u64::from(across);
        let v_sync = match () {
            () if is(4, 3) => 4,
            () if is(16, 9) => 5,
            () if is(16, 10) => 6,
            () if is(5, 4) || is(15, 9) => 7,
            () => 10,
        };
        // Rows within the time that is dark: a row takes what is left of a frame, shared among those that are seen.
        let lit_us = (1_000_000 / REFRESH).saturating_sub(BLANK_US_MIN);
        let dark = (BLANK_US_MIN * u64::from(height) / lit_us.max(1)) as u32 + 1;
        let v_blank = dark.max(V_FRONT + v_sync + V_BACK_MIN);
        let frame = u64::from(width + H_BLANK) * u64::from(height + v_blank);
        // CVT's clock goes in steps of 250 kHz.
        let clock = (frame * REFRESH / 250_000 * 25).min(CLOCK_MAX);
        Self { width, height, v_blank, v_sync, clock }
    }

    /// As a detailed timing, on a screen of so many millimetres.
    fn describe(&self, wide_mm: u32, high_mm: u32) -> [u8; 18] {
        let clock = (self.clock as u16).to_le_bytes();
        let high = |a: u32, b: u32| ((a >> 8) << 4 | b >> 8) as u8;
        [
            clock[0],
            clock[1],
            self.width as u8,
            H_BLANK as u8,
            high(self.width, H_BLANK),
            self.height as u8,
            self.v_blank as u8,
            high(self.height, self.v_blank),
            H_FRONT as u8,
            H_SYNC as u8,
            ((V_FRONT << 4) | (self.v_sync & 15)) as u8,
            0,
            wide_mm as u8,
            high_mm as u8,
            high(wide_mm, high_mm),
            0,
            0,
            // Digital, separate pulses; horizontal positive, vertical negative, as reduced blanking has them.
            0b0001_1010,
        ]
    }
}

/// A descriptor of text: its kind, and at most 13 characters.
fn text(kind: u8, text: &str) -> [u8; 18] {
    let mut bytes = [b' '; 18];
    bytes[..5].copy_from_slice(&[0, 0, 0, kind, 0]);
    let len = text.len().min(13);
    bytes[5..5 + len].copy_from_slice(&text.as_bytes()[..len]);
    if len < 13 {
        bytes[5 + len] = b'\n';
    }
    bytes
}

/// The EDID of screen number `scanout`, which wants this mode; sizes are brought within [`MODE_MIN`] and [`MODE_MAX`].
pub fn edid(scanout: u32, width: u32, height: u32) -> Edid {
    let (width, height) = (width.clamp(MODE_MIN, MODE_MAX), height.clamp(MODE_MIN, MODE_MAX));
    let millimetres = |pixels: u32| (pixels * 1000 / PIXELS_A_METRE).max(1);
    let (wide, high) = (millimetres(width), millimetres(height));
    let mut block = Vec::with_capacity(128);
    block.extend([0, 255, 255, 255, 255, 255, 255, 0]);
    // "ATL", five bits a letter; product and serial number; made in 2025; EDID 1.4.
    let letters = b"ATL".iter().fold(0_u16, |word, letter| word << 5 | u16::from(letter - b'A' + 1));
    block.extend(letters.to_be_bytes());
    block.extend(1_u16.to_le_bytes());
    block.extend(scanout.wrapping_add(1).to_le_bytes());
    block.extend([0, (2025 - 1990) as u8, 1, 4]);
    // Digital, 8 bits a colour; centimetres; gamma 2.2; RGB, sRGB's colours, the first detailed timing is the native one.
    block.extend([0b1010_0000, (wide / 10).clamp(1, 255) as u8, (high / 10).clamp(1, 255) as u8, 120, 0b0000_0110]);
    // Chromaticities of sRGB.
    block.extend([0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54]);
    // 640x480, 800x600 and 1024x768, at 60 Hz.
    block.extend([0b0010_0001, 0b0000_1000, 0]);
    block.extend(STANDARD.iter().flat_map(|(width, aspect)| [(width / 8 - 31) as u8, aspect << 6]));
    block.extend(Timing::reduced(width, height).describe(wide, high));
    block.extend(text(0xfc, "Atoll"));
    block.extend(text(0xff, &format!("screen {scanout}")));
    // Nothing more.
    block.extend([0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    block.push(0);
    let sum = block.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    block.push(0_u8.wrapping_sub(sum));
    Edid::new(block)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Timings of CVT's own table.
    #[test]
    fn reduced_blanking_is_that_of_the_standard() {
        let timing = |width, height| {
            let timing = Timing::reduced(width, height);
            (timing.clock, timing.height + timing.v_blank, timing.v_sync)
        };
        assert_eq!(timing(1920, 1080), (13_850, 1111, 5));
        assert_eq!(timing(1920, 1200), (15_400, 1235, 6));
        assert_eq!(timing(1280, 800), (7_100, 823, 6));
        assert_eq!(timing(1024, 768), (5_600, 790, 4));
        assert_eq!(timing(1280, 1024), (9_100, 1054, 7));
    }

    #[test]
    fn a_driver_finds_the_mode_and_the_name() {
        let edid = edid(1, 1920, 1080);
        let block = edid.bytes();
        assert_eq!((block.len(), &block[..8]), (128, &[0, 255, 255, 255, 255, 255, 255, 0][..]));
        let detailed = &block[54..72];
        assert_eq!(u32::from(detailed[2]) | u32::from(detailed[4] >> 4) << 8, 1920);
        assert_eq!(u32::from(detailed[5]) | u32::from(detailed[7] >> 4) << 8, 1080);
        assert_eq!(&block[72..83], b"\0\0\0\xfc\0Atoll\n");
        // 1280x800 is the first of the standard ones.
        assert_eq!(&block[38..40], &[0x81, 0]);
    }

    proptest! {
        #[test]
        fn any_mode_makes_a_block_that_adds_up(scanout: u32, width: u32, height: u32) {
            let edid = edid(scanout, width, height);
            prop_assert_eq!(edid.bytes().len(), 128);
            prop_assert_eq!(edid.bytes().iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        }
    }
}
