//! String instructions as host calls, a page at a time.
//!
//! With REP, a stretch that lies within one page on each side and within its segment is one `memmove`, fill or scan on
//! host memory. Between stretches the registers are up to date, so a fault or an interrupt there finds an instruction
//! that simply runs again. Everything unusual (the down direction, MMIO, code pages, an element across a page) goes
//! element by element.
#![allow(unsafe_code, reason = "copies within guest RAM that other processes may write at the same time")]

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::arith::{self, DF, ZF, mask};
use super::operand::{Slot, segment_name};
use super::{Done, Flow};
use crate::cpu::Cpu;
use crate::state::{Exception, SegmentName};
use crate::world::World;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Movs,
    Stos,
    Lods,
    Scas,
    Cmps,
    Ins,
    Outs,
}

/// A string instruction taken apart.
#[derive(Clone, Copy, Debug)]
struct Op {
    kind: Kind,
    /// Element size in bytes.
    size: u32,
    /// Address size in bytes: width of rSI, rDI and rCX.
    address: u8,
    /// Segment of the source.
    source: SegmentName,
    /// For SCAS and CMPS with REP: go on while ZF equals this.
    while_zero: bool,
    port: u16,
}

const RCX: u8 = 8;
const RSI: u8 = 48;
const RDI: u8 = 56;

fn take_apart(insn: &Instruction) -> Op {
    use Mnemonic as M;
    let (kind, size) = match insn.mnemonic() {
        M::Movsb => (Kind::Movs, 1),
        M::Movsw => (Kind::Movs, 2),
        M::Movsd => (Kind::Movs, 4),
        M::Movsq => (Kind::Movs, 8),
        M::Stosb => (Kind::Stos, 1),
        M::Stosw => (Kind::Stos, 2),
        M::Stosd => (Kind::Stos, 4),
        M::Stosq => (Kind::Stos, 8),
        M::Lodsb => (Kind::Lods, 1),
        M::Lodsw => (Kind::Lods, 2),
        M::Lodsd => (Kind::Lods, 4),
        M::Lodsq => (Kind::Lods, 8),
        M::Scasb => (Kind::Scas, 1),
        M::Scasw => (Kind::Scas, 2),
        M::Scasd => (Kind::Scas, 4),
        M::Scasq => (Kind::Scas, 8),
        M::Cmpsb => (Kind::Cmps, 1),
        M::Cmpsw => (Kind::Cmps, 2),
        M::Cmpsd => (Kind::Cmps, 4),
        M::Cmpsq => (Kind::Cmps, 8),
        M::Insb => (Kind::Ins, 1),
        M::Insw => (Kind::Ins, 2),
        M::Insd => (Kind::Ins, 4),
        M::Outsb => (Kind::Outs, 1),
        M::Outsw => (Kind::Outs, 2),
        _ => (Kind::Outs, 4),
    };
    let address = [insn.op0_kind(), insn.op1_kind()]
        .into_iter()
        .find_map(|kind| match kind {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(2),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(4),
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(8),
            _ => None,
        })
        .unwrap_or(8);
    Op {
        kind,
        size,
        address,
        source: segment_name(insn.memory_segment()),
        while_zero: !insn.has_repne_prefix(),
        port: 0,
    }
}

impl Cpu {
    fn index(&self, offset: u8, op: Op) -> u64 {
        self.slot_value(Slot { offset, size: op.address })
    }
    fn set_index(&mut self, offset: u8, op: Op, value: u64) {
        self.set_slot(Slot { offset, size: op.address }, value);
    }
    /// Moves rSI or rDI by `elements`.
    fn advance(&mut self, offset: u8, op: Op, elements: u64) {
        let bytes = elements.wrapping_mul(u64::from(op.size));
        let old = self.index(offset, op);
        let new = if self.regs.rflags & DF == 0 { old.wrapping_add(bytes) } else { old.wrapping_sub(bytes) };
        self.set_index(offset, op, new & mask(u32::from(op.address)));
    }

