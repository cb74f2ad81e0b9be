//! Builds that will not do, on purpose (feature `steps`): what an upgrade must refuse, or take back.
//!
//! The page of [`step`](crate::step) says what is wrong with the program beside which it lies; so two copies of one test
//! build in two folders are two builds. In a product nothing of this is left.

use std::time::Duration;

use crate::step::{build, die};

/// What is wrong with a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Bad {
    /// It dies before it has said anything.
    DiesAtStart,
    /// It never says hello.
    HangsBeforeHello,
    /// It never says ready.
    HangsBeforeReady,
    /// It is greeted, and then answers no more.
    HangsAfterHandshake,
    /// It offers less than its predecessor: no indirect descriptors.
    OffersLess,
    /// It refuses what its predecessor knew.
    RefusesState,
    /// It does not answer when it is handed its first ring.
    HangsAtSwitch,
    /// It dies when it is handed its first ring.
    DiesAtSwitch,
    /// It dies with the first request.
    DiesAtFirstRequest,
}

impl Bad {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::DiesAtStart,
        Self::HangsBeforeHello,
        Self::HangsBeforeReady,
        Self::HangsAfterHandshake,
        Self::OffersLess,
        Self::RefusesState,
        Self::HangsAtSwitch,
        Self::DiesAtSwitch,
        Self::DiesAtFirstRequest,
    ];
}

/// Whether that is wrong with this build.
#[inline]
pub fn is(bad: Bad) -> bool {
    build() == bad as u64 + 1
}

/// Dies or hangs here, if that is what is wrong with this build.
#[inline]
pub fn fail(dies: Option<Bad>, hangs: Option<Bad>) {
    if dies.is_some_and(is) {
        die();
    }
    while hangs.is_some_and(is) {
        std::thread::sleep(Duration::from_secs(1));
    }
}
