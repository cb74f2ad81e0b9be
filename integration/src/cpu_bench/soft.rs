//! The loops on the software CPU, from the image's 32-bit entry on.
#![allow(unsafe_code, reason = "guest RAM is a host mapping")]

use super::Run;
use super::clock::ProcessorClock;
use super::image::{BASE, EXIT_PORT, Image, MULTIBOOT_MAGIC, RAM, REPORT_PORT};
use anyhow::{Context, bail};
use atoll_softcpu::{Attention, Cpu, CpuModel, GuestRam, RamRegion, Segment, Stop, TimeMode, VcpuTopology, World};
use std::sync::Arc;

/// RAM of one run.
struct Ram(*mut u8);

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: mapped by `run`; the CPU that used it is gone by then.
        unsafe { libc::munmap(self.0.cast(), RAM as usize) };
    }
}

/// A board with the two ports.
struct Ports {
    attention: Attention,
    started: Option<f64>,
    seconds: f64,
    checksum: Vec<u8>,
    ended: bool,
}

impl World for Ports {
    fn mmio_read(&mut self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) {}
    fn pio_in(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_out(&mut self, port: u16, data: &[u8]) {
        match (port, self.started, data) {
            (REPORT_PORT, None, b"S") => self.started = Some(ProcessorClock::THREAD.seconds()),
            (REPORT_PORT, Some(started), b"E") if self.seconds == 0.0 => {
                self.seconds = ProcessorClock::THREAD.seconds() - started;
            }
            (REPORT_PORT, ..) => self.checksum.extend_from_slice(data),
            (EXIT_PORT, ..) => {
                self.ended = true;
                self.attention.raise(Attention::STOP);
            }
            _ => {}
        }
    }
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

/// Runs an image on a new CPU; also the number of instructions, which is the same wherever it runs.
pub fn run(image: &Image) -> anyhow::Result<(Run, u64)> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let host = unsafe { libc::mmap(std::ptr::null_mut(), RAM as usize, protection, flags, -1, 0) };
    if host == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error()).context("no memory for the guest");
    }
    let ram = Ram(host.cast());
    // SAFETY: the image ends below its data, which lies within RAM.
    unsafe { ram.0.add(BASE as usize).copy_from_nonoverlapping(image.bytes.as_ptr(), image.bytes.len()) };
    // SAFETY: `ram` outlives the CPU, which is dropped at the end of this function before it.
    let region = unsafe { RamRegion::new(0, RAM, ram.0, true) };
    let model = Arc::new(CpuModel::named("atoll-v1", VcpuTopology::SINGLE)?);
    let attention = Attention::default();
    let mut cpu = Cpu::new(GuestRam::new(vec![region]), model, attention.clone(), TimeMode::Real);
    let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xc093 };
    cpu.sys.segments = [data; 6];
    cpu.sys.segments[1] = Segment { selector: 0x08, base: 0, limit: u32::MAX, attributes: 0xc09b };
    cpu.sys.cr0 = 0x11;
    cpu.regs.rip = image.entry;
    cpu.regs.gpr[0] = MULTIBOOT_MAGIC.into();
    cpu.state_replaced();
    let mut ports = Ports { attention, started: None, seconds: 0.0, checksum: Vec::new(), ended: false };
    let stop = cpu.run(&mut ports, None);
    if !ports.ended || stop != Stop::Requested {
        bail!("the software CPU stopped early: {stop:?} at {:#x}", cpu.regs.rip);
    }
    let checksum = <[u8; 8]>::try_from(ports.checksum.as_slice()).context("the software CPU reported no checksum")?;
    Ok((Run { checksum: u64::from_le_bytes(checksum), seconds: ports.seconds }, cpu.retired()))
}
