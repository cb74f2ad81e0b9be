//! From guest bytes to blocks of ops.
//!
//! A block is decoded from a copy of a few lines of one frame and ends at an instruction that cannot fall through, at the
//! frame's end, or after a fixed number of instructions. A second pass, backwards, finds the ops whose arithmetic flags
//! nobody can see (the next op that looks at flags, or that may fault and so show them, comes after one that overwrites
//! all of them) and gives those the handler that computes none.
#![allow(unsafe_code, reason = "puts instructions behind ops, and copies guest memory that may change meanwhile")]

mod decoded;
mod offered;
mod select;

use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction};

use super::cache::LINE;
use super::fast::vector;
use super::general::ThunkCall;
use super::run::BLOCK_MAX;
use super::{Exit, FarLink, Handler, Mode, NO_KEY, Op, Slot, dispatch};
use crate::cpu::Cpu;
use crate::native::MemAccess;
use crate::state::Regs;

pub(crate) use decoded::Decoded;
pub(crate) use offered::Offered;
use select::At;

/// Lines copied for one block.
const COPY_LINES: usize = 5;
/// Byte offset in `Regs` of the word that is always zero.
pub(super) const ZERO: u8 = std::mem::offset_of!(Regs, zero) as u8;
/// Byte offset in `Regs` of RIP.
pub(super) const RIP: u8 = std::mem::offset_of!(Regs, rip) as u8;

/// Extensions that the decoder would otherwise take for granted: without BMI1 and LZCNT, F3 0F BC and BD are BSF and BSR
/// with a meaningless prefix.
const OPTIONS: u32 = DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD | DecoderOptions::NO_WBNOINVD;

/// What an op does with the arithmetic flags, for the backward pass.
#[derive(Clone, Copy, Debug)]
struct FlagUse {
    /// Slot of the op.
    slot: usize,
    /// Looks at flags, or may fault and so show them.
    observes: bool,
    /// Overwrites all of them.
    overwrites: bool,
    /// Handler that computes none.
    quiet: Option<Handler>,
}

/// The block in the making.
#[derive(Default)]
pub(crate) struct Builder {
    slots: Vec<Slot>,
    uses: Vec<FlagUse>,
    /// Slots of exits, and of what they link to until a better way is known.
    exits: Vec<(usize, usize)>,
    /// Slot of a STI that the block has not gone on behind yet.
    last_sti: Option<usize>,
}

/// Whether the block goes on behind an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    GoOn,
    /// An exit has been put.
    Ended,
}

impl Builder {
    fn clear(&mut self) {
        self.slots.clear();
        self.uses.clear();
        self.exits.clear();
        self.last_sti = None;
    }
    /// Puts an op that shows flags to nobody and changes none, or that must be taken for one that shows them.
    fn put(&mut self, op: Op, observes: bool) {
        self.uses.push(FlagUse { slot: self.slots.len(), observes, overwrites: false, quiet: None });
        self.slots.push(Slot { op });
    }
    /// Another instruction follows in the block.
    fn goes_on(&mut self) {
        if let Some(sti) = self.last_sti.take() {
            self.slots[sti].op.imm = 1;
        }
    }
    /// Puts raw data behind an op.
    fn put_behind<T: Copy>(&mut self, value: &T, slots: usize) {
        let at = self.slots.len();
        self.slots.resize(at + slots, Slot { raw: [0; 3] });
        debug_assert!(size_of::<T>() <= slots * size_of::<Slot>());
        // SAFETY: the slots just made are large enough and aligned to 8.
        unsafe { self.slots.as_mut_ptr().add(at).cast::<T>().write(*value) };
    }
    /// Puts an exit record to `delta` bytes from the block's first instruction, which is at `offset` in its frame.
    fn put_exit(&mut self, mode: Mode, offset: usize, delta: i64, count: u32) {
        let within = (0..0x1000).contains(&(offset as i64 + delta));
        let handler: Handler = match (within, mode) {
            (true, _) => dispatch::unlinked,
            (false, Mode::Bits64) => dispatch::elsewhere,
            (false, _) => dispatch::lookup,
        };
        self.exits.push((self.slots.len(), self.slots.len()));
        self.slots.push(Slot { exit: Exit { handler, count, delta: delta as i32, link: std::ptr::null() } });
    }
    /// Puts the link of a call's return.
    fn put_return_link(&mut self) {
        self.slots.push(Slot { far: FarLink { rip: 0, key: NO_KEY, op: std::ptr::null() } });
    }
    /// Puts, at the block's end, the links of exits to other frames.
    fn put_far_links(&mut self) {
        for (at, target) in &mut self.exits {
            // SAFETY: `at` is the slot of an exit.
            if unsafe { self.slots[*at].exit.handler } as usize == dispatch::elsewhere as Handler as usize {
                *target = self.slots.len();
                self.slots.push(Slot { op: bare_op(dispatch::elsewhere, 0, 0) });
                self.slots.push(Slot { far: FarLink { rip: 0, key: NO_KEY, op: std::ptr::null() } });
            }
        }
    }
    /// Gives ops whose flags nobody sees their quiet handlers.
    fn silence(&mut self) {
        let mut seen = true;
        for flag_use in self.uses.iter().rev() {
            if !seen && let Some(quiet) = flag_use.quiet {
                self.slots[flag_use.slot].op.handler = quiet;
            }
            if flag_use.overwrites {
                seen = false;
            }
            if flag_use.observes {
                seen = true;
            }
        }
    }
}

