//! Guest memory as the front end hands it over, and the one way in which a device moves data in and out.
//!
//! [`MemoryTable`] is what SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG build: regions by guest address, each
//! with the address that the front end uses for it in SET_VRING_ADDR. [`GuestRam`] is the mapped result.
//! Everything above is generic over `vm-memory`'s `GuestMemory`, so that a memory behind an IOMMU drops in.
//!
//! [`Segments`] is a list of guest ranges out of one descriptor chain; [`Transfer`] is the only place where
//! guest ranges become host pointers for a system call, and it marks what has landed in the dirty log.

use std::fs::File;
use std::iter::FusedIterator;
use std::os::fd::AsFd;
use std::sync::Arc;

use thiserror::Error;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollectionError, GuestRegionMmap, MemoryRegionAddress, Permissions, VolatileSlice,
};

use crate::dirty::{DirtyLog, LogSlice, RegionLog};
use crate::iotlb::Iotlb;
pub use crate::segments::{Direction, OutOfRange, Segment, Segments, Transfer, copy, piece};

/// Guest memory with a dirty log in it, as a device's requests see it: at guest-physical addresses, or behind an IOMMU at
/// those that the front end has told of ([`iotlb`](crate::iotlb)).
#[derive(Debug)]
pub struct GuestRam {
    physical: PhysicalRam,
    iotlb: Option<Arc<Iotlb>>,
}

impl GuestRam {
    /// The same memory behind an IOMMU.
    pub(crate) fn behind(&self, iotlb: Arc<Iotlb>) -> Self {
        Self { physical: self.physical.clone(), iotlb: Some(iotlb) }
    }

    /// Where `count` bytes at `addr` are, for a device behind an IOMMU.
    fn translate(
        &self,
        iotlb: &Iotlb,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Option<Vec<VolatileSlice<'_, LogSlice<'_>>>> {
        let mut pieces = Vec::new();
        let (mut iova, mut left) = (addr.0, count);
        while left > 0 {
            let mapping = iotlb.find(iova, access)?;
            let user = mapping.translate(iova)?;
            let (range, offset) = self.physical.user(user)?;
            let mapped = (mapping.iova().last() - iova).saturating_add(1).min(range.bytes - offset);
            let take = left.min(usize::try_from(mapped).unwrap_or(usize::MAX));
            pieces.push(range.region.get_slice(MemoryRegionAddress(offset), take).ok()?);
            left -= take;
            // Beyond the last address there is nothing.
            iova = if left > 0 { iova.checked_add(take as u64)? } else { iova };
        }
        Some(pieces)
    }
}

impl GuestMemory for GuestRam {
    type PhysicalMemory = PhysicalRam;
    type Bitmap = RegionLog;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        match &self.iotlb {
            None => GuestMemoryBackend::check_range(&self.physical, addr, count),
            Some(iotlb) => self.translate(iotlb, addr, count, access).is_some(),
        }
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> vm_memory::guest_memory::Result<impl GuestMemorySliceIterator<'a, LogSlice<'a>>> {
        let found = match &self.iotlb {
            None => None,
            Some(iotlb) => {
                let found = self.translate(iotlb, addr, count, access);
                Some(found.ok_or(vm_memory::guest_memory::Error::InvalidGuestAddress(addr))?.into_iter())
            }
        };
        // Nothing is looked up before the first piece is asked for.
        Ok(Slices { found, direct: GuestMemoryBackend::get_slices(&self.physical, addr, count) })
    }

    #[inline]
    fn physical_memory(&self) -> Option<&PhysicalRam> {
        if self.iotlb.is_none() { Some(&self.physical) } else { None }
    }
}

/// Pieces of memory, one after the other.
struct Slices<'a, I> {
    /// Behind an IOMMU all of them are found before the first is used.
    found: Option<std::vec::IntoIter<VolatileSlice<'a, LogSlice<'a>>>>,
    direct: I,
}

type Slice<'a> = vm_memory::guest_memory::Result<VolatileSlice<'a, LogSlice<'a>>>;

impl<'a, I: Iterator<Item = Slice<'a>>> Iterator for Slices<'a, I> {
    type Item = Slice<'a>;
    #[inline]
    fn next(&mut self) -> Option<Slice<'a>> {
        match &mut self.found {
            None => self.direct.next(),
            Some(found) => found.next().map(Ok),
        }
    }
}

