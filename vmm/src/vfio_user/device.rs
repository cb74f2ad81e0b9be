//! A device that another process serves, as the rest of the VMM holds it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_devices::Completion;
use rustix::event::EventfdFlags;

use super::doorbells::Doorbells;
use super::greeting::Shape;
use super::next::{ConnectError, Makers, Session, greet};
use super::record::Record;
use super::worker::{Past, Worker};
use crate::actor::{ActorReport, Clock, Post};
use crate::irq::VectorTable;
use crate::lifecycle::Story;
use crate::memory::GuestMemory;
use crate::metrics::{DeviceMeter, Phase};
use crate::seccomp::{self, ThreadClass};
use crate::vhost::gate::{Closed, Gate};
use crate::vhost::recovery::Rules;
use crate::vhost::{
    BackendSource, DeviceState, DeviceStatus, Ending, Fence, InFlight, Limits, PauseError, Recovery, Spare, tell_jail,
};

/// Requests that may wait; one of each vCPU, and the few of the operator's.
const INBOX_MAX: usize = 512;
/// How long whoever resumes a device waits for it.
const RESUME_TIME: Duration = Duration::from_secs(1);

/// A guest's access to registers of the server's.
pub(super) struct Access {
    pub(super) region: u32,
    pub(super) offset: u64,
    /// What is written; nothing of a read.
    pub(super) data: Option<Vec<u8>>,
    pub(super) len: usize,
    pub(super) completion: Completion,
}

/// What the device's thread is asked.
pub(super) enum Request {
    Access(Access),
    /// The gate has been closed.
    Pause,
    Resume {
        answer: SyncSender<()>,
    },
    Revive,
    /// A fault was asked for: the connection breaks.
    Break,
    Leave {
        deadline: Instant,
        answer: SyncSender<(Parts, Past)>,
    },
    Stop {
        deadline: Instant,
    },
}

#[derive(Default)]
struct Inbox {
    requests: VecDeque<Request>,
    full: u64,
    closed: bool,
}

