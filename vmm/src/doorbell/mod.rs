//! Doorbells: how a guest's notification of a queue reaches the backend.
//!
//! A [`Doorbell`] ends in one eventfd that the backend holds for as long as the VM lives, whatever happens to the
//! backend: a kick that nobody hears stays counted in it. On KVM the processor signals it without leaving the guest
//! (ioeventfd); on the software CPU the write reaches [`DoorbellTable::write`], which signals it.
//!
//! Each doorbell is [`Path::Direct`] or [`Path::Interposed`]: through the [`Relay`]'s thread, which counts and may hold
//! back or drop. Switching needs no pause and loses nothing: a kick in the moment between two paths comes out as a
//! register write and is rung by hand, and what lies in the abandoned eventfd is carried over.

mod bell;
mod relay;
mod table;

pub use bell::{Doorbell, DoorbellError, Path};
pub use relay::{Interposer, PassThrough, Relay, RelayError, RelayedEvent, Verdict};
pub(crate) use relay::{borrowed, signal, take};
pub use table::DoorbellTable;

#[cfg(test)]
mod tests;
