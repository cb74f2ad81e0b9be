//! What the recovery machine decides is done here, and what becomes of it is told to it.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use atoll_protocol::vfio_user::{DmaMap, DmaUnmap, IrqAction, IrqSet, Request, irq, region};
use rustix::fd::BorrowedFd;
use vmm_sys_util::eventfd::EventFd;

use super::conversation::TalkError;
use super::next::{Outcome, Preparation, Session};
use super::worker::Worker;
use crate::backend::Ending;
use crate::vhost::recovery::{Action, End, Event, Failure, Sample, State, TakeBack, Tale};
use crate::vhost::{DeviceState, Recovery, tell_jail};

/// How long a killed process may take to be reaped before it is waited for beside everything else.
const REAP: Duration = Duration::from_secs(1);
/// Lines of a server's output that are kept for an operator.
const LAST_LINES: usize = 8;
/// I/O of a process that has ended was seen to land this long after its end, and never later (when it cannot be seen).
const AFTER_THE_END: Duration = Duration::from_millis(250);
/// Configuration space: command register, with memory and bus mastering on and the pin off.
const COMMAND: (u64, [u8; 2]) = (4, [0x06, 0x04]);

/// What it means that somebody else's server is back.
pub(super) const CAME_ANEW: &str = "no recovery: what the server knew went with it, so the device came back as after a reset; \
                         requests that were in flight are lost, and the guest's driver finds out by its own timeout";

/// Looks for the proof that nothing of the dead is under way.
pub(super) struct FenceWatch {
    since: Instant,
    look_at: Instant,
    busy: Duration,
    ended: bool,
}

impl FenceWatch {
    fn new(ended: bool) -> Self {
        let now = Instant::now();
        Self { since: now, look_at: now, busy: Duration::ZERO, ended }
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
    }

    fn publish(&self) {
        let machine = &self.past.machine;
        let state = match machine.state() {
            State::Idle => DeviceState::Idle,
            State::Running => DeviceState::Running,
            State::Recovering { why } => DeviceState::Recovering { why },
            State::Waiting { why } => DeviceState::Waiting { why },
            State::Quarantined { why } => DeviceState::Quarantined { why },
        };
        let (generation, lost, failed_starts) = (machine.generation(), machine.lost(), machine.failed_starts());
        let session = self.past.session.as_ref();
        let (pid, jail) = (session.and_then(|session| session.pid()), session.map(|session| session.jail()));
        self.shared.update(|status| {
            (status.state, status.generation, status.lost, status.pid) = (state, generation, lost, pid);
            (status.failed_starts, status.jail) = (failed_starts, jail.unwrap_or_default());
        });
    }

    fn carry_out(&mut self, action: Action, events: &mut VecDeque<Event>) {
        match action {
            Action::Spawn { generation } => match Preparation::begin(&self.parts.makers, generation, &self.shared) {
                Ok(next) => self.nexts.push(next),
                Err(error) => {
                    let failure = Failure::Passing(format!("the host has no room: {error}"));
                    events.push_back(Event::NotStarted { generation, failure });
                }
            },
            Action::Promote { generation } => {
                if let Some(session) = self.past.greeted.take_if(|session| session.generation == generation) {
                    self.past.session = Some(session);
                }
            }
            Action::DropBeside { generation } => {
                self.nexts.retain(|next| next.generation != generation);
                if let Some(mut session) = self.past.greeted.take_if(|session| session.generation == generation) {
                    session.give_up(Instant::now());
                }
            }
            Action::Kill { generation } => self.kill(generation, events),
            Action::WatchFence => {
                // It never had memory.
                if self.fence.is_none() {
                    events.push_back(Event::FencePassed);
                }
            }
            Action::Settled => {
                self.fence = None;
                self.shared.gate.settled();
            }
            Action::HandOver { generation, continued } => self.hand_over(generation, continued, events),
            Action::Kick { call } => {
                if let Some(session) = &self.past.session {
                    session.doorbells.ring_all();
                }
                if call {
                    (0..self.vectors.len()).for_each(|vector| self.vectors.signal(vector));
                }
            }
            Action::TakeBack { generation, why } => self.take_back(generation, why, events),
            Action::Employ => {
                if !self.shared.gate.take_out() {
                    return events.push_back(Event::Withheld);
                }
                self.substituted = true;
                events.push_back(Event::Employed);
            }
            Action::Dismiss => {
                self.substituted = false;
                self.shared.gate.bring_back();
            }
            // What was unfinished in somebody else's is its own affair: there is no record of it.
            Action::Settle => events.push_back(Event::Settled(Ok(()))),
            Action::AskUnplug => {
                tracing::warn!(device = self.shared.name, "the device is of no use to the guest any more");
            }
            Action::Tell(tale) => self.relate(tale),
            // A reset clears it; there is no configuration of a driver's, no driver that waits, and nothing is made beside.
            Action::ClearRecord
            | Action::ShowConfig
            | Action::CompleteActivation
            | Action::CompleteResets
            | Action::NeedsReset
            | Action::SpawnBeside { .. }
            | Action::Transfer { .. }
            | Action::Revert => {}
        }
    }

