//! The device between its threads: both queues, the conversation, and the thread that speaks with the screen.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use crate::frame_memory::FrameMemory;
use crate::state::Gpu;

/// How long a guest that asks what the screens want waits for a screen's own word; what was known before is told otherwise.
const ASK_MAX: Duration = Duration::from_millis(200);

/// How far the conversation with a screen is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Link {
    /// There is none.
    #[default]
    Down,
    /// It has not said yet what it wants.
    Greeting,
    /// It says by itself when it wants something else.
    Tells,
    /// It has to be asked.
    Asked,
}

/// A change of screens: a socket, or none.
#[derive(Debug)]
pub struct Handover(pub Option<OwnedFd>);

/// What is under the lock.
pub struct Desk {
    /// The device.
    pub gpu: Gpu,
    /// The conversation with the screen.
    pub link: Link,
    /// Questions that were asked of the screen what it wants, and those that are answered.
    pub asked: u64,
    /// The last of them that was answered.
    pub answered: u64,
    /// Another screen, which the thread has not seen.
    handover: Option<Handover>,
    /// The socket that the thread has, so that it can be ended under it.
    present: Option<OwnedFd>,
    /// The thread was woken and has not looked.
    woken: bool,
    /// When the thread looks by itself.
    pub alarm: Option<Instant>,
}

impl Desk {
    /// Another screen was handed over: what the present one says is of no interest any more.
    pub fn is_replaced(&self) -> bool {
        self.handover.is_some()
    }
}

/// The device, shared.
pub struct Shared {
    desk: Mutex<Desk>,
    heard: Condvar,
    wake: OwnedFd,
    /// Where screens that take frames by memory find them.
    pub frames: FrameMemory,
}

impl Shared {
    /// Shares a device.
    ///
    /// # Errors
    /// Without descriptors or memory.
    pub fn new(gpu: Gpu) -> io::Result<Self> {
        let desk = Desk {
            gpu,
            link: Link::Down,
            asked: 0,
            answered: 0,
            handover: None,
            present: None,
            woken: false,
            alarm: None,
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { desk: Mutex::new(desk), heard: Condvar::new(), wake, frames: FrameMemory::new()? })
    }

    /// Takes the lock.
    pub fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands another screen to the thread, or none; the conversation with the present one ends at once.
    pub fn hand_over(&self, socket: Option<OwnedFd>) {
        let mut desk = self.lock();
        if let Some(present) = desk.present.take() {
            let _ = rustix::net::shutdown(&present, rustix::net::Shutdown::Both);
        }
        desk.link = if socket.is_some() { Link::Greeting } else { Link::Down };
        desk.handover = Some(Handover(socket));
        self.wake(&mut desk);
        self.heard.notify_all();
    }

    /// For the thread: another screen, if there was a change. Its next wait is ended by what comes from now on.
    pub fn take_handover(&self) -> Option<Handover> {
        let mut desk = self.lock();
        if std::mem::take(&mut desk.woken) {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        let handover = desk.handover.take()?;
        desk.present = handover.0.as_ref().and_then(|socket| socket.try_clone().ok());
        Some(handover)
    }

    /// For the thread: the conversation has ended by itself.
    pub fn lost(&self) {
        let mut desk = self.lock();
        if desk.handover.is_none() {
            desk.present = None;
            desk.link = Link::Down;
        }
        self.heard.notify_all();
    }

    /// Wakes the thread if there is something that a screen can be told, before it wakes by itself.
    pub fn has_changed(&self, desk: &mut Desk) {
        if !matches!(desk.link, Link::Tells | Link::Asked) || desk.woken {
            return;
        }
        let due = desk.gpu.due(Instant::now());
        if due.is_some_and(|due| desk.alarm.is_none_or(|alarm| due < alarm)) {
            self.wake(desk);
        }
    }

    fn wake(&self, desk: &mut Desk) {
        if !std::mem::replace(&mut desk.woken, true) {
            // It fails only when nobody has read 2^64 - 2 of them.
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }

    /// What wakes the thread.
    pub fn waker(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Has the screen asked what it wants, if it does not tell by itself, and waits a moment for its answer.
    pub fn ask<'a>(&'a self, mut desk: MutexGuard<'a, Desk>) -> MutexGuard<'a, Desk> {
        let until = Instant::now() + ASK_MAX;
        let question = match desk.link {
            Link::Down | Link::Tells => return desk,
            // It is being asked anyway.
            Link::Greeting => desk.answered + 1,
            Link::Asked => {
                desk.asked += 1;
                self.wake(&mut desk);
                desk.asked
            }
        };
        while desk.answered < question && desk.link != Link::Down {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            desk = self.heard.wait_timeout(desk, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        desk
    }

    /// For the thread: all questions up to this one are answered.
    pub fn answered(&self, desk: &mut Desk, question: u64) {
        desk.answered = desk.answered.max(question);
        self.heard.notify_all();
    }
}
