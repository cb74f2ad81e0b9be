//! A learning switch between the cards of one process: each card is a port.
//!
//! The thread of the sender's queue does everything: it finds the port, enters that port's receive queue and copies the
//! frame from one guest's memory to the other's. A port whose guest has no buffers loses the frame, and nobody waits for
//! it. Guests hear of what they got once per turn of the sender.
//!
//! Frames that come together mostly go to the same place. During a turn, which is a few dozen frames, the sender stays in
//! the receive queue that it entered last, and remembers where the last address was found. It never holds two queues, so
//! senders wait for each other a turn at most, and not in a circle.
//!
//! Each port agrees on its own with its driver about checksums and segments. A receiver that does not take what the
//! sender left undone gets it done in software, see [`offload`].

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use atoll_kit::Wait;
use atoll_kit::inlet::{Buffers, Inlet};
use atoll_kit::memory::GuestRam;
use vm_memory::GuestMemory;

use super::table::Table;
use super::{Link, Outgoing, Receiver, Sender};
use crate::face::{Face, dropped};
use crate::filter::is_group;
use crate::frame::{Frame, Takes, mac, pass, put};
use crate::header::{Features, Header, Offloads, Work};
use crate::offload;

/// Bytes of a frame that tell its flow: headers up to the ports.
const FLOW_BYTES: u64 = 74;

/// What a port's queues look like to the other ports.
#[derive(Debug)]
struct Side {
    face: Arc<Face>,
    inlets: Vec<OnceLock<Arc<Inlet<GuestRam>>>>,
}

/// A switch.
#[derive(Debug)]
pub struct Switch {
    sides: Vec<Side>,
    table: Table,
    begun: Instant,
}

impl Switch {
    /// A switch with these cards as ports.
    pub fn new(faces: &[Arc<Face>]) -> Arc<Self> {
        let side = |face: &Arc<Face>| Side {
            face: Arc::clone(face),
            inlets: (0..face.pairs_max).map(|_| OnceLock::new()).collect(),
        };
        Arc::new(Self {
            sides: faces.iter().map(side).collect(),
            table: Table::new(faces.len()),
            begun: Instant::now(),
        })
    }

    /// The link of a port.
    pub fn port(self: &Arc<Self>, port: usize) -> Port {
        Port { switch: Arc::clone(self), port }
    }

    fn inlet(&self, port: usize, pair: usize) -> Option<&Arc<Inlet<GuestRam>>> {
        self.sides.get(port)?.inlets.get(pair)?.get()
    }

    fn now_s(&self) -> u32 {
        self.begun.elapsed().as_secs().try_into().unwrap_or(u32::MAX)
    }
}

/// A port: what one card is plugged into.
#[derive(Debug)]
pub struct Port {
    switch: Arc<Switch>,
    port: usize,
}

impl Link for Port {
    type Sender = PortSender;
    type Receiver = PortReceiver;

    fn offers(&self) -> Offloads {
        Offloads::ALL
    }

    fn negotiated(&mut self, features: Features) {
        // A port that is left is known by nobody.
        if features == Features::default() {
            self.switch.table.forget(self.port);
        }
    }

    fn sender(&mut self, _pair: u16) -> PortSender {
        PortSender { switch: Arc::clone(&self.switch), port: self.port, bytes: Vec::new(), touched: Vec::new() }
    }

    fn receiver(&mut self, _pair: u16) -> PortReceiver {
        PortReceiver
    }

    fn opened(&mut self, pair: u16, inlet: &Arc<Inlet<GuestRam>>) {
        let side = self.switch.sides.get(self.port);
        if let Some(cell) = side.and_then(|side| side.inlets.get(usize::from(pair))) {
            let _ = cell.set(Arc::clone(inlet));
        }
    }
}

/// Other ports' threads fill the queue.
#[derive(Debug)]
pub struct PortReceiver;

impl Receiver for PortReceiver {
    fn receive<M: GuestMemory>(&mut self, _face: &Face, _buffers: &mut Buffers<'_, M>) -> Wait {
        Wait::Nothing
    }
}

/// One transmit queue of a port.
#[derive(Debug)]
pub struct PortSender {
    switch: Arc<Switch>,
    port: usize,
    /// A frame that something must be done to.
    bytes: Vec<u8>,
    /// Receive queues (port, pair) whose guests have not heard yet.
    touched: Vec<(usize, usize)>,
}

impl Sender for PortSender {
    type Turn<'a> = PortTurn<'a>;

    fn turn(&mut self) -> PortTurn<'_> {
        let switch = &*self.switch;
        let (bytes, touched) = (&mut self.bytes, &mut self.touched);
        let now_s = switch.now_s();
        PortTurn { switch, port: self.port, now_s, bytes, touched, learned: None, found: None, inside: None }
    }
}

/// Frames of a port that came together.
#[derive(Debug)]
pub struct PortTurn<'a> {
    switch: &'a Switch,
    port: usize,
    now_s: u32,
    bytes: &'a mut Vec<u8>,
    touched: &'a mut Vec<(usize, usize)>,
    /// The source address that was learned last.
    learned: Option<u64>,
    /// The address that was looked up last, and the port behind which it is.
    found: Option<(u64, Option<usize>)>,
    inside: Option<Inside<'a>>,
}

