//! What a viewer says once it is let in (RFC 6143, 7.5), taken from a stream of bytes. Nothing is kept that is longer than
//! the longest message that means something: texts of clipboards are skipped as they come.

use atoll_protocol::display::Rect;

use super::RfbError;
use super::format::PixelFormat;

/// Encodings that one message may name; those behind them are skipped.
const ENCODINGS_MAX: usize = 256;
/// The longest text that is skipped.
const TEXT_MAX: u32 = 1 << 20;

/// A word of a viewer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ViewerMessage {
    /// How it wants its pixels.
    Format(PixelFormat),
    /// What it understands, the best first.
    Encodings(Vec<i32>),
    /// It wants to see this, or what has changed of it.
    Update {
        /// What it has is right.
        incremental: bool,
        /// What it asks for.
        area: Rect,
    },
    /// A key, by what is printed on it.
    Symbol {
        /// Of X11.
        keysym: u32,
        /// It goes down.
        down: bool,
    },
    /// A key, by its number on a PC's keyboard (and what is printed on it).
    Key {
        /// Of X11.
        keysym: u32,
        /// Scan code of set 1; a prefix 0xe0 is its highest bit.
        scancode: u32,
        /// It goes down.
        down: bool,
    },
    /// Where the pointer is, and its buttons.
    Pointer {
        /// A bit each.
        buttons: u8,
        /// Column.
        x: u16,
        /// Row.
        y: u16,
    },
    /// It wants the picture to be as large.
    Resize {
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Something that is taken and not used.
    Ignored,
}

const SET_FORMAT: u8 = 0;
const SET_ENCODINGS: u8 = 2;
const UPDATE: u8 = 3;
const KEY: u8 = 4;
const POINTER: u8 = 5;
const CUT_TEXT: u8 = 6;
const SET_SIZE: u8 = 251;
const QEMU: u8 = 255;

/// Takes messages from bytes as they come.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    at: usize,
    /// Bytes that are of no interest.
    skip: usize,
}

impl Decoder {
    /// More bytes have come.
    pub fn push(&mut self, bytes: &[u8]) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        self.bytes.drain(..std::mem::take(&mut self.at));
        self.bytes.extend_from_slice(bytes.get(skipped..).unwrap_or_default());
    }

    /// Bytes that wait for more.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next message, if it is whole.
    ///
    /// # Errors
    /// [`RfbError`]; then nothing behind it can be understood.
    pub fn take(&mut self) -> Result<Option<ViewerMessage>, RfbError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some((message, len)) = decode(rest)? else { return Ok(None) };
        // What is longer than what has come is skipped when it comes.
        let here = len.min(rest.len());
        self.skip = len - here;
        self.at += here;
        Ok(Some(message))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// The message in front and how long it is, which may be more than has come.
fn decode(bytes: &[u8]) -> Result<Option<(ViewerMessage, usize)>, RfbError> {
    let Some(kind) = bytes.first().copied() else { return Ok(None) };
    Ok(match kind {
        SET_FORMAT => match bytes.get(4..20).and_then(|bytes| bytes.first_chunk()) {
            Some(format) => Some((ViewerMessage::Format(PixelFormat::decode(format)?), 20)),
            None => None,
        },
        SET_ENCODINGS => encodings(bytes),
        UPDATE => update(bytes),
        KEY => u32_at(bytes, 4)
            .map(|keysym| (ViewerMessage::Symbol { keysym, down: bytes.get(1).is_some_and(|down| *down != 0) }, 8)),
        POINTER => match *bytes {
            [_, buttons, x0, x1, y0, y1, ..] => {
                let (x, y) = (u16::from_be_bytes([x0, x1]), u16::from_be_bytes([y0, y1]));
                Some((ViewerMessage::Pointer { buttons, x, y }, 6))
            }
            _ => None,
        },
        CUT_TEXT => match u32_at(bytes, 4) {
            None => None,
            // One that is negative is of an extension that nobody agreed on.
            Some(len) if len > TEXT_MAX => {
                return Err(RfbError::Value { message: kind, what: "the length of a text", value: len });
            }
            Some(len) => Some((ViewerMessage::Ignored, 8 + len as usize)),
        },
        SET_SIZE => match (bytes.get(6), u16_at(bytes, 2), u16_at(bytes, 4)) {
            (Some(screens), Some(width), Some(height)) => {
                Some((ViewerMessage::Resize { width, height }, 8 + 16 * usize::from(*screens)))
            }
            _ => None,
        },
        QEMU => match bytes.get(1) {
            None => None,
            Some(0) => match (u16_at(bytes, 2), u32_at(bytes, 4), u32_at(bytes, 8)) {
                (Some(down), Some(keysym), Some(scancode)) => {
                    Some((ViewerMessage::Key { keysym, scancode, down: down != 0 }, 12))
                }
                _ => None,
            },
            Some(other) => {
                return Err(RfbError::Value { message: kind, what: "its kind", value: u32::from(*other) });
            }
        },
        other => return Err(RfbError::Message(other)),
    })
}

