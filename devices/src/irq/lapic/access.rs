//! Access to the registers: by the xAPIC page, by x2APIC MSRs, and by IA32_APIC_BASE.

use super::registers::{
    APR, BASE_ADDRESS, BASE_BSP, BASE_ENABLE, BASE_X2APIC, CURRENT_COUNT, DFR, DIVIDE, EOI, ESR, ESR_ILLEGAL_REGISTER,
    ESR_SEND_ILLEGAL_VECTOR, ICR_HIGH, ICR_LOW, ID, INITIAL_COUNT, IRR, IRR_LAST, ISR, ISR_LAST, LDR, LVT_MASKED, Lvt,
    PPR, SELF_IPI, SVR, SVR_ENABLE, TMR, TMR_LAST, TPR, VERSION, VERSION_VALUE,
};
use super::{ApicMessage, DeliveryMode, Destination, Effect, Ipi, LocalApic, Timer, TimerMode};

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First and last MSR of x2APIC mode.
pub const MSR_X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x83f;

/// A refused MSR access: the guest gets #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the local APIC has no such register in this mode, or a reserved bit was set")]
pub struct MsrRefused;

impl LocalApic {
    /// Whether the register page answers (xAPIC mode).
    pub fn page_enabled(&self) -> bool {
        self.hardware_enabled() && !self.x2apic()
    }

    /// Reads the register page. Registers are 32 bits at multiples of 16; what lies between reads as zero. All ones while
    /// the page does not answer.
    pub fn page_read(&mut self, offset: u64, data: &mut [u8], now_ns: u64) {
        if !self.page_enabled() {
            data.fill(0xff);
            return;
        }
        data.fill(0);
        let within = (offset & 0xf) as usize;
        if within >= 4 {
            return;
        }
        let value = match (offset >> 4) as u32 {
            DFR if self.cluster_model => 0x0fff_ffff,
            DFR => u32::MAX,
            register => self.register(register, now_ns).unwrap_or_else(|| {
                self.record_error(ESR_ILLEGAL_REGISTER);
                0
            }),
        };
        for (to, from) in data.iter_mut().zip(&value.to_le_bytes()[within..]) {
            *to = *from;
        }
    }

    /// Writes the register page; only whole, aligned 32-bit registers can be written.
    pub fn page_write(&mut self, offset: u64, data: &[u8], now_ns: u64) -> Effect {
        let (true, Some(bytes), 0) = (self.page_enabled(), data.first_chunk::<4>(), offset & 0xf) else {
            return Effect::None;
        };
        let value = u32::from_le_bytes(*bytes);
        match (offset >> 4) as u32 {
            // The ids are fixed: interrupts are routed by them.
            ID => {}
            LDR => self.logical_id = (value >> 24) as u8,
            DFR => self.cluster_model = value >> 28 == 0,
            ICR_HIGH => self.icr_high = value & 0xff00_0000,
            ICR_LOW => {
                self.icr_low = value & 0x000c_cfff;
                return self.send(Destination::from_byte((self.icr_high >> 24) as u8, value & 1 << 11 != 0));
            }
            register => match self.set_register(register, value, now_ns) {
                Some(effect) => return effect,
                None => self.record_error(ESR_ILLEGAL_REGISTER),
            },
        }
        Effect::None
    }

    /// Reads one of the APIC's MSRs.
    ///
    /// # Errors
    /// [`MsrRefused`] in xAPIC mode, and for registers that cannot be read.
    pub fn msr_read(&mut self, msr: u32, now_ns: u64) -> Result<u64, MsrRefused> {
        match msr {
            MSR_APIC_BASE => Ok(self.base),
            MSR_TSC_DEADLINE => Ok(self.timer.tsc_deadline()),
            _ if !self.x2apic() => Err(MsrRefused),
            _ => match msr.checked_sub(*MSR_X2APIC.start()).ok_or(MsrRefused)? {
                ICR_LOW => Ok(u64::from(self.icr_high) << 32 | u64::from(self.icr_low)),
                // Write-only or gone in this mode.
                EOI | SELF_IPI | ICR_HIGH | DFR | APR => Err(MsrRefused),
                register => self.register(register, now_ns).map(u64::from).ok_or(MsrRefused),
            },
        }
    }

