//! A small vhost-user front end with hand-made rings, for tests and benchmarks of devices (feature `driver`).
//!
//! It does what a guest and its VMM do together: guest memory in a memfd, split rings with EVENT_IDX, kicks and
//! calls through eventfds. Everything outlives a connection, so that a test can kill a device and go on with its
//! successor. It trusts its caller: wrong addresses are passed on, which is what hostile-guest tests need.

pub mod disk;
pub mod display;
pub mod guest;
pub mod iommu;
pub mod net;
pub mod process;
pub mod queue;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use atoll_protocol::FrameSocket;
use atoll_protocol::jail::JailLayer;
use atoll_protocol::sidecar::SidecarReport;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

pub use guest::Guest;
pub use queue::Queue;

/// What is added to a guest address to make the front end's address of it.
pub const USER_OFFSET: u64 = 1 << 52;

/// Takes what a process says of its jail, which comes between its hello and its ready; the layers that every host has
/// must stand.
///
/// # Errors
/// It says something else.
pub fn is_jailed(sidecar: &mut FrameSocket) -> Result<()> {
    let report: SidecarReport = sidecar.reader.receive_message(Some(Duration::from_secs(20)))?;
    let SidecarReport::Jailed { layers } = report else { bail!("not a word about its jail: {report:?}") };
    for layer in [JailLayer::NoNewPrivileges, JailLayer::Capabilities, JailLayer::Rings, JailLayer::Calls] {
        let stands = layers.iter().any(|jailed| jailed.layer == layer && jailed.stands());
        ensure!(stands, "{layer} is missing: {layers:?}");
    }
    Ok(())
}

/// What to ask of a device.
#[derive(Debug, Clone)]
pub struct Options {
    /// Queues to run.
    pub queues: u16,
    /// Entries of each.
    pub size: u16,
    /// Bytes of guest memory.
    pub memory: usize,
    /// Feature bits to leave out of what is offered.
    pub without: u64,
    /// Ask for an in-flight region.
    pub inflight: bool,
    /// The guest has an IOMMU: what the device uses has to be told ([`iommu`]). The queues are, at their own addresses.
    pub iommu: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { queues: 1, size: 128, memory: 16 << 20, without: LOG_ALL, inflight: true, iommu: false }
    }
}

/// VHOST_F_LOG_ALL.
pub const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// A front end and its guest.
pub struct Driver {
    options: Options,
    guest: Guest,
    queues: Vec<Queue>,
    front: Option<Frontend>,
    /// The same conversation.
    talk: Option<UnixStream>,
    inflight: Option<(VhostUserInflight, File)>,
    features: u64,
}

impl Driver {
    /// A guest that no device serves yet.
    pub fn new(options: Options) -> Result<Self> {
        let guest = Guest::new(options.memory)?;
        let queues = (0..options.queues).map(|index| Queue::new(&guest, index, options.size)).collect::<Result<_>>()?;
        Ok(Self { options, guest, queues, front: None, talk: None, inflight: None, features: 0 })
    }

    /// The queues of a guest whose front end is somebody else's: rings that this one lays out, with `event_idx` as that
    /// front end has negotiated it. What is in the rings' memory is forgotten.
    pub fn over(guest: Guest, options: Options, event_idx: bool) -> Result<Self> {
        let zeroes = vec![0; queue::QUEUE_BYTES as usize];
        for index in 0..u64::from(options.queues) {
            guest.write(index * queue::QUEUE_BYTES, &zeroes);
        }
        let mut queues =
            (0..options.queues).map(|index| Queue::new(&guest, index, options.size)).collect::<Result<Vec<_>>>()?;
        queues.iter_mut().for_each(|queue| queue.event_idx = event_idx);
        Ok(Self { options, guest, queues, front: None, talk: None, inflight: None, features: 0 })
    }

    /// A guest that is served by the device on `stream`.
    pub fn connected(options: Options, stream: UnixStream) -> Result<Self> {
        let mut driver = Self::new(options)?;
        driver.connect(stream)?;
        Ok(driver)
    }

    /// Negotiates with a device and starts all rings where the guest is. May be repeated with a successor.
    pub fn connect(&mut self, stream: UnixStream) -> Result<()> {
        self.negotiate(stream)?;
        for index in 0..self.queues.len() {
            self.start(index)?;
        }
        Ok(())
    }

    /// Like [`Driver::connect`], with a base of the caller's choice for all rings.
    pub fn connect_at(&mut self, stream: UnixStream, base: u16) -> Result<()> {
        self.negotiate(stream)?;
        for index in 0..self.queues.len() {
            self.start_at(index, base)?;
        }
        Ok(())
    }

