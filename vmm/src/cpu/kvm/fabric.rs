//! Interrupts on KVM: wires are inputs of the kernel's chips, messages and eventfds are routes of the GSI table.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_devices::{MsiMessage, MsiSink, WireSink};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::Irqchip;
use super::split::Lines;
use crate::cpu::CpuError;
use crate::irq::{EventRoute, InterruptFabric, IrqError};
use crate::machine::layout::GSI_COUNT;

/// GSIs that KVM's table holds (KVM_MAX_IRQ_ROUTES of x86).
const GSI_MAX: u32 = 4096;

/// Where the board's lines end, which are the first GSIs.
enum Pins {
    /// In the kernel's chips.
    Kernel,
    /// In an I/O APIC of ours, whose entries are these.
    Ours(Box<[MsiMessage; GSI_COUNT as usize]>),
}

/// KVM's table of routes.
struct Routes {
    pins: Pins,
    /// Those of messages: their GSIs begin behind those of the lines. `None` is taken but masked.
    messages: BTreeMap<u32, Option<MsiMessage>>,
}

/// Where interrupts of one machine end.
pub(super) struct KvmFabric {
    shared: Arc<Shared>,
    /// The controllers of lines that are not in the kernel.
    lines: Option<Arc<Lines>>,
}

/// What routes and chips share.
pub(super) struct Shared {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

fn chip_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    }
}

fn message_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

