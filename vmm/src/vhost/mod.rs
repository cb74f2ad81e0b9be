//! vhost-user, the front end: a virtio device whose other half is a process of its own.
//!
//! [`DeviceFactory`] makes the builder of any of them from its configuration. A kind of device is a
//! [`DeviceClass`] (what the guest is offered on top of a backend) and a source of backends; `kinds` has them all, and
//! everything else is the same for each. Read `worker` for a device's life, `recovery` for how it comes
//! through the death of a backend, `session` for the order of messages,
//! `conversation` for how a silent backend is dealt with, `back_channel` for what a backend may say by itself. Data never
//! comes this way: kicks and calls are eventfds, requests are in guest memory.

mod back_channel;
mod builder;
mod call;
mod class;
mod config_space;
mod conversation;
mod device;
mod device_error;
mod device_state;
mod error;
mod factory;
mod fault;
mod features;
pub(crate) mod gate;
mod gpu_socket;
mod guest_ring;
mod inflight;
mod iotlb;
mod kinds;
mod ledger;
mod orders;
mod parts;
mod patience;
pub(crate) mod recovery;
mod request;
mod rings;
mod session;
mod shadow;
mod source;
mod spawned;
mod standin;
mod status;
mod upgrade;
mod window;
mod worker;

#[cfg(test)]
mod tests;

pub use back_channel::{BackChannel, ChannelError, Heard};
pub(crate) use builder::Placements;
pub use call::Transport;
pub use class::{ConfigWish, DeviceClass};
pub(crate) use device::tell_jail;
pub use device::{ConnectError, Connected, PauseError, SwitchError, VhostDevice, VhostFrontend};
pub(crate) use device_error::InFlight;
pub use error::{ConversationError, Step};
pub use factory::{DeviceFactory, FactoryError, FactoryParts};
pub use fault::{Fault, FaultError};
pub use features::{feature_names, offerable, protocol_feature_names};
pub(crate) use guest_ring::{GuestRing, RingFault};
pub use iotlb::Miss;
pub(crate) use kinds::open_image;
pub use kinds::{ChainError, ConsoleError, DiskError, NetError, TapError, UserError, switch_socket};
pub use parts::{Care, DeviceParts, Limits};
pub use patience::{Ending, Patience};
pub use session::Capabilities;
pub(crate) use source::is_readable;
pub use source::{
    BackendProcess, BackendSource, Build, EndIsEnough, ExternalSocket, Fence, Incarnation, SourceError, Start, Unseen,
};
pub use spawned::{MakeDescriptors, SpawnedBackend};
pub use standin::{RecordError, unfinished};
pub use status::{DeviceState, DeviceStatus, Recovery, Spare};
pub use upgrade::{Lone, SWITCH_STEP, UPGRADE_TRIAL, UpgradeError, UpgradeOrder, UpgradeOutcome};
pub(crate) use upgrade::{UPGRADE_MAX, await_outcome};
pub(crate) use worker::is_traced;
pub use worker::{LinkError, ResizeError};
