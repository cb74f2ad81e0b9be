//! What resources of 3D have besides: a shape, a price, and pixels in the record only once a screen shows them.
//!
//! Their contents are the renderer's and go with it. A successor makes them anew, black, and takes note that they are lost until
//! somebody draws on them: until then a screen is shown what it was shown last, which stands in the record.

use atoll_protocol::display::{PIXEL_BYTES, Rect};

use super::{Resource, Resources, bytes, pages};
use crate::command::Refusal;
use crate::format::Format;
use crate::geometry;
use crate::record::{Record, SLOTS, Slot};
use crate::render::Shape;

/// Most bytes of the host's memory for all resources of 3D.
pub const SOLID_MAX: u64 = 2 << 30;

/// What a resource of 3D is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Solid {
    /// As it was asked for.
    pub shape: Shape,
    /// What it is reckoned at.
    pub bytes: u64,
    /// Its contents were a predecessor's.
    pub lost: bool,
}

/// The words of a record.
fn words(shape: &Shape) -> [u32; 5] {
    // Each fits: they were checked.
    let first = shape.target | shape.last_level << 8 | shape.samples << 16;
    [first, shape.bind, shape.depth, shape.array_size, shape.flags]
}

impl Resources {
    /// Bytes of the host's memory that those of 3D may take.
    fn solid_max(&self) -> u64 {
        self.arena.min(SOLID_MAX)
    }

    pub(super) fn adopt_solid(
        &mut self,
        record: &Record,
        number: usize,
        slot: &Slot,
        &[first, bind, depth, array_size, flags]: &[u32; 5],
    ) -> Option<Resource> {
        let (target, last_level, samples) = (first & 0xff, first >> 8 & 0xff, first >> 16);
        let Slot { format, width, height, .. } = *slot;
        let shape = Shape { target, format, bind, width, height, depth, array_size, last_level, samples, flags };
        let bytes_taken = shape.check().ok()?;
        if slot.id == 0
            || self.table.contains_key(&slot.id)
            || self.solid_bytes.saturating_add(bytes_taken) > self.solid_max()
        {
            return None;
        }
        let mut resource = Resource::new(number, slot, Format::from_number(format));
        if slot.pixels_at != 0 {
            resource.pixels = bytes(width, height).and_then(|len| self.occupy(slot.pixels_at, pages(len)));
            if resource.pixels.is_none() {
                record.set_pixels(number, 0);
            }
        }
        resource.backing = self.adopt_backing(record, number, slot);
        resource.solid = Some(Solid { shape, bytes: bytes_taken, lost: true });
        self.solid_bytes += bytes_taken;
        Some(resource)
    }

    /// RESOURCE_CREATE_3D, before the renderer hears of it. Said `again`, one that is there and is the same will do: then there is
    /// nothing more to be done.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn create_solid(&mut self, record: &Record, again: bool, id: u32, shape: &Shape) -> Result<bool, Refusal> {
        let bytes_taken = shape.check()?;
        if let Some(there) = self.table.get(&id) {
            let same = there.solid.is_some_and(|solid| solid.shape == *shape) && there.backing.is_none();
            return if again && same { Ok(false) } else { Err(Refusal::Name(id)) };
        }
        if id == 0 {
            return Err(Refusal::Name(id));
        }
        if self.solid_bytes.saturating_add(bytes_taken) > self.solid_max() {
            return Err(Refusal::Budget(self.solid_max() >> 20));
        }
        let slot = *self.free.last().ok_or(Refusal::Count(SLOTS))?;
        let Shape { format, width, height, .. } = *shape;
        let solid = Some(words(shape));
        let words = Slot { id, format, width, height, pixels_at: 0, entries_at: 0, entries: 0, solid };
        record.set_slot(slot, &words);
        self.free.pop();
        self.solid_bytes += bytes_taken;
        let solid = Some(Solid { shape: *shape, bytes: bytes_taken, lost: false });
        self.table.insert(id, Resource { solid, ..Resource::new(slot, &words, Format::from_number(format)) });
        Ok(true)
    }

    /// Those of 3D.
    pub fn solids(&self) -> impl Iterator<Item = (u32, &Solid)> {
        self.table.iter().filter_map(|(id, resource)| Some((*id, resource.solid.as_ref()?)))
    }

    /// Somebody draws on it, or has given it contents.
    pub fn found(&mut self, id: u32) {
        if let Some(solid) = self.table.get_mut(&id).and_then(|resource| resource.solid.as_mut()) {
            solid.lost = false;
        }
    }

    /// The ranges of its backing, none where it has none.
    pub fn ranges(&self, id: u32) -> Option<impl Iterator<Item = (u64, u32)>> {
        let backing = self.table.get(&id)?.backing.as_ref()?;
        Some(backing.entries.iter().map(|entry| (entry.addr, entry.len)))
    }

    /// Has pixels in the record from now on, so that a screen can show it.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn make_visible(&mut self, record: &Record, id: u32) -> Result<(), Refusal> {
        let resource = self.get(id)?;
        let Some(solid) = resource.solid else { return Ok(()) };
        if resource.pixels.is_some() {
            return Ok(());
        }
        let (slot, Shape { format, width, height, .. }) = (resource.slot, solid.shape);
        if !solid.shape.is_picture() {
            return Err(Refusal::Kind(id));
        }
        if resource.format.is_none() {
            return Err(Refusal::Format(format));
        }
        let len = bytes(width, height).ok_or(Refusal::Size(width, height))?;
        let pixels = self.take(pages(len))?;
        record.set_pixels(slot, pixels.at);
        if let Some(resource) = self.table.get_mut(&id) {
            resource.pixels = Some(pixels);
        }
        Ok(())
    }

    /// Puts rows of pixels, as the renderer has given them, where the screen's are read from.
    pub fn paint(&self, record: &Record, id: u32, rect: Rect, pixels: &[u8]) {
        let Some(resource) = self.table.get(&id) else { return };
        let Some(place) = resource.pixels.filter(|_| geometry::is_within(rect, resource.width, resource.height)) else {
            return;
        };
        let (stride, row) = (resource.stride(), rect.width as usize * PIXEL_BYTES);
        let first = place.at + u64::from(rect.y) * stride + u64::from(rect.x) * PIXEL_BYTES as u64;
        let len = if rect.width == resource.width { row * rect.height as usize } else { row };
        for (number, rows) in (0_u64..).zip(pixels.chunks_exact(len)).take(rect.height as usize) {
            if let Some(piece) = record.piece(first + number * stride, len as u64) {
                piece.copy_from(rows);
            }
        }
    }

    /// Appends its pixels as they are, of a part of it that lies within; nothing otherwise.
    pub fn raw(&self, record: &Record, id: u32, rect: Rect) -> Option<Vec<u8>> {
        let resource = self.table.get(&id).filter(|r| geometry::is_within(rect, r.width, r.height))?;
        let place = resource.pixels?;
        let (stride, row) = (resource.stride(), rect.width as usize * PIXEL_BYTES);
        let first = place.at + u64::from(rect.y) * stride + u64::from(rect.x) * PIXEL_BYTES as u64;
        let mut out = vec![0; row * rect.height as usize];
        for (number, target) in (0_u64..).zip(out.chunks_exact_mut(row)) {
            record.piece(first + number * stride, row as u64)?.copy_to(target);
        }
        Some(out)
    }
}
