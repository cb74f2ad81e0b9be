//! The life of a device process, from its command line to its end.
//!
//! The order matters. Everything that needs rights is done first: sockets, the image. Then the queue threads are
//! started, each with its restricted ring, and the jail closes (see [`jail`](crate::jail)); only then is guest memory
//! seen. Behind a gate that keeps the queues from taking requests, the fence against a predecessor is raised; with a
//! supervisor not before its `Start`, which says that no copy of the image's descriptor is left in its hands.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use atoll_protocol::jail::{JailOutcome, JailedLayer};
use atoll_protocol::sidecar::{GoodbyeReason, SidecarReport};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use thiserror::Error;

use crate::bad_build::{self, Bad};
use crate::device::Device;
use crate::fence::{Fence, FenceError};
use crate::hold::Hold;
use crate::jail::{Jail, SocketFile};
use crate::session::{self, Conversation, EndOfTalk};
use crate::sidecar::{Orders, Reports, Sidecar, SidecarError, Started};
use crate::stats::{StatsError, StatsPage};
use crate::step::{Sabotage, fence_took, strikes};
use crate::worker::{Gate, SpawnError};

/// How long a first incarnation waits for a fence: as long as dying I/O takes, and some.
const FENCE_WAIT: Duration = Duration::from_secs(2);
/// How long a successor waits: its supervisor knows that the predecessor is gone.
const FENCE_WAIT_SUCCESSOR: Duration = Duration::from_secs(60);

