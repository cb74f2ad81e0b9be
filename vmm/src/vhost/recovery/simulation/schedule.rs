//! One schedule: the machine, a world, and whatever a seed lets happen to them; first chaos, then a world that is well
//! again, in which everything must come to an end.

mod hands;

use std::collections::VecDeque;
use std::time::Duration;

use super::super::{Event, Failure, Machine, Rules, Sample, SpareState, State};
use super::mistake::Mistake;
use super::rng::Rng;
use super::world::{Life, Vices, World};
use crate::actor::Moment;
use crate::backend::PolicyConfig;
use crate::config::OnFailure;
use crate::vhost::device::Recovery;

/// Things that happen in the first half.
const CHAOS: usize = 400;
/// Rounds of the second half; a healthy world needs a few dozen.
const ROUNDS: usize = 2000;

/// What came of a schedule.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outcome {
    pub(super) complaint: Option<&'static str>,
    pub(super) completed: usize,
    pub(super) deaths: u64,
    pub(super) quarantines: u64,
    pub(super) hand_overs: u64,
    pub(super) upgrades: u64,
    pub(super) refusals: u64,
    pub(super) rolled_back: u64,
    pub(super) takeovers: u64,
}

impl Outcome {
    /// Adds what another one has counted.
    pub(super) fn add(&mut self, other: &Self) {
        self.completed += other.completed;
        self.deaths += other.deaths;
        self.quarantines += other.quarantines;
        self.hand_overs += other.hand_overs;
        self.upgrades += other.upgrades;
        self.refusals += other.refusals;
        self.rolled_back += other.rolled_back;
        self.takeovers += other.takeovers;
    }
}

struct Schedule {
    machine: Machine,
    world: World,
    rng: Rng,
    now: Duration,
    mistake: Option<Mistake>,
    chaos: bool,
    driver: bool,
    activation_open: bool,
    resets_open: u32,
    gate_closed: bool,
    leaving: bool,
    watched: bool,
    given_up_fence: bool,
    stand_in: bool,
    /// How far the rings were when the last backend died.
    seen: Vec<usize>,
    used_at_start: Vec<usize>,
    quarantines: u64,
    hand_overs: u64,
    /// The build that is started, the one before it, and the one that the operator was told of last.
    build: u32,
    former_build: u32,
    told_build: u32,
    /// An upgrade that was not answered.
    upgrading: bool,
    /// The incarnation that an upgrade has promoted, and what it must know.
    must_know: Option<(u64, u32)>,
    upgrades: u64,
    refusals: u64,
    rolled_back: u64,
    takeovers: u64,
}

fn rules(rng: &mut Rng) -> Rules {
    let on_failure = [OnFailure::Error, OnFailure::Wait, OnFailure::Unplug];
    let mut policy = PolicyConfig { intensity: 3, ..PolicyConfig::default() };
    policy.start_attempts = rng.chance(2).then_some(2);
    Rules {
        policy,
        on_failure: on_failure.get(rng.below(3)).copied().unwrap_or_default(),
        fence: Duration::from_secs(10),
        stall: Some(Duration::from_secs(30)),
        debugged: false,
        standby: rng.chance(2),
        probation: Duration::from_millis(200),
        trial: Duration::from_secs(1 << rng.below(8)),
    }
}

/// Runs one schedule.
pub(super) fn run(seed: u64, mistake: Option<Mistake>) -> Outcome {
    let mut rng = Rng::new(seed);
    let (rules, full, queues) = (rules(&mut rng), !rng.chance(4), 1 + rng.below(2));
    let recovery = if full { Recovery::Full } else { Recovery::IdleOnly };
    let mut world = World::new(queues, full);
    world.bear(1, Life::Greeted, Vices::default(), 0);
    world.clear_record();
    let mut schedule = Schedule {
        machine: Machine::new(rules, recovery),
        world,
        rng,
        now: Duration::ZERO,
        mistake,
        chaos: true,
        driver: false,
        activation_open: false,
        resets_open: 0,
        gate_closed: false,
        leaving: false,
        watched: false,
        given_up_fence: false,
        stand_in: false,
        seen: vec![0; queues],
        used_at_start: vec![0; queues],
        quarantines: 0,
        hand_overs: 0,
        build: 0,
        former_build: 0,
        told_build: 0,
        upgrading: false,
        must_know: None,
        upgrades: 0,
        refusals: 0,
        rolled_back: 0,
        takeovers: 0,
    };
    schedule.activate();
    for _ in 0..CHAOS {
        schedule.happen();
        if schedule.world.complaint.is_some() {
            return schedule.outcome();
        }
    }
    schedule.heal();
    schedule.outcome()
}

