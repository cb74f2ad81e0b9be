//! Admin commands (5), settings and events.

use std::sync::atomic::Ordering::{Relaxed, Release};

use crate::controller::{Controller, Outcome};
use crate::identify;
use crate::prp::{self, Dma};
use crate::queues::Fatal;
use crate::spec::{Command, ENTRIES_MAX, EVENTS_MAX, EVERY_NAMESPACE, NAMESPACE, PAGE, Status, admin};

/// Settings (5.21.1): number of the feature, its index in the record, what it is at power-on, and whether a driver may set it.
const FEATURES: [(u8, usize, u32, bool); 10] = [
    (ARBITRATION, 0, 7, true),
    (POWER, 1, 0, true),
    (TEMPERATURE, 2, 0, true),
    (RECOVERY, 3, 0, true),
    (WRITE_CACHE, 4, 1, true),
    (QUEUES, 5, 0, false),
    (COALESCING, 6, 0, true),
    (VECTOR, 7, 0, true),
    (ATOMICITY, 8, 0, true),
    (EVENTS, 9, 0, true),
];
const ARBITRATION: u8 = 0x01;
const POWER: u8 = 0x02;
const TEMPERATURE: u8 = 0x04;
const RECOVERY: u8 = 0x05;
const WRITE_CACHE: u8 = 0x06;
const QUEUES: u8 = 0x07;
const COALESCING: u8 = 0x08;
const VECTOR: u8 = 0x09;
const ATOMICITY: u8 = 0x0a;
const EVENTS: u8 = 0x0b;
/// Where the write cache is among them.
const WRITE_CACHE_AT: usize = 4;
/// Where a temperature threshold that was set is: zero stands for the one at power-on.
const TEMPERATURE_AT: usize = 2;

/// Events of the type "error" (5.2.1), by their bit in the record.
const WRONG_REGISTER: u32 = 1 << 0;
const WRONG_VALUE: u32 = 1 << 1;
/// The log page that tells of them, and the bit that holds them back until it is read.
const ERROR_LOG: u32 = 1;
const ERROR_MASK: u32 = 1;

impl Controller {
    /// Settings as at power-on.
    pub(crate) fn defaults(&self) {
        for (_, at, value, _) in FEATURES {
            if let Some(feature) = self.record.feature(at) {
                feature.store(value, Relaxed);
            }
        }
    }

    /// Whether what was written may wait for a flush.
    pub(crate) fn caches_writes(&self) -> bool {
        self.record.feature(WRITE_CACHE_AT).is_none_or(|cache| cache.load(Relaxed) & 1 != 0)
    }

    /// An admin command; `again` when a predecessor may have carried it out without saying so.
    pub(crate) fn admin(&mut self, slot: u16, command: &Command, again: bool, dma: &dyn Dma) -> Outcome {
        let done = match command.opcode() {
            admin::CREATE_CQ => self.create_completion(command, again),
            admin::CREATE_SQ => self.create_submission(command, again),
            admin::DELETE_CQ => self.delete_completion(command, again),
            admin::DELETE_SQ => return self.delete_submission(slot, command, again),
            admin::IDENTIFY => self.identify(command, dma),
            admin::LOG_PAGE => self.log_page(command, dma),
            admin::SET_FEATURES => return self.set_feature(command),
            admin::GET_FEATURES => return self.get_feature(command),
            // Nothing waits that could be aborted in time: bit 0 says that it was not.
            admin::ABORT => return Outcome::Done(Status::SUCCESS, 1),
            admin::EVENT if self.events.len() >= EVENTS_MAX => Err(Status::EVENT_LIMIT),
            admin::EVENT => {
                self.events.push(slot);
                return Outcome::Waits;
            }
            _ => Err(Status::OPCODE),
        };
        done.map_or_else(Outcome::from, |()| Status::SUCCESS.into())
    }

    fn queue_number(&self, number: u32) -> Result<usize, Status> {
        let number = number & 0xffff;
        if number == 0 || number > u32::from(self.queues_max) { Err(Status::QUEUE_ID) } else { Ok(number as usize) }
    }

