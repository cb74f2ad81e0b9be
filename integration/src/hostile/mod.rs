//! A device process that has gone over to the guest: it sits in the jail that its kind ships with and tries everything
//! else, by system call and through its ring.

#![allow(unsafe_code, reason = "raw system calls with arguments that are meant to do harm")]

pub mod calls;
pub mod cell;
pub mod rings;

use std::ffi::CString;
use std::fmt;
use std::os::fd::RawFd;

/// What there is to harm, made before the jail closes.
#[derive(Debug)]
pub struct Victim {
    /// A file of the user's that nobody has opened.
    pub path: CString,
    /// An abstract socket on which somebody listens, without its leading zero.
    pub abstract_name: String,
    /// A TCP port of the loopback on which somebody listens.
    pub port: u16,
    /// A process of the same user outside.
    pub pid: i32,
    /// The host's root directory, which a careless program left open.
    pub root: RawFd,
    /// The host's network namespace, likewise.
    pub network: RawFd,
    /// A file in memory with a program in it.
    pub program: RawFd,
    /// An eventfd.
    pub event: RawFd,
}

/// Errors that a jail answers with.
const NAMES: [(i32, &str); 12] = [
    (libc::EPERM, "EPERM"),
    (libc::ENOENT, "ENOENT"),
    (libc::EBADF, "EBADF"),
    (libc::EACCES, "EACCES"),
    (libc::EINVAL, "EINVAL"),
    (libc::EROFS, "EROFS"),
    (libc::ENOSYS, "ENOSYS"),
    (libc::EOPNOTSUPP, "EOPNOTSUPP"),
    (libc::ENETUNREACH, "ENETUNREACH"),
    (libc::ECONNREFUSED, "ECONNREFUSED"),
    (libc::EFAULT, "EFAULT"),
    (libc::ESRCH, "ESRCH"),
];

/// What came of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The kernel said no, with this error.
    Refused(i32),
    /// The process was ended by this signal.
    Killed(i32),
    /// It was done.
    Done(i64),
    /// It neither ended nor came back.
    Hung,
}

impl Outcome {
    /// Whether nothing came of it.
    #[must_use]
    pub fn is_harmless(self) -> bool {
        matches!(self, Self::Refused(_) | Self::Killed(libc::SIGSYS))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(errno) => match NAMES.iter().find(|(number, _)| number == errno) {
                Some((_, name)) => f.write_str(name),
                None => write!(f, "errno {errno}"),
            },
            Self::Killed(libc::SIGSYS) => f.write_str("killed"),
            Self::Killed(signal) => write!(f, "signal {signal}"),
            Self::Done(value) => write!(f, "DONE ({value})"),
            Self::Hung => f.write_str("HUNG"),
        }
    }
}

/// A result of the kernel: a negated error, or what it gave.
#[must_use]
pub fn outcome(result: i64) -> Outcome {
    match i32::try_from(-result) {
        Ok(errno @ 1..=4095) => Outcome::Refused(errno),
        _ => Outcome::Done(result),
    }
}
