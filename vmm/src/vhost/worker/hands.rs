//! What the recovery machine decides is done here, and what becomes of it is told to it.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::beside::Greeted;
use super::next::{Make, Outcome};
use super::{Event, Failure, Preparation, Session, Shown, Worker};
use crate::backend::Ending;
use crate::vhost::device::{ConnectError, DeviceState, Recovery, Spare, tell_jail};
use crate::vhost::error::ConversationError;
use crate::vhost::recovery::{Action, End, SpareState, State, TakeBack, Tale};
use crate::vhost::source::Start;
use crate::vhost::upgrade::UpgradeError;
use atoll_devices::virtio::device_class;

/// How long a killed process may take to be reaped before it is waited for beside everything else.
const REAP: Duration = Duration::from_secs(1);
/// Lines of a backend's output that are kept for an operator.
const LAST_LINES: usize = 8;
/// I/O of a process that has ended was seen to land this long after its end, and never later (when it cannot be seen).
const AFTER_THE_END: Duration = Duration::from_millis(250);

/// Looks for the proof that nothing of the dead is under way.
pub(super) struct FenceWatch {
    since: Instant,
    look_at: Instant,
    /// Something was seen to be under way for so long.
    busy: Duration,
    /// Its process was seen to end.
    ended: bool,
}

impl FenceWatch {
    const SHORTEST: Duration = Duration::from_micros(200);
    const LONGEST: Duration = Duration::from_millis(20);

    fn new(ended: bool) -> Self {
        let now = Instant::now();
        Self { since: now, look_at: now, busy: Duration::ZERO, ended }
    }
    /// What was under way a moment ago may take as long again; a guest waits for nothing but this, so looks are dense.
    fn look_again(&mut self, now: Instant) {
        self.busy = now - self.since;
        self.look_at = now + (self.busy / 8).clamp(Self::SHORTEST, Self::LONGEST);
    }
    /// How long until the next look.
    pub(super) fn nap(&self) -> Duration {
        self.look_at.saturating_duration_since(Instant::now())
    }
}

