//! One conversation with a backend, on a thread of its own.
//!
//! The `vhost` crate's front end blocks, and retries for ever what a socket timeout would interrupt. So it lives on its
//! own thread, which publishes each [`Step`] before it takes it; whoever waits for the thread keeps a copy of the socket
//! and shuts it down when a step takes longer than it may. That ends the step, the thread's unit of work and the
//! conversation: a half-done negotiation is thrown away, never continued. The end of the backend's process does the same at
//! once: its socket may be open all the same, because somebody else has a copy of it.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserProtocolFeatures as Protocol};

use super::error::{ConversationError, Step};
use super::patience::{Ending, Patience, SLICE};

use crate::actor::{Inbox, Outbox, Roll, mailbox};
use crate::seccomp::{self, ThreadClass};

/// Rings that a conversation may name before the backend has said how many it has.
const RINGS_MAX: u64 = 256;

/// How long what is left of a unit may take once its socket is shut: each of its steps fails at once.
const AFTER_THE_CUT: Duration = Duration::from_secs(2);

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

/// Why a conversation was cut in the middle of a unit.
#[derive(Clone, Copy)]
enum Cut {
    /// A step took too long, or the device ends.
    Late(Step),
    /// The process that would answer has ended.
    Dead(Step),
}

/// The waiting end.
pub(super) struct Conversation {
    units: Option<Outbox<Unit>>,
    socket: UnixStream,
    progress: Arc<Mutex<Progress>>,
    step_limit: Duration,
    ending: Ending,
    /// Raised when a unit is done.
    done: Arc<OwnedFd>,
    /// Readable once the process that would answer has ended.
    process: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Conversation {
    /// Starts the thread of a conversation over a connected socket. Each step may take `step_limit`, or until `ending`.
    ///
    /// # Errors
    /// If there is no thread or descriptor left.
    pub(super) fn new(
        roll: &Roll,
        (name, generation): (&str, u64),
        socket: UnixStream,
        step_limit: Duration,
        ending: &Ending,
    ) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        let kept = socket.try_clone()?;
        let progress = Arc::new(Mutex::new(Progress { step: Step::Idle, since: Instant::now() }));
        let done = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut wire = Wire {
            socket: socket.try_clone()?,
            frontend: Frontend::from_stream(socket, RINGS_MAX),
            progress: Arc::clone(&progress),
            protocol: Protocol::empty(),
        };
        let (units, work): (_, Inbox<Unit>) = mailbox(roll, format!("talk.{name}"), generation, 1);
        let thread = std::thread::Builder::new().name(format!("talk-{name}")).spawn(move || {
            seccomp::enter(ThreadClass::Talk);
            while let Ok(unit) = work.recv() {
                unit(&mut wire);
            }
        })?;
        let ending = Arc::clone(ending);
        let (units, thread) = (Some(units), Some(thread));
        Ok(Self { units, socket: kept, progress, step_limit, ending, done, process: None, thread })
    }

    /// Ends its waits as soon as `process`, which answers at the other end, has ended: a descriptor that is readable then.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub(super) fn end_with(&mut self, process: impl AsFd) -> io::Result<()> {
        self.process = Some(process.as_fd().try_clone_to_owned()?);
        Ok(())
    }

    /// The socket, to watch for a hang-up.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Has the thread do one unit of work, and waits for it as long as its steps are in time and its process lives. After an
    /// error the conversation is over.
    ///
    /// # Errors
    /// What the unit says, [`ConversationError::Silent`] when a step was too slow, or [`ConversationError::Gone`].
    pub(super) fn perform<T: Send + 'static>(
        &mut self,
        unit: impl FnOnce(&mut Wire) -> Result<T, ConversationError> + Send + 'static,
    ) -> Result<T, ConversationError> {
        /// Wakes whoever waits, also when the unit panics.
        struct Done(Arc<OwnedFd>);
        impl Drop for Done {
            fn drop(&mut self) {
                let _ = rustix::io::write(&*self.0, &1_u64.to_ne_bytes());
            }
        }
        let over = || ConversationError::Gone { step: Step::Idle, reason: "the conversation is over".into() };
        let (answer, result) = sync_channel(1);
        let started = Instant::now();
        let done = Done(Arc::clone(&self.done));
        let unit: Unit = Box::new(move |wire| {
            // Dropped last, after the answer was sent or its sender is gone.
            let _done = done;
            let answer = answer;
            let _ = answer.send(unit(wire));
        });
        self.units.as_ref().ok_or_else(over)?.send(unit).map_err(|_| over())?;
        let mut cut = None;
        let mut patience = Patience::new(self.step_limit, &self.ending);
        let mut watched = started;
        let outcome = loop {
            match result.try_recv() {
                Ok(outcome) => break outcome,
                Err(TryRecvError::Disconnected) => break Err(over()),
                Err(TryRecvError::Empty) => {}
            }
            let progress = lock(&self.progress);
            let (step, since) = (progress.step, progress.since.max(started));
            drop(progress);
            if cut.is_none() && since != watched {
                watched = since;
                // It began within the slice that is over, and has had that part of its time.
                let had = since.elapsed().min(SLICE);
                patience = Patience::new(self.step_limit.saturating_sub(had), &self.ending);
            }
            match patience.slice() {
                Some(slice) => {
                    if self.wait(slice, cut.is_none()) && cut.is_none() {
                        let step = lock(&self.progress).step;
                        (cut, patience) = (Some(Cut::Dead(step)), self.cut());
                    }
                }
                None if cut.is_none() => (cut, patience) = (Some(Cut::Late(step)), self.cut()),
                None => {
                    // Nothing that it could wait for is left. Whoever joined it would wait, too.
                    tracing::error!(%step, "a conversation does not end after its socket was shut: its thread is left behind");
                    (self.units, self.thread) = (None, None);
                    break Err(over());
                }
            }
        };
        *lock(&self.progress) = Progress { step: Step::Idle, since: Instant::now() };
        match (outcome, cut) {
            (Ok(value), None) => Ok(value),
            (Err(error), None) => {
                self.hang_up();
                Err(error)
            }
            (_, Some(Cut::Late(step))) => Err(ConversationError::Silent { step, waited: self.step_limit }),
            (_, Some(Cut::Dead(step))) => {
                Err(ConversationError::Gone { step, reason: "its process has ended in the middle of it".into() })
            }
        }
    }

    /// Shuts the socket: what is left of the unit fails by itself, at once. Gives the patience for that, which nothing ends.
    fn cut(&mut self) -> Patience {
        self.hang_up();
        Patience::new(AFTER_THE_CUT, &Ending::default())
    }

    /// Waits for the unit, no longer than `slice`. True when the process has ended and the unit is not done.
    fn wait(&self, slice: Duration, mind_the_process: bool) -> bool {
        let mut fds = vec![PollFd::new(&*self.done, PollFlags::IN)];
        fds.extend(self.process.iter().filter(|_| mind_the_process).map(|process| PollFd::new(process, PollFlags::IN)));
        let time = Timespec::try_from(slice).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 20_000_000 });
        // An error (a signal) is a wait that was shorter.
        let _ = poll(&mut fds, Some(&time));
        let ended = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| !fd.revents().is_empty());
        let (done, dead) = (ended(fds.first()), ended(fds.get(1)));
        if done {
            let _ = rustix::io::read(&*self.done, &mut [0; 8]);
        }
        dead && !done
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
