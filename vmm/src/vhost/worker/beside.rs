//! Processes beside the one that serves: started, told what can be told before there are rings, watched, promoted, let go.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::next::Make;
use super::{Event, Failure, Preparation, Session, Worker};
use crate::vhost::device_state;
use crate::vhost::recovery::Build;
use crate::vhost::session::Preface;
use crate::vhost::source::Start;
use crate::vhost::upgrade::{UpgradeError, UpgradeOrder};

/// A greeted incarnation that is not the device's backend yet.
pub(super) struct Greeted {
    pub(super) generation: u64,
    pub(super) session: Box<Session>,
    /// What it shows as its configuration space.
    pub(super) config: Vec<u8>,
    /// It is made of another program than its predecessors.
    build: Option<PathBuf>,
    /// It was started beside another one.
    beside: bool,
}

impl Greeted {
    pub(super) fn new(generation: u64, session: Box<Session>, config: Vec<u8>, start: Start) -> Self {
        let beside = start != Start::Alone;
        let build = match start {
            Start::Beside { exe } => exe,
            Start::Alone => None,
        };
        Self { generation, session, config, build, beside }
    }
    /// What tells of its end.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = PollFd<'_>> {
        let socket = PollFd::new(self.session.conversation.socket(), PollFlags::IN | PollFlags::RDHUP);
        let process = self.session.process.as_ref();
        process.map(|process| PollFd::from_borrowed_fd(process.ended(), PollFlags::IN)).into_iter().chain([socket])
    }
}

/// An upgrade under way.
pub(super) struct Upgrade {
    order: UpgradeOrder,
    answer: SyncSender<Result<u64, UpgradeError>>,
    outcome: Option<Result<u64, UpgradeError>>,
}

/// How often it is looked whether a spare still answers its supervisor.
const SPARE_LOOK: Duration = Duration::from_secs(2);

impl Worker {
    /// The operator has a new build.
    pub(super) fn begin_upgrade(&mut self, order: UpgradeOrder, answer: SyncSender<Result<u64, UpgradeError>>) {
        let refusal = if self.past.upgrade.is_some() {
            Some(UpgradeError::Busy)
        } else {
            self.parts.makers.build.as_ref().err().map(|lone| UpgradeError::Lone(*lone))
        };
        if let Some(error) = refusal {
            let _ = answer.send(Err(error));
            return;
        }
        self.past.upgrade = Some(Upgrade { order, answer, outcome: None });
        self.feed(Event::Upgrade);
    }

    /// What became of it is known; the operator hears of it when everything has been done that follows.
    pub(super) fn conclude_upgrade(&mut self, outcome: Result<u64, UpgradeError>) {
        if let Some(upgrade) = &mut self.past.upgrade {
            upgrade.outcome = Some(outcome);
        }
    }

    /// The operator hears what became of it.
    pub(super) fn answer_upgrade(&mut self) {
        let concluded = self.past.upgrade.take_if(|upgrade| upgrade.outcome.is_some());
        if let Some(Upgrade { answer, outcome: Some(outcome), .. }) = concluded {
            if let Some(session) = &mut self.past.session {
                session.conversation.set_step_limit(self.parts.limits.step);
            }
            // He may have gone.
            let _ = answer.send(outcome);
        }
    }

    pub(super) fn spawn_beside(&mut self, generation: u64, build: Build, events: &mut VecDeque<Event>) {
        let exe = match (build, &self.past.upgrade) {
            (Build::New, Some(upgrade)) => Some(upgrade.order.exe.clone()),
            _ => None,
        };
        let make = Make { generation, start: Start::Beside { exe }, preface: self.preface() };
        match Preparation::begin(&self.parts.makers, make, &self.shared) {
            Ok(next) => self.nexts.push(next),
            Err(error) => {
                let failure = Failure::Passing(format!("no thread to make it ready on ({error}); raise ulimit -u"));
                events.push_back(Event::NotStarted { generation, failure });
            }
        }
    }

    /// Everything that can be said before there are rings: what the driver accepted, where its memory is, which requests
    /// are in flight.
    fn preface(&self) -> Option<Preface> {
        let session = self.past.session.as_ref().filter(|_| !self.parts.makers.is_shadowed())?;
        let features = self.driver.as_ref().map(|driver| driver.features & session.capabilities.features);
        let inflight = self.past.inflight.clone().filter(|_| features.is_some());
        Some(Preface { features, memory: self.parts.memory.clone(), inflight })
    }

