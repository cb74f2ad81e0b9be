//! Guest RAM: what holds it, and how each user wants to see it.
//!
//! RAM is one memfd, sealed so that nobody who is given it can change its size. The same bytes are shown as
//! vm-memory's [`GuestMemoryMmap`](vm_memory::GuestMemoryMmap) (the VMM), as [`GuestRam`](atoll_softcpu::ram::GuestRam)
//! (the software CPU), as memory slots (KVM) and as a memory table (vhost-user backends). Where it lies is the board's
//! to say ([`layout`](crate::machine::layout)).

mod device_pages;
mod guest_memory;

pub use device_pages::DevicePages;
pub use guest_memory::{BACKEND_ADDRESS_OFFSET, GuestMemory, MemoryError, MemorySlot, RamRange, backend_address};
