//! The virtio-net device (virtio 1.2, section 5.1): features, configuration space, queues.
//!
//! A card of n queue pairs has 2 n + 1 queues: receive and transmit of each pair in turn, then the control queue. A driver
//! that has not agreed to multi-queue has its control queue behind the first pair, where others have the second pair's
//! receive queue: that queue then serves commands.

use std::sync::Arc;

use atoll_kit::back_channel::BackChannel;
use atoll_kit::device_state::StateError;
use atoll_kit::inlet::Inlet;
use atoll_kit::limit::Limiter;
use atoll_kit::memory::GuestRam;
use atoll_kit::{ConfigError, Device, QueueLayout};
use atoll_protocol::saved;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use crate::face::{Face, Told};
use crate::filter::{Mac, is_group};
use crate::header::{Features, Offloads};
use crate::link::Link;
use crate::queue::{Control, NetQueue, Receive, Transmit};

/// Most entries of a queue.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Most queue pairs of a card.
pub const PAIRS_MAX: u16 = 8;

const CONFIG_LEN: usize = 12;
const LINK_UP: u16 = 1;

/// How a card looks to its driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Its address.
    pub mac: Mac,
    /// The largest packet that it suggests.
    pub mtu: Option<u16>,
    /// Whether it offers what its link can do besides whole frames.
    pub offload: bool,
}

/// A card on a link.
pub struct Card<L: Link> {
    look: Look,
    face: Arc<Face>,
    link: L,
    limiter: Option<Arc<Limiter>>,
}

impl<L: Link> Card<L> {
    /// Plugs a card in; `face` has its address and its number of queue pairs.
    pub fn new(look: Look, face: Arc<Face>, link: L) -> Self {
        Self { look, face, link, limiter: None }
    }

    /// Limits what the guest sends; what it gets is limited by the face.
    #[must_use]
    pub fn limited(mut self, limiter: Option<Arc<Limiter>>) -> Self {
        self.limiter = limiter;
        self
    }

    fn control(&self) -> Control {
        Control { face: Arc::clone(&self.face), spreader: self.link.spreader() }
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut out = [0; CONFIG_LEN];
        let status = if self.face.is_up() { LINK_UP } else { 0 };
        let words = [status, self.face.pairs_max, self.look.mtu.unwrap_or(0)];
        let bytes = self.face.filter.own().into_iter().chain(words.into_iter().flat_map(u16::to_le_bytes));
        for (to, byte) in out.iter_mut().zip(bytes) {
            *to = byte;
        }
        out
    }
}

fn bit(feature: u32) -> u64 {
    1 << feature
}

impl<L: Link> Device for Card<L> {
    type Queue = NetQueue<L>;

    fn layout(&self) -> QueueLayout {
        QueueLayout { queues: 2 * self.face.pairs_max + 1, size_max: QUEUE_SIZE_MAX }
    }

    fn features(&self) -> u64 {
        let offers = if self.look.offload { self.link.offers() } else { Offloads::NONE };
        let always = bit(VIRTIO_NET_F_MAC)
            | bit(VIRTIO_NET_F_STATUS)
            | bit(VIRTIO_NET_F_MRG_RXBUF)
            | bit(VIRTIO_NET_F_CTRL_VQ)
            | bit(VIRTIO_NET_F_CTRL_RX)
            | bit(VIRTIO_NET_F_CTRL_MAC_ADDR);
        let several = if self.face.pairs_max > 1 { bit(VIRTIO_NET_F_MQ) } else { 0 };
        let mtu = if self.look.mtu.is_some() { bit(VIRTIO_NET_F_MTU) } else { 0 };
        always | several | mtu | offers.features()
    }

    fn features_acked(&mut self, features: u64) {
        self.face.negotiate(features);
        self.link.negotiated(Features(features));
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let config = self.config();
        for (to, at) in out.iter_mut().zip(offset as usize..) {
            *to = config.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        // A front end that gives its cards addresses of its own writes all six bytes. What else a front end writes back
        // must be what is there.
        let mut config = self.config();
        let to = config.get_mut(offset as usize..).and_then(|rest| rest.get_mut(..data.len()));
        to.ok_or(ConfigError { offset })?.copy_from_slice(data);
        let (mac, rest) = config.split_first_chunk::<6>().ok_or(ConfigError { offset })?;
        if self.config().get(mac.len()..) != Some(rest) || is_group(mac) {
            return Err(ConfigError { offset });
        }
        self.face.filter.change(|rules| rules.own = *mac);
        Ok(())
    }

    fn reset(&mut self) {
        self.face.reset(self.look.mac);
        self.link.negotiated(Features::default());
        (self.link.spreader())(1);
    }

    fn save(&self, state: Vec<u8>) -> Result<Vec<u8>, StateError> {
        Ok(saved::save(&self.face.told(), state)?)
    }

    fn restore<'a>(&mut self, state: &'a [u8]) -> Result<&'a [u8], StateError> {
        let (told, rest) = saved::restore::<Told>(state)?;
        self.face.believe(told)?;
        Ok(rest)
    }

    fn back_channel(&mut self, channel: &BackChannel) {
        self.face.tell_by(channel);
    }

    fn limiter(&self, index: u16) -> Option<Arc<Limiter>> {
        let sends = !index.is_multiple_of(2);
        self.limiter.clone().filter(|_| sends)
    }

    fn queue(&mut self, index: u16) -> NetQueue<L> {
        let (pair, face) = (index / 2, Arc::clone(&self.face));
        if index == 2 * self.face.pairs_max {
            NetQueue::Control(self.control())
        } else if index.is_multiple_of(2) {
            let (receiver, control) = (self.link.receiver(pair), self.control());
            NetQueue::Receive(Receive { face, pair, receiver, control })
        } else {
            let (sender, spreader) = (self.link.sender(pair), self.link.spreader());
            NetQueue::Transmit(Transmit { face, pair, sender, spreader, copy: Vec::new(), streams: false })
        }
    }

    fn opened(&mut self, index: u16, inlet: &Arc<Inlet<GuestRam>>) {
        self.link.opened(index / 2, inlet);
    }
}
