//! The questions of one remote device that wait for an answer: a state machine without sockets or threads.

use std::collections::BTreeMap;
use std::time::Duration;

use atoll_devices::access::Completion;
use atoll_protocol::bus::{BusAnswer, BusCall, BusRequest, Refusal};
use atoll_protocol::{CauseId, Generation, RequestId, Width};

use crate::actor::clock::Moment;

/// What a question is about, and so which answers can be right.
#[derive(Debug)]
pub(super) enum Asked {
    Read(Width),
    Write,
    Reset,
}

#[derive(Debug)]
struct Question {
    call: BusCall,
    cause: CauseId,
    deadline: Moment,
    asked: Asked,
    completion: Option<Completion>,
    /// Given to the connection. One that is not can still be asked of the next incarnation; one that is cannot, since
    /// nobody knows how far it got.
    sent: bool,
}

/// What became of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Settled {
    /// It completed its question.
    Completed,
    /// The device did not carry it out; a read gives all ones.
    Refused(Refusal),
    /// Its question is no longer there: it was late.
    Stale,
    /// It cannot be right.
    Wrong(&'static str),
}

#[derive(Debug)]
pub(super) struct Table {
    next: u64,
    open: BTreeMap<RequestId, Question>,
}

/// As many as a machine has vCPUs that could wait at once.
const OPEN_MAX: usize = 256;

impl Table {
    pub(super) fn new() -> Self {
        Self { next: 1, open: BTreeMap::new() }
    }

    /// Questions that are open, and how many may be.
    pub(super) fn depth(&self) -> (usize, usize) {
        (self.open.len(), OPEN_MAX)
    }

    /// Remembers a question. `None`, and the completion dropped, when too many are open.
    pub(super) fn insert(
        &mut self,
        call: BusCall,
        asked: Asked,
        cause: CauseId,
        deadline: Moment,
        completion: Option<Completion>,
    ) -> Option<RequestId> {
        if self.open.len() >= OPEN_MAX {
            return None;
        }
        let id = RequestId(self.next);
        self.next = self.next.saturating_add(1);
        self.open.insert(id, Question { call, cause, deadline, asked, completion, sent: false });
        Some(id)
    }

    /// The request of an open question that was not sent yet; it counts as sent from now on.
    pub(super) fn send(&mut self, id: RequestId, generation: Generation, now: Moment) -> Option<BusRequest> {
        let question = self.open.get_mut(&id).filter(|question| !question.sent)?;
        question.sent = true;
        let budget_us = u32::try_from(question.deadline.since(now).as_micros()).unwrap_or(u32::MAX);
        Some(BusRequest { id, cause: question.cause, generation, budget_us, call: question.call.clone() })
    }

    /// Questions that wait for a connection, oldest first.
    pub(super) fn unsent(&self) -> Vec<RequestId> {
        self.open.iter().filter(|(_, question)| !question.sent).map(|(id, _)| *id).collect()
    }

    pub(super) fn settle(&mut self, id: RequestId, answer: &BusAnswer) -> Settled {
        let Some(question) = self.open.get(&id) else {
            return if id.0 >= self.next || id.0 == 0 {
                Settled::Wrong("it answers a question that was never asked")
            } else {
                Settled::Stale
            };
        };
        if !question.sent {
            return Settled::Wrong("it answers a question that was not sent");
        }
        let value = match (&question.asked, answer) {
            (Asked::Read(width), BusAnswer::Value(value)) if width.holds(*value) => Ok(*value),
            (Asked::Read(_), BusAnswer::Value(_)) => return Settled::Wrong("a value is wider than its register"),
            (Asked::Write | Asked::Reset, BusAnswer::Done) => Ok(0),
            (_, BusAnswer::Refused(refusal)) => Err(*refusal),
            _ => return Settled::Wrong("an answer is of another kind than its question"),
        };
        let completion = self.open.remove(&id).and_then(|question| question.completion);
        match value {
            Ok(value) => {
                if let Some(completion) = completion {
                    completion.complete(value);
                }
                Settled::Completed
            }
            Err(refusal) => Settled::Refused(refusal),
        }
    }

    /// Gives up the questions whose deadline has come; the causes of those.
    pub(super) fn expire(&mut self, now: Moment) -> Vec<CauseId> {
        self.open.extract_if(.., |_, question| question.deadline <= now).map(|(_, question)| question.cause).collect()
    }

    /// Nobody here was running for this long: no peer is late because of that.
    pub(super) fn postpone(&mut self, by: Duration) {
        for question in self.open.values_mut() {
            question.deadline = question.deadline.after(by);
        }
    }

    /// Gives up the questions that a connection took with it; how many. Those not sent wait on.
    pub(super) fn abandon_sent(&mut self) -> usize {
        self.open.extract_if(.., |_, question| question.sent).count()
    }

    /// Gives up all questions.
    pub(super) fn abandon_all(&mut self) {
        self.open.clear();
    }

