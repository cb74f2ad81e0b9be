//! The thread that runs a vCPU, named `vcpu0`, `vcpu1`, … because people pin them by name.

use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

use super::gate::{Gate, Next, VcpuPhase, Wish};
use super::{CpuError, CpuState, Exit, Kick, Processor, Vcpu, VcpuBus, VcpuFigures};
use crate::actor::StopSignal;
use crate::seccomp::{self, ThreadClass};

/// How a vCPU ended.
#[derive(Clone, Debug)]
pub struct VcpuEnd {
    /// Its number.
    pub index: u32,
    /// Why.
    pub exit: Result<Exit, Arc<CpuError>>,
    /// What it has done.
    pub figures: VcpuFigures,
    /// Processor time of its thread in nanoseconds.
    pub busy_ns: u64,
}

/// A vCPU as other threads reach it.
#[derive(Clone)]
struct Reins {
    gate: Arc<Gate>,
    kick: Arc<dyn Kick>,
    thread: Pid,
}

/// The vCPUs of a machine, as whoever must stop them at once reaches them. Each is on the list before it runs its first
/// instruction.
#[derive(Clone, Default)]
pub struct Kicks(Arc<Mutex<Vec<Reins>>>);

impl Kicks {
    fn list(&self) -> MutexGuard<'_, Vec<Reins>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// The guest has switched the machine off or reset it: every vCPU leaves the guest after the instruction that it is in,
    /// and executes no other one. May be called from within one.
    pub fn halt_all(&self) {
        for reins in self.list().iter() {
            reins.gate.shut();
            reins.kick.kick();
        }
    }
}

/// A running vCPU.
pub struct VcpuThread {
    reins: Reins,
    stop: StopSignal,
    join: Option<JoinHandle<()>>,
}

/// Runs the vCPU until it ends for good.
fn live(vcpu: &mut dyn Vcpu, gate: &Gate, bus: &mut VcpuBus) -> Result<Exit, CpuError> {
    loop {
        match gate.pass(vcpu)? {
            Next::End => return Ok(Exit::Stopped),
            Next::Run => {}
        }
        match vcpu.run(bus)? {
            // Somebody has a wish.
            Exit::Stopped => {}
            end @ (Exit::TripleFault { .. } | Exit::Stuck { .. }) => return Ok(end),
        }
    }
}

impl VcpuThread {
    /// Starts vCPU `index` in `state` (none for one that waits to be started by another), enters it in `kicks`, and calls
    /// `ended` on its thread when it leaves the guest for good.
    ///
    /// # Errors
    /// When the thread or the vCPU cannot be made.
    pub fn spawn(
        processor: Arc<dyn Processor>,
        index: u32,
        state: Option<CpuState>,
        mut bus: VcpuBus,
        kicks: &Kicks,
        ended: impl FnOnce(VcpuEnd) + Send + 'static,
    ) -> Result<Self, CpuError> {
        let name = format!("vcpu{index}");
        let stop = bus.stop.clone();
        let (made, ready) = sync_channel(1);
        let kicks = kicks.clone();
        let class = if processor.name() == "kvm" { ThreadClass::KvmVcpu } else { ThreadClass::SoftVcpu };
        let run = move || {
            let created = processor.create_vcpu(index).and_then(|mut vcpu| {
                if let Some(state) = &state {
                    vcpu.set_state(state)?;
                }
                Ok(vcpu)
            });
            let mut vcpu = match created {
                Ok(vcpu) => vcpu,
                Err(error) => {
                    let _ = made.send(Err(error));
                    return;
                }
            };
            let reins = Reins { gate: Arc::new(Gate::new()), kick: vcpu.kick_handle(), thread: gettid() };
            kicks.list().push(reins.clone());
            let gate = Arc::clone(&reins.gate);
            let _ = made.send(Ok(reins));
            // From here on the guest is at work.
            seccomp::enter(class);
            let exit = live(vcpu.as_mut(), &gate, &mut bus).map_err(Arc::new);
            let figures = vcpu.figures();
            gate.ended(figures);
            ended(VcpuEnd { index, exit, figures, busy_ns: busy_ns() });
        };
        let failed = |source| CpuError::Thread { name: name.clone(), source };
        let join = std::thread::Builder::new().name(name.clone()).spawn(run).map_err(failed)?;
        match ready.recv() {
            Ok(Ok(reins)) => Ok(Self { reins, stop, join: Some(join) }),
            Ok(Err(error)) => {
                let _ = join.join();
                Err(error)
            }
            Err(_) => Err(failed(std::io::Error::other("it ended before the vCPU was made"))),
        }
    }

    /// Asks the vCPU to stand between two instructions, with no exit half done. One that waits for a device's answer
    /// stands when it has it.
    pub fn stand(&self) {
        self.reins.gate.wish(Wish::Stand);
        self.reins.kick.kick();
    }

    /// Whether the vCPU executes nothing any more, waiting for that until `deadline`.
    pub fn await_standing(&self, deadline: Instant) -> bool {
        self.reins.gate.await_standing(deadline)
    }

    /// Lets it run on; not one whose guest has asked for power-off or reset.
    pub fn go(&self) {
        self.reins.gate.wish(Wish::Run);
    }

    /// Sends it a non-maskable interrupt; one that stands gets it before its next instruction.
    pub fn nmi(&self) {
        self.reins.gate.nmi();
        self.reins.kick.kick();
    }

    /// The processors of the host that its thread is pinned to; `None` when the kernel does not say.
    pub fn pinning(&self) -> Option<CpuSet> {
        sched_getaffinity(Some(self.reins.thread)).ok()
    }

    /// Pins its thread as another one was pinned.
    pub fn pin(&self, processors: &CpuSet) {
        if let Err(error) = sched_setaffinity(Some(self.reins.thread), processors) {
            tracing::warn!(%error, "a vCPU is not pinned any more as it was before the reset");
        }
    }

    /// What it is at.
    pub fn phase(&self) -> VcpuPhase {
        self.reins.gate.phase()
    }

    /// What it has done, as far as it tells by `deadline`; it leaves the guest for a moment.
    pub fn figures(&self, deadline: Instant) -> VcpuFigures {
        self.reins.gate.count();
        self.reins.kick.kick();
        self.reins.gate.figures(deadline)
    }

    /// Makes the vCPU leave the guest, also if it waits for a device, and waits for its thread.
    pub fn stop(&mut self) {
        let Some(join) = self.join.take() else { return };
        self.stop.raise();
        self.reins.gate.wish(Wish::End);
        self.reins.kick.kick();
        // A panic has been reported by its hook.
        let _ = join.join();
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Processor time of the calling thread.
fn busy_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}
