//! A backend that the VMM starts itself: a child of the spawner, born with its end of the vhost-user socket.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, TrySendError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use atoll_protocol::jail::JailedLayer;
use atoll_protocol::sidecar::{DeviceClass, GoodbyeReason, SidecarFeatures, SidecarOrder};
use atoll_protocol::{DeviceId, Generation};

use super::patience::Patience;
use super::source::{
    BackendProcess, BackendSource, Build, EndIsEnough, Fence, Incarnation, SourceError, Start, is_readable,
};
use super::upgrade::Lone;
use crate::actor::{Inbox, Outbox, mailbox};
use crate::backend::{
    BackendEvent, BackendExit, BackendSpec, Child, Ending, EventKind, EventSink, ExitCause, Offer, PassedFd, Spawner,
    WatchLimits,
};
use crate::metrics::DeviceMeter;

/// Opens or copies what one incarnation inherits.
pub type MakeDescriptors = Box<dyn Fn() -> Result<Vec<PassedFd>, Box<dyn std::error::Error + Send + Sync>> + Send>;

/// How to start each incarnation of a device's backend.
pub struct SpawnedBackend {
    /// Name of the device, for errors and logs.
    pub name: String,
    /// The device.
    pub device: DeviceId,
    /// What the process must say that it serves.
    pub class: DeviceClass,
    /// Its binary.
    pub build: Arc<Build>,
    /// Why what it is started with can be had by one process at a time, if it can.
    pub lone: Option<Lone>,
    /// Its arguments, without those of descriptors.
    pub args: Vec<OsString>,
    /// What each incarnation inherits besides its sockets.
    pub descriptors: MakeDescriptors,
    /// Counts what it does; each incarnation gets the same page (`--stats-fd`).
    pub meter: Option<Arc<DeviceMeter>>,
    /// Who starts it.
    pub spawner: Spawner,
}

/// Keeps what the device's thread wants to know; the rest is for the log.
struct Ears {
    name: String,
    events: Outbox<EventKind>,
    measured: Arc<Measured>,
    stall: Arc<Mutex<Option<String>>>,
}

/// The last size that the process has told.
#[derive(Default)]
struct Measured {
    bytes: Mutex<Option<u64>>,
    told: Condvar,
}

impl Measured {
    fn lock(&self) -> MutexGuard<'_, Option<u64>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventSink for Ears {
    fn offer(&self, event: BackendEvent) -> Offer {
        match event.kind {
            EventKind::Ready { .. } | EventKind::Exited(_) => {}
            EventKind::Stalled { queue } => {
                let what = match queue {
                    Some(queue) => format!("its queue {} completes nothing with work in it", queue.0),
                    None => "it does not answer".into(),
                };
                tracing::warn!(device = self.name, what, "the backend makes no progress");
                *self.stall.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
                return Offer::Taken;
            }
            EventKind::Measured { bytes } => {
                *self.measured.lock() = Some(bytes);
                self.measured.told.notify_all();
                return Offer::Taken;
            }
            EventKind::Progress { .. } | EventKind::Quiesced | EventKind::Pong { .. } => return Offer::Taken,
        }
        match self.events.try_send(event.kind.clone()) {
            Ok(()) => Offer::Taken,
            Err(TrySendError::Full(_)) => Offer::Full(event),
            Err(TrySendError::Disconnected(_)) => Offer::Gone,
        }
    }
}

/// Whether another incarnation would end the same way.
fn is_hopeless(exit: &BackendExit) -> bool {
    matches!(exit.cause, ExitCause::Goodbye(GoodbyeReason::Config(_)) | ExitCause::Unjailed(_))
}

