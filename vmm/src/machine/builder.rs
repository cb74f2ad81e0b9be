//! The seam between the assembler and each device.

use std::error::Error as StdError;
use std::str::FromStr;
use std::time::Instant;

use atoll_devices::pci::DevFn;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Board;
use super::ground::{Ground, Withdrawal};
use crate::lifecycle::DeviceReport;
use crate::vhost::{Fault, UpgradeOrder, UpgradeOutcome};

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
    /// What it was to do, as in "did not resume".
    pub step: &'static str,
    /// What went wrong.
    #[source]
    pub source: Box<dyn StdError + Send + Sync>,
}

/// What a kind of device cannot be asked for, and what leads there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("not supported for {what}: {instead}")]
pub struct Unsupported {
    /// The kind.
    pub what: &'static str,
    /// What to do instead.
    pub instead: &'static str,
}

/// How big what is behind a device shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewSize {
    /// In bytes.
    pub bytes: u64,
    /// It may be less than now: what lies behind is gone then.
    pub allow_shrink: bool,
}

/// Whether the cable of a network card is plugged in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// It is.
    #[default]
    Up,
    /// It is not: the guest sees no carrier, and nothing passes.
    Down,
}

impl FromStr for LinkState {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "up" => Ok(Self::Up),
            "down" => Ok(Self::Down),
            _ => Err("a link is up or down"),
        }
    }
}

/// Knows how to make one device out of its validated configuration.
pub trait DeviceBuilder: Send {
    /// The device's name in logs and errors.
    fn name(&self) -> String;
    /// Does what needs no board and may wait for another process, such as reaching a backend; ends early when it is
    /// withdrawn. Where nobody calls this, [`build`](Self::build) does it.
    ///
    /// # Errors
    /// When the device cannot be had. Nothing of it is left then, nor when a prepared builder is dropped.
    fn prepare(&mut self, _ground: &Ground, _withdrawal: &Withdrawal) -> Result<(), BuildError> {
        Ok(())
    }
    /// Makes the device and connects it to the board.
    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError>;
}

/// A device on the board.
pub struct BuiltDevice {
    /// As its builder is named.
    pub name: String,
    /// Its PCI function, for devices that have one.
    pub place: Option<DevFn>,
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
    /// vCPUs stand: a [`Self::pause`] is about to follow. Begins with it, and waits for nothing: all devices drain at the
    /// same time. [`Self::resume`] undoes this too.
    fn begin_pause(&mut self) {}
    /// vCPUs stand: finishes what is in flight by `deadline` and touches guest memory no more until [`Self::resume`].
    ///
    /// # Errors
    /// When it is late; then it goes on as if it had not been asked.
    fn pause(&mut self, _deadline: Instant) -> Result<(), LifeError> {
        Ok(())
    }
    /// Undoes [`Self::pause`].
    ///
    /// # Errors
    /// When the device cannot go on.
    fn resume(&mut self) -> Result<(), LifeError> {
        Ok(())
    }
    /// Changes the size of what is behind the device, and tells the guest.
    ///
    /// # Errors
    /// When the device has no size, or not this one.
    fn resize(&mut self, _size: NewSize) -> Result<(), LifeError> {
        let source = "the device has no size that could be changed".into();
        Err(LifeError { device: "device".into(), step: "resize", source })
    }
    /// Plugs the cable of a network card in or out, and tells the guest.
    ///
    /// # Errors
    /// When it is none.
    fn set_link(&mut self, _link: LinkState) -> Result<(), LifeError> {
        let source = "the device is no network card".into();
        Err(LifeError { device: "device".into(), step: "change its link", source })
    }
    /// Does to a device what the world may do, for a test.
    ///
    /// # Errors
    /// When there is no process behind it, or it is in no state for it.
    fn inject(&mut self, _fault: Fault, _seed: u64) -> Result<(), LifeError> {
        let source = "the device has no process to which anything could happen".into();
        Err(LifeError { device: "device".into(), step: "suffer the fault", source })
    }
    /// Gives a device whose process was given up another chance.
    ///
    /// # Errors
    /// When there is no process behind it.
    fn revive(&mut self) -> Result<(), LifeError> {
        let source = "the device has no process that could be started again".into();
        Err(LifeError { device: "device".into(), step: "revive", source })
    }
    /// Begins to put a process of another program in the place of the one that serves it; what comes of that comes later.
    ///
    /// # Errors
    /// When there is no process behind it, or it cannot be replaced.
    fn upgrade(&mut self, _order: UpgradeOrder) -> Result<UpgradeOutcome, LifeError> {
        let source = "no process stands behind it that could hand over what it knows to another build; one that is killed has a \
                      successor of the program that lies at its path then"
            .into();
        Err(LifeError { device: "device".into(), step: "take the upgrade", source })
    }
    /// What an operator is told about it; `None` for devices without a process.
    fn report(&self) -> Option<DeviceReport> {
        None
    }
    /// The machine is reset: stops like [`Self::stop`] as far as the guest is concerned, but keeps the process that serves
    /// the device. Gives a builder that puts it on the next board; `None` for a device that has stopped altogether, and
    /// whose usual builder makes it anew.
    fn survive(mut self: Box<Self>, deadline: Instant) -> Option<Box<dyn DeviceBuilder>> {
        if let Err(error) = self.stop(deadline) {
            tracing::error!(%error, "a device did not stop cleanly");
        }
        None
    }
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
