//! Starts an ELF kernel by PVH on the software CPU alone: RAM, a transmitter at 0x3f8 and nothing else. There is no
//! interrupt and no timer, so a kernel gets as far as its first wait; what it prints until then, and where it is when
//! it stops, is what this is for.
//!
//!     cargo run --release -p atoll-softcpu --example pvh -- VMLINUX "console=ttyS0 earlyprintk=serial" [MILLIONS [INITRAMFS]]
//!
//! MILLIONS bounds the instructions (default 2000). With STEP=n in the environment, registers are printed after each n
//! instructions.
#![allow(unsafe_code, reason = "maps guest RAM")]

use std::io::{self, Write};
use std::ptr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use atoll_softcpu::state::{Segment, SegmentName};
use atoll_softcpu::{Attention, Cpu, CpuModel, GuestRam, RamRegion, Stop, TimeMode, VcpuTopology, World};

const RAM_BYTES: usize = 256 << 20;
const START_INFO: usize = 0x6000;
const MEMORY_MAP: usize = 0x6100;
const MODULES: usize = 0x6200;
const COMMAND_LINE: usize = 0x7000;
/// Type of the ELF note with the 32-bit entry point.
const PHYS32_ENTRY: u32 = 18;

/// The transmitter half of an 8250; everything else is an empty bus.
struct Console {
    power_on: Instant,
    scratch: u8,
}

impl World for Console {
    fn mmio_read(&mut self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) {}
    fn pio_in(&mut self, port: u16, data: &mut [u8]) {
        data.fill(match port {
            // Line status: transmitter empty. Modem status: clear to send, ready, carrier. No interrupt pending.
            0x3fd => 0x60,
            0x3fe => 0xb0,
            0x3fa => 0xc1,
            0x3ff => self.scratch,
            0x3f8..=0x3fc => 0,
            // Channel 2 of the timer has run out.
            0x61 => 0x20,
            _ => 0xff,
        });
    }
    fn pio_out(&mut self, port: u16, data: &[u8]) {
        match (port, data) {
            (0x3f8, [byte]) => {
                let _ = io::stderr().write_all(&[*byte]);
            }
            (0x3ff, [byte]) => self.scratch = *byte,
            _ => {}
        }
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn read_msr(&mut self, msr: u32) -> Option<u64> {
        (msr == 0x1b).then_some(0xfee0_0900)
    }
    fn write_msr(&mut self, msr: u32, _value: u64) -> bool {
        msr == 0x1b || (0x800..0x900).contains(&msr)
    }
    fn read_cr8(&mut self) -> u64 {
        0
    }
    fn write_cr8(&mut self, _value: u64) {}
    fn now_ns(&mut self) -> u64 {
        self.power_on.elapsed().as_nanos() as u64
    }
    fn wall_clock_base_ns(&mut self) -> u64 {
        0
    }
}

fn number(bytes: &[u8], at: usize, len: usize) -> Result<usize> {
    let field = bytes.get(at..at + len).context("the ELF file is cut short")?;
    Ok(field.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte)))
}

