//! How a device comes through the death of its backends: one state machine without I/O, threads or a clock of its own.
//!
//! [`Machine`] takes [`Event`]s, each with the time, and says what is to be done as [`Action`]s; the device's thread
//! (`worker`) carries those out and feeds back what came of them. Everything that may be done only in some order is
//! decided here and nowhere else: that rings are handed out once, to an incarnation that lives, after the fence of the one
//! before; that a reset, a pause or an unplug waits for that fence and for nobody who is gone; that every ring is kicked
//! and called after a recovery; when to try again and when to give up ([`RestartPolicy`](crate::backend::RestartPolicy)).
//!
//! ```text
//!            lost (exit, hang-up, late step, stall)            ended           greeted
//! Running ────────────────────────────────────────> dying ───────────> coming ─────────> rings handed over ─> Running
//!    ^                                                 │ kill, reap       │ again, later      (fence passed)
//!    │                                                 v                  v
//!    └──── reset by the driver, or the operator ── Quarantined <── crash loop, or a successor that will not do
//!                                                   (a stand-in has the rings, once the fence has passed)
//! ```
//!
//! What serves (`present`) and what is being prepared (`coming`) are two things. Beside a backend that runs others can be
//! made ready ([`beside`]): a spare, which is there at once when the backend is lost, and a new build, which takes its
//! place:
//!
//! ```text
//!          started, greeted     rings taken back     state moved         old one ended       time passes
//! Starting ───────────────> Ready ───────────> Stopping ──────> Switching ────────────> Probation ─────────> Trial
//!    │                        │                   │                │                      │
//!    └────────────────────────┴───────────────────┘                └──────────────────────┘
//!       refused: the old one carries on, on its rings                refused: the old build is started again
//! ```
//!
//! A build whose time of trial is over is the device's; one that dies before that is followed by the one before it. Where
//! nobody serves, one that is ready takes the device as a successor does.
//!
//! The machine runs in a simulation of its own ([`simulation`]): fake processes, fake time, seeded schedules. And in a model
//! ([`model`]) in which every interleaving of a small device is tried, together with the real rules of a queue and of the
//! record of requests in flight.

mod beside;
mod event;
mod machine;
#[cfg(test)]
mod model;
#[cfg(test)]
mod simulation;
mod stall;
#[cfg(test)]
mod tests;

pub(crate) use event::{Action, Build, End, Event, Failure, SpareState, State, TakeBack, Tale};
pub(crate) use machine::{Machine, Rules};
pub(crate) use stall::Sample;
