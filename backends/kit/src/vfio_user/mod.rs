//! A PCI device in a process of its own, served over vfio-user instead of vhost-user.
//!
//! A device brings a [`PciDevice`]: configuration space, BARs, what to do with its interrupts and with memory that it may reach.
//! Conversation ([`session`]), the order of a start and the jail ([`serve`]) are here; program, sidecar, supervision and
//! fence are those of every other device. All of it happens on one thread: the device waits, in
//! [`PciDevice::turn`], for its own I/O and for the client's next word at the same time, so that nothing of it needs a lock.
//!
//! A client that takes memory away ([`PciDevice::quiesce`], then the answer to DMA_UNMAP) is sure that nothing of it is
//! touched any more. With no memory at all the device rests; that is how a client holds a device still.

mod serve;
mod session;

pub use serve::VfioUser;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use atoll_devices::pci::config_space::ConfigSpace;
use atoll_devices::pci::{BarMapping, BarSpace};
use atoll_protocol::vfio_user::reply::IoFd;
use thiserror::Error;

use crate::memory::GuestRam;
use crate::uring::UringError;

/// The device cannot go on; the process ends, and its successor may do better.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// Its ring.
    #[error(transparent)]
    Ring(#[from] UringError),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// Ways to write registers without a message, and the descriptors that they name by their place.
#[derive(Debug, Default)]
pub struct Ways<'a> {
    /// The ways.
    pub ways: Vec<IoFd>,
    /// The descriptors.
    pub descriptors: Vec<BorrowedFd<'a>>,
}

/// A PCI device.
pub trait PciDevice {
    /// Makes what can only be made by the thread that serves, before the jail closes.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn prepare(&mut self) -> Result<(), DeviceError>;
    /// The fence has fallen: nothing of a predecessor is under way any more, and what it left may be read.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn begin(&mut self) -> Result<(), DeviceError>;
    /// Its configuration space.
    fn config(&mut self) -> &mut ConfigSpace;
    /// The bytes of a BAR; zero for one that is not there. None of it can be mapped: a client that writes into memory wakes nobody,
    /// and this device does not poll. Those that know [`Self::ways`] write into memory and say so.
    fn bar(&self, bar: u8) -> u64;
    /// How registers of a BAR are written without a message.
    fn ways(&self, bar: u8) -> Ways<'_>;
    /// MSI-X vectors.
    fn vectors(&self) -> u16;
    /// Who is signalled by a vector; none: nobody.
    fn set_vector(&mut self, vector: u16, event: Option<OwnedFd>);
    /// Raises a vector because the client says so.
    fn raise(&mut self, vector: u16);
    /// Reads registers of a BAR, within it.
    fn read(&mut self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes registers of a BAR, within it.
    fn write(&mut self, bar: u8, offset: u64, data: &[u8]);
    /// Finishes what is under way and begins nothing new until there is other memory.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn quiesce(&mut self) -> Result<(), DeviceError>;
    /// The memory that it may reach from now on. It is [quiet](Self::quiesce).
    fn set_memory(&mut self, memory: Option<Arc<GuestRam>>);
    /// As after power-on. It is [quiet](Self::quiesce).
    fn reset(&mut self);
    /// Who is heard of in [`Self::turn`], from now on.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn attend(&mut self, client: BorrowedFd<'_>) -> Result<(), DeviceError>;
    /// Works until the client has said something.
    ///
    /// # Errors
    /// [`DeviceError`].
    fn turn(&mut self) -> Result<(), DeviceError>;
}

/// For a configuration space whose BARs are where the client puts them.
#[derive(Debug)]
pub struct Nowhere;

impl BarMapping for Nowhere {
    fn map(&self, _bar: u8, _space: BarSpace, _base: u64, _len: u64) {}
    fn unmap(&self, _bar: u8, _space: BarSpace, _base: u64, _len: u64) {}
}
