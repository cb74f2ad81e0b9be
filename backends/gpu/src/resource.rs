//! Resources: pictures in the record's pages, and where the guest has its copy of each. What those of 3D have besides is in
//! [`solid`].
//!
//! All that a guest may ask for comes out of one budget, the record's pages, and a bounded number of resources and of entries
//! of backings. A resource is written down ([`record`](crate::record)) before it is answered for; a successor reads all of
//! them back, and drops what cannot be right.

use std::collections::HashMap;

use atoll_kit::memory::Segments;
use atoll_protocol::display::{PIXEL_BYTES, Rect, pixel_bytes};
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, Permissions, VolatileSlice, WriteVolatile};

use crate::command::{ATTACH_LEN, ENTRY_LEN, Refusal};
use crate::format::Format;
use crate::geometry;
use crate::record::{ARENA_AT, PAGE, Place, Record, SLOTS, Slot};

mod solid;

pub use solid::{SOLID_MAX, Solid};

/// Most columns and rows of a picture.
pub const SIDE_MAX: u32 = 16_384;
/// Most entries of one backing: a picture of 128 MiB in single pages.
pub const ENTRIES_MAX: u32 = 32_768;
/// Most entries of all backings together.
pub const ENTRIES_IN_ALL_MAX: usize = 1 << 20;
/// Entries that are read at a time.
const ENTRIES_AT_ONCE: usize = 256;

/// A range of the guest's memory.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Bytes of the backing before it.
    start: u64,
    addr: u64,
    len: u32,
}

/// Where the guest has its copy.
#[derive(Debug)]
struct Backing {
    entries: Vec<Entry>,
    bytes: u64,
    place: Place,
}

/// A picture.
#[derive(Debug)]
pub struct Resource {
    slot: usize,
    number: u32,
    /// Its format, if it is one that a screen can show: one of 2D has no other.
    format: Option<Format>,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Where its pixels are; one of 3D has some once a screen shows it.
    pixels: Option<Place>,
    backing: Option<Backing>,
    /// What it is besides, if it is one of 3D.
    pub solid: Option<Solid>,
}

impl Resource {
    /// Without pixels and backing.
    fn new(slot: usize, words: &Slot, format: Option<Format>) -> Self {
        let Slot { format: number, width, height, .. } = *words;
        Self { slot, number, format, width, height, pixels: None, backing: None, solid: None }
    }

    /// Number of its format.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// A screen can show it.
    pub fn is_visible(&self) -> bool {
        self.pixels.is_some() && self.format.is_some()
    }

    /// Bytes from one row to the next.
    pub(crate) fn stride(&self) -> u64 {
        u64::from(self.width) * PIXEL_BYTES as u64
    }
}

/// All pictures of a guest.
pub struct Resources {
    table: HashMap<u32, Resource>,
    free: Vec<usize>,
    pages: AddressAllocator,
    arena: u64,
    entries: usize,
    /// What those of 3D take of the host's memory, about.
    solid_bytes: u64,
}

/// What `width` by `height` pixels take; none for what no picture has.
fn bytes(width: u32, height: u32) -> Option<u64> {
    let sides = 1..=SIDE_MAX;
    (sides.contains(&width) && sides.contains(&height))
        .then(|| u64::from(width) * u64::from(height) * PIXEL_BYTES as u64)
}

fn pages(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE)
}

impl Resources {
    /// None, with so many bytes of pages for them.
    pub fn new(arena: u64) -> Self {
        let pages = AddressAllocator::new(ARENA_AT, arena).expect("pages that do not wrap around");
        Self { table: HashMap::new(), free: (0..SLOTS).rev().collect(), pages, arena, entries: 0, solid_bytes: 0 }
    }

