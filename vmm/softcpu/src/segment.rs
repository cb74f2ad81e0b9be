//! Segment registers: what the mode is, what an offset in a segment means, loading of selectors, and the instructions
//! that look at descriptors (LAR, LSL, VERR, VERW, LLDT, LTR). SDM vol. 3, chapters 3 and 5.
//!
//! The current privilege level is the DPL of SS, in every mode: real mode leaves it 0, a null SS keeps one.

use crate::cpu::Cpu;
use crate::descriptor::{
    GP, NP, SS, TYPE_CALL_GATE16, TYPE_CALL_GATE32, TYPE_LDT, TYPE_TASK_GATE, TYPE_TSS16, TYPE_TSS16_BUSY, TYPE_TSS32,
    TYPE_TSS32_BUSY, is_null, rpl, selector_fault,
};
use crate::mmu::is_canonical;
use crate::state::{Exception, Segment, SegmentName};
use crate::world::World;

/// CR0.PE.
pub(crate) const CR0_PE: u64 = 1;

/// Operand size of a far transfer or a system instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OperandSize {
    /// 16 bits.
    Word,
    /// 32 bits.
    Dword,
    /// 64 bits.
    Qword,
}

impl OperandSize {
    /// In bytes.
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Self::Word => 2,
            Self::Dword => 4,
            Self::Qword => 8,
        }
    }
    /// All ones of this width.
    pub(crate) fn mask(self) -> u64 {
        match self {
            Self::Word => 0xffff,
            Self::Dword => 0xffff_ffff,
            Self::Qword => !0,
        }
    }
}

impl Exception {
    /// The same fault for an access relative to SS: #GP(0) from a non-canonical address becomes #SS(0).
    pub(crate) fn into_stack_fault(self) -> Self {
        if self.vector == GP { Self::with_error(SS, 0) } else { self }
    }
}

