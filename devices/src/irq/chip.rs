//! All interrupt controllers of a board, and what travels between them.
//!
//! [`IrqChip`] is the state machine for any number of CPUs; [`SharedIrqChip`] is the lock around it that wires and messages
//! end in. Whenever something that a CPU must notice may have become pending, its number is passed to [`CpuSink::kick`];
//! the CPU then asks for signals and, when it can take interrupts, for a vector.
//!
//! Lines are global system interrupts, with the one exception of every PC: line 0, the timer, is pin 2 of the I/O APIC.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ioapic::IoApic;
use super::lapic::{CpuSignal, Effect, Ipi, LocalApic, MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC};
use super::msi::{ApicMessage, DeliveryMode};
use super::pic::DualPic;
use crate::interrupt::{MsiMessage, MsiSink, WireSink};

/// Gets a CPU's notice.
pub trait CpuSink: Send + Sync {
    /// CPU `cpu` may have an interrupt or a signal to take. Called under the chip's lock: it sets a flag, wakes a thread
    /// and returns.
    fn kick(&self, cpu: usize);
}

/// The interrupt controllers of a board.
pub struct IrqChip {
    pic: DualPic,
    ioapic: IoApic,
    lapics: Vec<LocalApic>,
    /// Who got the last lowest-priority interrupt: the next one goes to the one after it among equals.
    last_lowest: usize,
    sink: Arc<dyn CpuSink>,
}

/// Everything of an [`IrqChip`] that a guest can see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IrqChipState {
    /// The 8259 pair.
    pub pic: DualPic,
    /// The I/O APIC.
    pub ioapic: IoApic,
    /// The local APICs in order of CPU.
    pub lapics: Vec<LocalApic>,
}

impl IrqChip {
    /// Controllers for `cpus` CPUs (at least one), as after power-on. APIC ids are CPU numbers.
    pub fn new(cpus: usize, sink: Arc<dyn CpuSink>) -> Self {
        let lapics = (0..cpus.max(1)).map(|cpu| LocalApic::new(cpu as u32)).collect();
        Self { pic: DualPic::new(), ioapic: IoApic::new(), lapics, last_lowest: 0, sink }
    }

    /// Machine reset: as after power-on.
    pub fn reset(&mut self) {
        *self = Self::new(self.lapics.len(), Arc::clone(&self.sink));
    }

    /// A copy of the state.
    pub fn state(&self) -> IrqChipState {
        IrqChipState { pic: self.pic.clone(), ioapic: self.ioapic.clone(), lapics: self.lapics.clone() }
    }

    /// Puts a state back; every CPU is kicked. The number of CPUs must be that of this chip, else nothing changes and
    /// `false` is returned.
    pub fn restore(&mut self, state: IrqChipState) -> bool {
        if state.lapics.len() != self.lapics.len() {
            return false;
        }
        (self.pic, self.ioapic, self.lapics) = (state.pic, state.ioapic, state.lapics);
        (0..self.lapics.len()).for_each(|cpu| self.sink.kick(cpu));
        true
    }

    /// Number of CPUs.
    pub fn cpus(&self) -> usize {
        self.lapics.len()
    }

    /// One CPU's local APIC; `None` when there is no such CPU.
    pub fn lapic(&self, cpu: usize) -> Option<&LocalApic> {
        self.lapics.get(cpu)
    }

    /// Sets the level of line `line`: 0 to 15 are the ISA interrupts, up to 23 those of PCI. Others do not exist.
    pub fn set_line(&mut self, line: u32, high: bool) {
        if let Some(irq) = u8::try_from(line).ok().filter(|irq| *irq < 16) {
            self.pic.set_irq(irq, high);
            self.pic_changed();
        }
        let pin = match line {
            0 => 2,
            2 => return,
            line => line as usize,
        };
        if let Some(message) = self.ioapic.set_pin(pin, high) {
            self.deliver(message);
        }
    }

    /// Delivers a message-signalled interrupt. A write that interrupts nobody is ignored.
    pub fn fire_msi(&mut self, message: MsiMessage) {
        if let Some(message) = ApicMessage::from_msi(message) {
            self.deliver(message);
        }
    }

