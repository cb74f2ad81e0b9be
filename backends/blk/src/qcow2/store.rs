//! The order in which changed tables reach the file.
//!
//! An image must be sound whenever its process is killed or the host loses power: a cluster that a table points to must
//! be counted, or the next writer gives it away again. imago writes some pointers before the counts that they need, and
//! its order is one of calls, not of durability. So nothing that it writes to tables goes to the file at once: it is
//! kept here, block by block, and [`TableStore::settle`] carries out what has come together in an order that is sound
//! after each single write:
//!
//! 1. refcount blocks, no count lower than it is in the file; a new refcount table;
//! 2. entries of the refcount table, the header;
//! 3. second-level tables;
//! 4. entries of the first-level table;
//! 5. refcount blocks as they are to be.
//!
//! Between two steps everything before is made durable, guest data that a new mapping shows included. Cut anywhere, the
//! image has at worst counted clusters that nothing points to: leaks, which `qemu-img check -r leaks` gives back. In
//! most rounds there is one block for step 1 and one for step 3.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::file::{Align, read_at, write_at};
use super::tables::{OFFSET_MASK, REFCOUNT_RESERVED, Tables};

/// What is kept and compared by, unless a cluster is smaller. No file system's block is larger.
const BLOCK_BYTES: u64 = 4096;

/// Changed tables that are not in the file yet.
#[derive(Debug, Default)]
struct Changes {
    blocks: BTreeMap<u64, Vec<u8>>,
    /// Where the file must end at least: behind the last table.
    end: u64,
    /// Start and end of the refcount table that the header in the file names.
    refcount_table: (u64, u64),
}

/// A block that is due: where, what, and whether it holds reference counts.
type Due<'a> = (u64, &'a [u8], bool);

/// Which table a block belongs to; in the order in which they are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Counts,
    CountPointers,
    Mappings,
    MappingPointers,
}

