//! Handing a device the socket of a display (GPU_SET_SOCKET), which the `vhost` crate's front end has no method for.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::message::FrontendReq;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// Hands over a socket in the conversation `talk`, in which answers are agreed on; whether the device took it.
///
/// # Errors
/// The conversation ends, or the answer is none.
pub fn hand_over(mut talk: &UnixStream, socket: BorrowedFd<'_>) -> Result<bool> {
    let code = u32::from(FrontendReq::GPU_SET_SOCKET);
    let message = [code, VERSION | NEED_REPLY, 0].map(u32::to_le_bytes).concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let sockets = [socket];
    ensure!(ancillary.push(SendAncillaryMessage::ScmRights(&sockets)), "no room for a descriptor");
    sendmsg(talk, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL)?;
    let mut answer = [0; 20];
    talk.read_exact(&mut answer)?;
    let (header, value) = answer.split_at(12);
    ensure!(header == [code, VERSION | REPLY, 8].map(u32::to_le_bytes).concat(), "an answer to something else");
    Ok(value.iter().all(|byte| *byte == 0))
}
