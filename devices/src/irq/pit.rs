//! The 8254 interval timer (Intel 8254 data sheet) and port 0x61, which gates its speaker channel.
//!
//! Nothing is stepped: each channel remembers when its count was loaded and works out counter and output from the time.
//! Channel 0 drives interrupt line 0, channel 1 (DRAM refresh) only exists to be read, channel 2 has a gate.

use crate::access::Answer;
use crate::interrupt::Wire;
use crate::timed::TimedDevice;

/// Input clock, in Hz.
pub const FREQUENCY_HZ: u64 = 1_193_182;

/// Least time between two interrupts of channel 0, in ns: a guest that asks for more would keep its host busy with
/// nothing else.
pub const PERIOD_NS_MIN: u64 = 50_000;

const NS: u128 = 1_000_000_000;

fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(FREQUENCY_HZ) / NS) as u64
}

/// First nanosecond at which `ticks` have passed.
fn nanoseconds(ticks: u64) -> u64 {
    u64::try_from((u128::from(ticks) * NS).div_ceil(u128::from(FREQUENCY_HZ))).unwrap_or(u64::MAX)
}

/// Which bytes of the counter an access moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Bytes {
    #[default]
    Low,
    High,
    LowThenHigh,
}

/// One channel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Channel {
    mode: u8,
    bytes: Bytes,
    bcd: bool,
    /// Count as loaded: 1 to 65536.
    reload: u32,
    /// Tick at which counting began; `None` before a count is written (or triggered, in modes 1 and 5).
    start: Option<u64>,
    /// Elapsed ticks at which a low gate has stopped counting.
    stopped_at: Option<u64>,
    gate: bool,
    low_written: Option<u8>,
    high_read_next: bool,
    latched: Option<u16>,
    status: Option<u8>,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self { gate, reload: 0x1_0000, ..Self::default() }
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn elapsed(&self, tick: u64) -> Option<u64> {
        let start = self.start?;
        Some(self.stopped_at.unwrap_or_else(|| tick.saturating_sub(start)))
    }

    fn counter(&self, tick: u64) -> u16 {
        let Some(elapsed) = self.elapsed(tick) else { return self.encode(self.reload) };
        let reload = u64::from(self.reload);
        let count = match self.mode {
            2 => reload - elapsed % reload,
            3 => reload - elapsed * 2 % reload,
            _ => {
                // Counts on past zero: modulo 65536, or 10000 in BCD.
                let modulus = if self.bcd { 10_000 } else { 0x1_0000 };
                (reload % modulus + modulus - elapsed % modulus) % modulus
            }
        };
        self.encode(count as u32)
    }

    fn encode(&self, count: u32) -> u16 {
        if !self.bcd {
            return count as u16;
        }
        (0..4).fold(0, |bcd, digit| bcd | ((count / 10u32.pow(digit) % 10) as u16) << (4 * digit))
    }

    fn decode(&self, value: u16) -> u32 {
        let (count, full) = match self.bcd {
            // Digits above nine have no meaning; they count as what they are worth.
            true => ((0..4).map(|digit| u32::from(value >> (4 * digit) & 0xf) * 10u32.pow(digit)).sum(), 10_000),
            false => (u32::from(value), 0x1_0000),
        };
        if count == 0 { full } else { count.min(0x1_0000) }
    }

    fn output(&self, tick: u64) -> bool {
        let Some(elapsed) = self.elapsed(tick) else { return self.mode != 0 };
        let reload = u64::from(self.reload);
        match self.mode {
            0 | 1 => elapsed >= reload,
            2 => !self.gate || elapsed % reload != reload - 1,
            3 => !self.gate || elapsed % reload < reload.div_ceil(2),
            _ => elapsed != reload,
        }
    }

    /// The first tick after `after` at which the output rises.
    fn next_rise(&self, after: Option<u64>) -> Option<u64> {
        let start = self.start?;
        if self.stopped_at.is_some() {
            return None;
        }
        let reload = u64::from(self.reload);
        let first = start.saturating_add(reload);
        match after.filter(|after| *after >= first) {
            None => Some(first),
            Some(after) if self.periodic() => Some(first.saturating_add(((after - first) / reload + 1) * reload)),
            Some(_) => None,
        }
    }

    fn set_mode(&mut self, control: u8) {
        let mode = match control >> 1 & 7 {
            6 => 2,
            7 => 3,
            mode => mode,
        };
        let bytes = match control >> 4 & 3 {
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::LowThenHigh,
        };
        *self = Self { mode, bytes, bcd: control & 1 != 0, ..Self::new(self.gate) };
    }

    fn latch(&mut self, tick: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.counter(tick));
            self.high_read_next = false;
        }
    }

    fn latch_status(&mut self, tick: u64) {
        if self.status.is_none() {
            let bytes = match self.bytes {
                Bytes::Low => 1,
                Bytes::High => 2,
                Bytes::LowThenHigh => 3,
            };
            let null_count = self.start.is_none();
            self.status = Some(
                u8::from(self.output(tick)) << 7
                    | u8::from(null_count) << 6
                    | bytes << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let value = self.latched.unwrap_or_else(|| self.counter(tick));
        let (byte, done) = match (self.bytes, self.high_read_next) {
            (Bytes::Low, _) => (value as u8, true),
            (Bytes::High, _) => ((value >> 8) as u8, true),
            (Bytes::LowThenHigh, high) => {
                self.high_read_next = !high;
                (if high { value >> 8 } else { value } as u8, high)
            }
        };
        if done {
            self.latched = None;
        }
        byte
    }

    /// Writes a byte of the count; tells whether the count is complete.
    fn write(&mut self, value: u8, tick: u64) -> bool {
        let count = match (self.bytes, self.low_written) {
            (Bytes::Low, _) => value.into(),
            (Bytes::High, _) => u16::from(value) << 8,
            (Bytes::LowThenHigh, None) => {
                self.low_written = Some(value);
                // In mode 0 the first byte stops the counter.
                if self.mode == 0 {
                    self.start = None;
                }
                return false;
            }
            (Bytes::LowThenHigh, Some(low)) => u16::from_le_bytes([low, value]),
        };
        self.low_written = None;
        self.reload = self.decode(count);
        // Modes 1 and 5 wait for the gate to rise.
        if !matches!(self.mode, 1 | 5) {
            self.start = Some(tick);
            self.stopped_at = (!self.gate).then_some(0);
        }
        true
    }

    fn set_gate(&mut self, gate: bool, tick: u64) {
        if gate == self.gate {
            return;
        }
        match (self.mode, gate) {
            (1 | 5, true) => self.start = Some(tick),
            (1 | 5, false) => {}
            (0 | 4, true) => {
                if let (Some(_), Some(stopped)) = (self.start, self.stopped_at.take()) {
                    self.start = Some(tick.saturating_sub(stopped));
                }
            }
            (_, true) => {
                self.stopped_at = None;
                self.start = self.start.map(|_| tick);
            }
            (_, false) => self.stopped_at = self.elapsed(tick),
        }
        self.gate = gate;
    }
}

/// The timer and port 0x61. As a device it answers ports 0x40 to 0x43.
#[derive(Debug)]
pub struct Pit {
    channels: [Channel; 3],
    speaker: bool,
    /// Tick of the last interrupt, and the time before which there is no other.
    last_rise: Option<u64>,
    not_before_ns: u64,
    irq0: Wire,
}

/// Everything of a [`Pit`] that a guest can see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PitState {
    /// The channels.
    pub channels: [Channel; 3],
    /// Speaker data bit of port 0x61.
    pub speaker: bool,
    /// Tick of channel 0's last interrupt.
    pub last_rise: Option<u64>,
}

