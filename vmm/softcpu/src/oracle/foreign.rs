//! An oracle in another process: this runner, executed by an emulator of unprivileged x86-64 programs.
//!
//! Native thunks run on the host's units, so the host cannot judge them alone. `answer` runs cases on whatever the
//! process believes to be its processor and writes the outcomes; started under `qemu-x86_64` that is QEMU's own
//! implementation, down to its soft-float. `judge` reads them beside the software CPU's.

use super::generate::{Generator, Slot, Start};
use super::host::Host;
use super::layout::{self, BATCH, RUNS, TAKEN};
use super::outcome::Outcome;
use super::report::{Mismatch, beginning, listing};
use super::soft::Soft;
use super::{Family, HostError, for_each_batch, model};
use crate::FpState;
use crate::native::sse::{ResultShape, mxcsr_use};
use iced_x86::{Instruction, Mnemonic, OpKind};
use std::io::{self, Read, Write};
use std::ops::Range;

/// Why outcomes could not be written or compared.
#[derive(Debug, thiserror::Error)]
pub enum ForeignError {
    /// The two sides disagree.
    #[error("{0}")]
    Mismatch(Box<Mismatch>),
    /// The host cannot run cases.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The other process is gone or does not speak this protocol.
    #[error("the other side's answers end early: {0}")]
    Pipe(#[from] io::Error),
}

// An answer in words: registers, RIP, RFLAGS, vector of a fault plus one, x87 control, status and tags, MXCSR, x87
// registers, XMM registers, hash of memory.
const FAULTED: usize = 18;
const X87: usize = 19;
const MXCSR: usize = 20;
const ST: usize = 21;
const XMM: usize = ST + 16;
const HASH: usize = XMM + 32;
const WORDS: usize = HASH + 1;

/// Runs cases and writes their outcomes to `out`.
pub fn answer(seed: u64, family: Family, range: Range<u64>, out: &mut impl Write) -> Result<(), ForeignError> {
    let generator = Generator::new(seed, family, model().features(), true);
    let mut host = Host::new()?;
    for_each_batch(range, |cases| {
        let memory = generator.memory(cases.start / BATCH);
        let slots = slots(&generator, &cases);
        host.restore(&memory);
        host.load(&slots);
        for (slot, start) in runs(&slots, &cases) {
            for &(address, value) in &start.patches {
                layout::patch(host.memory(), address, value);
            }
            let mut outcome = host.run(start, ends(slot));
            outcome.normalise(slot.undefined(start, outcome.rip));
            let hash = hash(host.memory());
            for word in words(&outcome, hash) {
                out.write_all(&word.to_le_bytes())?;
            }
            let [data, stack] = host.memory();
            data.copy_from_slice(&memory.data[..data.len()]);
            stack.copy_from_slice(&memory.stack);
        }
        Ok::<_, ForeignError>(true)
    })?;
    Ok(out.flush()?)
}

/// Compares the software CPU with outcomes that [`answer`] wrote for the same arguments; tells `found` of each mismatch,
/// which says whether to go on. Cases that fault are left out: emulators of programs are loose about those. Returns the
/// number of cases compared.
pub fn judge(
    seed: u64,
    family: Family,
    range: Range<u64>,
    input: &mut impl Read,
    mut found: impl FnMut(Mismatch) -> bool,
) -> Result<u64, ForeignError> {
    let model = model();
    let generator = Generator::new(seed, family, model.features(), true);
    let mut soft = Soft::new(model);
    let mut compared = 0;
    for_each_batch(range, |cases| {
        let memory = generator.memory(cases.start / BATCH);
        let slots = slots(&generator, &cases);
        soft.restore(&memory);
        soft.load(&slots);
        for ((slot, start), case) in runs(&slots, &cases).zip(cases.clone()) {
            let mut bytes = [0; 8 * WORDS];
            input.read_exact(&mut bytes)?;
            let theirs = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
            let theirs: Vec<u64> = theirs.collect();
            for &(address, value) in &start.patches {
                layout::patch(soft.memory(), address, value);
            }
            let mut outcome = soft.run(start, ends(slot));
            outcome.normalise(slot.undefined(start, outcome.rip));
            let ours = words(&outcome, hash(soft.memory()));
            let [data, stack] = soft.memory();
            data.copy_from_slice(&memory.data[..data.len()]);
            stack.copy_from_slice(&memory.stack);
            if theirs[FAULTED] != 0 || outcome.fault.is_some() || not_emulated(slot, start, &ours) {
                continue;
            }
            compared += 1;
            if level(slot, start, &theirs) != level(slot, start, &ours) {
                let memory = theirs[HASH] == ours[HASH];
                let mismatch = describe(&generator, slot, start, case, (&theirs, &outcome, memory));
                if !found(mismatch) {
                    return Ok(false);
                }
            }
        }
        Ok::<_, ForeignError>(true)
    })?;
    Ok(compared)
}

/// Whether the case meets something that QEMU 7.2 does not do.
fn not_emulated(slot: &Slot, start: &Start, ours: &[u64]) -> bool {
    use Mnemonic as M;
    // Overflow and underflow of the x87 stack.
    if ours[X87] >> 16 & 0x40 != 0 {
        return true;
    }
    let Some(fp) = &start.fp else { return false };
    slot.instructions.iter().any(|instruction| match instruction.mnemonic() {
        // Denormals as zeros.
        M::Minps | M::Minpd | M::Minss | M::Minsd | M::Maxps | M::Maxpd | M::Maxss | M::Maxsd => fp.mxcsr & 0x40 != 0,
        // These ignore the precision control.
        M::Fprem | M::Fprem1 | M::Frndint | M::Fscale | M::Fxtract => fp.fcw & 0x300 != 0x300,
        // It rounds operands from memory to the precision control.
        _ => is_x87(instruction) && instruction.memory_size().size() != 0 && fp.fcw & 0x300 != 0x300,
    })
}

/// Both halves of an XMM register, or all four quarters, with one NaN for all.
fn without_payload(word: u64, double: bool) -> u64 {
    if double {
        return if f64::from_bits(word).is_nan() { f64::NAN.to_bits() } else { word };
    }
    let single = |bits: u32| if f32::from_bits(bits).is_nan() { f32::NAN.to_bits() } else { bits };
    u64::from(single(word as u32)) | u64::from(single((word >> 32) as u32)) << 32
}

/// Whether one of the two operands at the top of the x87 stack is zero, denormal, infinite or not a number.
fn special(start: &Start) -> bool {
    start.fp.as_ref().is_some_and(|fp| fp.st[..2].iter().any(|value| matches!(value >> 64 & 0x7fff, 0 | 0x7fff)))
}

fn is_x87(instruction: &Instruction) -> bool {
    instruction.cpuid_features().iter().any(|feature| {
        use iced_x86::CpuidFeature as F;
        matches!(feature, F::FPU | F::FPU287 | F::FPU387)
    })
}

/// An answer without what QEMU 7.2 does not model.
fn level(slot: &Slot, start: &Start, answer: &[u64]) -> Vec<u64> {
    use Mnemonic as M;
    let mut answer = answer.to_vec();
    // The denormal-operand flags, and C1.
    answer[MXCSR] &= !0x2;
    answer[X87] &= !(0x202 << 16);
    for instruction in &slot.instructions {
        match instruction.mnemonic() {
            // OF, SF and AF become zero.
            M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip => answer[17] &= !0x890,
            // Condition codes stay.
            M::Fincstp | M::Fdecstp | M::Fsqrt => answer[X87] &= !(0x4700 << 16),
            // Quotient bits: QEMU's are zero where there is no quotient, and often after FPREM1.
            M::Fprem1 => answer[X87] &= !(0x4700 << 16),
            M::Fprem if special(start) => answer[X87] &= !(0x4700 << 16),
            // A store into an empty register fills it.
            M::Fst | M::Fstp if instruction.op0_kind() == OpKind::Register => answer[X87] &= 0xffff_ffff,
            // Bits 64 to 79 of the register become ones.
            M::Movdq2q => (0..8).for_each(|n| answer[ST + 2 * n + 1] = 0),
            _ => {}
        }
        // Of two NaN operands SSE takes the first and the x87 the one with the larger significand; QEMU always follows
        // the x87.
        if let Some(ResultShape::Elements { xmm, double, .. }) = mxcsr_use(instruction.mnemonic(), Some(0)) {
            debug_assert_eq!(xmm, 0);
            answer[XMM..HASH].iter_mut().for_each(|word| *word = without_payload(*word, double));
        }
    }
    answer
}

fn slots(generator: &Generator, cases: &Range<u64>) -> Vec<Slot> {
    (cases.start / RUNS..cases.end.div_ceil(RUNS)).map(|number| generator.slot(number * RUNS)).collect()
}

/// Slots with their starts, for cases that begin at the first run of a slot.
fn runs<'a>(slots: &'a [Slot], cases: &Range<u64>) -> impl Iterator<Item = (&'a Slot, &'a Start)> + use<'a> {
    let count = (cases.end - cases.start) as usize;
    let skipped = (cases.start % RUNS) as usize;
    slots.iter().flat_map(|slot| slot.runs.iter().map(move |start| (slot, start))).skip(skipped).take(count)
}