    /// Writes one of the APIC's MSRs.
    ///
    /// # Errors
    /// [`MsrRefused`] in xAPIC mode, for registers that cannot be written, and for reserved bits.
    pub fn msr_write(&mut self, msr: u32, value: u64, now_ns: u64) -> Result<Effect, MsrRefused> {
        match msr {
            MSR_APIC_BASE => self.set_base(value).map(|()| Effect::None),
            MSR_TSC_DEADLINE => {
                self.timer.set_tsc_deadline(value, self.tsc_offset);
                self.expire(now_ns);
                Ok(Effect::None)
            }
            _ if !self.x2apic() => Err(MsrRefused),
            _ => self.x2apic_write(msr.checked_sub(*MSR_X2APIC.start()).ok_or(MsrRefused)?, value, now_ns),
        }
    }

    fn x2apic_write(&mut self, register: u32, value: u64, now_ns: u64) -> Result<Effect, MsrRefused> {
        if register == ICR_LOW {
            let low = value as u32;
            // Bits 12 (delivery status), 13, 17, 16 and 20 to 31 are reserved.
            if low & !0x000c_cfff & !(1 << 12) != 0 {
                return Err(MsrRefused);
            }
            self.icr_low = low & 0x000c_cfff;
            self.icr_high = (value >> 32) as u32;
            let destination = match low & 1 << 11 != 0 {
                true => Destination::Logical(self.icr_high),
                false => Destination::Physical(self.icr_high),
            };
            return Ok(self.send(destination));
        }
        let value = u32::try_from(value).map_err(|_| MsrRefused)?;
        let writable = match register {
            TPR => 0xff,
            EOI | ESR => 0,
            SVR => 0x3ff,
            INITIAL_COUNT => u32::MAX,
            DIVIDE => 0xb,
            SELF_IPI => 0xff,
            // Delivery status and remote IRR are ignored rather than refused.
            register => Lvt::from_register(register).ok_or(MsrRefused)?.writable() | 0x5000,
        };
        if value & !writable != 0 {
            return Err(MsrRefused);
        }
        if register == SELF_IPI {
            let message = self.message(Destination::Physical(self.id), DeliveryMode::Fixed, value as u8);
            return Ok(self.checked(Ipi::OnlySelf(message), message));
        }
        self.set_register(register, value, now_ns).ok_or(MsrRefused)
    }

    fn set_base(&mut self, value: u64) -> Result<(), MsrRefused> {
        let (enable, x2apic) = (value & BASE_ENABLE != 0, value & BASE_X2APIC != 0);
        let reserved = !(BASE_ADDRESS | BASE_BSP | BASE_ENABLE | BASE_X2APIC);
        // The page stays where it is; x2APIC needs the APIC enabled, is entered from xAPIC and left by disabling.
        let moved = value & BASE_ADDRESS != BASE_ADDRESS;
        let illegal = match (self.hardware_enabled(), self.x2apic()) {
            (false, _) => x2apic,
            (true, false) => x2apic && !enable,
            (true, true) => enable != x2apic,
        };
        if value & reserved != 0 || moved || illegal {
            return Err(MsrRefused);
        }
        let was_enabled = self.hardware_enabled();
        // The boot flag is the board's, not software's.
        self.base = value & !BASE_BSP | self.base & BASE_BSP;
        if was_enabled && !enable {
            // Disabling forgets the state, as after power-on.
            let waits = self.waits_for_startup;
            self.init();
            self.waits_for_startup = waits;
        }
        Ok(())
    }

