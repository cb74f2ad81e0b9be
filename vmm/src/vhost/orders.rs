//! What the machine and its operator order of a running device: to stand still, to go on, to try again, to be served by
//! another program.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use super::device::VhostDevice;
use super::device_error::PauseError;
use super::gate::Closed;
use super::request::Request;
use super::upgrade::{self, UpgradeError, UpgradeOrder, UpgradeOutcome};

/// How long whoever resumes a device waits for it to have its rings.
const RESUME_TIME: Duration = Duration::from_secs(1);

impl VhostDevice {
    /// Begins what [`Self::pause`] waits for. [`Self::resume`] undoes it.
    pub fn begin_pause(&self) {
        if self.shared.gate.close() {
            // A thread that is not there any more is noticed by who waits.
            self.shared.send(Request::Pause);
        }
    }
    /// Takes the rings from the backend by `deadline`, when it has completed what it had begun; kicks pile up meanwhile.
    /// Never waits for a backend that is gone, only a while for the proof that its last writes are done.
    ///
    /// # Errors
    /// When a live backend keeps the rings for too long; then the device goes on.
    pub fn pause(&self, deadline: Instant) -> Result<(), PauseError> {
        let began = Instant::now();
        if self.shared.gate.close() && !self.shared.send(Request::Pause) {
            return Err(PauseError::Stopped);
        }
        let fence = began + deadline.saturating_duration_since(began) / 2;
        match self.shared.gate.await_closed(deadline, fence) {
            Closed::Proven => Ok(()),
            Closed::Unproven => {
                tracing::warn!(
                    device = self.shared.name,
                    "no successor shows that the dead backend's last writes are done; the pause goes on without that proof"
                );
                Ok(())
            }
            Closed::Late => {
                // The thread may still wait for the rings, and get a successor's instead: it must hear that nobody wants them
                // to stay here. There is nobody to wait for its answer.
                if self.shared.gate.open() {
                    let (answer, _) = sync_channel(1);
                    self.shared.send(Request::Resume { answer });
                }
                let in_flight = self.queues().iter().map(|queue| u32::from(queue.in_flight)).sum();
                Err(PauseError::Late { waited: began.elapsed(), in_flight })
            }
        }
    }
    /// Gives the rings back to the backend, or to the next one as soon as there is one. Nothing happens to a device that
    /// is not paused.
    ///
    /// # Errors
    /// When the backend says no.
    pub fn resume(&self) -> Result<(), PauseError> {
        if !self.shared.gate.open() {
            return Ok(());
        }
        let (answer, result) = sync_channel(1);
        if !self.shared.send(Request::Resume { answer }) {
            return Err(PauseError::Stopped);
        }
        match result.recv_timeout(RESUME_TIME) {
            Ok(result) => result,
            // The thread waits for a backend, and goes on by itself when there is one.
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => Err(PauseError::Stopped),
        }
    }
    /// Gives a device that was given up, or that waits, another chance at once.
    pub fn revive(&self) {
        self.shared.send(Request::Revive);
    }
    /// Begins to put a process of another program in the place of the present one, without the driver noticing: it is made
    /// ready beside it first. What comes is its generation once it has served for a while, or why the old one carries on.
    ///
    /// # Errors
    /// When the program cannot even be tried.
    pub fn begin_upgrade(&self, order: UpgradeOrder) -> Result<UpgradeOutcome, UpgradeError> {
        let unfit = |reason: String| UpgradeError::Program { exe: order.exe.clone(), reason };
        if !order.exe.is_absolute() {
            return Err(unfit("give the program's absolute path".into()));
        }
        let there = order.exe.metadata().map_err(|error| unfit(format!("it cannot be run ({error})")))?;
        if !there.is_file() {
            return Err(unfit(format!(
                "it is {}, and no program",
                if there.is_dir() { "a folder" } else { "no file" }
            )));
        }
        let (answer, outcome) = sync_channel(1);
        if !self.shared.send(Request::Upgrade { order, answer }) {
            return Err(UpgradeError::Stopped);
        }
        Ok(outcome)
    }
    /// [`VhostDevice::begin_upgrade`], and waits for what comes of it.
    ///
    /// # Errors
    /// All of [`UpgradeError`]; the old program carries on then.
    pub fn upgrade(&self, order: UpgradeOrder) -> Result<u64, UpgradeError> {
        upgrade::await_outcome(&self.begin_upgrade(order)?, upgrade::UPGRADE_MAX)
    }
}
