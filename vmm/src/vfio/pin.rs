//! The pin of a function: a level, which VFIO tells as an edge and masks until it is told that the interrupt was served.
//!
//! Where KVM has the interrupt controller it does that by itself. Elsewhere the line is raised here when VFIO tells of it,
//! and *sampled* whenever the guest has touched the function, which is how it is served, and every few milliseconds besides:
//! VFIO is asked to unmask, tells again at once if the function still asserts its pin, and if not the line goes down.

use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use atoll_devices::Wire;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::Device;
use crate::irq::InterruptFabric;

struct Line {
    wire: Wire,
    high: bool,
    /// The guest has chosen the pin.
    in_use: bool,
}

/// One function's pin.
pub(super) struct Pin {
    fabric: Arc<dyn InterruptFabric>,
    gsi: u32,
    raised: EventFd,
    ended: EventFd,
    /// KVM's half, while it is connected.
    level: Mutex<Option<Box<dyn Send>>>,
    line: Mutex<Line>,
    device: Weak<Device>,
    /// Whether the line is set here.
    by_hand: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pin {
    /// A pin that leads to input `gsi`.
    ///
    /// # Errors
    /// When there are no descriptors left, or the hypervisor refuses.
    pub(super) fn new(
        fabric: &Arc<dyn InterruptFabric>,
        gsi: u32,
        wire: Wire,
        device: Weak<Device>,
    ) -> io::Result<Self> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let (raised, ended) = (event()?, event()?);
        // A trial tells which of both it is.
        let by_hand = fabric.connect_level(gsi, &raised, &ended).map_err(io::Error::other)?.is_none();
        Ok(Self {
            fabric: Arc::clone(fabric),
            gsi,
            raised,
            ended,
            level: Mutex::default(),
            line: Mutex::new(Line { wire, high: false, in_use: false }),
            device,
            by_hand,
        })
    }

    /// Whether the line is set here: then the guest must be seen to touch the function.
    pub(super) fn by_hand(&self) -> bool {
        self.by_hand
    }

    /// What VFIO signals.
    pub(super) fn raised(&self) -> &EventFd {
        &self.raised
    }

    /// From now on the function interrupts with it. What tells VFIO that an interrupt was served, if nobody here does.
    ///
    /// # Errors
    /// When the hypervisor refuses.
    pub(super) fn connect(&self) -> io::Result<Option<&EventFd>> {
        lock(&self.line).in_use = true;
        if self.by_hand {
            return Ok(None);
        }
        let level = self.fabric.connect_level(self.gsi, &self.raised, &self.ended).map_err(io::Error::other)?;
        *lock(&self.level) = level;
        Ok(Some(&self.ended))
    }

    /// It does so no more.
    pub(super) fn disconnect(&self) {
        drop(lock(&self.level).take());
        let mut line = lock(&self.line);
        (line.high, line.in_use) = (false, false);
        line.wire.set(false);
        let _ = self.raised.read();
    }

    /// VFIO may have told of an interrupt.
    pub(super) fn told(&self) {
        let mut line = lock(&self.line);
        if self.by_hand && line.in_use && self.raised.read().is_ok() {
            line.high = true;
            line.wire.set(true);
        }
    }

    /// Whether the line is high, and thus to be sampled.
    pub(super) fn is_high(&self) -> bool {
        self.by_hand && lock(&self.line).high
    }

    /// The guest has touched the function, or time has passed.
    pub(super) fn served(&self) {
        if !self.by_hand {
            return;
        }
        let mut line = lock(&self.line);
        if !line.high {
            return;
        }
        // It is told again at once, or not at all.
        let asserted = self.device.upgrade().is_some_and(|device| device.unmask_pin()) && self.raised.read().is_ok();
        if !asserted {
            line.high = false;
            line.wire.set(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use atoll_devices::{MsiMessage, MsiSink, WireSink};

    use super::*;
    use crate::irq::{EventRoute, IrqError};

    /// Interrupt controllers that hear of no end, as those of the software CPU.
    #[derive(Default)]
    struct Deaf(Mutex<Vec<bool>>);

    impl WireSink for Deaf {
        fn set_level(&self, _line: u32, high: bool) {
            self.0.lock().unwrap().push(high);
        }
    }
    impl MsiSink for Deaf {
        fn fire(&self, _message: MsiMessage) {}
    }
    impl InterruptFabric for Deaf {
        fn connect(&self, _event: &EventFd) -> Result<Box<dyn EventRoute>, IrqError> {
            Err(IrqError::Exhausted(0))
        }
    }

    /// The line goes up when VFIO tells of it and down when it is served, and a pin that the guest has not chosen, or no
    /// longer has, is silent. Of a function that is gone nothing is asserted.
    #[test]
    fn a_line_that_is_set_by_hand_comes_down_again() {
        let deaf = Arc::new(Deaf::default());
        let fabric: Arc<dyn InterruptFabric> = Arc::clone(&deaf) as _;
        let wire = Wire::new(Arc::clone(&deaf) as Arc<dyn WireSink>, 17);
        let pin = Pin::new(&fabric, 17, wire, Weak::new()).unwrap();
        assert!(pin.by_hand());
        pin.raised().write(1).unwrap();
        pin.told();
        assert!(!pin.is_high(), "nobody has chosen it");
        assert!(pin.connect().unwrap().is_none());
        pin.told();
        assert!(pin.is_high());
        pin.served();
        assert!(!pin.is_high());
        pin.served();
        assert_eq!(*deaf.0.lock().unwrap(), [true, false]);
        pin.raised().write(1).unwrap();
        pin.disconnect();
        pin.told();
        assert_eq!(*deaf.0.lock().unwrap(), [true, false, false]);
    }
}
