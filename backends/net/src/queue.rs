//! What a card does on the threads of its queues: take frames from the guest, put frames into its buffers, and obey the
//! control queue.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use atoll_kit::chain::Chain;
use atoll_kit::device::Io;
use atoll_kit::inlet::Buffers;
use atoll_kit::limit::Cost;
use atoll_kit::{Fetched, Progress, QueueHandler, Requests, Wait};
use vm_memory::GuestMemory;

use crate::control::{self, Command};
use crate::face::{Face, dropped};
use crate::frame::{Frame, Sends};
use crate::header::HEADER_BYTES;
use crate::link::{Link, Outgoing, Receiver, Sender, Spreader};

/// Bytes of a turn that belong to a stream.
const STREAM_BYTES: u64 = 16 << 10;
/// How long a sender of a stream rests between two looks. A guest on an emulated processor takes longer for a segment of
/// 64 KiB, and waking this thread for it cost that processor a tenth of its time.
const NAP: Duration = Duration::from_micros(100);

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
    /// The last turn was part of a stream.
    pub streams: bool,
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
            return self.receiver.receive(&self.face, buffers);
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

/// As frames count for the guest: without headers.
fn cost(chain: &Chain) -> Cost {
    Cost { bytes: chain.readable_bytes().saturating_sub(HEADER_BYTES as u64), operations: 1 }
}

impl<L: Link> Transmit<L> {
    fn send<M: GuestMemory>(&mut self, io: &Io<'_>, requests: &mut Requests<'_, M>) {
        let (face, figures) = (&*self.face, io.figures());
        let sends = Sends::by(face.features());
        let mut turn = self.sender.turn();
        let (mut frames, mut bytes) = (0, 0);
        while !turn.is_blocked() && requests.advance(cost) {
            if frames == 0 && face.saw_pair(self.pair) {
                (self.spreader)(face.active_pairs());
            }
            let (mem, chain) = requests.current();
            match Frame::read(sends, mem, chain) {
                Some(frame) => {
                    if !face.captures.sent.is_empty() && frame.copy_out(&mut self.copy, frame.len).is_ok() {
                        face.captures.sent.iter().for_each(|capture| capture.frame(&self.copy));
                    }
                    if turn.send(face, &frame) {
                        frames += 1;
                        bytes += frame.len;
                    } else {
                        dropped(figures, frame.len);
                    }
                }
                None => figures.failed(),
            }
            requests.done(0);
        }
        self.streams = bytes >= STREAM_BYTES;
        figures.written_several(frames, bytes);
    }
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

    fn requests<M: GuestMemory>(&mut self, io: &mut Io<'_>, requests: &mut Requests<'_, M>) {
        if let Self::Transmit(transmit) = self {
            return transmit.send(io, requests);
        }
        while requests.advance(cost) {
            let (mem, chain) = requests.current();
            if let Progress::Done { written } = self.request(io, mem, chain) {
                requests.done(written);
            }
        }
    }

    fn request<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, chain: &Chain) -> Progress {
        let written = match self {
            Self::Control(control) => {
                io.figures().class(CONTROL_COMMANDS, 1);
                control.serve(mem, chain)
            }
            Self::Receive(_) | Self::Transmit(_) => 0,
        };
        Progress::Done { written }
    }

    /// Frames leave and come in the order of their buffers, and commands wait for each other.
    fn completes_in_order(&self) -> bool {
        true
    }

    fn completion<M: GuestMemory>(&mut self, _io: &mut Io<'_>, _mem: &M, _head: u16, _result: i32) -> Progress {
        Progress::Done { written: 0 }
    }

    fn cost(&self, chain: &Chain) -> Cost {
        cost(chain)
    }

    fn batch_ended(&mut self) {
        if let Self::Transmit(transmit) = self {
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

    fn reopens(&mut self) {
        if let Self::Receive(receive) = self {
            receive.receiver.discard();
        }
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
            Self::Transmit(transmit) => transmit.sender.source(),
            Self::Control(_) => None,
        }
    }

    fn nap(&self) -> Option<Duration> {
        match self {
            Self::Transmit(transmit) if transmit.streams && transmit.sender.naps() => Some(NAP),
            _ => None,
        }
    }

    fn sourced(&mut self, readable: bool) -> Fetched {
        match self {
            Self::Transmit(transmit) => transmit.sender.fetch(&transmit.face, readable),
            _ => Fetched::default(),
        }
    }
}
