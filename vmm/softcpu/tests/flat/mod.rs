//! A bare machine in flat 64-bit mode: RAM, identity page tables of 2 MiB pages, no devices. Programs are written with
//! iced's assembler and end with HLT.
#![allow(unsafe_code, reason = "guest RAM is a host mapping")]
#![allow(dead_code, unreachable_pub, reason = "a module of several test programs, each of which uses its part")]

use std::sync::Arc;

use atoll_softcpu::{Attention, Cpu, CpuModel, GuestRam, RamRegion, Stop, TimeMode, VcpuTopology, World};
use iced_x86::code_asm::CodeAssembler;

/// Size of RAM.
pub const RAM: usize = 64 << 20;
/// Page tables.
pub const TABLES: u64 = 0x1000;
/// Code goes here.
pub const CODE: u64 = 0x10_0000;
/// Stack grows down from here.
pub const STACK: u64 = 0x80_0000;
/// Data.
pub const DATA: u64 = 0x100_0000;

/// A board without devices: remembers port writes, answers reads with all ones.
#[derive(Default)]
pub struct Bare {
    pub out: Vec<(u16, u32)>,
    pub now_ns: u64,
    pub vectors: Vec<u8>,
    /// How often it was told that time has passed, and with which of them it raises an interrupt.
    pub looks: u64,
    pub at_look: Option<(u64, u8, Attention)>,
}

