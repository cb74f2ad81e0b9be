//! What draws in 3D, as the device sees it: a renderer that it tells what the guest wants, and the memory that it is lent.
//!
//! The one that draws is [`virgl`](crate::virgl); [`Blank`] draws nothing and is enough to look at everything around it. What a
//! guest says of shapes and boxes is checked here, before a renderer hears of it.

use std::any::Any;
use std::sync::Arc;

use atoll_protocol::display::Rect;
use thiserror::Error;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, Permissions};

use crate::command::Refusal;
use crate::texel;

/// Most columns and rows of a texture.
const SIDE_MAX: u32 = 16_384;
/// Most slices of one, and most elements of an array.
const DEPTH_MAX: u32 = 2048;
/// Least that a resource is reckoned at.
const BYTES_MIN: u64 = 4096;

/// A set of abilities, as the guest asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capset {
    /// Its number: 1 (VIRGL) or 2 (VIRGL2).
    pub id: u32,
    /// Newest version of it.
    pub version: u32,
    /// What it says.
    pub bytes: Arc<[u8]>,
}

/// The renderer refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the renderer refused it ({0})")]
pub struct Failed(pub i32);

/// A resource of 3D, as RESOURCE_CREATE_3D says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Buffer, texture of one, two or three dimensions, cube, arrays of them.
    pub target: u32,
    /// Number of its format.
    pub format: u32,
    /// What it will be used for.
    pub bind: u32,
    /// Columns; bytes of a buffer.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Slices.
    pub depth: u32,
    /// Elements.
    pub array_size: u32,
    /// Number of its smallest level.
    pub last_level: u32,
    /// Samples of a pixel.
    pub samples: u32,
    /// What holds of its rows, and others; for the renderer, which minds it when it gives and takes pixels.
    pub flags: u32,
}

impl Shape {
    /// Memory of the guest's that the renderer writes by itself: results of queries.
    pub const BIND_CUSTOM: u32 = 1 << 17;
    const BUFFER: u32 = 0;
    const TEXTURE_2D: u32 = 2;
    const RECT: u32 = 5;
    const TARGET_MAX: u32 = 8;
    const BIND_SAMPLER_VIEW: u32 = 1 << 3;
    const BIND_RENDER_TARGET: u32 = 1 << 1;

    /// What a 2D resource is to 3D.
    pub fn flat(format: u32, width: u32, height: u32) -> Self {
        let bind = Self::BIND_SAMPLER_VIEW | Self::BIND_RENDER_TARGET;
        let target = Self::TEXTURE_2D;
        Self { target, format, bind, width, height, depth: 1, array_size: 1, last_level: 0, samples: 0, flags: 0 }
    }

    /// Refuses what no resource is; says about how many bytes of the host's memory it takes.
    ///
    /// # Errors
    /// [`Refusal::Shape`].
    pub fn check(&self) -> Result<u64, Refusal> {
        let sides_max = if self.target == Self::BUFFER { u32::MAX } else { SIDE_MAX };
        let fits = self.target <= Self::TARGET_MAX
            && (1..=sides_max).contains(&self.width)
            && (1..=SIDE_MAX).contains(&self.height)
            && (1..=DEPTH_MAX).contains(&self.depth)
            // What is no array may say that it has no elements.
            && self.array_size <= DEPTH_MAX
            && self.last_level <= SIDE_MAX.ilog2()
            && self.samples <= 16;
        if fits { Ok(self.bytes()) } else { Err(Refusal::Shape) }
    }

    fn bytes(&self) -> u64 {
        if self.target == Self::BUFFER {
            return u64::from(self.width).max(BYTES_MIN);
        }
        let texel = texel::of(self.format);
        let level = |level: u32| {
            let side = |len: u32| u64::from((len >> level).max(1));
            let blocks = |len: u32, block: u32| side(len).div_ceil(u64::from(block));
            // At most 2^14 by 2^14 by 2^11 of 2^5 bytes.
            blocks(self.width, texel.columns)
                * blocks(self.height, texel.rows)
                * side(self.depth)
                * u64::from(texel.bytes)
        };
        let levels: u64 = (0..=self.last_level).map(level).sum();
        levels.saturating_mul(self.array_size.max(1).into()).saturating_mul(self.samples.max(1).into()).max(BYTES_MIN)
    }

    /// It is a picture that a screen can show.
    pub fn is_picture(&self) -> bool {
        matches!(self.target, Self::TEXTURE_2D | Self::RECT) && self.samples <= 1
    }

