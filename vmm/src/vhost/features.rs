//! Feature bits: which of a backend's the guest may see, which of the protocol's this front end speaks.

use vhost::vhost_user::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures as Transport};
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config as config;
use virtio_bindings::virtio_ring as ring;

const fn bit(number: u32) -> u64 {
    1 << number
}

/// The vhost-user bit beside virtio's: rings start disabled, protocol features exist.
pub(super) const PROTOCOL_FEATURES: u64 = Transport::PROTOCOL_FEATURES.bits();
/// virtio 1.0 and later.
pub(super) const VERSION_1: u64 = bit(config::VIRTIO_F_VERSION_1);
/// More than one request queue of a disk.
pub(super) const BLK_MQ: u64 = bit(blk::VIRTIO_BLK_F_MQ);

/// Bits 24 to 40 belong to rings and transports (virtio 1.2, 6). Of these only what split rings, our transport and the
/// backends' kit serve may reach the guest.
const RESERVED: u64 = ((1 << 41) - 1) & !((1 << 24) - 1);
const SERVED: u64 = bit(ring::VIRTIO_RING_F_INDIRECT_DESC) | bit(ring::VIRTIO_RING_F_EVENT_IDX) | VERSION_1;

/// What the guest may be offered of what a backend offers: all bits of the device class, and of the transport's those
/// that are served.
pub fn offerable(backend: u64) -> u64 {
    backend & (!RESERVED | SERVED)
}

/// Protocol features that this front end speaks. CONFIGURE_MEM_SLOTS follows with the feature that needs it.
pub(super) fn spoken() -> Protocol {
    Protocol::MQ
        | Protocol::REPLY_ACK
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::BACKEND_REQ
        | Protocol::DEVICE_STATE
}

/// Protocol features that a successor must have when its predecessor had them. The others are not felt by the guest.
pub(super) fn kept() -> Protocol {
    Protocol::MQ | Protocol::CONFIG | Protocol::INFLIGHT_SHMFD
}

/// Names of virtio feature bits, for errors: those of rings and transports, and of disks for device type 2.
pub fn feature_names(bits: u64, device_type: u16) -> String {
    names(bits, |number| {
        let name = match number {
            26 => "VHOST_F_LOG_ALL",
            28 => "VIRTIO_F_INDIRECT_DESC",
            29 => "VIRTIO_F_EVENT_IDX",
            30 => "VHOST_USER_F_PROTOCOL_FEATURES",
            32 => "VIRTIO_F_VERSION_1",
            33 => "VIRTIO_F_ACCESS_PLATFORM",
            34 => "VIRTIO_F_RING_PACKED",
            35 => "VIRTIO_F_IN_ORDER",
            _ if device_type != 2 => return None,
            1 => "VIRTIO_BLK_F_SIZE_MAX",
            2 => "VIRTIO_BLK_F_SEG_MAX",
            4 => "VIRTIO_BLK_F_GEOMETRY",
            5 => "VIRTIO_BLK_F_RO",
            6 => "VIRTIO_BLK_F_BLK_SIZE",
            9 => "VIRTIO_BLK_F_FLUSH",
            10 => "VIRTIO_BLK_F_TOPOLOGY",
            11 => "VIRTIO_BLK_F_CONFIG_WCE",
            12 => "VIRTIO_BLK_F_MQ",
            13 => "VIRTIO_BLK_F_DISCARD",
            14 => "VIRTIO_BLK_F_WRITE_ZEROES",
            _ => return None,
        };
        Some(name)
    })
}

/// Names of protocol feature bits, for errors.
pub fn protocol_feature_names(bits: u64) -> String {
    names(bits, |number| {
        let name = match number {
            0 => "MQ",
            1 => "LOG_SHMFD",
            3 => "REPLY_ACK",
            5 => "BACKEND_REQ",
            9 => "CONFIG",
            12 => "INFLIGHT_SHMFD",
            13 => "RESET_DEVICE",
            15 => "CONFIGURE_MEM_SLOTS",
            16 => "STATUS",
            19 => "DEVICE_STATE",
            _ => return None,
        };
        Some(name)
    })
}

fn names(bits: u64, name: impl Fn(u32) -> Option<&'static str>) -> String {
    let all: Vec<String> = (0..64)
        .filter(|number| bits & bit(*number) != 0)
        .map(|number| name(number).map_or_else(|| format!("feature bit {number}"), str::to_owned))
        .collect();
    all.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A backend that offers everything must not make the guest use what nobody here serves: packed rings, an IOMMU,
    /// notification data, queue reset, or vhost's own bits.
    #[test]
    fn only_served_transport_bits_reach_the_guest() {
        let offered = offerable(u64::MAX);
        assert_eq!(offered & RESERVED, (1 << 28) | (1 << 29) | (1 << 32));
        assert_eq!(offered & 0xff_ffff, 0xff_ffff);
        assert_eq!(offerable(BLK_MQ), BLK_MQ);
    }

    #[test]
    fn errors_name_bits() {
        assert_eq!(feature_names((1 << 9) | (1 << 32), 2), "VIRTIO_BLK_F_FLUSH, VIRTIO_F_VERSION_1");
        assert_eq!(feature_names(1 << 9, 1), "feature bit 9");
        assert_eq!(protocol_feature_names((1 << 12) | (1 << 40)), "INFLIGHT_SHMFD, feature bit 40");
    }
}
