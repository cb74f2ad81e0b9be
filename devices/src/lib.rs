//! What the guest sees, as pure state machines: an access goes in, an outcome and interrupts come out.
//!
//! Nothing here waits, spawns, opens a socket or knows which CPU drives it.

pub mod access;
pub mod interrupt;
pub mod virtio;

pub use access::{Access, Answer, Completion, Deferred, RegisterDevice};
pub use interrupt::{MsiMessage, MsiSink, Wire, WireSink};
