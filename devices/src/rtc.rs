//! The real-time clock and CMOS memory of a PC (Motorola MC146818A data sheet), ports 0x70 and 0x71.
//!
//! The clock is not stepped: its registers are worked out from the wall clock at guest time zero, the guest's time and what
//! the guest has set. Alarm and periodic rate are registers without interrupts; status register C shows update-ended.

use crate::access::Answer;
use crate::timed::TimedDevice;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

const UPDATING: u8 = 0x80;
const SET: u8 = 0x80;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
const UPDATE_ENDED: u8 = 0x10;
const VALID: u8 = 0x80;
const PM: u8 = 0x80;

const NS: u64 = 1_000_000_000;
/// How long before each second the update-in-progress bit is set, in ns.
const UPDATE_NS: u64 = 244_000;

/// A moment as the clock shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calendar {
    second: u8,
    minute: u8,
    hour: u8,
    /// 1 is Sunday.
    weekday: u8,
    day: u8,
    month: u8,
    /// 0 to 9999.
    year: u16,
}

impl Calendar {
    /// From seconds since 1970.
    fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(86_400);
        let within = seconds.rem_euclid(86_400);
        // Years that begin in March put the leap day at the end; eras of 400 years repeat.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * day_of_year + 2) / 153;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Self {
            second: (within % 60) as u8,
            minute: (within / 60 % 60) as u8,
            hour: (within / 3600) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            day: (day_of_year - (153 * from_march + 2) / 5 + 1) as u8,
            month: month as u8,
            year: year.clamp(0, 9999) as u16,
        }
    }

    /// To seconds since 1970. Fields out of range count on, as they do in the chip.
    fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let from_march = (month + 9) % 12;
        let day_of_year = (153 * from_march + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

/// What a guest can see of the clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RtcState {
    /// Index register.
    pub index: u8,
    /// CMOS memory; the clock's own registers in it are not used, except alarms and status A and B.
    pub memory: Vec<u8>,
    /// What the guest has set the clock forward by, in seconds.
    pub offset_s: i64,
}

/// The clock. As a device it answers its two ports.
#[derive(Clone, Debug)]
pub struct Rtc {
    /// UTC at guest time zero, in ns since 1970.
    wall_base_ns: u64,
    index: u8,
    memory: [u8; 128],
    offset_s: i64,
    /// The time registers while the guest sets them.
    setting: Option<Calendar>,
    /// Second of the last read of status C.
    seen_s: i64,
}

impl Rtc {
    /// A clock that shows `wall_base_ns` (UTC, ns since 1970) at guest time zero.
    pub fn new(wall_base_ns: u64) -> Self {
        let mut memory = [0; 128];
        memory[usize::from(STATUS_A)] = 0x26;
        memory[usize::from(STATUS_B)] = HOURS_24;
        Self { wall_base_ns, index: 0, memory, offset_s: 0, setting: None, seen_s: (wall_base_ns / NS) as i64 }
    }

    /// A copy of the state.
    pub fn state(&self) -> RtcState {
        RtcState { index: self.index, memory: self.memory.to_vec(), offset_s: self.offset_s }
    }

    /// Puts a state back.
    pub fn restore(&mut self, state: &RtcState) {
        self.index = state.index & 0x7f;
        self.memory.iter_mut().zip(&state.memory).for_each(|(to, from)| *to = *from);
        self.offset_s = state.offset_s;
    }

    /// Sets a byte of CMOS memory, as firmware would; offsets past the end are ignored.
    pub fn set_memory(&mut self, offset: u8, value: u8) {
        if let Some(byte) = self.memory.get_mut(usize::from(offset)) {
            *byte = value;
        }
    }

    fn wall_ns(&self, now_ns: u64) -> u64 {
        self.wall_base_ns.saturating_add(now_ns)
    }

    fn unix_s(&self, now_ns: u64) -> i64 {
        ((self.wall_ns(now_ns) / NS) as i64).saturating_add(self.offset_s)
    }

