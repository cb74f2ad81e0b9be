//! Far jumps, calls and returns, with call gates, and IRET (SDM vol. 2, JMP, CALL, RET, IRET; vol. 3, chapter 5).
//!
//! Registers change in the last lines of each instruction, after every check and every memory access. Task switches are
//! not there: a TSS or a task gate as a target raises #GP with its selector, a return with NT set raises #GP(0), and
//! so does an IRET into virtual-8086 mode.

use crate::cpu::Cpu;
use crate::descriptor::{
    Descriptor, GP, NP, TS, TYPE_CALL_GATE16, TYPE_CALL_GATE32, TYPE_TSS32, TYPE_TSS32_BUSY, is_null, rpl,
    selector_fault,
};
use crate::mmu::is_canonical;
use crate::segment::OperandSize;
use crate::stack::{RSP, Stack};
use crate::state::{Exception, Segment, SegmentName};
use crate::world::World;

/// RFLAGS bits.
pub(crate) const FLAG_TF: u64 = 1 << 8;
pub(crate) const FLAG_IF: u64 = 1 << 9;
pub(crate) const FLAG_IOPL: u64 = 3 << 12;
pub(crate) const FLAG_NT: u64 = 1 << 14;
pub(crate) const FLAG_RF: u64 = 1 << 16;
pub(crate) const FLAG_VM: u64 = 1 << 17;
pub(crate) const FLAG_AC: u64 = 1 << 18;
/// Flags that any code may change: CF PF AF ZF SF TF DF OF NT, and AC and ID.
const FLAGS_FREE: u64 = 0x0024_4dd5;

/// Where a far transfer through a gate leads.
struct GateTarget {
    code: Segment,
    rip: u64,
    size: OperandSize,
    /// Words or doublewords to copy to an inner stack.
    parameters: u32,
}

impl Cpu {
    /// JMP far.
    pub(crate) fn far_jump(
        &mut self,
        world: &mut dyn World,
        selector: u16,
        offset: u64,
        size: OperandSize,
    ) -> Result<(), Exception> {
        let offset = offset & size.mask();
        if !self.protected_mode() {
            return self.real_transfer(selector, offset);
        }
        let descriptor = self.far_descriptor(world, selector)?;
        if descriptor.segment(selector).is_ordinary() {
            let code = self.direct_code(world, selector, descriptor)?;
            self.check_target(&code, offset)?;
            self.commit_code(code, offset);
            return Ok(());
        }
        let target = self.call_gate(world, selector, descriptor)?;
        // A jump never gains privilege.
        let cpl = self.cpl();
        if !target.code.is_conforming_code() && target.code.dpl() != cpl {
            return Err(selector_fault(GP, target.code.selector));
        }
        self.check_target(&target.code, target.rip)?;
        self.commit_code(with_rpl(target.code, cpl), target.rip);
        Ok(())
    }

    /// CALL far.
    pub(crate) fn far_call(
        &mut self,
        world: &mut dyn World,
        selector: u16,
        offset: u64,
        size: OperandSize,
    ) -> Result<(), Exception> {
        let offset = offset & size.mask();
        let old_cs = u64::from(self.segment(SegmentName::Cs).selector);
        let old_rip = self.regs.rip;
        let mut stack = self.stack();
        if !self.protected_mode() {
            self.check_target(self.segment(SegmentName::Cs), offset)?;
            self.push_on(world, &mut stack, old_cs, size)?;
            self.push_on(world, &mut stack, old_rip, size)?;
            self.real_transfer(selector, offset)?;
            self.regs.gpr[RSP] = self.merge_pointer(stack.pointer);
            return Ok(());
        }
        let descriptor = self.far_descriptor(world, selector)?;
        let (code, rip, stack) = if descriptor.segment(selector).is_ordinary() {
            let code = self.direct_code(world, selector, descriptor)?;
            self.check_target(&code, offset)?;
            self.push_on(world, &mut stack, old_cs, size)?;
            self.push_on(world, &mut stack, old_rip, size)?;
            (code, offset, stack)
        } else {
            let target = self.call_gate(world, selector, descriptor)?;
            self.check_target(&target.code, target.rip)?;
            let inner = target.code.dpl();
            if !target.code.is_conforming_code() && inner < self.cpl() {
                return self.call_inner(world, &target, stack);
            }
            self.push_on(world, &mut stack, old_cs, target.size)?;
            self.push_on(world, &mut stack, old_rip, target.size)?;
            (with_rpl(target.code, self.cpl()), target.rip, stack)
        };
        self.regs.gpr[RSP] = self.merge_pointer(stack.pointer);
        self.commit_code(code, rip);
        Ok(())
    }

