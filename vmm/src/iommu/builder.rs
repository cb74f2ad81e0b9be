//! Puts the IOMMU on the board, with its thread.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use atoll_devices::iommu::Iommu;
use atoll_devices::pci::SharedFunction;
use atoll_devices::virtio::device_class::IOMMU;
use atoll_devices::virtio::input_config::Pages;
use atoll_devices::virtio::pci::{VirtioPci, VirtioPciParts};
use atoll_devices::virtio::{DeviceOffer, Intent, VirtioFrontend};
use atoll_devices::{Answer, access};
use virtio_bindings::{virtio_config, virtio_ring};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queues::{self, Interrupt, Order, Queues};
use super::unit::Unit;
use crate::doorbell::Doorbell;
use crate::irq::VectorTable;
use crate::machine::{Board, BuildError, BuiltDevice, DeviceBuilder, DeviceLife, LifeError};
use crate::seccomp::{self, ThreadClass};
use crate::vhost::Placements;

/// Its name, which no device of a configuration can have.
const NAME: &str = "_iommu";
/// Entries of both queues. A driver waits for most requests before it makes the next.
const QUEUE_SIZE: u16 = 128;
/// Orders that may wait; a guest that gives more is not heard.
const ORDERS_MAX: usize = 64;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Makes the machine's IOMMU. To be built before the devices behind it.
#[derive(Clone, Copy, Debug, Default)]
pub struct IommuBuilder;

/// The way from the thread to the driver.
struct ToDriver {
    vectors: Arc<VectorTable>,
    function: Arc<OnceLock<Weak<Mutex<VirtioPci>>>>,
}

impl Interrupt for ToDriver {
    fn used(&self, index: u16, vector: Option<u16>) {
        match (vector, self.function.get().and_then(Weak::upgrade)) {
            (Some(vector), _) => self.vectors.signal(vector),
            (None, Some(function)) => function.lock().unwrap_or_else(PoisonError::into_inner).signal_queue(index),
            (None, None) => {}
        }
    }
}

/// The way from the driver to the thread.
struct ToThread {
    orders: SyncSender<Order>,
    wake: EventFd,
    bells: Vec<Arc<Doorbell>>,
}

impl VirtioFrontend for ToThread {
    fn intent(&mut self, intent: Intent) -> Answer {
        let (completion, deferred) = access::deferred();
        // A thread that has ended, or has too much to do, drops it: the guest's write ends as one that nobody answered.
        let _ = self.orders.try_send(Order::Intent(intent, completion));
        queues::wake_up(&self.wake);
        Answer::Later(deferred)
    }
    fn notify(&mut self, index: u16) {
        if let Some(bell) = self.bells.get(usize::from(index)) {
            bell.ring();
        }
    }
}

impl DeviceBuilder for IommuBuilder {
    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        build(board).map_err(|source| BuildError::new("the virtual IOMMU", source))
    }
}

fn build(board: &mut Board) -> Result<BuiltDevice, Cause> {
    let unit = Arc::new(Unit::new()?);
    let bit = |number: u32| 1_u64 << number;
    let offer = DeviceOffer {
        device_type: IOMMU,
        features: Iommu::FEATURES
            | bit(virtio_config::VIRTIO_F_VERSION_1)
            | bit(virtio_ring::VIRTIO_RING_F_INDIRECT_DESC)
            | bit(virtio_ring::VIRTIO_RING_F_EVENT_IDX),
        queue_sizes: vec![QUEUE_SIZE; 2],
        config: unit.with(|iommu| iommu.config()).to_vec(),
        pages: Pages::default(),
    };
    let vectors = board.vectors(offer.vectors())?;
    let bells = (0..2).map(|_| Doorbell::new(board.relay())).collect::<Result<Vec<_>, _>>()?;
    let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
    let (orders, inbox) = sync_channel(ORDERS_MAX);
    let frontend = ToThread { orders: orders.clone(), wake: wake.try_clone()?, bells: bells.clone() };
    let bars = board.bar_mapping();
    let (intx, intx_line) = board.next_pin();
    let function = VirtioPci::new(VirtioPciParts {
        offer,
        frontend: Box::new(frontend),
        mapping: Arc::clone(&bars) as _,
        doorbells: Box::new(Placements::new(board.doorbells(), &bells)),
        routes: Arc::clone(&vectors) as _,
        intx,
        intx_pin: 1,
        intx_line,
    })?;
    let function = Arc::new(Mutex::new(function));
    let known = Arc::new(OnceLock::new());
    // The only one who sets it.
    let _ = known.set(Arc::downgrade(&function));
    let interrupt = Box::new(ToDriver { vectors, function: known });
    let served = Queues::new(Arc::clone(&unit), Arc::clone(board.memory().mapped()), interrupt);
    let heard = wake.try_clone()?;
    let thread = std::thread::Builder::new().name("iommu".into()).spawn(move || {
        seccomp::enter(ThreadClass::Events);
        queues::run(served, &inbox, &heard, &bells);
    })?;
    let life = Life { orders, wake, thread: Some(thread) };
    let shared: SharedFunction = function;
    let place = board.add_fixed_pci(shared, &bars)?;
    board.set_iommu(unit, place);
    Ok(BuiltDevice { name: NAME.to_owned(), place: Some(place), life: Box::new(life) })
}

struct Life {
    orders: SyncSender<Order>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Life {
    fn say(&self, order: Order) {
        // A thread that has ended touches nothing any more.
        let _ = self.orders.send(order);
        queues::wake_up(&self.wake);
    }
    fn end(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.say(Order::Stop);
            // It only fails if the thread panicked, which its hook has reported.
            let _ = thread.join();
        }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.end();
    }
}

impl DeviceLife for Life {
    fn start(&mut self) -> Result<(), LifeError> {
        Ok(())
    }
    fn stop(&mut self, _deadline: Instant) -> Result<(), LifeError> {
        // It waits for a device process at most, and each of those waits has a deadline of its own.
        self.end();
        Ok(())
    }
    fn pause(&mut self, deadline: Instant) -> Result<(), LifeError> {
        let (done, is_done) = sync_channel(1);
        self.say(Order::Pause(done));
        is_done.recv_timeout(deadline.saturating_duration_since(Instant::now())).map_err(|_| {
            self.say(Order::Resume);
            let source = "it waits for a device process to confirm a change; try again".into();
            LifeError { device: NAME.into(), step: "pause", source }
        })
    }
    fn resume(&mut self) -> Result<(), LifeError> {
        self.say(Order::Resume);
        Ok(())
    }
}
