//! What the judge says, as one line of JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Findings that are told in full; the others are counted.
pub const FINDINGS_MAX: usize = 20;

/// A way to break a promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Violation {
    /// An acknowledged write is gone, and nobody has ever seen it.
    Lost,
    /// A value came back that had been replaced.
    Stale,
    /// A sector holds parts of two writes, though none was under way.
    Torn,
    /// A sector holds what was meant for another place.
    Misplaced,
    /// A sector holds what no operation can have left there.
    Corrupt,
    /// A read was completed and left parts of its buffer untouched.
    Unfilled,
    /// A request was completed that was not in flight, or without a status.
    CompletedTwice,
    /// A request was not completed within its deadline.
    NeverCompleted,
    /// A buffer changed after its request was completed, or beyond its end.
    LateWrite,
    /// A request failed.
    Failed,
    /// The rings disagree at the end.
    Rings,
    /// The guest's log complains.
    GuestLog,
    /// The history itself is damaged or has no end: nothing is proven.
    History,
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Reads that were completed.
    pub reads: u64,
    /// Writes that were completed.
    pub writes: u64,
    /// Flushes that were completed.
    pub flushes: u64,
    /// Discards that were completed.
    pub discards: u64,
    /// Zeroes that were completed.
    pub zeroes: u64,
    /// Sectors that were read and checked.
    pub sectors_read: u64,
    /// Sectors that were written.
    pub sectors_written: u64,
    /// Deaths of the peer.
    pub deaths: u64,
    /// Restarts of the guest.
    pub resets: u64,
    /// Losses of power.
    pub power_losses: u64,
    /// Sectors that were read while a write to them was under way, and held parts of it: no promise forbids it.
    pub torn_under_way: u64,
}

/// The judgement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Always "blk".
    pub verify: String,
    /// No promise was broken.
    pub ok: bool,
    /// Reproduces the load.
    pub seed: u64,
    /// What was done.
    #[serde(flatten)]
    pub counts: Counts,
    /// From the first record to the last.
    pub seconds: f64,
    /// The slowest operation.
    pub slowest_ms: f64,
    /// How often each promise was broken.
    pub violations: BTreeMap<Violation, u64>,
    /// The first of them in words.
    pub findings: Vec<String>,
}

impl Verdict {
    /// One line.
    pub fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// How often this promise was broken.
    pub fn count(&self, violation: Violation) -> u64 {
        self.violations.get(&violation).copied().unwrap_or_default()
    }

    /// Adds a finding.
    pub fn find(&mut self, violation: Violation, text: String) {
        self.ok = false;
        *self.violations.entry(violation).or_default() += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(text);
        }
    }
}
