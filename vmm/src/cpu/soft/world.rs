//! What the software CPU asks of the board: its own chips here, everything else on the bus.

use atoll_softcpu::World;

use super::chips::{Chips, owns_port};
use crate::cpu::{GuestBus, Space};
use crate::irq::Doorstep;
use crate::machine::layout::{IOAPIC, LAPIC, Span};

/// Registers of the local APIC that set its timer: spurious vector, LVT timer, initial count, divisor (SDM vol. 3, 10.4).
const TIMER_REGISTERS: [u64; 4] = [0xf0, 0x320, 0x380, 0x3e0];
/// MSRs that do: APIC base, TSC deadline and the x2APIC forms of the above.
const TIMER_MSRS: [u32; 6] = [0x1b, 0x6e0, 0x80f, 0x832, 0x838, 0x83e];

/// Guest time between two looks at the eventfds while the guest is busy. What comes meanwhile is one interrupt: with looks
/// every 8 us a TCP stream had twice as many, each of which costs the guest thousands of instructions.
const LOOK_NS: u64 = 50_000;

/// The board during one call of `Cpu::run`.
pub(super) struct BoardWorld<'a> {
    pub(super) cpu: usize,
    pub(super) chips: &'a Chips,
    /// Where backends interrupt.
    pub(super) doorstep: &'a Doorstep<'a>,
    /// When to look there again.
    pub(super) next_look_ns: u64,
    /// Timers are due by the clock; in deterministic mode they are at the ends of slices.
    pub(super) timers: bool,
    pub(super) bus: &'a mut dyn GuestBus,
    pub(super) wall_base_ns: u64,
}

/// The offset of an access in `span`, if it lies there whole.
fn within(span: Span, address: u64, len: usize) -> Option<u64> {
    let offset = address.checked_sub(span.start)?;
    (offset.checked_add(len as u64)? <= span.len).then_some(offset)
}

/// Splits what is not one access of a bus (REP INS to memory-mapped registers, 16-byte stores) into those that are.
fn pieces(len: usize) -> usize {
    match len {
        1 | 2 | 4 | 8 => len,
        _ if len.is_multiple_of(8) => 8,
        _ if len.is_multiple_of(4) => 4,
        _ if len.is_multiple_of(2) => 2,
        _ => 1,
    }
}

impl World for BoardWorld<'_> {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        if let Some(offset) = within(LAPIC, gpa, data.len()) {
            self.chips.irq().lapic_read(self.cpu, offset, data, self.chips.now_ns());
        } else if let Some(offset) = within(IOAPIC, gpa, data.len()) {
            self.chips.irq().ioapic_read(offset, data);
        } else {
            let piece = pieces(data.len());
            for (index, part) in data.chunks_mut(piece).enumerate() {
                self.bus.read(Space::Mmio, gpa.wrapping_add((index * piece) as u64), part);
            }
        }
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        if let Some(offset) = within(LAPIC, gpa, data.len()) {
            self.chips.irq().lapic_write(self.cpu, offset, data, self.chips.now_ns());
            if TIMER_REGISTERS.contains(&(offset & !15)) {
                self.chips.timers_changed();
            }
        } else if let Some(offset) = within(IOAPIC, gpa, data.len()) {
            self.chips.irq().ioapic_write(offset, data);
        } else {
            let piece = pieces(data.len());
            for (index, part) in data.chunks(piece).enumerate() {
                self.bus.write(Space::Mmio, gpa.wrapping_add((index * piece) as u64), part);
            }
        }
    }

    fn pio_in(&mut self, port: u16, data: &mut [u8]) {
        if owns_port(port) {
            self.chips.read_port(port, data);
        } else {
            self.bus.read(Space::Pio, u64::from(port), data);
        }
    }

    fn pio_out(&mut self, port: u16, data: &[u8]) {
        if owns_port(port) {
            self.chips.write_port(port, data);
        } else {
            self.bus.write(Space::Pio, u64::from(port), data);
        }
    }

    fn look(&mut self) {
        let now = self.chips.now_ns();
        if self.timers && self.chips.is_due(now) {
            self.chips.expire();
        }
        if now >= self.next_look_ns {
            self.next_look_ns = now.saturating_add(LOOK_NS);
            self.doorstep.deliver();
        }
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.chips.irq().acknowledge(self.cpu)
    }

    fn read_msr(&mut self, msr: u32) -> Option<u64> {
        self.chips.irq().read_msr(self.cpu, msr, self.chips.now_ns())
    }

    fn write_msr(&mut self, msr: u32, value: u64) -> bool {
        let known = self.chips.irq().write_msr(self.cpu, msr, value, self.chips.now_ns());
        if TIMER_MSRS.contains(&msr) {
            self.chips.timers_changed();
        }
        known
    }

    fn read_cr8(&mut self) -> u64 {
        u64::from(self.chips.irq().cr8(self.cpu))
    }

    fn write_cr8(&mut self, value: u64) {
        self.chips.irq().set_cr8(self.cpu, value as u8);
    }

    fn now_ns(&mut self) -> u64 {
        self.chips.now_ns()
    }

    fn wall_clock_base_ns(&mut self) -> u64 {
        self.wall_base_ns
    }
}
