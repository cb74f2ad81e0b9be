//! The header of a packet (virtio 1.2, 5.10.6): decoded from whatever a guest puts there, and made for it.

/// Bytes of it.
pub(crate) const LEN: usize = 44;
/// The host's context id.
pub(crate) const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub(crate) const STREAM: u16 = 1;
/// What a peer will do no more (VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE, _SEND).
pub(crate) const HEARS_NO_MORE: u32 = 1;
pub(crate) const SAYS_NO_MORE: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    Unknown(u16),
}

impl From<u16> for Op {
    fn from(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }
}

impl Op {
    fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// A header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) src_cid: u64,
    pub(crate) dst_cid: u64,
    pub(crate) src_port: u32,
    pub(crate) dst_port: u32,
    /// Bytes that follow.
    pub(crate) len: u32,
    pub(crate) kind: u16,
    pub(crate) op: Op,
    pub(crate) flags: u32,
    /// What the sender has room for.
    pub(crate) buf_alloc: u32,
    /// What it has taken out of that room, ever, modulo 2^32.
    pub(crate) fwd_cnt: u32,
}

impl Header {
    pub(crate) fn decode(bytes: &[u8; LEN]) -> Self {
        let mut at = 0;
        let mut take = |len: usize| {
            let mut value = [0; 8];
            for (to, from) in value.iter_mut().zip(bytes.iter().skip(at).take(len)) {
                *to = *from;
            }
            at += len;
            u64::from_le_bytes(value)
        };
        // The casts take what was read as that width.
        Self {
            src_cid: take(8),
            dst_cid: take(8),
            src_port: take(4) as u32,
            dst_port: take(4) as u32,
            len: take(4) as u32,
            kind: take(2) as u16,
            op: Op::from(take(2) as u16),
            flags: take(4) as u32,
            buf_alloc: take(4) as u32,
            fwd_cnt: take(4) as u32,
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(LEN);
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.number().to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever stands there is read, and written back as it was.
        #[test]
        fn any_bytes_are_a_header(bytes in prop::array::uniform32(any::<u8>()), rest in prop::array::uniform12(any::<u8>())) {
            let mut whole = [0; LEN];
            for (to, from) in whole.iter_mut().zip(bytes.iter().chain(&rest)) {
                *to = *from;
            }
            prop_assert_eq!(Header::decode(&whole).encode(), whole.to_vec());
        }
    }
}
