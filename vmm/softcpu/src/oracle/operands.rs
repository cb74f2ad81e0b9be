//! Random operands for one encoding: registers, addresses whose target is known, immediates.

use super::catalog::Family;
use super::layout::{DATA, DATA_MAPPED, DATA_WRITABLE, STACK, STACK_LEN};
use super::random::Random;
use iced_x86::{Code, Instruction, MemorySize, Mnemonic, OpCodeOperandKind, OpKind, Register};
use std::collections::BTreeMap;

const GPR64: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];
const GPR8: [Register; 20] = [
    Register::AL,
    Register::CL,
    Register::DL,
    Register::BL,
    Register::AH,
    Register::CH,
    Register::DH,
    Register::BH,
    Register::SPL,
    Register::BPL,
    Register::SIL,
    Register::DIL,
    Register::R8L,
    Register::R9L,
    Register::R10L,
    Register::R11L,
    Register::R12L,
    Register::R13L,
    Register::R14L,
    Register::R15L,
];

/// What is fixed about a slot's registers and memory, and what its instructions have changed so far.
#[derive(Clone)]
pub(super) struct Frame {
    /// Registers whose value addresses or counts rely on: the same in all runs of the slot.
    pub(super) pinned: BTreeMap<usize, u64>,
    /// Registers that an instruction of the slot has written: no address may use them.
    pub(super) written: u16,
    /// Memory to be set before each run.
    pub(super) patches: Vec<(u64, u64)>,
    /// An instruction has unmasked x87 exceptions: the rest of the slot leaves memory alone.
    pub(super) unmasked: bool,
    /// An instruction has stored something or moved the stack pointer: patched memory may be gone.
    pub(super) stored: bool,
    /// Where branches go when taken.
    pub(super) taken: u64,
}

impl Frame {
    /// Pins register `index` to `value`, unless it is written already or pinned to something else.
    pub(super) fn pin(&mut self, index: usize, value: u64) -> Option<u64> {
        if self.written >> index & 1 != 0 {
            return None;
        }
        let pinned = *self.pinned.entry(index).or_insert(value);
        (pinned == value).then_some(value)
    }

    /// The value of a register that an address may use: the pinned one, or `fresh` pinned now.
    fn base(&mut self, index: usize, fresh: u64) -> Option<u64> {
        if self.written >> index & 1 != 0 {
            return None;
        }
        Some(*self.pinned.entry(index).or_insert(fresh))
    }
}

/// Where a memory operand of `size` bytes goes.
fn target(random: &mut Random, size: u64, align: u64) -> u64 {
    let size = size.max(1);
    // Processors differ in how much of an operand that does not fit their ports they touch before they fault.
    let whole = !matches!(size, 1..=8 | 16);
    let place = match if whole { 39 } else { random.below(40) } {
        // Across the page boundary.
        0..=2 => DATA + 0x1000 - random.below(size + 1),
        // The last bytes before nothing, or beyond.
        3 => DATA + DATA_MAPPED - random.below(2 * size + 1),
        // Before the first byte.
        4 => DATA - random.below(size + 1),
        // Into the read-only page.
        5 => DATA + DATA_WRITABLE - size + random.below(2 * size),
        6 => DATA + DATA_WRITABLE + random.below(0xf00),
        7 => STACK + random.below(STACK_LEN - size),
        _ => DATA + 0x100 + random.below(DATA_WRITABLE - 0x300),
    };
    // Mostly aligned where it is demanded, now and then not.
    if align > 1 && !random.one_in(12) { place & !(align - 1) } else { place }
}

