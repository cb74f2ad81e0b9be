//! virtio devices as the guest meets them (virtio 1.2): the transport is here, the device itself is another process.

pub mod common_config;
pub mod device_class;
pub mod driver_intent;
pub mod input_config;
pub mod notification;
pub mod pci;
#[cfg(test)]
mod tests;

pub use driver_intent::{DeviceOffer, Intent, NoDoorbells, NotifyPlacement, QueueConfig, VirtioFrontend};
pub use pci::{OfferError, VirtioPci, VirtioPciParts, VirtioPciState};
