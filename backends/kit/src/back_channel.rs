//! The back channel (vhost-user, "Back-end communication"): how a device tells its front end that its configuration space
//! has changed.
//!
//! The `vhost` crate receives the channel (SET_BACKEND_REQ_FD) and hides its descriptor, and has no word for
//! VHOST_USER_BACKEND_CONFIG_CHANGE_MSG. So that one message is taken from the socket by hand before the crate sees it, and
//! the other one is written by hand. No answer is asked for: whoever waited for one would keep the conversation from
//! answering the question that the front end asks next, which is GET_CONFIG.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recv, recvmsg, send};
use vhost::vhost_user::message::{BackendReq, FrontendReq};

/// Header: request, flags, size.
const HEADER: usize = 12;
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// VHOST_USER_BACKEND_IOTLB_MSG, which the crate does not know.
const BACKEND_IOTLB_MSG: u32 = 1;
/// Bytes of an answer: header and value.
const ANSWER: usize = HEADER + 8;

/// The way to the present front end, if it has given one. Copies share it.
#[derive(Debug, Clone, Default)]
pub struct BackChannel(Arc<Mutex<Option<OwnedFd>>>);

impl BackChannel {
    /// Tells the front end to read the configuration space again. One that does not read its channel is not waited for.
    pub fn config_changed(&self) {
        let channel = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(socket) = &*channel else { return };
        let message = words(&[u32::from(BackendReq::CONFIG_CHANGE_MSG), VERSION, 0]);
        match send(socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) if sent == message.len() => {}
            Ok(_) => tracing::warn!("the front end does not read its back channel"),
            Err(error) => tracing::warn!(%error, "the front end was not told that the configuration has changed"),
        }
    }

    /// Sends the body of an IOTLB message. With `acknowledge` the front end's answer is waited for until `deadline`; whether
    /// it is yes. One that does not answer in time is not asked again, because its answer could be taken for another's.
    pub(crate) fn ask_translation(&self, body: &[u8], acknowledge: bool, deadline: Instant) -> bool {
        let mut channel = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(socket) = &*channel else { return false };
        let flags = if acknowledge { VERSION | NEED_REPLY } else { VERSION };
        let mut message = words(&[BACKEND_IOTLB_MSG, flags, body.len() as u32]);
        message.extend(body);
        let asked = send(socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        let granted = match asked {
            Ok(sent) if sent == message.len() => !acknowledge || hear_yes(socket, deadline) == Some(true),
            _ => return false,
        };
        if !granted && Instant::now() >= deadline {
            tracing::warn!("the front end does not answer for a translation");
            *channel = None;
        }
        granted
    }

    pub(crate) fn set(&self, socket: Option<OwnedFd>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = socket;
    }
}

