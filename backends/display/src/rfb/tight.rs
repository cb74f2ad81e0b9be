//! Tight, the encoding that nearly all viewers and noVNC have: a part of one colour is told as that colour, one of a few by a
//! palette, everything else as it is; all but the shortest through zlib. Nothing is lost: there is no JPEG here.

use flate2::{Compress, Compression, FlushCompress};

use super::format::{PIXEL, PixelFormat};

/// Most columns and most pixels of a rectangle.
pub const WIDTH_MAX: u32 = 2048;
/// As above.
pub const PIXELS_MAX: u32 = 65_536;
/// Shorter data is not compressed.
const COMPRESSED_MIN: usize = 12;
/// Colours of a palette at most.
const COLOURS_MAX: usize = 256;

const FILL: u8 = 0x80;
const FILTER: u8 = 0x40;
const PALETTE: u8 = 1;
/// Streams of zlib, each of which goes on over all rectangles: for colours, for two of them, for palettes.
const FULL: usize = 0;
const MONO: usize = 1;
const INDEXED: usize = 2;

/// What a viewer's zlib streams remember.
#[derive(Debug)]
pub struct Tight {
    streams: [Compress; 3],
    room: Vec<u8>,
}

impl Default for Tight {
    fn default() -> Self {
        // Fast: who looks at a guest is near.
        let stream = || Compress::new(Compression::new(1), true);
        Self { streams: [stream(), stream(), stream()], room: Vec::new() }
    }
}

/// The colours of some pixels, as long as they are few.
struct Colours {
    list: Vec<u32>,
    /// Where each is in the list, found by a part of its value; empty places have the number beyond the last.
    places: Box<[u16; 1024]>,
}

impl Colours {
    fn of(pixels: &[u8]) -> Option<Self> {
        let mut colours = Self { list: Vec::new(), places: Box::new([u16::MAX; 1024]) };
        let mut last = None;
        for pixel in pixels.as_chunks::<PIXEL>().0 {
            let colour = colour(*pixel);
            if last == Some(colour) {
                continue;
            }
            last = Some(colour);
            let slot = colours.slot(colour);
            if colours.places.get(slot) == Some(&u16::MAX) {
                if colours.list.len() == COLOURS_MAX {
                    return None;
                }
                if let Some(place) = colours.places.get_mut(slot) {
                    *place = colours.list.len() as u16;
                }
                colours.list.push(colour);
            }
        }
        Some(colours)
    }

    /// Where this colour is, or would be.
    fn slot(&self, colour: u32) -> usize {
        let mut slot = (colour.wrapping_mul(0x9e37_79b1) >> 22) as usize;
        // There are four times as many places as colours: this ends.
        while let Some(index) = self.places.get(slot).copied().filter(|index| *index != u16::MAX) {
            if self.list.get(usize::from(index)) == Some(&colour) {
                break;
            }
            slot = (slot + 1) % self.places.len();
        }
        slot
    }

    fn index(&self, pixel: [u8; PIXEL]) -> u8 {
        self.places.get(self.slot(colour(pixel))).map_or(0, |index| *index as u8)
    }
}

/// A pixel without its fourth byte.
fn colour([blue, green, red, _]: [u8; PIXEL]) -> u32 {
    u32::from_le_bytes([blue, green, red, 0])
}

impl Tight {
    /// Appends a rectangle of `width` columns, which has at most [`WIDTH_MAX`] of them and [`PIXELS_MAX`] pixels.
    pub fn put(&mut self, format: &PixelFormat, width: u32, pixels: &[u8], out: &mut Vec<u8>) {
        let mut room = std::mem::take(&mut self.room);
        room.clear();
        let stream = match Colours::of(pixels) {
            Some(Colours { list, .. }) if list.len() <= 1 => {
                out.push(FILL);
                format.put_tight(pixels.get(..PIXEL).unwrap_or(&[0; PIXEL]), out);
                self.room = room;
                return;
            }
            Some(colours) => {
                let stream = if colours.list.len() == 2 { MONO } else { INDEXED };
                out.extend([FILTER | (stream as u8) << 4, PALETTE, (colours.list.len() - 1) as u8]);
                let palette: Vec<u8> = colours.list.iter().flat_map(|colour| colour.to_le_bytes()).collect();
                format.put_tight(&palette, out);
                if stream == MONO {
                    for row in pixels.chunks(width as usize * PIXEL) {
                        for eight in row.chunks(8 * PIXEL) {
                            let bit = |(at, pixel): (usize, &[u8; PIXEL])| colours.index(*pixel) << (7 - at);
                            room.push(eight.as_chunks().0.iter().enumerate().map(bit).fold(0, |bits, bit| bits | bit));
                        }
                    }
                } else {
                    room.extend(pixels.as_chunks().0.iter().map(|pixel| colours.index(*pixel)));
                }
                stream
            }
            None => {
                out.push((FULL as u8) << 4);
                format.put_tight(pixels, &mut room);
                FULL
            }
        };
        self.compress(stream, &room, out);
        self.room = room;
    }

    fn compress(&mut self, stream: usize, data: &[u8], out: &mut Vec<u8>) {
        if data.len() < COMPRESSED_MIN {
            out.extend_from_slice(data);
            return;
        }
        let Some(stream) = self.streams.get_mut(stream) else { return };
        // The length comes first, in three bytes that are always as many.
        let at = out.len();
        out.extend([0; 3]);
        let begun = stream.total_in();
        loop {
            out.reserve(data.len() / 2 + 256);
            let rest = data.get((stream.total_in() - begun) as usize..).unwrap_or_default();
            let (had, room) = (out.len(), out.capacity());
            let moved = stream.compress_vec(rest, out, FlushCompress::Sync);
            // All is taken, and told when there is room left.
            let is_whole = stream.total_in() - begun == data.len() as u64 && out.len() < room;
            if is_whole || moved.is_err() || out.len() == had {
                break;
            }
        }
        let len = out.len() - at - 3;
        let bytes = [len as u8 & 0x7f | 0x80, (len >> 7) as u8 & 0x7f | 0x80, (len >> 14) as u8];
        if let Some(to) = out.get_mut(at..at + 3) {
            to.copy_from_slice(&bytes);
        }
    }
}
