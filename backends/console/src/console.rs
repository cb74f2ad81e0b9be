//! The device: a pair of queues for each port, and one for messages about them (virtio 1.2, 5.3.6).
//!
//! What comes for the guest is taken from a descriptor when the guest has room for it, one read a buffer: from the host's
//! end of a port, or, for control messages, from a socket pair that this process writes them to. The queue of that pair
//! is then like any other, and what a guest does not fetch is bounded by the socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use atoll_kit::chain::Chain;
use atoll_kit::device::{Io, Wait};
use atoll_kit::inlet::Buffers;
use atoll_kit::program::StartError;
use atoll_kit::{ConfigError, Device, Progress, QueueHandler, QueueLayout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::GuestMemory;

use crate::port::{Input, Port};

/// Most ports: what a driver can tell apart by one character in a name is enough.
pub(crate) const PORTS_MAX: usize = 31;
const QUEUE_SIZE_MAX: u16 = 256;
/// Bytes that are moved at a time.
const CHUNK: usize = 4096;
/// VIRTIO_CONSOLE_F_MULTIPORT.
const MULTIPORT: u64 = 1 << 1;
/// Offset of max_nr_ports in the configuration space.
const MAX_PORTS_AT: usize = 4;

/// Control messages (virtio 1.2, 5.3.6.2).
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
/// Bytes of a message: port, event, value.
const MESSAGE: usize = 8;

/// The console.
pub(crate) struct Console {
    ports: Arc<Vec<Port>>,
    /// Where messages for the guest are put, and where its queue takes them from.
    outbox: Arc<OwnedFd>,
    inbox: Arc<OwnedFd>,
}

impl Console {
    pub(crate) fn new(ports: Vec<Port>) -> Result<Self, StartError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (outbox, inbox) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok(Self { ports: Arc::new(ports), outbox: Arc::new(outbox), inbox: Arc::new(inbox) })
    }
}

impl Device for Console {
    type Queue = Queue;

    fn layout(&self) -> QueueLayout {
        QueueLayout { queues: 2 * (self.ports.len() as u16 + 1), size_max: QUEUE_SIZE_MAX }
    }
    fn features(&self) -> u64 {
        MULTIPORT
    }
    fn features_acked(&mut self, _features: u64) {}
    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let ports = (self.ports.len() as u32).to_le_bytes();
        for (to, at) in out.iter_mut().zip(offset as usize..) {
            *to = at.checked_sub(MAX_PORTS_AT).and_then(|at| ports.get(at)).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u32, _data: &[u8]) -> Result<(), ConfigError> {
        Err(ConfigError { offset })
    }
    fn reset(&mut self) {}
    fn queue(&mut self, index: u16) -> Queue {
        // Ports 0, 1, 2, …: pairs 0, 2, 3, …; control messages have pair 1.
        let port = match index / 2 {
            0 => Some(0),
            1 => None,
            pair => Some(pair - 1),
        };
        let (ports, outbox) = (Arc::clone(&self.ports), Arc::clone(&self.outbox));
        let part = match (port, index % 2) {
            (Some(port), 0) => Part::Input { port, watched: None, ended: false },
            (Some(port), _) => Part::Output { port },
            (None, 0) => Part::Messages { inbox: Arc::clone(&self.inbox) },
            (None, _) => Part::Control { inbox: Arc::clone(&self.inbox) },
        };
        Queue { ports, outbox, part }
    }
}

enum Part {
    /// What the host says on a port; a client is held as long as it is waited for.
    Input { port: u16, watched: Option<Arc<OwnedFd>>, ended: bool },
    /// What the guest says on a port.
    Output { port: u16 },
    /// What the guest is told of the ports.
    Messages { inbox: Arc<OwnedFd> },
    /// What the guest tells of them.
    Control { inbox: Arc<OwnedFd> },
}

/// One queue.
pub(crate) struct Queue {
    ports: Arc<Vec<Port>>,
    outbox: Arc<OwnedFd>,
    part: Part,
}

impl Queue {
    fn port(&self, number: u16) -> Option<&Port> {
        self.ports.get(usize::from(number))
    }

    /// Tells the guest something about a port. A guest that does not listen misses it.
    fn tell(&self, port: u16, event: u16, value: u16, text: &[u8]) {
        let mut message = u32::from(port).to_le_bytes().to_vec();
        message.extend(event.to_le_bytes().into_iter().chain(value.to_le_bytes()).chain(text.iter().copied()));
        if rustix::io::write(&*self.outbox, &message).is_err() {
            tracing::debug!(port, event, "the guest does not take control messages");
        }
    }

