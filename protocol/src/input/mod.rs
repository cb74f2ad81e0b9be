//! The input wire: what somebody types and points at, told by a display process to an input device's process.
//!
//! One direction only. A [`Frame`] is 4 bytes of header (kind, number of events, both `u16`), then 8 bytes for each event as
//! virtio-input has them (type, code, value), all little-endian. A [`Report`] is what belongs together: it ends with
//! SYN_REPORT, is never longer than [`REPORT_MAX`] events, and is delivered to the guest whole or not at all.
//! [`Frame::Begin`] is the first word of whoever speaks: what the speaker before it held down is let go.
//!
//! A pair of SOCK_SEQPACKET sockets is the best road: a frame is one message there, so one pair can outlive any number of
//! processes at either end. A stream works as long as neither end is exchanged ([`channel`]).

mod channel;
#[cfg(test)]
mod tests;

pub use channel::{Hearer, InputError, Speaker, Spoken};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 4;
/// Bytes of an event.
pub const EVENT_LEN: usize = 8;
/// Events of one report, SYN_REPORT not counted.
pub const REPORT_MAX: usize = 31;
/// The longest frame, in bytes.
pub const FRAME_MAX: usize = HEADER_LEN + (REPORT_MAX + 1) * EVENT_LEN;

/// Types and codes of events (Linux, `input-event-codes.h`), as far as they are used here.
pub mod code {
    /// Type: the end of a report.
    pub const SYN: u16 = 0;
    /// Type: keys and buttons.
    pub const KEY: u16 = 1;
    /// Type: relative axes.
    pub const REL: u16 = 2;
    /// Type: absolute axes.
    pub const ABS: u16 = 3;
    /// Type: lights.
    pub const LED: u16 = 0x11;
    /// Type: repetition of keys.
    pub const REP: u16 = 0x14;

    /// Most of a key's code.
    pub const KEY_MAX: u16 = 0x2ff;
    /// Most of a relative axis' code.
    pub const REL_MAX: u16 = 0x0f;
    /// Most of an absolute axis' code.
    pub const ABS_MAX: u16 = 0x3f;

    /// Relative and absolute: columns.
    pub const X: u16 = 0;
    /// Relative and absolute: rows.
    pub const Y: u16 = 1;
    /// Relative: the wheel, sideways.
    pub const HWHEEL: u16 = 6;
    /// Relative: the wheel.
    pub const WHEEL: u16 = 8;

    /// Key: the main button of a pointer.
    pub const BTN_LEFT: u16 = 0x110;
    /// Key: its right button.
    pub const BTN_RIGHT: u16 = 0x111;
    /// Key: its middle one.
    pub const BTN_MIDDLE: u16 = 0x112;
    /// Key: "back".
    pub const BTN_SIDE: u16 = 0x113;
    /// Key: "forward".
    pub const BTN_EXTRA: u16 = 0x114;
}

/// The largest value of an absolute axis; the smallest is 0.
pub const AXIS_MAX: u16 = 0x7fff;

/// What an input device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum InputKind {
    /// Keys.
    Keyboard,
    /// A pointer that says where it is.
    Tablet,
    /// A pointer that says how far it went.
    Mouse,
}

impl InputKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Keyboard, Self::Tablet, Self::Mouse];

    /// What people call it, on command lines too.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Keyboard => "keyboard",
            Self::Tablet => "tablet",
            Self::Mouse => "mouse",
        }
    }
}

impl std::fmt::Display for InputKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for InputKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::ALL.into_iter().find(|kind| kind.name() == text);
        named.ok_or_else(|| "there are keyboard, tablet and mouse".to_owned())
    }
}

/// One event. Made by the functions below only, so that it is one that a guest can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event {
    kind: u16,
    code: u16,
    value: i32,
}

impl Event {
    /// The end of a report.
    pub const SYN: Self = Self { kind: code::SYN, code: 0, value: 0 };

    /// A key or button that goes down or up.
    ///
    /// # Errors
    /// There is no such key.
    pub fn key(key: u16, down: bool) -> Result<Self, WireError> {
        Self::checked(code::KEY, key, i32::from(down))
    }
    /// An axis that moves by so much.
    ///
    /// # Errors
    /// There is no such axis.
    pub fn relative(axis: u16, by: i32) -> Result<Self, WireError> {
        Self::checked(code::REL, axis, by)
    }
    /// An axis that is there.
    ///
    /// # Errors
    /// There is no such axis, or no such place on it.
    pub fn absolute(axis: u16, at: u16) -> Result<Self, WireError> {
        Self::checked(code::ABS, axis, at.into())
    }

    fn checked(kind: u16, code: u16, value: i32) -> Result<Self, WireError> {
        let sound = match kind {
            code::KEY => code <= code::KEY_MAX && matches!(value, 0 | 1),
            code::REL => code <= code::REL_MAX,
            code::ABS => code <= code::ABS_MAX && (0..=i32::from(AXIS_MAX)).contains(&value),
            _ => false,
        };
        if sound { Ok(Self { kind, code, value }) } else { Err(WireError::Event { kind, code, value }) }
    }

