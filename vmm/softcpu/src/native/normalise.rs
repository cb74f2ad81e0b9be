//! Turns a guest instruction into the one that runs on the host: memory operand at \[RSI\], general registers renamed to
//! RAX and RCX, no prefixes that the guest chose; and lists what must be loaded and stored around it.

use super::emit::{GprUse, HostGpr, Plan};
use super::{MemAccess, ThunkRef, Unit, sse};
use crate::state::Regs;
use iced_x86::{
    CodeSize, Instruction, InstructionInfo, InstructionInfoFactory, MemorySize, Mnemonic, OpAccess, OpKind, Register,
};

/// An instruction ready for the emitter.
pub(super) struct Native {
    pub(super) instruction: Instruction,
    pub(super) plan: Plan,
    /// Complete but for its entry.
    pub(super) thunk: ThunkRef,
}

/// Plans the thunk; `None` if the instruction has an operand that no family on the allow list should have.
pub(super) fn plan(instruction: &Instruction, unit: Unit, factory: &mut InstructionInfoFactory) -> Option<Native> {
    let info = factory.info(instruction);
    let mut native = *instruction;
    native.set_code_size(CodeSize::Code64);
    native.set_ip(0);
    native.set_has_lock_prefix(false);
    native.set_has_rep_prefix(false);
    native.set_has_repne_prefix(false);
    native.set_segment_prefix(Register::None);
    let mnemonic = instruction.mnemonic();
    let x87 = unit == Unit::X87 || mnemonic == Mnemonic::Emms;
    let mut plan = Plan { x87, ..Plan::default() };
    let mut mem = MemAccess::None;
    for operand in 0..instruction.op_count() {
        let access = info.op_access(operand);
        let writes = !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess);
        match instruction.op_kind(operand) {
            OpKind::Register => register(&mut native, &mut plan, operand, writes)?,
            OpKind::Memory => {
                native.set_memory_base(Register::RSI);
                native.set_memory_index(Register::None);
                native.set_memory_index_scale(1);
                native.set_memory_displ_size(0);
                native.set_memory_displacement64(0);
                mem = match access {
                    OpAccess::Read | OpAccess::CondRead => MemAccess::Read,
                    // A masked response to an exception may leave the operand of an x87 store as it was.
                    OpAccess::Write if !x87 => MemAccess::Write,
                    OpAccess::NoMemAccess | OpAccess::None => return None,
                    _ => MemAccess::ReadWrite,
                };
            }
            OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI => {
                native.set_op_kind(operand, OpKind::MemorySegRDI);
                plan.implicit_rdi = true;
                mem = MemAccess::ReadWrite;
            }
            OpKind::Immediate8 | OpKind::Immediate8_2nd => {}
            _ => return None,
        }
    }
    implicit(instruction, info, &mut plan);
    let written = instruction.rflags_modified();
    let arithmetic = iced_x86::RflagsBits::OF
        | iced_x86::RflagsBits::SF
        | iced_x86::RflagsBits::ZF
        | iced_x86::RflagsBits::AF
        | iced_x86::RflagsBits::CF
        | iced_x86::RflagsBits::PF;
    plan.writes_flags = written & arithmetic != 0;
    // FCOMI and its kin leave some flags to the processor: give it the guest's.
    plan.reads_flags = instruction.rflags_read() & arithmetic != 0 || x87 && plan.writes_flags;
    let destination = (instruction.op_count() > 0 && instruction.op_kind(0) == OpKind::Register)
        .then(|| instruction.op0_register())
        .filter(|register| register.is_xmm())
        .map(|register| register.number() as u8);
    if !x87 {
        plan.mxcsr = sse::mxcsr_use(mnemonic, destination);
    }
    let mem_size = if mem == MemAccess::None { 0 } else { operand_size(instruction) };
    let thunk = ThunkRef {
        entry: placeholder,
        mem_size,
        mem,
        mem_align: if aligned(instruction, mem_size) { 16 } else { 1 },
        unit,
        waits: x87 || plan.mm_load | plan.mm_store != 0,
        reads_flags: plan.reads_flags,
        writes_flags: plan.writes_flags,
        implicit_rdi: plan.implicit_rdi,
    };
    Some(Native { instruction: native, plan, thunk })
}

