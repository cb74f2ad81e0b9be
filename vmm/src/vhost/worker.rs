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

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use atoll_devices::Completion;
use atoll_devices::virtio::{DeviceOffer, Intent, QueueConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backoff::Backoff;
use super::call::{CallPath, Transport};
use super::conversation::Conversation;
use super::device::{DeviceParts, DeviceState, Recovery, Request, Shared, SwitchError, greet};
use super::error::{ConversationError, Step};
use super::features::{feature_names, protocol_feature_names};
use super::inflight::InflightRegion;
use super::rings::{RingPosition, in_ram};
use super::session::{self, Capabilities, InflightPlan, RingPlan, StartPlan};
use super::source::{BackendProcess, is_readable};
use crate::doorbell::{Interposer, RelayedEvent, Verdict};
use crate::irq::VectorTable;

/// How long a killed process may take to be reaped.
const REAP: Duration = Duration::from_secs(5);

/// One incarnation of the backend, greeted.
pub(super) struct Session {
    pub(super) conversation: Conversation,
    process: Option<Box<dyn BackendProcess>>,
    pub(super) capabilities: Option<Capabilities>,
    /// It was handed the driver's rings, or some of them.
    has_rings: bool,
}

impl Session {
    pub(super) fn new(conversation: Conversation, process: Option<Box<dyn BackendProcess>>) -> Self {
        Self { conversation, process, capabilities: None, has_rings: false }
    }
    fn protocol(&self) -> Protocol {
        self.capabilities.as_ref().map_or(Protocol::empty(), |capabilities| capabilities.protocol)
    }
    pub(super) fn recovery(&self) -> Recovery {
        if self.protocol().contains(Protocol::INFLIGHT_SHMFD) { Recovery::Full } else { Recovery::IdleOnly }
    }
    /// Ends it by force. Says how the process ended, where it is ours.
    pub(super) fn give_up(mut self, deadline: Instant) -> Option<String> {
        self.conversation.hang_up();
        self.process.as_mut().map(|process| process.kill(deadline))
    }
    /// Why it is over, if it is.
    fn over(&self) -> Option<&'static str> {
        if self.process.as_ref().is_some_and(|process| is_readable(process.ended())) {
            Some("its process has ended")
        } else if is_readable(self.conversation.socket()) {
            Some("it has hung up, or spoken without being asked")
        } else {
            None
        }
    }
}

enum Link {
    Up(Session),
    Down { retry_at: Instant },
    Quarantined,
}

/// What the driver has set up.
struct Driver {
    features: u64,
    queues: Vec<QueueConfig>,
    calls: Vec<CallPath>,
    /// Some backend has had the rings: what they hold may have been taken already.
    ran: bool,
    /// Used indices when the rings were last handed over.
    used_at_start: Vec<u16>,
    /// The first queue in which the last backend that had the rings left requests unfinished, and how many.
    unfinished: Option<(u16, u16)>,
}

impl Driver {
    /// Looks at the rings after a backend's death. What the driver adds later, no backend has seen.
    fn take_stock(&mut self, memory: &GuestMemoryMmap) {
        self.unfinished = self.queues.iter().find_map(|queue| {
            let position = RingPosition::read(memory, queue)?;
            (!position.is_idle()).then(|| (queue.index, position.available.wrapping_sub(position.used)))
        });
    }
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    parts: DeviceParts,
    shown: DeviceOffer,
    /// The configuration space with the driver's writes.
    config: Vec<u8>,
    protocol: Protocol,
    vectors: Arc<VectorTable>,
    transport: Arc<dyn Transport>,
    link: Link,
    driver: Option<Driver>,
    inflight: Option<Arc<InflightRegion>>,
    ring_errors: Option<RelayedEvent>,
    activation: Option<Completion>,
    resets: Vec<(Completion, Instant)>,
    backoff: Backoff,
    generation: u64,
}

/// Says in the log that a backend complains about a ring; more than that the protocol has no word for.
struct RingErrors(String);

