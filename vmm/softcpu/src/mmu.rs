//! The slow path of memory: page crossings, TLB fills, memory-mapped I/O, pages that hold decoded code.
//!
//! All pages of an access are translated, with their permissions, before the first byte moves, so that a fault leaves
//! memory as it was. Accesses of 1, 2, 4 or 8 bytes within a page are one host access; others are copied.
#![allow(unsafe_code, reason = "guest RAM is host memory reached by raw pointers")]

use std::ptr;

use crate::cpu::Cpu;
use crate::state::Exception;
use crate::tlb::{Fill, Kind, Tlb};
use crate::walk::{Access, CR0_PG, CR4_PAE, EFER_LMA, Translation, Walker};
use crate::world::World;

/// Where a page's bytes are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// RAM at this host address.
    Ram {
        /// Host address of the byte.
        host: *mut u8,
        /// Its guest-physical address.
        gpa: u64,
        /// The page holds decoded code: a writer reports to `code_written`.
        code: bool,
    },
    /// Outside RAM, or a write to read-only memory: the board's business.
    Io {
        /// Guest-physical address of the byte.
        gpa: u64,
    },
}

/// What a read-modify-write operand is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum HostRw {
    /// Within one page of RAM: operate on it with host atomics.
    Ram {
        /// Host address of the operand.
        host: *mut u8,
        /// Its guest-physical address.
        gpa: u64,
        /// Call `code_written` afterwards.
        code: bool,
    },
    /// It crosses a page or lies outside RAM: read it and write it back. Both have been checked and will not fault.
    Slow,
}

/// Bytes up to the end of a page, for instructions that move many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageSpan {
    /// Host address of the first byte.
    pub(crate) host: *mut u8,
    /// Bytes from there to the end of the page.
    pub(crate) len: usize,
}

/// A page to decode from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodePage {
    /// Guest-physical address of the frame.
    pub(crate) gpa: u64,
    /// Host address of the frame's first byte.
    pub(crate) host: *const u8,
}

/// Whether bits 63 to 47 are equal.
#[inline(always)]
pub(crate) fn is_canonical(linear: u64) -> bool {
    (linear.wrapping_shl(16) as i64 >> 16) as u64 == linear
}

