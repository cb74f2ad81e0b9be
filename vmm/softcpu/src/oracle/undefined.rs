//! Which flags an instruction leaves undefined: what two processors may disagree about. iced-x86 has the manuals' table;
//! what depends on a count that is only known when the instruction runs is added here.
//!
//! What the hosts at hand do, for the record: Intel and AMD agree on the flags after logical operations (AF = 0) and on
//! BSF and BSR of zero (destination kept). They differ in SF, ZF, AF and PF after MUL and IMUL, in all flags after DIV, in OF after rotates and shifts by
//! more than one, and in OF, SF, AF and PF after BT and its kin (AMD keeps them, older Intel processors do not).

use iced_x86::{Instruction, Mnemonic, OpKind, Register, RflagsBits};

pub(super) const CF: u64 = 1;
pub(super) const PF: u64 = 4;
pub(super) const AF: u64 = 0x10;
pub(super) const ZF: u64 = 0x40;
pub(super) const SF: u64 = 0x80;
pub(super) const DF: u64 = 0x400;
pub(super) const OF: u64 = 0x800;
/// The six arithmetic flags.
pub(super) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

/// iced's flag set as RFLAGS bits.
pub(super) fn rflags(bits: u32) -> u64 {
    [
        (RflagsBits::OF, OF),
        (RflagsBits::SF, SF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::AF, AF),
        (RflagsBits::CF, CF),
        (RflagsBits::PF, PF),
        (RflagsBits::DF, DF),
    ]
    .into_iter()
    .filter(|(iced, _)| bits & iced != 0)
    .fold(0, |word, (_, flag)| word | flag)
}

/// Flags undefined after `instruction`. `cl` is the count in CL if it is known; without it the answer covers all counts.
pub(super) fn undefined_after(instruction: &Instruction, cl: Option<u8>) -> u64 {
    if !is_shift(instruction.mnemonic()) {
        return rflags(instruction.rflags_undefined());
    }
    let count_operand = instruction.op_count() - 1;
    let count = match instruction.op_kind(count_operand) {
        OpKind::Immediate8 => Some(instruction.immediate8()),
        OpKind::Register if instruction.op_register(count_operand) == Register::CL => cl,
        _ => Some(1),
    };
    let bits = match instruction.op_kind(0) {
        OpKind::Register => instruction.op0_register().size() * 8,
        _ => instruction.memory_size().size() * 8,
    };
    let Some(count) = count else { return worst_of_shift(instruction.mnemonic()) };
    let count = usize::from(count & if bits == 64 { 63 } else { 31 });
    let rotate = matches!(instruction.mnemonic(), Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr);
    let double = matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd);
    match count {
        0 => 0,
        1 if rotate => 0,
        _ if rotate => OF,
        _ if double && count > bits => ARITHMETIC,
        1 => AF,
        _ if count >= bits && instruction.mnemonic() != Mnemonic::Sar => AF | OF | CF,
        _ => AF | OF,
    }
}

fn worst_of_shift(mnemonic: Mnemonic) -> u64 {
    match mnemonic {
        Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr => OF,
        Mnemonic::Sar => AF | OF,
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr => AF | OF | CF,
        _ => ARITHMETIC,
    }
}

/// Flags undefined after `instruction` when `before` were undefined, whatever CL is; `None` if it reads one of those.
pub(super) fn flow(before: u64, instruction: &Instruction) -> Option<u64> {
    if rflags(instruction.rflags_read()) & before != 0 {
        return None;
    }
    let defined = rflags(instruction.rflags_modified()) & !rflags(instruction.rflags_undefined());
    // A shift by zero defines nothing, nor does a string instruction that repeats zero times.
    let conditional = is_shift(instruction.mnemonic()) || instruction.is_string_instruction();
    Some(before & !if conditional { 0 } else { defined } | undefined_after(instruction, None))
}

fn is_shift(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd)
}
