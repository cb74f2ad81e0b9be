//! The clock of processor time of any process.
#![allow(unsafe_code, reason = "the clock of another process has no safe wrapper")]

use std::time::Duration;

use anyhow::{Result, bail};

/// Processor time of all threads of `pid` so far, those that have ended included.
///
/// # Errors
/// When there is no such process.
pub fn processor_time(pid: u32) -> Result<Duration> {
    let mut clock = 0;
    // SAFETY: both calls fill one plain value each.
    let time = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        if libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) != 0
            || libc::clock_gettime(clock, &raw mut time) != 0
        {
            bail!("process {pid} has no clock: has it ended?");
        }
        time
    };
    Ok(Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32))
}
