//! What a builder finds: memory, address spaces, PCI slots, interrupts, doorbells and time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_devices::acpi_hotplug::AcpiHotplug;
use atoll_devices::acpi_pm::AcpiPm;
use atoll_devices::pci::root::PciRoot;
use atoll_devices::pci::{DevFn, SharedFunction};
use atoll_devices::{AtTime, GuestClock, MsiMessage, MsiSink, PowerSink, RegisterDevice, Wire, WireSink, WiredOr};
use thiserror::Error;

use super::events::EventSender;
use super::layout::{GSI_COUNT, SCI_GSI, Span};
use super::slots::{Ejector, FunctionBars, PciSlots};
use crate::cpu::{AddressSpace, Processor, SharedDevice, Space};
use crate::doorbell::{DoorbellTable, Relay};
use crate::iommu::{Unit, endpoint_id};
use crate::irq::{InterruptFabric, IrqError, VectorTable};
use crate::memory::GuestMemory;

/// Why something has no place on the board.
#[derive(Debug, Error)]
pub enum BoardError {
    /// Addresses collide.
    #[error("{what} has no place on the board: {source}")]
    Address {
        /// What was to be placed.
        what: String,
        /// Why it was not.
        #[source]
        source: atoll_devices::AddressMapError,
    },
    /// The bus is full.
    #[error("hotplug beyond the last slot: all 32 PCI slots are taken; remove a device or leave one out")]
    NoSlot,
    /// The slot that was asked for is not free.
    #[error("PCI slot {0} is taken or not there; choose another")]
    SlotTaken(u8),
    /// A BAR does not fit.
    #[error("BAR {bar} of {len:#x} bytes finds no room in the board's windows; leave a device out")]
    NoRoom {
        /// Its number.
        bar: u8,
        /// Its length.
        len: u64,
    },
    /// The function refused its own BAR.
    #[error(transparent)]
    Bar(#[from] atoll_devices::pci::BarError),
}

/// Where the host bridge is; it is fixed.
const HOST_BRIDGE_SLOT: u8 = 0;

/// What a board is made from.
pub struct BoardParts {
    /// Runs guest code.
    pub processor: Arc<dyn Processor>,
    /// Guest RAM.
    pub memory: GuestMemory,
    /// Interposed doorbells and calls.
    pub relay: Arc<Relay>,
    /// Hears of power-off and reset.
    pub power: Arc<dyn PowerSink>,
    /// Hears of devices that the guest has let go.
    pub events: EventSender,
    /// UTC in nanoseconds at guest time zero.
    pub wall_base_ns: u64,
}

/// A board: under construction, and while devices come and go.
pub struct Board {
    parts: BoardParts,
    fabric: Arc<dyn InterruptFabric>,
    /// The lines that devices may share.
    lines: Vec<Arc<WiredOr>>,
    space: Arc<AddressSpace>,
    doorbells: Arc<DoorbellTable>,
    pci: PciSlots,
    hotplug: Arc<Mutex<AcpiHotplug>>,
    power_button: Option<Arc<Mutex<AtTime<AcpiPm>>>>,
    iommu: Option<(Arc<Unit>, DevFn)>,
}

impl Board {
    /// An empty board.
    pub fn new(parts: BoardParts) -> Self {
        let fabric = parts.processor.interrupts();
        let line = |gsi| WiredOr::new(Wire::new(Arc::new(Fabric(Arc::clone(&fabric))), gsi));
        let lines: Vec<_> = (0..GSI_COUNT).map(line).collect();
        let doorbells = Arc::new(DoorbellTable::new(parts.processor.doorbells()));
        let space = Arc::new(AddressSpace::new(Arc::clone(&doorbells)));
        let pci = PciSlots::new();
        let ejector = Ejector { root: Arc::clone(pci.root()), events: parts.events.clone() };
        let sci = lines[SCI_GSI as usize].input();
        let hotplug = Arc::new(Mutex::new(AcpiHotplug::new(sci, Arc::new(ejector))));
        Self { parts, fabric, lines, space, doorbells, pci, hotplug, power_button: None, iommu: None }
    }

