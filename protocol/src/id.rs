//! Identifiers as types of their own, so that a queue never stands where a vCPU was meant.
//!
//! All of them are transparent numbers on the wire. An id that came from a peer is only a number until whoever decodes it
//! has looked it up.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! ids {
    ($($(#[$meta:meta])* $name:ident($inner:ty) = $prefix:literal;)*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    )*};
}

ids! {
    /// A virtual machine, unique on its host while it lives.
    VmId(u64) = "vm";
    /// A device of one VM: the same number for its whole life, over restarts of its process.
    DeviceId(u32) = "device";
    /// A virtqueue of one device.
    QueueIndex(u16) = "queue";
    /// A vCPU, counted from 0.
    VcpuIndex(u16) = "vcpu";
    /// A register window of one device, in the order in which the device announced them.
    RegionIndex(u8) = "region";
    /// An interrupt wire of one device, in the order in which the device announced them. Never a number of the board.
    LineIndex(u8) = "line";
    /// Global system interrupt: an input of the board's interrupt controllers.
    Gsi(u32) = "gsi";
    /// The incarnation of a process that serves a device: 1 for the first, never reused, so never late for another one.
    Generation(u64) = "generation ";
    /// A question on one connection, unique for as long as the connection lives.
    RequestId(u64) = "request ";
    /// What made a question be asked: a vCPU's exit, an operator's request. The same in all processes that it reaches.
    CauseId(u64) = "cause ";
    /// A process id as the peer says it. A claim: never signalled, only compared with what the kernel says.
    ProcessId(u32) = "pid ";
}

macro_rules! addresses {
    ($($(#[$meta:meta])* $name:ident = $prefix:literal;)*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{:#x}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl $name {
            /// The address `bytes` further on, unless that leaves the 64-bit space.
            #[must_use]
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }
        }
    )*};
}

addresses! {
    /// A guest-physical address.
    Gpa = "gpa:";
    /// An address as a device behind an IOMMU sees it.
    Iova = "iova:";
}

impl Generation {
    /// The first incarnation.
    pub const FIRST: Self = Self(1);

    /// The next incarnation. At one a nanosecond it lasts 584 years: saturating is never reached and never wraps.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// A message-signalled interrupt: the write that a device makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MsiMessage {
    /// Where the device writes (0xFEE0_0000 and up on x86).
    pub address: u64,
    /// What it writes.
    pub data: u32,
}
