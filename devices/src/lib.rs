//! What the guest sees, as pure state machines: an access goes in, an outcome and interrupts come out.
//!
//! Nothing here waits, spawns, opens a socket or knows which CPU drives it.

pub mod access;
pub mod acpi_hotplug;
pub mod acpi_pm;
pub mod address_map;
pub mod interrupt;
pub mod iommu;
pub mod irq;
pub mod passthrough;
pub mod pci;
pub mod power;
pub mod reset_port;
pub mod rtc;
pub mod serial;
pub mod timed;
pub mod virtio;

pub use access::{Access, Answer, Completion, Deferred, RegisterDevice};
pub use address_map::{AddressMap, AddressMapError, AddressRange};
pub use interrupt::{MsiMessage, MsiSink, MsixRoutes, Wire, WireSink, WiredOr};
pub use power::{PowerEvent, PowerSink};
pub use timed::{AtTime, GuestClock, TimedDevice};
