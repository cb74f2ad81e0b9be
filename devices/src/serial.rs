//! A 16550A serial port (National Semiconductor PC16550D data sheet) without line timing.
//!
//! What the guest sends waits in a bounded buffer until the host takes it; while that is full the transmitter stays busy,
//! so a slow terminal slows the guest's driver instead of losing its output. What the host sends waits in a second bounded
//! buffer and moves into the 16-byte FIFO as the guest empties it; a guest that has raised RTS and lowers it again holds it
//! back.
//!
//! `vm-superio` has a serial port, but one without FIFO control, trigger levels, modem status and overrun, whose interrupt
//! is an edge that is lost when its cause outlives one read of the identification register.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use crate::access::{Answer, RegisterDevice};
use crate::interrupt::Wire;

/// Bytes of the receive FIFO.
const FIFO_LEN: usize = 16;
/// Bytes that the host may send ahead.
const BACKLOG_MAX: usize = 1024;
/// Bytes of output that wait for the host.
const OUTPUT_MAX: usize = 16 << 10;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TRANSMITTER: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;

const LCR_DIVISOR: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

const LSR_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_TRANSMITTER: u8 = 1 << 5 | 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

/// What the port tells the host's side. Called under the port's lock, in the middle of a guest's access.
pub trait SerialHost: Send + Sync {
    /// There is output to [take](Serial::take_output) where there was none.
    fn output_ready(&self);
    /// Input that was [refused](Serial::receive) can be sent now.
    fn input_room(&self);
}

/// What a guest can see of a port, and what is under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SerialState {
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    modem_changes: u8,
    scratch: u8,
    divisor: [u8; 2],
    fifo_enabled: bool,
    trigger: usize,
    overrun: bool,
    /// The transmitter has become empty and nobody has looked yet.
    transmitter_news: bool,
    rts_was_raised: bool,
    fifo: VecDeque<u8>,
    backlog: VecDeque<u8>,
    output: VecDeque<u8>,
}

impl SerialState {
    fn new() -> Self {
        Self {
            interrupt_enable: 0,
            line_control: 0,
            modem_control: 0,
            modem_changes: 0,
            scratch: 0,
            divisor: [12, 0],
            fifo_enabled: false,
            trigger: 1,
            overrun: false,
            transmitter_news: false,
            rts_was_raised: false,
            fifo: VecDeque::new(),
            backlog: VecDeque::new(),
            output: VecDeque::new(),
        }
    }
    fn looped(&self) -> bool {
        self.modem_control & MCR_LOOP != 0
    }
    fn depth(&self) -> usize {
        if self.fifo_enabled { FIFO_LEN } else { 1 }
    }
    fn transmitter_empty(&self) -> bool {
        self.looped() || self.output.len() < OUTPUT_MAX
    }
    fn held_back(&self) -> bool {
        self.looped() || self.rts_was_raised && self.modem_control & MCR_RTS == 0
    }
    /// Modem lines: of a terminal that is always there, or in loop mode of the port's own outputs.
    fn modem_lines(&self) -> u8 {
        if !self.looped() {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
            .iter()
            .filter(|(output, _)| self.modem_control & output != 0)
            .fold(0, |lines, (_, input)| lines | input)
    }
    /// The most urgent interrupt that is enabled and has a cause.
    fn cause(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(IER_LINE) && self.overrun {
            IIR_LINE
        } else if enabled(IER_RECEIVED) && !self.fifo.is_empty() {
            // No line timing: a FIFO that is not filled to its trigger has timed out already.
            if self.fifo.len() >= self.trigger { IIR_RECEIVED } else { IIR_TIMEOUT }
        } else if enabled(IER_TRANSMITTER) && self.transmitter_news {
            IIR_TRANSMITTER
        } else if enabled(IER_MODEM) && self.modem_changes != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }
}

/// A serial port. As a device it answers its eight ports.
pub struct Serial {
    state: SerialState,
    /// The host was refused and waits for room.
    host_waits: bool,
    irq: Wire,
    irq_high: bool,
    host: Arc<dyn SerialHost>,
}

impl Serial {
    /// A port as after power-on, interrupting by `irq`.
    pub fn new(irq: Wire, host: Arc<dyn SerialHost>) -> Self {
        Self { state: SerialState::new(), host_waits: false, irq, irq_high: false, host }
    }