    fn calendar(&self, now_ns: u64) -> Calendar {
        self.setting.unwrap_or_else(|| Calendar::from_unix(self.unix_s(now_ns)))
    }

    fn status_b(&self) -> u8 {
        self.memory[usize::from(STATUS_B)]
    }

    fn encode(&self, value: u8) -> u8 {
        if self.status_b() & BINARY != 0 { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.status_b() & BINARY != 0 { value } else { (value >> 4).saturating_mul(10).saturating_add(value & 0xf) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.status_b() & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.status_b() & HOURS_24 != 0 {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    fn read_register(&mut self, now_ns: u64) -> u8 {
        let time = self.calendar(now_ns);
        match self.index {
            SECONDS => self.encode(time.second),
            MINUTES => self.encode(time.minute),
            HOURS => self.encode_hour(time.hour),
            WEEKDAY => self.encode(time.weekday),
            DAY => self.encode(time.day),
            MONTH => self.encode(time.month),
            YEAR => self.encode((time.year % 100) as u8),
            CENTURY => self.encode((time.year / 100) as u8),
            STATUS_A => {
                let updating = self.setting.is_none() && self.wall_ns(now_ns) % NS >= NS - UPDATE_NS;
                self.memory[usize::from(STATUS_A)] | if updating { UPDATING } else { 0 }
            }
            STATUS_C => {
                let second = self.unix_s(now_ns);
                if std::mem::replace(&mut self.seen_s, second) == second { 0 } else { UPDATE_ENDED }
            }
            STATUS_D => VALID,
            index => self.memory[usize::from(index & 0x7f)],
        }
    }

    fn write_register(&mut self, value: u8, now_ns: u64) {
        let mut time = self.calendar(now_ns);
        let plain = self.decode(value);
        match self.index {
            SECONDS => time.second = plain,
            MINUTES => time.minute = plain,
            HOURS => time.hour = self.decode_hour(value),
            // Follows from the date.
            WEEKDAY => return,
            DAY => time.day = plain,
            MONTH => time.month = plain,
            YEAR => time.year = time.year / 100 * 100 + u16::from(plain % 100),
            CENTURY => time.year = u16::from(plain % 100) * 100 + time.year % 100,
            STATUS_A => {
                self.memory[usize::from(STATUS_A)] = value & !UPDATING;
                return;
            }
            STATUS_B => return self.write_status_b(value, now_ns),
            STATUS_C | STATUS_D => return,
            index => {
                self.memory[usize::from(index & 0x7f)] = value;
                return;
            }
        }
        if self.setting.is_some() {
            self.setting = Some(time);
        } else {
            self.set_time(time, now_ns);
        }
    }

    fn write_status_b(&mut self, value: u8, now_ns: u64) {
        let time = self.calendar(now_ns);
        self.memory[usize::from(STATUS_B)] = value;
        if value & SET != 0 {
            self.setting = Some(time);
        } else if self.setting.take().is_some() {
            self.set_time(time, now_ns);
        }
    }

    fn set_time(&mut self, time: Calendar, now_ns: u64) {
        let wall_s = (self.wall_ns(now_ns) / NS) as i64;
        self.offset_s = time.to_unix().saturating_sub(wall_s);
    }
}

impl TimedDevice for Rtc {
    fn read_at(&mut self, offset: u64, data: &mut [u8], now_ns: u64) -> Answer {
        data.fill(0xff);
        if let (1, [first, ..]) = (offset, data) {
            *first = self.read_register(now_ns);
        }
        Answer::Now
    }

    fn write_at(&mut self, offset: u64, data: &[u8], now_ns: u64) -> Answer {
        match (offset, data) {
            // Bit 7 masks NMI on old boards.
            (0, [value, ..]) => self.index = value & 0x7f,
            (1, [value, ..]) => self.write_register(*value, now_ns),
            _ => {}
        }
        Answer::Now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    const LEAP_DAY_NS: u64 = 1_709_251_198 * NS;

    fn get(rtc: &mut Rtc, index: u8, now_ns: u64) -> u8 {
        let mut data = [0];
        assert!(matches!(rtc.write_at(0, &[index], now_ns), Answer::Now));
        assert!(matches!(rtc.read_at(1, &mut data, now_ns), Answer::Now));
        data[0]
    }
    fn put(rtc: &mut Rtc, index: u8, value: u8, now_ns: u64) {
        assert!(matches!(rtc.write_at(0, &[index], now_ns), Answer::Now));
        assert!(matches!(rtc.write_at(1, &[value], now_ns), Answer::Now));
    }
    fn date(rtc: &mut Rtc, now_ns: u64) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|index| get(rtc, index, now_ns))
    }

    /// The clock runs over the end of a leap day, in BCD as at power-on.
    #[test]
    fn leap_day_ends() {
        let mut rtc = Rtc::new(LEAP_DAY_NS);
        assert_eq!(date(&mut rtc, 0), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
        assert_eq!(date(&mut rtc, 2 * NS), [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]);
        assert_eq!(get(&mut rtc, STATUS_D, 0), 0x80);
    }

    /// A kernel waits for update-in-progress to end and reads at leisure.
    #[test]
    fn update_in_progress_precedes_the_second() {
        let mut rtc = Rtc::new(LEAP_DAY_NS);
        assert_eq!(get(&mut rtc, STATUS_A, NS - UPDATE_NS - 1), 0x26);
        assert_eq!(get(&mut rtc, STATUS_A, NS - 1), 0xa6);
        assert_eq!(get(&mut rtc, STATUS_A, NS), 0x26);
        assert_eq!(get(&mut rtc, STATUS_C, NS), UPDATE_ENDED);
        assert_eq!(get(&mut rtc, STATUS_C, NS), 0);
    }

    /// The guest sets the clock with updates inhibited; it runs on from there.
    #[test]
    fn guest_sets_the_clock() {
        let mut rtc = Rtc::new(LEAP_DAY_NS);
        put(&mut rtc, STATUS_B, SET | HOURS_24 | BINARY, NS);
        for (index, value) in
            [(CENTURY, 19), (YEAR, 99), (MONTH, 12), (DAY, 31), (HOURS, 23), (MINUTES, 59), (SECONDS, 59)]
        {
            put(&mut rtc, index, value, 5 * NS);
        }
        assert_eq!(get(&mut rtc, SECONDS, 8 * NS), 59, "inhibited");
        put(&mut rtc, STATUS_B, HOURS_24 | BINARY, 9 * NS);
        assert_eq!(date(&mut rtc, 10 * NS), [20, 0, 1, 1, 7, 0, 0, 0]);
        put(&mut rtc, STATUS_B, 0, 10 * NS);
        assert_eq!(get(&mut rtc, HOURS, 10 * NS), 0x12, "twelve o'clock at night");
        assert_eq!(get(&mut rtc, HOURS, (10 + 13 * 3600) * NS), 0x81);
        let mut other = Rtc::new(LEAP_DAY_NS);
        other.restore(&rtc.state());
        assert_eq!(date(&mut other, 10 * NS), date(&mut rtc, 10 * NS));
    }

    /// Any value in any register at any time: no panic, and memory keeps what is not the clock's.
    #[test]
    fn absurd_values_are_harmless() {
        for base in [0, LEAP_DAY_NS, u64::MAX] {
            let mut rtc = Rtc::new(base);
            for b in [0, SET, SET | BINARY, BINARY | HOURS_24] {
                put(&mut rtc, STATUS_B, b, 0);
                for index in (0..=255u8).filter(|index| index & 0x7f != STATUS_B) {
                    for value in [0, 0x99, 0xaa, 0xff] {
                        put(&mut rtc, index, value, u64::MAX - 3);
                        get(&mut rtc, index, u64::MAX);
                    }
                }
                date(&mut rtc, u64::MAX);
            }
            assert_eq!(get(&mut rtc, 0x7f, 0), 0xff);
        }
    }
}
