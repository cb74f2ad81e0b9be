//! The machine itself.

mod loss;

use std::time::Duration;

use atoll_protocol::Generation;

use super::beside::{Standby, Upgrade};
use super::event::{Action, Event, Failure, State, TakeBack, Tale};
use super::stall::StallWatch;
use crate::actor::Moment;
use crate::backend::{Decision, PolicyConfig, QuarantineReason, RestartPolicy};
use crate::config::OnFailure;
use crate::vhost::device::Recovery;

/// What is fixed for a device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// When to try again, and when no more.
    pub(crate) policy: PolicyConfig,
    /// See there.
    pub(crate) on_failure: OnFailure,
    /// How long the proof is waited for that nothing of a dead backend is under way.
    pub(crate) fence: Duration,
    /// How long a queue may stand with work in it; `None`: for ever.
    pub(crate) stall: Option<Duration>,
    /// Somebody debugs the backend: one that stands is told of and left alone.
    pub(crate) debugged: bool,
    /// A spare waits beside the backend.
    pub(crate) standby: bool,
    /// How long a new build must serve before the operator is told that it does.
    pub(crate) probation: Duration,
    /// How long after that its death brings the old one back.
    pub(crate) trial: Duration,
}

/// A backend that is there.
#[derive(Clone, Debug)]
pub(super) struct Present {
    pub(super) generation: u64,
    pub(super) recovery: Recovery,
    pub(super) dying: Option<Verdict>,
}

/// What comes after a backend's end.
#[derive(Clone, Debug)]
pub(super) enum Verdict {
    Restart,
    GiveUp(String),
    /// A new build takes its place.
    Replaced,
    /// It is a new build that did not do; the old one comes back.
    RollBack(String),
}

/// Who has the driver's rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rings {
    Home,
    Out(u64),
    Substituted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fence {
    Clear,
    /// Something of a dead backend may be under way; that is believed until then.
    Pending(Moment),
}

#[derive(Clone, Copy, Debug, Default)]
struct Driver {
    /// Some backend has had these rings.
    ran: bool,
    /// One that kept no record died with requests in them.
    unfinished: bool,
}

#[derive(Clone, Debug)]
pub(super) enum Trouble {
    None,
    Recovering(String),
    Waiting(String),
    Quarantined(String),
}

/// The state of one device's recovery.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(super) rules: Rules,
    pub(super) policy: RestartPolicy,
    pub(super) present: Option<Present>,
    pub(super) coming: Option<u64>,
    /// It was started beside a backend that lived: that it is there says nothing of the fence.
    pub(super) coming_beside: bool,
    pub(super) upgrade: Option<Upgrade>,
    pub(super) standby: Standby,
    pub(super) again_at: Option<Moment>,
    pub(super) rings: Rings,
    pub(super) fence: Fence,
    driver: Option<Driver>,
    paused: bool,
    pub(super) leaving: bool,
    pub(super) settling: bool,
    resets_owed: bool,
    activation_owed: bool,
    stall_told: bool,
    pub(super) trouble: Trouble,
    lost: u64,
    failed_starts: u64,
    stalls: StallWatch,
    actions: Vec<Action>,
}

impl Machine {
    /// A device whose first backend, generation 1, is there and greeted.
    pub(crate) fn new(rules: Rules, recovery: Recovery) -> Self {
        let mut policy = RestartPolicy::new(rules.policy, Generation::FIRST);
        policy.ready(Generation::FIRST);
        Self {
            rules,
            policy,
            present: Some(Present { generation: Generation::FIRST.0, recovery, dying: None }),
            coming: None,
            coming_beside: false,
            upgrade: None,
            standby: Standby::new(),
            again_at: None,
            rings: Rings::Home,
            fence: Fence::Clear,
            driver: None,
            paused: false,
            leaving: false,
            settling: false,
            resets_owed: false,
            activation_owed: false,
            stall_told: false,
            trouble: Trouble::None,
            lost: 0,
            failed_starts: 0,
            stalls: StallWatch::new(rules.stall),
            actions: Vec::new(),
        }
    }

