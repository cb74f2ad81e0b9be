//! Chunks of slots for decoded code, in huge pages as long as there are some.
//!
//! A chunk never moves. What a frame gives back is kept by size and used again; there are few sizes, because most chunks
//! are of the two that the cache asks for.

use std::ptr::NonNull;
use std::sync::Arc;

use super::Slot;
use crate::huge::HugePages;

/// Sizes are multiples of so many slots.
const GRAIN: usize = 64;
/// And at most so many of them; beyond, a chunk is on the heap.
const GRAINS_MAX: usize = 16;

/// Slots, some of them in use.
pub(crate) struct Chunk {
    slots: NonNull<Slot>,
    len: usize,
    capacity: usize,
    /// Memory of one that is on the heap.
    heap: Option<Vec<Slot>>,
}

impl Chunk {
    /// Slots that are free.
    pub(crate) fn room(&self) -> usize {
        self.capacity - self.len
    }
    /// Memory that it takes.
    pub(crate) fn bytes(&self) -> usize {
        self.capacity * size_of::<Slot>()
    }
    /// Puts slots behind those in use and says where; `None` if they do not fit.
    pub(crate) fn push(&mut self, slots: &[Slot]) -> Option<*const Slot> {
        if slots.len() > self.room() {
            return None;
        }
        // SAFETY: `len + slots.len()` slots lie within the chunk, and the new ones are used by nobody yet.
        let place = unsafe {
            let place = self.slots.as_ptr().add(self.len);
            place.copy_from_nonoverlapping(slots.as_ptr(), slots.len());
            place
        };
        self.len += slots.len();
        Some(place)
    }
    /// The slot in use at an address, to be changed.
    pub(crate) fn at(&mut self, address: usize) -> Option<*mut Slot> {
        let offset = address.checked_sub(self.slots.addr().get())?;
        // SAFETY: the offset was just compared with the length.
        (offset < self.len * size_of::<Slot>()).then(|| unsafe { self.slots.as_ptr().byte_add(offset) })
    }
}

/// Where chunks come from.
pub(crate) struct Chunks {
    pages: Arc<HugePages>,
    /// Those given back, by size.
    free: [Vec<NonNull<Slot>>; GRAINS_MAX],
    heap_bytes: usize,
}

impl Chunks {
    pub(crate) fn new(pages: Arc<HugePages>) -> Self {
        Self { pages, free: [const { Vec::new() }; GRAINS_MAX], heap_bytes: 0 }
    }

    /// A chunk of at least so many slots.
    pub(crate) fn take(&mut self, slots: usize) -> Chunk {
        let grains = slots.div_ceil(GRAIN).max(1);
        let capacity = grains * GRAIN;
        let pages = &self.pages;
        let fresh = || pages.take(capacity * size_of::<Slot>()).map(NonNull::cast);
        if let Some(free) = self.free.get_mut(grains - 1)
            && let Some(slots) = free.pop().or_else(fresh)
        {
            return Chunk { slots, len: 0, capacity, heap: None };
        }
        let mut heap = Vec::with_capacity(capacity);
        let slots = NonNull::from(heap.spare_capacity_mut()).cast();
        let chunk = Chunk { slots, len: 0, capacity, heap: Some(heap) };
        self.heap_bytes += chunk.bytes();
        chunk
    }

    /// Takes a chunk back that nothing leads into any more.
    pub(crate) fn give_back(&mut self, chunk: Chunk) {
        let bytes = chunk.bytes();
        let Chunk { slots, capacity, heap, .. } = chunk;
        if heap.is_some() {
            self.heap_bytes -= bytes;
        } else if let Some(free) = self.free.get_mut(capacity / GRAIN - 1) {
            free.push(slots);
        }
    }

    /// Memory of all chunks, and of what else lies in their pages.
    pub(crate) fn bytes(&self) -> usize {
        self.pages.bytes() + self.heap_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(value: u64) -> Slot {
        Slot { raw: [value; 3] }
    }

    /// A frame's code is thrown away and other code takes its place: chunks must be used again, and never be shared.
    #[test]
    fn chunks_are_apart_and_used_again() {
        for reserved in [2 << 20, 0] {
            let mut chunks = Chunks::new(Arc::new(HugePages::reserve(reserved)));
            let mut held: Vec<Chunk> = (0..200_u64)
                .map(|n| {
                    let mut chunk = chunks.take(if n % 2 == 0 { 64 } else { 256 });
                    assert_eq!(chunk.room(), if n % 2 == 0 { 64 } else { 256 });
                    chunk.push(&[slot(n); 60]).unwrap();
                    chunk
                })
                .collect();
            let taken = chunks.bytes();
            for (n, chunk) in held.iter_mut().enumerate() {
                let address = chunk.slots.addr().get();
                for at in [0, 59] {
                    let slot = chunk.at(address + at * size_of::<Slot>()).unwrap();
                    // SAFETY: a slot in use, written as raw words.
                    assert_eq!(unsafe { (*slot).raw }, [n as u64; 3]);
                }
                assert!(chunk.at(address + 60 * size_of::<Slot>()).is_none());
                assert!(chunk.push(&[slot(0); 256]).is_none());
            }
            held.into_iter().for_each(|chunk| chunks.give_back(chunk));
            let again: Vec<Chunk> = (0..100).flat_map(|_| [64, 256]).map(|slots| chunks.take(slots)).collect();
            assert_eq!(chunks.bytes(), taken, "nothing new was needed");
            drop(again);
        }
    }

    #[test]
    fn a_large_chunk_and_one_too_many_are_on_theheap() {
        let mut chunks = Chunks::new(Arc::new(HugePages::reserve(2 << 20)));
        let before = chunks.bytes();
        let large = chunks.take(5000);
        assert!(large.room() >= 5000);
        assert!(chunks.bytes() > before);
        chunks.give_back(large);
        assert_eq!(chunks.bytes(), before);
    }
}
