//! A device behind the IOMMU: its backend is told what changes, and hears of what it may not do.

use atoll_devices::iommu::{Access, Change, Fault, Mapping};
use atoll_devices::virtio::QueueConfig;

use super::Worker;
use crate::vhost::iotlb::{self, ACCESS_PLATFORM, Behind, Miss, Word};

/// What a backend has asked at one time, and what came of it.
pub(super) struct Questions<'a> {
    behind: Option<&'a Behind>,
    granted: Vec<Mapping>,
    refused: Vec<Fault>,
}

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
    pub(super) fn end(self) -> (Vec<Mapping>, Vec<Fault>) {
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
    ) -> Result<(Vec<QueueConfig>, Option<Vec<QueueConfig>>), &'static str> {
        let Some(behind) = &self.parts.behind else { return Ok((queues, None)) };
        if features & ACCESS_PLATFORM == 0 {
            return Err("it is behind an IOMMU, and its driver does not know of that (VIRTIO_F_ACCESS_PLATFORM)");
        }
        let located: Option<Vec<_>> = queues.iter().map(|queue| behind.translate(queue)).collect();
        let located = located.ok_or("a part of a ring is not mapped, or does not lie in one piece")?;
        Ok((located, Some(queues)))
    }

    /// Tells the backend of a change, if one has the rings. One that does not confirm is lost.
    pub(super) fn translate(&mut self, change: Change) {
        let Some(Behind { unit, endpoint }) = &self.parts.behind else { return };
        let Some(session) = self.past.session.as_mut().filter(|session| session.has_rings) else { return };
        let words: Vec<Word> = match change {
            Change::Lost { range, .. } => vec![Word::Invalidate(range)],
            Change::Gained { range, .. } => unit.mappings(*endpoint, range).into_iter().map(Word::Update).collect(),
        };
        let told =
            session.conversation.perform(move |wire| words.into_iter().try_for_each(|word| iotlb::tell(wire, word)));
        if let Err(error) = told {
            self.lose(&error);
        }
    }

    /// Tells the backend what it was granted, and the guest and the operator what it was refused.
    pub(super) fn answer_questions(&mut self, (granted, refused): (Vec<Mapping>, Vec<Fault>)) {
        if let Some(first) = refused.first() {
            let access = match first.access {
                Access::Read => "read",
                Access::Write => "write",
            };
            let known = [("id", self.shared.name.clone()), ("generation", self.past.machine.generation().to_string())];
            let what = [("address", format!("{:#x}", first.address)), ("access", access.to_owned())];
            // One event for all that came at a time: a guest decides how many there are.
            let count = [("count", refused.len().to_string())];
            self.parts.story.tell("device", "dma-fault", known.into_iter().chain(what).chain(count));
        }
        if let Some(Behind { unit, .. }) = &self.parts.behind {
            refused.into_iter().for_each(|fault| unit.report(fault));
        }
        let Some(session) = self.past.session.as_mut().filter(|_| !granted.is_empty()) else { return };
        let words = granted.into_iter().map(Word::Update);
        let words: Vec<Word> = words.collect();
        let told =
            session.conversation.perform(move |wire| words.into_iter().try_for_each(|word| iotlb::tell(wire, word)));
        if let Err(error) = told {
            self.lose(&error);
        }
    }
}
