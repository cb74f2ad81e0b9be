//! What an exit leads to: a state machine over exits, progress and the clock.
//!
//! The first crash restarts at once; further ones without progress back off, up to a cap. Progress forgives everything.
//! More than `intensity` crashes within `period` and without progress lead to quarantine, from which a reset of the guest
//! or an operator leads back. A crash while no work waits costs the guest nothing: it is never counted towards
//! quarantine, and backs off only as far as to keep a broken program from eating a processor. A crash before the process
//! was ready is judged apart: it is counted on its own, and a first incarnation that never gets ready is the operator's
//! business, not that of a restart.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use atoll_protocol::Generation;
use atoll_protocol::sidecar::GoodbyeReason;

use super::event::{BackendExit, ExitCause};
use crate::actor::Moment;

/// How patient a policy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyConfig {
    /// Delay before the second restart in a row; the first has none. It doubles from there.
    pub backoff_first: Duration,
    /// The longest delay.
    pub backoff_max: Duration,
    /// Crashes without progress, within the period, that are forgiven.
    pub intensity: u32,
    /// See `intensity`.
    pub period: Duration,
    /// The longest delay after crashes of a device that has nothing to do.
    pub idle_backoff_max: Duration,
    /// The longest delay after an incarnation that did not get ready.
    pub start_backoff_max: Duration,
    /// After so many starts in a row of which none got ready it is given up; `None`: never (somebody else's backend comes
    /// when it comes).
    pub start_attempts: Option<u32>,
}

/// Starts in a row that fail before a device is given up, unless its user says otherwise: with the delays between them an
/// outage of not quite half a minute.
pub const START_ATTEMPTS: u32 = 20;

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            backoff_first: Duration::from_millis(10),
            backoff_max: Duration::from_secs(10),
            intensity: 12,
            period: Duration::from_mins(2),
            idle_backoff_max: Duration::from_millis(100),
            start_backoff_max: Duration::from_secs(2),
            start_attempts: Some(START_ATTEMPTS),
        }
    }
}

/// How an incarnation that was ready ended, as far as a restart cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was told to.
    Asked,
    /// It said that its configuration cannot work.
    Config(String),
    /// Anything else.
    Crash {
        /// No work waited for it.
        idle: bool,
    },
}

impl From<&BackendExit> for Ending {
    fn from(exit: &BackendExit) -> Self {
        match &exit.cause {
            ExitCause::Asked | ExitCause::Goodbye(GoodbyeReason::Asked) => Self::Asked,
            ExitCause::Goodbye(GoodbyeReason::Config(reason)) => Self::Config(reason.clone()),
            _ => Self::Crash { idle: false },
        }
    }
}

/// Why a device is given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QuarantineReason {
    /// It crashed this often without progress.
    CrashLoop(u32),
    /// Its successor did not get ready this often in a row.
    StartFailures(u32),
    /// It said that its configuration cannot work.
    Config(String),
}

impl fmt::Display for QuarantineReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CrashLoop(count) => write!(f, "it crashed {count} times without progress"),
            Self::StartFailures(count) => write!(f, "its successor did not get ready {count} times in a row"),
            Self::Config(why) => write!(f, "its configuration cannot work: {why}"),
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing: it is as it should be, or the news is of an earlier incarnation.
    Nothing,
    /// Start this incarnation now.
    Start(Generation),
    /// Call [`RestartPolicy::due`] at that moment.
    Wait(Moment),
    /// A stand-in takes the device.
    Quarantine(QuarantineReason),
    /// The first incarnation never got ready: the device cannot be had.
    GiveUp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Running,
    Recovering {
        at: Moment,
    },
    Quarantined,
    /// It ended because it was told to; nobody is waiting for it.
    Ended,
}