    /// Sends bytes to the guest; gives how many were taken. When not all of them, [`SerialHost::input_room`] tells when
    /// there is room again.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(BACKLOG_MAX - self.state.backlog.len().min(BACKLOG_MAX));
        self.state.backlog.extend(&bytes[..taken]);
        self.host_waits = taken < bytes.len();
        self.refill();
        self.update_irq();
        taken
    }

    /// Moves all output that waits to the end of `into`.
    pub fn take_output(&mut self, into: &mut Vec<u8>) {
        let was_full = !self.state.transmitter_empty();
        into.extend(self.state.output.drain(..));
        if was_full {
            self.state.transmitter_news = true;
            self.update_irq();
        }
    }

    /// A copy of the state.
    pub fn state(&self) -> SerialState {
        self.state.clone()
    }

    /// Puts a state back.
    pub fn restore(&mut self, mut state: SerialState) {
        state.fifo.truncate(FIFO_LEN);
        state.backlog.truncate(BACKLOG_MAX);
        state.output.truncate(OUTPUT_MAX);
        self.state = state;
        self.update_irq();
        if !self.state.output.is_empty() {
            self.host.output_ready();
        }
    }

    fn refill(&mut self) {
        let state = &mut self.state;
        if state.held_back() {
            return;
        }
        let room = state.depth().saturating_sub(state.fifo.len()).min(state.backlog.len());
        state.fifo.extend(state.backlog.drain(..room));
        if self.host_waits && state.backlog.len() < BACKLOG_MAX / 2 {
            self.host_waits = false;
            self.host.input_room();
        }
    }

    fn update_irq(&mut self) {
        // OUT2 connects the interrupt to the bus on a PC; loop mode disconnects it.
        let connected = self.state.modem_control & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2;
        let high = connected && self.state.cause() != IIR_NONE;
        if high != self.irq_high {
            self.irq_high = high;
            self.irq.set(high);
        }
    }

    fn transmit(&mut self, byte: u8) {
        let state = &mut self.state;
        state.transmitter_news = false;
        if state.looped() {
            if state.fifo.len() < state.depth() {
                state.fifo.push_back(byte);
            } else {
                state.overrun = true;
            }
        } else if state.output.len() < OUTPUT_MAX {
            state.output.push_back(byte);
            if state.output.len() == 1 {
                self.host.output_ready();
            }
        }
        // Lowers the line if this was the cause, so that what follows is an edge.
        self.update_irq();
        self.state.transmitter_news = self.state.transmitter_empty();
    }

    fn read_register(&mut self, register: u64) -> u8 {
        let state = &mut self.state;
        match register {
            0 | 1 if state.line_control & LCR_DIVISOR != 0 => state.divisor[register as usize],
            0 => {
                let byte = state.fifo.pop_front().unwrap_or(0);
                self.refill();
                byte
            }
            1 => state.interrupt_enable,
            2 => {
                let cause = state.cause();
                if cause == IIR_TRANSMITTER {
                    state.transmitter_news = false;
                }
                cause | if state.fifo_enabled { IIR_FIFO } else { 0 }
            }
            3 => state.line_control,
            4 => state.modem_control,
            5 => {
                let overrun = std::mem::take(&mut state.overrun);
                (if state.fifo.is_empty() { 0 } else { LSR_READY })
                    | (if overrun { LSR_OVERRUN } else { 0 })
                    | (if state.transmitter_empty() { LSR_TRANSMITTER } else { 0 })
            }
            6 => state.modem_lines() | std::mem::take(&mut state.modem_changes),
            7 => state.scratch,
            _ => 0xff,
        }
    }

