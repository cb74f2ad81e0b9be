//! PCI functions of the host that the guest drives itself (VFIO), for `--device path=`.
//!
//! A function is opened through its IOMMU group ([`space`]), in a container in which guest memory is mapped: its DMA reaches
//! that and nothing else. What the guest sees of its configuration space is `atoll_devices::passthrough`'s; what is behind
//! ([`device`]) reads and writes the real one, connects its interrupts to the guest's vectors by eventfds, and its pin to a
//! line ([`pin`]). On KVM its registers are memory of the guest's ([`bars`]), and interrupts pass nobody; on the software CPU
//! each access to a register comes here, and DMA is the same. Behind the guest's IOMMU ([`behind`]) it reaches what the guest
//! has mapped.
//!
//! A device is open from its preparation until it is stopped, which is when the kernel resets it. A reset of the machine opens
//! it anew. [`watch`] hears what the host says of it meanwhile.

mod bars;
mod behind;
mod builder;
mod device;
mod error;
mod ioctl;
mod pin;
mod space;
mod watch;

pub(crate) use builder::{Surroundings, VfioBuilder};
pub use error::VfioError;
pub(crate) use ioctl::{EVENT_CALLS, VCPU_CALLS};
pub(crate) use space::SharedSpace;
