//! Interrupt routes: from a wire, a message or an eventfd to whatever interrupts the guest.
//!
//! Devices hold wires, and backends hold eventfds; neither knows which CPU runs. An [`InterruptFabric`] is the far end:
//! KVM's irqchip with irqfds, or the interrupt chips of `atoll-devices` with a listener for eventfds. A masked route keeps its
//! event pending: the count stays in the eventfd and is delivered on unmask, so nothing is lost and nothing spins.

mod listener;
mod vectors;

use std::io;
use std::time::Instant;

use atoll_devices::{MsiMessage, MsiSink, WireSink};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

pub use listener::{Door, Doorstep, EventListener, Signalled};
pub use vectors::VectorTable;

/// Why an interrupt could not be connected.
#[derive(Debug, Error)]
pub enum IrqError {
    /// An eventfd could not be made, copied or watched.
    #[error("no eventfd for an interrupt ({0}); raise the limit on open files (ulimit -n)")]
    Event(#[source] io::Error),
    /// The hypervisor refused the route.
    #[error("the hypervisor refused an interrupt route: {0}")]
    Route(#[source] io::Error),
    /// The interrupt controller has no free input left.
    #[error("all {0} interrupt routes are taken; give devices fewer queues or leave one out")]
    Exhausted(u32),
    /// The device has fewer vectors than that.
    #[error("vector {vector} of a device that has {vectors}")]
    NoVector {
        /// Vector asked for.
        vector: u16,
        /// Vectors that there are.
        vectors: u16,
    },
}

/// Where all interrupts of a machine end: inputs of the board's interrupt controllers ([`WireSink`]; the line number is the
/// GSI), messages ([`MsiSink`]) and eventfds.
pub trait InterruptFabric: WireSink + MsiSink {
    /// Connects an eventfd. Until a message is set the route is masked; dropping the route disconnects it.
    fn connect(&self, event: &EventFd) -> Result<Box<dyn EventRoute>, IrqError>;
    /// Connects the eventfd `raise` to input `line`: each signal raises it, and it is lowered, with a signal of `ended`, when
    /// the guest says that it has served it. Until what is returned is dropped. `None` where that cannot be had: whoever
    /// asks sets the line by hand.
    ///
    /// # Errors
    /// When the hypervisor can and refuses.
    fn connect_level(&self, _line: u32, _raise: &EventFd, _ended: &EventFd) -> Result<Option<Box<dyn Send>>, IrqError> {
        Ok(None)
    }
    /// Waits until every eventfd that was signalled before this call has interrupted the guest, or stays counted because
    /// its route is masked. Whether that was so by `deadline`.
    fn flush(&self, _deadline: Instant) -> bool {
        // Eventfds that interrupt by themselves leave nothing to wait for.
        true
    }
}

/// One eventfd's way into the guest.
pub trait EventRoute: Send + Sync {
    /// What each signal of the eventfd delivers; `None` masks the route, and signals then stay counted in the eventfd
    /// until a message is set again.
    fn set(&self, message: Option<MsiMessage>) -> Result<(), IrqError>;
}