/// Fills in random operands. `None`: this encoding cannot follow what the frame holds; draw another.
pub(super) fn fill(code: Code, family: Family, random: &mut Random, frame: &mut Frame) -> Option<Instruction> {
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let op = code.op_code();
    if op.can_use_lock_prefix() && random.one_in(3) {
        instruction.set_has_lock_prefix(true);
    }
    let mnemonic = code.mnemonic();
    if op.can_use_rep_prefix() && string(mnemonic) && random.one_in(2) {
        instruction.set_has_rep_prefix(true);
    } else if op.can_use_repne_prefix() && string(mnemonic) && random.one_in(2) {
        instruction.set_has_repne_prefix(true);
    }
    let address32 = random.one_in(8);
    for (operand, &kind) in op.op_kinds().iter().enumerate() {
        one(&mut instruction, operand as u32, kind, family, address32, random, frame)?;
    }
    implicit(&instruction, address32, random, frame)?;
    Some(instruction)
}

fn one(
    instruction: &mut Instruction,
    operand: u32,
    kind: OpCodeOperandKind,
    family: Family,
    address32: bool,
    random: &mut Random,
    frame: &mut Frame,
) -> Option<()> {
    use OpCodeOperandKind as K;
    let register = |instruction: &mut Instruction, register| {
        instruction.set_op_kind(operand, OpKind::Register);
        instruction.set_op_register(operand, register);
    };
    let sized = |random: &mut Random, first: Register| first + random.below(16) as u32;
    match kind {
        K::r8_reg | K::r8_opcode => register(instruction, *random.pick(&GPR8)),
        K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => {
            register(instruction, sized(random, Register::AX));
        }
        K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode => {
            register(instruction, sized(random, Register::EAX));
        }
        K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode => {
            register(instruction, sized(random, Register::RAX));
        }
        K::seg_reg => {
            let segments = [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS];
            register(instruction, *random.pick(&segments));
        }
        K::fs => register(instruction, Register::FS),
        K::gs => register(instruction, Register::GS),
        K::mm_reg | K::mm_rm => register(instruction, Register::MM0 + random.below(8) as u32),
        K::xmm_reg | K::xmm_rm => register(instruction, Register::XMM0 + random.below(16) as u32),
        K::al => register(instruction, Register::AL),
        K::cl => register(instruction, Register::CL),
        K::ax => register(instruction, Register::AX),
        K::dx => register(instruction, Register::DX),
        K::eax => register(instruction, Register::EAX),
        K::rax => register(instruction, Register::RAX),
        K::st0 => register(instruction, Register::ST0),
        K::sti_opcode => register(instruction, Register::ST0 + random.below(8) as u32),
        K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::mm_or_mem | K::xmm_or_mem => {
            if !instruction.has_lock_prefix() && random.one_in(2) {
                let register_kind = match kind {
                    K::r8_or_mem => K::r8_reg,
                    K::r16_or_mem => K::r16_reg,
                    K::r32_or_mem => K::r32_reg,
                    K::r64_or_mem => K::r64_reg,
                    K::mm_or_mem => K::mm_reg,
                    _ => K::xmm_reg,
                };
                return one(instruction, operand, register_kind, family, address32, random, frame);
            }
            memory(instruction, operand, family, address32, random, frame)?;
        }
        K::mem => memory(instruction, operand, family, address32, random, frame)?,
        K::mem_offs => {
            instruction.set_op_kind(operand, OpKind::Memory);
            instruction.set_memory_displ_size(if address32 { 4 } else { 8 });
            instruction.set_memory_displacement64(target(random, 8, 1));
        }
        K::imm8 if operand > 0 && instruction.op_kind(operand - 1) == OpKind::Immediate16 => {
            instruction.set_op_kind(operand, OpKind::Immediate8_2nd);
            instruction.set_immediate8_2nd(random.integer() as u8);
        }
        K::imm8 => immediate(instruction, operand, OpKind::Immediate8, random.integer()),
        K::imm8_const_1 => immediate(instruction, operand, OpKind::Immediate8, 1),
        K::imm8sex16 => immediate(instruction, operand, OpKind::Immediate8to16, random.integer()),
        K::imm8sex32 => immediate(instruction, operand, OpKind::Immediate8to32, random.integer()),
        K::imm8sex64 => immediate(instruction, operand, OpKind::Immediate8to64, random.integer()),
        K::imm16 => immediate(instruction, operand, OpKind::Immediate16, random.integer()),
        K::imm32 => immediate(instruction, operand, OpKind::Immediate32, random.integer()),
        K::imm32sex64 => immediate(instruction, operand, OpKind::Immediate32to64, random.integer()),
        K::imm64 => immediate(instruction, operand, OpKind::Immediate64, random.integer()),
        K::br64_1 | K::br64_4 => {
            instruction.set_op_kind(operand, OpKind::NearBranch64);
            instruction.set_near_branch64(frame.taken);
        }
        K::seg_rSI => {
            instruction.set_op_kind(operand, if address32 { OpKind::MemorySegESI } else { OpKind::MemorySegRSI });
        }
        K::es_rDI => {
            instruction.set_op_kind(operand, if address32 { OpKind::MemoryESEDI } else { OpKind::MemoryESRDI });
        }
        K::seg_rDI => {
            instruction.set_op_kind(operand, if address32 { OpKind::MemorySegEDI } else { OpKind::MemorySegRDI });
        }
        K::seg_rBX_al => {
            instruction.set_op_kind(operand, OpKind::Memory);
            instruction.set_memory_base(if address32 { Register::EBX } else { Register::RBX });
            instruction.set_memory_index(Register::AL);
        }
        _ => return None,
    }
    Some(())
}

