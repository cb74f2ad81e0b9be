//! One register access, and the three ways to answer it.
//!
//! A device answers *now*, or hands back a [`Deferred`] and lets whoever holds the paired [`Completion`] finish the
//! access later: an actor in this process, or a process at the other end of a socket. The device itself stays
//! synchronous and testable. A dropped [`Completion`] is a defined answer: all ones for a read, "dropped" for a write.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use atoll_protocol::CauseId;
use atoll_protocol::lane::Watch;

/// Where an access lands inside a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Offset from the start of the device's range, in bytes.
    pub offset: u64,
    /// Width: 1, 2, 4 or 8 bytes.
    pub width: u8,
}

/// How a device answers an access.
#[must_use]
#[derive(Debug)]
pub enum Answer {
    /// Done; a read's bytes are in the buffer.
    Now,
    /// Somebody else will complete it.
    Later(Deferred),
}

/// A device made of registers, reached by PIO or MMIO.
pub trait RegisterDevice: Send {
    /// Reads `data.len()` bytes (1, 2, 4 or 8) at `offset` from the start of the range that the device was mapped at.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Answer;
    /// Writes likewise.
    fn write(&mut self, offset: u64, data: &[u8]) -> Answer;
}

#[derive(Debug)]
enum State {
    Waiting(Option<Waker>),
    Done(u64),
    Dropped,
    Taken,
}

/// Where answers of another process arrive. The thread that waits for one takes it there itself, so that nobody has to
/// be woken in between.
pub trait Arrivals: Send + Sync {
    /// Completes what has come.
    fn collect(&self);
}

/// A question to another process.
pub struct Elsewhere {
    /// Where its answer arrives.
    arrivals: Arc<dyn Arrivals>,
    /// Tells the other process to wake whoever waits; none where answers come by themselves.
    watch: Option<Watch>,
}

impl Elsewhere {
    /// Looks for what has come; what to sleep on if that is not enough.
    pub fn look(&mut self) -> Option<&Watch> {
        let watch = self.watch.as_mut()?;
        // First, so that what comes after the look ends the sleep.
        watch.renew();
        self.arrivals.collect();
        Some(watch)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        // What came before it was known that nobody waits any more.
        if self.watch.take().is_some() {
            self.arrivals.collect();
        }
    }
}

/// Who hears that a question was not answered in time.
pub trait Overdue: Send + Sync {
    /// The asker goes on without the answer to the question of that cause.
    fn overdue(&self, cause: CauseId);
}

/// How long the asker waits, and who hears of it if that was in vain.
struct Limit {
    budget: Duration,
    cause: CauseId,
    hears: Arc<dyn Overdue>,
}

/// The asker's end of an access that is answered later: a future of the value read (little-endian, the access's width;
/// writes give zero), or `None` when nobody will ever complete it.
pub struct Deferred {
    state: Arc<Mutex<State>>,
    elsewhere: Option<Elsewhere>,
    limit: Option<Limit>,
}

impl fmt::Debug for Deferred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deferred").field("state", &self.state).finish_non_exhaustive()
    }
}

/// The answerer's end.
#[derive(Debug)]
pub struct Completion(Arc<Mutex<State>>);

/// Makes both ends of an access that will be completed later.
pub fn deferred() -> (Completion, Deferred) {
    let state = Arc::new(Mutex::new(State::Waiting(None)));
    (Completion(Arc::clone(&state)), Deferred { state, elsewhere: None, limit: None })
}

fn settle(shared: &Mutex<State>, outcome: State) {
    let mut state = shared.lock().unwrap_or_else(PoisonError::into_inner);
    if let State::Waiting(waker) = &mut *state {
        let waker = waker.take();
        *state = outcome;
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Deferred {
    /// Says that another process answers, and where its answer arrives. With a `watch`, begun before the question was
    /// asked, whoever waits must [look](Elsewhere::look) there.
    #[must_use]
    pub fn elsewhere(mut self, arrivals: Arc<dyn Arrivals>, watch: Option<Watch>) -> Self {
        self.elsewhere = Some(Elsewhere { arrivals, watch });
        self
    }

    /// Whether another process answers.
    #[must_use]
    pub fn is_elsewhere(&self) -> bool {
        self.elsewhere.is_some()
    }

    /// Where the answer arrives, if another process gives it.
    pub fn take_elsewhere(&mut self) -> Option<Elsewhere> {
        self.elsewhere.take()
    }

    /// Says how long the asker waits, and who hears of it if that was in vain.
    #[must_use]
    pub fn within(mut self, budget: Duration, cause: CauseId, hears: Arc<dyn Overdue>) -> Self {
        self.limit = Some(Limit { budget, cause, hears });
        self
    }

    /// How long to wait, if the answerer has said so.
    #[must_use]
    pub fn budget(&self) -> Option<Duration> {
        self.limit.as_ref().map(|limit| limit.budget)
    }

    /// Gives up: [`Self::budget`] is over. Whatever is answered after all goes nowhere.
    pub fn give_up(self) {
        if let Some(limit) = self.limit {
            limit.hears.overdue(limit.cause);
        }
    }
}

impl Completion {
    /// Whether somebody still waits for the answer.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        // The asker has the other one.
        Arc::strong_count(&self.0) > 1
    }

    /// Completes the access: the value read, or zero for a write.
    pub fn complete(self, value: u64) {
        settle(&self.0, State::Done(value));
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        settle(&self.0, State::Dropped);
    }
}

impl Future for Deferred {
    type Output = Option<u64>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            State::Waiting(_) => {
                *state = State::Waiting(Some(context.waker().clone()));
                Poll::Pending
            }
            State::Done(value) => {
                let value = *value;
                *state = State::Taken;
                Poll::Ready(Some(value))
            }
            State::Dropped | State::Taken => Poll::Ready(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(deferred: &mut Deferred) -> Poll<Option<u64>> {
        Pin::new(deferred).poll(&mut Context::from_waker(Waker::noop()))
    }

    /// An access that nobody will complete must not leave its asker waiting.
    #[test]
    fn dropped_completion_is_an_answer() {
        let (completion, mut asked) = deferred();
        assert_eq!(poll(&mut asked), Poll::Pending);
        drop(completion);
        assert_eq!(poll(&mut asked), Poll::Ready(None));
    }

    #[test]
    fn value_arrives_once() {
        let (completion, mut asked) = deferred();
        completion.complete(0x5a);
        assert_eq!(poll(&mut asked), Poll::Ready(Some(0x5a)));
        assert_eq!(poll(&mut asked), Poll::Ready(None));
    }
}
