//! One sector as a register: is there an order of the operations that explains what was read?
//!
//! Each operation takes effect at one moment between its invocation and its acknowledgement. Written values are distinct,
//! so a write and the reads that returned it form a *cluster*, which stands in one piece in any such order. If anything in
//! cluster `a` ended before anything in cluster `b` began, then all of `a` stands before all of `b`; the history can be
//! explained if and only if no two clusters stand before each other (Gibbons and Korach, 1997: with `[first end, last
//! beginning]` as a zone, no two forward zones overlap and no backward zone lies within a forward one).
//!
//! Zeroes are not distinct once operations make some. These are clusters without reads then; a read of zeroes is explained
//! if some of them can be the last before it. That is necessary, not sufficient: the judge may overlook something there,
//! and never accuses wrongly.
//!
//! A device that dies does what was in flight again, so until such a write is acknowledged its value may come, go and come
//! again: reads that began before the acknowledgement say nothing then.
//!
//! A register is judged in segments: up to a loss of power, after which it may hold any value that no durable one has
//! surely replaced, or up to a moment at which everything is acknowledged and flushed.

use std::collections::HashMap;

/// Moments are positions in the history.
pub type Moment = u64;
/// Not yet.
pub const NEVER: Moment = Moment::MAX;

/// A value: zero, or what an operation wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Value {
    /// Zeroes, of whatever origin.
    Zero,
    /// What this operation wrote.
    Op(u64),
}

/// What changes the register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It then holds the operation's value.
    Write,
    /// It then holds zeroes.
    Zeroes,
    /// It then holds zeroes or what it held, until the next write.
    Discard,
}

/// An operation that changes the register.
#[derive(Debug, Clone, Copy)]
struct Writing {
    op: u64,
    change: Change,
    start: Moment,
    /// Acknowledgement; [`NEVER`] when there is none.
    end: Moment,
    /// It happened, for it was acknowledged as done.
    certain: bool,
    /// It was in flight when its device died, so it may have taken effect twice before its acknowledgement.
    repeated: bool,
}

/// A read that returned a value.
#[derive(Debug, Clone, Copy)]
struct Reading {
    op: u64,
    value: Value,
    start: Moment,
    end: Moment,
}

/// What is wrong with a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `read` returned `old`, though `new` was acknowledged in between and was never seen.
    Lost {
        /// The read.
        read: u64,
        /// What it returned.
        old: Value,
        /// What is gone.
        new: Value,
    },
    /// `read` returned `old`, though `new` had replaced it, which others have seen.
    Stale {
        /// The read.
        read: u64,
        /// What it returned.
        old: Value,
        /// What had replaced it.
        new: Value,
    },
    /// `read` returned what no operation can have left there.
    Invented {
        /// The read.
        read: u64,
        /// What it returned.
        value: Value,
    },
}

/// How a segment ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Nothing is in flight and everything is durable.
    Settled,
    /// What was not flushed may be lost.
    PowerLoss,
}

/// A sector's history since the last ending.
#[derive(Debug, Clone)]
pub struct Register {
    began: Moment,
    initial: Vec<Value>,
    writings: Vec<Writing>,
    readings: Vec<Reading>,
}

impl Default for Register {
    fn default() -> Self {
        Self { began: 0, initial: vec![Value::Zero], writings: Vec::new(), readings: Vec::new() }
    }
}

#[derive(Debug, Clone, Copy)]
struct Cluster {
    value: Value,
    /// The operation, when it belongs to this segment.
    op: Option<u64>,
    first_end: Moment,
    last_start: Moment,
    /// The read that began last.
    last_read: Option<u64>,
    writing: Option<Writing>,
    certain: bool,
}

impl Cluster {
    fn before(&self, other: &Self) -> bool {
        self.first_end < other.last_start
    }
}

impl Register {
    /// True when nothing has happened since the last ending.
    pub fn is_quiet(&self) -> bool {
        self.writings.is_empty() && self.readings.is_empty()
    }

    /// A change is invoked.
    pub fn invoke(&mut self, op: u64, change: Change, now: Moment) {
        self.writings.push(Writing { op, change, start: now, end: NEVER, certain: false, repeated: false });
    }

    /// It ends: acknowledged as done (`certain`), or in a way that leaves open whether it was done, but after which it is
    /// not done any more.
    pub fn end(&mut self, op: u64, now: Moment, certain: bool) {
        if let Some(writing) = self.writings.iter_mut().rev().find(|w| w.op == op && w.end == NEVER) {
            writing.end = now;
            writing.certain = certain && writing.change != Change::Discard;
        }
    }

