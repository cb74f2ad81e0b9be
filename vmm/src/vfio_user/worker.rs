//! The device's own thread: it asks the server what the guest asks, and carries out what the recovery machine decides
//! (`hands`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::device::{Access, Parts, Request, Shared};
use super::estranged::Estranged;
use super::greeting::Shape;
use super::hands::FenceWatch;
use super::next::{Preparation, Session};
use crate::actor::Moment;
use crate::irq::VectorTable;
use crate::vhost::recovery::{Event, Machine, Rules, State};
use crate::vhost::{DeviceState, Recovery};

/// How long a server may finish what is under way when its device ends.
const STOP_DRAIN: Duration = Duration::from_secs(1);
/// How long its process may take to end by itself then.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// What outlives a board.
pub(super) struct Past {
    /// What the guest is shown.
    pub(super) shown: Shape,
    pub(super) session: Option<Box<Session>>,
    /// One that was killed and has not ended yet.
    pub(super) dying: Option<Box<Session>>,
    /// One that was greeted and is to take over.
    pub(super) greeted: Option<Box<Session>>,
    pub(super) machine: Machine,
    /// The guest has seen that nobody answers. What it believes of the device since is not what a record says: it may have given up
    /// commands, and use their memory for something else. Whoever gets the device next begins as after power-on.
    pub(super) forsaken: bool,
}

impl Past {
    pub(super) fn new(session: Box<Session>, rules: Rules, recovery: Recovery) -> Self {
        let (shown, machine) = (session.shape.clone(), Machine::new(rules, recovery));
        Self { shown, session: Some(session), dying: None, greeted: None, machine, forsaken: false }
    }
    pub(super) fn sessions(&mut self) -> impl Iterator<Item = &mut Session> {
        let all = self.session.iter_mut().chain(&mut self.dying).chain(&mut self.greeted);
        all.map(|session| &mut **session)
    }
}

struct Leaving {
    deadline: Instant,
    answer: SyncSender<(Parts, Past)>,
}

pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) parts: Parts,
    pub(super) past: Past,
    pub(super) vectors: Arc<VectorTable>,
    /// What the guest waits for, in its order.
    pub(super) accesses: VecDeque<Access>,
    pub(super) nexts: Vec<Preparation>,
    pub(super) fence: Option<FenceWatch>,
    /// How far the device was when the present server got its memory.
    pub(super) completed_before: u64,
    /// Nobody answers: registers read as those of a device that is gone.
    pub(super) substituted: bool,
    /// Whether the guest's driver takes the device for what it is not any more.
    pub(super) estranged: Estranged,
    leaving: Option<Leaving>,
    /// How long a drain may take.
    pub(super) drain: Duration,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, parts: Parts, past: Past, vectors: Arc<VectorTable>) -> Self {
        Self {
            shared,
            drain: parts.limits.drain,
            estranged: Estranged::new(past.shown.identity.class),
            parts,
            past,
            vectors,
            accesses: VecDeque::new(),
            nexts: Vec::new(),
            fence: None,
            completed_before: 0,
            substituted: false,
            leaving: None,
        }
    }

    pub(super) fn run(mut self) {
        struct Closing(Arc<Shared>);
        impl Drop for Closing {
            fn drop(&mut self) {
                self.0.close();
            }
        }
        let _closing = Closing(Arc::clone(&self.shared));
        self.feed(Event::Arrive);
        // A guest may touch the device at any moment: it has its memory from the start.
        self.feed(Event::Activated);
        loop {
            self.wait();
            while let Some(request) = self.shared.next() {
                match request {
                    Request::Access(access) => self.accesses.push_back(access),
                    Request::Pause => {
                        if self.shared.gate.is_closed() {
                            self.drain = self.parts.limits.drain;
                            self.feed(Event::Pause);
                        }
                    }
                    Request::Resume { answer } => {
                        self.feed(Event::Resume);
                        let _ = answer.send(());
                    }
                    Request::Revive => self.feed(Event::Revive),
                    Request::Break => {
                        if let Some(session) = &self.past.session {
                            session.talk.hang_up();
                        }
                    }
                    Request::Leave { deadline, answer } => self.prepare_to_leave(deadline, answer),
                    Request::Stop { deadline } => return self.stop(deadline),
                }
            }
            self.look_after();
            self.answer();
            if let Some(answer) = self.may_leave() {
                // Nobody is there to take it: then it ends here.
                let _ = answer.send((self.parts, self.past));
                return;
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self) {
        let mut fds = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        let clock = &self.parts.clock;
        let mut nap: Option<Duration> = None;
        let mut no_longer_than = |time: Duration| nap = Some(nap.map_or(time, |nap: Duration| nap.min(time)));
        for session in self.past.session.iter().chain(&self.past.greeted) {
            fds.push(PollFd::from_borrowed_fd(session.talk.socket(), PollFlags::IN | PollFlags::RDHUP));
            if let Some(process) = &session.process {
                fds.push(PollFd::from_borrowed_fd(process.ended(), PollFlags::IN));
            }
        }
        if let Some(process) = self.past.dying.as_ref().and_then(|session| session.process.as_ref()) {
            fds.push(PollFd::from_borrowed_fd(process.ended(), PollFlags::IN));
        }
        let moments = [self.past.machine.due_at(), self.past.machine.look_at()];
        moments.into_iter().flatten().for_each(|moment| no_longer_than(clock.nap(moment)));
        if let Some(leaving) = &self.leaving {
            no_longer_than(leaving.deadline.saturating_duration_since(Instant::now()));
        }
        if let Some(fence) = &self.fence {
            no_longer_than(fence.nap());
        }
        let timeout = nap.map(|nap| {
            // Rounded up, so that waking up early does not become a spin.
            Timespec::try_from(nap + Duration::from_micros(100)).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
        });
        // An error (a signal) is a wake-up like any other.
        let _ = poll(&mut fds, timeout.as_ref());
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.shared.wake, &mut count);
    }

    pub(super) fn now(&self) -> Moment {
        self.parts.clock.now()
    }

    /// Deals with what has happened by itself.
    fn look_after(&mut self) {
        let why = match &mut self.past.session {
            Some(session) if session.has_ended() => Some("its process has ended".to_owned()),
            Some(session) => session.talk.hear().err().map(|error| error.to_string()),
            None => None,
        };
        if let Some(why) = why {
            self.lose(why);
        }
        self.look_at_the_dead();
        self.look_at_the_next();
        self.look_at_progress();
        if self.past.machine.due_at().is_some_and(|due| due <= self.now()) {
            self.feed(Event::Time);
        }
    }

    /// The server is to be taken for dead.
    pub(super) fn lose(&mut self, why: String) {
        if let Some(generation) = self.past.machine.alive() {
            self.feed(Event::Lost { generation, why });
        }
    }

    /// Asks the server what the guest waits for. Where none has the device, the guest waits on; one that was given up is not
    /// there.
    pub(super) fn answer(&mut self) {
        loop {
            if self.substituted {
                for access in self.accesses.drain(..) {
                    self.past.forsaken = true;
                    access.completion.complete(u64::MAX);
                }
                return;
            }
            let running = self.past.machine.state() == State::Running;
            let Some(session) = self.past.session.as_mut().filter(|session| running && session.has_memory) else {
                return;
            };
            let Some(access) = self.accesses.pop_front() else { return };
            if access.data.is_some() {
                self.estranged.written(access.region, access.offset, access.len);
            }
            let asked = match &access.data {
                Some(data) => session.talk.write(access.region, access.offset, data).map(|()| 0),
                None => {
                    let mut bytes = [0; 8];
                    let read = bytes.get_mut(..access.len).unwrap_or_default();
                    session.talk.read(access.region, access.offset, read).map(|()| u64::from_le_bytes(bytes))
                }
            };
            match asked {
                Ok(value) => {
                    let Access { region, offset, len, .. } = access;
                    access.completion.complete(self.estranged.read(region, offset, len, value));
                }
                // It lives, and does not want this: the guest reads what is not there.
                Err(super::TalkError::Refused { command, errno }) => {
                    tracing::debug!(device = self.shared.name, ?command, errno, "an access is refused");
                    access.completion.complete(u64::MAX);
                }
                Err(error) => {
                    // A process of ours takes it a second time as the first; somebody else's may not.
                    if self.parts.record.is_some() {
                        self.accesses.push_front(access);
                    } else {
                        access.completion.complete(u64::MAX);
                    }
                    self.lose(error.to_string());
                }
            }
        }
    }

    /// Drops what nobody waits for any more: the guest has gone on without an answer.
    pub(super) fn drop_the_unawaited(&mut self) {
        let before = self.accesses.len();
        self.accesses.retain(|access| access.completion.is_awaited());
        self.past.forsaken |= self.accesses.len() < before;
    }

    fn prepare_to_leave(&mut self, deadline: Instant, answer: SyncSender<(Parts, Past)>) {
        let now = Instant::now();
        self.accesses.clear();
        self.drain = self.parts.limits.drain.min(deadline.saturating_duration_since(now));
        self.feed(Event::Leave);
        self.leaving = Some(Leaving { deadline: deadline.min(now + self.parts.limits.fence), answer });
    }

    /// Whoever waits for this device, if it can go.
    fn may_leave(&mut self) -> Option<SyncSender<(Parts, Past)>> {
        let Leaving { deadline, .. } = self.leaving.as_ref()?;
        let cut = *deadline <= Instant::now() || self.shared.ending.load(Ordering::Relaxed);
        if !self.past.machine.may_leave() && !cut {
            return None;
        }
        // The next board's thread makes others.
        self.nexts.clear();
        self.leaving.take().map(|leaving| leaving.answer)
    }

    fn stop(mut self, deadline: Instant) {
        self.accesses.clear();
        let left = deadline.saturating_duration_since(Instant::now());
        self.drain = STOP_DRAIN.min(left.max(Duration::from_millis(100)));
        self.feed(Event::Stop);
        self.nexts.clear();
        let fenced = deadline.min(Instant::now() + STOP_DRAIN);
        while !self.past.machine.may_leave() && Instant::now() < fenced {
            std::thread::sleep(Duration::from_millis(1));
            self.look_at_the_dead();
        }
        if let Some(mut greeted) = self.past.greeted.take() {
            greeted.give_up(deadline);
        }
        if let Some(mut session) = self.past.session.take() {
            session.talk.hang_up();
            if let Some(process) = &mut session.process {
                let end = process.finish(deadline.min(Instant::now() + STOP_GRACE));
                tracing::debug!(device = self.shared.name, end, "server ended");
            }
        }
        self.shared.update(|status| (status.state, status.pid) = (DeviceState::Stopped, None));
    }
}
