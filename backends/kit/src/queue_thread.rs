//! The thread of one queue.
//!
//! It owns an io_uring, the device's [`QueueHandler`] and, while the ring runs, the [`Ring`]. It waits for
//! everything in one place: kicks, commands of the conversation (a mailbox with an eventfd) and completions
//! all arrive on the io_uring. Kick descriptors are watched with a multishot poll and never read: each write to
//! an eventfd wakes the poll, so that a kick costs no system call beyond the wait itself.
//!
//! After work the thread may spin for a short time before it asks for a kick and sleeps, see [`spin`](crate::spin).
//! It never spins while I/O is in flight.
//!
//! Where requests come in a stream that is too slow for that, a handler may have it nap ([`QueueHandler::nap`]): it looks
//! again after a moment and asks for a kick only if there was nothing.
//!
//! Where the guest is interrupted for another queue at the same time, whose interrupt makes its driver look at this one as
//! well (a card's driver frees what was sent when it takes what came), its wish for an interrupt of this one is read a
//! moment later, when it mostly has none any more.
//!
//! A ring that turns out to be broken (an index out of bounds, a head twice) is not served further; its requests in
//! flight are still completed, and the conversation learns of it when it stops the ring.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::chain::Chain;
use crate::device::{Io, Progress, QueueHandler};
use crate::limit::{Cost, Toll};
use crate::meter::Meter;
use crate::requests::{PUBLISH_AT, Requests, Turn, publish};
use crate::ring::{Ring, RingError};
use crate::spin::Spin;
use crate::stats::{Figures, Part, add};
use crate::step::{Step, step};
use crate::uring::{Completion, Uring, UringError};
use crate::worker::{Gate, Mailbox, QueuePulse, RingOwner, RingStart, obey, wake};

/// Operations that are submitted without waiting for the end of the batch.
const SUBMIT_AT: u32 = 16;
/// How long an interrupt waits for the guest to see by itself what it is for: longer than a wake-up on another processor
/// and the way to the driver take.
const CALL_LATER: Duration = Duration::from_micros(250);

const TAG_SHIFT: u32 = 56;
const TAG_DEVICE: u64 = 1;
const TAG_KICK: u64 = 2;
const TAG_MAILBOX: u64 = 3;
const TAG_REMOVED: u64 = 4;
const TAG_SINK: u64 = 5;
const TAG_SOURCE: u64 = 6;

/// The `user_data` of an operation for request `head`.
pub(crate) fn device_tag(head: u16) -> u64 {
    TAG_DEVICE << TAG_SHIFT | u64::from(head)
}

/// A ring for `handler`, which hears of `mailbox`. To be called by the thread that will drive it.
pub(crate) fn open<H: QueueHandler, M>(handler: &H, mailbox: &Mailbox<M>) -> Result<Uring, UringError> {
    let mut uring = Uring::new(256, handler.opcodes())?;
    uring.watch(mailbox.wake.as_fd(), TAG_MAILBOX << TAG_SHIFT)?;
    Ok(uring)
}

struct Running<M: GuestMemory> {
    ring: Ring<M>,
    kick: OwnedFd,
    err: Option<OwnedFd>,
    enabled: bool,
    /// It was told to be disabled: requests are thrown away.
    discards: bool,
    broken: bool,
}

pub(crate) struct QueueThread<H, M: GuestMemory> {
    index: u16,
    uring: Uring,
    handler: H,
    mailbox: Arc<Mailbox<M>>,
    pulse: Arc<QueuePulse>,
    gate: Arc<Gate>,
    running: Option<Running<M>>,
    kick_epoch: u64,
    outstanding: u32,
    completions: Vec<Completion>,
    /// Requests that are done and not yet in the used ring; empty between two steps.
    done: Vec<(u16, u32)>,
    chain: Chain,
    spin: Spin,
    /// The last requests were not done on this thread but waited for in the ring: a device so slow gains little by a
    /// spin, which costs as much as its requests do.
    waited_for_storage: bool,
    malformed: u64,
    /// What the handler is blocked by is being polled.
    sink_watched: bool,
    /// When the guest is to be interrupted, if it has not seen by then what is done ([`QueueHandler::grace`]).
    call_at: Option<Instant>,
    /// What the handler fetches from is being polled.
    source_watched: bool,
    /// It has been found readable.
    source_readable: bool,
    /// The handler has not fetched all that there was.
    more_to_fetch: bool,
    /// It asks for no kick before.
    nap_until: Option<Instant>,
    /// For the handler; the meter counts in the same part.
    figures: Part,
    meter: Meter,
    toll: Toll,
}

