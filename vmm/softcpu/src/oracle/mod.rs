//! Differential tests of the CPU: random instructions, run by [`Cpu`](crate::Cpu) and by something else.
//!
//! The something else is the host processor for all families, and besides it an emulator (`qemu-x86_64` running this very
//! runner) for the families that native thunks execute, because there the host would be compared with itself. A case is
//! named by seed, family and number, and these three make it again. Cases run as unprivileged 64-bit code at the same
//! addresses on both sides; a mismatch is shrunk to few instructions and simple registers before it is reported.
//!
//! What is in the catalogue follows from iced-x86's tables ([`catalog`]), so nothing implemented escapes by being
//! forgotten; what processors may do differently is masked by [`undefined`], with the reason.

mod catalog;
mod foreign;
mod generate;
mod host;
mod layout;
mod operands;
mod outcome;
mod random;
mod report;
mod soft;
mod undefined;

pub use catalog::Family;
pub use foreign::{ForeignError, answer, judge};
pub use host::HostError;
pub use report::Mismatch;

use crate::{CpuModel, VcpuTopology};
use generate::{Generator, Slot, Start};
use host::Host;
use layout::{BATCH, Memory, RUNS, TAKEN};
use outcome::Outcome;
use soft::Soft;
use std::ops::Range;
use std::sync::Arc;
use undefined::ARITHMETIC;

/// MXCSR.MM.
const MISALIGNED: u32 = 1 << 17;

/// Why a run of cases ended early.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// The two sides disagree.
    #[error("{0}")]
    Mismatch(Box<Mismatch>),
    /// The host cannot run cases.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// Compares cases `range` of a family on the CPU and on the host, in batches; `progress` hears the number of the next
/// case and says whether to go on. Ends at the first mismatch.
pub fn soak(
    seed: u64,
    family: Family,
    range: Range<u64>,
    mut progress: impl FnMut(u64) -> bool,
) -> Result<(), OracleError> {
    let mut pair = Pair::new(seed, family)?;
    for_each_batch(range, |cases| {
        let end = cases.end;
        match pair.batch(cases, |_| false) {
            Some(mismatch) => Err(OracleError::Mismatch(Box::new(mismatch))),
            None => Ok(progress(end)),
        }
    })
}

/// Like [`soak`], but collects mismatches, one for each group of instructions that take part in it, and goes on.
pub fn survey(seed: u64, family: Family, range: Range<u64>) -> Result<Vec<Mismatch>, OracleError> {
    let mut pair = Pair::new(seed, family)?;
    let mut found: Vec<Mismatch> = Vec::new();
    for_each_batch(range, |cases| {
        let mut from = cases.start;
        while let Some(mismatch) = pair.batch(from..cases.end, |shrunk| found.iter().any(|known| known.alike(shrunk))) {
            from = mismatch.case + 1;
            found.push(mismatch);
        }
        Ok::<_, OracleError>(true)
    })?;
    Ok(found)
}

fn for_each_batch<E>(range: Range<u64>, mut work: impl FnMut(Range<u64>) -> Result<bool, E>) -> Result<(), E> {
    let mut next = range.start;
    while next < range.end {
        let end = (next / BATCH + 1).saturating_mul(BATCH).min(range.end);
        if !work(next..end)? {
            break;
        }
        next = end;
    }
    Ok(())
}

/// Number of encodings in a family: what a run draws from.
pub fn encodings(family: Family) -> usize {
    Generator::new(0, family, model().features(), false).encodings()
}

fn model() -> Arc<CpuModel> {
    let named = CpuModel::named("atoll-v2", VcpuTopology::SINGLE);
    Arc::new(named.expect("the model table has this name"))
}

/// Both sides, with the same memory.
struct Pair {
    generator: Generator,
    host: Host,
    soft: Soft,
    /// Contents of memory before each case, with the batch it belongs to.
    pristine: Option<(u64, Memory)>,
}

impl Pair {
    fn new(seed: u64, family: Family) -> Result<Self, HostError> {
        let model = model();
        let generator = Generator::new(seed, family, model.features(), false);
        Ok(Self { generator, host: Host::new()?, soft: Soft::new(model), pristine: None })
    }

    /// Runs `cases`, all of one batch, up to the first mismatch that is not `known`.
    fn batch(&mut self, cases: Range<u64>, known: impl Fn(&Mismatch) -> bool) -> Option<Mismatch> {
        if cases.is_empty() {
            return None;
        }
        let batch = cases.start / BATCH;
        if self.pristine.as_ref().is_none_or(|(of, _)| *of != batch) {
            let memory = self.generator.memory(batch);
            self.host.restore(&memory);
            self.soft.restore(&memory);
            self.pristine = Some((batch, memory));
        }
        let slots: Vec<Slot> =
            (cases.start / RUNS..cases.end.div_ceil(RUNS)).map(|number| self.generator.slot(number * RUNS)).collect();
        self.load(&slots);
        for (slot, number) in slots.iter().zip(cases.start / RUNS..) {
            for (start, case) in slot.runs.iter().zip(number * RUNS..) {
                if cases.contains(&case) && !self.agree(slot, start) {
                    let mismatch = report::shrink(self, slot, start, case);
                    if !known(&mismatch) {
                        return Some(mismatch);
                    }
                    self.load(&slots);
                }
            }
        }
        None
    }

