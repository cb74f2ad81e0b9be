//! Devices that come and go while the guest runs.
//!
//! In: prepare (the process starts and is greeted, on whatever thread), build (the function gets a slot that the guest does
//! not see yet), start, show, tell the guest.
//! When a step fails, those before it are undone. Out: the guest is asked, and nobody waits for it. When it lets the device
//! go, its vCPU takes the function out of sight by itself; [`Machine::settle`] then ends the device on a thread of its own,
//! because a backend that is gone or stuck takes its time, and frees name and slot when that is done. A guest that does not
//! answer within the limit keeps the device and the request is withdrawn. A guest that lets a device go unasked, busy or
//! not, has pulled it out by itself: it goes the same way.
//!
//! The limit does not run while the machine stands. A guest that is not up yet finds the request when it is. One that is
//! just coming up may take the request and have nobody to give it to: as long as the limit runs, the guest is asked again.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_devices::pci::DevFn;
use thiserror::Error;

use super::{BoardError, BuildError, BuiltDevice, DeviceBuilder, LifeError, Machine, MachineEvent};

/// How long a device that was let go has to stop before it uses force.
const STOP_TIME_MAX: Duration = Duration::from_secs(5);
/// How often a guest that has taken a request and is silent is asked within the limit (every 5 s of the usual minute). Not
/// more often: one that is asked while it lets the device go looks a second time, and finds nothing.
const ASKS: u32 = 12;

/// Why a device was not plugged in. Nothing of it is left.
#[derive(Debug, Error)]
pub enum PlugError {
    /// There is one of that name, maybe on its way out.
    #[error("there is a device '{0}' already: give the new one another id, or remove that one first")]
    Duplicate(String),
    /// No slot.
    #[error(transparent)]
    Full(BoardError),
    /// Not a device of the bus.
    #[error("{0} cannot be plugged into a running machine: give it at the start")]
    NotPluggable(String),
    /// It could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// It did not start.
    #[error(transparent)]
    Life(#[from] LifeError),
}

/// Why a device is not pulled out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum UnplugError {
    /// No such device.
    #[error("there is no device '{0}'")]
    Unknown(String),
    /// The guest has let it go, and it is ending.
    #[error("device '{0}' is on its way out already: it is gone when vm.info no longer has it")]
    OnItsWay(String),
    /// It belongs to the board.
    #[error("'{0}' is part of the board and cannot be removed")]
    Fixed(String),
}

/// What has become of a device that was to go, or went.
#[derive(Debug)]
pub enum UnplugEvent {
    /// It is gone; name and slot are free.
    Gone {
        /// Its name.
        name: String,
        /// Its place until now.
        place: DevFn,
        /// Somebody had asked for it; else the guest did it by itself.
        asked: bool,
        /// What went wrong while it stopped; it has ended all the same.
        error: Option<LifeError>,
    },
    /// The guest has not let it go within the limit; it stays.
    Late {
        /// Its name.
        name: String,
    },
}

/// What a device that leaves is at.
enum Leaving {
    /// The guest was asked.
    Asked { place: DevFn, deadline: Instant, again: Instant, every: Duration },
    /// The guest has let it go; its thread says when it has ended.
    Ending { place: DevFn, asked: bool, thread: Option<JoinHandle<()>> },
}

/// A device has ended.
struct Ended {
    name: String,
    error: Option<LifeError>,
}

/// The devices of a machine that are on their way out, by name.
pub(super) struct Hotplug {
    leaving: BTreeMap<String, Leaving>,
    ends: (Sender<Ended>, Receiver<Ended>),
    /// Since when the machine stands.
    frozen: Option<Instant>,
}

impl Default for Hotplug {
    fn default() -> Self {
        Self { leaving: BTreeMap::new(), ends: channel(), frozen: None }
    }
}

/// Ends a device for good; threads, process and descriptors are gone when this returns.
fn end(mut device: BuiltDevice) -> Option<LifeError> {
    let stopped = device.life.stop(Instant::now() + STOP_TIME_MAX);
    stopped.err()
}

impl Machine {
    /// Whether a device of this name could be plugged in beside `coming` others that are being prepared.
    ///
    /// # Errors
    /// When there is one of its name, or no slot.
    pub fn has_room_for(&self, name: &str, coming: usize) -> Result<(), PlugError> {
        if self.has_device(name) {
            return Err(PlugError::Duplicate(name.into()));
        }
        if self.board.free_slots() > coming { Ok(()) } else { Err(PlugError::Full(BoardError::NoSlot)) }
    }

