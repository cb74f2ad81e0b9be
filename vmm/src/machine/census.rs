//! What an operator can see of a machine, and the little that can be done to it while it runs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{DeviceLife, Machine};
use crate::cpu::VcpuPhase;
use crate::lifecycle::{DeviceReport, DeviceState};
use crate::metrics::Registry;

/// How long a vCPU has to say what it has done; one that waits for a device answers later, and says what it said before.
const COUNT_TIME_MAX: Duration = Duration::from_millis(100);

/// One vCPU.
#[derive(Clone, Debug, Serialize)]
pub struct VcpuReport {
    /// Its number.
    pub index: u32,
    /// What it is at: `running`, `standing`, `ended`.
    pub phase: &'static str,
    /// Instructions retired; zero where the CPU does not count them.
    pub instructions: u64,
    /// Host memory that holds decoded code, in bytes.
    pub code_bytes: u64,
    /// How often KVM came back from guest code, for whatever reason, this question included; zero on the software CPU.
    pub returns: u64,
}

impl Machine {
    /// Its vCPUs.
    pub fn vcpu_reports(&self) -> Vec<VcpuReport> {
        let deadline = Instant::now() + COUNT_TIME_MAX;
        (0..)
            .zip(&self.vcpus)
            .map(|(index, vcpu)| {
                let phase = match vcpu.phase() {
                    VcpuPhase::Running => "running",
                    VcpuPhase::Standing => "standing",
                    VcpuPhase::Ended => "ended",
                };
                let figures = vcpu.figures(deadline);
                let (instructions, code_bytes) = (figures.instructions, figures.cache_bytes);
                VcpuReport { index, phase, instructions, code_bytes, returns: figures.returns }
            })
            .collect()
    }

    /// Its figures.
    pub fn figures(&self) -> &Registry {
        &self.metrics
    }

    /// Has each vCPU say how many instructions it has retired, for the figures.
    pub fn count_instructions(&self) {
        for vcpu in self.vcpu_reports() {
            self.metrics.vcpu(vcpu.index).retired(vcpu.instructions);
        }
    }

    /// Its devices that are processes.
    pub fn reports(&self) -> Vec<DeviceReport> {
        self.devices
            .iter()
            .filter_map(|device| {
                let mut report = device.life.report()?;
                if self.is_leaving(&device.name) {
                    report.state = DeviceState::Unplugging;
                }
                report.bdf = device.place.map(|place| format!("0000:00:{:02x}.{}", place.slot(), place.function()));
                Some(report)
            })
            .collect()
    }

    /// Counters by vCPU and name.
    pub fn counters(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let counters = |vcpu: VcpuReport| {
            let exits = self.metrics.vcpu(vcpu.index).snapshot(vcpu.index);
            let of = [
                ("instructions", vcpu.instructions),
                ("code_bytes", vcpu.code_bytes),
                ("exits", exits.exits_total()),
                ("returns", vcpu.returns),
                ("doorbells", exits.doorbells),
                ("stalls", exits.stalls),
            ];
            (format!("vcpu{}", vcpu.index), of.map(|(name, count)| (name.to_owned(), count)).into())
        };
        self.vcpu_reports().into_iter().map(counters).collect()
    }

    /// The life of the device of that name.
    pub fn life_of(&mut self, name: &str) -> Option<&mut dyn DeviceLife> {
        let device = self.devices.iter_mut().find(|device| device.name == name)?;
        Some(device.life.as_mut())
    }

    /// Sends every vCPU a non-maskable interrupt.
    pub fn nmi(&self) {
        self.vcpus.iter().for_each(crate::cpu::VcpuThread::nmi);
    }
}