impl SpawnedBackend {
    fn start(&self, generation: u64, start: &Start, patience: &mut Patience) -> Result<Incarnation, SourceError> {
        let failed =
            |hopeless, source: Box<dyn std::error::Error + Send + Sync>| SourceError::Start { hopeless, source };
        let exe = match start {
            Start::Beside { exe: Some(exe) } => exe.clone(),
            Start::Beside { exe: None } | Start::Alone => self.build.exe(),
        };
        let (socket, childs_socket) = UnixStream::pair().map_err(|error| failed(false, error.into()))?;
        let mut fds = vec![PassedFd { flag: "--vhost-fd".into(), fd: OwnedFd::from(childs_socket) }];
        fds.extend((self.descriptors)().map_err(|error| failed(false, error))?);
        let page = self.meter.as_ref().map_or(Ok(None), |meter| meter.pass());
        if let Some(fd) = page.map_err(|error| failed(false, error.into()))? {
            fds.push(PassedFd { flag: "--stats-fd".into(), fd });
        }
        let spec = BackendSpec {
            name: self.name.clone(),
            device: self.device,
            generation: Generation(generation),
            class: self.class,
            exe: exe.clone(),
            beside: matches!(start, Start::Beside { .. }),
            args: self.args.clone(),
            env: Vec::new(),
            fds,
            limits: WatchLimits::default(),
        };
        let (events, heard) = mailbox(self.spawner.roll(), format!("process.{}", self.name), generation, 4);
        let (measured, stall) = (Arc::<Measured>::default(), Arc::default());
        let ears = Ears { name: self.name.clone(), events, measured: Arc::clone(&measured), stall: Arc::clone(&stall) };
        let child = self.spawner.spawn(spec, ears).map_err(|error| failed(false, error.into()))?;
        let mut process = ChildProcess {
            child,
            events: heard,
            end: None,
            measured,
            stall,
            features: SidecarFeatures::default(),
            jail: Vec::new(),
        };
        // The spawner has deadlines of its own for hello and ready; ours is for a spawner that does not keep up.
        while let Some(slice) = patience.slice() {
            match process.events.recv_timeout(slice) {
                Ok(EventKind::Exited(exit)) => return Err(failed(is_hopeless(&exit), Box::new(exit))),
                Ok(event) => {
                    if let EventKind::Ready { features, jail } = event {
                        (process.features, process.jail) = (features, jail);
                    }
                    return Ok(Incarnation { socket, process: Some(Box::new(process)) });
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let end = process.kill(Instant::now() + KILL_TIME);
        Err(failed(false, format!("the backend of {} did not get ready in time ({end})", self.name).into()))
    }
}

impl BackendSource for SpawnedBackend {
    fn connect(&mut self, generation: u64, patience: &mut Patience) -> Result<Incarnation, SourceError> {
        self.start(generation, &Start::Alone, patience)
    }
    fn connect_beside(
        &mut self,
        generation: u64,
        exe: Option<&Path>,
        patience: &mut Patience,
    ) -> Result<Incarnation, SourceError> {
        self.start(generation, &Start::Beside { exe: exe.map(Path::to_owned) }, patience)
    }
    fn build(&self) -> Result<Arc<Build>, Lone> {
        self.lone.map_or_else(|| Ok(Arc::clone(&self.build)), Err)
    }
    fn describe(&self) -> String {
        self.build.exe().display().to_string()
    }
    fn fence(&self) -> Arc<dyn Fence> {
        Arc::new(EndIsEnough)
    }
}

/// How long a killed process may take to be reaped.
const KILL_TIME: Duration = Duration::from_secs(2);

/// How a process ended.
enum End {
    Seen(BackendExit),
    /// The spawner has gone with it.
    Unseen,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Seen(exit) => write!(f, "{exit}"),
            Self::Unseen => f.write_str("nobody knows how it ended"),
        }
    }
}

struct ChildProcess {
    child: Child,
    events: Inbox<EventKind>,
    end: Option<End>,
    measured: Arc<Measured>,
    stall: Arc<Mutex<Option<String>>>,
    features: SidecarFeatures,
    jail: Vec<JailedLayer>,
}

impl ChildProcess {
    fn await_end(&mut self, deadline: Instant) -> String {
        loop {
            if let Some(end) = &self.end {
                return end.to_string();
            }
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(EventKind::Exited(exit)) => self.end = Some(End::Seen(exit)),
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => self.end = Some(End::Unseen),
                Err(RecvTimeoutError::Timeout) => return format!("process {} has not ended yet", self.child.pid()),
            }
        }
    }
}

impl BackendProcess for ChildProcess {
    fn id(&self) -> u32 {
        self.child.pid()
    }
    fn jail(&self) -> &[JailedLayer] {
        &self.jail
    }
    fn ended(&self) -> BorrowedFd<'_> {
        self.child.pidfd().as_fd()
    }
    fn kill(&mut self, deadline: Instant) -> String {
        self.child.kill();
        self.await_end(deadline)
    }
    fn ending(&self) -> Ending {
        match &self.end {
            Some(End::Seen(BackendExit { cause: ExitCause::Goodbye(GoodbyeReason::Config(why)), .. })) => {
                Ending::Config(why.clone())
            }
            _ => Ending::Crash { idle: false },
        }
    }
    fn last_lines(&self) -> Vec<String> {
        match &self.end {
            Some(End::Seen(exit)) => exit.last_stderr.clone(),
            _ => Vec::new(),
        }
    }
    fn take_stall(&mut self) -> Option<String> {
        self.stall.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
    fn measure(&mut self, patience: &mut Patience) -> Result<u64, String> {
        if !self.features.contains(SidecarFeatures::MEASURE) {
            return Err("it cannot look at the size of its device while it runs".into());
        }
        *self.measured.lock() = None;
        self.child.order(&SidecarOrder::Measure).map_err(|error| error.to_string())?;
        let mut bytes = self.measured.lock();
        loop {
            if let Some(bytes) = bytes.take() {
                return Ok(bytes);
            }
            if is_readable(self.ended()) {
                return Err("its process has ended".into());
            }
            let slice = patience.slice().ok_or("it does not say what size its device has")?;
            bytes = self.measured.told.wait_timeout(bytes, slice).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
    fn finish(&mut self, deadline: Instant) -> String {
        let left = deadline.saturating_duration_since(Instant::now());
        self.child.stop(left);
        // A little longer than it has: killing it takes a moment too.
        self.await_end(deadline + KILL_TIME)
    }
}
