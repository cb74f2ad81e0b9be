//! The device on the kit: configuration space, control queue, cursor queue (virtio 1.2, 5.7).
//!
//! Both queues complete in order. What the control queue has executed is counted in the record, so that a successor, who is
//! handed again what its predecessor did not get to complete, answers those commands as they were answered and executes the
//! rest: a resource that exists already because the very same command made it is no error of the guest's.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use atoll_kit::back_channel::BackChannel;
use atoll_kit::chain::Chain;
use atoll_kit::device::Io;
use atoll_kit::{ConfigError, Device, Progress, QueueHandler, QueueLayout};
use vm_memory::GuestMemory;

use crate::command::{Answer, HEADER_LEN, Header, Refusal, Status};
use crate::display;
use crate::record::Record;
use crate::render::RingRam;
use crate::shared::Shared;
use crate::state::{Begun, Gpu, Wishes};
use crate::virgl::library::Library;
use crate::virgl::thread::Renderer;

/// Entries of a queue at most; the record remembers as many answers.
const QUEUE_SIZE_MAX: u16 = 256;
/// VIRTIO_GPU_F_VIRGL.
const VIRGL: u64 = 1;
/// VIRTIO_GPU_F_EDID.
const EDID: u64 = 1 << 1;
/// Bytes of the configuration space: events to read, events to clear, scanouts, capability sets.
const CONFIG_LEN: usize = 16;
/// Offset of the events to clear.
const CLEAR_AT: usize = 4;
/// VIRTIO_GPU_CMD_GET_DISPLAY_INFO, before which the screen is asked.
const GET_DISPLAY_INFO: u32 = 0x0100;

/// The device.
pub struct GpuDevice {
    shared: Arc<Shared>,
    /// The record is a supervisor's, for whom it is kept when the front end goes.
    kept: bool,
    /// 3D is served.
    virgl: bool,
    /// What will draw it, before its thread is started.
    library: Option<Library>,
}

impl GpuDevice {
    /// A device whose state is in `record`, which outlives this process if it is `kept`.
    ///
    /// # Errors
    /// Without descriptors.
    pub fn new(record: Record, kept: bool, wishes: &Wishes) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(Gpu::new(record, wishes))?);
        Ok(Self { shared, kept, virgl: false, library: None })
    }

    /// The same with 3D.
    #[must_use]
    pub fn with_virgl(self, library: Library) -> Self {
        Self { virgl: true, library: Some(library), ..self }
    }

    /// Starts the renderer, once the process has left what it must not reach, and before it can make no more threads.
    fn start_renderer(&mut self) {
        let Some(library) = self.library.take() else { return };
        match Renderer::start(library) {
            Ok(renderer) => self.shared.lock().gpu.serve(Arc::new(renderer)),
            Err(error) => {
                tracing::error!(%error, "3D cannot be served");
                std::process::exit(1);
            }
        }
    }
}

impl Device for GpuDevice {
    type Queue = Queue;

    fn layout(&self) -> QueueLayout {
        QueueLayout { queues: 2, size_max: QUEUE_SIZE_MAX }
    }
    fn features(&self) -> u64 {
        if self.virgl { EDID | VIRGL } else { EDID }
    }
    fn features_acked(&mut self, features: u64) {
        self.shared.lock().gpu.agree(features & VIRGL != 0);
    }
    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let words = {
            let gpu = &self.shared.lock().gpu;
            [gpu.events(), 0, gpu.scanouts() as u32, gpu.capsets() as u32]
        };
        let bytes = words.map(u32::to_le_bytes);
        let config = bytes.as_flattened();
        for (to, at) in out.iter_mut().zip(offset as usize..) {
            *to = config.get(at).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        let start = offset as usize;
        // QEMU writes the whole of it; what is not the one field that can be written stays as it is.
        if start.checked_add(data.len()).is_none_or(|end| end > CONFIG_LEN) {
            return Err(ConfigError { offset });
        }
        let cleared = CLEAR_AT.checked_sub(start).and_then(|at| data.get(at..)?.first_chunk::<4>());
        if let Some(cleared) = cleared {
            self.shared.lock().gpu.clear_events(u32::from_le_bytes(*cleared));
        }
        Ok(())
    }
    fn reset(&mut self) {
        let mut desk = self.shared.lock();
        desk.gpu.reset();
        self.shared.has_changed(&mut desk);
    }
    fn left(&mut self) {
        if !self.kept {
            self.reset();
        }
    }
    fn has_display(&self) -> bool {
        true
    }
    fn display(&mut self, socket: Option<OwnedFd>) {
        self.shared.hand_over(socket);
    }
    fn back_channel(&mut self, channel: &BackChannel) {
        if let Err(error) = display::start(Arc::clone(&self.shared), channel.clone()) {
            tracing::error!(%error, "there is no thread for the screen: nothing will be shown");
        }
    }
    fn queue(&mut self, index: u16) -> Queue {
        self.start_renderer();
        let shared = Arc::clone(&self.shared);
        Queue { shared, is_control: index == 0, position: 0, executed: 0, begun: false, continues: false }
    }
}

