//! What a card does on the threads of its queues: take frames from the guest, put frames into its buffers, and obey the
//! control queue.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use atoll_kit::chain::Chain;
use atoll_kit::device::Io;
use atoll_kit::inlet::Buffers;
use atoll_kit::limit::Cost;
use atoll_kit::{Progress, QueueHandler, Wait};
use vm_memory::GuestMemory;

use crate::control::{self, Command};
use crate::face::{Face, dropped};
use crate::frame::{Frame, SHORT_MAX};
use crate::header::{ETHERNET_BYTES, FRAME_MAX, HEADER_BYTES, Header, Offloads};
use crate::link::{Link, Receiver, Sender, Spreader};

/// Place of this counter in `class_counters` for network cards.
const CONTROL_COMMANDS: usize = 2;

/// The queues of a card on a link `L`.
pub enum NetQueue<L: Link> {
    /// Frames for the guest.
    Receive(Receive<L>),
    /// Frames of the guest.
    Transmit(Transmit<L>),
    /// Commands.
    Control(Control),
}

/// A receive queue.
pub struct Receive<L: Link> {
    /// What the card knows.
    pub face: Arc<Face>,
    /// Which pair.
    pub pair: u16,
    /// The link's half.
    pub receiver: L::Receiver,
    /// For drivers that have their control queue here.
    pub control: Control,
}

/// A transmit queue.
pub struct Transmit<L: Link> {
    /// What the card knows.
    pub face: Arc<Face>,
    /// Which pair.
    pub pair: u16,
    /// The link's half.
    pub sender: L::Sender,
    /// Told when the driver turns out to use more pairs.
    pub spreader: Spreader,
    /// For captures.
    pub copy: Vec<u8>,
}

/// The control queue.
#[derive(Clone)]
pub struct Control {
    /// What the card knows.
    pub face: Arc<Face>,
    /// Told how many pairs the driver uses.
    pub spreader: Spreader,
}

impl Control {
    fn serve<M: GuestMemory>(&self, mem: &M, chain: &Chain) -> u32 {
        let face = &self.face;
        let pairs_max = if face.features().multi_queue() { face.pairs_max } else { 0 };
        control::serve(mem, chain, pairs_max, |command| {
            if let Command::Pairs(pairs) = command {
                face.use_pairs(pairs);
                (self.spreader)(pairs);
            }
            face.filter.change(|rules| command.apply(rules));
            Ok(())
        })
    }
}

impl<L: Link> Receive<L> {
    /// Without multi-queue the control queue is the third one, whatever the card has: there is a receive queue otherwise.
    fn is_control(&self) -> bool {
        self.pair == 1 && !self.face.features().multi_queue()
    }

    fn fill<M: GuestMemory>(&mut self, buffers: &mut Buffers<'_, M>) -> Wait {
        if !self.is_control() {
            let wait = self.receiver.receive(&self.face, buffers);
            self.face.captures.received.iter().for_each(|capture| capture.flush());
            return wait;
        }
        // A few, and then the conversation's turn.
        for _ in 0..64 {
            let Some((mem, chain)) = buffers.take_one() else { return Wait::Buffers };
            let written = self.control.serve(mem, chain);
            buffers.finish(1, u64::from(written));
            buffers.figures().class(CONTROL_COMMANDS, 1);
        }
        Wait::Again
    }
}

impl<L: Link> Transmit<L> {
    fn send<M: GuestMemory>(&mut self, io: &Io<'_>, mem: &M, chain: &Chain) {
        let face = &*self.face;
        if face.saw_pair(self.pair) {
            (self.spreader)(face.active_pairs());
        }
        let mut first = [0; HEADER_BYTES + SHORT_MAX];
        let Some(frame) = frame(face, mem, chain, &mut first) else {
            io.figures().failed();
            return;
        };
        if !face.captures.sent.is_empty() && frame.copy_out(&mut self.copy, frame.len).is_ok() {
            face.captures.sent.iter().for_each(|capture| capture.frame(&self.copy));
        }
        let len = frame.len;
        if self.sender.send(face, &frame) {
            io.figures().written(len);
        } else {
            dropped(io.figures(), len);
        }
    }
}

/// Reads what a driver sends; none when it makes no sense.
fn frame<'a, M: GuestMemory>(
    face: &Face,
    mem: &'a M,
    chain: &'a Chain,
    first: &'a mut [u8; HEADER_BYTES + SHORT_MAX],
) -> Option<Frame<'a, M>> {
    let features = face.features();
    let head = features.header_bytes();
    let chain = chain.readable();
    let len = chain.bytes().checked_sub(head)?;
    if !(ETHERNET_BYTES as u64..=FRAME_MAX as u64).contains(&len) {
        return None;
    }
    let is_short = len <= SHORT_MAX as u64;
    let first = first.get_mut(..head as usize + if is_short { len as usize } else { ETHERNET_BYTES })?;
    chain.read_at(mem, 0, first).ok()?;
    let (header, bytes) = first.split_at_checked(head as usize)?;
    let start = bytes.first_chunk()?;
    let header = Header::parse(header).check(Offloads::from_driver(features), len).ok()?;
    Some(Frame { mem, chain, at: head, len, header, start: *start, short: is_short.then_some(bytes) })
}

impl<L: Link> QueueHandler for NetQueue<L> {
    fn opcodes(&self) -> &'static [u8] {
        &[]
    }

    fn started(&mut self, _size: u16) {}

    fn stopped(&mut self) {
        if let Self::Receive(receive) = self {
            receive.receiver.stopped();
        }
    }

    fn request<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, chain: &Chain) -> Progress {
        let written = match self {
            Self::Receive(_) => 0,
            Self::Transmit(transmit) => {
                transmit.send(io, mem, chain);
                0
            }
            Self::Control(control) => {
                io.figures().class(CONTROL_COMMANDS, 1);
                control.serve(mem, chain)
            }
        };
        Progress::Done { written }
    }

    fn completion<M: GuestMemory>(&mut self, _io: &mut Io<'_>, _mem: &M, _head: u16, _result: i32) -> Progress {
        Progress::Done { written: 0 }
    }

    fn cost(&self, chain: &Chain) -> Cost {
        // As frames count for the guest: without headers.
        let bytes = chain.readable().bytes().saturating_sub(HEADER_BYTES as u64);
        Cost { bytes, operations: 1 }
    }

    fn batch_ended(&mut self) {
        if let Self::Transmit(transmit) = self {
            transmit.sender.flush();
            transmit.face.captures.sent.iter().for_each(|capture| capture.flush());
        }
    }

    fn blocked(&mut self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Transmit(transmit) => transmit.sender.blocked(),
            _ => None,
        }
    }

    fn discards_when_disabled(&self) -> bool {
        matches!(self, Self::Transmit(_))
    }

    fn is_inlet(&self) -> bool {
        matches!(self, Self::Receive(_))
    }

    fn fill<M: GuestMemory>(&mut self, buffers: &mut Buffers<'_, M>) -> Wait {
        match self {
            Self::Receive(receive) => receive.fill(buffers),
            _ => Wait::Nothing,
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Receive(receive) => receive.receiver.source(),
            _ => None,
        }
    }
}
