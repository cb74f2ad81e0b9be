//! The state machine: domains, endpoints, and what requests do to them.

use std::collections::{BTreeMap, VecDeque};

use super::iova_map::{Access, IovaMap, IovaRange, MapError, Mapping, Rights};
use super::wire::{
    ATTACH_BYPASS, CONFIG_LEN, F_BYPASS_CONFIG, F_DOMAIN_RANGE, F_INPUT_RANGE, F_MAP_UNMAP, F_PROBE, FAULT_LEN, Fault,
    FaultReason, MAP_READ, MAP_WRITE, PROBE_LEN, Request, ReservedRegion, Status, TAIL_LEN, properties, tail,
};

/// The page size: mappings begin and end at multiples of it.
const PAGE: u64 = 4096;
/// Faults that wait for a buffer of the driver's; a driver that takes none misses the later ones.
const FAULTS_MAX: usize = 64;

/// What an IOMMU is made of; all of it is frozen.
#[derive(Clone, Debug)]
pub struct IommuParts {
    /// The addresses that can be mapped; from the beginning of a page to the end of one.
    pub input: IovaRange,
    /// The last guest-physical address that can be mapped onto.
    pub gpa_last: u64,
    /// The highest number of a domain; they begin at 0.
    pub domain_last: u32,
    /// Mappings that a domain may have. A domain is there only while an endpoint is in it, so that there are never more of
    /// them than endpoints.
    pub mappings_max: usize,
    /// Addresses that no driver can map, apart from each other.
    pub reserved: Vec<ReservedRegion>,
    /// Whether an endpoint outside of all domains reaches all memory when the machine starts.
    pub bypass: bool,
}

#[derive(Clone, Debug)]
enum Domain {
    Bypass,
    Mapped(IovaMap),
}

/// What a request has changed for an endpoint. Who keeps copies of translations for it has to act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// No translation of these addresses from before holds any longer; there may be other ones instead.
    Lost {
        /// Whose.
        endpoint: u32,
        /// Which addresses.
        range: IovaRange,
    },
    /// There are translations where there were none. [`Iommu::find`] gives them; who asks for each when it needs it has
    /// nothing to do.
    Gained {
        /// Whose.
        endpoint: u32,
        /// Which addresses.
        range: IovaRange,
    },
}

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// What to write to the beginning of the request's writable part; its length is the used length. Empty for a request
    /// that cannot be answered. To be given to the driver when all `changes` have been confirmed, not before.
    pub answer: Vec<u8>,
    /// What has changed, in order. As many as there are endpoints, and twice that when one changes domains.
    pub changes: Vec<Change>,
}

impl Outcome {
    /// Takes the success back: a change was not confirmed.
    pub fn fail(&mut self) {
        if let Some(status) = self.answer.len().checked_sub(TAIL_LEN).and_then(|at| self.answer.get_mut(at)) {
            *status = Status::DeviceError as u8;
        }
    }
}

/// A domain, as it is saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainState {
    /// Its number.
    pub id: u32,
    /// Its endpoints reach all memory.
    pub bypass: bool,
    /// What it has mapped, in order of address.
    pub mappings: Vec<Mapping>,
}

/// What a guest can see of an IOMMU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IommuState {
    /// The field of the configuration.
    pub bypass: bool,
    /// What the driver has accepted; 0 while there is none.
    pub features: u64,
    /// All domains, in order of number.
    pub domains: Vec<DomainState>,
    /// All endpoints in order, and the domain that each is in.
    pub endpoints: Vec<(u32, Option<u32>)>,
}

/// A virtio IOMMU without its queues.
#[derive(Debug)]
pub struct Iommu {
    parts: IommuParts,
    bypass: bool,
    features: u64,
    domains: BTreeMap<u32, Domain>,
    endpoints: BTreeMap<u32, Option<u32>>,
    faults: VecDeque<Fault>,
    faults_lost: u64,
}

