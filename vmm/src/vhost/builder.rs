//! What all vhost-user devices share on the board: the PCI function, its vectors and doorbells, and their part in the
//! machine's life.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use atoll_devices::pci::{DevFn, SharedFunction};
use atoll_devices::virtio::pci::{VirtioPci, VirtioPciParts};
use atoll_devices::virtio::{NotifyPlacement, VirtioFrontend};

use super::call::Transport;
use super::class;
use super::device::{Connected, DeviceState, Recovery, Spare, VhostDevice};
use super::fault::Fault;
use super::iotlb::Behind;
use super::kinds::{Host, Kind};
use super::parts::{Care, DeviceParts, Limits};
use super::patience::Ending;
use super::upgrade::{UpgradeOrder, UpgradeOutcome};
use crate::config::{DeviceKind, Isolation, OnFailure, Track};
use crate::cpu::Space;
use crate::doorbell::{Doorbell, DoorbellTable};
use crate::iommu::endpoint_id;
use crate::lifecycle::{DeviceReport, DeviceState as ReportedState, RecoveryClass, Standby, Story};
use crate::machine::{
    Board, BuildError, BuiltDevice, DeviceBuilder, DeviceLife, EventSender, Ground, LifeError, LinkState, MachineEvent,
    NewSize, Withdrawal,
};
use crate::metrics::Registry;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// How long a backend may take to end that nobody wants any more.
const GIVE_UP: Duration = Duration::from_secs(2);

/// A device as it is described, before it has a backend.
pub(super) struct Described {
    pub(super) kind: DeviceKind,
    pub(super) device: Box<dyn Kind>,
    pub(super) host: Host,
    pub(super) story: Story,
    pub(super) registry: Registry,
    pub(super) on_failure: OnFailure,
    pub(super) track: Track,
    pub(super) care: Care,
    pub(super) iommu: bool,
    pub(super) isolation: Isolation,
}

impl Described {
    /// Reaches the first backend, as long as `ending` is not raised.
    pub(super) fn connect(mut self, ground: &Ground, ending: Ending) -> Result<Connected, BuildError> {
        let shown = self.device.shown();
        let failed = |source: Cause| BuildError::new(shown.clone(), source);
        let (class, queues) = (self.device.sidecar(), self.device.own_queues());
        let meter = self.registry.device(&self.host.name, self.kind, class, queues);
        let meter = meter.map_err(|error| failed(error.into()))?;
        self.host.meter = queues.map(|_| Arc::clone(&meter));
        let parts = DeviceParts {
            name: self.host.name.clone(),
            class: self.device.class(),
            source: self.device.source(&self.host).map_err(failed)?,
            memory: ground.memory.clone(),
            relay: Arc::clone(&ground.relay),
            limits: Limits::default(),
            story: self.story,
            meter: Some(meter),
            on_failure: self.on_failure,
            track: self.track,
            care: self.care,
            iommu: self.iommu,
            isolation: self.isolation,
            joint: self.device.joint(),
            clock: DeviceParts::real_time(),
        };
        VhostDevice::connect_while(parts, ending).map_err(|error| failed(error.into()))
    }
}

/// Makes one device: out of its description, or out of what another board has left.
pub(super) struct VhostBuilder {
    name: String,
    shown: String,
    kind: DeviceKind,
    described: Option<Described>,
    connected: Option<Connected>,
}

impl VhostBuilder {
    /// Of a device that has no backend yet.
    pub(super) fn new(described: Described) -> Self {
        let (name, shown, kind) = (described.host.name.clone(), described.device.shown(), described.kind);
        Self { name, shown, kind, described: Some(described), connected: None }
    }

    /// Of a device whose board is gone, and that keeps its backend.
    fn of_survivor(kind: DeviceKind, connected: Connected) -> Self {
        let name = connected.name().to_owned();
        Self { shown: name.clone(), name, kind, described: None, connected: Some(connected) }
    }
}

impl DeviceBuilder for VhostBuilder {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn prepare(&mut self, ground: &Ground, withdrawal: &Withdrawal) -> Result<(), BuildError> {
        if let Some(described) = self.described.take() {
            self.connected = Some(described.connect(ground, withdrawal.ending())?);
        }
        Ok(())
    }