    fn write_register(&mut self, register: u64, value: u8) {
        let state = &mut self.state;
        match register {
            0 | 1 if state.line_control & LCR_DIVISOR != 0 => state.divisor[register as usize] = value,
            0 => self.transmit(value),
            1 => {
                // Enabling the interrupt of an empty transmitter is news.
                if value & !state.interrupt_enable & IER_TRANSMITTER != 0 && state.transmitter_empty() {
                    state.transmitter_news = true;
                }
                state.interrupt_enable = value & 0x0f;
            }
            2 => self.control_fifo(value),
            3 => state.line_control = value,
            4 => {
                let before = state.modem_lines();
                state.modem_control = value & 0x1f;
                state.rts_was_raised |= value & MCR_RTS != 0;
                let after = state.modem_lines();
                let changed = before ^ after;
                // The ring indicator counts only when it ends.
                let changed = changed & !MSR_RI | before & !after & MSR_RI;
                state.modem_changes |= changed >> 4;
                self.refill();
            }
            7 => state.scratch = value,
            _ => {}
        }
    }

    fn control_fifo(&mut self, value: u8) {
        let state = &mut self.state;
        let enabled = value & FCR_ENABLE != 0;
        if value & FCR_CLEAR_RECEIVER != 0 || enabled != state.fifo_enabled {
            state.fifo.clear();
        }
        state.fifo_enabled = enabled;
        state.trigger = match (enabled, value >> 6) {
            (false, _) | (true, 0) => 1,
            (true, 1) => 4,
            (true, 2) => 8,
            (true, _) => 14,
        };
        self.refill();
    }
}

impl RegisterDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Answer {
        data.fill(0xff);
        if let [first, ..] = data {
            *first = self.read_register(offset);
            self.update_irq();
        }
        Answer::Now
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        if let [first, ..] = data {
            self.write_register(offset, *first);
            self.update_irq();
        }
        Answer::Now
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state.fmt(formatter)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::interrupt::WireSink;

    /// Edges of the interrupt, and what the host was told.
    #[derive(Default)]
    struct Log {
        levels: Mutex<Vec<bool>>,
        ready: Mutex<u32>,
        room: Mutex<u32>,
    }
    impl WireSink for Log {
        fn set_level(&self, _line: u32, high: bool) {
            self.levels.lock().unwrap().push(high);
        }
    }
    impl SerialHost for Log {
        fn output_ready(&self) {
            *self.ready.lock().unwrap() += 1;
        }
        fn input_room(&self) {
            *self.room.lock().unwrap() += 1;
        }
    }
    impl Log {
        fn levels(&self) -> Vec<bool> {
            std::mem::take(&mut self.levels.lock().unwrap())
        }
    }

    fn port() -> (Serial, Arc<Log>) {
        let log = Arc::new(Log::default());
        (Serial::new(Wire::new(Arc::clone(&log) as Arc<dyn WireSink>, 4), Arc::clone(&log) as Arc<dyn SerialHost>), log)
    }
    fn put(port: &mut Serial, register: u64, value: u8) {
        assert!(matches!(port.write(register, &[value]), Answer::Now));
    }
    fn get(port: &mut Serial, register: u64) -> u8 {
        let mut data = [0];
        assert!(matches!(port.read(register, &mut data), Answer::Now));
        data[0]
    }
    fn output(port: &mut Serial) -> Vec<u8> {
        let mut bytes = Vec::new();
        port.take_output(&mut bytes);
        bytes
    }

    /// What Linux's 8250 driver does to find out what it has: a 16550A, at its first register and at its last.
    #[test]
    fn probed_as_16550a() {
        let (mut port, _) = port();
        put(&mut port, 1, 0x0f);
        assert_eq!(get(&mut port, 1), 0x0f);
        put(&mut port, 1, 0);
        put(&mut port, 4, 0x1a);
        assert_eq!(get(&mut port, 6) & 0xf0, 0x90, "loop mode shows OUT2 and RTS");
        put(&mut port, 4, 0);
        put(&mut port, 2, 1);
        assert_eq!(get(&mut port, 2) & 0xc0, 0xc0);
        put(&mut port, 3, 0x80);
        put(&mut port, 0, 1);
        put(&mut port, 3, 0x03);
        put(&mut port, 7, 0xa5);
        assert_eq!((get(&mut port, 7), get(&mut port, 3), get(&mut port, 5)), (0xa5, 0x03, 0x60));
    }

