//! Handing the driver's rings to a backend, and taking them back: at the driver's wish, for a pause, for a new board.

use std::sync::Arc;
use std::time::Duration;

use atoll_devices::virtio::device_class::BLOCK;
use atoll_devices::virtio::{DeviceOffer, QueueConfig};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::standin::stock;
use super::{Session, Worker};
use crate::doorbell::{Interposer, Verdict};
use crate::vhost::call::CallPath;
use crate::vhost::class::{answers, holds_requests};
use crate::vhost::device::{Recovery, Shared};
use crate::vhost::error::{ConversationError, Step};
use crate::vhost::iotlb::{ACCESS_PLATFORM, Behind};
use crate::vhost::ledger::Ledger;
use crate::vhost::parts::{Limits, Parts};
use crate::vhost::recovery::Sample;
use crate::vhost::rings::RingPosition;
use crate::vhost::session::{self, InflightPlan, RingPlan, StartPlan, ToldAt};
use crate::vhost::shadow::{Shadow, ShadowRing, Terms};
use crate::vhost::standin::{Answer, Stock, Trade};
use crate::vhost::window::Window;

const INDIRECT: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

/// What the driver has set up.
pub(super) struct Driver {
    pub(super) features: u64,
    /// At guest-physical addresses.
    pub(super) queues: Vec<QueueConfig>,
    /// As the driver has set them up, behind an IOMMU.
    pub(super) behind: Option<Vec<QueueConfig>>,
    pub(super) calls: Vec<CallPath>,
    /// Some backend has had the rings: what they hold may have been taken already.
    pub(super) ran: bool,
    /// Used indices of the queues that a backend has, when it got them.
    used_at_start: Vec<(QueueConfig, u16)>,
    /// The first queue in which the last backend that had the rings left requests unfinished, and how many.
    pub(super) unfinished: Option<(u16, u16)>,
    /// Where whoever had the rings last wants the next one to go on, in those that were given back with nothing in flight.
    pub(super) bases: Vec<(u16, u16)>,
    /// What the last backend had taken, where the VMM has kept account of it; or why that account is worth nothing.
    pub(super) stocks: Vec<(u16, Result<Stock, String>)>,
}

impl Driver {
    pub(super) fn new(features: u64, queues: Vec<QueueConfig>, calls: Vec<CallPath>) -> Self {
        let (used_at_start, bases, stocks) = (Vec::new(), Vec::new(), Vec::new());
        Self { features, queues, behind: None, calls, ran: false, used_at_start, unfinished: None, bases, stocks }
    }
    /// Where a backend is told that the ring of a queue is.
    fn told_at(&self, index: u16) -> ToldAt {
        let asked = self.behind.iter().flatten().find(|queue| queue.index == index);
        asked.map_or(ToldAt::Memory, |queue| {
            ToldAt::Iommu([queue.descriptor_table, queue.available_ring, queue.used_ring])
        })
    }
    /// Whether the last backend had the ring of queue `index`.
    pub(super) fn had(&self, index: u16) -> bool {
        self.used_at_start.iter().any(|(queue, _)| queue.index == index)
    }
    /// Looks at the rings after a backend's death. What the driver adds later, no backend has seen.
    pub(super) fn take_stock(&mut self, memory: &GuestMemoryMmap) {
        self.bases.clear();
        self.unfinished = self.used_at_start.iter().find_map(|(queue, _)| {
            let position = RingPosition::read(memory, queue)?;
            (!position.is_idle()).then(|| (queue.index, position.available.wrapping_sub(position.used)))
        });
    }
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
    /// Whether the backend has completed a request since it got the rings.
    pub(super) fn has_progressed(&self) -> bool {
        let Some(driver) = &self.driver else { return false };
        driver.used_at_start.iter().any(|(queue, used)| {
            RingPosition::read(self.parts.memory.mapped(), queue).is_some_and(|position| position.used != *used)
        })
    }

