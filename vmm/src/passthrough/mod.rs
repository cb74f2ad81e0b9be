//! PCI devices of the host that a guest shall have: what stands in the way of it, and who drives them.
//!
//! Everything is read from (and for [`bind`] written to) a tree of files with `sys`, `proc` and `dev` in it: the host's own at
//! `/`, or one of some other machine. Nothing here opens a device or talks to VFIO.
//!
//! [`Host::look`] reads the tree, [`check`] says about one function what is there, what is missing and the command that mends
//! it, [`record`] writes down what was read, [`bind`] gives a function to `vfio-pci` and back, and undoes what it did when a step fails.

mod bdf;
mod bind;
mod capabilities;
mod check;
mod host;
mod in_use;
mod recorded;
#[cfg(test)]
mod tests;

pub use bdf::{Bdf, BdfError};
pub use bind::{BindError, Hands, Record, SysfsHands, bind, unbind};
pub use capabilities::{Acs, Capabilities, PortKind};
pub use check::{Bar, Finding, Report, Topic, Verdict, check, switch_on};
pub use host::{Caller, Cpu, Function, Group, Host, HostError, Region};
pub use recorded::{RecordError, Recorded, record};
