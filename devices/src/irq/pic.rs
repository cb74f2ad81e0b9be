//! The pair of 8259A interrupt controllers of a PC (Intel 8259A data sheet), with the edge/level registers of chipsets.
//!
//! The slave's output is input 2 of the master. The pair only says whether its INTR output is high; the local APIC's LINT0
//! decides who acknowledges.

/// Where a controller is in its initialisation sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expecting {
    #[default]
    Operation,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Controller {
    /// Requests, in-service, masks: one bit an input.
    irr: u8,
    isr: u8,
    imr: u8,
    /// Levels of the inputs.
    lines: u8,
    /// Inputs that are level-triggered.
    level: u8,
    vector_base: u8,
    expecting: Expecting,
    icw4_follows: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    read_isr: bool,
    poll: bool,
    /// The input of highest priority.
    first: u8,
    is_master: bool,
}

impl Controller {
    fn set(&mut self, input: u8, high: bool) {
        let bit = 1u8 << (input & 7);
        match (high, self.level & bit != 0) {
            (true, true) => self.irr |= bit,
            (true, false) if self.lines & bit == 0 => self.irr |= bit,
            (false, true) => self.irr &= !bit,
            _ => {}
        }
        if high {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
    }

    /// Rank of the most urgent input of `set`, 0 first; 8 when there is none.
    fn rank(&self, set: u8) -> u32 {
        set.rotate_right(self.first.into()).trailing_zeros()
    }

    /// The input to be served now, if one is more urgent than what is in service.
    fn request(&self) -> Option<u8> {
        let wanted = self.rank(self.irr & !self.imr);
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        // A slave may interrupt again while an earlier request of it is in service.
        if self.special_fully_nested && self.is_master {
            serving &= !(1 << 2);
        }
        (wanted < 8 && wanted < self.rank(serving)).then(|| (wanted as u8).wrapping_add(self.first) & 7)
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1u8 << (input & 7);
        if self.level & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.first = input.wrapping_add(1) & 7;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            let (lines, level, is_master) = (self.lines, self.level, self.is_master);
            *self = Self { lines, level, is_master, expecting: Expecting::Icw2, ..Self::default() };
            self.icw4_follows = value & 1 != 0;
            // Level inputs that are still high ask again.
            self.irr = lines & level;
        } else if value & 0x08 != 0 {
            self.poll = value & 0x04 != 0;
            if value & 0x02 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.operate(value >> 5, value & 7);
        }
    }

    fn operate(&mut self, command: u8, input: u8) {
        match command {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            // Non-specific EOI, alone or with rotation.
            1 | 5 => {
                let rank = self.rank(self.isr);
                if rank < 8 {
                    let served = (rank as u8).wrapping_add(self.first) & 7;
                    self.isr &= !(1 << served);
                    if command == 5 {
                        self.first = served.wrapping_add(1) & 7;
                    }
                }
            }
            // Specific EOI, alone or with rotation.
            3 | 7 => {
                self.isr &= !(1 << input);
                if command == 7 {
                    self.first = input.wrapping_add(1) & 7;
                }
            }
            6 => self.first = input.wrapping_add(1) & 7,
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.expecting {
            Expecting::Operation => self.imr = value,
            Expecting::Icw2 => {
                self.vector_base = value & 0xf8;
                // Both chips are wired in cascade, so ICW3 always follows.
                self.expecting = Expecting::Icw3;
            }
            Expecting::Icw3 => {
                self.expecting = if self.icw4_follows { Expecting::Icw4 } else { Expecting::Operation };
            }
            Expecting::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 2 != 0;
                self.expecting = Expecting::Operation;
            }
        }
    }

    fn read(&mut self, command_port: bool) -> u8 {
        if self.poll {
            self.poll = false;
            return match self.request() {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match (command_port, self.read_isr) {
            (false, _) => self.imr,
            (true, true) => self.isr,
            (true, false) => self.irr,
        }
    }
}

/// Both controllers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DualPic {
    master: Controller,
    slave: Controller,
}

impl Default for DualPic {
    fn default() -> Self {
        Self {
            master: Controller { is_master: true, ..Controller::default() },
            slave: Controller { vector_base: 0, ..Controller::default() },
        }
    }
}

impl DualPic {
    /// The ports that the pair answers: commands, masks and the edge/level registers.
    pub const PORTS: [u16; 6] = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];
    /// Inputs that can be level-triggered: not the timer, keyboard, cascade, RTC and coprocessor.
    const LEVEL_MASTER: u8 = 0xf8;
    const LEVEL_SLAVE: u8 = 0xde;

