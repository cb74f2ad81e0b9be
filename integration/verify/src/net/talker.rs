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
