//! Processor time, of this thread or of another process.
#![allow(unsafe_code, reason = "clocks of other processes have no safe binding")]

use anyhow::Context;

/// A clock that runs while its owner does.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProcessorClock(libc::clockid_t);

impl ProcessorClock {
    /// That of the calling thread.
    pub(super) const THREAD: Self = Self(libc::CLOCK_THREAD_CPUTIME_ID);

    /// That of a process, all its threads together.
    pub(super) fn of_process(pid: u32) -> anyhow::Result<Self> {
        let mut id = 0;
        // SAFETY: writes one clock id.
        let error = unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &raw mut id) };
        if error == 0 {
            Ok(Self(id))
        } else {
            Err(std::io::Error::from_raw_os_error(error)).with_context(|| format!("process {pid} has no clock"))
        }
    }

    /// Seconds so far; zero once the owner is gone.
    pub(super) fn seconds(self) -> f64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes one timespec, or nothing.
        unsafe { libc::clock_gettime(self.0, &raw mut time) };
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    }
}
