//! Runs cases on [`Cpu`] in flat 64-bit user mode, under page tables that give them the addresses of the host runner.
//! Every vector leads to a handler that halts, on a stack of its own, so the frame that the CPU pushed there tells how a
//! case ended.
#![allow(unsafe_code, reason = "guest RAM is a host mapping")]

use super::generate::{Slot, Start};
use super::layout::{CODE, DATA, DATA_MAPPED, DATA_WRITABLE, Memory, SLOT, SLOTS, STACK, STACK_LEN, TAKEN};
use super::outcome::{Fault, Outcome};
use crate::state::{SegmentName, Table};
use crate::{Attention, Cpu, CpuModel, GuestRam, RamRegion, Segment, Stop, TimeMode, World};
use std::sync::Arc;

const RAM_LEN: u64 = 0x8_0000;
/// Linear address of tables, handlers and their stack.
const KERNEL: u64 = 0x3000_0000;
// Guest-physical places.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const TABLES: u64 = 0x4000;
const KERNEL_GPA: u64 = 0x1_0000;
const DATA_GPA: u64 = 0x2_0000;
const STACK_GPA: u64 = 0x2_4000;
const CODE_GPA: u64 = 0x4_0000;
// Pages of the kernel area.
const GDT: u64 = 0;
const TSS: u64 = 0x100;
const IDT: u64 = 0x1000;
const HANDLERS: u64 = 0x2000;
const FRAME_TOP: u64 = 0x4000;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

/// Instructions after which a case counts as hung.
const BUDGET: u64 = 1 << 20;

/// The software CPU as the subject of the test.
pub(super) struct Soft {
    cpu: Cpu,
    ram: Ram,
    attention: Attention,
    loaded: bool,
}

struct Ram {
    host: *mut u8,
}

impl Ram {
    fn new() -> Self {
        // SAFETY: a fresh anonymous mapping; checked below.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RAM_LEN as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(host, libc::MAP_FAILED, "out of memory for {RAM_LEN:#x} bytes of guest RAM");
        Self { host: host.cast() }
    }

    fn bytes(&mut self, gpa: u64, len: u64) -> &mut [u8] {
        assert!(gpa + len <= RAM_LEN);
        // SAFETY: within the mapping; the CPU does not run while the borrow lives.
        unsafe { std::slice::from_raw_parts_mut(self.host.add(gpa as usize), len as usize) }
    }

    fn set(&mut self, gpa: u64, value: u64) {
        self.bytes(gpa, 8).copy_from_slice(&value.to_le_bytes());
    }

    fn get(&mut self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.bytes(gpa, 8).try_into().unwrap_or_default())
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; the CPU that used it goes with its owner.
        unsafe { libc::munmap(self.host.cast(), RAM_LEN as usize) };
    }
}

/// A board with nothing on it.
struct Nothing;

impl World for Nothing {
    fn mmio_read(&mut self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) {}
    fn pio_in(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_out(&mut self, _port: u16, _data: &[u8]) {}
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn read_msr(&mut self, _msr: u32) -> Option<u64> {
        None
    }
    fn write_msr(&mut self, _msr: u32, _value: u64) -> bool {
        false
    }
    fn read_cr8(&mut self) -> u64 {
        0
    }
    fn write_cr8(&mut self, _value: u64) {}
    fn now_ns(&mut self) -> u64 {
        0
    }
    fn wall_clock_base_ns(&mut self) -> u64 {
        0
    }
}

impl Soft {
    pub(super) fn new(model: Arc<CpuModel>) -> Self {
        let mut ram = Ram::new();
        lay_out(&mut ram);
        // SAFETY: `ram` lives in the same value as the CPU and is dropped after it (field order).
        let region = unsafe { RamRegion::new(0, RAM_LEN, ram.host, true) };
        let attention = Attention::default();
        let time = TimeMode::Retired { ns_per_1000: 1000 };
        let mut cpu = Cpu::new(GuestRam::new(vec![region]), model, attention.clone(), time);
        let sys = &mut cpu.sys;
        sys.cr0 = 0x8005_0033;
        sys.cr3 = PML4;
        sys.cr4 = 0x620;
        sys.efer = 0xd01;
        sys.gdtr = Table { base: KERNEL + GDT, limit: 0x4f };
        sys.idtr = Table { base: KERNEL + IDT, limit: 0xfff };
        sys.tr = Segment { selector: 0x40, base: KERNEL + TSS, limit: 0x67, attributes: 0x8b };
        cpu.state_replaced();
        Self { cpu, ram, attention, loaded: false }
    }

    /// Puts the instructions of a batch in place.
    pub(super) fn load(&mut self, slots: &[Slot]) {
        for slot in slots {
            let mut bytes = vec![0xcc; SLOT as usize];
            bytes[..slot.bytes.len()].copy_from_slice(&slot.bytes);
            debug_assert_eq!(bytes[TAKEN as usize], 0xcc);
            self.ram.bytes(CODE_GPA + (slot.address - CODE), SLOT).copy_from_slice(&bytes);
        }
        if self.loaded {
            // As if a device had written there: decoded code must be looked at again.
            self.attention.raise(Attention::DMA);
        }
        self.loaded = true;
    }

    /// Sets all memory.
    pub(super) fn restore(&mut self, memory: &Memory) {
        self.ram.bytes(DATA_GPA, DATA_MAPPED).copy_from_slice(&memory.data);
        self.ram.bytes(STACK_GPA, STACK_LEN).copy_from_slice(&memory.stack);
    }

