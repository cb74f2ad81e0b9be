//! A head's picture as the device has told it: blue, green, red and nothing for each pixel, row by row.

use atoll_protocol::display::{PIXEL_BYTES, Rect, pixel_bytes};

use crate::damage;

/// A picture.
#[derive(Clone, Debug, Default)]
pub struct Picture {
    width: u32,
    height: u32,
    /// The pixels, behind what stood before them in the message that brought them.
    bytes: Vec<u8>,
    from: usize,
}

impl Picture {
    /// A black one.
    #[must_use]
    pub fn black((width, height): (u32, u32)) -> Self {
        Self { width, height, bytes: vec![0; pixel_bytes(damage::whole((width, height)))], from: 0 }
    }

    /// Columns and rows.
    #[must_use]
    pub fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// All pixels.
    #[must_use]
    pub fn pixels(&self) -> &[u8] {
        self.bytes.get(self.from..).unwrap_or_default()
    }

    /// The picture of this size that a message brings, if its bytes from `from` on are the pixels of all of it: they are taken
    /// as they are, without a copy.
    pub fn whole(size: (u32, u32), rect: Rect, message: &mut Vec<u8>, from: usize) -> Option<Self> {
        let is_whole = rect == damage::whole(size) && message.len().checked_sub(from) == Some(pixel_bytes(rect));
        is_whole.then(|| Self { width: size.0, height: size.1, bytes: std::mem::take(message), from })
    }

    /// The room that it had.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Takes the pixels of `rect`, row by row; what lies outside is left out. What has changed, if anything.
    pub fn draw(&mut self, rect: Rect, pixels: &[u8]) -> Option<Rect> {
        let part = damage::shared(rect, damage::whole(self.size()))?;
        let from_row = rect.width as usize * PIXEL_BYTES;
        let left = (part.x - rect.x) as usize * PIXEL_BYTES;
        let len = part.width as usize * PIXEL_BYTES;
        let rows = pixels.chunks_exact(from_row).skip((part.y - rect.y) as usize);
        for (from, y) in rows.zip(part.y..part.y + part.height) {
            let at = self.from + self.at(part.x, y);
            if let (Some(to), Some(from)) = (self.bytes.get_mut(at..at + len), from.get(left..left + len)) {
                to.copy_from_slice(from);
            }
        }
        Some(part)
    }

    /// The pixels of a part that is as wide as the picture: they lie one behind the other.
    #[must_use]
    pub fn rows(&self, rect: Rect) -> Option<&[u8]> {
        let is_wide = rect.x == 0 && rect.width == self.width;
        let at = self.at(0, rect.y);
        self.pixels().get(at..at + pixel_bytes(rect)).filter(|_| is_wide)
    }

    /// Appends the pixels of `rect` to `out`, row by row; those that are not there are black.
    pub fn append(&self, rect: Rect, out: &mut Vec<u8>) {
        let (pixels, row) = (self.pixels(), rect.width as usize * PIXEL_BYTES);
        let part = damage::shared(rect, damage::whole(self.size()));
        out.reserve(pixel_bytes(rect));
        if part == Some(rect) {
            // Rows without gaps are one.
            let (rows, len) =
                if rect.width == self.width { (1, row * rect.height as usize) } else { (rect.height, row) };
            for y in rect.y..rect.y + rows {
                let at = self.at(rect.x, y);
                out.extend_from_slice(pixels.get(at..at + len).unwrap_or_default());
            }
            return;
        }
        let start = out.len();
        out.resize(start + pixel_bytes(rect), 0);
        let Some(part) = part else { return };
        let left = (part.x - rect.x) as usize * PIXEL_BYTES;
        let len = part.width as usize * PIXEL_BYTES;
        let room = out.get_mut(start..).unwrap_or_default();
        let rows = room.chunks_exact_mut(row).skip((part.y - rect.y) as usize);
        for (to, y) in rows.zip(part.y..part.y + part.height) {
            let at = self.at(part.x, y);
            if let (Some(to), Some(from)) = (to.get_mut(left..left + len), pixels.get(at..at + len)) {
                to.copy_from_slice(from);
            }
        }
    }

    fn at(&self, x: u32, y: u32) -> usize {
        (y as usize * self.width as usize + x as usize) * PIXEL_BYTES
    }
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
        picture.append(rect, &mut out);
        assert_eq!(out, [9, 9, 9, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(picture.draw(Rect { x: 3, ..rect }, &pixels), None);
        assert_eq!(picture.pixels()[..20], [0; 20]);
    }

    /// A message of the whole picture becomes the picture, and parts are drawn on it and read from it as on any other.
    #[test]
    fn a_whole_picture_is_not_copied() {
        const SIZE: (u32, u32) = (2, 2);
        let whole = damage::whole(SIZE);
        let mut message: Vec<u8> = (0..20).collect();
        let there = message.as_ptr();
        let mut picture = Picture::whole(SIZE, whole, &mut message, 4).unwrap();
        assert_eq!((picture.pixels().as_ptr(), message.len()), (there.wrapping_add(4), 0));
        let right = Rect { x: 1, width: 1, ..whole };
        assert_eq!(picture.draw(right, &[91, 92, 93, 94, 95, 96, 97, 98]), Some(right));
        assert_eq!(picture.pixels(), [4, 5, 6, 7, 91, 92, 93, 94, 12, 13, 14, 15, 95, 96, 97, 98]);
        let mut out = Vec::new();
        picture.append(right, &mut out);
        let lower = Rect { y: 1, height: 1, ..whole };
        picture.append(lower, &mut out);
        assert_eq!((picture.rows(lower), picture.rows(right)), (out.get(8..), None));
        assert_eq!(picture.rows(Rect { y: 1, ..whole }), None);
        assert_eq!(out, [91, 92, 93, 94, 95, 96, 97, 98, 12, 13, 14, 15, 95, 96, 97, 98]);
        let room = picture.into_bytes();
        assert_eq!(room.as_ptr(), there);
        let mut message = vec![0; 15];
        assert!(Picture::whole(SIZE, whole, &mut message, 0).is_none(), "what is too short is no picture");
        assert!(Picture::whole(SIZE, right, &mut vec![0; 8], 0).is_none(), "a part is not all of it");
        assert_eq!(message.len(), 15);
    }
}
