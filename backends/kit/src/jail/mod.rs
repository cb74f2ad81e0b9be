//! The jail of a device process. It closes in three steps, each as early as what it forbids is no longer needed:
//!
//! 1. [`begin`], first thing in `main`: no descriptors but those on the command line, no new privileges, no core
//!    dumps with guest memory in them, death with the supervisor.
//! 2. [`Jail::confine`], when sockets and images are open and before any thread exists: namespaces of its own with an
//!    empty root, no capabilities, no debugger, landlock without a single path (except to remove the socket file).
//! 3. [`Jail::lock`], when the queue threads have their restricted rings and before guest memory is seen: resource limits,
//!    and a seccomp allow-list for all threads. It forbids to make further rings, because an io_uring passes no seccomp
//!    filter.
//!
//! What a kind of device may do is its [`Profile`]. A host that lacks a layer is no reason not to serve, unless the jail is
//! strict: what became of each layer is reported, and whoever asked for the device decides.

mod files;
mod ledger;
mod limits;
mod namespaces;
mod profile;
mod syscalls;

use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use atoll_protocol::jail::{JailLayer, JailOutcome, JailedLayer};
use rustix::process::{DumpableBehavior, Pid, Resource, Rlimit, Signal};
use thiserror::Error;

pub use files::SocketFile;
use ledger::Ledger;
pub use profile::Profile;

/// Why the jail could not be closed.
#[derive(Debug, Error)]
pub enum JailError {
    /// A system call of the jail itself failed.
    #[error("cannot {what}: {source}; --jail=off serves without a jail")]
    Step {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Landlock is there and refused the rules.
    #[error("cannot restrict file access: {0}; --jail=off serves without a jail")]
    Landlock(#[from] landlock::RulesetError),
    /// The seccomp filter could not be built or installed.
    #[error("cannot restrict system calls: {0}; --jail=off serves without a jail")]
    Seccomp(String),
    /// A strict jail on a host that lacks a layer.
    #[error("the jail would lack {0}: {remedy}; or serve with what there is (--jail=default)", remedy = .0.remedy())]
    Incomplete(JailedLayer),
    /// The supervisor ended while this process started.
    #[error("the supervisor has ended")]
    Orphan,
}

/// How the jail is meant (`--jail`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Every layer, or the process ends.
    Strict,
    /// Every layer that this host has.
    #[default]
    Default,
    /// None but what [`begin`] does, for debuggers and tracers.
    Off,
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "strict" => Ok(Self::Strict),
            "default" => Ok(Self::Default),
            "off" => Ok(Self::Off),
            _ => Err("there are strict, default and off".into()),
        }
    }
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
    crate::step::begin();
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

/// Tells the allocator never to give memory of a thread's heap back: before glibc does that for the first time it opens
/// /proc/sys/vm/overcommit_memory, which ends a locked process. A burst of bounce buffers, freed, was enough.
fn keep_heap() {
    #[allow(unsafe_code, reason = "the allocator's settings have no safe wrapper")]
    // SAFETY: a setting by value; no other thread exists.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

/// What is left open.
#[derive(Debug)]
pub struct Jail {
    /// How it is meant.
    pub mode: Mode,
    /// What this kind of device needs.
    pub profile: &'static Profile,
    /// A supervisor started this process.
    pub supervised: bool,
    /// It writes files of the host, of any length.
    pub writes_files: bool,
}

impl Default for Jail {
    /// For a device that nobody has a profile for, without supervisor.
    fn default() -> Self {
        Self { mode: Mode::Default, profile: &Profile::GENERIC, supervised: false, writes_files: true }
    }
}

/// A jail that is half closed: no path, no network, no capability.
#[derive(Debug)]
pub struct Confined {
    jail: Jail,
    listens: bool,
    ledger: Ledger,
}

impl Jail {
    /// Second step: no thread may exist yet, because these rights belong to each thread. `socket` may be removed at the
    /// end.
    pub fn confine(self, socket: Option<&Arc<SocketFile>>) -> Result<Confined, JailError> {
        let mut ledger = Ledger::default();
        if self.mode == Mode::Off {
            return Ok(Confined { jail: self, listens: socket.is_some(), ledger });
        }
        ledger.applied(JailLayer::NoNewPrivileges);
        ledger.applied(JailLayer::Descriptors);
        let parent = rustix::process::getppid();
        keep_heap();
        namespaces::leave(&mut ledger);
        files::drop_capabilities().map_err(step("drop capabilities"))?;
        ledger.applied(JailLayer::Capabilities);
        // After the namespaces: to begin one, a process must own its entries in /proc.
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("keep debuggers out"))?;
        ledger.applied(JailLayer::Undumpable);
        files::landlock(socket.map(Arc::as_ref), &mut ledger)?;
        if self.supervised {
            // A change of credentials clears it.
            die_with(parent)?;
        }
        Ok(Confined { jail: self, listens: socket.is_some(), ledger })
    }
}

impl Confined {
    /// What became of the layers so far.
    pub fn layers(&self) -> &[JailedLayer] {
        self.ledger.layers()
    }

    /// Third step: all threads exist, for `queues` queues. Says what became of each layer.
    pub fn lock(self, queues: usize) -> Result<Vec<JailedLayer>, JailError> {
        let Self { jail: Jail { mode, profile, writes_files, .. }, listens, mut ledger } = self;
        if mode == Mode::Off {
            let off = |layer| JailedLayer { layer, outcome: JailOutcome::Off };
            return Ok(JailLayer::ALL.into_iter().map(off).collect());
        }
        limits::set(profile, queues as u64, writes_files).map_err(step("lower resource limits"))?;
        ledger.applied(JailLayer::Limits);
        if profile.has_rings() {
            // They could not have been made otherwise.
            ledger.applied(JailLayer::Rings);
        }
        if syscalls::available() {
            if let (Mode::Strict, Some(missing)) = (mode, ledger.missing()) {
                return Err(JailError::Incomplete(missing));
            }
            syscalls::restrict(profile, listens)?;
            ledger.applied(JailLayer::Calls);
        } else {
            ledger.note(JailLayer::Calls, JailOutcome::KernelLacks);
        }
        match (mode, ledger.missing()) {
            (Mode::Strict, Some(missing)) => Err(JailError::Incomplete(missing)),
            _ => Ok(ledger.close()),
        }
    }
}

/// The folder of a socket file: the current one where its path has none.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