/// The lines of a PC: 0 to 15 reach both the 8259 pair and the I/O APIC, where the timer is pin 2; 16 to 23 only the
/// latter.
fn chip_routes() -> Vec<kvm_irq_routing_entry> {
    let mut routes = Vec::new();
    for gsi in 0..GSI_COUNT {
        match gsi {
            0..8 => routes.push(chip_route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            8..16 => routes.push(chip_route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
            _ => {}
        }
        match gsi {
            0 => routes.push(chip_route(gsi, KVM_IRQCHIP_IOAPIC, 2)),
            2 => {}
            _ => routes.push(chip_route(gsi, KVM_IRQCHIP_IOAPIC, gsi)),
        }
    }
    routes
}

impl Shared {
    pub(super) fn new(vm: Arc<VmFd>, irqchip: Irqchip) -> Result<Arc<Self>, CpuError> {
        let pins = match irqchip {
            Irqchip::Kernel => Pins::Kernel,
            // As after reset, no pin sends anything.
            Irqchip::Split => Pins::Ours(Box::new([MsiMessage { address: 0xfee0_0000, data: 0 }; GSI_COUNT as usize])),
        };
        let shared = Self { vm, routes: Mutex::new(Routes { pins, messages: BTreeMap::new() }) };
        shared.publish(&shared.routes()).map_err(|error| CpuError::Unsupported(error.to_string()))?;
        Ok(Arc::new(shared))
    }
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Gives KVM the whole table; it has no call for one entry.
    fn publish(&self, routes: &Routes) -> Result<(), IrqError> {
        let mut entries = match &routes.pins {
            Pins::Kernel => chip_routes(),
            Pins::Ours(pins) => (0..).zip(pins.iter()).map(|(gsi, message)| message_route(gsi, *message)).collect(),
        };
        let set = routes.messages.iter();
        entries.extend(set.filter_map(|(gsi, message)| message.map(|message| message_route(*gsi, message))));
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| IrqError::Exhausted(GSI_MAX - GSI_COUNT))?;
        self.vm.set_gsi_routing(&table).map_err(|error| IrqError::Route(error.into()))
    }
    /// The entries of an I/O APIC of ours.
    pub(super) fn set_pins(&self, pins: [MsiMessage; GSI_COUNT as usize]) -> Result<(), IrqError> {
        let mut routes = self.routes();
        routes.pins = Pins::Ours(Box::new(pins));
        self.publish(&routes)
    }
    pub(super) fn fire(&self, message: MsiMessage) {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        // A message that interrupts nobody is the guest's business.
        if let Err(error) = self.vm.signal_msi(msi) {
            tracing::debug!(?message, %error, "a message interrupted nobody");
        }
    }
}

impl KvmFabric {
    pub(super) fn new(shared: Arc<Shared>, lines: Option<Arc<Lines>>) -> Self {
        Self { shared, lines }
    }
}

impl WireSink for KvmFabric {
    fn set_level(&self, line: u32, high: bool) {
        if let Some(lines) = &self.lines {
            return lines.set_line(line, high);
        }
        if let Err(error) = self.shared.vm.set_irq_line(line, high) {
            tracing::error!(line, high, %error, "an interrupt line could not be set");
        }
    }
}

impl MsiSink for KvmFabric {
    fn fire(&self, message: MsiMessage) {
        self.shared.fire(message);
    }
}

/// An input that an eventfd raises.
struct KvmLevel {
    shared: Arc<Shared>,
    line: u32,
    raise: EventFd,
}

impl Drop for KvmLevel {
    fn drop(&mut self) {
        if let Err(error) = self.shared.vm.unregister_irqfd(&self.raise, self.line) {
            tracing::warn!(line = self.line, %error, "an eventfd still raises an interrupt line");
        }
    }
}

impl InterruptFabric for KvmFabric {
    fn connect_level(&self, line: u32, raise: &EventFd, ended: &EventFd) -> Result<Option<Box<dyn Send>>, IrqError> {
        // KVM hears of the end of an interrupt only where the controller is its own.
        if self.lines.is_some() {
            return Ok(None);
        }
        let raise = raise.try_clone().map_err(IrqError::Event)?;
        let registered = self.shared.vm.register_irqfd_with_resample(&raise, ended, line);
        registered.map_err(|error| IrqError::Route(error.into()))?;
        Ok(Some(Box::new(KvmLevel { shared: Arc::clone(&self.shared), line, raise })))
    }
    fn connect(&self, event: &EventFd) -> Result<Box<dyn EventRoute>, IrqError> {
        let event = event.try_clone().map_err(IrqError::Event)?;
        let mut routes = self.shared.routes();
        let gsi = (GSI_COUNT..GSI_MAX).find(|gsi| !routes.messages.contains_key(gsi));
        let gsi = gsi.ok_or(IrqError::Exhausted(GSI_MAX - GSI_COUNT))?;
        routes.messages.insert(gsi, None);
        drop(routes);
        Ok(Box::new(KvmRoute { shared: Arc::clone(&self.shared), gsi, event, assigned: Mutex::new(false) }))
    }
}

/// One eventfd. While it is masked KVM does not listen, so signals stay counted in it.
struct KvmRoute {
    shared: Arc<Shared>,
    gsi: u32,
    event: EventFd,
    assigned: Mutex<bool>,
}

impl KvmRoute {
    fn route(&self, message: Option<MsiMessage>) -> Result<(), IrqError> {
        let mut routes = self.shared.routes();
        routes.messages.insert(self.gsi, message);
        self.shared.publish(&routes)
    }
}

impl EventRoute for KvmRoute {
    fn set(&self, message: Option<MsiMessage>) -> Result<(), IrqError> {
        let mut assigned = self.assigned.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = |error: kvm_ioctls::Error| IrqError::Route(error.into());
        match message {
            Some(message) => {
                self.route(Some(message))?;
                if !*assigned {
                    // KVM delivers what is counted but leaves the count, which would look pending when it is masked
                    // again: take it first and deliver by hand.
                    let pending = self.event.read().is_ok();
                    self.shared.vm.register_irqfd(&self.event, self.gsi).map_err(refused)?;
                    *assigned = true;
                    if pending {
                        self.shared.fire(message);
                    }
                }
                Ok(())
            }
            None => {
                if *assigned {
                    self.shared.vm.unregister_irqfd(&self.event, self.gsi).map_err(refused)?;
                    *assigned = false;
                }
                self.route(None)
            }
        }
    }
}

impl Drop for KvmRoute {
    fn drop(&mut self) {
        if let Err(error) = self.set(None) {
            tracing::warn!(gsi = self.gsi, %error, "an interrupt route was left behind");
        }
        self.shared.routes().messages.remove(&self.gsi);
    }
}