fn register(native: &mut Instruction, plan: &mut Plan, operand: u32, writes: bool) -> Option<()> {
    let register = native.op_register(operand);
    let number = register.number();
    // Destinations are loaded too: many instructions leave part of them alone.
    if register.is_xmm() {
        plan.xmm_load |= 1 << number;
        plan.xmm_store |= u16::from(writes) << number;
    } else if register.is_mm() {
        plan.mm_load |= 1 << number;
        plan.mm_store |= u8::from(writes) << number;
    } else if register.is_gpr() {
        let (host, family) = match plan.gprs.len() {
            0 => (HostGpr::Rax, [Register::AL, Register::AX, Register::EAX, Register::RAX]),
            1 => (HostGpr::Rcx, [Register::CL, Register::CX, Register::ECX, Register::RCX]),
            _ => return None,
        };
        let high_byte = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
        if high_byte && writes {
            return None;
        }
        let guest = register.full_register().number() as u8;
        plan.gprs.push(GprUse { guest, host, high_byte, store: writes });
        native.set_op_register(operand, family[register.size().trailing_zeros() as usize]);
    } else if !(plan.x87 && register.is_st()) {
        return None;
    }
    Some(())
}

/// Registers that the encoding does not name: XMM0 of the blends, and the operands of PCMPxSTRx.
fn implicit(instruction: &Instruction, info: &InstructionInfo, plan: &mut Plan) {
    for used in info.used_registers().iter().filter(|used| used.register().is_xmm()) {
        let bit = 1 << used.register().number();
        plan.xmm_load |= bit;
        if !matches!(used.access(), OpAccess::Read | OpAccess::CondRead) {
            plan.xmm_store |= bit;
        }
    }
    let load = |guest, host, store| GprUse { guest, host, high_byte: false, store };
    match instruction.mnemonic() {
        Mnemonic::Pcmpestri | Mnemonic::Pcmpestri64 => {
            plan.gprs = vec![load(0, HostGpr::Rax, false), load(2, HostGpr::Rdx, false), load(1, HostGpr::Rcx, true)];
        }
        Mnemonic::Pcmpestrm | Mnemonic::Pcmpestrm64 => {
            plan.gprs = vec![load(0, HostGpr::Rax, false), load(2, HostGpr::Rdx, false)];
        }
        Mnemonic::Pcmpistri => plan.gprs = vec![load(1, HostGpr::Rcx, true)],
        _ => {}
    }
}

fn operand_size(instruction: &Instruction) -> u16 {
    instruction.memory_size().size() as u16
}

/// Sixteen-byte operands of legacy SSE must be aligned, but for those that say "unaligned" and those of PCMPxSTRx.
fn aligned(instruction: &Instruction, mem_size: u16) -> bool {
    mem_size == 16
        && instruction.memory_size() != MemorySize::Unknown
        && !matches!(
            instruction.mnemonic(),
            Mnemonic::Movups
                | Mnemonic::Movupd
                | Mnemonic::Movdqu
                | Mnemonic::Lddqu
                | Mnemonic::Maskmovdqu
                | Mnemonic::Pcmpestri
                | Mnemonic::Pcmpestri64
                | Mnemonic::Pcmpestrm
                | Mnemonic::Pcmpestrm64
                | Mnemonic::Pcmpistri
                | Mnemonic::Pcmpistrm
        )
}

/// Stands in a [`ThunkRef`] until the code is made; never called.
unsafe extern "sysv64" fn placeholder(_regs: *mut Regs, _mem: *mut u8) -> u64 {
    6
}