    /// A call through a gate to more privileged code: the TSS gives the stack.
    fn call_inner(&mut self, world: &mut dyn World, target: &GateTarget, mut outer: Stack) -> Result<(), Exception> {
        let privilege = target.code.dpl();
        let old_ss = *self.segment(SegmentName::Ss);
        let old_rsp = self.regs.gpr[RSP] & if self.is_64bit() { !0 } else { 0xffff_ffff };
        let (segment, mut stack) = self.inner_stack(world, privilege)?;
        let size = target.size;
        self.push_on(world, &mut stack, u64::from(old_ss.selector), size)?;
        self.push_on(world, &mut stack, old_rsp, size)?;
        if target.parameters > 0 {
            let mut words = [0u64; 31];
            let count = target.parameters as usize & 31;
            for word in &mut words[..count] {
                *word = self.pop_off(world, &mut outer, size)?;
            }
            for word in words[..count].iter().rev() {
                self.push_on(world, &mut stack, *word, size)?;
            }
        }
        self.push_on(world, &mut stack, u64::from(self.segment(SegmentName::Cs).selector), size)?;
        self.push_on(world, &mut stack, self.regs.rip, size)?;
        self.sys.segments[SegmentName::Ss as usize] = segment;
        self.regs.gpr[RSP] = stack.pointer;
        self.commit_code(with_rpl(target.code, privilege), target.rip);
        Ok(())
    }

    /// RET far, dropping `pop` bytes of parameters.
    pub(crate) fn far_return(&mut self, world: &mut dyn World, size: OperandSize, pop: u16) -> Result<(), Exception> {
        let mut stack = self.stack();
        let rip = self.pop_off(world, &mut stack, size)?;
        let selector = self.pop_off(world, &mut stack, size)? as u16;
        stack.skip(u64::from(pop));
        if !self.protected_mode() {
            self.real_transfer(selector, rip)?;
            self.regs.gpr[RSP] = self.merge_pointer(stack.pointer);
            return Ok(());
        }
        let code = self.return_code(world, selector)?;
        if rpl(selector) == self.cpl() {
            self.check_target(&code, rip)?;
            self.regs.gpr[RSP] = self.merge_pointer(stack.pointer);
            self.commit_code(code, rip);
            return Ok(());
        }
        let rsp = self.pop_off(world, &mut stack, size)?;
        let ss = self.pop_off(world, &mut stack, size)? as u16;
        let segment = self.return_stack(world, ss, &code)?;
        self.check_target(&code, rip)?;
        let mut outer = if code.long() && self.long_mode_active() {
            Stack::flat(rsp, 3)
        } else {
            Stack::segmented(segment, rsp, 3)
        };
        outer.skip(u64::from(pop));
        self.commit_outer(code, rip, segment, outer.pointer);
        Ok(())
    }

    /// IRET, IRETD, IRETQ.
    pub(crate) fn iret(&mut self, world: &mut dyn World, size: OperandSize) -> Result<(), Exception> {
        let mut stack = self.stack();
        if self.protected_mode() && self.regs.rflags & FLAG_NT != 0 {
            return Err(Exception::gp(0));
        }
        let rip = self.pop_off(world, &mut stack, size)?;
        let selector = self.pop_off(world, &mut stack, size)? as u16;
        let flags = self.pop_off(world, &mut stack, size)?;
        if !self.protected_mode() {
            self.real_transfer(selector, rip)?;
            self.regs.gpr[RSP] = self.merge_pointer(stack.pointer);
            self.restore_flags(flags, size, 0);
            return Ok(());
        }
        let from_64bit = self.is_64bit();
        if !self.long_mode_active() && flags & FLAG_VM != 0 && size != OperandSize::Word && self.cpl() == 0 {
            return Err(Exception::gp(0));
        }
        let code = self.return_code(world, selector)?;
        let cpl = self.cpl();
        let outward = rpl(selector) != cpl;
        if !outward && !from_64bit {
            self.check_target(&code, rip)?;
            self.regs.gpr[RSP] = self.merge_pointer(stack.pointer);
            self.commit_code(code, rip);
            self.restore_flags(flags, size, cpl);
            return Ok(());
        }
        let rsp = self.pop_off(world, &mut stack, size)?;
        let ss = self.pop_off(world, &mut stack, size)? as u16;
        let segment = self.return_stack(world, ss, &code)?;
        self.check_target(&code, rip)?;
        if outward {
            self.commit_outer(code, rip, segment, rsp);
        } else {
            self.sys.segments[SegmentName::Ss as usize] = segment;
            self.regs.gpr[RSP] = rsp;
            self.commit_code(code, rip);
        }
        self.restore_flags(flags, size, cpl);
        Ok(())
    }

