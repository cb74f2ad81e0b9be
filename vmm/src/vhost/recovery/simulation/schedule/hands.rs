//! What the machine decides is done to the world here.

use std::collections::VecDeque;

use super::super::super::{Action, Build, End, Event, Failure, TakeBack, Tale};
use super::super::mistake::Mistake;
use super::super::world::{Life, Ring};
use super::Schedule;
use crate::backend::Ending;

impl Schedule {
    /// Notes what a backend leaves that has ended.
    pub(super) fn bury(&mut self, generation: u64) -> End {
        self.world.end(generation);
        if let Some(process) = self.world.process(generation) {
            process.leave();
        }
        let rings = &self.world.rings;
        self.seen = rings.iter().map(|ring| ring.available.len()).collect();
        let waiting = rings.iter().any(Ring::waiting);
        let progressed = rings.iter().zip(&self.used_at_start).any(|(ring, used)| ring.used.len() > *used);
        End { ending: Ending::Crash { idle: !waiting }, progressed, unfinished: waiting }
    }

    pub(super) fn carry_out(&mut self, action: &Action, events: &mut VecDeque<Event>) {
        match *action {
            Action::Spawn { generation } => {
                if self.build != self.told_build && !self.upgrading {
                    self.world.complain("another build was started than the operator was told of");
                }
                let vices = self.vices();
                self.world.bear(generation, Life::Starting, vices, self.build);
            }
            Action::SpawnBeside { generation, build } => {
                let vices = self.vices();
                let build = match build {
                    Build::Present => self.build,
                    Build::New => self.build + 1,
                };
                self.world.bear(generation, Life::Starting, vices, build);
                if let Some(process) = self.world.process(generation) {
                    process.beside = true;
                }
            }
            Action::Promote { generation } => self.promote(generation),
            Action::DropBeside { generation } => {
                if self.is(Mistake::KeepBeside) {
                    return;
                }
                if let Some(process) = self.world.process(generation) {
                    process.leave();
                }
            }
            Action::Transfer { from, to } => self.transfer(from, to, events),
            Action::Revert => {
                if !self.is(Mistake::SkipRevert) {
                    self.build = self.former_build;
                }
            }
            Action::Kill { generation } => {
                let lingers =
                    self.world.process(generation).is_some_and(|process| process.vices.lingers && !process.ended);
                if lingers {
                    if let Some(process) = self.world.process(generation) {
                        process.life = Life::Lingering;
                    }
                    if !self.is(Mistake::SkipReap) {
                        return;
                    }
                    let end = End { ending: Ending::Crash { idle: false }, progressed: false, unfinished: false };
                    return events.push_back(Event::Ended { generation, end });
                }
                let end = self.bury(generation);
                events.push_back(Event::Ended { generation, end });
            }
            Action::WatchFence => (self.watched, self.given_up_fence) = (true, false),
            Action::Settled => self.watched = false,
            Action::HandOver { generation, continued } => self.hand_over(generation, continued, events),
            Action::Kick { call } => {
                for ring in &mut self.world.rings {
                    ring.kicked |= self.mistake != Some(Mistake::SkipKick);
                    ring.called |= call && self.mistake != Some(Mistake::SkipCall);
                }
            }
            Action::TakeBack { generation, why } => self.take_back(generation, why, events),
            Action::Employ => {
                if self.gate_closed {
                    return events.push_back(Event::Withheld);
                }
                self.check_fence("a stand-in took the rings before the fence");
                if self.world.has_another_owner(None) {
                    self.world.complain("a stand-in took rings that a backend has");
                }
                self.stand_in = true;
                self.world.fail_outstanding(None);
                events.push_back(Event::Employed);
            }
            Action::Dismiss => self.stand_in = self.is(Mistake::KeepStandIn),
            Action::Settle => {
                self.check_fence("requests were failed before the fence");
                if self.rng.chance(8) && self.chaos {
                    return events.push_back(Event::Settled(Err(String::new())));
                }
                let seen = self.seen.clone();
                self.world.fail_outstanding(Some(&seen));
                events.push_back(Event::Settled(Ok(())));
            }
            Action::ClearRecord => {
                if !self.is(Mistake::KeepRecord) {
                    self.world.clear_record();
                }
            }
            Action::CompleteActivation => self.activation_open &= self.is(Mistake::SkipActivation),
            Action::CompleteResets => {
                self.check_fence("a reset was done before the fence");
                if self.world.has_another_owner(None) && !self.given_up_fence {
                    self.world.complain("a reset was done while somebody has the rings");
                }
                self.resets_open = 0;
            }
            Action::Tell(Tale::FenceGivenUp) => self.given_up_fence = true,
            Action::Tell(Tale::Quarantined { .. }) => self.quarantines += 1,
            Action::Tell(Tale::Upgraded { generation }) => {
                self.answer();
                self.upgrades += 1;
                let build = self.world.process(generation).map(|process| process.build);
                if build.is_none_or(|build| build == self.told_build) {
                    self.world.complain("an upgrade was said to be done and is not");
                }
                self.told_build = build.unwrap_or(self.told_build);
            }
            Action::Tell(Tale::UpgradeRefused { .. }) => {
                self.answer();
                self.refusals += 1;
                let (alive, told) = (self.machine.alive(), self.told_build);
                let serves = alive.and_then(|generation| self.world.process(generation));
                if serves.is_some_and(|process| process.build != told) {
                    self.world.complain("an upgrade was said to be refused and is done");
                }
            }
            // The operator hears that the build before serves again.
            Action::Tell(Tale::RolledBack { .. }) => {
                self.rolled_back += 1;
                self.told_build = self.former_build;
            }
            Action::Tell(_) | Action::ShowConfig | Action::NeedsReset | Action::AskUnplug => {}
        }
    }

