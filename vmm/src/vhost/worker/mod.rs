//! The device's own thread: it carries out what the driver wants, notices that a backend is gone and brings up the next.
//!
//! ```text
//! Up ── hang-up, exit, a step past its deadline ──> Down ── backoff ──> connect, handshake, compare with what the
//!  ^                                                  ^                  guest was shown, hand over the rings ──> Up
//!  |                                                  └── gone again ────┘      |
//!  └────────── the driver resets the device ────────── Quarantined <────────────┘ the backend says no
//! ```
//!
//! Nothing of a failed conversation is kept: the next one replays all of it on a fresh socket. Kicks pile up in the
//! doorbells meanwhile. After a death each ring starts from its used index. Requests that the dead process had taken are
//! in the in-flight region, from which its successor resubmits them and goes on behind them in the available ring: its
//! base is the used index plus the number in flight, and it computes that by itself. (Sending the sum would be the
//! clearer message, but the backends that exist expect the used index, and one adds to it.) Then every ring is kicked
//! and called once, because the last kick or call before the death may be lost.

mod config;
mod link;
mod recovery;
mod resize;
mod rings;
mod standin;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use atoll_devices::Completion;
use atoll_devices::virtio::{DeviceOffer, Intent, QueueConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

pub(super) use link::{Link, Session, SessionParts};
pub use resize::ResizeError;

use super::backoff::Backoff;
use super::call::{CallPath, Transport};
use super::device::{DeviceParts, DeviceState, Request, Shared, SwitchError, lock};
use super::error::{ConversationError, Step};
use super::inflight::InflightRegion;
use super::rings::in_ram;
use super::session;
use super::standin::StandIn;
use crate::doorbell::{Interposer, RelayedEvent};
use crate::irq::VectorTable;
use rings::Driver;

/// How long a backend may finish what is in flight when its device stops for good: nobody waits for those requests any
/// more, and one that is stuck must not keep the machine from ending.
const STOP_DRAIN: Duration = Duration::from_secs(1);
/// The same when the driver resets the device, as a guest does before it switches itself off: it has given those requests
/// up. A backend that is stuck is replaced, and nothing is lost with it that anybody waits for.
const RESET_DRAIN: Duration = Duration::from_secs(2);
/// How long its process may take to end by itself when its device stops for good.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// What outlives a board: everything that is agreed with the backend and promised to the guest.
pub(super) struct Past {
    /// What the guest is shown.
    pub(super) shown: DeviceOffer,
    /// Protocol features of the first backend.
    protocol: Protocol,
    link: Link,
    inflight: Option<Arc<InflightRegion>>,
    backoff: Backoff,
    generation: u64,
    /// Sectors that the operator gave it last, if he did: what a successor shows then is no surprise.
    capacity: Option<u64>,
}

impl Past {
    /// The past of a new device.
    pub(super) fn new(session: Box<Session>, shown: DeviceOffer) -> Self {
        let (protocol, link) = (session.protocol(), Link::Up(session));
        Self { shown, protocol, link, inflight: None, backoff: Backoff::default(), generation: 1, capacity: None }
    }
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    parts: DeviceParts,
    past: Past,
    /// The configuration space with the driver's writes.
    config: Vec<u8>,
    vectors: Arc<VectorTable>,
    transport: Arc<dyn Transport>,
    driver: Option<Driver>,
    ring_errors: Option<RelayedEvent>,
    activation: Option<Completion>,
    resets: Vec<(Completion, Instant)>,
    /// Requests of the backend's own are heard again from then on.
    listen_at: Instant,
    /// The backend says that its configuration space has changed.
    config_is_stale: bool,
    /// Answers the driver while no backend does.
    stand_in: Option<StandIn>,
    /// Somebody waits for this device to leave its board, and until when at most.
    leaving: Option<(Instant, SyncSender<(DeviceParts, Past)>)>,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        parts: DeviceParts,
        past: Past,
        vectors: Arc<VectorTable>,
        transport: Arc<dyn Transport>,
    ) -> Self {
        Self {
            shared,
            parts,
            config: past.shown.config.clone(),
            past,
            vectors,
            transport,
            driver: None,
            ring_errors: None,
            activation: None,
            resets: Vec::new(),
            listen_at: Instant::now(),
            config_is_stale: false,
            stand_in: None,
            leaving: None,
        }
    }

    pub(super) fn run(mut self) {
        struct Closing(Arc<Shared>);
        impl Drop for Closing {
            fn drop(&mut self) {
                self.0.close();
            }
        }
        let _closing = Closing(Arc::clone(&self.shared));
        loop {
            self.wait();
            while let Some(request) = self.shared.next() {
                match request {
                    Request::Intent(intent, completion) => self.intent(intent, completion),
                    Request::SwitchCall { index, interposer, answer } => {
                        let _ = answer.send(self.switch_call(index, interposer));
                    }
                    Request::CountCalls { index, answer } => {
                        let _ = answer.send(self.call_mut(index).and_then(|(call, _)| call.count()));
                    }
                    Request::Resize { bytes, answer } => {
                        let _ = answer.send(self.resize(bytes));
                    }
                    Request::Pause => self.pause(),
                    Request::Resume { answer } => {
                        let _ = answer.send(self.resume());
                    }
                    Request::Leave { deadline, answer } => self.prepare_to_leave(deadline, answer),
                    Request::Stop { deadline } => return self.stop(deadline),
                }
            }
            self.look_after();
            if let Some(answer) = self.may_leave() {
                // Nobody is there to take it: then it ends here.
                let _ = answer.send((self.parts, self.past));
                return;
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self) {
        let mut fds = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        let mut until = self.resets.iter().map(|(_, deadline)| *deadline).min();
        let mut no_later_than = |time: Instant| until = Some(until.map_or(time, |until| until.min(time)));
        match &self.past.link {
            Link::Up(session) => {
                fds.push(PollFd::new(session.conversation.socket(), PollFlags::IN | PollFlags::RDHUP));
                if let Some(process) = &session.process {
                    fds.push(PollFd::from_borrowed_fd(process.ended(), PollFlags::IN));
                }
                if let Some(requests) = &session.requests {
                    if self.listen_at <= Instant::now() {
                        fds.push(PollFd::new(requests.socket(), PollFlags::IN));
                    } else {
                        no_later_than(self.listen_at);
                    }
                }
            }
            Link::Down { retry_at } => no_later_than(*retry_at),
            Link::Quarantined => {}
        }
        if let Some((deadline, _)) = &self.leaving {
            no_later_than(*deadline);
        }
        let timeout = until.map(|until| {
            // Rounded up, so that waking up early does not become a spin.
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        // An error (a signal) is a wake-up like any other.
        let _ = poll(&mut fds, timeout.as_ref());
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.shared.wake, &mut count);
    }

    /// Deals with what has happened by itself: a death, a wait that is over.
    fn look_after(&mut self) {
        let now = Instant::now();
        match &self.past.link {
            Link::Up(session) => match session.over() {
                Some(why) => self.lose(&ConversationError::Gone { step: Step::Idle, reason: why.into() }),
                None => self.hear_backend(),
            },
            Link::Down { retry_at } if *retry_at <= now => self.revive(),
            Link::Down { .. } | Link::Quarantined => {}
        }
        let (due, left) = std::mem::take(&mut self.resets).into_iter().partition(|(_, deadline)| *deadline <= now);
        self.resets = left;
        for (completion, _) in Vec::from_iter::<Vec<_>>(due) {
            tracing::warn!(
                device = self.shared.name,
                "no successor shows that the dead backend's last writes are done; the reset goes on without that proof"
            );
            completion.complete(0);
        }
    }

    fn intent(&mut self, intent: Intent, completion: Completion) {
        match intent {
            Intent::Activate { features, queues, .. } => self.activate(features, queues, completion),
            Intent::Reset => self.reset(completion),
            Intent::ConfigWrite { offset, data } => self.write_config(offset, data),
        }
    }

    fn activate(&mut self, features: u64, queues: Vec<QueueConfig>, completion: Completion) {
        if self.driver.is_some() {
            self.take_rings_back();
        }
        if let Some(queue) = queues.iter().find(|queue| !in_ram(self.parts.memory.mapped(), queue)) {
            tracing::warn!(device = self.shared.name, queue = queue.index, "the driver put a ring outside of RAM");
            self.transport.needs_reset();
            return;
        }
        let calls = queues
            .iter()
            .map(|queue| CallPath::new(queue.index, queue.vector, &self.vectors, &self.transport, &self.parts.relay))
            .collect();
        let calls: Vec<CallPath> = match calls {
            Ok(calls) => calls,
            Err(error) => {
                let source = ConversationError::Local { step: Step::SetVringCall(0), source: error };
                return self.quarantine(&source.to_string());
            }
        };
        // Only what was shown can have been accepted; the transport has checked that, and a backend believes it.
        let features = features & self.past.shown.features;
        lock(&self.shared.queues).clone_from(&queues);
        self.driver = Some(Driver::new(features, queues, calls));
        self.activation = Some(completion);
        self.hand_over();
    }

    fn reset(&mut self, completion: Completion) {
        self.activation = None;
        self.take_rings_back_within(RESET_DRAIN);
        match &self.past.link {
            Link::Up(_) => completion.complete(0),
            Link::Down { .. } => self.resets.push((completion, Instant::now() + self.parts.limits.fence)),
            Link::Quarantined => {
                self.past.link = Link::Down { retry_at: Instant::now() };
                self.shared.update(|status| {
                    status.state = DeviceState::Recovering { why: "the driver has reset the device".into() };
                });
                self.resets.push((completion, Instant::now() + self.parts.limits.fence));
            }
        }
    }

    fn call_mut(&mut self, index: u16) -> Option<(&mut CallPath, &mut Session)> {
        let (Link::Up(session), Some(driver)) = (&mut self.past.link, &mut self.driver) else { return None };
        let at = driver.queues.iter().position(|queue| queue.index == index)?;
        driver.calls.get_mut(at).map(|call| (call, &mut **session))
    }

    fn switch_call(&mut self, index: u16, interposer: Option<Arc<dyn Interposer>>) -> Result<(), SwitchError> {
        let relay = Arc::clone(&self.parts.relay);
        let (call, session) = self.call_mut(index).ok_or(SwitchError::NotRunning(index))?;
        let old = call.switch(interposer, &relay)?;
        let event = call.event().try_clone()?;
        let told = session.conversation.perform(move |wire| session::set_call(wire, index, &event));
        // Only now: the backend may have signalled the old way until it was told of the new one.
        drop(old);
        told.map_err(|error| {
            let reason = error.to_string();
            self.lose(&error);
            SwitchError::Conversation(ConversationError::Gone { step: Step::SetVringCall(index), reason })
        })
    }

    /// Gives the rings back to the gate's keeper, whatever becomes of the backend.
    fn prepare_to_leave(&mut self, deadline: Instant, answer: SyncSender<(DeviceParts, Past)>) {
        let fence = Instant::now() + self.parts.limits.fence;
        self.activation = None;
        self.resets.clear();
        self.take_rings_back_within(deadline.saturating_duration_since(Instant::now()));
        self.forget_driver_config();
        if matches!(self.past.link, Link::Quarantined) {
            self.past.link = Link::Down { retry_at: Instant::now() };
        }
        self.leaving = Some((fence.min(deadline), answer));
    }

    /// Whoever waits for this device, if it can go: its backend is there, or has had its time to come.
    fn may_leave(&mut self) -> Option<SyncSender<(DeviceParts, Past)>> {
        let (deadline, _) = self.leaving.as_ref()?;
        let there = matches!(self.past.link, Link::Up(_));
        if !there && *deadline > Instant::now() && !self.shared.ending.load(Ordering::Relaxed) {
            return None;
        }
        self.leaving.take().map(|(_, answer)| answer)
    }

    fn stop(mut self, deadline: Instant) {
        // What follows has a deadline of its own.
        self.shared.ending.store(false, Ordering::Relaxed);
        self.activation = None;
        let left = deadline.saturating_duration_since(Instant::now());
        self.take_rings_back_within(STOP_DRAIN.min(left.max(Duration::from_millis(100))));
        if let Link::Up(mut session) = std::mem::replace(&mut self.past.link, Link::Quarantined) {
            session.conversation.hang_up();
            if let Some(process) = &mut session.process {
                let end = process.finish(deadline.min(Instant::now() + STOP_GRACE));
                tracing::debug!(device = self.shared.name, end, "backend ended");
            }
        }
        self.shared.update(|status| (status.state, status.pid) = (DeviceState::Stopped, None));
    }
}
