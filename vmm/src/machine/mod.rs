//! The machine: a validated configuration becomes a list of builders, the builders make a board, and the board runs.
//!
//! Assembling only loops: each device brings its own [`DeviceBuilder`], which takes what it needs from the [`Board`] and
//! hands back a [`BuiltDevice`] that takes part in ordered start and stop. Nothing here knows a device by name.

pub mod acpi;
mod assembly;
mod board;
pub mod boot;
mod builder;
mod census;
mod chipset;
mod config;
mod end;
mod events;
mod ground;
mod hotplug;
pub mod layout;
mod pause;
mod serial;
mod serial_branch;
mod serial_line;
mod serial_peer;
mod slots;
mod transcript;

pub use assembly::{Machine, Rebuilt};
pub use board::{Board, BoardError, BoardParts};
pub use builder::{
    BuildError, BuiltDevice, DeviceBuilder, DeviceLife, LifeError, LinkState, NewSize, Passive, Unsupported,
};
pub use census::VcpuReport;
pub use chipset::chipset;
pub use config::{CpuKind, MachineConfig};
pub use end::{MachineEnd, MachineError, MachineFigures, failure};
pub use events::{EventSender, EventSink, MachineEvent, StopCause};
pub use ground::{Ground, Withdrawal};
pub use hotplug::{PlugError, UnplugError, UnplugEvent};
pub use pause::{PauseError, PauseFigures, PauseLimits};
pub use serial::{EscapeFilter, SerialBuilder, SerialEnd, SerialError};
pub use serial_branch::SerialBranch;
pub use serial_line::SerialLine;
pub use serial_peer::Peer as SerialPeer;
pub use slots::FunctionBars;
pub use transcript::Transcript;
