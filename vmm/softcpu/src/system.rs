//! Privileged and system instructions other than segment loads and far transfers: control and debug registers, system
//! calls, descriptor-table registers, flags that only some may change, I/O permission, CPUID and the time-stamp counter.

use crate::cpu::Cpu;
use crate::descriptor::{TYPE_TSS32, TYPE_TSS32_BUSY};
use crate::far::{FLAG_IF, FLAG_IOPL, FLAG_RF, FLAG_TF, FLAG_VM};
use crate::interrupt::{DR6_BD, DR6_BS, DR7_GD};
use crate::mmu::is_canonical;
use crate::msr::{EFER_LME, EFER_SCE};
use crate::segment::{CR0_PE, OperandSize};
use crate::stack::RSP;
use crate::state::{Exception, Segment, SegmentName, Table};
use crate::walk::{CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, CR4_PSE, CR4_SMEP, EFER_LMA};
use crate::world::World;

/// CR0 bits that exist: PE MP EM TS ET NE WP AM NW CD PG.
const CR0_KNOWN: u64 = 0xe005_003f;
const CR0_TS: u64 = 1 << 3;
const CR0_ET: u64 = 1 << 4;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
/// CR4 bits that exist: TSD DE PSE PAE PGE PCE OSFXSR OSXMMEXCPT SMEP.
const CR4_KNOWN: u64 = CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_PGE | 7 << 8 | CR4_SMEP;
const CR4_TSD: u64 = 1 << 2;
const CR4_DE: u64 = 1 << 3;

/// IA32_APIC_BASE, which is the board's, its enable bit, and the bit of CPUID's EDX that shows it.
const APIC_BASE: u32 = 0x1b;
const APIC_ENABLED: u64 = 1 << 11;
const CPUID_APIC: u32 = 1 << 9;

/// Debug register bits that always read the same.
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR6_WRITABLE: u64 = 0xe00f;
const DR7_FIXED: u64 = 0x400;
const DR7_WRITABLE: u64 = 0xffff_23ff;

/// Attributes of the flat segments that system calls load: code for 64 and 32 bits, and data, at DPL 0.
const FLAT_CODE64: u16 = 0xa09b;
const FLAT_CODE32: u16 = 0xc09b;
const FLAT_DATA: u16 = 0xc093;
const DPL3: u16 = 3 << 5;

/// RFLAGS bits that SYSRET takes from R11: all that exist but RF and VM.
const SYSRET_FLAGS: u64 = 0x003c_7fd7;
/// RFLAGS bits that POPF may write with enough privilege: all but RF, VM, VIF, VIP.
const POPF_FLAGS: u64 = 0x0024_7fd5;

impl Cpu {
    /// MOV from CR0, 2, 3, 4, 8.
    pub(crate) fn read_cr(&mut self, world: &mut dyn World, number: u8) -> Result<u64, Exception> {
        if !matches!(number, 0 | 2 | 3 | 4 | 8) {
            return Err(Exception::ud());
        }
        self.require_cpl0()?;
        Ok(match number {
            0 => self.sys.cr0,
            2 => self.sys.cr2,
            3 => self.sys.cr3,
            4 => self.sys.cr4,
            _ => world.read_cr8(),
        })
    }

    /// MOV to CR0, 2, 3, 4, 8.
    pub(crate) fn write_cr(&mut self, world: &mut dyn World, number: u8, value: u64) -> Result<(), Exception> {
        if !matches!(number, 0 | 2 | 3 | 4 | 8) {
            return Err(Exception::ud());
        }
        self.require_cpl0()?;
        match number {
            0 => self.write_cr0(value)?,
            2 => self.sys.cr2 = value,
            3 => self.write_cr3(value)?,
            4 => self.write_cr4(value)?,
            _ => {
                if value & !0xf != 0 {
                    return Err(Exception::gp(0));
                }
                world.write_cr8(value);
            }
        }
        Ok(())
    }

