//! From PVH's 32-bit entry to long mode.
#![allow(clippy::wildcard_imports, reason = "iced's assembler names every register as a constant")]

use super::AssembleError;
use super::elf::{self, LOAD};
use iced_x86::code_asm::*;

/// Offset of the 64-bit code in the image.
const CODE64: u64 = 0x1000;
/// Page tables: one PML4, one PDPT, four directories of 2 MiB pages.
const TABLES: u32 = 0x20_0000;
/// Top of the stack.
pub const STACK: u64 = 0x18_0000;
/// Scratch memory of the guest.
pub const SCRATCH: u64 = 0x30_0000;
/// The interrupt descriptor table that [`set_gate`] fills; zero, so every vector is absent at first.
pub const IDT: u64 = 0x28_0000;

const CODE_SELECTOR: u16 = 8;
const EFER: u32 = 0xc000_0080;

/// Builds an ELF kernel: the prologue, then whatever `body` assembles, in long mode at privilege level 0, interrupts off.
pub fn kernel(body: impl FnOnce(&mut CodeAssembler) -> Result<(), AssembleError>) -> Result<Vec<u8>, AssembleError> {
    let mut image = entry()?;
    assert!(image.len() <= CODE64 as usize, "the prologue fits below the 64-bit code");
    image.resize(CODE64 as usize, 0);
    let mut long = CodeAssembler::new(64)?;
    long.mov(rsp, STACK)?;
    body(&mut long)?;
    image.extend(long.assemble(LOAD + CODE64)?);
    Ok(elf::with_pvh_note(&image))
}

fn entry() -> Result<Vec<u8>, AssembleError> {
    // The GDT stands at the end of the prologue's page.
    const GDT: u64 = LOAD + 0xf00;
    let mut code = CodeAssembler::new(32)?;
    code.cld()?;
    // PML4[0] -> PDPT, PDPT[0..4] -> directories.
    code.mov(edi, TABLES)?;
    code.xor(eax, eax)?;
    code.mov(ecx, 6 * 1024)?;
    code.rep().stosd()?;
    code.mov(dword_ptr(TABLES), TABLES + 0x1003)?;
    for directory in 0..4_u32 {
        code.mov(dword_ptr(TABLES + 0x1000 + 8 * directory), TABLES + 0x2003 + 0x1000 * directory)?;
    }
    // 2048 pages of 2 MiB: present, writable, large.
    let mut fill = code.create_label();
    code.mov(edi, TABLES + 0x2000)?;
    code.mov(eax, 0x83)?;
    code.mov(ecx, 2048)?;
    code.set_label(&mut fill)?;
    code.mov(dword_ptr(edi), eax)?;
    code.add(edi, 8)?;
    code.add(eax, 0x20_0000)?;
    code.dec(ecx)?;
    code.jnz(fill)?;
    // PAE, OSFXSR and OSXMMEXCPT; long mode; paging.
    code.mov(eax, 0x620)?;
    code.mov(cr4, eax)?;
    code.mov(eax, TABLES)?;
    code.mov(cr3, eax)?;
    code.mov(ecx, EFER)?;
    code.rdmsr()?;
    code.or(eax, 0x100)?;
    code.wrmsr()?;
    code.mov(eax, cr0)?;
    code.or(eax, i32::from_le_bytes(0x8000_0003_u32.to_le_bytes()))?;
    code.and(eax, !4)?;
    code.mov(cr0, eax)?;
    code.lgdt(fword_ptr((GDT + 0x20) as u32))?;
    let mut bytes = code.assemble(LOAD)?;
    // A far jump with an immediate pointer has no form in 64-bit assemblers' vocabulary worth fighting for.
    bytes.push(0xea);
    bytes.extend(((LOAD + CODE64) as u32).to_le_bytes());
    bytes.extend(CODE_SELECTOR.to_le_bytes());
    bytes.resize((GDT - LOAD) as usize, 0);
    for descriptor in [0_u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0] {
        bytes.extend(descriptor.to_le_bytes());
    }
    bytes.extend(23_u16.to_le_bytes());
    bytes.extend((GDT as u32).to_le_bytes());
    Ok(bytes)
}

/// Prints a short text on COM1, byte by byte; clobbers AL and DX.
pub fn print(code: &mut CodeAssembler, text: &str) -> Result<(), AssembleError> {
    code.mov(edx, 0x3f8)?;
    for byte in text.bytes() {
        code.mov(eax, u32::from(byte))?;
        code.out(dx, al)?;
    }
    Ok(())
}

/// Enters S5 through PM1_CNT; never comes back.
pub fn power_off(code: &mut CodeAssembler) -> Result<(), AssembleError> {
    let mut forever = code.create_label();
    code.mov(edx, 0x604)?;
    code.mov(eax, 0x2000 | u32::from(5_u8) << 10)?;
    code.out(dx, ax)?;
    code.set_label(&mut forever)?;
    code.hlt()?;
    code.jmp(forever)?;
    Ok(())
}

/// Points `vector` at `handler` with an interrupt gate; clobbers RAX and RDI.
pub fn set_gate(code: &mut CodeAssembler, vector: u8, handler: CodeLabel) -> Result<(), AssembleError> {
    let gate = IDT + 16 * u64::from(vector);
    code.lea(rax, ptr(handler))?;
    code.mov(rdi, gate)?;
    code.mov(word_ptr(rdi), ax)?;
    code.mov(word_ptr(rdi + 2), u32::from(CODE_SELECTOR))?;
    code.mov(word_ptr(rdi + 4), 0x8e00)?;
    code.shr(rax, 16)?;
    code.mov(word_ptr(rdi + 6), ax)?;
    code.shr(rax, 16)?;
    code.mov(dword_ptr(rdi + 8), eax)?;
    Ok(())
}

/// Loads the IDT register; clobbers RAX.
pub fn load_idt(code: &mut CodeAssembler) -> Result<(), AssembleError> {
    code.mov(rax, SCRATCH)?;
    code.mov(word_ptr(rax), 0xfff)?;
    code.mov(dword_ptr(rax + 2), IDT as u32)?;
    code.mov(dword_ptr(rax + 6), 0)?;
    code.lidt(tbyte_ptr(rax))?;
    Ok(())
}
