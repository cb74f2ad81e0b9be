//! The memfd behind guest RAM and the views of it.
#![allow(unsafe_code, reason = "hands the CPU raw pointers into the mapping, which it keeps alive")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use atoll_softcpu::ram::{GuestRam, RamRegion};
use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::machine::layout::Span;

/// Added to a guest-physical address to make the "user address" that vhost-user backends see.
///
/// Not canonical with four-level page tables, so a backend that forgets to translate faults at once, and no address of
/// this process leaks to it.
pub const BACKEND_ADDRESS_OFFSET: u64 = 1 << 52;

/// The user address of a guest-physical address, as ring addresses and memory tables carry it.
pub fn backend_address(gpa: u64) -> u64 {
    // RAM ends below 2^40 and rings are checked to lie in 52-bit physical space, so this never wraps for what is valid;
    // what is not valid must not become valid by wrapping.
    gpa.saturating_add(BACKEND_ADDRESS_OFFSET)
}

/// Guest memory could not be made.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// No memfd, or not of this size.
    #[error("cannot create {} MiB of guest memory: {source}; give less with --memory size=", size >> 20)]
    Create {
        /// Size asked for, in bytes.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The mapping failed.
    #[error("cannot map guest memory at {gpa:#x} ({len:#x} bytes): {reason}; give less with --memory size=")]
    Map {
        /// First guest-physical address of the region.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
        /// What failed.
        reason: String,
    },
}

/// One contiguous stretch of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where its first byte lies in the memfd.
    pub file_offset: u64,
}

/// One region as a KVM memory slot wants it.
#[derive(Clone, Copy, Debug)]
pub struct MemorySlot {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Host address of the first byte; valid as long as the [`GuestMemory`] lives.
    pub host: u64,
}

/// Guest RAM: cheap to clone, unmapped when the last clone and the last CPU that was given it are gone.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    ranges: Vec<RamRange>,
    file: Arc<File>,
    mapped: Arc<GuestMemoryMmap>,
}

impl GuestMemory {
    /// Creates, seals and maps RAM at `spans` (from [`layout::ram`](crate::machine::layout::ram): in order of address,
    /// without overlap, whole pages). Pages are zero and cost nothing until they are touched.
    ///
    /// # Errors
    /// If the kernel refuses the memfd or the mapping, or the spans overlap.
    pub fn new(spans: &[Span]) -> Result<Self, MemoryError> {
        let mut size = 0;
        let mut ranges = Vec::new();
        for span in spans {
            ranges.push(RamRange { gpa: span.start, len: span.len, file_offset: size });
            size += span.len;
        }
        let create = |source: rustix::io::Errno| MemoryError::Create { size, source: source.into() };
        let memfd =
            rustix::fs::memfd_create("atoll-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(create)?;
        rustix::fs::ftruncate(&memfd, size).map_err(create)?;
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(create)?;
        let file = Arc::new(File::from(memfd));
        let mut regions = Vec::new();
        for range in &ranges {
            let failed = |reason: String| MemoryError::Map { gpa: range.gpa, len: range.len, reason };
            let len = usize::try_from(range.len).map_err(|error| failed(error.to_string()))?;
            let backing = FileOffset::from_arc(Arc::clone(&file), range.file_offset);
            let region = GuestRegionMmap::<()>::from_range(GuestAddress(range.gpa), len, Some(backing))
                .map_err(|error| failed(error.to_string()))?;
            regions.push(region);
        }
        let mapped = GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Map {
            gpa: 0,
            len: size,
            reason: error.to_string(),
        })?;
        Ok(Self { ranges, file, mapped: Arc::new(mapped) })
    }
    /// Where RAM lies, in order of address.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }
    /// All RAM, in bytes.
    pub fn size(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }
    /// The view of the VMM itself: loading kernels, reading rings.
    pub fn mapped(&self) -> &Arc<GuestMemoryMmap> {
        &self.mapped
    }
    /// The memfd.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }
    /// The view of the software CPU. It keeps the mapping alive by itself.
    pub fn cpu_ram(&self) -> GuestRam {
        let regions = self
            .slots()
            .into_iter()
            // SAFETY: `slots` gives whole live mappings, page-aligned, readable and writable; `keeping` below holds
            // them for as long as the `GuestRam`, and thus any CPU that owns it, exists.
            .map(|slot| unsafe { RamRegion::new(slot.gpa, slot.len, slot.host as *mut u8, true) })
            .collect();
        let owner = Arc::clone(&self.mapped);
        GuestRam::new(regions).keeping(owner)
    }
    /// The view of KVM.
    pub fn slots(&self) -> Vec<MemorySlot> {
        self.mapped
            .iter()
            .filter_map(|region| {
                let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
                Some(MemorySlot { gpa: region.start_addr().0, len: region.len(), host: host as u64 })
            })
            .collect()
    }
    /// The view of a vhost-user backend: user address = guest-physical address + 2^52. The descriptor in it is
    /// borrowed from [`Self::file`].
    pub fn memory_table(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.ranges
            .iter()
            .map(|range| VhostUserMemoryRegionInfo {
                guest_phys_addr: range.gpa,
                memory_size: range.len,
                userspace_addr: backend_address(range.gpa),
                mmap_offset: range.file_offset,
                mmap_handle: self.file.as_raw_fd(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::layout::ram;
    use vm_memory::Bytes;

    /// A backend is handed the very descriptor that holds guest RAM: it must not be able to truncate it under the VMM,
    /// which would turn the VMM's next access into SIGBUS.
    #[test]
    fn nobody_can_resize_ram() {
        let memory = GuestMemory::new(&ram(16 << 20).unwrap()).unwrap();
        let backend = memory.file().try_clone().unwrap();
        assert!(backend.set_len(4096).is_err());
        assert!(backend.set_len(32 << 20).is_err());
        assert!(rustix::fs::fcntl_add_seals(&backend, SealFlags::WRITE).is_err());
    }

    /// All views show the same bytes, and the CPU's survives the VMM's.
    #[test]
    fn views_agree() {
        let memory = GuestMemory::new(&ram((3 << 30) + (2 << 20)).unwrap()).unwrap();
        memory.mapped().write_obj(0x5a17_u16, GuestAddress((4 << 30) + 4096)).unwrap();

        let table = memory.memory_table();
        assert_eq!(table.len(), 2);
        assert_eq!((table[1].guest_phys_addr, table[1].userspace_addr), (4 << 30, (4 << 30) + (1 << 52)));
        assert_eq!((table[1].mmap_offset, table[1].memory_size), (3 << 30, 2 << 20));
        let mut through_file = [0; 2];
        rustix::io::pread(memory.file(), &mut through_file, table[1].mmap_offset + 4096).unwrap();
        assert_eq!(u16::from_le_bytes(through_file), 0x5a17);

        let ram = memory.cpu_ram();
        drop(memory);
        let (frame, writable) = ram.frame((4 << 30) + 4096).unwrap();
        assert!(writable);
        // SAFETY: `ram` keeps the mapping alive and nobody else writes it.
        assert_eq!(unsafe { frame.cast::<u16>().read_volatile() }, 0x5a17);
        assert!(ram.frame(3 << 30).is_none());
    }
}
