//! What a descriptor chain points to, and the ways in which a device moves data in and out.

use thiserror::Error;
use vm_memory::bitmap::{Bitmap, MS};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions, VolatileSlice};

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

/// Guest memory at `addr`, if it lies in one piece of a mapping; none behind an IOMMU. What is written through it is marked
/// in the dirty log.
#[inline]
pub fn piece<M: GuestMemory>(
    mem: &M,
    addr: GuestAddress,
    len: usize,
) -> Option<VolatileSlice<'_, MS<'_, M::PhysicalMemory>>> {
    let physical = mem.physical_memory()?;
    let region = physical.find_region(addr)?;
    region.get_slice(region.to_region_addr(addr)?, len).ok()
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

    /// The bytes from `offset` on, if they lie in the first segment and in one piece of a mapping: as nearly always.
    #[inline]
    pub fn piece<'m, M: GuestMemory>(
        &self,
        mem: &'m M,
        offset: u64,
        len: usize,
    ) -> Option<VolatileSlice<'m, MS<'m, M::PhysicalMemory>>> {
        let first = self.0.first()?;
        if offset.checked_add(len as u64)? > u64::from(first.len) {
            return None;
        }
        piece(mem, GuestAddress(first.addr.0.checked_add(offset)?), len)
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
    #[inline]
    pub fn read_at<M: GuestMemory>(&self, mem: &M, offset: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        match self.piece(mem, offset, out.len()) {
            Some(piece) => {
                piece.copy_to(out);
                Ok(())
            }
            None => self.read_parts(mem, offset, out),
        }
    }

    #[cold]
    fn read_parts<M: GuestMemory>(&self, mem: &M, offset: u64, out: &mut [u8]) -> Result<(), OutOfRange> {
        let mut done = 0;
        self.ranges(offset, out.len() as u64, |addr, len| {
            let part = out.get_mut(done..done + len).ok_or(OutOfRange)?;
            done += len;
            mem.read_slice(part, addr).map_err(|_| OutOfRange)
        })
    }

    /// Writes `data` from `offset` on, and marks it dirty.
    #[inline]
    pub fn write_at<M: GuestMemory>(&self, mem: &M, offset: u64, data: &[u8]) -> Result<(), OutOfRange> {
        match self.piece(mem, offset, data.len()) {
            Some(piece) => {
                piece.copy_from(data);
                Ok(())
            }
            None => self.write_parts(mem, offset, data),
        }
    }

    #[cold]
    fn write_parts<M: GuestMemory>(&self, mem: &M, offset: u64, data: &[u8]) -> Result<(), OutOfRange> {
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
    let bytes = usize::try_from(len).map_err(|_| OutOfRange)?;
    if let (Some(source), Some(target)) = (from.1.piece(from.0, from.2, bytes), to.1.piece(to.0, to.2, bytes)) {
        source.copy_to_volatile_slice(target);
        return Ok(());
    }
    copy_parts(from, to, len)
}

fn copy_parts<A: GuestMemory, B: GuestMemory>(
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
            if direction == Direction::IntoGuest {
                ranges.push(Segment { addr, len: len as u32 });
            }
            if let Some(piece) = piece(mem, addr, len) {
                let iov_base = piece.ptr_guard_mut().as_ptr().cast();
                iovecs.push(rustix_iovec::Iovec(libc::iovec { iov_base, iov_len: len }));
                return Ok(());
            }
            for slice in mem.get_slices(addr, len, access).map_err(|_| OutOfRange)? {
                let slice = slice.map_err(|_| OutOfRange)?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                iovecs.push(rustix_iovec::Iovec(libc::iovec { iov_base, iov_len: slice.len() }));
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
            if let Some(piece) = piece(mem, range.addr, range.len as usize) {
                piece.bitmap().mark_dirty(0, piece.len());
                continue;
            }
            let Ok(slices) = mem.get_slices(range.addr, range.len as usize, Permissions::Write) else { continue };
            for slice in slices.flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
    }
}
