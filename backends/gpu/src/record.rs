//! What a successor of this process needs to know, in memory that outlives it: a sealed memfd of the supervisor's.
//!
//! | bytes | what |
//! |---|---|
//! | 0 | magic; which command of the control queue was begun, how many were executed; events; what the screens want |
//! | 0x240 | ids of contexts |
//! | 0x400 | what the last 256 commands were answered |
//! | 0x800 | what each scanout shows |
//! | 0x1000 | where each cursor is |
//! | 0x2000 | resources, 64 bytes each |
//! | 0x42000 | pictures of the cursors |
//! | 0x82000 … | pages for the pixels of resources and for the entries of their backings |
//!
//! A process that dies does so between two stores, and both are seen by its successor in the order in which they were made. A
//! resource is there when its first word says so, which is written last. What stands here is hostile input to who maps it;
//! nothing of it is more than a wrong number, and it is checked where it is read ([`resource`](crate::resource)). Memory is
//! reached through `vm-memory`, never by reference.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use thiserror::Error;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// Most resources.
pub const SLOTS: usize = 4096;
/// Where pixels begin.
pub const ARENA_AT: u64 = 0x8_2000;
/// What pixels and entries take a whole number of.
pub const PAGE: u64 = 4096;
/// Least and most bytes for them.
pub const ARENA_MIN: u64 = 1 << 20;
/// Most bytes for them.
pub const ARENA_MAX: u64 = 16 << 30;

const MAGIC: u64 = u64::from_le_bytes(*b"atgpu\0\0\x01");
const BEGUN_AT: u64 = 8;
const EXECUTED_AT: u64 = 12;
const EVENTS_AT: u64 = 16;
const SCREENS_AT: u64 = 0x40;
const CONTEXTS_AT: u64 = 0x240;
/// Most contexts.
pub const CONTEXTS: usize = 96;
const ANSWERS_AT: u64 = 0x400;
const ANSWERS: u16 = 256;
const SCANOUTS_AT: u64 = 0x800;
const CURSORS_AT: u64 = 0x1000;
const SLOTS_AT: u64 = 0x2000;
const PICTURES_AT: u64 = 0x4_2000;
/// Bytes of a scanout, of a cursor's place, of what a screen wants.
const ENTRY: u64 = 32;
/// Bytes of a resource.
const SLOT: u64 = 64;
/// Bytes of a cursor's picture.
const PICTURE: u64 = 0x4000;
/// First word of a resource of 2D, and of 3D.
const FLAT: u32 = 1;
const SOLID: u32 = 2;
/// Tells a number from nothing.
const SET: u32 = 1 << 16;

/// The record was refused.
#[derive(Debug, Error)]
pub enum RecordError {
    /// It could be cut while it is mapped, or has the wrong length.
    #[error("the record must be a memfd sealed against shrinking, of {min} to {max} bytes", min = ARENA_AT + ARENA_MIN, max = ARENA_AT + ARENA_MAX)]
    Unfit,
    /// It could not be made or mapped.
    #[error("cannot make or map the record: {0}")]
    Host(#[from] io::Error),
}

/// A piece of the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Offset in the record.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

/// The words of a resource, as they stand there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Its id.
    pub id: u32,
    /// Number of its format.
    pub format: u32,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Where its pixels are.
    pub pixels_at: u64,
    /// Where the entries of its backing are; 0 when it has none.
    pub entries_at: u64,
    /// How many.
    pub entries: u32,
    /// Set for a resource of 3D: its target, number of its last level and samples; bind flags; slices; elements; flags.
    /// Such a one has pixels only once a screen has shown it; `pixels_at` is 0 until then.
    pub solid: Option<[u32; 5]>,
}

/// A cursor, without its picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CursorWords {
    /// Column.
    pub x: u32,
    /// Row.
    pub y: u32,
    /// Column of the picture that points.
    pub hot_x: u32,
    /// Row of it.
    pub hot_y: u32,
    /// It is shown.
    pub shown: bool,
    /// There is a picture.
    pub has_picture: bool,
}

/// The mapped record.
#[derive(Debug)]
pub struct Record {
    file: OwnedFd,
    map: MmapRegion<()>,
}