impl World for Bare {
    fn look(&mut self) {
        self.looks += 1;
        if let Some((_, vector, attention)) = self.at_look.take_if(|(look, ..)| *look == self.looks) {
            self.vectors.push(vector);
            attention.raise(Attention::INTERRUPT);
        }
    }
    fn mmio_read(&mut self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) {}
    fn pio_in(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_out(&mut self, port: u16, data: &[u8]) {
        let mut bytes = [0; 4];
        bytes[..data.len()].copy_from_slice(data);
        self.out.push((port, u32::from_le_bytes(bytes)));
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.vectors.pop()
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
        0
    }
}

/// RAM with a CPU.
pub struct Machine {
    pub cpu: Cpu,
    pub world: Bare,
    pub attention: Attention,
    host: *mut u8,
}

// SAFETY: the mapping is plain memory that lives as long as the process.
unsafe impl Send for Machine {}

impl Machine {
    /// Real time.
    pub fn new() -> Self {
        Self::with_time(TimeMode::Real)
    }
    pub fn with_time(time: TimeMode) -> Self {
        // SAFETY: a fresh private mapping; it is never unmapped, so it outlives the CPU.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RAM,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(host, libc::MAP_FAILED);
        let host = host.cast::<u8>();
        // SAFETY: as above.
        let ram = GuestRam::new(vec![unsafe { RamRegion::new(0, RAM as u64, host, true) }]);
        let model = Arc::new(CpuModel::named("atoll-v2", VcpuTopology::SINGLE).expect("model"));
        let attention = Attention::default();
        let cpu = Cpu::new(ram, model, attention.clone(), time);
        let mut machine = Self { cpu, world: Bare::default(), attention, host };
        machine.long_mode();
        machine
    }
    fn long_mode(&mut self) {
        self.write(TABLES, &(TABLES + 0x1000 + 7).to_le_bytes());
        self.write(TABLES + 0x1000, &(TABLES + 0x2000 + 7).to_le_bytes());
        for n in 0..512u64 {
            self.write(TABLES + 0x2000 + n * 8, &((n << 21) + 0x87).to_le_bytes());
        }
        let sys = &mut self.cpu.sys;
        sys.cr3 = TABLES;
        sys.cr4 = 0x20 | 0x600;
        sys.efer = 0xd01;
        sys.cr0 = 0x8001_0031;
        for segment in &mut sys.segments {
            *segment = atoll_softcpu::Segment { selector: 0x10, base: 0, limit: !0, attributes: 0xc093 };
        }
        sys.segments[1] = atoll_softcpu::Segment { selector: 8, base: 0, limit: !0, attributes: 0xa09b };
        self.cpu.regs.gpr[4] = STACK;
        self.cpu.regs.rip = CODE;
        self.cpu.regs.rflags = 2;
        self.cpu.state_replaced();
    }
    /// 32-bit protected mode without paging, flat.
    pub fn protected_mode(&mut self) {
        let sys = &mut self.cpu.sys;
        sys.cr0 = 0x31;
        sys.efer = 0;
        for segment in &mut sys.segments {
            segment.attributes = 0xc093;
        }
        sys.segments[1].attributes = 0xc09b;
        self.cpu.state_replaced();
    }
    /// Real mode, all segments at zero.
    pub fn real_mode(&mut self) {
        let sys = &mut self.cpu.sys;
        sys.cr0 = 0x30;
        sys.efer = 0;
        for segment in &mut sys.segments {
            *segment = atoll_softcpu::Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x93 };
        }
        sys.segments[1].attributes = 0x9b;
        self.cpu.regs.gpr[4] = 0x7000;
        self.cpu.regs.rip = 0x7c00;
        self.cpu.state_replaced();
    }
    /// Assembles code of another width.
    pub fn load_bits(&mut self, bits: u32, at: u64, program: impl FnOnce(&mut CodeAssembler)) {
        let mut asm = CodeAssembler::new(bits).expect("assembler");
        program(&mut asm);
        let code = asm.assemble(at).expect("assembles");
        self.write(at, &code);
    }
    pub fn host(&self, gpa: u64) -> *mut u8 {
        assert!(gpa < RAM as u64);
        // SAFETY: within the mapping.
        unsafe { self.host.add(gpa as usize) }
    }
    pub fn write(&mut self, gpa: u64, data: &[u8]) {
        assert!(gpa as usize + data.len() <= RAM);
        // SAFETY: within the mapping.
        unsafe { std::ptr::copy(data.as_ptr(), self.host(gpa), data.len()) }
    }
    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        assert!(gpa as usize + len <= RAM);
        // SAFETY: within the mapping.
        unsafe { std::slice::from_raw_parts(self.host(gpa), len) }.to_vec()
    }
    pub fn read_u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.read(gpa, 8).try_into().expect("eight bytes"))
    }
    /// Assembles at `CODE` (the program must end with HLT).
    pub fn load(&mut self, program: impl FnOnce(&mut CodeAssembler)) {
        self.load_at(CODE, program);
    }
    pub fn load_at(&mut self, at: u64, program: impl FnOnce(&mut CodeAssembler)) {
        let mut asm = CodeAssembler::new(64).expect("assembler");
        program(&mut asm);
        let code = asm.assemble(at).expect("assembles");
        self.write(at, &code);
    }
    /// Interrupt descriptor table.
    const IDT: u64 = 0x8000;
    /// Global descriptor table: null, 64-bit code, data.
    const GDT: u64 = 0x9000;
    /// Makes an interrupt gate to `handler`.
    pub fn gate(&mut self, vector: u8, handler: u64) {
        self.write(Self::GDT + 8, &0x00af_9b00_0000_ffffu64.to_le_bytes());
        self.write(Self::GDT + 16, &0x00cf_9300_0000_ffffu64.to_le_bytes());
        self.cpu.sys.gdtr.base = Self::GDT;
        self.cpu.sys.gdtr.limit = 23;
        self.cpu.sys.idtr.base = Self::IDT;
        self.cpu.sys.idtr.limit = 0xfff;
        let low = (handler & 0xffff) | (8 << 16) | (0x8e00 << 32) | ((handler >> 16 & 0xffff) << 48);
        self.write(Self::IDT + u64::from(vector) * 16, &low.to_le_bytes());
        self.write(Self::IDT + u64::from(vector) * 16 + 8, &(handler >> 32).to_le_bytes());
    }
    /// Back to the start of the program.
    pub fn restart(&mut self) {
        self.cpu.regs.rip = CODE;
        self.cpu.halted = false;
    }
    /// Runs to HLT.
    pub fn run(&mut self) {
        let stop = self.cpu.run(&mut self.world, None);
        assert_eq!(stop, Stop::Halted, "rip {:#x}", self.cpu.regs.rip);
    }
    pub fn gpr(&self, n: usize) -> u64 {
        self.cpu.regs.gpr[n]
    }
}
