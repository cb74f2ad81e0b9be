//! `--report`: what a run came to, as one JSON object.

use std::path::Path;

use atoll_vmm::machine::{MachineEnd, MachineFigures, StopCause};
use serde::Serialize;

use crate::described::UsageError;
use crate::run::RunError;

/// A report that could not be written is refused before anything runs.
pub(crate) fn check(path: &Path) -> Result<(), RunError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if folder.is_dir() && !path.is_dir() {
        return Ok(());
    }
    let text = format!("--report {}: no file can be made there; choose one in a folder that is there", path.display());
    Err(RunError::Usage(UsageError::Where(text)))
}

/// The object.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// `soft` or `kvm`.
    cpu: &'static str,
    /// Instructions retired by all vCPUs; zero where the CPU does not count them.
    instructions: u64,
    /// Processor time of the vCPU threads in nanoseconds.
    run_ns: u64,
    /// Host memory that holds decoded code, in bytes.
    cache_bytes: u64,
    /// Deterministic mode: a hash of what was executed.
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_hash: Option<String>,
    /// How it ended.
    reason: String,
}

impl Report {
    pub(crate) fn new(cpu: &'static str, figures: &MachineFigures, end: &MachineEnd) -> Self {
        let reason = match end {
            MachineEnd::PowerOff => "power-off".into(),
            MachineEnd::Reset => "reset".into(),
            MachineEnd::Asked => "asked".into(),
            MachineEnd::Stopped(StopCause::Escape) => "escape".into(),
            MachineEnd::Stopped(StopCause::Signal(signal)) => format!("signal {signal}"),
            MachineEnd::Failed(text) => format!("failed: {text}"),
        };
        Self {
            cpu,
            instructions: figures.instructions,
            run_ns: figures.busy_ns,
            cache_bytes: figures.cache_bytes,
            trace_hash: figures.trace_hash.map(|hash| format!("{hash:016x}")),
            reason,
        }
    }

    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut text = serde_json::to_string(self)?;
        text.push('\n');
        std::fs::write(path, text)
            .map_err(|error| anyhow::anyhow!("cannot write --report {}: {error}; choose another file", path.display()))
    }
}
