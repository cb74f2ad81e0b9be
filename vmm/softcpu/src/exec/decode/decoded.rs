//! Instructions that were decoded alone: those that no block holds because they cross into another frame, and those that
//! a block's op hands to the general interpreter. A kernel comes by the same ones again and again.
//!
//! An entry is found by the very bytes that it was decoded from, so that it can never be stale.

use iced_x86::Instruction;

use super::super::Mode;

/// Entries.
const ENTRIES: usize = 256;
/// No instruction is longer.
const LONGEST: usize = 15;

#[derive(Clone, Copy)]
struct Entry {
    rip: u64,
    mode: Mode,
    /// The instruction's own bytes; zeros behind.
    bytes: [u8; LONGEST],
    /// Not valid in an entry that was never filled.
    insn: Instruction,
}

/// The latest ones, each in the only place where it may be.
pub(crate) struct Decoded(Box<[Entry]>);

impl Decoded {
    pub(crate) fn new() -> Self {
        let none = Entry { rip: 0, mode: Mode::Bits16, bytes: [0; LONGEST], insn: Instruction::default() };
        Self(vec![none; ENTRIES].into_boxed_slice())
    }

    fn index(rip: u64) -> usize {
        (rip ^ (rip >> 8)) as usize % ENTRIES
    }

    /// The instruction at `rip`, if it was decoded from the first of these bytes.
    pub(crate) fn get(&self, rip: u64, mode: Mode, bytes: &[u8]) -> Option<Instruction> {
        let entry = self.0.get(Self::index(rip))?;
        let len = entry.insn.len();
        let same = entry.rip == rip && entry.mode == mode && len > 0 && bytes.get(..len) == entry.bytes.get(..len);
        same.then_some(entry.insn)
    }

    /// Keeps an instruction that was decoded from the first of these bytes. One that is invalid has no length and is
    /// not kept.
    pub(crate) fn put(&mut self, mode: Mode, bytes: &[u8], insn: &Instruction) {
        let Some(used) = bytes.get(..insn.len()).filter(|used| !used.is_empty()) else { return };
        let mut kept = [0; LONGEST];
        if let (Some(entry), Some(to)) = (self.0.get_mut(Self::index(insn.ip())), kept.get_mut(..used.len())) {
            to.copy_from_slice(used);
            *entry = Entry { rip: insn.ip(), mode, bytes: kept, insn: *insn };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Code is written over in place: what was decoded before must not come back.
    #[test]
    fn other_bytes_another_place_or_another_width_are_another_instruction() {
        const RIP: u64 = 0xffff_ffff_8100_0ffe;
        let code = [0x48, 0x89, 0xd8, 0x90];
        let decode = |bytes: &[u8]| iced_x86::Decoder::with_ip(64, bytes, RIP, 0).decode();
        let mut decoded = Decoded::new();
        assert_eq!(decoded.get(RIP, Mode::Bits64, &code), None);
        decoded.put(Mode::Bits64, &code, &decode(&code));
        assert_eq!(decoded.get(RIP, Mode::Bits64, &code), Some(decode(&code)));
        assert_eq!(decoded.get(RIP, Mode::Bits64, &code[..3]), Some(decode(&code)), "what follows is of no account");
        assert_eq!(decoded.get(RIP, Mode::Bits64, &code[..2]), None, "not all of it is there");
        assert_eq!(decoded.get(RIP, Mode::Bits64, &[0x48, 0x89, 0xd9, 0x90]), None);
        assert_eq!(decoded.get(RIP, Mode::Bits32, &code), None);
        assert_eq!(decoded.get(RIP + 1, Mode::Bits64, &code), None);
        decoded.put(Mode::Bits64, &[], &Instruction::default());
        assert_eq!(decoded.get(RIP, Mode::Bits64, &code), Some(decode(&code)), "nothing is no instruction");
    }
}
