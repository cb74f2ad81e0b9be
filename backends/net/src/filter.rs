//! Which frames a guest wants: by its address, by the addresses that its driver has listed, or all of them.
//!
//! A driver that never says anything gets everything, as after a reset. That is also what a successor does, which cannot
//! know what a driver has told its predecessor: a guest then drops by itself what is not meant for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use serde::{Deserialize, Serialize};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Most addresses of one kind in the table; a driver with more gets all frames of that kind.
pub const TABLE_MAX: usize = 64;

/// Whether an address is one of a group.
pub fn is_group(mac: &Mac) -> bool {
    mac.first().is_some_and(|first| first & 1 != 0)
}

/// What a driver has said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// The card's own address.
    pub own: Mac,
    /// Everything.
    pub promiscuous: bool,
    /// Every group.
    pub all_groups: bool,
    /// More addresses of its own.
    pub single: Vec<Mac>,
    /// Groups.
    pub groups: Vec<Mac>,
    /// The driver listed more single addresses than [`TABLE_MAX`].
    pub single_overflow: bool,
    /// The driver listed more groups than [`TABLE_MAX`].
    pub groups_overflow: bool,
}

impl Rules {
    fn accept(&self, to: &Mac) -> bool {
        if is_group(to) {
            *to == [0xff; 6] || self.all_groups || self.groups_overflow || self.groups.contains(to)
        } else {
            *to == self.own || self.single_overflow || self.single.contains(to)
        }
    }
}

/// The rules of a card, asked for each frame by any thread.
#[derive(Debug)]
pub struct Filter {
    everything: AtomicBool,
    rules: RwLock<Rules>,
}

impl Filter {
    /// A filter that lets everything pass.
    pub fn new(own: Mac) -> Self {
        let rules = Rules { own, promiscuous: true, ..Rules::default() };
        Self { everything: AtomicBool::new(true), rules: RwLock::new(rules) }
    }

    /// Whether a frame to this address is wanted.
    pub fn accepts(&self, to: &Mac) -> bool {
        self.everything.load(Ordering::Relaxed) || self.rules.read().unwrap_or_else(PoisonError::into_inner).accept(to)
    }

    /// Whether every frame is wanted.
    #[inline]
    pub fn accepts_all(&self) -> bool {
        self.everything.load(Ordering::Relaxed)
    }

    /// Changes the rules.
    pub fn change(&self, change: impl FnOnce(&mut Rules)) {
        let mut rules = self.rules.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut rules);
        self.everything.store(rules.promiscuous, Ordering::Relaxed);
    }

    /// What the driver has said so far.
    pub fn rules(&self) -> Rules {
        self.rules.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The card's own address.
    pub fn own(&self) -> Mac {
        self.rules.read().unwrap_or_else(PoisonError::into_inner).own
    }

    /// Forgets what a driver has said.
    pub fn reset(&self, own: Mac) {
        self.change(|rules| *rules = Rules { own, promiscuous: true, ..Rules::default() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_pass_by_what_the_driver_has_said() {
        let own = [2, 0, 0, 0, 0, 1];
        let (other, group, all) = ([2, 0, 0, 0, 0, 2], [0x33, 0x33, 0, 0, 0, 1], [0xff; 6]);
        let filter = Filter::new(own);
        assert!([own, other, group, all].iter().all(|to| filter.accepts(to)), "a silent driver gets everything");
        filter.change(|rules| rules.promiscuous = false);
        assert!(filter.accepts(&own) && filter.accepts(&all) && !filter.accepts(&other) && !filter.accepts(&group));
        filter.change(|rules| rules.all_groups = true);
        assert!(filter.accepts(&group) && !filter.accepts(&other));
        filter.change(|rules| rules.single = vec![other]);
        assert!(filter.accepts(&other));
        filter.reset(own);
        assert!(filter.accepts(&group));
    }
}
