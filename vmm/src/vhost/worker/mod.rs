//! The device's own thread: it carries out what the driver wants and what the recovery machine decides.
//!
//! What happens (a request of the driver, a hang-up, an exit, a step past its deadline, a queue that stands) goes as an event to the
//! [`Machine`]; what it answers is carried out in `hands`, and what comes of that is the next event. A successor is
//! prepared on a thread of its own (`next`), so that this one hears everybody meanwhile; everything else that waits here
//! has a deadline.
//!
//! Nothing of a failed conversation is kept: the next one replays all of it on a fresh socket. Kicks pile up in the
//! doorbells meanwhile. After a death each ring starts from its used index. Requests that the dead process had taken are
//! in the in-flight region, from which its successor resubmits them and goes on behind them in the available ring: its
//! base is the used index plus the number in flight, and it computes that by itself. (Sending the sum would be the
//! clearer message, but the backends that exist expect the used index, and one adds to it.) Then every ring is kicked
//! and called once, because the last kick or call before the death may be lost.

mod beside;
mod carrier;
mod compare;
mod config;
mod draw;
mod hands;
mod link;
mod next;
mod resize;
mod rings;
mod standin;
mod translate;

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use atoll_devices::Completion;
use atoll_devices::virtio::{DeviceOffer, Intent, QueueConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

pub use carrier::LinkError;
pub(super) use compare::Shown;
pub(crate) use hands::is_traced;
pub(super) use link::{Session, SessionParts};
pub use resize::ResizeError;

use super::back_channel::BackChannel;
use super::call::{CallPath, Transport};
use super::device::{DeviceState, Shared, SwitchError};
use super::error::{ConversationError, Step};
use super::fault;
use super::inflight::InflightRegion;
use super::ledger::Ledger;
use super::parts::Parts;
use super::recovery::{Event, Failure, Machine, Rules};
use super::request::Request;
use super::rings::in_ram;
use super::session;
use super::shadow::{Shadow, ShadowFault};
use super::standin::StandIn;
use crate::actor::Moment;
use crate::doorbell::{Interposer, RelayedEvent};
use crate::irq::VectorTable;
use crate::machine::LinkState;
use beside::{Greeted, Upgrade};
use hands::FenceWatch;
use next::Preparation;
use rings::Driver;

/// How long a backend may finish what is in flight when its device stops for good: nobody waits for those requests any
/// more, and one that is stuck must not keep the machine from ending.
const STOP_DRAIN: Duration = Duration::from_secs(1);
/// The same when the driver resets the device, as a guest does before it switches itself off: it has given those requests
/// up. A backend that is stuck is replaced, and nothing is lost with it that anybody waits for.
const RESET_DRAIN: Duration = Duration::from_secs(2);
/// How long the proof is waited for that a dead backend's writes are done when its device stops for good.
const STOP_FENCE: Duration = Duration::from_secs(1);
/// How long its process may take to end by itself when its device stops for good.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// How long calls may take through the relay when their way has just been switched.
const FLUSH_TIME: Duration = Duration::from_millis(100);

/// What outlives a board: everything that is agreed with the backend and promised to the guest.
pub(super) struct Past {
    /// What the guest is shown.
    pub(super) shown: DeviceOffer,
    /// Protocol features of the first backend.
    protocol: Protocol,
    /// The backend that is there.
    session: Option<Box<Session>>,
    /// One that was killed and has not ended yet.
    dying: Option<Box<Session>>,
    /// Those that are there and wait to be promoted.
    greeted: Vec<Greeted>,
    /// Another build that the operator asked for.
    upgrade: Option<Upgrade>,
    /// The program before the last that was promoted.
    former: Option<PathBuf>,
    /// Why the last build that was tried was given up after all.
    rolled_back: Option<String>,
    machine: Machine,
    inflight: Option<Arc<InflightRegion>>,
    /// Sectors that the operator gave it last, if he did: what a successor shows then is no surprise.
    capacity: Option<u64>,
    /// Whether the operator has plugged the cable of a network card in.
    link: LinkState,
}

impl Past {
    /// The past of a new device.
    pub(super) fn new(session: Box<Session>, shown: DeviceOffer, rules: Rules) -> Self {
        let (protocol, machine) = (session.protocol(), Machine::new(rules, session.recovery()));
        Self {
            shown,
            protocol,
            session: Some(session),
            dying: None,
            greeted: Vec::new(),
            upgrade: None,
            former: None,
            rolled_back: None,
            machine,
            inflight: None,
            capacity: None,
            link: LinkState::Up,
        }
    }

    /// Ends the backend of a device that is put on no board.
    pub(super) fn give_up(&mut self, deadline: Instant) {
        for session in self.session.iter_mut().chain(&mut self.dying) {
            session.give_up(deadline);
        }
    }
}

/// Somebody waits for this device to leave its board.
struct Leaving {
    deadline: Instant,
    answer: SyncSender<(Parts, Past)>,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    parts: Parts,
    past: Past,
    /// The configuration space with the driver's writes.
    config: Vec<u8>,
    /// What a successor shows.
    new_config: Option<Vec<u8>>,
    vectors: Arc<VectorTable>,
    transport: Arc<dyn Transport>,
    driver: Option<Driver>,
    ring_errors: Option<RelayedEvent>,
    activation: Option<Completion>,
    resets: Vec<Completion>,
    /// Requests of the backend's own are heard again from then on.
    listen_at: Instant,
    /// The backend says that its configuration space has changed.
    config_is_stale: bool,
    /// Incarnations that are being made.
    nexts: Vec<Preparation>,
    /// Those that nobody wants any more and that have not ended.
    cancelled: Vec<Preparation>,
    /// The dead are being looked after.
    fence: Option<FenceWatch>,
    /// Stands between the driver's rings and the backend's, where it was asked to.
    shadow: Option<Shadow>,
    /// Keeps account of what the backend has taken, where it does not.
    ledger: Option<Ledger>,
    /// Answers the driver while no backend does.
    stand_in: Option<StandIn>,
    leaving: Option<Leaving>,
    /// How long a drain may take that the driver or the end asked for.
    drain: Duration,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        parts: Parts,
        past: Past,
        vectors: Arc<VectorTable>,
        transport: Arc<dyn Transport>,
    ) -> Self {
        Self {
            shared,
            drain: parts.limits.drain,
            parts,
            config: past.shown.config.clone(),
            new_config: None,
            past,
            vectors,
            transport,
            driver: None,
            ring_errors: None,
            activation: None,
            resets: Vec::new(),
            listen_at: Instant::now(),
            config_is_stale: false,
            nexts: Vec::new(),
            cancelled: Vec::new(),
            fence: None,
            shadow: None,
            ledger: None,
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
        self.draw_for_the_display();
        self.feed(Event::Arrive);
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
                    Request::Resize { size, answer } => {
                        let _ = answer.send(self.resize(size));
                    }
                    Request::SetLink { link, answer } => {
                        let _ = answer.send(self.set_link(link));
                    }
                    Request::Pause => self.pause(),
                    Request::Resume { answer } => {
                        self.feed(Event::Resume);
                        self.update_config();
                        let _ = answer.send(Ok(()));
                    }
                    Request::Translate { change, answer } => {
                        self.translate(change);
                        let _ = answer.send(());
                    }
                    Request::Draw => self.draw(),
                    Request::Revive => self.feed(Event::Revive),
                    Request::Upgrade { order, answer } => self.begin_upgrade(order, answer),
                    Request::Break { nonsense } => self.break_conversation(nonsense),
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
        let clock = &self.parts.clock;
        let (now, mut nap) = (Instant::now(), None);
        let mut no_longer_than = |time: Duration| nap = Some(nap.map_or(time, |nap: Duration| nap.min(time)));
        if let Some(session) = &self.past.session {
            fds.push(PollFd::new(session.conversation.socket(), PollFlags::IN | PollFlags::RDHUP));
            if let Some(process) = &session.process {
                fds.push(PollFd::from_borrowed_fd(process.ended(), PollFlags::IN));
            }
            if let Some(requests) = &session.requests {
                if self.listen_at <= now {
                    fds.push(PollFd::new(requests.socket(), PollFlags::IN));
                } else {
                    no_longer_than(self.listen_at.saturating_duration_since(now));
                }
            }
        }
        for greeted in &self.past.greeted {
            fds.extend(greeted.descriptors());
        }
        if let Some(process) = self.past.dying.as_ref().and_then(|session| session.process.as_ref()) {
            fds.push(PollFd::from_borrowed_fd(process.ended(), PollFlags::IN));
        }
        let moments = [self.past.machine.due_at(), self.past.machine.look_at()];
        moments.into_iter().flatten().for_each(|moment| no_longer_than(clock.nap(moment)));
        if let Some(nap) = self.spare_nap() {
            no_longer_than(nap);
        }
        if let Some(leaving) = &self.leaving {
            no_longer_than(leaving.deadline.saturating_duration_since(now));
        }
        if let Some(fence) = &self.fence {
            no_longer_than(fence.nap());
        }
        let timeout = nap.map(|nap| {
            // Rounded up, so that waking up early does not become a spin.
            let nap = nap + Duration::from_micros(100);
            Timespec {
                tv_sec: i64::try_from(nap.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(nap.subsec_nanos()),
            }
        });
        // An error (a signal) is a wake-up like any other.
        let _ = poll(&mut fds, timeout.as_ref());
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.shared.wake, &mut count);
    }

    fn now(&self) -> Moment {
        self.parts.clock.now()
    }

    /// Deals with what has happened by itself: a death, a successor that is ready, a wait that is over.
    fn look_after(&mut self) {
        match self.shadow.as_ref().and_then(Shadow::fault) {
            Some(ShadowFault::Backend(what)) => self.lose(&ConversationError::Absurd { step: Step::Idle, what }),
            Some(ShadowFault::Driver(what)) => {
                tracing::warn!(device = self.shared.name, what, "a ring is not served any more");
                self.transport.needs_reset();
            }
            None => {}
        }
        let mut refused = self.shadow.as_ref().map(Shadow::refused).unwrap_or_default();
        refused.extend(self.stand_in.as_ref().map(StandIn::refused).unwrap_or_default());
        self.tell_faults(refused);
        match self.past.session.as_ref().map(|session| session.over()) {
            Some(Some(why)) => self.lose(&ConversationError::Gone { step: Step::Idle, reason: why.into() }),
            Some(None) => self.hear_backend(),
            None => {}
        }
        self.look_at_the_dead();
        self.look_at_the_next();
        self.look_beside();
        self.look_at_the_rings();
        if self.past.machine.due_at().is_some_and(|due| due <= self.now()) {
            self.feed(Event::Time);
        }
    }

    /// The backend is to be taken for dead.
    pub(super) fn lose(&mut self, error: &ConversationError) {
        if let Some(generation) = self.past.machine.alive() {
            self.feed(Event::Lost { generation, why: error.to_string() });
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
            self.forget_driver(Event::Reset, self.parts.limits.drain);
        }
        let (queues, behind) = match self.locate(features, queues) {
            Ok(located) => located,
            Err(why) => {
                tracing::warn!(device = self.shared.name, %why, "the driver's queues cannot be served");
                self.transport.needs_reset();
                return;
            }
        };
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
                tracing::error!(device = self.shared.name, %error, "the driver's queues cannot be called");
                self.transport.needs_reset();
                return;
            }
        };
        // Only what was shown can have been accepted; the transport has checked that, and a backend believes it.
        let features = features & self.past.shown.features;
        self.shared.begin_queues(&queues);
        let mut driver = Driver::new(features, queues, calls);
        driver.behind = behind;
        self.driver = Some(driver);
        self.activation = Some(completion);
        self.feed(Event::Activated);
    }

    fn reset(&mut self, completion: Completion) {
        self.activation = None;
        self.resets.push(completion);
        self.forget_driver(Event::Reset, RESET_DRAIN);
    }

    /// The driver goes, in the way that the event says; a backend that has its rings may take so long to finish.
    fn forget_driver(&mut self, event: Event, drain: Duration) {
        self.shared.end_queues();
        self.drain = self.parts.limits.drain.min(drain);
        self.feed(event);
        self.driver = None;
    }

    /// The gate has been closed: nobody may have the rings until it opens.
    fn pause(&mut self) {
        if self.shared.gate.is_closed() {
            self.drain = self.parts.limits.drain;
            self.feed(Event::Pause);
        }
    }

    /// A fault that was asked for. What follows is what follows when it happens by itself.
    fn break_conversation(&mut self, nonsense: Option<u64>) {
        let Some(session) = &mut self.past.session else { return };
        match nonsense {
            None => session.conversation.hang_up(),
            Some(seed) => match BackChannel::new() {
                Ok((channel, backends)) => {
                    // Fails only when nobody reads, and then the channel is closed, which is a fault too.
                    let _ = (&backends).write_all(&fault::nonsense(seed));
                    session.requests = Some(channel);
                }
                Err(error) => tracing::warn!(device = self.shared.name, %error, "no channel for a fault"),
            },
        }
    }

    fn call_mut(&mut self, index: u16) -> Option<(&mut CallPath, &mut Session)> {
        let session = self.past.session.as_mut().filter(|session| session.has_rings)?;
        let driver = self.driver.as_mut()?;
        let at = driver.queues.iter().position(|queue| queue.index == index)?;
        driver.calls.get_mut(at).map(|call| (call, &mut **session))
    }

    fn switch_call(&mut self, index: u16, interposer: Option<Arc<dyn Interposer>>) -> Result<(), SwitchError> {
        let relay = Arc::clone(&self.parts.relay);
        let (call, _) = self.call_mut(index).ok_or(SwitchError::NotRunning(index))?;
        let old = call.switch(interposer, &relay)?;
        let event = call.event().try_clone()?;
        let told = match (&self.shadow, &mut self.past.session) {
            (Some(shadow), _) => {
                shadow.set_call(index, event);
                Ok(())
            }
            (None, Some(session)) => session.conversation.perform(move |wire| session::set_call(wire, index, &event)),
            (None, None) => Ok(()),
        };
        // Only now: the other end may have signalled the old way until it was told of the new one.
        drop(old);
        // What the backend said on being told has gone through when whoever asked for the switch hears of it.
        if !relay.flush(Instant::now() + FLUSH_TIME) {
            tracing::debug!(device = self.shared.name, "the relay is slow");
        }
        told.map_err(|error| {
            let reason = error.to_string();
            self.lose(&error);
            SwitchError::Conversation(ConversationError::Gone { step: Step::SetVringCall(index), reason })
        })
    }

    /// Gives the rings back to the gate's keeper, whatever becomes of the backend.
    fn prepare_to_leave(&mut self, deadline: Instant, answer: SyncSender<(Parts, Past)>) {
        let now = Instant::now();
        self.activation = None;
        self.resets.clear();
        self.forget_driver(Event::Leave, deadline.saturating_duration_since(now));
        self.forget_driver_config();
        self.leaving = Some(Leaving { deadline: deadline.min(now + self.parts.limits.fence), answer });
    }

    /// Whoever waits for this device, if it can go: nothing of a dead backend can land in its memory, or that was waited for.
    fn may_leave(&mut self) -> Option<SyncSender<(Parts, Past)>> {
        let Leaving { deadline, .. } = self.leaving.as_ref()?;
        let cut = *deadline <= Instant::now() || self.shared.ending.load(Ordering::Relaxed);
        if !self.past.machine.may_leave() && !cut {
            return None;
        }
        // The next board's thread makes others.
        self.nexts.clear();
        self.cancelled.clear();
        self.leaving.take().map(|leaving| leaving.answer)
    }

    fn stop(mut self, deadline: Instant) {
        // What follows has a deadline of its own.
        self.shared.ending.store(false, Ordering::Relaxed);
        self.activation = None;
        self.resets.clear();
        let left = deadline.saturating_duration_since(Instant::now());
        self.forget_driver(Event::Stop, STOP_DRAIN.min(left.max(Duration::from_millis(100))));
        self.nexts.clear();
        self.cancelled.clear();
        let fenced = deadline.min(Instant::now() + STOP_FENCE);
        while !self.past.machine.may_leave() && Instant::now() < fenced {
            std::thread::sleep(Duration::from_millis(1));
            self.look_at_the_dead();
        }
        if let Some(mut session) = self.past.session.take() {
            session.conversation.hang_up();
            if let Some(process) = &mut session.process {
                let end = process.finish(deadline.min(Instant::now() + STOP_GRACE));
                tracing::debug!(device = self.shared.name, end, "backend ended");
            }
        }
        self.shared.update(|status| (status.state, status.pid) = (DeviceState::Stopped, None));
    }
}
