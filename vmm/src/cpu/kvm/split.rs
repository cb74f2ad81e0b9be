//! The split arrangement of interrupt chips: local APICs in the kernel, the 8259 pair, the I/O APIC and the interval timer
//! here, as they are for the software CPU.
//!
//! The I/O APIC's pins are the first routes of KVM's table: from these the kernel knows which vectors' ends it has to tell us
//! (level-triggered ones). The 8259 pair interrupts the boot processor alone, by its own thread, when KVM says that the guest
//! would take it; whoever raises one of its inputs gets that thread out of the guest. The timer has a thread that sleeps
//! until a tick is due, which in a guest that uses its local APIC's timer is never.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use atoll_devices::irq::ioapic::IoApic;
use atoll_devices::irq::msi::{ApicMessage, DeliveryMode, Destination};
use atoll_devices::irq::pic::DualPic;
use atoll_devices::irq::pit::Pit;
use atoll_devices::{GuestClock, MsiMessage, TimedDevice, Wire, WireSink};
use kvm_bindings::{KVMIO, kvm_interrupt};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl_iow_nr;

use super::fabric::Shared;
use crate::cpu::{CpuError, GuestBus, Kick, Space};
use crate::machine::layout::{GSI_COUNT, IOAPIC};
use crate::seccomp::{self, ThreadClass};

ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

const PIT_PORT: u16 = 0x40;
const PIT_PORTS: std::ops::RangeInclusive<u16> = PIT_PORT..=0x43;
/// Gate and output of the timer's channel 2.
const PIT_GATE_PORT: u16 = 0x61;
/// Interrupt input of its channel 0.
const PIT_LINE: u32 = 0;

/// Bits of a redirection entry (82093AA, 3.2.4).
const ENTRY_LOGICAL: u64 = 1 << 11;
const ENTRY_LEVEL: u64 = 1 << 15;

struct Controllers {
    pic: DualPic,
    ioapic: IoApic,
    /// What KVM's table says of the pins.
    pins: [MsiMessage; GSI_COUNT as usize],
}

/// Interrupt controllers whose inputs are the board's lines.
pub(super) struct Lines {
    controllers: Mutex<Controllers>,
    routes: Arc<Shared>,
    boot_cpu: Mutex<Option<Arc<dyn Kick>>>,
}

/// As a message-signalled write (SDM vol. 3, 11.11); its inverse is [`ApicMessage::from_msi`].
fn to_msi(message: ApicMessage) -> MsiMessage {
    let (id, logical) = match message.destination {
        Destination::Physical(Destination::EVERYONE) => (0xff, 0),
        Destination::Physical(id) => (id & 0xff, 0),
        Destination::Logical(id) => (id & 0xff, 1),
    };
    let mode = match message.mode {
        DeliveryMode::Fixed => 0,
        DeliveryMode::LowestPriority => 1,
        DeliveryMode::Smi => 2,
        DeliveryMode::Nmi => 4,
        DeliveryMode::Init => 5,
        DeliveryMode::Startup => 6,
        DeliveryMode::ExtInt => 7,
    };
    let address = 0xfee0_0000 | u64::from(id) << 12 | logical << 2;
    MsiMessage { address, data: u32::from(message.vector) | mode << 8 | 1 << 14 | u32::from(message.level) << 15 }
}

/// The route of a pin. One that is masked stays in the table: the end of an interrupt that came before is still awaited.
fn pin_route(entry: u64) -> MsiMessage {
    let logical = u64::from(entry & ENTRY_LOGICAL != 0);
    let level = u32::from(entry & ENTRY_LEVEL != 0);
    MsiMessage {
        address: 0xfee0_0000 | (entry >> 56) << 12 | logical << 2,
        data: entry as u32 & 0x7ff | 1 << 14 | level << 15,
    }
}

impl Lines {
    pub(super) fn new(routes: Arc<Shared>) -> Self {
        let pins = [pin_route(0); GSI_COUNT as usize];
        let controllers = Controllers { pic: DualPic::new(), ioapic: IoApic::new(), pins };
        Self { controllers: Mutex::new(controllers), routes, boot_cpu: Mutex::default() }
    }

    fn controllers(&self) -> MutexGuard<'_, Controllers> {
        self.controllers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How to get the boot processor's notice.
    pub(super) fn set_boot_cpu(&self, kick: Arc<dyn Kick>) {
        *self.boot_cpu.lock().unwrap_or_else(PoisonError::into_inner) = Some(kick);
    }