impl<H: QueueHandler, M: GuestMemory + Send + Sync + 'static> QueueThread<H, M> {
    pub(crate) fn new(
        index: u16,
        uring: Uring,
        handler: H,
        mailbox: Arc<Mailbox<M>>,
        pulse: Arc<QueuePulse>,
        gate: Arc<Gate>,
        (figures, toll): (Part, Toll),
    ) -> Self {
        Self {
            index,
            uring,
            handler,
            mailbox,
            pulse,
            gate,
            running: None,
            kick_epoch: 0,
            outstanding: 0,
            completions: Vec::with_capacity(512),
            done: Vec::with_capacity(PUBLISH_AT),
            chain: Chain::default(),
            spin: Spin::default(),
            waited_for_storage: false,
            malformed: 0,
            sink_watched: false,
            source_watched: false,
            source_readable: false,
            more_to_fetch: false,
            call_at: None,
            nap_until: None,
            meter: Meter::new(figures.clone()),
            figures,
            toll,
        }
    }

    pub(crate) fn run(&mut self) -> Result<(), UringError> {
        loop {
            if self.mailbox.pending.swap(false, Ordering::AcqRel) && !obey(self)? {
                return Ok(());
            }
            if !self.step()? {
                self.idle()?;
            }
        }
    }

    /// Completes, takes and submits what there is; true when there was anything.
    fn step(&mut self) -> Result<bool, UringError> {
        if self.uring.deliverable() {
            self.uring.submit()?;
        }
        let completed = self.finish()?;
        let taken = self.take()?;
        let readable = std::mem::take(&mut self.source_readable);
        let mut seen_by_guest = false;
        if taken || readable || self.more_to_fetch {
            let fetched = self.handler.sourced(readable);
            self.more_to_fetch = fetched.more;
            seen_by_guest = fetched.tells_guest;
        }
        if taken {
            self.nap_until = self.handler.nap().map(|nap| Instant::now() + nap);
        }
        if completed || taken {
            self.announce_in_time(seen_by_guest);
            // A few operations wait for the sleep, which submits them in the same system call.
            if self.uring.queued() >= SUBMIT_AT {
                self.uring.submit()?;
            }
        }
        Ok(completed || taken || self.more_to_fetch)
    }

    /// Handles completions that have been delivered.
    fn finish(&mut self) -> Result<bool, UringError> {
        self.pulse.beat();
        let mut completions = std::mem::take(&mut self.completions);
        self.uring.reap(&mut completions);
        let mut worked = false;
        for completion in &completions {
            let value = completion.user_data & ((1 << TAG_SHIFT) - 1);
            match completion.user_data >> TAG_SHIFT {
                TAG_DEVICE => {
                    if !worked {
                        self.meter.batch();
                    }
                    self.outstanding = self.outstanding.saturating_sub(1);
                    self.device_completion(value as u16, completion.result);
                    worked = true;
                }
                TAG_KICK if !completion.more && value == self.kick_epoch => self.rewatch_kick(completion.result)?,
                TAG_MAILBOX if !completion.more => {
                    self.uring.watch(self.mailbox.wake.as_fd(), TAG_MAILBOX << TAG_SHIFT)?;
                }
                TAG_SINK => self.sink_watched = false,
                TAG_SOURCE => (self.source_watched, self.source_readable) = (false, true),
                _ => {}
            }
        }
        completions.clear();
        self.completions = completions;
        if let Some(running) = &mut self.running {
            let published = publish(&mut running.ring, &mut self.done);
            self.check(published);
        }
        Ok(worked)
    }

    fn device_completion(&mut self, head: u16, result: i32) {
        let Some(running) = &mut self.running else { return };
        let mut io = Io::new(&mut self.uring, &mut self.outstanding, Figures::new(&self.figures));
        let progress = self.handler.completion(&mut io, &**running.ring.memory(), head, result);
        if let Progress::Done { written } = progress {
            step(Step::Done);
            add(&self.pulse.completed, 1);
            self.meter.ended(head);
            self.done.push((head, written));
            if self.done.len() >= PUBLISH_AT {
                let published = publish(&mut running.ring, &mut self.done);
                self.check(published);
            }
        }
    }

    /// Takes what the guest has made available, a turn of it.
    fn take(&mut self) -> Result<bool, UringError> {
        let Some(running) = &mut self.running else { return Ok(false) };
        let serves = running.enabled || running.discards;
        if !serves || running.broken || !self.gate.is_open() || self.toll.is_closed() {
            return Ok(false);
        }
        let mut requests = Requests::new(Turn {
            index: self.index,
            ring: &mut running.ring,
            chain: &mut self.chain,
            done: &mut self.done,
            toll: &mut self.toll,
            meter: &mut self.meter,
            pulse: &self.pulse,
            malformed: &mut self.malformed,
            discards: running.discards,
        });
        if running.discards {
            while requests.advance(|_| Cost::default()) {
                requests.done(0);
            }
        } else {
            let mut io = Io::new(&mut self.uring, &mut self.outstanding, Figures::new(&self.figures));
            self.handler.requests(&mut io, &mut requests);
        }
        let (count, ended) = requests.end();
        self.check(ended);
        if count > 0 {
            self.handler.batch_ended();
        }
        Ok(count > 0)
    }

    /// A ring error stops the ring, not the process.
    fn check(&mut self, result: Result<(), RingError>) {
        if let (Err(e), Some(running)) = (result, &mut self.running)
            && !running.broken
        {
            running.broken = true;
            if let Some(err) = &running.err {
                wake(err);
            }
            tracing::warn!(queue = self.index, error = %e, "the ring is broken and is not served until it is reset");
        }
    }

    /// At once, or when the guest has had its time to see it by itself. One that leaves half a ring unseen does not look.
    fn announce_in_time(&mut self, seen_by_guest: bool) {
        let grace = self.handler.grace();
        if grace.is_zero() && !seen_by_guest && self.call_at.is_none() {
            return self.announce();
        }
        let now = Instant::now();
        if grace.is_zero() {
            if *self.call_at.get_or_insert(now + CALL_LATER) <= now {
                self.announce();
            }
            return;
        }
        let looks = |running: &Running<M>| running.ring.unseen().is_some_and(|unseen| unseen < running.ring.size() / 2);
        if !self.running.as_ref().is_some_and(looks) || *self.call_at.get_or_insert(now + grace) <= now {
            self.announce();
        }
    }

    fn announce(&mut self) {
        self.call_at = None;
        if let Some(running) = &mut self.running {
            match running.ring.notify() {
                Ok(false) => {}
                Ok(true) => self.meter.called(),
                Err(e) => self.check(Err(e)),
            }
        }
    }

    /// Nothing to do: spin a little, then ask for a kick and sleep.
    ///
    /// A command may have come since the mailbox was looked at, and its wake-up have been reaped with other completions:
    /// nothing would end the sleep.
    fn idle(&mut self) -> Result<(), UringError> {
        if self.mailbox.pending.load(Ordering::Acquire) {
            return Ok(());
        }
        let open = self.gate.is_open();
        if self.call_at.is_some_and(|at| at <= Instant::now()) {
            self.announce();
        }
        if !self.source_watched
            && let Some(source) = self.handler.source()
        {
            self.uring.watch_once(source, libc::POLLIN, TAG_SOURCE << TAG_SHIFT)?;
            self.source_watched = true;
        }
        if let Some(sink) = self.handler.blocked() {
            if !self.sink_watched {
                self.uring.watch_once(sink, libc::POLLOUT, TAG_SINK << TAG_SHIFT)?;
                self.sink_watched = true;
            }
        } else if let Some(running) = &mut self.running
            && (running.enabled || running.discards)
            && !running.broken
            && open
        {
            if let Some(until) = self.toll.until() {
                // No kick is asked for: what the guest adds comes behind the request that waits.
                self.uring.submit_and_wait_until(self.call_at.map_or(until, |at| at.min(until)))?;
                self.meter.woken();
                return Ok(());
            }
            let budget = self.spin.budget();
            if self.outstanding == 0 && !self.waited_for_storage && !budget.is_zero() {
                let since = Instant::now();
                while since.elapsed() < budget {
                    for _ in 0..8 {
                        if running.ring.waiting() {
                            self.spin.caught();
                            self.meter.spun();
                            return Ok(());
                        }
                        std::hint::spin_loop();
                    }
                    if self.mailbox.pending.load(Ordering::Acquire) || self.uring.deliverable() {
                        return Ok(());
                    }
                }
            }
            if let Some(moment) = self.nap_until {
                if moment > Instant::now() {
                    let until = self.call_at.map_or(moment, |call| call.min(moment));
                    self.uring.submit_and_wait_until(until)?;
                    self.meter.woken();
                    return Ok(());
                }
                self.nap_until = None;
            }
            let armed = running.ring.arm();
            match armed {
                Ok(false) => {}
                Ok(true) => return Ok(()),
                Err(e) => self.check(Err(e)),
            }
        }
        if let Some(at) = self.call_at {
            self.uring.submit_and_wait_until(at)?;
            self.meter.woken();
            return Ok(());
        }
        let idle = self.outstanding == 0;
        let before = Instant::now();
        self.uring.submit_and_wait()?;
        self.meter.woken();
        if !idle {
            self.waited_for_storage = true;
        } else if !std::mem::take(&mut self.waited_for_storage) {
            self.spin.slept(before.elapsed());
        }
        Ok(())
    }

    /// The poll has ended: begin another one, unless the descriptor can never be waited for.
    fn rewatch_kick(&mut self, result: i32) -> Result<(), UringError> {
        let gone = i32::from(libc::POLLERR | libc::POLLHUP | libc::POLLNVAL);
        if result < 0 || result & gone != 0 {
            self.check(Err(RingError::Broken {
                index: self.index,
                reason: "its kick descriptor is no eventfd".into(),
            }));
            return Ok(());
        }
        self.watch_kick()
    }

    fn watch_kick(&mut self) -> Result<(), UringError> {
        let tag = TAG_KICK << TAG_SHIFT | self.kick_epoch;
        match &self.running {
            Some(running) => self.uring.watch(running.kick.as_fd(), tag),
            None => Ok(()),
        }
    }

    /// Waits until nothing is in flight, taking nothing new.
    fn drain(&mut self) -> Result<(), UringError> {
        while self.outstanding > 0 {
            self.uring.submit_and_wait()?;
            self.finish()?;
        }
        self.announce();
        Ok(())
    }
}

