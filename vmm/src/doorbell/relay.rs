//! The thread that stands between two eventfds: it counts, and does what its [`Interposer`] says.
//!
//! One thread serves all interposed doorbells and calls of a machine. It never blocks on an eventfd: a peer that shares
//! one may change its flags or take the count first.
#![allow(unsafe_code, reason = "vmm-sys-util's EventFd has no AsFd; its descriptor is borrowed for one call")]

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::{Errno, ReadWriteFlags};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::actor::Laps;
use crate::seccomp::{self, ThreadClass};

/// What becomes of the signals that one wake-up of the relay found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They go on at once.
    Pass,
    /// They go on after this long.
    Delay(Duration),
    /// They are gone.
    Drop,
}

/// Watches signals on their way, on the relay's thread: it must not block.
pub trait Interposer: Send + Sync {
    /// `count` signals have arrived since the last call.
    fn signalled(&self, count: u64) -> Verdict;
}

/// Only counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct PassThrough;

impl Interposer for PassThrough {
    fn signalled(&self, _count: u64) -> Verdict {
        Verdict::Pass
    }
}

/// The relay cannot work.
#[derive(Debug, Error)]
pub enum RelayError {
    /// No descriptor, no thread, or no room in the poll set.
    #[error("cannot relay an eventfd ({0}); raise the limit on open files or processes (ulimit -n, -u)")]
    Resource(#[from] io::Error),
}

impl From<Errno> for RelayError {
    fn from(errno: Errno) -> Self {
        Self::Resource(errno.into())
    }
}

/// One relayed eventfd.
struct Line {
    from: EventFd,
    to: EventFd,
    interposer: Arc<dyn Interposer>,
    seen: AtomicU64,
    held: Mutex<Held>,
}

/// Signals held back until their time.
#[derive(Default)]
struct Held {
    signals: Vec<(Instant, u64)>,
    /// The line has ended: whatever still arrives goes on at once.
    ended: bool,
}

impl Line {
    /// Takes what has been signalled and deals with it. Two threads may do so: each signal is taken once, and none
    /// falls between a line's end and its last signal.
    fn carry(&self, now: Instant) {
        let mut held = lock(&self.held);
        let count = take(&self.from);
        if count == 0 {
            return;
        }
        self.seen.fetch_add(count, Ordering::Relaxed);
        match self.interposer.signalled(count) {
            Verdict::Pass => signal(&self.to, count),
            Verdict::Delay(_) if held.ended => signal(&self.to, count),
            Verdict::Delay(delay) => held.signals.push((now + delay, count)),
            Verdict::Drop => {}
        }
    }
    /// Lets go of what is due; `None` when nothing is held any more.
    fn release(&self, now: Instant) -> Option<Instant> {
        let mut held = lock(&self.held);
        held.signals.retain(|(due, count)| {
            let waits = *due > now;
            if !waits {
                signal(&self.to, *count);
            }
            waits
        });
        held.signals.iter().map(|(due, _)| *due).min()
    }
}

struct Shared {
    poll: rustix::fd::OwnedFd,
    wake: EventFd,
    laps: Laps,
    lines: Mutex<Lines>,
}

#[derive(Default)]
struct Lines {
    next: u64,
    by_key: HashMap<u64, Arc<Line>>,
    ended: bool,
}

/// Handle of the relay's thread, which ends with the last handle.
pub struct Relay {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Key of the wake-up eventfd in the poll set.
const WAKE: u64 = u64::MAX;

impl Relay {
    /// Starts the thread.
    ///
    /// # Errors
    /// If there is no descriptor or thread left.
    pub fn new() -> Result<Arc<Self>, RelayError> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        epoll::add(&poll, borrowed(&wake), epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        let shared = Arc::new(Shared { poll, wake, laps: Laps::default(), lines: Mutex::default() });
        let served = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("relay".into()).spawn(move || {
            seccomp::enter(ThreadClass::Events);
            serve(&served);
        })?;
        Ok(Arc::new(Self { shared, thread: Mutex::new(Some(thread)) }))
    }

    /// Waits until what was signalled before this call has been dealt with; what an interposer delays stays delayed.
    /// Whether it was by `deadline`.
    pub fn flush(&self, deadline: Instant) -> bool {
        let lap = self.shared.laps.ask();
        // Behind everything that is ready already: epoll reports in that order.
        signal(&self.shared.wake, 1);
        self.shared.laps.wait(lap, deadline)
    }

