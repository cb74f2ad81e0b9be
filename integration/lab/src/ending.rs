//! SIGTERM, SIGINT and SIGHUP end the lab in order: its machines end and its folders go. The signal is noted, and looked for
//! by all that waits; a signal's handler can do little else.
#![allow(unsafe_code, reason = "a handler of signals")]

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    ASKED.store(true, Ordering::Relaxed);
}

/// Notes such signals from now on.
pub fn watch() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let handler: extern "C" fn(libc::c_int) = note;
        // SAFETY: the handler does nothing but store into an atomic, which is allowed in one at any time.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Whether it is still wanted that the lab goes on.
///
/// # Errors
/// When a signal has come.
pub fn check() -> Result<()> {
    ensure!(!ASKED.load(Ordering::Relaxed), "ended by a signal");
    Ok(())
}
