//! The supervisor: an actor that only receives.
//!
//! It hears from the spawner ([`BackendEvent`]) and from the bus ([`LifecycleEvent`]), lets each device's
//! [`RestartPolicy`] judge, and hands the decision to that device's [`Recovery`], which carries it out on a thread of its
//! own. It never calls a child and never waits for one, so that no child can keep it from hearing of another.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::{DeviceId, Generation, QueueIndex};
use tokio::sync::broadcast;

use super::event::{BackendEvent, BackendExit, EventKind, EventSink, Offer};
use super::policy::{Decision, Ending, PolicyConfig, QuarantineReason, RestartPolicy};
use crate::actor::{Actor, Address, Clock, Flow, Mail, Moment, Reply, Supervision, TellError, WhenFull};

/// Who carries out what the supervisor decides for one device. Called on the supervisor's task: it hands the decision on
/// and returns.
pub trait Recovery: Send {
    /// Start this incarnation and replay the device's negotiation. The outcome comes back as events, or as
    /// [`SupervisorMail::NotStarted`].
    fn start(&mut self, generation: Generation);

    /// The present incarnation is gone: stop from own knowledge, keep what the guest asks meanwhile. Says whether it had
    /// completed anything that it did not report itself.
    fn lost(&mut self, generation: Generation, exit: &BackendExit) -> bool;

    /// A stand-in takes the device.
    fn quarantine(&mut self, reason: &QuarantineReason);

    /// It stands: a queue, an access, or everything. Not every stall is a death (a debugger): the device's own policy
    /// decides whether to end the incarnation.
    fn stalled(&mut self, generation: Generation, queue: Option<QueueIndex>);
}

/// What the supervisor hears.
pub enum SupervisorMail {
    /// A device whose first incarnation is being started.
    Adopt {
        /// Which.
        device: DeviceId,
        /// That incarnation. Later than all that this device had before: what a predecessor's end still has to say must
        /// not be taken for its own.
        generation: Generation,
        /// How patient to be.
        config: PolicyConfig,
        /// Who carries out decisions.
        recovery: Box<dyn Recovery>,
    },
    /// A device is unplugged.
    Release(DeviceId),
    /// From the spawner.
    Backend(BackendEvent),
    /// From the bus.
    Bus(LifecycleEvent),
    /// An incarnation could not be started, or its negotiation failed.
    NotStarted {
        /// Which device.
        device: DeviceId,
        /// Which incarnation.
        generation: Generation,
    },
    /// A delay is over.
    Due(DeviceId),
    /// The guest was reset, or an operator wants it back.
    Revive(DeviceId),
    /// Which incarnation is it, and is one running?
    Ask {
        /// Which device.
        device: DeviceId,
        /// The answer; none for an unknown device.
        reply: Reply<Option<(Generation, bool)>>,
    },
}

impl fmt::Debug for SupervisorMail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, device) = match self {
            Self::Adopt { device, .. } => ("Adopt", *device),
            Self::Release(device) => ("Release", *device),
            Self::Backend(event) => ("Backend", event.device),
            Self::Bus(event) => return write!(f, "Bus({event:?})"),
            Self::NotStarted { device, .. } => ("NotStarted", *device),
            Self::Due(device) => ("Due", *device),
            Self::Revive(device) => ("Revive", *device),
            Self::Ask { device, .. } => ("Ask", *device),
        };
        write!(f, "{word}({device})")
    }
}

impl Mail for SupervisorMail {
    fn when_full(&self) -> WhenFull {
        match self {
            // The spawner offers it again; a stall is repeated by the next access.
            Self::Backend(_) | Self::Bus(_) => WhenFull::Refuse,
            _ => WhenFull::Wait,
        }
    }
}

impl EventSink for Address<SupervisorMail> {
    fn offer(&self, event: BackendEvent) -> Offer {
        match self.try_tell(SupervisorMail::Backend(event)) {
            Ok(()) => Offer::Taken,
            Err(TellError::Full { message: SupervisorMail::Backend(event), .. }) => Offer::Full(event),
            Err(_) => Offer::Gone,
        }
    }
}

impl Supervision for Address<SupervisorMail> {
    fn report(&self, event: LifecycleEvent) {
        // One that does not fit is counted by the address; the next stall tells the same.
        let _ = self.try_tell(SupervisorMail::Bus(event));
    }
}

struct Supervised {
    policy: RestartPolicy,
    recovery: Box<dyn Recovery>,
    /// Requests completed by the present incarnation, per queue, as last heard.
    completed: BTreeMap<QueueIndex, u64>,
}

/// The actor.
pub struct Supervisor {
    clock: Arc<dyn Clock>,
    devices: BTreeMap<DeviceId, Supervised>,
    /// What operators and tests may watch; a slow watcher misses the oldest.
    story: broadcast::Sender<LifecycleEvent>,
    /// Wakes the actor when a delay is over.
    timer: Timer,
}

type Timer = Box<dyn FnMut(DeviceId, Moment) + Send>;

impl fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Supervisor({} devices)", self.devices.len())
    }
}