    /// Those that stand in the record, those of 3D if there is who `renders`; what cannot be right is dropped from it. Pages that
    /// nobody has are given back.
    pub fn load(record: &Record, renders: bool) -> Self {
        let mut loaded = Self::new(record.arena());
        let mut taken = vec![false; SLOTS];
        for (number, taken) in taken.iter_mut().enumerate() {
            let Some(slot) = record.slot(number) else { continue };
            let adopted = match &slot.solid {
                None => loaded.adopt(record, number, &slot),
                Some(words) if renders => loaded.adopt_solid(record, number, &slot, words),
                Some(_) => None,
            };
            match adopted {
                Some(resource) => {
                    *taken = true;
                    loaded.table.insert(slot.id, resource);
                }
                None => {
                    tracing::warn!(id = slot.id, "a resource of the record cannot be right and is dropped");
                    record.free(number);
                }
            }
        }
        loaded.free.retain(|number| !taken.get(*number).copied().unwrap_or(false));
        loaded.sweep(record);
        loaded
    }

    fn adopt(&mut self, record: &Record, number: usize, slot: &Slot) -> Option<Resource> {
        let (format, len) = (Format::from_number(slot.format)?, bytes(slot.width, slot.height)?);
        if slot.id == 0 || self.table.contains_key(&slot.id) {
            return None;
        }
        let pixels = self.occupy(slot.pixels_at, pages(len))?;
        let mut resource = Resource::new(number, slot, Some(format));
        resource.pixels = Some(pixels);
        resource.backing = self.adopt_backing(record, number, slot);
        Some(resource)
    }

    fn adopt_backing(&mut self, record: &Record, number: usize, slot: &Slot) -> Option<Backing> {
        if slot.entries_at == 0 {
            return None;
        }
        let backing = self.read_backing(record, slot);
        if backing.is_none() {
            record.set_backing(number, 0, 0);
        }
        backing
    }

    fn read_backing(&mut self, record: &Record, slot: &Slot) -> Option<Backing> {
        let count = slot.entries as usize;
        if slot.entries > ENTRIES_MAX || self.entries + count > ENTRIES_IN_ALL_MAX {
            return None;
        }
        let place = self.occupy(slot.entries_at, pages((count * ENTRY_LEN).max(1) as u64))?;
        let mut raw = vec![0; count * ENTRY_LEN];
        record.piece(place.at, raw.len() as u64)?.copy_to(&mut raw);
        let (mut entries, mut bytes) = (Vec::with_capacity(count), 0);
        entries_of(&raw, &mut entries, &mut bytes);
        self.entries += count;
        Some(Backing { entries, bytes, place })
    }

    /// Takes these very pages, if they are pages and nobody has them.
    fn occupy(&mut self, at: u64, len: u64) -> Option<Place> {
        let end = at.checked_add(len)?;
        if !at.is_multiple_of(PAGE) || at < ARENA_AT || end > ARENA_AT + self.arena {
            return None;
        }
        self.pages.allocate(len, PAGE, AllocPolicy::ExactMatch(at)).ok()?;
        Some(Place { at, len })
    }

    fn take(&mut self, len: u64) -> Result<Place, Refusal> {
        let refusal = Refusal::Budget(self.arena >> 20);
        if len > self.arena {
            return Err(refusal);
        }
        let range = self.pages.allocate(len, PAGE, AllocPolicy::FirstMatch).map_err(|_| refusal)?;
        Ok(Place { at: range.start(), len })
    }

    fn release(&mut self, record: &Record, place: Place) {
        record.give_back(place);
        if let Ok(range) = RangeInclusive::new(place.at, place.at + place.len - 1) {
            let _ = self.pages.free(&range);
        }
    }

    /// Gives back what nobody has: a predecessor may have died before it did.
    fn sweep(&self, record: &Record) {
        let places = self.table.values().flat_map(|r| [r.pixels, r.backing.as_ref().map(|b| b.place)]);
        let mut places: Vec<Place> = places.flatten().collect();
        places.sort_by_key(|place| place.at);
        let mut at = ARENA_AT;
        for place in places.into_iter().chain([Place { at: ARENA_AT + self.arena, len: 0 }]) {
            if place.at > at {
                record.give_back(Place { at, len: place.at - at });
            }
            at = place.at + place.len;
        }
    }

