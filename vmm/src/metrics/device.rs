//! What the VMM knows of one device: its process' page, and what became of the process.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use atoll_devices::virtio::QueueConfig;
use atoll_protocol::sidecar::DeviceClass;
use atoll_protocol::stats::class_counters;
use serde::Serialize;
use vm_memory::GuestMemoryMmap;

use super::page::{QueueFigures, StatsPage};
use super::rings::{CountedBy, Rings};
use super::translation::TranslationCounters;
use crate::config::DeviceKind;
use crate::vhost::Spare;

/// What a device is at, as far as figures are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// A backend is there; no driver has started the device.
    Idle,
    /// The backend serves the driver.
    Running,
    /// The backend is gone; another one is on its way.
    Recovering,
    /// The backend is gone, and none is to be had.
    Waiting,
    /// No backend serves the driver.
    Quarantined,
    /// The machine has stopped it.
    Stopped,
}

impl Phase {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::Idle, Self::Running, Self::Recovering, Self::Waiting, Self::Quarantined, Self::Stopped];

    /// In lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Running => "running",
            Self::Recovering => "recovering",
            Self::Waiting => "waiting",
            Self::Quarantined => "quarantined",
            Self::Stopped => "stopped",
        }
    }
}

/// How it is counted what a device does.
#[derive(Debug)]
enum Count {
    /// In the page of its process.
    Page(StatsPage),
    /// In its rings, where the backend is not ours.
    Rings(Rings),
    /// In an account that its process keeps for its successors.
    Account(Arc<dyn Account>),
    /// Not at all: the guest drives it by itself, or somebody else's process serves its registers.
    Nobody,
}

/// Completions that a process writes down where the VMM can see them.
pub trait Account: std::fmt::Debug + Send + Sync {
    /// Of each queue, since the device is there.
    fn completed(&self) -> BTreeMap<u16, u64>;
}

/// Characters of a label that says how a process ended.
const REASON_MAX: usize = 256;

/// One device's figures. Whoever serves the device keeps it; with the last of them it disappears from the registry.
#[derive(Debug)]
pub struct DeviceMeter {
    id: String,
    kind: DeviceKind,
    class: DeviceClass,
    count: Count,
    phase: AtomicU8,
    generation: AtomicU64,
    lost: AtomicU64,
    full: AtomicBool,
    failed_starts: AtomicU64,
    /// How the last backend ended, and the spare beside the present one.
    told: Mutex<(Option<String>, Spare)>,
    /// What happens to its addresses, where it is behind an IOMMU.
    translation: OnceLock<TranslationCounters>,
}

impl DeviceMeter {
    pub(super) fn new(id: &str, kind: DeviceKind, class: DeviceClass, page: Option<StatsPage>) -> Self {
        let count = page.map_or_else(|| Count::Rings(Rings::default()), Count::Page);
        Self::counting(id, kind, class, count)
    }

    /// Of a device whose requests nobody counts.
    pub(super) fn uncounted(id: &str, kind: DeviceKind) -> Self {
        Self::counting(id, kind, DeviceClass::Other(0), Count::Nobody)
    }

    /// Of a device whose process keeps an account.
    pub(super) fn accounted(id: &str, kind: DeviceKind, account: Arc<dyn Account>) -> Self {
        Self::counting(id, kind, DeviceClass::Other(0), Count::Account(account))
    }

    fn counting(id: &str, kind: DeviceKind, class: DeviceClass, count: Count) -> Self {
        let (phase, generation, lost) = (AtomicU8::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let (full, failed_starts, told) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new((None, Spare::Off)));
        Self {
            id: id.to_owned(),
            kind,
            class,
            count,
            phase,
            generation,
            lost,
            full,
            failed_starts,
            told,
            translation: OnceLock::new(),
        }
    }

