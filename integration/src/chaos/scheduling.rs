//! Which thread of a device process runs first.

#![allow(unsafe_code, reason = "the idle scheduling class has no safe wrapper")]

use anyhow::{Context, Result};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Puts all threads of `process` on one processor, where those of queues run only when the others have nothing to do. A
/// process that was treated like this is not fit for anything but to be killed.
pub fn queues_last(process: u32) -> Result<()> {
    let ours = sched_getaffinity(None)?;
    let processor = (0..CpuSet::MAX_CPU).find(|number| ours.is_set(*number)).context("a processor")?;
    let mut one = CpuSet::new();
    one.set(processor);
    for entry in std::fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
        let Some(thread) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        sched_setaffinity(Pid::from_raw(thread), &one)?;
        if std::fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.starts_with("queue")) {
            let parameters = libc::sched_param { sched_priority: 0 };
            // SAFETY: the parameters live until the call returns.
            unsafe { libc::sched_setscheduler(thread, libc::SCHED_IDLE, &raw const parameters) };
        }
    }
    Ok(())
}
