//! A child that is told to end when this process ends, however that happens.
#![allow(unsafe_code, reason = "the kernel is asked between fork and exec")]

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::{Signal, set_parent_process_death_signal};

/// The child gets SIGTERM, on which it ends in order, when the thread that starts it has ended.
pub fn to_this_thread(command: &mut Command) -> &mut Command {
    // SAFETY: it makes one system call and allocates nothing.
    unsafe { command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::TERM))?)) }
}
