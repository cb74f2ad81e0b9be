//! The thread that runs a vCPU, named `vcpu0`, `vcpu1`, … because people pin them by name.

use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::time::{ClockId, clock_gettime};

use crate::actor::StopSignal;

use super::{CpuError, CpuState, Exit, Kick, Processor, VcpuBus, VcpuFigures};

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

/// The vCPUs of a machine, as whoever must stop them at once reaches them. Each is on the list before it runs its first
/// instruction.
#[derive(Clone, Default)]
pub struct Kicks(Arc<Mutex<Vec<Arc<dyn Kick>>>>);

impl Kicks {
    fn list(&self) -> MutexGuard<'_, Vec<Arc<dyn Kick>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Makes every vCPU leave the guest after the instruction that it is in. May be called from within one.
    pub fn kick_all(&self) {
        self.list().iter().for_each(|kick| kick.kick());
    }
}

/// A running vCPU.
pub struct VcpuThread {
    kick: Arc<dyn Kick>,
    stop: StopSignal,
    join: Option<JoinHandle<()>>,
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
            kicks.list().push(vcpu.kick_handle());
            let _ = made.send(Ok(vcpu.kick_handle()));
            let exit = vcpu.run(&mut bus).map_err(Arc::new);
            ended(VcpuEnd { index, exit, figures: vcpu.figures(), busy_ns: busy_ns() });
        };
        let failed = |source| CpuError::Thread { name: name.clone(), source };
        let join = std::thread::Builder::new().name(name.clone()).spawn(run).map_err(failed)?;
        match ready.recv() {
            Ok(Ok(kick)) => Ok(Self { kick, stop, join: Some(join) }),
            Ok(Err(error)) => {
                let _ = join.join();
                Err(error)
            }
            Err(_) => Err(failed(std::io::Error::other("it ended before the vCPU was made"))),
        }
    }

    /// Makes the vCPU leave the guest, also if it waits for a device, and waits for its thread.
    pub fn stop(&mut self) {
        let Some(join) = self.join.take() else { return };
        self.stop.raise();
        self.kick.kick();
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
