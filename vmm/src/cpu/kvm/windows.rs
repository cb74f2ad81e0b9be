//! Memory slots beside those of RAM: registers of devices that the guest drives itself.
//!
//! The pages behind one may vanish while the guest has it: a device that is pulled out, or whose memory the host has switched
//! off. KVM_RUN then fails with EFAULT at each access. Such a window is withdrawn: from then on each access comes out, and is
//! answered by whoever has the device, with ones when nobody does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;

use super::set_slot;
use crate::cpu::{CpuError, MemoryWindows};
use crate::memory::{DevicePages, MemorySlot};

/// What one slot shows.
struct Shown {
    gpa: u64,
    len: u64,
    /// KVM knows of it.
    open: bool,
}

/// The slots behind those of RAM.
pub(super) struct Windows {
    vm: Arc<VmFd>,
    first: u32,
    end: u32,
    taken: Mutex<BTreeMap<u32, Shown>>,
    /// How often one was withdrawn.
    withdrawn: AtomicU64,
}

impl Windows {
    /// RAM has `ram` slots, and there are `all` of them.
    pub(super) fn new(vm: Arc<VmFd>, ram: u32, all: usize) -> Self {
        Self {
            vm,
            first: ram,
            end: u32::try_from(all).unwrap_or(u32::MAX),
            taken: Mutex::default(),
            withdrawn: AtomicU64::new(0),
        }
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<u32, Shown>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shut(&self, slot: u32, shown: &mut Shown) {
        if std::mem::take(&mut shown.open) {
            // A slot without a length is none.
            let gone = MemorySlot { gpa: shown.gpa, len: 0, host: 0 };
            if let Err(error) = set_slot(&self.vm, slot, &gone, 0) {
                shown.open = true;
                tracing::error!(slot, %error, "a window into a device stays open");
            }
        }
    }

    /// How often a window was withdrawn until now.
    pub(super) fn withdrawn(&self) -> u64 {
        self.withdrawn.load(Ordering::Acquire)
    }

    /// The guest was refused an access: at `gpa`, or where KVM does not say. Withdraws the window there, or all of them. Whether
    /// the guest is to try again: one was withdrawn, by this call or by another one `since` there were so many.
    pub(super) fn vanished(&self, gpa: Option<u64>, since: u64) -> bool {
        let mut taken = self.taken();
        let there = |shown: &Shown| gpa.is_none_or(|gpa| gpa >= shown.gpa && gpa - shown.gpa < shown.len);
        for (slot, shown) in taken.iter_mut().filter(|(_, shown)| shown.open && there(shown)) {
            self.shut(*slot, shown);
            if !shown.open {
                self.withdrawn.fetch_add(1, Ordering::Release);
            }
            tracing::warn!(
                gpa = shown.gpa,
                len = shown.len,
                "a device's registers have vanished: each access comes out"
            );
        }
        self.withdrawn() != since
    }
}

/// The windows of one machine, as the seam hands them out.
pub(super) struct ShownBy(pub(super) Arc<Windows>);

/// One slot. The pages are unmapped when it is gone.
struct Window {
    windows: Arc<Windows>,
    slot: u32,
    _pages: Arc<DevicePages>,
}

impl MemoryWindows for ShownBy {
    fn show(&self, gpa: u64, pages: Arc<DevicePages>) -> Result<Box<dyn Send>, CpuError> {
        let mut taken = self.0.taken();
        let free = (self.0.first..self.0.end).find(|slot| !taken.contains_key(slot));
        let slot = free.ok_or(CpuError::KvmLacks("that many memory slots"))?;
        set_slot(&self.0.vm, slot, &MemorySlot { gpa, len: pages.len(), host: pages.host() }, 0)?;
        taken.insert(slot, Shown { gpa, len: pages.len(), open: true });
        Ok(Box::new(Window { windows: Arc::clone(&self.0), slot, _pages: pages }))
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let mut taken = self.windows.taken();
        let Some(mut shown) = taken.remove(&self.slot) else { return };
        self.windows.shut(self.slot, &mut shown);
        if shown.open {
            // KVM did not let it go: nobody else may have the slot.
            taken.insert(self.slot, shown);
        }
    }
}
