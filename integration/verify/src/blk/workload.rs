//! What a load does: operation `n` is a function of the seed and of `n`, and of nothing that happens.

use serde::{Deserialize, Serialize};

use super::sector::{SECTOR, Stamp, stamp};
use crate::dice::{Dice, mix};

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads sectors.
    Read,
    /// Writes sectors.
    Write,
    /// Makes durable what was acknowledged before it was invoked.
    Flush,
    /// Forgets sectors: their contents do not matter until they are written again.
    Discard,
    /// Makes sectors zero.
    Zeroes,
}

/// One operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// Its number: its name in sectors and in the history.
    pub id: u64,
    /// What it does.
    pub kind: Kind,
    /// First sector.
    pub lba: u64,
    /// Sectors; 0 for a flush.
    pub sectors: u32,
    /// Who does it.
    pub writer: u16,
}

/// How often each kind comes, in parts of their sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mix {
    /// Reads.
    pub read: u32,
    /// Writes.
    pub write: u32,
    /// Flushes.
    pub flush: u32,
    /// Discards.
    pub discard: u32,
    /// Zeroes.
    pub zeroes: u32,
}

impl Mix {
    /// Reads, writes and some flushes: what every disk can do.
    pub const PLAIN: Self = Self { read: 45, write: 50, flush: 5, discard: 0, zeroes: 0 };
    /// All five.
    pub const FULL: Self = Self { read: 45, write: 44, flush: 5, discard: 2, zeroes: 4 };
}

/// A load on one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Everything follows from it.
    pub seed: u64,
    /// First sector that may be used.
    pub first_lba: u64,
    /// Sectors that may be used, at least `sectors_max`.
    pub sectors: u64,
    /// Most sectors of one operation.
    pub sectors_max: u32,
    /// Writers, each with a place of its own in the histories.
    pub writers: u16,
    /// Kinds.
    pub mix: Mix,
}

impl Workload {
    /// A small region, so that operations meet: 1 MiB, up to 16 KiB each, four writers.
    pub fn new(seed: u64) -> Self {
        Self { seed, first_lba: 0, sectors: 2048, sectors_max: 32, writers: 4, mix: Mix::PLAIN }
    }

    /// Names the run in its sectors.
    pub fn run(&self) -> u64 {
        mix(self.seed, 0x0072_756e)
    }

    /// Operation `id`.
    pub fn operation(&self, id: u64) -> Operation {
        let mut dice = Dice::new(mix(self.seed, id));
        let Mix { read, write, flush, discard, zeroes } = self.mix;
        let mut roll = dice.below((read + write + flush + discard + zeroes).into());
        let mut is = |parts: u32| {
            let hit = roll < u64::from(parts);
            roll = roll.saturating_sub(parts.into());
            hit
        };
        let kind = if is(read) {
            Kind::Read
        } else if is(write) {
            Kind::Write
        } else if is(flush) {
            Kind::Flush
        } else if is(discard) {
            Kind::Discard
        } else {
            Kind::Zeroes
        };
        let writer = dice.below(self.writers.into()) as u16;
        if kind == Kind::Flush {
            return Operation { id, kind, lba: 0, sectors: 0, writer };
        }
        let most = u64::from(self.sectors_max.max(1)).min(self.sectors.max(1));
        // Half of them are pages, which is what file systems do.
        let page = most >= 8 && dice.below(2) == 0;
        let (unit, most) = if page { (8, most / 8) } else { (1, most) };
        let sectors = (1 + dice.below(most)) * unit;
        let places = (self.sectors - sectors) / unit + 1;
        // Every other one goes where the others go: to a sixteenth of the region.
        let hot = dice.below(2) == 0;
        let place = dice.below(if hot { places.div_ceil(16) } else { places });
        Operation { id, kind, lba: self.first_lba + place * unit, sectors: sectors as u32, writer }
    }

    /// The reads that see every sector of the region, with ids from `id` on.
    pub fn sweep(&self, id: u64) -> impl Iterator<Item = Operation> + use<> {
        let (first, end) = (self.first_lba, self.first_lba + self.sectors);
        let most = u64::from(self.sectors_max.max(1));
        (first..end).step_by(most as usize).zip(id..).map(move |(lba, id)| {
            let sectors = most.min(end - lba) as u32;
            Operation { id, kind: Kind::Read, lba, sectors, writer: 0 }
        })
    }

    /// Fills a buffer with what a write writes.
    pub fn fill(&self, operation: &Operation, epoch: u32, buffer: &mut [u8]) {
        let sectors = buffer.chunks_exact_mut(SECTOR).zip(operation.lba..);
        for (sector, lba) in sectors {
            let &Operation { id: op, writer, .. } = operation;
            sector.copy_from_slice(&stamp(&Stamp { run: self.run(), lba, op, epoch, writer }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_stays_in_its_region_and_does_everything() {
        for sectors in [32, 40, 2048] {
            let load = Workload { first_lba: 77, sectors, mix: Mix::FULL, ..Workload::new(5) };
            let mut kinds = [0; 5];
            for id in 0..2000 {
                let operation = load.operation(id);
                kinds[operation.kind as usize] += 1;
                assert_eq!(operation, load.operation(id));
                if operation.kind != Kind::Flush {
                    assert!(operation.sectors > 0 && operation.sectors <= 32 && operation.lba >= 77);
                    assert!(operation.lba + u64::from(operation.sectors) <= 77 + sectors);
                }
            }
            assert!(kinds.iter().all(|count| *count > 10), "{kinds:?}");
            let swept: u64 = load.sweep(0).map(|operation| u64::from(operation.sectors)).sum();
            assert_eq!(swept, sectors);
        }
    }
}
