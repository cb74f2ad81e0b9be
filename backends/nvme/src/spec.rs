//! The words of NVM Express 1.4: commands, completions, status codes, registers. Numbers in comments are its sections.

/// Bytes of an entry of a submission queue.
pub const COMMAND_LEN: u64 = 64;
/// Bytes of an entry of a completion queue.
pub const COMPLETION_LEN: u64 = 16;
/// Bytes of a page: the only size that is offered (CAP.MPSMIN and MPSMAX).
pub const PAGE: u64 = 4096;
/// Bytes of a block.
pub const BLOCK_SHIFT: u32 = 9;
/// Most entries of a queue (CAP.MQES, which counts from zero).
pub const ENTRIES_MAX: u32 = 1024;
/// Most bytes of a transfer as a power of two of pages (MDTS).
pub const TRANSFER_SHIFT: u8 = 7;
/// Most bytes of a transfer.
pub const TRANSFER_MAX: u64 = PAGE << TRANSFER_SHIFT;
/// Most AERs at a time (AERL counts from zero).
pub const EVENTS_MAX: usize = 4;
/// The one namespace.
pub const NAMESPACE: u32 = 1;
/// All namespaces.
pub const EVERY_NAMESPACE: u32 = u32::MAX;

/// Registers (3.1): offsets in BAR 0.
pub mod register {
    /// Controller capabilities.
    pub const CAP: u64 = 0x00;
    /// Version.
    pub const VS: u64 = 0x08;
    /// Controller configuration.
    pub const CC: u64 = 0x14;
    /// Controller status.
    pub const CSTS: u64 = 0x1c;
    /// Sizes of the admin queues.
    pub const AQA: u64 = 0x24;
    /// Base of the admin submission queue.
    pub const ASQ: u64 = 0x28;
    /// Base of the admin completion queue.
    pub const ACQ: u64 = 0x30;
    /// The first doorbell: submission and completion queues take turns, 4 bytes each.
    pub const DOORBELLS: u64 = 0x1000;
}

/// CC.EN.
pub const CC_ENABLE: u32 = 1;
/// CSTS.RDY.
pub const CSTS_READY: u32 = 1;
/// CSTS.CFS.
pub const CSTS_FATAL: u32 = 2;
/// CSTS.SHST: processing of a shutdown is complete.
pub const CSTS_SHUT: u32 = 2 << 2;
/// CSTS.SHST: it is going on.
pub const CSTS_SHUTTING: u32 = 1 << 2;
/// Both bits of it.
pub const CSTS_SHUT_MASK: u32 = 3 << 2;

/// CAP: 1024 entries, contiguous queues, 30 s to get ready, no doorbell stride, the NVM command set, pages of 4 KiB.
pub const CAP: u64 = (ENTRIES_MAX as u64 - 1) | 1 << 16 | 60 << 24 | 1 << 37;
/// Version 1.4.
pub const VERSION: u32 = 0x0001_0400;

/// A status (4.6.1): type and code, and whether it is of no use to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    const NO_RETRY: u16 = 1 << 14;
    const fn generic(code: u16) -> Self {
        Self(code | Self::NO_RETRY)
    }
    const fn specific(code: u16) -> Self {
        Self(code | 1 << 8 | Self::NO_RETRY)
    }
    /// It was done.
    pub const SUCCESS: Self = Self(0);
    /// No such command.
    pub const OPCODE: Self = Self::generic(0x01);
    /// A field is wrong.
    pub const FIELD: Self = Self::generic(0x02);
    /// Its data could not be moved.
    pub const TRANSFER: Self = Self::generic(0x04);
    /// The controller's fault.
    pub const INTERNAL: Self = Self(0x06);
    /// Its queue was deleted.
    pub const QUEUE_DELETED: Self = Self(0x08);
    /// No such namespace.
    pub const NAMESPACE: Self = Self::generic(0x0b);
    /// A PRP entry is not aligned.
    pub const PRP_OFFSET: Self = Self::generic(0x13);
    /// Beyond the end.
    pub const LBA_RANGE: Self = Self::generic(0x80);
    /// No such completion queue.
    pub const CQ_INVALID: Self = Self::specific(0x00);
    /// A queue number that is out of range or taken.
    pub const QUEUE_ID: Self = Self::specific(0x01);
    /// A size that no queue has.
    pub const QUEUE_SIZE: Self = Self::specific(0x02);
    /// Too many AERs.
    pub const EVENT_LIMIT: Self = Self::specific(0x05);
    /// No such vector.
    pub const VECTOR: Self = Self::specific(0x08);
    /// No such log page.
    pub const LOG_PAGE: Self = Self::specific(0x09);
    /// Its submission queues are still there.
    pub const DELETION: Self = Self::specific(0x0c);
    /// Nothing is saved.
    pub const NOT_SAVEABLE: Self = Self::specific(0x0d);
    /// It is fixed.
    pub const NOT_CHANGEABLE: Self = Self::specific(0x0e);
    /// It may only be read.
    pub const READ_ONLY: Self = Self::specific(0x82);
    /// The medium did not take it.
    pub const WRITE_FAULT: Self = Self(0x280);
    /// The medium did not give it.
    pub const READ_FAULT: Self = Self(0x281);
}

