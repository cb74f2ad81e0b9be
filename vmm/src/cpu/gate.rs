//! What a vCPU's thread is to do between two runs of guest code: run, stand, end, and small errands in between.
//!
//! A wish takes effect at the next instruction boundary: whoever sets one also kicks the vCPU. Standing is told back, so
//! that a pause knows when no exit is half done any more. Once the guest has asked for power-off or reset the gate is
//! shut for good: no later wish lets the vCPU execute another instruction.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{CpuError, Vcpu, VcpuFigures};

/// What whoever owns the machine wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Guest code runs.
    Run,
    /// The vCPU waits between two instructions.
    Stand,
    /// The thread ends.
    End,
}

/// What a vCPU's thread is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuPhase {
    /// It runs guest code, or waits for a device's answer.
    Running,
    /// It stands between two instructions.
    Standing,
    /// It has left the guest for good.
    Ended,
}

struct State {
    wish: Wish,
    /// The guest's own power-off or reset.
    shut: bool,
    phase: VcpuPhase,
    /// Non-maskable interrupts to send.
    nmi: bool,
    /// Somebody waits for newer figures.
    count: bool,
    figures: VcpuFigures,
}

/// Between a vCPU's thread and whoever owns the machine.
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// What the thread does next.
pub(super) enum Next {
    /// Guest code.
    Run,
    /// Nothing more.
    End,
}

impl Gate {
    /// An open gate.
    pub(super) fn new() -> Self {
        let state = State {
            wish: Wish::Run,
            shut: false,
            phase: VcpuPhase::Running,
            nmi: false,
            count: false,
            figures: VcpuFigures::default(),
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On the vCPU's thread, between two runs: does errands, waits while it is to stand.
    ///
    /// # Errors
    /// When the vCPU refuses an errand.
    pub(super) fn pass(&self, vcpu: &mut dyn Vcpu) -> Result<Next, CpuError> {
        let mut stood = false;
        let mut state = self.state();
        loop {
            if std::mem::take(&mut state.count) {
                state.figures = vcpu.figures();
                self.changed.notify_all();
            }
            match state.wish {
                Wish::End => return Ok(Next::End),
                Wish::Run if !state.shut => break,
                Wish::Run | Wish::Stand => {}
            }
            stood = true;
            if state.phase != VcpuPhase::Standing {
                state.phase = VcpuPhase::Standing;
                self.changed.notify_all();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.phase = VcpuPhase::Running;
        let nmi = std::mem::take(&mut state.nmi);
        drop(state);
        if stood {
            vcpu.stood()?;
        }
        if nmi {
            vcpu.nmi()?;
        }
        Ok(Next::Run)
    }

    /// On the vCPU's thread: it is over.
    pub(super) fn ended(&self, figures: VcpuFigures) {
        let mut state = self.state();
        state.phase = VcpuPhase::Ended;
        state.count = false;
        state.figures = figures;
        self.changed.notify_all();
    }

    /// Sets the wish; to be followed by a kick unless it is to run.
    pub(super) fn wish(&self, wish: Wish) {
        let mut state = self.state();
        // The end is final.
        if state.wish != Wish::End {
            state.wish = wish;
        }
        self.changed.notify_all();
    }

    /// The guest wants to execute nothing more; to be followed by a kick.
    pub(super) fn shut(&self) {
        self.state().shut = true;
    }

    /// Sends a non-maskable interrupt before the next instruction; to be followed by a kick.
    pub(super) fn nmi(&self) {
        self.state().nmi = true;
    }

    /// What the thread is at.
    pub(super) fn phase(&self) -> VcpuPhase {
        self.state().phase
    }

    /// Waits until the vCPU stands or has ended; whether it did by `deadline`.
    pub(super) fn await_standing(&self, deadline: Instant) -> bool {
        self.await_until(deadline, |state| state.phase != VcpuPhase::Running).1
    }

    /// Asks for figures; to be followed by a kick.
    pub(super) fn count(&self) {
        let mut state = self.state();
        state.count = state.phase != VcpuPhase::Ended;
        self.changed.notify_all();
    }

    /// The newest figures that are there by `deadline`.
    pub(super) fn figures(&self, deadline: Instant) -> VcpuFigures {
        self.await_until(deadline, |state| !state.count).0.figures
    }

    fn await_until(&self, deadline: Instant, is_so: impl Fn(&State) -> bool) -> (MutexGuard<'_, State>, bool) {
        let mut state = self.state();
        loop {
            if is_so(&state) {
                return (state, true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return (state, false);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