    /// Enabling the transmitter's interrupt, twice: each time there is one, and it is gone when it has been read.
    #[test]
    fn empty_transmitter_interrupts() {
        let (mut port, log) = port();
        put(&mut port, 4, 8);
        for _ in 0..2 {
            put(&mut port, 1, 2);
            assert_eq!(log.levels(), [true]);
            assert_eq!(get(&mut port, 2), 2);
            assert_eq!(log.levels(), [false]);
            assert_eq!(get(&mut port, 2), 1);
            put(&mut port, 1, 0);
        }
        put(&mut port, 1, 2);
        log.levels();
        for byte in b"hi" {
            put(&mut port, 0, *byte);
            assert_eq!(log.levels(), [false, true], "an edge for each byte: the line is edge-triggered");
        }
        assert_eq!(*log.ready.lock().unwrap(), 1, "the host is woken once");
        assert_eq!(output(&mut port), b"hi");
    }

    /// Nobody takes output: the transmitter becomes busy, nothing grows, and it goes on when the host has caught up.
    #[test]
    fn slow_host_makes_the_transmitter_busy() {
        let (mut port, log) = port();
        put(&mut port, 4, 8);
        put(&mut port, 1, 2);
        for _ in 0..OUTPUT_MAX + 5 {
            put(&mut port, 0, b'x');
        }
        assert_eq!(get(&mut port, 5), 0);
        log.levels();
        assert_eq!(output(&mut port).len(), OUTPUT_MAX);
        assert_eq!(log.levels(), [true]);
        assert_eq!(get(&mut port, 5), 0x60);
    }

    /// Typed input reaches the guest in order through the FIFO, with an interrupt that lasts as long as there is any.
    #[test]
    fn input_passes_the_fifo() {
        let (mut port, log) = port();
        put(&mut port, 2, 0x81);
        put(&mut port, 4, 0x0b);
        put(&mut port, 1, 1);
        let typed: Vec<u8> = (0..200).collect();
        assert_eq!(port.receive(&typed), 200);
        assert_eq!(log.levels(), [true]);
        assert_eq!(get(&mut port, 2), 0xc4, "filled to the trigger");
        let mut seen = Vec::new();
        while get(&mut port, 5) & 1 != 0 {
            if seen.len() == 195 {
                assert_eq!(get(&mut port, 2), 0xcc, "below the trigger: timed out");
            }
            seen.push(get(&mut port, 0));
        }
        assert_eq!(seen, typed);
        assert_eq!(log.levels(), [false]);
    }

    /// A guest that does not read: the host is told how much was taken, and when there is room. Clearing the FIFO costs at
    /// most what was in it.
    #[test]
    fn input_is_bounded() {
        let (mut port, log) = port();
        put(&mut port, 2, 1);
        let typed = vec![b'a'; 5000];
        let taken = port.receive(&typed);
        assert_eq!(taken, BACKLOG_MAX);
        assert_eq!(port.receive(&typed[taken..]), FIFO_LEN);
        assert_eq!(port.receive(&typed), 0);
        put(&mut port, 2, 3);
        let mut read = 0;
        while get(&mut port, 5) & 1 != 0 {
            get(&mut port, 0);
            read += 1;
        }
        assert_eq!(read, BACKLOG_MAX);
        assert_eq!(*log.room.lock().unwrap(), 1);
    }

    /// Flow control by RTS: lowered after it was raised, it holds input back; a guest that never raises it gets everything.
    #[test]
    fn rts_holds_input_back() {
        let (mut port, _) = port();
        port.receive(b"a");
        assert_eq!(get(&mut port, 0), b'a');
        put(&mut port, 4, 2);
        put(&mut port, 4, 0);
        port.receive(b"b");
        assert_eq!(get(&mut port, 5) & 1, 0);
        put(&mut port, 4, 2);
        assert_eq!(get(&mut port, 0), b'b');
    }

    /// Loop mode returns what is sent and nothing leaves; too much is an overrun.
    #[test]
    fn loop_mode() {
        let (mut port, log) = port();
        put(&mut port, 4, 0x18);
        put(&mut port, 1, 5);
        put(&mut port, 0, b'q');
        put(&mut port, 0, b'r');
        assert_eq!((get(&mut port, 2), get(&mut port, 5)), (6, 0x63));
        assert_eq!((get(&mut port, 2), get(&mut port, 0)), (4, b'q'));
        assert_eq!((output(&mut port), log.levels()), (vec![], vec![]));
    }
}
