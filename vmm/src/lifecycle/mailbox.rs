//! What waits for the thread that owns the machine: requests, each with a reply and a deadline, events of the machine, and
//! devices that have been prepared for it.
//!
//! All queues are bounded. Events go first: a guest that has switched itself off is heard before an operator who wants
//! to resume it. A request that has not begun by its deadline is taken back by whoever asked, and never happens. Requests
//! are begun in their order, but for those that wait for a boot to end; others overtake them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::{ErrorKind, VmError};
use super::keeper::Keeper;
use super::preparing::Prepared;
use crate::actor::{ActorReport, Post as Posted, Roll};
use crate::machine::{EventSink, MachineEvent};

/// Requests that wait at most; whoever asks beyond that hears that the machine is busy.
const REQUESTS_MAX: usize = 64;
/// Events that wait at most.
const EVENTS_MAX: usize = 256;

/// What a request has to wait for before it is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waits {
    /// Nothing: it only looks, or it ends what is there.
    Never,
    /// The end of a boot that is under way: it wants the machine that comes of it.
    ForBoot,
    /// That, and the end of whatever was withdrawn before: it may want the same images and sockets.
    ForAll,
}

/// Where an answer goes; it may be given later than the request is begun. Dropping it says that the monitor ends.
pub(super) struct Answer<T>(SyncSender<Result<T, VmError>>);

impl<T> Answer<T> {
    /// Gives it. Nobody listens any more to what took too long.
    pub(super) fn give(self, result: Result<T, VmError>) {
        let _ = self.0.send(result);
    }
}

/// A request on its way.
pub(super) struct Job {
    waits: Waits,
    /// Set by whoever is first: the thread that begins it, or the one who gives it up.
    claimed: Arc<AtomicBool>,
    act: Box<dyn FnOnce(&mut Keeper) + Send>,
}

/// An event, and which life of the machine it belongs to; none for what concerns the process.
pub(super) struct Event {
    pub(super) life: Option<u64>,
    pub(super) what: MachineEvent,
}

/// The next thing to do.
pub(super) enum Mail {
    /// It happened.
    Event(Event),
    /// Carried out by [`Job::begin`].
    Request(Job),
    /// What was prepared is ready, or cannot be had.
    Prepared(Prepared),
    /// The time that was waited for has come.
    Time,
    /// Nobody holds a handle any more.
    Abandoned,
}

impl Job {
    /// Carries it out, unless whoever asked has given up.
    pub(super) fn begin(self, keeper: &mut Keeper) {
        if !self.claimed.swap(true, Ordering::AcqRel) {
            (self.act)(keeper);
        }
    }
}

#[derive(Default)]
struct Waiting {
    requests: VecDeque<Job>,
    events: VecDeque<Event>,
    /// No more than there are preparations, which the owner bounds.
    prepared: VecDeque<Prepared>,
    dropped: u64,
    /// Requests that found no room.
    full: u64,
    abandoned: bool,
    closed: bool,
}