    /// Which incarnation serves it, served it last, or is on its way.
    pub(crate) fn generation(&self) -> u64 {
        let present = self.present.as_ref().map(|present| present.generation);
        present.or(self.coming).unwrap_or(self.policy.generation().0)
    }
    /// The backend that is there and lives.
    pub(crate) fn alive(&self) -> Option<u64> {
        self.present.as_ref().filter(|present| present.dying.is_none()).map(|present| present.generation)
    }
    /// Backends that were lost.
    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }
    /// Successors that did not get as far as to be greeted.
    pub(crate) fn failed_starts(&self) -> u64 {
        self.failed_starts
    }
    /// What happens when the present one is lost.
    pub(crate) fn recovery(&self) -> Option<Recovery> {
        self.present.as_ref().map(|present| present.recovery)
    }
    /// Whether the board can go: nobody has the rings, and nothing can land in its memory.
    pub(crate) fn may_leave(&self) -> bool {
        (self.rings == Rings::Home || self.dying().is_some()) && self.fence == Fence::Clear
    }
    /// When the rings are to be looked at next.
    pub(crate) fn look_at(&self) -> Option<Moment> {
        self.stalls.look_at()
    }
    /// When [`Event::Time`] has something to say.
    pub(crate) fn due_at(&self) -> Option<Moment> {
        let fence = match self.fence {
            Fence::Clear => None,
            Fence::Pending(until) => Some(until),
        };
        let again = self.again_at.filter(|_| !self.leaving);
        again.into_iter().chain(fence).chain(self.beside_due_at()).min()
    }
    /// What it is at.
    pub(crate) fn state(&self) -> State {
        match (&self.trouble, self.alive()) {
            (Trouble::Quarantined(why), _) => State::Quarantined { why: why.clone() },
            (_, Some(_)) if matches!(self.rings, Rings::Out(_)) => State::Running,
            (_, Some(_)) => State::Idle,
            (Trouble::Waiting(why), None) => State::Waiting { why: why.clone() },
            (Trouble::Recovering(why), None) => State::Recovering { why: why.clone() },
            (Trouble::None, None) => State::Recovering { why: String::new() },
        }
    }

    /// Takes an event; gives what is to be done, in order.
    pub(crate) fn on(&mut self, event: Event, now: Moment) -> Vec<Action> {
        match event {
            Event::Greeted { generation, recovery } => {
                if !self.greeted_beside(generation, recovery, now) {
                    self.greeted(generation, recovery);
                }
            }
            Event::NotStarted { generation, failure } => self.not_started(generation, failure, now),
            Event::HandedOver { generation } if self.rings == Rings::Out(generation) => self.handed_over(now),
            Event::HandOverFailed { generation, failure } if self.rings == Rings::Out(generation) => match failure {
                Failure::Passing(why) => self.lose(generation, Verdict::Restart, why, now),
                Failure::Hopeless(why) => self.lose(generation, Verdict::GiveUp(why.clone()), why, now),
            },
            Event::Withheld => {
                self.rings = Rings::Home;
                self.paused = true;
                self.clear_up();
            }
            Event::TakenBack { generation } if self.rings == Rings::Out(generation) => {
                self.rings = Rings::Home;
                self.stalls.end();
                self.clear_up();
            }
            Event::Lost { generation, why } => {
                if !self.lose_beside(generation, &why, now) {
                    self.lose(generation, Verdict::Restart, why, now);
                }
            }
            Event::Ended { generation, end } => self.ended(generation, &end, now),
            Event::Sampled { samples, spared } => self.sampled(&samples, spared, now),
            Event::Stalled { generation, what, spared } => self.stalled(generation, what, spared, now),
            Event::FencePassed if self.fence != Fence::Clear && self.dying().is_none() => {
                self.renew_probation(now);
                self.pass_fence();
            }
            Event::Employed if self.rings == Rings::Substituted => {
                if let Some(driver) = &mut self.driver {
                    driver.ran = true;
                }
                self.complete_activation();
            }
            Event::NotEmployed => {
                self.rings = Rings::Home;
                self.complete_activation();
            }
            Event::Settled(outcome) => self.settled(outcome, now),
            Event::Activated => self.activated(now),
            Event::Reset => self.reset(now),
            Event::Pause => {
                self.paused = true;
                self.take_back(TakeBack::Pause);
            }
            Event::Resume => {
                self.paused = false;
                self.serve();
            }
            Event::Leave => {
                self.leaving = true;
                (self.resets_owed, self.activation_owed) = (false, false);
                self.cancel_upgrade("the machine starts again", now);
                self.stop_preparing_a_spare();
                self.forget_driver(TakeBack::Leave);
                self.bring_back(RestartPolicy::retry, now);
                self.clear_up();
            }
            Event::Stop => {
                self.leaving = true;
                (self.resets_owed, self.activation_owed) = (false, false);
                self.cancel_upgrade("the machine ends", now);
                self.drop_spare();
                self.forget_driver(TakeBack::Leave);
            }
            Event::Arrive => {
                (self.leaving, self.paused) = (false, false);
                // Whoever prepared it is gone with the last board.
                if let Some(generation) = self.coming {
                    self.coming_beside = false;
                    self.actions.push(Action::Spawn { generation });
                }
            }
            Event::Revive => self.bring_back(RestartPolicy::revive, now),
            Event::Upgrade => self.upgrade(),
            Event::Transferred { generation } => self.transferred(generation, now),
            Event::NotTransferred { generation, why } => {
                self.lose_beside(generation, &why, now);
            }
            Event::Outdated => self.renew_spare(now),
            Event::Time => self.time(now),
            // News of an incarnation that has nothing any more.
            Event::HandedOver { .. }
            | Event::HandOverFailed { .. }
            | Event::TakenBack { .. }
            | Event::FencePassed
            | Event::Employed => {}
        }
        std::mem::take(&mut self.actions)
    }

    pub(super) fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn dying(&self) -> Option<u64> {
        self.present.as_ref().filter(|present| present.dying.is_some()).map(|present| present.generation)
    }

    pub(super) fn is_quarantined(&self) -> bool {
        matches!(self.trouble, Trouble::Quarantined(_))
    }

    /// Gives the rings to whoever is to have them, if they are here and there is a driver.
    pub(super) fn serve(&mut self) {
        if self.advance_upgrade() {
            return;
        }
        let Some(driver) = self.driver else { return };
        let at_rest = self.rings == Rings::Home && self.fence == Fence::Clear;
        if self.paused || self.leaving || self.settling || self.resets_owed || !at_rest {
            return;
        }
        match &self.present {
            Some(Present { generation, recovery, dying: None }) => {
                let generation = *generation;
                if driver.ran && driver.unfinished && *recovery == Recovery::IdleOnly {
                    self.settling = true;
                    return self.act(Action::Settle);
                }
                self.rings = Rings::Out(generation);
                self.begin(driver);
                self.act(Action::HandOver { generation, continued: driver.ran });
            }
            None if self.is_quarantined() => {
                self.rings = Rings::Substituted;
                self.begin(driver);
                self.act(Action::Employ);
            }
            _ => {}
        }
    }

    /// A driver begins with an empty record, whoever had the last one's rings when it went.
    fn begin(&mut self, driver: Driver) {
        if !driver.ran {
            self.act(Action::ClearRecord);
        }
    }

    /// What waits for the rings to be here and for the fence.
    pub(super) fn clear_up(&mut self) {
        if self.rings != Rings::Home || self.fence != Fence::Clear {
            return;
        }
        if self.driver.is_none() {
            self.act(Action::ClearRecord);
        }
        if std::mem::take(&mut self.resets_owed) {
            self.act(Action::CompleteResets);
        }
        self.serve();
    }

    fn pass_fence(&mut self) {
        self.fence = Fence::Clear;
        self.act(Action::Settled);
        self.clear_up();
    }

    fn complete_activation(&mut self) {
        if std::mem::take(&mut self.activation_owed) {
            self.act(Action::CompleteActivation);
        }
    }

    fn start(&mut self, generation: Generation, now: Moment) {
        self.again_at = None;
        if self.use_spare(now) {
            return self.policy.withdraw(generation);
        }
        (self.coming, self.coming_beside) = (Some(generation.0), false);
        self.act(Action::Spawn { generation: generation.0 });
    }

    pub(super) fn follow(&mut self, decision: Decision, now: Moment) {
        match decision {
            Decision::Nothing => {}
            Decision::Start(generation) => self.start(generation, now),
            Decision::Wait(at) => self.again_at = Some(at),
            Decision::Quarantine(reason) => {
                let why = match reason {
                    QuarantineReason::CrashLoop(times) => {
                        format!("its backend crashed {times} times without completing a request in between")
                    }
                    QuarantineReason::StartFailures(times) => {
                        let last = self.reason();
                        format!("its backend could not be started {times} times in a row; the last time: {last}")
                    }
                    QuarantineReason::Config(why) => why,
                };
                self.give_up(why, now);
            }
            Decision::GiveUp => self.give_up("its backend never got ready".into(), now),
        }
    }

    fn reason(&self) -> &str {
        match &self.trouble {
            Trouble::None => "",
            Trouble::Recovering(why) | Trouble::Waiting(why) | Trouble::Quarantined(why) => why,
        }
    }

    fn greeted(&mut self, generation: u64, recovery: Recovery) {
        if self.coming != Some(generation) {
            return;
        }
        self.coming = None;
        self.act(Action::Tell(Tale::Restarted { generation }));
        if !self.coming_beside {
            // It could not be ready before that.
            self.fence = Fence::Clear;
        }
        self.promote(generation, recovery);
    }

    fn not_started(&mut self, generation: u64, failure: Failure, now: Moment) {
        if self.coming != Some(generation) {
            let (Failure::Passing(why) | Failure::Hopeless(why)) = failure;
            self.lose_beside(generation, &why, now);
            return;
        }
        self.coming = None;
        self.failed_starts += 1;
        if self.take_over(now) {
            return;
        }
        match failure {
            Failure::Hopeless(why) => self.give_up(why, now),
            Failure::Passing(why) => {
                let times = self.policy.start_failures().saturating_add(1);
                if times.is_power_of_two() {
                    self.act(Action::Tell(Tale::StartFailed { generation, times, why: why.clone() }));
                }
                // One that waits goes on waiting, whatever comes of this attempt.
                match self.trouble {
                    Trouble::Waiting(_) => self.trouble = Trouble::Waiting(why),
                    _ if self.rules.policy.start_attempts.is_none() => self.await_one(why),
                    _ => self.trouble = Trouble::Recovering(why),
                }
                let decision = self.policy.not_started(Generation(generation), now);
                self.follow(decision, now);
            }
        }
    }

    fn handed_over(&mut self, now: Moment) {
        let Some(driver) = &mut self.driver else { return };
        let call = driver.ran;
        (driver.ran, driver.unfinished) = (true, false);
        self.stalls.begin(now);
        self.stall_told = false;
        self.renew_probation(now);
        self.act(Action::Kick { call });
        self.complete_activation();
    }

    fn settled(&mut self, outcome: Result<(), String>, now: Moment) {
        if !std::mem::take(&mut self.settling) {
            return;
        }
        match (outcome, self.alive()) {
            (Ok(()), _) => {
                if let Some(driver) = &mut self.driver {
                    driver.unfinished = false;
                }
                self.serve();
            }
            // It is well, but what the driver waits for it can never do.
            (Err(why), Some(generation)) => self.lose(generation, Verdict::GiveUp(why.clone()), why, now),
            (Err(_), None) => {}
        }
    }

    fn activated(&mut self, now: Moment) {
        if self.driver.is_some() {
            self.reset(now);
        }
        self.driver = Some(Driver::default());
        self.activation_owed = true;
        self.serve();
        if self.alive().is_none() && !self.is_quarantined() {
            self.complete_activation();
        }
    }

    fn forget_driver(&mut self, why: TakeBack) {
        self.driver = None;
        self.settling = false;
        self.take_back(why);
    }

    pub(super) fn take_back(&mut self, why: TakeBack) {
        match self.rings {
            Rings::Home => {}
            Rings::Out(generation) if self.alive() == Some(generation) => {
                self.act(Action::TakeBack { generation, why });
            }
            // It gives nothing back any more; its end is being waited for.
            Rings::Out(_) => {}
            Rings::Substituted => {
                self.rings = Rings::Home;
                self.act(Action::Dismiss);
                // Whatever was asked for has been answered.
                if let Some(driver) = &mut self.driver {
                    (driver.ran, driver.unfinished) = (true, false);
                }
            }
        }
    }

    fn reset(&mut self, now: Moment) {
        self.activation_owed = false;
        self.resets_owed = true;
        self.forget_driver(TakeBack::Reset);
        if self.is_quarantined() {
            self.bring_back(RestartPolicy::retry, now);
        }
        self.clear_up();
    }

    /// A device that was given up, or waits, is tried at once.
    fn bring_back(&mut self, how: fn(&mut RestartPolicy) -> Decision, now: Moment) {
        if self.present.is_some() || self.coming.is_some() {
            return;
        }
        self.take_back(TakeBack::Reset);
        if self.is_quarantined() {
            self.trouble = Trouble::Recovering("it was given up, and is tried again".into());
        }
        let decision = how(&mut self.policy);
        self.follow(decision, now);
    }

    fn time(&mut self, now: Moment) {
        if let Fence::Pending(until) = self.fence
            && until <= now
        {
            self.act(Action::Tell(Tale::FenceGivenUp));
            if self.dying().is_none() {
                self.renew_probation(now);
                self.pass_fence();
            } else {
                // It cannot even be reaped: whoever waits for the memory waits no longer, its successor does.
                self.fence = Fence::Clear;
                if std::mem::take(&mut self.resets_owed) {
                    self.act(Action::CompleteResets);
                }
            }
        }
        if self.again_at.is_some_and(|at| at <= now) && !self.leaving {
            self.again_at = None;
            let decision = self.policy.due(now);
            self.follow(decision, now);
        }
        self.time_beside(now);
    }
}