    /// Whether one that is being made is ready, or will not be.
    pub(super) fn look_at_the_next(&mut self) {
        let mut done = Vec::new();
        self.nexts.retain(|next| {
            let outcome = next.outcome();
            let over = outcome.is_some();
            done.extend(outcome.map(|outcome| (next.generation, outcome)));
            !over
        });
        for (generation, outcome) in done {
            let event = match self.examine(generation, outcome) {
                Ok(recovery) => Event::Greeted { generation, recovery },
                Err(failure) => Event::NotStarted { generation, failure },
            };
            self.feed(event);
        }
    }

    fn examine(&mut self, generation: u64, outcome: Outcome) -> Result<Recovery, Failure> {
        let failure = |hopeless, why: String| if hopeless { Failure::Hopeless(why) } else { Failure::Passing(why) };
        let mut session = outcome.map_err(|error| {
            if let super::next::ConnectError::Shape { last_lines, .. } = &error {
                self.note_end(error.to_string(), last_lines.clone());
            }
            failure(error.is_hopeless(), error.to_string())
        })?;
        session.talk.obey(&self.shared.ending);
        if let Err(error) = session.shape.compare(&self.past.shown) {
            session.give_up(Instant::now() + REAP);
            return Err(failure(true, error.to_string()));
        }
        tell_jail(&self.parts.story, &self.parts.name, generation, &session.jail());
        self.past.greeted = Some(session);
        Ok(self.recovery())
    }

    fn recovery(&self) -> Recovery {
        if self.parts.record.is_some() { Recovery::Full } else { Recovery::IdleOnly }
    }

    fn kill(&mut self, generation: u64, events: &mut VecDeque<Event>) {
        let Some(mut session) = self.past.session.take() else { return };
        // Its end is ours unless it had begun before.
        let killed = session.process.is_some() && !session.has_ended();
        let words = session.give_up(Instant::now() + REAP);
        let words = match (words, self.past.machine.state()) {
            (Some(words), State::Recovering { why }) if killed => Some(format!("killed by the VMM: {why} ({words})")),
            (words, _) => words,
        };
        self.shared.gate.lost();
        if session.is_gone() {
            return self.bury(generation, &session, words, events);
        }
        tracing::error!(device = self.shared.name, generation, "a killed server does not end: is its storage stuck?");
        self.past.dying = Some(session);
    }

    fn bury(&mut self, generation: u64, session: &Session, words: Option<String>, events: &mut VecDeque<Event>) {
        let progress = self.parts.record.as_ref().map(|record| record.progress());
        let progressed = match progress {
            Some(progress) => progress.completed != self.completed_before,
            None => session.talk.answered() > 0,
        };
        let idle = progress.is_some_and(|progress| !progress.waiting);
        if session.has_memory {
            self.fence = Some(FenceWatch::new(session.was_seen_to_end()));
        }
        let (mut ending, mut lines) = (Ending::Crash { idle }, Vec::new());
        if let Some(process) = &session.process {
            if let Ending::Config(why) = process.ending() {
                ending = Ending::Config(why);
            }
            lines = process.last_lines();
        }
        if let State::Recovering { why } = self.past.machine.state() {
            tracing::warn!(device = self.shared.name, generation, why, end = words, "server lost");
            self.note_end(words.unwrap_or(why), lines);
        }
        events.push_back(Event::Ended { generation, end: End { ending, progressed, unfinished: false } });
    }

