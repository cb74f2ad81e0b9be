//! The thread that is the parent of all device processes, and watches them.
//!
//! PDEATHSIG belongs to the thread that forked, so that thread must live as long as the VMM does: it is this one, it does
//! nothing else, and when the VMM dies, by whatever means, its children die. It waits on their pidfds, sidecars and
//! outputs in one poll. What it sees goes to the listener of each child ([`EventSink`]); a listener that has no room is
//! offered the event again, in order, and only progress reports are merged meanwhile.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::io::PipeReader;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_protocol::jail::{JailLayer, JailOutcome, JailedLayer};
use atoll_protocol::sidecar::{LogLevel, SidecarOrder};
use atoll_protocol::{DeviceId, FrameReader, FrameSocket, FrameWriter, Generation, SocketError};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};

use super::companion::{Companion, CompanionSpec, Escort};
use super::event::{BackendEvent, BackendExit, EventKind, EventSink, ExitCause, ExitStatus, Offer, SpawnError};
use super::launch::{Launched, launch};
use super::lines::{LastLines, read_lines};
use super::spec::{BackendSpec, JailPolicy};
use super::watch::{Watch, WatchAction};
use crate::actor::{Clock, Inbox, Moment, Outbox, RateLimit, Roll, mailbox};

/// A started device process. Letting go of it does not end the process: [`Child::stop`] and [`Child::kill`] do, and
/// [`Spawner::shutdown`], and the end of the VMM.
#[derive(Clone)]
pub struct Child {
    pid: u32,
    device: DeviceId,
    generation: Generation,
    pidfd: Arc<OwnedFd>,
    orders: Arc<Mutex<FrameWriter>>,
    /// A handle of a child keeps no spawner alive: its end is what ends the children.
    spawner: Weak<Inner>,
}

impl fmt::Debug for Child {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Child(pid {}, {}, {})", self.pid, self.device, self.generation)
    }
}

impl Child {
    /// Its process id. Only for people: the process may be gone, and the number somebody else's.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The process itself; readable once it has ended.
    #[must_use]
    pub fn pidfd(&self) -> &Arc<OwnedFd> {
        &self.pidfd
    }

    /// Which incarnation it is.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Says something on its sidecar. Does not wait.
    ///
    /// # Errors
    /// It is gone, or has not read its sidecar for long.
    pub fn order(&self, order: &SidecarOrder) -> Result<(), SocketError> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).send(order, &[], Duration::ZERO)
    }

    /// Kills it now. Its exit is reported as any other.
    pub fn kill(&self) {
        // An error means that it is gone.
        let _ = pidfd_send_signal(&*self.pidfd, Signal::KILL);
    }

    /// Asks it to end, and kills it if it has not by then. Does not wait; its exit is reported.
    pub fn stop(&self, grace: Duration) {
        let stop = Command::Stop { device: self.device, generation: self.generation, grace };
        let told = self.spawner.upgrade().is_some_and(|inner| inner.command(stop).is_ok());
        if !told {
            // The thread is gone or does not keep up.
            self.kill();
        }
    }
}

enum Command {
    Spawn { spec: Box<BackendSpec>, sink: Box<dyn EventSink>, reply: SyncSender<Result<Born, SpawnError>> },
    Escort { spec: Box<CompanionSpec>, reply: SyncSender<Result<Companion, SpawnError>> },
    Stop { device: DeviceId, generation: Generation, grace: Duration },
    Shutdown { grace: Duration },
}

struct Born {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    orders: Arc<Mutex<FrameWriter>>,
}

struct Inner {
    commands: Outbox<Command>,
    roll: Roll,
    jail: Arc<Mutex<JailPolicy>>,
    wake: Arc<OwnedFd>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Starts device processes. Clones share one thread; the last one to go kills what is left.
#[derive(Clone)]
pub struct Spawner(Arc<Inner>);

impl fmt::Debug for Spawner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Spawner")
    }
}

