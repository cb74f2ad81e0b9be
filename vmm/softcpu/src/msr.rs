//! Model-specific registers. The core owns those that are its own state; the rest (local APIC, speculation control, …)
//! belong to the board, and what neither knows raises #GP(0).

use crate::cpu::Cpu;
use crate::mmu::is_canonical;
use crate::state::{Exception, SegmentName};
use crate::walk::{CR0_PG, EFER_LMA, EFER_NXE};
use crate::world::World;

/// EFER.
pub(crate) const EFER_SCE: u64 = 1;
pub(crate) const EFER_LME: u64 = 1 << 8;
/// Automatic IBRS: accepted, and means nothing to a processor that does not speculate.
const EFER_AIBRSE: u64 = 1 << 21;

const TSC: u32 = 0x10;
const KVM_WALL_CLOCK_OLD: u32 = 0x11;
const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
const PATCH_LEVEL: u32 = 0x8b;
const MTRR_CAP: u32 = 0xfe;
const SYSENTER_CS: u32 = 0x174;
/// Machine check: no bank reports anything.
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const DEBUG_CONTROL: u32 = 0x1d9;
const LAST_BRANCH_FIRST: u32 = 0x1db;
const LAST_BRANCH_LAST: u32 = 0x1de;
const MTRR_VARIABLE_FIRST: u32 = 0x200;
const MTRR_VARIABLE_LAST: u32 = 0x20f;
/// The eleven fixed-range MTRRs, in the order of their storage.
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
const PAT: u32 = 0x277;
const MTRR_DEFAULT: u32 = 0x2ff;
const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SFMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const TSC_AUX: u32 = 0xc000_0103;
/// Event selectors and counters, which AMD's processors have without telling: they never count.
const PERF_FIRST: u32 = 0xc001_0000;
const PERF_LAST: u32 = 0xc001_0007;
/// AMD's, as far as kernels read them without being ready for a fault.
const SYSCFG: u32 = 0xc001_0010;
const HWCR: u32 = 0xc001_0015;
const NB_CFG: u32 = 0xc001_001f;
const INT_PENDING: u32 = 0xc001_0055;
const TSEG_ADDR: u32 = 0xc001_0112;
const LS_CFG: u32 = 0xc001_1020;
const DC_CFG: u32 = 0xc001_1022;
const DE_CFG: u32 = 0xc001_1029;
const BU_CFG2: u32 = 0xc001_102a;

/// Write-combining, fixed ranges, eight variable ranges.
const MTRR_CAP_VALUE: u64 = 1 << 10 | 1 << 8 | 8;
/// Level of an AMD microcode patch, as hypervisors report it.
const PATCH_LEVEL_VALUE: u64 = 0x0100_0065;
/// DE_CFG: LFENCE serialises, and this cannot be changed.
const DE_CFG_VALUE: u64 = 2;
/// HWCR bits that kernels set: FFDIS, IGNNE, cache flush filter, McStatusWrEn, and TscFreqSel, which reads as set.
const HWCR_WRITABLE: u64 = 1 << 3 | 1 << 6 | 1 << 8 | 1 << 18;
const HWCR_FIXED: u64 = 1 << 24;

impl Cpu {
    /// RDMSR.
    pub(crate) fn rdmsr(&mut self, world: &mut dyn World) -> Result<(), Exception> {
        self.require_cpl0()?;
        let value = self.read_msr(world, self.regs.gpr[1] as u32)?;
        self.set_edx_eax(value);
        Ok(())
    }

    /// WRMSR.
    pub(crate) fn wrmsr(&mut self, world: &mut dyn World) -> Result<(), Exception> {
        self.require_cpl0()?;
        let value = self.regs.gpr[2] << 32 | self.regs.gpr[0] & 0xffff_ffff;
        self.write_msr(world, self.regs.gpr[1] as u32, value)
    }

    /// The value of an MSR; #GP(0) if there is none.
    pub fn read_msr(&mut self, world: &mut dyn World, msr: u32) -> Result<u64, Exception> {
        let sys = &self.sys;
        Ok(match msr {
            TSC => self.tsc(world),
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => sys.kvm_wall_clock,
            KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => sys.kvm_system_time,
            PATCH_LEVEL => PATCH_LEVEL_VALUE,
            MTRR_CAP => MTRR_CAP_VALUE,
            SYSENTER_CS..=SYSENTER_EIP => sys.sysenter[(msr - SYSENTER_CS) as usize],
            MCG_CAP | MCG_STATUS => 0,
            MISC_ENABLE => sys.stored.misc_enable,
            DEBUG_CONTROL | LAST_BRANCH_FIRST..=LAST_BRANCH_LAST => 0,
            MTRR_VARIABLE_FIRST..=MTRR_VARIABLE_LAST => sys.stored.mtrr_variable[(msr - MTRR_VARIABLE_FIRST) as usize],
            PAT => sys.pat,
            MTRR_DEFAULT => sys.stored.mtrr_default,
            EFER => sys.efer,
            STAR => sys.star,
            LSTAR => sys.lstar,
            CSTAR => sys.cstar,
            SFMASK => sys.sfmask,
            FS_BASE => self.segment(SegmentName::Fs).base,
            GS_BASE => self.segment(SegmentName::Gs).base,
            KERNEL_GS_BASE => sys.kernel_gs_base,
            TSC_AUX => sys.tsc_aux,
            HWCR => sys.stored.hwcr | HWCR_FIXED,
            DE_CFG => DE_CFG_VALUE,
            PERF_FIRST..=PERF_LAST => 0,
            SYSCFG | NB_CFG | INT_PENDING | TSEG_ADDR | LS_CFG | DC_CFG | BU_CFG2 => 0,
            _ => match MTRR_FIXED.iter().position(|fixed| *fixed == msr) {
                Some(index) => sys.stored.mtrr_fixed[index],
                None => world.read_msr(msr).ok_or(Exception::gp(0))?,
            },
        })
    }

