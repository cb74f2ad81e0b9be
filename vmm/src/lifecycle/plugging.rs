//! Devices that come and go: in a configuration that is not booted, and in a machine that is.
//!
//! A device is in the configuration from the moment when it is plugged in until it has ended, so its name and a made-up
//! one's number are not given to another before that.

use super::control::Plugged;
use super::error::{ErrorKind, VmError};
use super::keeper::{Keeper, State, no_device, no_machine};
use super::roster;
use crate::config::DeviceConfig;
use crate::machine::{PlugError, UnplugError, UnplugEvent};

impl From<PlugError> for VmError {
    fn from(error: PlugError) -> Self {
        let kind = match &error {
            PlugError::Duplicate(_) => ErrorKind::Duplicate,
            PlugError::NotPluggable(_) => ErrorKind::Unsupported,
            PlugError::Full(_) | PlugError::Build(_) | PlugError::Life(_) => ErrorKind::Failed,
        };
        Self::new(kind, error)
    }
}

impl From<UnplugError> for VmError {
    fn from(error: UnplugError) -> Self {
        let kind = match &error {
            UnplugError::Unknown(_) => ErrorKind::NotFound,
            UnplugError::OnItsWay(_) => ErrorKind::WrongState,
            UnplugError::Fixed(_) => ErrorKind::Unsupported,
        };
        Self::new(kind, error)
    }
}

impl Keeper {
    pub(super) fn add_device(&mut self, device: DeviceConfig) -> Result<Option<Plugged>, VmError> {
        let plugged = match &mut self.state {
            State::Empty => return Err(no_machine()),
            State::Created(config) | State::Shutdown(config) => {
                roster::add(config, device)?;
                None
            }
            State::Running(config, live) | State::Paused(config, live) => {
                // The configuration grows only when the device is there.
                let mut grown = config.clone();
                let device = roster::add(&mut grown, device)?;
                let id = device.id().unwrap_or_default().to_owned();
                let place = live.machine.plug(live.plan.device(&device)?)?;
                *config = grown;
                let bdf = format!("0000:00:{:02x}.{}", place.slot(), place.function());
                self.story.tell("vm", "device-added", [("id", id.clone()), ("bdf", bdf.clone())]);
                Some(Plugged { id, bdf })
            }
        };
        self.show();
        Ok(plugged)
    }

    pub(super) fn remove_device(&mut self, id: &str) -> Result<(), VmError> {
        match &mut self.state {
            State::Empty => return Err(no_machine()),
            State::Created(config) | State::Shutdown(config) => {
                if !roster::remove(config, id) {
                    return Err(no_device(id));
                }
            }
            State::Running(config, live) | State::Paused(config, live) => {
                // What is on the board and not in the configuration has a name too, and is not for users to remove.
                if !config.devices().iter().any(|device| device.id() == Some(id)) {
                    return Err(no_device(id));
                }
                live.machine.unplug(id, self.unplug_limit)?;
                self.story.tell("vm", "device-leaving", [("id", id.to_owned())]);
            }
        }
        self.show();
        Ok(())
    }

    /// Goes on with devices that leave.
    pub(super) fn look_after_unplugs(&mut self) {
        let (State::Running(config, live) | State::Paused(config, live)) = &mut self.state else { return };
        let events = live.machine.settle();
        for event in events {
            match event {
                UnplugEvent::Gone { name, asked, error, .. } => {
                    roster::remove(config, &name);
                    let asked = ("asked", asked.to_string());
                    let reason = error.map(|error| ("reason", error.to_string()));
                    self.story.tell("vm", "device-removed", [("id", name), asked].into_iter().chain(reason));
                }
                UnplugEvent::Late { name } => {
                    let reason = format!("the guest did not let it go within {} s", self.unplug_limit.as_secs());
                    self.story.tell("vm", "device-remains", [("id", name), ("reason", reason)]);
                }
            }
        }
        self.show();
    }
}
