//! The conversation's handle of a queue thread: commands go through a mailbox, and each returns when it is done.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::EventfdFlags;
use thiserror::Error;
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::device::QueueHandler;
use crate::inlet::Inlet;
use crate::inlet_thread::{self, InletThread};
use crate::limit::{Limiter, Toll};
use crate::queue_thread::{QueueThread, open};
use crate::ring::{RingConfig, RingError};
use crate::stats::Part;
use crate::uring::UringError;

/// What a queue has done so far, and whether its thread still goes round; the supervisor is told of it.
#[derive(Debug)]
pub struct QueuePulse {
    /// Requests taken.
    pub taken: AtomicU64,
    /// Requests completed.
    pub completed: AtomicU64,
    asked: AtomicU64,
    seen: AtomicU64,
    wake: OwnedFd,
}

impl QueuePulse {
    pub(crate) fn new(wake: OwnedFd) -> Self {
        let zero = || AtomicU64::new(0);
        Self { taken: zero(), completed: zero(), asked: zero(), seen: zero(), wake }
    }

    /// Wakes the thread and asks it to show that it goes round.
    pub fn ask(&self) {
        self.asked.fetch_add(1, Ordering::Release);
        wake(&self.wake);
    }

    /// True when the thread has gone round since it was asked last.
    pub fn beats(&self) -> bool {
        self.seen.load(Ordering::Acquire) == self.asked.load(Ordering::Acquire)
    }

    pub(crate) fn beat(&self) {
        let asked = self.asked.load(Ordering::Acquire);
        if self.seen.load(Ordering::Relaxed) != asked {
            self.seen.store(asked, Ordering::Release);
        }
    }
}

pub(crate) fn wake(eventfd: &OwnedFd) {
    // It fails only when the count is full, and then the thread is awake.
    let _ = rustix::io::write(eventfd, &1_u64.to_ne_bytes());
}

/// A queue thread is gone.
#[derive(Debug, Error)]
#[error("the thread of queue {0} has ended")]
pub struct WorkerGone(pub u16);

/// Everything that a ring needs to run.
#[derive(Debug)]
pub struct RingStart<M> {
    /// Guest memory.
    pub mem: Arc<M>,
    /// Addresses and indices.
    pub config: RingConfig,
    /// Wakes the queue.
    pub kick: OwnedFd,
    /// Interrupts the guest.
    pub call: Option<EventFd>,
    /// Tells the front end that the ring is broken.
    pub err: Option<OwnedFd>,
    /// Whether requests may be taken at once.
    pub enabled: bool,
}

pub(crate) enum Command<M> {
    Start(Box<RingStart<M>>, SyncSender<Result<(), RingError>>),
    Stop(SyncSender<Option<u16>>),
    Memory(Arc<M>, SyncSender<()>),
    Call(Option<EventFd>, SyncSender<()>),
    Enable(bool, SyncSender<()>),
    Quit,
}

pub(crate) struct Mailbox<M> {
    pub(crate) commands: Mutex<VecDeque<Command<M>>>,
    pub(crate) pending: AtomicBool,
    pub(crate) wake: OwnedFd,
}

impl<M> Mailbox<M> {
    pub(crate) fn send(&self, command: Command<M>) {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).push_back(command);
        self.pending.store(true, Ordering::Release);
        wake(&self.wake);
    }
}

/// A thread that owns a ring and does what the conversation wants.
pub(crate) trait RingOwner<M> {
    fn mailbox(&self) -> &Arc<Mailbox<M>>;
    fn start(&mut self, start: RingStart<M>) -> Result<Result<(), RingError>, UringError>;
    fn stop(&mut self) -> Result<Option<u16>, UringError>;
    fn set_memory(&mut self, mem: Arc<M>) -> Result<(), UringError>;
    fn set_call(&mut self, call: Option<EventFd>);
    fn set_enabled(&mut self, enabled: bool);
}

