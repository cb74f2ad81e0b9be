//! What becomes of the driver's rings while no backend serves them: who knows what the last one had taken, and who answers
//! instead of it.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::Worker;
use super::rings::Driver;
use crate::vhost::inflight::InflightRegion;
use crate::vhost::rings::RingPosition;
use crate::vhost::standin::{StandIn, StandInParts, StandInRing, Stock, Trade, settle};
use crate::vhost::window::Window;
use atoll_devices::virtio::QueueConfig;

/// What the last backend had taken of a ring. An error says why nobody knows.
pub(super) fn stock(
    memory: &GuestMemoryMmap,
    driver: &Driver,
    region: Option<&InflightRegion>,
    in_order: bool,
    queue: &QueueConfig,
) -> Result<Stock, String> {
    let index = queue.index;
    if let Some((_, base)) = driver.bases.iter().find(|(ring, _)| *ring == index) {
        return Ok(Stock { next_avail: *base, unfinished: Vec::new() });
    }
    if !driver.ran {
        return Ok(Stock::default());
    }
    if let Some((_, stock)) = driver.stocks.iter().find(|(ring, _)| *ring == index) {
        return stock.clone();
    }
    let position = RingPosition::read(memory, queue).ok_or("the ring is not in RAM")?;
    let used = position.used;
    if let Some(region) = region {
        let unfinished = region.unfinished(index, queue.size, used).map_err(|error| error.to_string())?;
        let taken = u16::try_from(unfinished.len()).unwrap_or(u16::MAX);
        return Ok(Stock { next_avail: used.wrapping_add(taken), unfinished });
    }
    if in_order || position.is_idle() || !driver.had(index) {
        return Ok(Stock { next_avail: used, unfinished: Vec::new() });
    }
    Err("nobody kept account of what the backend had taken".into())
}

impl Worker {
    /// What a stand-in needs for the driver's rings. Rings of which nobody knows what was taken are told apart.
    fn stand_in_parts(&self) -> Option<(StandInParts, Vec<(u16, String)>)> {
        let driver = self.driver.as_ref()?;
        let memory = self.parts.memory.mapped();
        let (mut rings, mut unknown) = (Vec::new(), Vec::new());
        for (queue, call) in driver.queues.iter().zip(&driver.calls) {
            let stock = stock(memory, driver, self.past.inflight.as_deref(), self.parts.makers.class.in_order(), queue);
            let kick = self.shared.doorbells.get(usize::from(queue.index));
            let kick = kick.ok_or_else(|| "the device has no such queue".to_owned());
            let ring = stock.and_then(|stock| {
                let copied = |error: std::io::Error| error.to_string();
                let kick = kick?.backend_event().try_clone().map_err(copied)?;
                let call = call.event().try_clone().map_err(copied)?;
                Ok(StandInRing { queue: *queue, kick, call, stock })
            });
            match ring {
                Ok(ring) => rings.push(ring),
                Err(why) => unknown.push((queue.index, why)),
            }
        }
        let shown = &self.past.shown;
        let parts = StandInParts {
            name: self.shared.name.clone(),
            memory: Arc::clone(memory),
            window: Arc::new(Window::new(memory, self.parts.behind.clone())),
            features: driver.features,
            trade: Trade::of(shown.device_type, driver.features, &shown.config),
            rings,
        };
        Some((parts, unknown))
    }

    /// Has a stand-in take the driver's rings. No backend may have them, the writes of the last one are done, and the gate
    /// has let the rings out.
    ///
    /// # Errors
    /// When there is nobody to do it.
    pub(super) fn employ_stand_in(&mut self) -> Result<(), String> {
        let Some((parts, unknown)) = self.stand_in_parts() else { return Ok(()) };
        for (queue, why) in unknown {
            let device = &self.shared.name;
            tracing::error!(device, queue, why, "a queue gets no answers; only a reset by its driver leads on");
        }
        let alarm = self.shared.wake.try_clone().map_err(|error| error.to_string())?;
        self.stand_in = Some(StandIn::start(parts, alarm).map_err(|error| error.to_string())?);
        Ok(())
    }

    /// The IOMMU has taken something back: what the stand-in does by the old map is over when this is, and it goes on by the
    /// new one, if the rings are still where they were.
    pub(super) fn change_stand_in(&mut self) {
        let refused = self.stand_in.as_ref().map(StandIn::refused).unwrap_or_default();
        if !self.dismiss_stand_in() {
            return;
        }
        self.tell_faults(refused);
        if let Some(why) = self.moved() {
            tracing::warn!(device = self.shared.name, why, "the driver took its rings back while they were in use");
            self.transport.needs_reset();
        } else if let Err(why) = self.employ_stand_in() {
            tracing::warn!(device = self.shared.name, why, "no stand-in");
        }
    }

    /// Takes the rings back from the stand-in, if there is one: where it has served them, nothing is in flight. Whether
    /// there was one.
    pub(super) fn dismiss_stand_in(&mut self) -> bool {
        let Some(stand_in) = self.stand_in.take() else { return false };
        let bases = stand_in.stop();
        self.go_on_from(bases);
        true
    }

    /// Nothing is in flight in these rings, and whoever serves them next goes on with those entries.
    fn go_on_from(&mut self, bases: Vec<(u16, u16)>) {
        let Some(driver) = &mut self.driver else { return };
        for (index, base) in &bases {
            driver.bases.retain(|(ring, _)| ring != index);
            driver.stocks.retain(|(ring, _)| ring != index);
            if driver.unfinished.is_some_and(|(ring, _)| ring == *index) {
                driver.unfinished = None;
            }
            if let Some(region) = &self.past.inflight
                && let Err(error) = region.settle(*index, *base)
            {
                tracing::error!(device = self.shared.name, %error, "the record of requests in flight was not cleared");
            }
        }
        driver.bases.extend(bases);
        // What the rings hold from now on has been taken by somebody.
        driver.ran = true;
    }

    /// Gives up what the last backend had taken and not completed, so that the next one can go on behind it.
    ///
    /// # Errors
    /// When nobody knows what that is, or what to answer.
    pub(super) fn settle(&mut self) -> Result<(), String> {
        let Some((parts, unknown)) = self.stand_in_parts() else { return Ok(()) };
        if let Some((queue, why)) = unknown.into_iter().next() {
            return Err(format!("the backend died with unfinished requests in queue {queue}, and {why}"));
        }
        let bases = settle(parts).map_err(|queue| {
            format!(
                "the backend died with unfinished requests in queue {queue}, and nobody knows what to answer; use \
                 track=shadow"
            )
        })?;
        self.go_on_from(bases);
        Ok(())
    }

    /// A backend that had the rings has been reaped, or has given them back: the account of what it had taken is closed.
    pub(super) fn lost_rings(&mut self) {
        let stocks = match (self.shadow.take(), self.ledger.take()) {
            (Some(shadow), _) => shadow.close().into_iter().map(|(queue, stock)| (queue, Ok(stock))).collect(),
            (None, Some(ledger)) => ledger.close(),
            (None, None) => return,
        };
        let Some(driver) = &mut self.driver else { return };
        if self.parts.makers.is_shadowed() {
            // What it says about its own rings means nothing for the driver's.
            driver.bases.clear();
        }
        driver.stocks = stocks;
    }
}
