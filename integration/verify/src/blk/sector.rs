//! A sector's contents: who wrote it, in which operation, for which place, and data that follows from these.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 8 | run |
//! | 16 | 8 | LBA |
//! | 24 | 8 | operation |
//! | 32 | 4 | epoch |
//! | 36 | 2 | writer |
//! | 40 | 4 | CRC-32 of the bytes before it |
//! | 48 | 464 | data from a generator seeded by run, LBA and operation |
//!
//! Two more patterns exist: what a buffer is filled with before a read and after any completion ("poison", by
//! operation), and zeroes.

use crate::dice::{Dice, mix};

/// Bytes of a sector.
pub const SECTOR: usize = 512;

const MAGIC: u64 = u64::from_le_bytes(*b"AtollSec");
const POISON: u64 = 0xdead_5ec7_0000_0000;
const CRC_AT: usize = 40;
const DATA_AT: usize = 48;

/// Who wrote a sector, and for which place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The run.
    pub run: u64,
    /// The place.
    pub lba: u64,
    /// The operation.
    pub op: u64,
    /// Incarnations of the peer before it.
    pub epoch: u32,
    /// The writer.
    pub writer: u16,
}

/// What a sector was found to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Seen {
    /// Nothing but zeroes.
    Zero,
    /// What this operation wrote to this place.
    Op(u64),
    /// The poison of this operation's buffer.
    Poison(u64),
    /// It begins as this operation wrote it and goes on differently from this byte on.
    Torn(u64, u16),
    /// What this operation wrote to another place.
    Misplaced(u64, u64),
    /// What another run wrote.
    Foreign(u64),
    /// None of these.
    Corrupt,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// The sector that an operation writes.
pub fn stamp(stamp: &Stamp) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_le_bytes());
    put(8, &stamp.run.to_le_bytes());
    put(16, &stamp.lba.to_le_bytes());
    put(24, &stamp.op.to_le_bytes());
    put(32, &stamp.epoch.to_le_bytes());
    put(36, &stamp.writer.to_le_bytes());
    let crc = crc32fast::hash(&sector[..CRC_AT]);
    sector[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    let mut dice = data(stamp);
    for chunk in sector[DATA_AT..].chunks_exact_mut(8) {
        chunk.copy_from_slice(&dice.word().to_le_bytes());
    }
    sector
}

fn data(stamp: &Stamp) -> Dice {
    Dice::new(mix(mix(stamp.run, stamp.lba), stamp.op))
}

/// Fills a buffer with the poison of an operation.
pub fn poison(buffer: &mut [u8], op: u64) {
    let pattern = poison_word(op).to_le_bytes();
    for chunk in buffer.chunks_mut(8) {
        let len = chunk.len();
        chunk.copy_from_slice(&pattern[..len]);
    }
}

fn poison_word(op: u64) -> u64 {
    POISON | (op & 0xffff_ffff)
}

/// True when the buffer still holds nothing but the poison of this operation.
pub fn is_poison(buffer: &[u8], op: u64) -> bool {
    let pattern = poison_word(op).to_le_bytes();
    buffer.chunks(8).all(|chunk| chunk == &pattern[..chunk.len()])
}

/// Says what the sector that was read from `lba` in run `run` holds.
pub fn decode(sector: &[u8], run: u64, lba: u64) -> Seen {
    let first = word(sector, 0);
    if first == MAGIC {
        let crc = word(sector, CRC_AT) as u32;
        if crc32fast::hash(sector.get(..CRC_AT).unwrap_or_default()) != crc || word(sector, CRC_AT) >> 32 != 0 {
            return Seen::Corrupt;
        }
        let found = Stamp {
            run: word(sector, 8),
            lba: word(sector, 16),
            op: word(sector, 24),
            epoch: word(sector, 32) as u32,
            writer: (word(sector, 32) >> 32) as u16,
        };
        let mut dice = data(&found);
        let differs = sector.get(DATA_AT..).unwrap_or_default().chunks_exact(8).position(|c| word(c, 0) != dice.word());
        return match differs {
            _ if found.run != run => Seen::Foreign(found.run),
            Some(at) => Seen::Torn(found.op, (DATA_AT + 8 * at) as u16),
            None if found.lba != lba => Seen::Misplaced(found.op, found.lba),
            None => Seen::Op(found.op),
        };
    }
    if first >> 32 == POISON >> 32 && is_poison(sector, first & 0xffff_ffff) {
        return Seen::Poison(first & 0xffff_ffff);
    }
    if sector.iter().all(|byte| *byte == 0) { Seen::Zero } else { Seen::Corrupt }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Stamp = Stamp { run: 7, lba: 100, op: 42, epoch: 3, writer: 2 };

    #[test]
    fn a_sector_tells_what_happened_to_it() {
        let good = stamp(&AT);
        let other = stamp(&Stamp { op: 43, ..AT });
        assert_eq!(decode(&good, 7, 100), Seen::Op(42));
        assert_eq!(decode(&good, 7, 101), Seen::Misplaced(42, 100));
        assert_eq!(decode(&good, 8, 100), Seen::Foreign(7));
        let mut torn = good;
        torn[256..].copy_from_slice(&other[256..]);
        assert_eq!(decode(&torn, 7, 100), Seen::Torn(42, 256));
        let mut flipped = good;
        flipped[20] ^= 1;
        assert_eq!(decode(&flipped, 7, 100), Seen::Corrupt);
        assert_eq!(decode(&[0; SECTOR], 7, 100), Seen::Zero);
        let mut buffer = [0; SECTOR];
        poison(&mut buffer, 9);
        assert_eq!(decode(&buffer, 7, 100), Seen::Poison(9));
        assert!(is_poison(&buffer, 9) && !is_poison(&buffer, 8));
        buffer[511] = 0;
        assert_eq!(decode(&buffer, 7, 100), Seen::Corrupt);
    }

    /// A sector that was overwritten from its end: the head is the old one. From its start: the data gives it away.
    #[test]
    fn every_bit_of_a_sector_is_checked() {
        let good = stamp(&AT);
        for bit in 0..SECTOR * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(decode(&bad, 7, 100), Seen::Op(42), "bit {bit}");
        }
    }
}
