//! Which instructions the CPU model has: the rest are #UD.

use iced_x86::{Code, CpuidFeature};

use crate::cpuid::{CpuModel, Features};

/// What the decoder wants to know of each instruction form.
#[derive(Clone)]
pub(crate) struct Offered {
    allowed: Vec<bool>,
    native: Vec<bool>,
}

impl Offered {
    /// The instructions of a model.
    pub(crate) fn new(model: &CpuModel) -> Self {
        let features = model.features();
        let allowed = Code::values()
            .map(|code| {
                is_hint(code)
                    || is_hypercall(code)
                    || (code != Code::INVALID && code.cpuid_features().iter().all(|&f| has(f, features)))
            })
            .collect();
        let native = Code::values().map(|code| code.cpuid_features().iter().any(|&f| is_unit(f))).collect();
        Self { allowed, native }
    }
    /// Whether a form may have a thunk: the others need not be looked up.
    pub(crate) fn is_native(&self, code: Code) -> bool {
        self.native.get(code as usize).copied().unwrap_or(false)
    }
    /// Whether the model has this form.
    pub(crate) fn allows(&self, code: Code) -> bool {
        self.allowed.get(code as usize).copied().unwrap_or(false)
    }
}

/// The way to the hypervisor whose signature CPUID shows; both vendors' forms, as KVM has it.
fn is_hypercall(code: Code) -> bool {
    matches!(code, Code::Vmcall | Code::Vmmcall)
}

/// Forms that processors without their extension execute as no-operations.
fn is_hint(code: Code) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        code.mnemonic(),
        M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
            | M::Reservednop
            | M::Nop
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Cldemote
    )
}

fn has(feature: CpuidFeature, features: Features) -> bool {
    use CpuidFeature as F;
    match feature {
        F::INTEL8086
        | F::INTEL8086_ONLY
        | F::INTEL186
        | F::INTEL286
        | F::INTEL286_ONLY
        | F::INTEL386
        | F::INTEL386_ONLY
        | F::INTEL486
        | F::X64
        | F::CLFSH
        | F::CMOV
        | F::CMPXCHG16B
        | F::CPUID
        | F::CX8
        | F::FPU
        | F::FPU287
        | F::FPU387
        | F::FXSR
        | F::MMX
        | F::MSR
        | F::MULTIBYTENOP
        | F::PAUSE
        | F::RDPMC
        | F::RDTSCP
        | F::SEP
        | F::SSE
        | F::SSE2
        | F::SYSCALL
        | F::TSC => true,
        F::SSE3 => features.contains(Features::SSE3),
        F::SSSE3 => features.contains(Features::SSSE3),
        F::SSE4_1 => features.contains(Features::SSE4_1),
        F::SSE4_2 => features.contains(Features::SSE4_2),
        F::POPCNT => features.contains(Features::POPCNT),
        _ => false,
    }
}

/// Extensions whose instructions run natively.
fn is_unit(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::FPU
            | F::FPU287
            | F::FPU387
            | F::FXSR
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::POPCNT
    )
}
