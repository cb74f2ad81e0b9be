//! The last words of a process that made a forbidden call.
#![allow(unsafe_code, reason = "a signal handler")]

use std::cell::Cell;
use std::io;

use super::{ThreadClass, calls};

thread_local! {
    /// What the calling thread's filter is for. It needs neither memory nor a destructor, so a handler can read it.
    static CLASS: Cell<Option<ThreadClass>> = const { Cell::new(None) };
}

/// The calling thread has the filter of `class`.
pub(super) fn remember(class: ThreadClass) {
    CLASS.set(Some(class));
}

/// Where the number of the call is in what the kernel says about SIGSYS: after signal, error, code and the call's address.
const CALL_AT: usize = 24;

/// From now on a forbidden call is told on standard error before it ends the process.
pub(super) fn install() -> io::Result<()> {
    // SAFETY: all zeroes are an action; the handler does only what a handler may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = tell as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND | libc::SA_NODEFER;
        if libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// A line that is put together without the heap.
struct Line {
    bytes: [u8; 320],
    used: usize,
}

impl Line {
    fn add(&mut self, text: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.used).zip(text) {
            *to = *from;
            self.used += 1;
        }
    }

    fn number(&mut self, mut number: u32) {
        let mut digits = [0; 10];
        let mut first = digits.len();
        loop {
            first -= 1;
            if let Some(digit) = digits.get_mut(first) {
                *digit = b'0' + (number % 10) as u8;
            }
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.add(digits.get(first..).unwrap_or_default());
    }
}

extern "C" fn tell(_signal: libc::c_int, info: *const libc::siginfo_t, _context: *const libc::c_void) {
    let mut name = [0_u8; 16];
    // SAFETY: the kernel passes a whole siginfo, in which a SIGSYS has the number of the call there; the name has room for
    // the 16 bytes that are written.
    let call = unsafe {
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
        info.cast::<u8>().add(CALL_AT).cast::<i32>().read()
    };
    let mut line = Line { bytes: [0; 320], used: 0 };
    line.add(b"atoll: the thread ");
    line.add(name.split(|byte| *byte == 0).next().unwrap_or_default());
    if let Ok(Some(class)) = CLASS.try_with(Cell::get) {
        line.add(b" (class ");
        line.add(class.name().as_bytes());
        line.add(b")");
    }
    line.add(b" made system call ");
    if let Some(call) = calls::name(call.unsigned_abs()) {
        line.add(call.as_bytes());
        line.add(b", number ");
    }
    line.number(call.unsigned_abs());
    line.add(b", which its filter forbids: a bug, or somebody has broken in. --seccomp log lets it pass and logs it\n");
    // SAFETY: the line is there; the signal, whose action is the usual one again, ends the process.
    unsafe {
        libc::write(2, line.bytes.as_ptr().cast(), line.used);
        libc::raise(libc::SIGSYS);
    }
}
