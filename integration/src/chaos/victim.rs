//! The process that is to be killed: stopped, seen to end, and what it holds.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

/// How long a stopped process may take to stand still.
const STOP_MAX: Duration = Duration::from_secs(1);

/// Stops a process, all its threads. False when it has ended, or does not stand still.
pub(super) fn stop(process: &OwnedFd) -> bool {
    if pidfd_send_signal(process, Signal::STOP).is_err() {
        return false;
    }
    // What is seen stays to be seen, for whoever reaps it.
    let look = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    let deadline = Instant::now() + STOP_MAX;
    while Instant::now() < deadline {
        match waitid(WaitId::PidFd(process.as_fd()), look) {
            Ok(None) => std::hint::spin_loop(),
            Ok(Some(status)) => return status.stopped(),
            Err(_) => return false,
        }
    }
    false
}

/// Whether a process has ended, or does within this time.
pub(super) fn ended(process: &OwnedFd, within: Duration) -> bool {
    let limit = Timespec::try_from(within).ok();
    matches!(poll(&mut [PollFd::new(process, PollFlags::IN)], limit.as_ref()), Ok(1..))
}

/// The description that a process has of an image: with it its locks. None where this user may not look.
pub(super) fn copy_of_descriptor(process: &OwnedFd, pid: u32, image: &Path) -> Option<OwnedFd> {
    let image = std::fs::canonicalize(image).ok()?;
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let number = entries.flatten().find_map(|entry| {
        let is_image = std::fs::read_link(entry.path()).is_ok_and(|target| target == image);
        is_image.then(|| entry.file_name().to_str()?.parse::<i32>().ok()).flatten()
    })?;
    rustix::process::pidfd_getfd(process, number, rustix::process::PidfdGetfdFlags::empty()).ok()
}