    /// Whether a box lies within one of its levels.
    pub fn has(&self, area: &Box3, level: u32) -> bool {
        if level > self.last_level {
            return false;
        }
        let side = |len: u32| if self.target == Self::BUFFER { len } else { (len >> level).max(1) };
        let fits = |at: u32, len: u32, size: u32| len > 0 && at.checked_add(len).is_some_and(|end| end <= size);
        // What is compressed has whole blocks.
        let texel = texel::of(self.format);
        let (columns, rows) = (side(self.width), side(self.height).next_multiple_of(texel.rows));
        let columns = if self.target == Self::BUFFER { columns } else { columns.next_multiple_of(texel.columns) };
        // Elements of an array are counted as slices, or as rows where there is one dimension.
        let rows = rows.max(self.array_size);
        let slices = side(self.depth).max(self.array_size);
        fits(area.x, area.width, columns) && fits(area.y, area.height, rows) && fits(area.z, area.depth, slices)
    }
}

/// A part of a resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Box3 {
    /// First column.
    pub x: u32,
    /// First row.
    pub y: u32,
    /// First slice.
    pub z: u32,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Slices.
    pub depth: u32,
}

impl From<Rect> for Box3 {
    fn from(rect: Rect) -> Self {
        let Rect { x, y, width, height } = rect;
        Self { x, y, z: 0, width, height, depth: 1 }
    }
}

/// A transfer between a resource and its backing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// The resource.
    pub id: u32,
    /// The context that it belongs to; 0 for none.
    pub context: u32,
    /// Which part.
    pub area: Box3,
    /// Of which level.
    pub level: u32,
    /// Bytes from one row of the backing to the next; 0 where they follow each other.
    pub stride: u32,
    /// Bytes from one slice to the next.
    pub layer_stride: u32,
    /// Where in the backing it begins.
    pub offset: u64,
    /// From the backing to the resource.
    pub to_host: bool,
}

/// Pieces of a guest's memory that stay mapped for as long as this exists.
pub struct Pinned {
    pieces: Vec<(usize, usize)>,
    _memory: Arc<dyn Any + Send + Sync>,
}

impl Pinned {
    /// Address and bytes of each piece.
    pub fn pieces(&self) -> &[(usize, usize)] {
        &self.pieces
    }
}

/// Guest memory of which pieces can be lent for longer than a request.
pub trait Ram: Send + Sync {
    /// These ranges, each an address and bytes. None where one lies outside, and behind an IOMMU, whose mappings change by
    /// themselves.
    fn pin(&self, ranges: &mut dyn Iterator<Item = (u64, u32)>) -> Option<Pinned>;
    /// They were written, by whom the dirty log does not know.
    fn mark(&self, ranges: &mut dyn Iterator<Item = (u64, u32)>);
}

/// The memory of a ring.
pub struct RingRam<M>(pub Arc<M>);

impl<M: GuestMemory + Send + Sync + 'static> Ram for RingRam<M> {
    fn pin(&self, ranges: &mut dyn Iterator<Item = (u64, u32)>) -> Option<Pinned> {
        let physical = self.0.physical_memory()?;
        let mut pieces = Vec::new();
        for (addr, len) in ranges.filter(|(_, len)| *len > 0) {
            for slice in GuestMemoryBackend::get_slices(physical, GuestAddress(addr), len as usize) {
                let slice = slice.ok()?;
                pieces.push((slice.ptr_guard_mut().as_ptr().expose_provenance(), slice.len()));
            }
        }
        Some(Pinned { pieces, _memory: Arc::clone(&self.0) as Arc<dyn Any + Send + Sync> })
    }

    fn mark(&self, ranges: &mut dyn Iterator<Item = (u64, u32)>) {
        for (addr, len) in ranges.filter(|(_, len)| *len > 0) {
            let Ok(slices) = self.0.get_slices(GuestAddress(addr), len as usize, Permissions::Write) else { continue };
            slices.flatten().for_each(|slice| slice.bitmap().mark_dirty(0, slice.len()));
        }
    }
}

/// What draws. Ids are the guest's, unique and checked. A call returns when it is done; one that never is ends the process.
pub trait Render: Send + Sync {
    /// What it can do.
    fn capsets(&self) -> &[Capset];
    /// Makes a context.
    ///
    /// # Errors
    /// [`Failed`], as all that follow.
    fn create_context(&self, id: u32, name: &[u8]) -> Result<(), Failed>;
    /// Ends it.
    fn destroy_context(&self, id: u32);
    /// Makes a resource, black.
    fn create(&self, id: u32, shape: &Shape) -> Result<(), Failed>;
    /// Ends it, and what was lent to it.
    fn unref(&self, id: u32);
    /// Lends it the guest's memory, in place of what it had.
    fn attach(&self, id: u32, backing: Pinned) -> Result<(), Failed>;
    /// Takes that back.
    fn detach(&self, id: u32);
    /// A context may use a resource.
    fn join(&self, context: u32, id: u32);
    /// And may not any more.
    fn part(&self, context: u32, id: u32);
    /// Carries out a stream of commands.
    fn submit(&self, context: u32, stream: &mut [u32]) -> Result<(), Failed>;
    /// Moves data between a resource and its backing.
    fn transfer(&self, transfer: &Transfer) -> Result<(), Failed>;
    /// Reads rows of pixels, which follow each other in `out`.
    fn read(&self, id: u32, rect: Rect, out: &mut [u8]) -> Result<(), Failed>;
    /// Writes rows of pixels.
    fn write(&self, id: u32, rect: Rect, pixels: &mut [u8]) -> Result<(), Failed>;
    /// Returns when all that was asked for so far is drawn.
    fn finish(&self);
}

