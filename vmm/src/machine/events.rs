//! What happens to a running machine, told to the one thread that decides: the assembler's loop.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, SyncSender, sync_channel};

use atoll_devices::{PowerEvent, PowerSink};

use crate::cpu::{Stall, StallSink, VcpuEnd};

/// Events that wait for the loop at most; it only receives, so this is never reached in practice.
const WAITING_MAX: usize = 256;

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

/// Where they arrive.
#[derive(Debug)]
pub struct EventReceiver(Receiver<MachineEvent>);

/// Makes both ends.
pub fn events() -> (EventSender, EventReceiver) {
    let (sender, receiver) = sync_channel(WAITING_MAX);
    (EventSender::new(Arc::new(sender)), EventReceiver(receiver))
}

impl EventSink for SyncSender<MachineEvent> {
    fn happened(&self, event: MachineEvent) {
        if let Err(error) = self.try_send(event) {
            tracing::warn!(%error, "an event of the machine was dropped");
        }
    }
}

impl EventSender {
    /// Tells `sink`.
    pub fn new(sink: Arc<dyn EventSink>) -> Self {
        Self(sink)
    }
    /// Tells an event. One that finds no room is dropped and logged: whoever floods the loop is not waited for.
    pub fn tell(&self, event: MachineEvent) {
        self.0.happened(event);
    }
}

impl EventReceiver {
    /// Waits for the next event.
    pub(super) fn next(&self) -> Result<MachineEvent, RecvError> {
        self.0.recv()
    }
    /// Forgets what has arrived so far, apart from a wish to stop: it concerns a machine that is gone.
    pub fn discard_stale(&self) -> Option<StopCause> {
        self.0.try_iter().fold(None, |stop, event| match event {
            MachineEvent::Stop(cause) => Some(cause),
            MachineEvent::Power(_)
            | MachineEvent::VcpuEnded(_)
            | MachineEvent::Stalled(_)
            | MachineEvent::Ejected(_)
            | MachineEvent::Departed => stop,
        })
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
