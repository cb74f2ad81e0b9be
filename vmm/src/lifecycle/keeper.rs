//! The thread that owns the machine. It does one thing after the other: what operators ask, and what the machine tells.
//!
//! ```text
//!            create             boot                pause
//!   Empty ───────────> Created ──────> Running <─────────────> Paused
//!     ^                                 │  ^ └─┐ reset  resume   │
//!     │        delete, from anywhere    │  │   └─ (also the      │
//!     └─────────────────────────────    │  │      guest's own)   │
//!                                       v  │ boot                │
//!                                     Shutdown <─────────────────┘ shutdown
//! ```
//!
//! A reset of a paused machine leads to Running as well. While a boot is under way the state is what it was before; what is
//! prepared for it, or for a device that is plugged in, comes back as a message (`preparing`, `booting`).
//!
//! A guest that switches itself off ends the whole process, as does a vCPU that cannot go on: that is what clients of a
//! machine monitor with one machine a process wait for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use atoll_devices::PowerEvent;

use super::controller::{Home, Settings, VmmEnd};
use super::error::{ErrorKind, VmError};
use super::mailbox::{Event, Mail, Mailbox, Post};
use super::plan::Plan;
use super::preparing::Preparations;
use super::report::{DeviceReport, DeviceState, RecoveryClass, VmInfo, VmState};
use super::roster;
use super::story::Story;
use crate::backend::Household;
use crate::config::{DeviceConfig, DeviceKind, VmConfig};
use crate::machine::{
    EventSender, LifeError, LinkState, Machine, MachineEnd, MachineEvent, MachineFigures, NewSize, PauseError,
    PauseFigures, PauseLimits, Unsupported, failure,
};
use crate::screen::DisplayLine;
use crate::vhost::{Fault, LinkError, ResizeError, UpgradeOrder, UpgradeOutcome};

/// What is known without asking the thread.
#[derive(Default)]
pub(super) struct View(Mutex<Option<VmInfo>>);

impl View {
    pub(super) fn info(&self) -> Option<VmInfo> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
    fn show(&self, info: Option<VmInfo>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = info;
    }
}

/// A machine that has booted.
pub(super) struct Live {
    pub(super) plan: Plan,
    pub(super) machine: Machine,
    /// Number of its incarnation: events of an earlier one concern nobody.
    pub(super) life: u64,
}

/// What there is. Each state holds exactly what exists in it.
pub(super) enum State {
    /// No configuration.
    Empty,
    /// A configuration that has never been booted.
    Created(VmConfig),
    /// vCPUs run.
    Running(VmConfig, Box<Live>),
    /// vCPUs stand, devices are drained.
    Paused(VmConfig, Box<Live>),
    /// A configuration whose machine was switched off.
    Shutdown(VmConfig),
}

/// What the size of a disk is counted in, in bytes (virtio 1.2, 5.2.4).
const SECTOR: u64 = 512;

/// There is no configuration.
pub(super) fn no_machine() -> VmError {
    VmError::new(ErrorKind::NotFound, "there is no machine; create one with vm.create (atoll run)")
}

pub(super) fn wrong(text: &str) -> VmError {
    VmError::new(ErrorKind::WrongState, text)
}

pub(super) fn failed(error: impl std::fmt::Display) -> VmError {
    VmError::new(ErrorKind::Failed, error)
}

/// What the device named `id` did not do. One that is never asked for such a thing does not say its name.
fn of(id: &str) -> impl Fn(LifeError) -> LifeError + '_ {
    |error| LifeError { device: id.to_owned(), ..error }
}

/// What a device did not do.
fn refused(error: LifeError) -> VmError {
    let kind = if error.source.is::<Unsupported>() { ErrorKind::Unsupported } else { ErrorKind::Failed };
    VmError::new(kind, error)
}

impl From<PauseError> for VmError {
    fn from(error: PauseError) -> Self {
        let kind = match &error {
            PauseError::Vcpu { .. } | PauseError::Device { .. } | PauseError::Interrupts { .. } => ErrorKind::Late,
            PauseError::Resume { .. } => ErrorKind::Failed,
        };
        Self::new(kind, error)
    }
}

