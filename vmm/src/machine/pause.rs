//! Pause and resume, as ordered steps with undo.
//!
//! Pausing: vCPUs stand between two instructions, with no exit half done, so transports have no intent under way either
//! (a vCPU waits for each); devices finish what is in flight and touch guest memory no more; interrupts that are on their
//! way arrive in the interrupt controllers. Resuming is the reverse. A step that is late is undone, with all steps before
//! it: the machine runs on as if nobody had asked.
//!
//! Guest time goes on while the machine stands: its clocks stay right against the host's, a timer that was due meanwhile
//! fires once at the resume, and a guest that uses the paravirtual clock is told that it stood, so that its watchdogs
//! forgive it. In deterministic mode time comes from executed instructions and stands still with them.

use std::time::{Duration, Instant};

use thiserror::Error;

use super::{LifeError, Machine};
use crate::metrics::{DeviceSnapshot, Snapshot};

/// How long each step may take.
#[derive(Clone, Copy, Debug)]
pub struct PauseLimits {
    /// All vCPUs stand. A vCPU may wait for a device's answer, which has a deadline of its own.
    pub vcpus: Duration,
    /// Each device has finished what was in flight.
    pub device: Duration,
    /// Interrupts have arrived.
    pub interrupts: Duration,
}

impl Default for PauseLimits {
    fn default() -> Self {
        let limit = Duration::from_secs(5);
        Self { vcpus: limit, device: limit, interrupts: limit }
    }
}

/// What a pause took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PauseFigures {
    /// From the wish until all vCPUs stood.
    pub vcpus: Duration,
    /// How long after all were asked each device had drained: its slowest request in flight, and the conversation about it.
    pub devices: Vec<(String, Duration)>,
    /// How long it took, when all devices had drained, until their interrupts had arrived.
    pub interrupts: Duration,
    /// The slowest request that was completed from the wish until all devices had drained, from taken to completed, as the
    /// device's process measured it, within a quarter. `None` when there was none, or nobody to measure it.
    pub slowest_request: Option<Duration>,
    /// All of it.
    pub whole: Duration,
}

/// Why the machine runs on, or stands still.
#[derive(Debug, Error)]
pub enum PauseError {
    /// A vCPU is still in the middle of an instruction.
    #[error("pause: vcpu{vcpu} did not stop within {} s, as it waits for a device; the machine runs on", .limit.as_secs_f64())]
    Vcpu {
        /// Which.
        vcpu: usize,
        /// How long it had.
        limit: Duration,
    },
    /// A device has not finished.
    #[error("pause: {device} did not drain within {} s ({source}); the machine runs on", .limit.as_secs_f64())]
    Device {
        /// Which.
        device: String,
        /// How long it had.
        limit: Duration,
        /// What it says.
        #[source]
        source: LifeError,
    },
    /// Interrupts are still on their way.
    #[error("pause: interrupts were not delivered within {} s; the machine runs on", .limit.as_secs_f64())]
    Interrupts {
        /// How long they had.
        limit: Duration,
    },
    /// A device does not go on.
    #[error("resume: {device} does not go on ({source}); reset the machine, or shut it down")]
    Resume {
        /// Which.
        device: String,
        /// What it says.
        #[source]
        source: LifeError,
    },
}

impl Machine {
    /// Makes a running machine stand.
    ///
    /// # Errors
    /// When a step is late; then the machine runs on.
    pub fn pause(&mut self, limits: PauseLimits) -> Result<PauseFigures, PauseError> {
        let before = self.figures().snapshot();
        let begin = Instant::now();
        let mut figures = PauseFigures::default();
        let paused = self.stand(limits).and_then(|()| {
            figures.vcpus = begin.elapsed();
            self.drain(limits, &mut figures.devices)?;
            let drained = Instant::now();
            let settled = self.settle_interrupts(limits);
            figures.interrupts = drained.elapsed();
            settled
        });
        figures.whole = begin.elapsed();
        figures.slowest_request = slowest_request(&before, &self.figures().snapshot());
        match paused {
            Ok(()) => {
                self.freeze_unplugs();
                Ok(figures)
            }
            Err(error) => {
                self.go();
                Err(error)
            }
        }
    }

    /// Lets a machine that stands go on.
    ///
    /// # Errors
    /// When a device does not: then its driver will not get an answer, and the others go on.
    pub fn resume(&mut self) -> Result<(), PauseError> {
        let mut failed = None;
        self.thaw_unplugs();
        for device in &mut self.devices {
            if let Err(source) = device.life.resume() {
                tracing::error!(device = device.name, error = %source, "a device does not go on after a pause");
                failed = failed.or(Some(PauseError::Resume { device: device.name.clone(), source }));
            }
        }
        self.go();
        failed.map_or(Ok(()), Err)
    }

    fn go(&self) {
        self.vcpus.iter().for_each(crate::cpu::VcpuThread::go);
    }

    fn stand(&self, limits: PauseLimits) -> Result<(), PauseError> {
        self.vcpus.iter().for_each(crate::cpu::VcpuThread::stand);
        let deadline = Instant::now() + limits.vcpus;
        match self.vcpus.iter().position(|vcpu| !vcpu.await_standing(deadline)) {
            None => Ok(()),
            Some(vcpu) => Err(PauseError::Vcpu { vcpu, limit: limits.vcpus }),
        }
    }

    /// All devices are asked, the last one first, and then waited for: they drain at the same time. When one is late, all
    /// go on.
    fn drain(&mut self, limits: PauseLimits, took: &mut Vec<(String, Duration)>) -> Result<(), PauseError> {
        let begin = Instant::now();
        self.devices.iter_mut().rev().for_each(|device| device.life.begin_pause());
        let mut failed = None;
        for device in self.devices.iter_mut().rev() {
            match device.life.pause(begin + limits.device) {
                Ok(()) => took.push((device.name.clone(), begin.elapsed())),
                Err(source) => {
                    failed = Some((device.name.clone(), source));
                    break;
                }
            }
        }
        let Some((device, source)) = failed else { return Ok(()) };
        undo(&mut self.devices);
        Err(PauseError::Device { device, limit: limits.device, source })
    }

    fn settle_interrupts(&mut self, limits: PauseLimits) -> Result<(), PauseError> {
        let deadline = Instant::now() + limits.interrupts;
        // First what still passes through the relay, then what that has made of it.
        if self.board.relay().flush(deadline) && self.board.processor().interrupts().flush(deadline) {
            return Ok(());
        }
        undo(&mut self.devices);
        Err(PauseError::Interrupts { limit: limits.interrupts })
    }
}

/// The slowest request that was completed between two looks at the figures.
fn slowest_request(before: &Snapshot, after: &Snapshot) -> Option<Duration> {
    let of = |device: &DeviceSnapshot| {
        let earlier = before.devices.iter().find(|earlier| earlier.id == device.id)?;
        device.total().latency.since(&earlier.total().latency).longest()
    };
    after.devices.iter().filter_map(of).max()
}

/// Lets devices go on that had been asked to drain.
fn undo(drained: &mut [super::BuiltDevice]) {
    for device in drained {
        if let Err(error) = device.life.resume() {
            tracing::error!(device = device.name, %error, "a device does not go on after a pause that was given up");
        }
    }
}