    fn build(mut self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        let ground = Ground { memory: board.memory().clone(), relay: Arc::clone(board.relay()) };
        self.prepare(&ground, &Withdrawal::default())?;
        let failed = |source: Cause| BuildError::new(self.shown.clone(), source);
        let mut connected = self.connected.take().ok_or_else(|| failed("its preparation had failed".into()))?;
        connected.move_to(ground.memory, ground.relay);
        place(connected, self.kind, board).map_err(failed)
    }
}

impl Drop for VhostBuilder {
    fn drop(&mut self) {
        if let Some(connected) = self.connected.take() {
            connected.give_up(Instant::now() + GIVE_UP);
        }
    }
}

/// Puts a device with a backend behind a PCI function of the board.
fn place(mut connected: Connected, kind: DeviceKind, board: &mut Board) -> Result<BuiltDevice, Cause> {
    let behind = if connected.wants_iommu() { Some(behind(board)?) } else { None };
    if let Some(behind) = &behind {
        connected.put_behind(behind.clone());
    }
    let name = connected.name().to_owned();
    let offer = connected.offer().clone();
    offer.check()?;
    let vectors = board.vectors(offer.vectors())?;
    let face = Arc::new(PciFace { function: OnceLock::new(), name: name.clone(), events: board.events().clone() });
    let (device, frontend) = connected.attach(Arc::clone(&vectors), Arc::clone(&face) as _)?;
    let bars = board.bar_mapping();
    let (intx, intx_line) = board.next_pin();
    let doorbells = Placements::new(board.doorbells(), frontend.doorbells());
    let forgets = class::forgets(&offer);
    let frontend: Box<dyn VirtioFrontend> = Box::new(frontend);
    let function = VirtioPci::new(VirtioPciParts {
        offer,
        frontend,
        mapping: Arc::clone(&bars) as _,
        doorbells: Box::new(doorbells),
        routes: vectors,
        intx,
        intx_pin: 1,
        intx_line,
    })?;
    let function = Arc::new(Mutex::new(function));
    // The only one who sets it.
    let _ = face.function.set(Arc::downgrade(&function));
    let shared: SharedFunction = function;
    let place = board.add_pci(shared, &bars)?;
    if let Some(Behind { unit, endpoint }) = &behind {
        unit.join(*endpoint, device.endpoint());
    }
    let life = Box::new(VhostLife { device, name: name.clone(), kind, forgets, place, behind });
    Ok(BuiltDevice { name, place: Some(place), life })
}

/// The IOMMU of the board, and the place that the next function gets there.
fn behind(board: &Board) -> Result<Behind, Cause> {
    let unit = board.iommu().ok_or(
        "iommu=on needs the machine's IOMMU, which is there from the start or not at all: start the machine with a device \
         that has iommu=on, and others can be plugged in beside it",
    )?;
    let place = board.next_slot().and_then(|slot| DevFn::new(slot, 0)).ok_or("all PCI slots are taken")?;
    Ok(Behind { unit: Arc::clone(unit), endpoint: endpoint_id(place) })
}

/// The transport, as the device's thread reaches it. Its lock is held by vCPUs in the middle of an access, which never
/// wait for the device's thread there.
struct PciFace {
    function: OnceLock<Weak<Mutex<VirtioPci>>>,
    name: String,
    events: EventSender,
}