    /// Gives up one question.
    pub(super) fn abandon(&mut self, id: RequestId) {
        self.open.remove(&id);
    }

    pub(super) fn earliest_deadline(&self) -> Option<Moment> {
        self.open.values().map(|question| question.deadline).min()
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    use atoll_devices::access::{Deferred, deferred};
    use atoll_protocol::RegionIndex;

    use super::*;

    fn at(ms: u64) -> Moment {
        Moment::from_start(Duration::from_millis(ms))
    }

    fn ask(table: &mut Table, deadline_ms: u64, width: Width) -> (RequestId, Deferred) {
        let (completion, answer) = deferred();
        let call = BusCall::Read { region: RegionIndex(0), offset: 0, width };
        let id = table.insert(call, Asked::Read(width), CauseId(7), at(deadline_ms), Some(completion)).expect("room");
        (id, answer)
    }

    fn poll(answer: &mut Deferred) -> Poll<Option<u64>> {
        Pin::new(answer).poll(&mut Context::from_waker(Waker::noop()))
    }

    /// The life of a question: asked, late, and its answer comes after all.
    #[test]
    fn late_answer_is_stale_and_its_read_is_dropped() {
        let mut table = Table::new();
        let (id, mut answer) = ask(&mut table, 100, Width::Byte);
        assert_eq!(table.send(id, Generation(3), at(40)).expect("unsent").budget_us, 60_000);
        assert_eq!(table.send(id, Generation(3), at(40)), None, "nothing is sent twice");
        assert!(table.expire(at(99)).is_empty());
        assert_eq!(poll(&mut answer), Poll::Pending);
        assert_eq!(table.expire(at(100)), [CauseId(7)]);
        assert_eq!(poll(&mut answer), Poll::Ready(None));
        assert_eq!(table.settle(id, &BusAnswer::Value(1)), Settled::Stale);
    }

    /// The VMM is stopped for an hour with a question open; its process has no part in that.
    #[test]
    fn own_absence_is_not_counted() {
        let mut table = Table::new();
        let (_, mut answer) = ask(&mut table, 100, Width::Byte);
        table.postpone(Duration::from_hours(1));
        assert!(table.expire(at(3_600_099)).is_empty());
        assert_eq!(poll(&mut answer), Poll::Pending);
        assert_eq!(table.expire(at(3_600_100)), [CauseId(7)]);
    }

    /// What a hostile device process can answer, case by case: nothing but the right answer completes the access.
    #[test]
    fn answers_that_cannot_be_right() {
        let cases = [
            (BusAnswer::Value(0xff), Settled::Completed),
            (BusAnswer::Value(0x100), Settled::Wrong("a value is wider than its register")),
            (BusAnswer::Done, Settled::Wrong("an answer is of another kind than its question")),
            (BusAnswer::Refused(Refusal::Width), Settled::Refused(Refusal::Width)),
        ];
        for (answer, expected) in cases {
            let mut table = Table::new();
            let (id, _deferred) = ask(&mut table, 100, Width::Byte);
            assert_eq!(
                table.settle(id, &answer),
                Settled::Wrong("it answers a question that was not sent"),
                "{answer:?} before the question"
            );
            table.send(id, Generation(1), at(0)).expect("unsent");
            assert_eq!(table.settle(id, &answer), expected, "{answer:?}");
        }
        let mut table = Table::new();
        let never = Settled::Wrong("it answers a question that was never asked");
        assert_eq!(table.settle(RequestId(1), &BusAnswer::Done), never);
        assert_eq!(table.settle(RequestId(0), &BusAnswer::Done), never);
        assert_eq!(table.settle(RequestId(u64::MAX), &BusAnswer::Done), never);
    }

    /// A process dies with one question sent and one not: the first is lost with it, the second goes to its successor.
    #[test]
    fn death_takes_what_was_sent() {
        let mut table = Table::new();
        let (sent, mut lost) = ask(&mut table, 100, Width::Dword);
        table.send(sent, Generation(1), at(0)).expect("unsent");
        let (unsent, mut kept) = ask(&mut table, 100, Width::Dword);
        assert_eq!(table.abandon_sent(), 1);
        assert_eq!(poll(&mut lost), Poll::Ready(None));
        assert_eq!(table.unsent(), [unsent]);
        table.send(unsent, Generation(2), at(1)).expect("unsent");
        assert_eq!(table.settle(unsent, &BusAnswer::Value(5)), Settled::Completed);
        assert_eq!(poll(&mut kept), Poll::Ready(Some(5)));
    }

    #[test]
    fn open_questions_are_bounded() {
        let mut table = Table::new();
        let answers: Vec<_> = (0..OPEN_MAX).map(|_| ask(&mut table, 1, Width::Byte)).collect();
        let call = BusCall::Reset;
        assert_eq!(table.insert(call, Asked::Reset, CauseId(0), at(1), None), None);
        drop(answers);
    }
}
