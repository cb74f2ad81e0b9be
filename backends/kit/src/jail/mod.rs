//! The jail of a device process. It closes in three steps, each as early as what it forbids is no longer needed:
//!
//! 1. [`begin`], first thing in `main`: no descriptors but those on the command line, no new privileges, no core
//!    dumps with guest memory in them, death with the supervisor.
//! 2. [`Jail::confine`], when sockets and images are open and before any thread exists: no capabilities, namespaces
//!    of its own where permitted, landlock without a single path (except to remove the socket file).
//! 3. [`Jail::lock`], when the queue threads have their restricted rings and before guest memory is seen: a seccomp
//!    allow-list for all threads. It forbids to make further rings, because an io_uring passes no seccomp filter.

mod files;
mod syscalls;

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use rustix::process::{Pid, Resource, Rlimit, Signal};
use thiserror::Error;

/// Why the jail could not be closed.
#[derive(Debug, Error)]
pub enum JailError {
    /// A system call of the jail itself failed.
    #[error("cannot {what}: {source}; --no-jail serves without a jail")]
    Step {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Landlock is there and refused the rules.
    #[error("cannot restrict file access: {0}; --no-jail serves without a jail")]
    Landlock(#[from] landlock::RulesetError),
    /// The seccomp filter could not be built or installed.
    #[error("cannot restrict system calls: {0}; --no-jail serves without a jail")]
    Seccomp(String),
    /// The supervisor ended while this process started.
    #[error("the supervisor has ended")]
    Orphan,
}

fn step(what: &'static str) -> impl Fn(rustix::io::Errno) -> JailError {
    move |e| JailError::Step { what, source: e.into() }
}

/// First step. `keep` are the descriptors that the command line names; `supervised` ties this life to the parent's.
pub fn begin(keep: &[RawFd], supervised: bool) -> Result<(), JailError> {
    let parent = rustix::process::getppid();
    files::close_others(keep).map_err(|source| JailError::Step { what: "close inherited descriptors", source })?;
    rustix::thread::set_no_new_privs(true).map_err(step("give up new privileges"))?;
    one_heap();
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none).map_err(step("forbid core dumps"))?;
    if supervised {
        die_with(parent)?;
    }
    Ok(())
}

/// A few heaps at most: each costs memory, and to choose their number some C libraries open a file, which the jail
/// forbids by then.
fn one_heap() {
    #[allow(unsafe_code, reason = "a tuning call of the C library")]
    // SAFETY: it sets a number, before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2)
    };
}

/// The kernel kills this process when the thread that forked it ends.
fn die_with(parent: Option<Pid>) -> Result<(), JailError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("tie to the supervisor"))?;
    // It may have ended before the line above.
    if rustix::process::getppid() == parent { Ok(()) } else { Err(JailError::Orphan) }
}

/// What is left open.
#[derive(Debug, Default)]
pub struct Jail {
    /// The socket file, which may be removed at the end.
    pub socket: Option<PathBuf>,
    /// A supervisor started this process.
    pub supervised: bool,
    /// Requests of `ioctl` that the device needs while it serves, on what is open by then.
    pub ioctls: &'static [u64],
    /// The device takes connections on a listening socket of its own.
    pub accepts: bool,
}

/// Tells the allocator never to give memory of a thread's heap back: before glibc does that for the first time it opens
/// /proc/sys/vm/overcommit_memory, which ends a locked process. A burst of bounce buffers, freed, was enough.
fn keep_heap() {
    #[allow(unsafe_code, reason = "the allocator's settings have no safe wrapper")]
    // SAFETY: a setting by value; no other thread exists.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

impl Jail {
    /// Second step: no thread may exist yet, because these rights belong to each thread.
    pub fn confine(&self) -> Result<(), JailError> {
        let parent = rustix::process::getppid();
        keep_heap();
        files::leave_namespaces();
        files::drop_capabilities().map_err(step("drop capabilities"))?;
        files::landlock(self.socket.as_deref())?;
        if self.supervised {
            // A change of credentials clears it.
            die_with(parent)?;
        }
        Ok(())
    }

    /// Third step: all threads exist and [`Jail::confine`] has been called.
    pub fn lock(&self) -> Result<(), JailError> {
        syscalls::restrict(self.socket.is_some(), self.accepts, self.ioctls)
    }
}
