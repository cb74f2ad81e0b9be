//! The display as a part of the machine: a process that is kept alive, and that lives on when the machine is reset.

use std::error::Error as StdError;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use atoll_protocol::lifecycle::LifecycleEvent;
use atoll_protocol::sidecar::DeviceClass;
use atoll_protocol::socket::FrameSocket;
use atoll_protocol::{DeviceId, Generation};

use super::line::{DisplayLine, ORDER_MAX};
use crate::actor::Surroundings;
use crate::backend::{
    Attachment, Household, Kept, KeptProcess, PassedFd, PolicyConfig, WatchLimits, beside_this_binary,
};
use crate::config::DeviceKind;
use crate::lifecycle::{DeviceReport, DeviceState, Story};
use crate::machine::{Board, BuildError, BuiltDevice, DeviceBuilder, DeviceLife, LifeError};

/// Its number among the devices of a machine.
const DEVICE: DeviceId = DeviceId(0x1001);
/// What it is called.
const NAME: &str = "_display";
const PROGRAM: &str = "atoll-display";

/// Joins each incarnation with its line.
struct OnLine {
    line: Arc<DisplayLine>,
    surroundings: Surroundings,
    control: Mutex<Option<FrameSocket>>,
}

impl Attachment for OnLine {
    fn descriptors(&self) -> std::io::Result<Vec<PassedFd>> {
        let (fds, control) = self.line.descriptors()?;
        *self.control.lock().unwrap_or_else(PoisonError::into_inner) = Some(control);
        Ok(fds)
    }
    fn attach(&self, generation: Generation) -> Result<(), Box<dyn StdError + Send + Sync>> {
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner).take();
        let surroundings = self.surroundings.clone();
        let stuck = move || {
            let cause = surroundings.next_cause();
            surroundings.supervision.report(LifecycleEvent::DeviceStalled { device: DEVICE, generation, cause });
        };
        self.line.enter(control.ok_or("it was started without a control socket")?, stuck);
        Ok(())
    }
    fn detach(&self) {
        self.line.leave();
    }
    fn give_up(&self) {
        self.line.give_up();
    }
    fn done(&self) -> u64 {
        self.line.obeyed()
    }
}

/// Makes the display.
pub struct DisplayBuilder {
    line: Arc<DisplayLine>,
    folder: Option<PathBuf>,
    household: Arc<Household>,
    story: Story,
}

impl DisplayBuilder {
    /// A display in `line`, whose program is in `folder` or beside the running one; its lives are told in `story`.
    #[must_use]
    pub fn new(line: Arc<DisplayLine>, folder: Option<PathBuf>, household: Arc<Household>, story: Story) -> Self {
        Self { line, folder, household, story }
    }
}

impl DeviceBuilder for DisplayBuilder {
    fn name(&self) -> String {
        NAME.into()
    }
    fn build(self: Box<Self>, _board: &mut Board) -> Result<BuiltDevice, BuildError> {
        let failed = |source: Box<dyn StdError + Send + Sync>| BuildError::new("--display", source);
        let exe = match &self.folder {
            Some(folder) => folder.join(PROGRAM),
            None => beside_this_binary(PROGRAM).map_err(|error| failed(error.into()))?,
        };
        let process = KeptProcess {
            name: NAME.into(),
            device: DEVICE,
            kind: DeviceKind::Display,
            class: DeviceClass::Display,
            exe,
            args: self.line.arguments(),
            limits: WatchLimits::default(),
            policy: PolicyConfig::default(),
            story: Some(self.story),
        };
        let surroundings = self.household.surroundings(ORDER_MAX);
        let attachment = OnLine { line: self.line, surroundings, control: Mutex::default() };
        let kept = Kept::start(process, Arc::new(attachment), &self.household).map_err(|error| failed(error.into()))?;
        Ok(built(kept))
    }
}

fn built(kept: Kept) -> BuiltDevice {
    BuiltDevice { name: NAME.into(), place: None, life: Box::new(DisplayLife(kept)) }
}

/// The display whose board is gone.
struct Survivor(Kept);

impl DeviceBuilder for Survivor {
    fn name(&self) -> String {
        NAME.into()
    }
    fn build(self: Box<Self>, _board: &mut Board) -> Result<BuiltDevice, BuildError> {
        Ok(built(self.0))
    }
}

struct DisplayLife(Kept);

impl DeviceLife for DisplayLife {
    fn start(&mut self) -> Result<(), LifeError> {
        Ok(())
    }
    fn stop(&mut self, deadline: Instant) -> Result<(), LifeError> {
        self.0.stop(deadline);
        Ok(())
    }
    fn revive(&mut self) -> Result<(), LifeError> {
        let failed = |error| LifeError { device: NAME.into(), step: "revive", source: Box::new(error) };
        self.0.revive().map_err(failed)
    }
    fn report(&self) -> Option<DeviceReport> {
        Some(self.0.report())
    }
    fn survive(mut self: Box<Self>, deadline: Instant) -> Option<Box<dyn DeviceBuilder>> {
        if self.0.report().state == DeviceState::Quarantined {
            self.0.stop(deadline);
            return None;
        }
        Some(Box::new(Survivor(self.0)))
    }
}