impl State {
    fn config(&self) -> Option<&VmConfig> {
        match self {
            Self::Empty => None,
            Self::Created(config) | Self::Running(config, _) | Self::Paused(config, _) | Self::Shutdown(config) => {
                Some(config)
            }
        }
    }
    fn word(&self) -> Option<VmState> {
        match self {
            Self::Empty => None,
            Self::Created(_) => Some(VmState::Created),
            Self::Running(..) => Some(VmState::Running),
            Self::Paused(..) => Some(VmState::Paused),
            Self::Shutdown(_) => Some(VmState::Shutdown),
        }
    }
    pub(super) fn live(&self) -> Option<&Live> {
        match self {
            Self::Running(_, live) | Self::Paused(_, live) => Some(live),
            Self::Empty | Self::Created(_) | Self::Shutdown(_) => None,
        }
    }
    /// Why there is no running machine, and what to do about it.
    pub(super) fn not_running(&self) -> VmError {
        match self {
            Self::Empty => no_machine(),
            Self::Created(_) => wrong("the machine has not been booted; boot it with vm.boot (atoll boot)"),
            Self::Shutdown(_) => wrong("the machine is switched off; boot it with vm.boot (atoll boot)"),
            Self::Paused(..) => wrong("the machine is paused; let it go on with vm.resume (atoll resume)"),
            Self::Running(..) => wrong("the machine runs; pause it with vm.pause (atoll pause)"),
        }
    }
}

/// The thread's own state.
pub(super) struct Keeper {
    pub(super) story: Story,
    pub(super) home: Home,
    pub(super) household: Arc<Household>,
    pub(super) mailbox: Arc<Mailbox>,
    view: Arc<View>,
    pub(super) unplug_limit: Duration,
    pub(super) state: State,
    lives: u64,
    pub(super) figures: MachineFigures,
    last_pause: Option<PauseFigures>,
    end: Option<MachineEnd>,
    pub(super) preparations: Preparations,
}

impl Keeper {
    pub(super) fn new(settings: Settings, mailbox: Arc<Mailbox>, view: Arc<View>) -> Self {
        let Settings { home, story, household, unplug_limit } = settings;
        story.tell("vmm", "starting", []);
        Self {
            story,
            home,
            household,
            mailbox,
            view,
            unplug_limit,
            state: State::Empty,
            lives: 0,
            figures: MachineFigures::default(),
            last_pause: None,
            end: None,
            preparations: Preparations::default(),
        }
    }

    /// The thread.
    pub(super) fn live(mut self) -> VmmEnd {
        struct Closing(Arc<Mailbox>);
        impl Drop for Closing {
            fn drop(&mut self) {
                self.0.close();
            }
        }
        let closing = Closing(Arc::clone(&self.mailbox));
        let end = loop {
            if let Some(end) = self.end.take() {
                break end;
            }
            match self.mailbox.next(self.alarm(), self.preparations.held()) {
                Mail::Event(event) => self.hear(event),
                Mail::Request(job) => job.begin(&mut self),
                Mail::Prepared(prepared) => self.go_on(prepared),
                Mail::Time => {
                    self.preparations.withdraw_late();
                    self.look_after_unplugs();
                }
                Mail::Abandoned => self.finish(MachineEnd::Asked),
            }
        };
        drop(closing);
        self.story.tell("vmm", "shutdown", []);
        self.story.close();
        VmmEnd { end, figures: self.figures }
    }

    /// When to look after the machine by itself.
    fn alarm(&self) -> Option<Instant> {
        let unplugs = self.state.live().and_then(|live| live.machine.unplug_deadline());
        unplugs.into_iter().chain(self.preparations.deadline()).min()
    }

    /// Sets the state, and shows it.
    pub(super) fn enter(&mut self, state: State) {
        self.state = state;
        if self.state.live().is_none() {
            self.preparations.withdraw_all("the machine was switched off meanwhile");
        }
        self.show();
    }

    pub(super) fn show(&self) {
        let info = self.state.config().zip(self.state.word()).map(|(config, state)| VmInfo {
            config: config.clone(),
            state,
            memory_actual_size: config.memory.size,
        });
        self.view.show(info);
    }

    pub(super) fn take(&mut self) -> State {
        std::mem::replace(&mut self.state, State::Empty)
    }

