//! SSE instructions that look at MXCSR: which they are, and how they run when the guest's MXCSR is not the default.

use super::ThunkFn;
use crate::state::Regs;
use iced_x86::Mnemonic;

/// All exceptions masked, round to nearest, no DAZ or FTZ.
const DEFAULT: u32 = 0x1f80;
const FLAGS: u32 = 0x3f;
const MASKS: u32 = 0x1f80;
const UNDERFLOW: u32 = 0x10;
/// Invalid, denormal, zero-divide: found before the result is computed.
const BEFORE_COMPUTATION: u32 = 0x07;
const FLUSH_TO_ZERO: u32 = 0x8000;

/// The floating-point elements of a result that may be tiny, for the one case in which masked and unmasked exceptions
/// differ in more than delivery: unmasked underflow is raised for a tiny result even if it is exact.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum ResultShape {
    /// Never tiny: comparisons, minima, conversions to integers, square roots.
    NoTiny,
    /// `lanes` elements of `double` or single precision in this XMM register.
    Elements { xmm: u8, double: bool, lanes: u8 },
}

impl ResultShape {
    pub(super) fn to_bits(self) -> u32 {
        match self {
            Self::NoTiny => 0,
            Self::Elements { xmm, double, lanes } => u32::from(xmm) | u32::from(lanes) << 8 | u32::from(double) << 16,
        }
    }

    fn has_denormal(bits: u32, regs: &Regs) -> bool {
        let (xmm, lanes, double) = (bits & 15, bits >> 8 & 15, bits >> 16 & 1 != 0);
        let value = regs.fp.xmm[xmm as usize];
        (0..lanes).any(|lane| {
            if double {
                f64::from_bits((value >> (64 * lane)) as u64).is_subnormal()
            } else {
                f32::from_bits((value >> (32 * lane)) as u32).is_subnormal()
            }
        })
    }
}

/// How the instruction depends on MXCSR: `None` when it neither reads nor changes it.
pub(crate) fn mxcsr_use(mnemonic: Mnemonic, destination: Option<u8>) -> Option<ResultShape> {
    use Mnemonic as M;
    let elements = |double, lanes| match destination {
        Some(xmm) => ResultShape::Elements { xmm, double, lanes },
        None => ResultShape::NoTiny,
    };
    Some(match mnemonic {
        M::Addps | M::Subps | M::Mulps | M::Divps | M::Addsubps | M::Haddps | M::Hsubps | M::Dpps => elements(false, 4),
        M::Addss | M::Subss | M::Mulss | M::Divss | M::Cvtsd2ss => elements(false, 1),
        M::Cvtpd2ps => elements(false, 2),
        M::Addpd | M::Subpd | M::Mulpd | M::Divpd | M::Addsubpd | M::Haddpd | M::Hsubpd | M::Dppd => elements(true, 2),
        M::Addsd | M::Subsd | M::Mulsd | M::Divsd => elements(true, 1),
        M::Sqrtps | M::Sqrtpd | M::Sqrtss | M::Sqrtsd => ResultShape::NoTiny,
        M::Minps | M::Minpd | M::Minss | M::Minsd => ResultShape::NoTiny,
        M::Maxps | M::Maxpd | M::Maxss | M::Maxsd => ResultShape::NoTiny,
        M::Cmpps | M::Cmppd | M::Cmpss | M::Cmpsd => ResultShape::NoTiny,
        M::Comiss | M::Comisd | M::Ucomiss | M::Ucomisd => ResultShape::NoTiny,
        M::Cvtps2pd | M::Cvtss2sd => ResultShape::NoTiny,
        M::Cvtdq2ps | M::Cvtsi2ss | M::Cvtsi2sd | M::Cvtpi2ps => ResultShape::NoTiny,
        M::Cvtps2dq | M::Cvttps2dq | M::Cvtpd2dq | M::Cvttpd2dq => ResultShape::NoTiny,
        M::Cvtps2pi | M::Cvttps2pi | M::Cvtpd2pi | M::Cvttpd2pi => ResultShape::NoTiny,
        M::Cvtss2si | M::Cvttss2si | M::Cvtsd2si | M::Cvttsd2si => ResultShape::NoTiny,
        M::Roundps | M::Roundpd | M::Roundss | M::Roundsd => ResultShape::NoTiny,
        _ => return None,
    })
}

/// Type of [`run_with_guest_mxcsr`].
pub(super) type SlowFn = unsafe extern "sysv64" fn(*mut Regs, *mut u8, ThunkFn, u32) -> u64;

/// Runs `raw`, the bare instruction between its loads and stores, under a guest MXCSR other than the default; `shape`
/// is [`ResultShape::to_bits`]. Returns 19 (#XM) when it raises an exception that the guest has unmasked.
///
/// Known difference: when unmasked overflow or underflow is raised, silicon sets PE by a rounding without bound on the
/// exponent; here PE says what the masked response would have lost.
///
/// # Safety
/// As for [`ThunkFn`]; `raw` must be such a code sequence of this arena.
pub(super) unsafe extern "sysv64" fn run_with_guest_mxcsr(
    regs: *mut Regs,
    mem: *mut u8,
    raw: ThunkFn,
    shape: u32,
) -> u64 {
    // SAFETY: the caller passes the CPU's registers, to which nobody else refers during the call.
    let regs = unsafe { &mut *regs };
    let guest = regs.fp.mxcsr;
    let mut copy = regs.clone();
    let mut control = (guest & !FLAGS) | MASKS;
    if guest & UNDERFLOW << 7 == 0 {
        // FTZ has no effect while underflow is unmasked.
        control &= !FLUSH_TO_ZERO;
    }
    let mut word = control;
    // SAFETY: `raw` follows the sysv64 convention and touches only `copy` and `mem`; MXCSR is at its default again when
    // the block ends, all else that the call may change is declared.
    unsafe {
        std::arch::asm!(
            "ldmxcsr [r12]",
            "call r14",
            "stmxcsr [r12]",
            "ldmxcsr [r13]",
            inout("rdi") &raw mut copy => _,
            inout("rsi") mem => _,
            in("r12") &raw mut word,
            in("r13") &raw const DEFAULT_WORD,
            in("r14") raw,
            clobber_abi("sysv64"),
        );
    }
    let mut raised = word & FLAGS;
    if guest & UNDERFLOW << 7 == 0 && ResultShape::has_denormal(shape, &copy) {
        raised |= UNDERFLOW;
    }
    let unmasked = !(guest >> 7);
    if raised & unmasked & BEFORE_COMPUTATION != 0 {
        // The result is never computed, so nothing is found out about it.
        raised &= BEFORE_COMPUTATION;
    }
    if raised & unmasked & FLAGS != 0 {
        regs.fp.mxcsr = guest | raised;
        return 19;
    }
    copy.fp.mxcsr = guest | raised;
    *regs = copy;
    0
}

static DEFAULT_WORD: u32 = DEFAULT;