    /// The processor.
    pub fn processor(&self) -> &Arc<dyn Processor> {
        &self.parts.processor
    }
    /// Who hears of what happens.
    pub fn events(&self) -> &EventSender {
        &self.parts.events
    }
    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.parts.memory
    }
    /// Both address spaces.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }
    /// Where all interrupts end, for who connects them later.
    pub(crate) fn fabric(&self) -> &Arc<dyn InterruptFabric> {
        &self.fabric
    }
    /// The doorbells by address.
    pub fn doorbells(&self) -> &Arc<DoorbellTable> {
        &self.doorbells
    }
    /// The relay of interposed doorbells and calls.
    pub fn relay(&self) -> &Arc<Relay> {
        &self.parts.relay
    }
    /// Guest time.
    pub fn clock(&self) -> Arc<dyn GuestClock> {
        self.parts.processor.clock()
    }
    /// UTC in nanoseconds at guest time zero.
    pub fn wall_base_ns(&self) -> u64 {
        self.parts.wall_base_ns
    }
    /// Who hears of power-off and reset.
    pub fn power(&self) -> Arc<dyn PowerSink> {
        Arc::clone(&self.parts.power)
    }
    /// What has the power button.
    pub(super) fn set_power_button(&mut self, registers: Arc<Mutex<AtTime<AcpiPm>>>) {
        self.power_button = Some(registers);
    }
    /// The virtual IOMMU, where there is one.
    pub fn iommu(&self) -> Option<&Arc<Unit>> {
        self.iommu.as_ref().map(|(unit, _)| unit)
    }
    /// There is one, and it is here.
    pub fn set_iommu(&mut self, unit: Arc<Unit>, place: DevFn) {
        self.iommu = Some((unit, place));
    }
    /// What ACPI tells of it: where it is, what is behind it, and what may come to be: each slot that is free. (The guest
    /// reads the table once; of a device there that is not behind it the IOMMU says that it does not know it.)
    pub(super) fn iommu_topology(&self) -> Option<(DevFn, Vec<u32>)> {
        let (unit, place) = self.iommu.as_ref()?;
        let free = self.pci.free_places().map(endpoint_id);
        let mut behind: Vec<u32> = unit.endpoints().into_iter().chain(free).collect();
        behind.sort_unstable();
        behind.dedup();
        Some((*place, behind))
    }
    /// Presses the power button; the guest decides what that means. Whether the board has one.
    pub fn press_power_button(&self) -> bool {
        let Some(registers) = &self.power_button else { return false };
        registers.lock().unwrap_or_else(PoisonError::into_inner).device.power_button();
        true
    }
    /// A wire to input `gsi` of the interrupt controllers: 0 to 15 are the ISA lines, 16 to 23 those of PCI. Each call gives
    /// another device's wire; the input is high while any of them is.
    pub fn wire(&self, gsi: u32) -> Wire {
        match self.lines.get(gsi as usize) {
            Some(line) => line.input(),
            None => Wire::new(Arc::new(Fabric(Arc::clone(&self.fabric))), gsi),
        }
    }
    /// Where messages that the core itself sends go.
    pub fn msi(&self) -> Arc<dyn MsiSink> {
        Arc::new(Fabric(Arc::clone(&self.fabric)))
    }
    /// Eventfds for the MSI-X vectors of one function.
    ///
    /// # Errors
    /// When eventfds or routes run out.
    pub fn vectors(&self, count: u16) -> Result<Arc<VectorTable>, IrqError> {
        VectorTable::new(self.fabric.as_ref(), count).map(Arc::new)
    }

