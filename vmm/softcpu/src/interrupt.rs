//! Interrupts and exceptions: delivery through the IVT (real mode) or the IDT (16- and 32-bit gates, 64-bit gates with
//! IST), and what becomes of exceptions met on the way (SDM vol. 3, chapter 6).
//!
//! Delivery commits last: a frame that cannot be written leaves registers as they were, and the exception that it met
//! is combined with the first one by the table of SDM vol. 3, 6-5. Task gates are refused with #GP.

use crate::cpu::Cpu;
use crate::descriptor::{
    Descriptor, GP, NP, TS, TYPE_INTERRUPT_GATE16, TYPE_INTERRUPT_GATE32, TYPE_TRAP_GATE16, TYPE_TRAP_GATE32, is_null,
    selector_fault,
};
use crate::far::{FLAG_AC, FLAG_IF, FLAG_NT, FLAG_RF, FLAG_TF, FLAG_VM};
use crate::mmu::is_canonical;
use crate::segment::OperandSize;
use crate::stack::{RSP, Stack};
use crate::state::{Exception, Segment, SegmentName};
use crate::world::World;

/// Vectors with a meaning of their own here.
const VECTOR_DB: u8 = 1;
const VECTOR_DF: u8 = 8;
const VECTOR_PF: u8 = 14;

/// DR6 bits.
pub(crate) const DR6_BS: u64 = 1 << 14;
pub(crate) const DR6_BD: u64 = 1 << 13;
/// DR7.GD.
pub(crate) const DR7_GD: u64 = 1 << 13;

/// An exception met a double fault on its way: the processor shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TripleFault;

/// Which instruction raised a software interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SoftwareInterrupt {
    /// INT n.
    IntN,
    /// INT3.
    Int3,
    /// INTO.
    Into,
    /// INT1 (ICEBP): counts as hardware, so no gate's DPL is looked at.
    Int1,
}

/// Where an event comes from, as far as delivery asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// A program asked for it: the gate's DPL counts, errors have EXT clear.
    Program,
    /// Interrupt or exception.
    Event,
}

/// How exceptions combine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(vector: u8) -> Class {
    match vector {
        0 | 10..=13 => Class::Contributory,
        VECTOR_PF => Class::PageFault,
        VECTOR_DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What follows when `second` is met while `first` is being delivered.
fn combine(first: Class, second: Exception) -> Result<Exception, TripleFault> {
    match (first, class(second.vector)) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault | Class::DoubleFault) => Err(TripleFault),
        (Class::Contributory, Class::Contributory) | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            Ok(Exception::with_error(VECTOR_DF, 0))
        }
        _ => Ok(second),
    }
}

/// Faults report the instruction itself, and their saved flags have RF set; traps and aborts do not.
fn is_fault(vector: u8) -> bool {
    matches!(vector, 0 | 5..=7 | 10..=14 | 16 | 17 | 19)
}

/// A gate, checked, and the code that it leads to.
struct Entry {
    code: Segment,
    rip: u64,
    size: OperandSize,
    clears_if: bool,
    ist: u8,
}

impl Cpu {
    /// Delivers an exception. `regs.rip` is the address to return to.
    pub(crate) fn deliver(&mut self, world: &mut dyn World, exception: Exception) -> Result<(), TripleFault> {
        self.halted = false;
        let mut exception = exception;
        self.note_fault_address(exception);
        loop {
            match self.enter(world, exception.vector, exception.error, Source::Event, is_fault(exception.vector)) {
                Ok(()) => break,
                // Each turn climbs from benign to contributory or page fault, to double fault, to the end.
                Err(met) => {
                    self.note_fault_address(met);
                    exception = combine(class(exception.vector), met)?;
                }
            }
        }
        self.sys.interrupt_shadow = false;
        if exception.vector == VECTOR_DB {
            self.sys.dr[7] &= !DR7_GD;
        }
        Ok(())
    }

    /// Delivers an external interrupt that has been acknowledged.
    pub(crate) fn deliver_interrupt(&mut self, world: &mut dyn World, vector: u8) -> Result<(), TripleFault> {
        self.halted = false;
        match self.enter(world, vector, None, Source::Event, false) {
            Ok(()) => Ok(()),
            Err(met) => self.deliver(world, met),
        }
    }