impl Pit {
    /// A timer that interrupts by `irq0`; nothing counts until it is programmed.
    pub fn new(irq0: Wire) -> Self {
        let channels = [Channel::new(true), Channel::new(true), Channel::new(false)];
        Self { channels, speaker: false, last_rise: None, not_before_ns: 0, irq0 }
    }

    /// A copy of the state.
    pub fn state(&self) -> PitState {
        PitState { channels: self.channels.clone(), speaker: self.speaker, last_rise: self.last_rise }
    }

    /// Puts a state back.
    pub fn restore(&mut self, state: PitState) {
        (self.channels, self.speaker, self.last_rise) = (state.channels, state.speaker, state.last_rise);
        self.not_before_ns = 0;
    }

    /// When [`expire`](Self::expire) must be called, in guest ns. It can become earlier by any write.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.channels[0].next_rise(self.last_rise).map(|tick| nanoseconds(tick).max(self.not_before_ns))
    }

    /// Interrupts if channel 0 is due at `now_ns`. Ticks that were missed are one interrupt.
    pub fn expire(&mut self, now_ns: u64) {
        if self.next_deadline_ns().is_some_and(|deadline| deadline <= now_ns) {
            self.last_rise = Some(ticks(now_ns));
            self.not_before_ns = now_ns.saturating_add(PERIOD_NS_MIN);
            // Mode 0 keeps its output high until the next count; the others drop it again.
            if self.channels[0].mode == 0 {
                self.irq0.set(true);
            } else {
                self.irq0.pulse();
            }
        }
    }

    /// Reads port 0x61: gate and data of the speaker, refresh toggle, output of channel 2.
    pub fn port61_read(&mut self, now_ns: u64) -> u8 {
        u8::from(self.channels[2].gate)
            | u8::from(self.speaker) << 1
            | u8::from(now_ns / 15_085 % 2 == 1) << 4
            | u8::from(self.channels[2].output(ticks(now_ns))) << 5
    }

    /// Writes port 0x61.
    pub fn port61_write(&mut self, value: u8, now_ns: u64) {
        self.speaker = value & 2 != 0;
        self.channels[2].set_gate(value & 1 != 0, ticks(now_ns));
    }

    fn control(&mut self, value: u8, tick: u64) {
        match value >> 6 {
            3 => {
                for (index, channel) in self.channels.iter_mut().enumerate() {
                    if value & 2 << index != 0 {
                        if value & 0x20 == 0 {
                            channel.latch(tick);
                        }
                        if value & 0x10 == 0 {
                            channel.latch_status(tick);
                        }
                    }
                }
            }
            index => {
                let channel = &mut self.channels[usize::from(index)];
                if value & 0x30 == 0 {
                    channel.latch(tick);
                    return;
                }
                channel.set_mode(value);
                if index == 0 {
                    self.last_rise = None;
                    self.irq0.set(false);
                }
            }
        }
    }
}

