//! Why a request of the front end is refused. The front end hears of a failure and no more, so the reason goes to the log.

use std::io;

use thiserror::Error;
use vhost::vhost_user::Error as VhostError;

use crate::device_state::StateError;
use crate::inflight;
use crate::iotlb::IotlbError;
use crate::ring::RingError;
use crate::worker::WorkerGone;

/// A request of the front end that is refused.
#[derive(Debug, Error)]
pub(crate) enum Refused {
    #[error("there is no queue {0}")]
    NoQueue(u32),
    #[error("queue size {0} is no power of two from 1 to {1}")]
    QueueSize(u32, u16),
    #[error("queue {0} is started without addresses")]
    NoAddresses(u16),
    #[error("queue {0} is started without guest memory")]
    NoMemory(u16),
    #[error("queue {0} has no kick descriptor; polling instead of kicks is not supported")]
    NoKick(u16),
    #[error("the addresses of queue {0} change while it runs; stop it first (GET_VRING_BASE)")]
    AddressesOfRunning(u16),
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("the last memory region is removed while queues run")]
    MemoryInUse,
    #[error("an in-flight region for {queues} queues of {size} was asked for; the device has {have} of {size_max}")]
    Inflight { queues: u16, size: u16, have: u16, size_max: u16 },
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    #[error(transparent)]
    Iotlb(#[from] IotlbError),
    #[error(transparent)]
    Log(#[from] crate::dirty::DirtyLogError),
    #[error(transparent)]
    Region(#[from] inflight::InflightError),
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Worker(#[from] WorkerGone),
    #[error(transparent)]
    Config(#[from] crate::device::ConfigError),
    #[error(transparent)]
    Fence(#[from] crate::fence::FenceError),
    #[error("its state: {0}")]
    State(#[from] StateError),
}

impl From<Refused> for VhostError {
    fn from(refused: Refused) -> Self {
        tracing::warn!(error = %refused, "a request of the front end is refused");
        Self::ReqHandlerError(io::Error::other(refused.to_string()))
    }
}
