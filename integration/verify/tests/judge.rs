//! The judge accepts every history that a correct disk can give, and rejects each way to spoil one.

use atoll_verify::blk::sector::Seen;
use atoll_verify::blk::workload::Mix;
use atoll_verify::blk::{Event, History, Judge, Kind, Operation, Outcome, Record, Violation, Workload, history};
use atoll_verify::dice::Dice;
use proptest::prelude::*;
use std::collections::HashMap;

/// Histories of a disk that keeps its promises: requests take effect at any moment between invocation and
/// acknowledgement, twice if the device dies meanwhile; a loss of power keeps what was flushed, and any of the rest.
struct Model {
    dice: Dice,
    load: Workload,
    events: Vec<Event>,
    now: HashMap<u64, Seen>,
    /// What each sector has held since the last flush, the flushed value first.
    since_flush: HashMap<u64, Vec<Seen>>,
    in_flight: Vec<(Operation, bool)>,
    next: u64,
}

impl Model {
    fn new(seed: u64, mix: Mix) -> Self {
        let load = Workload { sectors: 24, sectors_max: 6, mix, ..Workload::new(seed) };
        Self {
            dice: Dice::new(seed ^ 0x006d_6f64_656c),
            load,
            events: vec![Event::Begin(load, 0)],
            now: HashMap::new(),
            since_flush: HashMap::new(),
            in_flight: Vec::new(),
            next: 0,
        }
    }

    fn put(&mut self, lba: u64, value: Seen) {
        let before = self.now.insert(lba, value).unwrap_or(Seen::Zero);
        self.since_flush.entry(lba).or_insert_with(|| vec![before]).push(value);
    }

    fn take_effect(&mut self, operation: &Operation) {
        for lba in operation.lba..operation.lba + u64::from(operation.sectors) {
            match operation.kind {
                Kind::Write => self.put(lba, Seen::Op(operation.id)),
                Kind::Zeroes => self.put(lba, Seen::Zero),
                Kind::Discard if self.dice.below(2) == 0 => self.put(lba, Seen::Zero),
                _ => {}
            }
        }
    }

    fn holds(&self, operation: &Operation) -> Vec<(Seen, u32)> {
        let sectors = operation.lba..operation.lba + u64::from(operation.sectors);
        sectors.map(|lba| (self.now.get(&lba).copied().unwrap_or(Seen::Zero), 1)).collect()
    }

    fn step(&mut self, fresh: bool) {
        if fresh && (self.in_flight.is_empty() || self.in_flight.len() < 6 && self.dice.below(3) > 0) {
            let operation = self.load.operation(self.next);
            self.next += 1;
            self.events.push(Event::Invoke(operation));
            self.in_flight.push((operation, false));
            return;
        }
        let at = self.dice.below(self.in_flight.len() as u64) as usize;
        let (operation, done) = self.in_flight[at];
        match operation.kind {
            Kind::Read => {
                let seen = self.holds(&operation);
                self.events.push(Event::Complete(operation.id, Outcome::Done, seen));
                self.in_flight.swap_remove(at);
            }
            _ if done => {
                if operation.kind == Kind::Flush {
                    self.flush();
                }
                self.events.push(Event::Complete(operation.id, Outcome::Done, Vec::new()));
                self.in_flight.swap_remove(at);
            }
            _ => {
                self.take_effect(&operation);
                self.in_flight[at].1 = true;
            }
        }
    }

    fn flush(&mut self) {
        // What is in flight and has taken effect may be made durable too, or be found by a later loss in either state.
        self.since_flush.clear();
    }

    fn die(&mut self) {
        for entry in &mut self.in_flight {
            entry.1 = false;
        }
        self.events.push(Event::Death);
    }

    fn lose_power(&mut self) {
        let mut choices: Vec<(u64, Vec<Seen>)> = self.since_flush.drain().collect();
        choices.sort_unstable_by_key(|(lba, _)| *lba);
        for (lba, values) in choices {
            let kept = values[self.dice.below(values.len() as u64) as usize];
            self.now.insert(lba, kept);
        }
        self.in_flight.clear();
        self.events.push(Event::PowerLoss);
    }

