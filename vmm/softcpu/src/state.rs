//! Architectural state of one logical processor, apart from how it is executed.

/// Index of a general purpose register in [`Regs::gpr`]: the hardware encoding (RAX 0, RCX 1, RDX 2, RBX 3, RSP 4,
/// RBP 5, RSI 6, RDI 7, R8 to R15).
pub type GprIndex = usize;

/// Registers that unprivileged code sees. `repr(C)`: native thunks address the fields by offset.
#[repr(C, align(64))]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Regs {
    /// General purpose registers in hardware order.
    pub gpr: [u64; 16],
    /// Address of the next instruction (without the CS base).
    pub rip: u64,
    /// RFLAGS. While code runs, the six arithmetic flags may live elsewhere (lazy); they are folded in before anyone
    /// outside the dispatch loop looks.
    pub rflags: u64,
    /// Always zero: what an effective address without base or index adds.
    pub(crate) zero: u64,
    /// x87, MMX and SSE state.
    pub fp: FpState,
}

/// x87, MMX and SSE state in the layout of FXSAVE64 (SDM vol. 1, 10.5.1), so that a native thunk may FXRSTOR it.
#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FpState {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// Abridged tag word: one bit a register, 1 = valid.
    pub ftw: u8,
    /// Reserved by the layout.
    pub reserved0: u8,
    /// Last opcode.
    pub fop: u16,
    /// Last instruction pointer.
    pub fip: u64,
    /// Last data pointer.
    pub fdp: u64,
    /// SSE control and status.
    pub mxcsr: u32,
    /// Writable bits of `mxcsr`.
    pub mxcsr_mask: u32,
    /// ST(0) to ST(7), ten bytes used of each sixteen; the low eight are MM0 to MM7.
    pub st: [u128; 8],
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
    /// Reserved by the layout.
    pub reserved1: [u64; 12],
}

impl Default for FpState {
    /// The state after FNINIT and with MXCSR at its reset value.
    fn default() -> Self {
        Self {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            reserved0: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: 0x1f80,
            mxcsr_mask: 0xffff,
            st: [0; 8],
            xmm: [0; 16],
            reserved1: [0; 12],
        }
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base.
    pub base: u64,
    /// Limit in bytes, already scaled by the granularity bit.
    pub limit: u32,
    /// Bits 8 to 23 of the descriptor's high word, shifted to bit 0: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14,
    /// G 15 (bits 8-11 are zero). Zero P marks an unusable segment.
    pub attributes: u16,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Linear address of the first byte.
    pub base: u64,
    /// Offset of the last byte.
    pub limit: u16,
}

/// Index into [`System::segments`], in the encoding of ModRM.reg for MOV Sreg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SegmentName {
    /// Extra.
    Es = 0,
    /// Code.
    Cs = 1,
    /// Stack.
    Ss = 2,
    /// Data.
    Ds = 3,
    /// FS.
    Fs = 4,
    /// GS.
    Gs = 5,
}

/// MSRs that are kept for the guest and mean nothing to execution.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredMsrs {
    /// MTRRdefType. Firmware would leave write-back, enabled (0xc06): a loader without firmware writes that.
    pub mtrr_default: u64,
    /// Fixed-range MTRRs by number.
    pub mtrr_fixed: [u64; 11],
    /// PHYSBASE and PHYSMASK of the eight variable ranges, in turn.
    pub mtrr_variable: [u64; 16],
    /// MISC_ENABLE.
    pub misc_enable: u64,
    /// HWCR.
    pub hwcr: u64,
}

/// Privileged state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// ES, CS, SS, DS, FS, GS: see [`SegmentName`].
    pub segments: [Segment; 6],
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: Table,
    /// Interrupt descriptor table.
    pub idtr: Table,
    /// CR0.
    pub cr0: u64,
    /// CR2: last page fault's linear address.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// DR0-3, DR6, DR7 at their own numbers.
    pub dr: [u64; 8],
    /// EFER.
    pub efer: u64,
    /// STAR.
    pub star: u64,
    /// LSTAR.
    pub lstar: u64,
    /// CSTAR.
    pub cstar: u64,
    /// SFMASK.
    pub sfmask: u64,
    /// KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// SYSENTER_CS, _ESP, _EIP.
    pub sysenter: [u64; 3],
    /// TSC_AUX.
    pub tsc_aux: u64,
    /// PAT.
    pub pat: u64,
    /// Offset added to the time source to give the guest's TSC.
    pub tsc_offset: u64,
    /// KVM clock system-time MSR (0x4b56_4d01).
    pub kvm_system_time: u64,
    /// KVM wall-clock MSR (0x4b56_4d00).
    pub kvm_wall_clock: u64,
    /// MSRs that are kept for the guest and mean nothing to execution.
    pub stored: StoredMsrs,
    /// One-instruction shadow after STI, MOV SS or POP SS: no interrupt is taken while set.
    pub interrupt_shadow: bool,
}

/// A fault, trap or abort that the CPU delivers through the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector 0 to 31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error: Option<u32>,
    /// Faulting linear address: written to CR2 when a #PF is delivered.
    pub cr2: u64,
}

impl Exception {
    /// #DE, #DB, #BP, #OF, #BR, #UD, #NM, #MF, #XM and others without error code.
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error: None, cr2: 0 }
    }
    /// An exception with an error code other than #PF.
    pub const fn with_error(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), cr2: 0 }
    }
    /// #GP(error).
    pub const fn gp(error: u32) -> Self {
        Self::with_error(13, error)
    }
    /// #UD.
    pub const fn ud() -> Self {
        Self::plain(6)
    }
    /// #PF at `cr2` with the page-fault error code (SDM vol. 3, 4.7).
    pub const fn pf(cr2: u64, error: u32) -> Self {
        Self { vector: 14, error: Some(error), cr2 }
    }
}
