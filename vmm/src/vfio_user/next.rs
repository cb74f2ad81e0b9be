//! A server in the making: started or reached, and greeted, on a thread of its own.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_protocol::jail::JailedLayer;
use rustix::fd::OwnedFd;
use thiserror::Error;

use super::conversation::Conversation;
use super::device::Shared;
use super::doorbells::Doorbells;
use super::greeting::{Shape, ShapeError};
use crate::seccomp::{self, ThreadClass};
use crate::vhost::{BackendProcess, BackendSource, Ending, Incarnation, Limits, Patience, SourceError, is_readable};

/// How long one that nobody wants may take to end.
const REAP: Duration = Duration::from_secs(2);

/// What incarnations are made with.
#[derive(Clone)]
pub(super) struct Makers {
    pub(super) source: Arc<Mutex<Box<dyn BackendSource>>>,
    pub(super) limits: Limits,
}

/// One incarnation of the server, greeted.
pub(super) struct Session {
    pub(super) generation: u64,
    pub(super) talk: Conversation,
    pub(super) process: Option<Box<dyn BackendProcess>>,
    pub(super) shape: Shape,
    pub(super) doorbells: Arc<Doorbells>,
    /// It may reach guest memory, or some of it.
    pub(super) has_memory: bool,
    /// It has had some.
    pub(super) begun: bool,
    /// The process at the other end, where it is somebody else's and could be found.
    peer: Option<OwnedFd>,
}

impl Session {
    pub(super) fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.id())
    }
    pub(super) fn jail(&self) -> Vec<JailedLayer> {
        self.process.as_ref().map(|process| process.jail().to_vec()).unwrap_or_default()
    }
    /// Ends it by force and waits for that until `deadline`. Says how its process ended, where it is ours.
    pub(super) fn give_up(&mut self, deadline: Instant) -> Option<String> {
        self.talk.hang_up();
        self.process.as_mut().map(|process| process.kill(deadline))
    }
    /// Whether nothing of it runs any more, as far as can be seen.
    pub(super) fn is_gone(&self) -> bool {
        self.process.as_ref().is_none_or(|process| is_readable(process.ended()))
    }
    /// Whether it is known to have ended.
    pub(super) fn was_seen_to_end(&self) -> bool {
        self.process.is_some() || self.peer.as_ref().is_some_and(is_readable)
    }
    /// Whether its process has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.process.as_ref().is_some_and(|process| is_readable(process.ended()))
    }
}

/// Why there is no server.
#[derive(Debug, Error)]
pub(super) enum ConnectError {
    /// It could not be started or reached.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// It was, and is of no use.
    #[error("{server}: {source}")]
    Shape {
        /// Which.
        server: String,
        /// Why.
        #[source]
        source: ShapeError,
        /// What it wrote last.
        last_lines: Vec<String>,
    },
    /// No thread or descriptor.
    #[error("the host has no room: {0}")]
    Resource(#[from] io::Error),
}

impl ConnectError {
    pub(super) fn is_hopeless(&self) -> bool {
        match self {
            Self::Source(error) => {
                matches!(error, SourceError::Start { hopeless: true, .. } | SourceError::Name { .. })
            }
            Self::Shape { source, .. } => source.is_hopeless(),
            Self::Resource(_) => false,
        }
    }
}

/// Starts or reaches a server and asks it what it is.
///
/// # Errors
/// [`ConnectError`]; nothing of it is left.
pub(super) fn greet(makers: &Makers, generation: u64, ending: &Ending) -> Result<Box<Session>, ConnectError> {
    let mut patience = Patience::new(makers.limits.start, ending);
    let mut source = makers.source.lock().unwrap_or_else(PoisonError::into_inner);
    let Incarnation { socket, process } = source.connect(generation, &mut patience)?;
    let server = source.describe();
    drop(source);
    let peer = match &process {
        Some(_) => None,
        None => rustix::net::sockopt::socket_peercred(&socket)
            .and_then(|peer| rustix::process::pidfd_open(peer.pid, rustix::process::PidfdFlags::empty()))
            .ok(),
    };
    let mut talk = Conversation::new(socket, makers.limits.step, ending);
    let asked = talk.greet().map_err(ShapeError::from).and_then(|()| {
        let shape = Shape::ask(&mut talk)?;
        let doorbells = shape.ask_doorbells(&mut talk)?;
        Ok((shape, Arc::new(doorbells)))
    });
    let mut process = process;
    match asked {
        Ok((shape, doorbells)) => {
            Ok(Box::new(Session { generation, talk, process, shape, doorbells, has_memory: false, begun: false, peer }))
        }
        Err(source) => {
            talk.hang_up();
            let end = process.as_mut().map(|process| process.kill(Instant::now() + REAP));
            let server = end.map_or_else(|| server.clone(), |end| format!("{server} ({end})"));
            let last_lines = process.as_ref().map(|process| process.last_lines()).unwrap_or_default();
            Err(ConnectError::Shape { server, source, last_lines })
        }
    }
}

pub(super) type Outcome = Result<Box<Session>, ConnectError>;

/// One that is being prepared.
pub(super) struct Preparation {
    pub(super) generation: u64,
    ending: Ending,
    outcome: Receiver<Outcome>,
    thread: Option<JoinHandle<()>>,
}

impl Preparation {
    /// Begins; the device's thread is woken when it is done.
    ///
    /// # Errors
    /// Without a thread.
    pub(super) fn begin(makers: &Makers, generation: u64, shared: &Arc<Shared>) -> io::Result<Self> {
        let (told, outcome) = sync_channel(1);
        let (makers, shared, ending) = (makers.clone(), Arc::clone(shared), Ending::default());
        let heard = Arc::clone(&ending);
        let thread = std::thread::Builder::new().name(format!("next-{}", shared.name)).spawn(move || {
            seccomp::inherit(ThreadClass::Device);
            // Whoever began it keeps the other end until it has joined this thread.
            let _ = told.send(greet(&makers, generation, &heard));
            shared.wake();
        })?;
        Ok(Self { generation, ending, outcome, thread: Some(thread) })
    }
    /// What came of it, once.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        match self.outcome.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(TryRecvError::Empty) => None,
            // Its thread has panicked, which its hook has reported.
            Err(TryRecvError::Disconnected) => Some(Err(io::Error::other("its thread is gone").into())),
        }
    }
}

impl Drop for Preparation {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Ready too late: nobody wants it any more.
        if let Ok(Ok(mut session)) = self.outcome.try_recv() {
            session.give_up(Instant::now() + REAP);
        }
    }
}