    /// Hands the rings to the backend, each from its beginning or from where it is.
    pub(super) fn start_rings(&mut self, continued: bool) -> Result<(), ConversationError> {
        let unplugged = self.unplugged();
        let (Some(session), Some(driver)) = (&mut self.past.session, &mut self.driver) else { return Ok(()) };
        let local = |step| move |source| ConversationError::Local { step, source };
        if self.ring_errors.is_none() {
            let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
            let listener = Arc::new(RingErrors(self.shared.name.clone()));
            let (from, to) = event().and_then(|from| Ok((from, event()?))).map_err(local(Step::SetVringErr(0)))?;
            let relayed = self.parts.relay.carry(from, to, listener).map_err(std::io::Error::other);
            self.ring_errors = Some(relayed.map_err(local(Step::SetVringErr(0)))?);
        }
        let mut rings = Vec::new();
        driver.used_at_start.clear();
        let served = driver.queues.iter().zip(&driver.calls).filter(|(queue, _)| queue.index < session.served);
        for (queue, call) in served {
            let index = queue.index;
            let position = RingPosition::read(self.parts.memory.mapped(), queue).ok_or_else(|| {
                ConversationError::Absurd { step: Step::SetVringBase(index), what: "the ring is not in RAM".into() }
            })?;
            driver.used_at_start.push((*queue, position.used));
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
                told: driver.told_at(index),
                enabled: !unplugged.contains(&index),
                base: match driver.bases.iter().find(|(ring, _)| *ring == index) {
                    Some((_, base)) => *base,
                    None if continued => position.used,
                    None => 0,
                },
                call: call.event().try_clone().map_err(local(Step::SetVringCall(index)))?,
                error: errors.map_err(local(Step::SetVringErr(index)))?,
                kick: kick.backend_event().try_clone().map_err(local(Step::SetVringKick(index)))?,
            });
        }
        // What the front end adds to an offer, no backend has to know; of an IOMMU nothing, where requests are copied.
        let mut features = driver.features & session.capabilities.features;
        if self.parts.makers.copies() {
            features &= !ACCESS_PLATFORM;
        }
        let shadowed = self.parts.makers.is_shadowed();
        if shadowed {
            let copying = copying(&self.parts, &self.past.shown, features);
            let shadow = shadow_rings(&self.shared, &self.parts, driver, &mut rings, copying.as_ref());
            self.shadow = Some(shadow.map_err(local(Step::SetMemTable))?);
        } else if session.recovery() == Recovery::IdleOnly {
            let ledger = start_ledger(&self.shared, &self.parts, driver, &rings);
            self.ledger = Some(ledger.map_err(local(Step::SetMemTable))?);
        }
        let inflight = match &self.past.inflight {
            _ if shadowed => InflightPlan::Without,
            Some(region) => InflightPlan::Keep(Arc::clone(region)),
            None => InflightPlan::Make {
                queues: u16::try_from(self.past.shown.queue_sizes.len()).unwrap_or(u16::MAX).min(session.served),
                queue_size: self.past.shown.queue_sizes.iter().copied().max().unwrap_or(1),
            },
        };
        let shadow = self.shadow.as_ref().map(|shadow| Arc::clone(shadow.memory()));
        let known = session.told.take(features, &self.parts.memory, self.past.inflight.as_ref());
        let copies = self.parts.makers.copies();
        let translations = self.parts.behind.as_ref().filter(|_| !copies).map(Behind::everything).unwrap_or_default();
        let memory = (!copies).then(|| self.parts.memory.clone());
        let plan = StartPlan { features, memory, inflight, shadow, translations, rings, known };
        driver.ran = true;
        driver.bases.clear();
        driver.stocks.clear();
        driver.unfinished = None;
        session.has_rings = true;
        let region = session.conversation.perform(move |wire| session::start(wire, plan))?;
        if self.past.inflight.is_none() {
            self.past.inflight = region;
        }
        Ok(())
    }

    /// Kicks every ring once, and calls it where that may have been lost too.
    pub(super) fn kick(&self, call_too: bool) {
        let Some(driver) = &self.driver else { return };
        for (queue, call) in driver.queues.iter().zip(&driver.calls) {
            if let Some(bell) = self.shared.doorbells.get(usize::from(queue.index)) {
                bell.nudge();
            }
            if call_too {
                call.signal();
            }
        }
    }

    /// Stops the backend's use of the rings, for which it may take as long as `limit`.
    pub(super) fn stop_rings(&mut self, limit: Duration) -> Result<(), ConversationError> {
        let (Some(session), Some(driver)) = (&mut self.past.session, &mut self.driver) else { return Ok(()) };
        driver.bases = stop_rings(session, driver, Limits { drain: limit, ..self.parts.limits })?;
        self.lost_rings();
        Ok(())
    }

    /// How far the queues are that a backend answers by itself.
    pub(super) fn sample(&self) -> Vec<Sample> {
        self.look_at_queues(answers).collect()
    }

    /// Whether some request waits for a backend.
    pub(super) fn has_requests(&self) -> bool {
        self.look_at_queues(holds_requests).any(|sample| sample.waiting)
    }

    fn look_at_queues(&self, which: fn(u16, u16) -> bool) -> impl Iterator<Item = Sample> {
        let device_type = self.past.shown.device_type;
        let queues = self.driver.iter().flat_map(|driver| &driver.used_at_start);
        queues.filter(move |(queue, _)| which(device_type, queue.index)).filter_map(|(queue, _)| {
            let position = RingPosition::read(self.parts.memory.mapped(), queue)?;
            Some(Sample { queue: queue.index, used: position.used, waiting: !position.is_idle() })
        })
    }
}

