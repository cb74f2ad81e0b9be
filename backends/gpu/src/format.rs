//! Formats of 2D resources (virtio 1.2, 5.7.6.8, `virtio_gpu_formats`), and their way to what the display wire carries: blue,
//! green, red and one byte more for each pixel.

use atoll_protocol::display::PIXEL_BYTES;

/// A format: four bytes a pixel, named by their order in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Blue first, red third; alpha or nothing last. What the wire carries.
    Bgr,
    /// Alpha or nothing first, then red, green, blue.
    Argb,
    /// Red first, blue third; alpha or nothing last.
    Rgb,
    /// Alpha or nothing first, then blue, green, red.
    Abgr,
}

impl Format {
    /// By its number; those with alpha and those without are the same to who copies them.
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 | 2 => Self::Bgr,
            3 | 4 => Self::Argb,
            67 | 134 => Self::Rgb,
            68 | 121 => Self::Abgr,
            _ => return None,
        })
    }

    /// Turns whole pixels of this format into what the wire carries, where they are.
    pub fn convert(self, pixels: &mut [u8]) {
        let (pixels, _) = pixels.as_chunks_mut::<PIXEL_BYTES>();
        match self {
            Self::Bgr => {}
            Self::Argb => pixels.iter_mut().for_each(|pixel| pixel.reverse()),
            Self::Rgb => pixels.iter_mut().for_each(|pixel| pixel.swap(0, 2)),
            Self::Abgr => pixels.iter_mut().for_each(|pixel| pixel.rotate_left(1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_format_becomes_blue_green_red_alpha() {
        let cases: &[(&[u32], &[u8; 4])] =
            &[(&[1, 2], b"BGRA"), (&[3, 4], b"ARGB"), (&[67, 134], b"RGBA"), (&[68, 121], b"ABGR")];
        for (numbers, order) in cases {
            for number in *numbers {
                let mut pixels = [order.to_vec(), order.to_vec()].concat();
                Format::from_number(*number).unwrap().convert(&mut pixels);
                assert_eq!(pixels, b"BGRABGRA", "format {number}");
            }
        }
        assert_eq!([0, 5, 66, 135, u32::MAX].map(Format::from_number), [None; 5]);
    }
}
