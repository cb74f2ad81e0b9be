//! `atoll-nvme`: an NVMe controller on a file, in a process of its own, served over vfio-user.
//!
//! [`controller`] is the controller without any I/O, on a [`record`] that outlives the process; [`queues`] says how commands
//! are fetched and completed exactly once, [`admin`](controller) and [`identify`] what it answers, [`prp`] where data is.
//! [`engine`] carries out what the medium has to do, and [`device`] puts both behind the kit's PCI device.

mod admin;
pub mod controller;
pub mod device;
pub mod engine;
pub mod identify;
pub mod prp;
pub mod queues;
pub mod record;
pub mod spec;

#[cfg(test)]
mod tests;