    /// One of them.
    ///
    /// # Errors
    /// [`Refusal::NoResource`].
    pub fn get(&self, id: u32) -> Result<&Resource, Refusal> {
        self.table.get(&id).ok_or(Refusal::NoResource(id))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.table.len()
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// RESOURCE_CREATE_2D: a black picture. Said `again`, one that is there and is the same will do.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn create(&mut self, record: &Record, again: bool, words: [u32; 4]) -> Result<(), Refusal> {
        let [id, number, width, height] = words;
        let format = Format::from_number(number).ok_or(Refusal::Format(number))?;
        let len = bytes(width, height).ok_or(Refusal::Size(width, height))?;
        if let Some(there) = self.table.get(&id) {
            let same = (there.number, there.width, there.height) == (number, width, height) && there.solid.is_none();
            return if again && same && there.backing.is_none() { Ok(()) } else { Err(Refusal::Name(id)) };
        }
        if id == 0 {
            return Err(Refusal::Name(id));
        }
        let slot = *self.free.last().ok_or(Refusal::Count(SLOTS))?;
        let pixels = self.take(pages(len))?;
        let words =
            Slot { id, format: number, width, height, pixels_at: pixels.at, entries_at: 0, entries: 0, solid: None };
        record.set_slot(slot, &words);
        self.free.pop();
        let resource = Resource { pixels: Some(pixels), ..Resource::new(slot, &words, Some(format)) };
        self.table.insert(id, resource);
        Ok(())
    }

    /// RESOURCE_UNREF. Said `again`, one that is gone will do.
    ///
    /// # Errors
    /// [`Refusal::NoResource`].
    pub fn unref(&mut self, record: &Record, again: bool, id: u32) -> Result<(), Refusal> {
        let Some(resource) = self.table.remove(&id) else {
            return if again { Ok(()) } else { Err(Refusal::NoResource(id)) };
        };
        record.free(resource.slot);
        self.solid_bytes -= resource.solid.map_or(0, |solid| solid.bytes);
        if let Some(pixels) = resource.pixels {
            self.release(record, pixels);
        }
        if let Some(backing) = resource.backing {
            self.entries -= backing.entries.len();
            self.release(record, backing.place);
        }
        self.free.push(resource.slot);
        Ok(())
    }

