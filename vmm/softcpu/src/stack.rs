//! A stack being pushed to or popped from by an instruction that may still fault: RSP is written when it commits.

use crate::cpu::Cpu;
use crate::descriptor::SS;
use crate::mmu::is_canonical;
use crate::segment::{OperandSize, segment_holds};
use crate::state::{Exception, Segment, SegmentName};
use crate::world::World;

/// Index of RSP among the general purpose registers.
pub(crate) const RSP: usize = 4;

/// A stack segment, a pointer into it and the privilege of accesses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    segment: Segment,
    /// What RSP will be.
    pub(crate) pointer: u64,
    /// Bits of the pointer that count; all ones for a 64-bit stack.
    mask: u64,
    user: bool,
    /// Error code of a stack fault: the selector of a stack that is being switched to.
    fault_code: u32,
}

impl Stack {
    /// The stack of 64-bit code: flat.
    pub(crate) fn flat(pointer: u64, privilege: u8) -> Self {
        Self { segment: Segment::default(), pointer, mask: !0, user: privilege == 3, fault_code: 0 }
    }

    /// A stack of 16- or 32-bit code that is being switched to.
    pub(crate) fn segmented(segment: Segment, pointer: u64, privilege: u8) -> Self {
        let mask = if segment.big() { 0xffff_ffff } else { 0xffff };
        let fault_code = u32::from(segment.selector & 0xfffc);
        Self { segment, pointer: pointer & 0xffff_ffff, mask, user: privilege == 3, fault_code }
    }

    /// Moves the pointer by a number of bytes within its width.
    pub(crate) fn skip(&mut self, bytes: u64) {
        let moved = self.pointer.wrapping_add(bytes);
        self.pointer = match self.mask {
            0xffff => self.pointer & 0xffff_0000 | moved & 0xffff,
            mask => moved & mask,
        };
    }

    fn linear(&self, size: u64) -> Result<u64, Exception> {
        let fault = Exception::with_error(SS, self.fault_code);
        if self.mask == !0 {
            let ok = is_canonical(self.pointer) && is_canonical(self.pointer.wrapping_add(size - 1));
            return if ok { Ok(self.pointer) } else { Err(fault) };
        }
        let offset = self.pointer & self.mask;
        if !segment_holds(&self.segment, offset, size - 1) {
            return Err(fault);
        }
        Ok(self.segment.base.wrapping_add(offset) & 0xffff_ffff)
    }
}

impl Cpu {
    /// The stack in use.
    pub(crate) fn stack(&self) -> Stack {
        let mask = self.stack_mask();
        let pointer = self.regs.gpr[RSP];
        Stack {
            segment: *self.segment(SegmentName::Ss),
            pointer: if mask == !0 { pointer } else { pointer & 0xffff_ffff },
            mask,
            user: self.cpl() == 3,
            fault_code: 0,
        }
    }

    /// Pushes a value of the given size.
    pub(crate) fn push_on(
        &mut self,
        world: &mut dyn World,
        stack: &mut Stack,
        value: u64,
        size: OperandSize,
    ) -> Result<(), Exception> {
        stack.skip(size.bytes().wrapping_neg());
        let linear = stack.linear(size.bytes())?;
        let bytes = value.to_le_bytes();
        self.store(world, linear, &bytes[..size.bytes() as usize], stack.user)
    }

    /// Pops a value of the given size.
    pub(crate) fn pop_off(
        &mut self,
        world: &mut dyn World,
        stack: &mut Stack,
        size: OperandSize,
    ) -> Result<u64, Exception> {
        let linear = stack.linear(size.bytes())?;
        let value = match size {
            OperandSize::Word => u64::from(u16::from_le_bytes(self.load(world, linear, stack.user)?)),
            OperandSize::Dword => u64::from(u32::from_le_bytes(self.load(world, linear, stack.user)?)),
            OperandSize::Qword => u64::from_le_bytes(self.load(world, linear, stack.user)?),
        };
        stack.skip(size.bytes());
        Ok(value)
    }
}
