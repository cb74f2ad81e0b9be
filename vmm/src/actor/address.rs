//! Addresses: how a message gets into a bounded mailbox, and how an answer comes back.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use atoll_protocol::{DeviceId, Generation};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use super::clock::{Clock, Moment};
use super::park::{Parked, StopSignal, park};

/// What happens to a message that finds the mailbox full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// The sender waits until there is room: work that must not be lost.
    Wait,
    /// The sender gets it back in [`TellError::Full`]: what the next message of its sort makes up for, and what a thread
    /// sends that must not wait.
    Refuse,
}

/// A message to an actor.
pub trait Mail: Send + 'static {
    /// Decided per message, never by whoever happens to send it.
    fn when_full(&self) -> WhenFull;
}

/// A message that was not delivered; it is given back.
#[derive(Error)]
pub enum TellError<M> {
    /// The mailbox is full and the message may not wait.
    #[error("the mailbox of {actor} is full")]
    Full {
        /// Whose.
        actor: Arc<str>,
        /// The message.
        message: M,
    },
    /// The actor has ended.
    #[error("{actor} has ended")]
    Gone {
        /// Who.
        actor: Arc<str>,
        /// The message.
        message: M,
    },
}

impl<M> fmt::Debug for TellError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, actor) = match self {
            Self::Full { actor, .. } => ("Full", actor),
            Self::Gone { actor, .. } => ("Gone", actor),
        };
        write!(f, "{word}({actor})")
    }
}

/// Why a question has no answer.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum AskError {
    /// The mailbox is full and the question may not wait.
    #[error("the mailbox of {0} is full: ask again later")]
    Full(Arc<str>),
    /// The actor has ended, or ended before it answered.
    #[error("{0} has ended")]
    Gone(Arc<str>),
    /// The actor dropped the question.
    #[error("{0} did not answer the question")]
    Unanswered(Arc<str>),
    /// No answer by the deadline.
    #[error("{0} did not answer by the deadline")]
    Late(Arc<str>),
    /// The asking thread was told to stop.
    #[error("stopped while waiting for {0}")]
    Stopped(Arc<str>),
    /// The process that serves the device died, and the question is not one that may be repeated.
    #[error("the process of {device} died before it answered; its new generation is {}", .successor.0)]
    PeerDied {
        /// Whose process.
        device: DeviceId,
        /// Its next incarnation.
        successor: Generation,
    },
}

/// The answerer's end of a question. Dropping it is an answer too: [`AskError::Unanswered`].
#[derive(Debug)]
pub struct Reply<R>(oneshot::Sender<Result<R, AskError>>);

impl<R> Reply<R> {
    #[cfg(test)]
    pub(super) fn new(sender: oneshot::Sender<Result<R, AskError>>) -> Self {
        Self(sender)
    }

    /// Answers. An asker that has given up is no error.
    pub fn send(self, answer: R) {
        let _ = self.0.send(Ok(answer));
    }

    /// Says why there is no answer.
    pub fn fail(self, error: AskError) {
        let _ = self.0.send(Err(error));
    }

    /// Whether nobody waits any more, so that the work can be saved.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.0.is_closed()
    }
}

/// Where to reach an actor that takes `M`.
pub struct Address<M> {
    sender: mpsc::Sender<M>,
    name: Arc<str>,
    refused: Arc<AtomicU64>,
}

impl<M> Clone for Address<M> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), name: Arc::clone(&self.name), refused: Arc::clone(&self.refused) }
    }
}

impl<M> fmt::Debug for Address<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({})", self.name)
    }
}

impl<M: Mail> Address<M> {
    pub(super) fn new(sender: mpsc::Sender<M>, name: Arc<str>) -> Self {
        Self { sender, name, refused: Arc::default() }
    }

    /// The actor's name.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// What counts the messages that found the mailbox full.
    pub(super) fn counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.refused)
    }

    /// How many messages found the mailbox full and were given back.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Delivers a message, waiting for room if it is of that sort.
    ///
    /// # Errors
    /// The message, with the reason.
    pub async fn tell(&self, message: M) -> Result<(), TellError<M>> {
        match message.when_full() {
            WhenFull::Refuse => self.try_tell(message),
            WhenFull::Wait => self.sender.send(message).await.map_err(|error| self.gone(error.0)),
        }
    }

    /// Delivers a message if there is room now, whatever its sort. For threads that must not wait.
    ///
    /// # Errors
    /// The message, with the reason.
    pub fn try_tell(&self, message: M) -> Result<(), TellError<M>> {
        self.sender.try_send(message).map_err(|error| match error {
            mpsc::error::TrySendError::Full(message) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                TellError::Full { actor: Arc::clone(&self.name), message }
            }
            mpsc::error::TrySendError::Closed(message) => self.gone(message),
        })
    }

    /// Asks, and waits for the answer until `deadline`, which counts for the room in the mailbox as well.
    ///
    /// # Errors
    /// All of [`AskError`] but `Stopped`.
    pub async fn ask<R: Send>(
        &self,
        clock: &dyn Clock,
        deadline: Moment,
        question: impl FnOnce(Reply<R>) -> M,
    ) -> Result<R, AskError> {
        let (sender, receiver) = oneshot::channel();
        let message = question(Reply(sender));
        let mut answered = std::pin::pin!(async move {
            self.tell(message).await.map_err(|error| self.ask_error(&error))?;
            self.answer(receiver.await)
        });
        loop {
            tokio::select! {
                biased;
                answer = &mut answered => return answer,
                () = tokio::time::sleep(clock.nap(deadline)) => {
                    if clock.now() >= deadline {
                        return Err(AskError::Late(Arc::clone(&self.name)));
                    }
                }
            }
        }
    }

    /// Asks from an OS thread, which parks until the answer, the deadline, or its stop signal.
    ///
    /// # Errors
    /// All of [`AskError`].
    pub fn ask_parked<R: Send>(
        &self,
        clock: &dyn Clock,
        deadline: Moment,
        stop: &StopSignal,
        question: impl FnOnce(Reply<R>) -> M,
    ) -> Result<R, AskError> {
        let (sender, receiver) = oneshot::channel();
        let message = question(Reply(sender));
        let asked = async move {
            self.tell(message).await.map_err(|error| self.ask_error(&error))?;
            self.answer(receiver.await)
        };
        match park(asked, clock, deadline, stop) {
            Parked::Done(answer) => answer,
            Parked::Late => Err(AskError::Late(Arc::clone(&self.name))),
            Parked::Stopped => Err(AskError::Stopped(Arc::clone(&self.name))),
        }
    }

    fn gone(&self, message: M) -> TellError<M> {
        TellError::Gone { actor: Arc::clone(&self.name), message }
    }

    fn ask_error(&self, error: &TellError<M>) -> AskError {
        match error {
            TellError::Full { .. } => AskError::Full(Arc::clone(&self.name)),
            TellError::Gone { .. } => AskError::Gone(Arc::clone(&self.name)),
        }
    }

    fn answer<R>(&self, received: Result<Result<R, AskError>, oneshot::error::RecvError>) -> Result<R, AskError> {
        received.unwrap_or_else(|_| {
            Err(if self.sender.is_closed() {
                AskError::Gone(Arc::clone(&self.name))
            } else {
                AskError::Unanswered(Arc::clone(&self.name))
            })
        })
    }
}
