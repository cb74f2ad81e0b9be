//! A virtio IOMMU (virtio 1.2, 5.13): a guest says which memory its devices may reach, and at which addresses.
//!
//! [`Iommu`] is the device without its queues: a request's bytes go in, the answer's bytes come out, and with them what has
//! changed for which endpoint. Whoever serves the queues tells those that keep copies of translations, and hands the answer
//! to the guest only when they have confirmed ([`Outcome`]). [`IovaMap`] is what one domain has mapped, with no device
//! around it.
//!
//! An endpoint is in a domain, and reaches what that has mapped; or in a bypass domain, or in none while `bypass` is set,
//! and then addresses are guest-physical ones; or it reaches nothing.

mod device;
mod iova_map;
#[cfg(test)]
mod tests;
pub mod wire;

pub use device::{Change, DomainState, Iommu, IommuParts, IommuState, Outcome};
pub use iova_map::{Access, IovaMap, IovaRange, MapError, Mapping, Piece, Rights, SplitError, Unmapped};
pub use wire::{Fault, FaultReason, ReservedKind, ReservedRegion, Status};