/// Why a device process cannot serve.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The socket's folder does not allow it.
    #[error("cannot listen on {path}: {source}; choose a path in a folder that this user may write")]
    Listen {
        /// The path.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Somebody serves there already.
    #[error("another process listens on {0}: stop it or choose another path")]
    Taken(String),
    /// Something that is not a socket is there.
    #[error("{0} exists and is not a socket: move it away or choose another path")]
    NotSocket(String),
    /// An inherited descriptor is not there.
    #[error("no descriptor {fd} was inherited for {option}")]
    Descriptor {
        /// The option that named it.
        option: &'static str,
        /// Its number.
        fd: RawFd,
    },
    /// The queue threads did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The image is in use.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// The supervisor is gone.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    /// The supervisor never said start.
    #[error("the supervisor hung up before it said start")]
    NeverStarted,
    /// Several devices need a listening socket.
    #[error("one front end was inherited for {0} devices: let them listen on a socket")]
    OneFrontEnd(usize),
    /// A thread could not be made.
    #[error("cannot start the {what} thread: {source}")]
    Thread {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The page of figures was refused.
    #[error(transparent)]
    Stats(#[from] StatsError),
    /// The jail could not be closed.
    #[error(transparent)]
    Jail(#[from] crate::jail::JailError),
    /// An inherited front end misbehaved.
    #[error(transparent)]
    Talk(EndOfTalk),
    /// An inherited client of a PCI device misbehaved.
    #[error("the client is given up: {0}")]
    Client(String),
    /// A PCI device cannot go on.
    #[error(transparent)]
    Device(#[from] crate::vfio_user::DeviceError),
}

/// Where front ends come from.
#[derive(Debug)]
pub enum Transport {
    /// A socket file of ours, for one front end after another.
    Listen(Listening),
    /// A connected socket that was inherited: one front end, and the process ends with it.
    Connected(UnixStream),
}

/// A bound socket, unlinked when the process ends in order.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    path: PathBuf,
    file: Arc<SocketFile>,
}

impl Listening {
    /// Binds `path`. A socket that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        let name = path.display().to_string();
        let listen = |source| ServeError::Listen { path: name.clone(), source };
        if let Ok(meta) = path.symlink_metadata() {
            if !meta.file_type().is_socket() {
                return Err(ServeError::NotSocket(name));
            }
            if UnixStream::connect(path).is_ok() {
                return Err(ServeError::Taken(name));
            }
            std::fs::remove_file(path).map_err(listen)?;
        }
        let listener = UnixListener::bind(path).map_err(listen)?;
        let file = Arc::new(SocketFile::at(path).map_err(listen)?);
        Ok(Self { listener, path: path.to_owned(), file })
    }

    /// Its name, as the jail lets it be removed.
    pub(crate) fn file(&self) -> Arc<SocketFile> {
        Arc::clone(&self.file)
    }

    /// The next one who connects.
    pub(crate) fn accept(&self) -> Result<UnixStream, ServeError> {
        let accepted = self.listener.accept();
        let path = || self.path.display().to_string();
        accepted.map(|(stream, _)| stream).map_err(|source| ServeError::Listen { path: path(), source })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.file.remove();
    }
}

/// Takes over a descriptor that a command line names.
pub fn inherited(option: &'static str, fd: RawFd) -> Result<OwnedFd, ServeError> {
    #[allow(unsafe_code, reason = "a descriptor comes as a number")]
    // SAFETY: F_GETFD only asks; nothing is owned yet.
    if fd <= 2 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(ServeError::Descriptor { option, fd });
    }
    #[allow(unsafe_code, reason = "a descriptor comes as a number")]
    // SAFETY: the descriptor is open, was passed for this option and is taken over once.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    let _ = rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC);
    Ok(owned)
}

/// Everything that a device process needs besides its device.
pub struct Service {
    /// Where front ends come from.
    pub transport: Transport,
    /// The supervisor's channel.
    pub sidecar: Option<Sidecar>,
    /// Tells when a predecessor's I/O is over.
    pub fence: Box<dyn Fence>,
    /// What the jail leaves open.
    pub jail: Jail,
    /// The supervisor's page of figures (`--stats-fd`); without one nobody reads them.
    pub stats: Option<OwnedFd>,
}

type Talk<D> = Arc<Mutex<Conversation<D>>>;

struct Keeper<D: Device> {
    conversations: Vec<Talk<D>>,
    socket: Option<Arc<SocketFile>>,
}

impl<D: Device> Keeper<D> {
    fn end(&self, reports: Option<&Reports>, status: i32) -> ! {
        self.conversations.iter().for_each(|c| session::lock(c).reset());
        if let Some(socket) = &self.socket {
            socket.remove();
        }
        if let Some(reports) = reports {
            reports.goodbye(GoodbyeReason::Asked);
        }
        std::process::exit(status)
    }
}

impl<D: Device> Orders for Keeper<D> {
    fn quiesce(&self) {
        self.conversations.iter().for_each(|c| session::lock(c).quiesce());
    }

    fn exit(&self, reports: &Reports) -> ! {
        self.end(Some(reports), 0)
    }

    fn measure(&self) -> u64 {
        self.conversations.first().map_or(0, |c| session::lock(c).measure())
    }

    fn orphaned(&self) -> ! {
        if let Some(socket) = &self.socket {
            socket.remove();
        }
        std::process::exit(crate::EXIT_ORPHANED)
    }
}

/// Serves `device` until its front end or its supervisor has gone.
pub fn run<D: Device>(device: D, service: Service) -> Result<(), ServeError> {
    run_all(vec![device], service)
}

/// Serves several devices on one listening socket: a front end that connects gets the first one that is free, and has a
/// conversation, queue threads and a memory map of its own. All threads exist before the jail closes; a front end that
/// finds no device free is hung up on.
pub fn run_all<D: Device>(devices: Vec<D>, service: Service) -> Result<(), ServeError> {
    let Service { transport, sidecar, fence, jail, stats } = service;
    end_on_panic();
    // The parts of several devices stand one after the other.
    let queues = devices.first().map_or(0, |device| device.layout().queues);
    let parts = queues.saturating_mul(u16::try_from(devices.len()).unwrap_or(u16::MAX));
    let stats = match stats {
        Some(fd) => StatsPage::adopt(fd, parts)?,
        None => StatsPage::private(parts)?,
    };
    let socket = match &transport {
        Transport::Listen(listening) => Some(Arc::clone(&listening.file)),
        Transport::Connected(_) => None,
    };
    let jail = jail.confine(socket.as_ref())?;
    let gate = Arc::new(Gate::default());
    let mut conversations = Vec::new();
    for (device, first) in devices.into_iter().zip((0..).step_by(usize::from(queues.max(1)))) {
        conversations.push(Arc::new(Mutex::new(Conversation::new(device, &gate, &stats, first)?)));
    }
    let keeper = || Keeper { conversations: conversations.clone(), socket: socket.clone() };
    let reports = sidecar.as_ref().map(|s| s.reports().clone());
    let serving = sidecar.as_ref().map(Sidecar::serving);
    let started = sidecar
        .map(|sidecar| {
            let pulses = conversations
                .iter()
                .flat_map(|c| session::lock(c).workers().iter().map(|w| Arc::clone(w.pulse())).collect::<Vec<_>>())
                .collect();
            sidecar.attend(pulses, keeper()).map_err(|source| ServeError::Thread { what: "sidecar", source })
        })
        .transpose()?;
    let (ender, looker) = (keeper(), keeper());
    let last_reports = reports.clone();
    let look = move || {
        looker.measure();
    };
    crate::signals::attend(move || ender.end(last_reports.as_ref(), 0), Some(look))
        .map_err(|source| ServeError::Thread { what: "signal", source })?;
    let ports = Ports::start(&conversations)?;
    let layers = jail.lock(parts.into())?;
    tell_jail(layers, reports.as_ref())?;
    let outcome = prepare(&gate, started, fence, &conversations, reports.as_ref()).and_then(|()| {
        if let Some(serving) = &serving {
            serving.store(true, Ordering::Release);
        }
        talk(&conversations, &ports, transport)
    });
    if let Some(reports) = &reports {
        reports.goodbye(match &outcome {
            Ok(()) => GoodbyeReason::Asked,
            Err(e @ ServeError::Talk(_)) => GoodbyeReason::Peer(e.to_string()),
            Err(e @ ServeError::Fence(FenceError::Unfit(_))) => GoodbyeReason::Config(e.to_string()),
            Err(e @ ServeError::Fence(_)) => GoodbyeReason::Resource(e.to_string()),
            Err(e) => GoodbyeReason::Config(e.to_string()),
        });
    }
    outcome
}

/// Says how the jail came out: to the supervisor, who decides what that means, or to whoever reads the log.
pub fn tell_jail(layers: Vec<JailedLayer>, reports: Option<&Reports>) -> Result<(), SidecarError> {
    match reports {
        Some(reports) => reports.send(&SidecarReport::Jailed { layers }),
        None => {
            for missing in layers.iter().filter(|layer| !layer.stands() && layer.outcome != JailOutcome::Off) {
                tracing::warn!("the jail lacks {missing}: {}", missing.remedy());
            }
            Ok(())
        }
    }
}

/// A thread that panics takes the process with it: a successor serves better than what is left.
pub(crate) fn end_on_panic() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        tracing::error!(%panic, "this is a bug in the device process");
        std::process::exit(crate::EXIT_PANIC);
    }));
}