/// Does what the conversation wants; false when the thread shall end.
pub(crate) fn obey<M>(owner: &mut impl RingOwner<M>) -> Result<bool, UringError> {
    let mailbox = Arc::clone(owner.mailbox());
    // Take the eventfd's count, so that the level-triggered poll does not fire again by itself.
    let _ = rustix::io::read(&mailbox.wake, &mut [0_u8; 8]);
    loop {
        let command = mailbox.commands.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        match command {
            None => return Ok(true),
            Some(Command::Quit) => {
                owner.stop()?;
                return Ok(false);
            }
            Some(Command::Start(start, reply)) => {
                let started = owner.start(*start)?;
                let _ = reply.send(started);
            }
            Some(Command::Stop(reply)) => {
                let base = owner.stop()?;
                let _ = reply.send(base);
            }
            Some(Command::Memory(mem, reply)) => {
                owner.set_memory(mem)?;
                let _ = reply.send(());
            }
            Some(Command::Call(call, reply)) => {
                owner.set_call(call);
                let _ = reply.send(());
            }
            Some(Command::Enable(enabled, reply)) => {
                owner.set_enabled(enabled);
                let _ = reply.send(());
            }
        }
    }
}

/// What a queue thread does, and where it counts.
enum Role<M: GuestMemory> {
    /// It fills buffers with what comes from outside.
    Filled(Arc<Inlet<M>>),
    /// It carries out requests.
    Asked(Part, Toll),
}

/// The conversation's handle of one queue thread. Each call returns when the thread has done it.
pub struct Worker<M: GuestMemory> {
    index: u16,
    in_order: bool,
    mailbox: Arc<Mailbox<M>>,
    pulse: Arc<QueuePulse>,
    inlet: Option<Arc<Inlet<M>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Why a queue thread could not be started.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// No thread or eventfd.
    #[error("cannot start the thread of queue {index}: {reason}")]
    Thread {
        /// The queue.
        index: u16,
        /// What the kernel said.
        reason: String,
    },
    /// The page of figures is for a device of fewer queues.
    #[error("there is no room for the figures of queue {index} in a page for {have} queues")]
    NoFigures {
        /// The queue.
        index: u16,
        /// Queues of the page.
        have: u16,
    },
    /// No ring.
    #[error("queue {index}: {source}")]
    Uring {
        /// The queue.
        index: u16,
        /// What went wrong.
        #[source]
        source: UringError,
    },
}

