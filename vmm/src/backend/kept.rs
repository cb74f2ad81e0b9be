//! A process that the VMM starts and keeps alive, whatever it serves.
//!
//! The supervisor decides ([`Recovery`]); a thread of this process' own carries out: starts an incarnation, waits until
//! it is ready, and has it [attached](Attachment) to what it serves. A stalled incarnation is killed, which makes its
//! successor. In quarantine there is none any more.

use std::error::Error as StdError;
use std::ffi::OsString;
use std::fmt;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_protocol::sidecar::DeviceClass;
use atoll_protocol::{DeviceId, Generation, QueueIndex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;

use super::event::{BackendEvent, BackendExit, EventKind, EventSink, Offer, SpawnError};
use super::household::{Generations, Household};
use super::policy::{PolicyConfig, QuarantineReason};
use super::spawner::{Child, Spawner};
use super::spec::{BackendSpec, PassedFd, WatchLimits};
use super::standing::Standing;
use super::supervisor::{Recovery, SupervisorMail};
use crate::actor::{Address, Inbox, Outbox, TellError, mailbox};
use crate::config::DeviceKind;
use crate::lifecycle::{DeviceReport, DeviceState, Story};
use crate::seccomp::{self, ThreadClass};

/// How long an incarnation may take to be attached once it is ready.
pub(crate) const ATTACH_MAX: Duration = Duration::from_secs(5);

/// What an incarnation is joined with.
pub(crate) trait Attachment: Send + Sync {
    /// What the next incarnation inherits; the other ends are kept for [`Self::attach`].
    ///
    /// # Errors
    /// No descriptor is left.
    fn descriptors(&self) -> std::io::Result<Vec<PassedFd>>;
    /// The incarnation that has inherited them is ready.
    ///
    /// # Errors
    /// It is not what is needed.
    fn attach(&self, generation: Generation) -> Result<(), Box<dyn StdError + Send + Sync>>;
    /// It is gone.
    fn detach(&self);
    /// There will be no other.
    fn give_up(&self);
    /// A number that grows with what all incarnations have done.
    fn done(&self) -> u64;
}

/// How to start each incarnation.
pub(crate) struct KeptProcess {
    /// Name of the device, for errors and logs.
    pub(crate) name: String,
    /// The device.
    pub(crate) device: DeviceId,
    /// What kind of device people know it as.
    pub(crate) kind: DeviceKind,
    /// What the process must say that it serves.
    pub(crate) class: DeviceClass,
    /// Its binary.
    pub(crate) exe: PathBuf,
    /// Its arguments, without those of descriptors.
    pub(crate) args: Vec<OsString>,
    /// Deadlines of a start.
    pub(crate) limits: WatchLimits,
    /// When to give it up.
    pub(crate) policy: PolicyConfig,
    /// Where its lives are told.
    pub(crate) story: Option<Story>,
}

/// Why it does not serve.
#[derive(Debug, Error)]
pub enum KeptError {
    /// No process.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It ended before it served.
    #[error("{0}")]
    Exit(BackendExit),
    /// It is not what is needed.
    #[error("{name} does not serve: {source}")]
    Attach {
        /// Name of the device.
        name: String,
        /// What is wrong with it.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// No descriptors or threads left.
    #[error("{name} cannot be started: {source}")]
    Host {
        /// Name of the device.
        name: String,
        /// The kernel's error.
        #[source]
        source: std::io::Error,
    },
}

/// Why there is nothing to revive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum NotRevived {
    /// It serves.
    #[error("it is well: a process serves it")]
    Well,
    /// The supervisor's mailbox is full.
    #[error("the supervisor has much to do: ask again")]
    Busy,
}

enum Order {
    Start(Generation),
    Kill(Generation),
    Stop(Instant),
}

/// A process that is kept alive. Dropping it ends the process at once.
pub(crate) struct Kept {
    name: String,
    kind: DeviceKind,
    standing: Arc<Standing>,
    device: DeviceId,
    supervisor: Address<SupervisorMail>,
    orders: Outbox<Order>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kept({})", self.device)
    }
}

