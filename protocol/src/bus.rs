//! The bus between a VMM and a process that serves a device's registers ("elsewhere").
//!
//! The VMM asks with [`BusRequest`], the device process speaks with [`BusEvent`]: answers, interrupts, and one
//! announcement of what it is. The conversation opens with [`BusCall::Attach`], which tells the device process its
//! generation; each later word of either side carries it, so that a word from an earlier incarnation is recognised and
//! dropped. Answers may come in any order.

use serde::{Deserialize, Serialize};

use crate::access::{Space, Width};
use crate::bounded;
use crate::id::{CauseId, DeviceId, Generation, LineIndex, MsiMessage, RegionIndex, RequestId};
use crate::message::{Idempotence, Kind, Message, message_of_words, words};
use crate::sidecar::DeviceClass;

/// The most register windows of one device.
pub const REGIONS_MAX: usize = 8;
/// The most interrupt wires of one device.
pub const LINES_MAX: u8 = 32;

/// A register window that a device process serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Region {
    /// Address space it must be placed in.
    pub space: Space,
    /// Bytes. The board decides where it lies.
    pub length: u64,
}

words! {
    /// What the VMM asks of a device process.
    pub enum BusCall {
        /// First word of a connection: who you are here. Answered by [`BusAnswer::Attached`].
        Attach {
            /// The device that this connection serves.
            device: DeviceId,
            /// Incarnation of the process.
            generation: Generation,
        } => Idempotent,
        /// A guest loads from a register. Answered by [`BusAnswer::Value`]. Reading may have effects (a FIFO), so it is
        /// not repeated.
        Read {
            /// Which window.
            region: RegionIndex,
            /// First byte within it.
            offset: u64,
            /// Bytes.
            width: Width,
        } => Once,
        /// A guest stores to a register. Answered by [`BusAnswer::Done`].
        Write {
            /// Which window.
            region: RegionIndex,
            /// First byte within it.
            offset: u64,
            /// Bytes.
            width: Width,
            /// Zero-extended.
            value: u64,
        } => Once,
        /// The machine was reset: registers to their values at power-on, wires low. Answered by [`BusAnswer::Done`].
        Reset => Idempotent,
        /// Are the registers still served? Answered by [`BusAnswer::Done`] by the thread that serves them.
        Ping => Idempotent,
        /// Memory to talk through from now on, see [`lane`](crate::lane): beside it travel the memory, the bell and the
        /// post. Answered on the socket by [`BusAnswer::Done`], or by [`Refusal::NoLane`] from a process that talks over
        /// the socket only. Asked at most once of each incarnation, right after [`Self::Attach`].
        Lane => Idempotent,
    }
}

/// A question of the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusRequest {
    /// Unique on this connection.
    pub id: RequestId,
    /// What made it be asked.
    pub cause: CauseId,
    /// The incarnation that is asked.
    pub generation: Generation,
    /// Microseconds after which nobody waits for the answer any more.
    pub budget_us: u32,
    /// The question.
    pub call: BusCall,
}

impl Message for BusRequest {
    const KIND: Kind = Kind::BusRequest;
    const VARIANTS: &'static [(&'static str, Idempotence)] = BusCall::VARIANTS;

    fn variant(&self) -> usize {
        self.call.variant()
    }
}

/// What a device process answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BusAnswer {
    /// To [`BusCall::Attach`].
    Attached {
        /// What it is.
        class: DeviceClass,
        /// Its register windows; [`RegionIndex`] counts them.
        #[serde(deserialize_with = "bounded::list::<_, _, REGIONS_MAX>")]
        regions: Vec<Region>,
        /// How many interrupt wires it has; [`LineIndex`] counts them.
        lines: u8,
    },
    /// To [`BusCall::Read`]. Zero-extended; a value that does not fit the width of the question cannot be right.
    Value(u64),
    /// The rest: carried out.
    Done,
    /// Understood, and not carried out.
    Refused(Refusal),
}

/// Why a device process does not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Refusal {
    /// No such region, or the access leaves it.
    OutOfRange,
    /// The register has another width.
    Width,
    /// Asked of another generation.
    Generation,
    /// Asked before [`BusCall::Attach`].
    NotAttached,
    /// No lane can be had.
    NoLane,
}

words! {
    /// What a device process says.
    pub enum BusEvent {
        /// An answer to the question of that id. Its question decides whether that is repeated, the answer never is.
        Answer {
            /// The question's id.
            id: RequestId,
            /// The question's cause.
            cause: CauseId,
            /// The incarnation that answers.
            generation: Generation,
            /// The answer.
            answer: BusAnswer,
        } => Once,
        /// An interrupt wire has this level from now on.
        Line {
            /// The incarnation that says so.
            generation: Generation,
            /// What set it off, or the cause 0.
            cause: CauseId,
            /// Which wire.
            line: LineIndex,
            /// High is true.
            level: bool,
        } => Idempotent,
        /// A message-signalled interrupt: one edge.
        Msi {
            /// The incarnation that fires it.
            generation: Generation,
            /// What set it off, or the cause 0.
            cause: CauseId,
            /// The write.
            message: MsiMessage,
        } => Once,
    }
}
message_of_words!(BusEvent, BusEvent);

impl BusEvent {
    /// The incarnation that speaks.
    #[must_use]
    pub fn generation(&self) -> Generation {
        match self {
            Self::Answer { generation, .. } | Self::Line { generation, .. } | Self::Msi { generation, .. } => {
                *generation
            }
        }
    }
}