impl Supervisor {
    /// A supervisor without devices, started in `tree`; its address, and the story of what it saw.
    pub fn start(
        tree: &crate::actor::Tree,
        runtime: &tokio::runtime::Handle,
        clock: Arc<dyn Clock>,
    ) -> (Address<SupervisorMail>, broadcast::Sender<LifecycleEvent>) {
        let (story, _) = broadcast::channel(256);
        // The actor needs its own address for its timers, which exists once it is started.
        let own: Arc<std::sync::OnceLock<Address<SupervisorMail>>> = Arc::default();
        let timer: Timer = Box::new({
            let (own, runtime, clock) = (Arc::downgrade(&own), runtime.clone(), Arc::clone(&clock));
            move |device, at| {
                let (own, clock) = (own.clone(), Arc::clone(&clock));
                runtime.spawn(async move {
                    while clock.now() < at {
                        tokio::time::sleep(clock.nap(at)).await;
                    }
                    // Weak, so that a timer does not keep the actor's mailbox open.
                    let address = own.upgrade().and_then(|own| own.get().cloned());
                    if let Some(address) = address {
                        let _ = address.tell(SupervisorMail::Due(device)).await;
                    }
                });
            }
        });
        let supervisor = Self { clock, devices: BTreeMap::new(), story: story.clone(), timer };
        let address = tree.start("supervisor", 256, Keeper { supervisor, _own: Arc::clone(&own) });
        let _ = own.set(address.clone());
        (address, story)
    }

    fn tell_story(&self, event: LifecycleEvent) {
        // Nobody watching is no error.
        let _ = self.story.send(event);
    }

    fn hear(&mut self, mail: SupervisorMail) {
        match mail {
            SupervisorMail::Adopt { device, generation, config, recovery } => {
                let policy = RestartPolicy::new(config, generation);
                self.devices.insert(device, Supervised { policy, recovery, completed: BTreeMap::new() });
            }
            SupervisorMail::Release(device) => {
                self.devices.remove(&device);
            }
            SupervisorMail::Backend(event) => self.hear_backend(event),
            SupervisorMail::Bus(event) => self.hear_bus(event),
            SupervisorMail::NotStarted { device, generation } => {
                let now = self.clock.now();
                self.judge(device, |supervised| supervised.policy.not_started(generation, now));
            }
            SupervisorMail::Due(device) => {
                let now = self.clock.now();
                self.judge(device, |supervised| supervised.policy.due(now));
            }
            SupervisorMail::Revive(device) => self.judge(device, |supervised| supervised.policy.revive()),
            SupervisorMail::Ask { device, reply } => {
                let state = self.devices.get(&device).map(|it| (it.policy.generation(), it.policy.is_running()));
                reply.send(state);
            }
        }
    }

    fn hear_backend(&mut self, event: BackendEvent) {
        let BackendEvent { device, generation, kind } = event;
        let now = self.clock.now();
        let Some(supervised) = self.devices.get_mut(&device) else { return };
        match kind {
            EventKind::Ready { .. } => {
                supervised.policy.ready(generation);
                supervised.completed.clear();
                self.tell_story(LifecycleEvent::DeviceReady { device, generation });
            }
            EventKind::Progress { queues } => {
                let mut moved = false;
                for queue in queues {
                    let before = supervised.completed.insert(queue.queue, queue.completed).unwrap_or(0);
                    moved |= queue.completed > before;
                }
                if moved {
                    supervised.policy.progress(generation);
                }
            }
            EventKind::Stalled { queue } => {
                supervised.recovery.stalled(generation, queue);
                if let Some(queue) = queue {
                    self.tell_story(LifecycleEvent::QueueStalled { device, generation, queue });
                }
            }
            EventKind::Quiesced | EventKind::Pong { .. } | EventKind::Measured { .. } => {}
            EventKind::Exited(exit) => {
                if supervised.recovery.lost(generation, &exit) {
                    supervised.policy.progress(generation);
                }
                self.tell_story(LifecycleEvent::DeviceDied { device, generation });
                self.judge(device, |supervised| supervised.policy.exited(generation, &Ending::from(&exit), now));
            }
        }
    }

    fn hear_bus(&mut self, event: LifecycleEvent) {
        if let LifecycleEvent::DeviceStalled { device, generation, .. } = event
            && let Some(supervised) = self.devices.get_mut(&device)
        {
            supervised.recovery.stalled(generation, None);
        }
        self.tell_story(event);
    }

    fn judge(&mut self, device: DeviceId, decide: impl FnOnce(&mut Supervised) -> Decision) {
        let Some(supervised) = self.devices.get_mut(&device) else { return };
        match decide(supervised) {
            Decision::Nothing => {}
            Decision::Start(generation) => {
                supervised.recovery.start(generation);
                self.tell_story(LifecycleEvent::DeviceRecovering { device, generation });
            }
            Decision::Wait(at) => (self.timer)(device, at),
            Decision::Quarantine(reason) => {
                tracing::error!(%device, ?reason, "given up until a reset or an operator");
                supervised.recovery.quarantine(&reason);
                self.tell_story(LifecycleEvent::DeviceQuarantined { device });
            }
            Decision::GiveUp => {
                tracing::error!(%device, "its process never got ready");
                self.tell_story(LifecycleEvent::DeviceQuarantined { device });
            }
        }
    }
}

/// The supervisor with its own address, which its timers share for as long as it lives.
struct Keeper {
    supervisor: Supervisor,
    _own: Arc<std::sync::OnceLock<Address<SupervisorMail>>>,
}

impl Actor for Keeper {
    type Message = SupervisorMail;

    async fn handle(&mut self, mail: SupervisorMail) -> Flow {
        self.supervisor.hear(mail);
        Flow::Continue
    }
}
