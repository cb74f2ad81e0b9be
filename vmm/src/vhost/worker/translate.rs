//! A device behind the IOMMU: its backend is told what changes, and hears of what it may not do.

use std::time::Instant;

use atoll_devices::iommu::{Access, Change, Fault, Mapping};
use atoll_devices::virtio::QueueConfig;

use super::Worker;
use crate::metrics::TranslationEvent;
use crate::vhost::error::{ConversationError, Step};
use crate::vhost::iotlb::{self, ACCESS_PLATFORM, Behind, BehindError, Miss, Word};

/// What a backend has asked at one time, and what came of it.
pub(super) struct Questions<'a> {
    behind: Option<&'a Behind>,
    granted: Vec<Mapping>,
    refused: Vec<Fault>,
}

/// What was granted and what was refused.
pub(super) type Answers = (Vec<Mapping>, Vec<Fault>);

impl<'a> Questions<'a> {
    pub(super) fn new(behind: Option<&'a Behind>) -> Self {
        Self { behind, granted: Vec::new(), refused: Vec::new() }
    }

    /// Whether the device may do that.
    pub(super) fn judge(&mut self, miss: Miss) -> bool {
        let Some(Behind { unit, endpoint }) = self.behind else { return false };
        match unit.find(*endpoint, miss.address, miss.access) {
            Ok(mapping) => self.granted.push(mapping),
            Err(fault) => {
                self.refused.push(fault);
                return false;
            }
        }
        true
    }

    /// Mappings that it was granted, and faults.
    pub(super) fn end(self) -> Answers {
        (self.granted, self.refused)
    }
}

impl Worker {
    /// The driver's queues at guest-physical addresses, and as the driver set them up where that is not the same.
    ///
    /// # Errors
    /// When they cannot be served, and why.
    pub(super) fn locate(
        &self,
        features: u64,
        queues: Vec<QueueConfig>,
    ) -> Result<(Vec<QueueConfig>, Option<Vec<QueueConfig>>), BehindError> {
        let Some(behind) = &self.parts.behind else { return Ok((queues, None)) };
        if features & ACCESS_PLATFORM == 0 {
            return Err(BehindError::Driver);
        }
        let located = queues.iter().map(|queue| behind.translate(queue)).collect::<Result<Vec<_>, _>>()?;
        Ok((located, Some(queues)))
    }

    fn count(&self, event: TranslationEvent, times: usize) {
        if let (Some(meter), Some(_)) = (&self.parts.meter, &self.parts.behind) {
            meter.translation().add(event, times);
        }
    }

    /// Tells the backend of a change, if one has the rings. One that does not confirm is lost.
    pub(super) fn translate(&mut self, change: Change) {
        let Some(Behind { unit, endpoint }) = &self.parts.behind else { return };
        let words: Vec<Word> = match change {
            Change::Lost { range, .. } => vec![Word::Invalidate(range)],
            Change::Gained { range, .. } => unit.mappings(*endpoint, range).into_iter().map(Word::Update).collect(),
        };
        match change {
            Change::Lost { .. } => self.count(TranslationEvent::Unmap, 1),
            Change::Gained { .. } => self.count(TranslationEvent::Map, words.len()),
        }
        let lost = matches!(change, Change::Lost { .. });
        if lost {
            self.change_stand_in();
        }
        if self.parts.makers.copies() {
            if lost {
                self.let_go();
            }
            return;
        }
        let Some(session) = self.past.session.as_mut().filter(|session| session.has_rings) else { return };
        let told =
            session.conversation.perform(move |wire| words.into_iter().try_for_each(|word| iotlb::tell(wire, word)));
        match told {
            Ok(()) if lost => self.count(TranslationEvent::Invalidation, 1),
            Ok(()) => {}
            Err(error) => self.lose(&error),
        }
    }

    /// Waits until no copy is made by what the map was. Rings that are not where they were any more are not served.
    fn let_go(&mut self) {
        let Some(shadow) = &self.shadow else { return };
        let deadline = Instant::now() + self.parts.limits.step;
        let mut over = shadow.await_pass(deadline);
        if let Some(why) = self.moved() {
            tracing::warn!(device = self.shared.name, why, "the driver took its rings back while they were in use");
            shadow.halt();
            over = shadow.await_pass(deadline);
            self.transport.needs_reset();
        }
        if !over {
            // Nothing that it does waits for anybody: a thread that has no processor for seconds.
            let what = "copying its requests does not end".to_owned();
            self.lose(&ConversationError::Absurd { step: Step::Idle, what });
        }
    }

    /// Why the driver's rings are not where they were when it started the device, by the map as it is now.
    pub(super) fn moved(&self) -> Option<String> {
        let (Some(behind), Some(driver)) = (&self.parts.behind, &self.driver) else { return None };
        let asked = driver.behind.iter().flatten();
        asked.zip(&driver.queues).find_map(|(asked, found)| match behind.translate(asked) {
            Ok(now) if now == *found => None,
            Ok(_) => Some("a ring leads elsewhere than it did".to_owned()),
            Err(error) => Some(error.to_string()),
        })
    }

    /// Tells the backend what it was granted, and the guest and the operator what it was refused.
    pub(super) fn answer_questions(&mut self, (granted, refused): Answers) {
        self.count(TranslationEvent::Miss, granted.len() + refused.len());
        self.tell_faults(refused);
        let Some(session) = self.past.session.as_mut().filter(|_| !granted.is_empty()) else { return };
        let words = granted.into_iter().map(Word::Update);
        let words: Vec<Word> = words.collect();
        let told =
            session.conversation.perform(move |wire| words.into_iter().try_for_each(|word| iotlb::tell(wire, word)));
        if let Err(error) = told {
            self.lose(&error);
        }
    }

    /// Tells the guest and the operator of accesses that were refused.
    pub(super) fn tell_faults(&mut self, refused: Vec<Fault>) {
        let Some(first) = refused.first() else { return };
        self.count(TranslationEvent::Fault, refused.len());
        let access = match first.access {
            Access::Read => "read",
            Access::Write => "write",
        };
        let known = [("id", self.shared.name.clone()), ("generation", self.past.machine.generation().to_string())];
        let what = [("address", format!("{:#x}", first.address)), ("access", access.to_owned())];
        // One event for all that came at a time: a guest decides how many there are.
        let count = [("count", refused.len().to_string()), ("endpoint", first.endpoint.to_string())];
        self.parts.story.tell("device", "dma-fault", known.into_iter().chain(what).chain(count));
        if let Some(Behind { unit, .. }) = &self.parts.behind {
            refused.into_iter().for_each(|fault| unit.report(fault));
        }
    }
}