    /// Sets an MSR; #GP(0) if there is none or it does not take the value.
    pub fn write_msr(&mut self, world: &mut dyn World, msr: u32, value: u64) -> Result<(), Exception> {
        let check = |ok: bool| if ok { Ok(()) } else { Err(Exception::gp(0)) };
        let canonical = || check(is_canonical(value));
        let beyond_physical = !0u64 << self.model.physical_bits();
        match msr {
            TSC => self.set_tsc(world, value),
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => {
                self.sys.kvm_wall_clock = value;
                self.write_wall_clock(world, value);
            }
            KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => {
                self.sys.kvm_system_time = value;
                self.refresh_clock(world);
            }
            // Nothing counts; no microcode is loaded; DE_CFG says already what a kernel would set; the others have nothing to set.
            PERF_FIRST..=PERF_LAST
            | PATCH_LEVEL
            | DE_CFG
            | SYSCFG
            | NB_CFG
            | INT_PENDING
            | TSEG_ADDR
            | LS_CFG
            | DC_CFG
            | BU_CFG2 => {}
            SYSENTER_CS..=SYSENTER_EIP => {
                canonical()?;
                self.sys.sysenter[(msr - SYSENTER_CS) as usize] = value;
            }
            MISC_ENABLE => self.sys.stored.misc_enable = value,
            DEBUG_CONTROL | MCG_STATUS => check(value == 0)?,
            MTRR_VARIABLE_FIRST..=MTRR_VARIABLE_LAST => {
                // Even numbers are bases with a memory type, odd ones masks with a valid bit.
                let (reserved, type_ok) =
                    if msr & 1 == 0 { (0xf00, is_memory_type(value as u8)) } else { (0x7ff, true) };
                check(value & (beyond_physical | reserved) == 0 && type_ok)?;
                self.sys.stored.mtrr_variable[(msr - MTRR_VARIABLE_FIRST) as usize] = value;
            }
            PAT => {
                // UC- (7) exists here only.
                check(value.to_le_bytes().into_iter().all(|kind| kind == 7 || is_memory_type(kind)))?;
                self.sys.pat = value;
            }
            MTRR_DEFAULT => {
                check(value & !0xcff == 0 && is_memory_type(value as u8))?;
                self.sys.stored.mtrr_default = value;
            }
            EFER => self.write_efer(value)?,
            STAR => self.sys.star = value,
            LSTAR => {
                canonical()?;
                self.sys.lstar = value;
            }
            CSTAR => {
                canonical()?;
                self.sys.cstar = value;
            }
            SFMASK => self.sys.sfmask = value & 0xffff_ffff,
            FS_BASE => {
                canonical()?;
                self.sys.segments[SegmentName::Fs as usize].base = value;
            }
            GS_BASE => {
                canonical()?;
                self.sys.segments[SegmentName::Gs as usize].base = value;
            }
            KERNEL_GS_BASE => {
                canonical()?;
                self.sys.kernel_gs_base = value;
            }
            TSC_AUX => {
                check(value >> 32 == 0)?;
                self.sys.tsc_aux = value;
            }
            HWCR => {
                check(value & !(HWCR_WRITABLE | HWCR_FIXED) == 0)?;
                self.sys.stored.hwcr = value & HWCR_WRITABLE;
            }
            _ => match MTRR_FIXED.iter().position(|fixed| *fixed == msr) {
                Some(index) => {
                    check(value.to_le_bytes().into_iter().all(is_memory_type))?;
                    self.sys.stored.mtrr_fixed[index] = value;
                }
                None => check(world.write_msr(msr, value))?,
            },
        }
        Ok(())
    }

    fn write_efer(&mut self, value: u64) -> Result<(), Exception> {
        let old = self.sys.efer;
        let known = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_AIBRSE;
        let paging = self.sys.cr0 & CR0_PG != 0;
        if value & !known != 0 || paging && (value ^ old) & EFER_LME != 0 {
            return Err(Exception::gp(0));
        }
        // LMA is the processor's own.
        self.sys.efer = value & !EFER_LMA | old & EFER_LMA;
        if (value ^ old) & (EFER_NXE | EFER_LME) != 0 {
            self.mmu.flush_all();
        }
        Ok(())
    }

    /// EDX:EAX = value, as 32-bit register writes.
    pub(crate) fn set_edx_eax(&mut self, value: u64) {
        self.regs.gpr[0] = value & 0xffff_ffff;
        self.regs.gpr[2] = value >> 32;
    }
}

/// Memory types of MTRRs: UC, WC, WT, WP, WB.
fn is_memory_type(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}