    /// A sink for the events of the next incarnation.
    pub(super) fn next_life(&mut self) -> (u64, EventSender) {
        self.lives += 1;
        let post = Post { mailbox: Arc::clone(&self.mailbox), life: Some(self.lives) };
        (self.lives, EventSender::new(Arc::new(post)))
    }

    fn hear(&mut self, event: Event) {
        let present = self.state.live().map(|live| live.life);
        if event.life.is_some() && event.life != present && !matches!(event.what, MachineEvent::Stop(_)) {
            // A machine that is gone.
            return;
        }
        match event.what {
            MachineEvent::Power(PowerEvent::PowerOff) => self.finish(MachineEnd::PowerOff),
            MachineEvent::Power(PowerEvent::Reset) => {
                tracing::info!(target: "atoll::machine", "the guest resets: it starts again");
                if let Err(error) = self.guest_resets() {
                    self.finish(MachineEnd::Failed(error.text));
                }
            }
            MachineEvent::Stop(cause) => self.finish(MachineEnd::Stopped(cause)),
            MachineEvent::Stalled(stall) => {
                let (vcpu, address) = (stall.vcpu, format!("{:?} {:#x}", stall.space, stall.address));
                let waited_ms = stall.waited.as_millis();
                tracing::warn!(vcpu, address, write = stall.write, waited_ms, "a device did not answer in time");
                let about = [("vcpu", vcpu.to_string()), ("address", address), ("waited_ms", waited_ms.to_string())];
                self.story.tell("device", "stalled", about);
            }
            MachineEvent::Ejected(_) | MachineEvent::Departed => self.look_after_unplugs(),
            MachineEvent::GivenUp(id) => {
                // A stand-in answers for one that cannot go, or that the guest keeps.
                if let Err(error) = self.remove_device(&id) {
                    tracing::warn!(id, error = error.text, "a device that was given up cannot be unplugged");
                }
            }
            MachineEvent::VcpuEnded(end) => {
                let cpu = self.state.live().map(|live| live.machine.board().processor().name());
                if let Some(failure) = cpu.and_then(|cpu| failure(&end, cpu)) {
                    self.finish(MachineEnd::Failed(failure));
                }
            }
        }
    }

    /// Ends everything: the machine, and the thread after the present request.
    pub(super) fn finish(&mut self, end: MachineEnd) {
        if self.end.is_none() {
            let _ = self.delete();
            self.end = Some(end);
        }
    }

    pub(super) fn create(&mut self, mut config: VmConfig) -> Result<(), VmError> {
        if !matches!(self.state, State::Empty) {
            return Err(wrong("there is a machine already; delete it with vm.delete before you create another"));
        }
        config.check()?;
        roster::name_devices(&mut config);
        self.enter(State::Created(config));
        Ok(())
    }

    pub(super) fn pause(&mut self) -> Result<(), VmError> {
        match self.take() {
            State::Running(config, mut live) => {
                self.story.tell("vm", "pausing", []);
                match live.machine.pause(PauseLimits::default()) {
                    Ok(figures) => {
                        self.enter(State::Paused(config, live));
                        let took = ("took_us", figures.whole.as_micros().to_string());
                        let slowest = figures.slowest_request.map(|took| took.as_micros().to_string());
                        let slowest = slowest.map(|took| ("slowest_request_us", took));
                        self.story.tell("vm", "paused", std::iter::once(took).chain(slowest));
                        self.last_pause = Some(figures);
                        Ok(())
                    }
                    Err(error) => {
                        self.enter(State::Running(config, live));
                        Err(error.into())
                    }
                }
            }
            state @ State::Paused(..) => {
                self.state = state;
                Err(wrong("the machine is paused already; let it go on with vm.resume (atoll resume)"))
            }
            state => {
                self.state = state;
                Err(self.state.not_running())
            }
        }
    }

    pub(super) fn resume(&mut self) -> Result<(), VmError> {
        match self.take() {
            State::Paused(config, mut live) => {
                self.story.tell("vm", "resuming", []);
                let resumed = live.machine.resume();
                self.enter(State::Running(config, live));
                self.story.tell("vm", "resumed", []);
                resumed.map_err(VmError::from)
            }
            state => {
                self.state = state;
                Err(self.state.not_running())
            }
        }
    }

