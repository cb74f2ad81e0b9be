//! KVM behind the seam: interrupt chips and PIT in the kernel, irqfds, ioeventfds and memory slots.
//!
//! On the data path the VMM's code does not run: a doorbell is an ioeventfd, an interrupt an irqfd. What is left are
//! register accesses, which the vCPU's thread answers in place.
#![allow(unsafe_code, reason = "KVM maps guest memory by address and shares a page with each vCPU")]

mod cpuid;
mod dirty;
mod fabric;
mod split;
mod state;
mod vcpu;
mod windows;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use atoll_devices::GuestClock;
use atoll_softcpu::VcpuTopology;
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{CpuError, DoorbellWatch, MemoryWindows, Processor, Space, Vcpu};
use crate::irq::InterruptFabric;
use crate::machine::layout::{GSI_COUNT, KVM_PRIVATE};
use crate::memory::{GuestMemory, MemorySlot};
pub use dirty::DirtyLog;
use fabric::{KvmFabric, Shared};
use split::{Chips, Lines};
use vcpu::KvmVcpu;
use windows::{ShownBy, Windows};

/// The API version that every KVM of the last fifteen years has.
const API_VERSION: i32 = 12;

/// What must be there, and what it is called in an error.
const NEEDED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "memory slots"),
    (Cap::Irqchip, "interrupt chips"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::SignalMsi, "message-signalled interrupts"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::Pit2, "an interval timer"),
];

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> CpuError {
    move |error| CpuError::Kvm { what, source: io::Error::from(error) }
}

/// Where the interrupt chips are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Irqchip {
    /// All of them in the kernel.
    #[default]
    Kernel,
    /// Local APICs in the kernel, I/O APIC, 8259 pair and interval timer in the VMM: less of the host's kernel for a guest
    /// to reach.
    Split,
}

/// What the vCPUs of one machine are made from.
pub struct KvmConfig {
    /// Where the interrupt chips are.
    pub irqchip: Irqchip,
    /// Guest RAM.
    pub memory: GuestMemory,
    /// Name of the CPU model, or `host`.
    pub model: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// A trial of KVM, whose guest needs nothing of the model: what the host lacks of it is not told.
    pub trial: bool,
}

/// A virtual machine of KVM.
pub struct KvmProcessor {
    kvm: Kvm,
    vm: Arc<VmFd>,
    config: KvmConfig,
    fabric: Arc<KvmFabric>,
    clock: Arc<PowerOnClock>,
    dirty: DirtyLog,
    windows: Arc<Windows>,
    /// Those that are not in the kernel.
    chips: Option<Arc<Chips>>,
}

impl KvmProcessor {
    /// Makes the virtual machine, with its memory and interrupt chips.
    ///
    /// # Errors
    /// When KVM is missing, lacks something or refuses it.
    pub fn new(config: KvmConfig) -> Result<Self, CpuError> {
        cpuid::check(&config.model)?;
        let kvm = Kvm::new().map_err(|error| CpuError::NoKvm(error.into()))?;
        if kvm.get_api_version() != API_VERSION {
            return Err(CpuError::KvmLacks("API version 12"));
        }
        if let Some((_, name)) = NEEDED.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(CpuError::KvmLacks(name));
        }
        if config.vcpus as usize > kvm.get_max_vcpus() {
            return Err(CpuError::KvmLacks("that many vCPUs"));
        }
        let vm = Arc::new(kvm.create_vm().map_err(failed("making a virtual machine"))?);
        vm.set_identity_map_address(KVM_PRIVATE.start).map_err(failed("placing the identity map"))?;
        vm.set_tss_address(KVM_PRIVATE.start as usize + 0x1000).map_err(failed("placing the task state segment"))?;
        match config.irqchip {
            Irqchip::Kernel => {
                vm.create_irq_chip().map_err(failed("making interrupt chips"))?;
                let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
                vm.create_pit2(pit).map_err(failed("making the interval timer"))?;
            }
            Irqchip::Split if !kvm.check_extension(Cap::SplitIrqchip) => {
                return Err(CpuError::KvmLacks("a split irqchip; leave --kvm irqchip=split out"));
            }
            Irqchip::Split => {
                let args = [u64::from(GSI_COUNT), 0, 0, 0];
                let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args, ..Default::default() };
                vm.enable_cap(&split).map_err(failed("splitting the interrupt chips"))?;
            }
        }
        let slots = config.memory.slots();
        for (index, slot) in slots.iter().enumerate() {
            set_slot(&vm, index as u32, slot, 0)?;
        }
        let routes = Shared::new(Arc::clone(&vm), config.irqchip)?;
        let clock = Arc::new(PowerOnClock(Instant::now()));
        let chips = match config.irqchip {
            Irqchip::Kernel => None,
            Irqchip::Split => {
                let lines = Arc::new(Lines::new(Arc::clone(&routes)));
                Some(Arc::new(Chips::new(lines, Arc::clone(&clock) as _)?))
            }
        };
        let lines = chips.as_ref().map(|chips| Arc::clone(&chips.lines));
        let fabric = Arc::new(KvmFabric::new(routes, lines));
        let windows = Arc::new(Windows::new(Arc::clone(&vm), slots.len() as u32, kvm.get_nr_memslots()));
        let dirty = DirtyLog::new(Arc::clone(&vm), slots);
        Ok(Self { kvm, vm, config, fabric, clock, dirty, windows, chips })
    }

    /// Which pages the guest writes.
    pub fn dirty_log(&self) -> &DirtyLog {
        &self.dirty
    }
}

