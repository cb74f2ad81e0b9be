//! Decoded code: which guest frames it came from, how to find it again, and when it is stale.
//!
//! Blocks are kept by guest-physical address and mode, so that a library mapped by many processes is decoded once. A
//! frame's blocks live and die together: a write to decoded bytes (seen because the memory unit sends writes to such
//! frames here), or a changed hash after a backend's DMA, buries the whole frame's code. Buried code is freed only when
//! no block is running.
//!
//! The jump cache maps a linear address straight to a block. Its tags are mixed with a key that names mode, privilege and
//! a generation, so that a context switch or a flush is one increment.
#![allow(unsafe_code, reason = "blocks are reached through raw pointers; this module decides how long they live")]

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use super::chunks::{Chunk, Chunks};
use super::{Exit, Op, Slot};
use crate::huge::{HugePages, Placed};

/// Entries of the jump cache.
pub(crate) const JUMPS: usize = 16384;
/// Decoded code beyond this is thrown away as a whole.
const LIMIT_BYTES: usize = 96 << 20;
/// Bytes of a line, the unit in which decoded bytes are remembered.
pub(crate) const LINE: usize = 64;

/// One entry of the jump cache.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Jump {
    /// Linear address, exclusive-or the key of the moment.
    pub(crate) tag: u64,
    /// First op of the block there.
    pub(crate) op: *const Op,
}

/// A tag that no address and key make: that would take generation zero (or all ones in the upper half).
const NO_TAG: u64 = 0x0001_0000_0000_0000;

/// Multiplicative hashing of keys that are already addresses.
#[derive(Default)]
pub(crate) struct KeyHasher(u64);
impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u64(&mut self, key: u64) {
        let mixed = (self.0 ^ key).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }
}
type Map<T> = HashMap<u64, T, BuildHasherDefault<KeyHasher>>;

/// The decoded code of one guest frame.
pub(crate) struct Frame {
    /// Lines from which something was decoded.
    lines: u64,
    /// Their hashes.
    hashes: [u32; 64],
    /// DMA epoch at which the hashes were last compared with memory.
    epoch: u64,
    /// The frame's bytes.
    host: *const u8,
    /// Ops, in chunks that never move.
    chunks: Vec<Chunk>,
    /// Keys of its blocks.
    keys: Vec<u64>,
}

#[derive(Clone, Copy)]
struct Found {
    op: *const Op,
    frame: *mut Frame,
}

/// What a write to a protected frame did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// There is no code of it any more (a backend overwrote it before): the protection can go.
    Nothing,
    /// No decoded byte was touched.
    Beside,
    /// Its code has been taken out of use: the protection can go.
    Over,
}

/// All decoded code of one CPU.
pub(crate) struct CodeCache {
    frames: Map<Box<Frame>>,
    blocks: Map<Found>,
    /// Code that may still be running.
    #[allow(clippy::vec_box, reason = "blocks point to their frame, which must not move")]
    buried: Vec<Box<Frame>>,
    /// Grows with every report of DMA.
    epoch: u64,
    chunks: Chunks,
    /// Of chunks that hold code.
    bytes: usize,
    burials: u64,
    jumps: Placed<[Jump; JUMPS]>,
    /// Generation of the jump cache for addresses of the lower and of the upper half: twelve bits.
    generations: [u64; 2],
    /// The same, but never repeating.
    ages: [u64; 2],
}

/// Key of a block: frame address, offset and mode.
fn key(gpa: u64, mode: u8) -> u64 {
    (gpa << 2) | u64::from(mode)
}

