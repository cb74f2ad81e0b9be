//! Tables of fixed layout: FADT (ACPI 6.5, 5.2.9) and MADT (5.2.12).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;
use atoll_devices::acpi_hotplug;

use super::{AcpiConfig, OEM, OEM_REVISION, OEM_TABLE};
use crate::machine::layout::{ACPI_HOTPLUG, ACPI_PM, IOAPIC, LAPIC, RESET_PORT, RESET_VALUE, SCI_GSI};

/// Offsets in the power management block.
const PM1_EVENT: u64 = 0;
const PM1_CONTROL: u64 = 4;
const PM_TIMER: u64 = 8;

/// `IAPC_BOOT_ARCH`: there are ISA devices, but no keyboard controller, no VGA, and no link power management.
const BOOT_ARCHITECTURE: u16 = 1 | 1 << 2 | 1 << 4;

fn register(offset: u64, bytes: u8, size: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bytes * 8, 0, size, ACPI_PM.start + offset)
}

/// The fixed hardware: power management registers, reset register, and where FACS and DSDT are.
pub(super) fn fadt(facs: u64, dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = (SCI_GSI as u16).into();
    // Only one form: kernels that find two take them for two tables.
    fadt.x_firmware_ctrl = facs.into();
    // Both forms: older kernels want the short one, and equal ones are one table.
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.pm1a_evt_blk = ((ACPI_PM.start + PM1_EVENT) as u32).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = register(PM1_EVENT, 4, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = ((ACPI_PM.start + PM1_CONTROL) as u32).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = register(PM1_CONTROL, 2, AccessSize::WordAccess);
    fadt.pm_tmr_blk = ((ACPI_PM.start + PM_TIMER) as u32).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = register(PM_TIMER, 4, AccessSize::DwordAccess);
    fadt.gpe0_blk = ((ACPI_HOTPLUG.start + acpi_hotplug::GPE_OFFSET) as u32).into();
    fadt.gpe0_blk_len = acpi_hotplug::GPE_LEN;
    fadt.x_gpe0_blk = GAS::new(
        AddressSpace::SystemIo,
        acpi_hotplug::GPE_LEN * 8,
        0,
        AccessSize::ByteAccess,
        ACPI_HOTPLUG.start + acpi_hotplug::GPE_OFFSET,
    );
    // No C2 and no C3.
    fadt.p_lvl2_lat = 0xffff.into();
    fadt.p_lvl3_lat = 0xffff.into();
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(RESET_PORT));
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// Interrupt flags (5.2.12.5): polarity in bits 0-1, trigger in bits 2-3.
const ACTIVE_HIGH_LEVEL: u16 = 1 | 3 << 2;
/// As the bus has it: ISA is active high, edge.
const AS_THE_BUS: u16 = 0;
/// Flag of the table: there is an 8259 pair too.
const PCAT_COMPAT: u32 = 1;
/// I/O APIC id: out of the way of the vCPUs'.
const IOAPIC_ID: u8 = 0;

/// The interrupt controllers.
pub(super) fn madt(config: AcpiConfig) -> Sdt {
    const REVISION: u8 = 5;
    const HEADER: u32 = 36;
    let mut madt = Sdt::new(*b"APIC", HEADER, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&(LAPIC.start as u32).to_le_bytes());
    madt.append_slice(&PCAT_COMPAT.to_le_bytes());
    for vcpu in 0..config.vcpus {
        // Processor local APIC: type 0, length 8, ACPI id, APIC id, enabled.
        madt.append_slice(&[0, 8, vcpu, vcpu, 1, 0, 0, 0]);
    }
    // I/O APIC: type 1, length 12, id, reserved, address, first GSI.
    madt.append_slice(&[1, 12, IOAPIC_ID, 0]);
    madt.append_slice(&(IOAPIC.start as u32).to_le_bytes());
    madt.append_slice(&0_u32.to_le_bytes());
    for (irq, gsi, flags) in [(0, 2, AS_THE_BUS), (SCI_GSI as u8, SCI_GSI, ACTIVE_HIGH_LEVEL)] {
        // Interrupt source override: type 2, length 10, ISA, its interrupt, GSI, flags.
        madt.append_slice(&[2, 10, 0, irq]);
        madt.append_slice(&gsi.to_le_bytes());
        madt.append_slice(&flags.to_le_bytes());
    }
    // Local APIC NMI: type 4, length 6, all processors, flags, LINT1.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}