impl Cpu {
    /// Current privilege level.
    #[inline(always)]
    pub(crate) fn cpl(&self) -> u8 {
        self.sys.segments[SegmentName::Ss as usize].dpl()
    }
    #[inline(always)]
    pub(crate) fn segment(&self, name: SegmentName) -> &Segment {
        &self.sys.segments[name as usize]
    }
    /// Whether CR0.PE is set.
    #[inline(always)]
    pub(crate) fn protected_mode(&self) -> bool {
        self.sys.cr0 & CR0_PE != 0
    }
    /// Whether 64-bit code runs.
    #[inline(always)]
    pub(crate) fn is_64bit(&self) -> bool {
        self.long_mode_active() && self.segment(SegmentName::Cs).long()
    }
    /// #GP(0) unless CPL is 0.
    pub(crate) fn require_cpl0(&self) -> Result<(), Exception> {
        if self.cpl() == 0 { Ok(()) } else { Err(Exception::gp(0)) }
    }
    /// Bits of RSP that stack accesses use.
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.is_64bit() {
            !0
        } else if self.segment(SegmentName::Ss).big() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Linear address of `len` bytes (at most 4096) at an offset in a segment. Raises #GP(0), or #SS(0) for SS, when
    /// the segment does not allow it; the offset is already cut to the address size.
    pub(crate) fn segment_linear(
        &self,
        name: SegmentName,
        offset: u64,
        len: u32,
        write: bool,
    ) -> Result<u64, Exception> {
        let segment = self.segment(name);
        let fault = || Exception::with_error(if name == SegmentName::Ss { SS } else { GP }, 0);
        let last_byte = u64::from(len.max(1) - 1);
        if self.is_64bit() {
            let base = if matches!(name, SegmentName::Fs | SegmentName::Gs) { segment.base } else { 0 };
            let linear = base.wrapping_add(offset);
            let ok = is_canonical(linear) && is_canonical(linear.wrapping_add(last_byte));
            return if ok { Ok(linear) } else { Err(fault()) };
        }
        let allowed = segment.present() && if write { segment.is_writable() } else { segment.is_readable() };
        // In real mode CS is writable, and nothing but the limit counts.
        if self.protected_mode() && !allowed {
            return Err(fault());
        }
        if !segment_holds(segment, offset & 0xffff_ffff, last_byte) {
            return Err(fault());
        }
        Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// MOV, POP and LxS to a segment register other than CS. The caller sets the interrupt shadow for SS.
    pub(crate) fn load_segment(
        &mut self,
        world: &mut dyn World,
        name: SegmentName,
        selector: u16,
    ) -> Result<(), Exception> {
        if !self.protected_mode() {
            let segment = &mut self.sys.segments[name as usize];
            segment.selector = selector;
            segment.base = u64::from(selector) << 4;
            return Ok(());
        }
        let segment = if name == SegmentName::Ss {
            let cpl = self.cpl();
            self.stack_segment(world, selector, cpl, GP, self.is_64bit() && cpl != 3)?
        } else {
            self.data_segment(world, selector)?
        };
        self.sys.segments[name as usize] = segment;
        Ok(())
    }

    fn data_segment(&mut self, world: &mut dyn World, selector: u16) -> Result<Segment, Exception> {
        if is_null(selector) {
            return Ok(Segment::null(selector, 0));
        }
        let descriptor = self.read_descriptor(world, selector, GP)?;
        let segment = descriptor.segment(selector);
        let privileged = !segment.is_conforming_code() && rpl(selector).max(self.cpl()) > segment.dpl();
        if !segment.is_ordinary() || !segment.is_readable() || privileged {
            return Err(selector_fault(GP, selector));
        }
        if !segment.present() {
            return Err(selector_fault(NP, selector));
        }
        Ok(self.mark_accessed(world, descriptor)?.segment(selector))
    }

    /// What SS becomes when `selector` is loaded at privilege `cpl`: checks raise `vector` (#GP, or #TS while a stack
    /// is taken from the TSS).
    pub(crate) fn stack_segment(
        &mut self,
        world: &mut dyn World,
        selector: u16,
        cpl: u8,
        vector: u8,
        null_allowed: bool,
    ) -> Result<Segment, Exception> {
        if is_null(selector) {
            // A null SS serves 64-bit code below privilege 3, if its RPL tells the truth.
            return if null_allowed && rpl(selector) == cpl {
                Ok(Segment::null(selector, cpl))
            } else {
                Err(Exception::with_error(vector, 0))
            };
        }
        let descriptor = self.read_descriptor(world, selector, vector)?;
        let segment = descriptor.segment(selector);
        if rpl(selector) != cpl || !segment.is_writable() || segment.dpl() != cpl {
            return Err(selector_fault(vector, selector));
        }
        if !segment.present() {
            return Err(selector_fault(SS, selector));
        }
        Ok(self.mark_accessed(world, descriptor)?.segment(selector))
    }

    /// The descriptor of a selector that LAR, LSL, VERR or VERW may look at: present in its table, of sufficient
    /// privilege.
    fn visible_descriptor(
        &mut self,
        world: &mut dyn World,
        selector: u16,
    ) -> Result<Option<(Segment, u64)>, Exception> {
        if !self.protected_mode() {
            return Err(Exception::ud());
        }
        if is_null(selector) {
            return Ok(None);
        }
        let Some(descriptor) = self.find_descriptor(world, selector)? else { return Ok(None) };
        let segment = descriptor.segment(selector);
        let hidden = !segment.is_conforming_code() && rpl(selector).max(self.cpl()) > segment.dpl();
        Ok((!hidden).then_some((segment, descriptor.raw)))
    }

    /// LAR: the access rights (to be cut to 16 bits for that operand size), or `None` for ZF = 0.
    pub(crate) fn lar(&mut self, world: &mut dyn World, selector: u16) -> Result<Option<u32>, Exception> {
        let Some((segment, raw)) = self.visible_descriptor(world, selector)? else { return Ok(None) };
        let gates = [TYPE_CALL_GATE16, TYPE_TASK_GATE];
        let valid = segment.is_ordinary()
            || self.is_sized_system_type(segment.kind())
            || segment.kind() == TYPE_CALL_GATE32
            || !self.long_mode_active() && gates.contains(&segment.kind());
        Ok(valid.then_some((raw >> 32) as u32 & 0x00ff_ff00))
    }

    /// LSL: the limit in bytes, or `None` for ZF = 0.
    pub(crate) fn lsl(&mut self, world: &mut dyn World, selector: u16) -> Result<Option<u32>, Exception> {
        let Some((segment, _)) = self.visible_descriptor(world, selector)? else { return Ok(None) };
        let valid = segment.is_ordinary() || self.is_sized_system_type(segment.kind());
        Ok(valid.then_some(segment.limit))
    }

    /// System types that have a limit.
    fn is_sized_system_type(&self, kind: u8) -> bool {
        matches!(kind, TYPE_LDT | TYPE_TSS32 | TYPE_TSS32_BUSY)
            || !self.long_mode_active() && matches!(kind, TYPE_TSS16 | TYPE_TSS16_BUSY)
    }

    /// VERR: the new ZF.
    pub(crate) fn verr(&mut self, world: &mut dyn World, selector: u16) -> Result<bool, Exception> {
        let seen = self.visible_descriptor(world, selector)?;
        Ok(seen.is_some_and(|(segment, _)| segment.is_ordinary() && segment.is_readable()))
    }

    /// VERW: the new ZF.
    pub(crate) fn verw(&mut self, world: &mut dyn World, selector: u16) -> Result<bool, Exception> {
        let seen = self.visible_descriptor(world, selector)?;
        Ok(seen.is_some_and(|(segment, _)| segment.is_writable()))
    }

    /// LLDT.
    pub(crate) fn lldt(&mut self, world: &mut dyn World, selector: u16) -> Result<(), Exception> {
        self.require_protected_cpl0()?;
        if is_null(selector) {
            self.sys.ldtr = Segment::null(selector, 0);
            return Ok(());
        }
        let (mut segment, descriptor) = self.system_descriptor(world, selector, &[TYPE_LDT])?;
        segment.base = self.system_base(world, selector, descriptor.base())?;
        self.sys.ldtr = segment;
        Ok(())
    }

    /// LTR.
    pub(crate) fn ltr(&mut self, world: &mut dyn World, selector: u16) -> Result<(), Exception> {
        self.require_protected_cpl0()?;
        if is_null(selector) {
            return Err(Exception::gp(0));
        }
        let kinds: &[u8] = if self.long_mode_active() { &[TYPE_TSS32] } else { &[TYPE_TSS32, TYPE_TSS16] };
        let (_, descriptor) = self.system_descriptor(world, selector, kinds)?;
        let base = self.system_base(world, selector, descriptor.base())?;
        let mut segment = self.mark_busy(world, descriptor)?.segment(selector);
        segment.base = base;
        self.sys.tr = segment;
        Ok(())
    }

    fn require_protected_cpl0(&self) -> Result<(), Exception> {
        if !self.protected_mode() {
            return Err(Exception::ud());
        }
        self.require_cpl0()
    }

    fn system_descriptor(
        &mut self,
        world: &mut dyn World,
        selector: u16,
        kinds: &[u8],
    ) -> Result<(Segment, crate::descriptor::Descriptor), Exception> {
        if selector & 4 != 0 {
            return Err(selector_fault(GP, selector));
        }
        let descriptor = self.read_descriptor(world, selector, GP)?;
        let segment = descriptor.segment(selector);
        if segment.is_ordinary() || !kinds.contains(&segment.kind()) {
            return Err(selector_fault(GP, selector));
        }
        if !segment.present() {
            return Err(selector_fault(NP, selector));
        }
        Ok((segment, descriptor))
    }

    /// Base of a system segment: in long mode the descriptor has sixteen bytes and the base must be canonical.
    fn system_base(&mut self, world: &mut dyn World, selector: u16, low: u64) -> Result<u64, Exception> {
        if !self.long_mode_active() {
            return Ok(low);
        }
        let upper = self.descriptor_upper_half(world, selector)?.ok_or_else(|| selector_fault(GP, selector))?;
        let base = low | upper << 32;
        // The type field of the upper half must be zero.
        if upper >> 40 & 0x1f != 0 || !is_canonical(base) {
            return Err(selector_fault(GP, selector));
        }
        Ok(base)
    }
}

/// Whether bytes `offset` to `offset + last_byte` lie within a segment's limit. A segment of 4 GiB wraps around.
pub(crate) fn segment_holds(segment: &Segment, offset: u64, last_byte: u64) -> bool {
    let limit = u64::from(segment.limit);
    let end = offset + last_byte;
    if segment.is_expand_down() {
        offset > limit && end <= if segment.big() { 0xffff_ffff } else { 0xffff }
    } else {
        end <= limit || limit == 0xffff_ffff
    }
}

#[cfg(test)]
mod tests;
