//! What is told to a viewer: updates of its picture, and what is new about its size and its pointer.

use atoll_protocol::display::{CURSOR_BYTES, CURSOR_SIDE, Rect};

use super::encoding;
use super::format::{PIXEL, PixelFormat};
use super::tight::{PIXELS_MAX, Tight, WIDTH_MAX};

/// What became of a viewer's wish for another size (ExtendedDesktopSize).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resized {
    /// Nobody here asked.
    ByOthers,
    /// It is handed on to the guest, which may or may not follow.
    Forwarded,
    /// There is nobody who could be told.
    Prohibited,
    /// The size cannot be.
    Invalid,
}

/// How pixels are told. What zlib remembers stays as long as the conversation, also while another encoding is used.
#[derive(Debug, Default)]
pub struct Coding {
    tight: Option<Box<Tight>>,
    uses_tight: bool,
}

impl Coding {
    /// Uses the best of those that a viewer has from now on.
    pub fn choose(&mut self, encodings: &[i32]) {
        let best = encodings.iter().find(|number| matches!(**number, encoding::RAW | encoding::TIGHT));
        self.uses_tight = best == Some(&encoding::TIGHT);
    }

    /// Whether pixels are told as a picture has them: what is appended behind [`Coding::put_header`] is all of it.
    #[must_use]
    pub fn is_plain(&self, format: &PixelFormat) -> bool {
        !self.uses_tight && *format == PixelFormat::NATIVE
    }

    /// Appends the header of a part whose pixels are told as they are.
    pub fn put_header(&self, rect: Rect, out: &mut Vec<u8>) {
        header(rect, encoding::RAW, out);
    }

    /// Appends one of the parts that [`parts`] makes, with its header.
    pub fn put(&mut self, format: &PixelFormat, rect: Rect, pixels: &[u8], out: &mut Vec<u8>) {
        if self.uses_tight {
            header(rect, encoding::TIGHT, out);
            self.tight.get_or_insert_default().put(format, rect.width, pixels, out);
        } else {
            header(rect, encoding::RAW, out);
            format.put(pixels, out);
        }
    }
}

/// Cuts rectangles to parts that are told one after the other.
#[must_use]
pub fn parts(rects: &[Rect]) -> Vec<Rect> {
    let mut parts = Vec::new();
    for rect in rects {
        for x in (0..rect.width).step_by(WIDTH_MAX as usize) {
            let width = (rect.width - x).min(WIDTH_MAX);
            let rows = (PIXELS_MAX / width.max(1)).max(1);
            for y in (0..rect.height).step_by(rows as usize) {
                let height = (rect.height - y).min(rows);
                parts.push(Rect { x: rect.x + x, y: rect.y + y, width, height });
            }
        }
    }
    parts
}

/// Begins an update of so many rectangles.
pub fn begin(rects: u16, out: &mut Vec<u8>) {
    out.extend([0, 0]);
    out.extend(rects.to_be_bytes());
}

fn header(rect: Rect, encoding: i32, out: &mut Vec<u8>) {
    for side in [rect.x, rect.y, rect.width, rect.height] {
        out.extend((side as u16).to_be_bytes());
    }
    out.extend(encoding.to_be_bytes());
}

/// The picture has this size from now on, in the old way.
pub fn put_size((width, height): (u16, u16), out: &mut Vec<u8>) {
    header(Rect { x: 0, y: 0, width: width.into(), height: height.into() }, encoding::DESKTOP_SIZE, out);
}

/// It has this size, and why.
pub fn put_extended_size((width, height): (u16, u16), why: Resized, out: &mut Vec<u8>) {
    let (reason, status) = match why {
        Resized::ByOthers => (0, 0),
        Resized::Prohibited => (1, 1),
        Resized::Invalid => (1, 3),
        Resized::Forwarded => (1, 4),
    };
    let rect = Rect { x: reason, y: status, width: width.into(), height: height.into() };
    header(rect, encoding::EXTENDED_DESKTOP_SIZE, out);
    // One screen, number 0, which is all of it.
    out.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    out.extend([width.to_be_bytes(), height.to_be_bytes()].concat());
    out.extend([0; 4]);
}

/// Keys may be told by their numbers.
pub fn put_key_offer(out: &mut Vec<u8>) {
    header(Rect::default(), encoding::QEMU_KEY, out);
}

/// What the pointer looks like; nothing, when it is not shown.
pub fn put_cursor(format: &PixelFormat, cursor: Option<(&[u8; CURSOR_BYTES], (u32, u32))>, out: &mut Vec<u8>) {
    let Some((picture, (hot_x, hot_y))) = cursor else {
        header(Rect::default(), encoding::CURSOR, out);
        return;
    };
    let (x, y) = (hot_x.min(CURSOR_SIDE - 1), hot_y.min(CURSOR_SIDE - 1));
    header(Rect { x, y, width: CURSOR_SIDE, height: CURSOR_SIDE }, encoding::CURSOR, out);
    format.put(picture, out);
    // A bit for each pixel that is there.
    for eight in picture.as_chunks::<{ 8 * PIXEL }>().0 {
        let bit = |(at, pixel): (usize, &[u8; PIXEL])| u8::from(pixel[3] >= 128) << (7 - at);
        out.push(eight.as_chunks().0.iter().enumerate().map(bit).fold(0, |bits, bit| bits | bit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::damage;

    #[test]
    fn parts_are_all_of_it_and_not_too_large() {
        let rect = Rect { x: 3, y: 5, width: 5000, height: 301 };
        let parts = parts(&[rect]);
        let pixels: u32 = parts.iter().map(|part| part.width * part.height).sum();
        assert_eq!((pixels, parts.iter().copied().reduce(damage::around)), (5000 * 301, Some(rect)));
        assert!(parts.iter().all(|part| part.width <= WIDTH_MAX && part.width * part.height <= PIXELS_MAX));
    }

    #[test]
    fn a_pointer_has_a_mask() {
        let mut picture = [0; CURSOR_BYTES];
        picture[4..8].copy_from_slice(&[1, 2, 3, 255]);
        let mut out = Vec::new();
        put_cursor(&PixelFormat::NATIVE, Some((&picture, (70, 2))), &mut out);
        assert_eq!(out.len(), 12 + CURSOR_BYTES + 64 * 8);
        assert_eq!((out[..4].to_vec(), out[12 + CURSOR_BYTES]), (vec![0, 63, 0, 2], 0b0100_0000));
    }
}