    /// Writes RFLAGS as IRET does from privilege `cpl`.
    fn restore_flags(&mut self, flags: u64, size: OperandSize, cpl: u8) {
        let iopl = (self.regs.rflags >> 12 & 3) as u8;
        let mut writable = FLAGS_FREE;
        if cpl == 0 {
            writable |= FLAG_IOPL;
        }
        if cpl <= iopl {
            writable |= FLAG_IF;
        }
        writable = (writable | FLAG_RF) & size.mask();
        self.regs.rflags = self.regs.rflags & !(writable | FLAG_RF) | flags & writable | 2;
    }

    /// Real mode: CS is the selector times sixteen.
    fn real_transfer(&mut self, selector: u16, rip: u64) -> Result<(), Exception> {
        let mut code = *self.segment(SegmentName::Cs);
        code.selector = selector;
        code.base = u64::from(selector) << 4;
        self.check_target(&code, rip)?;
        self.sys.segments[SegmentName::Cs as usize] = code;
        self.regs.rip = rip;
        Ok(())
    }

    fn far_descriptor(&mut self, world: &mut dyn World, selector: u16) -> Result<Descriptor, Exception> {
        if is_null(selector) {
            return Err(Exception::gp(0));
        }
        self.read_descriptor(world, selector, GP)
    }

    /// Checks for a far transfer straight to a code segment; the result has CPL as its RPL.
    fn direct_code(
        &mut self,
        world: &mut dyn World,
        selector: u16,
        descriptor: Descriptor,
    ) -> Result<Segment, Exception> {
        let segment = descriptor.segment(selector);
        let cpl = self.cpl();
        let privilege_ok = if segment.is_conforming_code() {
            segment.dpl() <= cpl
        } else {
            rpl(selector) <= cpl && segment.dpl() == cpl
        };
        if !segment.is_code() || !privilege_ok {
            return Err(selector_fault(GP, selector));
        }
        self.finish_code(world, selector, descriptor).map(|code| with_rpl(code, cpl))
    }

    /// Checks for a return to a code segment: the privilege returned to is the selector's RPL.
    fn return_code(&mut self, world: &mut dyn World, selector: u16) -> Result<Segment, Exception> {
        let descriptor = self.far_descriptor(world, selector)?;
        let segment = descriptor.segment(selector);
        let target = rpl(selector);
        let privilege_ok = target >= self.cpl()
            && if segment.is_conforming_code() { segment.dpl() <= target } else { segment.dpl() == target };
        if !segment.is_code() || !privilege_ok {
            return Err(selector_fault(GP, selector));
        }
        self.finish_code(world, selector, descriptor)
    }

    /// Present, not both L and D in long mode; sets the accessed bit.
    pub(crate) fn finish_code(
        &mut self,
        world: &mut dyn World,
        selector: u16,
        descriptor: Descriptor,
    ) -> Result<Segment, Exception> {
        let segment = descriptor.segment(selector);
        if self.long_mode_active() && segment.long() && segment.big() {
            return Err(selector_fault(GP, selector));
        }
        if !segment.present() {
            return Err(selector_fault(NP, selector));
        }
        Ok(self.mark_accessed(world, descriptor)?.segment(selector))
    }

    /// SS on a return that pops it.
    fn return_stack(&mut self, world: &mut dyn World, selector: u16, code: &Segment) -> Result<Segment, Exception> {
        let privilege = rpl(code.selector);
        let null_allowed = self.long_mode_active() && code.long() && privilege != 3;
        self.stack_segment(world, selector, privilege, GP, null_allowed)
    }

    /// A call gate and the code it leads to, checked but for the change of privilege.
    fn call_gate(&mut self, world: &mut dyn World, selector: u16, gate: Descriptor) -> Result<GateTarget, Exception> {
        let fields = gate.segment(selector);
        let long = self.long_mode_active();
        let size = match fields.kind() {
            TYPE_CALL_GATE32 if long => OperandSize::Qword,
            TYPE_CALL_GATE32 => OperandSize::Dword,
            TYPE_CALL_GATE16 if !long => OperandSize::Word,
            _ => return Err(selector_fault(GP, selector)),
        };
        if fields.dpl() < self.cpl().max(rpl(selector)) {
            return Err(selector_fault(GP, selector));
        }
        let mut rip = u64::from(gate.gate_offset()) & size.mask();
        if long {
            let upper = self.descriptor_upper_half(world, selector)?.ok_or_else(|| selector_fault(GP, selector))?;
            if upper >> 40 & 0x1f != 0 {
                return Err(selector_fault(GP, selector));
            }
            rip |= upper << 32;
        }
        if !fields.present() {
            return Err(selector_fault(NP, selector));
        }
        let target = gate.gate_selector();
        let descriptor = self.far_descriptor(world, target)?;
        let code = descriptor.segment(target);
        if !code.is_code() || code.dpl() > self.cpl() || long && !code.long() {
            return Err(selector_fault(GP, target));
        }
        let code = self.finish_code(world, target, descriptor)?;
        let parameters = if long { 0 } else { (gate.raw >> 32) as u32 & 0x1f };
        Ok(GateTarget { code, rip, size, parameters })
    }

