//! What each kind of thread of the VMM may ask of the kernel.
//!
//! A guest drives vCPU threads, and a device process the thread that talks with it: whoever breaks into one of them finds a
//! kernel that answers a short list of calls. The filter belongs to the thread and is put on as its first act, after what
//! needs more (making a vCPU) is done. Threads that the list of [`ThreadClass`] lacks have none: the machine's keeper,
//! which opens what a configuration names and asks jailed programs about images, and the spawner: their filters would be
//! inherited by every program that they start, and forbid it to jail itself.
//!
//! A forbidden call is not carried out: it ends the VMM with SIGSYS, after a line that names thread and call
//! ([`Mode::Enforce`]), or is told to the kernel's log ([`Mode::Log`]). The program chooses once, before it makes a machine;
//! a library that nobody asked has no filters.

mod calls;
mod lists;
mod trap;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use thiserror::Error;

/// What becomes of a forbidden call (`--seccomp`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// There are no filters.
    #[default]
    Off,
    /// It is carried out and logged by the kernel.
    Log,
    /// It ends the VMM.
    Enforce,
}

impl Mode {
    /// As on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "false",
            Self::Log => "log",
            Self::Enforce => "true",
        }
    }
}

/// A kind of thread with a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadClass {
    /// Runs guest code on the software CPU, and the devices that answer at once.
    SoftVcpu,
    /// The same on KVM.
    KvmVcpu,
    /// Delivers interrupts, expires the guest's timers, relays kicks and calls.
    Events,
    /// Talks with a device process: one vhost-user conversation, or the bus.
    Talk,
    /// Looks after a device: reconnects, recovers, drains.
    Device,
    /// Moves bytes between a serial port, or a terminal, and its other end.
    Line,
    /// Decides what becomes of devices on the bus and cuts their connections; carries out nothing itself.
    Actors,
    /// Hears an operator: requests to the API, and the events that are told to whoever listens.
    Operator,
}

impl ThreadClass {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::SoftVcpu,
        Self::KvmVcpu,
        Self::Events,
        Self::Talk,
        Self::Device,
        Self::Line,
        Self::Actors,
        Self::Operator,
    ];

    /// What people know it by.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SoftVcpu => "soft-vcpu",
            Self::KvmVcpu => "kvm-vcpu",
            Self::Events => "events",
            Self::Talk => "talk",
            Self::Device => "device",
            Self::Line => "line",
            Self::Actors => "actors",
            Self::Operator => "operator",
        }
    }

    /// How many system calls it may make.
    #[must_use]
    pub fn calls(self) -> usize {
        lists::rules(self).map_or(0, |rules| rules.len())
    }
}

/// A filter could not be made or put on.
#[derive(Debug, Error)]
pub enum FilterError {
    /// It could not be made.
    #[error("no filter of system calls can be made for {class} threads: {source}; --seccomp false runs without", class = .class.name())]
    Make {
        /// For whom.
        class: ThreadClass,
        /// Why not.
        #[source]
        source: BackendError,
    },
    /// The kernel has none, or a policy forbids it.
    #[error(
        "this kernel takes no filters of system calls ({0}); boot one with CONFIG_SECCOMP_FILTER, or --seccomp false"
    )]
    Kernel(String),
    /// Nobody could be told of a forbidden call.
    #[error("no handler for forbidden system calls: {0}")]
    Handler(#[source] io::Error),
}

static MODE: AtomicU8 = AtomicU8::new(Mode::Off as u8);
/// Threads that have put theirs on, by class.
static FILTERED: [AtomicU64; ThreadClass::ALL.len()] = [const { AtomicU64::new(0) }; ThreadClass::ALL.len()];

/// What was chosen.
#[must_use]
pub fn mode() -> Mode {
    match MODE.load(Ordering::Relaxed) {
        2 => Mode::Enforce,
        1 => Mode::Log,
        _ => Mode::Off,
    }
}

/// Chooses for this process, for threads that start from now on. Tries a filter on a thread of no use, so that a host that
/// has none is found before there is a guest.
///
/// # Errors
/// All of [`FilterError`]; nothing is filtered then.
pub fn choose(mode: Mode) -> Result<(), FilterError> {
    try_out(mode)?;
    if mode == Mode::Enforce {
        trap::install().map_err(FilterError::Handler)?;
    }
    MODE.store(mode as u8, Ordering::Relaxed);
    Ok(())
}

/// Whether this host has what `mode` needs, tried on a thread of no use.
///
/// # Errors
/// [`FilterError::Make`], [`FilterError::Kernel`].
pub fn try_out(mode: Mode) -> Result<(), FilterError> {
    if mode != Mode::Off {
        for class in ThreadClass::ALL {
            programs(class, mode)?;
        }
        let trial = std::thread::Builder::new().name("trial".into()).spawn(move || put_on(ThreadClass::Events, mode));
        let tried = trial.map_err(|error| FilterError::Kernel(error.to_string()))?.join();
        tried.unwrap_or_else(|_| Err(FilterError::Kernel("the trial panicked".into())))?;
    }
    Ok(())
}

/// Puts the filter of `class` on the calling thread, if filters were chosen. Threads that it starts have it, too.
pub fn enter(class: ThreadClass) {
    let mode = mode();
    if mode == Mode::Off {
        return;
    }
    match put_on(class, mode) {
        Ok(()) => {
            trap::remember(class);
            if let Some(count) = FILTERED.get(class as usize) {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
        // It worked on the trial: only memory can be lacking.
        Err(error) => tracing::error!(%error, "a thread runs without its filter"),
    }
}

/// The calling thread was started by one of `class`, whose filter it has: its last words are to say so.
pub fn inherit(class: ThreadClass) {
    if mode() != Mode::Off {
        trap::remember(class);
    }
}

/// How many threads have put on the filter of each class since the VMM started; none where there are no filters.
#[must_use]
pub fn filtered() -> BTreeMap<&'static str, u64> {
    let counts = ThreadClass::ALL.into_iter().zip(&FILTERED);
    counts.map(|(class, count)| (class.name(), count.load(Ordering::Relaxed))).filter(|(_, count)| *count > 0).collect()
}

fn put_on(class: ThreadClass, mode: Mode) -> Result<(), FilterError> {
    for program in programs(class, mode)? {
        seccompiler::apply_filter(&program).map_err(|error| FilterError::Kernel(error.to_string()))?;
    }
    Ok(())
}

/// The filters of a class: the list, and those that answer calls of the C library's which it can do without: it starts
/// threads by the call whose flags can be looked at, and guesses a setting that it cannot read.
fn programs(class: ThreadClass, mode: Mode) -> Result<Vec<BpfProgram>, FilterError> {
    let forbidden = if mode == Mode::Log { SeccompAction::Log } else { SeccompAction::Trap };
    let make = |rules, otherwise, found| -> Result<BpfProgram, BackendError> {
        SeccompFilter::new(rules, otherwise, found, TargetArch::x86_64)?.try_into()
    };
    let list = lists::rules(class).and_then(|rules| make(rules, forbidden, SeccompAction::Allow));
    let refused = |call, errno: libc::c_int| {
        make([(call, Vec::new())].into(), SeccompAction::Allow, SeccompAction::Errno(errno.unsigned_abs()))
    };
    let all = || {
        let mut all = vec![refused(libc::SYS_clone3, libc::ENOSYS)?];
        if class != ThreadClass::Device {
            all.push(refused(libc::SYS_openat, libc::EACCES)?);
        }
        all.push(list?);
        Ok(all)
    };
    all().map_err(|source| FilterError::Make { class, source })
}

#[cfg(test)]
mod tests;