/// What the copies of each queue's requests are made by, where they are made.
fn copying(parts: &Parts, shown: &DeviceOffer, features: u64) -> Option<impl Fn(u16) -> Terms> {
    let window = Arc::new(Window::new(parts.memory.mapped(), parts.behind.clone()));
    let trade = Trade::of(shown.device_type, features, &shown.config);
    let (status_last, indirect) = (shown.device_type == BLOCK, features & INDIRECT != 0);
    let terms = move |queue| Terms {
        window: Arc::clone(&window),
        answer: trade.verdict(queue).unwrap_or(Answer::Drop),
        status_last,
        indirect,
    };
    parts.makers.copies().then_some(terms)
}

/// Puts a shadow between the driver's rings and those of `plans`, which are given others.
fn shadow_rings(
    shared: &Shared,
    parts: &Parts,
    driver: &Driver,
    plans: &mut [RingPlan],
    copying: Option<&impl Fn(u16) -> Terms>,
) -> std::io::Result<Shadow> {
    let mut rings = Vec::new();
    for plan in &*plans {
        let queue = driver.queues.iter().find(|queue| queue.index == plan.index).copied();
        let queue = queue.ok_or_else(|| std::io::Error::other("the driver has no such queue"))?;
        let stock = stock(parts.memory.mapped(), driver, None, parts.makers.class.in_order(), &queue);
        let stock = stock.map_err(std::io::Error::other)?;
        let copied = copying.map(|terms| terms(queue.index));
        rings.push(ShadowRing { queue, kick: plan.kick.try_clone()?, call: plan.call.try_clone()?, stock, copied });
    }
    let alarm = shared.wake.try_clone()?;
    let (shadow, handed) = Shadow::start(&shared.name, &parts.memory, driver.features, rings, alarm)?;
    for (plan, handed) in plans.iter_mut().zip(handed) {
        (plan.available_ring, plan.used_ring) = (handed.place.available_ring, handed.place.used_ring);
        (plan.base, plan.kick, plan.call) = (0, handed.kick, handed.call);
        if let Some(copies) = handed.place.copies {
            (plan.descriptor_table, plan.told) = (copies.table, ToldAt::Memory);
        }
    }
    Ok(shadow)
}

/// Keeps account of rings for a backend that does not.
fn start_ledger(shared: &Shared, parts: &Parts, driver: &Driver, plans: &[RingPlan]) -> std::io::Result<Ledger> {
    let queue = |plan: &RingPlan| {
        let queue = driver.queues.iter().find(|queue| queue.index == plan.index);
        queue.map(|queue| (*queue, plan.base))
    };
    Ledger::start(&shared.name, parts.memory.mapped(), plans.iter().filter_map(queue))
}

/// Has the backend give back the rings of `driver`. Says where it wants to go on in each.
fn stop_rings(
    session: &mut Session,
    driver: &mut Driver,
    limits: Limits,
) -> Result<Vec<(u16, u16)>, ConversationError> {
    let rings: Vec<u16> = driver.used_at_start.iter().map(|(queue, _)| queue.index).collect();
    session.conversation.set_step_limit(limits.drain);
    let asked = rings.clone();
    let stopped = session.conversation.perform(move |wire| session::stop(wire, &asked));
    session.conversation.set_step_limit(limits.step);
    let bases = stopped?;
    session.has_rings = false;
    Ok(rings.into_iter().zip(bases).collect())
}
