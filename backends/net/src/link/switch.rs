//! A learning switch between the cards of one process: each card is a port.
//!
//! The thread of the sender's queue does everything: it finds the port, enters that port's receive queue and copies the
//! frame from one guest's memory to the other's. A port whose guest has no buffers loses the frame, and nobody waits for
//! it. Guests hear of what they got once per batch of the sender.
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
use super::{Link, Receiver, Sender};
use crate::face::{Face, dropped};
use crate::filter::is_group;
use crate::frame::{Frame, pass, put};
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
        PortSender {
            switch: Arc::clone(&self.switch),
            port: self.port,
            now_s: self.switch.now_s(),
            desk: Desk::default(),
        }
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
    now_s: u32,
    desk: Desk,
}

/// What a sender works with.
#[derive(Debug, Default)]
struct Desk {
    /// Receive queues (port, pair) whose guests have not heard yet.
    touched: Vec<(usize, usize)>,
    /// A frame that something must be done to.
    bytes: Vec<u8>,
}

impl Sender for PortSender {
    fn send<M: GuestMemory>(&mut self, _face: &Face, frame: &Frame<'_, M>) -> bool {
        let switch = &*self.switch;
        switch.table.learn(&frame.from(), self.port, self.now_s);
        let to = frame.to();
        let known = if is_group(&to) { None } else { switch.table.find(&to, self.now_s) };
        match known {
            // It is behind the port that it came from.
            Some(port) if port == self.port => {}
            Some(port) => {
                if let Some(side) = switch.sides.get(port) {
                    self.desk.give(port, side, frame);
                }
            }
            None => {
                for (port, side) in switch.sides.iter().enumerate().filter(|(port, _)| *port != self.port) {
                    self.desk.give(port, side, frame);
                }
            }
        }
        // What a receiver does not take is counted there.
        true
    }

    fn flush(&mut self) {
        for (port, pair) in self.desk.touched.drain(..) {
            let side = self.switch.sides.get(port);
            if let Some(inlet) = side.and_then(|side| side.inlets.get(pair)).and_then(OnceLock::get) {
                inlet.announce();
            }
        }
        self.now_s = self.switch.now_s();
    }
}

impl Desk {
    /// Gives a frame to one port, if somebody uses it and wants the frame and has room for it.
    fn give<M: GuestMemory>(&mut self, port: usize, side: &Side, frame: &Frame<'_, M>) {
        if !side.face.filter.accepts(&frame.to()) {
            return;
        }
        let wanted = self.pair(&side.face, frame);
        let entered = [wanted, 0].into_iter().find_map(|pair| Some((pair, side.inlets.get(pair)?.get()?.enter()?)));
        let Some((pair, mut buffers)) = entered else { return };
        let face = &*side.face;
        if face.admit(frame.len).is_err() {
            // It must not hold up the sender, who may have other receivers.
            dropped(buffers.figures(), frame.len);
            return;
        }
        let given = match frame.header.work_for(face.takes()) {
            Work::Nothing => pass(&mut buffers, face, frame),
            work => self.finished(frame, work, |bytes| put(&mut buffers, face, &Header::default(), bytes)),
        };
        if !given {
            dropped(buffers.figures(), frame.len);
        } else if !face.captures.received.is_empty() && frame.copy_out(&mut self.bytes, frame.len).is_ok() {
            face.captures.received.iter().for_each(|capture| capture.frame(&self.bytes));
        }
        buffers.leave();
        let touched = (port, pair);
        if self.touched.last() != Some(&touched) && !self.touched.contains(&touched) {
            self.touched.push(touched);
        }
    }

    /// Does what the sender left undone and hands what results to `put`.
    fn finished<M: GuestMemory>(
        &mut self,
        frame: &Frame<'_, M>,
        work: Work,
        mut put: impl FnMut(&[u8]) -> bool,
    ) -> bool {
        if frame.copy_out(&mut self.bytes, frame.len).is_err() {
            return true;
        }
        if work == Work::Checksum {
            return offload::complete(&mut self.bytes, &frame.header).is_none() || put(&self.bytes);
        }
        let mut all = true;
        offload::segment(&self.bytes, &frame.header, |segment| {
            all = put(segment);
            all
        });
        all
    }

    /// The queue pair of a port for a frame: always the same one for a flow, in which order matters.
    fn pair<M: GuestMemory>(&mut self, face: &Face, frame: &Frame<'_, M>) -> usize {
        let pairs = u32::from(face.active_pairs());
        if pairs < 2 || frame.copy_out(&mut self.bytes, FLOW_BYTES).is_err() {
            return 0;
        }
        (offload::flow(&self.bytes) % pairs) as usize
    }
}