    /// RESOURCE_ATTACH_BACKING, whose entries stand in `said` behind the command. Said `again`, it takes the place of one
    /// that is there.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn attach<M: GuestMemory>(
        &mut self,
        (record, mem): (&Record, &M),
        again: bool,
        id: u32,
        count: u32,
        said: Segments<'_>,
    ) -> Result<(), Refusal> {
        let resource = self.get(id)?;
        if resource.backing.is_some() && !again {
            return Err(Refusal::Backed(id));
        }
        if resource.backing.is_some() {
            self.detach(record, true, id)?;
        }
        if count > ENTRIES_MAX {
            return Err(Refusal::Entries(count));
        }
        let whole = ATTACH_LEN + u64::from(count) * ENTRY_LEN as u64;
        if said.bytes() < whole {
            return Err(Refusal::Short(said.bytes()));
        }
        if self.entries + count as usize > ENTRIES_IN_ALL_MAX {
            return Err(Refusal::Count(self.entries));
        }
        let place = self.take(pages(u64::from(count) * ENTRY_LEN as u64).max(PAGE))?;
        match read_entries(record, mem, place, count as usize, said) {
            Ok((entries, bytes)) => {
                let Some(resource) = self.table.get_mut(&id) else { return Err(Refusal::NoResource(id)) };
                record.set_backing(resource.slot, place.at, count);
                self.entries += entries.len();
                resource.backing = Some(Backing { entries, bytes, place });
                Ok(())
            }
            Err(refusal) => {
                self.release(record, place);
                Err(refusal)
            }
        }
    }

    /// RESOURCE_DETACH_BACKING. Said `again`, one that is gone will do.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn detach(&mut self, record: &Record, again: bool, id: u32) -> Result<(), Refusal> {
        let resource = self.table.get_mut(&id).ok_or(Refusal::NoResource(id))?;
        let Some(backing) = resource.backing.take() else {
            return if again { Ok(()) } else { Err(Refusal::Unbacked(id)) };
        };
        record.set_backing(resource.slot, 0, 0);
        self.entries -= backing.entries.len();
        self.release(record, backing.place);
        Ok(())
    }

    /// TRANSFER_TO_HOST_2D: takes pixels over from the guest's copy.
    ///
    /// # Errors
    /// [`Refusal`]; of one that points outside guest memory a part may have been taken.
    pub fn transfer<M: GuestMemory>(
        &self,
        (record, mem): (&Record, &M),
        id: u32,
        rect: Rect,
        offset: u64,
    ) -> Result<u64, Refusal> {
        let resource = self.get(id)?;
        let backing = resource.backing.as_ref().ok_or(Refusal::Unbacked(id))?;
        let Some(pixels) = resource.pixels.filter(|_| resource.solid.is_none()) else { return Err(Refusal::Kind(id)) };
        if !geometry::is_within(rect, resource.width, resource.height) {
            return Err(Refusal::Rect(rect));
        }
        let (stride, row) = (resource.stride(), u64::from(rect.width) * PIXEL_BYTES as u64);
        let end = offset.checked_add(stride * u64::from(rect.height - 1) + row);
        if end.is_none_or(|end| end > backing.bytes) {
            return Err(Refusal::Beyond(id));
        }
        let first = pixels.at + u64::from(rect.y) * stride + u64::from(rect.x) * PIXEL_BYTES as u64;
        // Whole rows follow each other without a gap.
        let (rows, len) =
            if rect.width == resource.width { (1, row * u64::from(rect.height)) } else { (rect.height, row) };
        for row in 0..u64::from(rows) {
            let target = record.piece(first + row * stride, len).ok_or(Refusal::Rect(rect))?;
            backing.copy(mem, offset + row * stride, &target)?;
        }
        Ok(row * u64::from(rect.height))
    }

    /// Appends the pixels of a part of a picture to `out`, as the display wire carries them. Nothing, when it does not lie
    /// within.
    pub fn read(&self, record: &Record, resource: &Resource, rect: Rect, out: &mut Vec<u8>) {
        let (Some(format), Some(pieces)) = (resource.format, rows(record, resource, rect)) else { return };
        let start = out.len();
        for piece in pieces.flatten() {
            // Appended as it is read: a frame is too large to be filled with zeroes first. A vector takes all of it.
            let _ = out.write_volatile(&piece);
        }
        // A message is as long as its header says, whatever the record is like.
        out.resize(start + pixel_bytes(rect), 0);
        let room = out.get_mut(start..).unwrap_or_default();
        format.convert(room);
    }

    /// Copies a part of a picture to `room`, which is as large as that; `false` where its pixels would have to be changed on the way.
    pub fn copy(&self, record: &Record, resource: &Resource, rect: Rect, room: &VolatileSlice<'_>) -> bool {
        let Some(pieces) = rows(record, resource, rect).filter(|_| resource.format == Some(Format::Bgr)) else {
            return false;
        };
        let mut at = 0;
        for piece in pieces {
            let (Some(piece), Ok(to)) = (piece, room.offset(at)) else { return false };
            piece.copy_to_volatile_slice(to);
            at += piece.len();
        }
        at == room.len()
    }
}

