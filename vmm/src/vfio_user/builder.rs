//! A device that another process serves, from its configuration to its place on the board, and its part in the machine's life.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use atoll_devices::pci::{DevFn, SharedFunction};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::device::{Connected, Request, UserDevice, Wanted};
use super::function::UserFunction;
use super::record::{Record, RecordAccount};
use super::source::{NvmeHost, NvmeServers, PROGRAM};
use crate::backend::{PolicyConfig, Spawner, beside_this_binary};
use crate::config::{DeviceKind, NvmeConfig, OnFailure, UserDeviceConfig};
use crate::lifecycle::{DeviceReport, DeviceState as ReportedState, RecoveryClass, Story};
use crate::machine::{
    Board, BuildError, BuiltDevice, DeviceBuilder, DeviceLife, Ground, LifeError, NewSize, Unsupported, Withdrawal,
};
use crate::metrics::{CountedBy, Registry};
use crate::vhost::recovery::Rules;
use crate::vhost::{
    BackendSource, Care, DeviceParts, DeviceState, Ending, ExternalSocket, Fault, Limits, Recovery, UpgradeOrder,
    UpgradeOutcome,
};

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// How long a server may take to end that nobody wants any more.
const GIVE_UP: Duration = Duration::from_secs(2);
/// How often it is looked at the latest whether somebody listens at a socket of somebody else's.
const FOREIGN_LOOK: Duration = Duration::from_millis(250);

/// Who serves a device.
#[derive(Clone, Debug)]
pub enum Served {
    /// A process of ours: an NVMe controller on an image.
    Nvme(NvmeConfig),
    /// Somebody else's, behind a socket.
    Foreign(UserDeviceConfig),
}

impl Served {
    fn kind(&self) -> DeviceKind {
        match self {
            Self::Nvme(_) => DeviceKind::Nvme,
            Self::Foreign(_) => DeviceKind::User,
        }
    }
    fn shown(&self) -> String {
        match self {
            Self::Nvme(nvme) => format!("--nvme {}", nvme.path.display()),
            Self::Foreign(device) => format!("--user-device {}", device.socket.display()),
        }
    }
}

/// A device as it is described, before it has a server.
pub struct Described {
    /// Its name.
    pub name: String,
    /// Its number among all of this VMM.
    pub number: atoll_protocol::DeviceId,
    /// Who serves it.
    pub served: Served,
    /// What the user says of deaths and stalls.
    pub care: Care,
    /// What becomes of it when no server is to be had.
    pub on_failure: OnFailure,
    /// Who starts processes.
    pub spawner: Spawner,
    /// Where their programs are, if not beside the VMM's.
    pub backend_dir: Option<PathBuf>,
    /// Where deaths and returns are told.
    pub story: Story,
    /// Where figures are.
    pub registry: Registry,
}

impl Described {
    pub(super) fn connect(self, ground: &Ground, ending: Ending) -> Result<Connected, Cause> {
        let limits = Limits::default();
        let (kind, mut policy) = (self.served.kind(), self.care.policy);
        let (source, record): (Box<dyn BackendSource>, _) = match &self.served {
            Served::Nvme(nvme) => {
                let exe = match &self.backend_dir {
                    Some(folder) => folder.join(PROGRAM),
                    None => beside_this_binary(PROGRAM).map_err(|error| {
                        format!("cannot find {PROGRAM}: {error}; mount /proc, or give --backend-dir")
                    })?,
                };
                let host =
                    NvmeHost { name: self.name.clone(), number: self.number, spawner: self.spawner.clone(), exe };
                let record = Arc::new(Record::new()?);
                (Box::new(NvmeServers::new(nvme, host, &record)?), Some(record))
            }
            Served::Foreign(device) => {
                let none = PolicyConfig { start_attempts: None, start_backoff_max: FOREIGN_LOOK, ..policy };
                policy = none;
                (Box::new(ExternalSocket::new(&device.socket)), None)
            }
        };
        let meter = match &record {
            Some(record) => {
                let account = Arc::new(RecordAccount::new(Arc::clone(record)));
                self.registry.accounted(&self.name, kind, account)?
            }
            // What it does is between the guest and somebody else's process.
            None => self.registry.uncounted(&self.name, kind)?,
        };
        let rules = Rules {
            policy,
            on_failure: self.on_failure,
            fence: limits.fence,
            stall: self.care.stall.filter(|_| record.is_some()),
            debugged: self.care.debugged,
            standby: false,
            probation: limits.probation,
            trial: limits.trial,
        };
        let wanted = Wanted {
            name: self.name,
            source,
            record,
            memory: ground.memory.clone(),
            rules,
            limits,
            story: self.story,
            meter: Some(meter),
            clock: DeviceParts::real_time(),
        };
        Ok(Connected::new(wanted, ending)?)
    }
}

