//! The guest half of a PCI function of the host that a guest drives itself.
//!
//! [`Shown`] says, from the function's configuration space alone, what of it the guest sees; [`PassedFunction`] answers the
//! guest's accesses with that and hands the rest to a [`HostFunction`], which is whatever reaches the real one: VFIO, or
//! another process. Its BARs are the board's, MSI and MSI-X are kept here and come out as messages for eventfds.
//!
//! What the function says is not trusted: lists that turn in circles end, tables outside their BAR are refused, and what it
//! does not answer reads as ones.

pub mod capabilities;
mod direct;
mod function;
mod msi;
mod shown;
#[cfg(test)]
mod tests;

pub use direct::{Pages, direct_pages};
pub use function::{FunctionError, HostFunction, Interrupts, PassedFunction, PassedParts, Region};
pub use msi::MsiPlace;
pub use shown::{EXTENDED_LEN, HostBar, HostFacts, MsixPlace, Shown, ShownError, Stretch};
