//! The flat image: multiboot header, the way to 64-bit mode, the frame around one loop, the loop.
//!
//! The frame writes `S` to the report port before the loop and `E` after it, then the eight bytes of the checksum, and
//! then ends the machine through the exit port.

use super::loops::Loop;
use anyhow::Context;
use iced_x86::code_asm::{CodeAssembler, al, dx, eax, ecx, edi, edx, esp, ptr, r12, rax};
use iced_x86::{BlockEncoderOptions, IcedError};

/// Load address, and the first byte of the multiboot header.
pub const BASE: u64 = 0x0010_0000;
/// Port of QEMU's debug console: the report.
pub const REPORT_PORT: u16 = 0xe9;
/// Port of QEMU's exit device.
pub const EXIT_PORT: u16 = 0xf4;
/// What EAX holds at the entry.
pub const MULTIBOOT_MAGIC: u32 = 0x2bad_b002;
/// Bytes of RAM that the image uses: page tables, stack, code and data lie below.
pub const RAM: u64 = 0x0200_0000;

const PAGE_TABLES: u32 = 0x8_0000;
const STACK_TOP: u32 = 0x9_0000;
const HEADER: usize = 48;
const CODE64: u64 = BASE + 0x1000;
// Offsets in the image's first page.
const GDT: u64 = 0x800;
const GDTR: u64 = 0x840;

/// An assembled image.
pub struct Image {
    /// Its bytes, for [`BASE`].
    pub bytes: Vec<u8>,
    /// Address of the 32-bit entry.
    pub entry: u64,
    /// Address of the loop's preparation.
    pub prepare: u64,
    /// Address of the loop.
    pub run: u64,
}

impl Image {
    /// Assembles the image of one loop.
    pub fn new(which: Loop) -> anyhow::Result<Self> {
        let (code64, prepare, run) =
            code64(which).with_context(|| format!("cannot assemble the {} loop", which.name()))?;
        let boot = boot().context("cannot assemble the way to 64-bit mode")?;
        let mut bytes = vec![0; (CODE64 - BASE) as usize];
        let entry = BASE + HEADER as u64;
        let end = CODE64 + code64.len() as u64;
        anyhow::ensure!(end <= super::loops::DATA, "the image of {} runs into its data", which.name());
        let header: [u32; 8] = {
            const MAGIC: u32 = 0x1bad_b002;
            // The header gives the addresses itself.
            const FLAGS: u32 = 1 << 16;
            let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS);
            [MAGIC, FLAGS, checksum, BASE as u32, BASE as u32, end as u32, end as u32, entry as u32]
        };
        for (place, word) in bytes.chunks_exact_mut(4).zip(header) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes[HEADER..HEADER + boot.len()].copy_from_slice(&boot);
        // Null, 64-bit code, data.
        const DESCRIPTORS: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
        for (place, descriptor) in bytes[GDT as usize..].chunks_exact_mut(8).zip(DESCRIPTORS) {
            place.copy_from_slice(&descriptor.to_le_bytes());
        }
        bytes[GDTR as usize..][..2].copy_from_slice(&(8 * DESCRIPTORS.len() as u16 - 1).to_le_bytes());
        bytes[GDTR as usize + 2..][..4].copy_from_slice(&((BASE + GDT) as u32).to_le_bytes());
        bytes.extend_from_slice(&code64);
        Ok(Self { bytes, entry, prepare, run })
    }
}

/// 32-bit code: identity map of 1 GiB by 2 MiB pages, long mode, far jump.
fn boot() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let mut page = a.create_label();
    a.mov(esp, STACK_TOP)?;
    a.mov(edi, PAGE_TABLES)?;
    a.xor(eax, eax)?;
    a.mov(ecx, 3 * 1024)?;
    a.cld()?;
    a.rep().stosd()?;
    a.mov(iced_x86::code_asm::dword_ptr(PAGE_TABLES), PAGE_TABLES + 0x1003)?;
    a.mov(iced_x86::code_asm::dword_ptr(PAGE_TABLES + 0x1000), PAGE_TABLES + 0x2003)?;
    a.mov(edi, PAGE_TABLES + 0x2000)?;
    a.mov(eax, 0x83)?;
    a.mov(ecx, 512)?;
    a.set_label(&mut page)?;
    a.mov(iced_x86::code_asm::dword_ptr(edi), eax)?;
    a.add(eax, 0x20_0000)?;
    a.add(edi, 8)?;
    a.dec(ecx)?;
    a.jne(page)?;
    a.mov(eax, PAGE_TABLES)?;
    a.mov(iced_x86::code_asm::cr3, eax)?;
    a.mov(eax, iced_x86::code_asm::cr4)?;
    a.or(eax, 0x20)?;
    a.mov(iced_x86::code_asm::cr4, eax)?;
    a.mov(ecx, 0xc000_0080_u32)?;
    a.rdmsr()?;
    a.or(eax, 0x100)?;
    a.wrmsr()?;
    a.mov(eax, iced_x86::code_asm::cr0)?;
    a.or(eax, 0x8000_0001_u32 as i32)?;
    a.mov(iced_x86::code_asm::cr0, eax)?;
    a.lgdt(ptr((BASE + GDTR) as u32))?;
    a.mov(edx, 0x10)?;
    for segment in [iced_x86::code_asm::ds, iced_x86::code_asm::es, iced_x86::code_asm::ss] {
        a.mov(segment, dx)?;
    }
    // Far jump to the 64-bit segment: EA, offset, selector.
    a.db(&[0xea])?;
    a.dd(&[CODE64 as u32])?;
    a.dw(&[0x08])?;
    a.assemble(BASE + HEADER as u64)
}

/// The frame and the loop; addresses of preparation and loop.
fn code64(which: Loop) -> Result<(Vec<u8>, u64, u64), IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut prepare = a.create_label();
    let mut run = a.create_label();
    let mut halt = a.create_label();
    a.mov(esp, STACK_TOP)?;
    a.call(prepare)?;
    report(&mut a, b'S')?;
    a.mov(iced_x86::code_asm::rdi, which.count())?;
    a.call(run)?;
    a.mov(r12, rax)?;
    report(&mut a, b'E')?;
    for _ in 0..8 {
        a.mov(rax, r12)?;
        a.mov(edx, u32::from(REPORT_PORT))?;
        a.out(dx, al)?;
        a.shr(r12, 8)?;
    }
    a.mov(edx, u32::from(EXIT_PORT))?;
    a.xor(eax, eax)?;
    a.out(dx, al)?;
    a.set_label(&mut halt)?;
    a.hlt()?;
    a.jmp(halt)?;
    which.assemble(&mut a, &mut prepare, &mut run)?;
    let done = a.assemble_options(CODE64, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let (prepare, run) = (done.label_ip(&prepare)?, done.label_ip(&run)?);
    Ok((done.inner.code_buffer, prepare, run))
}

fn report(a: &mut CodeAssembler, byte: u8) -> Result<(), IcedError> {
    a.mov(eax, u32::from(byte))?;
    a.mov(edx, u32::from(REPORT_PORT))?;
    a.out(dx, al)
}