    fn notify(&self) {
        if let Some(kick) = self.boot_cpu.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            kick.kick();
        }
    }

    /// Sets the level of a line; lines are those of `atoll_devices::irq::chip`.
    pub(super) fn set_line(&self, line: u32, high: bool) {
        let mut controllers = self.controllers();
        let mut rises = false;
        if let Some(irq) = u8::try_from(line).ok().filter(|irq| *irq < 16) {
            let before = controllers.pic.output();
            controllers.pic.set_irq(irq, high);
            rises = !before && controllers.pic.output();
        }
        let pin = match line {
            0 => Some(2),
            2 => None,
            line => Some(line as usize),
        };
        if let Some(message) = pin.and_then(|pin| controllers.ioapic.set_pin(pin, high)) {
            // Under the lock, so that messages keep the order of the lines.
            self.routes.fire(to_msi(message));
        }
        drop(controllers);
        if rises {
            self.notify();
        }
    }

    /// A local APIC has ended a vector that a pin may have sent.
    pub(super) fn end_of_interrupt(&self, vector: u8) {
        let mut controllers = self.controllers();
        for message in controllers.ioapic.end_of_interrupt(vector) {
            self.routes.fire(to_msi(message));
        }
    }

    fn ioapic_read(&self, offset: u64, data: &mut [u8]) {
        let value = self.controllers().ioapic.read(offset).to_le_bytes();
        data.fill(0);
        data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
    }

    fn ioapic_write(&self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let mut controllers = self.controllers();
        let message = controllers.ioapic.write(offset, u32::from_le_bytes(value));
        let mut pins = controllers.pins;
        for (pin, route) in pins.iter_mut().enumerate() {
            *route = controllers.ioapic.entry(pin).map_or(*route, pin_route);
        }
        if pins != controllers.pins {
            controllers.pins = pins;
            if let Err(error) = self.routes.set_pins(pins) {
                tracing::error!(%error, "the pins of the I/O APIC are not routed as the guest wants");
            }
        }
        if let Some(message) = message {
            self.routes.fire(to_msi(message));
        }
    }

    fn pic_port(&self, port: u16, byte: &mut u8, write: bool) {
        let mut controllers = self.controllers();
        if write {
            controllers.pic.write(port, *byte);
        } else {
            *byte = controllers.pic.read(port);
        }
    }

    /// On the boot processor's thread, before it enters the guest: hands over what the 8259 pair asks for, as soon as the
    /// guest takes it.
    pub(super) fn offer(&self, fd: &mut VcpuFd) -> Result<(), CpuError> {
        let mut controllers = self.controllers();
        let run = fd.get_kvm_run();
        if controllers.pic.output() && run.ready_for_interrupt_injection != 0 {
            let mut acknowledged = controllers.pic.clone();
            let interrupt = kvm_interrupt { irq: u32::from(acknowledged.acknowledge()) };
            run.ready_for_interrupt_injection = 0;
            // SAFETY: the descriptor is a vCPU's, and the kernel reads a structure that lives until the call returns.
            let done = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_INTERRUPT(), &raw const interrupt) };
            if done == 0 {
                controllers.pic = acknowledged;
            } else {
                let error = io::Error::last_os_error();
                // The guest has not been entered since the last one, because something else got the thread out before: it has
                // that one first.
                if error.raw_os_error() != Some(libc::EEXIST) {
                    return Err(CpuError::Kvm { what: "interrupting a vCPU", source: error });
                }
            }
        }
        let run = fd.get_kvm_run();
        run.request_interrupt_window = u8::from(controllers.pic.output());
        Ok(())
    }
}

impl WireSink for Lines {
    fn set_level(&self, line: u32, high: bool) {
        self.set_line(line, high);
    }
}

struct TimerState {
    pit: Pit,
    over: bool,
}

/// The interval timer and what wakes its thread.
struct Timer {
    state: Mutex<TimerState>,
    changed: Condvar,
    clock: Arc<dyn GuestClock>,
}

impl Timer {
    fn state(&self) -> MutexGuard<'_, TimerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(timer: &Weak<Self>) {
        seccomp::enter(ThreadClass::Talk);
        while let Some(timer) = timer.upgrade() {
            let mut state = timer.state();
            if state.over {
                return;
            }
            let now = timer.clock.now_ns();
            state.pit.expire(now);
            let left = state.pit.next_deadline_ns().map(|due| Duration::from_nanos(due.saturating_sub(now)));
            match left {
                Some(left) => drop(timer.changed.wait_timeout(state, left)),
                None => drop(timer.changed.wait(state)),
            }
        }
    }
}

