//! A device whose other half is a vhost-user backend, as the rest of the VMM holds it.
//!
//! [`VhostDevice::connect`] reaches the first backend and learns what it can do; [`Connected::attach`] puts the result
//! behind a virtio transport and starts the device's own thread (`worker`), which owns everything that may wait.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_devices::virtio::{DeviceOffer, Intent, VirtioFrontend};
use atoll_devices::{Answer, Completion, access};
use rustix::event::EventfdFlags;
use thiserror::Error;

use super::call::Transport;
use super::conversation::Conversation;
use super::error::ConversationError;
use super::patience::{Ending, Patience};
use super::session::{self, Capabilities};
use super::source::{BackendSource, Incarnation, SourceError};
use super::worker::{Session, Worker};
use crate::doorbell::{Doorbell, DoorbellError, Interposer, Relay};
use crate::irq::VectorTable;
use crate::memory::GuestMemory;

/// What differs between kinds of devices.
pub trait DeviceClass: Send {
    /// Virtio device type (virtio 1.2, section 5).
    fn device_type(&self) -> u16;
    /// How much configuration space to read from the backend, in bytes.
    fn config_len(&self) -> u32;
    /// What to offer to the guest on top of such a backend.
    ///
    /// # Errors
    /// If the backend's answers cannot be right, or it lacks something that the user asked for.
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError>;
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From asking for a backend to its being connected.
    pub start: Duration,
    /// One step of a conversation.
    pub step: Duration,
    /// GET_VRING_BASE, for which a backend finishes what is in flight.
    pub drain: Duration,
    /// A guest's reset waits so long for a successor to have passed the fence of a dead backend.
    pub fence: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            start: Duration::from_secs(10),
            step: Duration::from_secs(5),
            drain: Duration::from_secs(10),
            fence: Duration::from_secs(10),
        }
    }
}

/// The device could not be made.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// No backend.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A backend that will not do.
    #[error("{backend}: {source}")]
    Conversation {
        /// Which.
        backend: String,
        /// Why not.
        #[source]
        source: ConversationError,
    },
    /// No doorbell.
    #[error(transparent)]
    Doorbell(#[from] DoorbellError),
    /// No thread or descriptor.
    #[error("no thread or descriptor for the device ({0}); raise the limits (ulimit -u, -n)")]
    Resource(#[from] io::Error),
}

impl ConnectError {
    /// Whether trying again would end the same way.
    pub(super) fn is_hopeless(&self) -> bool {
        match self {
            Self::Source(SourceError::Start { hopeless, .. }) => *hopeless,
            Self::Conversation { source, .. } => !source.is_gone(),
            Self::Source(_) | Self::Doorbell(_) | Self::Resource(_) => false,
        }
    }
}

/// How completely the device survives its backend's death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Every request completes exactly once.
    Full,
    /// Only when nothing was in flight: the backend keeps no record.
    IdleOnly,
}

/// What the device is at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// A backend is there; the driver has not started the device.
    Idle,
    /// The backend serves the driver.
    Running,
    /// The backend is gone; another one is on its way.
    Recovering {
        /// What became of it.
        why: String,
    },
    /// No backend serves the driver until it resets the device.
    Quarantined {
        /// Why.
        why: String,
    },
    /// The machine has stopped it.
    Stopped,
}

/// The device's state for an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// What it is at.
    pub state: DeviceState,
    /// Which incarnation of the backend serves it, from 1.
    pub generation: u64,
    /// Backends that it has lost.
    pub lost: u64,
    /// What happens when it loses this one.
    pub recovery: Recovery,
}

