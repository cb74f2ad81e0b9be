//! One incarnation of a backend, as the device's thread holds it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use atoll_protocol::jail::JailedLayer;
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vm_memory::GuestMemoryMmap;

use crate::memory::GuestMemory;
use crate::vhost::back_channel::BackChannel;
use crate::vhost::conversation::Conversation;
use crate::vhost::device::Recovery;
use crate::vhost::error::ConversationError;
use crate::vhost::inflight::InflightRegion;
use crate::vhost::session::{self, Capabilities, Known, Preface};
use crate::vhost::source::{BackendProcess, is_readable};

/// The process that listened at the other end.
fn peer(socket: &UnixStream) -> Option<OwnedFd> {
    let pid = rustix::net::sockopt::socket_peercred(socket).ok()?.pid;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

/// What a backend was told before it was handed rings.
#[derive(Default)]
pub(super) struct Told {
    features: Option<u64>,
    memory: Option<Arc<GuestMemoryMmap>>,
    inflight: Option<Arc<InflightRegion>>,
}

impl Told {
    /// What of it is still true; asked once, because it is told again from then on.
    pub(super) fn take(
        &mut self,
        features: u64,
        memory: &GuestMemory,
        inflight: Option<&Arc<InflightRegion>>,
    ) -> Known {
        let Self { features: was_told, memory: known, inflight: region } = std::mem::take(self);
        Known {
            features: was_told == Some(features),
            memory: known.is_some_and(|known| Arc::ptr_eq(&known, memory.mapped())),
            inflight: region.is_some_and(|region| inflight.is_some_and(|asked| Arc::ptr_eq(&region, asked))),
        }
    }
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
    /// What it knows before it is handed rings.
    pub(super) told: Told,
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
        Self {
            conversation,
            process,
            capabilities,
            requests,
            served,
            in_order,
            shadowed,
            told: Told::default(),
            has_rings: false,
            peer,
        }
    }
    /// Tells it what can be told before there are rings, so that it need not be repeated then.
    ///
    /// # Errors
    /// When it does not take it.
    pub(super) fn brief(&mut self, preface: Preface) -> Result<(), ConversationError> {
        let told = Told {
            features: preface.features,
            memory: Some(Arc::clone(preface.memory.mapped())),
            inflight: preface.inflight.clone(),
        };
        self.conversation.perform(move |wire| session::brief(wire, preface))?;
        self.told = told;
        Ok(())
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
