//! A device whose other half is a vhost-user backend, as the rest of the VMM holds it.
//!
//! [`VhostDevice::connect`] reaches the first backend and learns what it can do; [`Connected::attach`] puts the result
//! behind a virtio transport and starts the device's own thread (`worker`), which owns everything that may wait.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_devices::virtio::{DeviceOffer, Intent, QueueConfig, VirtioFrontend};
use atoll_devices::{Answer, access};
use atoll_protocol::jail::JailedLayer;
use rustix::event::EventfdFlags;

use super::back_channel::BackChannel;
use super::call::Transport;
use super::conversation::Conversation;
pub use super::device_error::{ConnectError, PauseError, SwitchError};
use super::fault::{self, Fault, FaultError};
use super::gate::Gate;
use super::iotlb::Behind;
use super::parts::{DeviceParts, Makers, Parts};
use super::patience::{Ending, Patience};
use super::recovery::Rules;
use super::request::Request;
use super::rings::RingPosition;
use super::session;
use super::source::{Incarnation, Start};
pub(super) use super::status::{DeviceState, DeviceStatus, Recovery, Spare};
use super::worker::{LinkError, Past, ResizeError, Session, SessionParts, Worker};
use crate::actor::{ActorReport, Post};
use crate::doorbell::{Doorbell, Interposer, Relay};
use crate::iommu::Endpoint;
use crate::irq::VectorTable;
use crate::lifecycle::{QueueReport, Story};
use crate::machine::{LinkState, NewSize};
use crate::memory::GuestMemory;
use crate::metrics::{CountedBy, DeviceMeter, Phase};
use crate::seccomp::{self, ThreadClass};

/// A net below the deadlines that the device's thread has for each of its own steps.
const ANSWER_MAX: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Inbox {
    requests: VecDeque<Request>,
    /// Requests that found no room.
    full: u64,
    /// The thread has ended: nobody will read another request.
    closed: bool,
}

/// How often it is looked at the latest whether somebody listens at a socket of somebody else's.
const FOREIGN_LOOK: Duration = Duration::from_millis(250);

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
    /// Whether a backend may have the rings, and has.
    pub(super) gate: Gate,
    /// The driver's queues, while it runs the device.
    pub(super) queues: Mutex<Vec<QueueConfig>>,
    memory: GuestMemory,
    meter: Option<Arc<DeviceMeter>>,
}

