//! What a vCPU leaves the guest with: register accesses and the other exits.

use serde::{Deserialize, Serialize};

use crate::id::{CauseId, VcpuIndex};

/// An address space that registers live in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Space {
    /// x86 I/O ports, 0 to 0xFFFF.
    Pio,
    /// Guest-physical addresses that are not RAM.
    Mmio,
}

/// How many bytes an access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Width {
    /// 1 byte.
    Byte,
    /// 2 bytes.
    Word,
    /// 4 bytes.
    Dword,
    /// 8 bytes.
    Qword,
}

impl Width {
    /// All of them, narrow to wide.
    pub const ALL: [Self; 4] = [Self::Byte, Self::Word, Self::Dword, Self::Qword];

    /// The width of so many bytes, if there is one.
    #[must_use]
    pub fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            1 => Some(Self::Byte),
            2 => Some(Self::Word),
            4 => Some(Self::Dword),
            8 => Some(Self::Qword),
            _ => None,
        }
    }

    /// Number of bytes.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Dword => 4,
            Self::Qword => 8,
        }
    }

    /// What an access to nothing reads: every bit of this width set. Also the mask of a value that fits.
    #[must_use]
    pub fn all_ones(self) -> u64 {
        u64::MAX >> (64 - 8 * self.bytes())
    }

    /// Whether `value` has no bit outside this width.
    #[must_use]
    pub fn holds(self, value: u64) -> bool {
        value & !self.all_ones() == 0
    }
}

/// Direction of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AccessKind {
    /// The guest loads; the answer is a value.
    Read,
    /// The guest stores this value, zero-extended from the access's width.
    Write(u64),
}

/// One access of a guest to a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Access {
    /// Address space.
    pub space: Space,
    /// First byte, in that space.
    pub address: u64,
    /// Bytes moved.
    pub width: Width,
    /// Load or store.
    pub kind: AccessKind,
}

/// Why a vCPU left the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Exit {
    /// A register access that the board must answer.
    Access(Access),
    /// HLT: nothing to run until an interrupt.
    Halt,
    /// Triple fault, or the processor's shutdown state.
    Shutdown,
    /// Somebody asked this vCPU to stop.
    StopRequested,
    /// The CPU cannot go on; the code is the CPU's own (KVM: suberror of KVM_EXIT_INTERNAL_ERROR).
    Failed {
        /// Reason code.
        code: u32,
    },
}

/// An exit as it is traced and recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Who exited.
    pub vcpu: VcpuIndex,
    /// The id that everything it sets off carries.
    pub cause: CauseId,
    /// Why.
    pub exit: Exit,
}
