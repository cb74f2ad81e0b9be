//! Builders of what every board has: the root bus with its host bridge, the clock and power management.

use std::sync::{Arc, Mutex};

use atoll_devices::AtTime;
use atoll_devices::acpi_pm::AcpiPm;
use atoll_devices::pci::{ConfigPorts, Ecam, HostBridge, SharedFunction};
use atoll_devices::reset_port::{self, ResetPort};
use atoll_devices::rtc::Rtc;

use super::layout::{ACPI_HOTPLUG, ACPI_PM, ECAM, PCI_PORTS, RTC, SCI_GSI, Span};
use super::{Board, BoardError, BuildError, BuiltDevice, DeviceBuilder, Passive};
use crate::cpu::Space;

/// The builders of the chipset, in the order in which they take PCI slots.
pub fn chipset() -> Vec<Box<dyn DeviceBuilder>> {
    vec![Box::new(PciBuilder), Box::new(RtcBuilder), Box::new(PowerBuilder), Box::new(ResetPortBuilder)]
}

fn passive(name: String, built: Result<(), BoardError>) -> Result<BuiltDevice, BuildError> {
    match built {
        Ok(()) => Ok(BuiltDevice { name, place: None, life: Box::new(Passive) }),
        Err(error) => Err(BuildError::new(name, error)),
    }
}

/// Ways to configuration space, and 00:00.0.
struct PciBuilder;

impl PciBuilder {
    fn place(board: &mut Board) -> Result<(), BoardError> {
        let ports = ConfigPorts::new(Arc::clone(board.pci()), board.power());
        board.add_registers("PCI configuration ports", Space::Pio, PCI_PORTS, ports)?;
        board.add_registers("PCI configuration memory", Space::Mmio, ECAM, Ecam::new(Arc::clone(board.pci())))?;
        let bridge: SharedFunction = Arc::new(Mutex::new(HostBridge::new()));
        let bars = board.bar_mapping();
        board.add_pci(bridge, &bars)?;
        Ok(())
    }
}

impl DeviceBuilder for PciBuilder {
    fn name(&self) -> String {
        "pci".into()
    }
    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        passive(self.name(), Self::place(board))
    }
}

/// Clock and CMOS.
struct RtcBuilder;

impl DeviceBuilder for RtcBuilder {
    fn name(&self) -> String {
        "rtc".into()
    }
    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        let clock = AtTime::new(Rtc::new(board.wall_base_ns()), board.clock());
        passive(self.name(), board.add_registers("rtc", Space::Pio, RTC, clock))
    }
}

/// ACPI power management and hotplug.
struct PowerBuilder;

impl DeviceBuilder for PowerBuilder {
    fn name(&self) -> String {
        "acpi-pm".into()
    }
    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        let power = AcpiPm::new(board.wire(SCI_GSI), board.power());
        let registers = Arc::new(Mutex::new(AtTime::new(power, board.clock())));
        board.set_power_button(Arc::clone(&registers));
        let power = board.add_shared_registers("acpi-pm", Space::Pio, ACPI_PM, registers);
        let slots = board.hotplug_registers();
        let built = power.and_then(|()| board.add_shared_registers("acpi-hotplug", Space::Pio, ACPI_HOTPLUG, slots));
        passive(self.name(), built)
    }
}

/// The keyboard controller's reset line, the oldest way to start a PC again.
struct ResetPortBuilder;

impl DeviceBuilder for ResetPortBuilder {
    fn name(&self) -> String {
        "reset-port".into()
    }
    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        let port = ResetPort::new(board.power());
        let span = Span { start: u64::from(reset_port::PORT), len: 1 };
        passive(self.name(), board.add_registers("reset-port", Space::Pio, span, port))
    }
}
