//! What a card is plugged into.
//!
//! A link has a half per queue pair and direction, each used by the thread of its queue. Nothing of it may wait: a sender
//! that cannot take a frame says so by a descriptor that the queue thread waits for, or drops it.

pub mod connector;
pub mod hand_over;
pub mod iovec;
pub mod none;
pub mod stream;
pub mod switch;
pub mod table;
pub mod tap;
pub mod tap_device;
pub mod tap_intake;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use atoll_kit::inlet::{Buffers, Inlet};
use atoll_kit::memory::GuestRam;
use atoll_kit::{Fetched, Wait};
use vm_memory::GuestMemory;

use crate::face::Face;
use crate::frame::Frame;
use crate::header::{Features, Offloads};

/// Somewhere that frames go to and come from.
pub trait Link: Send + 'static {
    /// Takes the frames of one transmit queue.
    type Sender: Sender;
    /// Has frames for one receive queue.
    type Receiver: Receiver;

    /// What it takes from a driver, and may give to one, besides whole frames.
    fn offers(&self) -> Offloads;

    /// The driver has chosen; with no bit at all after a reset.
    fn negotiated(&mut self, features: Features);

    /// Its half for the transmit queue of a pair; called once for each.
    fn sender(&mut self, pair: u16) -> Self::Sender;

    /// Its half for the receive queue of a pair; called once for each.
    fn receiver(&mut self, pair: u16) -> Self::Receiver;

    /// The receive queue of a pair can be filled by any thread.
    fn opened(&mut self, _pair: u16, _inlet: &Arc<Inlet<GuestRam>>) {}

    /// Changes how many pairs are used, from any thread.
    fn spreader(&self) -> Spreader {
        Arc::new(|_| {})
    }
}

/// Told how many queue pairs are used.
pub type Spreader = Arc<dyn Fn(u16) + Send + Sync>;

/// The sending half of a link for one queue.
pub trait Sender: Send + 'static {
    /// What it has at hand while frames that came together go out.
    type Turn<'a>: Outgoing
    where
        Self: 'a;

    /// Frames are about to come. Dropping the result says that there are no more for the moment.
    fn turn(&mut self) -> Self::Turn<'_>;

    /// A descriptor without whose being writable no frame can be taken now.
    fn blocked(&mut self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Frames that come in a stream may wait for a moment, see [`QueueHandler::nap`](atoll_kit::QueueHandler::nap).
    fn naps(&self) -> bool {
        false
    }

    /// Where this queue's thread waits for frames for the guest, when it is the one to fetch them.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Frames have been sent, to which there may be an answer already, or its source was found `readable`: puts what
    /// there is into the guest's buffers.
    fn fetch(&mut self, _face: &Face, _readable: bool) -> Fetched {
        Fetched::default()
    }
}

/// Takes frames that come together.
pub trait Outgoing {
    /// Takes a frame. False when it was dropped.
    fn send<M: GuestMemory>(&mut self, face: &Face, frame: &Frame<'_, M>) -> bool;

    /// No frame can be taken now, see [`Sender::blocked`].
    fn is_blocked(&mut self) -> bool {
        false
    }
}

/// The receiving half of a link for one queue.
pub trait Receiver: Send + 'static {
    /// Puts frames into the guest's buffers, and says what to wait for.
    fn receive<M: GuestMemory>(&mut self, face: &Face, buffers: &mut Buffers<'_, M>) -> Wait;

    /// The descriptor that frames come from.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The ring has stopped: what was begun is forgotten.
    fn stopped(&mut self) {}

    /// What lies there was sent while the cable was out: it is thrown away.
    fn discard(&mut self) {}
}