impl Record {
    /// A record of this process' own, which goes with it, with so many bytes for pixels.
    ///
    /// # Errors
    /// Without memory.
    pub fn new(arena: u64) -> Result<Self, RecordError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("atoll-gpu-record", flags).map_err(io::Error::from)?;
        rustix::fs::ftruncate(&file, ARENA_AT.saturating_add(arena)).map_err(io::Error::from)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).map_err(io::Error::from)?;
        Self::map(file)
    }

    /// One that was given: what stands in it is gone on with. Anything that is no record becomes an empty one when it is
    /// first written.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn map(file: OwnedFd) -> Result<Self, RecordError> {
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(io::Error::from)?;
        let len = u64::try_from(rustix::fs::fstat(&file).map_err(io::Error::from)?.st_size).unwrap_or(0);
        let arena = len.checked_sub(ARENA_AT).filter(|arena| (ARENA_MIN..=ARENA_MAX).contains(arena));
        let (true, Some(_)) = (seals.contains(SealFlags::SHRINK), arena) else { return Err(RecordError::Unfit) };
        let again = File::from(file.try_clone()?);
        let map = MmapRegion::from_file(FileOffset::new(again, 0), len as usize).map_err(io::Error::other)?;
        Ok(Self { file, map })
    }

    /// Bytes for pixels, whole pages.
    pub fn arena(&self) -> u64 {
        (self.map.size() as u64).saturating_sub(ARENA_AT) / PAGE * PAGE
    }

    /// The memfd once more.
    ///
    /// # Errors
    /// Without descriptors.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.file.try_clone()
    }

    /// Nobody has written it.
    pub fn is_fresh(&self) -> bool {
        self.load::<u64>(0) != MAGIC
    }

    /// As if nobody had written it.
    pub fn clear(&self) {
        self.store::<u64>(0, 0);
        (0..SLOTS).for_each(|number| self.free(number));
        self.give_back(Place { at: 8, len: self.map.size() as u64 - 8 });
        self.store(0, MAGIC);
    }

    // Offsets are constants and checked numbers; one beyond the end would read as nothing and write nowhere.
    fn load<T: AtomicAccess + Default>(&self, at: u64) -> T {
        self.map.as_volatile_slice().load(at as usize, Ordering::Acquire).unwrap_or_default()
    }
    fn store<T: AtomicAccess>(&self, at: u64, value: T) {
        let _ = self.map.as_volatile_slice().store(value, at as usize, Ordering::Release);
    }
    fn words<const N: usize>(&self, at: u64) -> [u32; N] {
        std::array::from_fn(|index| self.load(at + 4 * index as u64))
    }
    fn set_words(&self, at: u64, words: &[u32]) {
        (0_u64..).zip(words).for_each(|(index, word)| self.store(at + 4 * index, *word));
    }

    /// A piece of the pages.
    pub fn piece(&self, at: u64, len: u64) -> Option<VolatileSlice<'_>> {
        self.map.get_slice(usize::try_from(at).ok()?, usize::try_from(len).ok()?).ok()
    }

    /// Gives memory back to the host; what stood there reads as zeroes.
    pub fn give_back(&self, place: Place) {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(self.file.as_fd(), mode, place.at, place.len).is_err()
            && let Some(piece) = self.piece(place.at, place.len)
        {
            // It is not given back then, but nobody sees what stood there.
            for at in (0..piece.len()).step_by(PAGE as usize) {
                let len = (piece.len() - at).min(PAGE as usize);
                let _ = piece.subslice(at, len).map(|page| page.copy_from(&[0_u8; PAGE as usize]));
            }
        }
    }

    /// The resource in a slot, if there is one.
    pub fn slot(&self, number: usize) -> Option<Slot> {
        let at = Self::slot_at(number)?;
        let solid = match self.load::<u32>(at) {
            0 => return None,
            SOLID => Some(self.words(at + 40)),
            _ => None,
        };
        let [id, format, width, height, entries] = self.words(at + 4);
        let (pixels_at, entries_at) = (self.load(at + 24), self.load(at + 32));
        Some(Slot { id, format, width, height, pixels_at, entries_at, entries, solid })
    }
    /// Writes a resource down: it is there when this is done.
    pub fn set_slot(&self, number: usize, slot: &Slot) {
        let Some(at) = Self::slot_at(number) else { return };
        self.set_words(at + 4, &[slot.id, slot.format, slot.width, slot.height, slot.entries]);
        self.store(at + 24, slot.pixels_at);
        self.store(at + 32, slot.entries_at);
        if let Some(words) = &slot.solid {
            self.set_words(at + 40, words);
        }
        self.store(at, if slot.solid.is_some() { SOLID } else { FLAT });
    }
    /// Writes down where the pixels of a resource of 3D are.
    pub fn set_pixels(&self, number: usize, pixels_at: u64) {
        if let Some(at) = Self::slot_at(number) {
            self.store(at + 24, pixels_at);
        }
    }
    /// Writes down that it has a backing, when its entries are written, or that it has none.
    pub fn set_backing(&self, number: usize, entries_at: u64, entries: u32) {
        let Some(at) = Self::slot_at(number) else { return };
        // Never an old place with a new count: none, then the count, then the place.
        self.store(at + 32, 0_u64);
        self.store(at + 20, entries);
        self.store(at + 32, entries_at);
    }
    /// Nothing is in a slot from now on.
    pub fn free(&self, number: usize) {
        if let Some(at) = Self::slot_at(number) {
            self.store(at, 0_u32);
        }
    }
    fn slot_at(number: usize) -> Option<u64> {
        (number < SLOTS).then_some(SLOTS_AT + SLOT * number as u64)
    }

    /// What a scanout shows: id, then the rectangle; id 0 for nothing.
    pub fn scanout(&self, number: usize) -> [u32; 5] {
        self.words(SCANOUTS_AT + ENTRY * number as u64)
    }
    /// Writes it down.
    pub fn set_scanout(&self, number: usize, words: [u32; 5]) {
        self.set_words(SCANOUTS_AT + ENTRY * number as u64, &words);
    }
    /// What a screen wants: a rectangle, whether it is on, and 1 for one that was ever told.
    pub fn screen(&self, number: usize) -> [u32; 6] {
        self.words(SCREENS_AT + ENTRY * number as u64)
    }
    /// Writes it down.
    pub fn set_screen(&self, number: usize, words: [u32; 6]) {
        self.set_words(SCREENS_AT + ENTRY * number as u64, &words);
    }
    /// A cursor.
    pub fn cursor(&self, number: usize) -> CursorWords {
        let [x, y, hot_x, hot_y, shown, picture] = self.words(CURSORS_AT + ENTRY * number as u64);
        CursorWords { x, y, hot_x, hot_y, shown: shown != 0, has_picture: picture != 0 }
    }
    /// Writes it down.
    pub fn set_cursor(&self, number: usize, cursor: &CursorWords) {
        let flags = [u32::from(cursor.shown), u32::from(cursor.has_picture)];
        let words = [cursor.x, cursor.y, cursor.hot_x, cursor.hot_y, flags[0], flags[1]];
        self.set_words(CURSORS_AT + ENTRY * number as u64, &words);
    }
    /// A cursor's picture.
    pub fn picture(&self, number: usize) -> Option<VolatileSlice<'_>> {
        self.piece(PICTURES_AT + PICTURE * number as u64, PICTURE)
    }

    /// The context in a place; 0 for none.
    pub fn context(&self, number: usize) -> u32 {
        if number < CONTEXTS { self.load(CONTEXTS_AT + 4 * number as u64) } else { 0 }
    }
    /// Writes it down.
    pub fn set_context(&self, number: usize, id: u32) {
        if number < CONTEXTS {
            self.store(CONTEXTS_AT + 4 * number as u64, id);
        }
    }

    /// Events that the guest has not taken note of.
    pub fn events(&self) -> u32 {
        self.load(EVENTS_AT)
    }
    /// Writes them down.
    pub fn set_events(&self, events: u32) {
        self.store(EVENTS_AT, events);
    }

    /// The command at this position of the control queue begins.
    pub fn begin(&self, position: u16) {
        self.store(BEGUN_AT, SET | u32::from(position));
    }
    /// It is done, and was answered so.
    pub fn end(&self, position: u16, answer: u32) {
        self.store(ANSWERS_AT + 4 * u64::from(position % ANSWERS), answer);
        self.store(EXECUTED_AT, SET | u32::from(position.wrapping_add(1)));
    }
    /// How many commands from this position on were executed, and whether the one behind them was begun.
    pub fn executed_from(&self, position: u16) -> (u16, bool) {
        let (executed, begun) = (self.load::<u32>(EXECUTED_AT), self.load::<u32>(BEGUN_AT));
        let count = if executed & SET == 0 { 0 } else { (executed as u16).wrapping_sub(position) };
        if count > ANSWERS {
            // Of another ring.
            return (0, false);
        }
        (count, begun == SET | u32::from(position.wrapping_add(count)))
    }
    /// What the command at this position was answered.
    pub fn answer(&self, position: u16) -> u32 {
        self.load(ANSWERS_AT + 4 * u64::from(position % ANSWERS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A successor of another build reads what this one wrote: what moves needs another magic.
    #[test]
    fn what_was_written_is_there_for_who_maps_it_next() {
        const { assert!(SLOTS_AT + SLOT * SLOTS as u64 == PICTURES_AT && PICTURES_AT + 16 * PICTURE == ARENA_AT) };
        const {
            assert!(
                SCREENS_AT + 16 * ENTRY <= CONTEXTS_AT
                    && CONTEXTS_AT + 4 * CONTEXTS as u64 <= ANSWERS_AT
                    && SCANOUTS_AT + 16 * ENTRY <= CURSORS_AT
            );
        };
        let record = Record::new(ARENA_MIN).unwrap();
        assert!(record.is_fresh());
        record.clear();
        let slot =
            Slot { id: 7, format: 2, width: 3, height: 4, pixels_at: ARENA_AT, entries_at: 0, entries: 0, solid: None };
        record.set_slot(9, &slot);
        record.set_backing(9, ARENA_AT + PAGE, 2);
        record.set_slot(10, &Slot { id: 8, pixels_at: 0, solid: Some([2, 3, 4, 5, 6]), ..slot });
        record.set_pixels(10, ARENA_AT + 2 * PAGE);
        record.set_context(95, 12);
        record.set_scanout(15, [7, 0, 0, 3, 4]);
        record.piece(ARENA_AT, 4).unwrap().copy_from(&[1_u8, 2, 3, 4]);
        let same = Record::map(record.file.try_clone().unwrap()).unwrap();
        assert!(!same.is_fresh());
        assert_eq!(same.slot(9), Some(Slot { entries_at: ARENA_AT + PAGE, entries: 2, ..slot }));
        let solid = Slot { id: 8, pixels_at: ARENA_AT + 2 * PAGE, solid: Some([2, 3, 4, 5, 6]), ..slot };
        assert_eq!((same.slot(10), same.context(95), same.context(94)), (Some(solid), 12, 0));
        assert_eq!((same.slot(8), same.scanout(15)), (None, [7, 0, 0, 3, 4]));
        record.give_back(Place { at: ARENA_AT, len: PAGE });
        let mut bytes = [9_u8; 4];
        same.piece(ARENA_AT, 4).unwrap().copy_to(&mut bytes);
        assert_eq!(bytes, [0; 4]);
        assert!(!same.is_fresh());
        record.clear();
        assert_eq!(same.slot(9), None);
        assert!(same.piece(ARENA_AT, ARENA_MIN + 1).is_none());
    }

    #[test]
    fn commands_are_counted_over_a_death() {
        let record = Record::new(ARENA_MIN).unwrap();
        assert_eq!(record.executed_from(0), (0, false));
        for position in [65_534, 65_535, 0] {
            record.begin(position);
            record.end(position, 0x1100 + u32::from(position));
        }
        record.begin(1);
        assert_eq!(record.executed_from(65_534), (3, true));
        assert_eq!(record.executed_from(1), (0, true));
        assert_eq!(record.executed_from(2), (0, false), "it is behind: of another ring");
        assert_eq!(record.answer(0), 0x1100);
    }

    #[test]
    fn what_could_be_cut_or_is_too_short_is_refused() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = |len: u64, seals| {
            let file = rustix::fs::memfd_create("x", flags).unwrap();
            rustix::fs::ftruncate(&file, len).unwrap();
            rustix::fs::fcntl_add_seals(&file, seals).unwrap();
            Record::map(file)
        };
        assert!(matches!(memfd(ARENA_AT + ARENA_MIN, SealFlags::GROW), Err(RecordError::Unfit)));
        assert!(matches!(memfd(ARENA_AT, SealFlags::SHRINK), Err(RecordError::Unfit)));
        assert!(memfd(ARENA_AT + ARENA_MIN, SealFlags::SHRINK).is_ok());
    }
}
