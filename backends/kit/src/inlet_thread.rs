//! The thread of a queue that is filled from outside, see [`inlet`](crate::inlet).
//!
//! It obeys the conversation like any queue thread, and asks its handler what to wait for next: for the descriptor that
//! data comes from, for buffers of the guest, for a moment, or for nothing, when others fill the ring. It never waits
//! for data and buffers at once: data that has no buffers stays where it is, and buffers that have no data need no kick.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use io_uring::opcode;
use io_uring::types::Timespec;
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::device::{QueueHandler, Wait};
use crate::inlet::Inlet;
use crate::ring::RingError;
use crate::uring::{Completion, Uring, UringError};
use crate::worker::{Mailbox, QueuePulse, RingOwner, RingStart, obey};

const TAG_SHIFT: u32 = 56;
const TAG_KICK: u64 = 1;
const TAG_MAILBOX: u64 = 2;
const TAG_SOURCE: u64 = 3;
const TAG_TIME: u64 = 4;
const TAG_REMOVED: u64 = 5;

pub(crate) struct InletThread<H, M: GuestMemory> {
    index: u16,
    uring: Uring,
    handler: H,
    /// The front end has disabled the ring.
    disabled: bool,
    mailbox: Arc<Mailbox<M>>,
    pulse: Arc<QueuePulse>,
    inlet: Arc<Inlet<M>>,
    kick: Option<OwnedFd>,
    kick_epoch: u64,
    /// The descriptor that data comes from is being polled.
    source_watched: bool,
    /// A timeout is under way.
    timed: bool,
    /// The timeout's argument, read by the kernel when it is submitted.
    time: Box<Timespec>,
    completions: Vec<Completion>,
}

/// A ring for the thread, which hears of `mailbox`. To be called by the thread that will drive it.
pub(crate) fn open<M>(mailbox: &Mailbox<M>) -> Result<Uring, UringError> {
    let mut uring = Uring::with_room(32, 128, &[opcode::Timeout::CODE])?;
    uring.watch(mailbox.wake.as_fd(), TAG_MAILBOX << TAG_SHIFT)?;
    Ok(uring)
}

impl<H: QueueHandler, M: GuestMemory> InletThread<H, M> {
    pub(crate) fn new(index: u16, uring: Uring, handler: H, mailbox: Arc<Mailbox<M>>, inlet: Arc<Inlet<M>>) -> Self {
        Self {
            index,
            uring,
            handler,
            disabled: false,
            mailbox,
            pulse: Arc::clone(inlet.pulse()),
            inlet,
            kick: None,
            kick_epoch: 0,
            source_watched: false,
            timed: false,
            time: Box::new(Timespec::new()),
            completions: Vec::with_capacity(128),
        }
    }

    pub(crate) fn run(&mut self) -> Result<(), UringError> {
        loop {
            if self.mailbox.pending.swap(false, Ordering::AcqRel) && !obey(self)? {
                return Ok(());
            }
            self.reap()?;
            // A command whose wake-up has been reaped already has nothing else that would end the sleep.
            if !self.fill()? && !self.mailbox.pending.load(Ordering::Acquire) {
                self.uring.submit_and_wait()?;
            }
        }
    }

    fn reap(&mut self) -> Result<(), UringError> {
        self.pulse.beat();
        let mut completions = std::mem::take(&mut self.completions);
        self.uring.reap(&mut completions);
        for completion in &completions {
            let value = completion.user_data & ((1 << TAG_SHIFT) - 1);
            match completion.user_data >> TAG_SHIFT {
                TAG_KICK if !completion.more && value == self.kick_epoch => self.rewatch_kick(completion.result)?,
                TAG_MAILBOX if !completion.more => {
                    self.uring.watch(self.mailbox.wake.as_fd(), TAG_MAILBOX << TAG_SHIFT)?;
                }
                TAG_SOURCE => self.source_watched = false,
                TAG_TIME => self.timed = false,
                _ => {}
            }
        }
        completions.clear();
        self.completions = completions;
        Ok(())
    }