impl<'a, I: FusedIterator<Item = Slice<'a>>> FusedIterator for Slices<'a, I> {}

impl<'a, I: FusedIterator<Item = Slice<'a>>> GuestMemorySliceIterator<'a, LogSlice<'a>> for Slices<'a, I> {}

/// The regions that a front end has handed over.
///
/// It finds the region of an address in a list of ranges that lie side by side: there are few of them, and every access to
/// what a request points to looks into it.
#[derive(Debug, Clone)]
pub struct PhysicalRam {
    ranges: Vec<Range>,
}

#[derive(Debug, Clone)]
struct Range {
    start: u64,
    bytes: u64,
    /// The front end's address of its first byte.
    user: u64,
    region: Arc<Region>,
}

type Region = GuestRegionMmap<RegionLog>;

impl GuestRam {
    /// Regions in any order, each with the front end's address of it.
    fn new(mut regions: Vec<(u64, Arc<Region>)>) -> Result<Self, GuestRegionCollectionError> {
        regions.sort_by_key(|(_, region)| region.start_addr());
        // It checks that they do not overlap.
        GuestMemoryMmap::from_arc_regions(regions.iter().map(|(_, region)| Arc::clone(region)).collect())?;
        let range = |(user, region): (u64, Arc<Region>)| Range {
            start: region.start_addr().0,
            bytes: region.len(),
            user,
            region,
        };
        let physical = PhysicalRam { ranges: regions.into_iter().map(range).collect() };
        Ok(Self { physical, iotlb: None })
    }

    fn regions(&self) -> impl Iterator<Item = (u64, Arc<Region>)> {
        self.physical.ranges.iter().map(|range| (range.user, Arc::clone(&range.region)))
    }
}

impl PhysicalRam {
    /// The range that an address of the front end lies in, and how far from its beginning.
    fn user(&self, user: u64) -> Option<(&Range, u64)> {
        self.ranges.iter().find_map(|range| {
            user.checked_sub(range.user).filter(|offset| *offset < range.bytes).map(|offset| (range, offset))
        })
    }
}

impl GuestMemoryBackend for PhysicalRam {
    type R = Region;

    fn num_regions(&self) -> usize {
        self.ranges.len()
    }

    #[inline]
    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        let found = self.ranges.iter().find(|range| addr.0.wrapping_sub(range.start) < range.bytes)?;
        Some(&found.region)
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.ranges.iter().map(|range| &*range.region)
    }
}

/// Memory regions that the kit accepts (GET_MAX_MEM_SLOTS).
pub const REGIONS_MAX: usize = 32;