/// Makes one device: out of its description, or out of what another board has left.
pub struct UserBuilder {
    name: String,
    shown: String,
    kind: DeviceKind,
    described: Option<Described>,
    connected: Option<Connected>,
}

impl UserBuilder {
    /// Of a device that has no server yet.
    pub fn new(described: Described) -> Self {
        let (name, shown, kind) = (described.name.clone(), described.served.shown(), described.served.kind());
        Self { name, shown, kind, described: Some(described), connected: None }
    }
}

impl DeviceBuilder for UserBuilder {
    fn name(&self) -> String {
        self.name.clone()
    }
    fn prepare(&mut self, ground: &Ground, withdrawal: &Withdrawal) -> Result<(), BuildError> {
        if let Some(described) = self.described.take() {
            let connected = described.connect(ground, withdrawal.ending());
            self.connected = Some(connected.map_err(|source| BuildError::new(self.shown.clone(), source))?);
        }
        Ok(())
    }
    fn build(mut self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        let ground = Ground { memory: board.memory().clone(), relay: Arc::clone(board.relay()) };
        self.prepare(&ground, &Withdrawal::default())?;
        let failed = |source: Cause| BuildError::new(self.shown.clone(), source);
        let mut connected = self.connected.take().ok_or_else(|| failed("its preparation had failed".into()))?;
        connected.parts.memory = ground.memory;
        place(connected, self.kind, board).map_err(failed)
    }
}

impl Drop for UserBuilder {
    fn drop(&mut self) {
        if let Some(connected) = self.connected.take() {
            connected.give_up(Instant::now() + GIVE_UP);
        }
    }
}

fn place(connected: Connected, kind: DeviceKind, board: &mut Board) -> Result<BuiltDevice, Cause> {
    let (name, shape) = (connected.parts.name.clone(), connected.shape().clone());
    let vectors = board.vectors(shape.vectors)?;
    let device = connected.attach(Arc::clone(&vectors))?;
    let bars = board.bar_mapping();
    let function = UserFunction::new(&shape, Arc::clone(&bars) as _, vectors, Arc::clone(&device.shared))?;
    let function: SharedFunction = Arc::new(Mutex::new(function));
    let place = board.add_pci(function, &bars)?;
    let life = Box::new(UserLife { device, name: name.clone(), kind, place });
    Ok(BuiltDevice { name, place: Some(place), life })
}

struct UserLife {
    device: UserDevice,
    name: String,
    kind: DeviceKind,
    place: DevFn,
}

impl UserLife {
    fn failed(&self, step: &'static str, source: impl Into<Cause>) -> LifeError {
        LifeError { device: self.name.clone(), step, source: source.into() }
    }

    fn unsupported(&self, instead: &'static str) -> Unsupported {
        let what = match self.kind {
            DeviceKind::Nvme => "NVMe over vfio-user",
            _ => "devices over vfio-user",
        };
        Unsupported { what, instead }
    }

    fn hurt(&self, fault: Fault, seed: u64) -> Result<(), Cause> {
        let status = self.device.shared.status();
        let process = || -> Result<_, Cause> {
            let pid = status.pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
            let pid = pid.ok_or("no process of this VMM serves the device now: disconnect works with any server")?;
            Ok(pidfd_open(pid, PidfdFlags::empty())?)
        };
        tracing::warn!(fault = fault.name(), seed, "a fault is brought about, as was asked");
        match fault {
            Fault::Kill => Ok(pidfd_send_signal(process()?, Signal::KILL)?),
            Fault::Stop => {
                let process = process()?;
                pidfd_send_signal(&process, Signal::STOP)?;
                let length = Duration::from_millis(50 + seed % 500);
                let wakes = std::thread::Builder::new().name("fault".into()).spawn(move || {
                    std::thread::sleep(length);
                    // It fails when the process has been killed meanwhile.
                    let _ = pidfd_send_signal(&process, Signal::CONT);
                });
                Ok(wakes.map(drop)?)
            }
            Fault::Disconnect if self.device.shared.send(Request::Break) => Ok(()),
            Fault::Disconnect => Err("the device has been stopped".into()),
            other => {
                Err(format!("{} is for devices with rings; kill, stop and disconnect are for this one", other.name())
                    .into())
            }
        }
    }
}