/// A receive queue that was entered.
#[derive(Debug)]
struct Inside<'a> {
    port: usize,
    /// The queue pair that was looked for, and the one that was found.
    wanted: usize,
    pair: usize,
    takes: Takes,
    buffers: Buffers<'a, GuestRam>,
}

impl Outgoing for PortTurn<'_> {
    #[inline]
    fn send<M: GuestMemory>(&mut self, _face: &Face, frame: &Frame<'_, M>) -> bool {
        let (from, to) = (frame.start.from(), frame.start.to());
        if self.learned != Some(from) {
            self.switch.table.learn(&mac(from), self.port, self.now_s);
            self.learned = Some(from);
        }
        let known = match self.found {
            Some((last, known)) if last == to => known,
            _ => {
                let address = mac(to);
                let known = if is_group(&address) { None } else { self.switch.table.find(&address, self.now_s) };
                self.found = Some((to, known));
                known
            }
        };
        match known {
            // It is behind the port that it came from.
            Some(port) if port == self.port => {}
            Some(port) => self.give(port, frame),
            None => {
                let own = self.port;
                (0..self.switch.sides.len()).filter(|port| *port != own).for_each(|port| self.give(port, frame));
            }
        }
        // What a receiver does not take is counted there.
        true
    }
}

impl Drop for PortTurn<'_> {
    fn drop(&mut self) {
        self.inside = None;
        for (port, pair) in self.touched.drain(..) {
            if let Some(inlet) = self.switch.inlet(port, pair) {
                inlet.announce();
            }
        }
    }
}

impl<'a> PortTurn<'a> {
    /// Gives a frame to one port, if somebody uses it and wants the frame and has room for it.
    #[inline]
    fn give<M: GuestMemory>(&mut self, port: usize, frame: &Frame<'_, M>) {
        let switch = self.switch;
        let Some(Side { face, .. }) = switch.sides.get(port) else { return };
        if !face.filter.accepts_all() && !face.filter.accepts(&mac(frame.start.to())) {
            return;
        }
        let wanted = self.pair(face, frame);
        if self.inside.as_ref().is_none_or(|inside| (inside.port, inside.wanted) != (port, wanted)) {
            self.enter(port, wanted);
        }
        let Some(inside) = &mut self.inside else { return };
        let (buffers, takes) = (&mut inside.buffers, inside.takes);
        if face.admit(frame.len).is_err() {
            // It must not hold up the sender, who may have other receivers.
            dropped(buffers.figures(), frame.len);
            return;
        }
        let given = match frame.header.work_for(takes.offloads) {
            Work::Nothing => pass(buffers, takes, frame),
            work => finished(self.bytes, frame, work, |bytes| put(buffers, takes, &Header::default(), bytes)),
        };
        if !given {
            dropped(buffers.figures(), frame.len);
        } else if !face.captures.received.is_empty() && frame.copy_out(self.bytes, frame.len).is_ok() {
            face.captures.received.iter().for_each(|capture| capture.frame(self.bytes));
        }
    }

    /// Leaves the queue that was entered last and enters another; its guest hears of what it got at the end of the turn.
    fn enter(&mut self, port: usize, wanted: usize) {
        if let Some(left) = self.inside.take() {
            let touched = (left.port, left.pair);
            left.buffers.leave();
            if !self.touched.contains(&touched) {
                self.touched.push(touched);
            }
        }
        let switch = self.switch;
        let entered = [wanted, 0].into_iter().find_map(|pair| Some((pair, switch.inlet(port, pair)?.enter()?)));
        let takes = switch.sides.get(port).map(|side| Takes::of(&side.face));
        self.inside = entered.zip(takes).map(|((pair, buffers), takes)| Inside { port, wanted, pair, takes, buffers });
    }

    /// The queue pair of a port for a frame: always the same one for a flow, in which order matters.
    #[inline]
    fn pair<M: GuestMemory>(&mut self, face: &Face, frame: &Frame<'_, M>) -> usize {
        let pairs = u32::from(face.active_pairs());
        if pairs < 2 || frame.copy_out(self.bytes, FLOW_BYTES).is_err() {
            return 0;
        }
        (offload::flow(self.bytes) % pairs) as usize
    }
}

/// Does what the sender left undone and hands what results to `put`.
fn finished<M: GuestMemory>(
    bytes: &mut Vec<u8>,
    frame: &Frame<'_, M>,
    work: Work,
    mut put: impl FnMut(&[u8]) -> bool,
) -> bool {
    if frame.copy_out(bytes, frame.len).is_err() {
        return true;
    }
    if work == Work::Checksum {
        return offload::complete(bytes, &frame.header).is_none() || put(bytes);
    }
    let mut all = true;
    offload::segment(bytes, &frame.header, |segment| {
        all = put(segment);
        all
    });
    all
}
