//! A driver of a virtio disk in a few dozen instructions: it finds the function in slot 1, moves its BAR, sets up a queue
//! with an MSI-X vector, writes a sector, reads it back and compares.
#![allow(clippy::wildcard_imports, reason = "iced's assembler names every register as a constant")]

use super::AssembleError;
use super::prologue::{SCRATCH, kernel, load_idt, power_off, print, set_gate};
use iced_x86::code_asm::*;

/// Sector that the guest writes.
pub const SECTOR: u64 = 3;
/// What it fills the sector with.
pub const PATTERN: u32 = 0x5a17_c0de;

const CONFIG: u64 = 0xe000_0000 + (1 << 15);
/// Where the guest puts BAR 0: below 4 GiB, where the board did not.
const BAR: u64 = 0xc000_0000;
const NOTIFY: i32 = 0x3000;
const MSIX_TABLE: i32 = 0x4000;
const MSIX_CAPABILITY: i32 = 0x11;
const LAPIC: u64 = 0xfee0_0000;
const VECTOR: u8 = 0x41;

const DESCRIPTORS: u64 = 0x40_0000;
const AVAILABLE: u64 = DESCRIPTORS + 0x1000;
const USED: u64 = DESCRIPTORS + 0x2000;
const HEADER: u64 = DESCRIPTORS + 0x3000;
const STATUS: u64 = HEADER + 64;
const DATA: u64 = DESCRIPTORS + 0x4000;
/// Interrupts that have come.
const COUNT: u64 = SCRATCH + 0x100;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Fields of the common configuration (virtio 1.2, 4.1.4.3).
mod common {
    pub(super) const DRIVER_FEATURE_SELECT: i32 = 8;
    pub(super) const DRIVER_FEATURE: i32 = 12;
    pub(super) const STATUS: i32 = 20;
    pub(super) const QUEUE_SELECT: i32 = 22;
    pub(super) const QUEUE_SIZE: i32 = 24;
    pub(super) const QUEUE_VECTOR: i32 = 26;
    pub(super) const QUEUE_ENABLE: i32 = 28;
    pub(super) const QUEUE_DESCRIPTORS: i32 = 32;
    pub(super) const QUEUE_AVAILABLE: i32 = 40;
    pub(super) const QUEUE_USED: i32 = 48;
}

/// Function 00:01.0: BAR below 4 GiB, decoding on, MSI-X on, its first vector to this processor.
fn find(code: &mut CodeAssembler) -> Result<(), AssembleError> {
    code.mov(rbx, CONFIG)?;
    code.mov(dword_ptr(rbx + 0x10), BAR as u32)?;
    code.mov(dword_ptr(rbx + 0x14), 0)?;
    code.mov(word_ptr(rbx + 4), 6)?;
    let (mut look, mut found) = (code.create_label(), code.create_label());
    code.movzx(eax, byte_ptr(rbx + 0x34))?;
    code.set_label(&mut look)?;
    code.movzx(ecx, byte_ptr(rbx + rax))?;
    code.cmp(ecx, MSIX_CAPABILITY)?;
    code.je(found)?;
    code.movzx(eax, byte_ptr(rbx + rax + 1))?;
    code.jmp(look)?;
    code.set_label(&mut found)?;
    code.mov(word_ptr(rbx + rax + 2), 0x8000_u32)?;
    code.mov(rsi, BAR)?;
    code.mov(dword_ptr(rsi + MSIX_TABLE), LAPIC as u32)?;
    code.mov(dword_ptr(rsi + MSIX_TABLE + 4), 0)?;
    code.mov(dword_ptr(rsi + MSIX_TABLE + 8), u32::from(VECTOR))?;
    code.mov(dword_ptr(rsi + MSIX_TABLE + 12), 0)?;
    Ok(())
}

/// Initialisation of the device (virtio 1.2, 3.1.1) with one queue of 8 descriptors.
fn initialise(code: &mut CodeAssembler) -> Result<(), AssembleError> {
    let mut reset = code.create_label();
    code.mov(byte_ptr(rsi + common::STATUS), 0)?;
    code.set_label(&mut reset)?;
    code.cmp(byte_ptr(rsi + common::STATUS), 0)?;
    code.jne(reset)?;
    code.mov(byte_ptr(rsi + common::STATUS), 3)?;
    // VERSION_1 and nothing else.
    code.mov(dword_ptr(rsi + common::DRIVER_FEATURE_SELECT), 1)?;
    code.mov(dword_ptr(rsi + common::DRIVER_FEATURE), 1)?;
    code.mov(byte_ptr(rsi + common::STATUS), 11)?;
    code.mov(word_ptr(rsi + common::QUEUE_SELECT), 0)?;
    code.mov(word_ptr(rsi + common::QUEUE_SIZE), 8)?;
    code.mov(word_ptr(rsi + common::QUEUE_VECTOR), 0)?;
    let places =
        [(common::QUEUE_DESCRIPTORS, DESCRIPTORS), (common::QUEUE_AVAILABLE, AVAILABLE), (common::QUEUE_USED, USED)];
    for (field, address) in places {
        code.mov(dword_ptr(rsi + field), address as u32)?;
        code.mov(dword_ptr(rsi + field + 4), 0)?;
    }
    code.mov(word_ptr(rsi + common::QUEUE_ENABLE), 1)?;
    code.mov(byte_ptr(rsi + common::STATUS), 15)?;
    Ok(())
}

