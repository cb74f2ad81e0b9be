//! The operator's handle of a machine that a thread of its own keeps.
//!
//! The thread ([`keeper`](super::keeper)) owns the machine and does one thing after the other; a handle asks it and waits,
//! with a deadline for each kind of request. What is known without the machine (configuration and state) is answered at
//! once, however busy the thread is.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::control::{Plugged, VmControl};
use super::error::{ErrorKind, VmError};
use super::keeper::{Keeper, View, no_machine};
use super::mailbox::{Event, Mailbox, Post, Waits};
use super::report::{DeviceReport, VmInfo};
use super::story::Story;
use crate::backend::Household;
use crate::config::{DeviceConfig, VmConfig};
use crate::machine::{EventSender, LinkState, MachineEnd, MachineEvent, MachineFigures, NewSize, StopCause};
use crate::screen::{DisplayError, DisplayLine, WhereToLook};
use crate::vhost::{Fault, UPGRADE_MAX, UpgradeOrder, await_outcome};

/// Requests that touch no device.
const QUICK: Duration = Duration::from_secs(5);
/// Requests that wait for devices: each of those has deadlines of its own, this is the net below them.
const DEVICES: Duration = Duration::from_secs(60);
/// Building a machine waits for each of its device processes.
const BUILD: Duration = Duration::from_secs(180);
/// A guest lets a device go in some ten milliseconds; one that is still booting takes as long as it boots.
const UNPLUG_LIMIT: Duration = Duration::from_secs(60);

/// Who a machine is among the machines of its user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    /// Its name: addresses that are made up for it are always the same.
    pub name: String,
    /// Folder of this user's sockets that belong to no single machine.
    pub runtime_dir: PathBuf,
}

/// What a controller is made from.
pub struct Settings {
    /// Who it is.
    pub home: Home,
    /// Where it tells what happens.
    pub story: Story,
    /// Starts and keeps device processes; shut down by whoever made it, after the end.
    pub household: Arc<Household>,
    /// How long a guest has to let a device go before the request is withdrawn.
    pub unplug_limit: Duration,
}

impl Settings {
    /// The usual ones.
    pub fn new(home: Home, story: Story, household: Arc<Household>) -> Self {
        Self { home, story, household, unplug_limit: UNPLUG_LIMIT }
    }
}

/// How it all ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmmEnd {
    /// Why.
    pub end: MachineEnd,
    /// What the machines have done, all together.
    pub figures: MachineFigures,
}

/// The end, to be waited for.
pub struct Ended(JoinHandle<VmmEnd>);

impl Ended {
    /// Waits until a guest has switched itself off, a vCPU has failed or somebody has ended the machine monitor. Machine
    /// and devices are gone then.
    pub fn wait(self) -> VmmEnd {
        self.0.join().unwrap_or_else(|_| VmmEnd {
            // Its words have been reported by the hook.
            end: MachineEnd::Failed("the thread that keeps the machine panicked; please report it".into()),
            figures: MachineFigures::default(),
        })
    }
}

/// One machine, or the place for one. Dropping it ends the thread, and the machine with it.
pub struct Controller {
    mailbox: Arc<Mailbox>,
    view: Arc<View>,
    story: Story,
}

impl Controller {
    /// Starts the thread, without a machine.
    ///
    /// # Errors
    /// When there is no thread left.
    pub fn start(settings: Settings) -> io::Result<(Arc<Self>, Ended)> {
        let mailbox = Mailbox::new(settings.story.roll());
        let view = Arc::<View>::default();
        let story = settings.story.clone();
        let keeper = Keeper::new(settings, Arc::clone(&mailbox), Arc::clone(&view));
        let thread = std::thread::Builder::new().name("machine".into()).spawn(move || keeper.live())?;
        Ok((Arc::new(Self { mailbox, view, story }), Ended(thread)))
    }

    /// Where signals and whatever else concerns the process are told.
    pub fn events(&self) -> EventSender {
        EventSender::new(Arc::new(Post { mailbox: Arc::clone(&self.mailbox), life: None }))
    }

    /// Ends the machine in good order, as a signal or the escape sequence does.
    pub fn stop(&self, cause: StopCause) {
        self.mailbox.tell(Event { life: None, what: MachineEvent::Stop(cause) });
    }

    /// What happens.
    pub fn story(&self) -> &Story {
        &self.story
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.mailbox.abandon();
    }
}

impl From<DisplayError> for VmError {
    fn from(error: DisplayError) -> Self {
        let kind = if matches!(error, DisplayError::Refused(_)) { ErrorKind::Bad } else { ErrorKind::Failed };
        Self::new(kind, error)
    }
}

impl Controller {
    /// The display's line. What is asked of it then, the machine's thread does not wait for.
    fn display(&self) -> Result<Arc<DisplayLine>, VmError> {
        self.mailbox.ask("looking for the display", Waits::Never, QUICK, |keeper| keeper.display())
    }
}

