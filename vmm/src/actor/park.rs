//! How an OS thread (a vCPU) waits for an answer: parked, until the value, the deadline or its stop signal, whichever
//! comes first. No runtime is involved, so a busy one delays no guest.
//!
//! The thread sleeps on a futex in its stop signal, which its waker and the signal change. For an answer of another
//! process it sleeps on that process's word as well, and takes the answer itself ([`Elsewhere`]).

#![allow(unsafe_code, reason = "a wait on two futexes takes their addresses as pointers")]

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use atoll_devices::access::{Deferred, Elsewhere};
use atoll_protocol::lane::Watch;
use rustix::thread::futex;
use rustix::time::{ClockId, Timespec, clock_gettime};

use super::clock::{Clock, Moment};

const AWAKE: u32 = 0;
const NOTIFIED: u32 = 1;
const ASLEEP: u32 = 2;

/// Tells one thread to give up waiting: the machine ends, and the answer no longer matters.
///
/// A pause does not raise it. A paused vCPU must have no exit half done, so it waits for its answer or its deadline.
#[derive(Clone, Debug, Default)]
pub struct StopSignal(Arc<StopState>);

#[derive(Debug, Default)]
struct StopState {
    raised: AtomicBool,
    /// What the thread sleeps on.
    word: AtomicU32,
}

impl StopState {
    fn notify(&self) {
        if self.word.swap(NOTIFIED, Ordering::SeqCst) == ASLEEP {
            // Fails only for a word that is no memory.
            let _ = futex::wake(&self.word, futex::Flags::PRIVATE, i32::MAX as u32);
        }
    }

    /// Sleeps until notified, until there is news, or for `nap`; perhaps for less.
    fn sleep(&self, watch: Option<&Watch>, nap: Duration) {
        if self.word.compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            let nap = Timespec::try_from(nap).unwrap_or(Timespec { tv_sec: i64::from(i32::MAX), tv_nsec: 0 });
            // However it ends, the caller looks again.
            match watch {
                None => drop(futex::wait(&self.word, futex::Flags::PRIVATE, ASLEEP, Some(&nap))),
                Some(watch) => self.sleep_on_both(watch, nap),
            }
        }
        self.word.store(AWAKE, Ordering::SeqCst);
    }

    fn sleep_on_both(&self, watch: &Watch, nap: Timespec) {
        let now = clock_gettime(ClockId::Monotonic);
        // Saturates after 2 billion years.
        let until = now.checked_add(nap).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        let (news, seen) = watch.word();
        let [mut own, mut other] = [futex::Wait::new(); 2];
        own.val = u64::from(ASLEEP);
        own.uaddr = futex::WaitPtr::new(self.word.as_ptr().cast());
        own.flags = futex::WaitFlags::SIZE_U32 | futex::WaitFlags::PRIVATE;
        other.val = u64::from(seen);
        other.uaddr = futex::WaitPtr::new(news.as_ptr().cast());
        other.flags = futex::WaitFlags::SIZE_U32;
        let _ = futex::waitv(&[own, other], futex::WaitvFlags::empty(), Some(&until), ClockId::Monotonic);
    }
}

impl Wake for StopState {
    fn wake(self: Arc<Self>) {
        self.notify();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.notify();
    }
}

impl StopSignal {
    /// A lowered signal.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Raises it and wakes the thread that is parked on it.
    pub fn raise(&self) {
        self.0.raised.store(true, Ordering::SeqCst);
        self.0.notify();
    }

    /// Lowers it, for the next run.
    pub fn lower(&self) {
        self.0.raised.store(false, Ordering::SeqCst);
    }

    /// Whether it is raised.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        self.0.raised.load(Ordering::SeqCst)
    }
}

/// How a wait ended.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub enum Parked<T> {
    /// With the value.
    Done(T),
    /// The deadline passed first.
    Late,
    /// The stop signal was raised first.
    Stopped,
}

/// Longer than any scheduler's delay on a busy host.
const OVERSLEPT: Duration = Duration::from_millis(200);

/// Parks this thread until `future` is done, `deadline` has come on `clock`, or `stop` is raised. A value that is
/// there counts even when the deadline has passed too. A signal is for one thread: two that park on the same one would
/// take each other's wake-up.
///
/// A future that is given up is dropped, which whoever would complete it can see. A thread that wakes long after the
/// deadline was stopped, and perhaps the whole VMM with it: it waits a little more, for answers that were stopped too.
pub fn park<F: Future>(future: F, clock: &dyn Clock, deadline: Moment, stop: &StopSignal) -> Parked<F::Output> {
    park_on(pin!(future), None, clock, (clock.now(), deadline), stop)
}

/// The same for an access: at most until its own deadline, and an answer of another process is taken where it arrives.
/// An answerer that has set a deadline and lets it pass hears of that.
pub fn park_access(
    mut deferred: Deferred,
    clock: &dyn Clock,
    budget: Duration,
    stop: &StopSignal,
) -> Parked<Option<u64>> {
    let own = deferred.budget().filter(|own| *own <= budget);
    let now = clock.now();
    let deadline = now.after(own.unwrap_or(budget));
    let elsewhere = deferred.take_elsewhere();
    match park_on(pin!(&mut deferred), elsewhere, clock, (now, deadline), stop) {
        Parked::Late if own.is_some() => {
            deferred.give_up();
            Parked::Done(None)
        }
        ended => ended,
    }
}

fn park_on<F: Future>(
    mut future: Pin<&mut F>,
    mut elsewhere: Option<Elsewhere>,
    clock: &dyn Clock,
    (mut now, mut deadline): (Moment, Moment),
    stop: &StopSignal,
) -> Parked<F::Output> {
    let waker = Waker::from(Arc::clone(&stop.0));
    let mut context = Context::from_waker(&waker);
    // What was left of an earlier wait; a signal that is raised is seen below.
    stop.0.word.store(AWAKE, Ordering::SeqCst);
    let mut slept = false;
    let mut forgiven = false;
    loop {
        let watch = elsewhere.as_mut().and_then(Elsewhere::look);
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return Parked::Done(value);
        }
        if stop.is_raised() {
            return Parked::Stopped;
        }
        if slept {
            now = clock.now();
        }
        if slept && now >= deadline {
            if clock.overslept(deadline) <= OVERSLEPT || forgiven {
                return Parked::Late;
            }
            forgiven = true;
            deadline = now.after(OVERSLEPT);
        }
        // Woken early, late or for no reason: the loop looks again.
        stop.0.sleep(watch, clock.nap_from(now, deadline));
        slept = true;
    }
}