/// Tells KVM about one region of RAM.
fn set_slot(vm: &VmFd, index: u32, slot: &MemorySlot, flags: u32) -> Result<(), CpuError> {
    let region = kvm_userspace_memory_region {
        slot: index,
        flags,
        guest_phys_addr: slot.gpa,
        memory_size: slot.len,
        userspace_addr: slot.host,
    };
    // SAFETY: the slot is a live mapping of that length, which the processor keeps for as long as the machine exists.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("giving the guest its memory"))
}

impl Processor for KvmProcessor {
    fn name(&self) -> &'static str {
        "kvm"
    }
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, CpuError> {
        let topology = VcpuTopology { index, count: self.config.vcpus };
        let fd = self.vm.create_vcpu(u64::from(index)).map_err(failed("making a vCPU"))?;
        // Before any register: KVM checks EFER and CR4 against it.
        let table = cpuid::table(&self.kvm, &self.config.model, topology, !self.config.trial)?;
        fd.set_cpuid2(&table).map_err(failed("setting CPUID"))?;
        Ok(Box::new(KvmVcpu::new(fd, index, self.chips.clone(), Arc::clone(&self.windows))?))
    }
    fn interrupts(&self) -> Arc<dyn InterruptFabric> {
        Arc::clone(&self.fabric) as _
    }
    fn clock(&self) -> Arc<dyn GuestClock> {
        Arc::clone(&self.clock) as _
    }
    fn windows(&self) -> Option<Arc<dyn MemoryWindows>> {
        Some(Arc::new(ShownBy(Arc::clone(&self.windows))))
    }
    fn doorbells(&self) -> Option<Arc<dyn DoorbellWatch>> {
        Some(Arc::new(IoEvents(Arc::clone(&self.vm))))
    }
}

/// Guest time of the devices: the host's since power-on.
struct PowerOnClock(Instant);

impl GuestClock for PowerOnClock {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Doorbells as ioeventfds.
struct IoEvents(Arc<VmFd>);

fn event_address(space: Space, address: u64) -> IoEventAddress {
    match space {
        Space::Pio => IoEventAddress::Pio(address),
        Space::Mmio => IoEventAddress::Mmio(address),
    }
}

impl DoorbellWatch for IoEvents {
    fn watch(&self, space: Space, address: u64, event: &EventFd) -> Result<(), CpuError> {
        let at = event_address(space, address);
        self.0.register_ioevent(event, &at, NoDatamatch).map_err(failed("watching a doorbell"))
    }
    fn unwatch(&self, space: Space, address: u64, event: &EventFd) -> Result<(), CpuError> {
        let at = event_address(space, address);
        self.0.unregister_ioevent(event, &at, NoDatamatch).map_err(failed("forgetting a doorbell"))
    }
}
