//! What a device process brings to the kit.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::squeue;
use thiserror::Error;
use vm_memory::GuestMemory;

use crate::back_channel::BackChannel;
use crate::chain::Chain;
use crate::device_state::StateError;
use crate::inlet::{Buffers, Inlet};
use crate::limit::{Cost, Limiter};
use crate::memory::GuestRam;
use crate::queue_thread::device_tag;
use crate::requests::Requests;
use crate::stats::Figures;
use crate::uring::{Uring, UringError};

/// How many queues a device has and how long they may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLayout {
    /// Queues, at least one.
    pub queues: u16,
    /// Most entries of one queue, a power of two.
    pub size_max: u16,
}

/// A write to the configuration space that the device refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the device has no writable configuration field at offset {offset}")]
pub struct ConfigError {
    /// Where the write went.
    pub offset: u32,
}

/// The part of a device that its queues share. The conversation with the front end calls it.
pub trait Device: Send + 'static {
    /// Runs the device's queues, one value per queue thread.
    type Queue: QueueHandler;

    /// Queues of this device.
    fn layout(&self) -> QueueLayout;

    /// Device-specific feature bits; the kit adds those of the ring and of the transport.
    fn features(&self) -> u64;

    /// The driver has chosen `features` (SET_FEATURES). May come while queues run.
    fn features_acked(&mut self, features: u64);

    /// Fills `out` from the configuration space at `offset`; beyond its end there are zeroes.
    fn read_config(&self, offset: u32, out: &mut [u8]);

    /// The driver writes the configuration space.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), ConfigError>;

    /// Back to the state of a device that no driver has touched.
    fn reset(&mut self);

    /// The front end has gone, without a word or because this process ends: what it shared is given up. The next one finds a
    /// device that no driver has touched, unless what the driver did is kept for a successor elsewhere.
    fn left(&mut self) {
        self.reset();
    }

    /// Its front end may hand over the socket of a display (GPU_SET_SOCKET).
    fn has_display(&self) -> bool {
        false
    }

    /// The socket of a display, in place of one that was handed over before; none when the front end has gone. For a device
    /// that has a display only.
    fn display(&mut self, _socket: Option<OwnedFd>) {}

    /// What the device stands on may have another size: looks, shows it in the configuration space from now on, and
    /// says how many bytes it is. None for a device without a size.
    fn measure(&mut self) -> Option<u64> {
        None
    }

    /// Appends what the device knows and its rings do not say to `state`, each value in its envelope
    /// ([`atoll_protocol::saved`]). Its rings are stopped.
    ///
    /// # Errors
    /// When it cannot be written down.
    fn save(&self, state: Vec<u8>) -> Result<Vec<u8>, StateError> {
        Ok(state)
    }

    /// Takes what a predecessor has said so, which may be of an older build and is hostile input; gives what is left.
    ///
    /// # Errors
    /// When it is not what this device can go on from; then nothing has changed.
    fn restore<'a>(&mut self, state: &'a [u8]) -> Result<&'a [u8], StateError> {
        Ok(state)
    }

    /// How to tell the front end that the configuration space has changed, for a device that changes it by itself. Called
    /// once, before any front end.
    fn back_channel(&mut self, _channel: &BackChannel) {}

    /// What limits the rate at which queue `index` takes requests; queues may share it. Queues that are filled from
    /// outside mind their limits themselves, see [`Wait::Until`].
    fn limiter(&self, _index: u16) -> Option<Arc<Limiter>> {
        None
    }

    /// The handler of queue `index`; called once for each, before any front end.
    fn queue(&mut self, index: u16) -> Self::Queue;

    /// Queue `index`, whose handler fills it from outside, can be entered from now on, by any thread. Called once for
    /// each, after [`Device::queue`].
    fn opened(&mut self, _index: u16, _inlet: &Arc<Inlet<GuestRam>>) {}
}

/// How far a request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It is finished; this many bytes of its writable part were written.
    Done {
        /// Bytes for the used ring.
        written: u32,
    },
    /// An operation that was pushed to [`Io`] will continue it.
    Pending,
}

/// What came of [`QueueHandler::sourced`].
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// The guest has been interrupted for another queue, and its driver sees then what this one has finished: whether it
    /// wants an interrupt for that, too, is asked a little later.
    pub tells_guest: bool,
    /// There is more, to be fetched after the conversation has been heard.
    pub more: bool,
}

/// What a queue that is filled from outside waits for, besides the conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Nothing: other threads fill it.
    Nothing,
    /// Buffers of the guest.
    Buffers,
    /// Data on [`QueueHandler::source`].
    Source,
    /// A moment.
    Until(Instant),
    /// Its turn: there is more to do, after the conversation has been heard.
    Again,
}