    pub(super) fn shutdown(&mut self) -> Result<(), VmError> {
        match self.take() {
            State::Running(mut config, mut live) | State::Paused(mut config, mut live) => {
                // What was to leave has left: its guest is gone.
                let left = live.machine.leaving();
                self.figures.add(&live.machine.stop());
                drop(live);
                for id in left {
                    roster::remove(&mut config, &id);
                    self.story.tell("vm", "device-removed", [("id", id), ("asked", true.to_string())]);
                }
                self.enter(State::Shutdown(config));
                self.story.tell("vm", "shutdown", []);
                Ok(())
            }
            state if self.preparations.is_booting() => {
                self.enter(state);
                Ok(())
            }
            state => {
                self.state = state;
                Err(self.state.not_running())
            }
        }
    }

    pub(super) fn delete(&mut self) -> Result<(), VmError> {
        if matches!(self.state, State::Running(..) | State::Paused(..)) {
            self.shutdown()?;
        }
        if matches!(self.state, State::Empty) {
            return Ok(());
        }
        self.enter(State::Empty);
        self.story.tell("vm", "deleted", []);
        Ok(())
    }

    pub(super) fn power_button(&mut self) -> Result<(), VmError> {
        match &self.state {
            State::Running(_, live) => {
                live.machine.board().press_power_button();
                Ok(())
            }
            other => Err(other.not_running()),
        }
    }

    pub(super) fn nmi(&mut self) -> Result<(), VmError> {
        match &self.state {
            State::Running(_, live) => {
                live.machine.nmi();
                Ok(())
            }
            other => Err(other.not_running()),
        }
    }

    pub(super) fn resize_disk(&mut self, id: &str, size: NewSize) -> Result<(), VmError> {
        match &mut self.state {
            State::Running(_, live) | State::Paused(_, live) => match live.machine.life_of(id) {
                Some(_) if size.bytes == 0 || !size.bytes.is_multiple_of(SECTOR) => {
                    let text = format!(
                        "a size of {} bytes is not possible: it must be a multiple of {SECTOR}, and not zero",
                        size.bytes
                    );
                    Err(VmError::new(ErrorKind::Bad, text))
                }
                Some(life) => life.resize(size).map_err(of(id)).map_err(|error| {
                    let mistake = error.source.downcast_ref::<ResizeError>().is_some_and(ResizeError::is_mistake);
                    if mistake { VmError::new(ErrorKind::Bad, error) } else { refused(error) }
                }),
                None => Err(no_device(id)),
            },
            other => Err(other.not_running()),
        }
    }

    pub(super) fn set_link(&mut self, id: &str, link: LinkState) -> Result<(), VmError> {
        match &mut self.state {
            State::Running(_, live) | State::Paused(_, live) => match live.machine.life_of(id) {
                Some(life) => life.set_link(link).map_err(of(id)).map_err(|error| {
                    let late = error.source.downcast_ref::<LinkError>().is_some_and(|error| !error.is_mistake());
                    VmError::new(if late { ErrorKind::Failed } else { ErrorKind::Bad }, error)
                }),
                None => Err(no_device(id)),
            },
            other => Err(other.not_running()),
        }
    }

    pub(super) fn revive_device(&mut self, id: &str) -> Result<(), VmError> {
        match &mut self.state {
            State::Running(_, live) | State::Paused(_, live) => match live.machine.life_of(id) {
                Some(life) => life.revive().map_err(of(id)).map_err(failed),
                None => Err(no_device(id)),
            },
            other => Err(other.not_running()),
        }
    }

    pub(super) fn upgrade_device(&mut self, id: &str, order: UpgradeOrder) -> Result<UpgradeOutcome, VmError> {
        match &mut self.state {
            State::Running(_, live) | State::Paused(_, live) => match live.machine.life_of(id) {
                Some(life) => life.upgrade(order).map_err(of(id)).map_err(refused),
                None => Err(no_device(id)),
            },
            other => Err(other.not_running()),
        }
    }

