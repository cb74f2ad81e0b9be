//! What must be zero in guest memory when a kernel starts, also when a reset has left RAM as it was: the first mebibyte,
//! in which firmware would have worked and where everything is written anew, and what an ELF file asks to be zero.
//!
//! Only what is not zero is written: where nothing has been, no backend sees a page change.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::place;

/// Bytes written at once.
const PIECE: usize = 1 << 16;
/// `PT_LOAD` (System V ABI, 5).
const LOADABLE: u32 = 1;
/// Bytes of an ELF64 program header.
const PROGRAM_HEADER: usize = 56;

/// Zeroes `len` bytes at `start`, as far as RAM goes.
fn zero(memory: &GuestMemoryMmap, start: u64, len: u64) {
    let zeroes = [0; PIECE];
    let mut found = [0; PIECE];
    let end = start.saturating_add(len);
    let mut at = start;
    while at < end {
        let piece = (end - at).min(PIECE as u64) as usize;
        let (Some(found), Some(zeroes)) = (found.get_mut(..piece), zeroes.get(..piece)) else { return };
        // Outside RAM there is nothing to zero; the loader says what does not fit.
        let is_there = memory.read_slice(found, GuestAddress(at)).is_ok();
        if is_there && found != zeroes {
            let _ = memory.write_slice(zeroes, GuestAddress(at));
        }
        at += piece as u64;
    }
}

/// Where firmware would have worked.
pub fn low_memory(memory: &GuestMemoryMmap) {
    zero(memory, 0, place::HIGH_MEMORY);
}

/// The parts of loadable segments that the file has no bytes for. The file is one that has been loaded: what cannot be
/// read of it here the loader would have refused.
pub(super) fn unfilled(file: &File, memory: &GuestMemoryMmap, ram_end: u64) {
    let mut header = [0; 64];
    if file.read_exact_at(&mut header, 0).is_err() {
        return;
    }
    let half = |at: usize| header.get(at..at + 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    let table = long(&header, 32);
    for index in 0..u64::from(half(56)) {
        let mut entry = [0; PROGRAM_HEADER];
        let at = table.saturating_add(index * PROGRAM_HEADER as u64);
        if file.read_exact_at(&mut entry, at).is_err() {
            return;
        }
        if long(&entry, 0) as u32 != LOADABLE {
            continue;
        }
        let (address, in_file, in_memory) = (long(&entry, 24), long(&entry, 32), long(&entry, 40));
        let start = address.saturating_add(in_file);
        let end = address.saturating_add(in_memory).min(ram_end);
        zero(memory, start, end.saturating_sub(start));
    }
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A kernel whose BSS was full of its earlier life's data would start with it after a reset.
    #[test]
    fn a_second_life_finds_zeroes_where_it_must() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        memory.write_slice(&vec![0x5a; 4 << 20], GuestAddress(0)).unwrap();
        let mut elf = vec![0; 64 + PROGRAM_HEADER];
        elf[32..40].copy_from_slice(&64_u64.to_le_bytes());
        elf[56..58].copy_from_slice(&1_u16.to_le_bytes());
        elf[64] = LOADABLE as u8;
        for (at, value) in [(24, 0x20_0000_u64), (32, 0x1001), (40, 0x2_3000)] {
            elf[64 + at..64 + at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&elf).unwrap();
        low_memory(&memory);
        unfilled(&file, &memory, 4 << 20);
        let byte = |at: u64| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!(
            [0, 0xf_ffff, 0x10_0000, 0x20_1000, 0x20_1001, 0x22_2fff, 0x22_3000].map(byte),
            [0, 0, 0x5a, 0x5a, 0, 0, 0x5a]
        );
        // Absurd sizes end where RAM does.
        elf[64 + 40..64 + 48].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut absurd = tempfile::tempfile().unwrap();
        absurd.write_all(&elf).unwrap();
        unfilled(&absurd, &memory, 4 << 20);
        assert_eq!(byte((4 << 20) - 1), 0);
    }
}
