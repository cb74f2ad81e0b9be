//! The page walker: 32-bit paging with PSE-36, PAE paging and 4-level paging (SDM vol. 3, chapter 4).
//!
//! A walk reads the entries from guest RAM with atomic loads, checks present and reserved bits on the way down and
//! permissions at the end, and then sets accessed and dirty bits by compare-and-swap, so that another CPU (or a
//! backend) that changes an entry under way is never overwritten: the walk starts over.
//!
//! Tables are whatever the guest says. An entry outside RAM reads as all ones, like a bus without a device, which has
//! reserved bits set in every format that has any. Every loop is bounded by the number of levels and a fixed number of
//! retries.
#![allow(unsafe_code, reason = "page-table entries are guest memory that others write: host atomics on raw pointers")]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::ram::GuestRam;
use crate::tlb::PageSize;

/// CR0.
pub(crate) const CR0_WP: u64 = 1 << 16;
pub(crate) const CR0_PG: u64 = 1 << 31;
/// CR4.
pub(crate) const CR4_PSE: u64 = 1 << 4;
pub(crate) const CR4_PAE: u64 = 1 << 5;
pub(crate) const CR4_PGE: u64 = 1 << 7;
pub(crate) const CR4_SMEP: u64 = 1 << 20;
/// EFER.
pub(crate) const EFER_LMA: u64 = 1 << 10;
pub(crate) const EFER_NXE: u64 = 1 << 11;

/// Bits of a page-table entry.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;

/// Bits of a page-fault error code (SDM vol. 3, 4.7).
const FAULT_PRESENT: u32 = 1;
const FAULT_WRITE: u32 = 2;
const FAULT_USER: u32 = 4;
const FAULT_RESERVED: u32 = 8;
const FAULT_FETCH: u32 = 16;

/// How often a walk starts over because an entry changed under it, before it goes on without having set its bits.
const RETRIES: u32 = 64;

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
}

/// A successful translation of one 4 KiB piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Translation {
    /// Guest-physical address of the 4 KiB frame.
    pub(crate) frame: u64,
    /// Size of the page that the frame is a part of.
    pub(crate) size: PageSize,
    /// Survives a load of CR3.
    pub(crate) global: bool,
    /// A write with the same privilege would need no further look at the tables: it is allowed and D is set.
    pub(crate) write_ready: bool,
}

/// The control registers that rule a translation, and the memory that holds the tables.
pub(crate) struct Walker<'a> {
    pub(crate) ram: &'a GuestRam,
    pub(crate) cr0: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
    /// PDPTE registers, for PAE paging outside long mode.
    pub(crate) pdpte: [u64; 4],
    pub(crate) physical_bits: u32,
}

/// An entry that the walk went through.
#[derive(Clone, Copy)]
struct Step {
    slot: Slot,
    value: u64,
}

/// Where an entry lives.
#[derive(Clone, Copy)]
enum Slot {
    /// In RAM, eight bytes.
    Wide(*mut u64),
    /// In RAM, four bytes.
    Narrow(*mut u32),
    /// Nowhere that could be written: outside RAM, read-only, or a register.
    Fixed,
}

/// Why a walk ended early.
enum Miss {
    /// A page fault with this error code.
    Fault(u32),
    /// An entry changed between being read and having its bits set.
    Changed,
}

