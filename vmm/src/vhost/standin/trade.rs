//! What a stand-in may honestly say, for each kind of device and queue.
//!
//! A disk's requests have an error of their own. What a network card, a console or a socket sends can be lost, and is;
//! where the guest waits for something to arrive, nothing does, and its buffers stay where they are. Entropy is neither
//! made up nor refused: Linux takes an answer without a byte for the end of the device and never asks again, not even of
//! the backend that comes back; a reader that waits can be interrupted, and is woken when the device is removed.

use crate::vhost::guest_ring::{Chain, Reach};
use atoll_devices::virtio::device_class::{BLOCK, CONSOLE, FS, NET, VSOCK};

/// VIRTIO_NET_F_CTRL_VQ and VIRTIO_NET_F_MQ.
const NET_CONTROL_QUEUE: u64 = 1 << 17;
const NET_MULTI_QUEUE: u64 = 1 << 22;
/// Where a network card says how many pairs of queues it has.
const NET_PAIRS_AT: usize = 8;
/// VIRTIO_BLK_S_IOERR and VIRTIO_NET_ERR.
const BLOCK_ERROR: u8 = 1;
const NET_ERROR: u8 = 1;
/// fuse_in_header up to and with `unique`; fuse_out_header; -EIO.
const FUSE_ASKED: usize = 16;
const FUSE_ANSWER: u32 = 16;
const FUSE_ERROR: i32 = -5;

/// What becomes of the requests of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vhost) enum Answer {
    /// They stay where they are.
    Leave,
    /// They come back with nothing written.
    Drop,
    /// They come back with this as their last byte.
    Status(u8),
    /// They come back with an error of FUSE.
    Fuse,
}

impl Answer {
    /// Writes what there is to say; how many bytes that is. A chain that makes no sense comes back as it is.
    pub(in crate::vhost) fn write(self, memory: &impl Reach, chain: Option<&Chain>) -> u32 {
        let Some(chain) = chain else { return 0 };
        match self {
            Self::Leave | Self::Drop => 0,
            Self::Status(byte) => u32::from(chain.write_last(memory, byte)),
            Self::Fuse => {
                let Some(asked) = chain.first::<FUSE_ASKED>(memory) else { return 0 };
                let [len, error] = [FUSE_ANSWER.to_le_bytes(), FUSE_ERROR.to_le_bytes()];
                let answer = [len.as_slice(), &error, asked.get(8..).unwrap_or_default()].concat();
                // What wants no answer has no room for one.
                if chain.write_first(memory, &answer) { FUSE_ANSWER } else { 0 }
            }
        }
    }
}

/// A kind of device, as a stand-in needs to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vhost) struct Trade {
    device_type: u16,
    /// A network card's control queue.
    control: Option<u16>,
}

impl Trade {
    /// Of a device whose driver has accepted `features` and reads `config`.
    pub(in crate::vhost) fn of(device_type: u16, features: u64, config: &[u8]) -> Self {
        let pairs = config.get(NET_PAIRS_AT..).and_then(|rest| rest.first_chunk::<2>());
        let pairs = pairs.filter(|_| features & NET_MULTI_QUEUE != 0).map_or(1, |pairs| u16::from_le_bytes(*pairs));
        let control = (device_type == NET && features & NET_CONTROL_QUEUE != 0).then(|| pairs.saturating_mul(2));
        Self { device_type, control }
    }

    /// What becomes of new requests while no backend serves the device.
    pub(in crate::vhost) fn answer(self, queue: u16) -> Answer {
        match self.device_type {
            BLOCK => Answer::Status(BLOCK_ERROR),
            NET if self.control == Some(queue) => Answer::Status(NET_ERROR),
            // Odd queues go from the guest to the host, control messages of a console included.
            NET | CONSOLE if queue % 2 == 1 => Answer::Drop,
            VSOCK if queue == 1 => Answer::Drop,
            FS => Answer::Fuse,
            _ => Answer::Leave,
        }
    }

    /// What becomes of requests that a dead backend has not finished, when the next one serves only those after them;
    /// `None` where nobody can tell.
    pub(in crate::vhost) fn verdict(self, queue: u16) -> Option<Answer> {
        match (self.device_type, self.answer(queue)) {
            // A buffer for what arrives, with nothing in it: drivers of these ask with another one.
            (NET | CONSOLE | VSOCK, Answer::Leave) => Some(Answer::Drop),
            (_, Answer::Leave) => None,
            (_, answer) => Some(answer),
        }
    }
}
