//! One moment of a device: the recovery machine, the worker that carries its actions out, a process with its hands in the
//! rings, and the driver. And each step that any of them can take.

mod worker;

use std::collections::hash_map::DefaultHasher;
use std::fmt::{Debug, Write as _};
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use atoll_devices::virtio::notification;
use atoll_kit::course::Course;

use super::super::{Action, Event, Failure, Machine, Rules, State as Stage};
use super::beside::Beside;
use super::memory::{Part, Ring, SIZE, Write, live};
use super::{Device, Mistake};
use crate::actor::Moment;
use crate::backend::PolicyConfig;
use crate::config::OnFailure;
use crate::vhost::device::Recovery;

/// Queues of the device.
pub(super) const QUEUES: usize = 2;
/// Longer than any wait for a next try, shorter than what the fence is waited for.
const TRY_AGAIN_MAX: Duration = Duration::from_secs(5);
const FENCE: Duration = Duration::from_secs(1000);
/// Writes of the longest step.
pub(super) const WRITES_MAX: u32 = 10;

/// What has no hash of its own is known by how it looks.
#[derive(Clone, Debug)]
pub(super) struct Seen<T>(pub(super) T);

impl<T: Debug> Hash for Seen<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = write!(text, "{:?}", self.0);
        text.hash(state);
    }
}

/// The real machine, and what it hashes to: it changes seldom.
#[derive(Clone, Debug)]
pub(super) struct Known {
    machine: Arc<Machine>,
    digest: u64,
}

impl Known {
    fn new(machine: Machine) -> Self {
        let mut hasher = DefaultHasher::new();
        Seen(&machine).hash(&mut hasher);
        Self { machine: Arc::new(machine), digest: hasher.finish() }
    }
}

impl Hash for Known {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

/// What the storage does with a request of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Io {
    #[default]
    None,
    Submitted,
    Done,
}

/// A process' side of one queue.
#[derive(Clone, Debug, Hash)]
pub(super) struct Hand {
    course: Course<Part>,
    io: [Io; SIZE],
    awake: bool,
    /// Requests that it took again so far and that are still in flight.
    again: usize,
}

#[derive(Clone, Debug, Hash)]
pub(super) struct Process {
    pub(super) generation: u64,
    pub(super) greeted: bool,
    pub(super) hands: [Option<Hand>; QUEUES],
    /// Which build of the program it is of.
    pub(super) build: u8,
    /// What the driver has told the device beside its rings.
    pub(super) knows: bool,
}

/// One queue, as the driver knows it, and what lies in memory that outlives a process.
#[derive(Clone, Debug, Hash)]
pub(super) struct Queue {
    pub(super) ring: Ring,
    /// Here while no process has it.
    part: Option<Part>,
    kick: bool,
    pub(super) call: bool,
    /// Requests that the driver has not made yet.
    pub(super) to_come: u8,
    next_used: u16,
    free: Vec<u16>,
    out: [bool; SIZE],
    executed: [bool; SIZE],
    /// For the judge: heads that were marked as taken, in that order, and are not completed.
    taken: Vec<u16>,
}

#[derive(Clone, Debug, Hash)]
#[expect(clippy::derived_hash_with_manual_eq, reason = "states are the same when their hashes are: see digest()")]
pub(super) struct State {
    pub(super) known: Known,
    now: Moment,
    /// What the worker is to do, and what it is to tell the machine after that.
    todo: Seen<Vec<Action>>,
    news: Seen<Vec<Event>>,
    /// Rings are being handed to this one: the next queue, and whether they go on.
    handing: Option<(u64, usize, bool)>,
    /// Rings are being taken back from this one, which finishes what it has begun.
    taking_back: Option<u64>,
    /// The driver resets the device, and waits for it.
    resetting: bool,
    resets_left: u8,
    pub(super) queues: [Queue; QUEUES],
    pub(super) process: Option<Process>,
    pub(super) beside: Beside,
    /// It has ended, and nobody has noticed.
    pub(super) dead: Option<u64>,
    used_at_start: [u16; QUEUES],
    watched: bool,
    /// I/O of the dead that may still land: a bit for each queue and head.
    pub(super) late: u8,
    pub(super) deaths_left: u8,
    pub(super) complaint: Option<&'static str>,
}

/// As the checker tells states apart.
impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.digest() == other.digest()
    }
}

