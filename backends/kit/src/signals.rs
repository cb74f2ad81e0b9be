//! SIGTERM and SIGINT end the process in order: requests in flight are finished, the socket file is removed.

#![allow(unsafe_code, reason = "signal sets have no safe wrapper")]

use std::io;

fn set() -> libc::sigset_t {
    // SAFETY: the set is plain data, made valid by sigemptyset.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        set
    }
}

/// Keeps the signals from ending the process at once; threads started later inherit it. To be called first.
pub fn hold() {
    let set = set();
    // SAFETY: the set is valid; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Calls `end` on a thread of its own when a signal comes. [`hold`] must have been called.
pub fn end_on_signal(end: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new()
        .name("signals".to_owned())
        .stack_size(256 << 10)
        .spawn(move || {
            let set = set();
            let mut signal = 0;
            // SAFETY: both pointers are valid.
            while unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {}
            end();
        })
        .map(drop)
}
