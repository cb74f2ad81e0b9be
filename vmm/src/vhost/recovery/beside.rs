//! What is made ready beside the backend that serves: a new build that is to take its place, and a spare that waits for
//! its death. Neither has rings, a lock or a say before it is promoted; what becomes of them harms nobody.

use std::collections::VecDeque;
use std::time::Duration;

use atoll_protocol::Generation;

use super::event::{Action, Build, SpareState, TakeBack, Tale};
use super::machine::{Fence, Machine, Present, Rings, Trouble, Verdict};
use crate::actor::Moment;
use crate::vhost::device::Recovery;

/// How far a new build is.
#[derive(Clone, Debug)]
pub(super) enum Upgrade {
    /// It is being started and greeted.
    Starting { generation: u64 },
    /// It offers what it must. A process of the old build is being made ready, so that a failure from here on is short.
    Covering { generation: u64, recovery: Recovery },
    /// Both are there. The old one is to give the rings back, where it has them.
    Ready { generation: u64, recovery: Recovery },
    /// It was asked to.
    Stopping { generation: u64, recovery: Recovery },
    /// What the device knows is being moved.
    Moving { generation: u64, recovery: Recovery },
    /// It knows all; the old one is ending. Lost: the new one ended meanwhile.
    Switching { generation: u64, recovery: Recovery, lost: Option<String> },
    /// It is the device's backend, and still has to show that it lives.
    Probation { generation: u64, until: Option<Moment> },
    /// It has, and the operator knows; but its first death within this time brings the old build back.
    Trial { generation: u64, until: Moment },
}

/// A process that waits for the death of the one that serves.
#[derive(Clone, Debug)]
pub(super) struct Standby {
    stage: Stage,
    /// Ends of spares, oldest first.
    ends: VecDeque<Moment>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// There will be one from then on.
    From(Moment),
    Starting(u64),
    Ready(u64, Recovery),
}

/// After a spare was used its successor is made when what waited has been answered.
const BREATH: Duration = Duration::from_millis(100);
/// Ends of spares that are remembered at most: with the longest delay between them that is reached long before.
const ENDS_MAX: usize = 32;

impl Standby {
    pub(super) fn new() -> Self {
        Self { stage: Stage::From(Moment::default()), ends: VecDeque::new() }
    }
}

impl Machine {
    /// Which incarnation waits beside, or is on its way.
    pub(in crate::vhost) fn spare(&self) -> SpareState {
        match self.standby.stage {
            _ if !self.rules.standby => SpareState::Off,
            Stage::Ready(generation, _) => SpareState::Ready(generation),
            Stage::From(_) | Stage::Starting(_) => SpareState::Coming,
        }
    }

    /// Whether an incarnation is waited for, waits, or serves.
    pub(in crate::vhost) fn wants(&self, generation: u64) -> bool {
        let upgrade = match self.upgrade {
            Some(
                Upgrade::Starting { generation }
                | Upgrade::Covering { generation, .. }
                | Upgrade::Ready { generation, .. }
                | Upgrade::Stopping { generation, .. }
                | Upgrade::Moving { generation, .. }
                | Upgrade::Switching { generation, .. }
                | Upgrade::Probation { generation, .. }
                | Upgrade::Trial { generation, .. },
            ) => Some(generation),
            None => None,
        };
        let spare = match self.standby.stage {
            Stage::Starting(generation) | Stage::Ready(generation, _) => Some(generation),
            Stage::From(_) => None,
        };
        let present = self.present.as_ref().map(|present| present.generation);
        [upgrade, spare, present, self.coming].contains(&Some(generation))
    }

    /// Whether the present backend is ending only because another build takes its place.
    pub(in crate::vhost) fn is_replaced(&self, generation: u64) -> bool {
        self.present
            .as_ref()
            .is_some_and(|present| present.generation == generation && matches!(present.dying, Some(Verdict::Replaced)))
    }

    /// Begins to make an incarnation of the new build.
    pub(super) fn upgrade(&mut self) {
        // Who asks for the next one keeps the last one.
        self.end_trial();
        if matches!(self.upgrade, Some(Upgrade::Trial { .. })) {
            let why = "the last new build has just died, and the one before it is on its way; try again when it serves";
            return self.act(Action::Tell(Tale::UpgradeRefused { why: why.to_owned() }));
        }
        if self.upgrade.is_some() {
            return;
        }
        if self.leaving {
            return self.refuse("the machine ends or starts again".to_owned());
        }
        let generation = self.policy.issue().0;
        self.upgrade = Some(Upgrade::Starting { generation });
        self.act(Action::Tell(Tale::UpgradeStarted { generation }));
        self.act(Action::SpawnBeside { generation, build: Build::New });
    }