impl DeviceLife for UserLife {
    fn start(&mut self) -> Result<(), LifeError> {
        Ok(())
    }
    fn stop(&mut self, deadline: Instant) -> Result<(), LifeError> {
        self.device.stop(deadline);
        Ok(())
    }
    fn begin_pause(&mut self) {
        self.device.begin_pause();
    }
    fn pause(&mut self, deadline: Instant) -> Result<(), LifeError> {
        self.device.pause(deadline).map_err(|error| self.failed("pause", error))
    }
    fn resume(&mut self) -> Result<(), LifeError> {
        self.device.resume().map_err(|error| self.failed("resume", error))
    }
    fn inject(&mut self, fault: Fault, seed: u64) -> Result<(), LifeError> {
        self.hurt(fault, seed).map_err(|error| self.failed("suffer the fault", error))
    }
    fn revive(&mut self) -> Result<(), LifeError> {
        match self.device.shared.status().state {
            DeviceState::Idle | DeviceState::Running => Err(self.failed("revive", "it is well: a server has it")),
            DeviceState::Stopped => Err(self.failed("revive", "it has been stopped")),
            _ => {
                self.device.shared.send(Request::Revive);
                Ok(())
            }
        }
    }
    fn resize(&mut self, _size: NewSize) -> Result<(), LifeError> {
        let instead = match self.kind {
            DeviceKind::Nvme => {
                "atoll remove, change the image's size, atoll add-nvme; a virtio disk (--disk) can be resized as it is"
            }
            _ => "its size is its server's affair",
        };
        Err(self.failed("resize", self.unsupported(instead)))
    }
    fn upgrade(&mut self, _order: UpgradeOrder) -> Result<UpgradeOutcome, LifeError> {
        let instead = match self.kind {
            DeviceKind::Nvme => {
                "put the new program where the old one is and end the device's process (its PID is in atoll info): the \
                 successor is of the new one, and the guest does not notice"
            }
            _ => "end its server and start another one at its socket; the device comes back as after a reset",
        };
        Err(self.failed("take the upgrade", self.unsupported(instead)))
    }
    fn report(&self) -> Option<DeviceReport> {
        let status = self.device.shared.status();
        let (state, reason) = match status.state {
            DeviceState::Idle => (ReportedState::Idle, None),
            DeviceState::Running => (ReportedState::Running, None),
            DeviceState::Recovering { why } => (ReportedState::Recovering, Some(why)),
            DeviceState::Waiting { why } => (ReportedState::Waiting, Some(why)),
            DeviceState::Quarantined { why } => (ReportedState::Quarantined, Some(why)),
            DeviceState::Stopped => (ReportedState::Stopped, None),
        };
        Some(DeviceReport {
            id: self.name.clone(),
            kind: self.kind,
            bdf: Some(format!("0000:00:{:02x}.{}", self.place.slot(), self.place.function())),
            state,
            reason,
            generation: status.generation,
            restarts: status.lost,
            failed_starts: status.failed_starts,
            upgrade: None,
            recovery: match status.recovery {
                Recovery::Full => RecoveryClass::Full,
                // What a server of somebody else's knows goes with it.
                Recovery::IdleOnly => RecoveryClass::None,
            },
            counted: self.device.shared.record.as_ref().map(|_| CountedBy::Rings),
            pid: status.pid,
            exe: status.exe.map(|exe| exe.display().to_string()),
            standby: None,
            link: None,
            jail: status.jail.iter().map(|layer| (layer.layer.to_string(), layer.outcome.to_string())).collect(),
            last_exit: status.last_exit,
            last_lines: status.last_lines,
            queues: self.device.shared.record.as_ref().map(|record| record.queues()).unwrap_or_default(),
        })
    }
    fn survive(mut self: Box<Self>, deadline: Instant) -> Option<Box<dyn DeviceBuilder>> {
        let connected = self.device.leave(deadline)?;
        let (name, kind) = (self.name.clone(), self.kind);
        Some(Box::new(UserBuilder { shown: name.clone(), name, kind, described: None, connected: Some(connected) }))
    }
}
