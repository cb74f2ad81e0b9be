//! A link that leads nowhere: what is sent is gone, and nothing ever comes.

use atoll_kit::Wait;
use atoll_kit::inlet::Buffers;
use vm_memory::GuestMemory;

use super::{Link, Outgoing, Receiver, Sender};
use crate::face::Face;
use crate::frame::Frame;
use crate::header::{Features, Offloads};

/// Nowhere.
#[derive(Debug, Clone, Copy)]
pub struct Nowhere;

impl Link for Nowhere {
    type Sender = Self;
    type Receiver = Self;

    fn offers(&self) -> Offloads {
        Offloads::ALL
    }

    fn negotiated(&mut self, _features: Features) {}

    fn sender(&mut self, _pair: u16) -> Self {
        Self
    }

    fn receiver(&mut self, _pair: u16) -> Self {
        Self
    }
}

impl Sender for Nowhere {
    type Turn<'a> = Self;

    fn turn(&mut self) -> Self {
        *self
    }
}

impl Outgoing for Nowhere {
    fn send<M: GuestMemory>(&mut self, _face: &Face, _frame: &Frame<'_, M>) -> bool {
        true
    }
}

impl Receiver for Nowhere {
    fn receive<M: GuestMemory>(&mut self, _face: &Face, _buffers: &mut Buffers<'_, M>) -> Wait {
        Wait::Nothing
    }
}