/// Why a memory table or an address was refused.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// More regions than [`REGIONS_MAX`].
    #[error("the front end gave more than {REGIONS_MAX} memory regions")]
    TooMany,
    /// A region is empty or wraps around the address space.
    #[error("memory region at {gpa:#x} with {size:#x} bytes is empty or wraps around")]
    BadRange {
        /// Guest-physical start.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// A region lies outside the file that was sent for it; touching it would end the process with SIGBUS.
    #[error("memory region at {gpa:#x} needs {need:#x} bytes of its file, which has {have:#x}")]
    PastEnd {
        /// Guest-physical start.
        gpa: u64,
        /// Offset and size together.
        need: u64,
        /// Length of the file.
        have: u64,
    },
    /// A region could not be mapped, or overlaps another.
    #[error("cannot map memory region at {gpa:#x}: {reason}")]
    Map {
        /// Guest-physical start.
        gpa: u64,
        /// What the kernel or `vm-memory` said.
        reason: String,
    },
    /// REM_MEM_REG names a region that is not there.
    #[error("there is no memory region at {gpa:#x} with {size:#x} bytes to remove")]
    NoSuchRegion {
        /// Guest-physical start.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// An address of the front end is in none of its regions.
    #[error("address {0:#x} of the front end is in none of its memory regions")]
    Untranslatable(u64),
}

#[derive(Debug, Clone, Copy)]
struct Window {
    user: u64,
    gpa: u64,
    size: u64,
}

/// The regions of one front end.
#[derive(Debug, Default)]
pub struct MemoryTable {
    windows: Vec<Window>,
    ram: Option<Arc<GuestRam>>,
}

impl MemoryTable {
    /// The mapped memory, once there is any.
    pub fn ram(&self) -> Option<&Arc<GuestRam>> {
        self.ram.as_ref()
    }

    /// Replaces everything by `regions` (SET_MEM_TABLE).
    pub fn replace(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        log: &Arc<DirtyLog>,
    ) -> Result<(), MemoryError> {
        if regions.len() > REGIONS_MAX {
            return Err(MemoryError::TooMany);
        }
        let mut windows = Vec::new();
        let mut mapped = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            let (window, ram) = map(region, file, log)?;
            mapped.push((window.user, Arc::new(ram)));
            windows.push(window);
        }
        let ram = GuestRam::new(mapped)
            .map_err(|e| MemoryError::Map { gpa: windows.first().map_or(0, |w| w.gpa), reason: e.to_string() })?;
        self.windows = windows;
        self.ram = Some(Arc::new(ram));
        Ok(())
    }

    /// Adds one region (ADD_MEM_REG).
    pub fn add(&mut self, region: &VhostUserMemoryRegion, file: File, log: &Arc<DirtyLog>) -> Result<(), MemoryError> {
        if self.windows.len() >= REGIONS_MAX {
            return Err(MemoryError::TooMany);
        }
        let (window, mapped) = map(region, file, log)?;
        let others = self.ram.iter().flat_map(|ram| ram.regions());
        let ram = GuestRam::new(others.chain([(window.user, Arc::new(mapped))]).collect())
            .map_err(|e| MemoryError::Map { gpa: window.gpa, reason: e.to_string() })?;
        self.windows.push(window);
        self.ram = Some(Arc::new(ram));
        Ok(())
    }

    /// Removes one region (REM_MEM_REG).
    pub fn remove(&mut self, gpa: u64, size: u64) -> Result<(), MemoryError> {
        let missing = MemoryError::NoSuchRegion { gpa, size };
        let Some(position) = self.windows.iter().position(|w| w.gpa == gpa && w.size == size) else {
            return Err(missing);
        };
        let Some(ram) = &self.ram else { return Err(missing) };
        let rest: Vec<_> = ram.regions().filter(|(_, region)| region.start_addr().0 != gpa).collect();
        self.ram = if rest.is_empty() { None } else { Some(Arc::new(GuestRam::new(rest).map_err(|_| missing)?)) };
        self.windows.remove(position);
        Ok(())
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.windows.clear();
        self.ram = None;
    }

    /// The guest address of a ring address that the front end sent.
    pub fn guest_address(&self, user: u64) -> Result<GuestAddress, MemoryError> {
        self.windows
            .iter()
            .find_map(|w| user.checked_sub(w.user).filter(|offset| *offset < w.size).map(|offset| w.gpa + offset))
            .map(GuestAddress)
            .ok_or(MemoryError::Untranslatable(user))
    }
}

fn map(
    region: &VhostUserMemoryRegion,
    file: File,
    log: &Arc<DirtyLog>,
) -> Result<(Window, GuestRegionMmap<RegionLog>), MemoryError> {
    // The message is a packed structure: copy the fields out.
    let (gpa, size, user, offset) = (region.guest_phys_addr, region.memory_size, region.user_addr, region.mmap_offset);
    let bad = MemoryError::BadRange { gpa, size };
    let Ok(len) = usize::try_from(size) else { return Err(bad) };
    if size == 0 || gpa.checked_add(size).is_none() || user.checked_add(size).is_none() {
        return Err(bad);
    }
    let reason = |reason: String| MemoryError::Map { gpa, reason };
    let have = rustix::fs::fstat(file.as_fd()).map_err(|e| reason(e.to_string()))?.st_size.cast_unsigned();
    let need = offset.checked_add(size).ok_or(MemoryError::BadRange { gpa, size })?;
    if need > have {
        return Err(MemoryError::PastEnd { gpa, need, have });
    }
    let bitmap = RegionLog::new(Arc::clone(log), gpa);
    let mmap = MmapRegionBuilder::new_with_bitmap(len, bitmap)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::new(file, offset))
        .build()
        .map_err(|e| reason(e.to_string()))?;
    let region = GuestRegionMmap::new(mmap, GuestAddress(gpa)).ok_or(bad)?;
    Ok((Window { user, gpa, size }, region))
}