    /// A new build is ready, and nobody serves the device or is about to: it does, as after a crash. What the old one knew
    /// is lost with it. Says whether it was so.
    pub(super) fn take_over(&mut self, now: Moment) -> bool {
        let Some(Upgrade::Ready { generation, recovery }) = self.upgrade else { return false };
        if self.present.is_some() || self.coming.is_some() || self.leaving {
            return false;
        }
        self.again_at = None;
        self.take_back(TakeBack::Reset);
        self.upgrade = Some(Upgrade::Probation { generation, until: None });
        self.renew_probation(now);
        self.act(Action::Tell(Tale::Restarted { generation }));
        self.promote(generation, recovery);
        true
    }

    /// One that was started beside is there. Says whether it was one.
    pub(super) fn greeted_beside(&mut self, generation: u64, recovery: Recovery, now: Moment) -> bool {
        match self.upgrade {
            Some(Upgrade::Starting { generation: new }) if new == generation && self.alive().is_none() => {
                self.upgrade = Some(Upgrade::Ready { generation, recovery });
                self.take_over(now);
                return true;
            }
            Some(Upgrade::Starting { generation: new }) if new == generation => {
                self.cover(generation, recovery);
                return true;
            }
            _ => {}
        }
        if self.standby.stage != Stage::Starting(generation) {
            return false;
        }
        self.standby.stage = Stage::Ready(generation, recovery);
        if self.rules.standby {
            self.act(Action::Tell(Tale::SpareReady { generation }));
        }
        self.switch_over();
        true
    }

    /// The new build is there. If it fails with the rings in its hands the guest waits for the old one: one of those is
    /// made ready first.
    fn cover(&mut self, generation: u64, recovery: Recovery) {
        self.upgrade = Some(Upgrade::Covering { generation, recovery });
        match self.standby.stage {
            Stage::Ready(..) => self.switch_over(),
            Stage::Starting(_) => {}
            Stage::From(_) => self.make_spare(),
        }
    }

    /// There is a cover, or none to be had.
    fn switch_over(&mut self) {
        if let Some(Upgrade::Covering { generation, recovery }) = self.upgrade {
            self.upgrade = Some(Upgrade::Ready { generation, recovery });
            self.serve();
        }
    }

    fn make_spare(&mut self) {
        let generation = self.policy.issue().0;
        self.standby.stage = Stage::Starting(generation);
        self.act(Action::SpawnBeside { generation, build: Build::Present });
    }

    /// The old build carries on, and needs no cover any more.
    fn uncover(&mut self) {
        if !self.rules.standby {
            self.drop_spare();
        }
    }

    /// One could not be started, or has ended. Says whether it was one of those beside.
    pub(super) fn lose_beside(&mut self, generation: u64, why: &str, now: Moment) -> bool {
        match &mut self.upgrade {
            Some(Upgrade::Starting { generation: new }) if *new == generation => {
                self.refuse(why.to_owned());
                return true;
            }
            Some(
                Upgrade::Covering { generation: new, .. }
                | Upgrade::Ready { generation: new, .. }
                | Upgrade::Stopping { generation: new, .. }
                | Upgrade::Moving { generation: new, .. },
            ) if *new == generation => {
                self.act(Action::DropBeside { generation });
                self.refuse(why.to_owned());
                // The old one carries on.
                self.serve();
                self.uncover();
                return true;
            }
            Some(Upgrade::Switching { generation: new, lost, .. }) if *new == generation => {
                if lost.is_none() {
                    *lost = Some(why.to_owned());
                    self.act(Action::DropBeside { generation });
                }
                return true;
            }
            _ => {}
        }
        match self.standby.stage {
            Stage::Starting(spare) if spare == generation => {}
            Stage::Ready(spare, _) if spare == generation => self.act(Action::DropBeside { generation }),
            _ => return false,
        }
        let ends = &mut self.standby.ends;
        ends.push_back(now);
        let period = self.rules.policy.period;
        while ends.len() > ENDS_MAX || ends.front().is_some_and(|end| now.since(*end) >= period) {
            ends.pop_front();
        }
        let delay = self.policy.delay(u32::try_from(ends.len()).unwrap_or(u32::MAX));
        self.standby.stage = Stage::From(now.after(delay));
        if self.rules.standby {
            self.act(Action::Tell(Tale::SpareLost { generation, why: why.to_owned() }));
        }
        self.switch_over();
        true
    }