fn encodings(bytes: &[u8]) -> Option<(ViewerMessage, usize)> {
    let count = usize::from(u16_at(bytes, 2)?);
    let known = count.min(ENCODINGS_MAX);
    let list = bytes.get(4..4 + 4 * known)?;
    let list = list.as_chunks::<4>().0.iter().map(|bytes| i32::from_be_bytes(*bytes)).collect();
    Some((ViewerMessage::Encodings(list), 4 + 4 * count))
}

fn update(bytes: &[u8]) -> Option<(ViewerMessage, usize)> {
    let field = |at| u16_at(bytes, at).map(u32::from);
    let area = Rect { x: field(2)?, y: field(4)?, width: field(6)?, height: field(8)? };
    let incremental = bytes.get(1).is_some_and(|incremental| *incremental != 0);
    Some((ViewerMessage::Update { incremental, area }, 10))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(bytes: &[u8], piece: usize) -> Result<Vec<ViewerMessage>, RfbError> {
        let (mut decoder, mut heard) = (Decoder::default(), Vec::new());
        for piece in bytes.chunks(piece) {
            decoder.push(piece);
            while let Some(message) = decoder.take()? {
                heard.push(message);
            }
        }
        Ok(heard)
    }

    /// One of each, in pieces of any length.
    #[test]
    fn words_are_found_in_any_pieces() {
        let mut bytes = vec![0, 0, 0, 0];
        bytes.extend(PixelFormat::NATIVE.encode());
        bytes.extend([2, 0, 0, 2, 0, 0, 0, 7, 255, 255, 255, 33]);
        bytes.extend([3, 1, 0, 1, 0, 2, 0, 3, 0, 4]);
        bytes.extend([6, 0, 0, 0, 0, 0, 0, 30]);
        bytes.extend([3; 30]);
        bytes.extend([4, 1, 0, 0, 0, 0, 0, 97, 5, 3, 1, 0, 0, 9]);
        bytes.extend([251, 0, 3, 32, 2, 88, 1, 0]);
        bytes.extend([5; 16]);
        bytes.extend([255, 0, 0, 1, 0, 0, 255, 13, 0, 0, 0, 28]);
        let expected = [
            ViewerMessage::Format(PixelFormat::NATIVE),
            ViewerMessage::Encodings(vec![7, -223]),
            ViewerMessage::Update { incremental: true, area: Rect { x: 1, y: 2, width: 3, height: 4 } },
            ViewerMessage::Ignored,
            ViewerMessage::Symbol { keysym: 97, down: true },
            ViewerMessage::Pointer { buttons: 3, x: 256, y: 9 },
            ViewerMessage::Resize { width: 800, height: 600 },
            ViewerMessage::Key { keysym: 0xff0d, scancode: 28, down: true },
        ];
        for piece in [1, 2, 3, 7, 64, 1000] {
            assert_eq!(all(&bytes, piece).unwrap(), expected, "{piece}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(all(&[1], 9), Err(RfbError::Message(1)));
        assert!(all(&[6, 0, 0, 0, 255, 255, 255, 255], 9).is_err());
        assert!(all(&[255, 1], 9).is_err());
        let mut long = vec![2, 0, 255, 255];
        long.extend(vec![0; 4 * 65535]);
        long.extend([5, 0, 0, 0, 0, 0]);
        let heard = all(&long, 4096).unwrap();
        assert!(
            matches!(&heard[..], [ViewerMessage::Encodings(list), ViewerMessage::Pointer { .. }] if list.len() == 256)
        );
    }

    proptest! {
        /// Whatever comes: no panic, little is kept, and pieces make no difference.
        #[test]
        fn anything_may_come(bytes in prop::collection::vec(prop_oneof![0_u8..7, any::<u8>()], 0..400), piece in 1_usize..50) {
            let whole = all(&bytes, bytes.len().max(1));
            prop_assert_eq!(all(&bytes, piece), whole);
        }
    }
}