impl Kept {
    /// Starts the first incarnation and waits until it serves.
    ///
    /// # Errors
    /// All of [`KeptError`]; no process is left then.
    pub(crate) fn start(
        process: KeptProcess,
        attachment: Arc<dyn Attachment>,
        household: &Household,
    ) -> Result<Self, KeptError> {
        let (device, config, kind) = (process.device, process.policy, process.kind);
        let supervisor = household.supervisor().clone();
        let roll = household.spawner().roll();
        let (orders, taken) = mailbox(roll, format!("keeper{}", device.0), 1, 16);
        let standing = Arc::new(Standing::new(process.name.clone(), process.story.clone()));
        let (attached, told) = (Arc::clone(&attachment), Arc::clone(&standing));
        let recovery = HandOn { attachment: attached, standing: told, done: 0, orders: orders.clone() };
        let generation = household.generations().first(device);
        let adopt = SupervisorMail::Adopt { device, generation, config, recovery: Box::new(recovery) };
        let _ = household.runtime().block_on(supervisor.tell(adopt));
        let name = process.name.clone();
        let mut keeper = Keeper {
            process,
            standing: Arc::clone(&standing),
            attachment,
            spawner: household.spawner().clone(),
            supervisor: supervisor.clone(),
            generations: household.generations().clone(),
            child: None,
        };
        let release = || {
            let _ = household.runtime().block_on(supervisor.tell(SupervisorMail::Release(device)));
        };
        if let Err(error) = keeper.incarnate(generation) {
            release();
            keeper.end(Instant::now());
            return Err(error);
        }
        let thread = std::thread::Builder::new().name(format!("keeper{}", device.0)).spawn(move || {
            seccomp::enter(ThreadClass::Device);
            keeper.run(&taken);
        });
        match thread {
            Ok(thread) => Ok(Self { name, kind, standing, device, supervisor, orders, thread: Some(thread) }),
            Err(source) => {
                release();
                Err(KeptError::Host { name, source })
            }
        }
    }

    /// What an operator is told of it.
    pub(crate) fn report(&self) -> DeviceReport {
        self.standing.report(&self.name, self.kind)
    }

    /// Starts one that was given up afresh, or one that waits for its next start at once.
    ///
    /// # Errors
    /// It serves, or nobody hears.
    pub(crate) fn revive(&self) -> Result<(), NotRevived> {
        if self.report().state == DeviceState::Running {
            return Err(NotRevived::Well);
        }
        self.supervisor.try_tell(SupervisorMail::Revive(self.device)).map_err(|_| NotRevived::Busy)
    }

    /// Asks the process to end, kills it at `deadline`, and waits for its end.
    pub(crate) fn stop(&mut self, deadline: Instant) {
        // First, so that the end is not taken for a crash. A full mailbox belongs to an actor that has nothing to start.
        let _ = self.supervisor.try_tell(SupervisorMail::Release(self.device));
        let _ = self.orders.send(Order::Stop(deadline));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop(Instant::now());
        }
    }
}

/// The supervisor's hand: notes and returns.
struct HandOn {
    attachment: Arc<dyn Attachment>,
    standing: Arc<Standing>,
    /// What all incarnations up to the last one have done.
    done: u64,
    orders: Outbox<Order>,
}

impl Recovery for HandOn {
    fn start(&mut self, generation: Generation) {
        // There is at most one start at a time, and a kill or two before it: room is there.
        let _ = self.orders.try_send(Order::Start(generation));
    }
    fn lost(&mut self, _generation: Generation, _exit: &BackendExit) -> bool {
        self.attachment.detach();
        let done = self.attachment.done();
        std::mem::replace(&mut self.done, done) < done
    }
    fn quarantine(&mut self, reason: &QuarantineReason) {
        self.standing.given_up(reason.to_string());
        self.attachment.give_up();
    }
    fn stalled(&mut self, generation: Generation, _queue: Option<QueueIndex>) {
        // Every access may stall at once; one kill is enough.
        let _ = self.orders.try_send(Order::Kill(generation));
    }
}

/// Tells the device's thread how a start went, and the supervisor everything.
struct Ears {
    standing: Arc<Standing>,
    supervisor: Address<SupervisorMail>,
    start: Mutex<Option<SyncSender<Result<(), BackendExit>>>>,
}