    /// From now on it is the device's backend.
    pub(super) fn promote(&mut self, generation: u64, events: &mut VecDeque<Event>) {
        let Some(at) = self.past.greeted.iter().position(|greeted| greeted.generation == generation) else {
            let why = "it is gone".to_owned();
            return events.push_back(Event::Lost { generation, why });
        };
        let Greeted { mut session, config, build, beside, .. } = self.past.greeted.swap_remove(at);
        if let Some(build) = build {
            self.past.former = self.parts.makers.build.as_ref().ok().map(|builds| builds.set(build));
            if let Some(upgrade) = &mut self.past.upgrade {
                session.conversation.set_step_limit(upgrade.order.step);
            }
        }
        if beside && let Err(error) = self.replay_config(&mut session) {
            events.push_back(Event::Lost { generation, why: error.to_string() });
        }
        self.new_config = Some(config);
        self.past.session = Some(session);
        self.draw();
    }

    /// The new build has done for this device.
    pub(super) fn revert(&mut self) {
        if let (Some(former), Ok(builds)) = (self.past.former.take(), &self.parts.makers.build) {
            builds.set(former);
        }
    }

    /// Lets go of one that was started beside. Waits for nothing.
    pub(super) fn drop_beside(&mut self, generation: u64) {
        if let Some(at) = self.nexts.iter().position(|next| next.generation() == generation) {
            let mut next = self.nexts.swap_remove(at);
            next.cancel();
            self.cancelled.push(next);
        }
        self.past.greeted.retain_mut(|greeted| {
            let goes = greeted.generation == generation;
            if goes {
                greeted.session.give_up(Instant::now());
            }
            !goes
        });
    }

    /// Moves what the device knows beyond its rings. Both are there, and neither has rings.
    pub(super) fn transfer(&mut self, from: u64, to: u64, events: &mut VecDeque<Event>) {
        let limit = self.past.upgrade.as_ref().map_or(self.parts.limits.step, |upgrade| upgrade.order.step);
        let new = self.past.greeted.iter_mut().find(|greeted| greeted.generation == to);
        let (Some(old), Some(new)) = (&mut self.past.session, new) else {
            return events.push_back(Event::NotTransferred { generation: to, why: "it is gone".into() });
        };
        let state = match device_state::save(old, self.parts.limits.step) {
            Ok(Ok(state)) => state,
            Ok(Err(why)) => return events.push_back(Event::NotTransferred { generation: to, why }),
            Err(error) => return events.push_back(Event::Lost { generation: from, why: error.to_string() }),
        };
        new.session.conversation.set_step_limit(limit);
        let loaded = match &state {
            None => Ok(Ok(())),
            Some(state) => device_state::load(&mut new.session, state, limit),
        };
        events.push_back(match loaded {
            Ok(Ok(())) => Event::Transferred { generation: to },
            Ok(Err(why)) => Event::NotTransferred { generation: to, why },
            Err(error) => Event::NotTransferred { generation: to, why: error.to_string() },
        });
    }

    /// Whether those beside live, and whether cancelled ones have ended.
    pub(super) fn look_beside(&mut self) {
        self.cancelled.retain_mut(|next| !next.is_over());
        let mut lost = Vec::new();
        for greeted in &mut self.past.greeted {
            let session = &mut greeted.session;
            let stands = session.process.as_mut().and_then(|process| process.take_stall());
            let why = session.over().map(str::to_owned).or(stands);
            lost.extend(why.map(|why| (greeted.generation, why)));
        }
        for (generation, why) in lost {
            self.feed(Event::Lost { generation, why });
        }
    }

    /// How long the next look at a spare may wait.
    pub(super) fn spare_nap(&self) -> Option<Duration> {
        (!self.past.greeted.is_empty()).then_some(SPARE_LOOK)
    }

    /// The device's size has changed: a spare, if there is one, has looked at it before.
    pub(super) fn outdate_spare(&mut self) {
        self.feed(Event::Outdated);
    }
}