    fn note_end(&self, end: String, mut lines: Vec<String>) {
        lines.drain(..lines.len().saturating_sub(LAST_LINES));
        self.shared.update(|status| (status.last_exit, status.last_lines) = (Some(end), lines));
    }

    /// Whether one that was killed has ended at last, and whether its last writes are done.
    pub(super) fn look_at_the_dead(&mut self) {
        if let Some(mut session) = self.past.dying.take_if(|session| session.is_gone()) {
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
            watch.busy = now - watch.since;
            watch.look_at = now + (watch.busy / 8).clamp(Duration::from_micros(200), Duration::from_millis(20));
            return;
        }
        let waited = watch.busy;
        self.fence = None;
        self.shared.update(|status| status.fence_wait = waited);
        self.feed(Event::FencePassed);
    }

    /// Whether the device moves, as its record says.
    pub(super) fn look_at_progress(&mut self) {
        if self.past.machine.look_at().is_none_or(|at| at > self.now()) {
            return;
        }
        let progress = self.parts.record.as_ref().map(|record| record.progress());
        let sample =
            progress.map(|progress| Sample { queue: 0, used: progress.completed as u16, waiting: progress.waiting });
        let pid = self.past.session.as_ref().and_then(|session| session.pid());
        let spared = pid.is_some_and(crate::vhost::is_traced);
        self.feed(Event::Sampled { samples: sample.into_iter().collect(), spared });
    }

    /// Gives a server guest memory and vectors, and the guest its doorbells.
    fn hand_over(&mut self, generation: u64, continued: bool, events: &mut VecDeque<Event>) {
        if !self.shared.gate.take_out() {
            return events.push_back(Event::Withheld);
        }
        self.completed_before = self.parts.record.as_ref().map_or(0, |record| record.progress().completed);
        events.push_back(match self.give(continued) {
            Ok(()) => Event::HandedOver { generation },
            Err(error) if error.is_hopeless() => {
                Event::HandOverFailed { generation, failure: Failure::Hopeless(error.to_string()) }
            }
            Err(error) => Event::HandOverFailed { generation, failure: Failure::Passing(error.to_string()) },
        });
    }