/// A step of somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The driver makes a request, and kicks if that is wanted.
    Issue(usize),
    /// The driver is interrupted and takes what is completed.
    Reap(usize),
    /// A queue's thread hears a kick.
    Wake(usize),
    /// It takes a request; or dies after so many writes of that.
    Take(usize, Option<u32>),
    /// The storage has done what a process asked for.
    Execute(usize, usize),
    /// The thread puts what is done into the used ring; or dies in the middle.
    Complete(usize, Option<u32>),
    /// It interrupts the driver if that is wanted.
    Announce(usize),
    /// It asks for a kick and sleeps.
    Sleep(usize),
    /// The process dies between two steps.
    Die,
    /// I/O of the dead ends: a bit.
    Land(u8),
    /// The worker goes on; the process may die while it takes over a ring.
    Work(Option<u32>),
    /// The worker notices a death.
    Notice,
    /// A successor is ready.
    Ready,
    /// The worker sees that nothing of the dead is under way.
    FenceFalls,
    /// Time passes until the machine tries again.
    Tick,
    /// One of those beside dies, its death is noticed, or it is ready.
    DieBeside(usize),
    NoticeBeside(usize),
    ReadyBeside(usize),
    /// The operator has a new build.
    Upgrade,
    /// The driver resets the device, in the middle of everything. It begins anew with what it has not asked for yet.
    Reset,
}

fn rules(standby: bool) -> Rules {
    let policy = PolicyConfig::default();
    let (on_failure, probation) = (OnFailure::Error, Duration::from_secs(1));
    Rules { policy, on_failure, fence: FENCE, stall: None, debugged: false, standby, probation, trial: Duration::ZERO }
}

impl State {
    /// A driver has just set up its rings.
    pub(super) fn new(device: &Device) -> Self {
        let queue = |to_come| Queue {
            ring: Ring::new(),
            part: Some(Part::default()),
            kick: false,
            call: false,
            to_come,
            next_used: 0,
            free: (0..SIZE as u16).collect(),
            out: [false; SIZE],
            executed: [false; SIZE],
            taken: Vec::new(),
        };
        Self {
            known: Known::new(Machine::new(rules(device.standby), Recovery::Full)),
            now: Moment::default(),
            todo: Seen(Vec::new()),
            news: Seen(vec![Event::Activated]),
            handing: None,
            taking_back: None,
            resetting: false,
            resets_left: device.resets,
            queues: device.requests.map(queue),
            process: Some(Process { generation: 1, greeted: true, hands: [None, None], build: 0, knows: true }),
            beside: Beside::new(device),
            dead: None,
            used_at_start: [0; QUEUES],
            watched: false,
            late: 0,
            deaths_left: device.deaths,
            complaint: None,
        }
    }

    pub(super) fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    pub(super) fn complain(&mut self, about: &'static str) {
        self.complaint.get_or_insert(about);
    }

    pub(super) fn machine(&self) -> &Machine {
        &self.known.machine
    }

    /// Everything that the driver wanted was done, and the device runs.
    pub(super) fn is_done(&self) -> bool {
        let answered = |queue: &Queue| queue.to_come == 0 && !queue.out.contains(&true);
        self.queues.iter().all(answered) && self.machine().state() == Stage::Running && self.is_done_beside()
    }

    fn worker_rests(&self) -> bool {
        self.todo.0.is_empty() && self.news.0.is_empty() && self.handing.is_none() && self.taking_back.is_none()
    }

    /// When the machine wants to try again; that the fence is given up belongs to no run.
    fn tries_again_at(&self) -> Option<Moment> {
        self.machine().due_at().filter(|due| due.since(self.now) < TRY_AGAIN_MAX)
    }

