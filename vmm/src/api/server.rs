//! Accepts connections and gives each a thread of its own.
//!
//! There is room for a limited number. A client may keep a connection for the life of its machine, so nobody is sent away
//! for silence as long as there is room; when there is none, the connection that has been silent for longest gives way to
//! the new one. A request that is under way is never cut.

use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::connection;
use super::listen::Listener;
use super::reply::{Reply, Status};
use super::wire;
use crate::actor::{ActorReport, Post};
use crate::lifecycle::{Story, VmControl};
use crate::seccomp::{self, ThreadClass};

/// Connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// Of those, how many may listen to events.
const STREAMS_MAX: usize = 16;
/// How long a refused connection may take to hear why.
const REFUSAL_PATIENCE: Duration = Duration::from_millis(100);
/// Pause when the process has no descriptor left for a connection.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// Writes counters and histograms in Prometheus' text format.
pub type MetricsSource = Arc<dyn Fn() -> String + Send + Sync>;

/// What the resources are made of.
#[derive(Clone)]
pub struct Api {
    /// The machine.
    pub control: Arc<dyn VmControl>,
    /// What happens to it.
    pub story: Story,
    /// Its figures.
    pub metrics: MetricsSource,
}

/// What all connections share.
pub(super) struct Shared {
    pub(super) api: Api,
    stopping: AtomicBool,
    streams: AtomicUsize,
    open: Mutex<Open>,
    fewer: Condvar,
    number: u64,
}

/// Sockets that have been served, so that each is on the roll by a name of its own.
static SERVERS: AtomicU64 = AtomicU64::new(0);

impl Post for Shared {
    fn report(&self) -> ActorReport {
        let open = self.open();
        let busy = open.connections.values().filter(|connection| connection.at == At::Work).count();
        let state = format!("{busy} of {} connections work", open.connections.len());
        let name = format!("api{}", self.number).into();
        ActorReport { name, waiting: busy, capacity: CONNECTIONS_MAX, full: open.refused, generation: 1, state }
    }
}

#[derive(Default)]
struct Open {
    next: u64,
    /// Connections for which there was no place.
    refused: u64,
    connections: BTreeMap<u64, Connected>,
}

/// A connection, as those who accept others see it.
struct Connected {
    socket: Arc<UnixStream>,
    at: At,
}

/// What a connection is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Nothing has been asked, or what was has been answered, since then.
    Rest(Instant),
    /// A request is under way.
    Work,
    /// It gives way to another, and is no longer counted.
    Leaving,
}

impl Open {
    /// Makes room for one more, if need be by having the one leave that has been at rest for longest; whether there is.
    fn make_room(&mut self) -> bool {
        let counted = self.connections.values().filter(|connection| connection.at != At::Leaving).count();
        if counted < CONNECTIONS_MAX {
            return true;
        }
        // Those that leave end at once, but for one that takes its time to read its last answer.
        if self.connections.len() >= 2 * CONNECTIONS_MAX {
            return false;
        }
        // What has sent something is no longer at rest, though nobody may have looked yet.
        let resting = self.connections.values_mut().filter_map(|connection| match connection.at {
            At::Rest(since) if !wire::has_more(connection.socket.as_fd()) => Some((since, connection)),
            At::Rest(_) | At::Work | At::Leaving => None,
        });
        let Some((_, longest)) = resting.min_by_key(|(since, _)| *since) else { return false };
        longest.at = At::Leaving;
        // A request that it sends in this moment is read, carried out and answered.
        let _ = longest.socket.shutdown(Shutdown::Read);
        true
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No more requests are taken.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// A place among those who listen to events, given back when it is dropped; `None` when all are taken.
    pub(super) fn listener_place(&self) -> Option<ListenerPlace<'_>> {
        let place = ListenerPlace(&self.streams);
        (self.streams.fetch_add(1, Ordering::AcqRel) < STREAMS_MAX).then_some(place)
    }
}

pub(super) struct ListenerPlace<'a>(&'a AtomicUsize);

