//! One CPU's local APIC (SDM vol. 3, chapter 11), in xAPIC and x2APIC mode.
//!
//! The chip is alone here: what it sends to other CPUs and to the I/O APIC comes out as an [`Effect`], which
//! [`IrqChip`](super::chip::IrqChip) carries. Both modes share one register file, numbered as in [`registers`]; the modes
//! differ in who may access what, which is decided in `access`.

pub mod access;
mod registers;
mod timer;

use super::msi::{ApicMessage, DeliveryMode, Destination};
use super::vector_set::VectorSet;
use registers::{
    BASE_ADDRESS, BASE_BSP, BASE_ENABLE, BASE_X2APIC, ESR_RECEIVE_ILLEGAL_VECTOR, LVT_COUNT, LVT_MASKED, Lvt,
    SVR_ENABLE,
};

pub use access::{MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC, MsrRefused};
pub use timer::{PERIOD_NS_MIN, Timer, TimerMode};

/// Something other than a vectored interrupt that a CPU must act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuSignal {
    /// INIT: registers to their INIT state. An application processor then waits for [`CpuSignal::Startup`]; the boot
    /// processor starts at the reset vector.
    Init,
    /// Start-up of a CPU that waits for it, in real mode at `page << 12`.
    Startup {
        /// Page number.
        page: u8,
    },
    /// Non-maskable interrupt.
    Nmi,
    /// System management interrupt.
    Smi,
}

/// Signals that wait for their CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Signals {
    init: bool,
    startup: Option<u8>,
    nmi: bool,
    smi: bool,
}

/// What a register write makes of other chips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// A level interrupt has ended: tell the I/O APIC.
    EndOfInterrupt {
        /// Its vector.
        vector: u8,
    },
    /// An interrupt for other CPUs.
    Send(Ipi),
}

/// An interrupt between CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ipi {
    /// To a destination.
    To(ApicMessage),
    /// To the sender alone.
    OnlySelf(ApicMessage),
    /// To everyone.
    All(ApicMessage),
    /// To everyone but the sender.
    Others(ApicMessage),
}

/// A local APIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalApic {
    id: u32,
    base: u64,
    tpr: u8,
    /// LDR and DFR of xAPIC mode.
    logical_id: u8,
    cluster_model: bool,
    svr: u32,
    irr: VectorSet,
    isr: VectorSet,
    tmr: VectorSet,
    /// Error status as the guest last latched it, and what has come since.
    esr: u32,
    esr_new: u32,
    icr_low: u32,
    icr_high: u32,
    lvt: [u32; LVT_COUNT],
    timer: Timer,
    tsc_offset: i64,
    /// Level of the LINT0 input.
    lint0: bool,
    signals: Signals,
    waits_for_startup: bool,
}

impl LocalApic {
    /// The APIC of CPU `id`; CPU 0 boots. The boot processor's LINT0 passes the 8259 pair through and its LINT1 is NMI, as
    /// firmware leaves them.
    pub fn new(id: u32) -> Self {
        let mut apic = Self {
            id,
            base: BASE_ADDRESS | BASE_ENABLE | if id == 0 { BASE_BSP } else { 0 },
            tpr: 0,
            logical_id: 0,
            cluster_model: false,
            svr: 0xff,
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            esr: 0,
            esr_new: 0,
            icr_low: 0,
            icr_high: 0,
            lvt: [LVT_MASKED; LVT_COUNT],
            timer: Timer::default(),
            tsc_offset: 0,
            lint0: false,
            signals: Signals::default(),
            waits_for_startup: id != 0,
        };
        if id == 0 {
            apic.lvt[Lvt::Lint0.index()] = 0x700;
            apic.lvt[Lvt::Lint1.index()] = 0x400;
        }
        apic
    }

    /// INIT: as after power-on, except for the id, the base register and what waits for the CPU.
    fn init(&mut self) {
        let (base, tsc_offset, lint0) = (self.base, self.tsc_offset, self.lint0);
        let apic = Self::new(self.id);
        *self = Self { base, tsc_offset, lint0, signals: self.signals, ..apic };
    }

