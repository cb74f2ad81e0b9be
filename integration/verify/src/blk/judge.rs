//! From a history to a verdict. Pure: the same records give the same verdict.

use std::collections::{BTreeMap, HashMap};

use super::history::{Event, History, Outcome, Record};
use super::register::{Change, Ending, Fault, Moment, Register, Value};
use super::sector::Seen;
use super::verdict::{Counts, Verdict, Violation};
use super::workload::{Kind, Operation};

#[derive(Debug, Clone, Copy)]
struct Open {
    operation: Operation,
    start: Moment,
    at_us: u64,
    overdue: bool,
}

/// Takes a history record by record.
#[derive(Debug)]
pub struct Judge {
    now: Moment,
    repeats: bool,
    begun: Option<u32>,
    ended: bool,
    /// Last operation of each driver that broke off, and when that was.
    broken_off: HashMap<u32, (u64, Moment)>,
    last_invoked: u64,
    open: BTreeMap<u64, Open>,
    registers: HashMap<u64, Register>,
    /// The flush that was acknowledged and was invoked last.
    flushed: Moment,
    /// The last acknowledgement of a change.
    changed: Moment,
    first_us: Option<u64>,
    verdict: Verdict,
    slowest_us: u64,
    last_us: u64,
    elapsed_us: u64,
}

impl Default for Judge {
    fn default() -> Self {
        Self::new()
    }
}

impl Judge {
    /// A judge of a disk that holds zeroes.
    pub fn new() -> Self {
        let verdict = Verdict {
            verify: "blk".to_owned(),
            ok: true,
            seed: 0,
            counts: Counts::default(),
            seconds: 0.0,
            slowest_ms: 0.0,
            violations: BTreeMap::new(),
            findings: Vec::new(),
        };
        Self {
            now: 0,
            repeats: false,
            begun: None,
            ended: false,
            broken_off: HashMap::new(),
            last_invoked: 0,
            open: BTreeMap::new(),
            registers: HashMap::new(),
            flushed: 0,
            changed: 0,
            first_us: None,
            verdict,
            slowest_us: 0,
            last_us: 0,
            elapsed_us: 0,
        }
    }

    /// A judge for a device that dies at moments which the history does not tell: any request may be done twice.
    pub fn under_deaths() -> Self {
        Self { repeats: true, ..Self::new() }
    }

    /// A whole history.
    pub fn judge(history: &History) -> Verdict {
        Self::new().verdict_on(history)
    }

    /// A whole history, and what has been found besides.
    pub fn verdict_on(self, history: &History) -> Verdict {
        let mut judge = self;
        history.records.iter().for_each(|record| judge.feed(record));
        if history.damaged > 0 {
            judge.find(
                Violation::History,
                format!("{} lines of the history are damaged or missing: {:?}", history.damaged, history.quoted),
            );
        }
        judge.verdict()
    }

    /// Adds a finding from elsewhere: the guest's log, for example.
    pub fn find(&mut self, violation: Violation, text: String) {
        self.verdict.find(violation, text);
    }

    /// What has been found so far; faults of registers are found when a segment ends.
    pub fn ok_so_far(&self) -> bool {
        self.verdict.ok
    }

    /// Takes the next record.
    pub fn feed(&mut self, record: &Record) {
        self.now += 1;
        self.first_us.get_or_insert(record.at_us);
        self.last_us = record.at_us;
        match &record.event {
            Event::Begin(load, epoch) => self.begin(load.seed, *epoch),
            Event::Invoke(operation) => self.invoke(*operation, record.at_us),
            Event::Complete(op, outcome, seen) => self.complete(*op, *outcome, seen, record.at_us),
            Event::Stray(head) => self.find(
                Violation::CompletedTwice,
                format!("ring head {head:#x} was completed without a status, or while it was not in flight"),
            ),
            Event::Late(op) => {
                self.find(Violation::LateWrite, format!("operation {op:#x}: its buffer changed after its completion"));
            }
            Event::Overdue(op) => {
                if let Some(open) = self.open.get_mut(op)
                    && !std::mem::replace(&mut open.overdue, true)
                {
                    let text = format!("{} missed its deadline", name(&open.operation));
                    self.find(Violation::NeverCompleted, text);
                }
            }
            Event::Death => {
                self.verdict.counts.deaths += 1;
                for (op, open) in &self.open {
                    each(&mut self.registers, &open.operation, |register| register.repeat(*op));
                }
            }
            Event::PowerLoss => {
                self.verdict.counts.power_losses += 1;
                self.abandon();
                self.close(Ending::PowerLoss);
            }
            // A claim that does not hold only costs memory.
            Event::Settled if self.open.is_empty() && self.flushed > self.changed => self.close(Ending::Settled),
            Event::Settled => {}
            Event::End { in_flight, avail, used } => {
                self.ended = true;
                if *in_flight != 0 || avail != used {
                    let text = format!("at the end {in_flight} requests are in flight, {avail} available, {used} used");
                    self.find(Violation::Rings, text);
                }
            }
        }
    }

