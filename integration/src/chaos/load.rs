//! What a class's guest does under a campaign, and what it says at the end.

use std::time::Instant;

use anyhow::Result;
use atoll_devices::Answer;
use serde::Serialize;

use super::rig::Rig;
use super::stall::StallWatch;

/// A guest that keeps its device busy.
pub trait Load {
    /// One turn: asks for what there is room for, takes what has come, waits a moment when there is nothing.
    fn turn(&mut self) -> Result<()>;
    /// Asks for what there is room for, and looks at nothing.
    fn push(&mut self) -> Result<()>;
    /// Takes what has come, and does not wait.
    fn poll(&mut self) -> Result<()>;
    /// Requests that the device has not completed, as its rings say.
    fn pending(&mut self) -> Result<u32>;
    /// What the device has completed, as its rings say: a number that only moves when it completes.
    fn used(&mut self) -> Result<u64>;
    /// Requests that were completed so far.
    fn completed(&self) -> u64;
    /// Requests that were made so far: all of them are in the rings.
    fn issued(&self) -> u64;
    /// From now on asks for more at a time, in heaps: a device has some left whenever it has just done some. Or as usual.
    fn lengthen(&mut self, _long: bool) {}
    /// The backend is killed now.
    fn killed(&mut self, at: Instant);
    /// How the last kill was felt.
    fn stall(&self) -> &StallWatch;
    /// A deadline was missed; there is no use in going on.
    fn is_stuck(&self) -> bool;
    /// The guest has reset its device, in the middle of everything, and begins anew.
    fn begin_anew(&mut self, rig: &mut Rig) -> Result<()>;
    /// The guest begins to write the configuration space, where its class has a field for that.
    fn write_config(&mut self, _rig: &mut Rig) -> Option<Answer> {
        None
    }
    /// Awaits everything that is in flight and looks at what can be looked at by now. Whether a promise is broken already.
    fn is_broken(&mut self) -> Result<bool>;
    /// Something was found from outside.
    fn accuse(&mut self, words: String);
    /// Awaits everything, checks what there is to check, and judges.
    fn finish(self: Box<Self>) -> Result<Findings>;
}

/// What was found, in requests and pieces of contents.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Requests that were completed.
    pub requests: u64,
    /// Requests that were never completed.
    pub lost: u64,
    /// Old contents that came back, or new ones that went.
    pub stale: u64,
    /// Contents of two requests in one piece, though none was under way.
    pub torn: u64,
    /// Requests that were completed twice, or without being in flight.
    pub duplicated: u64,
    /// Contents that nobody made, in a wrong place or at a wrong time.
    pub corrupted: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Completions for which nobody was interrupted.
    pub uncalled: u64,
    /// Frames that never came; a card may lose some around a death.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames_lost: Option<u64>,
    /// Frames that came again, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames_repeated: Option<u64>,
    /// The first findings in words.
    pub words: Vec<String>,
}

impl Findings {
    /// How many promises were broken.
    pub fn broken(&self) -> u64 {
        self.lost + self.stale + self.torn + self.duplicated + self.corrupted + self.failed + self.uncalled
    }

    /// Adds words, a bounded number.
    pub fn say(&mut self, words: impl Into<String>) {
        if self.words.len() < 20 {
            self.words.push(words.into());
        }
    }
}