    /// Maps registers at a fixed place.
    ///
    /// # Errors
    /// When something else is there.
    pub fn add_registers(
        &self,
        what: &str,
        space: Space,
        span: Span,
        device: impl RegisterDevice + 'static,
    ) -> Result<(), BoardError> {
        self.add_shared_registers(what, space, span, Arc::new(Mutex::new(device)))
    }
    /// Maps registers that somebody else holds too.
    ///
    /// # Errors
    /// When something else is there.
    pub fn add_shared_registers(
        &self,
        what: &str,
        space: Space,
        span: Span,
        device: SharedDevice,
    ) -> Result<(), BoardError> {
        self.space
            .insert(space, span.start, span.len, device)
            .map_err(|source| BoardError::Address { what: what.into(), source })
    }

    /// The root bus.
    pub fn pci(&self) -> &Arc<Mutex<PciRoot>> {
        self.pci.root()
    }
    /// Pin A of the next free PCI slot: its wire, and the line number that firmware would write into the function's
    /// configuration space.
    pub fn next_pin(&self) -> (Wire, u8) {
        let gsi = self.pci.next_pin_gsi();
        (self.wire(u32::from(gsi)), gsi)
    }
    /// What a PCI function is given at construction to keep the board's map in step with its BARs; [`Self::add_pci`]
    /// takes it together with the function.
    pub fn bar_mapping(&self) -> Arc<FunctionBars> {
        Arc::new(FunctionBars::new(&self.space))
    }
    /// The slot that the next function gets; `None` when the bus is full or the slot that was asked for is taken.
    pub fn next_slot(&self) -> Option<u8> {
        self.pci.next()
    }
    /// How many functions find a slot yet.
    pub fn free_slots(&self) -> usize {
        self.pci.free()
    }
    /// The next function goes into this slot; `None` for the lowest free one. So a device keeps its place over a reset.
    pub fn use_slot(&mut self, slot: Option<u8>) {
        self.pci.want(slot);
    }
    /// Puts a function into the next slot and gives its BARs addresses, as firmware would.
    ///
    /// # Errors
    /// When slots or windows are full.
    pub fn add_pci(&mut self, function: SharedFunction, bars: &FunctionBars) -> Result<DevFn, BoardError> {
        let place = self.add_fixed_pci(function, bars)?;
        if place.slot() != HOST_BRIDGE_SLOT {
            self.hotplug().occupied(place.slot());
        }
        Ok(place)
    }
    /// The same for a function that neither the guest nor the operator can take away.
    ///
    /// # Errors
    /// When slots or windows are full.
    pub fn add_fixed_pci(&mut self, function: SharedFunction, bars: &FunctionBars) -> Result<DevFn, BoardError> {
        self.pci.add(function, bars)
    }
    /// While veiled, new functions have a slot and are not seen by the guest.
    pub(super) fn veil(&mut self, veiled: bool) {
        self.pci.veil(veiled);
    }
    /// Shows a veiled function to the guest and tells it to look.
    pub(super) fn reveal(&mut self, place: DevFn) {
        self.pci.reveal(place);
        self.hotplug().announce(place.slot());
    }
    /// Takes a function off the board: it answers nowhere, its doorbells and interrupt routes go with it, and slot and
    /// addresses are free. Whether there was one.
    pub fn remove_pci(&mut self, place: DevFn) -> bool {
        self.hotplug().vacated(place.slot());
        self.pci.remove(place)
    }
    /// The hotplug registers. Not to be held while a function is locked: the guest's eject locks them in this order.
    pub(super) fn hotplug(&self) -> MutexGuard<'_, AcpiHotplug> {
        self.hotplug.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// The same, for the address map.
    pub(super) fn hotplug_registers(&self) -> SharedDevice {
        Arc::clone(&self.hotplug) as SharedDevice
    }
}

/// The fabric as devices hold it.
struct Fabric(Arc<dyn InterruptFabric>);

impl WireSink for Fabric {
    fn set_level(&self, line: u32, high: bool) {
        self.0.set_level(line, high);
    }
}

impl MsiSink for Fabric {
    fn fire(&self, message: MsiMessage) {
        self.0.fire(message);
    }
}
