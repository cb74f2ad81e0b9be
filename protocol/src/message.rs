//! What every message must declare about itself.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Whether a message may be sent again when nobody knows if it was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Idempotence {
    /// Twice is the same as once: a new incarnation is simply asked again.
    Idempotent,
    /// Twice differs from once. If the peer dies meanwhile, the asker is told so, with the new generation, and decides.
    Once,
}

/// The type of a frame's body: which conversation, and which side speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum Kind {
    /// VMM to a device process: [`crate::bus::BusRequest`].
    BusRequest = 1,
    /// Device process to VMM: [`crate::bus::BusEvent`].
    BusEvent = 2,
    /// Backend to VMM: [`crate::sidecar::SidecarReport`].
    SidecarReport = 3,
    /// VMM to backend: [`crate::sidecar::SidecarOrder`].
    SidecarOrder = 4,
    /// Operator to VMM: [`crate::operator::OperatorRequest`].
    OperatorRequest = 5,
    /// VMM to operator: [`crate::operator::OperatorReply`].
    OperatorReply = 6,
    /// A step in the life of a VM or a device, as it is traced: [`crate::lifecycle::LifecycleEvent`].
    Lifecycle = 7,
    /// An exit, as it is traced: [`crate::access::ExitRecord`].
    Exit = 8,
    /// VMM to a display process: [`crate::display::control::DisplayOrder`].
    DisplayOrder = 9,
    /// Display process to VMM: [`crate::display::control::DisplayReport`].
    DisplayReport = 10,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::BusRequest,
        Self::BusEvent,
        Self::SidecarReport,
        Self::SidecarOrder,
        Self::OperatorRequest,
        Self::OperatorReply,
        Self::Lifecycle,
        Self::Exit,
        Self::DisplayOrder,
        Self::DisplayReport,
    ];

    /// The kind of this number on the wire.
    #[must_use]
    pub fn from_wire(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.to_wire() == number)
    }

    /// Its number on the wire.
    #[must_use]
    pub fn to_wire(self) -> u16 {
        self as u16
    }

    /// The longest body, in bytes, that a frame of this kind may have. Checked before anything is allocated.
    #[must_use]
    pub fn ceiling(self) -> usize {
        match self {
            Self::BusRequest | Self::BusEvent | Self::Lifecycle | Self::Exit => 1 << 10,
            Self::SidecarReport => 16 << 10,
            Self::SidecarOrder | Self::DisplayOrder => 1 << 10,
            Self::DisplayReport => 8 << 10,
            Self::OperatorRequest | Self::OperatorReply => 64 << 10,
        }
    }

    /// The most descriptors that may travel beside a frame of this kind.
    #[must_use]
    pub fn descriptors_max(self) -> usize {
        match self {
            Self::SidecarOrder => 8,
            Self::BusRequest => 3,
            Self::DisplayOrder | Self::DisplayReport => 1,
            Self::BusEvent
            | Self::SidecarReport
            | Self::OperatorRequest
            | Self::OperatorReply
            | Self::Lifecycle
            | Self::Exit => 0,
        }
    }
}

/// A value that travels alone in a frame.
pub trait Message: Serialize + DeserializeOwned {
    /// Its frame's kind.
    const KIND: Kind;
    /// Every variant's name and whether it may be repeated, in the order of their numbers on the wire.
    const VARIANTS: &'static [(&'static str, Idempotence)];

    /// Index of this value's variant in [`Self::VARIANTS`].
    fn variant(&self) -> usize;

    /// Name of this value's variant, for traces and errors.
    fn name(&self) -> &'static str {
        Self::VARIANTS.get(self.variant()).map_or("?", |(name, _)| name)
    }

    /// Whether this value may be sent twice.
    fn idempotence(&self) -> Idempotence {
        Self::VARIANTS.get(self.variant()).map_or(Idempotence::Once, |(_, idempotence)| *idempotence)
    }
}

/// Declares an enum of words, each marked `Idempotent` or `Once`: a word without the mark does not compile.
macro_rules! words {
    ($(#[$meta:meta])* pub enum $name:ident {
        $($(#[$vmeta:meta])* $variant:ident $({ $($(#[$fmeta:meta])* $field:ident : $ty:ty),* $(,)? })? => $idem:ident,)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $($(#[$vmeta])* $variant $({ $($(#[$fmeta])* $field: $ty),* })?,)*
        }

        impl $name {
            /// Every word's name and whether it may be repeated, in the order of their numbers on the wire.
            pub const VARIANTS: &'static [(&'static str, $crate::message::Idempotence)] = &[
                $((concat!(stringify!($name), "::", stringify!($variant)), $crate::message::Idempotence::$idem),)*
            ];

            /// Index of this word in [`Self::VARIANTS`].
            #[must_use]
            pub fn variant(&self) -> usize {
                #[allow(dead_code, reason = "a discriminant of each word, used through its number only")]
                #[repr(usize)]
                enum Number { $($variant,)* }
                match self { $(Self::$variant $({ $($field: _),* })? => Number::$variant as usize,)* }
            }
        }
    };
}
pub(crate) use words;

/// The message that is exactly one enum of words.
macro_rules! message_of_words {
    ($name:ident, $kind:ident) => {
        impl $crate::message::Message for $name {
            const KIND: $crate::message::Kind = $crate::message::Kind::$kind;
            const VARIANTS: &'static [(&'static str, $crate::message::Idempotence)] = $name::VARIANTS;
            fn variant(&self) -> usize {
                $name::variant(self)
            }
        }
    };
}
pub(crate) use message_of_words;
