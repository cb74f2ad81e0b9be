//! The host's side of the verifier: loads played against device processes without a guest.
//!
//! `atoll_verify` holds the loads, the histories and the judges; here are a driver for disks that plays guest and VMM on
//! the kit's `driver` ([`player`]), a disk process to play against ([`disk_process`]), and a disk with planted faults,
//! which shows that the judge finds them ([`faulty`]).

pub mod disk_process;
pub mod faulty;
pub mod player;
