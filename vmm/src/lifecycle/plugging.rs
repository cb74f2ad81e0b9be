//! Devices that come and go: in a configuration that is not booted, and in a machine that is.
//!
//! A device is in the configuration from the moment when it is plugged in until it has ended, and before that its
//! preparation has its name (`preparing`): neither that nor a made-up one's number is given to another.

use super::control::Plugged;
use super::error::{ErrorKind, VmError};
use super::keeper::{Keeper, Live, State, no_device, no_machine};
use super::mailbox::Answer;
use super::preparing::{Plugging, Purpose};
use super::roster;
use crate::config::{DeviceConfig, VmConfig};
use crate::machine::{DeviceBuilder, Ground, PlugError, UnplugError, UnplugEvent};

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

/// The device with its name, its builder, and what it is prepared on; `coming` are those that are on their way already.
fn describe(
    mut grown: VmConfig,
    coming: Vec<DeviceConfig>,
    device: DeviceConfig,
    live: &Live,
) -> Result<(DeviceConfig, Box<dyn DeviceBuilder>, Ground), VmError> {
    let count = coming.len();
    for other in coming {
        roster::add(&mut grown, other)?;
    }
    let device = roster::add(&mut grown, device)?;
    live.machine.has_room_for(device.id().unwrap_or_default(), count)?;
    let builder = live.plan.device(&device)?;
    Ok((device, builder, live.machine.ground()))
}

impl Keeper {
    /// Adds a device to a configuration at once; for a machine that runs, begins to prepare it. The answer comes then.
    pub(super) fn begin_add(&mut self, device: DeviceConfig, answer: Answer<Option<Plugged>>) {
        let prepared = match &mut self.state {
            State::Empty => Err(no_machine()),
            State::Created(config) | State::Shutdown(config) => {
                let added = roster::add(config, device).map(|_| None);
                self.show();
                return answer.give(added);
            }
            State::Running(config, live) | State::Paused(config, live) => {
                let coming: Vec<_> = self.preparations.devices().cloned().collect();
                describe(config.clone(), coming, device, live)
            }
        };
        match prepared {
            Ok((device, builder, ground)) => {
                let purpose = Purpose::Plug(Box::new(Plugging { device, answer }));
                self.begin_preparation(purpose, vec![builder], ground);
            }
            Err(error) => answer.give(Err(error)),
        }
    }

    /// A device that was to be plugged in is ready.
    pub(super) fn plug(&mut self, device: DeviceConfig, builder: Box<dyn DeviceBuilder>) -> Result<Plugged, VmError> {
        let (State::Running(config, live) | State::Paused(config, live)) = &mut self.state else {
            return Err(self.state.not_running());
        };
        let id = device.id().unwrap_or_default().to_owned();
        // The configuration grows only when the device is there.
        let mut grown = config.clone();
        roster::add(&mut grown, device)?;
        let place = live.machine.plug(builder)?;
        *config = grown;
        let bdf = format!("0000:00:{:02x}.{}", place.slot(), place.function());
        self.story.tell("vm", "device-added", [("id", id.clone()), ("bdf", bdf.clone())]);
        self.show();
        Ok(Plugged { id, bdf })
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
                if self.preparations.devices().any(|device| device.id() == Some(id)) {
                    let text = format!("device '{id}' is being plugged in; ask again when that is done");
                    return Err(VmError::new(ErrorKind::WrongState, text));
                }
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
