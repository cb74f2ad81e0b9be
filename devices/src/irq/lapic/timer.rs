//! The local APIC's timer (SDM vol. 3, 11.5.4): one-shot, periodic and TSC-deadline.
//!
//! The counter is never stepped: what is kept is the time at which it reaches zero. The timer's clock is 1 GHz, so a
//! count lasts `divide` nanoseconds.

/// Mode, from bits 18 and 17 of the timer's LVT entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimerMode {
    /// Counts down once.
    #[default]
    OneShot,
    /// Counts down over and over.
    Periodic,
    /// Fires when the TSC reaches an absolute value.
    TscDeadline,
}

impl TimerMode {
    /// From the LVT entry; the reserved code 3 counts as one-shot.
    pub fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::OneShot,
        }
    }
}

/// Least time between two ticks of a periodic timer, in ns: a guest that asks for more would keep its host busy with
/// nothing else.
pub const PERIOD_NS_MIN: u64 = 50_000;

/// The timer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timer {
    mode: TimerMode,
    /// Divide configuration register.
    divide: u32,
    initial_count: u32,
    /// When the counter reaches zero, in guest ns; `None` while stopped.
    expires_ns: Option<u64>,
    /// Last value written to IA32_TSC_DEADLINE; zero when disarmed.
    deadline_tsc: u64,
}

impl Timer {
    /// Nanoseconds a count.
    fn divisor(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        if code == 7 { 1 } else { 2 << code }
    }

    fn period_ns(&self) -> u64 {
        u64::from(self.initial_count) * self.divisor()
    }

    /// When the timer wants [`expire`](Self::expire) to be called, in guest ns.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.expires_ns
    }

    /// Divide configuration register.
    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// Writes it. What is left to count stays, and lasts longer or shorter.
    pub fn set_divide(&mut self, value: u32, now_ns: u64) {
        let left = u64::from(self.current_count(now_ns));
        self.divide = value & 0xb;
        if self.mode != TimerMode::TscDeadline && self.expires_ns.is_some() {
            self.expires_ns = Some(now_ns.saturating_add(left * self.divisor()));
        }
    }

    /// Follows the LVT entry. A change to or from TSC-deadline disarms.
    pub fn set_mode(&mut self, mode: TimerMode) {
        if (mode == TimerMode::TscDeadline) != (self.mode == TimerMode::TscDeadline) {
            self.expires_ns = None;
            self.deadline_tsc = 0;
            self.initial_count = 0;
        }
        self.mode = mode;
    }

    /// Initial count register.
    pub fn initial_count(&self) -> u32 {
        self.initial_count
    }

    /// Writes it: starts the counter, or stops it with zero. Ignored in TSC-deadline mode.
    pub fn set_initial_count(&mut self, count: u32, now_ns: u64) {
        if self.mode == TimerMode::TscDeadline {
            return;
        }
        self.initial_count = count;
        self.expires_ns = (count != 0).then(|| now_ns.saturating_add(self.period_ns()));
    }

    /// Current count register.
    pub fn current_count(&self, now_ns: u64) -> u32 {
        match (self.mode, self.expires_ns) {
            (TimerMode::TscDeadline, _) | (_, None) => 0,
            (mode, Some(expires)) => {
                let mut left = expires.saturating_sub(now_ns);
                if left == 0 && mode == TimerMode::Periodic {
                    // Late: nobody has called expire yet, but the counter runs on.
                    let period = self.period_ns().max(1);
                    left = period - now_ns.saturating_sub(expires) % period;
                }
                u32::try_from(left.div_ceil(self.divisor())).unwrap_or(u32::MAX)
            }
        }
    }

    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self) -> u64 {
        self.deadline_tsc
    }

    /// Writes it; zero disarms. Ignored in other modes. `tsc_offset` is guest TSC minus guest time.
    pub fn set_tsc_deadline(&mut self, tsc: u64, tsc_offset: i64) {
        if self.mode != TimerMode::TscDeadline {
            return;
        }
        self.deadline_tsc = tsc;
        // A TSC before power-on is in the past.
        let at = i128::from(tsc) - i128::from(tsc_offset);
        self.expires_ns = (tsc != 0).then(|| u64::try_from(at.max(0)).unwrap_or(u64::MAX));
    }

    /// Follows a change of the guest's TSC.
    pub fn set_tsc_offset(&mut self, tsc_offset: i64) {
        if self.mode == TimerMode::TscDeadline && self.deadline_tsc != 0 {
            self.set_tsc_deadline(self.deadline_tsc, tsc_offset);
        }
    }

    /// Whether the timer has fired by `now_ns`. Ticks that were missed are one tick.
    pub fn expire(&mut self, now_ns: u64) -> bool {
        let Some(expires) = self.expires_ns.filter(|expires| *expires <= now_ns) else { return false };
        self.expires_ns = match self.mode {
            TimerMode::Periodic => {
                let period = self.period_ns().max(1);
                let missed = (now_ns - expires) / period;
                let next = expires.saturating_add(period.saturating_mul(missed + 1));
                Some(if period < PERIOD_NS_MIN { now_ns.saturating_add(PERIOD_NS_MIN) } else { next })
            }
            TimerMode::OneShot | TimerMode::TscDeadline => None,
        };
        self.deadline_tsc = 0;
        true
    }
}
