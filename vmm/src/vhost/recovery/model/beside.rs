//! Processes beside the one that serves, in the model: a new build that is to replace it, the process of the old build that
//! covers an upgrade, and a spare. Each may die at any moment before it is promoted, and after that as any backend.

use super::super::{Action, Build, Event, Failure, SpareState, Tale};
use super::state::{Process, QUEUES, State, Step};
use super::{Device, Mistake};

/// One that has no rings.
#[derive(Clone, Debug, Hash)]
struct Waiting {
    process: Process,
    dead: bool,
}

/// All of them, and what is known of builds.
#[derive(Clone, Debug, Hash)]
pub(super) struct Beside {
    waiting: Vec<Waiting>,
    /// What is started, what was before the last one that was promoted, and what the operator was told of last.
    build: u8,
    former: u8,
    told: u8,
    /// The last one that was promoted, and its build.
    promoted: (u64, u8),
    upgrades_left: u8,
    /// The operator waits for a word.
    asked: bool,
    /// Whom what the device knows was moved to.
    moved: Option<u64>,
}

impl Beside {
    pub(super) fn new(device: &Device) -> Self {
        let upgrades_left = device.upgrades;
        let (promoted, asked, moved) = ((1, 0), false, None);
        Self { waiting: Vec::new(), build: 0, former: 0, told: 0, promoted, upgrades_left, asked, moved }
    }

    /// The build of a process that is started alone.
    pub(super) fn build(&self) -> u8 {
        self.build
    }
}

impl State {
    /// What those beside can do now.
    pub(super) fn steps_beside(&self, worker_rests: bool, add: &mut impl FnMut(bool, Step)) {
        for (at, waiting) in self.beside.waiting.iter().enumerate() {
            add(self.deaths_left > 0 && !waiting.dead, Step::DieBeside(at));
            add(worker_rests && waiting.dead, Step::NoticeBeside(at));
            add(worker_rests && !waiting.dead && !waiting.process.greeted, Step::ReadyBeside(at));
        }
        add(worker_rests && self.beside.upgrades_left > 0, Step::Upgrade);
    }

    pub(super) fn go_beside(&mut self, step: Step) -> Option<()> {
        match step {
            Step::DieBeside(at) => {
                self.beside.waiting.get_mut(at)?.dead = true;
                self.deaths_left -= 1;
            }
            Step::NoticeBeside(at) => {
                let Process { generation, greeted, .. } = self.beside.waiting.remove(at).process;
                let why = String::new();
                self.tell(if greeted {
                    Event::Lost { generation, why }
                } else {
                    Event::NotStarted { generation, failure: Failure::Passing(why) }
                });
            }
            Step::ReadyBeside(at) => {
                let process = &mut self.beside.waiting.get_mut(at)?.process;
                process.greeted = true;
                let generation = process.generation;
                self.tell_greeted(generation);
            }
            Step::Upgrade => {
                self.beside.upgrades_left -= 1;
                self.beside.asked = true;
                self.tell(Event::Upgrade);
            }
            _ => return None,
        }
        Some(())
    }

    pub(super) fn carry_out_beside(&mut self, action: &Action, mistake: Option<Mistake>) {
        match *action {
            Action::SpawnBeside { generation, build } => {
                // What the driver has told its device is told again to a process of the same build when it is promoted.
                let (build, knows) = match build {
                    Build::New => (self.beside.told + 1, false),
                    Build::Present => (self.beside.build, true),
                };
                let process = Process { generation, greeted: false, hands: [const { None }; QUEUES], build, knows };
                self.beside.waiting.push(Waiting { process, dead: false });
            }
            Action::DropBeside { .. } if mistake == Some(Mistake::KeepBeside) => {}
            Action::DropBeside { generation } => self.take_beside(generation),
            Action::Promote { generation } => self.promote(generation, mistake),
            Action::Transfer { from, to } => self.transfer(from, to, mistake),
            Action::Revert if mistake != Some(Mistake::SkipRevert) => self.beside.build = self.beside.former,
            Action::Tell(Tale::Upgraded { generation }) => {
                match self.beside.promoted {
                    (promoted, build) if promoted == generation && build != self.beside.told => {
                        self.beside.told = build;
                    }
                    _ => self.complain("an upgrade was said to be done and is not"),
                }
                self.answer(mistake);
            }
            Action::Tell(Tale::UpgradeRefused { .. }) => self.answer(mistake),
            _ => {}
        }
    }

    fn answer(&mut self, mistake: Option<Mistake>) {
        if !self.beside.asked {
            self.complain("the operator hears twice of an upgrade");
        }
        self.beside.asked = mistake == Some(Mistake::SkipAnswer);
    }

    fn take_beside(&mut self, generation: u64) {
        self.beside.waiting.retain(|waiting| waiting.process.generation != generation);
    }

    fn promote(&mut self, generation: u64, mistake: Option<Mistake>) {
        let at = self.beside.waiting.iter().position(|waiting| waiting.process.generation == generation);
        let Some(at) = at else {
            // One that was started alone is the device's backend already, or has died since.
            return;
        };
        if self.process.is_some() {
            self.complain("two backends at a time");
        }
        let Waiting { mut process, dead } = self.beside.waiting.remove(at);
        // One that follows the dead is told again what the driver has told its device.
        process.knows |= self.beside.moved != Some(generation);
        self.beside.promoted = (generation, process.build);
        if process.build != self.beside.build && mistake != Some(Mistake::KeepBuild) {
            (self.beside.former, self.beside.build) = (self.beside.build, process.build);
        }
        if dead {
            (self.process, self.dead) = (None, Some(generation));
        } else {
            self.process = Some(process);
        }
    }

    fn transfer(&mut self, from: u64, to: u64, mistake: Option<Mistake>) {
        let why = String::new();
        let Some(old) = self.process.as_ref().filter(|process| process.generation == from) else {
            return self.tell(Event::Lost { generation: from, why });
        };
        if old.hands.iter().any(Option::is_some) {
            self.complain("what the device knows was moved while its backend had the rings");
        }
        let new = self.beside.waiting.iter_mut().find(|waiting| waiting.process.generation == to && !waiting.dead);
        let event = match new {
            Some(new) => {
                self.beside.moved = Some(to);
                new.process.knows = mistake != Some(Mistake::SkipTransfer);
                Event::Transferred { generation: to }
            }
            None => Event::NotTransferred { generation: to, why },
        };
        self.tell(event);
    }

    /// Nobody is left over, the operator has heard, and what serves is what he was told of.
    pub(super) fn is_done_beside(&self) -> bool {
        let wanted = |waiting: &Waiting| self.machine().wants(waiting.process.generation) && !waiting.dead;
        let spare = !matches!(self.machine().spare(), SpareState::Coming);
        let built = self.process.as_ref().is_some_and(|process| process.build == self.beside.told);
        let nobody = self.machine().spare() != SpareState::Off || self.beside.waiting.is_empty();
        spare && built && nobody && self.beside.waiting.iter().all(wanted) && !self.beside.asked
    }
}