    /// Any string instruction, with or without REP.
    pub(super) fn string(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let mut op = take_apart(insn);
        let ports = matches!(op.kind, Kind::Ins | Kind::Outs);
        if ports {
            op.port = self.regs.gpr[2] as u16;
        }
        let after = if ports { Flow::Boundary } else { Flow::Next };
        if !insn.has_rep_prefix() && !insn.has_repne_prefix() {
            if ports {
                self.check_io(world, op.port, op.size)?;
            }
            self.element(world, op)?;
            return Ok(after);
        }
        let mut checked = !ports;
        // A repeated comparison that faults leaves the flags as they were before it began.
        let flags = self.regs.rflags;
        let restored = move |cpu: &mut Self, fault: Exception| {
            cpu.regs.rflags = flags;
            fault
        };
        loop {
            let count = self.index(RCX, op);
            if count == 0 {
                return Ok(after);
            }
            if !checked {
                self.check_io(world, op.port, op.size)?;
                checked = true;
            }
            let done = match self.stretch(op, count).map_err(|fault| restored(self, fault))? {
                0 => {
                    self.element(world, op).map_err(|fault| restored(self, fault))?;
                    1
                }
                done => done,
            };
            self.set_index(RCX, op, count - done);
            if matches!(op.kind, Kind::Scas | Kind::Cmps) && (self.regs.rflags & ZF != 0) != op.while_zero {
                return Ok(after);
            }
            if count > done && self.wants_attention() {
                return Ok(Flow::Again);
            }
        }
    }

    /// One element; the registers move after everything that can fault.
    fn element(&mut self, world: &mut dyn World, op: Op) -> Result<(), Exception> {
        let size = op.size;
        let user = self.exec.user;
        let stack = op.source == SegmentName::Ss;
        let from = |cpu: &Self| cpu.linear(op.source, cpu.index(RSI, op), size, false);
        let to = |cpu: &Self, write| cpu.linear(SegmentName::Es, cpu.index(RDI, op), size, write);
        match op.kind {
            Kind::Movs => {
                let source = from(self)?;
                let value = self.load_value(world, source, size, stack)?;
                let target = to(self, true)?;
                self.store_value(world, target, size, value, false)?;
                self.advance(RSI, op, 1);
                self.advance(RDI, op, 1);
            }
            Kind::Stos => {
                let target = to(self, true)?;
                self.store_value(world, target, size, self.regs.gpr[0], false)?;
                self.advance(RDI, op, 1);
            }
            Kind::Lods => {
                let source = from(self)?;
                let value = self.load_value(world, source, size, stack)?;
                self.set_slot(Slot { offset: 0, size: size as u8 }, value);
                self.advance(RSI, op, 1);
            }
            Kind::Scas => {
                let target = to(self, false)?;
                let value = self.load_value(world, target, size, false)?;
                let accumulator = self.regs.gpr[0] & mask(size);
                self.regs.rflags = arith::sub(accumulator, value, false, size, self.regs.rflags).1;
                self.advance(RDI, op, 1);
            }
            Kind::Cmps => {
                let source = from(self)?;
                let a = self.load_value(world, source, size, stack)?;
                let target = to(self, false)?;
                let b = self.load_value(world, target, size, false)?;
                self.regs.rflags = arith::sub(a, b, false, size, self.regs.rflags).1;
                self.advance(RSI, op, 1);
                self.advance(RDI, op, 1);
            }
            Kind::Ins => {
                let target = to(self, true)?;
                // A device is asked only when the answer can be stored.
                self.check_write(target, size as usize, user)?;
                let mut bytes = [0; 8];
                world.pio_in(op.port, &mut bytes[..size as usize]);
                self.store_value(world, target, size, u64::from_le_bytes(bytes), false)?;
                self.advance(RDI, op, 1);
            }
            Kind::Outs => {
                let source = from(self)?;
                let value = self.load_value(world, source, size, stack)?;
                world.pio_out(op.port, &value.to_le_bytes()[..size as usize]);
                self.advance(RSI, op, 1);
            }
        }
        Ok(())
    }

    /// Host pointer for as many elements as fit one page, the segment and `count`; `None`: go element by element.
    fn window(
        &mut self,
        op: Op,
        segment: SegmentName,
        offset: u64,
        count: u64,
        write: bool,
    ) -> Result<Option<(*mut u8, u64)>, Exception> {
        let Ok(start) = self.linear(segment, offset, op.size, write) else { return Ok(None) };
        let in_page = (4096 - (start & 0xfff)) / u64::from(op.size);
        let count = count.min(in_page);
        if count == 0 {
            return Ok(None);
        }
        let bytes = count * u64::from(op.size);
        // The offset must not wrap within the stretch, and all of it must be inside the segment.
        if offset > mask(u32::from(op.address)) - (bytes - 1)
            || self.linear(segment, offset, bytes as u32, write) != Ok(start)
        {
            return Ok(None);
        }
        let span = self.host_ptr(start, self.exec.user, write);
        let span = span.map_err(|fault| super::stack_fault(fault, segment == SegmentName::Ss))?;
        Ok(span.map(|span| (span.host, count.min(span.len as u64 / u64::from(op.size)))))
    }