fn immediate(instruction: &mut Instruction, operand: u32, kind: OpKind, value: u64) {
    instruction.set_op_kind(operand, kind);
    match kind {
        OpKind::Immediate8 => instruction.set_immediate8(value as u8),
        OpKind::Immediate8to16 => instruction.set_immediate8to16(i16::from(value as i8)),
        OpKind::Immediate8to32 => instruction.set_immediate8to32(i32::from(value as i8)),
        OpKind::Immediate8to64 => instruction.set_immediate8to64(i64::from(value as i8)),
        OpKind::Immediate16 => instruction.set_immediate16(value as u16),
        OpKind::Immediate32 => instruction.set_immediate32(value as u32),
        OpKind::Immediate32to64 => instruction.set_immediate32to64(i64::from(value as i32)),
        _ => instruction.set_immediate64(value),
    }
}

/// A memory operand in one of the address forms, with registers pinned so that it lies where [`target`] wants it.
fn memory(
    instruction: &mut Instruction,
    operand: u32,
    family: Family,
    address32: bool,
    random: &mut Random,
    frame: &mut Frame,
) -> Option<()> {
    if frame.unmasked {
        return None;
    }
    let memory_size = instruction.code().op_code().memory_size();
    let size = memory_size.size() as u64;
    let mnemonic = instruction.mnemonic();
    let align = match memory_size {
        // A locked access across a cache line stalls the host for milliseconds.
        _ if instruction.has_lock_prefix() || mnemonic == Mnemonic::Xchg => size.next_power_of_two().max(1),
        MemorySize::Unknown if matches!(mnemonic, Mnemonic::Fxsave | Mnemonic::Fxsave64) => 64,
        _ if size == 512 || size == 16 && family == Family::Vector => 16,
        _ if mnemonic == Mnemonic::Cmpxchg16b => 16,
        _ => 1,
    };
    let mut place = target(random, size, align);
    if instruction.has_lock_prefix() || mnemonic == Mnemonic::Xchg {
        place &= !(align - 1);
    }
    instruction.set_op_kind(operand, OpKind::Memory);
    if mnemonic == Mnemonic::Bt || mnemonic == Mnemonic::Bts || mnemonic == Mnemonic::Btr || mnemonic == Mnemonic::Btc {
        // A register operand moves the access by up to 2^60 bytes: keep it near.
        place = DATA + 0x800 + (random.below(0x800) & !7);
    }
    // Once in a while an address that is not canonical, or that is mapped nowhere.
    let wild = random.one_in(60) && !address32 && !instruction.has_lock_prefix();
    let form = if wild { 0 } else { random.below(16) };
    let names: [Register; 16] = if address32 { std::array::from_fn(|n| Register::EAX + n as u32) } else { GPR64 };
    if form == 15 {
        instruction.set_memory_base(if address32 { Register::EIP } else { Register::RIP });
        instruction.set_memory_displ_size(if address32 { 4 } else { 8 });
        instruction.set_memory_displacement64(place);
        return Some(());
    }
    if form == 14 {
        instruction.set_memory_displ_size(if address32 { 4 } else { 8 });
        instruction.set_memory_displacement64(place);
        return Some(());
    }
    let base = random.below(16) as usize;
    let near = place.wrapping_sub(match random.below(4) {
        0 => 0,
        1 => random.below(256).wrapping_sub(128),
        _ => random.below(1 << 20).wrapping_sub(1 << 19),
    });
    let fresh = if wild {
        *random.pick(&[0x8000_0000_0000_0000, 0x0000_8000_0000_0000, 0xffff_7fff_ffff_fff8, 0x0000_7000_0000_0000])
    } else if address32 {
        near & 0xffff_ffff | random.u64() << 32
    } else {
        near
    };
    let base_value = if base == 4 { frame.base(4, STACK + STACK_LEN / 2)? } else { frame.base(base, fresh)? };
    if wild && base_value != fresh {
        return None;
    }
    let mut sum = base_value;
    instruction.set_memory_base(names[base]);
    if form >= 7 {
        let index = random.below(16) as usize;
        if index != 4 {
            let fresh = match random.below(4) {
                0 => random.below(64).wrapping_sub(32),
                1 => random.integer(),
                _ => random.below(1 << 16),
            };
            let scale = 1u32 << random.below(4);
            let index_value = frame.base(index, fresh)?;
            instruction.set_memory_index(names[index]);
            instruction.set_memory_index_scale(scale);
            sum = sum.wrapping_add(index_value.wrapping_mul(scale.into()));
        }
    }
    if wild {
        instruction.set_memory_displ_size(1);
        instruction.set_memory_displacement64(random.below(128));
        return Some(());
    }
    let displacement = place.wrapping_sub(sum) as i64;
    let displacement = if address32 { i64::from(displacement as i32) } else { displacement };
    let displacement32 = i32::try_from(displacement).ok()?;
    instruction.set_memory_displacement64(if address32 {
        u64::from(displacement32 as u32)
    } else {
        displacement as u64
    });
    let short = i8::try_from(displacement).is_ok();
    instruction.set_memory_displ_size(match (displacement, short) {
        (0, _) if base & 7 != 5 && random.one_in(2) => 0,
        (_, true) if !random.one_in(8) => 1,
        _ if address32 => 4,
        _ => 8,
    });
    Some(())
}

