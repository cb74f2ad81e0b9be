//! SIGTERM and SIGINT end the process in order: requests in flight are finished, the socket file is removed. SIGHUP has a
//! device look at what it stands on, where it has a size.

#![allow(unsafe_code, reason = "signal sets have no safe wrapper")]

use std::io;

fn set() -> libc::sigset_t {
    // SAFETY: the set is plain data, made valid by sigemptyset.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::sigaddset(&raw mut set, libc::SIGHUP);
        set
    }
}

/// Keeps the signals from ending the process at once; threads started later inherit it. To be called first. A limit on
/// the length of files fails the write that meets it, not the process.
pub fn hold() {
    let set = set();
    // SAFETY: no handler is installed, the signal is ignored.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    // SAFETY: the set is valid; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Calls `end` on a thread of its own when a signal comes. [`hold`] must have been called.
pub fn end_on_signal(end: impl FnOnce() + Send + 'static) -> io::Result<()> {
    attend(end, None::<fn()>)
}

/// Calls `end` on a thread of its own when a signal comes that ends the process, and `look` at each SIGHUP; without it
/// that is a signal like the others. [`hold`] must have been called.
pub fn attend(end: impl FnOnce() + Send + 'static, look: Option<impl Fn() + Send + 'static>) -> io::Result<()> {
    let attend = move || {
        let set = set();
        loop {
            let mut signal = 0;
            // SAFETY: both pointers are valid.
            let failed = unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0;
            match &look {
                _ if failed => {}
                Some(look) if signal == libc::SIGHUP => look(),
                _ => break,
            }
        }
        end();
    };
    std::thread::Builder::new().name("signals".to_owned()).stack_size(256 << 10).spawn(attend).map(drop)
}