impl Schedule {
    fn outcome(&self) -> Outcome {
        Outcome {
            complaint: self.world.complaint,
            completed: self.world.fates.iter().filter(|fate| fate.reaped).count(),
            deaths: self.machine.lost(),
            quarantines: self.quarantines,
            hand_overs: self.hand_overs,
            upgrades: self.upgrades,
            refusals: self.refusals,
            rolled_back: self.rolled_back,
            takeovers: self.takeovers,
        }
    }

    fn moment(&self) -> Moment {
        Moment::from_start(self.now)
    }

    fn is(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    fn feed(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.machine.on(event, self.moment()) {
                self.carry_out(&action, &mut events);
            }
        }
    }

    /// One thing happens.
    fn happen(&mut self) {
        match self.rng.below(64) {
            0..=33 => {
                self.step();
                self.step();
            }
            34..=41 => self.guest(),
            42 | 43 => {
                // Death at any step.
                let alive: Vec<u64> = self.living();
                if let Some(generation) = alive.get(self.rng.below(alive.len())).copied() {
                    self.world.end(generation);
                }
            }
            44..=46 => self.notice(),
            47..=50 => self.prepare(),
            51 | 52 => self.world.land(&mut self.rng),
            53 | 54 => self.look_at_the_dead(),
            55 | 56 => {
                self.now += Duration::from_millis(1 << self.rng.below(16));
                self.time();
            }
            57 | 58 => {
                if self.gate_closed || self.rng.chance(3) {
                    self.pause_or_resume();
                }
            }
            59 => {
                if self.rng.chance(3) {
                    self.reset();
                }
            }
            60 => self.activate(),
            61 => {
                if self.rng.chance(2) {
                    self.leave_or_arrive();
                } else {
                    self.upgrade();
                }
            }
            62 => match self.machine.alive() {
                // A step that was late, or words that cannot be right.
                Some(generation) if self.rng.chance(4) => self.feed(Event::Lost { generation, why: String::new() }),
                Some(_) => {}
                None => self.feed(Event::Revive),
            },
            _ => self.stale_news(),
        }
    }

    fn living(&self) -> Vec<u64> {
        let living = self
            .world
            .processes
            .iter()
            .filter(|process| matches!(process.life, Life::Starting | Life::Greeted) && !process.ended);
        living.map(|process| process.generation).collect()
    }

    fn step(&mut self) -> bool {
        let owners: Vec<u64> =
            self.world.processes.iter().filter(|process| process.has_rings).map(|process| process.generation).collect();
        let mut moved = false;
        for generation in owners {
            moved |= self.world.step(generation, &mut self.rng);
        }
        if self.stand_in && self.world.rings.iter().any(super::world::Ring::waiting) {
            self.world.fail_outstanding(None);
            moved = true;
        }
        moved
    }

    fn guest(&mut self) {
        if self.driver && !self.gate_closed && self.resets_open == 0 && !self.leaving {
            for _ in 0..self.rng.below(if self.chaos { 4 } else { 1 }) {
                self.world.issue(&mut self.rng);
            }
            // It tells its backend something that is not in the rings.
            let word = self.rng.below(1000) as u32;
            let owner =
                self.world.processes.iter_mut().find(|process| process.has_rings && process.life == Life::Greeted);
            if let Some(owner) = owner {
                owner.knows = word;
            }
            self.world.reap();
        }
    }