impl Interposer for RingErrors {
    fn signalled(&self, count: u64) -> Verdict {
        tracing::warn!(device = self.0, count, "the backend reports an error of a ring");
        Verdict::Drop
    }
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        parts: DeviceParts,
        shown: DeviceOffer,
        session: Session,
        vectors: Arc<VectorTable>,
        transport: Arc<dyn Transport>,
    ) -> Self {
        Self {
            shared,
            parts,
            config: shown.config.clone(),
            shown,
            protocol: session.protocol(),
            vectors,
            transport,
            link: Link::Up(session),
            driver: None,
            inflight: None,
            ring_errors: None,
            activation: None,
            resets: Vec::new(),
            backoff: Backoff::default(),
            generation: 1,
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
                    Request::Stop { deadline } => return self.stop(deadline),
                }
            }
            self.look_after();
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self) {
        let mut fds = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        let mut until = self.resets.iter().map(|(_, deadline)| *deadline).min();
        match &self.link {
            Link::Up(session) => {
                fds.push(PollFd::new(session.conversation.socket(), PollFlags::IN | PollFlags::RDHUP));
                if let Some(process) = &session.process {
                    fds.push(PollFd::from_borrowed_fd(process.ended(), PollFlags::IN));
                }
            }
            Link::Down { retry_at } => until = Some(until.map_or(*retry_at, |until| until.min(*retry_at))),
            Link::Quarantined => {}
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
        match &self.link {
            Link::Up(session) => {
                if let Some(why) = session.over() {
                    self.lose(&ConversationError::Gone { step: Step::Idle, reason: why.into() });
                }
            }
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
        let calls = match calls {
            Ok(calls) => calls,
            Err(error) => {
                let source = ConversationError::Local { step: Step::SetVringCall(0), source: error };
                return self.quarantine(&source.to_string());
            }
        };
        // Only what was shown can have been accepted; the transport has checked that, and a backend believes it.
        let features = features & self.shown.features;
        self.driver = Some(Driver { features, queues, calls, ran: false, used_at_start: Vec::new(), unfinished: None });
        self.activation = Some(completion);
        self.hand_over();
    }

    /// Gives the rings to the backend, if both are there.
    fn hand_over(&mut self) {
        let (Link::Up(_), Some(_)) = (&self.link, &self.driver) else { return };
        match self.start_rings() {
            Ok(()) => {
                self.shared.update(|status| status.state = DeviceState::Running);
                if let Some(completion) = self.activation.take() {
                    completion.complete(0);
                }
            }
            Err(error) if error.is_gone() => self.lose(&error),
            Err(error) => self.quarantine(&error.to_string()),
        }
    }

    fn start_rings(&mut self) -> Result<(), ConversationError> {
        let (Link::Up(session), Some(driver)) = (&mut self.link, &mut self.driver) else { return Ok(()) };
        let local = |step| move |source| ConversationError::Local { step, source };
        let continued = driver.ran;
        if let (true, Recovery::IdleOnly, Some((queue, count))) = (continued, session.recovery(), driver.unfinished) {
            let record = protocol_feature_names(Protocol::INFLIGHT_SHMFD.bits());
            let what = format!("{record} (it died with {count} unfinished requests in queue {queue})");
            return Err(ConversationError::Lacks { what });
        }
        if !continued && let Some(region) = &self.inflight {
            region.clear().map_err(local(Step::SetInflightFd))?;
        }
        if self.ring_errors.is_none() {
            let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
            let listener = Arc::new(RingErrors(self.shared.name.clone()));
            let (from, to) = event().and_then(|from| Ok((from, event()?))).map_err(local(Step::SetVringErr(0)))?;
            let relayed = self.parts.relay.carry(from, to, listener).map_err(std::io::Error::other);
            self.ring_errors = Some(relayed.map_err(local(Step::SetVringErr(0)))?);
        }
        let mut rings = Vec::new();
        driver.used_at_start.clear();
        for (queue, call) in driver.queues.iter().zip(&driver.calls) {
            let index = queue.index;
            let position = RingPosition::read(self.parts.memory.mapped(), queue).ok_or_else(|| {
                ConversationError::Absurd { step: Step::SetVringBase(index), what: "the ring is not in RAM".into() }
            })?;
            driver.used_at_start.push(position.used);
            let kick = self.shared.doorbells.get(usize::from(index)).ok_or_else(|| ConversationError::Absurd {
                step: Step::SetVringKick(index),
                what: "the device has no such queue".into(),
            })?;
            let errors = self.ring_errors.as_ref().map(|relayed| relayed.source().try_clone());
            let Some(errors) = errors else { return Ok(()) };
            rings.push(RingPlan {
                index,
                size: queue.size,
                descriptor_table: queue.descriptor_table,
                available_ring: queue.available_ring,
                used_ring: queue.used_ring,
                base: if continued { position.used } else { 0 },
                call: call.event().try_clone().map_err(local(Step::SetVringCall(index)))?,
                error: errors.map_err(local(Step::SetVringErr(index)))?,
                kick: kick.backend_event().try_clone().map_err(local(Step::SetVringKick(index)))?,
            });
        }
        let inflight = match &self.inflight {
            Some(region) => InflightPlan::Keep(Arc::clone(region)),
            None => InflightPlan::Make {
                queues: u16::try_from(self.shown.queue_sizes.len()).unwrap_or(u16::MAX),
                queue_size: self.shown.queue_sizes.iter().copied().max().unwrap_or(1),
            },
        };
        let plan = StartPlan { features: driver.features, memory: self.parts.memory.clone(), inflight, rings };
        driver.ran = true;
        session.has_rings = true;
        let region = session.conversation.perform(move |wire| session::start(wire, plan))?;
        if self.inflight.is_none() {
            self.inflight = region;
        }
        for (queue, call) in driver.queues.iter().zip(&driver.calls) {
            if let Some(bell) = self.shared.doorbells.get(usize::from(queue.index)) {
                bell.nudge();
            }
            if continued {
                call.signal();
            }
        }
        Ok(())
    }

    fn reset(&mut self, completion: Completion) {
        self.activation = None;
        self.take_rings_back();
        match &self.link {
            Link::Up(_) => completion.complete(0),
            Link::Down { .. } => self.resets.push((completion, Instant::now() + self.parts.limits.fence)),
            Link::Quarantined => {
                self.link = Link::Down { retry_at: Instant::now() };
                self.shared.update(|status| {
                    status.state = DeviceState::Recovering { why: "the driver has reset the device".into() };
                });
                self.resets.push((completion, Instant::now() + self.parts.limits.fence));
            }
        }
    }

    /// Stops the backend's use of the rings and forgets the driver.
    fn take_rings_back(&mut self) {
        let Some(driver) = self.driver.take() else { return };
        let rings: Vec<u16> = driver.queues.iter().map(|queue| queue.index).collect();
        if let Link::Up(session) = &mut self.link
            && session.has_rings
        {
            session.conversation.set_step_limit(self.parts.limits.drain);
            let stopped = session.conversation.perform(move |wire| session::stop(wire, &rings));
            session.conversation.set_step_limit(self.parts.limits.step);
            match stopped {
                Ok(_) => {
                    session.has_rings = false;
                    self.shared.update(|status| status.state = DeviceState::Idle);
                }
                // It may go on writing: the only way to be rid of it is to end it.
                Err(error) => self.lose(&error),
            }
        }
        if let Some(region) = &self.inflight
            && let Err(error) = region.clear()
        {
            tracing::error!(device = self.shared.name, %error, "the record of requests in flight was not cleared");
        }
    }

    fn write_config(&mut self, offset: u32, data: Vec<u8>) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let field = start.checked_add(data.len()).and_then(|end| self.config.get_mut(start..end));
        let Some(field) = field else { return };
        field.copy_from_slice(&data);
        let Link::Up(session) = &mut self.link else { return };
        match session.conversation.perform(move |wire| session::set_config(wire, offset, &data)) {
            Ok(()) => {}
            // A backend may refuse what the driver writes; that conversation is over, the next one does not repeat it.
            Err(error) => {
                if !error.is_gone() {
                    self.config.clone_from(&self.shown.config);
                }
                self.lose(&error);
            }
        }
    }

    /// Gives up the backend and plans the next one.
    fn lose(&mut self, error: &ConversationError) {
        let retry_at = Instant::now();
        let Link::Up(session) = std::mem::replace(&mut self.link, Link::Down { retry_at }) else { return };
        if self.has_progressed() {
            self.backoff.progress();
        }
        let had_rings = session.has_rings;
        let end = session.give_up(Instant::now() + REAP);
        if let (true, Some(driver)) = (had_rings, &mut self.driver) {
            driver.take_stock(self.parts.memory.mapped());
        }
        let wait = self.backoff.next();
        self.link = Link::Down { retry_at: Instant::now() + wait };
        let device = &self.shared.name;
        tracing::warn!(device, generation = self.generation, %error, end, ?wait, "backend lost");
        self.shared.update(|status| {
            status.lost += 1;
            status.state = DeviceState::Recovering { why: error.to_string() };
        });
    }

    /// Whether the backend has completed a request since it got the rings.
    fn has_progressed(&self) -> bool {
        let Some(driver) = &self.driver else { return false };
        driver.queues.iter().zip(&driver.used_at_start).any(|(queue, used)| {
            RingPosition::read(self.parts.memory.mapped(), queue).is_some_and(|position| position.used != *used)
        })
    }

    /// Brings up the next incarnation, with everything that the last one had.
    fn revive(&mut self) {
        self.generation += 1;
        let generation = self.generation;
        match greet(&mut self.parts, generation, &self.shared.ending) {
            Ok((session, offer)) => {
                self.shared.update(|status| {
                    status.generation = generation;
                    status.state = DeviceState::Idle;
                });
                let checked = self.compare(&session, &offer);
                self.link = Link::Up(session);
                match checked.and_then(|()| self.replay_config()) {
                    Ok(()) => {}
                    Err(error) if error.is_gone() => return self.lose(&error),
                    Err(error) => return self.quarantine(&error.to_string()),
                }
                tracing::warn!(device = self.shared.name, generation, "backend is back");
                for (completion, _) in self.resets.drain(..) {
                    completion.complete(0);
                }
                self.hand_over();
            }
            Err(error) if error.is_hopeless() => self.quarantine(&error.to_string()),
            Err(error) => {
                let wait = self.backoff.next();
                self.link = Link::Down { retry_at: Instant::now() + wait };
                tracing::warn!(device = self.shared.name, generation, %error, ?wait, "no backend yet");
            }
        }
    }

    /// A successor must offer at least what the guest was shown; more is masked.
    fn compare(&self, session: &Session, offer: &DeviceOffer) -> Result<(), ConversationError> {
        let lacks = |what: String| Err(ConversationError::Lacks { what });
        let missing = self.shown.features & !offer.features;
        if missing != 0 {
            return lacks(feature_names(missing, self.shown.device_type));
        }
        let missing = self.protocol & !session.protocol();
        if !missing.is_empty() {
            return lacks(protocol_feature_names(missing.bits()));
        }
        if offer.queue_sizes.len() < self.shown.queue_sizes.len() {
            return lacks(format!("{} queues (it has {})", self.shown.queue_sizes.len(), offer.queue_sizes.len()));
        }
        // A backend that lived on behind its socket may still have what the driver wrote.
        let known = self.shown.config.iter().zip(&self.config);
        let differs = known.zip(&offer.config).position(|((shown, written), new)| new != shown && new != written);
        match differs {
            // virtio 1.2, 5.2.4: what differs when an image was resized behind our back.
            Some(0..8) if self.shown.device_type == VIRTIO_ID_BLOCK as u16 => {
                lacks("the capacity that the guest was shown (was its image resized?)".into())
            }
            Some(offset) => lacks(format!("the configuration that the guest was shown (it differs at byte {offset})")),
            None => Ok(()),
        }
    }

    /// Repeats what the driver wrote into the configuration space.
    fn replay_config(&mut self) -> Result<(), ConversationError> {
        let Link::Up(session) = &mut self.link else { return Ok(()) };
        let written: Vec<(u32, u8)> = (0..)
            .zip(self.config.iter().zip(&self.shown.config))
            .filter(|(_, (now, shown))| now != shown)
            .map(|(offset, (now, _))| (offset, *now))
            .collect();
        if written.is_empty() {
            return Ok(());
        }
        session.conversation.perform(move |wire| {
            written.into_iter().try_for_each(|(offset, byte)| session::set_config(wire, offset, &[byte]))
        })
    }

    /// No backend serves the driver until it resets the device.
    fn quarantine(&mut self, why: &str) {
        let device = &self.shared.name;
        tracing::error!(device, generation = self.generation, why, "device quarantined until its driver resets it");
        let link = std::mem::replace(&mut self.link, Link::Quarantined);
        if let Link::Up(session) = link {
            session.give_up(Instant::now() + REAP);
        }
        self.shared.update(|status| status.state = DeviceState::Quarantined { why: why.to_owned() });
        self.activation = None;
        self.transport.needs_reset();
    }

    fn call_mut(&mut self, index: u16) -> Option<(&mut CallPath, &mut Session)> {
        let (Link::Up(session), Some(driver)) = (&mut self.link, &mut self.driver) else { return None };
        let at = driver.queues.iter().position(|queue| queue.index == index)?;
        driver.calls.get_mut(at).map(|call| (call, session))
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

    fn stop(mut self, deadline: Instant) {
        // What follows has a deadline of its own.
        self.shared.ending.store(false, Ordering::Relaxed);
        self.activation = None;
        let left = deadline.saturating_duration_since(Instant::now());
        self.parts.limits.drain = self.parts.limits.drain.min(left.max(Duration::from_millis(100)));
        self.take_rings_back();
        if let Link::Up(mut session) = std::mem::replace(&mut self.link, Link::Quarantined) {
            session.conversation.hang_up();
            if let Some(process) = &mut session.process {
                let end = process.finish(deadline);
                tracing::debug!(device = self.shared.name, end, "backend ended");
            }
        }
        self.shared.update(|status| status.state = DeviceState::Stopped);
    }
}