    /// Gets an upgrade on whose new build is ready, when the rings allow it. Says whether it needs them.
    pub(super) fn advance_upgrade(&mut self) -> bool {
        let (generation, recovery) = match self.upgrade {
            Some(Upgrade::Ready { generation, recovery } | Upgrade::Stopping { generation, recovery }) => {
                (generation, recovery)
            }
            Some(Upgrade::Moving { .. }) => return true,
            _ => return false,
        };
        let Some(from) = self.alive() else { return false };
        if self.leaving || self.settling || self.fence != Fence::Clear {
            return false;
        }
        match self.rings {
            Rings::Home => {
                self.upgrade = Some(Upgrade::Moving { generation, recovery });
                self.act(Action::Transfer { from, to: generation });
            }
            Rings::Out(_) if matches!(self.upgrade, Some(Upgrade::Ready { .. })) => {
                self.upgrade = Some(Upgrade::Stopping { generation, recovery });
                self.act(Action::TakeBack { generation: from, why: TakeBack::Upgrade });
            }
            Rings::Out(_) | Rings::Substituted => {}
        }
        true
    }

    /// The new one knows what the old one knew: the old one goes.
    pub(super) fn transferred(&mut self, generation: u64, now: Moment) {
        let Some(Upgrade::Moving { generation: new, recovery }) = self.upgrade else { return };
        let Some(present) = self.present.as_mut().filter(|present| new == generation && present.dying.is_none()) else {
            return;
        };
        present.dying = Some(Verdict::Replaced);
        let old = present.generation;
        self.upgrade = Some(Upgrade::Switching { generation, recovery, lost: None });
        self.trouble = Trouble::Recovering("a new build takes over".into());
        // It has nothing in flight, but what the new one waits for falls with its end.
        self.fence = Fence::Pending(now.after(self.rules.fence));
        self.act(Action::Kill { generation: old });
    }

    /// The old one has ended in favour of the new one.
    pub(super) fn replaced(&mut self, now: Moment) {
        // It may have been given up while the old one would not end.
        if self.fence != Fence::Clear {
            self.act(Action::WatchFence);
        }
        match self.upgrade.take() {
            Some(Upgrade::Switching { generation, recovery, lost: None }) => {
                self.upgrade = Some(Upgrade::Probation { generation, until: None });
                self.promote(generation, recovery);
            }
            other => {
                let why = match other {
                    Some(Upgrade::Switching { lost: Some(why), .. }) => why,
                    _ => "it is gone".to_owned(),
                };
                self.refuse(why);
                let decision = self.policy.replace();
                self.follow(decision, now);
            }
        }
    }

    /// The new build serves no more, and its time of probation is not over.
    pub(super) fn roll_back(&mut self, why: String, now: Moment) {
        self.act(Action::Revert);
        if let Some(Upgrade::Trial { .. }) = self.upgrade {
            self.upgrade = None;
            // It is of the new build too.
            self.drop_spare();
            self.act(Action::Tell(Tale::RolledBack { why }));
        } else {
            self.refuse(why);
        }
        let decision = self.policy.replace();
        self.follow(decision, now);
    }

    /// Whether it is a new build whose time of probation is not over.
    pub(super) fn is_on_probation(&self, generation: u64) -> bool {
        let on_probation = match self.upgrade {
            Some(Upgrade::Probation { generation, .. } | Upgrade::Trial { generation, .. }) => Some(generation),
            _ => None,
        };
        on_probation == Some(generation)
    }

    /// Whether what serves is a new build whose death would bring the old one back.
    pub(in crate::vhost) fn is_on_trial(&self) -> bool {
        matches!(self.upgrade, Some(Upgrade::Trial { .. }))
    }

    /// Whether a new build is being started and greeted.
    pub(super) fn is_trying_a_build(&self) -> bool {
        matches!(self.upgrade, Some(Upgrade::Starting { .. }))
    }

    /// Its time begins when it could have the rings, and anew when it has them.
    pub(super) fn renew_probation(&mut self, now: Moment) {
        if let Some(Upgrade::Probation { until, .. }) = &mut self.upgrade {
            *until = Some(now.after(self.rules.probation));
        }
    }

    fn refuse(&mut self, why: String) {
        self.upgrade = None;
        self.act(Action::Tell(Tale::UpgradeRefused { why }));
    }

