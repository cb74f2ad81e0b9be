//! The interrupt controllers and the interval timer behind one lock each, and the deadline that they wait for: the vCPU
//! looks at it now and then while it runs the guest, and waits for it while it is halted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_devices::irq::chip::{CpuSink, IrqChip, SharedIrqChip};
use atoll_devices::irq::pit::Pit;
use atoll_devices::{GuestClock, MsiMessage, TimedDevice, Wire};

use super::clock::SoftClock;

/// Ports of the two interrupt controllers and their edge/level registers.
const PIC_PORTS: [u16; 6] = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];
/// First port of the interval timer.
const PIT_PORT: u16 = 0x40;
/// Gate and output of its channel 2.
const PIT_GATE_PORT: u16 = 0x61;
/// Interrupt input of its channel 0.
const PIT_LINE: u32 = 0;

/// Whether a port belongs to the processor's own chips.
pub(super) fn owns_port(port: u16) -> bool {
    matches!(port, PIT_PORT..=0x43 | PIT_GATE_PORT) || PIC_PORTS.contains(&port)
}

/// The chips of one machine.
pub(super) struct Chips {
    irq: SharedIrqChip,
    pit: Mutex<Pit>,
    clock: Arc<SoftClock>,
    /// What [`Chips::next_deadline`] was when the guest last set a timer or one was due; all ones for none.
    due: AtomicU64,
}

/// No timer runs.
const NEVER: u64 = u64::MAX;

impl Chips {
    pub(super) fn new(cpus: usize, sink: Arc<dyn CpuSink>, clock: Arc<SoftClock>) -> Self {
        let irq = SharedIrqChip::new(IrqChip::new(cpus, sink));
        let pit = Mutex::new(Pit::new(Wire::new(Arc::new(irq.clone()), PIT_LINE)));
        Self { irq, pit, clock, due: AtomicU64::new(NEVER) }
    }

    /// The interrupt controllers.
    pub(super) fn irq(&self) -> MutexGuard<'_, IrqChip> {
        self.irq.lock()
    }

    fn pit(&self) -> MutexGuard<'_, Pit> {
        self.pit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_line(&self, line: u32, high: bool) {
        self.irq().set_line(line, high);
    }

    pub(super) fn fire(&self, message: MsiMessage) {
        self.irq().fire_msi(message);
    }

    pub(super) fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    /// Guest time at which the next timer fires.
    pub(super) fn next_deadline(&self) -> Option<u64> {
        let pit = self.pit().next_deadline_ns();
        let lapic = self.irq().next_deadline_ns();
        match (pit, lapic) {
            (Some(pit), Some(lapic)) => Some(pit.min(lapic)),
            (pit, lapic) => pit.or(lapic),
        }
    }

    /// Fires the timers that are due.
    pub(super) fn expire(&self) {
        let now = self.now_ns();
        self.pit().expire(now);
        self.irq().expire(now);
        self.timers_changed();
    }

    /// Whether a timer is due at `now`.
    pub(super) fn is_due(&self, now: u64) -> bool {
        self.due.load(Ordering::Relaxed) <= now
    }

    /// The guest may have set a timer.
    pub(super) fn timers_changed(&self) {
        self.due.store(self.next_deadline().unwrap_or(NEVER), Ordering::Relaxed);
    }

    /// Reads a port of [`owns_port`].
    pub(super) fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let now = self.now_ns();
        for (port, byte) in (port..).zip(data) {
            match port {
                PIT_GATE_PORT => *byte = self.pit().port61_read(now),
                PIT_PORT..=0x43 => {
                    let _ = self.pit().read_at(u64::from(port - PIT_PORT), std::slice::from_mut(byte), now);
                }
                _ if PIC_PORTS.contains(&port) => *byte = self.irq().pic_read(port),
                _ => {}
            }
        }
    }

    /// Writes a port of [`owns_port`].
    pub(super) fn write_port(&self, port: u16, data: &[u8]) {
        let now = self.now_ns();
        for (port, byte) in (port..).zip(data) {
            match port {
                PIT_GATE_PORT => self.pit().port61_write(*byte, now),
                PIT_PORT..=0x43 => {
                    let _ = self.pit().write_at(u64::from(port - PIT_PORT), &[*byte], now);
                }
                _ if PIC_PORTS.contains(&port) => self.irq().pic_write(port, *byte),
                _ => {}
            }
        }
        self.timers_changed();
    }
}