/// Hash of one line.
fn line_hash(line: &[u8; LINE]) -> u32 {
    let mut hash = 0u64;
    for word in line.as_chunks::<8>().0 {
        hash = (hash.rotate_left(23) ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    (hash >> 32) as u32
}

impl CodeCache {
    pub(crate) fn new(pages: &Arc<HugePages>) -> Self {
        let empty = Jump { tag: NO_TAG, op: std::ptr::null() };
        let jumps = vec![empty; JUMPS].into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!());
        Self {
            frames: Map::default(),
            blocks: Map::default(),
            buried: Vec::new(),
            epoch: 0,
            bytes: 0,
            burials: 0,
            jumps: Placed::new(pages, jumps),
            chunks: Chunks::new(Arc::clone(pages)),
            generations: [1; 2],
            ages: [0; 2],
        }
    }

    /// Host memory in use.
    pub(crate) fn bytes(&self) -> usize {
        let heap = self.frames.len() * size_of::<Frame>() + self.blocks.capacity() * 32 + self.jumps.heap_bytes();
        self.chunks.bytes() + heap
    }
    /// Base of the jump cache.
    pub(crate) fn jumps(&mut self) -> *mut Jump {
        self.jumps.as_mut_ptr()
    }
    /// Notes where a block is.
    pub(crate) fn remember_jump(&mut self, index: usize, tag: u64, op: *const Op) {
        self.jumps[index & (JUMPS - 1)] = Jump { tag, op };
    }
    /// What was noted, if it still is so.
    pub(crate) fn known_jump(&self, index: usize, tag: u64) -> Option<*const Op> {
        let jump = self.jumps[index & (JUMPS - 1)];
        (jump.tag == tag).then_some(jump.op)
    }
    /// Grows whenever code is buried: links made before must not be written any more.
    pub(crate) fn burials(&self) -> u64 {
        self.burials
    }
    /// What jump tags of the lower and upper half are mixed with.
    pub(crate) fn jump_keys(&self, mode: u8, user: bool) -> [u64; 2] {
        self.generations.map(|generation| (generation << 52) | (u64::from(mode) << 49) | (u64::from(user) << 48))
    }
    /// What the links of exits to other frames are compared with, for the lower and the upper half.
    pub(crate) fn link_keys(&self, mode: u8, user: bool) -> [u64; 2] {
        self.ages.map(|age| (age << 3) | (u64::from(mode) << 1) | u64::from(user))
    }
    /// Forgets jumps to one half of the address space.
    pub(crate) fn forget_jumps(&mut self, half: usize) {
        // Neither zero nor all ones (which the sign bits of the upper half would turn into zero) is ever used, so that
        // an empty entry never matches.
        self.ages[half] += 1;
        self.generations[half] += 1;
        if self.generations[half] == 0xfff {
            self.generations = [1; 2];
            for jump in self.jumps.iter_mut() {
                *jump = Jump { tag: NO_TAG, op: std::ptr::null() };
            }
        }
    }
    /// A backend has written memory, as `epoch` counts: every frame is compared with its hashes before it is used again,
    /// those in the upper half of the address space once they have been translated anew. A kernel lets no device write
    /// where it executes, but gives frames that held code to devices later, and maps what came anew. An interrupt runs
    /// through a hundred frames of the kernel: comparing all of them each time was a tenth of a network load.
    pub(crate) fn dma(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.forget_jumps(0);
    }
    /// The epoch of the present.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The block at a guest-physical address; `None` if there is none, or if the frame has changed meanwhile. It must
    /// have been compared in the epoch `since` or later.
    pub(crate) fn find(&mut self, gpa: u64, mode: u8, since: u64) -> Option<*const Op> {
        let found = *self.blocks.get(&key(gpa, mode))?;
        // SAFETY: frames are boxed, and leave `blocks` together with their frame.
        let frame = unsafe { &mut *found.frame };
        if frame.epoch < since && !frame.unchanged(self.epoch) {
            self.bury(gpa & !0xfff);
            return None;
        }
        Some(found.op)
    }

    /// Notes that the bytes of `line_first..` (whole lines, from a copy of the frame) are about to be decoded. Returns
    /// whether the frame is new. Stale code of the frame is buried first.
    pub(crate) fn claim(&mut self, gpa: u64, host: *const u8, first_line: usize, copy: &[[u8; LINE]]) -> bool {
        let page = gpa & !0xfff;
        if let Some(frame) = self.frames.get_mut(&page) {
            let epoch = self.epoch;
            let stale = (frame.epoch != epoch && !frame.unchanged(epoch))
                || copy.iter().enumerate().any(|(n, line)| {
                    let line_number = (first_line + n) & 63;
                    frame.lines >> line_number & 1 != 0 && frame.hashes[line_number] != line_hash(line)
                });
            if !stale {
                return false;
            }
            self.bury(page);
        }
        let frame = Frame { lines: 0, hashes: [0; 64], epoch: self.epoch, host, chunks: Vec::new(), keys: Vec::new() };
        self.frames.insert(page, Box::new(frame));
        true
    }

    /// Stores a finished block and returns its first op. `claim` has been called for its frame.
    pub(crate) fn insert(
        &mut self,
        gpa: u64,
        mode: u8,
        ops: &[Slot],
        first_line: usize,
        decoded: &[[u8; LINE]],
    ) -> Option<*const Op> {
        let frame = self.frames.get_mut(&(gpa & !0xfff))?;
        for (n, line) in decoded.iter().enumerate() {
            let line_number = (first_line + n) & 63;
            frame.lines |= 1 << line_number;
            frame.hashes[line_number] = line_hash(line);
        }
        let fits = frame.chunks.last().is_some_and(|chunk| chunk.room() >= ops.len());
        if !fits {
            let wanted = if frame.chunks.is_empty() { 64 } else { 256 };
            let chunk = self.chunks.take(wanted.max(ops.len()));
            self.bytes += chunk.bytes();
            frame.chunks.push(chunk);
        }
        let op = frame.chunks.last_mut()?.push(ops)?.cast::<Op>();
        let key = key(gpa, mode);
        frame.keys.push(key);
        let frame: *mut Frame = &raw mut **frame;
        self.blocks.insert(key, Found { op, frame });
        Some(op)
    }

    /// Links an exit to the block at `gpa`, if both are of one frame: then they live and die together.
    pub(crate) fn link(&mut self, exit: *const Exit, op: *const Op, gpa: u64) {
        let Some(frame) = self.frames.get_mut(&(gpa & !0xfff)) else { return };
        let address = exit as usize;
        for chunk in &mut frame.chunks {
            if let Some(slot) = chunk.at(address) {
                // SAFETY: the exit is a slot of this chunk, which lives.
                unsafe { (*slot.cast::<Exit>()).link = op };
                return;
            }
        }
    }

    /// Guest bytes of a protected frame were written: what that means for its code.
    pub(crate) fn written(&mut self, gpa: u64, len: usize) -> Written {
        let page = gpa & !0xfff;
        let Some(frame) = self.frames.get(&page) else { return Written::Nothing };
        let first = (gpa & 0xfff) as usize / LINE;
        let last = (((gpa & 0xfff) as usize + len.max(1) - 1).min(0xfff)) / LINE;
        let touched = (u64::MAX << first) & (u64::MAX >> (63 - last));
        if frame.lines & touched == 0 {
            return Written::Beside;
        }
        self.bury(page);
        Written::Over
    }

    /// Takes a frame's code out of use.
    fn bury(&mut self, page: u64) {
        if let Some(frame) = self.frames.remove(&page) {
            for key in &frame.keys {
                self.blocks.remove(key);
            }
            self.buried.push(frame);
            self.burials += 1;
            self.forget_jumps(0);
            self.forget_jumps(1);
        }
    }
    /// Frees buried code; no block may be running. Returns whether there was any: whoever holds pointers into code drops
    /// them then.
    pub(crate) fn free_buried(&mut self) -> bool {
        let any = !self.buried.is_empty();
        for frame in self.buried.drain(..) {
            for chunk in frame.chunks {
                self.bytes -= chunk.bytes();
                self.chunks.give_back(chunk);
            }
        }
        any
    }
    /// Whether decoded code has outgrown its limit.
    pub(crate) fn is_over_limit(&self) -> bool {
        self.bytes > LIMIT_BYTES
    }
    /// Takes all code out of use; returns the frames that held some.
    pub(crate) fn clear(&mut self) -> Vec<u64> {
        let pages: Vec<u64> = self.frames.keys().copied().collect();
        for &page in &pages {
            self.bury(page);
        }
        self.blocks = Map::default();
        pages
    }
}

impl Frame {
    /// Compares the decoded lines with memory; on equality the frame is good for `epoch`.
    fn unchanged(&mut self, epoch: u64) -> bool {
        let mut left = self.lines;
        while left != 0 {
            let line = left.trailing_zeros() as usize;
            left &= left - 1;
            // SAFETY: `host` is a whole frame of guest RAM, which outlives the CPU.
            let bytes = unsafe { self.host.add(line * LINE).cast::<[u8; LINE]>().read() };
            if line_hash(&bytes) != self.hashes[line] {
                return false;
            }
        }
        self.epoch = epoch;
        true
    }
}
