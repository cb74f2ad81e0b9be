//! A message of the front end's that brings one socket and nothing else: SET_BACKEND_REQ_FD, GPU_SET_SOCKET. The `vhost` crate
//! takes both and hides the descriptor behind an object that waits without a limit, so the message is taken from the
//! conversation by hand before the crate sees it.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send};
use vhost::vhost_user::message::FrontendReq;

use crate::back_channel::{HEADER, NEED_REPLY, REPLY, VERSION, VERSION_MASK, words};

/// Takes the message, which is next on the stream and is `request`, and answers it when `acknowledge` is agreed on and asked
/// for.
pub(crate) fn take(stream: &UnixStream, request: FrontendReq, acknowledge: bool) -> io::Result<OwnedFd> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{request:?} {what}"));
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
        let answer = words(&[u32::from(request), VERSION | REPLY, 8, 0, 0]);
        if send(stream, &answer, SendFlags::NOSIGNAL)? != answer.len() {
            return Err(wrong("could not be answered"));
        }
    }
    Ok(socket)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsFd;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};

    use super::*;

    /// Sends a message with descriptors beside it.
    pub(crate) fn offer(front: &UnixStream, header: &[u32], descriptors: &[std::os::fd::BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        sendmsg(front, &[IoSlice::new(&words(header))], &mut ancillary, SendFlags::empty()).unwrap();
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
            assert!(
                take(&back, FrontendReq::SET_BACKEND_REQ_FD, false).is_err(),
                "{header:?} with {} descriptors",
                descriptors.len()
            );
        }
    }
}
