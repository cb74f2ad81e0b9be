//! The controller: registers, fetching, and what becomes of each command. It moves no data and waits for nothing; what has to
//! be read or written goes out as an [`Io`] and comes back by [`Controller::done`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use atoll_kit::step::{Step, step};

use crate::identify::Namespace;
use crate::prp::{self, Dma, Piece};
use crate::queues::{Fatal, Posted, Queues};
use crate::record::{QUEUES_MAX, Record};
use crate::spec::{
    BLOCK_SHIFT, CAP, CC_ENABLE, COMMAND_LEN, CSTS_FATAL, CSTS_READY, CSTS_SHUT, CSTS_SHUT_MASK, CSTS_SHUTTING,
    Command, EVERY_NAMESPACE, NAMESPACE, PAGE, Status, VERSION, nvm, register,
};

/// Commands that one turn fetches at most, so that registers are answered, and what is done is told, in between.
const FETCH_MAX: usize = 64;

/// A token of an [`Io`] that no command waits for.
pub const NO_COMMAND: u16 = u16::MAX;

/// What is to be done to the medium.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// From the medium into memory.
    Read {
        /// Where, in bytes.
        offset: u64,
        /// Where to.
        pieces: Vec<Piece>,
    },
    /// From memory to the medium.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// Where from.
        pieces: Vec<Piece>,
        /// It is to be durable when it is done.
        durable: bool,
    },
    /// All that was written becomes durable.
    Flush,
    /// Ranges read as zeros afterwards; each may lose its room, or has to keep it.
    Zero {
        /// Offset and bytes.
        ranges: Vec<(u64, u64)>,
        /// They may lose it.
        release: bool,
        /// It is to be durable when it is done.
        durable: bool,
    },
}

/// One of them, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Io {
    /// Comes back with the outcome.
    pub token: u16,
    /// What.
    pub kind: IoKind,
}

/// Why the medium did not do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed;

/// What a command leads to.
pub(crate) enum Outcome {
    /// It is done.
    Done(Status, u32),
    /// The medium has something to do first.
    Io(IoKind),
    /// It waits for something that happens.
    Waits,
}

impl From<Status> for Outcome {
    fn from(status: Status) -> Self {
        Self::Done(status, 0)
    }
}

/// A controller on a record.
pub struct Controller {
    pub(crate) record: Arc<Record>,
    pub(crate) queues: Queues,
    pub(crate) namespace: Namespace,
    /// I/O queues of each kind that it offers.
    pub(crate) queues_max: u16,
    /// What a predecessor left has been looked at.
    adopted: bool,
    /// Slots that are to be carried out again.
    again: VecDeque<u16>,
    /// Slots whose completion found no room.
    blocked: VecDeque<(u16, Status, u32)>,
    /// AERs that wait for an event.
    pub(crate) events: Vec<u16>,
    /// Deletions that wait for the last command of their queue.
    pub(crate) deletions: Vec<u16>,
    /// Tokens that are out.
    out: usize,
    vectors: Vec<u16>,
    disabling: bool,
    shutting: bool,
}

impl Controller {
    /// A controller of `namespace` that goes on where `record` says, with at most so many I/O queues of each kind.
    pub fn new(record: Arc<Record>, namespace: Namespace, queues_max: u16) -> Self {
        let queues = Queues::new(Arc::clone(&record));
        let mut controller = Self {
            record,
            queues,
            namespace,
            queues_max: queues_max.clamp(1, QUEUES_MAX as u16),
            adopted: false,
            again: VecDeque::new(),
            blocked: VecDeque::new(),
            events: Vec::new(),
            deletions: Vec::new(),
            out: 0,
            vectors: Vec::new(),
            disabling: false,
            shutting: false,
        };
        // What a predecessor was in the middle of.
        let (cc, csts) = (controller.record.cc().load(Acquire), controller.record.csts().load(Acquire));
        match (cc & CC_ENABLE != 0, csts & CSTS_READY != 0) {
            (true, false) if csts & CSTS_FATAL == 0 => controller.enable(),
            (false, _) => controller.forget(),
            _ => {}
        }
        if csts & CSTS_SHUT_MASK == CSTS_SHUTTING {
            controller.shutting = true;
        }
        controller
    }

