//! ACPI fixed hardware (ACPI 6.5, 4.8): PM1 event and control registers and the power management timer.
//!
//! The board is not "hardware-reduced": Linux takes that flag to mean that there is no 8259, PIT or RTC either. There is no
//! SMI command, so the machine is always in ACPI mode and SCI_EN reads as set. The timer has 24 bits; its carry event
//! cannot be enabled, as the kernels that would use it poll instead.

use std::sync::Arc;

use crate::access::Answer;
use crate::interrupt::Wire;
use crate::power::{PowerEvent, PowerSink};
use crate::timed::TimedDevice;

/// Ports of the block: events at 0, control at 4, timer at 8.
pub const LEN: u64 = 16;
/// SLP_TYP of S5, as the DSDT's \_S5 package must say.
pub const S5_SLEEP_TYPE: u8 = 5;
/// Frequency of the timer, in Hz.
pub const TIMER_HZ: u64 = 3_579_545;

const STATUS: usize = 0;
const ENABLE: usize = 2;
const CONTROL: usize = 4;
const TIMER: usize = 8;

/// Global lock, power button, sleep button, RTC alarm.
const EVENTS: u16 = 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;
const POWER_BUTTON: u16 = 1 << 8;
const WAKE: u16 = 1 << 15;

const SCI_ENABLE: u16 = 1 << 0;
/// Bus master reload and sleep type.
const CONTROL_KEPT: u16 = 1 << 1 | 7 << 10;
const SLEEP_ENABLE: u16 = 1 << 13;

/// What a guest can see of the registers; the timer follows from the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AcpiPmState {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control, without SCI_EN.
    pub control: u16,
}

/// The register block. As a device it answers [`LEN`] ports.
pub struct AcpiPm {
    state: AcpiPmState,
    sci: Wire,
    sci_high: bool,
    power: Arc<dyn PowerSink>,
}

impl AcpiPm {
    /// As after power-on. `sci` is the system control interrupt.
    pub fn new(sci: Wire, power: Arc<dyn PowerSink>) -> Self {
        Self { state: AcpiPmState::default(), sci, sci_high: false, power }
    }

    /// Somebody presses the power button.
    pub fn power_button(&mut self) {
        self.state.status |= POWER_BUTTON;
        self.update_sci();
    }

    /// The registers.
    pub fn state(&self) -> AcpiPmState {
        self.state
    }

    /// Puts them back.
    pub fn restore(&mut self, state: AcpiPmState) {
        self.state = AcpiPmState {
            status: state.status & (EVENTS | WAKE),
            enable: state.enable & EVENTS,
            control: state.control & CONTROL_KEPT,
        };
        self.update_sci();
    }

    fn update_sci(&mut self) {
        let high = self.state.status & self.state.enable & EVENTS != 0;
        if high != self.sci_high {
            self.sci_high = high;
            self.sci.set(high);
        }
    }

    fn image(&self, now_ns: u64) -> [u8; LEN as usize] {
        let ticks = u128::from(now_ns) * u128::from(TIMER_HZ) / 1_000_000_000;
        let timer = ticks as u32 & 0x00ff_ffff;
        let mut image = [0; LEN as usize];
        image[STATUS..][..2].copy_from_slice(&self.state.status.to_le_bytes());
        image[ENABLE..][..2].copy_from_slice(&self.state.enable.to_le_bytes());
        image[CONTROL..][..2].copy_from_slice(&(self.state.control | SCI_ENABLE).to_le_bytes());
        image[TIMER..][..4].copy_from_slice(&timer.to_le_bytes());
        image
    }

    fn control(&mut self, value: u16) {
        self.state.control = value & CONTROL_KEPT;
        if value & SLEEP_ENABLE != 0 && value >> 10 & 7 == u16::from(S5_SLEEP_TYPE) {
            self.power.power_event(PowerEvent::PowerOff);
        }
    }
}