    /// What can happen now.
    pub(super) fn steps(&self, mistake: Option<Mistake>) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut add = |can: bool, step: Step| {
            if can {
                steps.push(step);
            }
        };
        let mortal = self.deaths_left > 0;
        for (at, queue) in self.queues.iter().enumerate() {
            add(!self.resetting && queue.to_come > 0 && !queue.free.is_empty(), Step::Issue(at));
            add(!self.resetting && queue.call, Step::Reap(at));
            let hand = self.process.as_ref().and_then(|process| process.hands.get(at)?.as_ref());
            let Some(hand) = hand else { continue };
            // Whoever is to give a ring back takes nothing more from it.
            let waiting = hand.course.waiting(&queue.ring) && self.taking_back.is_none();
            add(queue.kick && !hand.awake, Step::Wake(at));
            add(hand.awake && waiting, Step::Take(at, None));
            for (head, io) in hand.io.iter().enumerate() {
                add(*io == Io::Submitted, Step::Execute(at, head));
            }
            let done = hand.io.contains(&Io::Done);
            add(done, Step::Complete(at, None));
            add(hand.course.is_unannounced(), Step::Announce(at));
            let sleeps = !waiting && !hand.course.is_unannounced() && self.taking_back.is_none();
            add(hand.awake && sleeps, Step::Sleep(at));
            for writes in 1..WRITES_MAX {
                add(mortal && hand.awake && waiting, Step::Take(at, Some(writes)));
                add(mortal && done, Step::Complete(at, Some(writes)));
            }
        }
        add(mortal && self.process.is_some(), Step::Die);
        self.steps_beside(self.worker_rests(), &mut add);
        for bit in 0..(QUEUES * SIZE) as u8 {
            add(self.late & 1 << bit != 0, Step::Land(bit));
        }
        if !self.worker_rests() {
            add(self.taking_back.is_none() || self.has_drained(), Step::Work(None));
            for writes in 1..WRITES_MAX {
                add(mortal && self.handing.is_some() && self.process.is_some(), Step::Work(Some(writes)));
            }
            return steps;
        }
        let quiet = self.late == 0 || mistake == Some(Mistake::SkipFence);
        let starting = self.process.as_ref().is_some_and(|process| !process.greeted);
        add(self.dead.is_some(), Step::Notice);
        add(starting && quiet, Step::Ready);
        add(self.watched && quiet, Step::FenceFalls);
        add(self.tries_again_at().is_some(), Step::Tick);
        add(self.resets_left > 0 && !self.resetting, Step::Reset);
        steps
    }

    /// The process has nothing under way any more, or is gone.
    fn has_drained(&self) -> bool {
        let Some(process) = &self.process else { return true };
        let idle = |hand: &Hand| hand.io == [Io::None; SIZE] && !hand.course.is_unannounced();
        process.hands.iter().flatten().all(idle)
    }

    /// One step later; none when that step cannot be.
    pub(super) fn after(&self, step: Step, mistake: Option<Mistake>) -> Option<Self> {
        let mut next = self.clone();
        next.go(step, mistake)?;
        Some(next)
    }

    fn go(&mut self, step: Step, mistake: Option<Mistake>) -> Option<()> {
        let forgets = match mistake {
            Some(Mistake::Forget(write)) => Some(write),
            _ => None,
        };
        match step {
            Step::Issue(at) => self.issue(at)?,
            Step::Reap(at) => self.reap(at)?,
            Step::Wake(at) => {
                self.queues.get_mut(at)?.kick = false;
                self.hand(at)?.awake = true;
            }
            Step::Take(at, dies) => self.take(at, dies, forgets)?,
            Step::Execute(at, head) => {
                *self.hand(at)?.io.get_mut(head)? = Io::Done;
                *self.queues.get_mut(at)?.executed.get_mut(head)? = true;
            }
            Step::Complete(at, dies) => self.complete(at, dies, forgets)?,
            Step::Announce(at) => {
                let mut ring = self.queues.get(at)?.ring.clone();
                let wanted = live(None, None, || self.hand(at)?.course.notify(&mut ring).ok()).0?;
                self.queues.get_mut(at)?.call |= wanted;
            }
            Step::Sleep(at) => {
                let mut ring = self.queues.get(at)?.ring.clone();
                let more = live(None, None, || self.hand(at)?.course.arm(&mut ring).ok()).0?;
                self.queues.get_mut(at)?.ring = ring;
                self.hand(at)?.awake = more;
            }
            Step::Die => self.die(),
            Step::Land(bit) => self.late &= !(1 << bit),
            Step::Work(dies) => self.work(dies, mistake)?,
            Step::Notice => {
                let generation = self.dead?;
                let (machine, why) = (self.machine(), String::new());
                let event = if machine.alive() == Some(generation) {
                    Event::Lost { generation, why }
                } else {
                    self.dead = None;
                    Event::NotStarted { generation, failure: Failure::Passing(why) }
                };
                self.news.0.push(event);
            }
            Step::Ready => {
                let process = self.process.as_mut()?;
                process.greeted = true;
                let generation = process.generation;
                self.tell_greeted(generation);
            }
            Step::FenceFalls => {
                self.watched = false;
                self.news.0.push(Event::FencePassed);
            }
            Step::DieBeside(_) | Step::NoticeBeside(_) | Step::ReadyBeside(_) | Step::Upgrade => {
                self.go_beside(step)?;
            }
            Step::Reset => {
                (self.resetting, self.resets_left) = (true, self.resets_left - 1);
                self.news.0.push(Event::Reset);
            }
            Step::Tick => {
                self.now = self.tries_again_at()?.max(self.now);
                self.news.0.push(Event::Time);
            }
        }
        Some(())
    }

    /// The worker hears of something.
    pub(super) fn tell(&mut self, event: Event) {
        self.news.0.push(event);
    }

    pub(super) fn tell_greeted(&mut self, generation: u64) {
        self.tell(Event::Greeted { generation, recovery: Recovery::Full });
    }

    fn hand(&mut self, at: usize) -> Option<&mut Hand> {
        self.process.as_mut()?.hands.get_mut(at)?.as_mut()
    }

    fn issue(&mut self, at: usize) -> Option<()> {
        let queue = self.queues.get_mut(at)?;
        let head = queue.free.pop()?;
        queue.to_come -= 1;
        *queue.out.get_mut(usize::from(head))? = true;
        *queue.executed.get_mut(usize::from(head))? = false;
        let before = queue.ring.avail_index;
        queue.ring.make_available(head);
        queue.kick |= notification::is_to_be_woken(&queue.ring, before, queue.ring.avail_index).ok()?;
        Some(())
    }

    fn reap(&mut self, at: usize) -> Option<()> {
        let queue = self.queues.get_mut(at)?;
        queue.call = false;
        let mut complaint = None;
        loop {
            while queue.next_used != queue.ring.used_index {
                let head = queue.ring.completed(queue.next_used);
                queue.next_used = queue.next_used.wrapping_add(1);
                let out = queue.out.get_mut(usize::from(head))?;
                if !std::mem::take(out) {
                    complaint = Some("a request was completed twice");
                    break;
                }
                if !*queue.executed.get(usize::from(head))? {
                    complaint = Some("a request was completed and never executed");
                }
                queue.free.push(head);
            }
            if complaint.is_some() || !notification::ask_to_be_woken(&mut queue.ring, queue.next_used).ok()? {
                break;
            }
        }
        if let Some(complaint) = complaint {
            self.complain(complaint);
        }
        Some(())
    }

    fn take(&mut self, at: usize, dies: Option<u32>, forgets: Option<Write>) -> Option<()> {
        if self.late != 0 {
            self.complain("a request was taken before the fence");
        }
        let ring = self.queues.get(at)?.ring.clone();
        let (taken, writes) = live(dies, forgets, || self.hand(at)?.course.take(&ring).ok());
        if let Some(died_after) = dies {
            return (died_after < writes).then(|| self.die());
        }
        let Some(head) = taken? else {
            self.complain("a queue's thread takes what is not there");
            return Some(());
        };
        let (hand, queue) = (self.process.as_mut()?.hands.get_mut(at)?.as_mut()?, self.queues.get_mut(at)?);
        let io = hand.io.get_mut(usize::from(head))?;
        let twice = std::mem::replace(io, Io::Submitted) != Io::None;
        let mut in_order = true;
        if queue.taken.contains(&head) {
            in_order = queue.taken.get(hand.again) == Some(&head);
            hand.again += 1;
        } else {
            queue.taken.push(head);
        }
        if twice {
            self.complain("a request was taken twice by one process");
        }
        if !in_order {
            self.complain("requests were taken again in another order");
        }
        Some(())
    }

    fn complete(&mut self, at: usize, dies: Option<u32>, forgets: Option<Write>) -> Option<()> {
        let hand = self.hand(at)?;
        // The last one first: the order of a batch is the storage's.
        let heads = (0..).zip(hand.io).filter(|(_, io)| *io == Io::Done).map(|(head, _)| (head, 0));
        let mut done: Vec<(u16, u32)> = heads.collect();
        done.reverse();
        let mut ring = self.queues.get(at)?.ring.clone();
        let before = ring.used_index;
        let (completed, writes) =
            live(dies, forgets, || self.hand(at)?.course.complete_together(&mut ring, &done).ok());
        let queue = self.queues.get_mut(at)?;
        queue.ring = ring;
        let shown = queue.ring.used_index != before;
        let hand = self.process.as_mut()?.hands.get_mut(at)?.as_mut()?;
        for (head, _) in done.iter().filter(|_| shown) {
            if let Some(place) = queue.taken.iter().position(|taken| taken == head) {
                queue.taken.remove(place);
                hand.again -= usize::from(place < hand.again);
            }
        }
        if let Some(died_after) = dies {
            return (died_after < writes).then(|| self.die());
        }
        completed?;
        for (head, _) in done {
            *self.hand(at)?.io.get_mut(usize::from(head))? = Io::None;
        }
        Some(())
    }

    /// The process ends where it stands. What it has submitted goes on without it.
    fn die(&mut self) {
        self.deaths_left = self.deaths_left.saturating_sub(1);
        self.bury();
    }

    fn bury(&mut self) {
        let Some(process) = self.process.take() else { return };
        self.dead = Some(process.generation);
        for (at, (hand, queue)) in process.hands.into_iter().zip(&mut self.queues).enumerate() {
            let Some(hand) = hand else { continue };
            for (head, io) in hand.io.into_iter().enumerate() {
                self.late |= u8::from(io == Io::Submitted) << (at * SIZE + head);
            }
            queue.part = hand.course.into_record();
        }
    }
}
