//! Registers of a local APIC by number (SDM vol. 3, table 11-1): the offset in the xAPIC page divided by 16, which is
//! also the distance from MSR 0x800 in x2APIC mode.

pub(super) const ID: u32 = 0x02;
pub(super) const VERSION: u32 = 0x03;
pub(super) const TPR: u32 = 0x08;
pub(super) const APR: u32 = 0x09;
pub(super) const PPR: u32 = 0x0a;
pub(super) const EOI: u32 = 0x0b;
pub(super) const LDR: u32 = 0x0d;
pub(super) const DFR: u32 = 0x0e;
pub(super) const SVR: u32 = 0x0f;
pub(super) const ISR: u32 = 0x10;
pub(super) const ISR_LAST: u32 = 0x17;
pub(super) const TMR: u32 = 0x18;
pub(super) const TMR_LAST: u32 = 0x1f;
pub(super) const IRR: u32 = 0x20;
pub(super) const IRR_LAST: u32 = 0x27;
pub(super) const ESR: u32 = 0x28;
pub(super) const ICR_LOW: u32 = 0x30;
pub(super) const ICR_HIGH: u32 = 0x31;
pub(super) const LVT_TIMER: u32 = 0x32;
pub(super) const LVT_ERROR: u32 = 0x37;
pub(super) const INITIAL_COUNT: u32 = 0x38;
pub(super) const CURRENT_COUNT: u32 = 0x39;
pub(super) const DIVIDE: u32 = 0x3e;
pub(super) const SELF_IPI: u32 = 0x3f;

/// Version 0x14 with six LVT entries; no suppression of EOI broadcasts.
pub(super) const VERSION_VALUE: u32 = 0x05_0014;

/// Entries of the local vector table, in order of their registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lvt {
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

pub(super) const LVT_COUNT: usize = 6;
pub(super) const LVT_MASKED: u32 = 1 << 16;

impl Lvt {
    pub(super) fn from_register(register: u32) -> Option<Self> {
        match register {
            LVT_TIMER => Some(Self::Timer),
            0x33 => Some(Self::Thermal),
            0x34 => Some(Self::Performance),
            0x35 => Some(Self::Lint0),
            0x36 => Some(Self::Lint1),
            LVT_ERROR => Some(Self::Error),
            _ => None,
        }
    }

    pub(super) fn index(self) -> usize {
        self as usize
    }

    /// Bits that software can set.
    pub(super) fn writable(self) -> u32 {
        match self {
            Self::Timer => 0x7_00ff,
            Self::Thermal | Self::Performance => 0x1_07ff,
            Self::Lint0 | Self::Lint1 => 0x1_a7ff,
            Self::Error => 0x1_00ff,
        }
    }
}

/// Errors of the error status register.
pub(super) const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
pub(super) const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
pub(super) const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Software enable, in SVR.
pub(super) const SVR_ENABLE: u32 = 1 << 8;

/// IA32_APIC_BASE.
pub(super) const BASE_BSP: u64 = 1 << 8;
pub(super) const BASE_X2APIC: u64 = 1 << 10;
pub(super) const BASE_ENABLE: u64 = 1 << 11;
/// Where the register page is. The board does not move it.
pub(super) const BASE_ADDRESS: u64 = 0xfee0_0000;
