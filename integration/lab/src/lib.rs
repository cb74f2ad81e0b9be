//! The nested lab: a machine with hardware virtualisation on a host that has none.
//!
//! QEMU's software emulation plays an AMD processor with SVM ([`outer`]); a stock Debian kernel in it has a real KVM, and
//! Atoll's programs run there as on any host ([`freight`] carries them in). [`inside`] is what runs there: scenarios, each
//! of which ends in one JSON line ([`report`]) on the outer machine's second serial port.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the lab talks to a person at a terminal")]

pub mod drivers;
pub mod ending;
pub mod freight;
pub mod hardware;
pub mod inside;
pub mod outer;
pub mod report;
pub mod schedule;
