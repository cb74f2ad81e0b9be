//! The terminal in raw mode, given back on every way out: return, error, panic and signal.
#![allow(unsafe_code, reason = "signal handlers that give the terminal back before the process dies")]

use std::io::{IsTerminal, stdin};
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};

/// What the terminal was like.
static SAVED: OnceLock<Termios> = OnceLock::new();
/// Whether it is raw now.
static RAW: AtomicBool = AtomicBool::new(false);
/// One switch at a time.
static SWITCHING: Mutex<()> = Mutex::new(());

/// Signals that end the process where it stands; the terminal is given back first.
const FATAL: [libc::c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT];

/// Whether a screen of our own is shown.
static SCREEN: AtomicBool = AtomicBool::new(false);
/// Another screen without a cursor, and back.
const SCREEN_ON: &[u8] = b"\x1b[?1049h\x1b[?25l";
const SCREEN_OFF: &[u8] = b"\x1b[?25h\x1b[?1049l";

/// Signals that end a command which has taken the terminal; it is given back first.
const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// For commands that wait for no signals: those that end the process give the terminal back.
pub(crate) fn restore_on_signals() {
    for signal in ENDING {
        // SAFETY: the handler only makes system calls that are async-signal-safe.
        unsafe { libc::signal(signal, fatal as *const () as libc::sighandler_t) };
    }
}

/// Shows an empty screen; [`restore`] brings the other one back.
pub(crate) fn take_screen() {
    SCREEN.store(true, Ordering::Release);
    let _ = rustix::io::write(rustix::stdio::stdout(), SCREEN_ON);
}

/// Gives the terminal back when dropped.
pub(crate) struct RawTerminal;

impl RawTerminal {
    /// Makes standard input raw, if it is a terminal. Output is still processed: the log's lines start at the left.
    pub(crate) fn enter() -> Option<Self> {
        let input = stdin();
        if !input.is_terminal() {
            return None;
        }
        let _switching = SWITCHING.lock();
        let saved = tcgetattr(&input).ok()?;
        let mut raw = saved.clone();
        let output = raw.output_modes & (OutputModes::OPOST | OutputModes::ONLCR);
        raw.make_raw();
        raw.output_modes |= output;
        let _ = SAVED.set(saved);
        for signal in FATAL {
            // SAFETY: the handler only makes system calls that are async-signal-safe, and never returns to the fault.
            unsafe { libc::signal(signal, fatal as *const () as libc::sighandler_t) };
        }
        let default = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            default(panic);
        }));
        RAW.store(true, Ordering::Release);
        tcsetattr(&input, OptionalActions::Now, &raw).ok()?;
        Some(Self)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back, if it was taken. Any thread, any number of times; async-signal-safe.
pub(crate) fn restore() {
    if SCREEN.swap(false, Ordering::AcqRel) {
        let _ = rustix::io::write(rustix::stdio::stdout(), SCREEN_OFF);
    }
    if RAW.swap(false, Ordering::AcqRel)
        && let Some(saved) = SAVED.get()
    {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Flush, saved);
    }
}

extern "C" fn fatal(signal: libc::c_int) {
    restore();
    // SAFETY: both calls are async-signal-safe; the default action ends the process.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}
