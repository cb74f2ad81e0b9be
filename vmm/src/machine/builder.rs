//! The seam between the assembler and each device.

use std::error::Error as StdError;
use std::time::Instant;

use thiserror::Error;

use super::Board;

/// Why a device could not be built. The message names the device; the source names the remedy.
#[derive(Debug, Error)]
#[error("{device}: {source}")]
pub struct BuildError {
    /// The device, as the user named it on the command line.
    pub device: String,
    /// What went wrong.
    #[source]
    pub source: Box<dyn StdError + Send + Sync>,
}

impl BuildError {
    /// Wraps a room's own error.
    pub fn new(device: impl Into<String>, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { device: device.into(), source: source.into() }
    }
}

/// Why a device did not start or stop. Stopping never stops at an error: the next device is stopped all the same.
#[derive(Debug, Error)]
#[error("{device} did not {step}: {source}")]
pub struct LifeError {
    /// The device.
    pub device: String,
    /// `start` or `stop`.
    pub step: &'static str,
    /// What went wrong.
    #[source]
    pub source: Box<dyn StdError + Send + Sync>,
}

/// Knows how to make one device out of its validated configuration.
pub trait DeviceBuilder: Send {
    /// The device's name in logs and errors.
    fn name(&self) -> String;
    /// Makes the device and connects it to the board.
    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError>;
}

/// A device on the board.
pub struct BuiltDevice {
    /// As its builder is named.
    pub name: String,
    /// Its part in the machine's life.
    pub life: Box<dyn DeviceLife>,
}

/// A device's part in ordered start and stop. Devices start in the order in which they were built, before the first
/// vCPU runs, and stop in reverse after the last one has stopped.
pub trait DeviceLife: Send {
    /// Starts what runs beside the vCPUs.
    fn start(&mut self) -> Result<(), LifeError>;
    /// Ends it: no process, thread or file is left behind, and nothing touches guest memory afterwards. By `deadline`
    /// the device uses force.
    fn stop(&mut self, deadline: Instant) -> Result<(), LifeError>;
}

/// The life of a device that is nothing but registers.
pub struct Passive;

impl DeviceLife for Passive {
    fn start(&mut self) -> Result<(), LifeError> {
        Ok(())
    }
    fn stop(&mut self, _deadline: Instant) -> Result<(), LifeError> {
        Ok(())
    }
}
