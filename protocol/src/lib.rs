//! The words that Atoll's processes say to each other.
//!
//! A message is a plain value that implements [`Message`]: it names its [`Kind`], says whether it may be repeated
//! ([`Idempotence`]) and how long its encoding may be. [`frame`] turns it into bytes and back; [`socket`] moves those
//! bytes, and descriptors beside them, over a connection that somebody else opened. Nothing here decides, waits without
//! a limit, or opens anything.
//!
//! Read README.md first: it has the frame's layout, the conversations, and the pinned hash of it all.

pub mod access;
pub mod bounded;
pub mod bus;
pub mod display;
pub mod frame;
pub mod id;
pub mod input;
pub mod jail;
pub mod lane;
pub mod lifecycle;
pub mod message;
pub mod operator;
pub mod saved;
pub mod sidecar;
pub mod socket;
pub mod stats;
mod stream;
pub mod vfio_user;

pub use access::{Access, AccessKind, Exit, Space, Width};
pub use frame::{FrameError, FrameHeader};
pub use id::{
    CauseId, DeviceId, Generation, Gpa, Gsi, Iova, LineIndex, MsiMessage, ProcessId, QueueIndex, RegionIndex,
    RequestId, VcpuIndex, VmId,
};
pub use message::{Idempotence, Kind, Message};
pub use socket::{Frame, FrameReader, FrameSocket, FrameWriter, SocketError};
pub use stream::ChannelError;

/// Version of the frame and of every message in it. A change of any golden byte changes it.
pub const PROTOCOL_VERSION: u16 = 6;