    /// The board's NMI line: to LINT1 of every CPU.
    pub fn raise_nmi(&mut self) {
        self.lapics.iter_mut().for_each(LocalApic::pulse_lint1);
        (0..self.lapics.len()).for_each(|cpu| self.kick(cpu));
    }

    /// Reads a port of the 8259 pair ([`DualPic::PORTS`]).
    pub fn pic_read(&mut self, port: u16) -> u8 {
        let value = self.pic.read(port);
        self.pic_changed();
        value
    }

    /// Writes likewise.
    pub fn pic_write(&mut self, port: u16, value: u8) {
        self.pic.write(port, value);
        self.pic_changed();
    }

    /// Reads the I/O APIC's page.
    pub fn ioapic_read(&mut self, offset: u64, data: &mut [u8]) {
        let value = self.ioapic.read(offset).to_le_bytes();
        data.fill(0);
        data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
    }

    /// Writes likewise. Narrow writes are widened with zeros, as select registers are written by bytes.
    pub fn ioapic_write(&mut self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        if let Some(message) = self.ioapic.write(offset, u32::from_le_bytes(value)) {
            self.deliver(message);
        }
    }

    /// Reads `cpu`'s local APIC page.
    pub fn lapic_read(&mut self, cpu: usize, offset: u64, data: &mut [u8], now_ns: u64) {
        match self.lapics.get_mut(cpu) {
            Some(lapic) => {
                lapic.page_read(offset, data, now_ns);
                // Reading a register that does not exist is an error that may interrupt.
                self.kick(cpu);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes likewise.
    pub fn lapic_write(&mut self, cpu: usize, offset: u64, data: &[u8], now_ns: u64) {
        if let Some(lapic) = self.lapics.get_mut(cpu) {
            let effect = lapic.page_write(offset, data, now_ns);
            self.carry(cpu, effect);
        }
    }

    /// Whether an MSR is the local APIC's.
    pub fn owns_msr(msr: u32) -> bool {
        msr == MSR_APIC_BASE || msr == MSR_TSC_DEADLINE || MSR_X2APIC.contains(&msr)
    }

    /// Reads an MSR of `cpu`'s local APIC; `None` is #GP.
    pub fn read_msr(&mut self, cpu: usize, msr: u32, now_ns: u64) -> Option<u64> {
        self.lapics.get_mut(cpu)?.msr_read(msr, now_ns).ok()
    }

    /// Writes likewise; `false` is #GP. A new timer deadline may be earlier than the one the caller waits for.
    #[must_use]
    pub fn write_msr(&mut self, cpu: usize, msr: u32, value: u64, now_ns: u64) -> bool {
        let Some(lapic) = self.lapics.get_mut(cpu) else { return false };
        match lapic.msr_write(msr, value, now_ns) {
            Ok(effect) => {
                self.carry(cpu, effect);
                true
            }
            Err(_) => false,
        }
    }

    /// `cpu`'s task priority as CR8 shows it.
    pub fn cr8(&self, cpu: usize) -> u8 {
        self.lapics.get(cpu).map_or(0, LocalApic::cr8)
    }

    /// Writes it.
    pub fn set_cr8(&mut self, cpu: usize, value: u8) {
        if let Some(lapic) = self.lapics.get_mut(cpu) {
            lapic.set_cr8(value & 0xf);
            self.kick(cpu);
        }
    }

    /// Guest TSC minus guest time on `cpu`.
    pub fn set_tsc_offset(&mut self, cpu: usize, offset: i64) {
        if let Some(lapic) = self.lapics.get_mut(cpu) {
            lapic.set_tsc_offset(offset);
        }
    }

    /// Whether [`acknowledge`](Self::acknowledge) would give a vector now; constant time.
    pub fn deliverable(&self, cpu: usize) -> bool {
        self.lapics.get(cpu).is_some_and(|lapic| lapic.deliverable() || lapic.passes_external() && self.pic.output())
    }

    /// `cpu` takes an interrupt. The 8259 pair's comes first, as its vectors know no priority of the APIC's. When another
    /// one can be delivered at once the CPU is kicked again.
    pub fn acknowledge(&mut self, cpu: usize) -> Option<u8> {
        let lapic = self.lapics.get_mut(cpu)?;
        let vector = if lapic.passes_external() && self.pic.output() {
            let vector = self.pic.acknowledge();
            self.pic_changed();
            Some(vector)
        } else {
            lapic.acknowledge()
        };
        self.kick(cpu);
        vector
    }

    /// Whether a signal waits for `cpu`.
    pub fn has_signal(&self, cpu: usize) -> bool {
        self.lapics.get(cpu).is_some_and(LocalApic::has_signal)
    }

    /// The next signal that waits for `cpu`.
    pub fn take_signal(&mut self, cpu: usize) -> Option<CpuSignal> {
        self.lapics.get_mut(cpu)?.take_signal()
    }

    /// The earliest time at which [`expire`](Self::expire) has something to do, in guest ns. It can become earlier by any
    /// register or MSR write.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.lapics.iter().filter_map(LocalApic::next_deadline_ns).min()
    }

    /// Lets every timer fire that is due at `now_ns`.
    pub fn expire(&mut self, now_ns: u64) {
        for cpu in 0..self.lapics.len() {
            if self.lapics[cpu].expire(now_ns) {
                self.kick(cpu);
            }
        }
    }

    fn kick(&self, cpu: usize) {
        if self.deliverable(cpu) || self.has_signal(cpu) {
            self.sink.kick(cpu);
        }
    }

    fn pic_changed(&mut self) {
        let high = self.pic.output();
        for cpu in 0..self.lapics.len() {
            self.lapics[cpu].set_lint0(high);
            if high {
                self.kick(cpu);
            }
        }
    }

    fn carry(&mut self, cpu: usize, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::EndOfInterrupt { vector } => {
                for message in self.ioapic.end_of_interrupt(vector) {
                    self.deliver(message);
                }
            }
            Effect::Send(Ipi::To(message)) => self.deliver(message),
            Effect::Send(Ipi::OnlySelf(message)) => self.deliver_to(cpu, message),
            Effect::Send(Ipi::All(message)) => (0..self.lapics.len()).for_each(|to| self.deliver_to(to, message)),
            Effect::Send(Ipi::Others(message)) => {
                (0..self.lapics.len()).filter(|to| *to != cpu).for_each(|to| self.deliver_to(to, message));
            }
        }
        self.kick(cpu);
    }

    fn deliver_to(&mut self, cpu: usize, message: ApicMessage) {
        self.lapics[cpu].deliver(message.mode, message.vector, message.level);
        self.kick(cpu);
    }

    fn deliver(&mut self, message: ApicMessage) {
        if message.mode == DeliveryMode::LowestPriority {
            if let Some(cpu) = self.lowest(message) {
                self.last_lowest = cpu;
                self.deliver_to(cpu, message);
            }
            return;
        }
        for cpu in 0..self.lapics.len() {
            if self.lapics[cpu].matches(message.destination) {
                self.deliver_to(cpu, message);
            }
        }
    }

    /// The CPU of lowest priority in the destination; among equals, in turn.
    fn lowest(&self, message: ApicMessage) -> Option<usize> {
        let cpus = self.lapics.len();
        (1..=cpus)
            .map(|distance| (self.last_lowest + distance) % cpus)
            .filter(|&cpu| self.lapics[cpu].accepts() && self.lapics[cpu].matches(message.destination))
            .min_by_key(|&cpu| self.lapics[cpu].processor_priority() >> 4)
    }
}

impl fmt::Debug for IrqChip {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state().fmt(formatter)
    }
}

/// An [`IrqChip`] behind a lock, as wires, messages and CPU threads share it.
#[derive(Clone, Debug)]
pub struct SharedIrqChip(Arc<Mutex<IrqChip>>);

impl SharedIrqChip {
    /// Shares a chip.
    pub fn new(chip: IrqChip) -> Self {
        Self(Arc::new(Mutex::new(chip)))
    }
    /// Locks it. A thread that panicked while it held the lock left a state that is still one of the chip's.
    pub fn lock(&self) -> MutexGuard<'_, IrqChip> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WireSink for SharedIrqChip {
    fn set_level(&self, line: u32, high: bool) {
        self.lock().set_line(line, high);
    }
}

impl MsiSink for SharedIrqChip {
    fn fire(&self, message: MsiMessage) {
        self.lock().fire_msi(message);
    }
}