fn string(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Movsb
            | M::Movsw
            | M::Movsd
            | M::Movsq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsd
            | M::Cmpsq
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
            | M::Lodsb
            | M::Lodsw
            | M::Lodsd
            | M::Lodsq
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
    )
}

/// Registers that the encoding does not name but that address memory or count.
fn implicit(instruction: &Instruction, address32: bool, random: &mut Random, frame: &mut Frame) -> Option<()> {
    use Mnemonic as M;
    let above = |random: &mut Random| if address32 { random.u64() << 32 } else { 0 };
    let mnemonic = instruction.mnemonic();
    let kinds = (0..instruction.op_count()).map(|operand| instruction.op_kind(operand));
    for kind in kinds {
        let register = match kind {
            OpKind::MemorySegRSI | OpKind::MemorySegESI => 6,
            OpKind::MemoryESRDI | OpKind::MemoryESEDI | OpKind::MemorySegRDI | OpKind::MemorySegEDI => 7,
            _ => continue,
        };
        let masked = matches!(mnemonic, M::Maskmovq | M::Maskmovdqu);
        // A masked store may or may not touch what its mask leaves out; and the processors of one maker clear the upper
        // halves of the registers even if a repeated instruction does nothing.
        let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        // Which of two bad operands a comparison reports first is the processor's choice: one of them is good.
        let second = register == 7 && matches!(mnemonic, M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq);
        let place = target(random, if masked || second { 10 } else { 16 }, 1);
        frame.pin(register, if repeated { place } else { place | above(random) })?;
    }
    if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
        let count = match random.below(8) {
            0 => 0,
            1 => 1,
            2 => random.below(300),
            _ => random.below(40),
        };
        frame.pin(1, count)?;
    }
    match mnemonic {
        M::Xlatb => {
            let place = target(random, 1, 1) | above(random);
            frame.pin(3, place)?;
        }
        M::Enter if instruction.immediate8_2nd() & 31 != 0 => {
            let place = target(random, 8, 1);
            frame.pin(5, place)?;
        }
        M::Leave => {
            frame.pin(5, STACK + 8 * random.below(STACK_LEN / 8))?;
        }
        M::Shld | M::Shrd if instruction.op0_register().size() == 2 || instruction.memory_size().size() == 2 => {
            // A count above the operand size gives an undefined result.
            match instruction.op_kind(2) {
                OpKind::Immediate8 if instruction.immediate8() & 31 > 16 => return None,
                OpKind::Register => {
                    frame.pin(1, random.u64() & !31 | random.below(17))?;
                }
                _ => {}
            }
        }
        M::Bswap if instruction.op0_register().size() == 2 => return None,
        M::Bt | M::Bts | M::Btr | M::Btc
            if instruction.op_kind(0) == OpKind::Memory && instruction.op_kind(1) == OpKind::Register =>
        {
            let register = instruction.op1_register();
            let bit = random.below(0x3000).wrapping_sub(0x1800);
            let index = register.full_register().number();
            frame.pin(index, bit)?;
        }
        M::Call | M::Jmp if instruction.op_kind(0) == OpKind::Register => {
            let index = instruction.op0_register().full_register().number();
            if index == 4 {
                return None;
            }
            frame.pin(index, frame.taken)?;
        }
        M::Call | M::Jmp if instruction.op_kind(0) == OpKind::Memory => {
            let place = address(instruction, frame)?;
            if frame.stored || !is_writable(place, 8) {
                return None;
            }
            frame.patches.push((place, frame.taken));
        }
        M::Fldcw | M::Fldenv | M::Frstor => {
            let place = address(instruction, frame)?;
            if !is_writable(place, 8) {
                return None;
            }
            // Mostly with all exceptions masked: one that is not makes a later store do nothing, and whether its operand
            // is looked at all the same is the processor's choice.
            let masks = if random.one_in(8) { random.u64() & 0x3f } else { 0x3f };
            frame.unmasked |= masks != 0x3f;
            frame.patches.push((place, random.u64() & !0xf0bf | 0x40 | masks));
        }
        M::Ret => {
            if frame.stored {
                return None;
            }
            let top = frame.base(4, STACK + STACK_LEN / 2)?;
            frame.patches.push((top, frame.taken));
        }
        _ => {}
    }
    Some(())
}

/// Whether these bytes lie in memory that both sides can set.
fn is_writable(address: u64, len: u64) -> bool {
    let inside = |base: u64, size: u64| address >= base && address <= base + size - len;
    inside(DATA, DATA_WRITABLE) || inside(STACK, STACK_LEN)
}

/// Linear address of the memory operand, from pinned registers.
fn address(instruction: &Instruction, frame: &Frame) -> Option<u64> {
    let operand = (0..instruction.op_count()).find(|&operand| instruction.op_kind(operand) == OpKind::Memory)?;
    let address = instruction.virtual_address(operand, 0, |register, _, _| match register {
        Register::None => Some(0),
        register if register.is_segment_register() => Some(0),
        register => frame.pinned.get(&register.full_register().number()).map(|value| match register.size() {
            4 => *value & 0xffff_ffff,
            _ => *value,
        }),
    })?;
    Some(address)
}
