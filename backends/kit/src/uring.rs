//! One io_uring, restricted before it can be used.
//!
//! A ring is created disabled, told the few opcodes that its device needs, and enabled by the thread that
//! owns it; from then on it can neither open a file nor make a socket, whatever is written into it. That
//! matters because io_uring requests pass no seccomp filter.
//!
//! The ring is made with SINGLE_ISSUER and DEFER_TASKRUN: completions are delivered only when the owner asks
//! for them, never by interrupting it. A flag in shared memory (TASKRUN) says without a system call whether
//! any are waiting.

#![allow(unsafe_code, reason = "submission entries carry raw pointers and descriptors")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use thiserror::Error;

/// Why a ring could not be made or driven.
#[derive(Debug, Error)]
pub enum UringError {
    /// The kernel has no io_uring, or a policy forbids it.
    #[error("cannot create an io_uring: {0}; this needs Linux 6.1 or newer and kernel.io_uring_disabled=0")]
    Create(#[source] io::Error),
    /// The restrictions were refused.
    #[error("cannot restrict an io_uring to its opcodes: {0}; this needs Linux 5.10 or newer")]
    Restrict(#[source] io::Error),
    /// The ring could not be enabled by its thread.
    #[error("cannot enable an io_uring: {0}")]
    Enable(#[source] io::Error),
    /// Submitting or waiting failed.
    #[error("io_uring_enter failed: {0}")]
    Enter(#[source] io::Error),
}

/// Room for completions: more than a queue can have in flight, so that none ever waits in the kernel for room.
const COMPLETIONS: u32 = 2048;
/// Submissions that may fail to make room before a ring counts as stuck.
const PUSH_TRIES: u32 = 1000;

/// A restricted ring and the entries that wait for the next submission.
pub struct Uring {
    ring: IoUring,
    queued: u32,
}

/// One completion: the `user_data` of its submission, the result, and whether more of the same will follow.
#[derive(Debug, Clone, Copy)]
pub struct Completion {
    /// What the submission was marked with.
    pub user_data: u64,
    /// The result of the operation, a negated errno on failure.
    pub result: i32,
    /// A multishot operation stays armed.
    pub more: bool,
}

impl Uring {
    /// A ring of `entries` submission slots that accepts `opcodes` besides the polls that the kit needs.
    /// Must be called by the thread that will drive the ring.
    pub fn new(entries: u32, opcodes: &[u8]) -> Result<Self, UringError> {
        Self::with_room(entries, COMPLETIONS, opcodes)
    }

    /// The same with room for `completions`.
    pub fn with_room(entries: u32, completions: u32, opcodes: &[u8]) -> Result<Self, UringError> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(completions)
            .build(entries)
            .map_err(UringError::Create)?;
        let mut restrictions: Vec<Restriction> = opcodes.iter().map(|op| Restriction::sqe_op(*op)).collect();
        restrictions.push(Restriction::sqe_op(opcode::PollAdd::CODE));
        restrictions.push(Restriction::sqe_op(opcode::PollRemove::CODE));
        let submitter = ring.submitter();
        submitter.register_restrictions(&mut restrictions).map_err(UringError::Restrict)?;
        submitter.register_enable_rings().map_err(UringError::Enable)?;
        Ok(Self { ring, queued: 0 })
    }

    /// Queues one entry; submits what is queued already when the submission queue is full.
    ///
    /// # Safety
    /// Everything that the entry points to must stay valid until its completion has been seen.
    pub unsafe fn push(&mut self, entry: &squeue::Entry) -> Result<(), UringError> {
        for _ in 0..PUSH_TRIES {
            // SAFETY: the caller keeps what the entry points to alive until its completion.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.queued += 1;
                return Ok(());
            }
            self.submit()?;
        }
        Err(UringError::Enter(io::Error::from_raw_os_error(libc::EBUSY)))
    }

    /// Watches `fd` for readability; completes once per wake-up until removed or until `more` is false.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, user_data: u64) -> Result<(), UringError> {
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(user_data);
        // SAFETY: the entry points to no memory; the kernel takes its own reference to the file.
        unsafe { self.push(&entry) }
    }

    /// Watches `fd` until it is ready for one of `events` (POLLIN, POLLOUT), once.
    pub fn watch_once(&mut self, fd: BorrowedFd<'_>, events: i16, user_data: u64) -> Result<(), UringError> {
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events as u32).build().user_data(user_data);
        // SAFETY: the entry points to no memory; the kernel takes its own reference to the file.
        unsafe { self.push(&entry) }
    }