    pub(super) fn fault_device(&mut self, id: &str, fault: Fault, seed: u64) -> Result<(), VmError> {
        if !self.state.config().is_some_and(|config| config.platform.allow_faults) {
            let what =
                "this machine was started without --allow-faults: start it with that flag to do such things to it";
            return Err(VmError { kind: ErrorKind::Bad, text: what.to_owned() });
        }
        match &mut self.state {
            State::Running(_, live) | State::Paused(_, live) => match live.machine.life_of(id) {
                Some(life) => {
                    life.inject(fault, seed).map_err(of(id)).map_err(failed)?;
                    let told = [("id", id.to_owned()), ("fault", fault.name().to_owned()), ("seed", seed.to_string())];
                    self.story.tell("device", "fault", told);
                    Ok(())
                }
                None => Err(no_device(id)),
            },
            other => Err(other.not_running()),
        }
    }

    pub(super) fn devices(&mut self) -> Result<Vec<DeviceReport>, VmError> {
        let Some(config) = self.state.config() else { return Err(no_machine()) };
        let reports = self.state.live().map(|live| live.machine.reports()).unwrap_or_default();
        let leaving = self.state.live().map(|live| live.machine.leaving()).unwrap_or_default();
        let mut reports: BTreeMap<_, _> = reports.into_iter().map(|report| (report.id.clone(), report)).collect();
        let idle = |device: &DeviceConfig| DeviceReport {
            id: device.id().unwrap_or_default().to_owned(),
            kind: device.kind(),
            bdf: None,
            state: match device.id() {
                Some(id) if leaving.iter().any(|other| other == id) => DeviceState::Unplugging,
                _ => DeviceState::Stopped,
            },
            reason: None,
            generation: 0,
            restarts: 0,
            failed_starts: 0,
            upgrade: None,
            link: None,
            recovery: RecoveryClass::None,
            counted: None,
            pid: None,
            exe: None,
            standby: None,
            jail: BTreeMap::new(),
            last_exit: None,
            last_lines: Vec::new(),
            queues: Vec::new(),
        };
        let listed = config.devices();
        let mut all: Vec<DeviceReport> = listed
            .iter()
            .map(|device| reports.remove(device.id().unwrap_or_default()).unwrap_or_else(|| idle(device)))
            .collect();
        // What is part of the board: a serial port that is a process, a display.
        all.extend(
            reports.into_values().filter(|report| matches!(report.kind, DeviceKind::Uart | DeviceKind::Display)),
        );
        Ok(all)
    }

    pub(super) fn display(&mut self) -> Result<Arc<DisplayLine>, VmError> {
        let Some(live) = self.state.live() else { return Err(self.state.not_running()) };
        let line = live.plan.line().cloned();
        line.ok_or_else(|| {
            VmError::new(ErrorKind::NotFound, "the machine has no display: start it with --gpu on --display on")
        })
    }

    pub(super) fn metrics(&mut self) -> String {
        if let Some(live) = self.state.live() {
            live.machine.count_instructions();
        }
        self.household.metrics().prometheus()
    }

    pub(super) fn counters(&mut self) -> Result<BTreeMap<String, BTreeMap<String, u64>>, VmError> {
        match self.state.live() {
            Some(live) => {
                let mut counters = self.household.metrics().counters();
                counters.extend(live.machine.counters());
                Ok(counters)
            }
            None => Err(self.state.not_running()),
        }
    }

    pub(super) fn inspect(&mut self, path: &str) -> Result<serde_json::Value, VmError> {
        let devices: BTreeMap<String, DeviceReport> =
            self.devices()?.into_iter().map(|report| (report.id.clone(), report)).collect();
        let Some((config, state)) = self.state.config().zip(self.state.word()) else { return Err(no_machine()) };
        let tree = super::inspect::Tree {
            state,
            memory: config.memory.size,
            machine: self.state.live().map(|live| &live.machine),
            devices,
            coming: self.preparations.devices().filter_map(|device| device.id().map(str::to_owned)).collect(),
            actors: self.story.roll().report().into_iter().chain(self.household.census()).collect(),
            last_pause: self.last_pause.as_ref(),
            story: &self.story,
        };
        tree.part(path)
    }
}

pub(super) fn no_device(id: &str) -> VmError {
    VmError::new(ErrorKind::NotFound, format!("there is no device named '{id}'; vm.info lists those that there are"))
}
