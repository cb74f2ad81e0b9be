//! The files of an image as imago sees them: reads and writes that wait on the queue's own thread, in three roles.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use rustix::fs::FallocateFlags;

use super::store::TableStore;
use crate::bounce::Bounce;

/// What reads and writes must be aligned to: 1 through the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Align {
    /// Of buffers.
    pub memory: usize,
    /// Of offsets and lengths.
    pub offset: u64,
}

impl Align {
    /// No demands.
    pub const NONE: Self = Self { memory: 1, offset: 1 };
}

/// What a file is to an image.
#[derive(Debug)]
pub(super) enum Role {
    /// Tables of the image that is written: they change in the order of the store.
    Tables(Arc<TableStore>),
    /// Guest data of the image that is written; where the file, as far as it was ever written, ends.
    Data(Arc<TableStore>, AtomicU64),
    /// Nothing in it changes.
    Fixed,
}

/// A file of an image.
#[derive(Debug)]
pub struct ImageFile {
    pub(super) file: Arc<File>,
    pub(super) role: Role,
    align: Align,
    helper: CommonStorageHelper,
}

/// Byte of the header with the dirty bit, and the bit.
const DIRTY_AT: u64 = 79;
const DIRTY: u8 = 1;

impl ImageFile {
    pub(super) fn new(file: Arc<File>, role: Role, align: Align) -> Self {
        Self { file, role, align, helper: CommonStorageHelper::default() }
    }

    /// The descriptor, for operations on a ring.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether nothing has ever been written from `offset` on, so that zeroes are read there, also after a loss of power.
    pub(super) fn is_fresh(&self, offset: u64) -> bool {
        matches!(&self.role, Role::Data(_, end) if offset >= end.load(Ordering::Acquire))
    }

    /// Something was written up to `end`.
    pub(super) fn reached(&self, to: u64) {
        if let Role::Data(_, end) = &self.role {
            end.fetch_max(to, Ordering::AcqRel);
        }
    }

    /// Frees the space of a stretch, which is read as zeroes then.
    pub(super) fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(&*self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?)
    }
}

/// Reads all of `out`; behind the end of the file there are zeroes.
pub(super) fn read_at(file: &File, out: &mut [u8], offset: u64, align: Align) -> io::Result<()> {
    if align == Align::NONE {
        return read_slices(file, &mut [IoSliceMut::new(out)], offset);
    }
    let (start, len) = widened(offset, out.len(), align);
    let mut bounce = Bounce::new(len, align.memory);
    let buffer = bounce.part(len);
    read_slices(file, &mut [IoSliceMut::new(buffer)], start)?;
    let skip = (offset - start) as usize;
    out.copy_from_slice(buffer.get(skip..skip + out.len()).ok_or(io::ErrorKind::InvalidInput)?);
    Ok(())
}

/// Writes all of `data`, whose place and length respect the alignment.
pub(super) fn write_at(file: &File, data: &[u8], offset: u64, align: Align) -> io::Result<()> {
    if align == Align::NONE {
        return write_slices(file, &mut [IoSlice::new(data)], offset);
    }
    let (start, len) = widened(offset, data.len(), align);
    let mut bounce = Bounce::new(len, align.memory);
    let buffer = bounce.part(len);
    if (start, len) != (offset, data.len()) {
        read_slices(file, &mut [IoSliceMut::new(buffer)], start)?;
    }
    let skip = (offset - start) as usize;
    buffer.get_mut(skip..skip + data.len()).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(data);
    write_slices(file, &mut [IoSlice::new(buffer)], start)
}

fn widened(offset: u64, len: usize, align: Align) -> (u64, usize) {
    let start = offset - offset % align.offset;
    (start, (offset + len as u64 - start).next_multiple_of(align.offset) as usize)
}

