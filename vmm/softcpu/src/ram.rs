//! Guest RAM as the CPU sees it: host mappings shared with other vCPUs and with backend processes.
#![allow(unsafe_code, reason = "guest RAM is host memory that other processes write; the CPU works on raw pointers")]

use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// One contiguous stretch of guest RAM.
#[derive(Clone, Copy, Debug)]
pub struct RamRegion {
    gpa: u64,
    len: u64,
    host: *mut u8,
    writable: bool,
}

// SAFETY: the region is plain shared memory; every access through it is by raw pointer or atomics, and the mapping
// outlives the region by the contract of `RamRegion::new`.
unsafe impl Send for RamRegion {}
// SAFETY: as above.
unsafe impl Sync for RamRegion {}

impl RamRegion {
    /// Describes `len` bytes at `host` as guest RAM from `gpa` on. Both ends must be multiples of 4096.
    ///
    /// # Safety
    /// The mapping must be readable (and writable if `writable`) and stay mapped for as long as any CPU that was given
    /// the region exists.
    pub unsafe fn new(gpa: u64, len: u64, host: *mut u8, writable: bool) -> Self {
        assert!(gpa.is_multiple_of(4096) && len.is_multiple_of(4096) && (host as usize).is_multiple_of(4096));
        assert!(gpa.checked_add(len).is_some());
        Self { gpa, len, host, writable }
    }
    /// First guest-physical address.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Whether the region is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Whether the guest may write it.
    pub fn writable(&self) -> bool {
        self.writable
    }
    /// Host address of the first byte.
    pub fn host(&self) -> *mut u8 {
        self.host
    }
}

/// All guest RAM, sorted by address, without overlap.
#[derive(Clone, Default)]
pub struct GuestRam {
    regions: Vec<RamRegion>,
    /// Whatever owns the mappings; held so that they outlive every CPU that was given them.
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl fmt::Debug for GuestRam {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("GuestRam").field("regions", &self.regions).finish_non_exhaustive()
    }
}

impl GuestRam {
    /// Sorts and checks the regions.
    ///
    /// # Panics
    /// If two regions overlap: the caller lays out memory.
    pub fn new(mut regions: Vec<RamRegion>) -> Self {
        regions.sort_by_key(|region| region.gpa);
        assert!(regions.windows(2).all(|pair| pair[0].gpa + pair[0].len <= pair[1].gpa), "RAM regions overlap");
        Self { regions, owner: None }
    }
    /// Keeps `owner`, which holds the mappings, alive for as long as any clone of this exists.
    #[must_use]
    pub fn keeping(mut self, owner: Arc<dyn Any + Send + Sync>) -> Self {
        self.owner = Some(owner);
        self
    }
    /// The regions in order of address.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }
    /// The region that holds `gpa`, if it is RAM.
    pub fn find(&self, gpa: u64) -> Option<&RamRegion> {
        let index = self.regions.partition_point(|region| region.gpa <= gpa).checked_sub(1)?;
        self.regions.get(index).filter(|region| gpa - region.gpa < region.len)
    }
    /// Host pointer of the 4096-byte frame at `gpa` (a multiple of 4096), with its writability.
    pub fn frame(&self, gpa: u64) -> Option<(*mut u8, bool)> {
        let region = self.find(gpa)?;
        // SAFETY: `find` has checked that the offset lies within the mapping.
        Some((unsafe { region.host.add((gpa - region.gpa) as usize) }, region.writable))
    }
}
