//! The guest of the golden trace: interrupts, faults, integer and SSE2 work, strings, calls, self-modifying code.
//!
//! In deterministic mode its run is the same to the last register on every machine and in every build, so the hash of
//! (rip, registers) each million instructions is a constant of the project.
#![allow(clippy::wildcard_imports, reason = "iced's assembler names every register as a constant")]

use super::AssembleError;
use super::prologue::{IDT, SCRATCH, kernel, load_idt, power_off, print, set_gate};
use iced_x86::code_asm::*;

/// Timer interrupts after which the guest powers off.
const TICKS: u32 = 40;
const TICK_VECTOR: u8 = 0x40;
const DIVIDE_VECTOR: u8 = 0;
/// Where the tick handler counts.
const TICK_COUNT: u64 = SCRATCH + 0x100;
const FAULT_COUNT: u64 = SCRATCH + 0x108;

const MSR_APIC_BASE: u32 = 0x1b;
const X2APIC_SPURIOUS: u32 = 0x80f;
const X2APIC_EOI: u32 = 0x80b;
const X2APIC_TIMER: u32 = 0x832;
const X2APIC_INITIAL_COUNT: u32 = 0x838;
const X2APIC_DIVIDE: u32 = 0x83e;

fn write_msr(code: &mut CodeAssembler, msr: u32, value: u32) -> Result<(), AssembleError> {
    code.mov(ecx, msr)?;
    code.mov(eax, value)?;
    code.xor(edx, edx)?;
    code.wrmsr()?;
    Ok(())
}

/// The ELF kernel.
pub fn guest() -> Result<Vec<u8>, AssembleError> {
    kernel(|code| {
        let mut start = code.create_label();
        let mut tick = code.create_label();
        let mut divide = code.create_label();
        let mut square = code.create_label();
        code.jmp(start)?;

        code.set_label(&mut tick)?;
        for register in [rax, rcx, rdx] {
            code.push(register)?;
        }
        code.mov(rax, TICK_COUNT)?;
        code.inc(qword_ptr(rax))?;
        write_msr(code, X2APIC_EOI, 0)?;
        for register in [rdx, rcx, rax] {
            code.pop(register)?;
        }
        code.iretq()?;

        // A #DE pushes the address of the DIV itself: two bytes (div ebx).
        code.set_label(&mut divide)?;
        code.push(rax)?;
        code.mov(rax, FAULT_COUNT)?;
        code.inc(qword_ptr(rax))?;
        code.pop(rax)?;
        code.add(qword_ptr(rsp), 2)?;
        code.iretq()?;

        code.set_label(&mut square)?;
        code.push(rbp)?;
        code.mov(rbp, rsp)?;
        code.imul_2(rax, rax)?;
        code.pop(rbp)?;
        code.ret()?;

        code.set_label(&mut start)?;
        print(code, "own guest\n")?;
        code.mov(rdi, IDT)?;
        code.xor(eax, eax)?;
        code.mov(ecx, 1024)?;
        code.rep().stosd()?;
        set_gate(code, TICK_VECTOR, tick)?;
        set_gate(code, DIVIDE_VECTOR, divide)?;
        load_idt(code)?;
        code.mov(rax, TICK_COUNT)?;
        code.mov(qword_ptr(rax), 0)?;
        code.mov(qword_ptr(rax + 8), 0)?;

        write_msr(code, MSR_APIC_BASE, 0xfee0_0d00)?;
        write_msr(code, X2APIC_SPURIOUS, 0x1ff)?;
        write_msr(code, X2APIC_DIVIDE, 0xb)?;
        write_msr(code, X2APIC_TIMER, 0x2_0000 | u32::from(TICK_VECTOR))?;
        write_msr(code, X2APIC_INITIAL_COUNT, 250_000)?;
        code.sti()?;

        let mut work = code.create_label();
        let mut done = code.create_label();
        code.mov(r8, 0x9e37_79b9_7f4a_7c15_u64)?;
        code.xor(r9, r9)?;
        code.pxor(xmm0, xmm0)?;
        code.set_label(&mut work)?;
        // xorshift64
        code.mov(rax, r8)?;
        code.shl(rax, 13)?;
        code.xor(r8, rax)?;
        code.mov(rax, r8)?;
        code.shr(rax, 7)?;
        code.xor(r8, rax)?;
        code.mov(rax, r8)?;
        code.shl(rax, 17)?;
        code.xor(r8, rax)?;
        // call, multiply, rotate
        code.mov(rax, r8)?;
        code.call(square)?;
        code.rol(rax, 11)?;
        code.adc(r9, rax)?;
        // divide by a byte that is zero once in 256 rounds
        code.mov(eax, r8d)?;
        code.xor(edx, edx)?;
        code.movzx(ebx, r8b)?;
        code.div(ebx)?;
        code.xor(r9, rdx)?;
        // SSE2
        code.movq(xmm1, r8)?;
        code.paddq(xmm0, xmm1)?;
        code.cvtsi2sd(xmm2, r8d)?;
        code.sqrtsd(xmm3, xmm2)?;
        code.movq(rax, xmm0)?;
        code.xor(r9, rax)?;
        // strings
        code.mov(rsi, SCRATCH + 0x1000)?;
        code.mov(qword_ptr(rsi), r9)?;
        code.lea(rdi, ptr(rsi + 8))?;
        code.mov(ecx, 64)?;
        code.rep().movsq()?;
        code.lock().add(qword_ptr(rsi), r8)?;
        code.mov(rax, TICK_COUNT)?;
        code.cmp(dword_ptr(rax), TICKS)?;
        code.jb(work)?;
        code.set_label(&mut done)?;
        code.cli()?;

        // The checksum in hexadecimal.
        let mut digit = code.create_label();
        let mut letter = code.create_label();
        code.mov(ecx, 16)?;
        code.mov(edx, 0x3f8)?;
        code.set_label(&mut digit)?;
        code.rol(r9, 4)?;
        code.mov(eax, r9d)?;
        code.and(eax, 15)?;
        code.add(eax, u32::from(b'0'))?;
        code.cmp(eax, u32::from(b'9'))?;
        code.jbe(letter)?;
        code.add(eax, u32::from(b'a' - b'9' - 1))?;
        code.set_label(&mut letter)?;
        code.out(dx, al)?;
        code.dec(ecx)?;
        code.jnz(digit)?;
        print(code, "\n")?;
        power_off(code)
    })
}
