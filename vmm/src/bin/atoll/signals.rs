//! Signals that ask for a clean stop, turned into an event of the machine.
#![allow(unsafe_code, reason = "sigwait has no safe form in the crates that are used")]

use std::mem::MaybeUninit;
use std::time::Duration;

use atoll_vmm::machine::{EventSender, MachineEvent, StopCause};
use atoll_vmm::seccomp::{self, ThreadClass};
use vmm_sys_util::signal::block_signal;

use crate::terminal;

/// They end the machine in good order; a second one ends the process at once.
const STOPPING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// The exit status of a process that a signal ended, as shells count.
pub(crate) fn exit_status(signal: i32) -> u8 {
    u8::try_from(signal).unwrap_or(0).saturating_add(128)
}

/// Keeps the signals from interrupting any thread that is started from now on. Children start with none blocked: the
/// standard library sees to that.
pub(crate) fn block() -> anyhow::Result<()> {
    for signal in STOPPING {
        block_signal(signal).map_err(|error| anyhow::anyhow!("signal {signal} cannot be blocked: {error:?}"))?;
    }
    // A reader of our output that is gone must not kill the machine: writes then fail, and are told in the log.
    // SAFETY: ignoring a signal touches no memory.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    Ok(())
}

/// The signals that ask for an end, and `more`.
fn set(more: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set, the others work on it.
    let mut set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    };
    for signal in STOPPING.iter().chain(more) {
        // SAFETY: the set is initialised.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    set
}

/// Waits for one of them, or for a child's end; `None` when none has come within `limit`.
pub(crate) fn wait(limit: Option<Duration>) -> Option<i32> {
    let set = set(&[libc::SIGCHLD]);
    // A signal that is ignored by default is only kept for us while it is blocked.
    let _ = block_signal(libc::SIGCHLD);
    let limit = limit.unwrap_or(Duration::from_secs(1));
    let limit = libc::timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    // SAFETY: all pointers are to live locals, or null where nothing is wanted.
    let signal = unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const limit) };
    (signal > 0).then_some(signal)
}

/// Starts the thread that waits for them.
pub(crate) fn listen(events: EventSender) -> std::io::Result<()> {
    let listen = move || {
        seccomp::enter(ThreadClass::Line);
        let set = set(&[]);
        let mut asked = false;
        loop {
            let mut signal = 0;
            // SAFETY: both pointers are to live locals.
            if unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {
                continue;
            }
            if asked {
                terminal::restore();
                std::process::exit(i32::from(exit_status(signal)));
            }
            asked = true;
            events.tell(MachineEvent::Stop(StopCause::Signal(signal)));
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(listen).map(drop)
}
