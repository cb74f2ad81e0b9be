//! A head's picture as the device has told it: blue, green, red and nothing for each pixel, row by row.

use atoll_protocol::display::{PIXEL_BYTES, Rect};

use crate::damage;

/// A picture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Picture {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl Picture {
    /// A black one.
    #[must_use]
    pub fn black((width, height): (u32, u32)) -> Self {
        Self { width, height, pixels: vec![0; bytes((width, height))] }
    }

    /// Columns and rows.
    #[must_use]
    pub fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// All pixels.
    #[must_use]
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Takes the pixels of `rect`, row by row; what lies outside is left out. What has changed, if anything.
    pub fn draw(&mut self, rect: Rect, pixels: &[u8]) -> Option<Rect> {
        let part = damage::shared(rect, damage::whole(self.size()))?;
        let from_row = rect.width as usize * PIXEL_BYTES;
        let left = (part.x - rect.x) as usize * PIXEL_BYTES;
        let len = part.width as usize * PIXEL_BYTES;
        let rows = pixels.chunks_exact(from_row).skip((part.y - rect.y) as usize);
        for (from, y) in rows.zip(part.y..part.y + part.height) {
            let at = self.at(part.x, y);
            if let (Some(to), Some(from)) = (self.pixels.get_mut(at..at + len), from.get(left..left + len)) {
                to.copy_from_slice(from);
            }
        }
        Some(part)
    }

    /// Puts the pixels of `rect` into `out`; those that are not there are black.
    pub fn read(&self, rect: Rect, out: &mut Vec<u8>) {
        out.clear();
        out.resize(bytes((rect.width, rect.height)), 0);
        let Some(part) = damage::shared(rect, damage::whole(self.size())) else { return };
        let to_row = rect.width as usize * PIXEL_BYTES;
        let left = (part.x - rect.x) as usize * PIXEL_BYTES;
        let len = part.width as usize * PIXEL_BYTES;
        let rows = out.chunks_exact_mut(to_row).skip((part.y - rect.y) as usize);
        for (to, y) in rows.zip(part.y..part.y + part.height) {
            let at = self.at(part.x, y);
            if let (Some(to), Some(from)) = (to.get_mut(left..left + len), self.pixels.get(at..at + len)) {
                to.copy_from_slice(from);
            }
        }
    }

    fn at(&self, x: u32, y: u32) -> usize {
        (y as usize * self.width as usize + x as usize) * PIXEL_BYTES
    }
}

/// Bytes of a picture of this size.
#[must_use]
pub fn bytes((width, height): (u32, u32)) -> usize {
    (width as usize).saturating_mul(height as usize).saturating_mul(PIXEL_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_outside_is_left_out() {
        let mut picture = Picture::black((3, 2));
        let pixels: Vec<u8> = (1..=16).collect();
        let rect = Rect { x: 2, y: 1, width: 2, height: 2 };
        assert_eq!(picture.draw(rect, &pixels), Some(Rect { x: 2, y: 1, width: 1, height: 1 }));
        let mut out = vec![9; 3];
        picture.read(rect, &mut out);
        assert_eq!(out, [1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(picture.draw(Rect { x: 3, ..rect }, &pixels), None);
        assert_eq!(picture.pixels()[..20], [0; 20]);
    }
}
