//! What a device knows beyond its rings, given to a successor: vhost-user's device-state transfer (DEVICE_STATE).
//!
//! The state is short, so both directions use memory of ours as their channel, which the front end is given in place of
//! its own: nobody waits for anybody. In it stand two saved values in the envelopes of `protocol`: what the kit knows, and
//! behind it what the device adds. They are read as hostile input.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};

use atoll_protocol::saved::{self, Saved, SavedError, SavedType};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::device::Device;

/// The longest state, in bytes.
const STATE_MAX: u64 = 1 << 20;

/// Why a state is not given or taken.
#[derive(Debug, Error)]
pub enum StateError {
    /// A queue runs.
    #[error("its rings are not stopped")]
    Running,
    /// Nothing was asked for.
    #[error("no state was asked for or given before it was checked")]
    Nothing,
    /// The channel does not work.
    #[error("the state cannot be read or written: {0}")]
    Channel(#[from] io::Error),
    /// Longer than any state.
    #[error("a state of {0} bytes; none is longer than {STATE_MAX}")]
    Long(u64),
    /// Not in its envelope.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// The predecessor was another device.
    #[error("the predecessor {0}")]
    Other(String),
    /// Bytes are left.
    #[error("{0} bytes stand behind the state")]
    Rest(usize),
}

/// What the kit knows of any device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct KitState {
    /// What the driver has accepted; 0: there is none.
    features: u64,
    queues: u16,
}

impl Saved for KitState {
    const TYPE: SavedType = SavedType(0x0001_0000);
    const VERSION: u16 = 1;
}

/// A transfer that has begun and was not checked.
#[derive(Debug)]
pub(crate) enum Transfer {
    /// Said; the front end reads it.
    Given,
    /// The front end writes it, and we read when it says that it has.
    Taken(File),
}

/// Writes what the device knows into memory for the front end.
pub(crate) fn give<D: Device>(device: &D, features: u64) -> Result<File, StateError> {
    let state = KitState { features, queues: device.layout().queues };
    let bytes = device.save(saved::save(&state, Vec::new())?)?;
    let mut file = memory()?;
    file.write_all(&bytes)?;
    // Who reads it begins at the beginning.
    file.rewind()?;
    Ok(file)
}

/// Memory for the front end to write a state into.
pub(crate) fn memory() -> io::Result<File> {
    let fd = rustix::fs::memfd_create(c"atoll-state", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    Ok(fd.into())
}

/// Takes what the front end wrote.
pub(crate) fn take<D: Device>(device: &mut D, offered: u64, mut file: &File) -> Result<(), StateError> {
    let len = file.metadata()?.len();
    if len > STATE_MAX {
        return Err(StateError::Long(len));
    }
    let mut bytes = vec![0; len as usize];
    // Not by place: a jail has no more calls than it needs.
    file.rewind()?;
    file.read_exact(&mut bytes)?;
    let (kit, rest) = saved::restore::<KitState>(&bytes)?;
    let missing = kit.features & !offered;
    if missing != 0 {
        return Err(StateError::Other(format!("served features {missing:#x}, which are not offered here")));
    }
    if kit.queues > device.layout().queues {
        return Err(StateError::Other(format!("had {} queues, here are {}", kit.queues, device.layout().queues)));
    }
    let rest = device.restore(rest)?;
    if rest.is_empty() { Ok(()) } else { Err(StateError::Rest(rest.len())) }
}