    fn run(mut self, steps: u32, calamities: bool) -> Vec<Event> {
        for _ in 0..steps {
            match self.dice.below(150) {
                0 if calamities => self.die(),
                1 if calamities => self.lose_power(),
                2 | 3 => {
                    while !self.in_flight.is_empty() {
                        self.step(false);
                    }
                    let flush = Operation { id: 1 << 40 | self.next, kind: Kind::Flush, lba: 0, sectors: 0, writer: 0 };
                    self.next += 1;
                    self.flush();
                    self.events.extend([
                        Event::Invoke(flush),
                        Event::Complete(flush.id, Outcome::Done, Vec::new()),
                        Event::Settled,
                    ]);
                }
                _ => self.step(true),
            }
        }
        while !self.in_flight.is_empty() {
            self.step(false);
        }
        for read in self.load.sweep(1 << 41) {
            self.events.push(Event::Invoke(read));
            let seen = self.holds(&read);
            self.events.push(Event::Complete(read.id, Outcome::Done, seen));
        }
        self.events.push(Event::End { in_flight: 0, avail: 7, used: 7 });
        self.events
    }
}

fn told(events: Vec<Event>) -> History {
    let records = events.into_iter().zip(0..).map(|(event, at_us)| Record { at_us, event }).collect();
    History { records, ..History::default() }
}

fn mixes() -> impl Strategy<Value = Mix> {
    let many_zeroes = Mix { read: 40, write: 25, flush: 5, discard: 10, zeroes: 20 };
    prop_oneof![Just(Mix::PLAIN), Just(Mix::FULL), Just(many_zeroes)]
}

