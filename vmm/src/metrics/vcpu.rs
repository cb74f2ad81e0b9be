//! What one vCPU has done outside the guest: counted on its own thread, so that an addition is a load and a store.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::cpu::Space;

/// Who answered an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AnswerKind {
    /// A state machine in this process, at once.
    Inline,
    /// An actor in this process, later.
    Later,
    /// Another process.
    Elsewhere,
    /// Nobody: nothing is mapped there.
    Nobody,
}

impl AnswerKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Inline, Self::Later, Self::Elsewhere, Self::Nobody];

    /// In lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Inline => "inline",
            Self::Later => "later",
            Self::Elsewhere => "elsewhere",
            Self::Nobody => "nobody",
        }
    }
}

/// The kinds of accesses: ports and memory, read and written.
pub(super) const ACCESSES: [(Space, bool, &str); 4] = [
    (Space::Pio, false, "pio_read"),
    (Space::Pio, true, "pio_write"),
    (Space::Mmio, false, "mmio_read"),
    (Space::Mmio, true, "mmio_write"),
];

/// One vCPU's counters. Exits are written by its thread only.
#[derive(Debug, Default)]
pub struct VcpuCounters {
    /// By access ([`ACCESSES`]) and [`AnswerKind`].
    exits: [[AtomicU64; 4]; 4],
    doorbells: AtomicU64,
    stalls: AtomicU64,
    instructions: AtomicU64,
}

fn add(cell: &AtomicU64, count: u64) {
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}

impl VcpuCounters {
    fn cell(&self, access: usize, answer: AnswerKind) -> &AtomicU64 {
        let [pio_reads, pio_writes, mmio_reads, mmio_writes] = &self.exits;
        let answers = match access {
            0 => pio_reads,
            1 => pio_writes,
            2 => mmio_reads,
            _ => mmio_writes,
        };
        let [inline, later, elsewhere, nobody] = answers;
        match answer {
            AnswerKind::Inline => inline,
            AnswerKind::Later => later,
            AnswerKind::Elsewhere => elsewhere,
            AnswerKind::Nobody => nobody,
        }
    }

    /// An access left the guest and was answered.
    pub fn exit(&self, space: Space, write: bool, answer: AnswerKind) {
        let access = match space {
            Space::Pio => usize::from(write),
            Space::Mmio => 2 + usize::from(write),
        };
        add(self.cell(access, answer), 1);
    }

    /// A write rang a doorbell.
    pub fn doorbell(&self) {
        add(&self.doorbells, 1);
    }

    /// An answer did not come in time.
    pub fn stall(&self) {
        add(&self.stalls, 1);
    }

    /// So many instructions were retired since power-on; whoever asks the vCPU notes what it said.
    pub fn retired(&self, instructions: u64) {
        self.instructions.store(instructions, Ordering::Relaxed);
    }

    /// The numbers now.
    pub fn snapshot(&self, index: u32) -> VcpuSnapshot {
        let load = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        let mut exits = Vec::with_capacity(16);
        for (access, (_, _, name)) in ACCESSES.iter().enumerate() {
            exits.extend(AnswerKind::ALL.map(|answer| (*name, answer.name(), load(self.cell(access, answer)))));
        }
        let (doorbells, stalls) = (load(&self.doorbells), load(&self.stalls));
        VcpuSnapshot { index, exits, doorbells, stalls, instructions: load(&self.instructions) }
    }
}

/// One vCPU's numbers at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VcpuSnapshot {
    /// Its number.
    pub index: u32,
    /// Accesses that left the guest: what, who answered, how many.
    pub exits: Vec<(&'static str, &'static str, u64)>,
    /// Writes that rang a doorbell. On KVM most doorbells ring without an exit and are not counted.
    pub doorbells: u64,
    /// Answers that did not come in time.
    pub stalls: u64,
    /// Instructions retired; zero where the CPU does not count them.
    pub instructions: u64,
}

impl VcpuSnapshot {
    /// All exits, those at doorbells too.
    pub fn exits_total(&self) -> u64 {
        self.exits.iter().fold(self.doorbells, |sum, (_, _, count)| sum.saturating_add(*count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_exit_has_a_counter_of_its_own() {
        let counters = VcpuCounters::default();
        let mut times = 0;
        for (space, write, _) in ACCESSES {
            for answer in AnswerKind::ALL {
                times += 1;
                (0..times).for_each(|_| counters.exit(space, write, answer));
            }
        }
        counters.doorbell();
        let snapshot = counters.snapshot(3);
        let counts: Vec<u64> = snapshot.exits.iter().map(|(_, _, count)| *count).collect();
        assert_eq!(counts, (1..=16).collect::<Vec<u64>>());
        assert_eq!(snapshot.exits[7], ("pio_write", "nobody", 8));
        assert_eq!(snapshot.exits_total(), 137);
    }
}
