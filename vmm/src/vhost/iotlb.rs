//! What a backend is told of the guest's IOMMU (vhost-user, "IOMMU support"), spoken by hand: the `vhost` crate has no such
//! messages.
//!
//! A backend is told of each mapping before the guest hears that it is made, and of each one that goes before the guest hears
//! that it is gone; its acknowledgement of the latter says that it uses nothing of it any more. So it has no reason to ask:
//! where it does, it is for an access that the guest has not permitted, or that was permitted while it forgot.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Instant;

use atoll_devices::iommu::{Access, Change, IovaRange, Mapping};
use atoll_devices::virtio::QueueConfig;
use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;

use super::conversation::Wire;
use super::device::Shared;
use super::error::{ConversationError, Step};
use super::request::Request;
use crate::iommu::{Endpoint, Unconfirmed, Unit};
use crate::memory::backend_address;

/// VIRTIO_F_ACCESS_PLATFORM.
pub(super) const ACCESS_PLATFORM: u64 = 1 << 33;
/// `struct vhost_iotlb_msg`.
pub(super) const BODY: usize = 32;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;
const READ: u8 = 1;
const WRITE: u8 = 2;

/// The IOMMU before a device, and the device's number there.
#[derive(Clone)]
pub(super) struct Behind {
    pub(super) unit: Arc<Unit>,
    pub(super) endpoint: u32,
}

/// Why the queues of a driver cannot be served behind an IOMMU.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum BehindError {
    /// Its addresses are guest-physical ones.
    #[error(
        "it is behind an IOMMU, and its driver does not know of that (VIRTIO_F_ACCESS_PLATFORM); leave iommu=on out"
    )]
    Driver,
    /// A part of a ring is not mapped for the device.
    #[error("queue {queue}: address {address:#x} in its {area} is not mapped for the device")]
    Unmapped {
        /// The queue.
        queue: u16,
        /// Which part of it.
        area: &'static str,
        /// Where.
        address: u64,
    },
    /// A part of a ring lies in pieces of guest memory that are not side by side.
    #[error(
        "queue {queue}: its {area} does not lie in one piece of memory (at {address:#x}); a smaller queue_size helps, or \
         huge pages in the guest"
    )]
    Scattered {
        /// The queue.
        queue: u16,
        /// Which part of it.
        area: &'static str,
        /// Where the next piece begins.
        address: u64,
    },
}

impl Behind {
    /// A queue at guest-physical addresses.
    ///
    /// # Errors
    /// Where the device may not reach all of it, or it does not lie there in one piece.
    pub(super) fn translate(&self, queue: &QueueConfig) -> Result<QueueConfig, BehindError> {
        let (index, size) = (queue.index, u64::from(queue.size));
        let place = |area: &'static str, first: u64, len: u64, access: Access| {
            let unmapped = |address: u64| BehindError::Unmapped { queue: index, area, address };
            let (mut left, mut next, mut begin) = (len, first, None::<(u64, u64)>);
            while left > 0 {
                let mapping = self.unit.find(self.endpoint, next, access).map_err(|_| unmapped(next))?;
                let gpa = mapping.translate(next).ok_or(unmapped(next))?;
                match begin {
                    None => begin = Some((gpa, gpa)),
                    Some((_, expected)) if gpa != expected => {
                        return Err(BehindError::Scattered { queue: index, area, address: next });
                    }
                    Some(_) => {}
                }
                let here = (mapping.iova().last() - next).saturating_add(1).min(left);
                left -= here;
                begin = begin.and_then(|(begin, _)| Some((begin, gpa.checked_add(here)?)));
                next = if left > 0 { next.checked_add(here).ok_or(unmapped(next))? } else { next };
            }
            begin.map(|(begin, _)| begin).ok_or(unmapped(first))
        };
        Ok(QueueConfig {
            descriptor_table: place("descriptor table", queue.descriptor_table, 16 * size, Access::Read)?,
            available_ring: place("available ring", queue.available_ring, 6 + 2 * size, Access::Read)?,
            used_ring: place("used ring", queue.used_ring, 6 + 8 * size, Access::Write)?,
            ..*queue
        })
    }

    /// Everything that a backend has to be told that knows nothing, or knows what was.
    pub(super) fn everything(&self) -> Vec<Word> {
        let all = IovaRange::ALL;
        let mappings = self.unit.mappings(self.endpoint, all).into_iter().map(Word::Update);
        std::iter::once(Word::Invalidate(all)).chain(mappings).collect()
    }
}