/// An op with everything but handler and place empty.
fn bare_op(handler: Handler, offset: usize, ordinal: usize) -> Op {
    Op {
        handler,
        r0: 0,
        r1: 0,
        base: ZERO,
        index: ZERO,
        disp: 0,
        imm: 0,
        offset: offset as u16,
        ordinal: ordinal as u8,
        scale: 0,
    }
}

impl Cpu {
    /// Decodes one instruction from exactly these bytes; `None` if they end before it does. What is no instruction comes
    /// back as an invalid one.
    pub(super) fn decode_one(&mut self, rip: u64, bytes: &[u8]) -> Option<Instruction> {
        let mode = self.exec.mode;
        if let Some(known) = self.exec.decoded.get(rip, mode, bytes) {
            return Some(known);
        }
        let mut decoder = Decoder::with_ip(mode.bitness(), bytes, rip, OPTIONS);
        let insn = decoder.decode();
        if decoder.last_error() == DecoderError::NoMoreBytes {
            return None;
        }
        let mut insn = if self.exec.offered.allows(insn.code()) { insn } else { Instruction::default() };
        mode.drop_null_override(&mut insn);
        self.exec.decoded.put(mode, bytes, &insn);
        Some(insn)
    }

    /// Decodes the block at `rip`, whose first byte is at `gpa` in the frame at `host`. `None` if its first instruction
    /// cannot be part of a block.
    pub(super) fn decode_block(&mut self, rip: u64, gpa: u64, host: *const u8) -> Option<*const Op> {
        let start = (gpa & 0xfff) as usize;
        let first_line = start / LINE;
        let lines = (0x1000 / LINE - first_line).min(COPY_LINES);
        let mut copy = [[0u8; LINE]; COPY_LINES];
        // Protect first and copy then: a write in between is seen as one to a code page.
        // SAFETY: the lines lie within the frame, which is mapped guest RAM.
        unsafe {
            std::ptr::copy(host.add(first_line * LINE), copy.as_mut_ptr().cast::<u8>(), lines * LINE);
        }
        if self.exec.cache.claim(gpa, host, first_line, &copy[..lines]) {
            self.mmu.protect_code(gpa & !0xfff);
        }
        let mut builder = std::mem::take(&mut self.exec.builder);
        builder.clear();
        let bytes = &copy.as_flattened()[..lines * LINE];
        let used = self.fill_block(&mut builder, rip, start, &bytes[start % LINE..], first_line + lines == 64);
        let op = if used == 0 {
            None
        } else {
            builder.silence();
            builder.put_far_links();
            let used_lines = (start % LINE + used).div_ceil(LINE);
            let mode = self.exec.mode as u8;
            let op = self.exec.cache.insert(gpa, mode, &builder.slots, first_line, &copy[..used_lines]);
            if let Some(op) = op {
                for &(at, target) in &builder.exits {
                    // SAFETY: the block was copied as a whole, so its exits are at the same places.
                    unsafe {
                        let exit = op.cast_mut().add(at).cast::<Exit>();
                        (*exit).link = op.add(target);
                    }
                }
            }
            op
        };
        self.exec.builder = builder;
        op
    }

