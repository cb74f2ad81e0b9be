//! The three units of a conversation: handshake, start and stop, each in the specification's order.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use atoll_devices::virtio::input_config::{self, Pages};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures as Protocol};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::class::ConfigWish;
use super::config_space;
use super::conversation::Wire;
use super::error::{ConversationError, Step};
use super::features::{self, PROTOCOL_FEATURES, VERSION_1};
use super::gpu_socket;
use super::inflight::{InflightRegion, Shape};
use super::iotlb::{self, ACCESS_PLATFORM};
use super::shadow::RingMemory;
use crate::memory::{GuestMemory, backend_address};

/// Bytes of an input device's configuration space, whichever page is open.
const PAGES_LEN: u32 = input_config::LEN as u32;

/// What a backend says of itself before anything is asked of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Virtio feature bits that the guest may be offered (see [`features::offerable`]).
    pub features: u64,
    /// Protocol features that both sides speak, now in force.
    pub protocol: Protocol,
    /// How many queues it serves; `None` when it cannot say (no MQ): then as few as its kind of device has at least.
    pub queues: Option<u16>,
    /// Its configuration space, as long as was asked for.
    pub config: Vec<u8>,
    /// Its pages, where its kind of device has some.
    pub pages: Pages,
}

/// Who finds out where the addresses of a driver lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Addresses {
    /// Nobody: they are guest-physical ones.
    Physical,
    /// The backend, by what it is told of the IOMMU.
    ByBackend,
    /// The front end, which copies: the backend hears of no IOMMU.
    ByFrontEnd,
}

/// Greets a backend and learns what it is. `requests` is the backend's end of a channel for requests of its own.
pub(super) fn handshake(
    wire: &mut Wire,
    wish: ConfigWish,
    requests: &UnixStream,
    addresses: Addresses,
) -> Result<Capabilities, ConversationError> {
    wire.tell(Step::SetOwner, |frontend| frontend.set_owner())?;
    let offered = wire.ask(Step::GetFeatures, |frontend| frontend.get_features())?;
    let iommu = addresses == Addresses::ByBackend;
    let platform = if iommu { ACCESS_PLATFORM } else { 0 };
    let missing = (PROTOCOL_FEATURES | VERSION_1 | platform) & !offered;
    if missing == ACCESS_PLATFORM {
        let what = format!("{} (or give isolation=copy, which needs none of it)", features::feature_names(missing, 0));
        return Err(ConversationError::Lacks { what });
    }
    if missing != 0 {
        return Err(ConversationError::Lacks { what: features::feature_names(missing, 0) });
    }
    let spoken = wire.ask(Step::GetProtocolFeatures, |frontend| frontend.get_protocol_features())?;
    let mut protocol = spoken & features::spoken();
    if matches!(wish, ConfigWish::Needed(_) | ConfigWish::Pages) && !protocol.contains(Protocol::CONFIG) {
        return Err(ConversationError::Lacks { what: features::protocol_feature_names(Protocol::CONFIG.bits()) });
    }
    // Without the first nobody knows when it has let go of what the guest takes back, without the second nobody hears of what
    // it may not do.
    let lacking = (Protocol::REPLY_ACK | Protocol::BACKEND_REQ) - protocol;
    if iommu && !lacking.is_empty() {
        return Err(ConversationError::Lacks { what: features::protocol_feature_names(lacking.bits()) });
    }
    if !protocol.contains(Protocol::CONFIG) && !iommu {
        // The only request that is served is that the configuration has changed.
        protocol.remove(Protocol::BACKEND_REQ);
    }
    // Not yet acknowledged: REPLY_ACK is in force only from the next message on.
    wire.ask(Step::SetProtocolFeatures, |frontend| frontend.set_protocol_features(protocol))?;
    wire.set_protocol(protocol);
    let queues = if protocol.contains(Protocol::MQ) {
        let queues = wire.ask(Step::GetQueueNum, |frontend| frontend.get_queue_num())?;
        if queues == 0 {
            return Err(ConversationError::Absurd { step: Step::GetQueueNum, what: "no queue at all".into() });
        }
        // Ring numbers are one byte in SET_VRING_KICK and its kin.
        Some(u16::try_from(queues.min(256)).unwrap_or(256))
    } else {
        None
    };
    if protocol.contains(Protocol::BACKEND_REQ) {
        wire.tell(Step::SetBackendReqFd, |frontend| frontend.set_backend_request_fd(requests))?;
    }
    let pages = if wish == ConfigWish::Pages { read_pages(wire)? } else { Pages::default() };
    let config = if wish == ConfigWish::Pages { pages.config(0, 0).to_vec() } else { read_config(wire, wish)? };
    let platform = if addresses == Addresses::Physical { 0 } else { ACCESS_PLATFORM };
    let features = features::offerable(offered) | platform;
    Ok(Capabilities { features, protocol, queues, config, pages })
}