fn text(history: &History) -> String {
    history.records.iter().zip(0..).map(|(record, sequence)| history::line(sequence, record)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_a_correct_disk_does_is_accepted(seed: u64, steps in 1..800_u32, calamities: bool, mix in mixes()) {
        let history = told(Model::new(seed, mix).run(steps, calamities));
        let verdict = Judge::judge(&history);
        prop_assert!(verdict.ok, "{}", verdict.json());
        // It survives the way over a console, too.
        let over_console = format!("login: {}bye", text(&history).replace('\n', "\r\n"));
        prop_assert_eq!(History::parse(&over_console), history);
    }

    /// A read returns what had been replaced before it began.
    #[test]
    fn a_read_of_the_past_is_rejected(seed: u64, steps in 300..800_u32, pick: u64) {
        let mut events = Model::new(seed, Mix::PLAIN).run(steps, false);
        // A write, acknowledged; then a read of its first sector that was invoked later.
        let mut written: HashMap<u64, Operation> = HashMap::new();
        let (mut open, mut replaced) = (HashMap::new(), HashMap::new());
        let mut chances = Vec::new();
        for event in &events {
            match event {
                Event::Invoke(operation) => {
                    open.insert(operation.id, *operation);
                    // Writes that were acknowledged before the last acknowledged one on the same sector was invoked.
                    let sectors = operation.lba..operation.lba + u64::from(operation.sectors);
                    let pasts: Vec<Option<u64>> = sectors.map(|lba| replaced.get(&lba).copied()).collect();
                    if operation.kind == Kind::Write {
                        written.insert(operation.id, *operation);
                    }
                    if let Some(place) = pasts.iter().position(Option::is_some)
                        && operation.kind == Kind::Read
                    {
                        chances.push((operation.id, place, pasts[place].unwrap_or_default()));
                    }
                }
                Event::Complete(op, ..) => {
                    let Some(operation) = open.remove(op) else { continue };
                    if operation.kind == Kind::Write {
                        // An earlier write, wholly before this one, with the same sector.
                        let begun = events.iter().position(|e| matches!(e, Event::Invoke(o) if o.id == *op)).unwrap_or(0);
                        for earlier in events[..begun].iter() {
                            let Event::Complete(other, ..) = earlier else { continue };
                            let Some(first) = written.get(other) else { continue };
                            for lba in first.lba..first.lba + u64::from(first.sectors) {
                                if lba >= operation.lba && lba < operation.lba + u64::from(operation.sectors) {
                                    replaced.insert(lba, first.id);
                                }
                            }
                        }
                    }
                }
                _ => {}
            }
        }
        prop_assume!(!chances.is_empty());
        let (read, place, past) = chances[(pick % chances.len() as u64) as usize];
        for event in &mut events {
            if let Event::Complete(op, _, seen) = event
                && *op == read
            {
                seen[place].0 = Seen::Op(past);
            }
        }
        let verdict = Judge::judge(&told(events));
        prop_assert!(verdict.count(Violation::Lost) + verdict.count(Violation::Stale) > 0, "{}", verdict.json());
    }

    #[test]
    fn each_way_to_spoil_a_history_is_noticed(seed: u64, steps in 200..600_u32, pick: u64, way in 0..7_u32) {
        let mut events = Model::new(seed, Mix::PLAIN).run(steps, false);
        let reads: Vec<usize> = (0..events.len())
            .filter(|at| matches!(&events[*at], Event::Complete(_, _, seen) if !seen.is_empty()))
            .collect();
        let completions: Vec<usize> = (0..events.len()).filter(|at| matches!(events[*at], Event::Complete(..))).collect();
        // The sweep at the end is not under way with anything.
        let last_read = reads[reads.len() - 1 - (pick % 4) as usize];
        let any = completions[(pick % completions.len() as u64) as usize];
        let spoil = |event: &mut Event, what: Seen| {
            if let Event::Complete(_, _, seen) = event {
                seen[0].0 = what;
            }
        };
        let id = match &events[last_read] {
            Event::Complete(op, ..) => *op,
            _ => 0,
        };
        let expected = match way {
            0 => {
                events.insert(any + 1, events[any].clone());
                Violation::CompletedTwice
            }
            1 => {
                // Whole, so that nothing else is said of it.
                events.remove(any);
                Violation::NeverCompleted
            }
            2 => {
                spoil(&mut events[last_read], Seen::Torn(3, 256));
                Violation::Torn
            }
            3 => {
                spoil(&mut events[last_read], Seen::Misplaced(3, 1));
                Violation::Misplaced
            }
            4 => {
                spoil(&mut events[last_read], Seen::Poison(id & 0xffff_ffff));
                Violation::Unfilled
            }
            5 => {
                spoil(&mut events[last_read], Seen::Op(1 << 50));
                Violation::Lost
            }
            _ => {
                events.insert(any + 1, Event::Late(5));
                Violation::LateWrite
            }
        };
        let verdict = Judge::judge(&told(events));
        prop_assert!(verdict.count(expected) > 0, "{expected:?}: {}", verdict.json());
    }

    #[test]
    fn no_text_is_too_much_for_the_parser(text in "(~[0-9a-zBei *,.]{0,40}\n|\\PC{0,20}\n){0,20}") {
        let history = History::parse(&text);
        Judge::judge(&history);
    }

    #[test]
    fn a_damaged_or_missing_line_is_noticed(seed: u64, pick: usize, byte: u8) {
        let whole = text(&told(Model::new(seed, Mix::FULL).run(60, true)));
        let lines: Vec<&str> = whole.lines().collect();
        let at = 1 + pick % (lines.len() - 2);
        let mut missing = lines.clone();
        missing.remove(at);
        prop_assert_eq!(History::parse(&missing.join("\n")).damaged, 1);
        let mut damaged = whole.into_bytes();
        let at = pick % damaged.len();
        prop_assume!(byte != damaged[at]);
        damaged[at] = byte;
        let verdict = Judge::judge(&History::parse(&String::from_utf8_lossy(&damaged)));
        prop_assert!(!verdict.ok, "{}", verdict.json());
    }
}

/// A guest that is restarted leaves requests behind: they have happened, or never will; and the end of what it told may be
/// missing.
#[test]
fn a_restart_of_the_guest_is_judged() {
    let load = Workload { sectors: 8, sectors_max: 8, ..Workload::new(1) };
    let write = |id| Event::Invoke(Operation { id, kind: Kind::Write, lba: 0, sectors: 1, writer: 0 });
    let read = |id| Event::Invoke(Operation { id, kind: Kind::Read, lba: 0, sectors: 1, writer: 0 });
    let done = |id| Event::Complete(id, Outcome::Done, Vec::new());
    let saw = |id, what| Event::Complete(id, Outcome::Done, vec![(what, 1)]);
    let end = Event::End { in_flight: 0, avail: 0, used: 0 };
    let boot = 1 << 32;
    let before = vec![Event::Begin(load, 0), write(1), done(1), write(2)];
    let after = |first: Seen, second: Seen| {
        let mut events = before.clone();
        events.extend([Event::Begin(load, 1), read(boot), saw(boot, first), read(boot + 1), saw(boot + 1, second)]);
        events.push(end.clone());
        Judge::judge(&told(events))
    };
    assert!(after(Seen::Op(1), Seen::Op(1)).ok, "2 never happened");
    assert!(after(Seen::Op(2), Seen::Op(2)).ok, "2 had happened");
    assert!(after(Seen::Op(3), Seen::Op(3)).ok, "3 was told in words that got lost");
    assert!(!after(Seen::Op(1), Seen::Op(2)).ok, "2 happened after its guest was gone");
    assert!(!after(Seen::Zero, Seen::Zero).ok, "1 was acknowledged");
    assert_eq!(after(Seen::Op(1), Seen::Op(1)).counts.resets, 1);
}