fn ends(slot: &Slot) -> [u64; 2] {
    [slot.address + slot.bytes.len() as u64, slot.address + TAKEN]
}

fn hash(memory: [&mut [u8]; 2]) -> u64 {
    let words = memory.into_iter().flat_map(|part| part.chunks_exact(8));
    words.fold(0, |hash: u64, word| {
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

fn words(outcome: &Outcome, hash: u64) -> Vec<u64> {
    let mut words = Vec::with_capacity(WORDS);
    words.extend(outcome.gpr);
    words.extend([outcome.rip, outcome.rflags, outcome.fault.map_or(0, |fault| u64::from(fault.vector) + 1)]);
    let default = FpState::default();
    let fp = outcome.fp.as_deref().unwrap_or(&default);
    words.push(u64::from(fp.fcw) | u64::from(fp.fsw) << 16 | u64::from(fp.ftw) << 32);
    words.push(fp.mxcsr.into());
    words.extend(fp.st.iter().chain(&fp.xmm).flat_map(|value| [*value as u64, (*value >> 64) as u64]));
    words.push(hash);
    words
}

fn describe(
    generator: &Generator,
    slot: &Slot,
    start: &Start,
    case: u64,
    (theirs, outcome, same_memory): (&[u64], &Outcome, bool),
) -> Mismatch {
    let mut other = outcome.clone();
    other.gpr.copy_from_slice(&theirs[..16]);
    (other.rip, other.rflags) = (theirs[16], theirs[17]);
    if let Some(fp) = &mut other.fp {
        let wide = |at: usize| u128::from(theirs[at]) | u128::from(theirs[at + 1]) << 64;
        fp.fcw = theirs[X87] as u16;
        fp.fsw = (theirs[X87] >> 16) as u16;
        fp.ftw = (theirs[X87] >> 32) as u8;
        fp.mxcsr = theirs[MXCSR] as u32;
        for (n, st) in fp.st.iter_mut().enumerate() {
            *st = wide(ST + 2 * n);
        }
        for (n, xmm) in fp.xmm.iter_mut().enumerate() {
            *xmm = wide(XMM + 2 * n);
        }
    }
    let mut text = listing(slot);
    text.push_str(&beginning(start));
    text.push_str(&other.difference(outcome, ["emulator", "cpu"]));
    if !same_memory {
        text.push_str("  memory differs\n");
    }
    let mnemonics: Vec<Mnemonic> = slot.instructions.iter().map(|instruction| instruction.mnemonic()).collect();
    Mismatch { seed: generator.seed(), family: generator.family(), case, text, mnemonics }
}
