//! Judges a stream from what came of it: which numbers, and when.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Gaps that are told one by one; the others are counted.
pub const GAPS_MAX: usize = 16;

/// Numbers that never came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The first of them.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// When the last number before it had come, in milliseconds since the beginning.
    pub from_ms: u64,
    /// When the first number after it came.
    pub to_ms: u64,
}

/// What a network has to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promise {
    /// Frames that may be lost.
    pub lost_max: u64,
    /// Frames that may come twice.
    pub repeated_max: u64,
    /// Frames that may come after a later one.
    pub reordered_max: u64,
    /// How long nothing may come while frames are under way, in milliseconds.
    pub silence_ms_max: u64,
}

impl Promise {
    /// All, once, in order, within ten seconds.
    pub const ALL: Self = Self { lost_max: 0, repeated_max: 0, reordered_max: 0, silence_ms_max: 10_000 };

    /// The same for a card whose process died `deaths` times under windows of `window` frames: what was under way may be
    /// lost, or sent again by a successor.
    pub fn with_deaths(deaths: u64, window: u64) -> Self {
        let most = deaths * window;
        Self { lost_max: most, repeated_max: most, reordered_max: most, ..Self::ALL }
    }
}

/// A stream as it was heard.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// Different frames that came.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that never came.
    pub lost: u64,
    /// Frames that came again.
    pub repeated: u64,
    /// Frames that came after a later one.
    pub reordered: u64,
    /// Frames that were not as they were sent.
    pub corrupted: u64,
    /// Frames of other runs, or of the listener itself.
    pub foreign: u64,
    /// The longest time between two frames.
    pub silence_ms_max: u64,
    /// The end of the stream was heard.
    pub ended: bool,
    /// Where frames are missing.
    pub gaps: Vec<Gap>,
    #[serde(skip)]
    next: u64,
    #[serde(skip)]
    last_ms: u64,
    /// Missing numbers: first, with what is known of them.
    #[serde(skip)]
    missing: BTreeMap<u64, Gap>,
}

impl Heard {
    /// The other end is there: time counts from now on.
    pub fn begin(&mut self, now_ms: u64) {
        self.last_ms = now_ms;
    }

    /// A whole frame came.
    pub fn came(&mut self, number: u64, bytes: u64, last: bool, now_ms: u64) {
        self.silence_ms_max = self.silence_ms_max.max(now_ms.saturating_sub(self.last_ms));
        self.ended |= last;
        let from_ms = std::mem::replace(&mut self.last_ms, now_ms);
        if number >= self.next {
            if number > self.next {
                let gap = Gap { first: self.next, count: number - self.next, from_ms, to_ms: now_ms };
                self.missing.insert(gap.first, gap);
            }
            self.next = number.saturating_add(1);
        } else if self.fill(number) {
            self.reordered += 1;
        } else {
            self.repeated += 1;
            return;
        }
        self.frames += 1;
        self.bytes += bytes;
    }

    /// Takes a number off the missing ones; false when it is none.
    fn fill(&mut self, number: u64) -> bool {
        let Some((&first, &gap)) = self.missing.range(..=number).next_back() else { return false };
        if number >= first + gap.count {
            return false;
        }
        self.missing.remove(&first);
        if number > first {
            self.missing.insert(first, Gap { count: number - first, ..gap });
        }
        let after = first + gap.count - number - 1;
        if after > 0 {
            self.missing.insert(number + 1, Gap { first: number + 1, count: after, ..gap });
        }
        true
    }

    /// Numbers up to the highest that came.
    pub fn up_to(&self) -> u64 {
        self.next
    }

    /// Nothing more will come: what is missing is lost. True when the promise is kept.
    pub fn close(&mut self, promise: &Promise) -> bool {
        self.lost = self.missing.values().map(|gap| gap.count).sum();
        self.gaps = self.missing.values().take(GAPS_MAX).copied().collect();
        self.corrupted == 0
            && self.ended
            && self.lost <= promise.lost_max
            && self.repeated <= promise.repeated_max
            && self.reordered <= promise.reordered_max
            && self.silence_ms_max <= promise.silence_ms_max
    }
}