/// The state of one device's process, as a restart sees it.
#[derive(Clone, Debug)]
pub struct RestartPolicy {
    config: PolicyConfig,
    generation: Generation,
    /// The last number that any incarnation got.
    issued: Generation,
    phase: Phase,
    /// Crashes without progress, oldest first.
    crashes: VecDeque<Moment>,
    /// Crashes of the same kind without work, since when the last one was.
    idle_crashes: VecDeque<Moment>,
    start_failures: u32,
    ever_ready: bool,
}

impl RestartPolicy {
    /// A device whose first incarnation is being started; after a reset of the machine that is not generation 1.
    #[must_use]
    pub fn new(config: PolicyConfig, first: Generation) -> Self {
        Self {
            config,
            generation: first,
            issued: first,
            phase: Phase::Starting,
            crashes: VecDeque::new(),
            idle_crashes: VecDeque::new(),
            start_failures: 0,
            ever_ready: false,
        }
    }

    /// The present incarnation, or the one that is being started.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Whether the stand-in has it.
    #[must_use]
    pub fn is_quarantined(&self) -> bool {
        self.phase == Phase::Quarantined
    }

    /// Whether a process serves it.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// An incarnation is ready.
    pub fn ready(&mut self, generation: Generation) {
        if generation == self.generation && self.phase == Phase::Starting {
            self.phase = Phase::Running;
            self.ever_ready = true;
            self.start_failures = 0;
        }
    }

    /// An incarnation completed a request.
    pub fn progress(&mut self, generation: Generation) {
        if generation == self.generation && self.phase == Phase::Running {
            self.crashes.clear();
            self.idle_crashes.clear();
        }
    }

    /// An incarnation is gone.
    pub fn exited(&mut self, generation: Generation, ending: &Ending, now: Moment) -> Decision {
        let present = matches!(self.phase, Phase::Starting | Phase::Running);
        if generation != self.generation || !present {
            return Decision::Nothing;
        }
        match ending {
            Ending::Asked => {
                self.phase = Phase::Ended;
                Decision::Nothing
            }
            Ending::Config(reason) if self.ever_ready => self.quarantine(QuarantineReason::Config(reason.clone())),
            _ if self.phase == Phase::Starting => self.failed_to_start(now),
            Ending::Crash { idle: true } => self.crashed_idle(now),
            Ending::Crash { idle: false } | Ending::Config(_) => self.crashed(now),
        }
    }

    /// An incarnation could not even be started.
    pub fn not_started(&mut self, generation: Generation, now: Moment) -> Decision {
        if generation != self.generation || self.phase != Phase::Starting {
            return Decision::Nothing;
        }
        self.failed_to_start(now)
    }

    fn failed_to_start(&mut self, now: Moment) -> Decision {
        if !self.ever_ready {
            self.phase = Phase::Ended;
            return Decision::GiveUp;
        }
        self.start_failures = self.start_failures.saturating_add(1);
        if self.config.start_attempts.is_some_and(|most| self.start_failures >= most) {
            return self.quarantine(QuarantineReason::StartFailures(self.start_failures));
        }
        // Never at once: what failed a moment ago fails again.
        self.recover(now, self.backoff(self.start_failures).min(self.config.start_backoff_max))
    }

    fn crashed(&mut self, now: Moment) -> Decision {
        let crashes = note(&mut self.crashes, now, self.config.period);
        if crashes > self.config.intensity {
            return self.quarantine(QuarantineReason::CrashLoop(crashes));
        }
        let delay = if crashes <= 1 { Duration::ZERO } else { self.backoff(crashes - 1) };
        self.recover(now, delay)
    }

    fn crashed_idle(&mut self, now: Moment) -> Decision {
        let crashes = note(&mut self.idle_crashes, now, self.config.period);
        let delay = if crashes <= 1 { Duration::ZERO } else { self.backoff(crashes - 1) };
        self.recover(now, delay.min(self.config.idle_backoff_max))
    }

