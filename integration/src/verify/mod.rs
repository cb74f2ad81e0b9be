//! The host's side of the verifier: loads played against device processes without a guest.
//!
//! `atoll_verify` holds the loads, the histories and the judges; here are drivers that play guest and VMM on the kit's
//! `driver`, for disks ([`player`], on queues of several kinds: [`disk_queues`]) and for two ports of a switch ([`talk`]), the processes to play against
//! ([`device_process`]), and a disk with planted faults, which shows that the judge finds them ([`faulty`]).

pub mod device_process;
pub mod disk_queues;
pub mod faulty;
pub mod player;
pub mod talk;
