//! Opening a TAP interface for somebody else (`--hand-over N`): a supervisor that keeps the queues, so that the interface, its
//! address and its routes outlive the processes that serve the card.
//!
//! One message goes over the socket: the queues beside a zero byte, or the reason why there are none. Then this process ends.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::tap_device::TapError;
use crate::card::PAIRS_MAX;

/// Tells the other end of `socket` what came of opening an interface.
///
/// # Errors
/// When nobody is there to hear it.
pub fn hand_over(socket: &OwnedFd, opened: &Result<Vec<File>, TapError>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PAIRS_MAX as usize))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let text = match opened {
        Ok(_) => "\0".to_owned(),
        Err(error) => error.to_string(),
    };
    let queues: Vec<_> = opened.iter().flatten().map(AsFd::as_fd).collect();
    if !queues.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(&queues)) {
        return Err(Errno::TOOBIG);
    }
    sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut beside, SendFlags::NOSIGNAL).map(drop)
}
