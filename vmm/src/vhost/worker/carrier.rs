//! The cable of a network card, which the operator plugs in and out.
//!
//! Out means: the driver sees a status without VIRTIO_NET_S_LINK_UP (virtio 1.2, 5.1.4), and the queues that carry frames are
//! disabled, not stopped. What becomes of a disabled ring is in the vhost-user document: nothing new comes in by it, and what
//! is sent is taken and thrown away. So it works with everybody's backend, and a successor starts as its predecessor was.

use std::borrow::Cow;

use atoll_devices::virtio::device_class;
use thiserror::Error;

use super::Worker;
use crate::machine::LinkState;
use crate::vhost::session;

/// VIRTIO_NET_F_STATUS, VIRTIO_NET_F_CTRL_VQ and VIRTIO_NET_F_MQ (virtio 1.2, 5.1.3).
const STATUS: u64 = 1 << 16;
const CONTROL_QUEUE: u64 = 1 << 17;
const MULTI_QUEUE: u64 = 1 << 22;
/// Where the configuration space has the status' low byte, and the number of queue pairs.
const STATUS_AT: usize = 6;
const PAIRS_AT: usize = 8;
/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u8 = 1;

/// Why a link stays as it is.
#[derive(Debug, Error)]
pub enum LinkError {
    /// It is no network card.
    #[error("the device is no network card: only those have a link")]
    NoLink,
    /// Its backend has no status to show.
    #[error("the card's backend has no link status (VIRTIO_NET_F_STATUS): its driver could not be told")]
    NoStatus,
    /// The device's thread is busy with something that takes longer than anything of its own may.
    #[error("no answer within {} s; see with `atoll info` how the link is, and try again", .0.as_secs())]
    Late(std::time::Duration),
    /// The device's thread has ended.
    #[error("the device has been stopped")]
    Stopped,
}

impl LinkError {
    /// Whether asking for something else would do.
    pub fn is_mistake(&self) -> bool {
        matches!(self, Self::NoLink | Self::NoStatus)
    }
}

/// The queue of control messages, for a driver that has one.
fn control_queue(features: u64, config: &[u8]) -> Option<u16> {
    let pairs = match config.get(PAIRS_AT..).and_then(|rest| rest.first_chunk()) {
        Some(pairs) if features & MULTI_QUEUE != 0 => u16::from_le_bytes(*pairs),
        _ => 1,
    };
    (features & CONTROL_QUEUE != 0).then(|| pairs.saturating_mul(2))
}

impl Worker {
    pub(super) fn set_link(&mut self, link: LinkState) -> Result<(), LinkError> {
        if self.past.shown.device_type != device_class::NET {
            return Err(LinkError::NoLink);
        }
        if self.past.shown.features & STATUS == 0 {
            return Err(LinkError::NoStatus);
        }
        if self.past.link == link {
            return Ok(());
        }
        let before = self.unplugged();
        self.past.link = link;
        let device = &self.shared.name;
        tracing::info!(device, ?link, "the operator has changed the link");
        // Nothing passes before the driver is told that nothing does, nor after it is told that something may.
        let (enabled, rings) = match link {
            LinkState::Up => (true, before),
            LinkState::Down => (false, self.unplugged()),
        };
        let mut said = Ok(());
        if let Some(session) = self.past.session.as_mut().filter(|session| session.has_rings) {
            let rings: Vec<u16> = rings.into_iter().filter(|ring| *ring < session.served).collect();
            said = session
                .conversation
                .perform(move |wire| rings.iter().try_for_each(|ring| session::set_enabled(wire, *ring, enabled)));
        }
        // Its successor is told when it gets the rings.
        if let Err(error) = said {
            self.lose(&error);
        }
        self.publish();
        self.config_is_stale = true;
        if self.past.session.is_some() {
            self.update_config();
        } else if !self.shared.gate.is_closed() && link == LinkState::Down {
            let shown = self.past.shown.config.clone();
            self.adopt_config(&shown);
        }
        Ok(())
    }

    /// The rings of the driver that carry frames, while the cable is out.
    pub(super) fn unplugged(&self) -> Vec<u16> {
        let Some(driver) = self.driver.as_ref().filter(|_| self.past.link == LinkState::Down) else {
            return Vec::new();
        };
        let control = control_queue(driver.features, &self.past.shown.config);
        driver.queues.iter().map(|queue| queue.index).filter(|index| Some(*index) != control).collect()
    }

    /// A configuration space as the driver may see it.
    pub(super) fn with_link<'a>(&self, config: &'a [u8]) -> Cow<'a, [u8]> {
        match self.past.link {
            LinkState::Down if self.past.shown.device_type == device_class::NET => {
                let mut config = config.to_vec();
                config.get_mut(STATUS_AT).into_iter().for_each(|status| *status &= !LINK_UP);
                Cow::Owned(config)
            }
            LinkState::Up | LinkState::Down => Cow::Borrowed(config),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// virtio 1.2, 5.1.2: behind all pairs that the device has, or behind the only one of a driver that knows of no more.
    #[test]
    fn the_control_queue_is_where_the_driver_puts_it() {
        let config = [2, 0, 0, 0, 0, 1, 1, 0, 4, 0];
        assert_eq!(control_queue(CONTROL_QUEUE | MULTI_QUEUE, &config), Some(8));
        assert_eq!(control_queue(CONTROL_QUEUE, &config), Some(2));
        assert_eq!(control_queue(MULTI_QUEUE, &config), None);
        assert_eq!(control_queue(CONTROL_QUEUE | MULTI_QUEUE, &config[..8]), Some(2));
    }
}
