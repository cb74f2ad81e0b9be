//! What there is to test: every encoding of iced-x86's table that belongs to a family, so that a new instruction of the
//! CPU model joins by its feature alone. What is left out is named here with its reason.

use crate::Features;
use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind};

/// A family of instructions with an oracle of its own kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// General registers, memory, flags, branches, strings: the host is the oracle.
    Integer,
    /// SSE and later, and what they share with MMX: run by native thunks, so an emulator is the oracle, besides the host
    /// (which finds mistakes of the thunks' loads and stores).
    Vector,
    /// x87, likewise.
    X87,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Integer, Self::Vector, Self::X87];

    /// Whether cases of the family have x87 and SSE state.
    pub(super) fn floating(self) -> bool {
        self != Self::Integer
    }

    /// Name for command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Integer => "integer",
            Self::Vector => "vector",
            Self::X87 => "x87",
        }
    }

    /// The family of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }
}

/// All encodings of a family that a CPU model with `features` has in 64-bit mode.
pub(super) fn encodings(family: Family, features: Features) -> Vec<Code> {
    Code::values().filter(|&code| belongs(code, family, features)).collect()
}

fn belongs(code: Code, family: Family, features: Features) -> bool {
    let op = code.op_code();
    if !op.is_instruction()
        || op.encoding() != EncodingKind::Legacy
        || !op.mode64()
        || op.fwait()
        || op.is_privileged()
        || op.must_be_cpl0()
        || op.is_input_output()
        || left_out(code.mnemonic())
        || op.op_kinds().iter().any(|&kind| operand_left_out(code, kind))
    {
        return false;
    }
    // Prefetches by their bytes, and with a register nothing at all or, on newer AMD processors, an invalid instruction.
    if matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    ) {
        return false;
    }
    // Of memory, Intel's processors read two bytes and AMD's four.
    if code == Code::Movsxd_r16_rm16 {
        return false;
    }
    // The image holds which bits of MXCSR there are, and hosts with misaligned SSE have one more than the model.
    if matches!(code.mnemonic(), Mnemonic::Fxsave | Mnemonic::Fxsave64) && has_misaligned_sse() {
        return false;
    }
    // Processors disagree about an operand-size prefix on near branches in 64-bit mode.
    if op.operand_size() == 16 && matches!(op.op0_kind(), OpCodeOperandKind::br64_1 | OpCodeOperandKind::br64_4) {
        return false;
    }
    if code.flow_control() != iced_x86::FlowControl::Next && op.operand_size() == 16 {
        return false;
    }
    family_of(code, features) == Some(family)
}

/// Whether the host has AMD's misaligned SSE mode (CPUID Fn8000_0001, ECX bit 7).
fn has_misaligned_sse() -> bool {
    const MISALIGNED: u32 = 1 << 7;
    std::arch::x86_64::__cpuid(0x8000_0000).eax > 0x8000_0000
        && std::arch::x86_64::__cpuid(0x8000_0001).ecx & MISALIGNED != 0
}

/// Family by the CPUID features that the encoding needs; `None` if the model lacks one.
fn family_of(code: Code, features: Features) -> Option<Family> {
    use CpuidFeature as F;
    let mut family = Family::Integer;
    for feature in code.cpuid_features() {
        match feature {
            F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::CMOV => {}
            F::CX8 | F::CMPXCHG16B | F::MULTIBYTENOP => {}
            F::FPU | F::FPU287 | F::FPU387 => family = Family::X87,
            F::MMX | F::SSE | F::SSE2 | F::FXSR if family == Family::Integer => family = Family::Vector,
            F::MMX | F::SSE | F::SSE2 => {}
            F::SSE3 if features.contains(Features::SSE3) => {
                if family == Family::Integer {
                    family = Family::Vector;
                }
            }
            F::SSSE3 if features.contains(Features::SSSE3) => family = Family::Vector,
            F::SSE4_1 if features.contains(Features::SSE4_1) => family = Family::Vector,
            F::SSE4_2 if features.contains(Features::SSE4_2) => family = Family::Vector,
            F::POPCNT if features.contains(Features::POPCNT) => family = Family::Vector,
            _ => return None,
        }
    }
    Some(family)
}

