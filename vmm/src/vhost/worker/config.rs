//! The configuration space: what the driver writes goes to the backend, what the backend changes goes to the driver.

use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use super::translate::Questions;
use super::{Session, Worker};
use crate::vhost::class::{ConfigWish, changeable, event_fields};
use crate::vhost::conversation::Wire;
use crate::vhost::error::{ConversationError, Step};
use crate::vhost::session;
use crate::vhost::source::is_readable;

/// How long a backend that makes requests of its own is not heard again: it can keep its device's thread busy, not the
/// guest.
const PAUSE: Duration = Duration::from_millis(10);

impl Worker {
    pub(super) fn write_config(&mut self, offset: u32, data: Vec<u8>) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let field = start.checked_add(data.len()).and_then(|end| self.config.get_mut(start..end));
        let Some(field) = field else { return };
        field.copy_from_slice(&data);
        self.take_note_of_events();
        let Some(session) = &mut self.past.session else { return };
        if !session.protocol().contains(Protocol::CONFIG) {
            return;
        }
        match session.conversation.perform(move |wire| session::set_config(wire, offset, &data)) {
            Ok(()) => {}
            // A backend may refuse what the driver writes; that conversation is over, the next one does not repeat it.
            Err(error) => {
                if !error.is_gone() {
                    self.config.clone_from(&self.past.shown.config);
                }
                self.lose(&error);
            }
        }
    }

    /// The events of which the driver says that it knows are told no longer: one that is shown for ever hides the next one.
    fn take_note_of_events(&mut self) {
        let Some(fields) = event_fields(self.past.shown.device_type) else { return };
        let shown = self.past.shown.config.get_mut(fields.told.clone());
        let (Ok([read, clear]), Some(shown)) =
            (self.config.get_disjoint_mut([fields.told, fields.acknowledged]), shown)
        else {
            return;
        };
        let mut taken = false;
        for ((read, shown), clear) in read.iter_mut().zip(shown).zip(clear) {
            taken |= *read & *clear != 0;
            *read &= !*clear;
            (*shown, *clear) = (*read, 0);
        }
        if taken {
            self.transport.config_changed(&self.config);
        }
    }

    /// Repeats to a successor what the driver wrote into the configuration space.
    pub(super) fn replay_config(&self, session: &mut Session) -> Result<(), ConversationError> {
        let written: Vec<(u32, u8)> = (0..)
            .zip(self.config.iter().zip(&self.past.shown.config))
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

    /// Another driver comes, on another board: what the last one wrote is undone.
    pub(super) fn forget_driver_config(&mut self) {
        let written = std::mem::replace(&mut self.config, self.past.shown.config.clone());
        let Some(session) = &mut self.past.session else { return };
        let shown = self.past.shown.config.iter().zip(&written);
        let undone: Vec<(u32, u8)> = (0..)
            .zip(shown)
            .filter(|(_, (shown, now))| shown != now)
            .map(|(offset, (shown, _))| (offset, *shown))
            .collect();
        let undo = move |wire: &mut Wire| {
            undone.into_iter().try_for_each(|(offset, byte)| session::set_config(wire, offset, &[byte]))
        };
        if let Err(error) = session.conversation.perform(undo) {
            self.lose(&error);
        }
    }

    /// Hears what the backend wants.
    pub(super) fn hear_backend(&mut self) {
        let now = Instant::now();
        let Some(session) = &mut self.past.session else { return };
        if let Some(requests) = &mut session.requests
            && self.listen_at <= now
            && is_readable(requests.socket())
        {
            self.listen_at = now + PAUSE;
            // A backend of copies has nothing to ask.
            let behind = self.parts.behind.as_ref().filter(|_| !self.parts.makers.copies());
            let mut questions = Questions::new(behind);
            match requests.hear_with(&mut |miss| questions.judge(miss)) {
                Ok(heard) => {
                    self.config_is_stale |= heard.config_changed;
                    if heard.closed {
                        session.requests = None;
                    }
                }
                Err(error) => {
                    let (step, what) = (Step::BackendRequest, error.to_string());
                    return self.lose(&ConversationError::Absurd { step, what });
                }
            }
            let answers = questions.end();
            self.answer_questions(answers);
        }
        self.update_config();
    }

    /// Reads the configuration space again when the backend says that it has changed. A paused device interrupts nobody.
    pub(super) fn update_config(&mut self) {
        if !self.config_is_stale || self.shared.gate.is_closed() {
            return;
        }
        let Some(session) = &mut self.past.session else { return };
        self.config_is_stale = false;
        let len = u32::try_from(session.capabilities.config.len()).unwrap_or(0);
        let wish = if len == 0 { ConfigWish::Nothing } else { ConfigWish::Needed(len) };
        let read = session.conversation.perform(move |wire| session::read_config(wire, wish));
        let offer = read.and_then(|config| {
            session.capabilities.config = config;
            self.parts.makers.class.offer(&session.capabilities)
        });
        match offer {
            Ok(offer) => self.adopt_config(&offer.config),
            Err(error) => self.lose(&error),
        }
    }

    /// Shows the driver what has changed of what may change.
    pub(super) fn adopt_config(&mut self, new: &[u8]) {
        let may_change = changeable(self.past.shown.device_type);
        let new = &self.with_link(new)[..];
        let mut changed = false;
        let current = self.past.shown.config.iter_mut().zip(&mut self.config);
        for (offset, ((shown, now), new)) in (0..).zip(current.zip(new)) {
            if may_change.contains(&offset) && shown != new {
                (*shown, *now) = (*new, *new);
                changed = true;
            }
        }
        // An event that comes while an earlier one stands is one, too.
        let told = event_fields(self.past.shown.device_type).and_then(|fields| self.past.shown.config.get(fields.told));
        if changed || told.is_some_and(|events| events.iter().any(|byte| *byte != 0)) {
            tracing::debug!(device = self.shared.name, "the configuration has changed");
            self.transport.config_changed(&self.config);
        }
    }
}