impl Iommu {
    /// What it offers, beside the transport's features.
    pub const FEATURES: u64 = F_INPUT_RANGE | F_DOMAIN_RANGE | F_MAP_UNMAP | F_PROBE | F_BYPASS_CONFIG;

    /// As after power-on, without endpoints.
    pub fn new(parts: IommuParts) -> Self {
        Self {
            bypass: parts.bypass,
            parts,
            features: 0,
            domains: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            faults: VecDeque::new(),
            faults_lost: 0,
        }
    }

    /// The configuration space.
    pub fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut fields = config.iter_mut();
        let mut put = |bytes: &[u8]| fields.by_ref().zip(bytes).for_each(|(to, from)| *to = *from);
        // Every power of two from a page on.
        put(&(!(PAGE - 1)).to_le_bytes());
        put(&self.parts.input.first().to_le_bytes());
        put(&self.parts.input.last().to_le_bytes());
        put(&0_u32.to_le_bytes());
        put(&self.parts.domain_last.to_le_bytes());
        put(&(PROBE_LEN as u32).to_le_bytes());
        put(&[self.bypass.into()]);
        config
    }

    /// A device behind it is there from now on; in no domain. Nothing happens when it was there.
    pub fn add_endpoint(&mut self, endpoint: u32) {
        self.endpoints.entry(endpoint).or_default();
    }

    /// It is gone. The domain that it was in goes with it when nobody else is in it.
    pub fn remove_endpoint(&mut self, endpoint: u32) {
        if let Some(Some(domain)) = self.endpoints.remove(&endpoint) {
            self.drop_if_empty(domain);
        }
    }

    /// A driver has accepted these features.
    pub fn activate(&mut self, features: u64) {
        self.features = features;
    }

    /// The driver has reset the device: no endpoint is in any domain. `bypass` stays as it is.
    pub fn reset(&mut self) -> Vec<Change> {
        self.features = 0;
        self.domains.clear();
        self.faults.clear();
        let attached = self.endpoints.iter_mut().filter_map(|(endpoint, domain)| domain.take().map(|_| *endpoint));
        let lost: Vec<_> = attached.map(|endpoint| Change::Lost { endpoint, range: IovaRange::ALL }).collect();
        let gained = lost.iter().map(|change| match change {
            Change::Lost { endpoint, range } | Change::Gained { endpoint, range } => {
                Change::Gained { endpoint: *endpoint, range: *range }
            }
        });
        let gained: Vec<_> = gained.filter(|_| self.bypass).collect();
        lost.into_iter().chain(gained).collect()
    }

    /// The driver has written the field `bypass`; only 0 and 1 are values of it.
    pub fn set_bypass(&mut self, value: u8) -> Vec<Change> {
        let bypass = match value {
            0 => false,
            1 => true,
            _ => return Vec::new(),
        };
        if self.bypass == bypass {
            return Vec::new();
        }
        self.bypass = bypass;
        let free = self.endpoints.iter().filter(|(_, domain)| domain.is_none()).map(|(endpoint, _)| *endpoint);
        let range = IovaRange::ALL;
        free.map(|endpoint| if bypass { Change::Gained { endpoint, range } } else { Change::Lost { endpoint, range } })
            .collect()
    }

    /// A request: its readable part, as much of it as there is up to [`Request::READABLE_MAX`], and how many bytes the
    /// driver has left for the answer.
    pub fn request(&mut self, readable: &[u8], writable: usize) -> Outcome {
        let Some(request) = Request::decode(readable) else { return Outcome::default() };
        let negotiated = match request {
            Request::Map { .. } | Request::Unmap { .. } => self.features & F_MAP_UNMAP != 0,
            Request::Attach { .. } | Request::Detach { .. } | Request::Probe { .. } => true,
        };
        if writable < TAIL_LEN || !negotiated {
            return Outcome::default();
        }
        if let Request::Probe { endpoint } = request {
            return Outcome { answer: self.probe(endpoint, writable), changes: Vec::new() };
        }
        let mut changes = Vec::new();
        let done = match request {
            Request::Attach { domain, endpoint, flags, reserved: 0 } => {
                self.attach(domain, endpoint, flags, &mut changes)
            }
            Request::Detach { domain, endpoint } => self.detach(domain, endpoint, &mut changes),
            Request::Map { domain, virt_start, virt_end, phys_start, flags } => {
                self.map(domain, (virt_start, virt_end), phys_start, flags, &mut changes)
            }
            Request::Unmap { domain, virt_start, virt_end, reserved: 0 } => {
                self.unmap(domain, (virt_start, virt_end), &mut changes)
            }
            Request::Attach { .. } | Request::Unmap { .. } | Request::Probe { .. } => Err(Status::Invalid),
        };
        let status = done.err().unwrap_or(Status::Ok);
        Outcome { answer: tail(status).to_vec(), changes }
    }

    fn probe(&self, endpoint: u32, writable: usize) -> Vec<u8> {
        let fits = writable >= PROBE_LEN + TAIL_LEN;
        // Of a list that is too short nothing but the tail is written; a list's bytes are to be zero then.
        let blank = if fits { PROBE_LEN } else { writable - TAIL_LEN };
        let (mut answer, status) = match (self.endpoints.contains_key(&endpoint), fits) {
            (false, _) => (vec![0; blank], Status::NoEntry),
            (true, false) => (vec![0; blank], Status::Invalid),
            (true, true) => (properties(&self.parts.reserved), Status::Ok),
        };
        answer.extend(tail(status));
        answer
    }

    fn attach(&mut self, domain: u32, endpoint: u32, flags: u32, changes: &mut Vec<Change>) -> Result<(), Status> {
        let known = if self.features & F_BYPASS_CONFIG != 0 { ATTACH_BYPASS } else { 0 };
        if flags & !known != 0 {
            return Err(Status::Invalid);
        }
        let was = *self.endpoints.get(&endpoint).ok_or(Status::NoEntry)?;
        if domain > self.parts.domain_last {
            return Err(Status::Range);
        }
        let bypass = flags & ATTACH_BYPASS != 0;
        match self.domains.get(&domain) {
            Some(Domain::Bypass) if !bypass => return Err(Status::Invalid),
            Some(Domain::Mapped(_)) if bypass => return Err(Status::Invalid),
            _ => {}
        }
        if was == Some(domain) {
            return Ok(());
        }
        let reached = match was {
            Some(_) => true,
            None => self.bypass,
        };
        if reached {
            changes.push(Change::Lost { endpoint, range: IovaRange::ALL });
        }
        let fresh = || if bypass { Domain::Bypass } else { Domain::Mapped(IovaMap::new(self.parts.mappings_max)) };
        let entered = self.domains.entry(domain).or_insert_with(fresh);
        if !matches!(entered, Domain::Mapped(map) if map.is_empty()) {
            changes.push(Change::Gained { endpoint, range: IovaRange::ALL });
        }
        self.endpoints.insert(endpoint, Some(domain));
        if let Some(was) = was {
            self.drop_if_empty(was);
        }
        Ok(())
    }

    fn detach(&mut self, domain: u32, endpoint: u32, changes: &mut Vec<Change>) -> Result<(), Status> {
        let was = self.endpoints.get_mut(&endpoint).ok_or(Status::NoEntry)?;
        if *was != Some(domain) {
            return Err(Status::Invalid);
        }
        *was = None;
        changes.push(Change::Lost { endpoint, range: IovaRange::ALL });
        if self.bypass {
            changes.push(Change::Gained { endpoint, range: IovaRange::ALL });
        }
        self.drop_if_empty(domain);
        Ok(())
    }

    fn map(
        &mut self,
        domain: u32,
        (first, last): (u64, u64),
        gpa: u64,
        flags: u32,
        changes: &mut Vec<Change>,
    ) -> Result<(), Status> {
        if flags & !(MAP_READ | MAP_WRITE) != 0 {
            return Err(Status::Invalid);
        }
        let aligned = |address: u64| address.is_multiple_of(PAGE);
        if !aligned(first) || !aligned(last.wrapping_add(1)) || !aligned(gpa) {
            return Err(Status::Range);
        }
        let iova = IovaRange::new(first, last).ok_or(Status::Invalid)?;
        let rights = Rights { read: flags & MAP_READ != 0, write: flags & MAP_WRITE != 0 };
        let mapping = Mapping::new(iova, gpa, rights).ok_or(Status::Range)?;
        if !self.parts.input.covers(iova) || gpa + iova.reach() > self.parts.gpa_last {
            return Err(Status::Range);
        }
        if self.parts.reserved.iter().any(|region| region.range.overlaps(iova)) {
            return Err(Status::Invalid);
        }
        match self.domains.get_mut(&domain).ok_or(Status::NoEntry)? {
            Domain::Bypass => return Err(Status::Invalid),
            Domain::Mapped(map) => map.map(mapping).map_err(|error| match error {
                MapError::Taken => Status::Invalid,
                MapError::Full => Status::NoMemory,
            })?,
        }
        changes.extend(self.members(domain).map(|endpoint| Change::Gained { endpoint, range: iova }));
        Ok(())
    }

    fn unmap(&mut self, domain: u32, (first, last): (u64, u64), changes: &mut Vec<Change>) -> Result<(), Status> {
        let range = IovaRange::new(first, last).ok_or(Status::Invalid)?;
        let removed = match self.domains.get_mut(&domain).ok_or(Status::NoEntry)? {
            Domain::Bypass => return Err(Status::Invalid),
            Domain::Mapped(map) => map.unmap(range).map_err(|_| Status::Range)?,
        };
        if removed != 0 {
            changes.extend(self.members(domain).map(|endpoint| Change::Lost { endpoint, range }));
        }
        Ok(())
    }

    /// The endpoints in a domain.
    fn members(&self, domain: u32) -> impl Iterator<Item = u32> {
        self.endpoints.iter().filter(move |(_, at)| **at == Some(domain)).map(|(endpoint, _)| *endpoint)
    }

    fn drop_if_empty(&mut self, domain: u32) {
        if self.members(domain).next().is_none() {
            self.domains.remove(&domain);
        }
    }

    /// The mapping through which an endpoint may access `address`. For one that bypasses the IOMMU it is the widest stretch
    /// without reserved regions, onto itself.
    ///
    /// # Errors
    /// The fault that the guest is to be told ([`report`](Self::report)).
    pub fn find(&self, endpoint: u32, address: u64, access: Access) -> Result<Mapping, Fault> {
        let fault = |reason| Fault { reason, endpoint, address, access };
        let attached = self.endpoints.get(&endpoint).ok_or(fault(FaultReason::Domain))?;
        let domain = attached.and_then(|domain| self.domains.get(&domain));
        match domain {
            None if !self.bypass => Err(fault(FaultReason::Domain)),
            None | Some(Domain::Bypass) => self.identity(address).ok_or(fault(FaultReason::Mapping)),
            Some(Domain::Mapped(map)) => map
                .find(address)
                .filter(|mapping| mapping.rights.permit(access))
                .copied()
                .ok_or(fault(FaultReason::Mapping)),
        }
    }

    /// All mappings of an endpoint with an address in `range`, in order; for those that map ahead.
    pub fn mappings(&self, endpoint: u32, range: IovaRange) -> Vec<Mapping> {
        let domain = match self.endpoints.get(&endpoint) {
            Some(Some(domain)) => self.domains.get(domain),
            Some(None) if self.bypass => Some(&Domain::Bypass),
            _ => None,
        };
        match domain {
            None => Vec::new(),
            Some(Domain::Mapped(map)) => map.within(range).copied().collect(),
            Some(Domain::Bypass) => {
                let mut found = Vec::new();
                let mut address = Some(0);
                while let Some(at) = address.filter(|at| *at <= self.parts.gpa_last) {
                    let skipped = self.parts.reserved.iter().find(|region| region.range.contains(at));
                    let last = match (self.identity(at), skipped) {
                        (Some(mapping), _) => {
                            found.extend(Some(mapping).filter(|mapping| mapping.iova().overlaps(range)));
                            mapping.iova().last()
                        }
                        (None, Some(region)) => region.range.last(),
                        (None, None) => break,
                    };
                    address = last.checked_add(1);
                }
                found
            }
        }
    }

    /// The stretch around `address` that holds no reserved region, onto itself.
    fn identity(&self, address: u64) -> Option<Mapping> {
        let (mut first, mut last) = (0, self.parts.gpa_last);
        for region in &self.parts.reserved {
            let range = region.range;
            if range.contains(address) {
                return None;
            }
            if range.last() < address {
                first = first.max(range.last() + 1);
            } else {
                last = last.min(range.first() - 1);
            }
        }
        let iova = IovaRange::new(first, last).filter(|range| range.contains(address))?;
        Mapping::new(iova, first, Rights::ALL)
    }

    /// Keeps a fault for the driver.
    pub fn report(&mut self, fault: Fault) {
        // Nobody reads them while there is no driver.
        if self.features == 0 || self.faults.len() >= FAULTS_MAX {
            self.faults_lost = self.faults_lost.saturating_add(1);
        } else {
            self.faults.push_back(fault);
        }
    }

    /// Whether a fault waits for a buffer.
    pub fn has_faults(&self) -> bool {
        !self.faults.is_empty()
    }

    /// The next fault, for a buffer of so many bytes. One that is too short for a record gets none, and no fault is lost.
    pub fn take_fault(&mut self, writable: usize) -> Option<[u8; FAULT_LEN]> {
        if writable < FAULT_LEN {
            return None;
        }
        self.faults.pop_front().map(|fault| fault.encode())
    }

    /// Faults that no driver was told of.
    pub fn faults_lost(&self) -> u64 {
        self.faults_lost
    }

    /// A copy of the state, for whoever saves it. Faults that were not told are not part of it.
    pub fn state(&self) -> IommuState {
        let saved = |(id, domain): (&u32, &Domain)| match domain {
            Domain::Bypass => DomainState { id: *id, bypass: true, mappings: Vec::new() },
            Domain::Mapped(map) => DomainState { id: *id, bypass: false, mappings: map.iter().copied().collect() },
        };
        IommuState {
            bypass: self.bypass,
            features: self.features,
            domains: self.domains.iter().map(saved).collect(),
            endpoints: self.endpoints.iter().map(|(endpoint, domain)| (*endpoint, *domain)).collect(),
        }
    }

    /// Puts a state back. Whether it was one that an IOMMU like this can have; if not, nothing has changed.
    pub fn restore(&mut self, state: &IommuState) -> bool {
        let mut restored = Self::new(self.parts.clone());
        (restored.bypass, restored.features) = (state.bypass, state.features & Self::FEATURES);
        let mut domains = BTreeMap::new();
        for saved in &state.domains {
            let mut map = IovaMap::new(self.parts.mappings_max);
            let sound = saved.mappings.iter().all(|mapping| {
                let free = !self.parts.reserved.iter().any(|region| region.range.overlaps(mapping.iova()));
                let fits = self.parts.input.covers(mapping.iova())
                    && mapping
                        .gpa()
                        .checked_add(mapping.iova().reach())
                        .is_some_and(|last| last <= self.parts.gpa_last);
                free && fits && map.map(*mapping).is_ok()
            });
            if !sound || saved.id > self.parts.domain_last || (saved.bypass && !map.is_empty()) {
                return false;
            }
            domains.insert(saved.id, if saved.bypass { Domain::Bypass } else { Domain::Mapped(map) });
        }
        restored.endpoints = state.endpoints.iter().copied().collect();
        let joined = |domain: &u32| restored.endpoints.values().any(|at| at.as_ref() == Some(domain));
        let inhabited = domains.keys().all(joined);
        let housed = restored.endpoints.values().flatten().all(|domain| domains.contains_key(domain));
        if !inhabited || !housed {
            return false;
        }
        restored.domains = domains;
        *self = restored;
        true
    }
}
