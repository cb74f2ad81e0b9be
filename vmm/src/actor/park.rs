//! How an OS thread (a vCPU) waits for a future: parked, until the value, the deadline or its stop signal, whichever
//! comes first. No runtime is involved, so a busy one delays no guest.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use super::clock::{Clock, Moment};

/// Tells one thread to give up waiting: the machine ends, and the answer no longer matters.
///
/// A pause does not raise it. A paused vCPU must have no exit half done, so it waits for its answer or its deadline.
#[derive(Clone, Debug, Default)]
pub struct StopSignal(Arc<StopState>);

#[derive(Debug, Default)]
struct StopState {
    raised: AtomicBool,
    parked: Mutex<Option<Thread>>,
}

impl StopSignal {
    /// A lowered signal.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Raises it and wakes the thread that is parked on it.
    pub fn raise(&self) {
        self.0.raised.store(true, Ordering::SeqCst);
        if let Some(thread) = &*self.0.parked.lock().unwrap_or_else(PoisonError::into_inner) {
            thread.unpark();
        }
    }

    /// Lowers it, for the next run.
    pub fn lower(&self) {
        self.0.raised.store(false, Ordering::SeqCst);
    }

    /// Whether it is raised.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        self.0.raised.load(Ordering::SeqCst)
    }

    fn set_parked(&self, thread: Option<Thread>) {
        *self.0.parked.lock().unwrap_or_else(PoisonError::into_inner) = thread;
    }
}

/// How a wait ended.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub enum Parked<T> {
    /// With the value.
    Done(T),
    /// The deadline passed first.
    Late,
    /// The stop signal was raised first.
    Stopped,
}

/// Longer than any scheduler's delay on a busy host.
const OVERSLEPT: Duration = Duration::from_millis(200);

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

/// Parks this thread until `future` is done, `deadline` has come on `clock`, or `stop` is raised. A value that is
/// there counts even when the deadline has passed too. A signal is for one thread: two that park on the same one would
/// take each other's wake-up.
///
/// A future that is given up is dropped, which whoever would complete it can see. A thread that wakes long after the
/// deadline was stopped, and perhaps the whole VMM with it: it waits a little more, for answers that were stopped too.
pub fn park<F: Future>(future: F, clock: &dyn Clock, deadline: Moment, stop: &StopSignal) -> Parked<F::Output> {
    let mut future = pin!(future);
    let thread = std::thread::current();
    let waker = Waker::from(Arc::new(Unpark(thread.clone())));
    let mut context = Context::from_waker(&waker);
    stop.set_parked(Some(thread));
    let mut deadline = deadline;
    let mut forgiven = false;
    let ended = loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            break Parked::Done(value);
        }
        if stop.is_raised() {
            break Parked::Stopped;
        }
        if clock.now() >= deadline {
            break Parked::Late;
        }
        // Woken early, late or for no reason: the loop looks again.
        let nap = clock.nap(deadline);
        let asleep = Instant::now();
        std::thread::park_timeout(nap);
        if asleep.elapsed().saturating_sub(nap) > OVERSLEPT && !forgiven {
            forgiven = true;
            deadline = clock.now().after(OVERSLEPT);
        }
    };
    stop.set_parked(None);
    ended
}
