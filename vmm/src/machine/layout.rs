//! The numbers of board `atoll-1`. They are frozen: a change makes another board (design.md, section 5).
//!
//! RAM fills guest-physical memory from zero up to the PCI hole and goes on above 4 GiB. The hole holds 32-bit BARs, ECAM
//! and the interrupt controllers; 64-bit BARs have a window of their own at 512 GiB, below the 40 physical address bits
//! that every CPU model has.

use std::fmt;

use thiserror::Error;

/// Name and version of the board.
pub const BOARD: &str = "atoll-1";

/// A stretch of guest-physical addresses or ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

impl Span {
    /// One past the last address.
    pub const fn end(self) -> u64 {
        self.start + self.len
    }
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// RAM between these addresses moves above 4 GiB.
pub const PCI_HOLE: Span = Span { start: 3 * GIB, len: GIB };
/// 32-bit BARs.
pub const MMIO32: Span = Span { start: 0xc000_0000, len: 0x2000_0000 };
/// Enhanced configuration access: 256 buses.
pub const ECAM: Span = Span { start: 0xe000_0000, len: 256 * MIB };
/// 64-bit BARs.
pub const MMIO64: Span = Span { start: 512 * GIB, len: 512 * GIB };
/// I/O APIC registers.
pub const IOAPIC: Span = Span { start: 0xfec0_0000, len: 0x1000 };
/// Local APIC registers.
pub const LAPIC: Span = Span { start: 0xfee0_0000, len: 0x1000 };
/// Kept free of devices for KVM: its task state segment and identity page table on Intel.
pub const KVM_PRIVATE: Span = Span { start: 0xfffb_c000, len: 0x4000 };
/// Conventional memory that firmware would keep (EBDA, video, ROMs): not RAM in the memory map, and where the ACPI
/// tables are.
pub const LEGACY: Span = Span { start: 0xa_0000, len: 0x6_0000 };
/// ACPI tables, from the RSDP on.
pub const ACPI_TABLES: Span = Span { start: 0xe_0000, len: 0x2_0000 };

/// First serial port.
pub const COM1: Span = Span { start: 0x3f8, len: 8 };
/// Its interrupt.
pub const COM1_GSI: u32 = 4;
/// Second serial port.
pub const COM2: Span = Span { start: 0x2f8, len: 8 };
/// Its interrupt.
pub const COM2_GSI: u32 = 3;
/// Clock and CMOS.
pub const RTC: Span = Span { start: 0x70, len: 2 };
/// Its interrupt.
pub const RTC_GSI: u32 = 8;
/// ACPI event block, control block and power management timer (ACPI 6.5, 4.8.3).
pub const ACPI_PM: Span = Span { start: 0x600, len: 0x10 };
/// General-purpose events and PCI slots of ACPI hotplug.
pub const ACPI_HOTPLUG: Span = Span { start: 0x620, len: atoll_devices::acpi_hotplug::LEN };
/// Slots of bus 0; the host bridge in the first one is fixed.
pub const PCI_SLOTS: u8 = 32;
/// Value of SLP_TYP that switches the machine off (S5).
pub const S5_SLEEP_TYPE: u8 = atoll_devices::acpi_pm::S5_SLEEP_TYPE;
/// ACPI system control interrupt.
pub const SCI_GSI: u32 = 9;
/// Reset register.
pub const RESET_PORT: u16 = 0xcf9;
/// What resets the machine when written there.
pub const RESET_VALUE: u8 = 6;
/// Configuration mechanism 1.
pub const PCI_PORTS: Span = Span { start: 0xcf8, len: 8 };
/// I/O BARs.
pub const PCI_IO: Span = Span { start: 0x1000, len: 0xf000 };
/// The interrupts that PCI pins A to D reach: 16 to 19.
pub const PCI_GSI_BASE: u32 = 16;
/// Inputs of the I/O APIC.
pub const GSI_COUNT: u32 = 24;

/// Least RAM: the tables below 1 MiB and a kernel above.
pub const RAM_MIN: u64 = 16 * MIB;
/// Most RAM: what lies below the window of 64-bit BARs.
pub const RAM_MAX: u64 = MMIO64.start - PCI_HOLE.len;

/// A number of bytes as users write it, with the largest unit that divides it.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(50, "P"), (40, "T"), (30, "G"), (20, "M"), (10, "K")];
        let unit = units.into_iter().find(|(shift, _)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        let (shift, name) = unit.unwrap_or((0, ""));
        write!(formatter, "{}{name}", self.0 >> shift)
    }
}

/// Memory of a size that the board cannot have.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MemorySizeError {
    /// Too little.
    #[error("--memory size={} is too little for a guest; the least is {}", Size(*.0), Size(RAM_MIN))]
    TooSmall(u64),
    /// Too much.
    #[error("--memory size={} is more than board {BOARD} can hold; the most is {}", Size(*.0), Size(RAM_MAX))]
    TooLarge(u64),
    /// Not whole MiB.
    #[error("--memory size={} is not a multiple of 1M", Size(*.0))]
    Uneven(u64),
}

/// The RAM regions of a machine with `size` bytes, in order of address.
pub fn ram(size: u64) -> Result<Vec<Span>, MemorySizeError> {
    match size {
        _ if size < RAM_MIN => Err(MemorySizeError::TooSmall(size)),
        _ if size > RAM_MAX => Err(MemorySizeError::TooLarge(size)),
        _ if !size.is_multiple_of(MIB) => Err(MemorySizeError::Uneven(size)),
        _ if size <= PCI_HOLE.start => Ok(vec![Span { start: 0, len: size }]),
        _ => {
            Ok(vec![Span { start: 0, len: PCI_HOLE.start }, Span { start: PCI_HOLE.end(), len: size - PCI_HOLE.start }])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_on_above_the_hole() {
        assert_eq!(ram(512 * MIB), Ok(vec![Span { start: 0, len: 512 * MIB }]));
        assert_eq!(ram(3 * GIB).unwrap().len(), 1);
        assert_eq!(ram(5 * GIB), Ok(vec![Span { start: 0, len: 3 * GIB }, Span { start: 4 * GIB, len: 2 * GIB }]));
        assert!(ram(RAM_MAX).unwrap().iter().all(|span| span.end() <= MMIO64.start));
    }

    #[test]
    fn absurd_sizes_are_named() {
        assert_eq!(ram(MIB), Err(MemorySizeError::TooSmall(MIB)));
        assert_eq!(ram(1 << 50), Err(MemorySizeError::TooLarge(1 << 50)));
        assert_eq!(ram(512 * MIB + 1), Err(MemorySizeError::Uneven(512 * MIB + 1)));
        assert!(MemorySizeError::TooLarge(1 << 50).to_string().contains("511G"));
    }

    /// No two things of the board claim the same address.
    #[test]
    fn spans_do_not_overlap() {
        let mut memory = [MMIO32, ECAM, IOAPIC, LAPIC, KVM_PRIVATE, MMIO64];
        memory.sort_by_key(|span| span.start);
        assert!(memory.windows(2).all(|pair| pair[0].end() <= pair[1].start));
        assert!(memory.iter().take(5).all(|span| span.start >= PCI_HOLE.start && span.end() <= PCI_HOLE.end()));
        let mut ports = [COM1, COM2, RTC, ACPI_PM, ACPI_HOTPLUG, PCI_PORTS, PCI_IO];
        ports.sort_by_key(|span| span.start);
        assert!(ports.windows(2).all(|pair| pair[0].end() <= pair[1].start));
    }
}