    fn load(&mut self, slots: &[Slot]) {
        self.host.load(slots);
        self.soft.load(slots);
    }

    /// Runs one case on both sides and leaves memory as before.
    fn agree(&mut self, slot: &Slot, start: &Start) -> bool {
        let [host, soft] = self.outcomes(slot, start);
        let memory = host.fault.is_some() && slot.may_store_before_fault() || self.host.memory() == self.soft.memory();
        // A bit of AMD's (misaligned SSE) that the model refuses, as Intel's processors do.
        let more = host.fp.as_ref().is_some_and(|fp| fp.mxcsr & MISALIGNED != 0);
        let same = more || host == soft && memory;
        self.rewind();
        same
    }

    /// Outcomes of both sides, normalised, with memory as they left it.
    fn outcomes(&mut self, slot: &Slot, start: &Start) -> [Outcome; 2] {
        for &(address, value) in &start.patches {
            layout::patch(self.host.memory(), address, value);
            layout::patch(self.soft.memory(), address, value);
        }
        let ends = [slot.address + slot.bytes.len() as u64, slot.address + TAKEN];
        let mut outcomes = [self.host.run(start, ends), self.soft.run(start, ends)];
        for outcome in &mut outcomes {
            outcome.normalise(slot.undefined(start, outcome.rip));
            if let Some(fault) = outcome.fault.as_mut().filter(|_| slot.vague_fault_address()) {
                fault.cr2 = 0;
            }
            let faulted = outcome.fault.is_some();
            if faulted && slot.may_flag_before_fault() {
                outcome.rflags &= !ARITHMETIC;
            }
            if let Some(fp) = outcome.fp.as_mut().filter(|_| faulted && slot.may_rotate_before_fault()) {
                (fp.fsw, fp.ftw, fp.st) = (0, 0, [0; 8]);
            }
            // A dot product stops somewhere on its way when an intermediate result raises an exception.
            let stopped = outcome.fault.is_some_and(|fault| fault.vector == 19) && slot.has_dot_product();
            if let Some(fp) = outcome.fp.as_mut().filter(|_| stopped) {
                fp.mxcsr &= !0x3f;
            }
        }
        outcomes
    }

    fn rewind(&mut self) {
        if let Some((_, pristine)) = &self.pristine {
            for [data, stack] in [self.host.memory(), self.soft.memory()] {
                data.copy_from_slice(&pristine.data[..data.len()]);
                stack.copy_from_slice(&pristine.stack);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// An oracle that is not repeatable, or that mostly faults, judges nothing.
    #[test]
    fn the_host_answers_the_same_twice_and_mostly_without_fault() {
        for family in Family::ALL {
            let generator = Generator::new(7, family, model().features(), false);
            let mut host = Host::new().expect("fixed mappings");
            let memory = generator.memory(0);
            let slots: Vec<Slot> = (0..BATCH / RUNS).map(|number| generator.slot(number * RUNS)).collect();
            host.load(&slots);
            let mut vectors = BTreeMap::new();
            for slot in &slots {
                let ends = [slot.address + slot.bytes.len() as u64, slot.address + TAKEN];
                for start in &slot.runs {
                    let [first, second] = [(); 2].map(|()| {
                        host.restore(&memory);
                        for &(address, value) in &start.patches {
                            layout::patch(host.memory(), address, value);
                        }
                        let mut outcome = host.run(start, ends);
                        outcome.normalise(slot.undefined(start, outcome.rip));
                        outcome
                    });
                    assert_eq!(first, second, "{}{}", report::listing(slot), report::beginning(start));
                    *vectors.entry(first.fault.map(|fault| fault.vector)).or_insert(0u32) += 1;
                }
            }
            assert!(vectors[&None] > BATCH as u32 * 3 / 5, "{family:?}: {vectors:?}");
            for vector in [14, 13] {
                assert!(vectors.contains_key(&Some(vector)), "{family:?} never gives vector {vector}: {vectors:?}");
            }
        }
    }

    /// A CPU that lacks what the generator uses must be caught, and the case shrunk to the instruction at fault.
    #[test]
    fn a_processor_without_an_extension_is_found_out() {
        let lesser = CpuModel::named("atoll-v1", VcpuTopology::SINGLE).expect("the model table has this name");
        let mut pair = Pair {
            generator: Generator::new(3, Family::Vector, model().features(), false),
            host: Host::new().expect("fixed mappings"),
            soft: Soft::new(Arc::new(lesser)),
            pristine: None,
        };
        let mismatch = pair.batch(0..BATCH, |_| false).expect("SSE3 and later are a third of the encodings");
        assert_eq!(mismatch.mnemonics.len(), 1, "{mismatch}");
        assert!(mismatch.to_string().contains("cpu Some(Fault { vector: 6"), "{mismatch}");
        // The numbers in the report make the case again.
        let again = pair.batch(mismatch.case..mismatch.case + 1, |_| false).expect("the same case");
        assert_eq!(again.to_string(), mismatch.to_string());
    }
}