    fn give(&mut self, continued: bool) -> Result<(), TalkError> {
        self.drop_the_unawaited();
        let Some(session) = &mut self.past.session else { return Err(TalkError::Ending) };
        if !continued || self.past.forsaken {
            session.talk.ask(&Request::Reset, &[])?;
        } else if session.generation > 1 && !session.begun && self.parts.record.is_none() {
            // Whatever somebody else's server had kept over the end of the connection is not what the guest knows.
            match session.talk.ask(&Request::Reset, &[]) {
                // It comes new by itself, then.
                Ok(_) | Err(TalkError::Refused { .. }) => self.estranged.begin(),
                Err(error) => return Err(error),
            }
        }
        session.begun = true;
        if std::mem::take(&mut self.past.forsaken) && continued {
            let why = "the guest has gone on without its answers: it begins as after power-on";
            tracing::warn!(device = self.shared.name, why, "device reset");
            let known = [("id", self.parts.name.clone()), ("reason", why.to_owned())];
            self.parts.story.tell("device", "reset", known);
        }
        session.talk.write(region::CONFIG, COMMAND.0, &COMMAND.1)?;
        set_vectors(session, &self.vectors)?;
        // Before the guest's memory is there nothing is done; and before its doorbells are, nobody rings this server's.
        *self.shared.doorbells.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&session.doorbells);
        session.has_memory = true;
        session.talk.lend(Some(self.parts.memory.clone()));
        let file = self.parts.memory.file();
        for range in self.parts.memory.ranges() {
            let (address, len, offset) = (range.gpa, range.len, range.file_offset);
            let map = DmaMap { address, len, offset, readable: true, writable: true };
            session.talk.ask(&Request::DmaMap(map), &[file.as_fd()])?;
        }
        Ok(())
    }

    fn take_back(&mut self, generation: u64, why: TakeBack, events: &mut VecDeque<Event>) {
        match self.take() {
            Ok(()) => {
                let stays = self.shared.gate.bring_back();
                events.push_back(Event::TakenBack { generation });
                if why == TakeBack::Pause && !stays {
                    events.push_back(Event::Resume);
                }
            }
            // It may go on writing: the only way to be rid of it is to end it.
            Err(error) => events.push_back(Event::Lost { generation, why: error.to_string() }),
        }
    }

    fn take(&mut self) -> Result<(), TalkError> {
        let Some(session) = &mut self.past.session else { return Err(TalkError::Ending) };
        let deadline = Instant::now() + self.drain;
        for range in self.parts.memory.ranges() {
            let unmap = Request::DmaUnmap(DmaUnmap::One { address: range.gpa, len: range.len });
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(10));
            session.talk.ask_within(&unmap, &[], left)?;
        }
        session.talk.lend(None);
        session.has_memory = false;
        Ok(())
    }

    fn tell(&self, event: &str, generation: Option<u64>, reason: Option<String>) {
        let generation = generation.unwrap_or_else(|| self.past.machine.generation());
        let known = [("id", self.parts.name.clone()), ("generation", generation.to_string())];
        self.parts.story.tell("device", event, known.into_iter().chain(reason.map(|reason| ("reason", reason))));
    }

    fn relate(&self, tale: Tale) {
        let device = &self.parts.name;
        match tale {
            Tale::Crashed { generation } => self.tell("crashed", Some(generation), self.shared.status().last_exit),
            Tale::Restarted { generation } => {
                tracing::warn!(device, generation, "server is back");
                let anew = self.parts.record.is_none().then(|| CAME_ANEW.to_owned());
                self.tell("restarted", Some(generation), anew);
            }
            Tale::StartFailed { generation, times, why } => {
                tracing::warn!(device, generation, times, why, "no server yet");
                self.tell("start-failed", Some(generation), Some(format!("{why} (failed starts in a row: {times})")));
            }
            Tale::Waiting { why } => {
                tracing::warn!(device, why, "no server is to be had; it is waited for");
                self.tell("waiting", None, Some(why));
            }
            Tale::Quarantined { why } => {
                tracing::error!(
                    device,
                    why,
                    "device quarantined until the operator revives it, or the machine is reset"
                );
                self.tell("quarantined", None, Some(why));
            }
            Tale::Stalled { what } => {
                tracing::warn!(device, what, "the server stands");
                self.tell("stalled", None, Some(what));
            }
            Tale::FenceGivenUp => {
                tracing::warn!(
                    device,
                    "nothing shows that the dead server's last writes are done; going on without that proof"
                );
            }
            // Nothing is made beside a server.
            Tale::UpgradeStarted { .. }
            | Tale::Upgraded { .. }
            | Tale::UpgradeRefused { .. }
            | Tale::RolledBack { .. }
            | Tale::SpareReady { .. }
            | Tale::SpareLost { .. } => {}
        }
    }
}

/// Tells a server whom to signal, as many at a time as it takes.
fn set_vectors(session: &mut Session, vectors: &crate::irq::VectorTable) -> Result<(), TalkError> {
    let events: Vec<EventFd> = (0..vectors.len()).filter_map(|vector| vectors.eventfd(vector).ok()).collect();
    let most = session.talk.descriptors_max();
    let mut start = 0;
    for events in events.chunks(most) {
        let beside: Vec<BorrowedFd<'_>> = events.iter().map(descriptor).collect();
        let count = beside.len() as u32;
        let set = IrqSet { index: irq::MSIX, start, count, action: IrqAction::Signals };
        session.talk.ask(&Request::SetIrqs(set), &beside)?;
        start += count;
    }
    Ok(())
}

#[allow(unsafe_code, reason = "vmm-sys-util's EventFd has no AsFd; its descriptor is borrowed")]
fn descriptor(event: &EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open as long as `event`, which the result borrows from.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