impl Cpu {
    fn walker(&self) -> Walker<'_> {
        Walker {
            ram: &self.ram,
            cr0: self.sys.cr0,
            cr3: self.sys.cr3,
            cr4: self.sys.cr4,
            efer: self.sys.efer,
            pdpte: self.mmu.pdpte.unwrap_or_default(),
            physical_bits: self.model.physical_bits(),
        }
    }

    /// Whether the processor is in long mode (64-bit or compatibility).
    #[inline(always)]
    pub(crate) fn long_mode_active(&self) -> bool {
        self.sys.efer & EFER_LMA != 0
    }

    /// Whether translation uses the PDPTE registers.
    fn uses_pdptes(&self) -> bool {
        self.sys.cr0 & CR0_PG != 0 && self.sys.cr4 & CR4_PAE != 0 && !self.long_mode_active()
    }

    /// Reads the PDPTE registers anew; #GP(0) when a present one has reserved bits set. Nothing outside PAE paging.
    pub(crate) fn reload_pdptes(&mut self) -> Result<(), Exception> {
        if self.uses_pdptes() {
            self.mmu.pdpte = Some(self.walker().load_pdptes().ok_or(Exception::gp(0))?);
        }
        Ok(())
    }

    /// To be called after `sys` was set from outside (restore, PVH entry): forgets every cached translation.
    pub fn state_replaced(&mut self) {
        self.mmu.pdpte = None;
        self.mmu.flush_all();
    }

    /// Translates for one access within a page, and makes TLB entries where it may.
    fn locate(&mut self, linear: u64, access: Access, user: bool) -> Result<Place, Exception> {
        let linear = self.check_linear(linear)?;
        let kind = match access {
            Access::Read => Kind::Read,
            Access::Write => Kind::Write,
            Access::Execute => Kind::Exec,
        };
        let tlb = &self.mmu.tlb[usize::from(user)];
        if let Some(entry) = tlb.lookup(kind, linear) {
            let host = (linear as usize).wrapping_add(entry.addend) as *mut u8;
            let gpa = tlb.frame(kind, Tlb::index(linear)) | linear & 0xfff;
            // A page with code has no write entry, and readers do not ask.
            return Ok(Place::Ram { host, gpa, code: false });
        }
        if self.mmu.pdpte.is_none() && self.uses_pdptes() {
            // Registers that an outside hand loaded: bad ones are as good as none.
            self.mmu.pdpte = Some(self.walker().load_pdptes().unwrap_or_default());
        }
        let found = self.walker().translate(linear, access, user, false).map_err(|code| Exception::pf(linear, code))?;
        Ok(self.place(linear, access, user, found))
    }

    /// Outside long mode linear addresses have 32 bits; in long mode they are canonical or #GP.
    #[inline]
    fn check_linear(&self, linear: u64) -> Result<u64, Exception> {
        if !self.long_mode_active() {
            Ok(linear & 0xffff_ffff)
        } else if is_canonical(linear) {
            Ok(linear)
        } else {
            Err(Exception::gp(0))
        }
    }

    fn place(&mut self, linear: u64, access: Access, user: bool, found: Translation) -> Place {
        let gpa = found.frame | linear & 0xfff;
        let Some((frame, writable)) = self.ram.frame(found.frame) else { return Place::Io { gpa } };
        let code = self.mmu.is_code(found.frame);
        let fill = Fill { linear, host: frame, gpa: found.frame, global: found.global, size: found.size };
        let write_fits = writable && !code && found.write_ready;
        match access {
            Access::Execute => self.mmu.fill(user, Kind::Exec, fill),
            // Each access to it must come by here.
            Access::Read | Access::Write if self.page_is_watched(linear) => {}
            Access::Read | Access::Write => {
                // Likely both will be needed. But the one that was not asked for only goes where nothing is: an
                // instruction that reads one page and writes another of the same slot would push out its own entry
                // for ever.
                let tlb = &self.mmu.tlb[usize::from(user)];
                let (fills_read, fills_write) = match access {
                    Access::Read => (true, tlb.is_free(Kind::Write, linear)),
                    _ => (tlb.is_free(Kind::Read, linear), true),
                };
                if fills_read {
                    self.mmu.fill(user, Kind::Read, fill);
                }
                if fills_write && write_fits {
                    self.mmu.fill(user, Kind::Write, fill);
                }
            }
        }
        if access == Access::Write && !writable {
            return Place::Io { gpa };
        }
        // SAFETY: `frame` is the host address of 4096 mapped bytes.
        let host = unsafe { frame.add((linear & 0xfff) as usize) };
        Place::Ram { host, gpa, code }
    }

    /// Address of the part of an access that lies in the next page. That all of an operand is canonical is checked
    /// before any of it is translated.
    fn next_page(&self, linear: u64) -> u64 {
        let next = (linear | 0xfff).wrapping_add(1);
        if self.long_mode_active() { next } else { next & 0xffff_ffff }
    }

    /// Reads at a linear address: any alignment, RAM or not, at most 4096 bytes. #PF, or #GP(0) when not canonical.
    pub(crate) fn read_slow(
        &mut self,
        world: &mut dyn World,
        linear: u64,
        data: &mut [u8],
        user: bool,
    ) -> Result<(), Exception> {
        let room = 0x1000 - (linear & 0xfff) as usize;
        if data.len() <= room {
            let place = self.locate(linear, Access::Read, user)?;
            read_place(world, place, data);
            self.note_access(linear, data.len(), false);
            return Ok(());
        }
        debug_assert!(data.len() <= 0x1000, "an operand spans at most two pages");
        let next = self.check_linear(self.next_page(linear))?;
        let first = self.locate(linear, Access::Read, user)?;
        let second = self.locate(next, Access::Read, user)?;
        self.note_access(linear, data.len(), false);
        let (low, high) = data.split_at_mut(room);
        read_place(world, first, low);
        read_place(world, second, high);
        Ok(())
    }

    /// Writes at a linear address: any alignment, RAM or not, at most 4096 bytes. Nothing is written when it faults.
    pub(crate) fn write_slow(
        &mut self,
        world: &mut dyn World,
        linear: u64,
        data: &[u8],
        user: bool,
    ) -> Result<(), Exception> {
        let room = 0x1000 - (linear & 0xfff) as usize;
        if data.len() <= room {
            let place = self.locate(linear, Access::Write, user)?;
            self.note_access(linear, data.len(), true);
            self.write_place(world, place, data);
            return Ok(());
        }
        debug_assert!(data.len() <= 0x1000, "an operand spans at most two pages");
        let next = self.check_linear(self.next_page(linear))?;
        let first = self.locate(linear, Access::Write, user)?;
        let second = self.locate(next, Access::Write, user)?;
        self.note_access(linear, data.len(), true);
        let (low, high) = data.split_at(room);
        self.write_place(world, first, low);
        self.write_place(world, second, high);
        Ok(())
    }

    fn write_place(&mut self, world: &mut dyn World, place: Place, data: &[u8]) {
        match place {
            Place::Ram { host, gpa, code } => {
                // SAFETY: `locate` gave the host address of a byte in a mapped page, and the caller has cut `data` at
                // the page's end.
                unsafe { store(host, data) };
                if code {
                    self.code_written(gpa, data.len());
                }
            }
            Place::Io { gpa } => world.mmio_write(gpa, data),
        }
    }

    /// Checks that `len` bytes at `linear` may be written (and so read), without touching them.
    pub(crate) fn check_write(&mut self, linear: u64, len: usize, user: bool) -> Result<(), Exception> {
        let crosses = (linear & 0xfff) as usize + len > 0x1000;
        if crosses {
            self.check_linear(self.next_page(linear))?;
        }
        self.locate(linear, Access::Write, user)?;
        if crosses {
            self.locate(self.next_page(linear), Access::Write, user)?;
        }
        Ok(())
    }

    /// The operand of a read-modify-write instruction of at most 16 bytes, checked for writing.
    pub(crate) fn host_rw(&mut self, linear: u64, len: usize, user: bool) -> Result<HostRw, Exception> {
        let crosses = (linear & 0xfff) as usize + len > 0x1000;
        if crosses {
            self.check_linear(self.next_page(linear))?;
        }
        let place = self.locate(linear, Access::Write, user)?;
        if crosses {
            self.locate(self.next_page(linear), Access::Write, user)?;
            return Ok(HostRw::Slow);
        }
        Ok(match place {
            Place::Ram { host, gpa, code } => HostRw::Ram { host, gpa, code },
            Place::Io { .. } => HostRw::Slow,
        })
    }

    /// Host memory from `linear` to the end of its page, for reading or writing in bulk. `None` where bytes must go
    /// one by one: outside RAM, or a write to a page that holds decoded code.
    pub(crate) fn host_ptr(&mut self, linear: u64, user: bool, write: bool) -> Result<Option<PageSpan>, Exception> {
        let access = if write { Access::Write } else { Access::Read };
        let len = 0x1000 - (linear & 0xfff) as usize;
        Ok(match self.locate(linear, access, user)? {
            Place::Ram { host, code, .. } if !(write && code || self.page_is_watched(linear)) => {
                Some(PageSpan { host, len })
            }
            _ => None,
        })
    }

    /// The page to fetch from. #PF with the fetch bit as enabled; #GP(0) when not canonical, and where there is no RAM:
    /// code is not run from devices.
    pub(crate) fn fetch_page(&mut self, linear: u64, user: bool) -> Result<CodePage, Exception> {
        // The whole address: it is what a page fault reports.
        match self.locate(linear, Access::Execute, user)? {
            Place::Ram { host, gpa, .. } => {
                let offset = linear & 0xfff;
                Ok(CodePage { gpa: gpa - offset, host: host.wrapping_sub(offset as usize) })
            }
            Place::Io { .. } => Err(Exception::gp(0)),
        }
    }

    /// Where a linear address lies in guest-physical memory, for debuggers: nothing changes, permissions do not count.
    pub fn translate(&self, linear: u64) -> Option<u64> {
        let linear = self.check_linear(linear).ok()?;
        let found = self.walker().translate(linear, Access::Read, false, true).ok()?;
        Some(found.frame | linear & 0xfff)
    }

    /// Reads a little-endian number of `N` bytes.
    #[inline]
    pub(crate) fn load<const N: usize>(
        &mut self,
        world: &mut dyn World,
        linear: u64,
        user: bool,
    ) -> Result<[u8; N], Exception> {
        let mut data = [0; N];
        if let Some(entry) = self.mmu.tlb[usize::from(user)].lookup(Kind::Read, linear)
            && (linear & 0xfff) as usize + N <= 0x1000
        {
            let host = (linear as usize).wrapping_add(entry.addend) as *const u8;
            // SAFETY: a read entry exists only for a mapped page of RAM, and the bytes end within that page.
            unsafe { fetch(host, &mut data) };
            return Ok(data);
        }
        self.read_slow(world, linear, &mut data, user)?;
        Ok(data)
    }

    /// Writes bytes, by way of the TLB if it can.
    #[inline]
    pub(crate) fn store(
        &mut self,
        world: &mut dyn World,
        linear: u64,
        data: &[u8],
        user: bool,
    ) -> Result<(), Exception> {
        if let Some(entry) = self.mmu.tlb[usize::from(user)].lookup(Kind::Write, linear)
            && (linear & 0xfff) as usize + data.len() <= 0x1000
        {
            let host = (linear as usize).wrapping_add(entry.addend) as *mut u8;
            // SAFETY: a write entry exists only for a mapped, writable page of RAM; the bytes end within that page.
            unsafe { store(host, data) };
            return Ok(());
        }
        self.write_slow(world, linear, data, user)
    }

    /// Reads a little-endian word from guest-physical memory; the address is a multiple of four. `None` outside RAM.
    pub(crate) fn read_physical_word(&self, gpa: u64) -> Option<u32> {
        let (frame, _) = self.ram.frame(gpa & !0xfff)?;
        let mut data = [0; 4];
        // SAFETY: the frame is 4096 mapped bytes, and an aligned word does not cross its end.
        unsafe { fetch(frame.add((gpa & 0xffc) as usize), &mut data) };
        Some(u32::from_le_bytes(data))
    }

    /// Writes to guest-physical memory as a device would (kvmclock), telling the decoder of changed code. `false`
    /// outside RAM.
    pub(crate) fn write_physical(&mut self, gpa: u64, data: &[u8]) -> bool {
        let Some((frame, true)) = self.ram.frame(gpa & !0xfff) else { return false };
        let offset = (gpa & 0xfff) as usize;
        if offset + data.len() > 0x1000 {
            return false;
        }
        // SAFETY: the frame is 4096 mapped, writable bytes, and the range was just checked to lie within.
        unsafe { store(frame.add(offset), data) };
        if self.mmu.is_code(gpa) {
            self.code_written(gpa, data.len());
        }
        true
    }
}