    /// Relays signals of `from` to `to` until the answer is dropped.
    ///
    /// # Errors
    /// If the poll set is full.
    pub fn carry(
        self: &Arc<Self>,
        from: EventFd,
        to: EventFd,
        interposer: Arc<dyn Interposer>,
    ) -> Result<RelayedEvent, RelayError> {
        let line = Arc::new(Line { from, to, interposer, seen: AtomicU64::new(0), held: Mutex::default() });
        let key = {
            let mut lines = lock(&self.shared.lines);
            let key = lines.next;
            lines.next += 1;
            lines.by_key.insert(key, Arc::clone(&line));
            key
        };
        let data = epoll::EventData::new_u64(key);
        if let Err(errno) = epoll::add(&self.shared.poll, borrowed(&line.from), data, epoll::EventFlags::IN) {
            lock(&self.shared.lines).by_key.remove(&key);
            return Err(errno.into());
        }
        Ok(RelayedEvent { relay: Arc::clone(self), key, line })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        lock(&self.shared.lines).ended = true;
        signal(&self.shared.wake, 1);
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // It only fails if the thread panicked, which its hook has reported.
            let _ = thread.join();
        }
    }
}

/// A pair of eventfds in the relay's care. Dropping it ends the relaying; signals that were held back or not yet seen
/// go on at once, so that none is lost.
pub struct RelayedEvent {
    relay: Arc<Relay>,
    key: u64,
    line: Arc<Line>,
}

impl RelayedEvent {
    /// Signals that arrived so far.
    pub fn count(&self) -> u64 {
        self.line.seen.load(Ordering::Relaxed)
    }
    /// The eventfd that is listened to.
    pub fn source(&self) -> &EventFd {
        &self.line.from
    }
}

impl Drop for RelayedEvent {
    fn drop(&mut self) {
        let shared = &self.relay.shared;
        lock(&shared.lines).by_key.remove(&self.key);
        // Fails only if it is not there, and then there is nothing to remove.
        let _ = epoll::delete(&shared.poll, borrowed(&self.line.from));
        {
            let mut held = lock(&self.line.held);
            held.ended = true;
            for (_, count) in held.signals.drain(..) {
                signal(&self.line.to, count);
            }
        }
        self.line.carry(Instant::now());
    }
}

fn serve(shared: &Shared) {
    let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
    let mut due: Option<Instant> = None;
    loop {
        let timeout = due.map(|due| {
            let left = due.saturating_duration_since(Instant::now());
            // A fraction more than needed rather than a spin of too short waits.
            rustix::event::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        events.clear();
        match epoll::wait(&shared.poll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                tracing::error!(%errno, "the relay of interposed doorbells has ended");
                return;
            }
        }
        let now = Instant::now();
        let mut lap = None;
        for event in &events {
            let key = event.data.u64();
            if key == WAKE {
                take(&shared.wake);
                lap = Some(shared.laps.begin());
                continue;
            }
            let line = lock(&shared.lines).by_key.get(&key).cloned();
            if let Some(line) = line {
                line.carry(now);
            }
        }
        let lines: Vec<_> = {
            let lines = lock(&shared.lines);
            if lines.ended {
                return;
            }
            lines.by_key.values().cloned().collect()
        };
        due = lines.iter().filter_map(|line| line.release(now)).min();
        if let Some(lap) = lap {
            shared.laps.finish(lap);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The descriptor of an eventfd, to wait for it.
pub(crate) fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `event` is, which the lifetime says.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Takes an eventfd's count, zero when it has none, without ever blocking: whoever else holds it may have cleared
/// O_NONBLOCK or taken the count.
pub(crate) fn take(event: &EventFd) -> u64 {
    let mut count = [0; 8];
    let mut buffers = [io::IoSliceMut::new(&mut count)];
    let no_offset = u64::MAX;
    let read = match rustix::io::preadv2(borrowed(event), &mut buffers, no_offset, ReadWriteFlags::NOWAIT) {
        // Kernels before 5.18 know no RWF_NOWAIT for eventfds.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => rustix::io::read(borrowed(event), &mut count),
        other => other,
    };
    match read {
        Ok(8) => u64::from_ne_bytes(count),
        _ => 0,
    }
}

/// Adds to an eventfd's count. The only failure is a counter that is full, and then it is signalled anyway.
pub(crate) fn signal(event: &EventFd, count: u64) {
    let _ = event.write(count);
}
