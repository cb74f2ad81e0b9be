//! Wires and messages: how a device interrupts, without knowing what it is connected to.

use std::fmt;
use std::sync::Arc;

/// Whatever a wire ends in: an I/O APIC pin, a PIC line, an irqfd.
pub trait WireSink: Send + Sync {
    /// Sets the level of input `line`.
    fn set_level(&self, line: u32, high: bool);
}

/// A level-triggered interrupt line that a device holds instead of an IRQ number.
#[derive(Clone)]
pub struct Wire {
    sink: Arc<dyn WireSink>,
    line: u32,
}

impl Wire {
    /// Connects a wire to input `line` of `sink`.
    pub fn new(sink: Arc<dyn WireSink>, line: u32) -> Self {
        Self { sink, line }
    }
    /// Raises or lowers it.
    pub fn set(&self, high: bool) {
        self.sink.set_level(self.line, high);
    }
    /// Raises and lowers it: an edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Wire({})", self.line)
    }
}

/// A message-signalled interrupt as the guest programmed it (PCI 3.0, 6.8; SDM vol. 3, 10.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Message address; 0xfee0_0000 to 0xfeef_ffff on x86.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Where messages go: the local APICs, or KVM.
pub trait MsiSink: Send + Sync {
    /// Delivers one message.
    fn fire(&self, message: MsiMessage);
}

/// The vectors of one function's MSI-X table, as whoever connects eventfds to them must see them.
///
/// A masked vector has no message: what is signalled meanwhile stays pending and is delivered on unmask.
pub trait MsixRoutes: Send + Sync {
    /// The guest changed vector `vector`: `Some` when it can fire, `None` while it is masked or MSI-X is disabled.
    fn route(&self, vector: u16, message: Option<MsiMessage>);
    /// Whether the vector was signalled while masked (the pending-bit array).
    fn pending(&self, vector: u16) -> bool;
    /// Signals the vector from inside the VMM (a configuration change, a stand-in's completion): fires its message, or
    /// stays pending while it is masked.
    fn signal(&self, vector: u16);
}
