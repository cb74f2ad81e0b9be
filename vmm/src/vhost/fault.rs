//! Faults as an interface: what a test does to a device of a running machine (`--allow-faults`).
//!
//! A fault is what the world may do by itself: a process dies or stands still, a signal is late or lost, a connection
//! breaks, a backend talks nonsense. How long and how often follows from a seed. Signals are late or lost in the doorbells'
//! and calls' interposed paths, so it is the same on both CPUs; when a fault is over, the path passes everything on.
//!
//! | fault | what the guest sees | what ends it |
//! |---|---|---|
//! | `kill`, `disconnect`, `garbage` | requests that take some milliseconds longer | a successor |
//! | `stop` | requests that take as long as the process stands | by itself; a successor after `stall_timeout` |
//! | `delay`, `slow` | slower requests | by itself |
//! | `drop-kick` | a request that nobody takes | its next kick; the VMM's own, which a ring that stands gets after two looks (a fifteenth of `stall_timeout` each: two to four seconds); a successor after `stall_timeout` |
//! | `drop-call` | a request that is done, and nobody says so | the next call, which a driver that hears of used buffers by index (EVENT_IDX) may never get; the next recovery, which calls every ring |

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::device::{DeviceState, SwitchError, VhostDevice};
use crate::doorbell::{DoorbellError, Interposer, Verdict};

/// What may happen to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT 50 to 550 ms later.
    Stop,
    /// The next 1 to 16 kicks and calls of each queue come 1 to 50 ms late.
    Delay,
    /// The next 1 to 4 kicks of each queue are lost.
    DropKick,
    /// The next 1 to 4 calls of each queue are lost.
    DropCall,
    /// The next 1000 kicks and calls of each queue come 1 to 5 ms late.
    Slow,
    /// The connection to the backend breaks.
    Disconnect,
    /// The backend says something that cannot be right.
    Garbage,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Kill,
        Self::Stop,
        Self::Delay,
        Self::DropKick,
        Self::DropCall,
        Self::Slow,
        Self::Disconnect,
        Self::Garbage,
    ];

    /// As the command line calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Delay => "delay",
            Self::DropKick => "drop-kick",
            Self::DropCall => "drop-call",
            Self::Slow => "slow",
            Self::Disconnect => "disconnect",
            Self::Garbage => "garbage",
        }
    }
}

impl FromStr for Fault {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|fault| fault.name() == text)
            .ok_or_else(|| format!("no such fault: name one of {}", names()))
    }
}

