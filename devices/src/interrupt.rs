//! Wires and messages: how a device interrupts, without knowing what it is connected to.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

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

/// Joins the wires of several devices into one, as the lines of a bus do: high while any of them is.
pub struct WiredOr {
    output: Wire,
    inputs: Mutex<Inputs>,
}

#[derive(Default)]
struct Inputs {
    /// Number of inputs that have been given out.
    count: u32,
    high: BTreeSet<u32>,
}

impl WiredOr {
    /// Joins wires into `output`.
    pub fn new(output: Wire) -> Arc<Self> {
        Arc::new(Self { output, inputs: Mutex::default() })
    }
    /// A wire for one more device.
    pub fn input(self: &Arc<Self>) -> Wire {
        let mut inputs = self.inputs.lock().unwrap_or_else(PoisonError::into_inner);
        inputs.count += 1;
        Wire::new(Arc::clone(self) as Arc<dyn WireSink>, inputs.count)
    }
}

impl WireSink for WiredOr {
    fn set_level(&self, line: u32, high: bool) {
        let mut inputs = self.inputs.lock().unwrap_or_else(PoisonError::into_inner);
        let was_high = !inputs.high.is_empty();
        if high {
            inputs.high.insert(line);
        } else {
            inputs.high.remove(&line);
        }
        let is_high = !inputs.high.is_empty();
        // Under the lock, so that two devices' changes leave in the order in which they came.
        if is_high != was_high {
            self.output.set(is_high);
        }
    }
}

impl fmt::Debug for WiredOr {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "WiredOr({:?})", self.output)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Levels(Mutex<Vec<bool>>);
    impl WireSink for Levels {
        fn set_level(&self, _line: u32, high: bool) {
            self.0.lock().unwrap().push(high);
        }
    }

    /// Two devices on one PCI line: the one that is served first must not lower it for the other.
    #[test]
    fn shared_line_stays_high_for_the_last_device() {
        let levels = Arc::new(Levels::default());
        let line = WiredOr::new(Wire::new(Arc::clone(&levels) as Arc<dyn WireSink>, 16));
        let (disk, net) = (line.input(), line.input());
        disk.set(true);
        net.set(true);
        disk.set(false);
        disk.set(false);
        assert_eq!(*levels.0.lock().unwrap(), [true]);
        net.set(false);
        assert_eq!(*levels.0.lock().unwrap(), [true, false]);
    }
}
