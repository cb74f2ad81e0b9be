//! Emits the machine code around one re-encoded instruction. Calling convention of all of it: RDI = `*mut Regs`,
//! RSI = host address of the memory operand, result in RAX, nothing callee-saved is touched.

use super::sse::ResultShape;
use super::{control, sse};
use crate::state::{FpState, Regs};
use iced_x86::code_asm::registers as r;
use iced_x86::code_asm::{
    AsmRegister64, AsmRegisterMm, AsmRegisterXmm, CodeAssembler, byte_ptr, cl, dword_ptr, eax, ecx, ptr, qword_ptr, r8,
    r9, r10, r10d, r10w, rax, rcx, rdi, rdx, rsi, rsp, word_ptr, xmmword_ptr,
};
use iced_x86::{IcedError, Instruction};
use std::mem::offset_of;

const GPR: usize = offset_of!(Regs, gpr);
const RFLAGS: usize = offset_of!(Regs, rflags);
const FP: usize = offset_of!(Regs, fp);
const FSW: usize = FP + offset_of!(FpState, fsw);
const FTW: usize = FP + offset_of!(FpState, ftw);
const FOP: usize = FP + offset_of!(FpState, fop);
const FIP: usize = FP + offset_of!(FpState, fip);
const FDP: usize = FP + offset_of!(FpState, fdp);
const MXCSR: usize = FP + offset_of!(FpState, mxcsr);
const MXCSR_MASK: usize = FP + offset_of!(FpState, mxcsr_mask);
const ST: usize = FP + offset_of!(FpState, st);
const XMM: usize = FP + offset_of!(FpState, xmm);

/// OF, SF, ZF, AF, PF and CF.
const ARITHMETIC_FLAGS: i32 = 0x8d5;
/// MXCSR without its sticky flags: DAZ, masks, rounding, FTZ.
const MXCSR_CONTROL: i32 = 0xffc0;
const MXCSR_DEFAULT: i32 = 0x1f80;

/// A guest general register that the body loads into a host register and perhaps stores back.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct GprUse {
    pub(super) guest: u8,
    pub(super) host: HostGpr,
    /// Load only bits 15:8, as the low byte (AH, CH, DH, BH).
    pub(super) high_byte: bool,
    pub(super) store: bool,
}

/// The host registers that stand for guest registers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum HostGpr {
    Rax,
    Rcx,
    Rdx,
}

/// Everything that the emitter needs to know about one instruction.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct Plan {
    pub(super) gprs: Vec<GprUse>,
    pub(super) xmm_load: u16,
    pub(super) xmm_store: u16,
    pub(super) mm_load: u8,
    pub(super) mm_store: u8,
    pub(super) reads_flags: bool,
    pub(super) writes_flags: bool,
    /// Runs under the guest's MXCSR, with this shape of result.
    pub(super) mxcsr: Option<ResultShape>,
    pub(super) x87: bool,
    pub(super) implicit_rdi: bool,
}

impl Plan {
    fn mmx(&self) -> bool {
        self.mm_load | self.mm_store != 0
    }
}

/// Assembles the thunk of `instruction`, already normalised, to run at `address`.
pub(super) fn assemble(instruction: &Instruction, plan: &Plan, address: u64) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    if plan.x87 {
        x87(&mut a, instruction, plan)?;
    } else {
        sse(&mut a, instruction, plan)?;
    }
    a.assemble(address)
}

fn sse(a: &mut CodeAssembler, instruction: &Instruction, plan: &Plan) -> Result<(), IcedError> {
    let mut pending = a.create_label();
    let mut transition = a.create_label();
    let mut ready = a.create_label();
    let mut cold = a.create_label();
    let mut raw = a.create_label();
    if plan.mmx() {
        a.movzx(ecx, word_ptr(rdi + FSW))?;
        a.test(cl, 0x80)?;
        a.jne(pending)?;
        a.and(ecx, 0x3800)?;
        a.jne(transition)?;
        a.cmp(byte_ptr(rdi + FTW), 0xff)?;
        a.jne(transition)?;
        a.set_label(&mut ready)?;
    }
    if plan.mxcsr.is_some() {
        a.mov(ecx, dword_ptr(rdi + MXCSR))?;
        a.and(ecx, MXCSR_CONTROL)?;
        a.cmp(ecx, MXCSR_DEFAULT)?;
        a.jne(cold)?;
        a.ldmxcsr(dword_ptr(rdi + MXCSR))?;
    }
    body(a, instruction, plan)?;
    if plan.mxcsr.is_some() {
        a.stmxcsr(dword_ptr(rdi + MXCSR))?;
    }
    a.xor(eax, eax)?;
    a.ret()?;
    if let Some(shape) = plan.mxcsr {
        a.set_label(&mut cold)?;
        a.lea(rdx, qword_ptr(raw))?;
        a.mov(ecx, shape.to_bits())?;
        let slow: sse::SlowFn = sse::run_with_guest_mxcsr;
        a.mov(rax, slow as usize as u64)?;
        a.jmp(rax)?;
        a.set_label(&mut raw)?;
        body(a, instruction, plan)?;
        a.ret()?;
    }
    if plan.mmx() {
        a.set_label(&mut transition)?;
        // Entered with RSP 8 below a multiple of 16.
        a.push(rdi)?;
        a.push(rsi)?;
        a.sub(rsp, 8)?;
        let enter: unsafe extern "sysv64" fn(*mut Regs) = control::enter_mmx;
        a.mov(rax, enter as usize as u64)?;
        a.call(rax)?;
        a.add(rsp, 8)?;
        a.pop(rsi)?;
        a.pop(rdi)?;
        a.jmp(ready)?;
        a.set_label(&mut pending)?;
        a.mov(eax, 16)?;
        a.ret()?;
    }
    Ok(())
}