    /// The judgement, after the last record.
    pub fn verdict(mut self) -> Verdict {
        self.now += 1;
        for open in std::mem::take(&mut self.open).into_values().filter(|open| !open.overdue) {
            self.find(Violation::NeverCompleted, format!("{} was never completed", name(&open.operation)));
        }
        self.close(Ending::Settled);
        if !self.ended {
            self.find(Violation::History, "the history has no end".to_owned());
        }
        self.elapsed_us += self.last_us.saturating_sub(self.first_us.unwrap_or_default());
        self.verdict.seconds = self.elapsed_us as f64 / 1e6;
        self.verdict.slowest_ms = self.slowest_us as f64 / 1e3;
        self.verdict
    }

    fn begin(&mut self, seed: u64, epoch: u32) {
        if let Some(before) = self.begun {
            self.verdict.counts.resets += 1;
            if before >= epoch || self.verdict.seed != seed {
                self.find(Violation::History, format!("epoch {epoch} of seed {seed:#x} follows epoch {before}"));
            }
            self.broken_off.insert(before, (self.last_invoked, self.now));
            self.abandon();
            self.elapsed_us += self.last_us.saturating_sub(self.first_us.unwrap_or_default());
        }
        self.first_us = Some(0);
        self.begun = Some(epoch);
        self.verdict.seed = seed;
        self.ended = false;
    }

    /// Whoever issued what is in flight is gone: it has been done by now, or never will be.
    fn abandon(&mut self) {
        for (op, open) in std::mem::take(&mut self.open) {
            each(&mut self.registers, &open.operation, |register| register.end(op, self.now, false));
        }
    }

    fn invoke(&mut self, operation: Operation, at_us: u64) {
        self.last_invoked = operation.id;
        let open = Open { operation, start: self.now, at_us, overdue: false };
        if self.open.insert(operation.id, open).is_some() {
            self.find(Violation::History, format!("operation {:#x} was invoked twice", operation.id));
        }
        if let Some(change) = change(operation.kind) {
            let (now, repeats) = (self.now, self.repeats);
            each(&mut self.registers, &operation, |register| {
                register.invoke(operation.id, change, now);
                if repeats {
                    register.repeat(operation.id);
                }
            });
        }
    }

    fn complete(&mut self, op: u64, outcome: Outcome, seen: &[(Seen, u32)], at_us: u64) {
        let Some(open) = self.open.remove(&op) else {
            self.find(Violation::CompletedTwice, format!("operation {op:#x} was completed and was not in flight"));
            return;
        };
        let operation = open.operation;
        self.slowest_us = self.slowest_us.max(at_us.saturating_sub(open.at_us));
        let done = outcome == Outcome::Done;
        if let Outcome::Failed(code) = outcome {
            self.find(Violation::Failed, format!("{} failed with {code}", name(&operation)));
        }
        let counts = &mut self.verdict.counts;
        let sectors = u64::from(operation.sectors);
        match operation.kind {
            Kind::Read => {
                counts.reads += 1;
                if done {
                    counts.sectors_read += sectors;
                    self.read(&open, seen);
                }
                return;
            }
            Kind::Flush => {
                counts.flushes += 1;
                if done {
                    self.flushed = self.flushed.max(open.start);
                }
                return;
            }
            Kind::Write => {
                counts.writes += 1;
                counts.sectors_written += sectors;
            }
            Kind::Discard => counts.discards += 1,
            Kind::Zeroes => counts.zeroes += 1,
        }
        self.changed = self.now;
        each(&mut self.registers, &operation, |register| register.end(op, self.now, done));
    }

    fn read(&mut self, open: &Open, seen: &[(Seen, u32)]) {
        let operation = &open.operation;
        let told: u64 = seen.iter().map(|(_, count)| u64::from(*count)).sum();
        if told != u64::from(operation.sectors) {
            let text = format!("{} tells of {told} sectors", name(operation));
            self.find(Violation::History, text);
            return;
        }
        let mut lba = operation.lba;
        for (seen, count) in seen {
            for _ in 0..*count {
                self.sector(open, lba, *seen);
                lba += 1;
            }
        }
    }