/// The part of a device that handles the requests of one queue, on the thread of that queue.
pub trait QueueHandler: Send + 'static {
    /// io_uring opcodes that this handler pushes; the ring refuses all others.
    fn opcodes(&self) -> &'static [u8];

    /// What requests point into from now on: said before a ring starts and when memory is exchanged under one that runs, and
    /// nothing is in flight then. For a handler that keeps addresses beyond a request: what it made of the memory before is of
    /// no use from now on, and stays mapped for as long as it holds that.
    fn memory<M: GuestMemory + Send + Sync + 'static>(&mut self, _mem: &Arc<M>) {}

    /// A ring of `size` entries starts.
    fn started(&mut self, size: u16);

    /// Said behind [`QueueHandler::started`]: so many requests (modulo 2^16) were taken from the ring before the next
    /// one, by whomever; and whether somebody, this process or another, has served this driver's ring before, where the front
    /// end keeps a record of requests in flight, which it clears when the driver resets its device. For a device that
    /// completes in order and remembers what it has done.
    fn goes_on_at(&mut self, _taken: u16, _served: Option<bool>) {}

    /// The ring has stopped; nothing is in flight.
    fn stopped(&mut self);

    /// A request has come. Heads of requests in flight are distinct.
    fn request<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, chain: &Chain) -> Progress;

    /// Requests have come: hands each of them to [`QueueHandler::request`]. For a handler that does better with several at
    /// a time.
    fn requests<M: GuestMemory>(&mut self, io: &mut Io<'_>, requests: &mut Requests<'_, M>) {
        while self.blocked().is_none() && requests.advance(|chain| self.cost(chain)) {
            let (mem, chain) = requests.current();
            match self.request(io, mem, chain) {
                Progress::Done { written } => requests.done(written),
                Progress::Pending => requests.pending(),
            }
        }
    }

    /// Every request is finished before the one behind it. Then those that a predecessor took and did not finish are what
    /// the avail ring holds from the used index on, and none has to be recorded while it is in flight.
    fn completes_in_order(&self) -> bool {
        false
    }

    /// How long a driver that waits for its requests in a loop may take to see that they are done: only then it is
    /// interrupted, unless it has seen it. To one that has, an interrupt comes from nowhere; Linux counts those, and after
    /// a hundred thousand it takes the interrupt for broken and switches it off.
    fn grace(&self) -> Duration {
        Duration::ZERO
    }

    /// The operation that was pushed for `head` has ended with `result`, a negated errno on failure.
    fn completion<M: GuestMemory>(&mut self, io: &mut Io<'_>, mem: &M, head: u16, result: i32) -> Progress;

    /// What a request takes from the limits of its queue.
    fn cost(&self, chain: &Chain) -> Cost {
        Cost { bytes: chain.readable_bytes() + chain.writable_bytes(), operations: 1 }
    }

    /// All requests that were there have been handed over, and those that are finished are in the used ring: time for
    /// what is worth doing once for many.
    fn batch_ended(&mut self) {}

    /// A descriptor without whose being writable no request can be taken now.
    fn blocked(&mut self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Once the front end has disabled its ring, requests are thrown away rather than left waiting: what a network
    /// card does with frames (vhost-user, "Ring states").
    fn discards_when_disabled(&self) -> bool {
        false
    }

    /// Requests of this queue are buffers for what comes from outside: they are taken by [`QueueHandler::fill`], or by
    /// other threads, and not handed to [`QueueHandler::request`].
    fn is_inlet(&self) -> bool {
        false
    }

    /// The front end enables its ring again that it had disabled: what came meanwhile is not for the guest.
    fn reopens(&mut self) {}

    /// Fills buffers with what there is, and says what to wait for.
    fn fill<M: GuestMemory>(&mut self, _buffers: &mut Buffers<'_, M>) -> Wait {
        Wait::Nothing
    }

    /// The descriptor that data comes from: for a queue that is filled from outside, and for one whose thread fills
    /// another one ([`QueueHandler::sourced`]).
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// For a queue of requests, after a batch: more will come within a moment, and waiting for so long without being told is
    /// no harm. Being told costs the guest's processor a wake-up of another one, often more than it has to do until its
    /// next request.
    fn nap(&self) -> Option<Duration> {
        None
    }

    /// For a queue of requests: its thread can have something to fetch, because a batch of requests has ended or because
    /// its source was found `readable`. What answers a request at once is fetched by the thread that is awake, and nobody
    /// is woken for it.
    fn sourced(&mut self, _readable: bool) -> Fetched {
        Fetched::default()
    }
}

/// Where a handler puts operations for its ring, and counts what it did.
pub struct Io<'a> {
    uring: &'a mut Uring,
    outstanding: &'a mut u32,
    figures: Figures<'a>,
}

impl<'a> Io<'a> {
    /// Puts operations into `uring` and counts them in `outstanding`.
    pub fn new(uring: &'a mut Uring, outstanding: &'a mut u32, figures: Figures<'a>) -> Self {
        Self { uring, outstanding, figures }
    }

    /// Where the handler says what its requests moved, and how many failed.
    pub fn figures(&self) -> Figures<'a> {
        self.figures
    }

    /// Queues one operation; its end comes back as [`QueueHandler::completion`] of `head`.
    ///
    /// # Safety
    /// What the entry points to must stay valid until that call. Guest memory does: the kit keeps it mapped
    /// while anything is in flight.
    #[allow(unsafe_code, reason = "an entry carries raw pointers")]
    pub unsafe fn push(&mut self, entry: squeue::Entry, head: u16) -> Result<(), UringError> {
        let entry = entry.user_data(device_tag(head));
        // SAFETY: promised by the caller.
        unsafe { self.uring.push(&entry) }?;
        *self.outstanding += 1;
        Ok(())
    }
}
