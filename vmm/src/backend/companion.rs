//! Programs of others that a device leans on (user-mode networking): children of the spawner like device processes, but
//! they know no sidecar, so all that is seen of them is their output and their end.

use std::ffi::OsString;
use std::io::PipeReader;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Signal, pidfd_send_signal};

use super::event::SpawnError;
use super::launch::{Started, start};
use super::lines::{LastLines, read_lines};
use super::spec::PassedFd;
use crate::actor::RateLimit;

/// What to start.
#[derive(Debug)]
pub struct CompanionSpec {
    /// Name of the device that it serves, for errors and logs.
    pub name: String,
    /// The program.
    pub exe: PathBuf,
    /// Arguments before those of the descriptors.
    pub args: Vec<OsString>,
    /// Descriptors to inherit, each behind its flag.
    pub fds: Vec<PassedFd>,
}

#[derive(Debug, Default)]
struct End {
    words: Mutex<Option<String>>,
    told: Condvar,
}

/// A companion that runs; it is killed when this is dropped.
#[derive(Debug)]
pub struct Companion {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    end: Arc<End>,
}

impl Companion {
    /// Its process id, for people.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Readable once it has ended.
    #[must_use]
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills it.
    pub fn kill(&self) {
        // An error means that it is gone.
        let _ = pidfd_send_signal(&*self.pidfd, Signal::KILL);
    }

    /// Waits until it was reaped, at most until `deadline`. How it ended and what it said last, in words.
    #[must_use]
    pub fn await_end(&self, deadline: Instant) -> Option<String> {
        let mut words = self.end.words.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if words.is_some() {
                return words.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            words = self.end.told.wait_timeout(words, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A companion as the spawner's thread has it.
pub(super) struct Escort {
    name: String,
    process: std::process::Child,
    pidfd: Arc<OwnedFd>,
    output: Option<PipeReader>,
    lines: LastLines,
    log_limit: RateLimit,
    end: Arc<End>,
    gone: bool,
}

impl Escort {
    /// Starts it, on the spawner's thread.
    pub(super) fn bear(spec: CompanionSpec, log_limit: RateLimit) -> Result<(Self, Companion), SpawnError> {
        let mut command = Command::new(&spec.exe);
        command.args(&spec.args).env_clear();
        let Started { process, pidfd, output } = start(&spec.name, command, spec.fds)?;
        let (pid, pidfd, end) = (process.id(), Arc::new(pidfd), Arc::<End>::default());
        let program = spec.exe.display();
        tracing::info!(name = spec.name, pid, "{program} started");
        let companion = Companion { pid, pidfd: Arc::clone(&pidfd), end: Arc::clone(&end) };
        let (lines, output) = (LastLines::default(), Some(output));
        Ok((Self { name: spec.name, process, pidfd, output, lines, log_limit, end, gone: false }, companion))
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    /// What wakes the thread on its behalf.
    pub(super) fn wakes(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.pidfd.as_fd()).chain(self.output.as_ref().map(AsFd::as_fd))
    }

    pub(super) fn kill(&self) {
        // An error means that it is gone.
        let _ = pidfd_send_signal(&*self.pidfd, Signal::KILL);
    }

    /// Reads what it says and reaps it when it has ended.
    pub(super) fn attend(&mut self) {
        let ended = self.process.try_wait().ok().flatten();
        read_lines(&mut self.output, &mut self.lines, &mut self.log_limit, &self.name);
        let Some(status) = ended else { return };
        self.gone = true;
        self.output = None;
        let name = &self.name;
        let words = match self.lines.finish(|_| {}).last() {
            Some(line) => format!("{status}; it said last: {line}"),
            None => status.to_string(),
        };
        tracing::info!(name, "companion ended with {words}");
        *self.end.words.lock().unwrap_or_else(PoisonError::into_inner) = Some(words);
        self.end.told.notify_all();
    }
}

/// How long a killed companion may take to be reaped.
pub const COMPANION_END: Duration = Duration::from_secs(2);