fn left_out(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    match mnemonic {
        // Enter the kernel, or mean something else to it than to a bare processor.
        M::Int | M::Int1 | M::Int3 | M::Into | M::Syscall | M::Sysenter | M::Sysexit | M::Sysret | M::Sysretq => true,
        M::Iret | M::Iretd | M::Iretq | M::Retf | M::Hlt | M::Cli | M::Sti => true,
        // Depend on the host kernel's descriptor tables or its leave to read them.
        M::Lar | M::Lsl | M::Verr | M::Verw | M::Sldt | M::Str | M::Smsw | M::Sgdt | M::Sidt => true,
        M::Lss | M::Lfs | M::Lgs | M::Lds | M::Les => true,
        // Another answer each time, or from another model.
        M::Rdtsc | M::Rdtscp | M::Cpuid | M::Rdpmc | M::Loadall => true,
        // May set TF or AC: cases have them through a template that clears those bits first.
        M::Popf | M::Popfd | M::Popfq => true,
        // The model has no BMI, so the prefix is ignored; hosts have it.
        M::Tzcnt | M::Lzcnt => true,
        // Encodings that processors treat as reserved or that differ between makers.
        M::Ud0 | M::Ud1 | M::Umov | M::Ibts | M::Xbts | M::Montmul | M::Salc => true,
        // Waits for an interrupt, or for nothing.
        M::Monitor | M::Mwait => true,
        _ => false,
    }
}

fn operand_left_out(code: Code, kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    match kind {
        K::farbr2_2 | K::farbr4_2 | K::br16_1 | K::br16_2 | K::br32_1 | K::br32_4 => true,
        K::cr_reg | K::dr_reg | K::tr_reg | K::xbegin_2 | K::xbegin_4 | K::brdisp_2 | K::brdisp_4 => true,
        // Loading a segment register changes the host thread; reading one is fine.
        K::seg_reg => code.op_code().op0_kind() == K::seg_reg,
        K::es | K::ds | K::cs | K::ss => true,
        K::fs | K::gs => code.mnemonic() == Mnemonic::Pop,
        // Far pointers in memory.
        K::mem => {
            matches!(code.mnemonic(), Mnemonic::Call | Mnemonic::Jmp)
                && code.op_code().memory_size() != iced_x86::MemorySize::QwordOffset
        }
        _ => false,
    }
}

/// Vector and x87 instructions that are compared with the host only: processors and emulators choose their result within
/// bounds, or the emulator at hand (QEMU 7.2) is known to get them wrong.
pub(super) fn emulators_differ(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    match mnemonic {
        // Approximations with a bounded error.
        M::Rcpps | M::Rcpss | M::Rsqrtps | M::Rsqrtss => true,
        // Transcendental functions: correct to the last place but one.
        M::Fsin | M::Fcos | M::Fsincos | M::Fptan | M::Fpatan | M::F2xm1 | M::Fyl2x | M::Fyl2xp1 => true,
        // State images: reserved bits, pointers and the summary bits are the implementation's. They are plain code here,
        // not thunks, so the host is an oracle of its own.
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => true,
        M::Fnsave | M::Frstor | M::Fnstenv | M::Fldenv => true,
        // REX.W makes the lengths 64 bits wide, which QEMU overlooks.
        M::Pcmpestri64 | M::Pcmpestrm64 => true,
        // From memory, QEMU enters MMX state and processors do not.
        M::Cvtpi2ps | M::Cvtpi2pd => true,
        // An undocumented alias.
        M::Fstpnce => true,
        _ => false,
    }
}