/// What is under way between guest data and the tables that show it.
#[derive(Debug)]
pub struct TableStore {
    file: Arc<File>,
    /// Another file with the guest's data.
    data: Option<Arc<File>>,
    align: Align,
    block: u64,
    /// Logarithm of the bits of a reference count.
    refcount_order: u32,
    changes: Mutex<Changes>,
    tables: Mutex<Tables>,
    /// Something was written that is not durable.
    unsynced: AtomicBool,
    #[cfg(test)]
    pub(super) journal: super::journal::Journal,
    /// Tests: without order, so that they are seen to mind it.
    #[cfg(test)]
    pub(super) careless: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TableStore {
    /// Keeps changes to `tables` of `file`.
    pub fn new(file: Arc<File>, data: Option<Arc<File>>, align: Align, tables: Tables, refcount_order: u32) -> Self {
        Self {
            file,
            data,
            align,
            block: BLOCK_BYTES.min(tables.cluster),
            refcount_order,
            changes: Mutex::new(Changes { refcount_table: tables.refcount_table, ..Changes::default() }),
            tables: Mutex::new(tables),
            unsynced: AtomicBool::new(false),
            #[cfg(test)]
            journal: super::journal::Journal::default(),
            #[cfg(test)]
            careless: AtomicBool::new(false),
        }
    }

    /// An error where a table lies within these bytes, which are to be guest data.
    pub fn refuse_tables(&self, start: u64, end: u64) -> io::Result<()> {
        if self.data.is_none() && lock(&self.tables).within(start, end) {
            return Err(io::Error::other("the image maps guest data onto its own tables: see `qemu-img check`"));
        }
        Ok(())
    }

    /// Fills `out` from the file and what is to come.
    pub fn read(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let changes = lock(&self.changes);
        read_at(&self.file, out, offset, self.align)?;
        let end = offset.saturating_add(out.len() as u64);
        for (at, block) in changes.blocks.range(offset.saturating_sub(self.block - 1)..end) {
            copy_overlap(out, offset, block, *at);
        }
        Ok(())
    }

    /// Keeps what is to be written.
    pub fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let mut changes = lock(&self.changes);
        let end = offset.checked_add(data.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let first = offset - offset % self.block;
        let mut before = vec![0; (end.next_multiple_of(self.block) - first) as usize];
        read_at(&self.file, &mut before, first, self.align)?;
        for (at, block) in (first..).step_by(self.block as usize).zip(before.chunks_mut(self.block as usize)) {
            if let Some(kept) = changes.blocks.get_mut(&at) {
                copy_overlap(kept, at, data, offset);
                continue;
            }
            let same = overlap(block, at, data, offset).is_none_or(|(to, from)| to == from);
            if !same {
                copy_overlap(block, at, data, offset);
                changes.blocks.insert(at, block.to_vec());
            }
        }
        changes.end = changes.end.max(end.next_multiple_of(lock(&self.tables).cluster));
        Ok(())
    }

    /// Guest data goes where a table was: what was to come there is void.
    pub fn forget(&self, start: u64, end: u64) {
        if self.data.is_some() {
            return;
        }
        let mut changes = lock(&self.changes);
        let stale: Vec<u64> = changes.blocks.range(start..end).map(|(at, _)| *at).collect();
        for at in stale {
            changes.blocks.remove(&at);
        }
    }

    /// The header is to change: places that it no longer names must not be used before that is in the file.
    pub fn is_urgent(&self) -> bool {
        lock(&self.changes).blocks.first_key_value().is_some_and(|(at, _)| *at == 0)
    }

    /// Guest data was written that a mapping will show instead of something else.
    pub fn data_written(&self) {
        self.unsynced.store(true, Release);
    }

    /// Makes everything durable that was written.
    pub fn sync(&self) -> io::Result<()> {
        self.unsynced.store(false, Release);
        let done =
            rustix::fs::fdatasync(&*self.file).and_then(|()| self.data.as_ref().map_or(Ok(()), rustix::fs::fdatasync));
        if done.is_err() {
            self.unsynced.store(true, Release);
        }
        #[cfg(test)]
        self.journal.synced();
        Ok(done?)
    }

    fn barrier(&self) -> io::Result<()> {
        if self.unsynced.swap(false, AcqRel) { self.sync() } else { Ok(()) }
    }

    fn put(&self, data: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.journal.write(&self.file, data, offset)?;
        write_at(&self.file, data, offset, self.align)?;
        self.unsynced.store(true, Release);
        Ok(())
    }

    /// Carries out all changes. When it fails, some are in the file and none is forgotten: it can be tried again.
    pub fn settle(&self) -> io::Result<()> {
        let mut changes = lock(&self.changes);
        if changes.blocks.is_empty() {
            return Ok(());
        }
        let mut tables = lock(&self.tables);
        self.follow(&changes, &mut tables)?;
        let refcount_table = tables.refcount_table;
        let found = self.file.metadata()?;
        if found.is_file() && found.len() < changes.end {
            rustix::fs::ftruncate(&*self.file, changes.end)?;
            #[cfg(test)]
            self.journal.grown(changes.end);
        }
        let mut steps: BTreeMap<Step, Vec<Due<'_>>> = BTreeMap::new();
        for (at, block) in &changes.blocks {
            let step = step_of(*at, &tables, changes.refcount_table);
            let counts = step == Step::Counts && tables.counts(*at);
            steps.entry(step).or_default().push((*at, block.as_slice(), counts));
        }
        // Requests of other queues go on meanwhile.
        drop(tables);
        #[cfg(test)]
        if self.careless.load(std::sync::atomic::Ordering::Relaxed) {
            for (at, block, _) in steps.into_values().rev().flatten() {
                self.put(block, at)?;
            }
            changes.blocks.clear();
            return Ok(());
        }
        // Blocks in which a count falls.
        let mut lowered: Vec<(u64, &[u8])> = Vec::new();
        for (step, blocks) in steps {
            if step > Step::Counts {
                self.barrier()?;
            }
            for (at, block, counts) in blocks {
                if !counts {
                    self.put(block, at)?;
                    continue;
                }
                let mut old = vec![0; block.len()];
                read_at(&self.file, &mut old, at, self.align)?;
                let highest = highest(&old, block, self.refcount_order);
                if highest != old {
                    self.put(&highest, at)?;
                }
                if highest != block {
                    lowered.push((at, block));
                }
            }
        }
        if !lowered.is_empty() {
            self.barrier()?;
            for (at, block) in lowered {
                self.put(block, at)?;
            }
        }
        changes.blocks.clear();
        changes.refcount_table = refcount_table;
        Ok(())
    }

    /// Learns of tables that the changes bring, and of those that they give up.
    fn follow(&self, changes: &Changes, tables: &mut Tables) -> io::Result<()> {
        if let Some(header) = changes.blocks.get(&0) {
            let word = |at: usize| header.get(at..)?.first_chunk::<8>().map(|b| u64::from_be_bytes(*b));
            let clusters = header.get(56..).and_then(|rest| rest.first_chunk::<4>()).map(|b| u32::from_be_bytes(*b));
            if let (Some(at), Some(clusters)) = (word(48), clusters) {
                let bytes = u64::from(clusters).saturating_mul(tables.cluster);
                tables.refcount_table = (at, at.saturating_add(bytes));
            }
        }
        for (_, block) in changes.blocks.range(tables.refcount_table.0..tables.refcount_table.1) {
            tables.refcount_blocks.extend(offsets(block, !REFCOUNT_RESERVED));
        }
        for (at, block) in changes.blocks.range(tables.first_level.0..tables.first_level.1) {
            let mut old = vec![0; block.len()];
            read_at(&self.file, &mut old, *at, self.align)?;
            for (old, new) in offsets(&old, OFFSET_MASK).zip(offsets(block, OFFSET_MASK)) {
                if old != new {
                    tables.second_level.remove(&old);
                    tables.second_level.insert(new);
                }
            }
        }
        tables.second_level.remove(&0);
        tables.refcount_blocks.remove(&0);
        Ok(())
    }
}

/// The offsets in a part of a table.
fn offsets(block: &[u8], mask: u64) -> impl Iterator<Item = u64> {
    block.as_chunks::<8>().0.iter().map(move |word| u64::from_be_bytes(*word) & mask)
}

fn step_of(at: u64, tables: &Tables, refcount_table_in_file: (u64, u64)) -> Step {
    let inside = |range: (u64, u64)| range.0 <= at && at < range.1;
    if at < tables.cluster || inside(refcount_table_in_file) {
        Step::CountPointers
    } else if inside(tables.first_level) {
        Step::MappingPointers
    } else if inside(tables.refcount_table) || tables.counts(at) {
        Step::Counts
    } else {
        Step::Mappings
    }
}

/// The parts of two stretches of one file that are the same bytes.
fn overlap<'a>(to: &'a [u8], to_at: u64, from: &'a [u8], from_at: u64) -> Option<(&'a [u8], &'a [u8])> {
    let start = to_at.max(from_at);
    let end = (to_at + to.len() as u64).min(from_at + from.len() as u64);
    let len = usize::try_from(end.checked_sub(start)?).ok()?;
    let (to_skip, from_skip) = ((start - to_at) as usize, (start - from_at) as usize);
    Some((to.get(to_skip..to_skip + len)?, from.get(from_skip..from_skip + len)?))
}

