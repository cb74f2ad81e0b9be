//! What a process holds: descriptors, threads, children, memory. Counted before and after.

use anyhow::Result;
use serde::Serialize;
use xtask::processes;

/// Growth of memory that is no leak: caches of allocators, and what a judge remembers between two settlements.
const MEMORY_SLACK_KIB: u64 = 48 << 10;
/// What one more kill may leave in heaps that are cut into pieces.
const MEMORY_PER_KILL_BYTES: u64 = 512;

/// A count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Census {
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
    /// Child processes.
    pub processes: u64,
    /// Memory of this process, in KiB (PSS), without guest memory.
    pub memory_kib: u64,
}

impl Census {
    /// Of this process, now.
    pub fn take() -> Result<Self> {
        let count = |folder: &str| std::fs::read_dir(folder).map(|entries| entries.count() as u64);
        let me = std::process::id();
        Ok(Self {
            descriptors: count("/proc/self/fd")?,
            threads: count("/proc/self/task")?,
            processes: processes::children(me).len() as u64,
            memory_kib: processes::pss_kib(me, &["memfd:"])?,
        })
    }

    /// How many things there are now that were not there before `kills` kills.
    pub fn leaked_since(&self, before: &Self, kills: u64) -> u64 {
        let more = |now: u64, then: u64| now.saturating_sub(then);
        let allowed = MEMORY_SLACK_KIB + kills * MEMORY_PER_KILL_BYTES / 1024;
        more(self.descriptors, before.descriptors)
            + more(self.threads, before.threads)
            + more(self.processes, before.processes)
            + u64::from(more(self.memory_kib, before.memory_kib) > allowed)
    }
}
