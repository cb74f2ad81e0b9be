//! vhost-user, the front end: a virtio device whose other half is a process of its own.
//!
//! Read [`worker`] for a device's life, [`session`] for the order of messages, [`conversation`] for how a silent backend
//! is dealt with. Data never comes this way: kicks and calls are eventfds, requests are in guest memory.

mod backoff;
mod call;
mod config_space;
mod conversation;
mod device;
mod disk;
mod disk_config;
mod error;
mod features;
mod inflight;
mod patience;
mod rings;
mod session;
mod source;
mod spawned;
mod worker;

#[cfg(test)]
mod tests;

pub use call::Transport;
pub use device::{
    ConnectError, Connected, DeviceClass, DeviceParts, DeviceState, DeviceStatus, Limits, Recovery, SwitchError,
    VhostDevice, VhostFrontend,
};
pub use disk::{DiskBuilder, DiskError};
pub use disk_config::{Backing, DiskConfig, DiskConfigError};
pub use error::{ConversationError, Step};
pub use features::{feature_names, offerable, protocol_feature_names};
pub use patience::{Ending, Patience};
pub use session::Capabilities;
pub use source::{BackendProcess, BackendSource, ExternalSocket, Incarnation, SourceError};
pub use spawned::SpawnedBackend;
