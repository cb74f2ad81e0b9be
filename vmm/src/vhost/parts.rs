//! What a device is made of, before it has a backend.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::class::DeviceClass;
use super::iotlb::Behind;
use super::session::Addresses;
use super::source::{BackendSource, Build, Fence};
use super::upgrade::{Lone, UPGRADE_TRIAL};
use crate::actor::{Clock, RealClock, Roll};
use crate::backend::PolicyConfig;
use crate::config::{Isolation, OnFailure, Track};
use crate::doorbell::Relay;
use crate::lifecycle::Story;
use crate::memory::GuestMemory;
use crate::metrics::DeviceMeter;
use crate::screen::Joint;

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From asking for a backend to its being connected.
    pub start: Duration,
    /// One step of a conversation.
    pub step: Duration,
    /// GET_VRING_BASE, for which a backend finishes what is in flight.
    pub drain: Duration,
    /// How long a new build must serve before the operator is told that it does.
    pub probation: Duration,
    /// How long after that its death brings the old one back.
    pub trial: Duration,
    /// A guest's reset waits so long for a successor to have passed the fence of a dead backend.
    pub fence: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            start: Duration::from_secs(10),
            step: Duration::from_secs(5),
            drain: Duration::from_secs(10),
            probation: Duration::from_millis(250),
            trial: UPGRADE_TRIAL,
            fence: Duration::from_secs(10),
        }
    }
}

/// What is needed to reach a device's first backend.
pub struct DeviceParts {
    /// As the user named it; also names its threads.
    pub name: String,
    /// What kind of device it is.
    pub class: Box<dyn DeviceClass>,
    /// Where backends come from.
    pub source: Box<dyn BackendSource>,
    /// What backends are shown of the guest.
    pub memory: GuestMemory,
    /// For interposed doorbells and calls.
    pub relay: Arc<Relay>,
    /// How long things may take.
    pub limits: Limits,
    /// Where deaths and returns of backends are told.
    pub story: Story,
    /// Where its figures are.
    pub meter: Option<Arc<DeviceMeter>>,
    /// What becomes of it when its backend cannot be had again.
    pub on_failure: OnFailure,
    /// Who keeps account of its requests.
    pub track: Track,
    /// What the user says of deaths and stalls.
    pub care: Care,
    /// It is behind the machine's IOMMU.
    pub iommu: bool,
    /// What backends have of the guest's memory.
    pub isolation: Isolation,
    /// Where its pictures go, when it draws.
    pub joint: Option<Arc<Joint>>,
    /// Time of restarts and deadlines.
    pub clock: Arc<dyn Clock>,
}

/// What the user says of a device's deaths and stalls.
#[derive(Clone, Copy, Debug)]
pub struct Care {
    /// How long a queue may stand with work in it before its backend is replaced; `None`: for ever.
    pub stall: Option<Duration>,
    /// The backend is being debugged: it is never taken for dead because it stands.
    pub debugged: bool,
    /// How patient to be with crashes.
    pub policy: PolicyConfig,
    /// A spare process waits beside the one that serves.
    pub standby: bool,
}

/// A queue that stands for this long with work in it does not come back by itself.
const STALL: Duration = Duration::from_secs(30);

impl Default for Care {
    fn default() -> Self {
        Self { stall: Some(STALL), debugged: false, policy: PolicyConfig::default(), standby: false }
    }
}

impl DeviceParts {
    /// The time of the host.
    pub fn real_time() -> Arc<dyn Clock> {
        Arc::new(RealClock::new())
    }
}

/// What incarnations are made with, shared with the thread that prepares one.
#[derive(Clone)]
pub(super) struct Makers {
    pub(super) name: String,
    pub(super) class: Arc<dyn DeviceClass>,
    pub(super) source: Arc<Mutex<Box<dyn BackendSource>>>,
    pub(super) limits: Limits,
    pub(super) track: Track,
    /// It is behind the machine's IOMMU.
    pub(super) iommu: bool,
    pub(super) isolation: Isolation,
    /// What its processes are made of, where that can be changed.
    pub(super) build: Result<Arc<Build>, Lone>,
    /// Where its conversations and its own thread are on the roll.
    pub(super) roll: Roll,
}

impl Makers {
    /// Whether its backends see rings of the VMM's instead of the driver's.
    pub(super) fn is_shadowed(&self) -> bool {
        self.track == Track::Shadow || self.copies()
    }
    /// Whether its backends see copies of requests and nothing of the guest's memory.
    pub(super) fn copies(&self) -> bool {
        self.isolation == Isolation::Copy
    }
    /// Who finds out where the driver's addresses lead.
    pub(super) fn addresses(&self) -> Addresses {
        match (self.iommu, self.copies()) {
            (false, _) => Addresses::Physical,
            (true, false) => Addresses::ByBackend,
            (true, true) => Addresses::ByFrontEnd,
        }
    }
}

/// [`DeviceParts`] as the device's thread has them.
pub(super) struct Parts {
    pub(super) makers: Makers,
    pub(super) fence: Arc<dyn Fence>,
    pub(super) memory: GuestMemory,
    /// The IOMMU that the device is behind, once it is on a board.
    pub(super) behind: Option<Behind>,
    pub(super) relay: Arc<Relay>,
    pub(super) limits: Limits,
    pub(super) story: Story,
    pub(super) meter: Option<Arc<DeviceMeter>>,
    /// Where its pictures go, when it draws.
    pub(super) joint: Option<Arc<Joint>>,
    pub(super) clock: Arc<dyn Clock>,
}
