//! What all queues of one card know: what the driver has agreed to, which frames it wants, how many it may get.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use atoll_kit::back_channel::BackChannel;
use atoll_kit::device_state::StateError;
use atoll_kit::limit::{Cost, Limiter};
use atoll_kit::stats::Figures;
use atoll_protocol::saved::{Saved, SavedType};
use serde::{Deserialize, Serialize};

use crate::capture::Capture;
use crate::filter::{Filter, Rules, TABLE_MAX, is_group};
use crate::header::{Features, Offloads};

/// Counts a frame that was dropped. The places of these counters are those of `class_counters` for network cards.
pub fn dropped(figures: Figures<'_>, bytes: u64) {
    figures.class(0, 1);
    figures.class(1, bytes);
}

/// What a driver has said on the control queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    pairs: u16,
    pairs_seen: u16,
    rules: Rules,
}

impl Saved for Told {
    const TYPE: SavedType = SavedType(0x0001_0003);
    const VERSION: u16 = 1;
}

/// Where frames of a card are written down.
#[derive(Debug, Default, Clone)]
pub struct Captures {
    /// What the guest sends.
    pub sent: Vec<Arc<Capture>>,
    /// What the guest gets.
    pub received: Vec<Arc<Capture>>,
}

/// One card, as its queues and its link see it.
#[derive(Debug)]
pub struct Face {
    features: AtomicU64,
    /// Queue pairs that it has.
    pub pairs_max: u16,
    /// Queue pairs that the driver has asked for.
    pairs: AtomicU16,
    /// Queue pairs that the driver was seen to send on.
    pairs_seen: AtomicU16,
    up: AtomicBool,
    /// Which frames the driver wants.
    pub filter: Filter,
    /// Limits what the guest gets.
    pub limiter: Option<Arc<Limiter>>,
    /// How to tell the front end that the link went up or down.
    channel: OnceLock<BackChannel>,
    /// Where frames are written down.
    pub captures: Captures,
}

impl Face {
    /// A card that no driver has touched.
    pub fn new(own: [u8; 6], pairs_max: u16, limiter: Option<Arc<Limiter>>, captures: Captures) -> Self {
        Self {
            features: AtomicU64::new(0),
            pairs_max,
            pairs: AtomicU16::new(1),
            pairs_seen: AtomicU16::new(1),
            up: AtomicBool::new(true),
            filter: Filter::new(own),
            limiter,
            channel: OnceLock::new(),
            captures,
        }
    }

    /// What was negotiated.
    #[inline]
    pub fn features(&self) -> Features {
        Features(self.features.load(Ordering::Relaxed))
    }

    /// The driver has chosen.
    pub fn negotiate(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
    }

    /// What the driver takes besides whole frames.
    pub fn takes(&self) -> Offloads {
        Offloads::to_driver(self.features())
    }

    /// The driver uses so many queue pairs from now on.
    pub fn use_pairs(&self, pairs: u16) {
        self.pairs.store(pairs, Ordering::Relaxed);
        self.pairs_seen.store(1, Ordering::Relaxed);
    }

    /// The driver has sent on a pair, so it uses it; true when that was news. A successor is told of it in no other way:
    /// drivers ask for their pairs only once.
    #[inline]
    pub fn saw_pair(&self, pair: u16) -> bool {
        pair >= self.active_pairs() && {
            self.pairs_seen.fetch_max(pair + 1, Ordering::Relaxed);
            true
        }
    }

    /// Queue pairs that frames for the guest may be spread over.
    #[inline]
    pub fn active_pairs(&self) -> u16 {
        let wanted = self.pairs.load(Ordering::Relaxed).max(self.pairs_seen.load(Ordering::Relaxed));
        wanted.clamp(1, self.pairs_max)
    }

    /// Whether the link is up.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// The link goes up or down; the driver hears of it when that is news.
    pub fn set_up(&self, up: bool) {
        if self.up.swap(up, Ordering::Relaxed) != up
            && let Some(channel) = self.channel.get()
        {
            channel.config_changed();
        }
    }

    /// The front end can be told of changes this way from now on.
    pub fn tell_by(&self, channel: &BackChannel) {
        let _ = self.channel.set(channel.clone());
    }

    /// Whether the guest may get a frame of so many bytes now, which is then counted against its limit; else when.
    #[inline]
    pub fn admit(&self, bytes: u64) -> Result<(), Instant> {
        self.limiter.as_ref().map_or(Ok(()), |limiter| limiter.admit(Cost { bytes, operations: 1 }))
    }

    /// What the driver has said on the control queue, for a successor.
    pub fn told(&self) -> Told {
        Told {
            pairs: self.pairs.load(Ordering::Relaxed),
            pairs_seen: self.pairs_seen.load(Ordering::Relaxed),
            rules: self.filter.rules(),
        }
    }

    /// Takes over what a driver has said to a predecessor.
    pub fn believe(&self, told: Told) -> Result<(), StateError> {
        let Told { pairs, pairs_seen, rules } = told;
        if pairs.max(pairs_seen) > self.pairs_max {
            return Err(StateError::Other(format!("used {pairs} queue pairs, here are {}", self.pairs_max)));
        }
        if rules.single.len().max(rules.groups.len()) > TABLE_MAX || is_group(&rules.own) {
            return Err(StateError::Other("had an address table that no driver can have set up".to_owned()));
        }
        self.pairs.store(pairs, Ordering::Relaxed);
        self.pairs_seen.store(pairs_seen, Ordering::Relaxed);
        self.filter.change(|now| *now = rules);
        Ok(())
    }

    /// As if no driver had touched it.
    pub fn reset(&self, own: [u8; 6]) {
        self.negotiate(0);
        self.use_pairs(1);
        self.filter.reset(own);
    }

    /// Writes down what was gathered in captures.
    pub fn flush_captures(&self) {
        self.captures.sent.iter().chain(&self.captures.received).for_each(|capture| capture.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn face(pairs_max: u16) -> Face {
        Face::new([2, 0, 0, 0, 0, 1], pairs_max, None, Captures::default())
    }

    /// A successor filters as its predecessor did, and spreads over as many pairs; what no driver can have said is refused.
    #[test]
    fn a_successor_believes_what_can_be() {
        let old = face(4);
        old.use_pairs(3);
        old.filter.change(|rules| (rules.promiscuous, rules.all_groups) = (false, true));
        let new = face(4);
        new.believe(old.told()).unwrap();
        assert_eq!((new.told(), new.active_pairs()), (old.told(), 3));
        assert!(!new.filter.accepts(&[2, 0, 0, 0, 0, 9]) && new.filter.accepts(&[3, 0, 0, 0, 0, 9]));
        assert!(face(2).believe(old.told()).is_err(), "more pairs than there are");
        old.filter.change(|rules| rules.single = vec![[2; 6]; TABLE_MAX + 1]);
        assert!(new.believe(old.told()).is_err(), "more addresses than the table holds");
    }
}
