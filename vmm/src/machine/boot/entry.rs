//! What the boot processor finds: parameters in memory and registers, by PVH and by the Linux 64-bit boot protocol.

use atoll_softcpu::state::{Regs, Segment, SegmentName, System, Table};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::image::Initramfs;
use super::{BootError, MapEntry, place};
use crate::cpu::{CpuState, reset_system};
use crate::machine::layout::Span;

/// Magic of a PVH start info ("xEn3" with the top bit of E set).
const PVH_MAGIC: u32 = 0x336e_c578;
/// `type_of_loader`: one without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// MTRRdefType as firmware leaves it: enabled, fixed ranges too, write-back wherever nothing else is said.
const MTRR_WRITE_BACK: u64 = 0xc06;

/// Present, writable; and a large page.
const ENTRY_TABLE: u64 = 3;
const ENTRY_LARGE_PAGE: u64 = 0x83;

/// Flat segments in the format of [`Segment::attributes`].
mod attributes {
    pub(super) const CODE32: u16 = 0xc09b;
    pub(super) const CODE64: u16 = 0xa09b;
    pub(super) const DATA: u16 = 0xc093;
    pub(super) const TSS: u16 = 0x8b;
    pub(super) const LDT: u16 = 0x82;
}

fn put(memory: &GuestMemoryMmap, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    let span = Span { start: at, len: bytes.len() as u64 };
    memory.write_slice(bytes, GuestAddress(at)).map_err(|_| BootError::NoRam(span))
}

fn put_object<T: vm_memory::ByteValued>(memory: &GuestMemoryMmap, at: u64, object: T) -> Result<(), BootError> {
    put(memory, at, object.as_slice())
}

/// Writes the command line with its terminating zero.
pub(super) fn command_line(text: &str, memory: &GuestMemoryMmap, kernel_max: usize) -> Result<(), BootError> {
    let max = kernel_max.min(place::COMMAND_LINE_MAX);
    if text.len() + 1 > max {
        return Err(BootError::CommandLineTooLong { len: text.len(), max: max.saturating_sub(1) });
    }
    if text.contains('\0') {
        return Err(BootError::CommandLineZero);
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    put(memory, place::COMMAND_LINE, &bytes)
}

/// The state that both protocols have in common: flat segments, everything else as after reset.
fn flat(code: Segment, data: Segment) -> System {
    let mut segments = [data; 6];
    segments[SegmentName::Cs as usize] = code;
    let mut system = reset_system();
    system.segments = segments;
    system.ldtr = Segment { selector: 0, base: 0, limit: 0xffff, attributes: attributes::LDT };
    system.tr = Segment { selector: 0, base: 0, limit: 0x67, attributes: attributes::TSS };
    (system.gdtr, system.idtr) = (Table::default(), Table::default());
    system.cr0 = CR0_PE | CR0_ET;
    system.stored.mtrr_default = MTRR_WRITE_BACK;
    system
}

/// PVH (Xen `docs/misc/pvh.pandoc`): 32-bit protected mode, paging off, EBX points at the start info.
pub(super) fn pvh(
    memory: &GuestMemoryMmap,
    rip: u64,
    initramfs: Option<Initramfs>,
    map: &[MapEntry],
    rsdp: u64,
) -> Result<CpuState, BootError> {
    let mut info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        cmdline_paddr: place::COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: place::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some(initramfs) = initramfs {
        info.nr_modules = 1;
        info.modlist_paddr = place::PVH_MODULES;
        let module = hvm_modlist_entry { paddr: initramfs.span.start, size: initramfs.span.len, ..Default::default() };
        put_object(memory, place::PVH_MODULES, module)?;
    }
    for (index, entry) in map.iter().enumerate() {
        let size = size_of::<hvm_memmap_table_entry>();
        let wire = hvm_memmap_table_entry {
            addr: entry.span.start,
            size: entry.span.len,
            type_: entry.kind as u32,
            reserved: 0,
        };
        put_object(memory, place::PVH_MEMORY_MAP + (index * size) as u64, wire)?;
    }
    put_object(memory, place::PARAMETERS, info)?;

    let mut regs = Regs::default();
    regs.rip = rip;
    regs.rflags = 2;
    regs.gpr[3] = place::PARAMETERS;
    let code = Segment { selector: 8, base: 0, limit: u32::MAX, attributes: attributes::CODE32 };
    let data = Segment { selector: 16, base: 0, limit: u32::MAX, attributes: attributes::DATA };
    Ok(CpuState { regs, system: flat(code, data) })
}

/// Linux boot protocol, "64-bit boot": long mode, memory below 4 GiB mapped onto itself, RSI points at the zero page.
pub(super) fn linux64(
    memory: &GuestMemoryMmap,
    rip: u64,
    header: setup_header,
    initramfs: Option<Initramfs>,
    map: &[MapEntry],
    rsdp: u64,
) -> Result<CpuState, BootError> {
    let mut parameters = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    parameters.hdr.type_of_loader = LOADER_UNDEFINED;
    parameters.hdr.cmd_line_ptr = place::COMMAND_LINE as u32;
    if let Some(initramfs) = initramfs {
        // Below 2 GiB: see `image`.
        parameters.hdr.ramdisk_image = initramfs.span.start as u32;
        parameters.hdr.ramdisk_size = initramfs.span.len as u32;
    }
    for (slot, entry) in parameters.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: entry.span.start, size: entry.span.len, r#type: entry.kind as u32 };
        parameters.e820_entries += 1;
    }
    put_object(memory, place::PARAMETERS, parameters)?;
    identity_map(memory)?;

    // Null, unused, code, data: selectors 0x10 and 0x18, as the protocol demands.
    let gdt: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    let bytes: Vec<u8> = gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    put(memory, place::GDT, &bytes)?;

    let mut regs = Regs::default();
    regs.rip = rip;
    regs.rflags = 2;
    regs.gpr[6] = place::PARAMETERS;
    let code = Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: attributes::CODE64 };
    let data = Segment { selector: 0x18, base: 0, limit: u32::MAX, attributes: attributes::DATA };
    let mut system = flat(code, data);
    system.gdtr = Table { base: place::GDT, limit: bytes.len() as u16 - 1 };
    system.cr0 |= CR0_PG;
    system.cr3 = place::PAGE_TABLES;
    system.cr4 = CR4_PAE;
    system.efer = EFER_LME | EFER_LMA;
    Ok(CpuState { regs, system })
}

/// Four-level tables that map the first 4 GiB onto themselves in 2 MiB pages.
fn identity_map(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    const PAGE: u64 = 4096;
    let table = |index: u64| place::PAGE_TABLES + index * PAGE;
    put(memory, table(0), &(table(1) | ENTRY_TABLE).to_le_bytes())?;
    for gigabyte in 0..4 {
        put(memory, table(1) + gigabyte * 8, &(table(2 + gigabyte) | ENTRY_TABLE).to_le_bytes())?;
        let pages: Vec<u8> =
            (0..512_u64).flat_map(|page| ((gigabyte << 30 | page << 21) | ENTRY_LARGE_PAGE).to_le_bytes()).collect();
        put(memory, table(2 + gigabyte), &pages)?;
    }
    Ok(())
}