/// A queue.
pub struct Queue {
    shared: Arc<Shared>,
    is_control: bool,
    /// Of the next request, counted over the life of the ring.
    position: u16,
    /// So many of those that come were executed by a predecessor.
    executed: u16,
    /// It had begun the one behind them.
    begun: bool,
    /// The ring that starts is one that a predecessor served.
    continues: bool,
}

impl Queue {
    fn control<M: GuestMemory>(&mut self, io: &Io<'_>, mem: &M, chain: &Chain) -> u32 {
        let (position, said) = (self.position, chain.readable());
        self.position = position.wrapping_add(1);
        let mut desk = self.shared.lock();
        let replayed = self.executed > 0;
        if replayed {
            self.executed -= 1;
            if let Some(status) = Status::from_number(desk.gpu.record().answer(position)) {
                drop(desk);
                return answer(mem, chain, &header(mem, chain), &Answer::Status(status));
            }
            // It only asked, and asks again.
        }
        if header(mem, chain).kind == GET_DISPLAY_INFO {
            desk = self.shared.ask(desk);
        }
        // The first one after those was under way.
        let again = !replayed && std::mem::take(&mut self.begun);
        if !replayed {
            desk.gpu.record().begin(position);
        }
        let done = match desk.gpu.begin(mem, said, again) {
            Begun::Done(done) => done,
            // What may take long is done without the lock: others want to know the configuration, or where the cursor is.
            Begun::Job(mut job) => {
                drop(desk);
                job.run();
                desk = self.shared.lock();
                desk.gpu.end(job)
            }
        };
        if !replayed {
            desk.gpu.record().end(position, done.answer.kind());
        }
        self.shared.has_changed(&mut desk);
        drop(desk);
        match &done.answer {
            Answer::Status(status) if *status != Status::Ok => io.figures().failed(),
            _ => io.figures().written(done.read),
        }
        answer(mem, chain, &done.header, &done.answer)
    }

    fn cursor<M: GuestMemory>(&self, io: &Io<'_>, mem: &M, chain: &Chain) -> u32 {
        let mut desk = self.shared.lock();
        let done = match desk.gpu.begin_cursor(mem, chain.readable()) {
            Ok(Some(mut reading)) => {
                drop(desk);
                reading.job.run();
                desk = self.shared.lock();
                desk.gpu.end_cursor(reading)
            }
            Ok(None) => Ok(()),
            Err(refusal) => Err(refusal),
        };
        self.shared.has_changed(&mut desk);
        drop(desk);
        if let Err(refusal) = &done {
            io.figures().failed();
            tracing::debug!(%refusal, "a cursor command is refused");
        }
        // Drivers give no room for an answer; who does gets one.
        let status = done.map_or_else(|refusal: Refusal| refusal.status(), |()| Status::Ok);
        answer(mem, chain, &header(mem, chain), &Answer::Status(status))
    }
}

/// What stands before a command; nothing, when there is not so much.
fn header<M: GuestMemory>(mem: &M, chain: &Chain) -> Header {
    let mut bytes = [0; HEADER_LEN];
    let read = chain.readable().read_at(mem, 0, &mut bytes).is_ok();
    Header::read(&bytes).ok().filter(|_| read).map(|(header, _)| header).unwrap_or_default()
}

/// Writes an answer; the bytes written.
fn answer<M: GuestMemory>(mem: &M, chain: &Chain, asked: &Header, answer: &Answer) -> u32 {
    let bytes = answer.encode(asked, chain.writable_bytes());
    if bytes.is_empty() || chain.writable().write_at(mem, 0, &bytes).is_err() { 0 } else { bytes.len() as u32 }
}

impl QueueHandler for Queue {
    fn opcodes(&self) -> &'static [u8] {
        &[]
    }
    fn completes_in_order(&self) -> bool {
        true
    }
    fn memory<M: GuestMemory + Send + Sync + 'static>(&mut self, mem: &Arc<M>) {
        if self.is_control {
            self.shared.lock().gpu.memory(Arc::new(RingRam(Arc::clone(mem))));
        }
    }
    fn started(&mut self, _size: u16) {
        // Only now is it certain that no other process writes the record.
        let mut desk = self.shared.lock();
        if desk.gpu.load() {
            self.shared.has_changed(&mut desk);
        }
        self.continues = self.is_control && desk.gpu.takes_over();
    }
    fn goes_on_at(&mut self, taken: u16, served: Option<bool>) {
        self.position = taken;
        (self.executed, self.begun) = (0, false);
        let continues = std::mem::take(&mut self.continues);
        let mut desk = self.shared.lock();
        match served {
            // Another driver: the guest was started again, or its device reset, perhaps while there was no process.
            Some(false) if self.is_control => {
                desk.gpu.reset();
                self.shared.has_changed(&mut desk);
            }
            _ if continues => (self.executed, self.begun) = desk.gpu.record().executed_from(taken),
            _ => {}
        }
    }
    fn stopped(&mut self) {}

    fn request<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, chain: &Chain) -> Progress {
        let written = if self.is_control { self.control(io, mem, chain) } else { self.cursor(io, mem, chain) };
        Progress::Done { written }
    }
    fn completion<M: GuestMemory>(&mut self, _io: &mut Io<'_>, _mem: &M, _head: u16, _result: i32) -> Progress {
        Progress::Done { written: 0 }
    }
}
