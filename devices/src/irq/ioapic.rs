//! The I/O APIC (Intel 82093AA data sheet): 24 pins, each with a redirection entry.
//!
//! The chip returns the messages that it sends; whoever owns it carries them to the local APICs.

use super::msi::{ApicMessage, DeliveryMode, Destination};

/// Pins.
pub const PINS: usize = 24;

const VERSION: u32 = 0x11;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Vector, delivery mode, destination mode, polarity, trigger, mask, destination.
const WRITABLE: u64 = 0xff00_0000_0001_ffff & !(DELIVERY_STATUS | REMOTE_IRR);

/// The I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoApic {
    id: u32,
    select: u8,
    redirection: [u64; PINS],
    /// Levels of the pins; polarity is not modelled, high is active.
    lines: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self { id: 0, select: 0, redirection: [MASKED; PINS], lines: 0 }
    }
}

impl IoApic {
    /// As after power-on: every pin masked.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the level of `pin`; gives the message that it sends. Pins that do not exist are ignored.
    pub fn set_pin(&mut self, pin: usize, high: bool) -> Option<ApicMessage> {
        let entry = *self.redirection.get(pin)?;
        let was_high = self.lines & 1 << pin != 0;
        if high {
            self.lines |= 1 << pin;
        } else {
            self.lines &= !(1 << pin);
        }
        match (high, entry & LEVEL != 0) {
            (true, true) => self.send(pin),
            (true, false) if !was_high => self.send(pin),
            _ => None,
        }
    }

    /// A local APIC has ended `vector`: level entries of that vector whose line is still high send again.
    pub fn end_of_interrupt(&mut self, vector: u8) -> Vec<ApicMessage> {
        let mut again = Vec::new();
        for pin in 0..PINS {
            let entry = &mut self.redirection[pin];
            if *entry as u8 == vector && *entry & REMOTE_IRR != 0 {
                *entry &= !REMOTE_IRR;
                if self.lines & 1 << pin != 0 {
                    again.extend(self.send(pin));
                }
            }
        }
        again
    }

    /// Reads a register at `offset` of the page: select (0x00) or window (0x10); zero elsewhere.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            0x00 => self.select.into(),
            0x10 => match self.select {
                0x00 | 0x02 => self.id << 24,
                0x01 => VERSION | (PINS as u32 - 1) << 16,
                select => self.selected(select).map_or(0, |(pin, high)| {
                    let entry = self.redirection[pin];
                    (if high { entry >> 32 } else { entry }) as u32
                }),
            },
            _ => 0,
        }
    }

    /// Writes likewise; gives the message that an entry sends because it was unmasked or made level-triggered.
    pub fn write(&mut self, offset: u64, value: u32) -> Option<ApicMessage> {
        match offset {
            0x00 => self.select = value as u8,
            0x10 => match self.select {
                0x00 => self.id = value >> 24 & 0xf,
                select => {
                    let (pin, high) = self.selected(select)?;
                    let entry = &mut self.redirection[pin];
                    let (mask, value) = match high {
                        true => (WRITABLE & !0xffff_ffff, u64::from(value) << 32),
                        false => (WRITABLE & 0xffff_ffff, u64::from(value)),
                    };
                    *entry = *entry & !mask | value & mask;
                    if *entry & LEVEL == 0 {
                        *entry &= !REMOTE_IRR;
                    } else if self.lines & 1 << pin != 0 {
                        return self.send(pin);
                    }
                }
            },
            _ => {}
        }
        None
    }

    /// The entry of `pin` as the guest wrote it, for whoever shows or saves routes.
    pub fn entry(&self, pin: usize) -> Option<u64> {
        self.redirection.get(pin).copied()
    }

    fn selected(&self, select: u8) -> Option<(usize, bool)> {
        let index = usize::from(select).checked_sub(0x10)?;
        (index / 2 < PINS).then_some((index / 2, index % 2 == 1))
    }

    fn send(&mut self, pin: usize) -> Option<ApicMessage> {
        let entry = self.redirection[pin];
        if entry & (MASKED | REMOTE_IRR) != 0 {
            return None;
        }
        let mode = DeliveryMode::from_bits((entry >> 8) as u32).filter(|mode| *mode != DeliveryMode::Startup)?;
        let vectored = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        // Only fixed and lowest-priority interrupts are ended by an EOI; the others are edges whatever the entry says.
        let level = entry & LEVEL != 0 && vectored;
        if level {
            self.redirection[pin] |= REMOTE_IRR;
        }
        let destination = Destination::from_byte((entry >> 56) as u8, entry & 1 << 11 != 0);
        Some(ApicMessage { destination, mode, vector: entry as u8, level })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(ioapic: &mut IoApic, pin: u32, entry: u64) -> Option<ApicMessage> {
        ioapic.write(0, 0x11 + 2 * pin);
        ioapic.write(0x10, (entry >> 32) as u32);
        ioapic.write(0, 0x10 + 2 * pin);
        ioapic.write(0x10, entry as u32)
    }

    /// A device that still asserts its line when the handler is done interrupts again, once per EOI.
    #[test]
    fn level_is_sent_again_after_end_of_interrupt() {
        let mut ioapic = IoApic::new();
        assert_eq!(program(&mut ioapic, 16, LEVEL | 0x51), None);
        assert!(ioapic.set_pin(16, true).unwrap().level);
        assert_eq!(ioapic.set_pin(16, true), None, "not while the first is being served");
        assert_eq!(u64::from(ioapic.read(0x10)) & REMOTE_IRR, REMOTE_IRR);
        assert_eq!(ioapic.end_of_interrupt(0x50), []);
        assert_eq!(ioapic.end_of_interrupt(0x51).len(), 1);
        ioapic.set_pin(16, false);
        assert_eq!(ioapic.end_of_interrupt(0x51), []);
        assert_eq!(u64::from(ioapic.read(0x10)) & REMOTE_IRR, 0);
    }

    /// A masked level interrupt is looked at again when it is unmasked; an edge that came meanwhile is gone.
    #[test]
    fn unmasking_looks_at_the_line() {
        let mut ioapic = IoApic::new();
        program(&mut ioapic, 9, MASKED | LEVEL | 0x29);
        assert_eq!(ioapic.set_pin(9, true), None);
        assert_eq!(program(&mut ioapic, 9, LEVEL | 0x29).map(|message| message.vector), Some(0x29));
        program(&mut ioapic, 4, MASKED | 0x24);
        assert_eq!(ioapic.set_pin(4, true), None);
        assert_eq!(program(&mut ioapic, 4, 0x24), None);
        assert_eq!(ioapic.set_pin(4, true), None, "the line did not rise");
        ioapic.set_pin(4, false);
        assert_eq!(ioapic.set_pin(4, true).map(|message| message.level), Some(false));
    }

    #[test]
    fn registers_of_no_pin_are_harmless() {
        let mut ioapic = IoApic::new();
        for select in 0..=255 {
            ioapic.write(0, select);
            for value in [0, u32::MAX] {
                ioapic.write(0x10, value);
                ioapic.read(0x10);
            }
        }
        assert_eq!(ioapic.set_pin(PINS, true), None);
        ioapic.write(0, 1);
        assert_eq!(ioapic.read(0x10), 0x17_0011);
        ioapic.write(0, 0x10);
        assert_eq!(u64::from(ioapic.read(0x10)), (WRITABLE | MASKED) & 0xffff_ffff);
    }
}
