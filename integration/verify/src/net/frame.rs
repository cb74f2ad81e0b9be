//! A frame of a stream: Ethernet with the ethertype for local experiments.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 14 | destination, source, ethertype 0x88b5 |
//! | 14 | 4 | magic |
//! | 18 | 4 | CRC-32 of the whole frame with this field zero |
//! | 22 | 8 | run |
//! | 30 | 2 | bytes of the frame |
//! | 32 | 1 | speaker |
//! | 33 | 1 | 0: a word of the stream, 1: the last one, 2: a greeting before the first |
//! | 34 | 8 | number |
//! | 42 | 8 | frames of the other stream up to the highest that was heard |
//! | 50 | | data from a generator seeded by run, speaker and number |

use crate::dice::{Dice, mix};

/// The ethertype.
pub const ETHERTYPE: u16 = 0x88b5;
/// Shortest frame, without its check sequence.
pub const FRAME_MIN: usize = 60;
/// Longest.
pub const FRAME_MAX: usize = 1514;

const MAGIC: u32 = u32::from_le_bytes(*b"AtNe");
const DATA_AT: usize = 50;

/// A frame's part in the conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// One of the stream.
    Word = 0,
    /// One of the stream, after which there is nothing new.
    Last = 1,
    /// Before the stream, which begins when the other end is known to listen.
    Greeting = 2,
}

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    /// The run.
    pub run: u64,
    /// Who speaks: 0 or 1.
    pub speaker: u8,
    /// Its part in the conversation.
    pub part: Part,
    /// Its number in the stream.
    pub number: u64,
    /// Frames of the other stream up to the highest that was heard.
    pub heard: u64,
}

/// What a frame that came turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// A whole frame of some run.
    Whole(Said),
    /// It has our ethertype and is not as it was sent.
    Corrupted,
    /// Somebody else's.
    Other,
}

/// A MAC address, locally administered, for a speaker.
pub fn address(speaker: u8) -> [u8; 6] {
    [0x02, 0x61, 0x74, 0x6f, 0x6c, speaker]
}

/// Bytes of frame `number`: mostly the extremes, which is where lengths go wrong.
pub fn bytes(run: u64, speaker: u8, number: u64) -> usize {
    let mut dice = Dice::new(mix(mix(run, number), 0x6c65_6e00 | u64::from(speaker)));
    match dice.below(4) {
        0 => FRAME_MIN,
        1 => FRAME_MAX,
        _ => FRAME_MIN + dice.below((FRAME_MAX - FRAME_MIN + 1) as u64) as usize,
    }
}

fn data(said: &Said) -> Dice {
    Dice::new(mix(mix(said.run, said.number), said.speaker.into()))
}

/// The frame that says this, from `source` to `destination`.
pub fn frame(said: &Said, source: [u8; 6], destination: [u8; 6]) -> Vec<u8> {
    let mut out = vec![0; bytes(said.run, said.speaker, said.number)];
    let len = out.len() as u16;
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &destination);
    put(6, &source);
    put(12, &ETHERTYPE.to_be_bytes());
    put(14, &MAGIC.to_le_bytes());
    put(22, &said.run.to_le_bytes());
    put(30, &len.to_le_bytes());
    put(32, &[said.speaker, said.part as u8]);
    put(34, &said.number.to_le_bytes());
    put(42, &said.heard.to_le_bytes());
    let mut dice = data(said);
    for chunk in out[DATA_AT..].chunks_mut(8) {
        chunk.copy_from_slice(&dice.word().to_le_bytes()[..chunk.len()]);
    }
    let crc = crc32fast::hash(&out);
    out[18..22].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Says what a frame is.
pub fn decode(frame: &[u8]) -> Came {
    if frame.get(12..14) != Some(&ETHERTYPE.to_be_bytes()) {
        return Came::Other;
    }
    parse(frame).map_or(Came::Corrupted, Came::Whole)
}

fn parse(frame: &[u8]) -> Option<Said> {
    let four = |at: usize| frame.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let eight = |at: usize| frame.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let mut crc = crc32fast::Hasher::new();
    crc.update(frame.get(..18)?);
    crc.update(&[0; 4]);
    crc.update(frame.get(22..)?);
    let said = Said {
        run: eight(22)?,
        speaker: *frame.get(32)?,
        part: match frame.get(33)? {
            0 => Part::Word,
            1 => Part::Last,
            2 => Part::Greeting,
            _ => return None,
        },
        number: eight(34)?,
        heard: eight(42)?,
    };
    let len = usize::from(u16::from_le_bytes(frame.get(30..32)?.try_into().ok()?));
    let mut dice = data(&said);
    let good = four(14)? == MAGIC
        && four(18)? == crc.finalize()
        && len == frame.len()
        && frame.get(DATA_AT..)?.chunks(8).all(|chunk| chunk == &dice.word().to_le_bytes()[..chunk.len()]);
    good.then_some(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_what_was_said_or_it_is_corrupted() {
        for number in 0..50 {
            let said =
                Said { run: 5, speaker: 1, part: if number == 7 { Part::Last } else { Part::Word }, number, heard: 3 };
            let good = frame(&said, address(1), address(0));
            assert!((FRAME_MIN..=FRAME_MAX).contains(&good.len()));
            assert_eq!(decode(&good), Came::Whole(said));
            for at in (0..good.len()).step_by(7).filter(|at| !(12..14).contains(at)) {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                assert_eq!(decode(&bad), Came::Corrupted, "byte {at}");
            }
            assert_eq!(decode(&good[..good.len() - 1]), Came::Corrupted);
            assert_eq!(decode(&[&good[..], &[0]].concat()), Came::Corrupted);
            assert_eq!(decode(&good[..13]), Came::Other);
        }
    }
}