    fn complete_upgrade(&mut self, now: Moment) {
        if let Some(Upgrade::Probation { generation, .. }) = self.upgrade
            && self.alive() == Some(generation)
        {
            self.upgrade = Some(Upgrade::Trial { generation, until: now.after(self.rules.trial) });
            self.act(Action::Tell(Tale::Upgraded { generation }));
            // The spare is of the old build.
            self.renew_spare(now);
            if self.rules.trial.is_zero() {
                self.end_trial();
            }
        }
    }

    /// The new build is kept. One that is dying is not.
    fn end_trial(&mut self) {
        if let Some(Upgrade::Trial { generation, .. }) = self.upgrade
            && self.alive() == Some(generation)
        {
            self.upgrade = None;
        }
    }

    /// Ends what has not begun to change the device; one that has the device already has proven itself enough.
    pub(super) fn cancel_upgrade(&mut self, why: &str, now: Moment) {
        match self.upgrade {
            Some(
                Upgrade::Starting { generation }
                | Upgrade::Covering { generation, .. }
                | Upgrade::Ready { generation, .. }
                | Upgrade::Stopping { generation, .. }
                | Upgrade::Moving { generation, .. },
            ) => {
                self.act(Action::DropBeside { generation });
                self.refuse(why.to_owned());
            }
            Some(Upgrade::Probation { .. }) => {
                self.complete_upgrade(now);
                self.end_trial();
            }
            Some(Upgrade::Trial { .. }) => self.end_trial(),
            Some(Upgrade::Switching { .. }) | None => {}
        }
    }

    /// What a spare knows of the device is of yesterday.
    pub(super) fn renew_spare(&mut self, now: Moment) {
        self.drop_spare();
        self.standby.stage = Stage::From(now.after(BREATH));
        self.switch_over();
    }

    /// No spare is wanted now.
    pub(super) fn drop_spare(&mut self) {
        if let Stage::Starting(generation) | Stage::Ready(generation, _) = self.standby.stage {
            self.standby.stage = Stage::From(Moment::default());
            self.act(Action::DropBeside { generation });
        }
    }

    /// The board goes, and with it whoever prepares a spare; one that is there stays where one is wanted.
    pub(super) fn stop_preparing_a_spare(&mut self) {
        if let Stage::Starting(_) = self.standby.stage {
            self.drop_spare();
        }
        self.uncover();
    }

    /// A backend is to be started: a spare is quicker. Says whether there is one, or will be.
    pub(super) fn use_spare(&mut self, now: Moment) -> bool {
        match self.standby.stage {
            Stage::Ready(generation, recovery) => {
                self.standby.stage = Stage::From(now.after(BREATH));
                self.promote(generation, recovery);
                self.act(Action::Tell(Tale::Restarted { generation }));
            }
            Stage::Starting(generation) => {
                self.standby.stage = Stage::From(now.after(BREATH));
                self.policy.expect(Generation(generation));
                (self.coming, self.coming_beside) = (Some(generation), true);
            }
            Stage::From(_) => return false,
        }
        true
    }

    /// It is the device's backend from now on.
    pub(super) fn promote(&mut self, generation: u64, recovery: Recovery) {
        self.policy.adopt(Generation(generation));
        self.present = Some(Present { generation, recovery, dying: None });
        self.trouble = Trouble::None;
        self.act(Action::Promote { generation });
        self.act(Action::ShowConfig);
        if self.fence == Fence::Clear {
            self.act(Action::Settled);
            self.clear_up();
        }
    }

    /// When something of this is due.
    pub(super) fn beside_due_at(&self) -> Option<Moment> {
        let probation = match self.upgrade {
            Some(Upgrade::Probation { until, .. }) => until,
            Some(Upgrade::Trial { until, generation }) if self.alive() == Some(generation) => Some(until),
            _ => None,
        };
        let spare = match self.standby.stage {
            Stage::From(at) if self.wants_spare() => Some(at),
            _ => None,
        };
        probation.into_iter().chain(spare).min()
    }

    /// Beside whom there should be a spare: one that serves and is not about to be replaced.
    fn wants_spare(&self) -> bool {
        let settled = matches!(self.upgrade, None | Some(Upgrade::Trial { .. }));
        self.rules.standby && self.alive().is_some() && settled && !self.leaving
    }

    pub(super) fn time_beside(&mut self, now: Moment) {
        if let Some(Upgrade::Probation { until: Some(until), .. }) = self.upgrade
            && until <= now
        {
            self.complete_upgrade(now);
        }
        if let Some(Upgrade::Trial { until, .. }) = self.upgrade
            && until <= now
        {
            self.end_trial();
        }
        if let Stage::From(at) = self.standby.stage
            && at <= now
            && self.wants_spare()
        {
            self.make_spare();
        }
    }
}