impl TimedDevice for Pit {
    fn read_at(&mut self, offset: u64, data: &mut [u8], now_ns: u64) -> Answer {
        data.fill(0xff);
        let channel = usize::try_from(offset).ok().and_then(|index| self.channels.get_mut(index));
        if let (Some(channel), [first, ..]) = (channel, data) {
            *first = channel.read(ticks(now_ns));
        }
        Answer::Now
    }

    fn write_at(&mut self, offset: u64, data: &[u8], now_ns: u64) -> Answer {
        let tick = ticks(now_ns);
        match (offset, data) {
            (3, [value, ..]) => self.control(*value, tick),
            (0, [value, ..]) if self.channels[0].write(*value, tick) => {
                self.last_rise = None;
                self.irq0.set(false);
            }
            (index @ 1..=2, [value, ..]) => {
                self.channels[index as usize].write(*value, tick);
            }
            _ => {}
        }
        Answer::Now
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::interrupt::WireSink;

    #[derive(Default)]
    struct Rises(Mutex<(bool, u32)>);
    impl WireSink for Rises {
        fn set_level(&self, _line: u32, high: bool) {
            let mut state = self.0.lock().unwrap();
            state.1 += u32::from(high && !state.0);
            state.0 = high;
        }
    }
    impl Rises {
        fn count(&self) -> u32 {
            self.0.lock().unwrap().1
        }
    }

    fn pit() -> (Pit, Arc<Rises>) {
        let rises = Arc::new(Rises::default());
        (Pit::new(Wire::new(Arc::clone(&rises) as Arc<dyn WireSink>, 0)), rises)
    }

    fn out(pit: &mut Pit, port: u64, value: u8, now_ns: u64) {
        assert!(matches!(pit.write_at(port, &[value], now_ns), Answer::Now));
    }

    fn inb(pit: &mut Pit, port: u64, now_ns: u64) -> u8 {
        let mut data = [0];
        let _ = pit.read_at(port, &mut data, now_ns);
        data[0]
    }

    /// A kernel's 100 Hz tick: one interrupt each 10 ms, and a late caller gets one, not a burst.
    #[test]
    fn periodic_tick() {
        let (mut pit, rises) = pit();
        assert_eq!(pit.next_deadline_ns(), None);
        for (port, value) in [(3, 0x34), (0, 0x9c), (0, 0x2e)] {
            out(&mut pit, port, value, 1_000);
        }
        let first = pit.next_deadline_ns().unwrap();
        assert!((10_000_000..10_003_000).contains(&first), "{first}");
        pit.expire(first - 1);
        assert_eq!(rises.count(), 0);
        pit.expire(first);
        assert_eq!(rises.count(), 1);
        let second = pit.next_deadline_ns().unwrap();
        assert!((9_999_000..10_001_000).contains(&(second - first)), "{second}");
        pit.expire(second + 95_000_000);
        assert_eq!(rises.count(), 2);
        assert!(pit.next_deadline_ns().unwrap() > second + 95_000_000);
    }

    /// One-shot as a kernel's clock event device uses it: mode 4, one interrupt for each count.
    #[test]
    fn one_shot_fires_once() {
        let (mut pit, rises) = pit();
        out(&mut pit, 3, 0x38, 0);
        for round in 1..=2 {
            let now = u64::from(round) * 1_000_000;
            out(&mut pit, 0, 100, now);
            assert_eq!(pit.next_deadline_ns(), None, "the count is complete with its second byte");
            out(&mut pit, 0, 0, now);
            assert_eq!(pit.next_deadline_ns(), Some(nanoseconds(ticks(now) + 100)));
            pit.expire(now + 1_000_000 - 1);
            assert_eq!(rises.count(), round);
            assert_eq!(pit.next_deadline_ns(), None);
        }
    }

    /// Calibration against channel 2: gate on, mode 0, poll port 0x61 until the output rises.
    #[test]
    fn speaker_channel_times_fifty_milliseconds() {
        let (mut pit, _) = pit();
        pit.port61_write(1, 0);
        let count = (FREQUENCY_HZ / 20) as u16;
        let [low, high] = count.to_le_bytes();
        for (port, value) in [(3, 0xb0), (2, low), (2, high)] {
            out(&mut pit, port, value, 0);
        }
        assert_eq!(pit.port61_read(49_990_000) & 0x20, 0);
        assert_eq!(pit.port61_read(50_010_000) & 0x20, 0x20);
        // A low gate stops the clock.
        for (port, value) in [(3, 0xb0), (2, low), (2, high)] {
            out(&mut pit, port, value, 0);
        }
        pit.port61_write(0, 25_000_000);
        assert_eq!(pit.port61_read(80_000_000) & 0x20, 0);
        pit.port61_write(1, 100_000_000);
        assert_eq!(pit.port61_read(124_000_000) & 0x20, 0);
        assert_eq!(pit.port61_read(126_000_000) & 0x20, 0x20);
    }

    /// A latched counter does not move between its two bytes; read-back gives status before count.
    #[test]
    fn latch_and_read_back() {
        let (mut pit, _) = pit();
        for (port, value) in [(3, 0x34), (0, 0), (0, 0)] {
            out(&mut pit, port, value, 0);
        }
        let at = nanoseconds(0x1234);
        out(&mut pit, 3, 0x00, at);
        assert_eq!(inb(&mut pit, 0, at + 1_000_000), 0xcc);
        assert_eq!(inb(&mut pit, 0, at + 2_000_000), 0xed);
        out(&mut pit, 3, 0xc2, at);
        assert_eq!(inb(&mut pit, 0, at), 0xb4, "output high, count loaded, both bytes, mode 2");
        assert_eq!(u16::from_le_bytes([inb(&mut pit, 0, at), inb(&mut pit, 0, at)]), 0xedcc);
    }

    /// The shortest period a guest can ask for must not become an interrupt storm.
    #[test]
    fn absurd_rate_is_bounded() {
        let (mut pit, rises) = pit();
        for (port, value) in [(3, 0x14), (0, 1)] {
            out(&mut pit, port, value, 0);
        }
        let mut now = 0;
        while let Some(deadline) = pit.next_deadline_ns().filter(|deadline| *deadline <= 1_000_000) {
            now = deadline.max(now + 1);
            pit.expire(now);
        }
        assert!(rises.count() <= 21, "{}", rises.count());
    }
}
