//! The header before each frame in a queue (virtio 1.2, section 5.1.6), and which of its offloads were agreed on.

use thiserror::Error;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
};

/// Bytes of a header with its last field, the number of buffers.
pub const HEADER_BYTES: usize = 12;
/// Bytes of an Ethernet header.
pub const ETHERNET_BYTES: usize = 14;
/// Longest frame: an IP packet of 65,535 bytes behind an Ethernet header with one VLAN tag.
pub const FRAME_MAX: usize = 65_535 + 18;

/// The checksum is to be completed (VIRTIO_NET_HDR_F_NEEDS_CSUM).
pub const NEEDS_CSUM: u8 = 1;
/// Segment as TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// Segment as TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// With congestion notification.
pub const GSO_ECN: u8 = 0x80;

/// Feature bits as they were negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

impl Features {
    /// Whether a bit, by its number, is there.
    pub fn has(self, bit: u32) -> bool {
        self.0 & 1 << bit != 0
    }

    /// A frame may take several receive buffers.
    pub fn mergeable(self) -> bool {
        self.has(VIRTIO_NET_F_MRG_RXBUF)
    }

    /// Several queue pairs may be used.
    pub fn multi_queue(self) -> bool {
        self.has(VIRTIO_NET_F_MQ)
    }

    /// Bytes of the header before each frame.
    pub fn header_bytes(self) -> u64 {
        // Drivers from before virtio 1.0 leave the number of buffers out when it cannot be but one.
        if self.has(VIRTIO_F_VERSION_1) || self.mergeable() { HEADER_BYTES as u64 } else { 10 }
    }
}

/// What the device can take from, or give to, a driver besides whole frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Frames with checksums to be completed.
    pub csum: bool,
    /// Segments of TCP over IPv4 to be cut.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// With congestion notification.
    pub ecn: bool,
}

impl Offloads {
    /// Everything.
    pub const ALL: Self = Self { csum: true, tso4: true, tso6: true, ecn: true };
    /// Nothing.
    pub const NONE: Self = Self { csum: false, tso4: false, tso6: false, ecn: false };

    /// What a driver may send by what it has agreed to.
    pub fn from_driver(features: Features) -> Self {
        Self {
            csum: features.has(VIRTIO_NET_F_CSUM),
            tso4: features.has(VIRTIO_NET_F_HOST_TSO4),
            tso6: features.has(VIRTIO_NET_F_HOST_TSO6),
            ecn: features.has(VIRTIO_NET_F_HOST_ECN),
        }
    }

    /// What a driver takes by what it has agreed to.
    pub fn to_driver(features: Features) -> Self {
        Self {
            csum: features.has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: features.has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: features.has(VIRTIO_NET_F_GUEST_TSO6),
            ecn: features.has(VIRTIO_NET_F_GUEST_ECN),
        }
    }

    /// The feature bits that offer it in both directions.
    pub fn features(self) -> u64 {
        let bits = [
            (self.csum, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM),
            (self.tso4, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_GUEST_TSO4),
            (self.tso6, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_TSO6),
            (self.ecn, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN),
        ];
        bits.into_iter().filter(|(on, ..)| *on).fold(0, |all, (_, host, guest)| all | 1 << host | 1 << guest)
    }
}

/// What is wrong with a header. The frame is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// A bit or a kind of segmentation that was not negotiated.
    #[error("the header asks for an offload that was not negotiated")]
    NotAgreed,
    /// The checksum lies behind the frame's end.
    #[error("the checksum lies outside the frame")]
    Checksum,
    /// Segmentation without a checksum or a size.
    #[error("segmentation without a checksum or a segment size")]
    Segments,
}

/// A header, in the processor's byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Bits.
    pub flags: u8,
    /// Kind of segmentation.
    pub gso: u8,
    /// Bytes of all protocol headers together, as a hint.
    pub header_len: u16,
    /// Bytes of payload in each segment.
    pub gso_size: u16,
    /// Where the checksummed part of the frame begins.
    pub csum_start: u16,
    /// Where in that part the checksum is.
    pub csum_offset: u16,
}

impl Header {
    /// Takes a header apart that was read as two integers.
    #[inline]
    pub fn of(word: u64, rest: u32) -> Self {
        let (word, rest) = (u64::from_le(word), u32::from_le(rest));
        Self {
            flags: word as u8,
            gso: (word >> 8) as u8,
            header_len: (word >> 16) as u16,
            gso_size: (word >> 32) as u16,
            csum_start: (word >> 48) as u16,
            csum_offset: rest as u16,
        }
    }

    /// The header as it stands in a receive buffer, for a frame in so many of them, as two integers.
    #[inline]
    pub fn words(&self, buffers: u16) -> (u64, u32) {
        let word = u64::from(self.flags)
            | u64::from(self.gso) << 8
            | u64::from(self.header_len) << 16
            | u64::from(self.gso_size) << 32
            | u64::from(self.csum_start) << 48;
        (word.to_le(), (u32::from(self.csum_offset) | u32::from(buffers) << 16).to_le())
    }