    /// Its type.
    #[must_use]
    pub fn kind(self) -> u16 {
        self.kind
    }
    /// Its code.
    #[must_use]
    pub fn code(self) -> u16 {
        self.code
    }
    /// Its value.
    #[must_use]
    pub fn value(self) -> i32 {
        self.value
    }
    /// The key, and whether it goes down.
    #[must_use]
    pub fn as_key(self) -> Option<(u16, bool)> {
        (self.kind == code::KEY).then_some((self.code, self.value != 0))
    }

    /// As virtio-input has it (virtio 1.2, 5.8.6).
    #[must_use]
    pub fn to_bytes(self) -> [u8; EVENT_LEN] {
        let ([a, b], [c, d]) = (self.kind.to_le_bytes(), self.code.to_le_bytes());
        let [e, f, g, h] = self.value.to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }
    fn from_bytes(bytes: &[u8; EVENT_LEN]) -> Result<Self, WireError> {
        let [a, b, c, d, e, f, g, h] = *bytes;
        let (kind, code) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        Self::checked(kind, code, i32::from_le_bytes([e, f, g, h]))
    }
}

/// Events that belong together; at least one, and SYN_REPORT behind them, which is not in the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report(Vec<Event>);

impl Report {
    /// Events of one report.
    ///
    /// # Errors
    /// There is none, there are too many, or a SYN is among them.
    pub fn new(events: Vec<Event>) -> Result<Self, WireError> {
        if events.is_empty() || events.len() > REPORT_MAX || events.contains(&Event::SYN) {
            return Err(WireError::Count(events.len()));
        }
        Ok(Self(events))
    }
    /// Its events.
    #[must_use]
    pub fn events(&self) -> &[Event] {
        &self.0
    }
    /// Its events as a guest gets them: SYN_REPORT last.
    pub fn told(&self) -> impl ExactSizeIterator<Item = Event> + '_ {
        (0..self.0.len() + 1).map(|at| self.0.get(at).copied().unwrap_or(Event::SYN))
    }
    /// Without the events that a device does not have; nothing, if nothing is left.
    #[must_use]
    pub fn filtered(mut self, has: impl Fn(Event) -> bool) -> Option<Self> {
        self.0.retain(|event| has(*event));
        (!self.0.is_empty()).then_some(self)
    }
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Another speaker begins: whatever was held down is not any more.
    Begin,
    /// Something happened.
    Report(Report),
}

const BEGIN: u16 = 1;
const REPORT: u16 = 2;

impl Frame {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (kind, events) = match self {
            Self::Begin => (BEGIN, None),
            Self::Report(report) => (REPORT, Some(report.told())),
        };
        let count = events.as_ref().map_or(0, ExactSizeIterator::len) as u16;
        let mut bytes = [kind.to_le_bytes(), count.to_le_bytes()].concat();
        bytes.extend(events.into_iter().flatten().flat_map(Event::to_bytes));
        bytes
    }

    /// The frame at the front of `bytes`, and how many of them it has; nothing, when more have to come.
    ///
    /// # Errors
    /// [`WireError`]: nothing that cannot be right gets past here.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, WireError> {
        let Some(([a, b, c, d], rest)) = bytes.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let (kind, count) = (u16::from_le_bytes([*a, *b]), usize::from(u16::from_le_bytes([*c, *d])));
        match (kind, count) {
            (BEGIN, 0) => return Ok(Some((Self::Begin, HEADER_LEN))),
            (BEGIN, count) => return Err(WireError::Count(count)),
            (REPORT, 2..) if count <= REPORT_MAX + 1 => {}
            (REPORT, count) => return Err(WireError::Count(count.saturating_sub(1))),
            (kind, _) => return Err(WireError::Kind(kind)),
        }
        let Some(events) = rest.get(..count * EVENT_LEN) else { return Ok(None) };
        let (events, _) = events.as_chunks::<EVENT_LEN>();
        let Some((last, events)) = events.split_last() else { return Err(WireError::Count(0)) };
        if *last != Event::SYN.to_bytes() {
            return Err(WireError::Open);
        }
        let events = events.iter().map(Event::from_bytes).collect::<Result<Vec<_>, _>>()?;
        Ok(Some((Self::Report(Report::new(events)?), HEADER_LEN + count * EVENT_LEN)))
    }
}

/// Bytes that are no frame of this wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// No such frame.
    #[error("an input frame has the unknown kind {0}")]
    Kind(u16),
    /// No report has so many events.
    #[error("a report of {0} events; there are 1 to {REPORT_MAX}")]
    Count(usize),
    /// It does not end where it says that it does.
    #[error("a report does not end with SYN_REPORT")]
    Open,
    /// No device has such an event.
    #[error("an event of type {kind}, code {code:#x}, value {value} cannot be")]
    Event {
        /// Its type.
        kind: u16,
        /// Its code.
        code: u16,
        /// Its value.
        value: i32,
    },
}