/// Waits for the start, raises the fence, opens the gate and says ready. Beside a process that serves the fence is left
/// for the first ring.
fn prepare<D: Device>(
    gate: &Arc<Gate>,
    started: Option<Receiver<Started>>,
    fence: Box<dyn Fence>,
    conversations: &[Talk<D>],
    reports: Option<&Reports>,
) -> Result<(), ServeError> {
    let started = started.map(|started| started.recv().map_err(|_| ServeError::NeverStarted)).transpose()?;
    let successor = started.is_some_and(|started| started.generation.0 > 1);
    bad_build::fail(None, Some(Bad::HangsBeforeReady));
    match conversations {
        [conversation] if started.is_some_and(|started| started.beside) => {
            fence.glance()?;
            session::lock(conversation).hold(Hold::new(fence, Arc::clone(gate)));
        }
        _ => {
            if successor && strikes(Sabotage::SkipFence) {
                fence.skip()?;
            } else {
                let began = Instant::now();
                fence.raise(if successor { FENCE_WAIT_SUCCESSOR } else { FENCE_WAIT })?;
                fence_took(began.elapsed());
            }
            gate.open();
        }
    }
    if let (Some(reports), Some(started)) = (reports, started) {
        reports.send(&SidecarReport::Ready { generation: started.generation })?;
    }
    Ok(())
}