fn read_slices(file: &File, mut slices: &mut [IoSliceMut<'_>], mut offset: u64) -> io::Result<()> {
    while slices.iter().any(|slice| !slice.is_empty()) {
        match rustix::io::preadv(file, slices, offset) {
            Ok(0) => {
                slices.iter_mut().for_each(|slice| slice.fill(0));
                return Ok(());
            }
            Ok(n) => {
                IoSliceMut::advance_slices(&mut slices, n);
                offset += n as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn write_slices(file: &File, mut slices: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
    while slices.iter().any(|slice| !slice.is_empty()) {
        match rustix::io::pwritev(file, slices, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                IoSlice::advance_slices(&mut slices, n);
                offset += n as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// imago refuses a dirty image. Whether one may be used was decided from the header: only to read it.
fn hide_dirty_bit(slices: &mut [IoSliceMut<'_>], mut offset: u64) {
    for slice in slices {
        if let Some(byte) = DIRTY_AT.checked_sub(offset).and_then(|at| slice.get_mut(at as usize)) {
            *byte &= !DIRTY;
        }
        offset = offset.saturating_add(slice.len() as u64);
    }
}

#[allow(unsafe_code, reason = "the trait's functions are unsafe to call; these are sound for any caller")]
impl Storage for ImageFile {
    fn mem_align(&self) -> usize {
        self.align.memory
    }

    fn req_align(&self) -> usize {
        self.align.offset as usize
    }

    fn size(&self) -> io::Result<u64> {
        Ok(rustix::fs::seek(&*self.file, rustix::fs::SeekFrom::End(0))?)
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let mut slices = bufv.into_inner();
        match &self.role {
            Role::Tables(store) => {
                let mut at = offset;
                for slice in &mut slices {
                    store.read(slice, at)?;
                    at += slice.len() as u64;
                }
            }
            _ => {
                // The slices are advanced by reading.
                let mut views: Vec<IoSliceMut<'_>> = slices.iter_mut().map(|slice| IoSliceMut::new(slice)).collect();
                read_slices(&self.file, &mut views, offset)?;
            }
        }
        if offset <= DIRTY_AT && !matches!(self.role, Role::Data(..)) {
            hide_dirty_bit(&mut slices, offset);
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        let mut slices = bufv.into_inner();
        match &self.role {
            Role::Tables(store) => {
                for slice in &slices {
                    store.write(slice, offset)?;
                    offset += slice.len() as u64;
                }
                Ok(())
            }
            Role::Data(store, _) => {
                let end = offset + slices.iter().map(|slice| slice.len() as u64).sum::<u64>();
                self.before_data(store, offset, end)?;
                #[cfg(test)]
                store.journal.write_all(&self.file, &slices, offset)?;
                let written = write_slices(&self.file, &mut slices, offset);
                self.reached(end);
                store.data_written();
                written
            }
            Role::Fixed => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let Role::Data(store, _) = &self.role else { return Err(io::ErrorKind::Unsupported.into()) };
        self.before_data(store, offset, offset + length)?;
        if self.is_fresh(offset) {
            return Ok(());
        }
        store.data_written();
        #[cfg(test)]
        store.journal.zero(&self.file, offset, length)?;
        match self.punch(offset, length) {
            // Then imago writes them.
            Err(e) if crate::storage::unsupported(&e) => Err(io::ErrorKind::Unsupported.into()),
            done => done,
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        match &self.role {
            Role::Tables(store) | Role::Data(store, _) => store.sync(),
            Role::Fixed => Ok(()),
        }
    }

    fn settle_writes(&self) -> io::Result<()> {
        // All have waited.
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}

impl ImageFile {
    /// Guest data must not go where a table is; what was to become of a table that was there is void.
    pub(super) fn before_data(&self, store: &TableStore, start: u64, end: u64) -> io::Result<()> {
        store.refuse_tables(start, end)?;
        store.forget(start, end);
        Ok(())
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.role {
            Role::Tables(_) => "tables",
            Role::Data(..) => "data",
            Role::Fixed => "base",
        })
    }
}
