//! The IOMMU as endpoints know it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use atoll_devices::iommu::{
    Access, Change, Fault, Iommu, IommuParts, IovaRange, Mapping, Outcome, ReservedKind, ReservedRegion,
};
use atoll_devices::pci::DevFn;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::doorbell::signal;

/// How long an endpoint may take to confirm a change: as long as a device process has to end what is in flight, to be
/// replaced when it does not, and for the proof that the dead one's writes are done.
const CONFIRM_MAX: Duration = Duration::from_secs(25);
/// Where interrupts are sent.
const MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
/// Addresses that can be mapped: as many as x86 processors have virtual ones.
const INPUT_LAST: u64 = (1 << 48) - 1;
/// The board's guest-physical addresses.
const GPA_LAST: u64 = (1 << 40) - 1;
const DOMAIN_LAST: u32 = 0xffff;
/// Four times what a driver with full rings of every kind has mapped.
const MAPPINGS_MAX: usize = 1 << 16;

/// An endpoint did not confirm a change.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct Unconfirmed(pub String);

/// A device behind the IOMMU. Called on the IOMMU's thread, one change after the other, without any lock.
pub trait Endpoint: Send + Sync {
    /// Something has changed; [`Unit::find`] and [`Unit::mappings`] tell what holds now. Returns when nothing uses a
    /// translation that is lost any more, and those that are gained can be used.
    ///
    /// # Errors
    /// When that cannot be said by `deadline`: the guest's request fails.
    fn changed(&self, change: Change, deadline: Instant) -> Result<(), Unconfirmed>;
}

/// The number of an endpoint: where it is on bus 0, as in the VIOT and in the source of a PCI transaction.
pub fn endpoint_id(place: DevFn) -> u32 {
    u32::from(place.slot()) << 3 | u32::from(place.function())
}

struct State {
    iommu: Iommu,
    endpoints: BTreeMap<u32, Weak<dyn Endpoint>>,
}

/// The IOMMU.
pub struct Unit {
    state: Mutex<State>,
    /// A fault waits to be told.
    faulted: EventFd,
}

impl Unit {
    /// One without endpoints, as after power-on.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new() -> io::Result<Self> {
        let range = |(first, last)| IovaRange::new(first, last).unwrap_or(IovaRange::ALL);
        let iommu = Iommu::new(IommuParts {
            input: range((0, INPUT_LAST)),
            gpa_last: GPA_LAST,
            domain_last: DOMAIN_LAST,
            mappings_max: MAPPINGS_MAX,
            reserved: vec![ReservedRegion { range: range(MSI), kind: ReservedKind::Msi }],
            bypass: true,
        });
        let state = Mutex::new(State { iommu, endpoints: BTreeMap::new() });
        Ok(Self { state, faulted: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)? })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device is behind it from now on.
    pub fn join(&self, endpoint: u32, device: Weak<dyn Endpoint>) {
        let mut state = self.state();
        state.iommu.add_endpoint(endpoint);
        state.endpoints.insert(endpoint, device);
    }

    /// It is gone.
    pub fn leave(&self, endpoint: u32) {
        let mut state = self.state();
        state.iommu.remove_endpoint(endpoint);
        state.endpoints.remove(&endpoint);
    }

    /// The devices behind it.
    pub fn endpoints(&self) -> Vec<u32> {
        self.state().endpoints.keys().copied().collect()
    }

    /// The mapping through which an endpoint may access an address.
    ///
    /// # Errors
    /// The fault, for [`Self::report`].
    pub fn find(&self, endpoint: u32, address: u64, access: Access) -> Result<Mapping, Fault> {
        self.state().iommu.find(endpoint, address, access)
    }

    /// All mappings of an endpoint that have an address in `range`.
    pub fn mappings(&self, endpoint: u32, range: IovaRange) -> Vec<Mapping> {
        self.state().iommu.mappings(endpoint, range)
    }

    /// Has the guest told of an access that was refused.
    pub fn report(&self, fault: Fault) {
        self.state().iommu.report(fault);
        signal(&self.faulted, 1);
    }

    /// Readable when a fault is to be told.
    pub(super) fn faulted(&self) -> &EventFd {
        &self.faulted
    }

    /// The driver has accepted these features.
    pub(crate) fn activate(&self, features: u64) {
        self.with(|iommu| iommu.activate(features));
    }

    /// Has the device itself for a moment, for what needs no endpoint.
    pub(super) fn with<T>(&self, act: impl FnOnce(&mut Iommu) -> T) -> T {
        act(&mut self.state().iommu)
    }

    /// Carries a request out, and returns when all endpoints have confirmed what it changes: the bytes of the answer.
    pub(crate) fn request(&self, readable: &[u8], writable: usize) -> Vec<u8> {
        let mut outcome: Outcome = self.with(|iommu| iommu.request(readable, writable));
        let changes = std::mem::take(&mut outcome.changes);
        if !self.settle(changes) {
            outcome.fail();
        }
        outcome.answer
    }

    /// Tells endpoints what has changed; whether all have confirmed. Those that are gone have nothing left to confirm.
    pub(super) fn settle(&self, changes: Vec<Change>) -> bool {
        let deadline = Instant::now() + CONFIRM_MAX;
        let mut confirmed = true;
        for change in changes {
            let (Change::Lost { endpoint, .. } | Change::Gained { endpoint, .. }) = change;
            let device = self.state().endpoints.get(&endpoint).and_then(Weak::upgrade);
            if let Some(Err(error)) = device.map(|device| device.changed(change, deadline)) {
                tracing::error!(endpoint, ?change, %error, "a change of the IOMMU was not confirmed");
                confirmed = false;
            }
        }
        confirmed
    }
}