    /// INT n, INT3, INTO, INT1. `regs.rip` is the address after the instruction; a fault belongs to the instruction.
    pub(crate) fn software_interrupt(
        &mut self,
        world: &mut dyn World,
        vector: u8,
        kind: SoftwareInterrupt,
    ) -> Result<(), Exception> {
        let source = if kind == SoftwareInterrupt::Int1 { Source::Event } else { Source::Program };
        if kind == SoftwareInterrupt::Int1 {
            // It is a debug exception already: whatever waits is told with it.
            self.sys.dr[6] |= std::mem::take(&mut self.mmu.pending_debug);
        }
        self.enter(world, vector, None, source, false)
    }

    /// CR2 is that of the latest page fault, even of one that turns into a double fault.
    fn note_fault_address(&mut self, exception: Exception) {
        if exception.vector == VECTOR_PF {
            self.sys.cr2 = exception.cr2;
        }
    }

    /// The #DB for a cause, with DR6 told: the breakpoints are those of this time, other bits stay until cleared.
    pub(crate) fn debug_trap(&mut self, cause: u64) -> Exception {
        self.sys.dr[6] = self.sys.dr[6] & !0xf | cause;
        Exception::plain(VECTOR_DB)
    }

    fn enter(
        &mut self,
        world: &mut dyn World,
        vector: u8,
        error: Option<u32>,
        source: Source,
        set_rf: bool,
    ) -> Result<(), Exception> {
        let ext = u32::from(source == Source::Event);
        let flags = self.regs.rflags | if set_rf { FLAG_RF } else { 0 };
        let result = if self.protected_mode() {
            self.enter_protected(world, vector, error, source, flags)
        } else {
            self.enter_real(world, vector)
        };
        result.map_err(|met| match met.error {
            Some(code) if met.vector != VECTOR_PF => Exception { error: Some(code | ext), ..met },
            _ => met,
        })
    }

    fn enter_real(&mut self, world: &mut dyn World, vector: u8) -> Result<(), Exception> {
        let at = u64::from(vector) * 4;
        if at + 3 > u64::from(self.sys.idtr.limit) {
            return Err(Exception::gp(0));
        }
        let [ip_low, ip_high, cs_low, cs_high] = self.load(world, self.sys.idtr.base.wrapping_add(at), false)?;
        let mut stack = self.stack();
        let word = OperandSize::Word;
        self.push_on(world, &mut stack, self.regs.rflags & 0xffff, word)?;
        self.push_on(world, &mut stack, u64::from(self.segment(SegmentName::Cs).selector), word)?;
        self.push_on(world, &mut stack, self.regs.rip, word)?;
        let selector = u16::from_le_bytes([cs_low, cs_high]);
        let code = &mut self.sys.segments[SegmentName::Cs as usize];
        code.selector = selector;
        code.base = u64::from(selector) << 4;
        self.regs.rip = u64::from(u16::from_le_bytes([ip_low, ip_high]));
        self.regs.rflags &= !(FLAG_IF | FLAG_TF | FLAG_AC | FLAG_RF);
        let rsp = &mut self.regs.gpr[RSP];
        *rsp = *rsp & !0xffff | stack.pointer & 0xffff;
        Ok(())
    }

    fn enter_protected(
        &mut self,
        world: &mut dyn World,
        vector: u8,
        error: Option<u32>,
        source: Source,
        flags: u64,
    ) -> Result<(), Exception> {
        let entry = self.gate(world, vector, source)?;
        let cpl = self.cpl();
        let inward = !entry.code.is_conforming_code() && entry.code.dpl() < cpl;
        let privilege = if inward { entry.code.dpl() } else { cpl };
        let old_ss = u64::from(self.segment(SegmentName::Ss).selector);
        let old_cs = u64::from(self.segment(SegmentName::Cs).selector);
        let (old_rsp, old_rip) = (self.regs.gpr[RSP], self.regs.rip);
        let long = self.long_mode_active();

        let (new_ss, mut stack) = if long {
            let (segment, mut stack) = if entry.ist != 0 {
                let segment = if inward {
                    Segment::null(u16::from(privilege), privilege)
                } else {
                    *self.segment(SegmentName::Ss)
                };
                (segment, Stack::flat(self.interrupt_stack(world, entry.ist)?, privilege))
            } else if inward {
                self.inner_stack(world, privilege)?
            } else {
                (*self.segment(SegmentName::Ss), Stack::flat(old_rsp, privilege))
            };
            stack.pointer &= !0xf;
            (segment, stack)
        } else if inward {
            self.inner_stack(world, privilege)?
        } else {
            (*self.segment(SegmentName::Ss), self.stack())
        };

        if long || inward {
            self.push_on(world, &mut stack, old_ss, entry.size)?;
            self.push_on(world, &mut stack, old_rsp, entry.size)?;
        }
        self.push_on(world, &mut stack, flags, entry.size)?;
        self.push_on(world, &mut stack, old_cs, entry.size)?;
        self.push_on(world, &mut stack, old_rip, entry.size)?;
        if let Some(code) = error {
            self.push_on(world, &mut stack, u64::from(code), entry.size)?;
        }

        // A 16-bit stack that is not switched keeps the upper half of ESP, which the cursor carries along.
        self.regs.gpr[RSP] = stack.pointer;
        self.sys.segments[SegmentName::Ss as usize] = new_ss;
        let selector = entry.code.selector & !3 | u16::from(privilege);
        self.commit_code(Segment { selector, ..entry.code }, entry.rip);
        self.regs.rflags &= !(FLAG_TF | FLAG_NT | FLAG_VM | FLAG_RF);
        if entry.clears_if {
            self.regs.rflags &= !FLAG_IF;
        }
        Ok(())
    }