    fn write_cr0(&mut self, value: u64) -> Result<(), Exception> {
        let old = self.sys.clone();
        let set = |bit: u64| value & bit != 0;
        let wrong = value >> 32 != 0 || set(CR0_PG) && !set(CR0_PE) || set(CR0_NW) && !set(CR0_CD);
        // Paging cannot end under 64-bit code.
        if wrong || !set(CR0_PG) && self.is_64bit() {
            return Err(Exception::gp(0));
        }
        let new = value & CR0_KNOWN | CR0_ET;
        let changed = new ^ old.cr0;
        self.sys.cr0 = new;
        if changed & CR0_PG != 0 {
            if set(CR0_PG) && old.efer & EFER_LME != 0 {
                let cs = self.segment(SegmentName::Cs);
                let tss16 = old.tr.present() && !matches!(old.tr.kind(), TYPE_TSS32 | TYPE_TSS32_BUSY);
                if old.cr4 & CR4_PAE == 0 || cs.long() || tss16 {
                    self.sys.cr0 = old.cr0;
                    return Err(Exception::gp(0));
                }
                self.sys.efer |= EFER_LMA;
            }
            if !set(CR0_PG) {
                self.sys.efer &= !EFER_LMA;
            }
        }
        if changed & (CR0_PG | CR0_CD | CR0_NW) != 0
            && let Err(fault) = self.reload_pdptes()
        {
            self.sys.cr0 = old.cr0;
            self.sys.efer = old.efer;
            return Err(fault);
        }
        if changed & (CR0_PG | CR0_PE | CR0_WP) != 0 {
            self.mmu.flush_all();
        }
        Ok(())
    }

    fn write_cr3(&mut self, value: u64) -> Result<(), Exception> {
        let new = if self.long_mode_active() {
            if value >> self.model.physical_bits() != 0 {
                return Err(Exception::gp(0));
            }
            value
        } else {
            value & 0xffff_ffff
        };
        let old = std::mem::replace(&mut self.sys.cr3, new);
        if let Err(fault) = self.reload_pdptes() {
            self.sys.cr3 = old;
            return Err(fault);
        }
        self.mmu.flush_non_global();
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Result<(), Exception> {
        if value & !CR4_KNOWN != 0 || self.long_mode_active() && value & CR4_PAE == 0 {
            return Err(Exception::gp(0));
        }
        let old = std::mem::replace(&mut self.sys.cr4, value);
        let changed = value ^ old;
        if changed & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP) != 0 {
            if let Err(fault) = self.reload_pdptes() {
                self.sys.cr4 = old;
                return Err(fault);
            }
            self.mmu.flush_all();
        }
        Ok(())
    }

    /// MOV from a debug register.
    pub(crate) fn read_dr(&mut self, number: u8) -> Result<u64, Exception> {
        let index = self.debug_register(number)?;
        Ok(self.sys.dr[index])
    }

    /// MOV to a debug register.
    pub(crate) fn write_dr(&mut self, number: u8, value: u64) -> Result<(), Exception> {
        let index = self.debug_register(number)?;
        if index >= 6 && value >> 32 != 0 {
            return Err(Exception::gp(0));
        }
        self.sys.dr[index] = match index {
            6 => value & DR6_WRITABLE | DR6_FIXED,
            7 => value & DR7_WRITABLE | DR7_FIXED,
            _ => value,
        };
        // Watched pages have no entries for data.
        if index != 6 {
            self.mmu.flush_all();
        }
        Ok(())
    }

    /// The register that a number means, and whether it may be touched: DR4 and DR5 are old names of DR6 and DR7.
    fn debug_register(&mut self, number: u8) -> Result<usize, Exception> {
        let index = match number {
            4 | 5 if self.sys.cr4 & CR4_DE != 0 => return Err(Exception::ud()),
            4 | 5 => number + 2,
            0..=7 => number,
            _ => return Err(Exception::ud()),
        };
        self.require_cpl0()?;
        if self.sys.dr[7] & DR7_GD != 0 {
            return Err(self.debug_trap(DR6_BD));
        }
        Ok(usize::from(index))
    }

    /// LGDT.
    pub(crate) fn lgdt(&mut self, table: Table) -> Result<(), Exception> {
        self.sys.gdtr = self.checked_table(table)?;
        Ok(())
    }

