//! The MSI-X vectors of one PCI function as eventfds: one eventfd a vector, connected by a route of its own.
#![allow(unsafe_code, reason = "vmm-sys-util's EventFd has no AsFd; its descriptor is borrowed for one poll")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use atoll_devices::MsiMessage;
use atoll_devices::interrupt::MsixRoutes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{EventRoute, InterruptFabric, IrqError};

/// One vector: the eventfd that queues and config interrupts signal, and its way into the guest.
struct Vector {
    event: EventFd,
    route: Box<dyn EventRoute>,
    message: Mutex<Option<MsiMessage>>,
}

/// The vectors of one function. Queues that share a vector share its eventfd.
pub struct VectorTable {
    vectors: Vec<Vector>,
}

impl VectorTable {
    /// Makes and connects `count` eventfds; all start masked.
    pub fn new(fabric: &dyn InterruptFabric, count: u16) -> Result<Self, IrqError> {
        let vectors = (0..count)
            .map(|_| {
                let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(IrqError::Event)?;
                let route = fabric.connect(&event)?;
                Ok(Vector { event, route, message: Mutex::new(None) })
            })
            .collect::<Result<_, IrqError>>()?;
        Ok(Self { vectors })
    }

    /// Number of vectors.
    pub fn len(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Whether the function has no vector at all.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// A copy of the vector's eventfd: a queue's call descriptor, or what a config interrupt writes.
    pub fn eventfd(&self, vector: u16) -> Result<EventFd, IrqError> {
        self.get(vector)?.event.try_clone().map_err(IrqError::Event)
    }

    /// Signals a vector from inside this process. A vector that the function lacks is ignored: the guest chose it.
    pub fn signal(&self, vector: u16) {
        if let Ok(vector) = self.get(vector) {
            // The only failure of a non-blocking eventfd is a full counter, and then it is signalled already.
            let _ = vector.event.write(1);
        }
    }

    fn get(&self, vector: u16) -> Result<&Vector, IrqError> {
        self.vectors.get(usize::from(vector)).ok_or(IrqError::NoVector { vector, vectors: self.len() })
    }
}

impl MsixRoutes for VectorTable {
    fn route(&self, vector: u16, message: Option<MsiMessage>) {
        let Ok(entry) = self.get(vector) else { return };
        let mut current = entry.message.lock().unwrap_or_else(PoisonError::into_inner);
        if *current == message {
            return;
        }
        match entry.route.set(message) {
            Ok(()) => *current = message,
            // The guest's write has no way to fail: the vector stays as it was and the log says why it is silent.
            Err(error) => tracing::error!(vector, %error, "interrupt vector not routed"),
        }
    }

    fn pending(&self, vector: u16) -> bool {
        let Ok(entry) = self.get(vector) else { return false };
        if entry.message.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return false;
        }
        // SAFETY: the descriptor belongs to `entry.event`, which outlives this borrow.
        let event = unsafe { BorrowedFd::borrow_raw(entry.event.as_raw_fd()) };
        let mut fds = [PollFd::from_borrowed_fd(event, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(1)) && fds[0].revents().contains(PollFlags::IN)
    }

    fn signal(&self, vector: u16) {
        // The inherent method of the same name: it is chosen before the trait's.
        Self::signal(self, vector);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use atoll_devices::{MsiSink, WireSink};

    use super::*;

    struct Nowhere;
    struct Silent;

    impl WireSink for Nowhere {
        fn set_level(&self, _line: u32, _high: bool) {}
    }
    impl MsiSink for Nowhere {
        fn fire(&self, _message: MsiMessage) {}
    }
    impl InterruptFabric for Nowhere {
        fn connect(&self, _event: &EventFd) -> Result<Box<dyn EventRoute>, IrqError> {
            Ok(Box::new(Silent))
        }
    }
    impl EventRoute for Silent {
        fn set(&self, _message: Option<MsiMessage>) -> Result<(), IrqError> {
            Ok(())
        }
    }

    /// The guest sees a signal to a masked vector in the pending-bit array, and only there.
    #[test]
    fn masked_vector_is_pending() {
        let fabric: Arc<dyn InterruptFabric> = Arc::new(Nowhere);
        let table = VectorTable::new(fabric.as_ref(), 2).unwrap();
        assert!(!table.pending(0));
        table.eventfd(0).unwrap().write(1).unwrap();
        assert!(table.pending(0) && !table.pending(1));
        table.route(0, Some(MsiMessage { address: 0xfee0_0000, data: 0x30 }));
        assert!(!table.pending(0), "an unmasked vector has been delivered, not kept");
        assert!(table.eventfd(2).is_err());
        table.signal(2);
    }
}
