//! One conversation with a backend, on a thread of its own.
//!
//! The `vhost` crate's front end blocks, and retries for ever what a socket timeout would interrupt. So it lives on its
//! own thread, which publishes each [`Step`] before it takes it; whoever waits for the thread keeps a copy of the socket
//! and shuts it down when a step takes longer than it may. That ends the step, the thread's unit of work and the
//! conversation: a half-done negotiation is thrown away, never continued.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Protocol};

use super::error::{ConversationError, Step};
use super::patience::{Ending, Patience};

use crate::seccomp::{self, ThreadClass};

/// Rings that a conversation may name before the backend has said how many it has.
const RINGS_MAX: u64 = 256;

type Unit = Box<dyn FnOnce(&mut Wire) + Send>;

struct Progress {
    step: Step,
    since: Instant,
}

/// The thread's end: what a unit of work talks through.
pub(super) struct Wire {
    frontend: Frontend,
    /// The same socket, for what the crate cannot say.
    socket: UnixStream,
    progress: Arc<Mutex<Progress>>,
    protocol: Protocol,
}

impl Wire {
    /// Takes a step whose message has an answer of its own.
    pub(super) fn ask<T>(
        &mut self,
        step: Step,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, ConversationError> {
        self.take(step, VhostUserHeaderFlag::empty(), call)
    }
    /// Takes a step whose message is acknowledged, where the backend can.
    pub(super) fn tell<T>(
        &mut self,
        step: Step,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, ConversationError> {
        let flags = if self.acknowledges() { VhostUserHeaderFlag::NEED_REPLY } else { VhostUserHeaderFlag::empty() };
        self.take(step, flags, call)
    }
    fn take<T>(
        &mut self,
        step: Step,
        flags: VhostUserHeaderFlag,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, ConversationError> {
        self.enter(step);
        self.frontend.set_hdr_flags(flags);
        call(&mut self.frontend).map_err(|error| ConversationError::from_crate(step, error))
    }
    fn enter(&self, step: Step) {
        *lock(&self.progress) = Progress { step, since: Instant::now() };
    }
    /// Takes a step on the bare socket.
    pub(super) fn speak<T>(
        &mut self,
        step: Step,
        call: impl FnOnce(&UnixStream) -> Result<T, ConversationError>,
    ) -> Result<T, ConversationError> {
        self.enter(step);
        call(&self.socket)
    }
    /// Protocol features in force.
    pub(super) fn protocol(&self) -> Protocol {
        self.protocol
    }
    pub(super) fn set_protocol(&mut self, protocol: Protocol) {
        self.protocol = protocol;
    }
    /// Whether each message is acknowledged (REPLY_ACK).
    pub(super) fn acknowledges(&self) -> bool {
        self.protocol.contains(Protocol::REPLY_ACK)
    }
}

/// The waiting end.
pub(super) struct Conversation {
    units: Option<SyncSender<Unit>>,
    socket: UnixStream,
    progress: Arc<Mutex<Progress>>,
    step_limit: Duration,
    ending: Ending,
    thread: Option<JoinHandle<()>>,
}

impl Conversation {
    /// Starts the thread of a conversation over a connected socket. Each step may take `step_limit`, or until `ending`.
    ///
    /// # Errors
    /// If there is no thread or descriptor left.
    pub(super) fn new(name: &str, socket: UnixStream, step_limit: Duration, ending: &Ending) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        let kept = socket.try_clone()?;
        let progress = Arc::new(Mutex::new(Progress { step: Step::Idle, since: Instant::now() }));
        let mut wire = Wire {
            socket: socket.try_clone()?,
            frontend: Frontend::from_stream(socket, RINGS_MAX),
            progress: Arc::clone(&progress),
            protocol: Protocol::empty(),
        };
        let (units, work): (_, Receiver<Unit>) = sync_channel(1);
        let thread = std::thread::Builder::new().name(format!("talk-{name}")).spawn(move || {
            seccomp::enter(ThreadClass::Talk);
            for unit in work {
                unit(&mut wire);
            }
        })?;
        let ending = Arc::clone(ending);
        Ok(Self { units: Some(units), socket: kept, progress, step_limit, ending, thread: Some(thread) })
    }

    /// The socket, to watch for a hang-up.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Has the thread do one unit of work, and waits for it as long as its steps are in time. After an error the
    /// conversation is over.
    ///
    /// # Errors
    /// What the unit says, or [`ConversationError::Silent`] when a step was too slow.
    pub(super) fn perform<T: Send + 'static>(
        &mut self,
        unit: impl FnOnce(&mut Wire) -> Result<T, ConversationError> + Send + 'static,
    ) -> Result<T, ConversationError> {
        let over = || ConversationError::Gone { step: Step::Idle, reason: "the conversation is over".into() };
        let (answer, result) = sync_channel(1);
        let started = Instant::now();
        let unit: Unit = Box::new(move |wire| {
            let _ = answer.send(unit(wire));
        });
        self.units.as_ref().ok_or_else(over)?.send(unit).map_err(|_| over())?;
        let mut cut = None;
        let mut patience = Patience::new(self.step_limit, &self.ending);
        let mut watched = started;
        let outcome = loop {
            let progress = lock(&self.progress);
            let (step, since) = (progress.step, progress.since.max(started));
            drop(progress);
            if since != watched {
                watched = since;
                patience = Patience::new(self.step_limit, &self.ending);
            }
            let received = match patience.slice() {
                Some(slice) => result.recv_timeout(slice),
                None => {
                    // The socket is shut: what is left of the unit fails by itself, at once.
                    cut = Some(step);
                    self.hang_up();
                    result.recv().map_err(|_| RecvTimeoutError::Disconnected)
                }
            };
            match received {
                Ok(outcome) => break outcome,
                Err(RecvTimeoutError::Disconnected) => break Err(over()),
                Err(RecvTimeoutError::Timeout) => {}
            }
        };
        *lock(&self.progress) = Progress { step: Step::Idle, since: Instant::now() };
        match (outcome, cut) {
            (Ok(value), None) => Ok(value),
            (Err(error), None) => {
                self.hang_up();
                Err(error)
            }
            (_, Some(step)) => Err(ConversationError::Silent { step, waited: self.step_limit }),
        }
    }

    /// From now on its waits end when that is raised.
    pub(super) fn obey(&mut self, ending: &Ending) {
        self.ending = Arc::clone(ending);
    }

    /// Gives the steps that follow another limit.
    pub(super) fn set_step_limit(&mut self, step_limit: Duration) {
        self.step_limit = step_limit;
    }

    /// Cuts the connection.
    pub(super) fn hang_up(&mut self) {
        // It only fails when the socket is not connected any more.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.hang_up();
        self.units = None;
        if let Some(thread) = self.thread.take() {
            // It only fails if the thread panicked, which its hook has reported.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
