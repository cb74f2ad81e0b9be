//! The kit that every device process of Atoll stands on: it serves one device over vhost-user.
//!
//! A device brings a [`Device`] (features, configuration space) and one [`QueueHandler`] per queue (what
//! to do with a request, or what to put into its buffers: [`inlet`]); everything else is here: the vhost-user conversation ([`session`]), guest memory
//! with its dirty log ([`memory`], [`dirty`]), one thread and one restricted io_uring per queue
//! ([`worker`], [`uring`]), descriptor chains checked as hostile input ([`chain`]), the record of requests
//! in flight that lets a successor finish them ([`inflight`]), the lock that tells a successor when its
//! predecessor's I/O is over ([`fence`]), the jail ([`jail`]) and the channel to the supervisor ([`sidecar`]).
//!
//! # Why not `vhost-user-backend`'s daemon
//!
//! The kit builds on the `vhost` crate's message layer (`BackendReqHandler` and its handler trait), on
//! `vm-memory` and on `virtio-queue`'s ring indices. The daemon of `vhost-user-backend` is not used, because
//! each of these is out of its reach: its handler answers GET/SET_INFLIGHT_FD with an error and is private,
//! so nothing can be put in front of it; its ring threads are epoll loops that cannot wait on a kick and on
//! an I/O completion in one system call; a running queue sees a changed memory table in the middle of a
//! request; logging of dirty pages stays on once switched on; and it cannot take over a connected socket.
//!
//! `virtio_queue::DescriptorChain` is replaced by [`chain`] for two reasons: a chain cannot be made for a
//! given head index, which is what resubmitting a request in flight needs, and a malformed chain looks to
//! its reader like one that simply ends.

mod areas;
pub mod back_channel;
pub mod bad_build;
mod brought;
pub mod chain;
pub mod course;
pub mod device;
pub mod device_state;
pub mod dirty;
#[cfg(feature = "driver")]
pub mod driver;
mod early_enable;
pub mod fence;
mod hand;
mod hold;
pub mod inflight;
pub mod inlet;
mod inlet_thread;
mod iotlb;
pub mod jail;
pub mod limit;
pub mod logging;
pub mod memory;
pub mod meter;
pub mod program;
mod queue_thread;
mod refused;
pub mod requests;
pub mod ring;
mod segments;
pub mod serve;
pub mod session;
pub mod sidecar;
pub mod signals;
pub mod spin;
pub mod stats;
pub mod step;
pub mod uring;
pub mod vfio_user;
pub mod worker;

/// Exit status of a process whose queue thread could not drive its ring any longer.
pub const EXIT_QUEUE_FAILED: i32 = 70;
/// Exit status of a process that found a bug in itself.
pub const EXIT_PANIC: i32 = 72;
/// Exit status of a process whose supervisor has gone.
pub const EXIT_ORPHANED: i32 = 71;

pub use device::{ConfigError, Device, Fetched, Progress, QueueHandler, QueueLayout, Wait};
pub use inlet::{Buffers, Inlet};
pub use requests::Requests;