    /// Reads the gate of a vector and the code segment that it names.
    fn gate(&mut self, world: &mut dyn World, vector: u8, source: Source) -> Result<Entry, Exception> {
        let long = self.long_mode_active();
        let gate_len: u64 = if long { 16 } else { 8 };
        let at = u64::from(vector) * gate_len;
        // The error code names the entry and says that it is one of the IDT.
        let fault = |kind: u8| Exception::with_error(kind, u32::from(vector) << 3 | 2);
        if at + gate_len - 1 > u64::from(self.sys.idtr.limit) {
            return Err(fault(GP));
        }
        let linear = self.sys.idtr.base.wrapping_add(at);
        let raw = u64::from_le_bytes(self.load(world, linear, false)?);
        let upper = if long { u64::from_le_bytes(self.load(world, linear.wrapping_add(8), false)?) } else { 0 };
        let gate = Descriptor::from_raw(raw);
        let fields = gate.segment(0);
        let (size, clears_if) = match (fields.is_ordinary(), fields.kind()) {
            (false, TYPE_INTERRUPT_GATE32) if long => (OperandSize::Qword, true),
            (false, TYPE_TRAP_GATE32) if long => (OperandSize::Qword, false),
            (false, TYPE_INTERRUPT_GATE32) => (OperandSize::Dword, true),
            (false, TYPE_TRAP_GATE32) => (OperandSize::Dword, false),
            (false, TYPE_INTERRUPT_GATE16) if !long => (OperandSize::Word, true),
            (false, TYPE_TRAP_GATE16) if !long => (OperandSize::Word, false),
            _ => return Err(fault(GP)),
        };
        if source == Source::Program && fields.dpl() < self.cpl() {
            return Err(fault(GP));
        }
        if !fields.present() {
            return Err(fault(NP));
        }
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(Exception::gp(0));
        }
        let descriptor = self.read_descriptor(world, selector, GP)?;
        let code = descriptor.segment(selector);
        if !code.is_code() || code.dpl() > self.cpl() || long && !code.long() {
            return Err(selector_fault(GP, selector));
        }
        let code = self.finish_code(world, selector, descriptor)?;
        let mut rip = u64::from(gate.gate_offset()) & size.mask();
        if long {
            rip |= upper << 32;
        }
        self.check_target(&code, rip)?;
        let ist = if long { (raw >> 32) as u8 & 7 } else { 0 };
        Ok(Entry { code, rip, size, clears_if, ist })
    }

    /// RSP from the interrupt stack table of the 64-bit TSS.
    fn interrupt_stack(&mut self, world: &mut dyn World, ist: u8) -> Result<u64, Exception> {
        let tr = self.sys.tr;
        let at = 0x24 + 8 * (u64::from(ist) - 1);
        if !tr.present() || at + 7 > u64::from(tr.limit) {
            return Err(selector_fault(TS, tr.selector));
        }
        let rsp = u64::from_le_bytes(self.load(world, tr.base.wrapping_add(at), false)?);
        if is_canonical(rsp) { Ok(rsp) } else { Err(Exception::with_error(crate::descriptor::SS, 0)) }
    }
}

#[cfg(test)]
mod tests;