    /// LIDT.
    pub(crate) fn lidt(&mut self, table: Table) -> Result<(), Exception> {
        self.sys.idtr = self.checked_table(table)?;
        Ok(())
    }

    fn checked_table(&self, table: Table) -> Result<Table, Exception> {
        self.require_cpl0()?;
        if self.is_64bit() && !is_canonical(table.base) {
            return Err(Exception::gp(0));
        }
        Ok(table)
    }

    /// CLTS.
    pub(crate) fn clts(&mut self) -> Result<(), Exception> {
        self.require_cpl0()?;
        self.sys.cr0 &= !CR0_TS;
        Ok(())
    }

    /// LMSW: sets MP, EM, TS, and PE, which it cannot clear.
    pub(crate) fn lmsw(&mut self, value: u16) -> Result<(), Exception> {
        self.require_cpl0()?;
        let low = u64::from(value & 0xf) | self.sys.cr0 & CR0_PE;
        self.write_cr0(self.sys.cr0 & !0xf | low)
    }

    /// SMSW: CR0, of which the operand takes as much as it holds.
    pub(crate) fn smsw(&self) -> u64 {
        self.sys.cr0
    }

    /// INVLPG; nothing happens for an address that is not canonical.
    pub(crate) fn invlpg(&mut self, linear: u64) -> Result<(), Exception> {
        self.require_cpl0()?;
        let linear = if self.long_mode_active() { linear } else { linear & 0xffff_ffff };
        self.mmu.flush_page(linear);
        Ok(())
    }

    /// WBINVD and INVD: guest memory is coherent.
    pub(crate) fn wbinvd_check(&self) -> Result<(), Exception> {
        self.require_cpl0()
    }

    /// Whether HLT may halt.
    pub(crate) fn hlt_check(&self) -> Result<(), Exception> {
        self.require_cpl0()
    }

    /// CPUID. The APIC bits follow the enable bit of the APIC base.
    pub(crate) fn cpuid(&mut self, world: &mut dyn World) {
        let leaf = self.regs.gpr[0] as u32;
        let [a, b, c, mut d] = self.model.cpuid(leaf, self.regs.gpr[1] as u32);
        if matches!(leaf, 1 | 0x8000_0001) && world.read_msr(APIC_BASE).is_some_and(|base| base & APIC_ENABLED == 0) {
            d &= !CPUID_APIC;
        }
        self.regs.gpr[0] = u64::from(a);
        self.regs.gpr[3] = u64::from(b);
        self.regs.gpr[1] = u64::from(c);
        self.regs.gpr[2] = u64::from(d);
    }

    /// VMCALL and VMMCALL. A guest that sees KVM's signature may ask KVM for services without looking twice; there are
    /// none here, and the answers are KVM's own for that (Linux `uapi/linux/kvm_para.h`).
    pub(crate) fn hypercall(&mut self) {
        /// No such service.
        const ENOSYS: i64 = -1000;
        /// Not from user mode.
        const EPERM: i64 = -1;
        let answer = if self.cpl() == 0 { ENOSYS } else { EPERM } as u64;
        self.regs.gpr[0] = if self.is_64bit() { answer } else { answer & 0xffff_ffff };
    }

    /// RDTSC.
    #[inline]
    pub(crate) fn rdtsc(&mut self, world: &mut dyn World) -> Result<(), Exception> {
        if self.sys.cr4 & CR4_TSD != 0 && self.cpl() != 0 {
            return Err(Exception::gp(0));
        }
        let tsc = self.tsc(world);
        self.set_edx_eax(tsc);
        Ok(())
    }

    /// RDTSCP.
    pub(crate) fn rdtscp(&mut self, world: &mut dyn World) -> Result<(), Exception> {
        self.rdtsc(world)?;
        self.regs.gpr[1] = self.sys.tsc_aux & 0xffff_ffff;
        Ok(())
    }

    /// RDPMC: no counter has any number.
    pub(crate) fn rdpmc(&self) -> Result<(), Exception> {
        Err(Exception::gp(0))
    }