impl<M: GuestMemory + Send + Sync + 'static> Worker<M> {
    /// Starts the thread and waits until its ring is restricted and enabled. `gate` keeps requests from being taken
    /// until it is opened (the predecessor's fence); what it does is counted in `figures` and
    /// limited by `limiter`.
    pub fn spawn<H: QueueHandler>(
        index: u16,
        handler: H,
        gate: Arc<Gate>,
        figures: Part,
        limiter: Option<Arc<Limiter>>,
    ) -> Result<Self, SpawnError> {
        let failed = |reason: String| SpawnError::Thread { index, reason };
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| failed(e.to_string()))?;
        let pulse = Arc::new(QueuePulse::new(wake.try_clone().map_err(|e| failed(e.to_string()))?));
        let mailbox = Arc::new(Mailbox { commands: Mutex::default(), pending: AtomicBool::new(false), wake });
        let in_order = handler.completes_in_order();
        let (ready, is_ready) = sync_channel(1);
        let (inbox, counts) = (Arc::clone(&mailbox), Arc::clone(&pulse));
        let role = if handler.is_inlet() {
            Role::Filled(Arc::new(Inlet::new(index, Arc::clone(&gate), Arc::clone(&pulse), figures)))
        } else {
            Role::Asked(figures, Toll::new(limiter))
        };
        let inlet = match &role {
            Role::Filled(inlet) => Some(Arc::clone(inlet)),
            Role::Asked(..) => None,
        };
        let thread = std::thread::Builder::new()
            .name(format!("queue{index}"))
            .stack_size(256 << 10)
            .spawn(move || {
                let opened = match &role {
                    Role::Filled(_) => inlet_thread::open(&inbox),
                    Role::Asked(..) => open(&handler, &inbox),
                };
                let uring = match opened {
                    Ok(uring) => uring,
                    Err(e) => {
                        let _ = ready.send(Err(e));
                        return;
                    }
                };
                let _ = ready.send(Ok(()));
                let ended = match role {
                    Role::Filled(inlet) => InletThread::new(index, uring, handler, inbox, inlet).run(),
                    Role::Asked(figures, toll) => {
                        QueueThread::new(index, uring, handler, inbox, counts, gate, (figures, toll)).run()
                    }
                };
                if let Err(e) = ended {
                    // Without its ring the thread can neither finish nor hand over what is in flight. The
                    // record in the in-flight region is what a successor needs.
                    tracing::error!(queue = index, error = %e, "the queue thread cannot go on");
                    std::process::exit(crate::EXIT_QUEUE_FAILED);
                }
            })
            .map_err(|e| failed(e.to_string()))?;
        match is_ready.recv() {
            Ok(Ok(())) => Ok(Self { index, in_order, mailbox, pulse, inlet, thread: Some(thread) }),
            Ok(Err(source)) => Err(SpawnError::Uring { index, source }),
            Err(_) => Err(failed("it ended at once".to_owned())),
        }
    }

    /// What the queue has done, and whether its thread goes round.
    pub fn pulse(&self) -> &Arc<QueuePulse> {
        &self.pulse
    }

    /// Its requests are finished in the order in which they are taken.
    pub fn in_order(&self) -> bool {
        self.in_order
    }

    /// The ring, if it is one that is filled from outside.
    pub fn inlet(&self) -> Option<&Arc<Inlet<M>>> {
        self.inlet.as_ref()
    }

    /// Wakes the thread, so that it looks at its gate again.
    pub fn wake(&self) {
        wake(&self.mailbox.wake);
    }

    fn ask<T>(&self, command: Command<M>, answer: &Receiver<T>) -> Result<T, WorkerGone> {
        self.mailbox.send(command);
        answer.recv().map_err(|_| WorkerGone(self.index))
    }

    /// Starts the ring.
    pub fn start(&self, start: RingStart<M>) -> Result<Result<(), RingError>, WorkerGone> {
        let (reply, answer) = sync_channel(1);
        self.ask(Command::Start(Box::new(start), reply), &answer)
    }

    /// Stops the ring once nothing is in flight; says where its next owner goes on, none when it did not run.
    pub fn stop(&self) -> Result<Option<u16>, WorkerGone> {
        let (reply, answer) = sync_channel(1);
        self.ask(Command::Stop(reply), &answer)
    }

    /// Exchanges guest memory, once nothing is in flight.
    pub fn set_memory(&self, mem: Arc<M>) -> Result<(), WorkerGone> {
        let (reply, answer) = sync_channel(1);
        self.ask(Command::Memory(mem, reply), &answer)
    }

    /// Exchanges the descriptor that interrupts the guest.
    pub fn set_call(&self, call: Option<EventFd>) -> Result<(), WorkerGone> {
        let (reply, answer) = sync_channel(1);
        self.ask(Command::Call(call, reply), &answer)
    }

    /// Lets requests be taken, or keeps them waiting.
    pub fn set_enabled(&self, enabled: bool) -> Result<(), WorkerGone> {
        let (reply, answer) = sync_channel(1);
        self.ask(Command::Enable(enabled, reply), &answer)
    }
}

impl<M: GuestMemory> Drop for Worker<M> {
    fn drop(&mut self) {
        self.mailbox.send(Command::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Keeps all queues from taking requests until the fence of a predecessor has fallen.
#[derive(Debug, Default)]
pub struct Gate {
    open: AtomicBool,
}

impl Gate {
    /// A gate that is open already.
    pub fn opened() -> Arc<Self> {
        Arc::new(Self { open: AtomicBool::new(true) })
    }

    /// Opens it; the queue threads must be woken.
    pub fn open(&self) {
        self.open.store(true, Ordering::Release);
    }

    /// True when requests may be taken.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }
}
