//! PCI as the guest meets it: configuration space, BARs, capabilities, MSI-X and the root bus.

pub mod config_space;
pub mod function;
pub mod host_bridge;
pub mod msix;
pub mod root;
#[cfg(test)]
mod tests;

pub use config_space::{BarKind, ConfigSpace, Identity};
pub use function::{BarError, BarMapping, BarSpace, DevFn, PciFunction, SharedFunction};
pub use host_bridge::HostBridge;
pub use msix::Msix;
pub use root::{ConfigPorts, Ecam, PciRoot, SharedRoot};