impl VmControl for Controller {
    fn create(&self, config: VmConfig) -> Result<(), VmError> {
        self.mailbox.ask("vm.create", Waits::Never, QUICK, move |keeper| keeper.create(config))
    }
    fn boot(&self) -> Result<(), VmError> {
        self.mailbox.ask_for("vm.boot", Waits::ForAll, BUILD, Keeper::begin_boot)
    }
    fn pause(&self) -> Result<(), VmError> {
        self.mailbox.ask("vm.pause", Waits::ForBoot, DEVICES, Keeper::pause)
    }
    fn resume(&self) -> Result<(), VmError> {
        self.mailbox.ask("vm.resume", Waits::ForBoot, DEVICES, Keeper::resume)
    }
    fn reset(&self) -> Result<(), VmError> {
        self.mailbox.ask("vm.reboot", Waits::ForBoot, BUILD, Keeper::reset)
    }
    fn power_button(&self) -> Result<(), VmError> {
        self.mailbox.ask("vm.power-button", Waits::ForBoot, QUICK, Keeper::power_button)
    }
    fn shutdown(&self) -> Result<(), VmError> {
        self.mailbox.ask("vm.shutdown", Waits::Never, DEVICES, Keeper::shutdown)
    }
    fn delete(&self) -> Result<(), VmError> {
        self.mailbox.ask("vm.delete", Waits::Never, DEVICES, Keeper::delete)
    }
    fn nmi(&self) -> Result<(), VmError> {
        self.mailbox.ask("vm.nmi", Waits::ForBoot, QUICK, Keeper::nmi)
    }
    fn add_device(&self, device: DeviceConfig) -> Result<Option<Plugged>, VmError> {
        self.mailbox.ask_for("adding a device", Waits::ForBoot, DEVICES, move |keeper, answer| {
            keeper.begin_add(device, answer);
        })
    }
    fn remove_device(&self, id: &str) -> Result<(), VmError> {
        let id = id.to_owned();
        self.mailbox.ask("vm.remove-device", Waits::ForBoot, DEVICES, move |keeper| keeper.remove_device(&id))
    }
    fn resize_disk(&self, id: &str, size: NewSize) -> Result<(), VmError> {
        let id = id.to_owned();
        self.mailbox.ask("vm.resize-disk", Waits::ForBoot, DEVICES, move |keeper| keeper.resize_disk(&id, size))
    }
    fn set_link(&self, id: &str, link: LinkState) -> Result<(), VmError> {
        let id = id.to_owned();
        self.mailbox.ask("vm.set-link", Waits::ForBoot, DEVICES, move |keeper| keeper.set_link(&id, link))
    }
    fn revive_device(&self, id: &str) -> Result<(), VmError> {
        let id = id.to_owned();
        self.mailbox.ask("vm.revive-device", Waits::ForBoot, DEVICES, move |keeper| keeper.revive_device(&id))
    }
    fn upgrade_device(&self, id: &str, order: UpgradeOrder) -> Result<u64, VmError> {
        let name = id.to_owned();
        let begun = self
            .mailbox
            .ask("vm.upgrade-device", Waits::ForBoot, QUICK, move |keeper| keeper.upgrade_device(&name, order))?;
        // The machine's thread does other things meanwhile; the device's thread has a deadline for each step, and this is
        // the net below them.
        let outcome = await_outcome(&begun, UPGRADE_MAX);
        outcome.map_err(|error| VmError::new(ErrorKind::Failed, format!("device '{id}' was not upgraded: {error}")))
    }
    fn fault_device(&self, id: &str, fault: Fault, seed: u64) -> Result<(), VmError> {
        let id = id.to_owned();
        self.mailbox
            .ask("vm.fault-device", Waits::ForBoot, DEVICES, move |keeper| keeper.fault_device(&id, fault, seed))
    }
    fn where_to_look(&self) -> Result<WhereToLook, VmError> {
        Ok(self.display()?.where_to_look())
    }
    fn screenshot(&self, head: u32) -> Result<Vec<u8>, VmError> {
        Ok(self.display()?.screenshot(head)?)
    }
    fn resize_display(&self, head: u32, width: u32, height: u32) -> Result<(), VmError> {
        Ok(self.display()?.resize(head, width, height)?)
    }
    fn record(&self, head: u32, file: OwnedFd) -> Result<(), VmError> {
        Ok(self.display()?.record(head, &file)?)
    }
    fn stop_record(&self, head: u32) -> Result<u32, VmError> {
        Ok(self.display()?.stop_record(head)?)
    }
    fn info(&self) -> Result<VmInfo, VmError> {
        self.view.info().ok_or_else(no_machine)
    }
    fn devices(&self) -> Result<Vec<DeviceReport>, VmError> {
        self.mailbox.ask("listing devices", Waits::Never, QUICK, |keeper| keeper.devices())
    }
    fn counters(&self) -> Result<BTreeMap<String, BTreeMap<String, u64>>, VmError> {
        self.mailbox.ask("vm.counters", Waits::Never, QUICK, |keeper| keeper.counters())
    }
    fn metrics(&self) -> Result<String, VmError> {
        self.mailbox.ask("metrics", Waits::Never, QUICK, |keeper| Ok(keeper.metrics()))
    }
    fn inspect(&self, path: &str) -> Result<serde_json::Value, VmError> {
        let path = path.to_owned();
        self.mailbox.ask("inspecting", Waits::Never, QUICK, move |keeper| keeper.inspect(&path))
    }
    fn shutdown_vmm(&self) -> Result<(), VmError> {
        self.mailbox.ask("vmm.shutdown", Waits::Never, DEVICES, |keeper| {
            keeper.finish(MachineEnd::Asked);
            Ok(())
        })
    }
}
