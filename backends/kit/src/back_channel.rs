//! The back channel (vhost-user, "Back-end communication"): how a device tells its front end that its configuration space
//! has changed.
//!
//! The `vhost` crate receives the channel (SET_BACKEND_REQ_FD) and hides its descriptor, and has no word for
//! VHOST_USER_BACKEND_CONFIG_CHANGE_MSG. So that one message is taken from the socket by hand ([`brought`](crate::brought)), and
//! the other one is written by hand. No answer is asked for: whoever waited for one would keep the conversation from
//! answering the question that the front end asks next, which is GET_CONFIG.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vhost::vhost_user::message::{BackendReq, FrontendReq};

/// Header: request, flags, size.
pub(crate) const HEADER: usize = 12;
pub(crate) const VERSION: u32 = 1;
pub(crate) const VERSION_MASK: u32 = 3;
pub(crate) const REPLY: u32 = 4;
pub(crate) const NEED_REPLY: u32 = 8;
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

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;
    use crate::brought::take;
    use crate::brought::tests::offer;

    fn is_next(stream: &UnixStream) -> bool {
        matches!(next_request(stream), Some(FrontendReq::SET_BACKEND_REQ_FD))
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
        channel.set(Some(take(&back, FrontendReq::SET_BACKEND_REQ_FD, true).unwrap()));
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
}