/// What the device's thread and the others share.
pub(super) struct Shared {
    pub(super) name: String,
    inbox: Mutex<Inbox>,
    pub(super) wake: OwnedFd,
    pub(super) ending: Ending,
    status: Mutex<DeviceStatus>,
    /// Whether a server may reach guest memory, and does.
    pub(super) gate: Gate,
    pub(super) doorbells: Mutex<Arc<Doorbells>>,
    meter: Option<Arc<DeviceMeter>>,
    /// What its processes know, where they are ours.
    pub(super) record: Option<Arc<Record>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Whether it was taken; one that was not is dropped, and with it its completion.
    pub(super) fn send(&self, request: Request) -> bool {
        let mut inbox = lock(&self.inbox);
        let room = inbox.requests.len() < INBOX_MAX || !matches!(request, Request::Access(_));
        let taken = room && !inbox.closed;
        inbox.full += u64::from(!room);
        if taken {
            inbox.requests.push_back(request);
        }
        drop(inbox);
        self.wake();
        taken
    }
    pub(super) fn wake(&self) {
        // Fails only when the count is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
    pub(super) fn next(&self) -> Option<Request> {
        lock(&self.inbox).requests.pop_front()
    }
    /// Nobody reads requests any more.
    pub(super) fn close(&self) {
        let mut inbox = lock(&self.inbox);
        inbox.closed = true;
        let left = std::mem::take(&mut inbox.requests);
        drop(inbox);
        drop(left);
    }
    pub(super) fn status(&self) -> DeviceStatus {
        lock(&self.status).clone()
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

/// What a device is made of.
pub(super) struct Wanted {
    pub(super) name: String,
    pub(super) source: Box<dyn BackendSource>,
    /// What outlives its processes, where they are ours.
    pub(super) record: Option<Arc<Record>>,
    pub(super) memory: GuestMemory,
    pub(super) rules: Rules,
    pub(super) limits: Limits,
    pub(super) story: Story,
    pub(super) meter: Option<Arc<DeviceMeter>>,
    pub(super) clock: Arc<dyn Clock>,
}

/// [`Wanted`] as the device's thread has it.
pub(super) struct Parts {
    pub(super) name: String,
    pub(super) makers: Makers,
    pub(super) fence: Arc<dyn Fence>,
    pub(super) record: Option<Arc<Record>>,
    pub(super) memory: GuestMemory,
    pub(super) limits: Limits,
    pub(super) story: Story,
    pub(super) meter: Option<Arc<DeviceMeter>>,
    pub(super) clock: Arc<dyn Clock>,
}

/// A device with a server and no place on a board yet: a new one, or one whose last board is gone.
pub(super) struct Connected {
    pub(super) parts: Parts,
    past: Past,
    status: DeviceStatus,
    ending: Ending,
}

impl Connected {
    /// Reaches the first server, as long as `ending` is not raised.
    ///
    /// # Errors
    /// If there is none, or it is no PCI device.
    pub(super) fn new(wanted: Wanted, ending: Ending) -> Result<Self, ConnectError> {
        let Wanted { name, source, record, memory, rules, limits, story, meter, clock } = wanted;
        let (fence, exe) = (source.fence(), source.build().ok().map(|build| build.exe()));
        let makers = Makers { source: Arc::new(Mutex::new(source)), limits };
        let session = greet(&makers, 1, &ending)?;
        tell_jail(&story, &name, 1, &session.jail());
        let recovery = if record.is_some() { Recovery::Full } else { Recovery::IdleOnly };
        let status = DeviceStatus {
            state: DeviceState::Idle,
            generation: 1,
            lost: 0,
            failed_starts: 0,
            upgrade: None,
            spare: Spare::Off,
            exe,
            recovery,
            pid: session.pid(),
            jail: session.jail(),
            fence_wait: Duration::ZERO,
            last_exit: None,
            last_lines: Vec::new(),
            link: None,
        };
        let past = Past::new(session, rules, recovery);
        let parts = Parts { name, makers, fence, record, memory, limits, story, meter, clock };
        Ok(Self { parts, past, status, ending })
    }
    /// What the guest is shown.
    pub(super) fn shape(&self) -> &Shape {
        &self.past.shown
    }
    /// Nobody wants it.
    pub(super) fn give_up(mut self, deadline: Instant) {
        self.past.give_up(deadline);
    }
    /// Starts the device's thread, with its vectors.
    ///
    /// # Errors
    /// Without a thread or descriptor.
    pub(super) fn attach(self, vectors: Arc<VectorTable>) -> io::Result<UserDevice> {
        let Self { parts, past, status, ending } = self;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let shared = parts.story.roll().post(Shared {
            name: parts.name.clone(),
            inbox: Mutex::default(),
            wake: rustix::event::eventfd(0, flags)?,
            ending,
            status: Mutex::new(status),
            gate: Gate::default(),
            doorbells: Mutex::default(),
            meter: parts.meter.clone(),
            record: parts.record.clone(),
        });
        shared.update(|_| {});
        let worker = Worker::new(Arc::clone(&shared), parts, past, vectors);
        let thread = std::thread::Builder::new().name(shared.name.clone()).spawn(move || {
            seccomp::enter(ThreadClass::Device);
            worker.run();
        })?;
        Ok(UserDevice { shared, thread: Some(thread) })
    }
}

/// A running device.
pub(super) struct UserDevice {
    pub(super) shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl UserDevice {
    /// Begins what [`Self::pause`] waits for.
    pub(super) fn begin_pause(&self) {
        if self.shared.gate.close() {
            self.shared.send(Request::Pause);
        }
    }
    /// Takes guest memory away from the server by `deadline`.
    ///
    /// # Errors
    /// When a live server is late; then the device goes on.
    pub(super) fn pause(&self, deadline: Instant) -> Result<(), PauseError> {
        let began = Instant::now();
        if self.shared.gate.close() && !self.shared.send(Request::Pause) {
            return Err(PauseError::Stopped);
        }
        let fence = began + deadline.saturating_duration_since(began) / 2;
        match self.shared.gate.await_closed(deadline, fence) {
            Closed::Proven => Ok(()),
            Closed::Unproven => {
                let device = &self.shared.name;
                tracing::warn!(
                    device,
                    "nothing shows that the dead server's last writes are done; the pause goes on without"
                );
                Ok(())
            }
            Closed::Late => {
                if self.shared.gate.open() {
                    let (answer, _) = sync_channel(1);
                    self.shared.send(Request::Resume { answer });
                }
                let in_flight = self.shared.record.as_ref().map(|record| record.in_flight());
                Err(PauseError::Silent { waited: began.elapsed(), in_flight: InFlight(in_flight) })
            }
        }
    }
    /// Undoes [`Self::pause`].
    ///
    /// # Errors
    /// When the device has been stopped.
    pub(super) fn resume(&self) -> Result<(), PauseError> {
        if !self.shared.gate.open() {
            return Ok(());
        }
        let (answer, done) = sync_channel(1);
        if !self.shared.send(Request::Resume { answer }) {
            return Err(PauseError::Stopped);
        }
        // Late: it goes on by itself when there is a server.
        let _ = done.recv_timeout(RESUME_TIME);
        Ok(())
    }
    /// The board goes, the server stays.
    pub(super) fn leave(&mut self, deadline: Instant) -> Option<Connected> {
        let thread = self.thread.take()?;
        let (answer, left) = sync_channel(1);
        self.shared.send(Request::Leave { deadline, answer });
        let in_time = left.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        let left = in_time.or_else(|_| {
            self.shared.ending.store(true, Ordering::Relaxed);
            left.recv()
        });
        // It only fails if the thread panicked, which its hook has reported.
        let _ = thread.join();
        let (parts, past) = left.ok()?;
        let ending = Arc::clone(&self.shared.ending);
        ending.store(false, Ordering::Relaxed);
        Some(Connected { parts, past, status: self.shared.status(), ending })
    }
    /// Ends the device: nothing touches guest memory afterwards.
    pub(super) fn stop(&mut self, deadline: Instant) {
        if let Some(thread) = self.thread.take() {
            self.shared.send(Request::Stop { deadline });
            // As above.
            let _ = thread.join();
        }
    }
}

impl Drop for UserDevice {
    fn drop(&mut self) {
        self.stop(Instant::now() + Duration::from_secs(1));
    }
}

/// The past of a device that was given up before it had a thread.
impl Past {
    fn give_up(&mut self, deadline: Instant) {
        for session in self.sessions() {
            Session::give_up(session, deadline);
        }
    }
}
