//! Campaigns of faults: the shipped front end and the real device processes, a load that describes itself on the guest's
//! side of the rings, and SIGKILL at random and at named steps.
//!
//! [`campaign`] kills and judges; [`rig`] is the device without a guest, [`scene`] that with a load; [`load`] is what a class's guest does ([`disk`],
//! [`net`]; an NVMe disk's queues are [`nvme`] and [`queue_pair`]; [`entropy`] and [`console`] on [`one_queue`]). [`page`] is how a test build of the device processes is told where to die and which
//! fault to commit; [`power`] is the other claim, the loss of power. [`strata`] measures how long a kill is felt. [`upgrades`]
//! puts one build in the place of another, again and again.

pub mod campaign;
pub mod census;
pub mod console;
pub mod disk;
pub mod entropy;
pub mod load;
pub mod net;
pub mod nvme;
pub mod one_queue;
pub mod outcome;
pub mod page;
pub mod power;
pub mod queue_pair;
pub mod requests;
pub mod rig;
pub mod sabotage;
pub mod scene;
pub mod scheduling;
pub mod stall;
pub mod strata;
pub mod tap;
pub mod upgrades;
mod victim;
