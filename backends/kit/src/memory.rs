//! Guest memory as the front end hands it over, and the one way in which a device moves data in and out.
//!
//! [`MemoryTable`] is what SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG build: regions by guest address, each
//! with the address that the front end uses for it in SET_VRING_ADDR. [`GuestRam`] is the mapped result.
//! Everything above is generic over `vm-memory`'s `GuestMemory`, so that a memory behind an IOMMU drops in.
//!
//! [`Segments`] is a list of guest ranges out of one descriptor chain; [`Transfer`] is the only place where
//! guest ranges become host pointers for a system call, and it marks what has landed in the dirty log.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use thiserror::Error;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, Permissions,
};

use crate::dirty::{DirtyLog, RegionLog};

/// Guest memory with a dirty log in it.
pub type GuestRam = GuestMemoryMmap<RegionLog>;

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
            windows.push(window);
            mapped.push(ram);
        }
        // Regions may come in any order; vm-memory wants them sorted.
        mapped.sort_by_key(GuestMemoryRegion::start_addr);
        let ram = GuestRam::from_regions(mapped)
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
        let ram = match &self.ram {
            Some(ram) => ram.insert_region(Arc::new(mapped)),
            None => GuestRam::from_regions(vec![mapped]),
        }
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
        self.ram = if self.windows.len() == 1 {
            None
        } else {
            let (rest, _) = ram.remove_region(GuestAddress(gpa), size).map_err(|_| missing)?;
            Some(Arc::new(rest))
        };
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

/// An access to guest memory that the guest has no memory for.
#[derive(Debug, Clone, Copy, Error, PartialEq, Eq)]
#[error("a request points outside guest memory")]
pub struct OutOfRange;

/// One range of guest memory, out of one descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub addr: GuestAddress,
    /// How many bytes.
    pub len: u32,
}

/// The readable or the writable half of a descriptor chain. Offsets count over all its segments.
#[derive(Debug, Clone, Copy)]
pub struct Segments<'a>(pub &'a [Segment]);

impl Segments<'_> {
    /// Bytes in all segments. A chain holds at most 2^32 of them.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|s| u64::from(s.len)).sum()
    }

    /// Guest address of the last byte, none when there is no byte.
    pub fn last_byte(&self) -> Option<GuestAddress> {
        let last = self.0.iter().rev().find(|s| s.len > 0)?;
        last.addr.0.checked_add(u64::from(last.len) - 1).map(GuestAddress)
    }

    /// Calls `f` for each guest range within `len` bytes at `offset`.
    fn ranges(
        &self,
        mut offset: u64,
        mut len: u64,
        mut f: impl FnMut(GuestAddress, usize) -> Result<(), OutOfRange>,
    ) -> Result<(), OutOfRange> {
        for segment in self.0 {
            if len == 0 {
                break;
            }
            let size = u64::from(segment.len);
            if offset >= size {
                offset -= size;
                continue;
            }
            let take = (size - offset).min(len);
            let start = segment.addr.0.checked_add(offset).ok_or(OutOfRange)?;
            f(GuestAddress(start), take as usize)?;
            len -= take;
            offset = 0;
        }
        if len == 0 { Ok(()) } else { Err(OutOfRange) }
    }

    /// Fills `out` from `offset` on.
    pub fn read_at<M: GuestMemory>(&self, mem: &M, offset: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        let mut done = 0;
        self.ranges(offset, out.len() as u64, |addr, len| {
            let part = out.get_mut(done..done + len).ok_or(OutOfRange)?;
            done += len;
            mem.read_slice(part, addr).map_err(|_| OutOfRange)
        })
    }

    /// Writes `data` from `offset` on, and marks it dirty.
    pub fn write_at<M: GuestMemory>(&self, mem: &M, offset: u64, data: &[u8]) -> Result<(), OutOfRange> {
        let mut done = 0;
        self.ranges(offset, data.len() as u64, |addr, len| {
            let part = data.get(done..done + len).ok_or(OutOfRange)?;
            done += len;
            mem.write_slice(part, addr).map_err(|_| OutOfRange)
        })
    }
}

