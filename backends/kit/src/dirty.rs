//! The log of dirty pages (VHOST_F_LOG_ALL): a bitmap shared with the front end, one bit per 4 KiB page.
//!
//! The log hangs inside the memory type: [`RegionLog`] is the bitmap of each region of
//! [`GuestRam`](crate::memory::GuestRam), so that every write through `vm-memory`, including those of
//! `virtio-queue` to the used ring, is marked without anybody remembering to. Data that the kernel writes
//! for us (reads from a disk) is marked by [`Transfer::landed`](crate::memory::Transfer::landed).
//!
//! A page is marked after it was written. When it is marked before, the front end may clear the bit, copy the
//! page and lose the write.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use thiserror::Error;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Bytes of guest memory per bit, as the vhost-user specification fixes it.
pub const LOG_PAGE_BYTES: u64 = 4096;

/// Why a log was refused.
#[derive(Debug, Error)]
pub enum DirtyLogError {
    /// The file is shorter than the front end says.
    #[error("the dirty log of {size} bytes at offset {offset} lies outside its file of {file_bytes} bytes")]
    PastEnd {
        /// Bytes of the log.
        size: u64,
        /// Where it starts in the file.
        offset: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// The log could not be mapped.
    #[error("cannot map the dirty log: {0}")]
    Map(String),
}

/// The log of one front end. It can be replaced, switched on and switched off while queues run.
#[derive(Debug, Default)]
pub struct DirtyLog {
    on: AtomicBool,
    map: RwLock<Option<MmapRegion<()>>>,
}

impl DirtyLog {
    /// Maps `size` bytes at `offset` of `file` as the log from now on.
    pub fn set_base(&self, file: File, offset: u64, size: u64) -> Result<(), DirtyLogError> {
        let file_bytes = file.metadata().map_err(|e| DirtyLogError::Map(e.to_string()))?.len();
        let end = offset.checked_add(size);
        let (Some(true), Ok(len)) = (end.map(|end| end <= file_bytes), usize::try_from(size)) else {
            return Err(DirtyLogError::PastEnd { size, offset, file_bytes });
        };
        let region =
            MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(|e| DirtyLogError::Map(e.to_string()))?;
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = Some(region);
        Ok(())
    }

    /// Switches marking on or off (VHOST_F_LOG_ALL in SET_FEATURES).
    pub fn switch(&self, on: bool) {
        self.on.store(on, Ordering::SeqCst);
    }

    /// True while pages are marked.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Forgets the log of a front end that has gone.
    pub fn clear(&self) {
        self.switch(false);
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Marks the pages that `len` bytes at guest-physical `gpa` touch. Pages beyond the log are ignored: the
    /// front end chose its size.
    #[inline]
    pub fn mark(&self, gpa: u64, len: usize) {
        if self.is_on() && len > 0 {
            self.mark_pages(gpa, len);
        }
    }

    #[cold]
    fn mark_pages(&self, gpa: u64, len: usize) {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let Some(map) = map.as_ref() else { return };
        let first = gpa / LOG_PAGE_BYTES;
        let last = gpa.saturating_add(len as u64 - 1) / LOG_PAGE_BYTES;
        for page in first..=last {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            let Ok(cell) = map.get_atomic_ref::<AtomicU8>(byte) else { return };
            cell.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }

    fn marked(&self, gpa: u64) -> bool {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let page = gpa / LOG_PAGE_BYTES;
        let byte = usize::try_from(page / 8).unwrap_or(usize::MAX);
        map.as_ref()
            .and_then(|map| map.get_atomic_ref::<AtomicU8>(byte).ok())
            .is_some_and(|cell| cell.load(Ordering::SeqCst) & (1 << (page % 8)) != 0)
    }
}

/// The log as one region of guest memory sees it: offsets within the region, marked at their guest address.
#[derive(Debug, Clone, Default)]
pub struct RegionLog {
    log: Arc<DirtyLog>,
    base: u64,
}

impl RegionLog {
    /// The view of a region that starts at guest-physical `base`.
    pub fn new(log: Arc<DirtyLog>, base: u64) -> Self {
        Self { log, base }
    }
}

/// Part of a [`RegionLog`].
#[derive(Debug, Clone, Copy)]
pub struct LogSlice<'a> {
    log: &'a DirtyLog,
    base: u64,
}

impl<'a> WithBitmapSlice<'a> for RegionLog {
    type S = LogSlice<'a>;
}

impl Bitmap for RegionLog {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark(self.base.saturating_add(offset as u64), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.marked(self.base.saturating_add(offset as u64))
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> LogSlice<'_> {
        LogSlice { log: &self.log, base: self.base.saturating_add(offset as u64) }
    }
}

impl NewBitmap for RegionLog {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

impl<'b> WithBitmapSlice<'_> for LogSlice<'b> {
    type S = LogSlice<'b>;
}

impl BitmapSlice for LogSlice<'_> {}

impl<'b> Bitmap for LogSlice<'b> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark(self.base.saturating_add(offset as u64), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.marked(self.base.saturating_add(offset as u64))
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> LogSlice<'b> {
        LogSlice { log: self.log, base: self.base.saturating_add(offset as u64) }
    }
}