    /// Does as many elements as one page allows on host memory; 0 if it cannot.
    fn stretch(&mut self, op: Op, count: u64) -> Result<u64, Exception> {
        if self.regs.rflags & DF != 0 {
            return Ok(0);
        }
        let size = u64::from(op.size);
        match op.kind {
            Kind::Movs => {
                let Some((from, n)) = self.window(op, op.source, self.index(RSI, op), count, false)? else {
                    return Ok(0);
                };
                let Some((to, n)) = self.window(op, SegmentName::Es, self.index(RDI, op), n, true)? else {
                    return Ok(0);
                };
                // SAFETY: both windows are `n` elements of mapped guest RAM.
                unsafe { copy_forward(from, to, (n * size) as usize, size as usize) };
                self.advance(RSI, op, n);
                self.advance(RDI, op, n);
                Ok(n)
            }
            Kind::Stos => {
                let Some((to, n)) = self.window(op, SegmentName::Es, self.index(RDI, op), count, true)? else {
                    return Ok(0);
                };
                let value = self.regs.gpr[0];
                // SAFETY: the window is `n` elements of mapped guest RAM.
                unsafe { fill(to, n as usize, op.size, value) };
                self.advance(RDI, op, n);
                Ok(n)
            }
            Kind::Scas => {
                let Some((at, n)) = self.window(op, SegmentName::Es, self.index(RDI, op), count, false)? else {
                    return Ok(0);
                };
                let accumulator = self.regs.gpr[0] & mask(op.size);
                let mut done = 0;
                let mut value = 0;
                while done < n {
                    value = super::atomic::read(at.wrapping_add((done * size) as usize), op.size);
                    done += 1;
                    if (value == accumulator) != op.while_zero {
                        break;
                    }
                }
                self.regs.rflags = arith::sub(accumulator, value, false, op.size, self.regs.rflags).1;
                self.advance(RDI, op, done);
                Ok(done)
            }
            Kind::Cmps => {
                let Some((left, n)) = self.window(op, op.source, self.index(RSI, op), count, false)? else {
                    return Ok(0);
                };
                let Some((right, n)) = self.window(op, SegmentName::Es, self.index(RDI, op), n, false)? else {
                    return Ok(0);
                };
                let mut done = 0;
                let (mut a, mut b) = (0, 0);
                while done < n {
                    let at = (done * size) as usize;
                    a = super::atomic::read(left.wrapping_add(at), op.size);
                    b = super::atomic::read(right.wrapping_add(at), op.size);
                    done += 1;
                    if (a == b) != op.while_zero {
                        break;
                    }
                }
                self.regs.rflags = arith::sub(a, b, false, op.size, self.regs.rflags).1;
                self.advance(RSI, op, done);
                self.advance(RDI, op, done);
                Ok(done)
            }
            Kind::Lods | Kind::Ins | Kind::Outs => Ok(0),
        }
    }
}

/// Copies upwards as MOVS does: with the target a little above the source, the pattern repeats.
///
/// # Safety
/// Both pointers are valid for `bytes`.
unsafe fn copy_forward(from: *const u8, to: *mut u8, bytes: usize, size: usize) {
    let distance = (to as usize).wrapping_sub(from as usize);
    if distance >= bytes {
        // SAFETY: by contract; `copy` allows overlap, and here the target is not inside the source's tail.
        unsafe { std::ptr::copy(from, to, bytes) };
        return;
    }
    let mut at = 0;
    while at < bytes {
        // SAFETY: `at + size <= bytes`, because `bytes` is a multiple of `size`.
        unsafe { super::atomic::write(to.add(at), size as u32, super::atomic::read(from.add(at), size as u32)) };
        at += size;
    }
}

/// Stores `count` elements.
///
/// # Safety
/// `to` is valid for `count * size` bytes.
unsafe fn fill(to: *mut u8, count: usize, size: u32, value: u64) {
    let low = value as u8;
    let uniform = value & mask(size) == u64::from(low) * (0x0101_0101_0101_0101 & mask(size));
    if uniform {
        // SAFETY: by contract.
        unsafe { std::ptr::write_bytes(to, low, count * size as usize) };
        return;
    }
    for n in 0..count {
        // SAFETY: `n < count`.
        unsafe { super::atomic::write(to.add(n * size as usize), size, value) };
    }
}