    fn answer(&mut self) {
        if !self.upgrading {
            self.world.complain("an upgrade was answered twice");
        }
        self.upgrading = self.is(Mistake::SkipAnswer);
    }

    /// One is the device's backend from now on.
    fn promote(&mut self, generation: u64) {
        let Some(process) = self.world.process(generation) else {
            return self.world.complain("somebody was promoted who is not there");
        };
        let (build, life, beside) = (process.build, process.life, process.beside);
        if life == Life::Starting {
            self.world.complain("somebody was promoted who was not greeted");
        }
        self.takeovers += u64::from(beside && build == self.build);
        if build != self.build {
            self.former_build = self.build;
            if !self.is(Mistake::KeepBuild) {
                self.build = build;
            }
            if !self.upgrading {
                self.world.complain("another build serves than the operator was told of");
            }
        }
    }

    fn transfer(&mut self, from: u64, to: u64, events: &mut VecDeque<Event>) {
        if self.world.has_another_owner(None) {
            self.world.complain("what a device knows was moved while somebody has the rings");
        }
        let Some(knows) = self.world.process(from).filter(|process| !process.ended).map(|process| process.knows) else {
            return events.push_back(Event::Lost { generation: from, why: String::new() });
        };
        let skipped = self.is(Mistake::SkipTransfer);
        let taken = self.world.process(to).filter(|process| !process.ended && !process.vices.refuses_state);
        let Some(process) = taken else {
            return events.push_back(Event::NotTransferred { generation: to, why: String::new() });
        };
        if !skipped {
            process.knows = knows;
        }
        self.must_know = Some((to, knows));
        events.push_back(Event::Transferred { generation: to });
    }

    fn hand_over(&mut self, generation: u64, continued: bool, events: &mut VecDeque<Event>) {
        if self.gate_closed && !self.is(Mistake::SkipPause) {
            return events.push_back(Event::Withheld);
        }
        if self.gate_closed {
            self.world.complain("rings were handed out during a pause");
        }
        if self.leaving {
            self.world.complain("rings were handed out while the board goes");
        }
        self.check_fence("rings were handed over before the fence");
        if self.world.has_another_owner(Some(generation)) || self.stand_in {
            self.world.complain("two have the rings");
        }
        let Some(process) = self.world.process(generation) else {
            return self.world.complain("rings were handed to nobody");
        };
        let failed = |failure| Event::HandOverFailed { generation, failure };
        // Nobody has noticed that yet.
        if process.ended {
            return events.push_back(failed(Failure::Passing(String::new())));
        }
        if process.life != Life::Greeted {
            return self.world.complain("rings were handed to one that is not there");
        }
        let vices = process.vices;
        if vices.lacks {
            return self.world.complain("rings were handed to a backend that lacks what was shown");
        }
        let (knows, must_know) = (process.knows, self.must_know.take());
        if must_know.is_some_and(|(whose, word)| whose == generation && word != knows) {
            self.world.complain("a new build does not know what the old one knew");
        }
        self.hand_overs += 1;
        let (mistake, record) = (self.mistake, self.world.record);
        self.world.hand_over(generation, |ring| match mistake {
            _ if !continued => 0,
            _ if !record => ring.used.len(),
            Some(Mistake::ReplayFromAvailable) => ring.available.len(),
            Some(Mistake::ReplayWithoutRecord) => {
                ring.marks.clear();
                ring.used.len()
            }
            Some(Mistake::ReplayTwice) => {
                ring.repair();
                ring.used.len()
            }
            _ => ring.repair(),
        });
        self.used_at_start = self.world.rings.iter().map(|ring| ring.used.len()).collect();
        if vices.refuses_rings {
            return events.push_back(failed(Failure::Hopeless(String::new())));
        }
        if vices.dies_at_hand_over {
            // With what it has begun.
            for ring in &mut self.world.rings {
                ring.kicked = true;
            }
            for _ in 0..self.rng.below(6) {
                self.world.step(generation, &mut self.rng);
            }
            self.world.end(generation);
            return events.push_back(failed(Failure::Passing(String::new())));
        }
        events.push_back(Event::HandedOver { generation });
    }

    fn take_back(&mut self, generation: u64, why: TakeBack, events: &mut VecDeque<Event>) {
        let lost = Event::Lost { generation, why: String::new() };
        let Some(process) = self.world.process(generation) else { return events.push_back(lost) };
        if process.ended || process.vices.stuck || (self.chaos && self.rng.chance(8)) {
            return events.push_back(lost);
        }
        // It finishes what it can see, or what it has begun.
        while self.world.step(generation, &mut self.rng) {}
        if why == TakeBack::Upgrade && self.is(Mistake::KeepRings) {
            return events.push_back(Event::TakenBack { generation });
        }
        if let Some(process) = self.world.process(generation) {
            process.has_rings = false;
        }
        events.push_back(Event::TakenBack { generation });
    }
}