    /// Takes a header apart; a short one is filled up with zeroes.
    #[inline]
    pub fn parse(raw: &[u8]) -> Self {
        let byte = |at: usize| raw.get(at).copied().unwrap_or(0);
        let word = |at: usize| u16::from_le_bytes([byte(at), byte(at + 1)]);
        Self {
            flags: byte(0),
            gso: byte(1),
            header_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    /// The header as it stands in a receive buffer, for a frame in so many of them.
    #[inline]
    pub fn bytes(&self, buffers: u16) -> [u8; HEADER_BYTES] {
        let ([l0, l1], [s0, s1]) = (self.header_len.to_le_bytes(), self.gso_size.to_le_bytes());
        let ([c0, c1], [o0, o1]) = (self.csum_start.to_le_bytes(), self.csum_offset.to_le_bytes());
        let [b0, b1] = buffers.to_le_bytes();
        [self.flags, self.gso, l0, l1, s0, s1, c0, c1, o0, o1, b0, b1]
    }

    /// Checks what a driver sent with a frame of `len` bytes against what was agreed on, and clears what has no meaning.
    #[inline]
    pub fn check(self, agreed: Offloads, len: u64) -> Result<Self, HeaderError> {
        // Nothing is asked for, and nothing else means anything then.
        if self.flags & NEEDS_CSUM == 0 && self.gso == 0 {
            Ok(Self::default())
        } else {
            self.check_offloads(agreed, len)
        }
    }

    fn check_offloads(self, agreed: Offloads, len: u64) -> Result<Self, HeaderError> {
        let mut checked = Self { flags: self.flags & NEEDS_CSUM, ..self };
        if self.flags & NEEDS_CSUM != 0 {
            if !agreed.csum {
                return Err(HeaderError::NotAgreed);
            }
            if u64::from(self.csum_start) + u64::from(self.csum_offset) + 2 > len {
                return Err(HeaderError::Checksum);
            }
        } else {
            (checked.csum_start, checked.csum_offset) = (0, 0);
        }
        if self.gso == 0 {
            (checked.gso_size, checked.header_len) = (0, 0);
            return Ok(checked);
        }
        let known = match self.gso & !GSO_ECN {
            GSO_TCPV4 => agreed.tso4,
            GSO_TCPV6 => agreed.tso6,
            _ => false,
        };
        if !known || self.gso & GSO_ECN != 0 && !agreed.ecn {
            return Err(HeaderError::NotAgreed);
        }
        if self.gso_size == 0 || self.flags & NEEDS_CSUM == 0 {
            return Err(HeaderError::Segments);
        }
        Ok(checked)
    }

    /// What must be done to a frame with this (checked) header before a driver that takes `takes` may have it.
    #[inline]
    pub fn work_for(&self, takes: Offloads) -> Work {
        if self.flags | self.gso == 0 {
            return Work::Nothing;
        }
        let segments = match self.gso & !GSO_ECN {
            0 => true,
            GSO_TCPV4 => takes.tso4,
            _ => takes.tso6,
        };
        if !segments || self.gso & GSO_ECN != 0 && !takes.ecn {
            Work::Segment
        } else if self.flags & NEEDS_CSUM != 0 && !takes.csum {
            Work::Checksum
        } else {
            Work::Nothing
        }
    }
}

/// What must be done to a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// It can be taken as it is.
    Nothing,
    /// Its checksum must be completed.
    Checksum,
    /// It must be cut into segments.
    Segment,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_survives_its_bytes(raw in any::<[u8; HEADER_BYTES]>()) {
            let [.., b0, b1] = raw;
            let header = Header::parse(&raw);
            prop_assert_eq!(header.bytes(u16::from_le_bytes([b0, b1])), raw);
            let (word, rest) = raw.split_at(8);
            let words = (u64::from_ne_bytes(word.try_into().unwrap()), u32::from_ne_bytes(rest.try_into().unwrap()));
            prop_assert_eq!(Header::of(words.0, words.1), header);
            prop_assert_eq!(header.words(u16::from_le_bytes([b0, b1])), words);
        }

        #[test]
        fn what_passes_the_check_lies_within_the_frame_and_the_agreement(
            raw in any::<[u8; HEADER_BYTES]>(), len in 14_u64..70_000, bits in any::<[bool; 4]>(),
        ) {
            let [csum, tso4, tso6, ecn] = bits;
            let agreed = Offloads { csum, tso4, tso6, ecn };
            if let Ok(header) = Header::parse(&raw).check(agreed, len) {
                prop_assert_eq!(header.work_for(agreed), Work::Nothing);
                if header.flags & NEEDS_CSUM != 0 {
                    prop_assert!(u64::from(header.csum_start) + u64::from(header.csum_offset) + 2 <= len);
                }
                prop_assert!(header.gso == 0 || header.gso_size > 0);
            }
        }
    }
}