    /// Plugs a device into the running machine; its place. What may wait for another process has been done before, where
    /// its builder was [prepared](DeviceBuilder::prepare).
    ///
    /// # Errors
    /// When there is no room for it or it cannot be made. Nothing of it is left then.
    pub fn plug(&mut self, builder: Box<dyn DeviceBuilder>) -> Result<DevFn, PlugError> {
        let name = builder.name();
        if self.has_device(&name) {
            return Err(PlugError::Duplicate(name));
        }
        // Before anything is started.
        let slot = self.board.next_slot().ok_or(PlugError::Full(BoardError::NoSlot))?;
        self.board.veil(true);
        let built = builder.build(&mut self.board);
        self.board.veil(false);
        let started = built.map_err(PlugError::from).and_then(|mut device| {
            let Some(place) = device.place else {
                end(device);
                return Err(PlugError::NotPluggable(name.clone()));
            };
            // A device that comes while the machine stands, stands with it.
            let stands = self.hotplug.frozen.is_some();
            let started = device.life.start().and_then(|()| match stands {
                true => device.life.pause(Instant::now() + STOP_TIME_MAX),
                false => Ok(()),
            });
            match started {
                Ok(()) => Ok((device, place)),
                Err(error) => {
                    end(device);
                    Err(error.into())
                }
            }
        });
        match started {
            Ok((device, place)) => {
                tracing::info!(device = name, slot, "plugged in");
                self.devices.push(device);
                self.board.reveal(place);
                Ok(place)
            }
            Err(error) => {
                if let Some(place) = DevFn::new(slot, 0) {
                    self.board.remove_pci(place);
                }
                Err(error)
            }
        }
    }

    /// Asks the guest to let a device go within `limit`. Returns at once; [`settle`](Self::settle) says what came of it.
    ///
    /// Asked again, the guest is: a kernel that was not up yet has taken the first request and had nobody to give it to.
    ///
    /// # Errors
    /// When there is no such device, it cannot go, or the guest has let it go.
    pub fn unplug(&mut self, name: &str, limit: Duration) -> Result<(), UnplugError> {
        if let Some(Leaving::Ending { .. }) = self.hotplug.leaving.get(name) {
            return Err(UnplugError::OnItsWay(name.into()));
        }
        let device = self.devices.iter().find(|device| device.name == name);
        let device = device.ok_or_else(|| UnplugError::Unknown(name.into()))?;
        let place = device.place.ok_or_else(|| UnplugError::Fixed(name.into()))?;
        let mut hotplug = self.board.hotplug();
        // The guest may have let it go by itself a moment ago.
        let gone = hotplug.ejected() >> place.slot() & 1 == 1;
        if !hotplug.ask_to_leave(place.slot()) && !gone {
            return Err(UnplugError::Fixed(name.into()));
        }
        drop(hotplug);
        tracing::info!(device = name, slot = place.slot(), "the guest is asked to let a device go");
        let now = self.hotplug.frozen.unwrap_or_else(Instant::now);
        let every = limit / ASKS;
        let asked = Leaving::Asked { place, deadline: now + limit, again: now + every, every };
        self.hotplug.leaving.insert(name.into(), asked);
        Ok(())
    }

    /// Whether a device of this name is on the board, or still on its way out.
    pub fn has_device(&self, name: &str) -> bool {
        self.is_leaving(name) || self.devices.iter().any(|device| device.name == name)
    }

    /// Whether the device was asked to leave or is leaving. Such a device is not carried over a reset of the machine.
    pub fn is_leaving(&self, name: &str) -> bool {
        self.hotplug.leaving.contains_key(name)
    }

    /// The devices that were asked to leave or are leaving.
    pub fn leaving(&self) -> Vec<String> {
        self.hotplug.leaving.keys().cloned().collect()
    }

    /// When [`settle`](Self::settle) must be called at the latest; besides, it is to be called at each
    /// [`MachineEvent::Ejected`] and [`MachineEvent::Departed`].
    pub fn unplug_deadline(&self) -> Option<Instant> {
        let asked = self.hotplug.leaving.values().filter_map(|leaving| match leaving {
            Leaving::Asked { deadline, again, .. } => Some((*deadline).min(*again)),
            Leaving::Ending { .. } => None,
        });
        asked.min().filter(|_| self.hotplug.frozen.is_none())
    }

    /// The machine stands: limits do not run.
    pub fn freeze_unplugs(&mut self) {
        self.hotplug.frozen.get_or_insert_with(Instant::now);
    }

    /// It runs again, and so do limits.
    pub fn thaw_unplugs(&mut self) {
        let Some(since) = self.hotplug.frozen.take() else { return };
        let stood = since.elapsed();
        for leaving in self.hotplug.leaving.values_mut() {
            if let Leaving::Asked { deadline, again, .. } = leaving {
                *deadline += stood;
                *again += stood;
            }
        }
    }

