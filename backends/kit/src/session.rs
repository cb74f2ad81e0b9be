//! The conversation with one front end: vhost-user requests turned into commands for the queue threads.
//!
//! One [`Conversation`] lives as long as the process and serves front ends one after another. Between them it is
//! reset: all rings stopped, memory unmapped, the log forgotten.
//!
//! Offered: MQ, CONFIG, REPLY_ACK, INFLIGHT_SHMFD, LOG_SHMFD, CONFIGURE_MEM_SLOTS, BACKEND_REQ, RESET_DEVICE and
//! DEVICE_STATE. Not offered,
//! because the `vhost` crate delivers no such message: STATUS and in-band notifications. Addresses behind an IOMMU
//! (ACCESS_PLATFORM, IOTLB messages) are served by hand: [`iotlb`](crate::iotlb). A request that cannot be right is answered with a failure when the front end wants an answer, and
//! ends the conversation.

mod requests;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError, VhostUserBackendReqHandlerMut};
use virtio_bindings::bindings::virtio_config::{VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::back_channel::{self, BackChannel};
use crate::bad_build::{self, Bad};
use crate::brought;
use crate::device::Device;
use crate::device_state::{self, StateError, Transfer};
use crate::dirty::DirtyLog;
use crate::early_enable;
use crate::hold::Hold;
use crate::inflight::Region;
use crate::iotlb::{self, ACCESS_PLATFORM, Iotlb};
use crate::memory::{GuestRam, MemoryTable};
use crate::refused::Refused;
use crate::ring::{RingConfig, RingError};
use crate::stats::StatsPage;
use crate::step::{Step, step};
use crate::worker::{Gate, RingStart, SpawnError, Worker, WorkerGone};

/// Bytes of configuration space that a front end may read.
pub const CONFIG_BYTES: u32 = 256;

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const RING_RESET: u64 = 1 << VIRTIO_F_RING_RESET;
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Addresses {
    desc: u64,
    avail: u64,
    used: u64,
}

#[derive(Debug, Default)]
struct QueueState {
    size: u16,
    addresses: Option<Addresses>,
    base: u16,
    call: Option<File>,
    err: Option<File>,
    enabled: bool,
    running: bool,
}

/// The device, its queue threads, and what the present front end has said.
pub struct Conversation<D: Device> {
    device: D,
    workers: Vec<Worker<GuestRam>>,
    log: Arc<DirtyLog>,
    table: MemoryTable,
    /// Addresses of a guest that has an IOMMU.
    iotlb: Arc<Iotlb>,
    queues: Vec<QueueState>,
    inflight: Option<Arc<Region>>,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    back_channel: BackChannel,
    /// A predecessor serves until the first ring comes.
    hold: Option<Hold>,
    /// The front end's word is awaited that a state was moved.
    transfer: Option<Transfer>,
}

/// How a conversation ended.
#[derive(Debug, Error)]
pub enum EndOfTalk {
    /// The front end hung up.
    #[error("the front end hung up")]
    HungUp,
    /// It sent something that cannot be right, or was refused.
    #[error("the conversation was ended: {0}")]
    Failed(#[source] VhostError),
}

impl<D: Device> Conversation<D> {
    /// Starts the queue threads of `device`. They take nothing before `gate` is open, and count in `stats` from part
    /// `first` on.
    pub fn new(mut device: D, gate: &Arc<Gate>, stats: &Arc<StatsPage>, first: usize) -> Result<Self, SpawnError> {
        let layout = device.layout();
        let workers = (0..layout.queues)
            .map(|index| {
                let part = u16::try_from(first + usize::from(index)).ok().and_then(|number| stats.part(number));
                let part = part.ok_or(SpawnError::NoFigures { index, have: stats.queues() })?;
                let limiter = device.limiter(index);
                Worker::spawn(index, device.queue(index), Arc::clone(gate), part, limiter)
            })
            .collect::<Result<Vec<_>, _>>()?;
        for (index, worker) in (0_u16..).zip(&workers) {
            if let Some(inlet) = worker.inlet() {
                device.opened(index, inlet);
            }
        }
        let queues = (0..layout.queues).map(|_| QueueState::default()).collect();
        let back_channel = BackChannel::default();
        device.back_channel(&back_channel);
        Ok(Self {
            device,
            workers,
            log: Arc::default(),
            table: MemoryTable::default(),
            iotlb: Arc::new(Iotlb::new(back_channel.clone())),
            queues,
            inflight: None,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            back_channel,
            hold: None,
            transfer: None,
        })
    }

    /// Another process serves the device until the first ring is handed over.
    pub(crate) fn hold(&mut self, hold: Hold) {
        self.hold = Some(hold);
    }

    /// The first ring comes: the predecessor has ended.
    fn take_place(&mut self) -> Result<(), Refused> {
        if let Some(hold) = &self.hold {
            bad_build::fail(Some(Bad::DiesAtSwitch), Some(Bad::HangsAtSwitch));
            hold.release()?;
            self.hold = None;
            self.device.features_acked(self.features);
        }
        Ok(())
    }

    /// The queue threads.
    pub fn workers(&self) -> &[Worker<GuestRam>] {
        &self.workers
    }

    /// Stops all rings once nothing is in flight; the front end asks for their bases as usual.
    pub fn quiesce(&mut self) {
        if let Err(e) = self.stop_all() {
            tracing::error!(error = %e, "a queue did not stop");
        }
    }

    /// Has the device look what size it has now, in bytes, and tells the front end that it may have changed; zero for a
    /// device that has none.
    pub fn measure(&mut self) -> u64 {
        let Some(bytes) = self.device.measure() else { return 0 };
        self.back_channel.config_changed();
        bytes
    }

    /// Takes the next message if it brings the back channel.
    fn take_back_channel(&mut self, stream: &UnixStream) -> Option<io::Result<()>> {
        if !self.protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            return None;
        }
        let acknowledge = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        let taken = brought::take(stream, FrontendReq::SET_BACKEND_REQ_FD, acknowledge);
        Some(taken.map(|socket| self.back_channel.set(Some(socket))))
    }

    /// Takes the next message, which brings the socket of a display, if the device has one.
    fn take_display(&mut self, stream: &UnixStream) -> Option<io::Result<()>> {
        if !self.device.has_display() {
            return None;
        }
        let acknowledge = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        let taken = brought::take(stream, FrontendReq::GPU_SET_SOCKET, acknowledge);
        Some(taken.map(|socket| self.device.display(Some(socket))))
    }

    /// Takes the next message if it is about addresses behind an IOMMU. What is taken back is acknowledged when nobody uses
    /// it any more.
    fn take_iotlb(&mut self, stream: &UnixStream) -> Option<io::Result<()>> {
        if !self.is_behind_iommu() {
            return None;
        }
        let acknowledge = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        Some(iotlb::take(stream).and_then(|message| {
            let heard = self.iotlb.hear(message.word).map_err(Refused::from);
            let done = heard.and_then(|had| if had { self.memory_changed() } else { Ok(()) });
            message.answer(stream, acknowledge, done.is_ok())?;
            done.map_err(io::Error::other)
        }))
    }

    fn is_behind_iommu(&self) -> bool {
        self.features & ACCESS_PLATFORM != 0
    }

    /// Guest memory at the addresses that requests hold.
    fn memory(&self) -> Option<Arc<GuestRam>> {
        let ram = self.table.ram()?;
        Some(if self.is_behind_iommu() { Arc::new(ram.behind(Arc::clone(&self.iotlb))) } else { Arc::clone(ram) })
    }

    /// Where an area of a ring is, by what the front end said.
    fn ring_address(&self, said: u64) -> Result<GuestAddress, Refused> {
        if self.is_behind_iommu() { Ok(GuestAddress(said)) } else { Ok(self.table.guest_address(said)?) }
    }

    fn take_early_enable(&mut self, stream: &UnixStream) -> Option<io::Result<()>> {
        if self.features & PROTOCOL != 0 {
            return None;
        }
        let acknowledge = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
        Some(early_enable::take(stream).and_then(|enable| {
            let done = self.set_vring_enable(enable.index, enable.on);
            if acknowledge {
                enable.answer(stream, done.is_ok())?;
            }
            done.map_err(io::Error::other)
        }))
    }

    /// Stops all rings (draining them) and forgets the front end.
    pub fn reset(&mut self) {
        if let Err(e) = self.stop_all() {
            tracing::error!(error = %e, "a queue did not stop");
        }
        self.queues = self.queues.iter().map(|_| QueueState::default()).collect();
        self.table.clear();
        self.iotlb.clear();
        self.log.clear();
        self.inflight = None;
        self.features = 0;
        self.protocol = VhostUserProtocolFeatures::empty();
        self.back_channel.set(None);
        self.transfer = None;
        self.device.display(None);
        // What a predecessor shares with us is as it wants it.
        if self.hold.is_none() {
            self.device.left();
        }
    }

    fn offered(&self) -> u64 {
        let offered = self.device.features() | EVENT_IDX | INDIRECT | VERSION_1 | LOG_ALL | PROTOCOL | ACCESS_PLATFORM;
        if bad_build::is(Bad::OffersLess) { offered & !INDIRECT } else { offered }
    }

    fn stop_all(&mut self) -> Result<(), WorkerGone> {
        for (queue, worker) in self.queues.iter_mut().zip(&self.workers) {
            if std::mem::take(&mut queue.running)
                && let Some(base) = worker.stop()?
            {
                queue.base = base;
            }
        }
        Ok(())
    }

    fn queue(&mut self, index: u32) -> Result<(&mut QueueState, &Worker<GuestRam>, u16), Refused> {
        let position = index as usize;
        match (self.queues.get_mut(position), self.workers.get(position)) {
            (Some(queue), Some(worker)) => Ok((queue, worker, index as u16)),
            _ => Err(Refused::NoQueue(index)),
        }
    }

    fn start(&mut self, index: u16, kick: OwnedFd) -> Result<(), Refused> {
        self.take_place()?;
        let features = self.features;
        let mem = self.memory().ok_or(Refused::NoMemory(index))?;
        let addresses =
            self.queues.get(usize::from(index)).and_then(|q| q.addresses).ok_or(Refused::NoAddresses(index))?;
        let desc = self.ring_address(addresses.desc)?;
        let avail = self.ring_address(addresses.avail)?;
        let used = self.ring_address(addresses.used)?;
        let region = self.inflight.clone();
        let (queue, worker, index) = self.queue(u32::from(index))?;
        if std::mem::take(&mut queue.running)
            && let Some(base) = worker.stop()?
        {
            queue.base = base;
        }
        let tracker = region.map(|region| region.tracker(index, queue.size)).transpose()?;
        let config = RingConfig {
            index,
            size: queue.size,
            desc,
            avail,
            used,
            base: queue.base,
            event_idx: features & EVENT_IDX != 0,
            indirect: features & INDIRECT != 0,
            tracker,
            in_order: worker.in_order(),
        };
        let call = queue.call.as_ref().map(event_fd).transpose();
        let call = call.map_err(|e| RingError::Broken { index, reason: format!("call descriptor: {e}") })?;
        let err = queue.err.as_ref().and_then(|err| err.try_clone().ok()).map(OwnedFd::from);
        worker.start(RingStart { mem, config, kick, call, err, enabled: queue.enabled })??;
        queue.running = true;
        Ok(())
    }

    fn begin_transfer(&mut self, direction: VhostTransferStateDirection) -> Result<File, StateError> {
        self.transfer = None;
        if self.queues.iter().any(|queue| queue.running) {
            return Err(StateError::Running);
        }
        match direction {
            VhostTransferStateDirection::SAVE => {
                let file = device_state::give(&self.device, self.features)?;
                self.transfer = Some(Transfer::Given);
                Ok(file)
            }
            VhostTransferStateDirection::LOAD => {
                let file = device_state::memory()?;
                self.transfer = Some(Transfer::Taken(file.try_clone()?));
                Ok(file)
            }
        }
    }

    fn end_transfer(&mut self) -> Result<(), StateError> {
        match self.transfer.take() {
            None => Err(StateError::Nothing),
            Some(Transfer::Given) => Ok(()),
            Some(Transfer::Taken(_)) if bad_build::is(Bad::RefusesState) => {
                Err(StateError::Other("is not trusted".into()))
            }
            Some(Transfer::Taken(file)) => {
                let offered = self.offered();
                device_state::take(&mut self.device, offered, &file)
            }
        }
    }

    fn memory_changed(&mut self) -> Result<(), Refused> {
        for (queue, worker) in self.queues.iter().zip(&self.workers) {
            if queue.running {
                worker.set_memory(self.memory().ok_or(Refused::MemoryInUse)?)?;
            }
        }
        Ok(())
    }
}

/// A second descriptor of the same eventfd, as `vmm-sys-util` wants it.
fn event_fd(file: &File) -> io::Result<EventFd> {
    let fd = file.try_clone()?.into_raw_fd();
    #[allow(unsafe_code, reason = "EventFd can only be made from a raw descriptor")]
    // SAFETY: the descriptor was made on the line above and nobody else owns it.
    Ok(unsafe { EventFd::from_raw_fd(fd) })
}

/// Serves one front end until it hangs up; the caller resets the conversation afterwards.
pub fn serve<D: Device>(conversation: &Arc<Mutex<Conversation<D>>>, stream: UnixStream) -> EndOfTalk {
    let peeked = match stream.try_clone() {
        Ok(stream) => stream,
        Err(e) => return EndOfTalk::Failed(VhostError::ReqHandlerError(e)),
    };
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(conversation));
    loop {
        let taken = match back_channel::next_request(&peeked) {
            Some(FrontendReq::SET_BACKEND_REQ_FD) => lock(conversation).take_back_channel(&peeked),
            Some(FrontendReq::GPU_SET_SOCKET) => lock(conversation).take_display(&peeked),
            Some(FrontendReq::SET_VRING_ENABLE) => lock(conversation).take_early_enable(&peeked),
            Some(FrontendReq::IOTLB_MSG) => lock(conversation).take_iotlb(&peeked),
            _ => None,
        };
        if let Some(taken) = taken {
            match taken {
                Ok(()) => continue,
                Err(e) => return EndOfTalk::Failed(VhostError::ReqHandlerError(e)),
            }
        }
        step(Step::Handshake);
        match handler.handle_request() {
            Ok(()) => {}
            Err(VhostError::Disconnected | VhostError::SocketBroken(_)) => return EndOfTalk::HungUp,
            Err(e) => return EndOfTalk::Failed(e),
        }
    }
}

/// The lock of a conversation, also after a panic of another thread: its state is checked on each use.
pub fn lock<D: Device>(conversation: &Mutex<Conversation<D>>) -> MutexGuard<'_, Conversation<D>> {
    conversation.lock().unwrap_or_else(PoisonError::into_inner)
}