    /// Decodes into the builder; returns the number of bytes that the block stands for.
    fn fill_block(&mut self, builder: &mut Builder, rip: u64, start: usize, bytes: &[u8], to_frame_end: bool) -> usize {
        let mode = self.exec.mode;
        let mut decoder = Decoder::with_ip(mode.bitness(), bytes, rip, OPTIONS);
        let mut insn = Instruction::default();
        let mut count = 0;
        let mut used = 0;
        let mut pending: Option<(Instruction, At)> = None;
        loop {
            if count == BLOCK_MAX as usize || used >= bytes.len() {
                if let Some((compare, at)) = pending {
                    self.put_instruction(builder, &compare, at);
                }
                builder.put(bare_op(dispatch::fall_out, used, count), true);
                builder.put_exit(mode, start, used as i64, count as u32);
                return used;
            }
            decoder.decode_out(&mut insn);
            if decoder.last_error() == DecoderError::NoMoreBytes {
                if count == 0 {
                    return 0;
                }
                if let Some((compare, at)) = pending {
                    self.put_instruction(builder, &compare, at);
                }
                if to_frame_end {
                    // It crosses into the next frame: the run loop does it alone.
                    builder.put(bare_op(dispatch::step, used, count), true);
                } else {
                    builder.put(bare_op(dispatch::fall_out, used, count), true);
                    builder.put_exit(mode, start, used as i64, count as u32);
                }
                return used;
            }
            let length = insn.len();
            if !self.exec.offered.allows(insn.code()) {
                insn = Instruction::default();
                insn.set_len(length);
            }
            mode.drop_null_override(&mut insn);
            let at = At { start, offset: used, ordinal: count };
            used += length;
            count += 1;
            builder.goes_on();
            // A compare waits to see whether a conditional jump follows.
            if mode == Mode::Bits64 {
                if insn.is_jcc_short_or_near() {
                    let before = pending.take();
                    let fused = before.as_ref().map(|(compare, compare_at)| (compare, *compare_at));
                    if builder.put_jcc(&insn, at, fused).is_some() {
                        if insn.near_branch_target() <= insn.ip() {
                            // A loop's end: what follows is met less often than its top.
                            builder.put(bare_op(dispatch::fall_out, used, count), true);
                            builder.put_exit(mode, start, used as i64, count as u32);
                            return used;
                        }
                        continue;
                    }
                    if let Some((compare, compare_at)) = before {
                        self.put_instruction(builder, &compare, compare_at);
                    }
                } else {
                    if let Some((compare, compare_at)) = pending.take() {
                        self.put_instruction(builder, &compare, compare_at);
                    }
                    if select::fuses(&insn) {
                        pending = Some((insn, at));
                        continue;
                    }
                }
            }
            if self.put_instruction(builder, &insn, at) == After::Ended {
                return used;
            }
        }
    }

    /// Puts the op of one instruction.
    fn put_instruction(&mut self, builder: &mut Builder, insn: &Instruction, at: At) -> After {
        if self.exec.mode == Mode::Bits64
            && let Some(after) = builder.put_fast(insn, at)
        {
            return after;
        }
        self.put_general(builder, insn, at)
    }

    /// Puts an instruction that the general interpreter or a thunk does.
    fn put_general(&mut self, builder: &mut Builder, insn: &Instruction, at: At) -> After {
        let At { offset, ordinal, .. } = at;
        let length = insn.len() as u8;
        if self.exec.offered.is_native(insn.code())
            && let Ok(thunk) = self.exec.thunks.compile(insn)
        {
            let mut op = Op { r0: length, ..bare_op(dispatch::native, offset, ordinal) };
            if self.exec.mode == Mode::Bits64 {
                let kind = if thunk.mem == MemAccess::None { None } else { select::address(insn, &mut op, at) };
                if let Some(handler) = vector::pick(&thunk, kind) {
                    op.handler = handler;
                }
            }
            builder.put(op, true);
            builder.put_behind(&ThunkCall { insn: *insn, thunk }, dispatch::THUNK_SLOTS - 1);
            return After::GoOn;
        }
        let op = Op { r0: length, ..bare_op(dispatch::general, offset, ordinal) };
        builder.put(op, true);
        builder.put_behind(insn, dispatch::GENERAL_SLOTS - 1);
        match insn.flow_control() {
            FlowControl::Next | FlowControl::ConditionalBranch => After::GoOn,
            _ => {
                // Most of these never come back, but some do: INTO without overflow, hypercalls.
                builder.put(bare_op(dispatch::step, offset + insn.len(), ordinal + 1), true);
                After::Ended
            }
        }
    }
}
