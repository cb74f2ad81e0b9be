//! The parts of `atoll-gpu`: pictures of a guest in memory that outlives the process, and the screen that shows them.
//!
//! `state` is the device without queues and sockets; begin there.

pub mod command;
pub mod command3d;
pub mod device;
pub mod display;
pub mod edid;
pub mod format;
pub mod frame_memory;
pub mod geometry;
pub mod head;
pub mod record;
pub mod render;
pub mod resource;
pub mod scene;
pub mod shared;
pub mod state;
pub mod texel;
pub mod virgl;
