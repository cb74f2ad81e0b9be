//! How a viewer wants its pixels. A picture has them as blue, green, red and nothing, eight bits each; a viewer may ask for
//! any true colours of 8, 16 or 32 bits. Palettes are not served.

use super::RfbError;

/// Bytes of a pixel in a picture.
pub const PIXEL: usize = 4;

/// A format of pixels (RFC 6143, 7.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PixelFormat {
    bits: u8,
    depth: u8,
    big_endian: bool,
    /// Largest values of red, green, blue.
    max: [u16; 3],
    shift: [u8; 3],
}

impl PixelFormat {
    /// That of pictures: nothing has to be done for it.
    pub const NATIVE: Self = Self { bits: 32, depth: 24, big_endian: false, max: [255; 3], shift: [16, 8, 0] };

    /// From a viewer's words.
    ///
    /// # Errors
    /// [`RfbError::Format`].
    pub fn decode(bytes: &[u8; 16]) -> Result<Self, RfbError> {
        let [bits, depth, big_endian, true_colour, r0, r1, g0, g1, b0, b1, red, green, blue, ..] = *bytes;
        let max = [u16::from_be_bytes([r0, r1]), u16::from_be_bytes([g0, g1]), u16::from_be_bytes([b0, b1])];
        let shift = [red, green, blue];
        let fits = |(max, shift): (&u16, &u8)| {
            let top = 16 - max.leading_zeros() + u32::from(*shift);
            *max > 0 && max & max.wrapping_add(1) == 0 && top <= u32::from(bits)
        };
        if !matches!(bits, 8 | 16 | 32) || true_colour == 0 || !max.iter().zip(&shift).all(fits) {
            return Err(RfbError::Format { bits, true_colour: true_colour != 0 });
        }
        Ok(Self { bits, depth, big_endian: big_endian != 0, max, shift })
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; 16] {
        let [[r0, r1], [g0, g1], [b0, b1]] = self.max.map(u16::to_be_bytes);
        let [red, green, blue] = self.shift;
        let order = u8::from(self.big_endian);
        [self.bits, self.depth, order, 1, r0, r1, g0, g1, b0, b1, red, green, blue, 0, 0, 0]
    }

    /// Bytes of a pixel.
    #[must_use]
    pub fn bytes(&self) -> usize {
        usize::from(self.bits / 8)
    }

    /// Pixels of Tight are three bytes long in this format: red, green, blue.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        self.bits == 32 && self.depth == 24 && self.max == [255; 3]
    }

    /// Appends a picture's pixels.
    pub fn put(&self, pixels: &[u8], out: &mut Vec<u8>) {
        if *self == Self::NATIVE {
            out.extend_from_slice(pixels);
            return;
        }
        out.reserve(pixels.len() / PIXEL * self.bytes());
        for pixel in pixels.as_chunks::<PIXEL>().0 {
            self.put_one(*pixel, out);
        }
    }

    /// Appends pixels as Tight has them.
    pub fn put_tight(&self, pixels: &[u8], out: &mut Vec<u8>) {
        if self.is_packed() {
            out.extend(pixels.as_chunks::<PIXEL>().0.iter().flat_map(|[blue, green, red, _]| [*red, *green, *blue]));
        } else {
            self.put(pixels, out);
        }
    }

    fn put_one(&self, [blue, green, red, _]: [u8; PIXEL], out: &mut Vec<u8>) {
        let mut word = 0_u32;
        for ((value, max), shift) in [red, green, blue].into_iter().zip(self.max).zip(self.shift) {
            let scaled = (u32::from(value) * u32::from(max) + 127) / 255;
            word |= scaled << shift;
        }
        let little = word.to_le_bytes();
        let len = self.bytes();
        if self.big_endian {
            out.extend(little.iter().take(len).rev());
        } else {
            out.extend(little.iter().take(len));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn said(bits: u8, depth: u8, big: u8, max: [u16; 3], shift: [u8; 3]) -> Result<PixelFormat, RfbError> {
        PixelFormat::decode(&PixelFormat { bits, depth, big_endian: big != 0, max, shift }.encode())
    }

    /// White is white and black is black in every format, and colours are where they were asked for.
    #[test]
    fn viewers_get_what_they_ask_for() {
        let mut out = Vec::new();
        let high = said(16, 16, 1, [31, 63, 31], [11, 5, 0]).unwrap();
        high.put(&[0, 0, 255, 9, 255, 255, 255, 9, 255, 0, 0, 9], &mut out);
        assert_eq!(out, [0xf8, 0, 0xff, 0xff, 0, 0x1f]);
        out.clear();
        said(8, 8, 0, [7, 7, 3], [0, 3, 6]).unwrap().put(&[255, 0, 255, 0], &mut out);
        assert_eq!(out, [0b1100_0111]);
        out.clear();
        let turned = said(32, 24, 0, [255; 3], [0, 8, 16]).unwrap();
        turned.put(&[1, 2, 3, 4], &mut out);
        turned.put_tight(&[1, 2, 3, 4], &mut out);
        assert_eq!(out, [3, 2, 1, 0, 3, 2, 1]);
        assert_eq!(PixelFormat::decode(&PixelFormat::NATIVE.encode()).unwrap(), PixelFormat::NATIVE);
        assert!(said(24, 24, 0, [255; 3], [0, 8, 16]).is_err() && said(16, 16, 0, [31, 63, 31], [12, 5, 0]).is_err());
        assert!(said(32, 24, 0, [0; 3], [0; 3]).is_err() && said(32, 24, 0, [255; 3], [255; 3]).is_err());
        assert!(PixelFormat::decode(&[8; 16]).is_err());
    }

    proptest! {
        #[test]
        fn any_format_is_refused_or_served(bytes: [u8; 16], pixels in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(format) = PixelFormat::decode(&bytes) {
                let mut out = Vec::new();
                format.put(&pixels, &mut out);
                prop_assert_eq!(out.len(), pixels.len() / PIXEL * format.bytes());
            }
        }
    }
}
