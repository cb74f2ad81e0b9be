//! A keyboard, a tablet or a mouse for a guest (virtio-input; virtio 1.2, 5.8), in a process of its own. See README.md.
//!
//! [`feed`] is the device without queues and sockets: what is said goes in, what the guest gets comes out. [`shape`] is
//! what each kind says of itself, [`device`] both on the kit.

pub mod device;
pub mod feed;
pub mod shape;
