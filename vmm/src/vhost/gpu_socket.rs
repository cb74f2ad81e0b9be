//! GPU_SET_SOCKET: the socket over which a GPU's process says what its screens show (vhost-user-gpu), for which the `vhost`
//! crate's front end has no method.

use std::io::{self, IoSlice, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::message::FrontendReq;

use super::error::{ConversationError, Step};

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// Hands it over; with `acknowledged`, waits for the word that it was taken.
pub(super) fn hand_over(mut talk: &UnixStream, socket: &OwnedFd, acknowledged: bool) -> Result<(), ConversationError> {
    let step = Step::GpuSetSocket;
    let gone = |error: io::Error| ConversationError::Gone { step, reason: error.to_string() };
    let request = u32::from(FrontendReq::GPU_SET_SOCKET);
    let flags = if acknowledged { VERSION | NEED_REPLY } else { VERSION };
    let message = [request, flags, 0].map(u32::to_le_bytes).concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let sockets = [socket.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&sockets));
    let sent = sendmsg(talk, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL);
    if sent.map_err(|error| gone(error.into()))? != message.len() {
        return Err(gone(io::ErrorKind::WriteZero.into()));
    }
    if !acknowledged {
        return Ok(());
    }
    let mut answer = [0; 20];
    talk.read_exact(&mut answer).map_err(gone)?;
    let (header, value) = answer.split_at(12);
    if header != [request, VERSION | REPLY, 8].map(u32::to_le_bytes).concat() {
        return Err(ConversationError::Absurd { step, what: format!("the header {header:02x?}") });
    }
    if value.iter().any(|byte| *byte != 0) {
        return Err(ConversationError::Refused { step });
    }
    Ok(())
}
