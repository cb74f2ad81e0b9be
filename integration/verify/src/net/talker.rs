//! One end of a conversation, as pure code: who drives it moves frames and tells the time.
//!
//! Each greets until it has heard the other, who is then known to listen. It sends no more than a window beyond what the other end has heard; when that does not move for a while, it sends one
//! frame more, so that a network which has lost a whole window is found alive again. At the end both say "last" until each
//! has heard the other say so.

use serde::{Deserialize, Serialize};

use super::frame::{Came, Part, Said, address, decode, frame};
use super::stream::{Heard, Promise};
use crate::dice::mix;

/// Without an answer for so long, one frame more than the window is sent.
const PROBE_MS: u64 = 100;
/// Between two greetings, and between two frames that say "last".
const AGAIN_MS: u64 = 20;

/// What an end says of the stream towards it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TalkVerdict {
    /// Always "net".
    pub verify: String,
    /// The promise was kept.
    pub ok: bool,
    /// Reproduces the streams.
    pub seed: u64,
    /// Who listened.
    pub listener: u8,
    /// Frames that it sent itself.
    pub sent: u64,
    /// What it heard.
    #[serde(flatten)]
    pub heard: Heard,
}

impl TalkVerdict {
    /// One line.
    pub fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// One end.
#[derive(Debug)]
pub struct Talker {
    seed: u64,
    run: u64,
    me: u8,
    source: [u8; 6],
    window: u64,
    met: bool,
    sent: u64,
    /// How far the other end has heard us.
    answered: u64,
    moved_ms: u64,
    closing: bool,
    last_ms: u64,
    /// The number of our first "last".
    first_last: Option<u64>,
    heard: Heard,
}

impl Talker {
    /// Speaker `me` (0 or 1) of run `seed`, with the card's address.
    pub fn new(seed: u64, me: u8, source: [u8; 6], window: u64) -> Self {
        Self {
            seed,
            run: mix(seed, 0x006e_6574),
            me,
            source,
            window,
            met: false,
            sent: 0,
            answered: 0,
            moved_ms: 0,
            closing: false,
            last_ms: 0,
            first_last: None,
            heard: Heard::default(),
        }
    }

    /// The address of a speaker that has no card of its own.
    pub fn address(me: u8) -> [u8; 6] {
        address(me)
    }

    /// What to send now, to everybody.
    pub fn speak(&mut self, now_ms: u64) -> Option<Vec<u8>> {
        if !self.met || self.closing {
            if self.last_ms > 0 && now_ms < self.last_ms + AGAIN_MS {
                return None;
            }
            self.last_ms = now_ms.max(1);
            if self.met {
                self.first_last.get_or_insert(self.sent);
            }
        } else if self.sent >= self.answered + self.window {
            if now_ms < self.moved_ms + PROBE_MS {
                return None;
            }
            self.moved_ms = now_ms;
        }
        let part = match (self.met, self.closing) {
            (false, _) => Part::Greeting,
            (true, false) => Part::Word,
            (true, true) => Part::Last,
        };
        let said = Said { run: self.run, speaker: self.me, part, number: self.sent, heard: self.heard.up_to() };
        self.sent += u64::from(self.met);
        Some(frame(&said, self.source, [0xff; 6]))
    }

    /// A frame came.
    pub fn listen(&mut self, frame: &[u8], now_ms: u64) {
        match decode(frame) {
            Came::Whole(said) if said.run == self.run && said.speaker != self.me => {
                if !std::mem::replace(&mut self.met, true) {
                    self.heard.begin(now_ms);
                    self.moved_ms = now_ms;
                }
                // Once it has ended nothing counts but that it has.
                if said.part != Part::Greeting && !(self.heard.ended && said.part == Part::Last) {
                    self.heard.came(said.number, frame.len() as u64, said.part == Part::Last, now_ms);
                }
                if said.heard > self.answered {
                    self.answered = said.heard;
                    self.moved_ms = now_ms;
                }
            }
            Came::Whole(_) => self.heard.foreign += 1,
            Came::Corrupted => self.heard.corrupted += 1,
            Came::Other => {}
        }
    }

    /// Says "last" from now on.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Both ends have said "last" and been heard.
    pub fn is_done(&self) -> bool {
        self.heard.ended && self.first_last.is_some_and(|first| self.answered > first)
    }