/// Reads the configuration space, as much of it as is wished for and there.
pub(super) fn read_config(wire: &mut Wire, wish: ConfigWish) -> Result<Vec<u8>, ConversationError> {
    let lengths = match wish {
        ConfigWish::Nothing | ConfigWish::Pages => return Ok(Vec::new()),
        ConfigWish::Needed(len) => return wire.speak(Step::GetConfig, |socket| config_space::read(socket, len)),
        ConfigWish::AnyOf(_) if !wire.protocol().contains(Protocol::CONFIG) => return Ok(Vec::new()),
        ConfigWish::AnyOf(lengths) => lengths,
    };
    for len in lengths {
        match wire.speak(Step::GetConfig, |socket| config_space::read(socket, *len)) {
            // What it does not have so much of it may have less of.
            Err(ConversationError::Refused { .. }) => {}
            other => return other,
        }
    }
    Ok(Vec::new())
}

/// Reads all pages of an input device: its driver is then answered without a word to the backend.
fn read_pages(wire: &mut Wire) -> Result<Pages, ConversationError> {
    let pages = Pages::ask(|select, subsel| {
        set_config(wire, 0, &[select, subsel])?;
        wire.speak(Step::GetConfig, |socket| config_space::read(socket, PAGES_LEN))
    })?;
    if pages.is_empty() {
        return Err(ConversationError::Absurd {
            step: Step::GetConfig,
            what: "an input device that says nothing".into(),
        });
    }
    Ok(pages)
}

/// Addresses of a ring as a backend knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ToldAt {
    /// The front end's own: those that its memory table gives to guest-physical ones.
    Memory,
    /// The driver's: descriptor table, available ring, used ring behind the IOMMU.
    Iommu([u64; 3]),
}

/// One ring, ready to be handed over.
pub(super) struct RingPlan {
    pub(super) index: u16,
    pub(super) size: u16,
    /// Guest-physical addresses.
    pub(super) descriptor_table: u64,
    pub(super) available_ring: u64,
    pub(super) used_ring: u64,
    /// Where a backend is told that they are.
    pub(super) told: ToldAt,
    /// A disabled ring of a network card is thrown away by the backend.
    pub(super) enabled: bool,
    /// Next index of the available ring to look at.
    pub(super) base: u16,
    pub(super) call: EventFd,
    pub(super) error: EventFd,
    pub(super) kick: EventFd,
}

/// What becomes of the record of requests in flight.
pub(super) enum InflightPlan {
    /// There is none yet: ask how large it must be for so many queues of such a size.
    Make { queues: u16, queue_size: u16 },
    /// Every incarnation gets the same.
    Keep(Arc<InflightRegion>),
    /// None is kept: somebody else keeps account.
    Without,
}

/// Everything that a backend needs to serve a driver.
pub(super) struct StartPlan {
    /// What the driver accepted.
    pub(super) features: u64,
    /// What it sees of the guest: nothing, where requests are copied.
    pub(super) memory: Option<GuestMemory>,
    pub(super) inflight: InflightPlan,
    /// Where its rings are, when they are not the driver's.
    pub(super) shadow: Option<Arc<RingMemory>>,
    /// What it has to know of the IOMMU before it has rings.
    pub(super) translations: Vec<iotlb::Word>,
    pub(super) rings: Vec<RingPlan>,
    pub(super) known: Known,
}

/// What can be told before there are rings.
#[derive(Clone)]
pub(super) struct Preface {
    /// What the driver accepted, where there is one.
    pub(super) features: Option<u64>,
    pub(super) memory: GuestMemory,
    /// The record of requests in flight, where there is one already.
    pub(super) inflight: Option<Arc<InflightRegion>>,
}

/// What a backend was told already.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known {
    pub(super) features: bool,
    pub(super) memory: bool,
    pub(super) inflight: bool,
}

/// Says everything that comes before the rings.
pub(super) fn brief(wire: &mut Wire, preface: Preface) -> Result<(), ConversationError> {
    if let Some(features) = preface.features {
        let wanted = features | PROTOCOL_FEATURES;
        wire.tell(Step::SetFeatures, |frontend| frontend.set_features(wanted))?;
    }
    let table = preface.memory.memory_table();
    wire.tell(Step::SetMemTable, |frontend| frontend.set_mem_table(&table))?;
    if let Some(region) = preface.inflight.filter(|_| wire.protocol().contains(Protocol::INFLIGHT_SHMFD)) {
        let (message, descriptor) = region.message();
        wire.tell(Step::SetInflightFd, |frontend| frontend.set_inflight_fd(&message, descriptor))?;
    }
    if !wire.acknowledges() {
        wire.ask(Step::GetFeatures, |frontend| frontend.get_features())?;
    }
    Ok(())
}