    /// Lets the handler work and prepares what it waits for; true when it wants to go on at once.
    fn fill(&mut self) -> Result<bool, UringError> {
        let Some(wait) = self.inlet.fill(|buffers| self.handler.fill(buffers)) else { return Ok(false) };
        match wait {
            Wait::Again => return Ok(true),
            Wait::Nothing | Wait::Buffers => {}
            Wait::Source => {
                if let Some(source) = self.handler.source()
                    && !self.source_watched
                {
                    self.uring.watch_once(source, libc::POLLIN, TAG_SOURCE << TAG_SHIFT)?;
                    self.source_watched = true;
                }
            }
            Wait::Until(moment) => self.wake_at(moment)?,
        }
        Ok(false)
    }

    #[allow(unsafe_code, reason = "a timeout's entry points to its time")]
    fn wake_at(&mut self, moment: Instant) -> Result<(), UringError> {
        if self.timed {
            return Ok(());
        }
        let left = moment.saturating_duration_since(Instant::now());
        *self.time = Timespec::from(left);
        let entry = opcode::Timeout::new(&raw const *self.time).build().user_data(TAG_TIME << TAG_SHIFT);
        self.timed = true;
        // SAFETY: the time lies in a box of this thread and is changed only when no timeout is under way.
        unsafe { self.uring.push(&entry) }
    }

    /// The poll has ended: begin another one, unless the descriptor can never be waited for.
    fn rewatch_kick(&mut self, result: i32) -> Result<(), UringError> {
        let gone = i32::from(libc::POLLERR | libc::POLLHUP | libc::POLLNVAL);
        if result < 0 || result & gone != 0 {
            let reason = "its kick descriptor is no eventfd".to_owned();
            self.inlet.break_off(RingError::Broken { index: self.index, reason });
            return Ok(());
        }
        self.watch_kick()
    }

    fn watch_kick(&mut self) -> Result<(), UringError> {
        match &self.kick {
            Some(kick) => self.uring.watch(kick.as_fd(), TAG_KICK << TAG_SHIFT | self.kick_epoch),
            None => Ok(()),
        }
    }
}

impl<H: QueueHandler, M: GuestMemory> RingOwner<M> for InletThread<H, M> {
    fn mailbox(&self) -> &Arc<Mailbox<M>> {
        &self.mailbox
    }

    fn start(&mut self, start: RingStart<M>) -> Result<Result<(), RingError>, UringError> {
        RingOwner::stop(self)?;
        let size = start.config.size;
        self.disabled = false;
        // The handler first: others may fill the ring as soon as it is open.
        self.handler.started(size);
        match self.inlet.start(start) {
            Ok((kick, taken, served)) => {
                self.kick = Some(kick);
                self.handler.goes_on_at(taken, served);
            }
            Err(e) => {
                self.handler.stopped();
                return Ok(Err(e));
            }
        }
        self.kick_epoch += 1;
        self.watch_kick()?;
        Ok(Ok(()))
    }

    fn stop(&mut self) -> Result<Option<u16>, UringError> {
        let Some(base) = self.inlet.stop() else { return Ok(None) };
        let watched = TAG_KICK << TAG_SHIFT | self.kick_epoch;
        self.kick_epoch += 1;
        self.kick = None;
        self.uring.unwatch(watched, TAG_REMOVED << TAG_SHIFT)?;
        self.uring.submit()?;
        self.handler.stopped();
        Ok(Some(base))
    }

    fn set_memory(&mut self, mem: Arc<M>) -> Result<(), UringError> {
        self.inlet.set_memory(mem);
        Ok(())
    }

    fn set_call(&mut self, call: Option<EventFd>) {
        self.inlet.set_call(call);
    }

    fn set_enabled(&mut self, enabled: bool) {
        // Before anybody can enter.
        if std::mem::replace(&mut self.disabled, !enabled) && enabled {
            self.handler.reopens();
        }
        self.inlet.set_enabled(enabled);
    }
}