    /// The device's thread sees that its backend has ended.
    fn notice(&mut self) {
        self.notice_beside();
        if let Some(generation) = self.machine.alive()
            && self.world.process(generation).is_none_or(|process| process.ended)
        {
            self.feed(Event::Lost { generation, why: String::new() });
        }
    }

    /// What is being started gets on, or fails.
    fn prepare(&mut self) {
        let fenced = self.world.late.is_empty() || self.is(Mistake::SkipFence) || !self.world.record;
        let starting: Vec<u64> = {
            let starting = self.world.processes.iter().filter(|process| process.life == Life::Starting);
            starting.map(|process| process.generation).collect()
        };
        let chosen = starting.get(self.rng.below(starting.len())).copied();
        let Some(process) = chosen.and_then(|generation| self.world.process(generation)) else { return };
        let generation = process.generation;
        if process.ended || process.vices.never_ready {
            process.leave();
            self.feed(Event::NotStarted { generation, failure: Failure::Passing(String::new()) });
        } else if fenced || process.beside {
            if process.vices.lacks && self.mistake != Some(Mistake::SkipCompare) {
                process.leave();
                return self.feed(Event::NotStarted { generation, failure: Failure::Hopeless(String::new()) });
            }
            process.life = Life::Greeted;
            process.has_rings |= process.beside && self.mistake == Some(Mistake::HastySpare);
            let recovery = if self.world.record { Recovery::Full } else { Recovery::IdleOnly };
            self.feed(Event::Greeted { generation, recovery });
        }
    }

    /// One that lingered ends; the fence falls.
    fn look_at_the_dead(&mut self) {
        let lingering = self.world.processes.iter().find(|process| process.life == Life::Lingering);
        if let Some(generation) = lingering.map(|process| process.generation)
            && self.rng.chance(2)
        {
            let end = self.bury(generation);
            self.feed(Event::Ended { generation, end });
        }
        if self.watched && (self.world.late.is_empty() || self.is(Mistake::SkipFence)) {
            self.watched = false;
            self.feed(Event::FencePassed);
        }
    }

    fn time(&mut self) {
        if self.machine.due_at().is_some_and(|due| due <= self.moment()) {
            self.feed(Event::Time);
        }
        if self.machine.look_at().is_some_and(|look| look <= self.moment()) && !self.is(Mistake::SkipLooks) {
            let samples = self.world.rings.iter().zip(0_u16..);
            let samples =
                samples.map(|(ring, queue)| Sample { queue, used: ring.used.len() as u16, waiting: ring.waiting() });
            let samples = samples.collect();
            self.feed(Event::Sampled { samples, spared: false });
        }
    }

    fn pause_or_resume(&mut self) {
        self.gate_closed = !self.gate_closed;
        if self.gate_closed {
            if !self.is(Mistake::SkipPause) {
                self.feed(Event::Pause);
            }
        } else {
            self.feed(Event::Resume);
        }
    }

    fn reset(&mut self) {
        if self.driver && !self.leaving {
            (self.driver, self.activation_open) = (false, false);
            self.resets_open += 1;
            self.feed(Event::Reset);
        }
    }

    fn activate(&mut self) {
        if !self.driver && !self.leaving && self.resets_open == 0 {
            self.world.new_epoch();
            (self.driver, self.activation_open) = (true, true);
            self.feed(Event::Activated);
        }
    }

    fn leave_or_arrive(&mut self) {
        if !self.leaving && self.rng.chance(8) {
            (self.leaving, self.driver, self.activation_open, self.resets_open) = (true, false, false, 0);
            self.feed(Event::Leave);
        }
        if self.leaving && self.machine.may_leave() {
            self.check_fence("a board left before the fence");
            // Its thread goes, and with it what it was preparing.
            for process in self.world.processes.iter_mut().filter(|process| process.life == Life::Starting) {
                process.leave();
            }
            (self.leaving, self.gate_closed) = (false, false);
            self.feed(Event::Arrive);
        }
    }

    /// The operator has a new build.
    fn upgrade(&mut self) {
        if !self.upgrading && !self.leaving {
            self.upgrading = true;
            self.feed(Event::Upgrade);
        }
    }

