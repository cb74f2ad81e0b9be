//! How a backend's interrupts reach the guest, queue by queue.
//!
//! With MSI-X a queue's call eventfd *is* its vector's eventfd ([`VectorTable`]), which the CPU's interrupt room turns
//! into an interrupt: nothing of the VMM runs. [`Path::Interposed`](crate::doorbell::Path) puts the relay between the two. A queue without a
//! vector interrupts by the transport's status register and pin; that too goes through the relay's thread.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::doorbell::{Interposer, Relay, RelayedEvent, Verdict};
use crate::irq::VectorTable;

/// What the front end asks of the transport in front of it.
pub trait Transport: Send + Sync {
    /// Queue `index`, which has no MSI-X vector, has used buffers: set the status bit, raise the pin.
    fn queue_used(&self, index: u16);
    /// The configuration space is now this one: keep it for the driver to read, and interrupt the driver.
    fn config_changed(&self, config: &[u8]);
    /// The device cannot go on until the driver resets it (DEVICE_NEEDS_RESET).
    fn needs_reset(&self);
    /// The device was given up, and the guest is to let it go.
    fn ask_unplug(&self) {}
}

/// Turns signals into pin interrupts, on the relay's thread.
struct Pin {
    transport: Arc<dyn Transport>,
    index: u16,
}

impl Interposer for Pin {
    fn signalled(&self, _count: u64) -> Verdict {
        self.transport.queue_used(self.index);
        Verdict::Drop
    }
}

/// The way of one queue's calls.
pub(super) struct CallPath {
    /// The vector's eventfd; without a vector, one that nobody listens to.
    target: EventFd,
    has_vector: bool,
    relayed: Option<RelayedEvent>,
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
}

impl CallPath {
    /// Connects queue `index` to the vector that the driver chose.
    pub(super) fn new(
        index: u16,
        vector: Option<u16>,
        vectors: &VectorTable,
        transport: &Arc<dyn Transport>,
        relay: &Arc<Relay>,
    ) -> io::Result<Self> {
        if let Some(vector) = vector {
            // A vector that the function lacks cannot get this far; without an eventfd the queue would be mute.
            let target = vectors.eventfd(vector).map_err(io::Error::other)?;
            return Ok(Self { target, has_vector: true, relayed: None });
        }
        let target = event()?;
        let relayed = relay
            .carry(event()?, target.try_clone()?, Arc::new(Pin { transport: Arc::clone(transport), index }))
            .map_err(io::Error::other)?;
        Ok(Self { target, has_vector: false, relayed: Some(relayed) })
    }
    /// What SET_VRING_CALL carries.
    pub(super) fn event(&self) -> &EventFd {
        self.relayed.as_ref().map_or(&self.target, RelayedEvent::source)
    }
    /// Interrupts the driver once, on behalf of a backend that may have died before it did. What stands in the backend's
    /// way does not stand in this one's.
    pub(super) fn signal(&self) {
        let event = if self.has_vector { &self.target } else { self.event() };
        // Fails only when the count is full, and then it is signalled.
        let _ = event.write(1);
    }
    /// Calls that the relay has seen, while interposed.
    pub(super) fn count(&self) -> Option<u64> {
        self.relayed.as_ref().map(RelayedEvent::count)
    }
    /// Makes the other way and gives back the old one. The backend must be told of the new event before the old way is
    /// dropped; dropping it carries over what the backend has signalled meanwhile.
    pub(super) fn switch(
        &mut self,
        interposer: Option<Arc<dyn Interposer>>,
        relay: &Arc<Relay>,
    ) -> io::Result<Option<RelayedEvent>> {
        if !self.has_vector {
            return Ok(None);
        }
        let relayed = match interposer {
            Some(interposer) => {
                Some(relay.carry(event()?, self.target.try_clone()?, interposer).map_err(io::Error::other)?)
            }
            None => None,
        };
        Ok(std::mem::replace(&mut self.relayed, relayed))
    }
}
