//! Which pages the guest may have written, by KVM's log.

use std::sync::Arc;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;

use super::{failed, set_slot};
use crate::cpu::CpuError;
use crate::memory::MemorySlot;

const PAGE: u64 = 4096;

/// The log of all memory slots. It sees what vCPUs write, not what backends do: they have a bitmap of their own.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    slots: Vec<MemorySlot>,
}

impl DirtyLog {
    pub(super) fn new(vm: Arc<VmFd>, slots: Vec<MemorySlot>) -> Self {
        Self { vm, slots }
    }
    /// Starts logging; every page is clean.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn start(&self) -> Result<(), CpuError> {
        self.set(KVM_MEM_LOG_DIRTY_PAGES)
    }
    /// Ends logging.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn stop(&self) -> Result<(), CpuError> {
        self.set(0)
    }
    fn set(&self, flags: u32) -> Result<(), CpuError> {
        self.slots.iter().enumerate().try_for_each(|(index, slot)| set_slot(&self.vm, index as u32, slot, flags))
    }
    /// Guest-physical addresses of the pages that were written since the last call, in order; they are clean again. Pages that
    /// were only read may be among them: where the processor walks tables of its own, KVM lets the guest write to a page
    /// at its first access of any kind, and names it then.
    ///
    /// # Errors
    /// When logging has not been started.
    pub fn take(&self) -> Result<Vec<u64>, CpuError> {
        let mut pages = Vec::new();
        for (index, slot) in self.slots.iter().enumerate() {
            let bitmap = self
                .vm
                .get_dirty_log(index as u32, slot.len as usize)
                .map_err(failed("reading which pages were written"))?;
            for (word, mut bits) in bitmap.into_iter().enumerate() {
                while bits != 0 {
                    let page = word as u64 * 64 + u64::from(bits.trailing_zeros());
                    bits &= bits - 1;
                    pages.push(slot.gpa + page * PAGE);
                }
            }
        }
        Ok(pages)
    }
}
