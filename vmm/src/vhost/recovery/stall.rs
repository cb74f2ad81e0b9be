//! Whether queues move: looked at in the rings themselves, so that no word of a backend counts, and a thread that only
//! answers is no progress.

use std::time::Duration;

use crate::actor::Moment;

/// How far one queue is, of those that a backend answers without waiting for anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    /// Which queue.
    pub(crate) queue: u16,
    /// Its used index.
    pub(crate) used: u16,
    /// Requests wait for an answer.
    pub(crate) waiting: bool,
}

#[derive(Clone, Copy, Debug)]
struct Watched {
    sample: Sample,
    since: Moment,
}

/// Finds a queue in which nothing was completed for too long although work waited all the time.
#[derive(Clone, Debug)]
pub(crate) struct StallWatch {
    limit: Option<Duration>,
    queues: Vec<Watched>,
    looked_at: Moment,
    look_at: Option<Moment>,
}

/// Looks per limit: a stall is seen at most this fraction of the limit late, and a lost kick after two of them.
const LOOKS: u32 = 15;

impl StallWatch {
    /// A watch that finds a queue that stands for `limit`; none for one that finds nothing.
    pub(crate) fn new(limit: Option<Duration>) -> Self {
        Self { limit, queues: Vec::new(), looked_at: Moment::default(), look_at: None }
    }
    /// Somebody has the rings from now on.
    pub(super) fn begin(&mut self, now: Moment) {
        self.queues.clear();
        self.looked_at = now;
        self.look_at = self.limit.map(|limit| now.after(limit / LOOKS));
    }
    /// Nobody has them.
    pub(super) fn end(&mut self) {
        self.look_at = None;
    }
    /// When to look at the rings next.
    pub(super) fn look_at(&self) -> Option<Moment> {
        self.look_at
    }
    /// Compares with the last look. Says whether anything was completed since, whether a queue has completed nothing since
    /// with work in it at both, and which one stands and for how long.
    pub(super) fn look(&mut self, samples: &[Sample], now: Moment) -> (bool, bool, Option<(u16, Duration)>) {
        let Some(limit) = self.limit else { return (false, false, None) };
        self.look_at = self.look_at.map(|_| now.after(limit / LOOKS));
        // Whoever looks was not running itself: nobody is late because of that.
        let absent = now.since(self.looked_at).saturating_sub(limit / 2);
        self.looked_at = now;
        let (mut moved, mut waits, mut stands) = (false, false, None);
        let before = std::mem::take(&mut self.queues);
        for sample in samples {
            let known = before.iter().find(|known| known.sample.queue == sample.queue);
            let progress = known.is_some_and(|known| known.sample.used != sample.used);
            moved |= progress;
            let since = match known {
                Some(known) if !progress && known.sample.waiting && sample.waiting => {
                    waits = true;
                    known.since.after(absent)
                }
                _ => now,
            };
            if now.since(since) >= limit {
                stands.get_or_insert((sample.queue, now.since(since)));
            }
            self.queues.push(Watched { sample: *sample, since });
        }
        (moved, waits, stands)
    }
}