fn copy_overlap(to: &mut [u8], to_at: u64, from: &[u8], from_at: u64) {
    let start = to_at.max(from_at);
    let end = (to_at + to.len() as u64).min(from_at + from.len() as u64);
    let Some(len) = end.checked_sub(start).map(|len| len as usize) else { return };
    let (to_skip, from_skip) = ((start - to_at) as usize, (start - from_at) as usize);
    if let (Some(to), Some(from)) = (to.get_mut(to_skip..to_skip + len), from.get(from_skip..from_skip + len)) {
        to.copy_from_slice(from);
    }
}

/// Of each reference count the higher one.
fn highest(one: &[u8], other: &[u8], order: u32) -> Vec<u8> {
    match order {
        // Several counts in a byte.
        0..3 => {
            let bits = 1_u32 << order;
            let mask = (1_u8 << bits) - 1;
            let higher = |a: u8, b: u8| {
                (0..8).step_by(bits as usize).fold(0, |out, at| out | ((a >> at & mask).max(b >> at & mask) << at))
            };
            one.iter().zip(other).map(|(a, b)| higher(*a, *b)).collect()
        }
        // Big-endian numbers compare like their bytes.
        _ => {
            let width = 1_usize << (order - 3);
            let pairs = one.chunks(width).zip(other.chunks(width));
            pairs.flat_map(|(a, b)| a.max(b)).copied().collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_higher_count_is_taken_at_each_width() {
        assert_eq!(highest(&[0b0101_0000], &[0b0011_0001], 0), [0b0111_0001]);
        assert_eq!(highest(&[0b1100_0110], &[0b0111_1001], 1), [0b1111_1010]);
        assert_eq!(highest(&[0x3f], &[0x4e], 2), [0x4f]);
        assert_eq!(highest(&[1, 0, 0, 9], &[0, 255, 0, 10], 4), [1, 0, 0, 10]);
    }
}