impl Walker<'_> {
    /// Translates `linear` (canonical, or 32 bits wide outside long mode), setting accessed and dirty bits unless
    /// `probe`. The error is the page-fault error code.
    pub(crate) fn translate(&self, linear: u64, access: Access, user: bool, probe: bool) -> Result<Translation, u32> {
        if self.cr0 & CR0_PG == 0 {
            let frame = linear & 0xffff_f000;
            return Ok(Translation { frame, size: PageSize::Small, global: false, write_ready: true });
        }
        for attempt in 0..=RETRIES {
            match self.attempt(linear, access, user, probe || attempt == RETRIES) {
                Ok(translation) => return Ok(translation),
                Err(Miss::Fault(code)) => return Err(code),
                Err(Miss::Changed) => {}
            }
        }
        // Not reached: the last attempt does not compare.
        Err(0)
    }

    fn attempt(&self, linear: u64, access: Access, user: bool, probe: bool) -> Result<Translation, Miss> {
        let mut steps = [Step { slot: Slot::Fixed, value: 0 }; 4];
        let mut used = 0;
        let wide = self.cr4 & CR4_PAE != 0;
        let long = self.efer & EFER_LMA != 0;
        let code = |bits: u32| Miss::Fault(bits | self.error_code(access, user));

        let mut writable = true;
        let mut for_user = true;
        let mut no_execute = false;
        let (mut table, mut level) = match (wide, long) {
            (_, true) => (self.cr3 & self.address_mask(), 4),
            (true, false) => {
                // The four PDPTEs are registers: no permissions and no accessed bit of their own.
                let pdpte = self.pdpte[(linear >> 30) as usize & 3];
                if pdpte & PRESENT == 0 {
                    return Err(code(0));
                }
                (pdpte & self.address_mask(), 2)
            }
            (false, false) => (self.cr3 & 0xffff_f000, 2),
        };
        let (leaf, size) = loop {
            let step = if wide || long {
                self.wide_entry(table, linear, level)
            } else {
                self.narrow_entry(table, linear, level)
            };
            let entry = step.value;
            if entry & PRESENT == 0 {
                return Err(code(0));
            }
            let large = level > 1 && entry & PAGE != 0 && (wide || long || self.cr4 & CR4_PSE != 0);
            if entry & self.reserved(level, large, wide || long, long) != 0 {
                return Err(code(FAULT_PRESENT | FAULT_RESERVED));
            }
            steps[used] = step;
            used += 1;
            writable &= entry & WRITABLE != 0;
            for_user &= entry & USER != 0;
            no_execute |= entry & NO_EXECUTE != 0;
            match (level, large) {
                (1, _) => break (entry, PageSize::Small),
                (2, true) if wide || long => break (entry, PageSize::Large),
                (2, true) => break (entry, PageSize::Legacy),
                (_, true) => break (entry, PageSize::Huge),
                (_, false) => {
                    table = entry & if wide || long { self.address_mask() } else { 0xffff_f000 };
                    level -= 1;
                }
            }
        };

        let may_write = writable || !user && self.cr0 & CR0_WP == 0;
        let allowed = (for_user || !user)
            && match access {
                Access::Read => true,
                Access::Write => may_write,
                // Supervisor code in user pages is what SMEP refuses. NX is reserved, and zero, unless enabled.
                Access::Execute => !no_execute && (user || !for_user || self.cr4 & CR4_SMEP == 0),
            };
        if !allowed {
            return Err(code(FAULT_PRESENT));
        }
        if !probe {
            let last = used - 1;
            for (index, step) in steps.iter().take(used).enumerate() {
                let wanted = if index == last && access == Access::Write { ACCESSED | DIRTY } else { ACCESSED };
                step.set(wanted)?;
            }
        }
        let offset_bits = match size {
            PageSize::Small => 12,
            PageSize::Large => 21,
            PageSize::Legacy => 22,
            PageSize::Huge => 30,
        };
        let base = match size {
            PageSize::Legacy => leaf & 0xffc0_0000 | (leaf >> 13 & 0xff) << 32,
            _ if wide || long => leaf & self.address_mask(),
            _ => leaf & 0xffff_f000,
        };
        let inside = (1u64 << offset_bits) - 1;
        Ok(Translation {
            frame: base & !inside | linear & inside & !0xfff,
            size,
            global: leaf & GLOBAL != 0 && self.cr4 & CR4_PGE != 0,
            write_ready: may_write && (leaf & DIRTY != 0 || access == Access::Write),
        })
    }

    /// Bits 12 and up of an entry that hold an address.
    fn address_mask(&self) -> u64 {
        ((1u64 << self.physical_bits) - 1) & !0xfff
    }

    /// The part of the error code that depends on the access alone.
    fn error_code(&self, access: Access, user: bool) -> u32 {
        let fetch_told = self.cr4 & CR4_SMEP != 0 || self.cr4 & CR4_PAE != 0 && self.efer & EFER_NXE != 0;
        let kind = match access {
            Access::Read => 0,
            Access::Write => FAULT_WRITE,
            Access::Execute if fetch_told => FAULT_FETCH,
            Access::Execute => 0,
        };
        kind | if user { FAULT_USER } else { 0 }
    }

    /// Bits that must be zero in a present entry.
    fn reserved(&self, level: u32, large: bool, wide: bool, long: bool) -> u64 {
        if !wide {
            // PSE-36: bits 20 to 13 are address bits 39 to 32 as far as the CPU has those; bit 21 is reserved.
            let beyond = 0xffu64 << self.physical_bits.saturating_sub(32).min(8) & 0xff;
            return if large { 1 << 21 | beyond << 13 } else { 0 };
        }
        let top = if long { 52 } else { 63 };
        let mut bits = (1u64 << top) - (1u64 << self.physical_bits);
        if self.efer & EFER_NXE == 0 {
            bits |= NO_EXECUTE;
        }
        match (level, large) {
            (4, _) => bits | PAGE,
            (3, true) => bits | 0x3fff_e000,
            (2, true) => bits | 0x001f_e000,
            _ => bits,
        }
    }

    fn wide_entry(&self, table: u64, linear: u64, level: u32) -> Step {
        let index = linear >> (12 + 9 * (level - 1)) & 0x1ff;
        let Some((frame, writable)) = self.ram.frame(table) else { return Step { slot: Slot::Fixed, value: !0 } };
        // SAFETY: `frame` is the host address of 4096 mapped bytes, and `index` is below 512.
        let entry = unsafe { frame.cast::<u64>().add(index as usize) };
        // SAFETY: the pointer is eight-byte aligned and mapped (see above); others may write it, hence the atomic.
        let value = unsafe { AtomicU64::from_ptr(entry) }.load(Ordering::Acquire);
        Step { slot: if writable { Slot::Wide(entry) } else { Slot::Fixed }, value }
    }

    fn narrow_entry(&self, table: u64, linear: u64, level: u32) -> Step {
        let index = linear >> (12 + 10 * (level - 1)) & 0x3ff;
        let Some((frame, writable)) = self.ram.frame(table) else {
            return Step { slot: Slot::Fixed, value: 0xffff_ffff };
        };
        // SAFETY: `frame` is the host address of 4096 mapped bytes, and `index` is below 1024.
        let entry = unsafe { frame.cast::<u32>().add(index as usize) };
        // SAFETY: the pointer is four-byte aligned and mapped (see above); others may write it, hence the atomic.
        let value = unsafe { AtomicU32::from_ptr(entry) }.load(Ordering::Acquire);
        Step { slot: if writable { Slot::Narrow(entry) } else { Slot::Fixed }, value: u64::from(value) }
    }

    /// Reads the four PDPTEs that CR3 points to. `None` when one that is present has reserved bits set, for which a
    /// load of CR3 raises #GP(0).
    pub(crate) fn load_pdptes(&self) -> Option<[u64; 4]> {
        let mut loaded = [0; 4];
        let base = self.cr3 & 0xffff_ffe0;
        let Some((frame, _)) = self.ram.frame(base & !0xfff) else {
            // All ones: present, with reserved bits set.
            return None;
        };
        let reserved = (!0u64 << self.physical_bits) | 0x1e6;
        for (index, pdpte) in loaded.iter_mut().enumerate() {
            // SAFETY: `base` is a multiple of 32, so the four entries lie in the same mapped frame.
            let entry = unsafe { frame.add((base & 0xfff) as usize).cast::<u64>().add(index) };
            // SAFETY: mapped and aligned (see above).
            *pdpte = unsafe { AtomicU64::from_ptr(entry) }.load(Ordering::Acquire);
            if *pdpte & PRESENT != 0 && *pdpte & reserved != 0 {
                return None;
            }
        }
        Some(loaded)
    }
}

impl Step {
    /// Sets bits in the entry unless it has changed since it was read.
    fn set(&self, bits: u64) -> Result<(), Miss> {
        if self.value & bits == bits {
            return Ok(());
        }
        let (value, new) = (self.value, self.value | bits);
        let done = match self.slot {
            Slot::Fixed => true,
            // SAFETY: the pointer came from `wide_entry`: mapped, aligned, in a writable region.
            Slot::Wide(entry) => unsafe { AtomicU64::from_ptr(entry) }
                .compare_exchange(value, new, Ordering::AcqRel, Ordering::Acquire)
                .is_ok(),
            // SAFETY: the pointer came from `narrow_entry`: mapped, aligned, in a writable region.
            Slot::Narrow(entry) => unsafe { AtomicU32::from_ptr(entry) }
                .compare_exchange(value as u32, new as u32, Ordering::AcqRel, Ordering::Acquire)
                .is_ok(),
        };
        if done { Ok(()) } else { Err(Miss::Changed) }
    }
}

#[cfg(test)]
mod tests;
