//! Guests that mean harm, or are simply broken.
#![allow(clippy::wildcard_imports, reason = "iced's assembler names every register as a constant")]

use super::AssembleError;
use super::prologue::{SCRATCH, kernel, power_off, print};
use iced_x86::code_asm::*;

/// No IDT, then an undefined instruction: a triple fault.
pub fn triple_fault() -> Result<Vec<u8>, AssembleError> {
    kernel(|code| {
        print(code, "about to fault\n")?;
        code.mov(rax, SCRATCH)?;
        code.mov(qword_ptr(rax), 0)?;
        code.mov(qword_ptr(rax + 8), 0)?;
        code.lidt(tbyte_ptr(rax))?;
        code.ud2()?;
        Ok(())
    })
}

/// Jumps to mapped linear memory that has no RAM behind it.
pub fn jump_into_nothing() -> Result<Vec<u8>, AssembleError> {
    kernel(|code| {
        print(code, "about to jump\n")?;
        code.mov(rax, 0xd000_0000_u64)?;
        code.jmp(rax)?;
        Ok(())
    })
}

/// Writes every byte value pattern to every config byte of the first 32 devices of bus 0, through ports and through
/// ECAM, then reads and writes the whole 32-bit MMIO window and every I/O port it dares, then powers off.
pub fn scribble_over_pci() -> Result<Vec<u8>, AssembleError> {
    kernel(|code| {
        print(code, "scribbling\n")?;
        for pattern in [0xffff_ffff_u32, 0, 0xa5a5_a5a5, 0x0000_0007] {
            // Ports: addresses 0x8000_0000 + (device << 11) + register.
            let mut each = code.create_label();
            code.mov(ebx, 0x8000_0000_u32)?;
            code.set_label(&mut each)?;
            code.mov(edx, 0xcf8)?;
            code.mov(eax, ebx)?;
            code.out(dx, eax)?;
            code.mov(edx, 0xcfc)?;
            code.mov(eax, pattern)?;
            code.out(dx, eax)?;
            code.in_(eax, dx)?;
            code.add(ebx, 4)?;
            code.cmp(ebx, 0x8001_0000_u32)?;
            code.jb(each)?;
            // ECAM, bytes: all of bus 0's first 8 devices.
            let mut bytes = code.create_label();
            code.mov(rdi, 0xe000_0000_u64)?;
            code.mov(ecx, 8 * 8 * 4096)?;
            code.mov(eax, pattern)?;
            code.set_label(&mut bytes)?;
            code.mov(byte_ptr(rdi), al)?;
            code.inc(rdi)?;
            code.dec(ecx)?;
            code.jnz(bytes)?;
        }
        // Everything behind the 32-bit window, sparsely, with memory decoding perhaps on by now.
        let mut window = code.create_label();
        code.mov(rdi, 0xc000_0000_u64)?;
        code.set_label(&mut window)?;
        code.mov(dword_ptr(rdi), eax)?;
        code.mov(eax, dword_ptr(rdi))?;
        code.add(rdi, 0x1004)?;
        code.mov(rax, 0xdfff_0000_u64)?;
        code.cmp(rdi, rax)?;
        code.jb(window)?;
        print(code, "survived\n")?;
        power_off(code)
    })
}