/// Where the rows of a part of a picture are; those that follow one another without a gap are one.
fn rows<'a>(
    record: &'a Record,
    resource: &Resource,
    rect: Rect,
) -> Option<impl Iterator<Item = Option<VolatileSlice<'a>>>> {
    let pixels = resource.pixels.filter(|_| geometry::is_within(rect, resource.width, resource.height))?;
    let (stride, row) = (resource.stride(), rect.width as usize * PIXEL_BYTES);
    let first = pixels.at + u64::from(rect.y) * stride + u64::from(rect.x) * PIXEL_BYTES as u64;
    let whole = rect.width == resource.width;
    let (rows, len) = if whole { (1, row * rect.height as usize) } else { (rect.height, row) };
    Some((0..u64::from(rows)).map(move |row| record.piece(first + row * stride, len as u64)))
}

/// Takes entries apart, up to the last whole one.
fn entries_of(raw: &[u8], entries: &mut Vec<Entry>, bytes: &mut u64) {
    for [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, ..] in raw.as_chunks::<ENTRY_LEN>().0 {
        let addr = u64::from_le_bytes([*a0, *a1, *a2, *a3, *a4, *a5, *a6, *a7]);
        let len = u32::from_le_bytes([*l0, *l1, *l2, *l3]);
        entries.push(Entry { start: *bytes, addr, len });
        // At most 2^15 of at most 2^32.
        *bytes += u64::from(len);
    }
}

/// Reads entries and writes them down; each has to lie in guest memory, as far as that can be told without asking.
fn read_entries<M: GuestMemory>(
    record: &Record,
    mem: &M,
    place: Place,
    count: usize,
    said: Segments<'_>,
) -> Result<(Vec<Entry>, u64), Refusal> {
    let (mut entries, mut bytes) = (Vec::with_capacity(count), 0);
    let mut raw = [0; ENTRIES_AT_ONCE * ENTRY_LEN];
    for first in (0..count).step_by(ENTRIES_AT_ONCE) {
        let at = (first * ENTRY_LEN) as u64;
        let raw = raw.get_mut(..(count - first).min(ENTRIES_AT_ONCE) * ENTRY_LEN).unwrap_or_default();
        said.read_at(mem, ATTACH_LEN + at, raw).map_err(|_| Refusal::Memory)?;
        record.piece(place.at + at, raw.len() as u64).ok_or(Refusal::Memory)?.copy_from(raw);
        entries_of(raw, &mut entries, &mut bytes);
    }
    // Behind an IOMMU an address that is not known has to be asked for, which takes its time: that is for who uses it.
    if let Some(physical) = mem.physical_memory() {
        let is_there =
            |entry: &Entry| GuestMemoryBackend::check_range(physical, GuestAddress(entry.addr), entry.len as usize);
        if !entries.iter().all(is_there) {
            return Err(Refusal::Memory);
        }
    }
    Ok((entries, bytes))
}

impl Backing {
    /// Copies from `offset` on, as much as `target` has room for.
    fn copy<M: GuestMemory>(&self, mem: &M, offset: u64, target: &VolatileSlice<'_>) -> Result<(), Refusal> {
        // The last entry that starts there or before: empty ones have none of the bytes.
        let first = self.entries.partition_point(|entry| entry.start <= offset).saturating_sub(1);
        let (mut skip, mut done) = (offset - self.entries.get(first).map_or(offset, |entry| entry.start), 0);
        for entry in self.entries.get(first..).unwrap_or_default() {
            let left = target.len() - done;
            if left == 0 {
                break;
            }
            let take = u64::from(entry.len).saturating_sub(skip).min(left as u64) as usize;
            let addr = entry.addr.checked_add(skip).ok_or(Refusal::Memory)?;
            skip = 0;
            if take == 0 {
                continue;
            }
            for slice in mem.get_slices(GuestAddress(addr), take, Permissions::Read).map_err(|_| Refusal::Memory)? {
                let slice = slice.map_err(|_| Refusal::Memory)?;
                let part = target.subslice(done, slice.len()).map_err(|_| Refusal::Memory)?;
                slice.copy_to_volatile_slice(part);
                done += slice.len();
            }
        }
        if done == target.len() { Ok(()) } else { Err(Refusal::Memory) }
    }
}
