//! `atoll-blk`: a virtio-blk device in a process of its own, served over vhost-user.
//!
//! [`storage`] is what the disk lies on, [`disk`] the device that the guest sees, [`request`] what happens to each
//! request. Everything else comes from the kit.

pub mod bounce;
pub mod disk;
pub mod request;
pub mod storage;