fn read_place(world: &mut dyn World, place: Place, data: &mut [u8]) {
    match place {
        // SAFETY: `locate` gave the host address of a byte in a mapped page, and the caller has cut `data` at the
        // page's end.
        Place::Ram { host, .. } => unsafe { fetch(host, data) },
        Place::Io { gpa } => world.mmio_read(gpa, data),
    }
}

/// Reads guest memory, in one access where the size is that of a register.
///
/// # Safety
/// `data.len()` bytes at `host` must be mapped.
unsafe fn fetch(host: *const u8, data: &mut [u8]) {
    // SAFETY: by the function's contract; unaligned volatile reads of plain integers are what x86 hosts do in one go.
    unsafe {
        match data.len() {
            1 => data[0] = host.read_volatile(),
            2 => data.copy_from_slice(&host.cast::<[u8; 2]>().read_volatile()),
            4 => data.copy_from_slice(&host.cast::<u32>().read_unaligned().to_le_bytes()),
            8 => data.copy_from_slice(&host.cast::<u64>().read_unaligned().to_le_bytes()),
            len => ptr::copy_nonoverlapping(host, data.as_mut_ptr(), len),
        }
    }
}

/// Writes guest memory, in one access where the size is that of a register.
///
/// # Safety
/// `data.len()` bytes at `host` must be mapped and writable.
unsafe fn store(host: *mut u8, data: &[u8]) {
    // SAFETY: by the function's contract.
    unsafe {
        match *data {
            [a] => host.write_volatile(a),
            [a, b] => host.cast::<u16>().write_unaligned(u16::from_le_bytes([a, b])),
            [a, b, c, d] => host.cast::<u32>().write_unaligned(u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                host.cast::<u64>().write_unaligned(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()),
        }
    }
}
