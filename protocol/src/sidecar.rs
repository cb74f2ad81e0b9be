//! The sidecar: a socket pair between a VMM and each backend process that it started, for everything that the device's
//! own wire (vhost-user, the bus) has no word for.
//!
//! Order of a start: the backend says [`SidecarReport::Hello`]; the VMM, which by then has closed its copies of the
//! descriptors that it passed, says [`SidecarOrder::Start`]; the backend says how its jail came out
//! ([`SidecarReport::Jailed`]); only after the start does it lock its image and prepare its device, and says
//! [`SidecarReport::Ready`]. A hang-up of either end means that the other side is gone: a backend ends
//! then. A backend that runs alone, without a sidecar, skips all of it.

use serde::{Deserialize, Serialize};

use crate::bounded;
use crate::id::{Generation, ProcessId, QueueIndex};
use crate::jail::{JailedLayer, LAYERS_MAX};
use crate::message::{message_of_words, words};

/// The most queues that one progress report tells about; more queues need more reports.
pub const PROGRESS_QUEUES_MAX: usize = 256;
/// The longest text, in bytes, of a log line or a reason. A sender cuts there; a longer one cannot be right.
pub const TEXT_MAX: usize = 4096;

/// What a process serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DeviceClass {
    /// A disk.
    Block,
    /// A network card.
    Net,
    /// A display.
    Gpu,
    /// A 16550 serial port.
    Uart,
    /// Something that the VMM has no name for, by its author's number.
    Other(u32),
    /// A screen that people look at.
    Display,
}

impl std::fmt::Display for DeviceClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Block => f.write_str("block"),
            Self::Net => f.write_str("net"),
            Self::Gpu => f.write_str("gpu"),
            Self::Uart => f.write_str("uart"),
            Self::Display => f.write_str("display"),
            Self::Other(number) => write!(f, "other({number})"),
        }
    }
}

/// What a backend can do on its sidecar.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SidecarFeatures(pub u64);

impl SidecarFeatures {
    /// Sends [`SidecarReport::Progress`] at the interval that [`SidecarOrder::Start`] asks for, when something changed.
    pub const PROGRESS: Self = Self(1);
    /// Understands [`SidecarOrder::Quiesce`].
    pub const QUIESCE: Self = Self(2);
    /// Keeps an in-flight region: full recovery.
    pub const INFLIGHT: Self = Self(4);
    /// Understands [`SidecarOrder::Measure`].
    pub const MEASURE: Self = Self(8);
    /// Understands [`SidecarOrder::StartBeside`].
    pub const BESIDE: Self = Self(16);

    /// Whether all bits of `other` are here.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for SidecarFeatures {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// How urgent a log line is; the names are those of `tracing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something is odd.
    Warn,
    /// A step of a life.
    Info,
    /// For who debugs.
    Debug,
    /// Each small thing.
    Trace,
}

/// How far one queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct QueueProgress {
    /// Which queue.
    pub queue: QueueIndex,
    /// Requests completed by this incarnation; only grows.
    pub completed: u64,
    /// Requests taken and not completed.
    pub in_flight: u32,
}

/// Why a backend leaves on its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GoodbyeReason {
    /// It was told to ([`SidecarOrder::Exit`], or the front end hung up).
    Asked,
    /// Its configuration cannot work; the text says what and how to mend it. Restarting would not help.
    Config(String),
    /// Its host resource failed; the text says how.
    Resource(String),
    /// What it was sent cannot be right; the text says what.
    Peer(String),
}

words! {
    /// What a backend tells its VMM.
    pub enum SidecarReport {
        /// First word.
        Hello {
            /// [`crate::PROTOCOL_VERSION`] that it was built with.
            version: u16,
            /// What it serves.
            class: DeviceClass,
            /// Its process id, as it sees it.
            pid: ProcessId,
            /// What it can do.
            features: SidecarFeatures,
        } => Idempotent,
        /// The device can be driven: its socket is listened to, its image is open and locked.
        Ready {
            /// The incarnation that [`SidecarOrder::Start`] named.
            generation: Generation,
        } => Idempotent,
        /// How far each queue is. Sent by what completes requests, not by a thread that only answers.
        Progress {
            /// One entry per queue.
            #[serde(deserialize_with = "bounded::list::<_, _, PROGRESS_QUEUES_MAX>")]
            queues: Vec<QueueProgress>,
        } => Idempotent,
        /// A line for the VMM's log.
        Log {
            /// How urgent.
            level: LogLevel,
            /// The line, without its line feed.
            text: String,
        } => Once,
        /// To [`SidecarOrder::Ping`].
        Pong {
            /// The ping's.
            nonce: u64,
        } => Idempotent,
        /// To [`SidecarOrder::Quiesce`]: nothing is in flight and nothing is started.
        Quiesced => Idempotent,
        /// Last word: it ends now, and why.
        Goodbye {
            /// Why.
            reason: GoodbyeReason,
        } => Idempotent,
        /// To [`SidecarOrder::Measure`]: the size that the device has now, and that its configuration space says.
        Measured {
            /// Bytes.
            bytes: u64,
        } => Idempotent,
        /// The jail is closed, or as much of it as this host allows. Comes once, before [`SidecarReport::Ready`]. A layer
        /// that does not concern the device is left out.
        Jailed {
            /// What became of each layer; each is named at most once.
            #[serde(deserialize_with = "bounded::list::<_, _, LAYERS_MAX>")]
            layers: Vec<JailedLayer>,
        } => Idempotent,
    }
}
message_of_words!(SidecarReport, SidecarReport);

words! {
    /// What a VMM tells a backend.
    pub enum SidecarOrder {
        /// The VMM has closed its copies of all descriptors that the backend got: lock, prepare, say ready.
        Start {
            /// Which incarnation this is.
            generation: Generation,
            /// Milliseconds between two progress reports; 0: none.
            progress_ms: u32,
        } => Idempotent,
        /// Say [`SidecarReport::Pong`].
        Ping {
            /// Comes back.
            nonce: u64,
        } => Idempotent,
        /// Take nothing new, finish what is in flight, say [`SidecarReport::Quiesced`].
        Quiesce => Idempotent,
        /// Finish what is in flight, make it durable, say [`SidecarReport::Goodbye`], end.
        Exit => Idempotent,
        /// What the device stands on may have another size: look, and say [`SidecarReport::Measured`].
        Measure => Idempotent,
        /// As [`SidecarOrder::Start`], but another process serves the device: lock nothing, touch nothing that both would,
        /// prepare everything else and say ready. The lock is taken when the front end hands over the first ring.
        StartBeside {
            /// Which incarnation this is.
            generation: Generation,
            /// Milliseconds between two progress reports; 0: none.
            progress_ms: u32,
        } => Idempotent,
    }
}
message_of_words!(SidecarOrder, SidecarOrder);

/// Cuts a text to what a frame may carry, at a character's boundary.
#[must_use]
pub fn cut_text(text: &str) -> &str {
    let mut end = text.len().min(TEXT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or("")
}