impl Drop for ListenerPlace<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The operator's socket, served.
pub struct ApiServer {
    shared: Arc<Shared>,
    wake: Arc<OwnedFd>,
    accepting: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Begins to serve.
    ///
    /// # Errors
    /// When there is no thread or descriptor for it.
    pub fn start(listener: Listener, api: Api) -> std::io::Result<Self> {
        let roll = api.story.roll().clone();
        let shared = roll.post(Shared {
            number: SERVERS.fetch_add(1, Ordering::Relaxed),
            api,
            stopping: AtomicBool::new(false),
            streams: AtomicUsize::new(0),
            open: Mutex::default(),
            fewer: Condvar::new(),
        });
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let accepting = {
            let (shared, wake) = (Arc::clone(&shared), Arc::clone(&wake));
            thread::Builder::new().name("api".into()).spawn(move || {
                seccomp::enter(ThreadClass::Operator);
                accept(&listener, &wake, &shared);
            })?
        };
        Ok(Self { shared, wake, accepting: Some(accepting) })
    }

    /// Takes no more requests, lets those at hand be answered within `limit`, and closes everything. The socket's file
    /// is gone afterwards.
    pub fn stop(mut self, limit: Duration) {
        self.end(limit);
    }

    fn end(&mut self, limit: Duration) {
        let Some(accepting) = self.accepting.take() else { return };
        self.shared.stopping.store(true, Ordering::Release);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        // It waits for nothing but the wake-up just sent.
        let _ = accepting.join();
        let deadline = Instant::now() + limit;
        let mut open = self.shared.open();
        for Connected { socket, .. } in open.connections.values() {
            // Whoever waits for a request sees an end; whoever carries one out can still answer.
            let _ = socket.shutdown(Shutdown::Read);
        }
        while !open.connections.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            open = self.shared.fewer.wait_timeout(open, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        for Connected { socket, .. } in open.connections.values() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

fn accept(listener: &Listener, wake: &OwnedFd, shared: &Arc<Shared>) {
    let mut short = false;
    while !shared.is_stopping() {
        let mut fds =
            [PollFd::new(listener.socket(), PollFlags::IN), PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN)];
        if let Err(errno) = poll(&mut fds, None)
            && errno != Errno::INTR
        {
            tracing::error!(%errno, "the operator's socket cannot be waited at");
            return;
        }
        match listener.socket().accept() {
            Ok((socket, _)) => {
                short = false;
                if !shared.is_stopping() {
                    welcome(socket, shared);
                }
            }
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                // Whoever else holds the socket has ended it.
                Some(Errno::INVAL) => {
                    tracing::error!("the operator's socket listens no more");
                    return;
                }
                _ => {
                    if !std::mem::replace(&mut short, true) {
                        tracing::warn!(%error, "connections to the operator's socket cannot be taken");
                    }
                    thread::sleep(SHORTAGE_PAUSE);
                }
            },
        }
    }
}

fn welcome(socket: UnixStream, shared: &Arc<Shared>) {
    let socket = Arc::new(socket);
    let number = {
        let mut open = shared.open();
        if !open.make_room() {
            open.refused += 1;
            drop(open);
            let why =
                format!("there are {CONNECTIONS_MAX} connections with a request under way: try again when one is done");
            return refuse(&socket, Status::TooMany, why);
        }
        let number = open.next;
        open.next += 1;
        open.connections.insert(number, Connected { socket: Arc::clone(&socket), at: At::Rest(Instant::now()) });
        number
    };
    // Whatever becomes of the thread, the connection is counted off once.
    let seat = Seat { shared: Arc::clone(shared), number };
    let theirs = Arc::clone(&socket);
    let spawned = thread::Builder::new().name(format!("api-{}", number % 1000)).spawn(move || {
        seccomp::inherit(ThreadClass::Operator);
        connection::converse(&theirs, &seat);
    });
    if let Err(error) = spawned {
        refuse(&socket, Status::Failed, format!("there is no thread for another connection: {error}"));
    }
}

/// A connection's place among the others.
pub(super) struct Seat {
    pub(super) shared: Arc<Shared>,
    number: u64,
}

impl Seat {
    /// A request has begun to come.
    pub(super) fn works(&self) {
        self.is_at(At::Work);
    }

    /// Nothing is under way any more.
    pub(super) fn rests(&self) {
        self.is_at(At::Rest(Instant::now()));
    }

    fn is_at(&self, at: At) {
        // One that leaves does so whatever it is at.
        if let Some(connection) =
            self.shared.open().connections.get_mut(&self.number).filter(|one| one.at != At::Leaving)
        {
            connection.at = at;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.open().connections.remove(&self.number);
        self.shared.fewer.notify_all();
    }
}

fn refuse(socket: &UnixStream, status: Status, why: String) {
    let reply = Reply::refused(status, &[why]).encode(false);
    let _ = wire::send(socket.as_fd(), &reply, &[], Instant::now() + REFUSAL_PATIENCE);
}
