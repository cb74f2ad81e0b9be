//! virtio devices as the guest meets them (virtio 1.2): the transport is here, the device itself is another process.

pub mod driver_intent;

pub use driver_intent::{DeviceOffer, Intent, QueueConfig, VirtioFrontend};