/// A front end asks for features as soon as it has connected; nobody else may keep it waiting for longer.
const FIRST_WORD: Duration = Duration::from_secs(10);

/// Whether the client says something, or hangs up, in time.
fn speaks(stream: &UnixStream) -> bool {
    let mut watched = [PollFd::new(stream, PollFlags::IN)];
    let limit = Timespec { tv_sec: FIRST_WORD.as_secs() as i64, tv_nsec: 0 };
    matches!(retry_on_intr(|| poll(&mut watched, Some(&limit))), Ok(1..))
}

/// The threads that talk with the front ends of several devices; none when there is one device.
struct Ports {
    calls: Vec<SyncSender<UnixStream>>,
    free: Arc<Mutex<BTreeSet<usize>>>,
}

impl Ports {
    fn start<D: Device>(conversations: &[Talk<D>]) -> Result<Self, ServeError> {
        let mut calls = Vec::new();
        let free = Arc::new(Mutex::new((0..conversations.len()).collect::<BTreeSet<_>>()));
        if conversations.len() < 2 {
            return Ok(Self { calls, free });
        }
        for (port, conversation) in conversations.iter().enumerate() {
            let (call, called) = sync_channel(1);
            let (conversation, free) = (Arc::clone(conversation), Arc::clone(&free));
            std::thread::Builder::new()
                .name(format!("port{port}"))
                .stack_size(256 << 10)
                .spawn(move || {
                    while let Ok(stream) = called.recv() {
                        one(&conversation, stream, port);
                        free.lock().unwrap_or_else(PoisonError::into_inner).insert(port);
                    }
                })
                .map_err(|source| ServeError::Thread { what: "port", source })?;
            calls.push(call);
        }
        Ok(Self { calls, free })
    }

    /// Gives a front end to the first free device.
    fn give(&self, stream: UnixStream) {
        let port = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop_first();
        match port.and_then(|port| self.calls.get(port)) {
            // A free port's thread waits for the next call, or is about to.
            Some(call) => drop(call.send(stream)),
            None => tracing::warn!(ports = self.calls.len(), "all ports are taken: hanging up on a front end"),
        }
    }
}

/// One front end on a listening socket, until it hangs up.
fn one<D: Device>(conversation: &Talk<D>, stream: UnixStream, port: usize) {
    if !speaks(&stream) {
        tracing::warn!(within = ?FIRST_WORD, "a client connected and said nothing: hanging up");
        return;
    }
    tracing::info!(port, socket = stream.as_raw_fd(), "a front end has connected");
    let end = session::serve(conversation, stream);
    session::lock(conversation).reset();
    tracing::info!(port, %end, "waiting for the next front end");
}

fn talk<D: Device>(conversations: &[Talk<D>], ports: &Ports, transport: Transport) -> Result<(), ServeError> {
    match (transport, conversations) {
        (Transport::Connected(stream), [conversation]) => {
            let end = session::serve(conversation, stream);
            session::lock(conversation).reset();
            match end {
                EndOfTalk::HungUp => Ok(()),
                failed @ EndOfTalk::Failed(_) => Err(ServeError::Talk(failed)),
            }
        }
        (Transport::Connected(_), _) => Err(ServeError::OneFrontEnd(conversations.len())),
        (Transport::Listen(listening), _) => loop {
            let stream = listening.accept()?;
            match conversations {
                [conversation] => one(conversation, stream, 0),
                _ => ports.give(stream),
            }
        },
    }
}
