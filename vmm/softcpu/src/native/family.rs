//! The allow list: which decoded instructions may be encoded anew and run on the host.

use super::Unit;
use iced_x86::{CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind};

/// Why an instruction is not on the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It belongs to no family that runs natively.
    Family,
    /// The host lacks an extension.
    Host,
}

/// The unit that runs `instruction`, if it is on the list and the host has it. Only unprivileged, non-branching,
/// legacy-encoded instructions whose every required extension is named here pass.
pub(super) fn classify(instruction: &Instruction) -> Result<Unit, Refusal> {
    let code = instruction.code();
    if code.encoding() != EncodingKind::Legacy
        || code.flow_control() != FlowControl::Next
        || instruction.is_privileged()
        || instruction.is_invalid()
    {
        return Err(Refusal::Family);
    }
    // Fences, prefetches and hints have no state to load or store: the dispatch loop has them as plain ops.
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Pause
            | Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Sfence
            | Mnemonic::Clflush
            | Mnemonic::Movnti
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
    ) {
        return Err(Refusal::Family);
    }
    let mut x87 = false;
    for feature in instruction.cpuid_features() {
        let present = match feature {
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 => {
                x87 = true;
                true
            }
            CpuidFeature::CMOV | CpuidFeature::MMX | CpuidFeature::SSE | CpuidFeature::SSE2 => true,
            CpuidFeature::SSE3 => is_x86_feature_detected!("sse3"),
            CpuidFeature::SSSE3 => is_x86_feature_detected!("ssse3"),
            CpuidFeature::SSE4_1 => is_x86_feature_detected!("sse4.1"),
            CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
            CpuidFeature::AES => is_x86_feature_detected!("aes"),
            CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
            CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
            CpuidFeature::SHA => is_x86_feature_detected!("sha"),
            _ => return Err(Refusal::Family),
        };
        if !present {
            return Err(Refusal::Host);
        }
    }
    let features = instruction.cpuid_features();
    if x87 {
        return Ok(Unit::X87);
    }
    // CMOVcc is integer work unless it is FCMOVcc.
    if features.is_empty() || features == [CpuidFeature::CMOV] {
        return Err(Refusal::Family);
    }
    if matches!(instruction.mnemonic(), Mnemonic::Popcnt | Mnemonic::Crc32) {
        return Ok(Unit::Integer);
    }
    // EMMS manages the x87 stack and has no operand.
    if instruction.mnemonic() == Mnemonic::Emms {
        return Ok(Unit::Mmx);
    }
    let mut registers = (0..instruction.op_count())
        .filter(|&operand| instruction.op_kind(operand) == OpKind::Register)
        .map(|operand| instruction.op_register(operand));
    let mmx_only = registers.clone().any(|register| register.is_mm()) && !registers.any(|register| register.is_xmm());
    Ok(if mmx_only { Unit::Mmx } else { Unit::Sse })
}