/// Draws nothing, and refuses nothing.
#[derive(Debug, Default)]
pub struct Blank;

impl Render for Blank {
    fn capsets(&self) -> &[Capset] {
        &[]
    }
    fn create_context(&self, _id: u32, _name: &[u8]) -> Result<(), Failed> {
        Ok(())
    }
    fn destroy_context(&self, _id: u32) {}
    fn create(&self, _id: u32, _shape: &Shape) -> Result<(), Failed> {
        Ok(())
    }
    fn unref(&self, _id: u32) {}
    fn attach(&self, _id: u32, _backing: Pinned) -> Result<(), Failed> {
        Ok(())
    }
    fn detach(&self, _id: u32) {}
    fn join(&self, _context: u32, _id: u32) {}
    fn part(&self, _context: u32, _id: u32) {}
    fn submit(&self, _context: u32, _stream: &mut [u32]) -> Result<(), Failed> {
        Ok(())
    }
    fn transfer(&self, _transfer: &Transfer) -> Result<(), Failed> {
        Ok(())
    }
    fn read(&self, _id: u32, _rect: Rect, _out: &mut [u8]) -> Result<(), Failed> {
        Ok(())
    }
    fn write(&self, _id: u32, _rect: Rect, _pixels: &mut [u8]) -> Result<(), Failed> {
        Ok(())
    }
    fn finish(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_reckoned_by_format_levels_samples_and_elements() {
        let flat = Shape::flat(1, 1024, 1024);
        assert_eq!(flat.check(), Ok(4 << 20));
        assert_eq!(Shape { samples: 4, ..flat }.check(), Ok(16 << 20));
        assert_eq!(Shape { array_size: 6, target: 4, ..flat }.check(), Ok(24 << 20));
        assert_eq!(Shape { format: 64, ..flat }.check(), Ok(1 << 20));
        assert_eq!(Shape { format: 105, ..flat }.check(), Ok(512 << 10), "blocks of four by four");
        assert_eq!(Shape { last_level: 10, ..flat }.check(), Ok(4 * 0x15_5555));
        assert_eq!(Shape { target: 0, width: 1, ..flat }.check(), Ok(4096), "and what stands around it");
        assert_eq!(Shape { target: 0, width: u32::MAX, ..flat }.check(), Ok(u64::from(u32::MAX)));
        let most = Shape { target: 3, width: 16_384, height: 16_384, depth: 2048, array_size: 2048, ..flat };
        assert!(Shape { last_level: 14, samples: 16, format: 27, ..most }.check().unwrap() > 1 << 50);
        for absurd in [
            Shape { target: 9, ..flat },
            Shape { width: 0, ..flat },
            Shape { height: 16_385, ..flat },
            Shape { depth: 0, ..flat },
            Shape { array_size: 2049, ..flat },
            Shape { last_level: 15, ..flat },
            Shape { samples: 17, ..flat },
        ] {
            assert_eq!(absurd.check(), Err(Refusal::Shape), "{absurd:?}");
        }
    }

    #[test]
    fn boxes_lie_within_their_level() {
        let shape = Shape { last_level: 3, ..Shape::flat(1, 64, 32) };
        let area = |x, y, width, height| Box3 { x, y, z: 0, width, height, depth: 1 };
        assert!(shape.has(&area(0, 0, 64, 32), 0) && !shape.has(&area(1, 0, 64, 32), 0));
        assert!(
            shape.has(&area(0, 0, 8, 4), 3) && !shape.has(&area(0, 0, 9, 4), 3) && !shape.has(&area(0, 0, 1, 1), 4)
        );
        assert!(!shape.has(&area(u32::MAX, 0, 2, 1), 0) && !shape.has(&area(0, 0, 0, 1), 0));
        assert!(!shape.has(&Box3 { depth: 2, ..area(0, 0, 1, 1) }, 0));
        assert!(Shape { format: 105, ..shape }.has(&area(0, 0, 8, 4), 3));
        assert!(
            !shape.has(&area(0, 0, 1, 33), 0) && Shape { format: 105, height: 33, ..shape }.has(&area(0, 0, 1, 36), 0)
        );
        assert!(Shape { array_size: 6, ..shape }.has(&Box3 { z: 5, ..area(0, 0, 1, 1) }, 0));
    }
}
