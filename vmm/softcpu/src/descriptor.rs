//! Segment descriptors: their bits, how they are read from the descriptor tables, and the two flags that the processor
//! itself sets in them (accessed and busy), atomically.
#![allow(unsafe_code, reason = "accessed and busy bits are set by host atomics in guest memory")]

use std::sync::atomic::{AtomicU8, Ordering};

use crate::cpu::Cpu;
use crate::mmu::HostRw;
use crate::state::{Exception, Segment};
use crate::world::World;

/// Vectors that this room raises.
pub(crate) const TS: u8 = 10;
pub(crate) const NP: u8 = 11;
pub(crate) const SS: u8 = 12;
pub(crate) const GP: u8 = 13;

/// System descriptor types (SDM vol. 3, table 3-2).
pub(crate) const TYPE_TSS16: u8 = 1;
pub(crate) const TYPE_LDT: u8 = 2;
pub(crate) const TYPE_TSS16_BUSY: u8 = 3;
pub(crate) const TYPE_CALL_GATE16: u8 = 4;
pub(crate) const TYPE_TASK_GATE: u8 = 5;
pub(crate) const TYPE_INTERRUPT_GATE16: u8 = 6;
pub(crate) const TYPE_TRAP_GATE16: u8 = 7;
pub(crate) const TYPE_TSS32: u8 = 9;
pub(crate) const TYPE_TSS32_BUSY: u8 = 11;
pub(crate) const TYPE_CALL_GATE32: u8 = 12;
pub(crate) const TYPE_INTERRUPT_GATE32: u8 = 14;
pub(crate) const TYPE_TRAP_GATE32: u8 = 15;

/// An exception whose error code names a selector.
pub(crate) fn selector_fault(vector: u8, selector: u16) -> Exception {
    Exception::with_error(vector, u32::from(selector & 0xfffc))
}

/// Whether a selector is null: index 0 of the GDT, whatever its RPL.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// Requested privilege level.
pub(crate) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

impl Segment {
    /// Type field.
    pub(crate) fn kind(&self) -> u8 {
        (self.attributes & 0xf) as u8
    }
    /// S: code or data, not system.
    pub(crate) fn is_ordinary(&self) -> bool {
        self.attributes & 1 << 4 != 0
    }
    /// Descriptor privilege level.
    #[inline(always)]
    pub(crate) fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
    /// P, which is also "usable" here.
    #[inline(always)]
    pub(crate) fn present(&self) -> bool {
        self.attributes & 1 << 7 != 0
    }
    /// L: 64-bit code.
    #[inline(always)]
    pub(crate) fn long(&self) -> bool {
        self.attributes & 1 << 13 != 0
    }
    /// D/B: 32-bit default size.
    #[inline(always)]
    pub(crate) fn big(&self) -> bool {
        self.attributes & 1 << 14 != 0
    }
    pub(crate) fn is_code(&self) -> bool {
        self.attributes & 0x18 == 0x18
    }
    pub(crate) fn is_conforming_code(&self) -> bool {
        self.attributes & 0x1c == 0x1c
    }
    pub(crate) fn is_readable(&self) -> bool {
        // Data, or code with the R bit.
        self.attributes & 0x18 == 0x10 || self.attributes & 0x1a == 0x1a
    }
    pub(crate) fn is_writable(&self) -> bool {
        self.attributes & 0x1a == 0x12
    }
    pub(crate) fn is_expand_down(&self) -> bool {
        self.attributes & 0x1c == 0x14
    }
    /// The unusable segment that a null selector gives; it keeps a privilege level, because CPL is that of SS.
    pub(crate) fn null(selector: u16, dpl: u8) -> Self {
        Self { selector, base: 0, limit: 0, attributes: u16::from(dpl) << 5 }
    }
}

/// An eight-byte descriptor and where it lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) raw: u64,
    linear: u64,
}

