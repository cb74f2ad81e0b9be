//! `atoll-blk`: a virtio-blk device in a process of its own, served over vhost-user.
//!
//! [`storage`] is what the disk lies on, [`disk`] the device that the guest sees, [`request`] what happens to each
//! request. [`qcow2`] is what there is more to images of that format. Everything else comes from the kit.

pub mod bounce;
pub mod disk;
pub mod fence;
pub mod probe;
pub mod qcow2;
pub mod request;
pub mod storage;

/// What an image is, as people say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ImageType {
    /// The disk, byte for byte.
    Raw,
    /// qcow2, of version 2 or 3.
    Qcow2,
}