/// The chips that are not in the kernel.
pub(super) struct Chips {
    pub(super) lines: Arc<Lines>,
    timer: Arc<Timer>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Chips {
    pub(super) fn new(lines: Arc<Lines>, clock: Arc<dyn GuestClock>) -> Result<Self, CpuError> {
        let pit = Pit::new(Wire::new(Arc::clone(&lines) as _, PIT_LINE));
        let state = Mutex::new(TimerState { pit, over: false });
        let timer = Arc::new(Timer { state, changed: Condvar::new(), clock });
        let weak = Arc::downgrade(&timer);
        let name = "kvm-timer".to_owned();
        let failed = |source| CpuError::Thread { name: name.clone(), source };
        let thread =
            std::thread::Builder::new().name(name.clone()).spawn(move || Timer::live(&weak)).map_err(failed)?;
        Ok(Self { lines, timer, thread: Some(thread) })
    }

    /// A bus on which these chips answer, before `rest`.
    pub(super) fn before<'a>(&'a self, rest: &'a mut dyn GuestBus) -> SplitBus<'a> {
        SplitBus { chips: self, rest }
    }

    /// Whether a port is one of theirs, and if so its answer.
    fn port(&self, port: u64, data: &mut [u8], write: bool) -> bool {
        let Ok(first) = u16::try_from(port) else { return false };
        if !(first == PIT_GATE_PORT || PIT_PORTS.contains(&first) || DualPic::PORTS.contains(&first)) {
            return false;
        }
        for (port, byte) in (first..).zip(data) {
            if DualPic::PORTS.contains(&port) {
                self.lines.pic_port(port, byte, write);
                continue;
            }
            let now = self.timer.clock.now_ns();
            let mut state = self.timer.state();
            match (port, write) {
                (PIT_GATE_PORT, false) => *byte = state.pit.port61_read(now),
                (PIT_GATE_PORT, true) => state.pit.port61_write(*byte, now),
                (0x40..=0x43, false) => {
                    let _ = state.pit.read_at(u64::from(port - PIT_PORT), std::slice::from_mut(byte), now);
                }
                (0x40..=0x43, true) => {
                    let _ = state.pit.write_at(u64::from(port - PIT_PORT), &[*byte], now);
                    self.timer.changed.notify_all();
                }
                _ => {}
            }
        }
        true
    }
}

impl Drop for Chips {
    fn drop(&mut self) {
        self.timer.state().over = true;
        self.timer.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by its hook.
            let _ = thread.join();
        }
    }
}

/// The chips, and behind them the board.
pub(super) struct SplitBus<'a> {
    chips: &'a Chips,
    rest: &'a mut dyn GuestBus,
}

/// The offset of an access in the I/O APIC's page.
fn in_ioapic(space: Space, address: u64, len: usize) -> Option<u64> {
    let offset = address.checked_sub(IOAPIC.start).filter(|_| space == Space::Mmio)?;
    (offset.checked_add(len as u64)? <= IOAPIC.len).then_some(offset)
}

impl GuestBus for SplitBus<'_> {
    fn read(&mut self, space: Space, address: u64, data: &mut [u8]) {
        if let Some(offset) = in_ioapic(space, address, data.len()) {
            self.chips.lines.ioapic_read(offset, data);
        } else if space != Space::Pio || !self.chips.port(address, data, false) {
            self.rest.read(space, address, data);
        }
    }
    fn write(&mut self, space: Space, address: u64, data: &[u8]) {
        if let Some(offset) = in_ioapic(space, address, data.len()) {
            self.chips.lines.ioapic_write(offset, data);
        } else if space != Space::Pio || !self.chips.port(address, &mut data.to_vec(), true) {
            self.rest.write(space, address, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a pin sends and what the kernel is told of the pin are the same message, and the one that the chip meant.
    #[test]
    fn pins_are_routed_as_they_send() {
        let mut ioapic = IoApic::new();
        for (entry, mode) in [
            (0x31_u64, DeliveryMode::Fixed),
            (0x0300_0000_0000_8041, DeliveryMode::Fixed),
            (0x0200_0000_0000_0951, DeliveryMode::LowestPriority),
        ] {
            for (select, half) in [(0x1b, entry >> 32), (0x1a, entry)] {
                assert_eq!(ioapic.write(0, select), None);
                assert_eq!(ioapic.write(0x10, half as u32), None);
            }
            let sent = ioapic.set_pin(5, true).expect("an unmasked pin");
            assert_eq!((sent.mode, sent.vector), (mode, entry as u8));
            assert_eq!(to_msi(sent), pin_route(ioapic.entry(5).unwrap_or_default()));
            assert_eq!(ApicMessage::from_msi(to_msi(sent)), Some(sent));
            ioapic.set_pin(5, false);
            ioapic.end_of_interrupt(entry as u8);
        }
    }
}
