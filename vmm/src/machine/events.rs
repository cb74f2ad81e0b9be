//! What happens to a running machine, told to the one thread that decides.

use std::fmt;
use std::sync::Arc;

use atoll_devices::{PowerEvent, PowerSink};

use crate::cpu::{Stall, StallSink, VcpuEnd};

/// Why somebody outside the guest wants the machine to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// A signal of this number.
    Signal(i32),
    /// The escape sequence on the terminal.
    Escape,
}

/// Something happened.
#[derive(Debug)]
pub enum MachineEvent {
    /// The guest asked for power-off or reset.
    Power(PowerEvent),
    /// A vCPU has left the guest for good.
    VcpuEnded(VcpuEnd),
    /// A device did not answer a vCPU in time.
    Stalled(Stall),
    /// The guest has let the device in this slot go: `Machine::settle` does the rest.
    Ejected(u8),
    /// A device that was pulled out has ended: `Machine::settle` frees its place.
    Departed,
    /// The backend of this device was given up, and its owner wants it unplugged then.
    GivenUp(String),
    /// The machine is to end.
    Stop(StopCause),
}

/// Who decides what events mean.
pub trait EventSink: Send + Sync {
    /// Something happened. Called on any thread, a vCPU's too: it notes the event and returns.
    fn happened(&self, event: MachineEvent);
}

/// Where events are told; never blocks.
#[derive(Clone)]
pub struct EventSender(Arc<dyn EventSink>);

impl fmt::Debug for EventSender {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("EventSender")
    }
}

impl EventSender {
    /// Tells `sink`.
    pub fn new(sink: Arc<dyn EventSink>) -> Self {
        Self(sink)
    }
    /// Tells an event.
    pub fn tell(&self, event: MachineEvent) {
        self.0.happened(event);
    }
}

impl PowerSink for EventSender {
    fn power_event(&self, event: PowerEvent) {
        self.tell(MachineEvent::Power(event));
    }
}

impl StallSink for EventSender {
    fn device_stalled(&self, stall: Stall) {
        self.tell(MachineEvent::Stalled(stall));
    }
}