impl Shared {
    pub(super) fn send(&self, request: Request) -> bool {
        let mut inbox = lock(&self.inbox);
        let room = inbox.requests.len() < INBOX_MAX || request.is_urgent();
        let taken = room && !inbox.closed;
        inbox.full += u64::from(!room);
        if taken {
            inbox.requests.push_back(request);
        }
        drop(inbox);
        self.wake();
        taken
    }
    /// Has the thread look what is to be done.
    pub(super) fn wake(&self) {
        // Fails only when the count is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
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
    /// A driver has set these queues up.
    pub(super) fn begin_queues(&self, queues: &[QueueConfig]) {
        *lock(&self.queues) = queues.to_vec();
        if let Some(meter) = &self.meter {
            meter.begin(self.memory.mapped(), queues);
        }
    }
    /// The driver goes.
    pub(super) fn end_queues(&self) {
        lock(&self.queues).clear();
        if let Some(meter) = &self.meter {
            meter.end();
        }
    }
    /// How the last backend ended.
    pub(super) fn last_exit(&self) -> Option<String> {
        lock(&self.status).last_exit.clone()
    }
    pub(super) fn update(&self, change: impl FnOnce(&mut DeviceStatus)) {
        let mut status = lock(&self.status);
        change(&mut status);
        let Some(meter) = &self.meter else { return };
        let phase = match &status.state {
            DeviceState::Idle => Phase::Idle,
            DeviceState::Running => Phase::Running,
            DeviceState::Recovering { .. } => Phase::Recovering,
            DeviceState::Waiting { .. } => Phase::Waiting,
            DeviceState::Quarantined { .. } => Phase::Quarantined,
            DeviceState::Stopped => Phase::Stopped,
        };
        meter.tell(phase, status.generation, status.lost);
        meter.tell_recovery(status.recovery == Recovery::Full);
        meter.tell_end(status.failed_starts, status.last_exit.as_deref(), status.spare);
    }
}

impl Post for Shared {
    fn report(&self) -> ActorReport {
        let (waiting, full) = {
            let inbox = lock(&self.inbox);
            (inbox.requests.len(), inbox.full)
        };
        let status = lock(&self.status);
        ActorReport {
            name: format!("device.{}", self.name).into(),
            waiting,
            capacity: INBOX_MAX,
            full,
            generation: status.generation,
            state: status.state.word().into(),
        }
    }
}

/// A device with a backend and no transport yet: a new one, or one whose last board is gone.
pub struct Connected {
    parts: Parts,
    past: Past,
    status: DeviceStatus,
    ending: Ending,
}

/// Tells the machine's story how the jail of an incarnation came out.
pub(crate) fn tell_jail(story: &Story, name: &str, generation: u64, jail: &[JailedLayer]) {
    if jail.is_empty() {
        return;
    }
    let missing: Vec<String> = jail.iter().filter(|layer| !layer.stands()).map(ToString::to_string).collect();
    let known = [("id", name.to_owned()), ("generation", generation.to_string())];
    let missing = (!missing.is_empty()).then(|| ("missing", missing.join(", ")));
    story.tell("device", "jailed", known.into_iter().chain(missing));
}

/// Reaches a backend and greets it.
pub(super) fn greet(
    parts: &Makers,
    generation: u64,
    start: &Start,
    ending: &Ending,
) -> Result<(Box<Session>, DeviceOffer), ConnectError> {
    let mut patience = Patience::new(parts.limits.start, ending);
    let (requests, backends_end) = BackChannel::new()?;
    let mut source = lock(&parts.source);
    let Incarnation { socket, mut process } = match start {
        Start::Alone => source.connect(generation, &mut patience)?,
        Start::Beside { exe } => source.connect_beside(generation, exe.as_deref(), &mut patience)?,
    };
    drop(source);
    let mut conversation =
        Conversation::new(&parts.roll, (&parts.name, generation), socket, parts.limits.step, ending)?;
    if let Some(process) = &process {
        conversation.end_with(process.ended())?;
    }
    let (wish, addresses) = (parts.class.config(), parts.addresses());
    let greeted = conversation
        .perform(move |wire| session::handshake(wire, wish, &backends_end, addresses))
        .and_then(|capabilities| Ok((parts.class.offer(&capabilities)?, capabilities)))
        .and_then(|(offer, capabilities)| {
            if let Some((offset, bytes)) = parts.class.imprint(&capabilities) {
                conversation.perform(move |wire| session::set_config(wire, offset, &bytes))?;
            }
            Ok((offer, capabilities))
        });
    match greeted {
        Ok((offer, capabilities)) => {
            let (served, in_order) = (parts.class.served(&capabilities), parts.class.in_order());
            let shadowed = parts.is_shadowed();
            let parts = SessionParts { conversation, process, capabilities, requests, served, in_order, shadowed };
            Ok((Box::new(Session::new(parts)), offer))
        }
        Err(source) => {
            conversation.hang_up();
            let end = process.as_mut().map(|process| process.kill(Instant::now() + parts.limits.step));
            let mut backend = match start {
                Start::Beside { exe: Some(exe) } => exe.display().to_string(),
                Start::Beside { exe: None } | Start::Alone => lock(&parts.source).describe(),
            };
            if let Some(end) = end {
                backend = format!("{backend} ({end})");
            }
            let last_lines = process.as_ref().map(|process| process.last_lines()).unwrap_or_default();
            Err(ConnectError::Conversation { backend, source, last_lines })
        }
    }
}

impl Connected {
    /// What the guest may be offered.
    pub fn offer(&self) -> &DeviceOffer {
        &self.past.shown
    }

    /// Which device it is, after its board is gone.
    pub fn name(&self) -> &str {
        &self.parts.makers.name
    }

    /// Whether it is to be behind an IOMMU.
    pub(super) fn wants_iommu(&self) -> bool {
        self.parts.makers.iommu
    }

    /// It is behind this one from now on.
    pub(super) fn put_behind(&mut self, behind: Behind) {
        self.parts.behind = Some(behind);
    }

    /// The board that it comes to has other memory than the one that it came from, and another relay.
    pub fn move_to(&mut self, memory: GuestMemory, relay: Arc<Relay>) {
        (self.parts.memory, self.parts.relay) = (memory, relay);
    }