/// Copies `len` bytes from one chain to another, which may belong to different guests, and marks them dirty. `from` and
/// `to` are each a memory, a chain's half and an offset into it.
pub fn copy<A: GuestMemory, B: GuestMemory>(
    from: (&A, Segments<'_>, u64),
    to: (&B, Segments<'_>, u64),
    len: u64,
) -> Result<(), OutOfRange> {
    let mut to_at = Cursor { segments: to.1.0, offset: 0 };
    to_at.advance(to.2);
    from.1.ranges(from.2, len, |addr, len| {
        for slice in from.0.get_slices(addr, len, Permissions::Read).map_err(|_| OutOfRange)? {
            let slice = slice.map_err(|_| OutOfRange)?;
            let mut done = 0;
            while done < slice.len() {
                let (addr, room) = to_at.next().ok_or(OutOfRange)?;
                let take = room.min((slice.len() - done) as u64) as usize;
                for target in to.0.get_slices(addr, take, Permissions::Write).map_err(|_| OutOfRange)? {
                    let target = target.map_err(|_| OutOfRange)?;
                    let part = slice.subslice(done, target.len()).map_err(|_| OutOfRange)?;
                    done += target.len();
                    part.copy_to_volatile_slice(target);
                }
                to_at.advance(take as u64);
            }
        }
        Ok(())
    })
}

/// A place in a list of segments, so that a walk over two of them stays linear.
struct Cursor<'a> {
    segments: &'a [Segment],
    offset: u64,
}

impl Cursor<'_> {
    /// Where the next bytes go and how many fit there.
    fn next(&mut self) -> Option<(GuestAddress, u64)> {
        loop {
            let (first, rest) = self.segments.split_first()?;
            let room = u64::from(first.len).saturating_sub(self.offset);
            if room > 0 {
                return Some((GuestAddress(first.addr.0.checked_add(self.offset)?), room));
            }
            self.offset -= u64::from(first.len);
            self.segments = rest;
        }
    }

    fn advance(&mut self, bytes: u64) {
        self.offset = self.offset.saturating_add(bytes);
    }
}

/// Which way a [`Transfer`] moves data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The device writes guest memory.
    IntoGuest,
    /// The device reads guest memory.
    FromGuest,
}

/// Guest ranges turned into an iovec for a system call. Reused from request to request.
///
/// The pointers are valid as long as the mapped memory is; the queue thread keeps it mapped until nothing is in
/// flight (see [`worker`](crate::worker)).
#[derive(Debug, Default)]
pub struct Transfer {
    iovecs: Vec<rustix_iovec::Iovec>,
    ranges: Vec<Segment>,
    skipped: usize,
}

/// `libc::iovec` that may move between threads.
mod rustix_iovec {
    #![allow(unsafe_code, reason = "a pointer into guest memory moves with its transfer")]

    #[repr(transparent)]
    #[derive(Debug, Clone, Copy)]
    pub(super) struct Iovec(pub(super) libc::iovec);

    // SAFETY: the pointer is never dereferenced here; it is handed to the kernel while the memory is mapped.
    unsafe impl Send for Iovec {}
}

impl Transfer {
    /// Points at `len` bytes from `offset` of `segments`.
    pub fn set<M: GuestMemory>(
        &mut self,
        mem: &M,
        segments: Segments<'_>,
        offset: u64,
        len: u64,
        direction: Direction,
    ) -> Result<(), OutOfRange> {
        let access = match direction {
            Direction::IntoGuest => Permissions::Write,
            Direction::FromGuest => Permissions::Read,
        };
        self.iovecs.clear();
        self.ranges.clear();
        self.skipped = 0;
        let (iovecs, ranges) = (&mut self.iovecs, &mut self.ranges);
        segments.ranges(offset, len, |addr, len| {
            for slice in mem.get_slices(addr, len, access).map_err(|_| OutOfRange)? {
                let slice = slice.map_err(|_| OutOfRange)?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                iovecs.push(rustix_iovec::Iovec(libc::iovec { iov_base, iov_len: slice.len() }));
            }
            if direction == Direction::IntoGuest {
                ranges.push(Segment { addr, len: len as u32 });
            }
            Ok(())
        })
    }

    /// The iovec as the kernel wants it: pointer and number of entries.
    pub fn iovec(&self) -> (*const libc::iovec, u32) {
        let rest = self.iovecs.get(self.skipped..).unwrap_or_default();
        (rest.as_ptr().cast(), rest.len() as u32)
    }

    /// True when each range starts and ends at a multiple of `align`, as direct I/O demands of memory.
    pub fn aligned(&self, align: usize) -> bool {
        let mask = align.wrapping_sub(1);
        self.iovecs.iter().all(|v| (v.0.iov_base as usize | v.0.iov_len) & mask == 0)
    }

    /// Drops the first `bytes` after a short read or write.
    pub fn advance(&mut self, mut bytes: usize) {
        while let Some(first) = self.iovecs.get_mut(self.skipped) {
            if bytes < first.0.iov_len {
                first.0.iov_base = first.0.iov_base.wrapping_byte_add(bytes);
                first.0.iov_len -= bytes;
                return;
            }
            bytes -= first.0.iov_len;
            self.skipped += 1;
        }
    }

    /// Marks everything that this transfer pointed at as written by the device. To be called before the request
    /// is completed, whether it succeeded or not: a failed read may have written a part.
    pub fn landed<M: GuestMemory>(&self, mem: &M) {
        for range in &self.ranges {
            let Ok(slices) = mem.get_slices(range.addr, range.len as usize, Permissions::Write) else { continue };
            for slice in slices.flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
    }
}