    fn register(&self, register: u32, now_ns: u64) -> Option<u32> {
        Some(match register {
            ID if self.x2apic() => self.id,
            ID => self.id << 24,
            VERSION => VERSION_VALUE,
            TPR => self.tpr.into(),
            // Arbitration does not exist since the Pentium 4.
            APR => 0,
            PPR => self.processor_priority().into(),
            EOI => 0,
            LDR if self.x2apic() => self.x2apic_logical_id(),
            LDR => u32::from(self.logical_id) << 24,
            SVR => self.svr,
            ISR..=ISR_LAST => self.isr.word32((register - ISR) as usize),
            TMR..=TMR_LAST => self.tmr.word32((register - TMR) as usize),
            IRR..=IRR_LAST => self.irr.word32((register - IRR) as usize),
            ESR => self.esr,
            ICR_LOW => self.icr_low,
            ICR_HIGH => self.icr_high,
            INITIAL_COUNT => self.timer.initial_count(),
            CURRENT_COUNT => self.timer.current_count(now_ns),
            DIVIDE => self.timer.divide(),
            register => self.lvt[Lvt::from_register(register)?.index()],
        })
    }

    fn set_register(&mut self, register: u32, value: u32, now_ns: u64) -> Option<Effect> {
        match register {
            TPR => self.tpr = value as u8,
            EOI => return Some(self.end_of_interrupt()),
            SVR => self.set_spurious(value & 0x3ff),
            ESR => {
                self.esr = std::mem::take(&mut self.esr_new);
            }
            INITIAL_COUNT => self.timer.set_initial_count(value, now_ns),
            DIVIDE => self.timer.set_divide(value, now_ns),
            register => {
                let lvt = Lvt::from_register(register)?;
                let mut value = value & lvt.writable();
                if self.svr & SVR_ENABLE == 0 {
                    value |= LVT_MASKED;
                }
                self.lvt[lvt.index()] = value;
                if lvt == Lvt::Timer {
                    self.timer.set_mode(TimerMode::from_lvt(value));
                }
            }
        }
        Some(Effect::None)
    }

    fn set_spurious(&mut self, value: u32) {
        self.svr = value;
        if value & SVR_ENABLE == 0 {
            for lvt in &mut self.lvt {
                *lvt |= LVT_MASKED;
            }
        }
    }

    fn end_of_interrupt(&mut self) -> Effect {
        match self.isr.highest() {
            Some(vector) => {
                self.isr.remove(vector);
                if self.tmr.contains(vector) { Effect::EndOfInterrupt { vector } } else { Effect::None }
            }
            None => Effect::None,
        }
    }

    fn message(&self, destination: Destination, mode: DeliveryMode, vector: u8) -> ApicMessage {
        ApicMessage { destination, mode, vector, level: false }
    }

    /// Sends what the interrupt command register says.
    fn send(&mut self, destination: Destination) -> Effect {
        let icr = self.icr_low;
        let (level_triggered, assert) = (icr & 1 << 15 != 0, icr & 1 << 14 != 0);
        let Some(mode) = DeliveryMode::from_bits(icr >> 8) else { return Effect::None };
        // An INIT that is de-asserted only synchronised arbitration ids, long ago.
        if mode == DeliveryMode::Init && level_triggered && !assert || mode == DeliveryMode::ExtInt {
            return Effect::None;
        }
        let message = self.message(destination, mode, icr as u8);
        let ipi = match icr >> 18 & 3 {
            0 => Ipi::To(message),
            1 => Ipi::OnlySelf(message),
            2 => Ipi::All(message),
            _ => Ipi::Others(message),
        };
        self.checked(ipi, message)
    }

    fn checked(&mut self, ipi: Ipi, message: ApicMessage) -> Effect {
        let vectored = matches!(message.mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if vectored && message.vector < 16 {
            self.record_error(ESR_SEND_ILLEGAL_VECTOR);
            return Effect::None;
        }
        Effect::Send(ipi)
    }

    /// The timer, for whoever saves it.
    pub fn timer(&self) -> &Timer {
        &self.timer
    }
}