impl PciFace {
    fn with(&self, act: impl FnOnce(&mut VirtioPci)) {
        if let Some(function) = self.function.get().and_then(Weak::upgrade) {
            act(&mut function.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Transport for PciFace {
    fn queue_used(&self, index: u16) {
        self.with(|function| function.signal_queue(index));
    }
    fn config_changed(&self, config: &[u8]) {
        self.with(|function| function.config_changed(config));
    }
    fn needs_reset(&self) {
        self.with(VirtioPci::set_needs_reset);
    }
    fn ask_unplug(&self) {
        self.events.tell(MachineEvent::GivenUp(self.name.clone()));
    }
}

/// Moves the doorbells along with the BAR that they are in.
pub(crate) struct Placements {
    table: Arc<DoorbellTable>,
    bells: Vec<(Arc<Doorbell>, Option<u64>)>,
}

impl Placements {
    /// Of these doorbells, by queue; they are nowhere yet.
    pub(crate) fn new(table: &Arc<DoorbellTable>, bells: &[Arc<Doorbell>]) -> Self {
        let bells = bells.iter().map(|bell| (Arc::clone(bell), None)).collect();
        Self { table: Arc::clone(table), bells }
    }
}

impl NotifyPlacement for Placements {
    fn placed(&mut self, index: u16, address: Option<u64>) {
        let Some((bell, placed)) = self.bells.get_mut(usize::from(index)) else { return };
        if let Some(old) = std::mem::replace(placed, address) {
            self.table.remove(Space::Mmio, old, bell);
        }
        if let Some(new) = address
            && let Err(error) = self.table.insert(Space::Mmio, new, Arc::clone(bell))
        {
            tracing::warn!(%error, "a doorbell costs an exit");
        }
    }
}

struct VhostLife {
    device: VhostDevice,
    name: String,
    kind: DeviceKind,
    /// What the driver has made in the backend goes with it.
    forgets: bool,
    place: DevFn,
    behind: Option<Behind>,
}

impl VhostLife {
    fn failed(&self, step: &'static str, source: impl Into<Cause>) -> LifeError {
        LifeError { device: self.name.clone(), step, source: source.into() }
    }
}

impl DeviceLife for VhostLife {
    fn start(&mut self) -> Result<(), LifeError> {
        Ok(())
    }
    fn stop(&mut self, deadline: Instant) -> Result<(), LifeError> {
        self.device.stop(deadline);
        if let Some(Behind { unit, endpoint }) = &self.behind {
            unit.leave(*endpoint);
        }
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
    fn resize(&mut self, size: NewSize) -> Result<(), LifeError> {
        self.device.resize(size).map_err(|error| self.failed("resize", error))
    }
    fn set_link(&mut self, link: LinkState) -> Result<(), LifeError> {
        self.device.set_link(link).map_err(|error| self.failed("change its link", error))
    }
    fn inject(&mut self, fault: Fault, seed: u64) -> Result<(), LifeError> {
        self.device.inject(fault, seed).map_err(|error| self.failed("suffer the fault", error))
    }
    fn revive(&mut self) -> Result<(), LifeError> {
        match self.device.status().state {
            DeviceState::Idle | DeviceState::Running => Err(self.failed("revive", "it is well: a backend serves it")),
            DeviceState::Stopped => Err(self.failed("revive", "it has been stopped")),
            DeviceState::Recovering { .. } | DeviceState::Waiting { .. } | DeviceState::Quarantined { .. } => {
                self.device.revive();
                Ok(())
            }
        }
    }

    fn upgrade(&mut self, order: UpgradeOrder) -> Result<UpgradeOutcome, LifeError> {
        self.device.begin_upgrade(order).map_err(|error| self.failed("take the upgrade", error))
    }

    fn report(&self) -> Option<DeviceReport> {
        let status = self.device.status();
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
            upgrade: status.upgrade,
            link: status.link,
            recovery: match status.recovery {
                Recovery::Full if self.forgets => RecoveryClass::ContextLoss,
                Recovery::Full => RecoveryClass::Full,
                Recovery::IdleOnly => RecoveryClass::IdleOnly,
            },
            counted: self.device.counted(),
            pid: status.pid,
            exe: status.exe.map(|exe| exe.display().to_string()),
            standby: match status.spare {
                Spare::Off => None,
                Spare::Coming => Some(Standby::Coming),
                Spare::Ready { .. } => Some(Standby::Ready),
            },
            jail: status.jail.iter().map(|layer| (layer.layer.to_string(), layer.outcome.to_string())).collect(),
            last_exit: status.last_exit,
            last_lines: status.last_lines,
            queues: self.device.queues(),
        })
    }
    fn survive(mut self: Box<Self>, deadline: Instant) -> Option<Box<dyn DeviceBuilder>> {
        let kind = self.kind;
        let connected = self.device.leave(deadline)?;
        Some(Box::new(VhostBuilder::of_survivor(kind, connected)))
    }
}
