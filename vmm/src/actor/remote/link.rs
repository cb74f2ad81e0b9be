//! The way to one incarnation of a device process: its socket, and a lane beside it where both are on one host.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use atoll_protocol::bus::{BusAnswer, BusCall, BusEvent, BusRequest, Refusal};
use atoll_protocol::lane::{LANE_BYTES, Lane, LaneError, VmmEnd};
use atoll_protocol::socket::HangUp;
use atoll_protocol::{FrameSocket, FrameWriter, SocketError};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::sockopt::socket_domain;
use thiserror::Error;

/// Why a question could not be sent.
#[derive(Debug, Error)]
pub(super) enum LinkError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Lane(#[from] LaneError),
}

pub(super) struct Link {
    writer: FrameWriter,
    hang_up: HangUp,
    lane: Option<VmmEnd>,
}

impl Link {
    pub(super) fn new(writer: FrameWriter, lane: Option<VmmEnd>) -> Self {
        Self { hang_up: writer.hang_up_handle(), writer, lane }
    }

    /// Does not wait. A peer that leaves more unread than a socket or a lane holds is stuck: its questions are at most
    /// 256, and small.
    pub(super) fn send(&mut self, question: &BusRequest) -> Result<(), LinkError> {
        match &mut self.lane {
            Some(lane) => Ok(lane.ask(question)?),
            None => Ok(self.writer.send(question, &[], Duration::ZERO)?),
        }
    }

    pub(super) fn lane(&self) -> Option<&VmmEnd> {
        self.lane.as_ref()
    }

    pub(super) fn lane_mut(&mut self) -> Option<&mut VmmEnd> {
        self.lane.as_mut()
    }

    pub(super) fn hang_up(&self) {
        self.hang_up.hang_up();
    }
}

/// What came of the offer of a lane.
pub(super) enum Offered {
    /// It is in use from now on.
    Lane(VmmEnd),
    /// Words go over the socket.
    Socket,
    /// The peer answered something else.
    Odd(BusEvent),
}

impl fmt::Debug for Offered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lane(_) => "Lane",
            Self::Socket => "Socket",
            Self::Odd(_) => "Odd",
        })
    }
}

/// Offers a lane to a process on the same host. `question` is the one that carries the offer.
pub(super) fn offer(
    socket: &mut FrameSocket,
    question: &BusRequest,
    patience: Duration,
) -> Result<Offered, SocketError> {
    if socket_domain(socket.reader.as_fd()) != Ok(AddressFamily::UNIX) {
        return Ok(Offered::Socket);
    }
    let (memory, bell, post) = match descriptors() {
        Ok(made) => made,
        Err(error) => {
            tracing::warn!(%error, "no lane to a device process: its answers take longer");
            return Ok(Offered::Socket);
        }
    };
    debug_assert_eq!(question.call, BusCall::Lane);
    socket.writer.send(question, &[memory.as_fd(), bell.as_fd(), post.as_fd()], patience)?;
    Ok(match socket.reader.receive_message(Some(patience))? {
        BusEvent::Answer { id, generation, answer: BusAnswer::Done, .. }
            if id == question.id && generation == question.generation =>
        {
            match Lane::map(memory.as_fd()) {
                Ok(lane) => Offered::Lane(VmmEnd::new(lane, bell, post)),
                Err(LaneError::Io(errno)) => return Err(errno.into()),
                Err(_) => return Err(Errno::INVAL.into()),
            }
        }
        BusEvent::Answer { id, answer: BusAnswer::Refused(Refusal::NoLane), .. } if id == question.id => {
            Offered::Socket
        }
        other => Offered::Odd(other),
    })
}

fn descriptors() -> Result<(OwnedFd, OwnedFd, OwnedFd), Errno> {
    let memory = memfd_create("atoll-lane", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&memory, LANE_BYTES as u64)?;
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    Ok((memory, event()?, event()?))
}