    /// The delay before the `nth` restart that has one.
    fn backoff(&self, nth: u32) -> Duration {
        let doublings = nth.saturating_sub(1).min(31);
        self.config.backoff_first.saturating_mul(1 << doublings).min(self.config.backoff_max)
    }

    fn recover(&mut self, now: Moment, delay: Duration) -> Decision {
        self.generation = self.issue();
        let at = now.after(delay);
        self.phase = Phase::Recovering { at };
        self.due(now)
    }

    fn quarantine(&mut self, reason: QuarantineReason) -> Decision {
        self.phase = Phase::Quarantined;
        Decision::Quarantine(reason)
    }

    /// A moment that [`Decision::Wait`] named has come, or may have.
    pub fn due(&mut self, now: Moment) -> Decision {
        match self.phase {
            Phase::Recovering { at } if at <= now => {
                self.phase = Phase::Starting;
                Decision::Start(self.generation)
            }
            Phase::Recovering { at } => Decision::Wait(at),
            _ => Decision::Nothing,
        }
    }

    /// An operator asked for it: a device that was given up, or waits, starts afresh.
    pub fn revive(&mut self) -> Decision {
        let decision = self.retry();
        if decision != Decision::Nothing {
            self.start_failures = 0;
        }
        decision
    }

    /// The guest was reset: a device that was given up, or waits, is tried at once. What could not be started before is not
    /// better for that: when it fails again, it fails as one time more, and a guest that boots does not wait for all of the
    /// attempts again.
    pub fn retry(&mut self) -> Decision {
        match self.phase {
            Phase::Quarantined => self.generation = self.issue(),
            Phase::Recovering { .. } => {}
            Phase::Starting | Phase::Running | Phase::Ended => return Decision::Nothing,
        }
        self.crashes.clear();
        self.idle_crashes.clear();
        self.phase = Phase::Starting;
        Decision::Start(self.generation)
    }

    /// Starts in a row that failed.
    #[must_use]
    pub fn start_failures(&self) -> u32 {
        self.start_failures
    }

    /// Whoever judges this incarnation found that no restart can help.
    pub fn give_up(&mut self) {
        self.phase = Phase::Quarantined;
    }

    /// A number for an incarnation that is made beside the present one; nobody else gets it.
    pub fn issue(&mut self) -> Generation {
        self.issued = self.issued.next();
        self.issued
    }

    /// One that was to be started is not: its number goes to the next process. Numbers are names of processes, in the order
    /// of their start, and not of those alone that came to serve.
    pub fn withdraw(&mut self, generation: Generation) {
        if self.issued == generation {
            self.issued = Generation(generation.0.saturating_sub(1));
        }
    }

    /// An incarnation that was made beside takes the place of the present one, or of the one that was to be started.
    pub fn adopt(&mut self, generation: Generation) {
        (self.generation, self.phase, self.ever_ready, self.start_failures) = (generation, Phase::Running, true, 0);
    }

    /// An incarnation that is being made beside is waited for in place of the one that was to be started.
    pub fn expect(&mut self, generation: Generation) {
        (self.generation, self.phase) = (generation, Phase::Starting);
    }

    /// The present incarnation gave way to another build, which will not do: its own build comes back at once. That is
    /// nobody's crash.
    pub fn replace(&mut self) -> Decision {
        self.generation = self.issue();
        self.phase = Phase::Starting;
        Decision::Start(self.generation)
    }

    /// How long to wait before what failed `times` in a row is tried again.
    #[must_use]
    pub fn delay(&self, times: u32) -> Duration {
        self.backoff(times)
    }

    /// The same, but the device is to wait for a better one: the next attempt comes after the longest delay.
    pub fn hold(&mut self, now: Moment) -> Decision {
        self.recover(now, self.config.backoff_max)
    }
}

/// Crashes that are remembered at most.
const CRASHES_MAX: usize = 64;