    /// SWAPGS.
    pub(crate) fn swapgs(&mut self) -> Result<(), Exception> {
        if !self.is_64bit() {
            return Err(Exception::ud());
        }
        self.require_cpl0()?;
        std::mem::swap(&mut self.sys.kernel_gs_base, &mut self.sys.segments[SegmentName::Gs as usize].base);
        Ok(())
    }

    /// SYSCALL: from 64-bit, compatibility and (as AMD has it) legacy mode.
    pub(crate) fn syscall(&mut self) -> Result<(), Exception> {
        if self.sys.efer & EFER_SCE == 0 || !self.protected_mode() {
            return Err(Exception::ud());
        }
        let selector = (self.sys.star >> 32) as u16;
        if self.long_mode_active() {
            self.regs.gpr[1] = self.regs.rip;
            self.regs.gpr[11] = self.regs.rflags & !FLAG_RF;
            self.regs.rip = if self.is_64bit() { self.sys.lstar } else { self.sys.cstar };
            self.regs.rflags = self.regs.rflags & !(self.sys.sfmask | FLAG_RF) | 2;
            self.load_flat(selector, FLAT_CODE64, 0);
        } else {
            self.regs.gpr[1] = self.regs.rip & 0xffff_ffff;
            self.regs.rip = self.sys.star & 0xffff_ffff;
            self.regs.rflags &= !(FLAG_IF | FLAG_VM | FLAG_RF);
            self.load_flat(selector, FLAT_CODE32, 0);
        }
        Ok(())
    }

    /// SYSRET. Like AMD's it does not look at RCX: an address that is not canonical faults when it is fetched from, at
    /// privilege 3 and on the user's stack.
    pub(crate) fn sysret(&mut self, size: OperandSize) -> Result<(), Exception> {
        if self.sys.efer & EFER_SCE == 0 {
            return Err(Exception::ud());
        }
        if !self.protected_mode() {
            return Err(Exception::gp(0));
        }
        self.require_cpl0()?;
        let selector = (self.sys.star >> 48) as u16;
        if self.is_64bit() {
            self.regs.rflags = self.regs.gpr[11] & SYSRET_FLAGS | 2;
            // A trap flag that comes with the return traps before the first instruction there.
            if self.regs.rflags & FLAG_TF != 0 {
                self.mmu.pending_debug |= DR6_BS;
            }
        } else {
            self.regs.rflags |= FLAG_IF;
        }
        if self.is_64bit() && size == OperandSize::Qword {
            self.regs.rip = self.regs.gpr[1];
            self.load_flat_from(selector.wrapping_add(16), FLAT_CODE64, selector.wrapping_add(8), 3);
        } else {
            self.regs.rip = self.regs.gpr[1] & 0xffff_ffff;
            self.load_flat_from(selector, FLAT_CODE32, selector.wrapping_add(8), 3);
        }
        Ok(())
    }

    /// SYSENTER. AMD's processors have it in legacy mode only.
    pub(crate) fn sysenter(&mut self) -> Result<(), Exception> {
        if self.long_mode_active() {
            return Err(Exception::ud());
        }
        let [selector, rsp, rip] = self.sys.sysenter;
        if !self.protected_mode() || selector & 0xfffc == 0 {
            return Err(Exception::gp(0));
        }
        self.regs.rflags &= !(FLAG_IF | FLAG_VM | FLAG_RF);
        self.regs.gpr[RSP] = rsp & 0xffff_ffff;
        self.regs.rip = rip & 0xffff_ffff;
        self.load_flat(selector as u16, FLAT_CODE32, 0);
        Ok(())
    }

    /// SYSEXIT, likewise.
    pub(crate) fn sysexit(&mut self) -> Result<(), Exception> {
        if self.long_mode_active() {
            return Err(Exception::ud());
        }
        let selector = self.sys.sysenter[0];
        if !self.protected_mode() || selector & 0xfffc == 0 {
            return Err(Exception::gp(0));
        }
        self.require_cpl0()?;
        self.regs.gpr[RSP] = self.regs.gpr[1] & 0xffff_ffff;
        self.regs.rip = self.regs.gpr[2] & 0xffff_ffff;
        self.load_flat((selector as u16).wrapping_add(16), FLAT_CODE32, 3);
        Ok(())
    }