    /// As after power-on: nothing initialised.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the level of ISA interrupt `irq`, 0 to 15; 2 is the cascade and cannot be set.
    pub fn set_irq(&mut self, irq: u8, high: bool) {
        match irq {
            2 => return,
            0..8 => self.master.set(irq, high),
            8..16 => self.slave.set(irq - 8, high),
            _ => return,
        }
        self.cascade();
    }

    /// Whether the pair's INTR output is high.
    pub fn output(&self) -> bool {
        self.master.request().is_some()
    }

    /// The CPU's acknowledge cycle: the vector. Without a request it is the spurious one (input 7), which is not in
    /// service afterwards.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.request() {
            Some(2) => {
                self.master.acknowledge(2);
                match self.slave.request() {
                    Some(input) => {
                        self.slave.acknowledge(input);
                        self.slave.vector_base | input
                    }
                    None => self.slave.vector_base | 7,
                }
            }
            Some(input) => {
                self.master.acknowledge(input);
                self.master.vector_base | input
            }
            None => self.master.vector_base | 7,
        };
        self.cascade();
        vector
    }

    /// Reads a port; all ones for one that is not in [`PORTS`](Self::PORTS).
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 => self.master.read(true),
            0x21 => self.master.read(false),
            0xa0 => self.slave.read(true),
            0xa1 => self.slave.read(false),
            0x4d0 => self.master.level,
            0x4d1 => self.slave.level,
            _ => 0xff,
        };
        self.cascade();
        value
    }

    /// Writes a port; others than [`PORTS`](Self::PORTS) are ignored.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.master.write_command(value),
            0x21 => self.master.write_data(value),
            0xa0 => self.slave.write_command(value),
            0xa1 => self.slave.write_data(value),
            0x4d0 => self.master.level = value & Self::LEVEL_MASTER,
            0x4d1 => self.slave.level = value & Self::LEVEL_SLAVE,
            _ => return,
        }
        self.cascade();
    }

    fn cascade(&mut self) {
        let high = self.slave.request().is_some();
        self.master.set(2, high);
        // The cascade follows the slave: a request that it has withdrawn is not remembered.
        if !high {
            self.master.irr &= !(1 << 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux does: vectors 0x30 and 0x38, normal EOI, nothing masked.
    fn initialised() -> DualPic {
        let mut pic = DualPic::new();
        for (port, value) in
            [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0xa0, 0x11), (0xa1, 0x38), (0xa1, 2), (0xa1, 1)]
        {
            pic.write(port, value);
        }
        pic
    }

    /// An interrupt of the slave passes through both chips, and each needs its EOI.
    #[test]
    fn slave_interrupts_through_the_cascade() {
        let mut pic = initialised();
        pic.set_irq(8, true);
        pic.set_irq(8, false);
        assert!(pic.output());
        assert_eq!(pic.acknowledge(), 0x38);
        assert!(!pic.output());
        pic.set_irq(12, true);
        assert!(!pic.output(), "12 is less urgent than 8, which is in service");
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x31, "the keyboard is more urgent than the whole slave");
        pic.write(0x20, 0x20);
        pic.write(0xa0, 0x20);
        pic.write(0x20, 0x20);
        assert_eq!(pic.acknowledge(), 0x3c);
    }

    /// A request that is masked between INTR and the acknowledge cycle gives vector 7 with nothing in service: what
    /// Linux checks for before it calls it spurious.
    #[test]
    fn withdrawn_request_is_spurious() {
        let mut pic = initialised();
        pic.set_irq(4, true);
        assert!(pic.output());
        pic.write(0x21, 0xff);
        assert!(!pic.output());
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0, "nothing is in service");
        pic.write(0x21, 0);
        assert_eq!(pic.acknowledge(), 0x34, "the edge was kept while masked");
    }

    /// Level inputs ask again after EOI for as long as the line is high; edges do not.
    #[test]
    fn level_asks_again() {
        let mut pic = initialised();
        pic.write(0x4d0, 0xff);
        assert_eq!(pic.read(0x4d0), 0xf8, "timer, keyboard and cascade stay edge-triggered");
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(0x20, 0x65);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.set_irq(5, false);
        pic.write(0x20, 0x65);
        assert!(!pic.output());
    }

    #[test]
    fn auto_eoi_rotation_and_poll() {
        let mut pic = initialised();
        pic.set_irq(3, true);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x83, "poll acknowledges");
        assert_eq!(pic.read(0x20), 0x00);
        pic.write(0x20, 0xa0);
        // 3 is now the least urgent, so 4 wins over 3.
        pic.set_irq(3, false);
        pic.set_irq(3, true);
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
        let mut pic = initialised();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3)] {
            pic.write(port, value);
        }
        pic.set_irq(0, true);
        pic.acknowledge();
        pic.write(0x20, 0x0b);
        assert_eq!(pic.read(0x20), 0, "automatic EOI leaves nothing in service");
    }
}