impl Worker {
    /// Tells the machine what happened, and does what follows from it.
    pub(super) fn feed(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let now = self.now();
            for action in self.past.machine.on(event, now) {
                self.carry_out(action, &mut events);
            }
        }
        self.publish();
        self.answer_upgrade();
    }

    /// Shows what the device is at.
    pub(super) fn publish(&self) {
        let machine = &self.past.machine;
        let state = match machine.state() {
            State::Idle => DeviceState::Idle,
            State::Running => DeviceState::Running,
            State::Recovering { why } => DeviceState::Recovering { why },
            State::Waiting { why } => DeviceState::Waiting { why },
            State::Quarantined { why } => DeviceState::Quarantined { why },
        };
        let (generation, lost, recovery) = (machine.generation(), machine.lost(), machine.recovery());
        let failed_starts = machine.failed_starts();
        let on_trial =
            machine.is_on_trial().then(|| "on probation: if it dies, the program before it comes back".into());
        let upgrade = on_trial.or_else(|| self.past.rolled_back.clone());
        let link = (self.past.shown.device_type == device_class::NET).then_some(self.past.link);
        let session = self.past.session.as_ref();
        let spare = match machine.spare() {
            SpareState::Off => Spare::Off,
            SpareState::Coming => Spare::Coming,
            SpareState::Ready(generation) => Spare::Ready { generation },
        };
        let exe = self.parts.makers.build.as_ref().ok().map(|build| build.exe());
        let (pid, jail) = (session.and_then(|session| session.pid()), session.map(|session| session.jail()));
        self.shared.update(|status| {
            (status.state, status.generation, status.lost, status.pid) = (state, generation, lost, pid);
            (status.spare, status.exe, status.failed_starts) = (spare, exe, failed_starts);
            (status.upgrade, status.link) = (upgrade, link);
            status.jail = jail.unwrap_or_default();
            status.recovery = recovery.unwrap_or(status.recovery);
        });
    }

    fn carry_out(&mut self, action: Action, events: &mut VecDeque<Event>) {
        match action {
            Action::Spawn { generation } => self.spawn(generation, events),
            Action::SpawnBeside { generation, build } => self.spawn_beside(generation, build, events),
            Action::Promote { generation } => self.promote(generation, events),
            Action::DropBeside { generation } => self.drop_beside(generation),
            Action::Transfer { from, to } => self.transfer(from, to, events),
            Action::Revert => self.revert(),
            Action::Kill { generation } => self.kill(generation, events),
            Action::WatchFence => {
                // It never had any of the rings.
                if self.fence.is_none() {
                    events.push_back(Event::FencePassed);
                }
            }
            Action::Settled => {
                self.fence = None;
                self.shared.gate.settled();
            }
            Action::HandOver { generation, continued } => self.hand_over(generation, continued, events),
            Action::Kick { call } => self.kick(call),
            Action::ShowConfig => {
                if let Some(config) = self.new_config.take() {
                    // A paused device interrupts nobody.
                    if self.shared.gate.is_closed() { self.config_is_stale = true } else { self.adopt_config(&config) }
                }
            }
            Action::TakeBack { generation, why } => self.take_back(generation, why, events),
            Action::Employ => {
                if !self.shared.gate.take_out() {
                    return events.push_back(Event::Withheld);
                }
                events.push_back(match self.employ_stand_in() {
                    Ok(()) => Event::Employed,
                    Err(why) => {
                        tracing::warn!(device = self.shared.name, why, "no stand-in");
                        self.shared.gate.bring_back();
                        Event::NotEmployed
                    }
                });
            }
            Action::Dismiss => {
                self.dismiss_stand_in();
                self.shared.gate.bring_back();
            }
            Action::Settle => events.push_back(Event::Settled(self.settle())),
            Action::ClearRecord => {
                if let Some(region) = &self.past.inflight
                    && let Err(error) = region.clear()
                {
                    tracing::error!(device = self.shared.name, %error, "the record of requests in flight was not cleared");
                }
            }
            Action::CompleteActivation => {
                if let Some(completion) = self.activation.take() {
                    completion.complete(0);
                }
            }
            Action::CompleteResets => {
                for completion in self.resets.drain(..) {
                    completion.complete(0);
                }
            }
            Action::NeedsReset => self.transport.needs_reset(),
            Action::AskUnplug => self.transport.ask_unplug(),
            Action::Tell(tale) => self.relate(tale),
        }
    }

    fn spawn(&mut self, generation: u64, events: &mut VecDeque<Event>) {
        let make = Make { generation, start: Start::Alone, preface: None };
        match Preparation::begin(&self.parts.makers, make, &self.shared) {
            Ok(next) => self.nexts.push(next),
            Err(error) => {
                let failure = Failure::Passing(ConnectError::Resource(error).to_string());
                events.push_back(Event::NotStarted { generation, failure });
            }
        }
    }

    /// Whether one that is being made is ready, or will not be.
    pub(super) fn look_at_the_next(&mut self) {
        let mut done = Vec::new();
        self.nexts.retain_mut(|next| {
            let outcome = next.outcome();
            let over = outcome.is_some();
            done.extend(outcome.map(|outcome| (next.generation(), next.start().clone(), outcome)));
            !over
        });
        for (generation, start, outcome) in done {
            let event = match self.examine(generation, start, outcome) {
                Ok(recovery) => Event::Greeted { generation, recovery },
                Err(failure) => Event::NotStarted { generation, failure },
            };
            self.feed(event);
            if !self.past.machine.wants(generation) {
                self.drop_beside(generation);
            }
        }
    }

    /// Whether one that was greeted will do; then it is kept.
    fn examine(&mut self, generation: u64, start: Start, outcome: Outcome) -> Result<Recovery, Failure> {
        let device = self.shared.name.clone();
        let (mut session, offer) = outcome.map_err(|error| {
            // Told by whoever counts them, so that a program that never starts does not fill the log.
            tracing::debug!(device, generation, %error, "no backend yet");
            if start == Start::Alone {
                self.note_end(error.ended(), error.last_lines().to_vec());
            }
            failure(error.is_hopeless(), error.to_string())
        })?;
        session.conversation.obey(&self.shared.ending);
        let shown = Shown {
            offer: &self.past.shown,
            protocol: self.past.protocol,
            config: &self.config,
            capacity: self.past.capacity,
        };
        let recovery = session.recovery();
        let jail = session.jail();
        let beside = start != Start::Alone;
        let fits = shown.compare(session.protocol(), &offer);
        // One beside gets what the driver has written when it is promoted.
        let fits = fits.and_then(|()| if beside { Ok(()) } else { self.replay_config(&mut session) });
        if let Err(error) = fits {
            let end = session.give_up(if beside { Instant::now() } else { Instant::now() + REAP });
            if !beside {
                self.note_end(Some(error.to_string()), Vec::new());
            }
            tracing::warn!(device, generation, %error, end, "a backend that will not do");
            return Err(failure(!error.is_gone(), error.to_string()));
        }
        tell_jail(&self.parts.story, &device, generation, &jail);
        self.past.greeted.push(Greeted::new(generation, session, offer.config, start));
        Ok(recovery)
    }

    fn kill(&mut self, generation: u64, events: &mut VecDeque<Event>) {
        let Some(mut session) = self.past.session.take() else { return };
        // Its end is ours unless it had begun before.
        let killed = session.process.is_some() && session.over().is_none();
        let words = session.give_up(Instant::now() + REAP);
        let words = match (words, self.past.machine.state()) {
            (Some(words), State::Recovering { why }) if killed => Some(format!("killed by the VMM: {why} ({words})")),
            (words, _) => words,
        };
        self.shared.gate.lost();
        if session.is_gone() {
            return self.bury(generation, &session, words, events);
        }
        tracing::error!(device = self.shared.name, generation, "a killed backend does not end: is its storage stuck?");
        self.past.dying = Some(session);
    }

    /// A backend is gone: what it left is looked at.
    fn bury(&mut self, generation: u64, session: &Session, words: Option<String>, events: &mut VecDeque<Event>) {
        let progressed = self.has_progressed();
        let idle = !self.has_requests();
        let mut unfinished = false;
        let replaced = self.past.machine.is_replaced(generation);
        if replaced {
            // It has nothing under way, but what its successor waits for falls with the last that it had open.
            self.fence = Some(FenceWatch::new(true));
        }
        if session.has_rings {
            if let Some(driver) = &mut self.driver {
                driver.take_stock(self.parts.memory.mapped());
                unfinished = driver.unfinished.is_some();
            }
            self.lost_rings();
            self.fence = Some(FenceWatch::new(session.process.is_some() || session.peer_is_gone()));
        }
        let (mut ending, mut lines) = (Ending::Crash { idle }, Vec::new());
        if let Some(process) = &session.process {
            if let Ending::Config(why) = process.ending() {
                ending = Ending::Config(why);
            }
            lines = process.last_lines();
        }
        if replaced {
            tracing::info!(device = self.shared.name, generation, "the old build has ended");
            return events.push_back(Event::Ended { generation, end: End { ending, progressed, unfinished } });
        }
        let State::Recovering { why } = self.past.machine.state() else {
            return events.push_back(Event::Ended { generation, end: End { ending, progressed, unfinished } });
        };
        tracing::warn!(device = self.shared.name, generation, why, end = words, "backend lost");
        let reason = words.unwrap_or(why);
        self.note_end(Some(reason), lines);
        events.push_back(Event::Ended { generation, end: End { ending, progressed, unfinished } });
    }

    /// How the last one ended, and what it wrote last; nothing where there was no process.
    fn note_end(&self, end: Option<String>, mut lines: Vec<String>) {
        let Some(end) = end else { return };
        lines.drain(..lines.len().saturating_sub(LAST_LINES));
        self.shared.update(|status| (status.last_exit, status.last_lines) = (Some(end), lines));
    }

    /// Whether one that was killed has ended at last, and whether its last writes are done.
    pub(super) fn look_at_the_dead(&mut self) {
        if self.past.dying.as_ref().is_some_and(|session| session.is_gone())
            && let Some(mut session) = self.past.dying.take()
        {
            let generation = self.past.machine.generation();
            let words = session.give_up(Instant::now() + REAP);
            let mut events = VecDeque::new();
            self.bury(generation, &session, words, &mut events);
            events.into_iter().for_each(|event| self.feed(event));
        }
        let Some(watch) = &mut self.fence else { return };
        let now = Instant::now();
        if watch.look_at > now {
            return;
        }
        let quiet = match self.parts.fence.is_quiet() {
            Some(quiet) => quiet,
            None => watch.ended && watch.since.elapsed() >= AFTER_THE_END,
        };
        if !quiet {
            return watch.look_again(now);
        }
        let waited = watch.busy;
        self.fence = None;
        self.shared.update(|status| status.fence_wait = waited);
        self.feed(Event::FencePassed);
    }

    /// Whether the queues move.
    pub(super) fn look_at_the_rings(&mut self) {
        if self.past.machine.look_at().is_none_or(|at| at > self.now()) {
            return;
        }
        let samples = self.sample();
        let process = self.past.session.as_mut().and_then(|session| session.process.as_mut());
        let waiting = samples.iter().any(|sample| sample.waiting);
        let spared = waiting && process.is_some_and(|process| is_traced(process.id()));
        self.feed(Event::Sampled { samples, spared });
        let process = self.past.session.as_mut().and_then(|session| session.process.as_mut());
        let said = process.and_then(|process| process.take_stall());
        if let (Some(what), Some(generation)) = (said, self.past.machine.alive()) {
            // Its own word only: whether it is to be replaced is for the rings to say.
            self.feed(Event::Stalled { generation, what, spared: true });
        }
    }

    fn hand_over(&mut self, generation: u64, continued: bool, events: &mut VecDeque<Event>) {
        if !self.shared.gate.take_out() {
            return events.push_back(Event::Withheld);
        }
        events.push_back(match self.start_rings(continued) {
            Ok(()) => Event::HandedOver { generation },
            Err(error) => Event::HandOverFailed { generation, failure: failure(!error.is_gone(), error.to_string()) },
        });
    }

    fn take_back(&mut self, generation: u64, why: TakeBack, events: &mut VecDeque<Event>) {
        match self.stop_rings(self.drain) {
            Ok(()) => {
                let stays = self.shared.gate.bring_back();
                events.push_back(Event::TakenBack { generation });
                if why == TakeBack::Pause && !stays {
                    tracing::warn!(device = self.shared.name, "the backend gave the rings back too late for the pause");
                    events.push_back(Event::Resume);
                }
            }
            // It may go on writing: the only way to be rid of it is to end it.
            Err(error) => events.push_back(Event::Lost { generation, why: error.to_string() }),
        }
    }

    /// Tells the machine's story.
    fn tell(&self, event: &str, generation: Option<u64>, reason: Option<String>) {
        let generation = generation.unwrap_or_else(|| self.past.machine.generation());
        let known = [("id", self.shared.name.clone()), ("generation", generation.to_string())];
        self.parts.story.tell("device", event, known.into_iter().chain(reason.map(|reason| ("reason", reason))));
    }

    fn relate(&mut self, tale: Tale) {
        let device = self.shared.name.clone();
        match tale {
            Tale::Crashed { generation } => {
                let reason = self.shared.last_exit();
                self.tell("crashed", Some(generation), reason);
            }
            Tale::Restarted { generation } => {
                tracing::warn!(device, generation, "backend is back");
                self.tell("restarted", Some(generation), None);
            }
            Tale::StartFailed { generation, times, why } => {
                tracing::warn!(device, generation, times, why, "no backend yet");
                self.tell("start-failed", Some(generation), Some(format!("{why} (failed starts in a row: {times})")));
            }
            Tale::Waiting { why } => {
                tracing::warn!(device, why, "no backend is to be had; it is waited for");
                self.tell("waiting", None, Some(why));
            }
            Tale::Quarantined { why } => {
                tracing::error!(
                    device,
                    why,
                    "device quarantined until its driver resets it, or the operator revives it"
                );
                self.tell("quarantined", None, Some(why));
            }
            Tale::Stalled { what } => {
                tracing::warn!(device, what, "the backend stands");
                self.tell("stalled", None, Some(what));
            }
            Tale::RolledBack { why } => {
                tracing::warn!(device, why, "the other build died too soon; the one before it is started again");
                self.past.rolled_back = Some(format!("rolled back: the new build did not last ({why})"));
                self.tell("rolled-back", None, Some(why));
            }
            Tale::UpgradeStarted { generation } => {
                self.past.rolled_back = None;
                tracing::info!(device, generation, "another build is tried");
                self.tell("upgrade-started", Some(generation), None);
            }
            Tale::Upgraded { generation } => {
                tracing::info!(device, generation, "another build serves");
                self.tell("upgraded", Some(generation), None);
                self.conclude_upgrade(Ok(generation));
            }
            Tale::UpgradeRefused { why } => {
                tracing::warn!(device, why, "the other build will not do");
                self.tell("upgrade-refused", None, Some(why.clone()));
                self.conclude_upgrade(Err(UpgradeError::Refused(why)));
            }
            Tale::SpareReady { generation } => {
                tracing::info!(device, generation, "a spare process waits");
                self.tell("spare-ready", Some(generation), None);
            }
            Tale::SpareLost { generation, why } => {
                tracing::warn!(device, generation, why, "the spare process is gone");
                self.tell("spare-lost", Some(generation), Some(why));
            }
            Tale::FenceGivenUp => {
                if !self.shared.ending.load(Ordering::Relaxed) {
                    tracing::warn!(
                        device,
                        "nothing shows that the dead backend's last writes are done; going on without that proof"
                    );
                }
            }
        }
    }
}

/// Whether a debugger has the process.
pub(crate) fn is_traced(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    tracer.is_some_and(|tracer| tracer.trim() != "0")
}

fn failure(hopeless: bool, why: String) -> Failure {
    if hopeless { Failure::Hopeless(why) } else { Failure::Passing(why) }
}

impl From<&ConversationError> for Failure {
    fn from(error: &ConversationError) -> Self {
        failure(!error.is_gone(), error.to_string())
    }
}
