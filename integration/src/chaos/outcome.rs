//! What a campaign came to, as one line of JSON, and the table of steps.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::census::Census;
use super::load::Findings;
use super::stall::Spread;

/// Kills that must find work in flight, in percent.
pub const IN_FLIGHT_PERCENT_MIN: u64 = 80;

/// What a campaign came to.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Always "process-death".
    pub chaos: &'static str,
    /// Every promise was kept.
    pub ok: bool,
    /// The class, and for a disk its image.
    pub device: String,
    /// Reproduces the load and what is aimed at when.
    pub seed: u64,
    /// SIGKILLs.
    pub kills: u64,
    /// Those that found work in flight.
    pub kills_in_flight: u64,
    /// Requests never completed.
    pub lost: u64,
    /// Old contents that came back, or new ones that went.
    pub stale: u64,
    /// Contents of two requests in one piece.
    pub torn: u64,
    /// Requests completed twice.
    pub duplicated: u64,
    /// Bad contents.
    pub corrupted: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Completions for which nobody was interrupted.
    pub uncalled: u64,
    /// Kills after which nothing went on.
    pub hung: u64,
    /// Descriptors, threads, processes and stretches of memory that were not there before.
    pub leaked: u64,
    /// Backends started beyond the first.
    pub restarts: u64,
    /// From a kill while running until all that was in flight was completed.
    pub stall_ms: Spread,
    /// The same for kills during negotiation, replay or reset.
    pub stall_start_ms: Spread,
    /// Requests that were completed.
    pub requests: u64,
    /// How long it took.
    pub seconds: f64,
    /// Frames that never came.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames_lost: Option<u64>,
    /// Frames that came again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames_repeated: Option<u64>,
    /// Images that `qemu-img check` has looked at; an error that it found is told in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images_checked: Option<u64>,
    /// What the process held before and after.
    pub census: [Census; 2],
    /// Kills at each step, and those of them that found work in flight.
    pub steps: BTreeMap<&'static str, [u64; 2]>,
    /// Rounds beyond those that were asked for, at steps that nobody had died at with work in flight.
    #[serde(skip_serializing_if = "is_zero")]
    pub aimed_again: u64,
    /// What went wrong, in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub words: Vec<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What is counted while a campaign runs.
#[derive(Debug, Default)]
pub struct Tally {
    /// SIGKILLs.
    pub kills: u64,
    /// Those that found work in flight.
    pub in_flight: u64,
    /// Kills after which nothing went on.
    pub hung: u64,
    /// Stalls of kills while running.
    pub stalls: Vec<Duration>,
    /// Stalls of kills during negotiation, replay and reset.
    pub start_stalls: Vec<Duration>,
    /// Kills at each step.
    pub steps: BTreeMap<&'static str, [u64; 2]>,
    /// Rounds beyond those that were asked for, at steps that had not been hit with work in flight.
    pub aimed_again: u64,
    /// What went wrong, in words.
    pub words: Vec<String>,
}

impl Tally {
    /// A kill.
    pub fn kill(&mut self, pending: u32, step: &'static str) {
        self.kills += 1;
        self.in_flight += u64::from(pending > 0);
        let [all, busy] = self.steps.entry(step).or_default();
        *all += 1;
        *busy += u64::from(pending > 0);
    }
}

/// What surrounds the counts.
pub struct Frame {
    /// The class.
    pub device: String,
    /// The seed.
    pub seed: u64,
    /// Backends lost, as the front end counts them.
    pub restarts: u64,
    /// Before and after.
    pub census: [Census; 2],
    /// How long it took.
    pub took: Duration,
    /// Images that `qemu-img check` has looked at.
    pub images_checked: Option<u64>,
}

impl Outcome {
    /// Puts everything together.
    pub fn new(frame: Frame, tally: Tally, findings: Findings) -> Self {
        let [before, after] = frame.census;
        let leaked = after.leaked_since(&before, tally.kills);
        let enough = tally.in_flight * 100 >= tally.kills * IN_FLIGHT_PERCENT_MIN;
        let ok = findings.broken() == 0 && tally.hung == 0 && leaked == 0 && enough && tally.words.is_empty();
        let words = [tally.words, findings.words].concat();
        Self {
            chaos: "process-death",
            ok,
            device: frame.device,
            seed: frame.seed,
            kills: tally.kills,
            kills_in_flight: tally.in_flight,
            lost: findings.lost,
            stale: findings.stale,
            torn: findings.torn,
            duplicated: findings.duplicated,
            corrupted: findings.corrupted,
            failed: findings.failed,
            uncalled: findings.uncalled,
            hung: tally.hung,
            leaked,
            restarts: frame.restarts,
            stall_ms: Spread::of(&tally.stalls),
            stall_start_ms: Spread::of(&tally.start_stalls),
            requests: findings.requests,
            seconds: (frame.took.as_secs_f64() * 100.0).round() / 100.0,
            frames_lost: findings.frames_lost,
            frames_repeated: findings.frames_repeated,
            images_checked: frame.images_checked,
            census: frame.census,
            steps: tally.steps,
            aimed_again: tally.aimed_again,
            words,
        }
    }

    /// The table of steps, for people.
    pub fn table(&self) -> String {
        let mut table = String::from("| killed at | kills | with work in flight |\n|---|---|---|\n");
        for (step, [all, busy]) in &self.steps {
            // Writing to a string cannot fail.
            let _ = writeln!(table, "| {step} | {all} | {busy} |");
        }
        table
    }
}
