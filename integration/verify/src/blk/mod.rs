//! Disks: sectors that describe themselves, concurrent overlapping writers, and a judge.
//!
//! [`workload`] says what operation `n` of a seed does. Drivers carry operations out and write a [`history`]: each is
//! invoked, and completed with what its sectors held ([`sector`]). The [`judge`] takes every sector as a register
//! ([`register`]) and asks whether there is an order of the operations, each between its invocation and its
//! acknowledgement, that gives what was read; what was acknowledged must survive the death of a process, and what was
//! flushed the loss of power. [`guest`] is the driver for a block device of Linux.

pub mod guest;
pub mod history;
pub mod judge;
pub mod register;
pub mod sector;
pub mod verdict;
pub mod workload;

pub use history::{Event, History, Outcome, Record};
pub use judge::Judge;
pub use verdict::{Verdict, Violation};
pub use workload::{Kind, Operation, Workload};