    /// Frames that it has sent.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// What it has heard so far.
    pub fn heard(&self) -> &Heard {
        &self.heard
    }

    /// The judgement.
    pub fn verdict(mut self, promise: &Promise) -> TalkVerdict {
        let ok = self.heard.close(promise);
        TalkVerdict {
            verify: "net".to_owned(),
            ok,
            seed: self.seed,
            listener: self.me,
            sent: self.sent,
            heard: self.heard,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// What a network does to the hundredth frame of one end, and to those after it where that matters.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Fault {
        None,
        Loses,
        Repeats,
        ComesLate,
        FlipsBit,
        CutsShort,
        IsStuck,
        NeverEnds,
        ReturnsToSender,
    }

    /// The judgement of both ends after a talk of two simulated seconds, or as long as the fault takes.
    fn talk(fault: Fault) -> [TalkVerdict; 2] {
        let mut ends = [0, 1].map(|me| Talker::new(7, me, Talker::address(me), 8));
        let mut wires: [VecDeque<Vec<u8>>; 2] = [VecDeque::new(), VecDeque::new()];
        let (mut late, mut count, mut now_ms) = (None, 0, 0);
        while now_ms < 60_000 && !ends.iter().all(Talker::is_done) {
            now_ms += 1;
            for me in 0..2 {
                for _ in 0..2 {
                    let Some(frame) = ends[me].speak(now_ms) else { break };
                    wires[me].push_back(frame);
                }
            }
            for me in 0..2 {
                let stuck = fault == Fault::IsStuck && (500..12_000).contains(&now_ms);
                let never = fault == Fault::NeverEnds && now_ms > 500;
                if me == 0 && (stuck || never) {
                    continue;
                }
                while let Some(mut frame) = wires[me].pop_front() {
                    count += usize::from(me == 0);
                    let strikes = me == 0 && count == 100;
                    match fault {
                        Fault::Loses if strikes => continue,
                        Fault::Repeats if strikes => ends[1].listen(&frame, now_ms),
                        Fault::ComesLate if strikes => {
                            late = Some(frame);
                            continue;
                        }
                        Fault::FlipsBit if strikes => frame[55] ^= 1,
                        Fault::CutsShort if strikes => frame.truncate(frame.len() - 1),
                        Fault::ReturnsToSender if strikes => ends[0].listen(&frame, now_ms),
                        _ => {}
                    }
                    ends[1 - me].listen(&frame, now_ms);
                    if me == 0 && count == 103 {
                        late.take().into_iter().for_each(|frame| ends[1].listen(&frame, now_ms));
                    }
                }
            }
            if now_ms > 2_000 {
                ends.iter_mut().for_each(Talker::close);
            }
        }
        ends.map(|end| end.verdict(&Promise::ALL))
    }

    /// Each is found, named, and found at the end that heard it and nowhere else.
    #[test]
    fn every_planted_fault_is_found_and_named() {
        let good = talk(Fault::None);
        assert!(good.iter().all(|end| end.ok && end.heard.frames > 1_000), "{good:?}");
        type Named = fn(&Heard) -> bool;
        let cases: [(Fault, Named); 7] = [
            (Fault::Loses, |heard| heard.lost == 1 && heard.gaps.len() == 1),
            (Fault::Repeats, |heard| heard.repeated == 1 && heard.lost == 0),
            (Fault::ComesLate, |heard| heard.reordered == 1 && heard.lost == 0),
            (Fault::FlipsBit, |heard| heard.corrupted == 1 && heard.lost == 1),
            (Fault::CutsShort, |heard| heard.corrupted == 1 && heard.lost == 1),
            (Fault::IsStuck, |heard| heard.silence_ms_max > 10_000 && heard.lost == 0),
            (Fault::NeverEnds, |heard| !heard.ended),
        ];
        for (fault, named) in cases {
            let [first, second] = talk(fault);
            assert!(!second.ok && named(&second.heard), "{fault:?}: {second:?}");
            let hurt = matches!(fault, Fault::IsStuck | Fault::NeverEnds);
            assert!(first.ok || hurt, "{fault:?}: {first:?}");
        }
        let [first, _] = talk(Fault::ReturnsToSender);
        assert_eq!(first.heard.foreign, 1, "a switch that sends a frame back");
    }
}
