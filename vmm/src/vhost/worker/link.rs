//! One incarnation of a backend, as the device's thread holds it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use atoll_protocol::jail::JailedLayer;
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use crate::vhost::back_channel::BackChannel;
use crate::vhost::conversation::Conversation;
use crate::vhost::device::Recovery;
use crate::vhost::session::Capabilities;
use crate::vhost::source::{BackendProcess, is_readable};

/// The process that listened at the other end.
fn peer(socket: &UnixStream) -> Option<OwnedFd> {
    let pid = rustix::net::sockopt::socket_peercred(socket).ok()?.pid;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

/// One incarnation of the backend, greeted.
pub(in crate::vhost) struct Session {
    pub(in crate::vhost) conversation: Conversation,
    pub(in crate::vhost) process: Option<Box<dyn BackendProcess>>,
    pub(in crate::vhost) capabilities: Capabilities,
    /// Where its own requests come from, if it can make any.
    pub(super) requests: Option<BackChannel>,
    /// How many of the queues it serves.
    pub(super) served: u16,
    /// It completes requests in their order.
    in_order: bool,
    /// Its rings are shadowed: the VMM itself knows what it has taken.
    shadowed: bool,
    /// It was handed the driver's rings, or some of them.
    pub(super) has_rings: bool,
    /// The process at the other end, where it is somebody else's and could be found.
    peer: Option<OwnedFd>,
}

/// What a session is made of.
pub(in crate::vhost) struct SessionParts {
    pub(in crate::vhost) conversation: Conversation,
    pub(in crate::vhost) process: Option<Box<dyn BackendProcess>>,
    pub(in crate::vhost) capabilities: Capabilities,
    pub(in crate::vhost) requests: BackChannel,
    pub(in crate::vhost) served: u16,
    pub(in crate::vhost) in_order: bool,
    pub(in crate::vhost) shadowed: bool,
}

impl Session {
    pub(in crate::vhost) fn new(parts: SessionParts) -> Self {
        let SessionParts { conversation, process, capabilities, requests, served, in_order, shadowed } = parts;
        let requests = capabilities.protocol.contains(Protocol::BACKEND_REQ).then_some(requests);
        let peer = if process.is_none() { peer(conversation.socket()) } else { None };
        Self { conversation, process, capabilities, requests, served, in_order, shadowed, has_rings: false, peer }
    }
    pub(super) fn protocol(&self) -> Protocol {
        self.capabilities.protocol
    }
    pub(in crate::vhost) fn recovery(&self) -> Recovery {
        if self.shadowed || self.in_order || self.protocol().contains(Protocol::INFLIGHT_SHMFD) {
            Recovery::Full
        } else {
            Recovery::IdleOnly
        }
    }
    /// Its process id, where it is ours.
    pub(in crate::vhost) fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.id())
    }
    /// How its jail came out, where it is a process of ours.
    pub(in crate::vhost) fn jail(&self) -> Vec<JailedLayer> {
        self.process.as_ref().map(|process| process.jail().to_vec()).unwrap_or_default()
    }
    /// Ends it by force and waits for that until `deadline`. Says how its process ended, where it is ours.
    pub(in crate::vhost) fn give_up(&mut self, deadline: Instant) -> Option<String> {
        self.conversation.hang_up();
        self.process.as_mut().map(|process| process.kill(deadline))
    }
    /// Whether nothing of it runs any more, as far as can be seen.
    pub(super) fn is_gone(&self) -> bool {
        self.process.as_ref().is_none_or(|process| is_readable(process.ended()))
    }
    /// Whether somebody else's process is known to have ended.
    pub(super) fn peer_is_gone(&self) -> bool {
        self.peer.as_ref().is_some_and(is_readable)
    }
    /// Why it is over, if it is.
    pub(super) fn over(&self) -> Option<&'static str> {
        if self.process.as_ref().is_some_and(|process| is_readable(process.ended())) {
            Some("its process has ended")
        } else if is_readable(self.conversation.socket()) {
            Some("it has hung up, or spoken without being asked")
        } else {
            None
        }
    }
}