/// Notes a crash and says how many there were within `period`.
fn note(crashes: &mut VecDeque<Moment>, now: Moment, period: Duration) -> u32 {
    crashes.push_back(now);
    while crashes.len() > CRASHES_MAX || crashes.front().is_some_and(|crash| now.since(*crash) >= period) {
        crashes.pop_front();
    }
    u32::try_from(crashes.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actor::{Clock, ManualClock};

    fn config() -> PolicyConfig {
        PolicyConfig {
            backoff_first: Duration::from_millis(100),
            backoff_max: Duration::from_millis(300),
            intensity: 5,
            period: Duration::from_secs(60),
            idle_backoff_max: Duration::from_millis(200),
            start_backoff_max: Duration::from_millis(300),
            start_attempts: Some(3),
        }
    }

    fn crash() -> Ending {
        Ending::Crash { idle: false }
    }

    struct Story {
        clock: ManualClock,
        policy: RestartPolicy,
    }

    impl Story {
        fn running() -> Self {
            let mut policy = RestartPolicy::new(config(), Generation::FIRST);
            policy.ready(Generation::FIRST);
            Self { clock: ManualClock::new(), policy }
        }

        /// Crashes the present incarnation; the delay after which its successor was started and became ready.
        fn crash(&mut self) -> Result<Duration, Decision> {
            self.end(&crash())
        }

        fn end(&mut self, ending: &Ending) -> Result<Duration, Decision> {
            let now = self.clock.now();
            let generation = self.policy.generation();
            let delay = match self.policy.exited(generation, ending, now) {
                Decision::Start(_) => Duration::ZERO,
                Decision::Wait(at) => {
                    self.clock.advance(at.since(now) - Duration::from_nanos(1));
                    assert_eq!(self.policy.due(self.clock.now()), Decision::Wait(at), "not a moment too early");
                    self.clock.advance(Duration::from_nanos(1));
                    assert_eq!(self.policy.due(self.clock.now()), Decision::Start(generation.next()));
                    at.since(now)
                }
                other => return Err(other),
            };
            assert_eq!(self.policy.generation(), generation.next());
            self.policy.ready(generation.next());
            Ok(delay)
        }
    }

    /// Crash after crash without a single completed request: at once, then slower and slower, then no more. A reset of
    /// the guest leads back.
    #[test]
    fn crash_loop_backs_off_and_ends_in_quarantine() {
        let mut story = Story::running();
        let delays: Vec<_> = (0..5).map(|_| story.crash().expect("restarted").as_millis()).collect();
        assert_eq!(delays, [0, 100, 200, 300, 300]);
        assert_eq!(story.crash(), Err(Decision::Quarantine(QuarantineReason::CrashLoop(6))));
        assert!(story.policy.is_quarantined());
        assert_eq!(story.policy.due(story.clock.now()), Decision::Nothing);
        assert_eq!(story.policy.revive(), Decision::Start(Generation(7)));
        story.policy.ready(Generation(7));
        assert_eq!(story.crash(), Ok(Duration::ZERO));
    }

    /// A backend that completes one request between two crashes is restarted at once, a thousand times: there is no
    /// limit over a lifetime.
    #[test]
    fn progress_forgives_everything() {
        let mut story = Story::running();
        for _ in 0..1000 {
            assert_eq!(story.crash(), Ok(Duration::ZERO));
            story.policy.progress(story.policy.generation());
        }
        assert_eq!(story.policy.generation(), Generation(1001));
    }

    /// Rare crashes of an idle device are no loop: those longer ago than the period do not count.
    #[test]
    fn intensity_is_within_a_period() {
        let mut story = Story::running();
        for _ in 0..100 {
            assert_eq!(story.crash(), Ok(Duration::ZERO));
            story.clock.advance(config().period);
        }
    }

    /// A device that nobody uses is killed ten thousand times: that is no reason to give it up, and its successor never
    /// waits for long. The first request that it cannot survive is judged like any other.
    #[test]
    fn idle_crashes_are_not_counted() {
        let mut story = Story::running();
        for _ in 0..10_000 {
            assert!(story.end(&Ending::Crash { idle: true }).expect("restarted") <= config().idle_backoff_max);
        }
        assert_eq!(story.crash(), Ok(Duration::ZERO));
    }

    /// A successor that dies before it is ready is never started at once, counts on its own, and does not use up what
    /// crashes may.
    #[test]
    fn start_failures_are_judged_apart() {
        let mut story = Story::running();
        story.crash().expect("restarted");
        let now = story.clock.now();
        assert!(matches!(story.policy.exited(Generation(2), &crash(), now), Decision::Wait(_)));
        story.clock.advance(Duration::from_millis(100));
        for (generation, delay) in [(3, 100), (4, 200)] {
            let now = story.clock.now();
            assert_eq!(story.policy.due(now), Decision::Start(Generation(generation)));
            let failed = story.policy.not_started(Generation(generation), now);
            assert_eq!(failed, Decision::Wait(now.after(Duration::from_millis(delay))), "generation {generation}");
            story.clock.advance(Duration::from_millis(delay));
        }
        let now = story.clock.now();
        assert_eq!(story.policy.due(now), Decision::Start(Generation(5)));
        let failed = story.policy.not_started(Generation(5), now);
        assert_eq!(failed, Decision::Quarantine(QuarantineReason::StartFailures(3)));
        // A reset of the guest is one attempt more, an operator's word all of them.
        assert_eq!(story.policy.retry(), Decision::Start(Generation(6)));
        let failed = story.policy.not_started(Generation(6), now);
        assert_eq!(failed, Decision::Quarantine(QuarantineReason::StartFailures(4)));
        assert_eq!(story.policy.revive(), Decision::Start(Generation(7)));
        assert!(matches!(story.policy.not_started(Generation(7), now), Decision::Wait(_)));
    }

    /// A program that cannot be started any more is in quarantine within half a minute, and not before an outage of some
    /// length.
    #[test]
    fn a_hopeless_program_is_given_up_soon() {
        let mut policy = RestartPolicy::new(PolicyConfig::default(), Generation::FIRST);
        policy.ready(Generation::FIRST);
        let start = Moment::default();
        assert_eq!(policy.exited(Generation::FIRST, &crash(), start), Decision::Start(Generation(2)));
        let (mut now, mut starts) = (start, 1);
        while let Decision::Wait(at) = policy.not_started(policy.generation(), now) {
            now = at;
            assert_eq!(policy.due(now), Decision::Start(policy.generation()));
            starts += 1;
        }
        assert!(policy.is_quarantined());
        let outage = now.since(start);
        assert!(starts == START_ATTEMPTS && (20..30).contains(&outage.as_secs()), "{starts} starts in {outage:?}");
    }

    /// What must not lead to a restart: an exit that was asked for, news of an earlier incarnation, a configuration that
    /// cannot work, and a device that could never be had.
    #[test]
    fn exits_that_are_no_crash() {
        let now = Moment::default();
        let mut story = Story::running();
        story.crash().expect("restarted");
        assert_eq!(story.policy.exited(Generation(1), &crash(), now), Decision::Nothing, "an old generation");
        let cannot = Ending::Config("no such file".into());
        let expected = Decision::Quarantine(QuarantineReason::Config("no such file".into()));
        assert_eq!(story.policy.exited(Generation(2), &cannot, now), expected);

        let mut asked = Story::running();
        assert_eq!(asked.policy.exited(Generation(1), &Ending::Asked, now), Decision::Nothing);
        assert_eq!(asked.policy.exited(Generation(1), &crash(), now), Decision::Nothing);

        let mut held = Story::running();
        assert_eq!(held.policy.hold(now), Decision::Wait(now.after(config().backoff_max)));

        let mut never = RestartPolicy::new(PolicyConfig::default(), Generation::FIRST);
        assert_eq!(never.exited(Generation(1), &crash(), now), Decision::GiveUp);
    }
}