/// Loads, the instruction, stores.
fn body(a: &mut CodeAssembler, instruction: &Instruction, plan: &Plan) -> Result<(), IcedError> {
    for n in bits(plan.xmm_load.into()) {
        a.movaps(XMM_REGISTERS[n], xmmword_ptr(rdi + XMM + 16 * n))?;
    }
    for n in bits(plan.mm_load.into()) {
        a.movq(MM_REGISTERS[n], qword_ptr(rdi + ST + 16 * n))?;
    }
    if plan.reads_flags {
        load_flags(a)?;
    }
    for gpr in &plan.gprs {
        let offset = GPR + 8 * usize::from(gpr.guest);
        let host = host_register(gpr.host);
        if gpr.high_byte {
            a.movzx(host, byte_ptr(rdi + offset + 1))?;
        } else {
            a.mov(host, qword_ptr(rdi + offset))?;
        }
    }
    if plan.implicit_rdi {
        a.mov(r8, rdi)?;
        a.mov(rdi, rsi)?;
        a.add_instruction(*instruction)?;
        a.mov(rdi, r8)?;
    } else {
        a.add_instruction(*instruction)?;
    }
    if plan.writes_flags {
        a.pushfq()?;
        a.pop(r8)?;
    }
    for n in bits(plan.xmm_store.into()) {
        a.movaps(xmmword_ptr(rdi + XMM + 16 * n), XMM_REGISTERS[n])?;
    }
    for n in bits(plan.mm_store.into()) {
        a.movq(qword_ptr(rdi + ST + 16 * n), MM_REGISTERS[n])?;
        a.mov(word_ptr(rdi + ST + 16 * n + 8), 0xffff)?;
    }
    for gpr in plan.gprs.iter().filter(|gpr| gpr.store) {
        a.mov(qword_ptr(rdi + GPR + 8 * usize::from(gpr.guest)), host_register(gpr.host))?;
    }
    if plan.writes_flags {
        store_flags(a)?;
    }
    if plan.mmx() {
        a.emms()?;
    }
    Ok(())
}

fn x87(a: &mut CodeAssembler, instruction: &Instruction, plan: &Plan) -> Result<(), IcedError> {
    let mut pending = a.create_label();
    let mut default = a.create_label();
    a.test(byte_ptr(rdi + FSW), 0x80)?;
    a.jne(pending)?;
    // The instruction, data and opcode pointers that FXSAVE will record are the host's: keep the guest's.
    a.mov(r8, qword_ptr(rdi + FIP))?;
    a.mov(r9, qword_ptr(rdi + FDP))?;
    a.movzx(r10d, word_ptr(rdi + FOP))?;
    a.fxrstor64(ptr(rdi + FP))?;
    if plan.reads_flags {
        load_flags(a)?;
    }
    a.add_instruction(*instruction)?;
    if plan.writes_flags {
        a.pushfq()?;
        a.pop(rdx)?;
    }
    a.fxsave64(ptr(rdi + FP))?;
    a.fninit()?;
    a.ldmxcsr(dword_ptr(default))?;
    a.mov(qword_ptr(rdi + FIP), r8)?;
    a.mov(qword_ptr(rdi + FDP), r9)?;
    a.mov(word_ptr(rdi + FOP), r10w)?;
    a.mov(dword_ptr(rdi + MXCSR_MASK), 0xffff)?;
    if plan.writes_flags {
        a.mov(r8, rdx)?;
        store_flags(a)?;
    }
    a.xor(eax, eax)?;
    a.ret()?;
    a.set_label(&mut pending)?;
    a.mov(eax, 16)?;
    a.ret()?;
    a.set_label(&mut default)?;
    a.dd(&[MXCSR_DEFAULT as u32])
}

/// Guest's arithmetic flags into the host's RFLAGS, nothing else (TF, DF and AC must not leak). Uses RCX.
fn load_flags(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rcx, qword_ptr(rdi + RFLAGS))?;
    a.and(ecx, ARITHMETIC_FLAGS)?;
    a.push(rcx)?;
    a.popfq()
}

/// Arithmetic flags in R8 into the guest's RFLAGS. Uses R10.
fn store_flags(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.and(r8, ARITHMETIC_FLAGS)?;
    a.mov(r10, qword_ptr(rdi + RFLAGS))?;
    a.and(r10, !ARITHMETIC_FLAGS)?;
    a.or(r10, r8)?;
    a.mov(qword_ptr(rdi + RFLAGS), r10)
}

fn bits(mask: u32) -> impl Iterator<Item = usize> {
    (0..16).filter(move |n| mask >> n & 1 != 0)
}

fn host_register(host: HostGpr) -> AsmRegister64 {
    match host {
        HostGpr::Rax => rax,
        HostGpr::Rcx => rcx,
        HostGpr::Rdx => rdx,
    }
}

const XMM_REGISTERS: [AsmRegisterXmm; 16] = [
    r::xmm0,
    r::xmm1,
    r::xmm2,
    r::xmm3,
    r::xmm4,
    r::xmm5,
    r::xmm6,
    r::xmm7,
    r::xmm8,
    r::xmm9,
    r::xmm10,
    r::xmm11,
    r::xmm12,
    r::xmm13,
    r::xmm14,
    r::xmm15,
];
const MM_REGISTERS: [AsmRegisterMm; 8] = [r::mm0, r::mm1, r::mm2, r::mm3, r::mm4, r::mm5, r::mm6, r::mm7];