    /// One that waits beside has ended.
    fn notice_beside(&mut self) {
        let ended =
            |process: &&super::world::Process| process.beside && process.ended && process.life != Life::Starting;
        let ended: Vec<u64> = self.world.processes.iter().filter(ended).map(|process| process.generation).collect();
        for generation in ended {
            if self.machine.alive() != Some(generation) {
                if let Some(process) = self.world.process(generation) {
                    process.noticed = true;
                }
                self.feed(Event::Lost { generation, why: String::new() });
            }
        }
    }

    /// News that come late, of somebody who is not there any more.
    fn stale_news(&mut self) {
        let old = self.machine.generation().saturating_sub(1);
        if self.machine.wants(old) {
            return;
        }
        let why = String::new;
        let event = match self.rng.below(6) {
            0 => Event::Greeted { generation: old, recovery: Recovery::Full },
            1 => Event::HandedOver { generation: old },
            2 => Event::Lost { generation: old, why: why() },
            3 => Event::NotStarted { generation: old, failure: Failure::Hopeless(why()) },
            4 => Event::TakenBack { generation: old },
            _ => Event::Stalled { generation: old, what: why(), spared: false },
        };
        self.feed(event);
    }

    fn check_fence(&mut self, about: &'static str) {
        if !self.world.late.is_empty() && !self.given_up_fence {
            self.world.complain(about);
        }
    }

    /// The world is well again.
    fn heal(&mut self) {
        self.chaos = false;
        let (mut quiet, mut wishes) = (0, self.rng.below(2));
        for _ in 0..ROUNDS {
            if self.gate_closed {
                self.pause_or_resume();
            }
            if self.leaving {
                self.leave_or_arrive();
            }
            self.world.land(&mut self.rng);
            self.look_at_the_dead();
            self.notice();
            self.prepare();
            self.prepare();
            // A driver that waits in vain is reset in the end.
            if matches!(self.machine.state(), State::Quarantined { .. }) && !self.leaving {
                if self.driver { self.reset() } else { self.feed(Event::Revive) }
            }
            self.activate();
            let mut moved = false;
            while self.step() {
                moved = true;
            }
            self.guest();
            if self.world.complaint.is_some() {
                return;
            }
            if self.is_done() && wishes > 0 {
                wishes -= 1;
                self.upgrade();
            } else if self.is_done() {
                quiet += 1;
                if quiet > 2 {
                    return;
                }
            } else if !moved {
                let next = self.machine.due_at().into_iter().chain(self.machine.look_at()).min();
                if let Some(next) = next {
                    self.now = self.now.max(next.since(Moment::default()));
                }
                self.time();
            }
        }
        let about = match (self.world.all_reaped(), self.activation_open, self.resets_open) {
            (false, ..) => "a request was never completed",
            (_, true, _) => "a driver's activation never ended",
            (.., 1..) => "a driver's reset never ended",
            _ if self.upgrading => "an upgrade was never answered",
            _ if !self.has_its_spare() => "there is no spare, or more than one",
            _ => "the device does not run",
        };
        self.world.complain(about);
    }

    fn is_done(&self) -> bool {
        self.machine.state() == State::Running
            && self.world.all_reaped()
            && !self.activation_open
            && self.resets_open == 0
            && !self.upgrading
            && self.has_its_spare()
    }

    /// Nobody is left but who serves, and its spare.
    fn has_its_spare(&self) -> bool {
        match self.machine.spare() {
            SpareState::Off => self.world.running() == 1,
            SpareState::Coming => false,
            SpareState::Ready(_) => self.world.running() == 2,
        }
    }

    fn vices(&mut self) -> Vices {
        if !self.chaos {
            return Vices::default();
        }
        let mut odds = |odds| self.rng.chance(odds);
        Vices {
            never_ready: odds(6),
            lacks: odds(16),
            dies_at_hand_over: odds(8),
            refuses_rings: odds(24),
            stuck: odds(12),
            lingers: odds(8),
            refuses_state: odds(6),
        }
    }
}