    fn sector(&mut self, open: &Open, lba: u64, seen: Seen) {
        let (start, end) = (open.start, self.now);
        let op = open.operation.id;
        let register = self.registers.entry(lba).or_default();
        let at = format_args!("operation {op:#x} read sector {lba:#x}");
        let (violation, text) = match seen {
            Seen::Zero => return register.read(op, Value::Zero, start, end),
            Seen::Op(writer) => {
                if let Some((last, when)) = self.broken_off.get(&((writer >> 32) as u32))
                    && writer > *last
                {
                    register.admit(writer, *when);
                }
                return register.read(op, Value::Op(writer), start, end);
            }
            Seen::Torn(..) | Seen::Corrupt if register.changes_within(start, end) => {
                self.verdict.counts.torn_under_way += 1;
                return;
            }
            Seen::Torn(writer, byte) => {
                (Violation::Torn, format!("{at}, which is torn: operation {writer:#x} up to byte {byte}"))
            }
            Seen::Misplaced(writer, meant) => {
                (Violation::Misplaced, format!("{at} and got what operation {writer:#x} wrote to sector {meant:#x}"))
            }
            Seen::Poison(writer) if writer == op & 0xffff_ffff => {
                (Violation::Unfilled, format!("{at}, was completed, and its buffer was not filled"))
            }
            Seen::Poison(writer) => (
                Violation::Corrupt,
                format!("{at}: data of operation {writer:#x} was fetched after it had been acknowledged"),
            ),
            Seen::Foreign(run) => (Violation::Corrupt, format!("{at}, which holds data of run {run:#x}")),
            Seen::Corrupt => (Violation::Corrupt, format!("{at}, which holds what nobody wrote")),
        };
        self.find(violation, text);
    }

    fn close(&mut self, ending: Ending) {
        let flushed = self.flushed;
        let mut sectors: Vec<(&u64, &mut Register)> =
            self.registers.iter_mut().filter(|(_, r)| !r.is_quiet()).collect();
        sectors.sort_unstable_by_key(|(lba, _)| **lba);
        for (lba, register) in sectors {
            for fault in register.close(self.now, ending, |acknowledged| acknowledged < flushed) {
                let (violation, text) = describe(*lba, fault);
                self.verdict.find(violation, text);
            }
        }
    }
}

/// The registers that an operation changes.
fn each(registers: &mut HashMap<u64, Register>, operation: &Operation, mut act: impl FnMut(&mut Register)) {
    if change(operation.kind).is_some() {
        for lba in operation.lba..operation.lba.saturating_add(operation.sectors.into()) {
            act(registers.entry(lba).or_default());
        }
    }
}

fn change(kind: Kind) -> Option<Change> {
    match kind {
        Kind::Write => Some(Change::Write),
        Kind::Zeroes => Some(Change::Zeroes),
        Kind::Discard => Some(Change::Discard),
        Kind::Read | Kind::Flush => None,
    }
}

fn name(operation: &Operation) -> String {
    let Operation { id, kind, lba, sectors, writer } = operation;
    format!("operation {id:#x} ({kind:?} of {sectors} sectors at {lba:#x} by writer {writer})")
}

fn value(value: Value) -> String {
    match value {
        Value::Zero => "zeroes".to_owned(),
        Value::Op(op) => format!("what operation {op:#x} wrote"),
    }
}

fn describe(lba: u64, fault: Fault) -> (Violation, String) {
    match fault {
        Fault::Lost { read, old, new } => {
            let (old, new) = (value(old), value(new));
            (Violation::Lost, format!("sector {lba:#x}: operation {read:#x} read {old}; lost is {new}"))
        }
        Fault::Stale { read, old, new } => {
            let (old, new) = (value(old), value(new));
            (Violation::Stale, format!("sector {lba:#x}: operation {read:#x} read {old}, though {new} had replaced it"))
        }
        Fault::Invented { read, value: Value::Op(op) } => (
            Violation::Lost,
            format!(
                "sector {lba:#x}: operation {read:#x} read what operation {op:#x} wrote, which cannot be there any more: what replaced it is lost"
            ),
        ),
        Fault::Invented { read, value: Value::Zero } => (
            Violation::Lost,
            format!(
                "sector {lba:#x}: operation {read:#x} read zeroes, which cannot be there any more: what replaced them is lost"
            ),
        ),
    }
}
