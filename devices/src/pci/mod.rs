//! PCI as the guest meets it: configuration space, BARs, capabilities, MSI-X and the root bus.

pub mod function;

pub use function::{BarError, BarMapping, BarSpace, DevFn, PciFunction, SharedFunction};