    /// APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    fn hardware_enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }
    fn x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }
    fn software_enabled(&self) -> bool {
        self.hardware_enabled() && self.svr & SVR_ENABLE != 0
    }

    /// Whether the APIC takes vectored interrupts.
    pub fn accepts(&self) -> bool {
        self.software_enabled()
    }

    /// Processor priority: the task's or that of what is in service, whichever is higher.
    pub fn processor_priority(&self) -> u8 {
        let serving = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= serving { self.tpr } else { serving }
    }

    /// The vector that the CPU would get now.
    fn deliverable_vector(&self) -> Option<u8> {
        let vector = self.irr.highest()?;
        (vector & 0xf0 > self.processor_priority() & 0xf0 && self.software_enabled()).then_some(vector)
    }

    /// Whether a vectored interrupt can be delivered now.
    pub fn deliverable(&self) -> bool {
        self.deliverable_vector().is_some()
    }

    /// Whether the APIC passes the 8259 pair's output to its CPU.
    pub fn passes_external(&self) -> bool {
        let lint0 = self.lvt[Lvt::Lint0.index()];
        !self.hardware_enabled()
            || lint0 & LVT_MASKED == 0 && DeliveryMode::from_bits(lint0 >> 8) == Some(DeliveryMode::ExtInt)
    }

    /// The CPU takes the highest interrupt: from IRR to ISR.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable_vector()?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        Some(vector)
    }

    /// The most urgent signal that waits for the CPU.
    pub fn take_signal(&mut self) -> Option<CpuSignal> {
        if std::mem::take(&mut self.signals.init) {
            return Some(CpuSignal::Init);
        }
        if let Some(page) = self.signals.startup.take() {
            return Some(CpuSignal::Startup { page });
        }
        // A CPU that waits for its start-up keeps the others pending.
        if self.waits_for_startup {
            return None;
        }
        if std::mem::take(&mut self.signals.smi) {
            return Some(CpuSignal::Smi);
        }
        std::mem::take(&mut self.signals.nmi).then_some(CpuSignal::Nmi)
    }

    /// Whether [`take_signal`](Self::take_signal) would give one.
    pub fn has_signal(&self) -> bool {
        let Signals { init, startup, nmi, smi } = self.signals;
        init || startup.is_some() || !self.waits_for_startup && (nmi || smi)
    }

    /// Whether the CPU waits for its start-up message.
    pub fn waits_for_startup(&self) -> bool {
        self.waits_for_startup
    }

    /// Whether `destination` includes this CPU.
    pub fn matches(&self, destination: Destination) -> bool {
        match destination {
            Destination::Physical(Destination::EVERYONE) => true,
            Destination::Physical(id) => id == self.id,
            Destination::Logical(Destination::EVERYONE) => true,
            Destination::Logical(wanted) if self.x2apic() => {
                let own = self.x2apic_logical_id();
                wanted >> 16 == own >> 16 && wanted & own & 0xffff != 0
            }
            Destination::Logical(wanted) => match u8::try_from(wanted) {
                Err(_) => false,
                Ok(wanted) if !self.cluster_model => wanted & self.logical_id != 0,
                Ok(wanted) => {
                    (wanted >> 4 == 0xf || wanted >> 4 == self.logical_id >> 4) && wanted & self.logical_id & 0xf != 0
                }
            },
        }
    }

    fn x2apic_logical_id(&self) -> u32 {
        self.id >> 4 << 16 | 1 << (self.id & 0xf)
    }

    /// Takes an interrupt that is meant for this CPU.
    pub fn deliver(&mut self, mode: DeliveryMode, vector: u8, level: bool) {
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => self.request(vector, level),
            DeliveryMode::Smi => self.signals.smi = true,
            DeliveryMode::Nmi => self.signals.nmi = true,
            DeliveryMode::Init => {
                self.init();
                self.signals = Signals { init: true, ..Signals::default() };
            }
            DeliveryMode::Startup => {
                if std::mem::take(&mut self.waits_for_startup) {
                    self.signals.startup = Some(vector);
                }
            }
            // The vector comes from the 8259 pair, whose own wire to LINT0 says the same.
            DeliveryMode::ExtInt => {}
        }
    }

    fn request(&mut self, vector: u8, level: bool) {
        if !self.software_enabled() {
            return;
        }
        if vector < 16 {
            self.record_error(ESR_RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        if level {
            self.tmr.insert(vector);
        } else {
            self.tmr.remove(vector);
        }
        self.irr.insert(vector);
    }

    fn record_error(&mut self, error: u32) {
        let news = self.esr_new & error == 0;
        self.esr_new |= error;
        let lvt = self.lvt[Lvt::Error.index()];
        let vector = lvt as u8;
        if news && lvt & LVT_MASKED == 0 && vector >= 16 {
            self.request(vector, false);
        }
    }

    /// The output of the 8259 pair. In ExtINT mode the CPU acknowledges there; in the other modes a rising edge is an
    /// interrupt of its own.
    pub fn set_lint0(&mut self, high: bool) {
        let rose = high && !self.lint0;
        self.lint0 = high;
        if rose {
            self.local_interrupt(Lvt::Lint0);
        }
    }

    /// An edge on LINT1: the NMI line of the board.
    pub fn pulse_lint1(&mut self) {
        self.local_interrupt(Lvt::Lint1);
    }

    fn local_interrupt(&mut self, source: Lvt) {
        let lvt = self.lvt[source.index()];
        if lvt & LVT_MASKED != 0 || !self.hardware_enabled() {
            return;
        }
        match DeliveryMode::from_bits(lvt >> 8) {
            Some(DeliveryMode::Fixed) => self.request(lvt as u8, false),
            Some(mode @ (DeliveryMode::Nmi | DeliveryMode::Smi)) => self.deliver(mode, 0, false),
            _ => {}
        }
    }

    /// When [`expire`](Self::expire) must be called, in guest ns.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.timer.next_deadline_ns()
    }

    /// Lets the timer fire if it is due at `now_ns`; tells whether an interrupt was requested.
    pub fn expire(&mut self, now_ns: u64) -> bool {
        if !self.timer.expire(now_ns) {
            return false;
        }
        let lvt = self.lvt[Lvt::Timer.index()];
        if lvt & LVT_MASKED != 0 {
            return false;
        }
        self.request(lvt as u8, false);
        true
    }

    /// Guest TSC minus guest time, for deadlines; changes when the guest writes its TSC.
    pub fn set_tsc_offset(&mut self, offset: i64) {
        self.tsc_offset = offset;
        self.timer.set_tsc_offset(offset);
    }

    /// Task priority as CR8 shows it.
    pub fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// Writes it.
    pub fn set_cr8(&mut self, value: u8) {
        self.tpr = value << 4;
    }
}