impl Descriptor {
    /// A gate of the IDT, which has no bits for the processor to set.
    pub(crate) fn from_raw(raw: u64) -> Self {
        Self { raw, linear: 0 }
    }
    pub(crate) fn attributes(self) -> u16 {
        (self.raw >> 40) as u16 & 0xf0ff
    }
    pub(crate) fn base(self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 56 << 24
    }
    /// Limit in bytes.
    pub(crate) fn limit(self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit }
    }
    /// The segment register's content after loading this.
    pub(crate) fn segment(self, selector: u16) -> Segment {
        Segment { selector, base: self.base(), limit: self.limit(), attributes: self.attributes() }
    }
    /// Gate: selector of the target.
    pub(crate) fn gate_selector(self) -> u16 {
        (self.raw >> 16) as u16
    }
    /// Gate: low 32 bits of the target's offset.
    pub(crate) fn gate_offset(self) -> u32 {
        (self.raw & 0xffff) as u32 | (self.raw >> 32) as u32 & 0xffff_0000
    }
}

impl Cpu {
    /// Reads the descriptor that a selector that is not null names. `vector` is raised with the selector when it lies
    /// beyond its table.
    pub(crate) fn read_descriptor(
        &mut self,
        world: &mut dyn World,
        selector: u16,
        vector: u8,
    ) -> Result<Descriptor, Exception> {
        self.find_descriptor(world, selector)?.ok_or_else(|| selector_fault(vector, selector))
    }

    /// The same, `None` when the selector lies beyond its table (LAR and its kin only clear ZF then).
    pub(crate) fn find_descriptor(
        &mut self,
        world: &mut dyn World,
        selector: u16,
    ) -> Result<Option<Descriptor>, Exception> {
        let Some(linear) = self.descriptor_address(selector, 8) else { return Ok(None) };
        let raw = u64::from_le_bytes(self.load(world, linear, false)?);
        Ok(Some(Descriptor { raw, linear }))
    }

    /// The upper half of a sixteen-byte system descriptor (long mode): `None` beyond the table.
    pub(crate) fn descriptor_upper_half(
        &mut self,
        world: &mut dyn World,
        selector: u16,
    ) -> Result<Option<u64>, Exception> {
        let Some(linear) = self.descriptor_address(selector, 16) else { return Ok(None) };
        Ok(Some(u64::from_le_bytes(self.load(world, linear.wrapping_add(8), false)?)))
    }

    fn descriptor_address(&self, selector: u16, len: u32) -> Option<u64> {
        let (base, limit) = if selector & 4 == 0 {
            (self.sys.gdtr.base, u32::from(self.sys.gdtr.limit))
        } else if self.sys.ldtr.present() {
            (self.sys.ldtr.base, self.sys.ldtr.limit)
        } else {
            return None;
        };
        let offset = u32::from(selector & 0xfff8);
        (offset + (len - 1) <= limit).then(|| base.wrapping_add(u64::from(offset)))
    }

    /// Sets the accessed bit of a code or data descriptor if it is clear, and returns the descriptor with it.
    pub(crate) fn mark_accessed(
        &mut self,
        world: &mut dyn World,
        descriptor: Descriptor,
    ) -> Result<Descriptor, Exception> {
        self.set_type_bit(world, descriptor, 1)
    }

    /// Sets the busy bit of a TSS descriptor.
    pub(crate) fn mark_busy(&mut self, world: &mut dyn World, descriptor: Descriptor) -> Result<Descriptor, Exception> {
        self.set_type_bit(world, descriptor, 2)
    }

    fn set_type_bit(
        &mut self,
        world: &mut dyn World,
        descriptor: Descriptor,
        bit: u8,
    ) -> Result<Descriptor, Exception> {
        let marked = Descriptor { raw: descriptor.raw | u64::from(bit) << 40, ..descriptor };
        if marked.raw == descriptor.raw {
            return Ok(marked);
        }
        let linear = descriptor.linear.wrapping_add(5);
        match self.host_rw(linear, 1, false)? {
            HostRw::Ram { host, gpa, code } => {
                // SAFETY: `host_rw` gave a mapped, writable byte; other CPUs write it too, hence the atomic.
                unsafe { AtomicU8::from_ptr(host) }.fetch_or(bit, Ordering::AcqRel);
                if code {
                    self.code_written(gpa, 1);
                }
            }
            HostRw::Slow => {
                let [old] = self.load::<1>(world, linear, false)?;
                self.store(world, linear, &[old | bit], false)?;
            }
        }
        Ok(marked)
    }
}