/// All queues.
#[derive(Default)]
pub(super) struct Mailbox {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

impl Posted for Mailbox {
    fn report(&self) -> ActorReport {
        let waiting = self.waiting();
        ActorReport {
            name: "machine".into(),
            waiting: waiting.requests.len() + waiting.events.len() + waiting.prepared.len(),
            capacity: REQUESTS_MAX + EVENTS_MAX,
            full: waiting.full + waiting.dropped,
            generation: 1,
            state: if waiting.closed { "ended" } else { "running" }.into(),
        }
    }
}

impl Mailbox {
    /// On the roll.
    pub(super) fn new(roll: &Roll) -> Arc<Self> {
        roll.post(Self::default())
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next thing to do; at `alarm` at the latest. Requests stay where they are whose wait is one of `held`.
    pub(super) fn next(&self, alarm: Option<Instant>, held: &[Waits]) -> Mail {
        let mut waiting = self.waiting();
        loop {
            if let Some(event) = waiting.events.pop_front() {
                return Mail::Event(event);
            }
            if let Some(prepared) = waiting.prepared.pop_front() {
                return Mail::Prepared(prepared);
            }
            let first = waiting.requests.iter().position(|job| !held.contains(&job.waits));
            if let Some(job) = first.and_then(|first| waiting.requests.remove(first)) {
                return Mail::Request(job);
            }
            if waiting.abandoned {
                return Mail::Abandoned;
            }
            waiting = match alarm {
                None => self.arrived.wait(waiting).unwrap_or_else(PoisonError::into_inner),
                Some(alarm) => {
                    let left = alarm.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Mail::Time;
                    }
                    self.arrived.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// An event. One that finds no room is dropped: whoever floods the machine's owner is not waited for. What ends the
    /// machine always finds room.
    pub(super) fn tell(&self, event: Event) {
        let mut waiting = self.waiting();
        let must = !matches!(event.what, MachineEvent::Stalled(_));
        if waiting.closed || (waiting.events.len() >= EVENTS_MAX && !must) {
            waiting.dropped += 1;
            let dropped = waiting.dropped;
            drop(waiting);
            if dropped.is_power_of_two() {
                tracing::debug!(dropped, "events of the machine were dropped");
            }
            return;
        }
        waiting.events.push_back(event);
        drop(waiting);
        self.arrived.notify_one();
    }

    /// What was prepared. When nobody reads any more it is dropped here, on the thread that has prepared it.
    pub(super) fn deliver(&self, prepared: Prepared) {
        let mut waiting = self.waiting();
        if waiting.closed {
            drop(waiting);
            drop(prepared);
            return;
        }
        waiting.prepared.push_back(prepared);
        drop(waiting);
        self.arrived.notify_one();
    }

    /// Has the owner carry out `act`, and waits for what comes of it for at most `limit`.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        what: &str,
        waits: Waits,
        limit: Duration,
        act: impl FnOnce(&mut Keeper) -> Result<T, VmError> + Send + 'static,
    ) -> Result<T, VmError> {
        self.ask_for(what, waits, limit, move |keeper, answer: Answer<T>| answer.give(act(keeper)))
    }

    /// Has the owner begin something whose answer may come later, and waits for that for at most `limit`.
    pub(super) fn ask_for<T: Send + 'static>(
        &self,
        what: &str,
        waits: Waits,
        limit: Duration,
        begin: impl FnOnce(&mut Keeper, Answer<T>) + Send + 'static,
    ) -> Result<T, VmError> {
        let gone = || VmError::new(ErrorKind::WrongState, format!("{what}: the machine monitor is ending"));
        let (reply, answer) = sync_channel(1);
        let claimed = Arc::new(AtomicBool::new(false));
        let act = move |keeper: &mut Keeper| begin(keeper, Answer(reply));
        let job = Job { waits, claimed: Arc::clone(&claimed), act: Box::new(act) };
        let mut waiting = self.waiting();
        if waiting.closed {
            return Err(gone());
        }
        if waiting.requests.len() >= REQUESTS_MAX {
            waiting.full += 1;
            let text = format!("{what}: {REQUESTS_MAX} requests wait already; ask again when some are done");
            return Err(VmError::new(ErrorKind::Late, text));
        }
        waiting.requests.push_back(job);
        drop(waiting);
        self.arrived.notify_one();
        match answer.recv_timeout(limit) {
            Ok(result) => result,
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
            Err(RecvTimeoutError::Timeout) => {
                let seconds = limit.as_secs_f32();
                let text = if claimed.swap(true, Ordering::AcqRel) {
                    // It may have ended at the last moment.
                    if let Ok(result) = answer.try_recv() {
                        return result;
                    }
                    format!(
                        "{what} has not ended within {seconds} s and goes on; look at its state before asking again"
                    )
                } else {
                    format!(
                        "{what} could not begin within {seconds} s, as other requests take long; nothing was changed"
                    )
                };
                Err(VmError::new(ErrorKind::Late, text))
            }
        }
    }

    /// Nobody holds a handle any more.
    pub(super) fn abandon(&self) {
        self.waiting().abandoned = true;
        self.arrived.notify_one();
    }

    /// Nobody reads any more: whoever waits hears of it.
    pub(super) fn close(&self) {
        let mut waiting = self.waiting();
        waiting.closed = true;
        let left = (std::mem::take(&mut waiting.requests), std::mem::take(&mut waiting.prepared));
        waiting.events.clear();
        drop(waiting);
        drop(left);
    }
}

/// Where one life of the machine, or the process, tells its events.
pub(super) struct Post {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) life: Option<u64>,
}

impl EventSink for Post {
    fn happened(&self, event: MachineEvent) {
        self.mailbox.tell(Event { life: self.life, what: event });
    }
}
