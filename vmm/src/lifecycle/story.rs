//! What happened to a machine, told to whoever listens.
//!
//! Each subscriber has a bounded queue of its own; one that does not read loses the oldest events and is told how many.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::actor::{ActorReport, Post, Roll};

/// Events that wait for one subscriber at most.
const WAITING_MAX: usize = 1024;

/// One event, in the form in which clients of an event monitor read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StoryEvent {
    /// Since the VMM started.
    pub timestamp: Duration,
    /// Who: `vmm`, `vm`, `device`.
    pub source: String,
    /// What: `booted`, `paused`, `crashed`, …
    pub event: String,
    /// Details by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
}

#[derive(Default)]
struct Waiting {
    events: VecDeque<StoryEvent>,
    lost: u64,
    lost_ever: u64,
    closed: bool,
}

#[derive(Default)]
struct Queue {
    number: u64,
    waiting: Mutex<Waiting>,
    told: Condvar,
}

impl Post for Queue {
    fn report(&self) -> ActorReport {
        let waiting = lock(&self.waiting);
        ActorReport {
            name: format!("listener{}", self.number).into(),
            waiting: waiting.events.len(),
            capacity: WAITING_MAX,
            full: waiting.lost_ever,
            generation: 1,
            state: if waiting.closed { "closed" } else { "listening" }.into(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where events are told; cheap to clone, never blocks.
#[derive(Clone)]
pub struct Story {
    start: Instant,
    queues: Arc<Mutex<Vec<Weak<Queue>>>>,
    subscribed: Arc<AtomicU64>,
    roll: Roll,
}

impl Default for Story {
    fn default() -> Self {
        Self { start: Instant::now(), queues: Arc::default(), subscribed: Arc::default(), roll: Roll::default() }
    }
}

impl Story {
    /// Tells all subscribers.
    pub fn tell<'a>(&self, source: &str, event: &str, properties: impl IntoIterator<Item = (&'a str, String)>) {
        let properties = properties.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let event =
            StoryEvent { timestamp: self.start.elapsed(), source: source.into(), event: event.into(), properties };
        tracing::debug!(source = event.source, event = event.event, properties = ?event.properties, "event");
        lock(&self.queues).retain(|queue| {
            let Some(queue) = queue.upgrade() else { return false };
            let mut waiting = lock(&queue.waiting);
            if waiting.events.len() >= WAITING_MAX {
                waiting.events.pop_front();
                waiting.lost += 1;
                waiting.lost_ever += 1;
            }
            waiting.events.push_back(event.clone());
            drop(waiting);
            queue.told.notify_one();
            true
        });
    }

    /// Hears all events from now on.
    pub fn subscribe(&self) -> Subscription {
        let number = self.subscribed.fetch_add(1, Ordering::Relaxed);
        let queue = self.roll.post(Queue { number, ..Queue::default() });
        lock(&self.queues).push(Arc::downgrade(&queue));
        Subscription(queue)
    }

    /// Everybody who has a mailbox in this machine, outside the household.
    pub fn roll(&self) -> &Roll {
        &self.roll
    }

    /// No more events will come; subscribers hear of that after the last one.
    pub fn close(&self) {
        for queue in lock(&self.queues).iter().filter_map(Weak::upgrade) {
            lock(&queue.waiting).closed = true;
            queue.told.notify_all();
        }
    }

    /// Time since the VMM started.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// When that was, by the wall clock.
    pub fn started(&self) -> SystemTime {
        SystemTime::now() - self.start.elapsed()
    }
}

/// What one subscriber hears.
pub struct Subscription(Arc<Queue>);

/// What came of waiting for an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// This one.
    Event(StoryEvent),
    /// So many were lost before the next one, because nobody read them.
    Lost(u64),
    /// None within the time.
    Nothing,
    /// There will be none any more.
    Closed,
}

impl Subscription {
    /// Waits for the next event for at most `limit`.
    pub fn next(&self, limit: Duration) -> Heard {
        let deadline = Instant::now() + limit;
        let mut waiting = lock(&self.0.waiting);
        loop {
            if waiting.lost > 0 {
                return Heard::Lost(std::mem::take(&mut waiting.lost));
            }
            if let Some(event) = waiting.events.pop_front() {
                return Heard::Event(event);
            }
            if waiting.closed {
                return Heard::Closed;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Heard::Nothing;
            }
            waiting = self.0.told.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A subscriber that sleeps costs a bounded amount of memory and learns what it missed.
    #[test]
    fn a_slow_listener_loses_the_oldest_and_knows_it() {
        let story = Story::default();
        let slow = story.subscribe();
        for number in 0..WAITING_MAX + 3 {
            story.tell("vm", "tick", [("number", number.to_string())]);
        }
        assert_eq!(slow.next(Duration::ZERO), Heard::Lost(3));
        let Heard::Event(first) = slow.next(Duration::ZERO) else { panic!("no event") };
        assert_eq!(first.properties.get("number").map(String::as_str), Some("3"));
        story.close();
        let last = std::iter::repeat_with(|| slow.next(Duration::ZERO)).find(|heard| !matches!(heard, Heard::Event(_)));
        assert_eq!(last, Some(Heard::Closed));
        drop(slow);
        story.tell("vm", "after", []);
        assert!(lock(&story.queues).is_empty());
    }
}
