//! A virtio-net device on the kit, and what it can be plugged into.

pub mod capture;
pub mod card;
pub mod control;
pub mod face;
pub mod filter;
pub mod frame;
pub mod header;
pub mod link;
pub mod offload;
pub mod options;
pub mod queue;