    /// Nobody wants it: its backend has ended, or is left alone where it is somebody else's, when this returns.
    pub(super) fn give_up(mut self, deadline: Instant) {
        self.past.give_up(deadline);
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
        let queues = &self.past.shown.queue_sizes;
        let doorbells = queues.iter().map(|_| Doorbell::new(&self.parts.relay)).collect::<Result<Vec<_>, _>>()?;
        let shared = self.parts.makers.roll.post(Shared {
            name: self.parts.makers.name.clone(),
            inbox: Mutex::default(),
            wake: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?,
            doorbells,
            ending: self.ending,
            status: Mutex::new(self.status),
            gate: Gate::default(),
            queues: Mutex::default(),
            memory: self.parts.memory.clone(),
            meter: self.parts.meter.clone(),
        });
        shared.update(|_| {});
        let worker = Worker::new(Arc::clone(&shared), self.parts, self.past, vectors, transport);
        let thread = std::thread::Builder::new().name(shared.name.clone()).spawn(move || {
            seccomp::enter(ThreadClass::Device);
            worker.run();
        })?;
        Ok((VhostDevice { shared: Arc::clone(&shared), thread: Some(thread) }, VhostFrontend { shared }))
    }
}

/// A running device.
pub struct VhostDevice {
    pub(super) shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl VhostDevice {
    /// Reaches the first backend.
    ///
    /// # Errors
    /// If there is none, or it cannot serve as this kind of device.
    pub fn connect(parts: DeviceParts) -> Result<Connected, ConnectError> {
        Self::connect_while(parts, Ending::default())
    }
    /// [`Self::connect`], as long as `ending` is not raised.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub(super) fn connect_while(parts: DeviceParts, ending: Ending) -> Result<Connected, ConnectError> {
        let DeviceParts {
            name,
            class,
            source,
            memory,
            relay,
            limits,
            story,
            meter,
            on_failure,
            track,
            care,
            iommu,
            isolation,
            joint,
            clock,
        } = parts;
        let (fence, foreign, build) = (source.fence(), source.is_foreign(), source.build());
        let makers = Makers {
            name,
            class: Arc::from(class),
            source: Arc::new(Mutex::new(source)),
            limits,
            track,
            iommu,
            isolation,
            build,
            roll: story.roll().clone(),
        };
        let (session, offer) = greet(&makers, 1, &Start::Alone, &ending)?;
        let (recovery, pid, jail) = (session.recovery(), session.pid(), session.jail());
        tell_jail(&story, &makers.name, 1, &jail);
        let state = DeviceState::Idle;
        let (last_exit, last_lines, fence_wait) = (None, Vec::new(), Duration::ZERO);
        let spare = if care.standby && makers.build.is_ok() { Spare::Coming } else { Spare::Off };
        let exe = makers.build.as_ref().ok().map(|build| build.exe());
        let status = DeviceStatus {
            state,
            generation: 1,
            lost: 0,
            failed_starts: 0,
            upgrade: None,
            link: None,
            spare,
            exe,
            recovery,
            pid,
            jail,
            fence_wait,
            last_exit,
            last_lines,
        };
        let mut policy = care.policy;
        if foreign {
            (policy.start_attempts, policy.start_backoff_max) = (None, FOREIGN_LOOK);
        }
        let rules = Rules {
            policy,
            on_failure,
            fence: limits.fence,
            stall: care.stall,
            debugged: care.debugged,
            // Of what cannot be started beside itself there is no spare.
            standby: care.standby && makers.build.is_ok(),
            probation: limits.probation,
            trial: limits.trial,
        };
        let parts = Parts { makers, fence, memory, behind: None, relay, limits, story, meter, joint, clock };
        Ok(Connected { parts, past: Past::new(session, offer, rules), status, ending })
    }
    /// What it is at.
    pub fn status(&self) -> DeviceStatus {
        lock(&self.shared.status).clone()
    }
    /// Who counts what it does.
    pub fn counted(&self) -> Option<CountedBy> {
        self.shared.meter.as_ref().map(|meter| meter.counted())
    }
    /// The device as an IOMMU tells it of changes.
    pub(super) fn endpoint(&self) -> Weak<dyn Endpoint> {
        let shared: Weak<Shared> = Arc::downgrade(&self.shared);
        shared
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
        result.recv_timeout(ANSWER_MAX).unwrap_or_else(|error| {
            Err(match error {
                RecvTimeoutError::Timeout => SwitchError::Late(ANSWER_MAX),
                RecvTimeoutError::Disconnected => SwitchError::Stopped,
            })
        })
    }
    /// Calls of a queue that the relay has seen; `None` while they go straight.
    pub fn calls_counted(&self, index: u16) -> Option<u64> {
        let (answer, result) = sync_channel(1);
        self.shared.send(Request::CountCalls { index, answer }).then_some(())?;
        result.recv_timeout(ANSWER_MAX).ok().flatten()
    }
    /// Changes the size of a disk that is ours, and tells the guest. While the device is paused the guest is told
    /// when it goes on, without a backend when there is the next one.
    ///
    /// # Errors
    /// All of [`ResizeError`]; the guest then sees the size that it saw before.
    pub fn resize(&self, size: NewSize) -> Result<(), ResizeError> {
        let (answer, result) = sync_channel(1);
        if !self.shared.send(Request::Resize { size, answer }) {
            return Err(ResizeError::Stopped);
        }
        result.recv_timeout(ANSWER_MAX).unwrap_or_else(|error| {
            Err(match error {
                RecvTimeoutError::Timeout => ResizeError::Late(ANSWER_MAX),
                RecvTimeoutError::Disconnected => ResizeError::Stopped,
            })
        })
    }
    /// Plugs the cable of a network card in or out, and tells the guest; a backend that is not there now finds it so. While
    /// the device is paused the guest is told when it goes on.
    ///
    /// # Errors
    /// All of [`LinkError`]; the link then is as it was.
    pub fn set_link(&self, link: LinkState) -> Result<(), LinkError> {
        let (answer, result) = sync_channel(1);
        if !self.shared.send(Request::SetLink { link, answer }) {
            return Err(LinkError::Stopped);
        }
        result.recv_timeout(ANSWER_MAX).unwrap_or_else(|error| {
            Err(match error {
                RecvTimeoutError::Timeout => LinkError::Late(ANSWER_MAX),
                RecvTimeoutError::Disconnected => LinkError::Stopped,
            })
        })
    }
    /// Its queues, as the driver set them up; how much is in flight is read from the rings.
    pub fn queues(&self) -> Vec<QueueReport> {
        let memory = self.shared.memory.mapped();
        let report = |queue: &QueueConfig| {
            let position = RingPosition::read(memory, queue);
            let in_flight = position.map_or(0, |position| position.available.wrapping_sub(position.used));
            let kicks = self.shared.doorbells.get(usize::from(queue.index)).and_then(|bell| bell.count());
            // More than the queue holds is a driver's nonsense.
            QueueReport {
                index: queue.index,
                size: queue.size,
                in_flight: in_flight.min(queue.size),
                kicks,
                calls: None,
            }
        };
        lock(&self.shared.queues).iter().map(report).collect()
    }
    /// Does to it what the world may do (`fault`).
    ///
    /// # Errors
    /// When it is in no state for it.
    pub fn inject(&self, fault: Fault, seed: u64) -> Result<(), FaultError> {
        fault::inject(self, fault, seed)
    }
    /// Cuts the connection, or has the backend talk nonsense that follows from a seed. Whether anybody hears of it.
    pub(super) fn break_conversation(&self, nonsense: Option<u64>) -> bool {
        self.shared.send(Request::Break { nonsense })
    }
    /// The board goes, the backend stays: takes the rings back and ends the thread. Nothing touches guest memory
    /// afterwards. `None` when the device had been stopped.
    pub fn leave(&mut self, deadline: Instant) -> Option<Connected> {
        let thread = self.thread.take()?;
        let (answer, left) = sync_channel(1);
        self.shared.send(Request::Leave { deadline, answer });
        let in_time = left.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        let left = in_time.or_else(|_| {
            // It waits for a backend that does not come: the next board's thread may do that.
            self.shared.ending.store(true, Ordering::Relaxed);
            left.recv()
        });
        // It only fails if the thread panicked, which its hook has reported.
        let _ = thread.join();
        let (parts, past) = left.ok()?;
        let ending = Arc::clone(&self.shared.ending);
        ending.store(false, Ordering::Relaxed);
        Some(Connected { parts, past, status: self.status(), ending })
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