impl Endpoint for Shared {
    fn changed(&self, change: Change, deadline: Instant) -> Result<(), Unconfirmed> {
        let (answer, done) = sync_channel(1);
        if self.send(Request::Translate { change, answer }) {
            match done.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                // Told, or there is nobody to tell: it has not been started, or was lost over this.
                Ok(()) | Err(RecvTimeoutError::Disconnected) => {}
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Unconfirmed(format!("{}: its backend has not confirmed in time", self.name)));
                }
            }
        }
        // One that was lost may still write until the fence has passed.
        if self.gate.await_settled(deadline) {
            Ok(())
        } else {
            Err(Unconfirmed(format!("{}: nothing shows that the dead backend's last writes are done", self.name)))
        }
    }
}

/// One thing that a backend is told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Word {
    /// This leads there.
    Update(Mapping),
    /// Nothing of this holds any longer.
    Invalidate(IovaRange),
}

impl Word {
    fn body(self) -> [u8; BODY] {
        let (range, user, permissions, kind) = match self {
            Self::Update(mapping) => {
                let read = if mapping.rights.read { READ } else { 0 };
                let write = if mapping.rights.write { WRITE } else { 0 };
                (mapping.iova(), backend_address(mapping.gpa()), read | write, UPDATE)
            }
            Self::Invalidate(range) => (range, 0, 0, INVALIDATE),
        };
        let mut body = [0; BODY];
        // All addresses are one more than can be said; nothing can be mapped at the last one.
        let longs = [range.first(), range.reach().saturating_add(1), user];
        for (field, long) in body.chunks_exact_mut(8).zip(longs) {
            field.copy_from_slice(&long.to_le_bytes());
        }
        (body[24], body[25]) = (permissions, kind);
        body
    }
}

/// Tells a backend and waits until it has confirmed.
pub(super) fn tell(wire: &mut Wire, word: Word) -> Result<(), ConversationError> {
    let step = Step::IotlbMsg;
    wire.speak(step, |socket| {
        let gone = |error: io::Error| ConversationError::Gone { step, reason: error.to_string() };
        let request = u32::from(FrontendReq::IOTLB_MSG);
        let mut message = [request, VERSION | NEED_REPLY, BODY as u32].map(u32::to_le_bytes).concat();
        message.extend(word.body());
        let mut stream: &UnixStream = socket;
        stream.write_all(&message).map_err(gone)?;
        let mut answer = [0; 20];
        stream.read_exact(&mut answer).map_err(gone)?;
        let (header, value) = answer.split_at(12);
        if header != [request, VERSION | REPLY, 8].map(u32::to_le_bytes).concat() {
            return Err(ConversationError::Absurd { step, what: format!("a header of {header:x?}") });
        }
        if value.iter().all(|byte| *byte == 0) { Ok(()) } else { Err(ConversationError::Refused { step }) }
    })
}

/// What a backend asks for, or complains that it may not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// Where.
    pub address: u64,
    /// What it wants to do.
    pub access: Access,
}

impl Miss {
    /// Reads the body of a message of a backend; `None` when it is no question.
    pub(super) fn decode(body: &[u8]) -> Option<Self> {
        let body: &[u8; BODY] = body.try_into().ok()?;
        let address = u64::from_le_bytes(*body.first_chunk()?);
        let access = if body[24] & WRITE != 0 { Access::Write } else { Access::Read };
        (body[25] == MISS).then_some(Self { address, access })
    }
}