    /// The stack that the TSS holds for a more privileged level.
    pub(crate) fn inner_stack(&mut self, world: &mut dyn World, privilege: u8) -> Result<(Segment, Stack), Exception> {
        let tr = self.sys.tr;
        let level = u64::from(privilege);
        let fault = || Exception::with_error(TS, u32::from(tr.selector & 0xfffc));
        let holds = |last: u64| tr.present() && last <= u64::from(tr.limit);
        if self.long_mode_active() {
            let at = 4 + 8 * level;
            if !holds(at + 7) {
                return Err(fault());
            }
            let rsp = u64::from_le_bytes(self.load(world, tr.base.wrapping_add(at), false)?);
            if !is_canonical(rsp) {
                return Err(Exception::with_error(crate::descriptor::SS, 0));
            }
            let null = Segment::null(u16::from(privilege), privilege);
            return Ok((null, Stack::flat(rsp, privilege)));
        }
        let (selector, rsp) = if matches!(tr.kind(), TYPE_TSS32 | TYPE_TSS32_BUSY) {
            let at = 4 + 8 * level;
            if !holds(at + 5) {
                return Err(fault());
            }
            let rsp = u32::from_le_bytes(self.load(world, tr.base.wrapping_add(at), false)?);
            (u16::from_le_bytes(self.load(world, tr.base.wrapping_add(at + 4), false)?), rsp)
        } else {
            let at = 2 + 4 * level;
            if !holds(at + 3) {
                return Err(fault());
            }
            let sp = u16::from_le_bytes(self.load(world, tr.base.wrapping_add(at), false)?);
            (u16::from_le_bytes(self.load(world, tr.base.wrapping_add(at + 2), false)?), u32::from(sp))
        };
        let segment = self.stack_segment(world, selector, privilege, TS, false)?;
        Ok((segment, Stack::segmented(segment, u64::from(rsp), privilege)))
    }

    /// #GP(0) unless the target address lies in the segment, or is canonical for 64-bit code.
    pub(crate) fn check_target(&self, code: &Segment, rip: u64) -> Result<(), Exception> {
        let ok = if self.long_mode_active() && code.long() { is_canonical(rip) } else { rip <= u64::from(code.limit) };
        if ok { Ok(()) } else { Err(Exception::gp(0)) }
    }

    pub(crate) fn commit_code(&mut self, code: Segment, rip: u64) {
        self.sys.segments[SegmentName::Cs as usize] = code;
        self.regs.rip = rip;
    }

    /// Ends a return to an outer level: the stack, and data segments that the outer level may not use become null.
    fn commit_outer(&mut self, code: Segment, rip: u64, stack: Segment, rsp: u64) {
        let privilege = rpl(code.selector);
        self.sys.segments[SegmentName::Ss as usize] = stack;
        self.regs.gpr[RSP] = rsp;
        for name in [SegmentName::Es, SegmentName::Ds, SegmentName::Fs, SegmentName::Gs] {
            let segment = &mut self.sys.segments[name as usize];
            if segment.present() && !segment.is_conforming_code() && segment.dpl() < privilege {
                // The selector becomes null; the hidden base stays, which matters to FS and GS.
                *segment = Segment { base: segment.base, ..Segment::null(0, 0) };
            }
        }
        self.commit_code(code, rip);
    }

    /// RSP after a push or pop: a 16- or 32-bit stack keeps the bits above its width, up to 32.
    fn merge_pointer(&self, pointer: u64) -> u64 {
        if self.stack_mask() == 0xffff { self.regs.gpr[RSP] & !0xffff | pointer & 0xffff } else { pointer }
    }
}

/// A segment with its selector's RPL replaced.
fn with_rpl(segment: Segment, privilege: u8) -> Segment {
    Segment { selector: segment.selector & !3 | u16::from(privilege), ..segment }
}

#[cfg(test)]
mod tests;
