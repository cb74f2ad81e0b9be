//! Actors: state that one task owns, reached only by messages.
//!
//! - [`Address`] is what others hold: typed, cheap to clone, in front of a bounded mailbox. Each message says what
//!   happens when the mailbox is full ([`WhenFull`]): the sender waits, or gets its message back in a typed error.
//! - [`Address::ask`] waits for a [`Reply`] until a deadline on a [`Clock`]; an OS thread (a vCPU) does the same with
//!   [`Address::ask_parked`], and gives up when its [`StopSignal`] is raised.
//! - Everybody who has a mailbox is on a [`Roll`], which an operator can read.
//! - A [`Tree`] starts actors, reports each end to its hook, and stops them in reverse order of their start.
//!
//! Registers are reached through [`ActorDevice`] when an actor of this process answers, and through
//! [`remote::RemoteDevice`] when another process does.

mod address;
mod clock;
mod device;
mod laps;
mod park;
mod rate;
pub mod remote;
mod roll;
mod thread;
mod tree;

pub use address::{Address, AskError, Mail, Reply, TellError, WhenFull};
pub use clock::{Clock, ManualClock, Moment, RealClock};
pub use device::{AccessToken, ActorDevice, RegisterAccess, Surroundings};
pub use laps::{Lap, Laps};
pub use park::{Parked, StopSignal, park, park_access};
pub use rate::RateLimit;
pub use roll::{ActorReport, Inbox, Outbox, Post, Roll, mailbox};
pub use thread::ActorThread;
pub use tree::{Actor, Ended, Ending, Flow, Tree};

use atoll_protocol::lifecycle::LifecycleEvent;

/// Who hears about the life of devices: a supervisor, or a test.
///
/// Called from vCPU threads and readers of sockets, so it must not wait: an actor's address tries once and counts what
/// does not fit.
pub trait Supervision: Send + Sync {
    /// Something happened.
    fn report(&self, event: LifecycleEvent);
}

#[cfg(test)]
mod tests;