    /// The writable memory: data, stack.
    pub(super) fn memory(&mut self) -> [&mut [u8]; 2] {
        const { assert!(DATA_GPA + DATA_MAPPED <= STACK_GPA) };
        let all = self.ram.bytes(DATA_GPA, STACK_GPA + STACK_LEN - DATA_GPA);
        let (data, stack) = all.split_at_mut((STACK_GPA - DATA_GPA) as usize);
        [&mut data[..DATA_WRITABLE as usize], stack]
    }

    /// Runs a loaded slot; `ends` are the addresses of its two ends.
    pub(super) fn run(&mut self, start: &Start, ends: [u64; 2]) -> Outcome {
        let cpu = &mut self.cpu;
        cpu.regs.gpr = start.gpr;
        cpu.regs.rip = start.rip;
        cpu.regs.rflags = start.rflags;
        if let Some(fp) = &start.fp {
            cpu.regs.fp = (**fp).clone();
        }
        let segments = &mut cpu.sys.segments;
        *segments = [Segment::default(); 6];
        segments[SegmentName::Cs as usize] = Segment { selector: 0x33, base: 0, limit: u32::MAX, attributes: 0xa0fb };
        segments[SegmentName::Ss as usize] = Segment { selector: 0x2b, base: 0, limit: u32::MAX, attributes: 0xc0f3 };
        cpu.sys.cr2 = 0;
        cpu.halted = false;
        let stop = cpu.run(&mut Nothing, Some(BUDGET));
        let cpu = &self.cpu;
        let mut outcome = Outcome {
            gpr: cpu.regs.gpr,
            rip: cpu.regs.rip,
            rflags: cpu.regs.rflags,
            fault: None,
            fp: start.fp.is_some().then(|| Box::new(cpu.regs.fp.clone())),
        };
        let vector = cpu.regs.rip.wrapping_sub(KERNEL + HANDLERS + 1) / 16;
        if stop != Stop::Halted || vector >= 256 {
            // No way that the host could end.
            outcome.fault = Some(Fault { vector: 0xff, error: stop as u32, cr2: 0 });
            return outcome;
        }
        let cr2 = cpu.sys.cr2;
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let mut word = |index: u64| self.ram.get(KERNEL_GPA + FRAME_TOP - 8 * index);
        outcome.gpr[4] = word(2);
        outcome.rflags = word(3);
        outcome.rip = word(5);
        if vector == 3 && ends.contains(&outcome.rip.wrapping_sub(1)) {
            outcome.rip -= 1;
        } else {
            outcome.fault = Some(Fault {
                vector: vector as u8,
                error: if has_error { word(6) as u32 } else { 0 },
                cr2: if vector == 14 { cr2 } else { 0 },
            });
        }
        outcome
    }
}

/// Page tables, descriptors, handlers.
fn lay_out(ram: &mut Ram) {
    ram.set(PML4, PDPT | PRESENT | WRITABLE | USER);
    ram.set(PDPT, DIRECTORY | PRESENT | WRITABLE | USER);
    let areas = [
        (CODE, CODE_GPA, SLOTS * SLOT, PRESENT | WRITABLE | USER),
        (DATA, DATA_GPA, DATA_WRITABLE, PRESENT | WRITABLE | USER | NO_EXECUTE),
        (DATA + DATA_WRITABLE, DATA_GPA + DATA_WRITABLE, DATA_MAPPED - DATA_WRITABLE, PRESENT | USER | NO_EXECUTE),
        (STACK, STACK_GPA, STACK_LEN, PRESENT | WRITABLE | USER | NO_EXECUTE),
        (KERNEL, KERNEL_GPA, FRAME_TOP, PRESENT | WRITABLE),
    ];
    let mut tables = TABLES;
    for (linear, gpa, len, flags) in areas {
        let entry = DIRECTORY + (linear >> 21 & 511) * 8;
        if ram.get(entry) == 0 {
            ram.set(entry, tables | PRESENT | WRITABLE | USER);
            tables += 0x1000;
        }
        let table = ram.get(entry) & !0xfff;
        for page in 0..len / 0x1000 {
            let slot = table + ((linear >> 12 & 511) + page) * 8;
            ram.set(slot, (gpa + page * 0x1000) | flags);
        }
    }
    let kernel = KERNEL_GPA;
    // The host kernel's selectors for user space, so that reading a segment register gives the same.
    for (selector, descriptor) in [
        (0x10, 0x00af_9b00_0000_ffff_u64),
        (0x18, 0x00cf_9300_0000_ffff),
        (0x20, 0x00cf_fb00_0000_ffff),
        (0x28, 0x00cf_f300_0000_ffff),
        (0x30, 0x00af_fb00_0000_ffff),
    ] {
        ram.set(kernel + GDT + selector, descriptor);
    }
    // TSS: RSP0 at 4, IST1 at 0x24, I/O map beyond the limit.
    for place in [4, 0x24] {
        ram.bytes(kernel + TSS + place, 8).copy_from_slice(&(KERNEL + FRAME_TOP).to_le_bytes());
    }
    ram.bytes(kernel + TSS + 0x66, 2).copy_from_slice(&0x68u16.to_le_bytes());
    for vector in 0..256 {
        let handler = KERNEL + HANDLERS + 16 * vector;
        let gate = handler & 0xffff | 0x10 << 16 | 1 << 32 | 0xee << 40 | (handler >> 16 & 0xffff) << 48;
        ram.set(kernel + IDT + 16 * vector, gate);
        ram.set(kernel + IDT + 16 * vector + 8, handler >> 32);
        ram.bytes(kernel + HANDLERS + 16 * vector, 1)[0] = 0xf4;
    }
}
