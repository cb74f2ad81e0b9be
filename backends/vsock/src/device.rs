//! The device and its three queues (virtio 1.2, 5.10.2): receive, transmit, events.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_kit::chain::Chain;
use atoll_kit::device::{Io, Wait};
use atoll_kit::inlet::Buffers;
use atoll_kit::program::StartError;
use atoll_kit::{ConfigError, Device, Progress, QueueHandler, QueueLayout};
use vm_memory::GuestMemory;

use crate::connection::ROOM;
use crate::header::{Header, LEN, Op};
use crate::hub::Hub;

const QUEUE_SIZE_MAX: u16 = 256;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const TRANSPORT_RESET: u32 = 0;
/// Packets before the conversation has its turn.
const BURST: usize = 256;

/// The device.
pub(crate) struct Vsock {
    hub: Arc<Mutex<Hub>>,
    cid: u64,
    source: Arc<OwnedFd>,
}

impl Vsock {
    pub(crate) fn new(hub: Hub) -> Result<Self, StartError> {
        let (cid, source) = (hub.cid(), Arc::new(hub.source()?));
        Ok(Self { hub: Arc::new(Mutex::new(hub)), cid, source })
    }
}

fn lock(hub: &Mutex<Hub>) -> MutexGuard<'_, Hub> {
    hub.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device for Vsock {
    type Queue = Queue;

    fn layout(&self) -> QueueLayout {
        QueueLayout { queues: 3, size_max: QUEUE_SIZE_MAX }
    }
    fn features(&self) -> u64 {
        // No bit at all: streams (virtio 1.2, 5.10.3).
        0
    }
    fn features_acked(&mut self, _features: u64) {}
    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let cid = self.cid.to_le_bytes();
        for (to, at) in out.iter_mut().zip(offset as usize..) {
            *to = cid.get(at).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u32, _data: &[u8]) -> Result<(), ConfigError> {
        Err(ConfigError { offset })
    }
    fn reset(&mut self) {
        lock(&self.hub).reset();
    }
    fn queue(&mut self, index: u16) -> Queue {
        let hub = Arc::clone(&self.hub);
        match index {
            0 => Queue::Receive { hub, source: Arc::clone(&self.source), packet: Vec::new() },
            1 => Queue::Transmit { hub, data: Vec::new() },
            // Whoever was served before, by another process, has lost its connections.
            _ => Queue::Events { owed: true },
        }
    }
}

/// A queue.
pub(crate) enum Queue {
    Receive { hub: Arc<Mutex<Hub>>, source: Arc<OwnedFd>, packet: Vec<u8> },
    Transmit { hub: Arc<Mutex<Hub>>, data: Vec<u8> },
    Events { owed: bool },
}

impl QueueHandler for Queue {
    fn opcodes(&self) -> &'static [u8] {
        &[]
    }
    fn started(&mut self, _size: u16) {}
    fn stopped(&mut self) {}

    fn request<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, chain: &Chain) -> Progress {
        let Self::Transmit { hub, data } = self else { return Progress::Done { written: 0 } };
        let said = chain.readable();
        let mut bytes = [0; LEN];
        let header = said.read_at(mem, 0, &mut bytes).ok().map(|()| Header::decode(&bytes));
        let whole = header.filter(|header| {
            let len = if header.op == Op::Data { u64::from(header.len) } else { 0 };
            // More than there is room for breaks a promise: nothing of it is read, and the connection ends.
            let read = len.min(u64::from(ROOM) + 1);
            data.resize(read as usize, 0);
            len + LEN as u64 <= said.bytes() && said.read_at(mem, LEN as u64, data).is_ok()
        });
        match whole {
            Some(header) => {
                lock(hub).hear(&header, data);
                io.figures().written(data.len() as u64);
            }
            None => io.figures().failed(),
        }
        Progress::Done { written: 0 }
    }
    fn completion<M: GuestMemory>(&mut self, _io: &mut Io<'_>, _mem: &M, _head: u16, _result: i32) -> Progress {
        Progress::Done { written: 0 }
    }

    fn is_inlet(&self) -> bool {
        !matches!(self, Self::Transmit { .. })
    }
    fn fill<M: GuestMemory>(&mut self, buffers: &mut Buffers<'_, M>) -> Wait {
        match self {
            Self::Receive { hub, packet, .. } => receive(&mut lock(hub), packet, buffers),
            Self::Events { owed } => {
                if *owed {
                    let event = TRANSPORT_RESET.to_le_bytes();
                    if !buffers.gather(event.len() as u64, 1, event.len() as u64) {
                        return Wait::Buffers;
                    }
                    let written = buffers.write(1, 0, &event).is_ok();
                    buffers.finish(1, if written { event.len() as u64 } else { 0 });
                    *owed = false;
                }
                Wait::Nothing
            }
            Self::Transmit { .. } => Wait::Nothing,
        }
    }
    fn source(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Receive { source, .. } => Some(source.as_fd()),
            Self::Transmit { .. } | Self::Events { .. } => None,
        }
    }
}

fn receive<M: GuestMemory>(hub: &mut Hub, packet: &mut Vec<u8>, buffers: &mut Buffers<'_, M>) -> Wait {
    for _ in 0..BURST {
        if !hub.look() {
            return Wait::Source;
        }
        if !buffers.gather(1, 1, LEN as u64) {
            return Wait::Buffers;
        }
        let room = buffers.room(1).map_or(0, |(_, room)| room.bytes());
        hub.next(usize::try_from(room).unwrap_or(usize::MAX), packet);
        if !packet.is_empty() {
            let written = buffers.write(1, 0, packet).is_ok();
            buffers.finish(1, if written { packet.len() as u64 } else { 0 });
        }
    }
    Wait::Again
}