    /// The device died with this change in flight: a successor does it again.
    pub fn repeat(&mut self, op: u64) {
        if let Some(writing) = self.writings.iter_mut().rev().find(|w| w.op == op && w.end == NEVER) {
            writing.repeated = true;
        }
    }

    /// A read that was invoked at `start` returned `value`.
    pub fn read(&mut self, op: u64, value: Value, start: Moment, end: Moment) {
        self.readings.push(Reading { op, value, start, end });
    }

    /// True when a change was under way at some time between the two moments.
    pub fn changes_within(&self, start: Moment, end: Moment) -> bool {
        self.writings.iter().any(|w| w.start < end && w.end > start)
    }

    /// Adds a write that the history does not know, because it broke off before `end`.
    pub fn admit(&mut self, op: u64, end: Moment) {
        if !self.initial.contains(&Value::Op(op)) && !self.writings.iter().any(|w| w.op == op) {
            let start = self.began;
            self.writings.push(Writing { op, change: Change::Write, start, end, certain: false, repeated: false });
        }
    }

    /// Judges the segment, and goes on with the next one.
    pub fn close(&mut self, now: Moment, ending: Ending, durable: impl Fn(Moment) -> bool) -> Vec<Fault> {
        let (clusters, mut faults) = self.clusters();
        conflicts(&clusters, &mut faults);
        self.zeroes(&clusters, &mut faults);
        self.initial = self.heirs(&clusters, ending, durable);
        if !faults.is_empty()
            && let Some(last) = self.readings.iter().max_by_key(|reading| reading.end)
            && !self.initial.contains(&last.value)
        {
            // Go on with what was seen, so that one fault is told once.
            self.initial.push(last.value);
        }
        self.began = now;
        self.writings.clear();
        self.readings.clear();
        faults
    }

    fn zeroes_are_distinct(&self) -> bool {
        self.writings.iter().all(|writing| writing.change == Change::Write)
    }

    fn clusters(&self) -> (Vec<Cluster>, Vec<Fault>) {
        let mut faults = Vec::new();
        let mut clusters = Vec::with_capacity(self.writings.len() + 1);
        let mut places = HashMap::new();
        for value in &self.initial {
            places.insert(*value, clusters.len());
            clusters.push(Cluster {
                value: *value,
                op: None,
                first_end: self.began,
                last_start: self.began,
                last_read: None,
                writing: None,
                certain: self.initial.len() == 1,
            });
        }
        for writing in &self.writings {
            let value = match writing.change {
                Change::Write => Value::Op(writing.op),
                Change::Zeroes | Change::Discard => Value::Zero,
            };
            if value != Value::Zero {
                places.insert(value, clusters.len());
            }
            clusters.push(Cluster {
                value,
                op: Some(writing.op),
                first_end: writing.end,
                last_start: writing.start,
                last_read: None,
                writing: Some(*writing),
                certain: writing.certain,
            });
        }
        let distinct = self.zeroes_are_distinct();
        for reading in self.readings.iter().filter(|reading| distinct || reading.value != Value::Zero) {
            let Some(cluster) = places.get(&reading.value).and_then(|place| clusters.get_mut(*place)) else {
                faults.push(Fault::Invented { read: reading.op, value: reading.value });
                continue;
            };
            if cluster.writing.is_some_and(|writing| reading.end < writing.start) {
                faults.push(Fault::Invented { read: reading.op, value: reading.value });
                continue;
            }
            if cluster.writing.is_some_and(|writing| writing.repeated && reading.start < writing.end) {
                // It may have been there, gone, and come again.
                continue;
            }
            cluster.certain = true;
            cluster.first_end = cluster.first_end.min(reading.end);
            if reading.start > cluster.last_start || cluster.last_read.is_none() {
                cluster.last_start = cluster.last_start.max(reading.start);
                cluster.last_read = Some(reading.op);
            }
        }
        (clusters, faults)
    }

