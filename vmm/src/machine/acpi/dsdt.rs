//! The DSDT: what is on the board, in AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, PackageBuilder,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use super::{AcpiConfig, OEM, OEM_REVISION, OEM_TABLE, hotplug};
use crate::machine::layout::{
    ACPI_HOTPLUG, COM1, COM1_GSI, ECAM, MMIO32, MMIO64, PCI_GSI_BASE, PCI_PORTS, PCI_SLOTS, RTC, RTC_GSI,
    S5_SLEEP_TYPE, Span,
};

const PCI_PINS: u32 = 4;

/// Fixed ports of a device.
fn ports(span: Span) -> IO {
    IO::new(span.start as u16, span.start as u16, 1, span.len as u8)
}

/// An ISA interrupt: active high, edge, not shared.
fn isa_interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// The whole table.
pub(super) fn dsdt(config: AcpiConfig) -> Vec<u8> {
    const REVISION: u8 = 6;
    const HEADER: u32 = 36;
    let mut devices = Vec::new();
    pci_root(&mut devices);
    ecam(&mut devices);
    if config.com1 {
        serial(&mut devices);
    }
    clock(&mut devices);
    let mut table = Sdt::new(*b"DSDT", HEADER, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&Scope::raw(Path::new("\\_SB_"), devices));
    let mut event = Vec::new();
    hotplug::event(&mut event);
    table.append_slice(&event);
    let mut sleep = Vec::new();
    // SLP_TYPa, SLP_TYPb and two reserved values.
    let states = Package::new(vec![&S5_SLEEP_TYPE, &S5_SLEEP_TYPE, &0_u8, &0_u8]);
    Name::new("\\_S5_".into(), &states).to_aml_bytes(&mut sleep);
    table.append_slice(&sleep);
    table.as_slice().to_vec()
}

/// The PCI host bridge: bus 0 with its windows, and where pins A to D of each slot lead.
fn pci_root(sink: &mut Vec<u8>) {
    let mut routes = PackageBuilder::new();
    for slot in 0..u32::from(PCI_SLOTS) {
        for pin in 0..PCI_PINS {
            // Any function of the slot; pins turn by one from slot to slot; no link device but a GSI.
            let gsi = PCI_GSI_BASE + (slot + pin) % PCI_PINS;
            routes.add_element(&Package::new(vec![&(slot << 16 | 0xffff), &pin, &0_u8, &gsi]));
        }
    }
    let below = PCI_PORTS.start as u16;
    let above = PCI_PORTS.end() as u16;
    let buses = AddressSpace::new_bus_number(0_u16, 0xff);
    let config = ports(PCI_PORTS);
    let low_ports = AddressSpace::new_io(0_u16, below - 1, None);
    let high_ports = AddressSpace::new_io(above, u16::MAX, None);
    let low = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        MMIO32.start as u32,
        MMIO32.end() as u32 - 1,
        None,
    );
    let high =
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, MMIO64.start, MMIO64.end() - 1, None);
    let windows = ResourceTemplate::new(vec![&buses, &config, &low_ports, &high_ports, &low, &high]);
    let mut slots = Vec::new();
    hotplug::slots(&mut slots);
    let slots = hotplug::Raw(slots);
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &0_u8),
            &Name::new("_BBN".into(), &0_u8),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &windows),
            &Name::new("_PRT".into(), &routes),
            &slots,
        ],
    )
    .to_aml_bytes(sink);
}

/// Configuration space in memory, which a kernel believes in only where a motherboard resource covers it, and the ports of
/// hotplug, so that nobody else takes them.
fn ecam(sink: &mut Vec<u8>) {
    let memory = Memory32Fixed::new(true, ECAM.start as u32, ECAM.len as u32);
    let hotplug = ports(ACPI_HOTPLUG);
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory, &hotplug])),
        ],
    )
    .to_aml_bytes(sink);
}

/// COM1.
fn serial(sink: &mut Vec<u8>) {
    let (ports, interrupt) = (ports(COM1), isa_interrupt(COM1_GSI));
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &1_u8),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(sink);
}

/// The clock.
fn clock(sink: &mut Vec<u8>) {
    let (ports, interrupt) = (ports(RTC), isa_interrupt(RTC_GSI));
    Device::new(
        "RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(sink);
}