/// Hands the driver's rings to the backend. Gives back the record of requests in flight where the backend keeps one.
pub(super) fn start(wire: &mut Wire, plan: StartPlan) -> Result<Option<Arc<InflightRegion>>, ConversationError> {
    let wanted = plan.features | PROTOCOL_FEATURES;
    if !plan.known.features {
        wire.tell(Step::SetFeatures, |frontend| frontend.set_features(wanted))?;
    }
    if !plan.known.memory {
        let mut table = plan.memory.as_ref().map(GuestMemory::memory_table).unwrap_or_default();
        table.extend(plan.shadow.iter().map(|memory| memory.table_entry()));
        wire.tell(Step::SetMemTable, |frontend| frontend.set_mem_table(&table))?;
    }
    let keeps_record = wire.protocol().contains(Protocol::INFLIGHT_SHMFD);
    let inflight = match plan.inflight {
        InflightPlan::Keep(region) if keeps_record => Some(region),
        InflightPlan::Make { queues, queue_size } if keeps_record => {
            Some(Arc::new(make_region(wire, queues, queue_size)?))
        }
        _ => None,
    };
    if let Some(region) = inflight.as_ref().filter(|_| !plan.known.inflight) {
        let (message, descriptor) = region.message();
        wire.tell(Step::SetInflightFd, |frontend| frontend.set_inflight_fd(&message, descriptor))?;
    }
    for word in plan.translations {
        iotlb::tell(wire, word)?;
    }
    for ring in &plan.rings {
        start_ring(wire, ring)?;
    }
    if !wire.acknowledges() {
        // Nothing was acknowledged: a question that needs an answer shows that all of it has been read.
        wire.ask(Step::GetFeatures, |frontend| frontend.get_features())?;
    }
    Ok(inflight)
}

fn make_region(wire: &mut Wire, queues: u16, queue_size: u16) -> Result<InflightRegion, ConversationError> {
    let question = VhostUserInflight::new(0, 0, queues, queue_size);
    let (answer, _file) = wire.ask(Step::GetInflightFd, |frontend| frontend.get_inflight_fd(&question))?;
    let shape = Shape::from_answer(&answer, (queues, queue_size))?;
    InflightRegion::new(shape).map_err(|source| ConversationError::Local { step: Step::GetInflightFd, source })
}

fn start_ring(wire: &mut Wire, ring: &RingPlan) -> Result<(), ConversationError> {
    let RingPlan { index, size, base, .. } = *ring;
    let number = usize::from(index);
    wire.tell(Step::SetVringNum(index), |frontend| frontend.set_vring_num(number, size))?;
    wire.tell(Step::SetVringBase(index), |frontend| frontend.set_vring_base(number, base))?;
    let [desc_table_addr, avail_ring_addr, used_ring_addr] = match ring.told {
        ToldAt::Memory => [ring.descriptor_table, ring.available_ring, ring.used_ring].map(backend_address),
        ToldAt::Iommu(addresses) => addresses,
    };
    let addresses = VringConfigData {
        queue_max_size: size,
        queue_size: size,
        flags: 0,
        desc_table_addr,
        used_ring_addr,
        avail_ring_addr,
        log_addr: None,
    };
    wire.tell(Step::SetVringAddr(index), |frontend| frontend.set_vring_addr(number, &addresses))?;
    wire.tell(Step::SetVringCall(index), |frontend| frontend.set_vring_call(number, &ring.call))?;
    wire.tell(Step::SetVringErr(index), |frontend| frontend.set_vring_err(number, &ring.error))?;
    wire.tell(Step::SetVringKick(index), |frontend| frontend.set_vring_kick(number, &ring.kick))?;
    set_enabled(wire, index, ring.enabled)
}

/// Enables a ring, or has a network card's backend throw away what is in it and give nothing to it.
pub(super) fn set_enabled(wire: &mut Wire, index: u16, enabled: bool) -> Result<(), ConversationError> {
    wire.tell(Step::SetVringEnable(index), |frontend| frontend.set_vring_enable(usize::from(index), enabled))
}

/// Takes the rings back. When this returns well, the backend touches them no more. Gives the next index of each
/// available ring. There is no disabling before it: a disabled ring of a network card discards what the guest sends.
pub(super) fn stop(wire: &mut Wire, rings: &[u16]) -> Result<Vec<u16>, ConversationError> {
    rings
        .iter()
        .map(|&index| {
            let step = Step::GetVringBase(index);
            let base = wire.ask(step, |frontend| frontend.get_vring_base(usize::from(index)))?;
            u16::try_from(base).map_err(|_| ConversationError::Absurd { step, what: format!("index {base}") })
        })
        .collect()
}

/// Lets a ring call another eventfd from now on.
pub(super) fn set_call(wire: &mut Wire, index: u16, call: &EventFd) -> Result<(), ConversationError> {
    wire.tell(Step::SetVringCall(index), |frontend| frontend.set_vring_call(usize::from(index), call))?;
    if !wire.acknowledges() {
        wire.ask(Step::GetFeatures, |frontend| frontend.get_features())?;
    }
    Ok(())
}

/// Gives whoever draws the socket of its screens.
pub(super) fn set_screen(wire: &mut Wire, socket: &OwnedFd) -> Result<(), ConversationError> {
    let acknowledged = wire.acknowledges();
    wire.speak(Step::GpuSetSocket, |talk| gpu_socket::hand_over(talk, socket, acknowledged))
}

/// Passes on what the driver wrote into the configuration space.
pub(super) fn set_config(wire: &mut Wire, offset: u32, data: &[u8]) -> Result<(), ConversationError> {
    wire.tell(Step::SetConfig, |frontend| frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, data))
}