impl Spawner {
    /// Starts the thread.
    ///
    /// # Errors
    /// The kernel has no thread or descriptor left.
    pub fn new(clock: Arc<dyn Clock>) -> std::io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let roll = Roll::default();
        let (commands, orders) = mailbox(&roll, "spawner".into(), 1, 64);
        let jail = Arc::<Mutex<JailPolicy>>::default();
        let nursery = Nursery {
            clock,
            jail: Arc::clone(&jail),
            warned: Arc::default(),
            wake: Arc::clone(&wake),
            commands: orders,
            children: Vec::new(),
            escorts: Vec::new(),
            ending: None,
        };
        let thread = std::thread::Builder::new().name("spawner".into()).spawn(move || nursery.run())?;
        Ok(Self(Arc::new(Inner { commands, roll, jail, wake, thread: Mutex::new(Some(thread)) })))
    }

    /// Who has to do with device processes and has a mailbox.
    #[must_use]
    pub fn roll(&self) -> &Roll {
        &self.0.roll
    }

    /// How device processes that are started from now on are jailed.
    pub fn jail(&self, policy: JailPolicy) {
        *self.0.jail.lock().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    /// Starts a process; its events go to `sink`, from `Ready` to `Exited`, which always comes. Waits for fork and exec:
    /// some milliseconds.
    ///
    /// # Errors
    /// All of [`SpawnError`]; then there is no process, and no event comes.
    pub fn spawn(&self, spec: BackendSpec, sink: impl EventSink + 'static) -> Result<Child, SpawnError> {
        let (name, device, generation) = (spec.name.clone(), spec.device, spec.generation);
        let (reply, born) = sync_channel(1);
        let command = Command::Spawn { spec: Box::new(spec), sink: Box::new(sink), reply };
        let ending = |()| SpawnError::Ending { name };
        self.0.command(command).map_err(ending.clone())?;
        // The thread answers each command, and dropping one is an answer too.
        let Born { pid, pidfd, orders } = born.recv().map_err(|_| ending(()))??;
        Ok(Child { pid, device, generation, pidfd, orders, spawner: Arc::downgrade(&self.0) })
    }

    /// Starts a program of somebody else's. Waits for fork and exec.
    ///
    /// # Errors
    /// All of [`SpawnError`]; then there is no process.
    pub fn companion(&self, spec: CompanionSpec) -> Result<Companion, SpawnError> {
        let name = spec.name.clone();
        let (reply, born) = sync_channel(1);
        let ending = |()| SpawnError::Ending { name };
        self.0.command(Command::Escort { spec: Box::new(spec), reply }).map_err(ending.clone())?;
        // The thread answers each command, and dropping one is an answer too.
        born.recv().map_err(|_| ending(()))?
    }

    /// Asks all children to end, kills those that have not within `grace`, and waits until all are reaped. Later spawns
    /// are refused.
    pub fn shutdown(&self, grace: Duration) {
        let _ = self.0.command(Command::Shutdown { grace });
        let thread = self.0.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl Inner {
    fn command(&self, command: Command) -> Result<(), ()> {
        let sent = self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) | TrySendError::Disconnected(_) => (),
        });
        wake(&self.wake);
        sent
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = self.commands.try_send(Command::Shutdown { grace: Duration::ZERO });
            wake(&self.wake);
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

fn wake(eventfd: &OwnedFd) {
    // Fails only when it is full, and then the thread is awake.
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

/// One child, on the thread.
struct Ward {
    name: String,
    device: DeviceId,
    generation: Generation,
    process: std::process::Child,
    pidfd: Arc<OwnedFd>,
    /// None once it hung up.
    sidecar: Option<FrameReader>,
    orders: Arc<Mutex<FrameWriter>>,
    output: Option<PipeReader>,
    lines: LastLines,
    log_limit: RateLimit,
    watch: Watch,
    /// Missing layers of jails that were told of, of any child.
    warned: Arc<Mutex<BTreeSet<JailLayer>>>,
    /// Why it is being ended, if it is.
    cause: Option<ExitCause>,
    kill_at: Option<Moment>,
    sink: Box<dyn EventSink>,
    outbox: VecDeque<EventKind>,
    gone: bool,
}

/// The thread's state.
struct Nursery {
    clock: Arc<dyn Clock>,
    jail: Arc<Mutex<JailPolicy>>,
    warned: Arc<Mutex<BTreeSet<JailLayer>>>,
    wake: Arc<OwnedFd>,
    commands: Inbox<Command>,
    children: Vec<Ward>,
    escorts: Vec<Escort>,
    /// All must be gone by then.
    ending: Option<Moment>,
}

/// How long after its last word, or its hang-up, a child may take to end.
const LEAVE_GRACE: Duration = Duration::from_secs(2);
/// A VMM that wakes this much too late was not running itself.
const OVERSLEPT: Duration = Duration::from_millis(200);
/// Between two offers of an event to a listener without room.
const OFFER_AGAIN: Duration = Duration::from_millis(5);

impl Nursery {
    fn run(mut self) {
        let mut expected = None;
        loop {
            let now = self.clock.now();
            let late: Option<Duration> = expected.map(|expected: Instant| expected.elapsed());
            if let Some(late) = late.filter(|late| *late > OVERSLEPT) {
                for child in &mut self.children {
                    child.watch.postpone(late);
                }
            }
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command, now);
            }
            for child in &mut self.children {
                child.attend(now);
            }
            self.escorts.iter_mut().for_each(Escort::attend);
            self.escorts.retain(|escort| !escort.is_gone());
            self.children.retain(|child| !(child.gone && child.outbox.is_empty()));
            // Nobody may listen any more while the VMM ends.
            if self.ending.is_some() && self.children.iter().all(|child| child.gone) && self.escorts.is_empty() {
                return;
            }
            expected = self.wait();
        }
    }

    fn obey(&mut self, command: Command, now: Moment) {
        match command {
            Command::Spawn { spec, sink, reply } => {
                let born = if self.ending.is_some() {
                    Err(SpawnError::Ending { name: spec.name })
                } else {
                    self.bear(*spec, sink, now)
                };
                // Whoever asked waits, or has given up; then the child is reported to the sink all the same.
                let _ = reply.try_send(born);
            }
            Command::Escort { spec, reply } => {
                let born = if self.ending.is_some() {
                    Err(SpawnError::Ending { name: spec.name })
                } else {
                    let limit = RateLimit::new(Arc::clone(&self.clock), 100, Duration::from_millis(100));
                    Escort::bear(*spec, limit).map(|(escort, companion)| {
                        self.escorts.push(escort);
                        companion
                    })
                };
                // One that nobody takes is killed by being dropped.
                let _ = reply.try_send(born);
            }
            Command::Stop { device, generation, grace } => {
                let wanted = |child: &&mut Ward| child.device == device && child.generation == generation;
                for child in self.children.iter_mut().filter(wanted) {
                    child.ask_to_end(now.after(grace));
                }
            }
            Command::Shutdown { grace } => {
                self.ending = Some(now.after(grace));
                self.escorts.iter().for_each(Escort::kill);
                for child in &mut self.children {
                    child.ask_to_end(now.after(grace));
                }
            }
        }
    }

    fn bear(&mut self, spec: BackendSpec, sink: Box<dyn EventSink>, now: Moment) -> Result<Born, SpawnError> {
        let (name, device, generation) = (spec.name.clone(), spec.device, spec.generation);
        let policy = *self.jail.lock().unwrap_or_else(PoisonError::into_inner);
        let watch = Watch::new(spec.class, generation, spec.limits, now).jailed(policy).beside(spec.beside);
        let Launched { process, pidfd, sidecar, output } = launch(spec, policy)?;
        let pid = process.id();
        tracing::info!(name, %device, generation = generation.0, pid, "device process started");
        let (reader, writer) = FrameSocket::new(sidecar).split();
        let (pidfd, orders) = (Arc::new(pidfd), Arc::new(Mutex::new(writer)));
        self.children.push(Ward {
            name,
            device,
            generation,
            process,
            pidfd: Arc::clone(&pidfd),
            sidecar: Some(reader),
            orders: Arc::clone(&orders),
            output: Some(output),
            lines: LastLines::default(),
            log_limit: RateLimit::new(Arc::clone(&self.clock), 100, Duration::from_millis(100)),
            watch,
            warned: Arc::clone(&self.warned),
            cause: None,
            kill_at: None,
            sink,
            outbox: VecDeque::new(),
            gone: false,
        });
        Ok(Born { pid, pidfd, orders })
    }

    /// Waits for anything; until when, in real time, it meant to wait at most.
    fn wait(&self) -> Option<Instant> {
        let now = self.clock.now();
        let mut until: Option<Moment> = None;
        let mut fds = vec![PollFd::new(&*self.wake, PollFlags::IN)];
        for child in &self.children {
            let again = (!child.outbox.is_empty()).then(|| now.after(OFFER_AGAIN));
            let deadlines = [child.watch.next_deadline(), child.kill_at, again];
            until = deadlines.into_iter().flatten().chain(until).min();
            if child.gone {
                continue;
            }
            fds.push(PollFd::new(&*child.pidfd, PollFlags::IN));
            fds.extend(child.sidecar.as_ref().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
            fds.extend(child.output.as_ref().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
        }
        let wakes = self.escorts.iter().flat_map(Escort::wakes);
        fds.extend(wakes.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let nap = until.map(|until| self.clock.nap(until));
        let expected = nap.and_then(|nap| Instant::now().checked_add(nap));
        let timeout = nap.map(|nap| Timespec::try_from(nap).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                // Out of kernel memory: wait a little instead of spinning.
                tracing::error!(%errno, "poll failed");
                std::thread::sleep(OFFER_AGAIN);
            }
        }
        let _ = rustix::io::read(&*self.wake, &mut [0u8; 8]);
        expected
    }
}

impl Ward {
    /// Looks at everything of one child: first what it said, then whether it is late, last whether it is gone.
    fn attend(&mut self, now: Moment) {
        if !self.gone {
            // Asked first, so that what a dead child had said before is heard below.
            let ended = self.process.try_wait().ok().flatten();
            read_lines(&mut self.output, &mut self.lines, &mut self.log_limit, &self.name);
            self.listen(now, if ended.is_some() { usize::MAX } else { 64 });
            if let Some(status) = ended {
                self.bury(status);
            } else {
                for action in self.watch.check(now) {
                    self.act(action);
                }
                if self.kill_at.is_some_and(|at| at <= now) {
                    self.kill_at = None;
                    self.kill();
                }
            }
        }
        self.deliver();
    }

    fn listen(&mut self, now: Moment, frames_max: usize) {
        for _ in 0..frames_max {
            let Some(sidecar) = &mut self.sidecar else { return };
            match sidecar.receive_message(Some(Duration::ZERO)) {
                Ok(report) => {
                    for action in self.watch.hear(report, now) {
                        self.act(action);
                    }
                    if self.watch.goodbye().is_some() && self.kill_at.is_none() {
                        self.kill_at = Some(now.after(LEAVE_GRACE));
                    }
                }
                Err(SocketError::Timeout(_)) => return,
                Err(error) if error.is_hang_up() => {
                    self.sidecar = None;
                    // A dying process closes its sidecar a moment before it can be reaped.
                    self.watch.leaving();
                    self.kill_at.get_or_insert(now.after(LEAVE_GRACE));
                    return;
                }
                Err(error) => {
                    self.sidecar = None;
                    self.end_because(ExitCause::Wrong(error.to_string()));
                    return;
                }
            }
        }
    }

    fn act(&mut self, action: WatchAction) {
        match action {
            WatchAction::Event(event) => {
                if let EventKind::Ready { jail, .. } = &event {
                    self.warn_of(jail);
                }
                self.post(event);
            }
            WatchAction::Order(order) => self.order(&order),
            WatchAction::Kill(cause) => self.end_because(cause),
            WatchAction::Log(level, text) => {
                let Some(suppressed) = self.log_limit.admit() else { return };
                let name = &self.name;
                match level {
                    LogLevel::Error => tracing::error!(name, suppressed, "{text}"),
                    LogLevel::Warn => tracing::warn!(name, suppressed, "{text}"),
                    LogLevel::Info => tracing::info!(name, suppressed, "{text}"),
                    LogLevel::Debug => tracing::debug!(name, suppressed, "{text}"),
                    LogLevel::Trace => tracing::trace!(name, suppressed, "{text}"),
                }
            }
        }
    }

    /// Says what the jails on this host lack, each layer once: it is the same for all device processes.
    fn warn_of(&self, jail: &[JailedLayer]) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        for missing in jail.iter().filter(|layer| !layer.stands()) {
            if warned.insert(missing.layer) && missing.outcome != JailOutcome::Off {
                tracing::warn!("device processes are jailed without {missing}: {}", missing.remedy());
            }
        }
        let off = !jail.is_empty() && jail.iter().all(|layer| layer.outcome == JailOutcome::Off);
        if off && warned.insert(JailLayer::NoNewPrivileges) {
            tracing::warn!("device processes are not jailed: {}", JailLayer::Calls.remedy(JailOutcome::Off));
        }
    }

    fn order(&mut self, order: &SidecarOrder) {
        let sent = self.orders.lock().unwrap_or_else(PoisonError::into_inner).send(order, &[], Duration::ZERO);
        // One that cannot be told anything is found out by its hang-up or its deadline.
        if let Err(error) = sent {
            tracing::debug!(name = self.name, %error, "an order was not delivered");
        }
    }

    fn ask_to_end(&mut self, by: Moment) {
        self.order(&SidecarOrder::Exit);
        self.watch.leaving();
        self.cause.get_or_insert(ExitCause::Asked);
        self.kill_at = Some(self.kill_at.map_or(by, |at| at.min(by)));
    }

    fn end_because(&mut self, cause: ExitCause) {
        self.cause.get_or_insert(cause);
        self.watch.leaving();
        self.kill();
    }

    fn kill(&mut self) {
        if self.sidecar.is_none() && self.cause.is_none() && self.watch.goodbye().is_none() {
            self.cause = Some(ExitCause::HungUp);
        }
        // An error means that it is gone.
        let _ = pidfd_send_signal(&*self.pidfd, Signal::KILL);
    }

    fn bury(&mut self, status: std::process::ExitStatus) {
        self.gone = true;
        let (name, limit) = (&self.name, &mut self.log_limit);
        let last_stderr = self.lines.finish(|line| {
            if limit.admit().is_some() {
                tracing::info!(name, "output: {line}");
            }
        });
        let cause = match (self.cause.take(), self.watch.goodbye()) {
            (None | Some(ExitCause::Asked), Some(reason))
                if *reason != atoll_protocol::sidecar::GoodbyeReason::Asked =>
            {
                ExitCause::Goodbye(reason.clone())
            }
            (Some(cause), _) => cause,
            (None, Some(reason)) => ExitCause::Goodbye(reason.clone()),
            (None, None) => ExitCause::Unknown,
        };
        let status = match status.signal() {
            Some(signal) => ExitStatus::Signal(signal),
            None => ExitStatus::Code(status.code().unwrap_or(-1)),
        };
        let was_ready = self.watch.was_ready();
        let exit = BackendExit { name: self.name.clone(), cause, status, was_ready, last_stderr };
        tracing::info!(device = %self.device, generation = self.generation.0, "{exit}");
        self.post(EventKind::Exited(exit));
        self.sidecar = None;
        self.output = None;
    }

    /// Bounded: newer progress replaces older, a stall is told once per queue, and the rest happens once.
    fn post(&mut self, event: EventKind) {
        if let (EventKind::Progress { .. }, Some(last @ EventKind::Progress { .. })) = (&event, self.outbox.back_mut())
        {
            *last = event;
            return;
        }
        const OUTBOX_MAX: usize = 4096;
        if self.outbox.len() < OUTBOX_MAX || matches!(event, EventKind::Exited(_)) {
            self.outbox.push_back(event);
        }
    }

    fn deliver(&mut self) {
        while let Some(kind) = self.outbox.pop_front() {
            match self.sink.offer(BackendEvent { device: self.device, generation: self.generation, kind }) {
                Offer::Taken => {}
                Offer::Full(event) => {
                    self.outbox.push_front(event.kind);
                    return;
                }
                Offer::Gone => self.outbox.clear(),
            }
        }
    }
}
