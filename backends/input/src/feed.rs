//! The device without queues and sockets: frames go in, reports for the guest come out.
//!
//! Three rules. A report reaches the guest whole or not at all. A key that is down in the guest comes up sooner or later:
//! if the report that said so was dropped, or whoever held it is gone, it is *owed* and told before anything else. And a
//! report that the guest could not take in time is dropped, because what was typed long ago is of no use.

use std::collections::BTreeSet;

use atoll_protocol::input::{Event, Frame, InputKind, REPORT_MAX, Report};

use crate::shape;

/// What the guest has been told, and what it is to be told.
#[derive(Debug)]
pub struct Feed {
    kind: InputKind,
    /// Keys that are down for the guest.
    held: BTreeSet<u16>,
    /// Keys that are down for the guest, or may be, and should not be.
    owed: BTreeSet<u16>,
    /// What was heard last and not told.
    waiting: Option<Report>,
    dropped: u64,
}

impl Feed {
    /// A device that nobody has touched.
    #[must_use]
    pub fn new(kind: InputKind) -> Self {
        Self { kind, held: BTreeSet::new(), owed: BTreeSet::new(), waiting: None, dropped: 0 }
    }

    /// Another driver: for it, no key is down.
    pub fn forget(&mut self) {
        self.held.clear();
        self.owed.clear();
        self.waiting = None;
    }

    /// The guest was told by a predecessor, nobody knows what: any key may be down.
    pub fn take_over(&mut self) {
        self.owed.extend(shape::keys(self.kind));
    }

    /// Whoever spoke is gone.
    pub fn let_go(&mut self) {
        self.waiting = None;
        self.owed.extend(&self.held);
    }

    /// Takes a frame. A report that waits already is dropped for it; see [`Feed::is_waiting`].
    pub fn hear(&mut self, frame: Frame) {
        match frame {
            Frame::Begin => self.let_go(),
            Frame::Report(report) => {
                self.drop_waiting();
                self.waiting = report.filtered(|event| shape::has(self.kind, event));
            }
        }
    }

    /// Something is to be told.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some() || !self.owed.is_empty()
    }

    /// What the guest is to be told now; what it is owed in reports of at most `events_max` events.
    #[must_use]
    pub fn next(&self, events_max: usize) -> Option<Report> {
        if self.owed.is_empty() {
            return self.waiting.clone();
        }
        let up = self.owed.iter().take(events_max.clamp(1, REPORT_MAX)).filter_map(|key| Event::key(*key, false).ok());
        Report::new(up.collect()).ok()
    }

    /// The guest has been told what [`Feed::next`] gave.
    pub fn told(&mut self, report: &Report) {
        if self.owed.is_empty() {
            self.waiting = None;
        }
        for (key, down) in report.events().iter().filter_map(|event| event.as_key()) {
            if down {
                self.held.insert(key);
            } else {
                self.held.remove(&key);
                self.owed.remove(&key);
            }
        }
    }

    /// The guest cannot take the report that waits. A key that it says is up is owed.
    pub fn drop_waiting(&mut self) {
        let Some(report) = self.waiting.take() else { return };
        self.dropped = self.dropped.saturating_add(1);
        let keys = report.events().iter().filter_map(|event| event.as_key());
        self.owed.extend(keys.filter(|(key, down)| !down && self.held.contains(key)).map(|(key, _)| key));
    }

    /// Reports that were dropped since the last time.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    /// Keys that are down for the guest.
    #[must_use]
    pub fn held(&self) -> &BTreeSet<u16> {
        &self.held
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys(keys: &[(u16, bool)]) -> Frame {
        let events = keys.iter().map(|(key, down)| Event::key(*key, *down).unwrap());
        Frame::Report(Report::new(events.collect()).unwrap())
    }

    fn tell(feed: &mut Feed) -> Vec<(u16, bool)> {
        let mut told = Vec::new();
        while let Some(report) = feed.next(REPORT_MAX) {
            told.extend(report.events().iter().filter_map(|event| event.as_key()));
            feed.told(&report);
        }
        told
    }

    /// The display process dies with Shift down; its successor says so by beginning, and the guest's Shift comes up.
    #[test]
    fn a_held_key_is_let_go_with_who_held_it() {
        let mut feed = Feed::new(InputKind::Keyboard);
        feed.hear(keys(&[(42, true)]));
        assert_eq!(tell(&mut feed), [(42, true)]);
        feed.hear(keys(&[(30, true)]));
        feed.hear(Frame::Begin);
        assert_eq!(tell(&mut feed), [(42, false)], "what was not told needs no end");
        assert!(!feed.is_waiting() && feed.held().is_empty());
    }

    /// The word that a key is up is dropped: the key comes up all the same, before anything else.
    #[test]
    fn a_dropped_report_leaves_no_key_down() {
        let mut feed = Feed::new(InputKind::Keyboard);
        feed.hear(keys(&[(30, true), (31, true)]));
        tell(&mut feed);
        feed.hear(keys(&[(30, false), (32, true)]));
        feed.drop_waiting();
        feed.hear(keys(&[(33, true)]));
        assert_eq!(tell(&mut feed), [(30, false), (33, true)]);
        assert_eq!((feed.take_dropped(), feed.take_dropped()), (1, 0));
    }

    /// Nobody knows what a dead predecessor has told: all keys are said to be up, in reports that are not too long.
    #[test]
    fn a_successor_says_that_all_is_up() {
        let mut feed = Feed::new(InputKind::Keyboard);
        feed.take_over();
        assert_eq!(tell(&mut feed), (1..=248).map(|key| (key, false)).collect::<Vec<_>>());
        feed.hear(keys(&[(0x110, true)]));
        assert!(!feed.is_waiting(), "a keyboard has no buttons");
        feed.hear(keys(&[(30, true)]));
        feed.forget();
        assert!(!feed.is_waiting());
    }

    proptest! {
        /// Whatever is said and dropped: what the guest believes is what was told, and once everybody is gone no key is down.
        #[test]
        fn no_key_stays_down(steps in prop::collection::vec((0_u8..5, 1_u16..6, any::<bool>()), 0..64)) {
            let mut feed = Feed::new(InputKind::Keyboard);
            let mut guest = BTreeSet::new();
            let deliver = |feed: &mut Feed, guest: &mut BTreeSet<u16>| {
                while let Some(report) = feed.next(REPORT_MAX) {
                    for (key, down) in report.events().iter().filter_map(|event| event.as_key()) {
                        if down { guest.insert(key); } else { guest.remove(&key); }
                    }
                    feed.told(&report);
                }
            };
            for (what, key, down) in steps {
                match what {
                    0 => feed.hear(Frame::Begin),
                    1 => feed.drop_waiting(),
                    2 => deliver(&mut feed, &mut guest),
                    _ => feed.hear(keys(&[(key, down)])),
                }
                prop_assert_eq!(feed.held(), &guest);
            }
            feed.let_go();
            deliver(&mut feed, &mut guest);
            prop_assert!(guest.is_empty());
        }
    }
}
