//! The machine: a validated configuration becomes a list of builders, the builders make a board, and the board runs.
//!
//! Assembling only loops: each device brings its own [`DeviceBuilder`], which takes what it needs from the [`Board`] and
//! hands back a [`BuiltDevice`] that takes part in ordered start and stop. Nothing here knows a device by name.

pub mod acpi;
mod assembly;
mod board;
pub mod boot;
mod builder;
mod chipset;
mod config;
mod events;
mod hotplug;
pub mod layout;
mod serial;
mod slots;

pub use assembly::{Machine, MachineEnd, MachineError, MachineFigures};
pub use board::{Board, BoardError, BoardParts};
pub use builder::{BuildError, BuiltDevice, DeviceBuilder, DeviceLife, LifeError, Passive};
pub use chipset::chipset;
pub use config::{CpuKind, MachineConfig, SerialMode};
pub use events::{EventReceiver, EventSender, MachineEvent, StopCause, events};
pub use hotplug::{PlugError, UnplugError, UnplugEvent};
pub use serial::{SerialBuilder, SerialEnd, SerialError};
pub use slots::FunctionBars;