/// The answer to the question that was asked last; none when there is none in time, or it cannot be one.
fn hear_yes(socket: &OwnedFd, deadline: Instant) -> Option<bool> {
    let mut answer: Vec<u8> = Vec::with_capacity(ANSWER);
    while answer.len() < ANSWER {
        let left = deadline.checked_duration_since(Instant::now())?;
        let mut wait = [PollFd::new(socket, PollFlags::IN)];
        let timeout = Timespec::try_from(left).ok()?;
        match poll(&mut wait, Some(&timeout)) {
            Ok(0) => return None,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
        let mut bytes = [0; ANSWER];
        match recv(socket, bytes.get_mut(answer.len()..)?, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return None,
            Ok((count, _)) => answer.extend(bytes.iter().skip(answer.len()).take(count)),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => return None,
        }
    }
    let expected = words(&[BACKEND_IOTLB_MSG, VERSION | REPLY, 8]);
    let (header, value) = answer.split_at_checked(HEADER)?;
    (header == expected).then(|| value.iter().all(|byte| *byte == 0))
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Waits for the next message, which stays in the socket; which request it is.
pub(crate) fn next_request(stream: &UnixStream) -> Option<FrontendReq> {
    let mut code = [0; 4];
    // A hang-up, an error or a message in pieces is for the crate to judge.
    loop {
        match recv(stream, &mut code, RecvFlags::PEEK) {
            Ok((4, _)) => return FrontendReq::try_from(u32::from_le_bytes(code)).ok(),
            Err(rustix::io::Errno::INTR) => {}
            _ => return None,
        }
    }
}

/// Takes the message that brings a back channel, and answers it when `acknowledge` is agreed on and asked for.
pub(crate) fn take(stream: &UnixStream, acknowledge: bool) -> io::Result<OwnedFd> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("SET_BACKEND_REQ_FD {what}"));
    let mut header = [0; HEADER];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
    let received = loop {
        match recvmsg(stream, &mut [IoSliceMut::new(&mut header)], &mut ancillary, flags) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    let mut descriptors: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    let [_, _, _, _, f0, f1, f2, f3, s0, s1, s2, s3] = header;
    let (flags, size) = (u32::from_le_bytes([f0, f1, f2, f3]), u32::from_le_bytes([s0, s1, s2, s3]));
    if received.bytes != HEADER || flags & VERSION_MASK != VERSION || flags & REPLY != 0 || size != 0 {
        return Err(wrong("has a header that cannot be right"));
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() != 1 {
        return Err(wrong("must bring one descriptor"));
    }
    let Some(socket) = descriptors.pop() else { return Err(wrong("must bring one descriptor")) };
    if rustix::net::sockopt::socket_domain(&socket)? != rustix::net::AddressFamily::UNIX {
        return Err(wrong("brought something that is no UNIX socket"));
    }
    if acknowledge && flags & NEED_REPLY != 0 {
        let answer = words(&[u32::from(FrontendReq::SET_BACKEND_REQ_FD), VERSION | REPLY, 8, 0, 0]);
        if send(stream, &answer, SendFlags::NOSIGNAL)? != answer.len() {
            return Err(wrong("could not be answered"));
        }
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read, Write};
    use std::os::fd::AsFd;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};

    use super::*;

    fn is_next(stream: &UnixStream) -> bool {
        matches!(next_request(stream), Some(FrontendReq::SET_BACKEND_REQ_FD))
    }

    fn offer(front: &UnixStream, header: &[u32], descriptors: &[std::os::fd::BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        sendmsg(front, &[IoSlice::new(&words(header))], &mut ancillary, SendFlags::empty()).unwrap();
    }

    /// The channel is taken out from between other messages, acknowledged, and used.
    #[test]
    fn a_change_is_told_on_the_channel_that_was_given() {
        let (mut front, back) = UnixStream::pair().unwrap();
        let (mut fronts, backs) = UnixStream::pair().unwrap();
        front.write_all(&words(&[3, 1, 0])).unwrap();
        assert!(!is_next(&back), "SET_OWNER");
        (&back).read_exact(&mut [0; 12]).unwrap();
        offer(&front, &[21, VERSION | NEED_REPLY, 0], &[backs.as_fd()]);
        drop(backs);
        assert!(is_next(&back));
        let channel = BackChannel::default();
        channel.config_changed();
        channel.set(Some(take(&back, true).unwrap()));
        let mut answer = [0; 20];
        front.read_exact(&mut answer).unwrap();
        assert_eq!(answer.to_vec(), words(&[21, 5, 8, 0, 0]));
        channel.clone().config_changed();
        let mut told = [0; 12];
        fronts.read_exact(&mut told).unwrap();
        assert_eq!(told.to_vec(), words(&[2, 1, 0]));
        channel.set(None);
        assert_eq!(fronts.read(&mut told).unwrap(), 0, "closed");
        drop(front);
        assert!(!is_next(&back), "a hang-up is nobody's channel");
    }

    #[test]
    fn what_is_no_channel_is_refused() {
        let (front, back) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let cases: &[(&[u32], &[std::os::fd::BorrowedFd<'_>])] = &[
            (&[21, 1, 0], &[]),
            (&[21, 1, 0], &[file.as_fd()]),
            (&[21, 1, 0], &[front.as_fd(), front.as_fd()]),
            (&[21, 1, 0], &[front.as_fd(), front.as_fd(), front.as_fd()]),
            (&[21, 5, 0], &[front.as_fd()]),
            (&[21, 1, 8], &[front.as_fd()]),
            (&[21, 0, 0], &[front.as_fd()]),
        ];
        for (header, descriptors) in cases {
            offer(&front, header, descriptors);
            assert!(is_next(&back));
            assert!(take(&back, false).is_err(), "{header:?} with {} descriptors", descriptors.len());
        }
    }
}