    /// Size and base of a queue that is to be made.
    fn place(command: &Command) -> Result<(u32, u64), Status> {
        let size = (command.word(10) >> 16) + 1;
        if !(2..=ENTRIES_MAX).contains(&size) {
            return Err(Status::QUEUE_SIZE);
        }
        // Contiguous, as CAP.CQR demands, and aligned to a page.
        if command.word(11) & 1 == 0 {
            return Err(Status::FIELD);
        }
        let base = command.prp1();
        if base == 0 || !base.is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET);
        }
        Ok((size, base))
    }

    fn create_completion(&self, command: &Command, again: bool) -> Result<(), Status> {
        let number = self.queue_number(command.word(10))?;
        let (size, base) = Self::place(command)?;
        let (vector, interrupts) = (command.word(11) >> 16, command.word(11) & 2 != 0);
        if self.queues.is_completion(number) {
            let made = again && self.queues.has_completion(number, size, base);
            return if made { Ok(()) } else { Err(Status::QUEUE_ID) };
        }
        let vector = u16::try_from(vector).ok().filter(|vector| *vector <= self.queues_max).ok_or(Status::VECTOR)?;
        self.queues.create_completion(number, size, base, interrupts.then_some(vector));
        Ok(())
    }

    fn create_submission(&self, command: &Command, again: bool) -> Result<(), Status> {
        let number = self.queue_number(command.word(10))?;
        let completion = (command.word(11) >> 16) as usize;
        if completion == 0 || !self.queues.is_completion(completion) {
            return Err(Status::CQ_INVALID);
        }
        let (size, base) = Self::place(command)?;
        if self.queues.submission(number).is_some() {
            let made = again && self.queues.has_submission(number, size, base, completion);
            return if made { Ok(()) } else { Err(Status::QUEUE_ID) };
        }
        self.queues.create_submission(number, size, base, completion);
        Ok(())
    }

    fn delete_completion(&self, command: &Command, again: bool) -> Result<(), Status> {
        let number = self.queue_number(command.word(10))?;
        if !self.queues.is_completion(number) {
            return if again { Ok(()) } else { Err(Status::QUEUE_ID) };
        }
        if self.queues.is_used(number) {
            return Err(Status::DELETION);
        }
        self.queues.delete_completion(number);
        Ok(())
    }

    fn delete_submission(&mut self, slot: u16, command: &Command, again: bool) -> Outcome {
        match self.queue_number(command.word(10)) {
            Err(status) => status.into(),
            Ok(number) if self.queues.submission(number).is_none() => {
                if again { Status::SUCCESS } else { Status::QUEUE_ID }.into()
            }
            Ok(_) => {
                self.deletions.push(slot);
                Outcome::Waits
            }
        }
    }

    /// The queue that a waiting deletion is to take away: nothing is fetched from it any more.
    pub(crate) fn deleted(&self, slot: u16) -> Option<usize> {
        self.queues.command(slot).and_then(|(_, command)| self.queue_number(command.word(10)).ok())
    }

    /// Deletions whose queue has nothing under way any more.
    pub(crate) fn finish_deletions(&mut self, dma: &dyn Dma) -> Result<(), Fatal> {
        let mut waiting = Vec::new();
        for slot in std::mem::take(&mut self.deletions) {
            match self.deleted(slot) {
                Some(queue) if self.queues.has_taken(queue, &[]) => waiting.push(slot),
                queue => {
                    if let Some(queue) = queue {
                        self.queues.delete_submission(queue);
                    }
                    self.complete(slot, Status::SUCCESS, 0, dma)?;
                }
            }
        }
        self.deletions = waiting;
        Ok(())
    }

    fn identify(&self, command: &Command, dma: &dyn Dma) -> Result<(), Status> {
        let (what, namespace) = (command.word(10) as u8, command.namespace());
        let one = || match namespace {
            NAMESPACE => Ok(()),
            _ => Err(Status::NAMESPACE),
        };
        let page = match what {
            0 => {
                one()?;
                identify::namespace(&self.namespace)
            }
            1 => identify::controller(&self.namespace),
            2 if namespace >= EVERY_NAMESPACE - 1 => return Err(Status::NAMESPACE),
            2 => identify::namespaces(namespace),
            3 => {
                one()?;
                identify::descriptors(&self.namespace)
            }
            _ => return Err(Status::FIELD),
        };
        let pieces = prp::pieces(dma, command.prp1(), command.prp2(), page.len() as u64)?;
        prp::scatter(dma, &pieces, &page)
    }

    fn log_page(&self, command: &Command, dma: &dyn Dma) -> Result<(), Status> {
        let words = u64::from(command.word(10) >> 16) | u64::from(command.word(11) & 0xffff) << 16;
        let offset = u64::from(command.word(12)) | u64::from(command.word(13)) << 32;
        let page = match command.word(10) & 0xff {
            // Errors are told by status; the log has room for one, and it is empty.
            ERROR_LOG => vec![0; 64],
            2 => identify::health(self.record.completed()),
            3 => identify::firmware(),
            _ => return Err(Status::LOG_PAGE),
        };
        let at = usize::try_from(offset).ok().filter(|at| *at <= page.len() && at % 4 == 0).ok_or(Status::FIELD)?;
        let len = (words + 1) * 4;
        let pieces = prp::pieces(dma, command.prp1(), command.prp2(), len)?;
        // What is asked for beyond the end is zeros.
        let mut data = page.get(at..).unwrap_or_default().to_vec();
        data.resize(len as usize, 0);
        prp::scatter(dma, &pieces, &data)?;
        if command.word(10) & 0xff == ERROR_LOG && command.word(10) & 1 << 15 == 0 {
            let masked = self.record.events_masked().load(Relaxed);
            self.record.events_masked().store(masked & !ERROR_MASK, Relaxed);
        }
        Ok(())
    }

    fn set_feature(&self, command: &Command) -> Outcome {
        let (number, value) = (command.word(10) as u8, command.word(11));
        if command.word(10) & 1 << 31 != 0 {
            return Status::NOT_SAVEABLE.into();
        }
        if number == QUEUES {
            // Neither number may be the highest, and the answer is what there is.
            if value & 0xffff == 0xffff || value >> 16 == 0xffff {
                return Status::FIELD.into();
            }
            return Outcome::Done(Status::SUCCESS, identify::queue_count(self.queues_max));
        }
        let Some((_, at, _, free)) = FEATURES.into_iter().find(|feature| feature.0 == number) else {
            return Status::FIELD.into();
        };
        let wrong = match number {
            POWER => value & 0x1f != 0,
            TEMPERATURE => value >> 16 & 0xf != 0 || value >> 20 & 3 > 1,
            VECTOR => value & 0xffff > u32::from(self.queues_max),
            _ => false,
        };
        if !free {
            return Status::NOT_CHANGEABLE.into();
        }
        if wrong {
            return Status::FIELD.into();
        }
        // Each vector is as it is: interrupts are not coalesced, which is what "disabled" asks for.
        let kept = number != VECTOR && !(number == TEMPERATURE && value >> 20 & 3 != 0);
        if let Some(feature) = self.record.feature(at).filter(|_| kept) {
            feature.store(value, Release);
        }
        Outcome::Done(Status::SUCCESS, 0)
    }

    fn get_feature(&self, command: &Command) -> Outcome {
        let number = command.word(10) as u8;
        // Select: only what is in force now is known.
        if command.word(10) >> 8 & 7 != 0 {
            return Status::FIELD.into();
        }
        if number == QUEUES {
            return Outcome::Done(Status::SUCCESS, identify::queue_count(self.queues_max));
        }
        let Some((_, at, _, _)) = FEATURES.into_iter().find(|feature| feature.0 == number) else {
            return Status::FIELD.into();
        };
        let value = self.record.feature(at).map_or(0, |feature| feature.load(Relaxed));
        let value = match number {
            TEMPERATURE if command.word(11) >> 20 & 3 != 0 => 0,
            TEMPERATURE if at == TEMPERATURE_AT && value == 0 => identify::TEMPERATURE_MAX.into(),
            VECTOR if command.word(11) & 0xffff > u32::from(self.queues_max) => return Status::FIELD.into(),
            VECTOR => command.word(11) & 0xffff | 1 << 16,
            _ => value,
        };
        Outcome::Done(Status::SUCCESS, value)
    }

    /// Takes note of doorbells that were rung wrongly.
    pub(crate) fn note_wrong_doorbells(&self) {
        let (register, value) = self.queues.wrong_doorbells();
        let bits = if register { WRONG_REGISTER } else { 0 } | if value { WRONG_VALUE } else { 0 };
        if bits != 0 {
            let events = self.record.events().load(Relaxed);
            self.record.events().store(events | bits, Relaxed);
        }
    }

    /// Tells an event to an AER that waits for one.
    pub(crate) fn tell_events(&mut self, dma: &dyn Dma) -> Result<(), Fatal> {
        let events = self.record.events().load(Relaxed);
        let masked = self.record.events_masked().load(Relaxed) & ERROR_MASK != 0;
        let Some((bit, number)) =
            [(WRONG_REGISTER, 0), (WRONG_VALUE, 1)].into_iter().find(|(bit, _)| events & bit != 0)
        else {
            return Ok(());
        };
        if masked || self.events.is_empty() {
            return Ok(());
        }
        let slot = self.events.remove(0);
        // Type 0 (error), what it is, the log page that says more. Told first: twice is better than never.
        self.complete(slot, Status::SUCCESS, number << 8 | ERROR_LOG << 16, dma)?;
        self.record.events().store(events & !bit, Relaxed);
        self.record.events_masked().store(ERROR_MASK, Relaxed);
        Ok(())
    }
}