impl<H: QueueHandler, M: GuestMemory + Send + Sync + 'static> RingOwner<M> for QueueThread<H, M> {
    fn mailbox(&self) -> &Arc<Mailbox<M>> {
        &self.mailbox
    }

    fn start(&mut self, start: RingStart<M>) -> Result<Result<(), RingError>, UringError> {
        self.stop()?;
        let recorded = start.config.tracker.is_some();
        let mem = Arc::clone(&start.mem);
        let mut ring = match Ring::start(start.mem, start.config) {
            Ok(ring) => ring,
            Err(e) => return Ok(Err(e)),
        };
        ring.call = start.call;
        self.handler.memory(&mem);
        self.handler.started(ring.size());
        self.handler.goes_on_at(ring.next_avail(), recorded.then(|| ring.continued()));
        self.meter.ring(ring.size());
        if ring.continued() {
            ring.interrupt();
        }
        self.running = Some(Running {
            ring,
            kick: start.kick,
            err: start.err,
            enabled: start.enabled,
            discards: false,
            broken: false,
        });
        self.kick_epoch += 1;
        self.watch_kick()?;
        Ok(Ok(()))
    }

    fn stop(&mut self) -> Result<Option<u16>, UringError> {
        if self.running.is_none() {
            return Ok(None);
        }
        self.drain()?;
        let Some(running) = self.running.take() else { return Ok(None) };
        let watched = TAG_KICK << TAG_SHIFT | self.kick_epoch;
        self.kick_epoch += 1;
        self.uring.unwatch(watched, TAG_REMOVED << TAG_SHIFT)?;
        self.uring.submit()?;
        self.handler.stopped();
        self.toll.forget();
        Ok(Some(running.ring.next_avail()))
    }

    fn set_memory(&mut self, mem: Arc<M>) -> Result<(), UringError> {
        self.drain()?;
        if let Some(running) = &mut self.running {
            self.handler.memory(&mem);
            running.ring.set_memory(mem);
        }
        Ok(())
    }

    fn set_call(&mut self, call: Option<EventFd>) {
        if let Some(running) = &mut self.running {
            running.ring.call = call;
            // What was announced to the old descriptor may have been lost with it.
            running.ring.interrupt();
        }
    }

    fn set_enabled(&mut self, enabled: bool) {
        if let Some(running) = &mut self.running {
            // Not before it is told to: a ring that starts is disabled until the front end says more.
            running.discards = !enabled && self.handler.discards_when_disabled();
            running.enabled = enabled;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc::{RecvTimeoutError, channel, sync_channel};
    use std::time::Duration;

    use rustix::event::EventfdFlags;

    use super::*;
    use crate::stats::StatsPage;
    use crate::worker::Command;

    struct Nothing;

    impl QueueHandler for Nothing {
        fn opcodes(&self) -> &'static [u8] {
            &[]
        }
        fn started(&mut self, _size: u16) {}
        fn stopped(&mut self) {}
        fn request<M: GuestMemory>(&mut self, _io: &mut Io<'_>, _mem: &M, _chain: &Chain) -> Progress {
            Progress::Done { written: 0 }
        }
        fn completion<M: GuestMemory>(&mut self, _io: &mut Io<'_>, _mem: &M, _head: u16, _result: i32) -> Progress {
            Progress::Done { written: 0 }
        }
    }

    /// One successor in some thousand did not answer SET_VRING_ENABLE, and was replaced after five seconds: the command had come
    /// after its queue thread looked into the mailbox, and before the thread reaped the wake-up among its completions.
    #[test]
    fn a_command_whose_wake_up_was_reaped_is_heard() {
        let (done, is_done) = channel();
        std::thread::spawn(move || {
            let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
            let pulse = Arc::new(QueuePulse::new(wake.try_clone().unwrap()));
            let mailbox = Arc::new(Mailbox::<crate::memory::GuestRam> {
                commands: Mutex::new(VecDeque::new()),
                pending: AtomicBool::new(false),
                wake,
            });
            let uring = open(&Nothing, &mailbox).unwrap();
            let figures = StatsPage::private(1).unwrap().part(0).unwrap();
            let (inbox, gate) = (Arc::clone(&mailbox), Gate::opened());
            let mut thread = QueueThread::new(0, uring, Nothing, inbox, pulse, gate, (figures, Toll::new(None)));
            // As in its first sleep: the mailbox is being watched.
            thread.uring.submit().unwrap();
            let (reply, answer) = sync_channel(1);
            mailbox.send(Command::Enable(true, reply));
            assert!(!thread.step().unwrap(), "the wake-up is no work");
            assert!(!thread.uring.deliverable(), "it has been reaped");
            thread.idle().unwrap();
            mailbox.pending.store(false, Ordering::Release);
            assert!(obey(&mut thread).unwrap());
            let _ = done.send(answer.try_recv().is_ok());
        });
        match is_done.recv_timeout(Duration::from_secs(60)) {
            Ok(obeyed) => assert!(obeyed),
            Err(RecvTimeoutError::Timeout) => panic!("it sleeps with a command in its mailbox"),
            Err(RecvTimeoutError::Disconnected) => panic!("the thread has failed"),
        }
    }
}