/// Puts request number `number` (from 1) into the ring, rings the doorbell and halts until its interrupt has come.
fn request(code: &mut CodeAssembler, number: u32, kind: u32, data_flags: u16) -> Result<(), AssembleError> {
    code.mov(rdi, HEADER)?;
    code.mov(dword_ptr(rdi), kind)?;
    code.mov(dword_ptr(rdi + 4), 0)?;
    code.mov(dword_ptr(rdi + 8), SECTOR as u32)?;
    code.mov(dword_ptr(rdi + 12), 0)?;
    code.mov(rdi, DESCRIPTORS)?;
    let chain = [(HEADER, 16_u32, NEXT, 1_u16), (DATA, 512, data_flags | NEXT, 2), (STATUS, 1, WRITE, 0)];
    for (index, (address, len, flags, next)) in (0..).zip(chain) {
        code.mov(dword_ptr(rdi + 16 * index), address as u32)?;
        code.mov(dword_ptr(rdi + 16 * index + 4), 0)?;
        code.mov(dword_ptr(rdi + 16 * index + 8), len)?;
        code.mov(word_ptr(rdi + 16 * index + 12), u32::from(flags))?;
        code.mov(word_ptr(rdi + 16 * index + 14), u32::from(next))?;
    }
    code.mov(rdi, AVAILABLE)?;
    code.mov(word_ptr(rdi + 4 + 2 * (number as i32 - 1)), 0)?;
    code.mov(word_ptr(rdi + 2), number)?;
    code.mov(word_ptr(rsi + NOTIFY), 0)?;
    let (mut wait, mut done) = (code.create_label(), code.create_label());
    code.mov(rdi, COUNT)?;
    code.set_label(&mut wait)?;
    code.cli()?;
    code.cmp(dword_ptr(rdi), number)?;
    code.jae(done)?;
    code.sti()?;
    code.hlt()?;
    code.jmp(wait)?;
    code.set_label(&mut done)?;
    Ok(())
}

/// Fills the data buffer with EAX.
fn fill(code: &mut CodeAssembler) -> Result<(), AssembleError> {
    code.mov(rdi, DATA)?;
    code.mov(ecx, 128)?;
    code.rep().stosd()?;
    Ok(())
}

/// The ELF kernel: prints `disk ok` or `disk bad` and switches the machine off.
pub fn guest() -> Result<Vec<u8>, AssembleError> {
    kernel(|code| {
        let (mut start, mut interrupt, mut bad, mut end) =
            (code.create_label(), code.create_label(), code.create_label(), code.create_label());
        code.jmp(start)?;

        code.set_label(&mut interrupt)?;
        code.push(rdi)?;
        code.mov(rdi, COUNT)?;
        code.inc(dword_ptr(rdi))?;
        code.mov(rdi, LAPIC)?;
        code.mov(dword_ptr(rdi + 0xb0), 0)?;
        code.pop(rdi)?;
        code.iretq()?;

        code.set_label(&mut start)?;
        set_gate(code, VECTOR, interrupt)?;
        load_idt(code)?;
        // The 8259 pair stays out of it.
        code.mov(eax, 0xff)?;
        code.out(0x21, al)?;
        code.out(0xa1, al)?;
        code.mov(rdi, LAPIC)?;
        code.mov(dword_ptr(rdi + 0xf0), 0x1ff)?;
        code.mov(rdi, COUNT)?;
        code.mov(dword_ptr(rdi), 0)?;
        find(code)?;
        initialise(code)?;

        code.mov(eax, PATTERN)?;
        fill(code)?;
        request(code, 1, 1, 0)?;
        code.xor(eax, eax)?;
        fill(code)?;
        request(code, 2, 0, WRITE)?;
        code.mov(rdi, DATA)?;
        code.cmp(dword_ptr(rdi), PATTERN)?;
        code.jne(bad)?;
        code.cmp(dword_ptr(rdi + 508), PATTERN)?;
        code.jne(bad)?;
        code.mov(rdi, STATUS)?;
        code.cmp(byte_ptr(rdi), 0)?;
        code.jne(bad)?;
        code.mov(rdi, USED)?;
        code.cmp(word_ptr(rdi + 2), 2)?;
        code.jne(bad)?;
        print(code, "disk ok\n")?;
        code.jmp(end)?;
        code.set_label(&mut bad)?;
        print(code, "disk bad\n")?;
        code.set_label(&mut end)?;
        power_off(code)
    })
}
