//! What waits for the thread that owns the machine: requests, each with a reply and a deadline, and events of the machine.
//!
//! Both queues are bounded. Events go first: a guest that has switched itself off is heard before an operator who wants
//! to resume it. A request that has not begun by its deadline is taken back by whoever asked, and never happens.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::{ErrorKind, VmError};
use super::keeper::Keeper;
use crate::machine::{EventSink, MachineEvent};

/// Requests that wait at most; whoever asks beyond that hears that the machine is busy.
const REQUESTS_MAX: usize = 64;
/// Events that wait at most.
const EVENTS_MAX: usize = 256;

/// A request on its way.
pub(super) struct Job {
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
    dropped: u64,
    abandoned: bool,
    closed: bool,
}

/// Both queues.
#[derive(Default)]
pub(super) struct Mailbox {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

impl Mailbox {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next thing to do; at `alarm` at the latest.
    pub(super) fn next(&self, alarm: Option<Instant>) -> Mail {
        let mut waiting = self.waiting();
        loop {
            if let Some(event) = waiting.events.pop_front() {
                return Mail::Event(event);
            }
            if let Some(job) = waiting.requests.pop_front() {
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

    /// Requests that wait.
    pub(super) fn depth(&self) -> usize {
        self.waiting().requests.len()
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

    /// Has the owner carry out `act`, and waits for what comes of it for at most `limit`.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        what: &str,
        limit: Duration,
        act: impl FnOnce(&mut Keeper) -> Result<T, VmError> + Send + 'static,
    ) -> Result<T, VmError> {
        let gone = || VmError::new(ErrorKind::WrongState, format!("{what}: the machine monitor is ending"));
        let (reply, answer) = sync_channel(1);
        let claimed = Arc::new(AtomicBool::new(false));
        let act = move |keeper: &mut Keeper| {
            // Nobody listens any more to what took too long.
            let _ = reply.send(act(keeper));
        };
        let job = Job { claimed: Arc::clone(&claimed), act: Box::new(act) };
        let mut waiting = self.waiting();
        if waiting.closed {
            return Err(gone());
        }
        if waiting.requests.len() >= REQUESTS_MAX {
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
        let left = std::mem::take(&mut waiting.requests);
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