impl TimedDevice for AcpiPm {
    fn read_at(&mut self, offset: u64, data: &mut [u8], now_ns: u64) -> Answer {
        data.fill(0);
        let image = self.image(now_ns);
        let bytes = usize::try_from(offset).ok().and_then(|offset| image.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        Answer::Now
    }

    /// Registers may be written whole, together or by bytes; what is not written stays.
    fn write_at(&mut self, offset: u64, data: &[u8], _now_ns: u64) -> Answer {
        let Some(start) = usize::try_from(offset).ok().filter(|start| *start < LEN as usize) else {
            return Answer::Now;
        };
        // Bits to clear, and registers with the bytes written over them.
        let mut clear = [0; LEN as usize];
        let mut image = self.image(0);
        for ((clear, byte), value) in clear[start..].iter_mut().zip(&mut image[start..]).zip(data) {
            (*clear, *byte) = (*value, *value);
        }
        let word = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let touches = |at: usize| start < at + 2 && at < start + data.len();
        self.state.status &= !word(&clear, STATUS);
        self.state.enable = word(&image, ENABLE) & EVENTS;
        if touches(CONTROL) {
            self.control(word(&image, CONTROL));
        }
        self.update_sci();
        Answer::Now
    }
}

impl std::fmt::Debug for AcpiPm {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.state.fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::interrupt::WireSink;

    #[derive(Default)]
    struct Log(Mutex<(Vec<bool>, Vec<PowerEvent>)>);
    impl WireSink for Log {
        fn set_level(&self, _line: u32, high: bool) {
            self.0.lock().unwrap().0.push(high);
        }
    }
    impl PowerSink for Log {
        fn power_event(&self, event: PowerEvent) {
            self.0.lock().unwrap().1.push(event);
        }
    }

    fn block() -> (AcpiPm, Arc<Log>) {
        let log = Arc::new(Log::default());
        (AcpiPm::new(Wire::new(Arc::clone(&log) as Arc<dyn WireSink>, 9), Arc::clone(&log) as Arc<dyn PowerSink>), log)
    }
    fn put(pm: &mut AcpiPm, offset: u64, data: &[u8]) {
        assert!(matches!(pm.write_at(offset, data, 0), Answer::Now));
    }
    fn get(pm: &mut AcpiPm, offset: u64, now_ns: u64) -> u32 {
        let mut data = [0; 4];
        assert!(matches!(pm.read_at(offset, &mut data, now_ns), Answer::Now));
        u32::from_le_bytes(data)
    }

    /// `poweroff`: the kernel writes the sleep type, then the type with SLP_EN, in words; other types do nothing.
    #[test]
    fn sleep_type_five_powers_off() {
        let (mut pm, log) = block();
        assert_eq!(get(&mut pm, 4, 0), 1, "always in ACPI mode");
        put(&mut pm, 4, &0x1401u16.to_le_bytes());
        put(&mut pm, 4, &0x2c01u16.to_le_bytes());
        put(&mut pm, 6, &0xffffu16.to_le_bytes());
        put(&mut pm, 0, &0x3400_0000u32.to_le_bytes());
        assert!(log.0.lock().unwrap().1.is_empty());
        put(&mut pm, 4, &0x3401u16.to_le_bytes());
        assert_eq!(log.0.lock().unwrap().1, [PowerEvent::PowerOff]);
        assert_eq!(get(&mut pm, 4, 0), 0x1401, "SLP_EN reads as zero");
    }

    /// The power button raises the SCI when it is enabled, until the driver clears its status.
    #[test]
    fn power_button_interrupts() {
        let (mut pm, log) = block();
        pm.power_button();
        assert!(log.0.lock().unwrap().0.is_empty());
        put(&mut pm, 2, &0xffffu16.to_le_bytes());
        assert_eq!(get(&mut pm, 0, 0), u32::from(EVENTS) << 16 | u32::from(POWER_BUTTON));
        put(&mut pm, 0, &[0xff]);
        put(&mut pm, 1, &[0x01]);
        assert_eq!(log.0.lock().unwrap().0, [true, false]);
    }

    #[test]
    fn timer_runs_and_wraps() {
        let (mut pm, _) = block();
        assert_eq!(get(&mut pm, 8, 1_000_000_000), TIMER_HZ as u32);
        assert!(get(&mut pm, 8, u64::MAX) < 1 << 24);
        assert_eq!(get(&mut pm, u64::MAX, 0), 0);
        put(&mut pm, 15, &[0xff; 4]);
        put(&mut pm, u64::MAX, &[0xff; 4]);
    }
}