    /// CS from a selector and SS from the next one, flat, at a privilege.
    fn load_flat(&mut self, selector: u16, code: u16, privilege: u16) {
        let selector = selector & 0xfffc;
        self.load_flat_from(selector, code, selector.wrapping_add(8), privilege);
    }

    fn load_flat_from(&mut self, cs: u16, code: u16, ss: u16, privilege: u16) {
        let dpl = if privilege == 3 { DPL3 } else { 0 };
        let flat = |selector: u16, attributes: u16| Segment {
            selector: selector & 0xfffc | privilege,
            base: 0,
            limit: 0xffff_ffff,
            attributes: attributes | dpl,
        };
        self.sys.segments[SegmentName::Cs as usize] = flat(cs, code);
        self.sys.segments[SegmentName::Ss as usize] = flat(ss, FLAT_DATA);
    }

    /// Whether IN, OUT, INS or OUTS of `len` bytes may touch a port: IOPL, or else the bitmap of a 32- or 64-bit TSS.
    pub(crate) fn check_io(&mut self, world: &mut dyn World, port: u16, len: u32) -> Result<(), Exception> {
        if !self.protected_mode() || self.cpl() <= self.iopl() {
            return Ok(());
        }
        let tr = self.sys.tr;
        let limit = u64::from(tr.limit);
        let denied = Exception::gp(0);
        if !tr.present() || !matches!(tr.kind(), TYPE_TSS32 | TYPE_TSS32_BUSY) || limit < 0x67 {
            return Err(denied);
        }
        let map = u64::from(u16::from_le_bytes(self.load(world, tr.base.wrapping_add(0x66), false)?));
        let at = map + u64::from(port >> 3);
        // Two bytes are always read, so the map ends with a byte of ones.
        if at + 1 > limit {
            return Err(denied);
        }
        let bits = u16::from_le_bytes(self.load(world, tr.base.wrapping_add(at), false)?);
        let wanted = (1u16 << len) - 1;
        if bits >> (port & 7) & wanted == 0 { Ok(()) } else { Err(denied) }
    }

    fn iopl(&self) -> u8 {
        (self.regs.rflags >> 12 & 3) as u8
    }

    /// CLI.
    pub(crate) fn cli(&mut self) -> Result<(), Exception> {
        self.check_iopl()?;
        self.regs.rflags &= !FLAG_IF;
        Ok(())
    }

    /// STI: interrupts wait for one more instruction when they were off.
    pub(crate) fn sti(&mut self) -> Result<(), Exception> {
        self.check_iopl()?;
        if self.regs.rflags & FLAG_IF == 0 {
            self.sys.interrupt_shadow = true;
        }
        self.regs.rflags |= FLAG_IF;
        Ok(())
    }

    fn check_iopl(&self) -> Result<(), Exception> {
        if !self.protected_mode() || self.cpl() <= self.iopl() { Ok(()) } else { Err(Exception::gp(0)) }
    }

    /// What PUSHF pushes, to be cut to the operand size: RF and VM read as zero.
    pub(crate) fn pushf_value(&self) -> u64 {
        self.regs.rflags & !(FLAG_RF | FLAG_VM)
    }

    /// POPF: IOPL changes at privilege 0 only, IF where IOPL allows; both silently keep their value otherwise.
    pub(crate) fn popf(&mut self, value: u64, size: OperandSize) -> Result<(), Exception> {
        let (cpl, iopl) = if self.protected_mode() { (self.cpl(), self.iopl()) } else { (0, 0) };
        let mut writable = POPF_FLAGS & size.mask();
        if cpl != 0 {
            writable &= !FLAG_IOPL;
        }
        if cpl > iopl {
            writable &= !FLAG_IF;
        }
        self.regs.rflags = self.regs.rflags & !(writable | FLAG_RF) | value & writable | 2;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