    /// What happens to its addresses; whoever asks says that it is behind an IOMMU.
    pub fn translation(&self) -> &TranslationCounters {
        self.translation.get_or_init(TranslationCounters::default)
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A descriptor of its page for an incarnation of its process (`--stats-fd`); none where there is no page.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn pass(&self) -> io::Result<Option<OwnedFd>> {
        match &self.count {
            Count::Page(page) => page.pass().map(Some),
            Count::Rings(_) | Count::Account(_) | Count::Nobody => Ok(None),
        }
    }

    /// Its rings, where they are what is counted.
    pub(super) fn rings(&self) -> Option<&Rings> {
        match &self.count {
            Count::Page(_) | Count::Account(_) | Count::Nobody => None,
            Count::Rings(rings) => Some(rings),
        }
    }

    /// Who counts what it does.
    pub fn counted(&self) -> CountedBy {
        match &self.count {
            Count::Page(_) => CountedBy::Process,
            Count::Rings(_) | Count::Account(_) => CountedBy::Rings,
            Count::Nobody => CountedBy::Nobody,
        }
    }

    /// A driver has set these queues up, and runs the device from now on.
    pub fn begin(&self, memory: &Arc<GuestMemoryMmap>, queues: &[QueueConfig]) {
        if let Some(rings) = self.rings() {
            rings.begin(memory, queues);
        }
    }

    /// The driver's rings are not there any more.
    pub fn end(&self) {
        if let Some(rings) = self.rings() {
            rings.end();
        }
    }

    /// What it is at, which incarnation of its backend serves it, how many it has lost.
    pub fn tell(&self, phase: Phase, generation: u64, lost: u64) {
        self.phase.store(phase as u8, Ordering::Relaxed);
        self.generation.store(generation, Ordering::Relaxed);
        self.lost.store(lost, Ordering::Relaxed);
    }

    /// Whether it survives the death of the present backend with requests in flight.
    pub fn tell_recovery(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    /// Starts that failed, how the last process ended, and whether a spare waits.
    pub fn tell_end(&self, failed_starts: u64, last_exit: Option<&str>, spare: Spare) {
        self.failed_starts.store(failed_starts, Ordering::Relaxed);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.0.as_deref() != last_exit {
            told.0 = last_exit.map(|words| words.chars().take(REASON_MAX).collect());
        }
        told.1 = spare;
    }

    /// The figures now.
    pub fn snapshot(&self) -> DeviceSnapshot {
        let (queues, completed) = match &self.count {
            Count::Page(page) => ((0..page.queues()).map(|n| page.queue(n)).collect(), BTreeMap::new()),
            Count::Rings(rings) => (Vec::new(), rings.completed()),
            Count::Account(account) => (Vec::new(), account.completed()),
            Count::Nobody => (Vec::new(), BTreeMap::new()),
        };
        let (last_exit, spare) = self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        DeviceSnapshot {
            counted: self.counted(),
            completed,
            id: self.id.clone(),
            kind: self.kind,
            class: self.class,
            phase: Phase::ALL.get(usize::from(self.phase.load(Ordering::Relaxed))).copied().unwrap_or(Phase::Stopped),
            generation: self.generation.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
            full_recovery: self.full.load(Ordering::Relaxed),
            failed_starts: self.failed_starts.load(Ordering::Relaxed),
            last_exit,
            spare,
            queues,
            translation: self.translation.get().map(TranslationCounters::snapshot).unwrap_or_default(),
        }
    }
}

/// One device at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSnapshot {
    /// Its name.
    pub id: String,
    /// What it is.
    pub kind: DeviceKind,
    /// What its process said that it serves.
    pub class: DeviceClass,
    /// What it is at.
    pub phase: Phase,
    /// Which incarnation of its backend serves it, from 1.
    pub generation: u64,
    /// Backends that it has lost.
    pub lost: u64,
    /// Whether it survives the death of the present backend with requests in flight.
    pub full_recovery: bool,
    /// Successors that could not be started.
    pub failed_starts: u64,
    /// How the last process ended.
    pub last_exit: Option<String>,
    /// Whether a spare waits.
    pub spare: Spare,
    /// Who has counted.
    pub counted: CountedBy,
    /// Its queues, where its process counts.
    pub queues: Vec<QueueFigures>,
    /// Requests that each queue has completed, where its rings are what is counted.
    pub completed: BTreeMap<u16, u64>,
    /// What has happened to its addresses, by name; nothing where it is behind no IOMMU.
    pub translation: Vec<(&'static str, u64)>,
}

/// What `top` shows of a device: sums over its queues, latencies in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QueueSnapshot {
    /// Requests completed.
    pub requests: u64,
    /// With an error.
    pub errors: u64,
    /// Bytes to the guest.
    pub read_bytes: u64,
    /// Bytes from the guest.
    pub write_bytes: u64,
    /// Half of all requests took no longer; none without a request.
    pub p50_us: Option<f64>,
    /// 99 of 100 took no longer.
    pub p99_us: Option<f64>,
    /// 999 of 1000 took no longer.
    pub p999_us: Option<f64>,
}

impl From<&QueueFigures> for QueueSnapshot {
    fn from(figures: &QueueFigures) -> Self {
        let us = |share| figures.latency.quantile(share).map(|time| time.as_nanos() as f64 / 1000.0);
        Self {
            requests: figures.requests,
            errors: figures.errors,
            read_bytes: figures.read_bytes,
            write_bytes: figures.write_bytes,
            p50_us: us(0.5),
            p99_us: us(0.99),
            p999_us: us(0.999),
        }
    }
}

impl DeviceSnapshot {
    /// Sums over all queues.
    pub fn total(&self) -> QueueFigures {
        let mut total = QueueFigures::default();
        self.queues.iter().for_each(|queue| total.add(queue));
        total
    }

    /// Names of the class's counters.
    pub(super) fn class_counters(&self) -> &'static [&'static str] {
        class_counters(self.class)
    }

    /// By the names that clients of Cloud Hypervisor's `vm.counters` know, and ours beside them.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        let total = self.total();
        let mut counters = BTreeMap::new();
        let mut put = |name: &str, value: u64| {
            counters.insert(name.to_owned(), value);
        };
        put("generation", self.generation);
        put("restarts", self.lost);
        for (event, times) in &self.translation {
            put(&format!("iommu_{event}"), *times);
        }
        // What is not counted is left out.
        if self.counted == CountedBy::Nobody {
            return counters;
        }
        if self.counted == CountedBy::Rings {
            put("requests", self.completed.values().fold(0, |sum, count| sum.wrapping_add(*count)));
            return counters;
        }
        let names = match self.kind {
            DeviceKind::Net => ["rx_frames", "rx_bytes", "tx_frames", "tx_bytes"],
            _ => ["read_ops", "read_bytes", "write_ops", "write_bytes"],
        };
        for (name, value) in names.iter().zip([total.reads, total.read_bytes, total.writes, total.write_bytes]) {
            put(name, value);
        }
        put("requests", total.requests);
        put("errors", total.errors);
        put("malformed", total.malformed);
        put("throttled", total.throttled);
        for (name, value) in self.class_counters().iter().zip(total.class) {
            put(name, value);
        }
        counters
    }
}