/// Copies the loadable segments and returns the PVH entry point.
fn load(elf: &[u8], ram: &mut [u8]) -> Result<u64> {
    ensure!(elf.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit ELF file");
    let (table, size, count) = (number(elf, 32, 8)?, number(elf, 54, 2)?, number(elf, 56, 2)?);
    let mut entry = None;
    for header in (0..count).map(|index| table + index * size) {
        let kind = number(elf, header, 4)?;
        let (offset, to, len) =
            (number(elf, header + 8, 8)?, number(elf, header + 24, 8)?, number(elf, header + 32, 8)?);
        let content = elf.get(offset..offset + len).context("a segment lies outside the file")?;
        match kind {
            1 => ram.get_mut(to..to + len).context("a segment lies outside RAM")?.copy_from_slice(content),
            4 => entry = entry.or(find_entry(content)?),
            _ => {}
        }
    }
    entry.context("the kernel has no PVH entry point")
}

fn find_entry(notes: &[u8]) -> Result<Option<u64>> {
    let mut at = 0;
    while at + 12 <= notes.len() {
        let (name, content, kind) = (number(notes, at, 4)?, number(notes, at + 4, 4)?, number(notes, at + 8, 4)?);
        let value = at + 12 + name.next_multiple_of(4);
        if notes.get(at + 12..at + 15) == Some(b"Xen") && kind == PHYS32_ENTRY as usize {
            return Ok(Some(number(notes, value, content.min(8))? as u64));
        }
        at = value + content.next_multiple_of(4);
    }
    Ok(None)
}

fn put(ram: &mut [u8], at: usize, words: &[u64]) {
    for (index, word) in words.iter().enumerate() {
        ram[at + 8 * index..at + 8 * index + 8].copy_from_slice(&word.to_le_bytes());
    }
}

fn report(cpu: &Cpu, started: Instant) -> Result<()> {
    let seconds = started.elapsed().as_secs_f64();
    let mut err = io::stderr().lock();
    let (regs, sys) = (&cpu.regs, &cpu.sys);
    writeln!(err, "\n{} instructions, {:.0} MIPS", cpu.retired(), cpu.retired() as f64 / seconds / 1e6)?;
    writeln!(err, "rip {:016x} flags {:08x} halted {}", regs.rip, regs.rflags, cpu.halted)?;
    for (index, value) in regs.gpr.iter().enumerate() {
        write!(err, "r{index:<2} {value:016x}{}", if index % 4 == 3 { "\n" } else { "  " })?;
    }
    writeln!(err, "cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x}", sys.cr0, sys.cr2, sys.cr3, sys.cr4, sys.efer)?;
    writeln!(err, "cs {:x?}\nss {:x?}\nidt {:x?} gdt {:x?}", sys.segments[1], sys.segments[2], sys.idtr, sys.gdtr)?;
    Ok(())
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().context("usage: pvh VMLINUX [COMMAND LINE [MILLIONS [INITRAMFS]]]")?;
    let command_line = arguments.next().unwrap_or_else(|| "console=ttyS0 earlyprintk=serial".to_owned());
    let millions: u64 = arguments.next().map_or(Ok(2000), |text| text.parse())?;
    let initramfs = arguments.next();
    let step: Option<u64> = std::env::var("STEP").ok().map(|text| text.parse()).transpose()?;

    // SAFETY: a fresh anonymous mapping, which lives until the process ends.
    let host = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(ptr::null_mut(), RAM_BYTES, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    ensure!(host != libc::MAP_FAILED, "no memory for the guest");
    // SAFETY: the mapping has this size, and nobody else uses it before the processor runs.
    let ram = unsafe { std::slice::from_raw_parts_mut(host.cast::<u8>(), RAM_BYTES) };
    let entry = load(&std::fs::read(&path).with_context(|| format!("cannot read {path}"))?, ram)?;
    ram[COMMAND_LINE..COMMAND_LINE + command_line.len()].copy_from_slice(command_line.as_bytes());
    put(ram, MEMORY_MAP, &[0, 0xa_0000, 1, 0x10_0000, RAM_BYTES as u64 - 0x10_0000, 1]);
    let mut modules = 0;
    if let Some(path) = initramfs {
        let content = std::fs::read(&path).with_context(|| format!("cannot read {path}"))?;
        let at = (RAM_BYTES - content.len()) & !0xfff;
        ram[at..at + content.len()].copy_from_slice(&content);
        put(ram, MODULES, &[at as u64, content.len() as u64, 0, 0]);
        modules = 1;
    }
    put(ram, START_INFO, &[0x1_336e_c578, modules << 32, MODULES as u64, COMMAND_LINE as u64, 0, MEMORY_MAP as u64, 2]);

    // SAFETY: mapped above for good.
    let region = unsafe { RamRegion::new(0, RAM_BYTES as u64, host.cast(), true) };
    let model = Arc::new(CpuModel::named("atoll-v1", VcpuTopology::SINGLE)?);
    let mut cpu = Cpu::new(GuestRam::new(vec![region]), model, Attention::default(), TimeMode::Real);
    for segment in &mut cpu.sys.segments {
        *segment = Segment { selector: 0x10, base: 0, limit: !0, attributes: 0xc093 };
    }
    cpu.sys.segments[SegmentName::Cs as usize] = Segment { selector: 8, base: 0, limit: !0, attributes: 0xc09b };
    cpu.sys.cr0 = 0x11;
    cpu.sys.stored.mtrr_default = 0xc06;
    cpu.regs.rip = entry;
    cpu.regs.gpr[3] = START_INFO as u64;
    cpu.state_replaced();

    let started = Instant::now();
    let mut world = Console { power_on: started, scratch: 0 };
    let end = millions * 1_000_000;
    while cpu.retired() < end {
        match cpu.run(&mut world, Some(step.unwrap_or(end).min(end - cpu.retired()))) {
            Stop::Budget if step.is_some() => report(&cpu, started)?,
            Stop::Budget => {}
            stop @ (Stop::Halted | Stop::TripleFault | Stop::Requested) => {
                report(&cpu, started)?;
                bail!("stopped: {stop:?}");
            }
        }
    }
    report(&cpu, started)
}
