//! What happens when a backend is gone, until the next one has taken over or the device is given up.

use std::time::{Duration, Instant};

use atoll_devices::virtio::{DeviceOffer, device_class};

use super::{Link, Session, Worker};
use crate::config::OnFailure;
use crate::vhost::class::{changeable, too_few_queues};
use crate::vhost::device::{DeviceState, greet};
use crate::vhost::error::ConversationError;
use crate::vhost::features::{feature_names, kept, protocol_feature_names};

/// How long a killed process may take to be reaped.
const REAP: Duration = Duration::from_secs(5);

impl Worker {
    /// Gives up the backend and plans the next one.
    pub(super) fn lose(&mut self, error: &ConversationError) {
        let retry_at = Instant::now();
        let Link::Up(session) = std::mem::replace(&mut self.past.link, Link::Down { retry_at }) else { return };
        if self.has_progressed() {
            self.past.backoff.progress();
        }
        let had_rings = session.has_rings;
        let end = session.give_up(Instant::now() + REAP);
        if let (true, Some(driver)) = (had_rings, &mut self.driver) {
            driver.take_stock(self.parts.memory.mapped());
        }
        let wait = self.past.backoff.next();
        self.past.link = Link::Down { retry_at: Instant::now() + wait };
        self.shared.gate.lost();
        let device = &self.shared.name;
        tracing::warn!(device, generation = self.past.generation, %error, end, ?wait, "backend lost");
        let reason = end.clone().unwrap_or_else(|| error.to_string());
        self.shared.update(|status| {
            status.lost += 1;
            status.state = DeviceState::Recovering { why: error.to_string() };
            (status.pid, status.last_exit) = (None, Some(reason.clone()));
        });
        self.tell("crashed", Some(reason));
    }

    /// Tells the machine's story.
    fn tell(&self, event: &str, reason: Option<String>) {
        let known = [("id", self.shared.name.clone()), ("generation", self.past.generation.to_string())];
        self.parts.story.tell("device", event, known.into_iter().chain(reason.map(|reason| ("reason", reason))));
    }

    /// Brings up the next incarnation, with everything that the last one had.
    pub(super) fn revive(&mut self) {
        self.past.generation += 1;
        let generation = self.past.generation;
        match greet(&mut self.parts, generation, &self.shared.ending) {
            Ok((session, offer)) => {
                let (pid, recovery) = (session.pid(), session.recovery());
                self.shared.update(|status| {
                    status.generation = generation;
                    status.state = DeviceState::Idle;
                    (status.pid, status.recovery) = (pid, recovery);
                });
                let checked = self.compare(&session, &offer);
                self.past.link = Link::Up(session);
                match checked.and_then(|()| self.replay_config()) {
                    Ok(()) => {}
                    Err(error) if error.is_gone() => return self.lose(&error),
                    Err(error) => return self.quarantine(&error.to_string()),
                }
                tracing::warn!(device = self.shared.name, generation, "backend is back");
                self.tell("restarted", None);
                self.shared.gate.settled();
                self.adopt_config(&offer.config);
                for (completion, _) in self.resets.drain(..) {
                    completion.complete(0);
                }
                self.hand_over();
            }
            Err(error) if error.is_hopeless() => self.quarantine(&error.to_string()),
            Err(error) => {
                let wait = self.past.backoff.next();
                self.past.link = Link::Down { retry_at: Instant::now() + wait };
                tracing::warn!(device = self.shared.name, generation, %error, ?wait, "no backend yet");
            }
        }
    }

    /// A successor must offer at least what the guest was shown; more is masked.
    fn compare(&self, session: &Session, offer: &DeviceOffer) -> Result<(), ConversationError> {
        let lacks = |what: String| Err(ConversationError::Lacks { what });
        let missing = self.past.shown.features & !offer.features;
        if missing != 0 {
            return lacks(feature_names(missing, self.past.shown.device_type));
        }
        let missing = self.past.protocol & kept() & !session.protocol();
        if !missing.is_empty() {
            return lacks(protocol_feature_names(missing.bits()));
        }
        let shown = &self.past.shown;
        if offer.queue_sizes.len() < shown.queue_sizes.len() {
            let has = u16::try_from(offer.queue_sizes.len()).unwrap_or(u16::MAX);
            return Err(too_few_queues(shown.queue_sizes.len(), has));
        }
        // What a device may change while its driver runs, it may have changed meanwhile; not what the guest's data is in.
        let block = shown.device_type == device_class::BLOCK;
        // The capacity that the operator gave it is the exception.
        let given = self.past.capacity.is_some_and(|sectors| offer.config.starts_with(&sectors.to_le_bytes()));
        let may_differ = if block && !given { 0..0 } else { changeable(shown.device_type) };
        // A backend that lived on behind its socket may still have what the driver wrote.
        let known = shown.config.iter().zip(&self.config);
        let differing =
            (0..).zip(known.zip(&offer.config)).filter(|(_, ((shown, written), new))| new != shown && new != written);
        match differing.map(|(offset, _)| offset).find(|offset| !may_differ.contains(offset)) {
            // virtio 1.2, 5.2.4: what differs when an image was resized behind our back.
            Some(0..8) if block => lacks("the capacity that the guest was shown (was its image resized?)".into()),
            Some(offset) => lacks(format!("the configuration that the guest was shown (it differs at byte {offset})")),
            None => Ok(()),
        }
    }

    /// No backend serves the driver until it resets the device.
    pub(super) fn quarantine(&mut self, why: &str) {
        let device = &self.shared.name;
        tracing::error!(
            device,
            generation = self.past.generation,
            why,
            "device quarantined until its driver resets it"
        );
        let link = std::mem::replace(&mut self.past.link, Link::Quarantined);
        if let Link::Up(session) = link {
            let end = session.give_up(Instant::now() + REAP);
            self.shared.update(|status| status.last_exit = end.or_else(|| status.last_exit.take()));
        }
        self.shared.gate.bring_back();
        self.shared.update(|status| {
            status.state = DeviceState::Quarantined { why: why.to_owned() };
            status.pid = None;
        });
        self.tell("quarantined", Some(why.to_owned()));
        self.activation = None;
        if self.parts.on_failure == OnFailure::Wait {
            return;
        }
        self.transport.needs_reset();
        self.stand_in();
    }

    /// Lets a stand-in have the rings, if anybody may.
    pub(super) fn stand_in(&mut self) {
        let wanted = self.parts.on_failure != OnFailure::Wait && self.driver.is_some();
        if !wanted || !self.shared.gate.take_out() {
            return;
        }
        if let Err(error) = self.employ_stand_in() {
            tracing::error!(device = self.shared.name, error, "nobody answers for the device");
            self.shared.gate.bring_back();
        }
    }
}
