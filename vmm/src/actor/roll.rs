//! The roll of everybody who has a mailbox, for operators who want to know who keeps whom waiting.
//!
//! There is no bounded mailbox that is not on a roll, because making one is what puts it there: [`mailbox`] between threads,
//! [`Roll::post`] for one that is more than a queue, and [`Tree::start`](super::Tree::start) for an actor. Nothing is counted on
//! the way of a message that the mailbox does not know anyway; it is asked when somebody wants to know.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender, TryRecvError, TrySendError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// An actor as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorReport {
    /// Its name, with those of the trees that it is in before it.
    pub name: Arc<str>,
    /// Messages that wait in its mailbox.
    pub waiting: usize,
    /// How many its mailbox holds.
    pub capacity: usize,
    /// How often it was full: a message was given back or dropped, or its sender had to wait.
    pub full: u64,
    /// Which incarnation it is, or serves; 1 for what has one only.
    pub generation: u64,
    /// What it is at.
    pub state: String,
}

/// Something with a mailbox.
pub trait Post: Send + Sync {
    /// What it is at.
    fn report(&self) -> ActorReport;
}

/// Who is there. Clones speak of the same; whoever is gone is no longer on it.
#[derive(Clone, Default)]
pub struct Roll(Arc<Mutex<Vec<Weak<dyn Post>>>>);

impl std::fmt::Debug for Roll {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Roll")
    }
}

impl Roll {
    /// Puts a mailbox on the roll for as long as somebody holds it.
    pub fn post<P: Post + 'static>(&self, post: P) -> Arc<P> {
        let post = Arc::new(post);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|one| one.strong_count() > 0);
        let weak: Weak<P> = Arc::downgrade(&post);
        all.push(weak);
        post
    }

    /// Everybody who is there, in the order in which they came.
    #[must_use]
    pub fn report(&self) -> Vec<ActorReport> {
        // Outside the lock: whoever reports may take locks of its own.
        let all: Vec<_> =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect();
        all.iter().map(|post| post.report()).collect()
    }
}

struct Count {
    name: String,
    capacity: usize,
    generation: u64,
    waiting: AtomicUsize,
    full: AtomicU64,
}

impl Post for Count {
    fn report(&self) -> ActorReport {
        let waiting = self.waiting.load(Ordering::Relaxed);
        ActorReport {
            name: self.name.as_str().into(),
            waiting,
            capacity: self.capacity,
            full: self.full.load(Ordering::Relaxed),
            generation: self.generation,
            state: if waiting > 0 { "busy" } else { "idle" }.into(),
        }
    }
}

/// Where messages are put in.
pub struct Outbox<M> {
    sender: SyncSender<M>,
    count: Arc<Count>,
}

impl<M> Clone for Outbox<M> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), count: Arc::clone(&self.count) }
    }
}

impl<M> Outbox<M> {
    /// Puts a message in if there is room.
    ///
    /// # Errors
    /// The message, with the reason.
    pub fn try_send(&self, message: M) -> Result<(), TrySendError<M>> {
        // Counted first, so that whoever takes it out never counts below zero.
        self.count.waiting.fetch_add(1, Ordering::Relaxed);
        self.sender.try_send(message).inspect_err(|error| {
            self.count.waiting.fetch_sub(1, Ordering::Relaxed);
            if matches!(error, TrySendError::Full(_)) {
                self.count.full.fetch_add(1, Ordering::Relaxed);
            }
        })
    }

    /// Puts a message in, and waits for room.
    ///
    /// # Errors
    /// The message, when nobody will read it.
    pub fn send(&self, message: M) -> Result<(), mpsc::SendError<M>> {
        match self.try_send(message) {
            Ok(()) => Ok(()),
            Err(TrySendError::Disconnected(message)) => Err(mpsc::SendError(message)),
            Err(TrySendError::Full(message)) => {
                self.count.waiting.fetch_add(1, Ordering::Relaxed);
                self.sender.send(message).inspect_err(|_| {
                    self.count.waiting.fetch_sub(1, Ordering::Relaxed);
                })
            }
        }
    }
}

/// Where they are taken out.
pub struct Inbox<M> {
    receiver: mpsc::Receiver<M>,
    count: Arc<Count>,
}

impl<M> Inbox<M> {
    fn taken<E>(&self, taken: Result<M, E>) -> Result<M, E> {
        taken.inspect(|_| {
            self.count.waiting.fetch_sub(1, Ordering::Relaxed);
        })
    }

    /// The next message; waits for it.
    ///
    /// # Errors
    /// When there will be none.
    pub fn recv(&self) -> Result<M, mpsc::RecvError> {
        self.taken(self.receiver.recv())
    }

    /// The next message; waits for it for at most `limit`.
    ///
    /// # Errors
    /// When there is none within that time, or ever.
    pub fn recv_timeout(&self, limit: Duration) -> Result<M, RecvTimeoutError> {
        self.taken(self.receiver.recv_timeout(limit))
    }

    /// The next message, if there is one.
    ///
    /// # Errors
    /// When there is none, now or ever.
    pub fn try_recv(&self) -> Result<M, TryRecvError> {
        self.taken(self.receiver.try_recv())
    }
}

/// A mailbox between threads that holds `capacity` messages, on the roll by this name and incarnation.
pub fn mailbox<M>(roll: &Roll, name: String, generation: u64, capacity: usize) -> (Outbox<M>, Inbox<M>) {
    let (sender, receiver) = mpsc::sync_channel(capacity);
    let (waiting, full) = (AtomicUsize::new(0), AtomicU64::new(0));
    let count = roll.post(Count { name, capacity, generation, waiting, full });
    (Outbox { sender, count: Arc::clone(&count) }, Inbox { receiver, count })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who has a mailbox is on the roll, with what is in it, and is not when it is gone.
    #[test]
    fn a_mailbox_is_on_the_roll_as_long_as_it_lives() {
        let roll = Roll::default();
        let (sender, receiver) = mailbox(&roll, "clerk".into(), 3, 2);
        let clerk = || roll.report().into_iter().find(|one| &*one.name == "clerk");
        assert_eq!(clerk().map(|one| (one.waiting, one.capacity, one.full, one.generation)), Some((0, 2, 0, 3)));
        sender.send('a').unwrap();
        sender.try_send('b').unwrap();
        assert!(sender.try_send('c').is_err());
        assert_eq!(clerk().map(|one| (one.waiting, one.full, one.state)), Some((2, 1, "busy".to_owned())));
        assert_eq!((receiver.recv(), receiver.try_recv()), (Ok('a'), Ok('b')));
        assert!(receiver.recv_timeout(Duration::ZERO).is_err());
        assert_eq!(clerk().map(|one| (one.waiting, one.state)), Some((0, "idle".to_owned())));
        drop(sender);
        assert!(clerk().is_some(), "somebody still reads");
        drop(receiver);
        assert_eq!(clerk(), None);
    }
}