/// A fault could not be brought about.
#[derive(Debug, Error)]
pub enum FaultError {
    /// There is no process of ours.
    #[error("no process of this VMM serves the device now: disconnect works with any backend")]
    NoProcess,
    /// There is no conversation that could break.
    #[error("no backend serves the device now (it is {0}), so that nothing can break")]
    NoBackend(&'static str),
    /// The process could not be signalled.
    #[error("its process cannot be signalled: {0}")]
    Signal(#[from] rustix::io::Errno),
    /// No thread.
    #[error("no thread to end the fault again: {0}")]
    Thread(#[from] std::io::Error),
    /// A kick's way could not be changed.
    #[error(transparent)]
    Doorbell(#[from] DoorbellError),
    /// A call's way could not be changed.
    #[error(transparent)]
    Call(#[from] SwitchError),
    /// The device has been stopped.
    #[error("the device has been stopped")]
    Stopped,
}

/// A number below `bound` that follows from a seed (SplitMix64).
pub(super) fn roll(seed: u64, bound: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) % bound
}

/// Deals with the next signals in one way, and passes the others on.
struct Next {
    left: AtomicU64,
    verdict: Verdict,
}

impl Next {
    /// It passes everything on, until it is let loose.
    fn new(verdict: Verdict) -> Arc<Self> {
        Arc::new(Self { left: AtomicU64::new(0), verdict })
    }
    fn let_loose(&self, count: u64) {
        self.left.store(count, Ordering::Release);
    }
}

impl Interposer for Next {
    fn signalled(&self, _count: u64) -> Verdict {
        let taken = self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1));
        if taken.is_ok() { self.verdict } else { Verdict::Pass }
    }
}

/// Nonsense for the channel of a backend's own requests: a header of a version that does not exist, and noise.
pub(super) fn nonsense(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0xff; 12];
    bytes.extend((0..256).map(|at| roll(seed ^ at, 256) as u8));
    bytes
}

/// Brings about a fault.
///
/// # Errors
/// When the device is in no state for it.
pub(super) fn inject(device: &VhostDevice, fault: Fault, seed: u64) -> Result<(), FaultError> {
    tracing::warn!(fault = fault.name(), seed, "a fault is brought about, as was asked");
    let few = 1 + roll(seed, 4);
    let late = |ms| Verdict::Delay(Duration::from_millis(1 + roll(seed ^ 1, ms)));
    match fault {
        Fault::Kill => Ok(pidfd_send_signal(process(device)?, Signal::KILL)?),
        Fault::Stop => {
            let process = process(device)?;
            pidfd_send_signal(&process, Signal::STOP)?;
            let length = Duration::from_millis(50 + roll(seed, 500));
            let wakes = std::thread::Builder::new().name("fault".into()).spawn(move || {
                std::thread::sleep(length);
                // It fails when the process has been killed meanwhile.
                let _ = pidfd_send_signal(&process, Signal::CONT);
            });
            Ok(wakes.map(drop)?)
        }
        Fault::Delay => {
            kicks(device, 1 + roll(seed, 16), late(50)).and_then(|()| calls(device, 1 + roll(seed, 16), late(50)))
        }
        Fault::Slow => kicks(device, 1000, late(5)).and_then(|()| calls(device, 1000, late(5))),
        Fault::DropKick => kicks(device, few, Verdict::Drop),
        Fault::DropCall => calls(device, few, Verdict::Drop),
        Fault::Disconnect | Fault::Garbage => {
            let state = device.status().state;
            match state {
                DeviceState::Idle | DeviceState::Running | DeviceState::Stopped => {}
                away => return Err(FaultError::NoBackend(away.word())),
            }
            if device.break_conversation((fault == Fault::Garbage).then_some(seed)) {
                Ok(())
            } else {
                Err(FaultError::Stopped)
            }
        }
    }
}

fn process(device: &VhostDevice) -> Result<rustix::fd::OwnedFd, FaultError> {
    let pid = device.status().pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    Ok(pidfd_open(pid.ok_or(FaultError::NoProcess)?, PidfdFlags::empty())?)
}

fn kicks(device: &VhostDevice, count: u64, verdict: Verdict) -> Result<(), FaultError> {
    for bell in device.doorbells() {
        let next = Next::new(verdict);
        bell.interpose(Arc::clone(&next) as _)?;
        next.let_loose(count);
    }
    Ok(())
}

fn calls(device: &VhostDevice, count: u64, verdict: Verdict) -> Result<(), FaultError> {
    for queue in device.queues() {
        let next = Next::new(verdict);
        device.interpose_calls(queue.index, Some(Arc::clone(&next) as _))?;
        // Only now: a backend calls once when it is given another way to call, and that one is not the fault's.
        next.let_loose(count);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_numbers_repeat() {
        for fault in Fault::ALL {
            assert_eq!(fault.name().parse(), Ok(fault));
            assert_eq!(serde_json::to_value(fault).unwrap(), fault.name());
        }
        assert!("burn".parse::<Fault>().is_err_and(|error| error.contains("drop-kick")));
        assert_eq!(roll(7, 500), roll(7, 500));
    }

    #[test]
    fn a_fault_ends_by_itself() {
        let next = Next::new(Verdict::Drop);
        assert_eq!(next.signalled(1), Verdict::Pass);
        next.let_loose(2);
        let verdicts: Vec<Verdict> = (0..4).map(|_| next.signalled(1)).collect();
        assert_eq!(verdicts, [Verdict::Drop, Verdict::Drop, Verdict::Pass, Verdict::Pass]);
    }
}