/// A call's way could not be switched.
#[derive(Debug, Error)]
pub enum SwitchError {
    /// The device is not running, or has no such queue with a vector.
    #[error("queue {0} has no interrupt vector in use; start its driver first")]
    NotRunning(u16),
    /// The backend did not take it; the device recovers.
    #[error(transparent)]
    Conversation(#[from] ConversationError),
    /// No descriptor.
    #[error("no eventfd ({0}); raise the limit on open files (ulimit -n)")]
    Resource(#[from] io::Error),
    /// The device's thread has ended.
    #[error("the device has been stopped")]
    Stopped,
}

/// What the device's thread is asked.
pub(super) enum Request {
    Intent(Intent, Completion),
    SwitchCall { index: u16, interposer: Option<Arc<dyn Interposer>>, answer: SyncSender<Result<(), SwitchError>> },
    CountCalls { index: u16, answer: SyncSender<Option<u64>> },
    Stop { deadline: Instant },
}

#[derive(Default)]
struct Inbox {
    requests: VecDeque<Request>,
    /// The thread has ended: nobody will read another request.
    closed: bool,
}

/// Requests that may wait; a guest that produces more is not heard.
const INBOX_MAX: usize = 64;

/// What the device's thread and the others share.
pub(super) struct Shared {
    pub(super) name: String,
    inbox: Mutex<Inbox>,
    pub(super) wake: OwnedFd,
    pub(super) doorbells: Vec<Arc<Doorbell>>,
    /// Raised while the thread is to drop what it waits for.
    pub(super) ending: Ending,
    status: Mutex<DeviceStatus>,
}

impl Shared {
    fn send(&self, request: Request) -> bool {
        let mut inbox = lock(&self.inbox);
        let room = inbox.requests.len() < INBOX_MAX || matches!(request, Request::Stop { .. });
        let taken = room && !inbox.closed;
        if taken {
            inbox.requests.push_back(request);
        }
        drop(inbox);
        // Fails only when the count is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        taken
    }
    pub(super) fn next(&self) -> Option<Request> {
        lock(&self.inbox).requests.pop_front()
    }
    /// Nobody reads requests any more; whoever waits for an answer hears that there is none.
    pub(super) fn close(&self) {
        let mut inbox = lock(&self.inbox);
        inbox.closed = true;
        let left = std::mem::take(&mut inbox.requests);
        drop(inbox);
        drop(left);
    }
    pub(super) fn update(&self, change: impl FnOnce(&mut DeviceStatus)) {
        change(&mut lock(&self.status));
    }
}

/// What is needed to reach a device's first backend.
pub struct DeviceParts {
    /// As the user named it; also names its threads.
    pub name: String,
    /// Kind of device.
    pub class: Box<dyn DeviceClass>,
    /// Where backends come from.
    pub source: Box<dyn BackendSource>,
    /// What backends are shown of the guest.
    pub memory: GuestMemory,
    /// For interposed doorbells and calls.
    pub relay: Arc<Relay>,
    /// How long things may take.
    pub limits: Limits,
}

/// A device with a backend and no transport yet.
pub struct Connected {
    parts: DeviceParts,
    session: Session,
    offer: DeviceOffer,
    ending: Ending,
}

/// Reaches a backend and greets it.
pub(super) fn greet(
    parts: &mut DeviceParts,
    generation: u64,
    ending: &Ending,
) -> Result<(Session, DeviceOffer), ConnectError> {
    let mut patience = Patience::new(parts.limits.start, ending);
    let Incarnation { socket, process } = parts.source.connect(generation, &mut patience)?;
    let conversation = Conversation::new(&parts.name, socket, parts.limits.step, ending)?;
    let mut session = Session::new(conversation, process);
    let config_len = parts.class.config_len();
    let result = session
        .conversation
        .perform(move |wire| session::handshake(wire, config_len))
        .and_then(|capabilities| Ok((parts.class.offer(&capabilities)?, capabilities)));
    match result {
        Ok((offer, capabilities)) => {
            session.capabilities = Some(capabilities);
            Ok((session, offer))
        }
        Err(source) => {
            let mut backend = parts.source.describe();
            if let Some(end) = session.give_up(Instant::now() + parts.limits.step) {
                backend = format!("{backend} ({end})");
            }
            Err(ConnectError::Conversation { backend, source })
        }
    }
}

impl Connected {
    /// What the guest may be offered.
    pub fn offer(&self) -> &DeviceOffer {
        &self.offer
    }

    /// Starts the device's thread behind a transport that has the given vectors (one per queue, and one for the
    /// configuration).
    ///
    /// # Errors
    /// If there is no thread or descriptor left.
    pub fn attach(
        self,
        vectors: Arc<VectorTable>,
        transport: Arc<dyn Transport>,
    ) -> Result<(VhostDevice, VhostFrontend), ConnectError> {
        let doorbells =
            self.offer.queue_sizes.iter().map(|_| Doorbell::new(&self.parts.relay)).collect::<Result<Vec<_>, _>>()?;
        let recovery = self.session.recovery();
        let status = DeviceStatus { state: DeviceState::Idle, generation: 1, lost: 0, recovery };
        let shared = Arc::new(Shared {
            name: self.parts.name.clone(),
            inbox: Mutex::default(),
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?,
            doorbells,
            ending: self.ending,
            status: Mutex::new(status),
        });
        let worker = Worker::new(Arc::clone(&shared), self.parts, self.offer, self.session, vectors, transport);
        let thread = std::thread::Builder::new().name(shared.name.clone()).spawn(move || worker.run())?;
        Ok((VhostDevice { shared: Arc::clone(&shared), thread: Some(thread) }, VhostFrontend { shared }))
    }
}

/// A running device.
pub struct VhostDevice {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl VhostDevice {
    /// Reaches the first backend.
    ///
    /// # Errors
    /// If there is none, or it cannot serve as this kind of device.
    pub fn connect(mut parts: DeviceParts) -> Result<Connected, ConnectError> {
        let ending = Ending::default();
        let (session, offer) = greet(&mut parts, 1, &ending)?;
        Ok(Connected { parts, session, offer, ending })
    }
    /// What it is at.
    pub fn status(&self) -> DeviceStatus {
        lock(&self.shared.status).clone()
    }
    /// Its doorbells, by queue.
    pub fn doorbells(&self) -> &[Arc<Doorbell>] {
        &self.shared.doorbells
    }
    /// Sends the calls of a queue through an interposer, or straight. The guest keeps running; no call is lost.
    ///
    /// # Errors
    /// If the queue is not in use or the backend does not take it.
    pub fn interpose_calls(&self, index: u16, interposer: Option<Arc<dyn Interposer>>) -> Result<(), SwitchError> {
        let (answer, result) = sync_channel(1);
        if !self.shared.send(Request::SwitchCall { index, interposer, answer }) {
            return Err(SwitchError::Stopped);
        }
        result.recv().unwrap_or(Err(SwitchError::Stopped))
    }
    /// Calls of a queue that the relay has seen; `None` while they go straight.
    pub fn calls_counted(&self, index: u16) -> Option<u64> {
        let (answer, result) = sync_channel(1);
        self.shared.send(Request::CountCalls { index, answer }).then_some(())?;
        result.recv().ok().flatten()
    }
    /// Takes the rings back, lets the backend end, ends the thread. Nothing touches guest memory afterwards.
    pub fn stop(&mut self, deadline: Instant) {
        if let Some(thread) = self.thread.take() {
            self.shared.ending.store(true, Ordering::Relaxed);
            self.shared.send(Request::Stop { deadline });
            // It only fails if the thread panicked, which its hook has reported.
            let _ = thread.join();
        }
    }
}

impl Drop for VhostDevice {
    fn drop(&mut self) {
        self.stop(Instant::now() + Duration::from_secs(1));
    }
}

/// The device as its transport sees it.
pub struct VhostFrontend {
    shared: Arc<Shared>,
}

impl VhostFrontend {
    /// The doorbells, by queue.
    pub fn doorbells(&self) -> &[Arc<Doorbell>] {
        &self.shared.doorbells
    }
}

impl VirtioFrontend for VhostFrontend {
    fn intent(&mut self, intent: Intent) -> Answer {
        let waits = !matches!(intent, Intent::ConfigWrite { .. });
        let (completion, deferred) = access::deferred();
        // An intent that is not taken drops its completion: the guest's write ends as one that nobody answered.
        self.shared.send(Request::Intent(intent, completion));
        if waits { Answer::Later(deferred) } else { Answer::Now }
    }
    fn notify(&mut self, index: u16) {
        if let Some(bell) = self.shared.doorbells.get(usize::from(index)) {
            bell.ring();
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
