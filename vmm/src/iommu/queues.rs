//! The two queues of the IOMMU, and the thread that serves them.
//!
//! A request waits for the device processes that it concerns, so nothing else waits for this thread but the guest's own
//! requests and register writes. Rings are the guest's: a broken one is left alone until the driver resets the device.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};

use atoll_devices::Completion;
use atoll_devices::iommu::wire::Request;
use atoll_devices::virtio::{Intent, QueueConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::unit::Unit;
use crate::doorbell::{Doorbell, borrowed, signal, take};
use crate::vhost::{GuestRing, RingFault};

/// The queue of requests.
const REQUESTS: u16 = 0;
/// The queue of faults.
const EVENTS: u16 = 1;

/// What the thread is told.
pub(super) enum Order {
    /// The driver wants something.
    Intent(Intent, Completion),
    /// The machine stands: nothing of the guest's is touched until [`Order::Resume`].
    Pause(SyncSender<()>),
    /// It goes on.
    Resume,
    /// It is over.
    Stop,
}

/// Interrupts the driver for a queue: by its vector, or by the pin where it has none.
pub(super) trait Interrupt: Send {
    /// Queue `index`, with this vector, has used buffers.
    fn used(&self, index: u16, vector: Option<u16>);
}

/// A ring that is being served.
struct Desk {
    ring: GuestRing,
    vector: Option<u16>,
    /// Buffers that were taken and not used yet.
    held: VecDeque<u16>,
}

/// The queues while a driver has them.
pub(super) struct Queues {
    unit: Arc<Unit>,
    memory: Arc<GuestMemoryMmap>,
    interrupt: Box<dyn Interrupt>,
    desks: Vec<Desk>,
}

impl Queues {
    pub(super) fn new(unit: Arc<Unit>, memory: Arc<GuestMemoryMmap>, interrupt: Box<dyn Interrupt>) -> Self {
        Self { unit, memory, interrupt, desks: Vec::new() }
    }

    /// Does what the driver wants; it is done when this returns.
    pub(super) fn intent(&mut self, intent: Intent) {
        match intent {
            Intent::Activate { features, queues, .. } => self.activate(features, &queues),
            Intent::Reset => {
                self.desks.clear();
                let changes = self.unit.with(|iommu| iommu.reset());
                self.unit.settle(changes);
            }
            Intent::ConfigWrite { data, .. } => {
                // The transport lets nothing but `bypass` be written.
                if let [value] = data[..] {
                    let changes = self.unit.with(|iommu| iommu.set_bypass(value));
                    self.unit.settle(changes);
                }
            }
        }
    }

    fn activate(&mut self, features: u64, queues: &[QueueConfig]) {
        self.unit.activate(features);
        let open = |queue: &QueueConfig| match GuestRing::new(&self.memory, queue, features, 0) {
            Ok(ring) => Some(Desk { ring, vector: queue.vector, held: VecDeque::new() }),
            Err(fault) => {
                tracing::warn!(%fault, "a ring of the IOMMU cannot be served");
                None
            }
        };
        self.desks = queues.iter().filter_map(open).collect();
    }

    /// Answers what is there and tells what there is to tell; whether there may be more.
    pub(super) fn serve(&mut self) -> bool {
        let Self { unit, memory, interrupt, desks } = self;
        let mut more = false;
        desks.retain_mut(|desk| {
            let served = match desk.ring.index() {
                REQUESTS => answer_requests(unit, memory, desk),
                EVENTS => tell_faults(unit, memory, desk),
                _ => return false,
            };
            let called = served.and_then(|used| Ok(used && desk.ring.wants_call()?));
            match called.and_then(|call| Ok((call, desk.ring.listen()?))) {
                Ok((call, busy)) => {
                    if call {
                        interrupt.used(desk.ring.index(), desk.vector);
                    }
                    more |= busy;
                    true
                }
                Err(fault) => {
                    tracing::warn!(%fault, "a ring of the IOMMU is not served any more");
                    false
                }
            }
        });
        more
    }
}

/// Answers requests, at most a ring full; whether there was one.
fn answer_requests(unit: &Unit, memory: &GuestMemoryMmap, desk: &mut Desk) -> Result<bool, RingFault> {
    let mut answered = 0;
    while answered < desk.ring.size() {
        let Some(head) = desk.ring.take()? else { break };
        let written = desk.ring.chain(head).map_or(0, |chain| {
            let answer = unit.request(&chain.gather(memory, Request::READABLE_MAX), chain.room(Request::WRITABLE_MAX));
            if chain.write_first(memory, &answer) { answer.len() as u32 } else { 0 }
        });
        desk.ring.complete(head, written)?;
        answered += 1;
    }
    Ok(answered > 0)
}

/// Takes buffers and puts faults into them; whether one was used.
fn tell_faults(unit: &Unit, memory: &GuestMemoryMmap, desk: &mut Desk) -> Result<bool, RingFault> {
    take(unit.faulted());
    // All that there are, so that one more is something new. A ring holds no more than its size.
    while desk.held.len() < usize::from(desk.ring.size())
        && let Some(head) = desk.ring.take()?
    {
        desk.held.push_back(head);
    }
    let mut used = false;
    while unit.with(|iommu| iommu.has_faults()) {
        let Some(head) = desk.held.pop_front() else { break };
        let chain = desk.ring.chain(head).unwrap_or_default();
        let record = unit.with(|iommu| iommu.take_fault(chain.room(atoll_devices::iommu::wire::FAULT_LEN)));
        // A buffer that is too short goes back empty.
        let written = record.filter(|record| chain.write_first(memory, record)).map_or(0, |record| record.len() as u32);
        desk.ring.complete(head, written)?;
        used = true;
    }
    Ok(used)
}

/// The thread: until it is told to stop, or nobody is left to tell it anything.
pub(super) fn run(mut queues: Queues, orders: &Receiver<Order>, wake: &EventFd, bells: &[Arc<Doorbell>]) {
    let (mut paused, mut more) = (false, false);
    loop {
        take(wake);
        loop {
            match orders.try_recv() {
                Ok(Order::Intent(intent, completion)) => {
                    queues.intent(intent);
                    completion.complete(0);
                }
                Ok(Order::Pause(done)) => {
                    paused = true;
                    let _ = done.send(());
                }
                Ok(Order::Resume) => paused = false,
                Ok(Order::Stop) | Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => break,
            }
        }
        if !paused {
            bells.iter().for_each(|bell| {
                take(bell.backend_event());
            });
            more = queues.serve();
        }
        let mut fds = vec![PollFd::from_borrowed_fd(borrowed(wake), PollFlags::IN)];
        if !paused {
            fds.push(PollFd::from_borrowed_fd(borrowed(queues.unit.faulted()), PollFlags::IN));
            fds.extend(
                bells.iter().map(|bell| PollFd::from_borrowed_fd(borrowed(bell.backend_event()), PollFlags::IN)),
            );
        }
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        // An error (a signal) is a wake-up like any other.
        let _ = poll(&mut fds, (more && !paused).then_some(&at_once));
    }
}

/// Tells the thread something.
pub(super) fn wake_up(wake: &EventFd) {
    signal(wake, 1);
}
