//! The thread that waits for the chips' next deadline while guest code runs.
//!
//! A halted vCPU waits for it by itself and disarms the thread, so an idle guest wakes one thread a tick, not two.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use atoll_devices::GuestClock;

use super::clock::SoftClock;

use crate::seccomp::{self, ThreadClass};

#[derive(Default)]
struct State {
    /// Guest time of the next deadline.
    armed: Option<u64>,
    /// What the thread waits for now; it need not be woken for anything later.
    waiting: Option<u64>,
    ended: bool,
}

/// State and condition that the thread and its users share.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread.
pub(super) struct DeadlineTimer {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl DeadlineTimer {
    /// Starts the thread; it calls `expire` at each deadline, which returns the next one.
    pub(super) fn start(
        clock: Arc<SoftClock>,
        expire: impl Fn() -> Option<u64> + Send + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("guest-timer".into()).spawn(move || {
                seccomp::enter(ThreadClass::Events);
                wait(&shared, &clock, expire);
            })?
        };
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// The next deadline is `deadline` now.
    pub(super) fn arm(&self, deadline: Option<u64>) {
        let mut state = self.shared.state();
        state.armed = deadline;
        let sooner = match (deadline, state.waiting) {
            (Some(deadline), Some(waiting)) => deadline < waiting,
            (Some(_), None) => true,
            (None, _) => false,
        };
        drop(state);
        if sooner {
            self.shared.changed.notify_one();
        }
    }
}

impl Drop for DeadlineTimer {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.shared.changed.notify_one();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

fn wait(shared: &Shared, clock: &SoftClock, expire: impl Fn() -> Option<u64>) {
    let mut state = shared.state();
    while !state.ended {
        state.waiting = state.armed;
        state = match state.armed {
            None => shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(deadline) => match deadline.checked_sub(clock.now_ns()).filter(|left| *left > 0) {
                Some(left) => {
                    let waited = shared.changed.wait_timeout(state, Duration::from_nanos(left));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    state.armed = None;
                    state.waiting = None;
                    // The chips have locks of their own: never hold both.
                    drop(state);
                    let next = expire();
                    let mut state = shared.state();
                    if state.armed.is_none() {
                        state.armed = next;
                    }
                    state
                }
            },
        };
    }
}