    /// Stops watching what was watched as `watched`; the removal itself completes as `user_data`.
    pub fn unwatch(&mut self, watched: u64, user_data: u64) -> Result<(), UringError> {
        let entry = opcode::PollRemove::new(watched).build().user_data(user_data);
        // SAFETY: the entry points to no memory.
        unsafe { self.push(&entry) }
    }

    /// Entries queued and not submitted yet.
    pub fn queued(&self) -> u32 {
        self.queued
    }

    /// Hands queued entries to the kernel and lets it deliver completions, without waiting.
    pub fn submit(&mut self) -> Result<(), UringError> {
        self.enter(0)
    }

    /// Hands queued entries to the kernel and waits for at least one completion.
    pub fn submit_and_wait(&mut self) -> Result<(), UringError> {
        self.enter(1)
    }

    /// Like [`Uring::submit_and_wait`], but no longer than until `end`.
    pub fn submit_and_wait_until(&mut self, end: Instant) -> Result<(), UringError> {
        let left = types::Timespec::from(end.saturating_duration_since(Instant::now()));
        let args = types::SubmitArgs::new().timespec(&left);
        let entered = self.ring.submitter().submit_with_args(1, &args);
        self.entered(entered)
    }

    /// True when the kernel holds completions that one `submit` would deliver.
    pub fn deliverable(&mut self) -> bool {
        self.ring.submission().taskrun()
    }

    fn enter(&mut self, want: usize) -> Result<(), UringError> {
        // IORING_ENTER_GETEVENTS, so that deferred completions are delivered even when none is waited for.
        const GETEVENTS: u32 = 1;
        let queued = self.ring.submission().len() as u32;
        // SAFETY: no argument is passed; what the entries point to is kept alive by those who pushed them.
        let entered = unsafe { self.ring.submitter().enter::<libc::sigset_t>(queued, want as u32, GETEVENTS, None) };
        self.entered(entered)
    }

    fn entered(&mut self, entered: io::Result<usize>) -> Result<(), UringError> {
        let harmless = [libc::EINTR, libc::EBUSY, libc::EAGAIN, libc::ETIME];
        match entered {
            Ok(_) => {}
            // A signal, a completion queue that must be emptied first, a wait that is over: the caller reaps and comes
            // back.
            Err(e) if e.raw_os_error().is_some_and(|number| harmless.contains(&number)) => {}
            Err(e) => return Err(UringError::Enter(e)),
        }
        self.queued = self.ring.submission().len() as u32;
        Ok(())
    }

    /// Takes the completions that have been delivered into `out`.
    pub fn reap(&mut self, out: &mut Vec<Completion>) {
        out.extend(self.ring.completion().map(|c| Completion {
            user_data: c.user_data(),
            result: c.result(),
            more: io_uring::cqueue::more(c.flags()),
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_opcode_that_was_not_asked_for_is_refused_by_the_kernel() {
        let mut ring = Uring::new(8, &[opcode::Fsync::CODE]).unwrap();
        let path = c"/etc/hostname";
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build().user_data(7);
        // SAFETY: the path is static.
        unsafe { ring.push(&open) }.unwrap();
        ring.submit_and_wait().unwrap();
        let mut seen = Vec::new();
        ring.reap(&mut seen);
        assert_eq!(seen.len(), 1);
        assert_eq!((seen[0].user_data, seen[0].result), (7, -libc::EACCES));
    }
}
