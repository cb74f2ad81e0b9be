//! The 16550 itself: vm-superio's state machine, and the level of its interrupt wire.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;

use vm_superio::Serial;
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;

/// Number of registers.
pub(crate) const REGISTERS: u64 = 8;

/// Interrupt enable register: received data, transmitter empty.
const IER_RECEIVED: u8 = 1;
const IER_EMPTY: u8 = 2;
/// Interrupt identification register, as vm-superio keeps it: one bit per cause.
const IIR_EMPTY: u8 = 2;
const IIR_RECEIVED: u8 = 4;

/// The wire's level is computed after each access; the edges that vm-superio reports are not needed.
#[derive(Clone, Copy, Debug)]
struct NoEdge;

impl Trigger for NoEdge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// What the guest has sent and nobody has taken yet.
#[derive(Debug, Default)]
struct Sent(VecDeque<u8>);

impl io::Write for Sent {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A serial port: register accesses in, characters and a wire's level out.
#[derive(Debug)]
pub(crate) struct Port {
    serial: Serial<NoEdge, NoEvents, Sent>,
}

impl Port {
    /// A port after power-on.
    pub(crate) fn new() -> Self {
        Self { serial: Serial::new(NoEdge, Sent::default()) }
    }

    /// Reads a register.
    pub(crate) fn read(&mut self, register: u8) -> u8 {
        self.serial.read(register)
    }

    /// Writes a register.
    pub(crate) fn write(&mut self, register: u8, value: u8) {
        // Fails only if the sink or the trigger does; ours do not.
        let _ = self.serial.write(register, value);
    }

    /// How many characters the receiver has room for.
    pub(crate) fn room(&self) -> usize {
        self.serial.fifo_capacity()
    }

    /// Characters arrive; how many there was room for. In loop-back mode the line is cut off, and none are taken.
    pub(crate) fn receive(&mut self, characters: &[u8]) -> usize {
        self.serial.enqueue_raw_bytes(characters).unwrap_or(0)
    }

    /// What the guest has sent since the last time.
    pub(crate) fn take_sent(&mut self) -> impl Iterator<Item = u8> + '_ {
        self.serial.writer_mut().0.drain(..)
    }

    /// The level of the interrupt wire: a cause that is both pending and enabled.
    pub(crate) fn level(&self) -> bool {
        let state = self.serial.state();
        let (pending, enabled) = (state.interrupt_identification, state.interrupt_enable);
        let received = pending & IIR_RECEIVED != 0 && enabled & IER_RECEIVED != 0;
        let empty = pending & IIR_EMPTY != 0 && enabled & IER_EMPTY != 0;
        received || empty
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u8 = 0;
    const IER: u8 = 1;
    const IIR: u8 = 2;
    const LSR: u8 = 5;

    /// A driver's life with the transmitter: it enables the interrupt, is told that the register is empty, acknowledges
    /// by reading IIR, writes a character, is told again, and leaves with the interrupt masked and the wire low.
    #[test]
    fn transmitter_interrupt_is_a_level() {
        let mut port = Port::new();
        assert!(!port.level());
        port.write(IER, IER_EMPTY);
        assert!(port.level(), "empty from the start");
        assert_eq!(port.read(IIR) & 0x0f, IIR_EMPTY);
        assert!(!port.level());
        port.write(DATA, b'x');
        assert!(port.level());
        port.write(IER, 0);
        assert!(!port.level(), "a masked cause does not hold the wire");
        assert_eq!(port.take_sent().collect::<Vec<_>>(), b"x");
        assert_eq!(port.take_sent().count(), 0);
    }

    /// The receiver: the wire is high from the first character until the last one is read; what does not fit stays
    /// outside.
    #[test]
    fn receiver_interrupt_is_a_level() {
        let mut port = Port::new();
        port.write(IER, IER_RECEIVED);
        assert_eq!(port.receive(&[b'a'; 100]), 64);
        assert_eq!((port.room(), port.receive(b"b")), (0, 0));
        assert!(port.level());
        assert_eq!(port.read(LSR) & 1, 1);
        for _ in 0..64 {
            assert_eq!(port.read(DATA), b'a');
        }
        assert!(!port.level());
        assert_eq!(port.read(LSR) & 1, 0);
    }
}