    /// Answers a message of the guest.
    fn hear(&self, inbox: &OwnedFd, message: [u8; MESSAGE]) {
        let [a, b, c, d, e, f, ..] = message;
        let (port, event) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]));
        match event {
            DEVICE_READY => {
                // Another driver: what the last one did not fetch is not for this one.
                while rustix::io::read(inbox, &mut [0; CHUNK]).is_ok_and(|count| count > 0) {}
                (0..).zip(self.ports.iter()).for_each(|(port, _)| self.tell(port, PORT_ADD, 1, &[]));
            }
            PORT_READY => {
                let Some((number, port)) = u16::try_from(port).ok().and_then(|port| Some((port, self.port(port)?)))
                else {
                    return;
                };
                if number == 0 {
                    self.tell(number, CONSOLE_PORT, 1, &[]);
                }
                self.tell(number, PORT_NAME, 1, port.name.as_bytes());
                self.tell(number, PORT_OPEN, u16::from(port.is_open()), &[]);
            }
            // Whether a program in the guest has the port open changes nothing here.
            _ => {}
        }
    }
}

impl QueueHandler for Queue {
    fn opcodes(&self) -> &'static [u8] {
        &[]
    }
    fn grace(&self) -> Duration {
        // Linux prints in a loop, with interrupts off, until the buffer comes back.
        match self.part {
            Part::Output { .. } | Part::Control { .. } => Duration::from_millis(10),
            Part::Input { .. } | Part::Messages { .. } => Duration::ZERO,
        }
    }
    fn started(&mut self, _size: u16) {}
    fn stopped(&mut self) {}

    fn request<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, chain: &Chain) -> Progress {
        match &self.part {
            Part::Output { port } => {
                let mut bytes = [0; CHUNK];
                let (mut at, end) = (0, chain.readable().bytes());
                while at < end {
                    let len = (end - at).min(CHUNK as u64) as usize;
                    let Some(chunk) = bytes.get_mut(..len) else { break };
                    if chain.readable().read_at(mem, at, chunk).is_err() {
                        io.figures().failed();
                        break;
                    }
                    at += len as u64;
                    let taken = self.port(*port).map_or(0, |port| port.write(chunk));
                    io.figures().written(taken as u64);
                }
            }
            Part::Control { inbox } => {
                let mut message = [0; MESSAGE];
                match chain.readable().read_at(mem, 0, &mut message) {
                    Ok(()) => self.hear(inbox, message),
                    Err(_) => io.figures().failed(),
                }
            }
            Part::Input { .. } | Part::Messages { .. } => {}
        }
        Progress::Done { written: 0 }
    }
    fn completion<M: GuestMemory>(&mut self, _io: &mut Io<'_>, _mem: &M, _head: u16, _result: i32) -> Progress {
        Progress::Done { written: 0 }
    }

    fn is_inlet(&self) -> bool {
        matches!(self.part, Part::Input { .. } | Part::Messages { .. })
    }
    fn fill<M: GuestMemory>(&mut self, buffers: &mut Buffers<'_, M>) -> Wait {
        let mut bytes = [0; CHUNK];
        // A flood from outside waits its turn behind the conversation.
        for _ in 0..QUEUE_SIZE_MAX {
            if let Part::Input { ended: true, .. } = self.part {
                return Wait::Nothing;
            }
            if !buffers.gather(1, 1, 1) {
                return Wait::Buffers;
            }
            let room = buffers.room(1).map_or(0, |(_, room)| room.bytes()).min(CHUNK as u64) as usize;
            let Some(room) = bytes.get_mut(..room) else { return Wait::Nothing };
            let input = match &self.part {
                Part::Input { port, .. } => self.port(*port).map_or(Input::Ended, |port| port.read(room)),
                Part::Messages { inbox } => match rustix::io::read(&**inbox, &mut *room) {
                    Ok(count) => Input::Bytes(count),
                    Err(_) => Input::Nothing,
                },
                Part::Output { .. } | Part::Control { .. } => Input::Ended,
            };
            match input {
                Input::Bytes(count) => {
                    let written = room.get(..count).is_some_and(|data| buffers.write(1, 0, data).is_ok());
                    let count = if written { count as u64 } else { 0 };
                    buffers.figures().read(count);
                    buffers.finish(1, count);
                }
                Input::Nothing => {
                    self.watch();
                    return Wait::Source;
                }
                Input::Connected(there) => {
                    if let Part::Input { port, .. } = self.part {
                        self.tell(port, PORT_OPEN, u16::from(there), &[]);
                    }
                }
                Input::Ended => {
                    if let Part::Input { ended, .. } = &mut self.part {
                        *ended = true;
                    }
                }
            }
        }
        Wait::Again
    }
    fn source(&self) -> Option<BorrowedFd<'_>> {
        match &self.part {
            Part::Input { watched: Some(client), .. } => Some(client.as_fd()),
            Part::Input { port, watched: None, .. } => self.port(*port)?.listener(),
            Part::Messages { inbox } => Some(inbox.as_fd()),
            Part::Output { .. } | Part::Control { .. } => None,
        }
    }
}

impl Queue {
    /// Holds the descriptor that is waited for now.
    fn watch(&mut self) {
        let ports = Arc::clone(&self.ports);
        if let Part::Input { port, watched, .. } = &mut self.part {
            *watched = ports.get(usize::from(*port)).and_then(Port::source);
        }
    }
}