    /// Reads of zeroes that nothing explains.
    fn zeroes(&self, clusters: &[Cluster], faults: &mut Vec<Fault>) {
        let zero_reads: Vec<&Reading> = self.readings.iter().filter(|r| r.value == Value::Zero).collect();
        if zero_reads.is_empty() || self.zeroes_are_distinct() {
            return;
        }
        // What can have made zeroes, by its beginning, with the latest end so far.
        let mut makers: Vec<(Moment, Moment)> =
            self.initial.iter().filter(|v| **v == Value::Zero).map(|_| (self.began, self.began)).collect();
        makers.extend(
            self.writings.iter().filter(|w| w.change != Change::Write).map(|w| (w.start, self.end_of_zeroes(w))),
        );
        makers.sort_unstable();
        running_max(&mut makers);
        // Other values, by their first end, with the latest last beginning so far.
        let mut others: Vec<&Cluster> =
            clusters.iter().filter(|c| c.certain && c.value != Value::Zero && c.op.is_some()).collect();
        others.sort_unstable_by_key(|c| c.first_end);
        let mut latest: Vec<(Moment, &Cluster)> = Vec::with_capacity(others.len());
        for other in others {
            let top =
                latest.last().map_or(other, |(_, top)| if top.last_start >= other.last_start { top } else { other });
            latest.push((other.first_end, top));
        }
        for reading in zero_reads {
            let made =
                makers.partition_point(|(start, _)| *start < reading.end).checked_sub(1).and_then(|at| makers.get(at));
            let replaced =
                latest.partition_point(|(end, _)| *end < reading.start).checked_sub(1).and_then(|at| latest.get(at));
            match (made, replaced) {
                (None, _) => faults.push(Fault::Invented { read: reading.op, value: Value::Zero }),
                (Some((_, end)), Some((_, by))) if *end < by.last_start => {
                    faults.push(by.fault(reading.op, Value::Zero));
                }
                _ => {}
            }
        }
    }

    /// After a discard contents are open until the next write, so it may take effect until that begins.
    fn end_of_zeroes(&self, writing: &Writing) -> Moment {
        if writing.change != Change::Discard {
            return writing.end;
        }
        let next = self
            .writings
            .iter()
            .filter(|w| w.change != Change::Discard && w.start > writing.end)
            .map(|w| w.start)
            .min();
        next.map_or(NEVER, |start| start - 1)
    }

    /// The values that the next segment may begin with.
    fn heirs(&self, clusters: &[Cluster], ending: Ending, durable: impl Fn(Moment) -> bool) -> Vec<Value> {
        let holds = |cluster: &&Cluster| match ending {
            Ending::Settled => cluster.certain,
            Ending::PowerLoss => {
                let flushed = cluster.writing.is_none_or(|w| w.certain && durable(w.end));
                cluster.certain && flushed
            }
        };
        let mut keepers: Vec<&Cluster> = clusters.iter().filter(holds).collect();
        keepers.sort_unstable_by_key(|c| std::cmp::Reverse(c.last_start));
        let mut heirs: Vec<Value> = clusters
            .iter()
            .filter(|cluster| {
                // The last beginning of another keeper: the first or the second in the list.
                let last = keepers.iter().take(2).find(|keeper| !std::ptr::eq(**keeper, *cluster));
                last.is_none_or(|keeper| !cluster.before(keeper))
            })
            .map(|cluster| cluster.value)
            .collect();
        heirs.sort_unstable();
        heirs.dedup();
        heirs
    }
}

impl Cluster {
    /// What it means that `read` returned `old` though this one had replaced it.
    fn fault(&self, read: u64, old: Value) -> Fault {
        let new = self.value;
        match self.last_read {
            Some(_) => Fault::Stale { read, old, new },
            None => Fault::Lost { read, old, new },
        }
    }
}

fn running_max(pairs: &mut [(Moment, Moment)]) {
    let mut most = 0;
    for (_, end) in pairs {
        most = most.max(*end);
        *end = most;
    }
}

/// Clusters that stand before each other.
fn conflicts(clusters: &[Cluster], faults: &mut Vec<Fault>) {
    let mut forward: Vec<&Cluster> = clusters.iter().filter(|c| c.certain && c.first_end < c.last_start).collect();
    forward.sort_unstable_by_key(|c| c.first_end);
    // For each forward zone the one that reaches furthest so far.
    let mut reach: Vec<&Cluster> = Vec::with_capacity(forward.len());
    for zone in &forward {
        if let Some(top) = reach.last().copied() {
            if zone.first_end < top.last_start {
                faults.push(zone.fault(top.last_read.unwrap_or_default(), top.value));
            }
            reach.push(if top.last_start >= zone.last_start { top } else { zone });
        } else {
            reach.push(zone);
        }
    }
    for within in clusters.iter().filter(|c| c.certain && c.first_end >= c.last_start && c.first_end != NEVER) {
        let before = forward.partition_point(|zone| zone.first_end < within.last_start);
        let around = before.checked_sub(1).and_then(|at| reach.get(at));
        if let Some(around) = around.filter(|zone| within.first_end < zone.last_start) {
            faults.push(within.fault(around.last_read.unwrap_or_default(), around.value));
        }
    }
}