    /// Goes on with devices that leave, without waiting for any; what has happened since the last call.
    pub fn settle(&mut self) -> Vec<UnplugEvent> {
        self.begin_ends();
        let mut events = self.finish_ends();
        if self.hotplug.frozen.is_none() {
            events.extend(self.withdraw_late());
            self.ask_again();
        }
        events
    }

    /// Waits for the devices that are ending: their time to stop is bounded.
    pub fn finish_unplugs(&mut self) -> Vec<UnplugEvent> {
        self.begin_ends();
        for leaving in self.hotplug.leaving.values_mut() {
            if let Leaving::Ending { thread, .. } = leaving
                && let Some(thread) = thread.take()
            {
                // It only fails if the thread panicked, which its hook has reported.
                let _ = thread.join();
            }
        }
        self.finish_ends()
    }

    /// Ends what the guest has let go.
    fn begin_ends(&mut self) {
        let ejected = self.board.hotplug().ejected();
        let gone = |device: &BuiltDevice| device.place.is_some_and(|place| ejected >> place.slot() & 1 == 1);
        while let Some(index) = self.devices.iter().position(gone) {
            let device = self.devices.remove(index);
            // `gone` is true only of devices that have a place.
            let Some(place) = device.place else { continue };
            let name = device.name.clone();
            let asked = self.is_leaving(&name);
            tracing::info!(device = name, slot = place.slot(), asked, "the guest has let a device go");
            let (sender, events) = (self.hotplug.ends.0.clone(), self.events.clone());
            let work = {
                let name = name.clone();
                move |device: BuiltDevice| {
                    let error = end(device);
                    // The machine may be gone, and then nobody needs to know.
                    let _ = sender.send(Ended { name, error });
                    events.tell(MachineEvent::Departed);
                }
            };
            // The device is handed over when the thread is there, so that it can be ended here when there is none.
            let (hand_over, given) = channel::<BuiltDevice>();
            let on_thread = work.clone();
            let spawned = std::thread::Builder::new().name("unplug".into()).spawn(move || {
                if let Ok(device) = given.recv() {
                    on_thread(device);
                }
            });
            let thread = match spawned {
                Ok(thread) => {
                    // The receiver waits for exactly this.
                    let _ = hand_over.send(device);
                    Some(thread)
                }
                Err(error) => {
                    tracing::warn!(%error, "no thread to stop a device on: the machine waits for it");
                    work(device);
                    None
                }
            };
            self.hotplug.leaving.insert(name, Leaving::Ending { place, asked, thread });
        }
    }

    /// Frees what has ended.
    fn finish_ends(&mut self) -> Vec<UnplugEvent> {
        let ended: Vec<Ended> = self.hotplug.ends.1.try_iter().collect();
        let mut events = Vec::new();
        for Ended { name, error } in ended {
            let Some(Leaving::Ending { place, asked, thread }) = self.hotplug.leaving.remove(&name) else { continue };
            if let Some(thread) = thread {
                // It has said its last word.
                let _ = thread.join();
            }
            self.board.remove_pci(place);
            events.push(UnplugEvent::Gone { name, place, asked, error });
        }
        events
    }

    /// Asks a guest once more that has taken the request and let nothing go. Where it has not taken it yet, that changes
    /// nothing: it is one bit.
    fn ask_again(&mut self) {
        let now = Instant::now();
        for (name, leaving) in &mut self.hotplug.leaving {
            let Leaving::Asked { place, again, every, .. } = leaving else { continue };
            if *again <= now {
                *again = now + *every;
                tracing::debug!(device = name, slot = place.slot(), "the guest is asked again to let a device go");
                self.board.hotplug().ask_to_leave(place.slot());
            }
        }
    }

    /// Gives up asking for devices that the guest did not let go in time.
    fn withdraw_late(&mut self) -> Vec<UnplugEvent> {
        let now = Instant::now();
        let late = |leaving: &Leaving| match leaving {
            Leaving::Asked { place, deadline, .. } if *deadline <= now => Some(*place),
            _ => None,
        };
        let late: Vec<(String, DevFn)> =
            self.hotplug.leaving.iter().filter_map(|(name, leaving)| Some((name.clone(), late(leaving)?))).collect();
        let mut events = Vec::new();
        for (name, place) in late {
            let mut hotplug = self.board.hotplug();
            hotplug.withdraw(place.slot());
            // It went in the last moment: the next call ends it.
            let gone = hotplug.ejected() >> place.slot() & 1 == 1;
            drop(hotplug);
            if !gone {
                self.hotplug.leaving.remove(&name);
                events.push(UnplugEvent::Late { name });
            }
        }
        events
    }
}
