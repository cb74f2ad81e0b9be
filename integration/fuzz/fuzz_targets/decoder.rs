//! Arbitrary bytes as guest code, in real, protected and long mode, as supervisor: nothing may panic, hang, or touch
//! memory outside the guest's RAM (guard pages on both sides would fault).
#![no_main]

use std::sync::{Arc, OnceLock};

use atoll_softcpu::state::{SegmentName, Table};
use atoll_softcpu::{Attention, Cpu, CpuModel, GuestRam, RamRegion, Segment, TimeMode, VcpuTopology, World};
use libfuzzer_sys::fuzz_target;

const RAM: usize = 0x4_0000;
const PAGE: usize = 4096;
const CODE: u64 = 0x1_0000;
const TABLES: usize = 0x2_0000;
const BUDGET: u64 = 4096;

/// Every access outside RAM reads as ones; interrupts come when the code asks a port for them.
struct Nothing(Attention, bool);

impl World for Nothing {
    fn mmio_read(&mut self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) {}
    fn pio_in(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_out(&mut self, _port: u16, _data: &[u8]) {
        self.1 = true;
        self.0.raise(Attention::INTERRUPT | Attention::DMA);
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        std::mem::take(&mut self.1).then_some(0x20)
    }
    fn read_msr(&mut self, msr: u32) -> Option<u64> {
        (msr & 1 == 0).then_some(u64::from(msr))
    }
    fn write_msr(&mut self, msr: u32, _value: u64) -> bool {
        msr & 1 == 0
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

/// RAM between two pages that nobody may touch.
fn ram() -> *mut u8 {
    static HOST: OnceLock<usize> = OnceLock::new();
    *HOST.get_or_init(|| {
        // SAFETY: a fresh anonymous reservation, of which the middle is made accessible; results are checked.
        unsafe {
            let none = libc::mmap(std::ptr::null_mut(), RAM + 2 * PAGE, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
            assert_ne!(none, libc::MAP_FAILED);
            let middle = none.cast::<u8>().add(PAGE);
            assert_eq!(libc::mprotect(middle.cast(), RAM, libc::PROT_READ | libc::PROT_WRITE), 0);
            middle as usize
        }
    }) as *mut u8
}

fuzz_target!(|input: &[u8]| {
    let Some((mode, rest)) = input.split_first() else { return };
    // Registers first, so that addresses are the fuzzer's choice.
    let registers = rest.get(..64).unwrap_or_default();
    let code = rest.get(64..).unwrap_or(rest);
    let host = ram();
    // SAFETY: the mapping lives for ever, and no CPU of an earlier input is left.
    let bytes = unsafe { std::slice::from_raw_parts_mut(host, RAM) };
    bytes.fill(0);
    let length = code.len().min(0x8000);
    bytes[CODE as usize..CODE as usize + length].copy_from_slice(&code[..length]);
    // Identity map of the first GiB by one large page; the page tables themselves are writable by the code.
    for (at, value) in [(TABLES, TABLES as u64 + 0x1007), (TABLES + 0x1000, 0x87)] {
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    // An IDT full of whatever the input holds.
    let idt = 0x3_0000;
    for (slot, byte) in bytes[idt..idt + PAGE].iter_mut().zip(code.iter().rev().cycle().take(if code.is_empty() { 0 } else { PAGE })) {
        *slot = *byte;
    }

    // SAFETY: as above.
    let region = unsafe { RamRegion::new(0, RAM as u64, host, true) };
    let Ok(model) = CpuModel::named("atoll-v2", VcpuTopology { index: 0, count: 1 }) else { return };
    let attention = Attention::default();
    let time = TimeMode::Retired { ns_per_1000: 1000 };
    let mut cpu = Cpu::new(GuestRam::new(vec![region]), Arc::new(model), attention.clone(), time);
    let flat = |attributes: u16| Segment { selector: 8, base: 0, limit: 0xffff_ffff, attributes };
    let code_attributes = match mode % 3 {
        0 => {
            cpu.sys.segments[SegmentName::Cs as usize] = Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x9b };
            cpu.regs.rip = 0x1000;
            bytes.copy_within(CODE as usize..CODE as usize + length.min(0x7000), 0x1000);
            None
        }
        1 => {
            cpu.sys.cr0 = 0x31;
            Some(0xc09b)
        }
        _ => {
            cpu.sys.cr0 = 0x8005_0031;
            cpu.sys.cr3 = TABLES as u64;
            cpu.sys.cr4 = 0x6b0;
            cpu.sys.efer = 0xd01;
            Some(0xa09b)
        }
    };
    if let Some(attributes) = code_attributes {
        cpu.sys.segments = [flat(0xc093); 6];
        cpu.sys.segments[SegmentName::Cs as usize] = flat(attributes);
        cpu.sys.idtr = Table { base: idt as u64, limit: 0xfff };
        cpu.regs.rip = CODE;
    }
    cpu.regs.rflags = 0x202;
    for (register, chunk) in cpu.regs.gpr.iter_mut().zip(registers.chunks_exact(4)) {
        *register = u64::from(u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]])) & 0x8000_0000_0004_ffff;
    }
    cpu.state_replaced();
    let mut world = Nothing(attention, false);
    let _ = cpu.run(&mut world, Some(BUDGET));
    assert!(cpu.retired() <= BUDGET + 1, "the budget is exact");
});
