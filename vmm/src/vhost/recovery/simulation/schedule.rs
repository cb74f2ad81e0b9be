//! One schedule: the machine, a world, and whatever a seed lets happen to them; first chaos, then a world that is well
//! again, in which everything must come to an end.

use std::collections::VecDeque;
use std::time::Duration;

use super::super::{Action, End, Event, Failure, Machine, Rules, Sample, State, TakeBack, Tale};
use super::rng::Rng;
use super::world::{Life, Vices, World};
use crate::actor::Moment;
use crate::backend::{Ending, PolicyConfig};
use crate::config::OnFailure;
use crate::vhost::device::Recovery;

/// A mistake that the machine's surroundings make on purpose, or a decision of the machine that is not carried out: each
/// must be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mistake {
    /// No ring is called after a recovery.
    SkipCall,
    /// No ring is kicked after a recovery.
    SkipKick,
    /// A successor begins behind everything that is available.
    ReplayFromAvailable,
    /// A successor begins at the used index, and forgets what was under way.
    ReplayWithoutRecord,
    /// A successor goes on from the used index and does what is marked once more.
    ReplayTwice,
    /// Nobody waits for what the dead have under way.
    SkipFence,
    /// A process that was killed and has not ended counts as ended.
    SkipReap,
    /// A successor that lacks what the guest was shown is taken.
    SkipCompare,
    /// A reset leaves the record as it is.
    KeepRecord,
    /// The machine does not hear of a pause.
    SkipPause,
    /// Nobody tells the driver that its device is there.
    SkipActivation,
    /// A stand-in goes on after a successor has come.
    KeepStandIn,
    /// A queue that stands is not looked at.
    SkipLooks,
}

impl Mistake {
    pub(super) const ALL: [Self; 13] = [
        Self::SkipCall,
        Self::SkipKick,
        Self::ReplayFromAvailable,
        Self::ReplayWithoutRecord,
        Self::ReplayTwice,
        Self::SkipFence,
        Self::SkipReap,
        Self::SkipCompare,
        Self::KeepRecord,
        Self::SkipPause,
        Self::SkipActivation,
        Self::KeepStandIn,
        Self::SkipLooks,
    ];
}

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
}

fn rules(rng: &mut Rng) -> Rules {
    let on_failure = [OnFailure::Error, OnFailure::Wait, OnFailure::Unplug];
    let mut policy = PolicyConfig { intensity: 3, ..PolicyConfig::default() };
    policy.start_failures_max = rng.chance(2).then_some(2);
    Rules {
        policy,
        on_failure: on_failure.get(rng.below(3)).copied().unwrap_or_default(),
        fence: Duration::from_secs(10),
        stall: Some(Duration::from_secs(30)),
        debugged: false,
    }
}

/// Runs one schedule.
pub(super) fn run(seed: u64, mistake: Option<Mistake>) -> Outcome {
    let mut rng = Rng::new(seed);
    let (rules, full, queues) = (rules(&mut rng), !rng.chance(4), 1 + rng.below(2));
    let recovery = if full { Recovery::Full } else { Recovery::IdleOnly };
    let mut world = World::new(queues, full);
    world.bear(1, Life::Greeted, Vices::default());
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
            61 => self.leave_or_arrive(),
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
            self.world.reap();
        }
    }

    /// The device's thread sees that its backend has ended.
    fn notice(&mut self) {
        if let Some(generation) = self.machine.alive()
            && self.world.process(generation).is_none_or(|process| process.ended)
        {
            self.feed(Event::Lost { generation, why: String::new() });
        }
    }

    /// What is being started gets on, or fails.
    fn prepare(&mut self) {
        let fenced = self.world.late.is_empty() || self.is(Mistake::SkipFence) || !self.world.record;
        let starting = self.world.processes.iter_mut().find(|process| process.life == Life::Starting);
        let Some(process) = starting else { return };
        let generation = process.generation;
        if process.ended || process.vices.never_ready {
            (process.life, process.ended) = (Life::Gone, true);
            self.feed(Event::NotStarted { generation, failure: Failure::Passing(String::new()) });
        } else if fenced {
            if process.vices.lacks && self.mistake != Some(Mistake::SkipCompare) {
                (process.life, process.ended) = (Life::Gone, true);
                return self.feed(Event::NotStarted { generation, failure: Failure::Hopeless(String::new()) });
            }
            process.life = Life::Greeted;
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
                (process.life, process.ended) = (Life::Gone, true);
            }
            (self.leaving, self.gate_closed) = (false, false);
            self.feed(Event::Arrive);
        }
    }

    /// News that come late, of somebody who is not there any more.
    fn stale_news(&mut self) {
        let old = self.machine.generation().saturating_sub(1);
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
        let mut quiet = 0;
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
            if self.is_done() {
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
            _ => "the device does not run",
        };
        self.world.complain(about);
    }

    fn is_done(&self) -> bool {
        self.machine.state() == State::Running
            && self.world.all_reaped()
            && !self.activation_open
            && self.resets_open == 0
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
        }
    }

    /// Notes what a backend leaves that has ended.
    fn bury(&mut self, generation: u64) -> End {
        self.world.end(generation);
        let rings = &self.world.rings;
        self.seen = rings.iter().map(|ring| ring.available.len()).collect();
        let waiting = rings.iter().any(super::world::Ring::waiting);
        let progressed = rings.iter().zip(&self.used_at_start).any(|(ring, used)| ring.used.len() > *used);
        End { ending: Ending::Crash { idle: !waiting }, progressed, unfinished: waiting }
    }

    fn carry_out(&mut self, action: &Action, events: &mut VecDeque<Event>) {
        match *action {
            Action::Spawn { generation } => {
                let vices = self.vices();
                self.world.bear(generation, Life::Starting, vices);
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
            Action::Tell(_) | Action::ShowConfig | Action::NeedsReset | Action::AskUnplug => {}
        }
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

    fn take_back(&mut self, generation: u64, _why: TakeBack, events: &mut VecDeque<Event>) {
        let lost = Event::Lost { generation, why: String::new() };
        let Some(process) = self.world.process(generation) else { return events.push_back(lost) };
        if process.ended || process.vices.stuck || (self.chaos && self.rng.chance(8)) {
            return events.push_back(lost);
        }
        // It finishes what it can see, or what it has begun.
        while self.world.step(generation, &mut self.rng) {}
        if let Some(process) = self.world.process(generation) {
            process.has_rings = false;
        }
        events.push_back(Event::TakenBack { generation });
    }
}
