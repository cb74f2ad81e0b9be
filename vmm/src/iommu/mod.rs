//! The machine's virtual IOMMU: the one virtio device that the core serves itself, because it decides which memory all the
//! others may reach.
//!
//! [`Unit`] is what the others see of it: they join it as endpoints, ask it where addresses lead, tell it of accesses that
//! it refused, and hear of each change before the guest hears that it is done ([`Endpoint`]). [`IommuBuilder`] puts it on the
//! board, with a thread that serves its two queues (`queues`). The rules are in `atoll_devices::iommu`.
//!
//! It is there only if a device of the configuration has `iommu=on`. Until the guest's driver has attached a device, the
//! device reaches all memory at its own addresses, so that firmware and kernels without a driver work.

mod builder;
mod queues;
#[cfg(test)]
mod tests;
mod unit;

pub use builder::IommuBuilder;
pub use unit::{Endpoint, Unconfirmed, Unit, endpoint_id};