    fn negotiate(&mut self, stream: UnixStream) -> Result<()> {
        let talk = stream.try_clone()?;
        let mut front = Frontend::from_stream(stream, u64::from(self.options.queues));
        front.set_owner()?;
        let offered = front.get_features()?;
        let without = if self.options.iommu { 0 } else { iommu::ACCESS_PLATFORM };
        self.features = offered & !self.options.without & !without;
        let protocol = front.get_protocol_features().context("protocol features")?;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        front.set_protocol_features(protocol & wanted)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if self.options.inflight && protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            if self.inflight.is_none() {
                let ask = VhostUserInflight::new(0, 0, self.options.queues, self.options.size);
                self.inflight = Some(front.get_inflight_fd(&ask).context("GET_INFLIGHT_FD")?);
            }
            if let Some((inflight, file)) = &self.inflight {
                front.set_inflight_fd(inflight, file.as_raw_fd()).context("SET_INFLIGHT_FD")?;
            }
        }
        front.set_features(self.features)?;
        front.set_mem_table(&[self.region()])?;
        for queue in &mut self.queues {
            queue.event_idx = self.features & queue::EVENT_IDX != 0;
        }
        if self.options.iommu {
            let len = u64::from(self.options.queues) * queue::QUEUE_BYTES;
            anyhow::ensure!(iommu::update(&talk, 0, len, USER_OFFSET, iommu::READ | iommu::WRITE)?, "the queues");
        }
        self.talk = Some(talk);
        self.front = Some(front);
        Ok(())
    }

    /// Starts one ring where the guest is: at what is completed. The device adds what its record of requests
    /// in flight says.
    pub fn start(&mut self, index: usize) -> Result<()> {
        let base = self.queues.get(index).context("no such queue")?.used_index(&self.guest);
        self.start_at(index, base)
    }

    /// Starts one ring at a base of the caller's choice.
    pub fn start_at(&mut self, index: usize, base: u16) -> Result<()> {
        let queue = self.queues.get(index).context("no such queue")?;
        let front = self.front.as_mut().context("not connected")?;
        front.set_vring_num(index, queue.size())?;
        front.set_vring_base(index, base)?;
        front.set_vring_addr(index, &Self::addresses(queue, if self.options.iommu { 0 } else { USER_OFFSET }))?;
        front.set_vring_call(index, &queue.call)?;
        front.set_vring_kick(index, &queue.kick)?;
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            front.set_vring_enable(index, true)?;
        }
        queue.kick.write(1)?;
        queue.call.write(1)?;
        Ok(())
    }

    fn addresses(queue: &Queue, offset: u64) -> VringConfigData {
        VringConfigData {
            queue_max_size: queue.size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: offset + queue.desc,
            used_ring_addr: offset + queue.used,
            avail_ring_addr: offset + queue.avail,
            log_addr: Some(queue.used),
        }
    }

    /// Guest memory as SET_MEM_TABLE wants it.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: self.options.memory as u64,
            userspace_addr: USER_OFFSET,
            mmap_offset: 0,
            mmap_handle: self.guest.file().as_raw_fd(),
        }
    }

    /// Stops one ring; gives the base of its next owner.
    pub fn stop(&mut self, index: usize) -> Result<u32> {
        Ok(self.front()?.get_vring_base(index)?)
    }

    /// The conversation, for what has no method here.
    pub fn front(&mut self) -> Result<&mut Frontend> {
        self.front.as_mut().context("not connected")
    }

    /// The socket of the conversation, for what [`iommu`] says.
    pub fn talk(&self) -> Result<&UnixStream> {
        self.talk.as_ref().context("not connected")
    }

    /// Hangs up.
    pub fn disconnect(&mut self) {
        self.talk = None;
        self.front = None;
    }

    /// The in-flight region.
    pub fn inflight(&self) -> Option<&(VhostUserInflight, File)> {
        self.inflight.as_ref()
    }

    /// The bits that were negotiated.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Negotiates other features, while rings may run.
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.features = features;
        Ok(self.front()?.set_features(features)?)
    }

    /// The configuration space.
    pub fn config(&mut self, len: u32) -> Result<Vec<u8>> {
        let buffer = vec![0; len as usize];
        let (reply, data) = self.front()?.get_config(0, len, VhostUserConfigFlags::empty(), &buffer)?;
        if reply.size != len {
            bail!("the device refused to show its configuration");
        }
        Ok(data)
    }

    /// Guest memory.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// How many queues there are.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// A queue, and the memory that it lies in.
    pub fn queue(&mut self, index: usize) -> Result<(&mut Queue, &Guest)> {
        Ok((self.queues.get_mut(index).context("no such queue")?, &self.guest))
    }
}