    /// As at power-on. Nothing may be out.
    pub fn reset(&mut self) {
        self.record.clear();
        self.forget();
        (self.disabling, self.shutting) = (false, false);
    }

    /// No queue and no command any more.
    fn forget(&mut self) {
        self.queues.clear();
        self.record.csts().store(0, Release);
        self.again.clear();
        self.blocked.clear();
        self.events.clear();
        self.deletions.clear();
        self.vectors.clear();
        self.adopted = true;
        self.disabling = false;
        self.defaults();
    }

    /// [`Io`]s that have not come back.
    pub fn out(&self) -> usize {
        self.out
    }

    /// Reads registers.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let record = &self.record;
        for (at, byte) in (offset..).zip(data) {
            let word = |value: u64, base: u64| (value >> ((at - base) * 8)) as u8;
            *byte = match at {
                register::CAP..0x08 => word(CAP, register::CAP),
                register::VS..0x0c => word(VERSION.into(), register::VS),
                register::CC..0x18 => word(record.cc().load(Acquire).into(), register::CC),
                register::CSTS..0x20 => word(record.csts().load(Acquire).into(), register::CSTS),
                register::AQA..0x28 => word(record.aqa().load(Relaxed).into(), register::AQA),
                register::ASQ..0x30 => word(record.asq().load(Relaxed), register::ASQ),
                register::ACQ..0x38 => word(record.acq().load(Relaxed), register::ACQ),
                // Doorbells and everything else say nothing.
                _ => 0,
            };
        }
    }

    /// Writes registers: 4 or 8 bytes at their beginning; anything else is none of a driver's.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        match data {
            [a, b, c, d] => self.write_word(offset, u32::from_le_bytes([*a, *b, *c, *d])),
            [a, b, c, d, e, f, g, h] => {
                self.write_word(offset, u32::from_le_bytes([*a, *b, *c, *d]));
                self.write_word(offset.saturating_add(4), u32::from_le_bytes([*e, *f, *g, *h]));
            }
            _ => {}
        }
    }

    fn write_word(&mut self, offset: u64, value: u32) {
        let record = Arc::clone(&self.record);
        let half = |register: &std::sync::atomic::AtomicU64, high: bool| {
            let old = register.load(Relaxed);
            let new =
                if high { old & 0xffff_ffff | u64::from(value) << 32 } else { old >> 32 << 32 | u64::from(value) };
            register.store(new & !(PAGE - 1), Relaxed);
        };
        match offset {
            register::CC => self.configure(value),
            register::AQA => record.aqa().store(value & 0x0fff_0fff, Relaxed),
            register::ASQ => half(record.asq(), false),
            0x2c => half(record.asq(), true),
            register::ACQ => half(record.acq(), false),
            0x34 => half(record.acq(), true),
            register::DOORBELLS.. if offset.is_multiple_of(4) => {
                let number = usize::try_from((offset - register::DOORBELLS) / 4).unwrap_or(usize::MAX);
                if let Some(bell) = record.doorbell(number) {
                    bell.store(value, Release);
                }
            }
            _ => {}
        }
    }

    fn configure(&mut self, cc: u32) {
        let old = self.record.cc().swap(cc, Release);
        match (old & CC_ENABLE != 0, cc & CC_ENABLE != 0) {
            (false, true) if !self.disabling => self.enable(),
            (true, false) => {
                step(Step::Reset);
                self.disabling = true;
            }
            _ => {}
        }
        let shutdown = |cc: u32| cc >> 14 & 3;
        if shutdown(cc) != 0 && shutdown(old) == 0 {
            self.set_status(CSTS_SHUT_MASK, CSTS_SHUTTING);
            self.shutting = true;
        }
    }

    fn set_status(&self, mask: u32, bits: u32) {
        let csts = self.record.csts().load(Relaxed);
        self.record.csts().store(csts & !mask | bits, Release);
    }

    fn fail(&mut self, why: &'static str) {
        if self.record.csts().load(Relaxed) & CSTS_FATAL == 0 {
            tracing::warn!(why, "the driver's queues cannot be served until it resets the controller");
        }
        self.set_status(CSTS_FATAL, CSTS_FATAL);
    }

    fn enable(&mut self) {
        let record = Arc::clone(&self.record);
        let (cc, aqa) = (record.cc().load(Relaxed), record.aqa().load(Relaxed));
        let (sizes, bases) =
            ((aqa & 0xfff, aqa >> 16 & 0xfff), (record.asq().load(Relaxed), record.acq().load(Relaxed)));
        // The NVM command set, pages of 4 KiB, round robin.
        if cc & (7 << 4 | 15 << 7 | 7 << 11) != 0 {
            return self.fail("CC asks for what CAP does not offer");
        }
        if sizes.0 == 0 || sizes.1 == 0 || sizes.0 > 1023 || sizes.1 > 1023 || bases.0 == 0 || bases.1 == 0 {
            return self.fail("the admin queues have no place or a size that cannot be");
        }
        self.forget();
        self.queues.create_completion(0, sizes.1 + 1, bases.1, Some(0));
        self.queues.create_submission(0, sizes.0 + 1, bases.0, 0);
        self.set_status(CSTS_READY, CSTS_READY);
    }

    /// Whether commands are fetched.
    fn is_running(&self) -> bool {
        let csts = self.record.csts().load(Relaxed);
        csts & (CSTS_READY | CSTS_FATAL) == CSTS_READY && !self.disabling
    }

    /// Goes on as far as it can: what the medium is to do is put to `out`. Says whether there is more to do at once. Without
    /// memory only its registers move.
    pub fn run(&mut self, dma: Option<&dyn Dma>, out: &mut Vec<Io>) -> bool {
        if self.disabling && self.out == 0 {
            let cc = self.record.cc().load(Relaxed);
            self.forget();
            // A driver that has enabled it again in the meantime did not wait as it has to.
            if cc & CC_ENABLE != 0 {
                self.enable();
            }
        }
        if self.shutting && self.out == 0 {
            self.shutting = false;
            self.give(NO_COMMAND, IoKind::Flush, out);
        }
        let Some(dma) = dma else { return false };
        if !self.is_running() {
            self.queues.note_doorbells();
            return false;
        }
        match self.advance(dma, out) {
            Ok(more) => more,
            Err(Fatal) => {
                self.fail("a queue is not in memory");
                false
            }
        }
    }

    fn give(&mut self, token: u16, kind: IoKind, out: &mut Vec<Io>) {
        self.out += 1;
        out.push(Io { token, kind });
    }

    fn advance(&mut self, dma: &dyn Dma, out: &mut Vec<Io>) -> Result<bool, Fatal> {
        if !self.adopted {
            let (again, vectors) = self.queues.adopt(dma)?;
            self.adopted = true;
            self.again.extend(again);
            self.vectors.extend(vectors);
        }
        for _ in 0..self.blocked.len() {
            if let Some((slot, status, result)) = self.blocked.pop_front() {
                self.complete(slot, status, result, dma)?;
            }
        }
        while let Some(slot) = self.again.pop_front() {
            step(Step::Replay);
            self.carry_out(slot, true, dma, out)?;
        }
        self.note_wrong_doorbells();
        let mut fetched = 0;
        while fetched < FETCH_MAX {
            let deletions: Vec<usize> = self.deletions.iter().filter_map(|slot| self.deleted(*slot)).collect();
            let Some(slot) = self.queues.fetch(dma, |queue| !deletions.contains(&queue))? else { break };
            fetched += 1;
            self.carry_out(slot, false, dma, out)?;
        }
        self.finish_deletions(dma)?;
        self.tell_events(dma)?;
        // What waits for the driver, or for another command, does not wait for this process.
        let others = self.events.len() + self.blocked.len() + self.deletions.len();
        self.record.tell(self.queues.taken().saturating_sub(others));
        Ok(fetched == FETCH_MAX)
    }

    /// The medium has done, or has not.
    pub fn done(&mut self, token: u16, outcome: Result<(), Failed>, dma: Option<&dyn Dma>) {
        self.out = self.out.saturating_sub(1);
        if token == NO_COMMAND {
            return self.set_status(CSTS_SHUT_MASK, CSTS_SHUT);
        }
        let Some(dma) = dma.filter(|_| !self.disabling) else { return };
        let reads = self.queues.command(token).is_some_and(|(_, command)| command.opcode() == nvm::READ);
        let status = match outcome {
            Ok(()) => Status::SUCCESS,
            Err(Failed) if reads => Status::READ_FAULT,
            Err(Failed) => Status::WRITE_FAULT,
        };
        if self.complete(token, status, 0, dma).is_err() {
            self.fail("a completion queue is not in memory");
        }
    }

    pub(crate) fn complete(&mut self, slot: u16, status: Status, result: u32, dma: &dyn Dma) -> Result<(), Fatal> {
        match self.queues.complete(slot, status, result, dma)? {
            Posted::Full => self.blocked.push_back((slot, status, result)),
            Posted::Done(vector) => self.vectors.extend(vector),
        }
        Ok(())
    }

    /// Vectors that are to be raised.
    pub fn take_vectors(&mut self) -> Vec<u16> {
        self.vectors.sort_unstable();
        self.vectors.dedup();
        std::mem::take(&mut self.vectors)
    }

    fn carry_out(&mut self, slot: u16, again: bool, dma: &dyn Dma, out: &mut Vec<Io>) -> Result<(), Fatal> {
        let Some((queue, command)) = self.queues.command(slot) else { return Ok(()) };
        let outcome = match queue {
            _ if command.is_exotic() => Status::FIELD.into(),
            0 => self.admin(slot, &command, again, dma),
            _ => self.medium(&command, dma).map_or_else(Outcome::from, Outcome::Io),
        };
        match outcome {
            Outcome::Done(status, result) => self.complete(slot, status, result, dma)?,
            Outcome::Io(kind) => self.give(slot, kind, out),
            Outcome::Waits => {}
        }
        Ok(())
    }

    /// A command of the NVM command set.
    fn medium(&self, command: &Command, dma: &dyn Dma) -> Result<IoKind, Status> {
        let everywhere = command.opcode() == nvm::FLUSH && command.namespace() == EVERY_NAMESPACE;
        let known = matches!(command.opcode(), nvm::FLUSH | nvm::READ | nvm::WRITE | nvm::WRITE_ZEROES | nvm::DATASET);
        if !known {
            return Err(Status::OPCODE);
        }
        if command.namespace() != NAMESPACE && !everywhere {
            return Err(Status::NAMESPACE);
        }
        if self.namespace.read_only && matches!(command.opcode(), nvm::WRITE | nvm::WRITE_ZEROES | nvm::DATASET) {
            return Err(Status::READ_ONLY);
        }
        let durable = command.is_fua() || !self.caches_writes();
        match command.opcode() {
            nvm::FLUSH => Ok(IoKind::Flush),
            nvm::DATASET => self.dataset(command, durable, dma),
            opcode => {
                let (offset, len) = self.range(command.first_block(), command.blocks())?;
                if opcode == nvm::WRITE_ZEROES {
                    // Deallocate, bit 25.
                    let release = command.word(12) & 1 << 25 != 0;
                    return Ok(IoKind::Zero { ranges: vec![(offset, len)], release, durable });
                }
                let pieces = prp::pieces(dma, command.prp1(), command.prp2(), len)?;
                Ok(match opcode {
                    nvm::READ => IoKind::Read { offset, pieces },
                    _ => IoKind::Write { offset, pieces, durable },
                })
            }
        }
    }

    /// Offset and bytes of blocks that are there.
    fn range(&self, first: u64, blocks: u64) -> Result<(u64, u64), Status> {
        let end = first.checked_add(blocks).filter(|end| *end <= self.namespace.blocks());
        end.map(|_| (first << BLOCK_SHIFT, blocks << BLOCK_SHIFT)).ok_or(Status::LBA_RANGE)
    }

    fn dataset(&self, command: &Command, durable: bool, dma: &dyn Dma) -> Result<IoKind, Status> {
        let count = u64::from(command.word(10) & 0xff) + 1;
        let pieces = prp::pieces(dma, command.prp1(), command.prp2(), count * 16)?;
        let data = prp::gather(dma, &pieces)?;
        let mut ranges = Vec::new();
        for range in data.chunks_exact(16) {
            let (head, first) = range.split_at(8);
            let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
            let blocks = number(head) >> 32;
            if blocks > 0 {
                ranges.push(self.range(number(first), blocks)?);
            }
        }
        // Anything but deallocation (bit 2) is a hint, and taken as none.
        if command.word(11) & 1 << 2 == 0 {
            ranges.clear();
        }
        Ok(IoKind::Zero { ranges, release: true, durable })
    }
}

// Queues are contiguous: an entry never crosses a page.
const _: () = assert!(PAGE.is_multiple_of(COMMAND_LEN));
