//! What happened, in order: invocations, completions and events outside, one line of text each.
//!
//! A line is `~SEQUENCE MICROSECONDS EVENT CRC`, numbers in hexadecimal, the CRC (the low half of CRC-32) over what stands
//! between the tilde and the last space. It is meant for serial ports: other text may stand around it, and a line that
//! was damaged or lost is noticed.
//!
//! | event | words |
//! |---|---|
//! | a driver begins | `B seed first_lba sectors sectors_max writers mix epoch` |
//! | invoked | `i op kind lba sectors writer` |
//! | completed | `c op k` or `c op eCODE`, for a read with what its sectors hold: `seen*count,…` |
//! | completed, and not in flight | `s head` |
//! | buffer changed after completion | `l op` |
//! | deadline missed | `o op` |
//! | the peer died, the power failed | `d`, `p` |
//! | nothing is in flight, all is flushed | `q` |
//! | the driver ends | `e in_flight avail used` |

use std::fmt::Write as _;

use super::sector::Seen;
use super::workload::{Kind, Mix, Operation, Workload};

/// Most sectors of one operation that a history may tell of.
pub const SECTORS_MAX: u32 = 1 << 16;

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As asked.
    Done,
    /// With this status or errno.
    Failed(u32),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A driver begins; the second time it is one in a guest that was restarted.
    Begin(Workload, u32),
    /// An operation is about to be handed over.
    Invoke(Operation),
    /// It was completed; for a read, what sectors held, in runs.
    Complete(u64, Outcome, Vec<(Seen, u32)>),
    /// This ring head was completed without being in flight, or without a status.
    Stray(u32),
    /// The buffer of this operation changed after its completion, or next to it.
    Late(u64),
    /// This operation has missed its deadline.
    Overdue(u64),
    /// The peer died; its successor goes on with what was in flight.
    Death,
    /// What was not flushed may be lost, what was in flight is.
    PowerLoss,
    /// Nothing is in flight, and a flush has ended since the last write.
    Settled,
    /// The driver has ended: requests in flight as the system says, and the rings' indices.
    End {
        /// Requests in flight.
        in_flight: u32,
        /// Requests made available, all queues.
        avail: u32,
        /// Requests used, all queues.
        used: u32,
    },
}

/// An event and its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Microseconds since the driver began.
    pub at_us: u64,
    /// What happened.
    pub event: Event,
}

/// Records as they were read from text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// Those that are whole.
    pub records: Vec<Record>,
    /// Lines that were damaged or are missing.
    pub damaged: u64,
    /// The first of the damaged ones, as they came.
    pub quoted: Vec<String>,
}

/// Damaged lines that are kept, and how much of each.
const QUOTED_MAX: usize = 4;
const QUOTED_CHARS: usize = 160;

impl History {
    /// Finds the records in what came from a console.
    pub fn parse(text: &str) -> Self {
        let mut history = Self::default();
        let mut expected = 0;
        for line in text.lines() {
            // What stands before the last tilde may be a line that a restart cut short.
            let Some((_, line)) = line.rsplit_once('~') else { continue };
            let Some((sequence, record)) = parse_line(line.trim_end()) else {
                history.damaged += 1;
                if history.quoted.len() < QUOTED_MAX {
                    history.quoted.push(line.chars().take(QUOTED_CHARS).collect());
                }
                continue;
            };
            // A driver that begins counts anew.
            if !matches!(record.event, Event::Begin(..)) && sequence != expected {
                history.damaged += 1;
            }
            expected = sequence.wrapping_add(1);
            history.records.push(record);
        }
        history
    }
}

fn check(body: &str) -> u32 {
    crc32fast::hash(body.as_bytes()) & 0xffff
}

/// One line, with its end.
pub fn line(sequence: u64, record: &Record) -> String {
    let mut body = format!("{sequence:x} {:x} ", record.at_us);
    // Writing to a string cannot fail.
    let _ = match &record.event {
        Event::Begin(load, epoch) => {
            let Workload { seed, first_lba, sectors, sectors_max, writers, mix } = load;
            let Mix { read, write, flush, discard, zeroes } = mix;
            write!(
                body,
                "B {seed:x} {first_lba:x} {sectors:x} {sectors_max:x} {writers:x} {read:x}.{write:x}.{flush:x}.{discard:x}.{zeroes:x} {epoch:x}"
            )
        }
        Event::Invoke(Operation { id, kind, lba, sectors, writer }) => {
            write!(body, "i {id:x} {} {lba:x} {sectors:x} {writer:x}", letter(*kind))
        }
        Event::Complete(op, outcome, seen) => {
            let _ = match outcome {
                Outcome::Done => write!(body, "c {op:x} k"),
                Outcome::Failed(code) => write!(body, "c {op:x} e{code:x}"),
            };
            for (position, (what, count)) in seen.iter().enumerate() {
                body.push(if position == 0 { ' ' } else { ',' });
                push_seen(&mut body, *what);
                if *count != 1 {
                    let _ = write!(body, "*{count:x}");
                }
            }
            Ok(())
        }
        Event::Stray(head) => write!(body, "s {head:x}"),
        Event::Late(op) => write!(body, "l {op:x}"),
        Event::Overdue(op) => write!(body, "o {op:x}"),
        Event::Death => write!(body, "d"),
        Event::PowerLoss => write!(body, "p"),
        Event::Settled => write!(body, "q"),
        Event::End { in_flight, avail, used } => write!(body, "e {in_flight:x} {avail:x} {used:x}"),
    };
    format!("~{body} {:x}\n", check(&body))
}

