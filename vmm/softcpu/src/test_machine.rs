//! What the unit tests of the privileged half run on: a little RAM, a board that answers nothing, and a processor.
#![allow(unsafe_code, reason = "tests own the host memory that stands for guest RAM")]

use std::sync::Arc;

use crate::cpu::{Cpu, TimeMode};
use crate::cpuid::{CpuModel, VcpuTopology};
use crate::ram::{GuestRam, RamRegion};
use crate::state::{Segment, SegmentName};
use crate::walk::{CR0_PG, CR4_PAE, EFER_LMA};
use crate::world::{Attention, World};

/// A frame of host memory at a page boundary.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Frame([u8; 4096]);

/// A board without devices; it notes what it is asked.
#[derive(Debug, Default)]
pub(crate) struct BareWorld {
    /// Guest time.
    pub(crate) now_ns: u64,
    /// UTC at guest time zero.
    pub(crate) wall_ns: u64,
    /// Guest-physical addresses read outside RAM, with the length.
    pub(crate) reads: Vec<(u64, usize)>,
    /// Writes outside RAM.
    pub(crate) writes: Vec<(u64, Vec<u8>)>,
}

impl World for BareWorld {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        self.reads.push((gpa, data.len()));
        data.fill(0xff);
    }
    fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        self.writes.push((gpa, data.to_vec()));
    }
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
        self.now_ns
    }
    fn wall_clock_base_ns(&mut self) -> u64 {
        self.wall_ns
    }
}

/// A processor with `RAM_BYTES` of RAM from address zero.
pub(crate) struct TestMachine {
    pub(crate) cpu: Cpu,
    pub(crate) world: BareWorld,
    frames: Box<[Frame]>,
}

/// RAM of a test machine.
pub(crate) const RAM_BYTES: u64 = 1 << 20;

/// Attributes of flat segments at DPL 0.
pub(crate) const CODE64: u16 = 0xa09b;
pub(crate) const CODE32: u16 = 0xc09b;
pub(crate) const DATA32: u16 = 0xc093;

impl TestMachine {
    pub(crate) fn new() -> Self {
        let mut frames = vec![Frame([0; 4096]); (RAM_BYTES / 4096) as usize].into_boxed_slice();
        // SAFETY: the boxed frames outlive the processor, which is dropped before them (field order).
        let region = unsafe { RamRegion::new(0, RAM_BYTES, frames.as_mut_ptr().cast(), true) };
        let model = CpuModel::named("atoll-v1", VcpuTopology::SINGLE).expect("a known model");
        let cpu = Cpu::new(GuestRam::new(vec![region]), Arc::new(model), Attention::default(), TimeMode::Real);
        Self { cpu, world: BareWorld::default(), frames }
    }

    /// Puts the processor into flat 32-bit protected mode without paging, at privilege 0.
    pub(crate) fn protected() -> Self {
        let mut machine = Self::new();
        machine.cpu.sys.cr0 |= 1;
        for segment in &mut machine.cpu.sys.segments {
            *segment = Segment { selector: 0x10, base: 0, limit: 0xffff_ffff, attributes: DATA32 };
        }
        machine.set_code(0x08, CODE32);
        machine.cpu.state_replaced();
        machine
    }

    /// Puts the processor into 64-bit mode at privilege 0, with the first 1 GiB mapped onto itself, for supervisors,
    /// by tables at 0xe_0000.
    pub(crate) fn long() -> Self {
        let mut machine = Self::protected();
        machine.write64(0xe_0000, 0xe_1003);
        machine.write64(0xe_1000, 0x83);
        let sys = &mut machine.cpu.sys;
        sys.cr3 = 0xe_0000;
        sys.cr4 |= CR4_PAE;
        sys.efer |= EFER_LMA | 1 << 8;
        sys.cr0 |= CR0_PG;
        machine.set_code(0x08, CODE64);
        machine.cpu.state_replaced();
        machine
    }

    pub(crate) fn set_code(&mut self, selector: u16, attributes: u16) {
        self.cpu.sys.segments[SegmentName::Cs as usize] = Segment { selector, base: 0, limit: 0xffff_ffff, attributes };
    }

    fn at(&mut self, gpa: u64, len: usize) -> *mut u8 {
        assert!(gpa + len as u64 <= RAM_BYTES);
        // SAFETY: within the allocation, as was just checked.
        unsafe { self.frames.as_mut_ptr().cast::<u8>().add(gpa as usize) }
    }

    pub(crate) fn write(&mut self, gpa: u64, data: &[u8]) {
        let to = self.at(gpa, data.len());
        // SAFETY: `at` has checked the range.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
    }

    pub(crate) fn write64(&mut self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub(crate) fn read64(&mut self, gpa: u64) -> u64 {
        let from = self.at(gpa, 8).cast::<u64>();
        // SAFETY: `at` has checked the range.
        unsafe { from.read_unaligned() }
    }

    pub(crate) fn read32(&mut self, gpa: u64) -> u32 {
        let from = self.at(gpa, 4).cast::<u32>();
        // SAFETY: `at` has checked the range.
        unsafe { from.read_unaligned() }
    }

    pub(crate) fn read16(&mut self, gpa: u64) -> u16 {
        let from = self.at(gpa, 2).cast::<u16>();
        // SAFETY: `at` has checked the range.
        unsafe { from.read_unaligned() }
    }

    /// A descriptor from base, limit as stored (20 bits) and attributes.
    pub(crate) fn descriptor(base: u32, limit: u32, attributes: u16) -> u64 {
        let base = u64::from(base);
        let limit = u64::from(limit);
        limit & 0xffff
            | (base & 0xff_ffff) << 16
            | u64::from(attributes) << 40
            | (limit >> 16 & 0xf) << 48
            | (base >> 24) << 56
    }
}
