//! How a backend is lost, by its own end or because it stands, and what its end is followed by.

use atoll_protocol::Generation;

use super::{Fence, Machine, Present, Rings, Trouble, Verdict};
use crate::actor::Moment;
use crate::config::OnFailure;
use crate::vhost::recovery::event::{Action, End, Tale};
use crate::vhost::recovery::stall::Sample;

impl Machine {
    /// Gives up a backend.
    pub(super) fn lose(&mut self, generation: u64, verdict: Verdict, why: String, now: Moment) {
        let Some(present) = self.present.as_mut().filter(|present| present.generation == generation) else { return };
        if present.dying.is_some() {
            return;
        }
        present.dying = Some(verdict);
        if self.is_on_probation(generation)
            && let Some(present) = &mut self.present
        {
            present.dying = Some(Verdict::RollBack(why.clone()));
        } else if !self.is_trying_a_build() {
            // One that is on its way may be what the device waits for.
            self.cancel_upgrade(&format!("the old one was lost meanwhile: {why}"), now);
        }
        self.lost += 1;
        self.stalls.end();
        if !self.is_quarantined() {
            self.trouble = Trouble::Recovering(why);
        }
        if self.rings == Rings::Out(generation) {
            self.fence = Fence::Pending(now.after(self.rules.fence));
            if let Some(driver) = &mut self.driver {
                driver.ran = true;
            }
        }
        self.act(Action::Kill { generation });
    }

    pub(super) fn ended(&mut self, generation: u64, end: &End, now: Moment) {
        let Some(Present { generation, dying: Some(verdict), .. }) =
            self.present.take_if(|present| present.generation == generation && present.dying.is_some())
        else {
            return;
        };
        if self.rings == Rings::Out(generation) {
            self.rings = Rings::Home;
            if let Some(driver) = &mut self.driver {
                driver.unfinished = end.unfinished;
            }
        }
        if matches!(verdict, Verdict::Replaced) {
            self.replaced(now);
            return if self.alive().is_none() {
                self.complete_activation();
            };
        }
        self.act(Action::Tell(Tale::Crashed { generation }));
        if self.fence != Fence::Clear {
            self.act(Action::WatchFence);
        } else {
            self.clear_up();
        }
        if end.progressed {
            self.policy.progress(Generation(generation));
        }
        match verdict {
            Verdict::GiveUp(_) | Verdict::Restart if self.take_over(now) => {}
            Verdict::GiveUp(why) => self.give_up(why, now),
            Verdict::RollBack(why) => self.roll_back(why, now),
            Verdict::Replaced | Verdict::Restart => {
                let decision = self.policy.exited(Generation(generation), &end.ending, now);
                self.follow(decision, now);
            }
        }
        // Nobody keeps a driver waiting for a process that is gone: what it asks for waits in its rings.
        if !self.is_quarantined() {
            self.complete_activation();
        }
    }

    /// None is to be had now.
    pub(super) fn await_one(&mut self, why: String) {
        if !matches!(self.trouble, Trouble::Waiting(_)) {
            self.act(Action::Tell(Tale::Waiting { why: why.clone() }));
        }
        self.trouble = Trouble::Waiting(why);
    }

    /// No restart helps.
    pub(super) fn give_up(&mut self, why: String, now: Moment) {
        if self.rules.on_failure == OnFailure::Wait {
            let decision = self.policy.hold(now);
            self.await_one(why);
            return self.follow(decision, now);
        }
        self.policy.give_up();
        (self.again_at, self.trouble) = (None, Trouble::Quarantined(why.clone()));
        self.drop_spare();
        self.act(Action::Tell(Tale::Quarantined { why }));
        // A driver that is resetting the device has heard enough.
        if self.driver.is_some() && !self.resets_owed {
            self.act(Action::NeedsReset);
        }
        if self.rules.on_failure == OnFailure::Unplug {
            self.act(Action::AskUnplug);
        }
        self.serve();
    }

    pub(super) fn sampled(&mut self, samples: &[Sample], spared: bool, now: Moment) {
        let Rings::Out(generation) = self.rings else { return };
        let (moved, waits, stands) = self.stalls.look(samples, now);
        if moved {
            self.stall_told = false;
            self.policy.progress(Generation(generation));
        }
        if let Some((queue, time)) = stands {
            let what = format!("queue {queue} has completed nothing for {} s with work in it", time.as_secs());
            self.stalled(generation, what, spared, now);
        } else if waits {
            // A kick may have been lost: it is given again before that costs a backend.
            self.act(Action::Kick { call: false });
        }
    }

    pub(super) fn stalled(&mut self, generation: u64, what: String, spared: bool, now: Moment) {
        if self.alive() != Some(generation) {
            return;
        }
        if spared || self.rules.debugged {
            if !std::mem::replace(&mut self.stall_told, true) {
                self.act(Action::Tell(Tale::Stalled { what }));
            }
            return;
        }
        self.lose(generation, Verdict::Restart, what, now);
    }
}