fn letter(kind: Kind) -> char {
    match kind {
        Kind::Read => 'r',
        Kind::Write => 'w',
        Kind::Flush => 'f',
        Kind::Discard => 'd',
        Kind::Zeroes => 'z',
    }
}

fn push_seen(body: &mut String, seen: Seen) {
    let _ = match seen {
        Seen::Zero => write!(body, "z"),
        Seen::Op(op) => write!(body, "{op:x}"),
        Seen::Poison(op) => write!(body, "p{op:x}"),
        Seen::Torn(op, at) => write!(body, "t{op:x}.{at:x}"),
        Seen::Misplaced(op, lba) => write!(body, "m{op:x}.{lba:x}"),
        Seen::Foreign(run) => write!(body, "o{run:x}"),
        Seen::Corrupt => write!(body, "x"),
    };
}

fn number(word: &str) -> Option<u64> {
    // from_str_radix would take a sign, and capitals, which nobody wrote.
    let written = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if word.bytes().all(written) { u64::from_str_radix(word, 16).ok() } else { None }
}

fn small<T: TryFrom<u64>>(word: &str) -> Option<T> {
    number(word)?.try_into().ok()
}

fn pair<A: TryFrom<u64>, B: TryFrom<u64>>(word: &str) -> Option<(A, B)> {
    let (a, b) = word.split_once('.')?;
    Some((small(a)?, small(b)?))
}

fn parse_seen(word: &str) -> Option<Seen> {
    Some(match word.as_bytes().first()? {
        b'z' => Seen::Zero,
        b'x' => Seen::Corrupt,
        b'p' => Seen::Poison(number(&word[1..])?),
        b't' => pair(&word[1..]).map(|(op, at)| Seen::Torn(op, at))?,
        b'm' => pair(&word[1..]).map(|(op, lba)| Seen::Misplaced(op, lba))?,
        b'o' => Seen::Foreign(number(&word[1..])?),
        _ => Seen::Op(number(word)?),
    })
}

fn parse_line(line: &str) -> Option<(u64, Record)> {
    let (body, crc) = line.rsplit_once(' ')?;
    if number(crc)? != u64::from(check(body)) {
        return None;
    }
    let words: Vec<&str> = body.split(' ').collect();
    let (sequence, at_us, event) = match words.as_slice() {
        [sequence, at, event @ ..] => (number(sequence)?, number(at)?, event),
        _ => return None,
    };
    Some((sequence, Record { at_us, event: parse_event(event)? }))
}

fn parse_event(words: &[&str]) -> Option<Event> {
    Some(match *words {
        ["B", seed, first_lba, sectors, sectors_max, writers, mix, epoch] => {
            let mut parts = mix.split('.').map(small);
            let mut part = || parts.next().flatten();
            let mix = Mix { read: part()?, write: part()?, flush: part()?, discard: part()?, zeroes: part()? };
            let load = Workload {
                seed: number(seed)?,
                first_lba: number(first_lba)?,
                sectors: number(sectors)?,
                sectors_max: small(sectors_max)?,
                writers: small(writers)?,
                mix,
            };
            Event::Begin(load, small(epoch)?)
        }
        ["i", id, kind, lba, sectors, writer] => {
            let kind = match kind {
                "r" => Kind::Read,
                "w" => Kind::Write,
                "f" => Kind::Flush,
                "d" => Kind::Discard,
                "z" => Kind::Zeroes,
                _ => return None,
            };
            let (id, lba) = (number(id)?, number(lba)?);
            let operation = Operation { id, kind, lba, sectors: small(sectors)?, writer: small(writer)? };
            (operation.sectors <= SECTORS_MAX).then_some(Event::Invoke(operation))?
        }
        ["c", op, outcome, ref seen @ ..] => {
            let outcome = match outcome.strip_prefix('e') {
                Some(code) => Outcome::Failed(small(code)?),
                None if outcome == "k" => Outcome::Done,
                None => return None,
            };
            let runs = match seen {
                [] => Vec::new(),
                [runs] => runs
                    .split(',')
                    .map(|run| match run.split_once('*') {
                        Some((what, count)) => Some((parse_seen(what)?, small(count)?)),
                        None => Some((parse_seen(run)?, 1)),
                    })
                    .collect::<Option<_>>()?,
                _ => return None,
            };
            Event::Complete(number(op)?, outcome, runs)
        }
        ["s", head] => Event::Stray(small(head)?),
        ["l", op] => Event::Late(number(op)?),
        ["o", op] => Event::Overdue(number(op)?),
        ["d"] => Event::Death,
        ["p"] => Event::PowerLoss,
        ["q"] => Event::Settled,
        ["e", in_flight, avail, used] => {
            Event::End { in_flight: small(in_flight)?, avail: small(avail)?, used: small(used)? }
        }
        _ => return None,
    })
}

/// Says what a read's buffer holds, in runs.
pub fn look(buffer: &[u8], run: u64, lba: u64) -> Vec<(Seen, u32)> {
    let mut runs: Vec<(Seen, u32)> = Vec::new();
    for (sector, lba) in buffer.chunks(super::sector::SECTOR).zip(lba..) {
        let seen = super::sector::decode(sector, run, lba);
        match runs.last_mut() {
            Some((last, count)) if *last == seen => *count += 1,
            _ => runs.push((seen, 1)),
        }
    }
    runs
}
