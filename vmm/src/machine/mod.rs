//! The machine: a validated configuration becomes a list of builders, the builders make a board, and the board runs.
//!
//! Assembling only loops: each device brings its own [`DeviceBuilder`], which takes what it needs from the [`Board`] and
//! hands back a [`BuiltDevice`] that takes part in ordered start and stop. Nothing here knows a device by name.

mod board;
pub mod boot;
mod builder;
pub mod layout;

pub use board::Board;
pub use builder::{BuildError, BuiltDevice, DeviceBuilder, DeviceLife, LifeError, Passive};
