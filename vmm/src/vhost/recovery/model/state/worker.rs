//! The device's worker in the model: it feeds the machine and carries out what that decides, one thing at a time.

use atoll_kit::course::{Beginning, Course};
use atoll_kit::inflight::Tracker;

use super::super::super::{Action, End, Event, Failure};
use super::super::Mistake;
use super::super::memory::{Part, Ring, SIZE, live};
use super::{Hand, Io, Known, Process, QUEUES, State};
use crate::backend::Ending;

impl State {
    fn feed(&mut self, event: Event) {
        let mut machine = (*self.known.machine).clone();
        self.todo.0 = machine.on(event, self.now);
        self.todo.0.reverse();
        self.known = Known::new(machine);
    }

    /// The worker takes the next thing to do.
    pub(super) fn work(&mut self, dies: Option<u32>, mistake: Option<Mistake>) -> Option<()> {
        if let Some((generation, at, continued)) = self.handing {
            return self.hand_over(generation, at, continued, dies, mistake);
        }
        if let Some(generation) = self.taking_back.take() {
            self.news.0.push(match &mut self.process {
                Some(process) if process.generation == generation && mistake == Some(Mistake::KeepRings) => {
                    Event::TakenBack { generation }
                }
                Some(process) if process.generation == generation => {
                    for (hand, queue) in process.hands.iter_mut().zip(&mut self.queues) {
                        if let Some(hand) = hand.take() {
                            queue.part = hand.course.into_record();
                        }
                    }
                    Event::TakenBack { generation }
                }
                _ => Event::Lost { generation, why: String::new() },
            });
            return Some(());
        }
        match self.todo.0.pop() {
            Some(action) => self.carry_out(action, mistake),
            None => {
                let event = self.news.0.remove(0);
                self.feed(event);
            }
        }
        Some(())
    }

    #[expect(clippy::needless_pass_by_value, reason = "an action is carried out once")]
    fn carry_out(&mut self, action: Action, mistake: Option<Mistake>) {
        match action {
            Action::Spawn { generation } => {
                if self.process.is_some() {
                    self.complain("two backends at a time");
                }
                let build = self.beside.build();
                self.process = Some(Process { generation, greeted: false, hands: [None, None], build, knows: true });
            }
            Action::Kill { generation } => {
                if self.process.as_ref().is_some_and(|process| process.generation == generation) {
                    self.bury();
                }
                self.dead = None;
                let queues = self.queues.iter().zip(&self.used_at_start);
                let progressed = queues.into_iter().any(|(queue, used)| queue.ring.used_index != *used);
                let waiting = self.queues.iter().any(|queue| !queue.ring.is_idle());
                let end = End { ending: Ending::Crash { idle: !waiting }, progressed, unfinished: waiting };
                self.news.0.push(Event::Ended { generation, end });
            }
            Action::WatchFence => self.watched = true,
            Action::Settled => self.watched = false,
            Action::HandOver { generation, continued } => self.handing = Some((generation, 0, continued)),
            Action::Kick { call } => {
                for queue in &mut self.queues {
                    queue.kick |= mistake != Some(Mistake::SkipKick);
                    queue.call |= call && mistake != Some(Mistake::SkipCall);
                }
            }
            Action::ClearRecord if mistake == Some(Mistake::KeepRecord) => {}
            Action::ClearRecord => {
                for at in 0..QUEUES {
                    match self.queues.get_mut(at).and_then(|queue| queue.part.as_mut()) {
                        Some(part) => *part = Part::default(),
                        None => self.complain("the record was cleared under a process"),
                    }
                }
            }
            Action::Employ | Action::Settle | Action::NeedsReset | Action::AskUnplug => {
                self.complain("a device that could be served was given up");
            }
            Action::TakeBack { generation, .. } => self.taking_back = Some(generation),
            Action::Dismiss => self.complain("there is no stand-in"),
            Action::SpawnBeside { .. }
            | Action::DropBeside { .. }
            | Action::Transfer { .. }
            | Action::Revert
            | Action::Promote { .. }
            | Action::Tell(_) => self.carry_out_beside(&action, mistake),
            Action::CompleteResets => self.begin_anew(),
            Action::ShowConfig | Action::CompleteActivation => {}
        }
    }

    /// The reset is done: the driver sets up its rings anew, and what was in flight is nobody's business any more.
    fn begin_anew(&mut self) {
        if self.late != 0 {
            self.complain("a reset was done before the fence");
        }
        if self.process.as_ref().is_some_and(|process| process.hands.iter().any(Option::is_some)) {
            self.complain("a reset was done while somebody had the rings");
        }
        for queue in &mut self.queues {
            (queue.ring, queue.next_used, queue.call) = (Ring::new(), 0, false);
            (queue.free, queue.out, queue.executed) = ((0..SIZE as u16).collect(), [false; SIZE], [false; SIZE]);
            queue.taken.clear();
        }
        self.resetting = false;
        self.news.0.push(Event::Activated);
    }

    /// One ring goes to the process, which begins, or goes on where the record says.
    fn hand_over(
        &mut self,
        generation: u64,
        at: usize,
        continued: bool,
        dies: Option<u32>,
        mistake: Option<Mistake>,
    ) -> Option<()> {
        if !self.process.as_ref().is_some_and(|process| process.generation == generation && process.greeted) {
            self.handing = None;
            let failure = Failure::Passing(String::new());
            self.news.0.push(Event::HandOverFailed { generation, failure });
            return Some(());
        }
        if self.late != 0 {
            self.complain("rings were handed over before the fence");
        }
        if !self.process.as_ref()?.knows {
            self.complain("a new build serves and does not know what the device knows");
        }
        let queue = self.queues.get_mut(at)?;
        let used = queue.ring.used_index;
        let base = match mistake {
            Some(Mistake::FromAvailable) if continued => queue.ring.avail_index,
            _ if continued => used,
            _ => 0,
        };
        let mut part = queue.part.take()?;
        if mistake == Some(Mistake::WithoutRecord) && continued {
            part = Part::default();
        }
        let beginning = Beginning { index: at as u16, size: SIZE as u16, base, used, event_idx: true, in_order: false };
        let forgets = match mistake {
            Some(Mistake::Forget(write)) => Some(write),
            _ => None,
        };
        let tracker = Tracker::new(part, at as u16, SIZE as u16);
        let begin = || Course::begin(&mut queue.ring, &beginning, Some(tracker));
        let (course, writes) = live(dies, forgets, begin);
        let Ok(course) = course else {
            self.complain("a successor cannot go on where the record says");
            return Some(());
        };
        if let Some(slot) = self.used_at_start.get_mut(at) {
            *slot = used;
        }
        *self.process.as_mut()?.hands.get_mut(at)? =
            Some(Hand { course, io: [Io::None; SIZE], awake: false, again: 0 });
        if let Some(died_after) = dies {
            return (died_after < writes).then(|| self.die());
        }
        self.handing = (at + 1 < QUEUES).then_some((generation, at + 1, continued));
        if self.handing.is_none() {
            self.news.0.push(Event::HandedOver { generation });
        }
        Some(())
    }
}