impl EventSink for Ears {
    fn offer(&self, event: BackendEvent) -> Offer {
        let kind = event.kind.clone();
        let outcome = match &kind {
            EventKind::Ready { .. } => Some(Ok(())),
            EventKind::Exited(exit) => Some(Err(exit.clone())),
            _ => None,
        };
        if let Err(TellError::Full { message: SupervisorMail::Backend(event), .. }) =
            self.supervisor.try_tell(SupervisorMail::Backend(event))
        {
            return Offer::Full(event);
        }
        // Once only: an event that finds no room is offered again.
        match &kind {
            EventKind::Ready { jail, .. } => self.standing.ready(jail),
            EventKind::Exited(exit) => self.standing.exited(exit),
            _ => {}
        }
        if let Some(outcome) = outcome
            && let Some(start) = self.start.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            let _ = start.try_send(outcome);
        }
        Offer::Taken
    }
}

/// The device's thread.
struct Keeper {
    process: KeptProcess,
    standing: Arc<Standing>,
    attachment: Arc<dyn Attachment>,
    spawner: Spawner,
    supervisor: Address<SupervisorMail>,
    generations: Generations,
    child: Option<Child>,
}

impl Keeper {
    fn run(mut self, orders: &Inbox<Order>) {
        loop {
            match orders.recv() {
                Ok(Order::Start(generation)) => {
                    if let Err(error) = self.incarnate(generation) {
                        let name = &self.process.name;
                        tracing::warn!(name, %generation, %error, "a successor did not start");
                        // An exit has been reported as one; nothing else makes the supervisor try again.
                        if !matches!(error, KeptError::Exit(_)) && self.child.is_none() {
                            let device = self.process.device;
                            let _ = self.supervisor.try_tell(SupervisorMail::NotStarted { device, generation });
                        }
                    }
                }
                Ok(Order::Kill(generation)) => {
                    if let Some(child) = self.child.as_ref().filter(|child| child.generation() == generation) {
                        child.kill();
                    }
                }
                Ok(Order::Stop(deadline)) => return self.end(deadline),
                Err(_) => return self.end(Instant::now()),
            }
        }
    }

    fn incarnate(&mut self, generation: Generation) -> Result<(), KeptError> {
        self.child = None;
        self.generations.used(self.process.device, generation);
        let name = self.process.name.clone();
        let host = |source| KeptError::Host { name: name.clone(), source };
        let fds = self.attachment.descriptors().map_err(host)?;
        let spec = BackendSpec {
            name: name.clone(),
            device: self.process.device,
            generation,
            class: self.process.class,
            exe: self.process.exe.clone(),
            args: self.process.args.clone(),
            env: Vec::new(),
            fds,
            beside: false,
            limits: self.process.limits,
        };
        let (start, started) = sync_channel(1);
        let (standing, supervisor) = (Arc::clone(&self.standing), self.supervisor.clone());
        let child = self.spawner.spawn(spec, Ears { standing, supervisor, start: Mutex::new(Some(start)) })?;
        self.standing.started(generation, child.pid());
        self.child = Some(child.clone());
        // The spawner's own deadlines end this wait; ours is for a spawner that does not keep up.
        let wait = self.process.limits.ready.saturating_mul(2).saturating_add(ATTACH_MAX);
        match started.recv_timeout(wait) {
            Ok(Ok(())) => {}
            Ok(Err(exit)) => return Err(KeptError::Exit(exit)),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                child.kill();
                return Err(host(std::io::ErrorKind::TimedOut.into()));
            }
        }
        if let Err(source) = self.attachment.attach(generation) {
            // Its exit is reported, and judged, as that of any other.
            child.kill();
            return Err(KeptError::Attach { name, source });
        }
        Ok(())
    }

    fn end(&mut self, deadline: Instant) {
        let Some(child) = self.child.take() else { return };
        let left = deadline.saturating_duration_since(Instant::now());
        child.stop(left);
        // A kill takes a moment too.
        let wait = Timespec::try_from(left + Duration::from_secs(2)).unwrap_or(Timespec { tv_sec: 10, tv_nsec: 0 });
        let _ = poll(&mut [PollFd::from_borrowed_fd(child.pidfd().as_fd(), PollFlags::IN)], Some(&wait));
        self.attachment.detach();
    }
}