/// Admin commands (5).
pub mod admin {
    /// Delete I/O Submission Queue.
    pub const DELETE_SQ: u8 = 0x00;
    /// Create I/O Submission Queue.
    pub const CREATE_SQ: u8 = 0x01;
    /// Get Log Page.
    pub const LOG_PAGE: u8 = 0x02;
    /// Delete I/O Completion Queue.
    pub const DELETE_CQ: u8 = 0x04;
    /// Create I/O Completion Queue.
    pub const CREATE_CQ: u8 = 0x05;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get Features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous Event Request.
    pub const EVENT: u8 = 0x0c;
}

/// Commands of the NVM command set (6).
pub mod nvm {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DATASET: u8 = 0x09;
}

/// An entry of a submission queue (4.2): sixteen words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Command(pub [u32; 16]);

impl Command {
    /// From the bytes in guest memory.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; COMMAND_LEN as usize]) -> Self {
        let mut words = [0; 16];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().unwrap_or_default());
        }
        Self(words)
    }
    /// What is to be done.
    #[must_use]
    pub fn opcode(&self) -> u8 {
        self.0[0] as u8
    }
    /// Fused with another, or its data described otherwise than by PRPs: neither is offered.
    #[must_use]
    pub fn is_exotic(&self) -> bool {
        self.0[0] & (3 << 8 | 3 << 14) != 0
    }
    /// Its driver's name for it.
    #[must_use]
    pub fn id(&self) -> u16 {
        (self.0[0] >> 16) as u16
    }
    /// Namespace.
    #[must_use]
    pub fn namespace(&self) -> u32 {
        self.0[1]
    }
    /// Word `number` of 10 to 15.
    #[must_use]
    pub fn word(&self, number: usize) -> u32 {
        self.0.get(number).copied().unwrap_or(0)
    }
    fn long(&self, at: usize) -> u64 {
        u64::from(self.word(at)) | u64::from(self.word(at + 1)) << 32
    }
    /// First PRP entry.
    #[must_use]
    pub fn prp1(&self) -> u64 {
        self.long(6)
    }
    /// Second PRP entry, or the list.
    #[must_use]
    pub fn prp2(&self) -> u64 {
        self.long(8)
    }
    /// First block.
    #[must_use]
    pub fn first_block(&self) -> u64 {
        self.long(10)
    }
    /// How many blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        u64::from(self.word(12) & 0xffff) + 1
    }
    /// Force unit access: durable when it completes.
    #[must_use]
    pub fn is_fua(&self) -> bool {
        self.word(12) & 1 << 30 != 0
    }
}

/// An entry of a completion queue (4.6), its phase bit apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What the command has found.
    pub result: u32,
    /// Head of its submission queue.
    pub head: u16,
    /// Its submission queue.
    pub queue: u16,
    /// The command.
    pub id: u16,
    /// How it went.
    pub status: Status,
}

impl Completion {
    /// The words before the last.
    #[must_use]
    pub fn front(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&self.result.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.head.to_le_bytes());
        bytes[10..].copy_from_slice(&self.queue.to_le_bytes());
        bytes
    }
    /// The last word, which makes it valid.
    #[must_use]
    pub fn last(&self, phase: bool) -> u32 {
        u32::from(self.id) | u32::from(phase) << 16 | u32::from(self.status.0) << 17
    }
}
