//! Who may touch the driver's rings: the agreement between the device's thread and those who pause it.
//!
//! A pause must not wait for a thread that waits for a dead backend. So whether a backend has the rings is written down
//! here, and the thread asks here before it hands them over; a device without a live backend is paused by that alone.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

#[derive(Debug, Default)]
struct State {
    /// No backend may be given the rings.
    closed: bool,
    /// A live backend has them, or is being given them.
    out: bool,
    /// A dead backend had them, and nobody knows yet that its last writes are done.
    dying: bool,
}

/// How a wait for the rings ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closed {
    /// No backend touches them.
    Proven,
    /// No live backend touches them; whether the writes of a dead one are done could not be seen.
    Unproven,
    /// A live backend kept them. The gate is still closed: whoever gives the pause up opens it, and tells the thread, which
    /// may have heard of the pause and not of its end.
    Late,
}

#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let result = act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
        result
    }
    /// Takes the rings out, to give them to a backend; says no while the gate is closed.
    pub(crate) fn take_out(&self) -> bool {
        self.with(|state| {
            state.out = !state.closed;
            state.out
        })
    }
    /// The backend has given them back. Says whether somebody wants them to stay here.
    pub(crate) fn bring_back(&self) -> bool {
        self.with(|state| {
            state.out = false;
            state.closed
        })
    }
    /// The backend is gone with them.
    pub(crate) fn lost(&self) {
        self.with(|state| {
            state.dying |= state.out;
            state.out = false;
        });
    }
    /// The writes of all dead backends are done.
    pub(crate) fn settled(&self) {
        self.with(|state| state.dying = false);
    }
    /// Whether no backend may have the rings.
    pub(crate) fn is_closed(&self) -> bool {
        self.with(|state| state.closed)
    }
    /// Nobody may take the rings out any more. Says whether a live backend still has them.
    pub(crate) fn close(&self) -> bool {
        self.with(|state| {
            state.closed = true;
            state.out
        })
    }
    /// They may be taken out again. Says whether they might not before.
    pub(crate) fn open(&self) -> bool {
        self.with(|state| std::mem::take(&mut state.closed))
    }
    /// Waits until no dead backend can write any more; whether that is so by `deadline`.
    pub(crate) fn await_settled(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.dying {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
    /// Waits until the rings are back: until `deadline` for a live backend, until `fence` for the proof that a dead one's
    /// writes are done.
    pub(crate) fn await_closed(&self, deadline: Instant, fence: Instant) -> Closed {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let until = match (state.out, state.dying) {
                (false, false) => return Closed::Proven,
                (true, _) => deadline,
                (false, true) => fence.min(deadline),
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                if !state.out {
                    return Closed::Unproven;
                }
                return Closed::Late;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A dead backend keeps nobody waiting, a live one only until the deadline, and then it is for the one who waits to open.
    #[test]
    fn only_a_live_backend_can_be_late() {
        let gate = Gate::default();
        let soon = || Instant::now() + Duration::from_millis(20);
        assert!(!gate.close());
        assert_eq!(gate.await_closed(soon(), soon()), Closed::Proven);
        assert!(!gate.take_out() && gate.open() && gate.take_out());
        assert!(gate.close());
        assert_eq!(gate.await_closed(soon(), soon()), Closed::Late);
        assert!(gate.is_closed() && gate.open() && !gate.open());
        assert!(gate.close());
        gate.lost();
        assert_eq!(gate.await_closed(Instant::now() + Duration::from_secs(60), soon()), Closed::Unproven);
        gate.settled();
        assert_eq!(gate.await_closed(soon(), soon()), Closed::Proven);
        assert!(gate.bring_back(), "still closed");
    }
}
