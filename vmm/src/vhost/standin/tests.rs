//! A stand-in behind rings that a test fills like a driver.

use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_devices::iommu::wire::{MAP_READ, MAP_WRITE};
use atoll_devices::virtio::QueueConfig;
use atoll_devices::virtio::device_class::{BLOCK, CONSOLE, ENTROPY, FS, NET, VSOCK};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::*;
use crate::vhost::iotlb::Behind;
use crate::vhost::shadow::copy_tests::Mapped;

const SIZE: u16 = 16;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const EVENT_IDX: u64 = 1 << 29;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Driver {
    memory: Arc<GuestMemoryMmap>,
    kick: EventFd,
    call: EventFd,
    available: u16,
}

impl Driver {
    /// A driver that has put so many requests into its ring and taken as many back.
    fn after(requests: u16) -> Self {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap());
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap();
        memory.write_obj(requests, GuestAddress(AVAILABLE + 2)).unwrap();
        memory.write_obj(requests, GuestAddress(USED + 2)).unwrap();
        Self { memory, kick: event(), call: event(), available: requests }
    }
    fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(TABLE + 16 * u64::from(index));
        let low = u128::from(address) | u128::from(len) << 64;
        self.memory.write_obj(low | u128::from(flags) << 96 | u128::from(next) << 112, at).unwrap();
    }
    /// Puts a head into the ring.
    fn offer(&mut self, head: u16) {
        self.memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * u64::from(self.available % SIZE))).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
    }
    /// A disk's request: a header, data and a status byte at `0x8000 + 0x100 * head`; three descriptors from `head` on.
    fn ask(&mut self, head: u16) {
        let place = 0x8000 + 0x100 * u64::from(head);
        self.describe(head, place, 16, NEXT, head + 1);
        self.describe(head + 1, place + 0x10, 0x20, NEXT | WRITE, head + 2);
        self.describe(head + 2, place + 0x30, 1, WRITE, 0);
        self.memory.write_obj(0xff_u8, GuestAddress(place + 0x30)).unwrap();
        self.offer(head);
    }
    fn status(&self, head: u16) -> u8 {
        self.memory.read_obj(GuestAddress(0x8030 + 0x100 * u64::from(head))).unwrap()
    }
    fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }
    fn completed(&self, at: u16) -> (u32, u32) {
        let element: u64 = self.memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(at % SIZE))).unwrap();
        (element as u32, (element >> 32) as u32)
    }
    fn await_used(&self, used: u16) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.used() != used {
            assert!(Instant::now() < deadline, "used {} of {used}", self.used());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    fn parts(&self, trade: Trade, features: u64, stock: Stock) -> StandInParts {
        let queue = QueueConfig {
            index: 0,
            size: SIZE,
            descriptor_table: TABLE,
            available_ring: AVAILABLE,
            used_ring: USED,
            vector: Some(0),
        };
        let (kick, call) = (self.kick.try_clone().unwrap(), self.call.try_clone().unwrap());
        let rings = vec![StandInRing { queue, kick, call, stock }];
        self.parts_behind(None, trade, features, rings)
    }
    fn parts_behind(
        &self,
        behind: Option<Behind>,
        trade: Trade,
        features: u64,
        rings: Vec<StandInRing>,
    ) -> StandInParts {
        let (memory, window) = (Arc::clone(&self.memory), Arc::new(Window::new(&self.memory, behind)));
        StandInParts { name: "disk0".into(), memory, window, features, trade, rings }
    }
}

/// Somebody who waits for an alarm.
fn alarm() -> OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap()
}

fn disk() -> Trade {
    Trade::of(BLOCK, 0, &[])
}

/// A guest's dd hung for ever in a disk whose backend would not come back: stock drivers do not look at
/// DEVICE_NEEDS_RESET. What the dead backend had taken fails first, in its order, then what it had not seen, then what is
/// asked later, each exactly once; and whoever comes next finds nothing in flight.
#[test]
fn a_disk_without_a_backend_fails_its_requests() {
    for features in [0, EVENT_IDX] {
        // Near the end of the indices' range: they wrap.
        let mut driver = Driver::after(0xfffe);
        for head in [0, 3, 6] {
            driver.ask(head);
        }
        // The backend had taken two and completed none, the second one before the first in its queue.
        let stock = Stock { next_avail: 0, unfinished: vec![3, 0] };
        let stand_in = StandIn::start(driver.parts(disk(), features, stock), alarm()).unwrap();
        driver.await_used(1);
        let first: Vec<_> = [0xfffe, 0xffff, 0].map(|at| driver.completed(at)).into();
        assert_eq!(first, [(3, 1), (0, 1), (6, 1)]);
        assert_eq!([0, 3, 6].map(|head| driver.status(head)), [1, 1, 1]);
        assert!(take(&driver.call) > 0);
        driver.ask(9);
        signal(&driver.kick, 1);
        driver.await_used(2);
        assert_eq!(driver.completed(1), (9, 1));
        assert_eq!(stand_in.stop(), [(0, 2)]);
        driver.ask(0);
        signal(&driver.kick, 1);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(driver.used(), 2, "nobody is there any more");
    }
}

/// A disk behind the IOMMU had nobody to answer for it when it was given up. The stand-in writes by the map, the failure where
/// it may and nothing where it may not, of which the guest is told; and what it does after a change goes by the new map.
#[test]
fn behind_an_iommu_it_writes_by_the_map() {
    const SHIFT: u64 = 0x7000_0000;
    let map = Mapped::new();
    map.map(SHIFT + 0x8000, 0x8000, MAP_READ | MAP_WRITE);
    let mut driver = Driver::after(0);
    let ask = |driver: &mut Driver, head: u16, page: u64| {
        let place = SHIFT + page + 0x100 * u64::from(head);
        driver.describe(head, place, 16, NEXT, head + 1);
        driver.describe(head + 1, place + 0x30, 1, WRITE, 0);
        driver.offer(head);
    };
    let start = |driver: &Driver, next_avail: u16| {
        let rings = driver.parts(disk(), 0, Stock { next_avail, unfinished: Vec::new() }).rings;
        let heard = alarm();
        let parts = driver.parts_behind(Some(map.behind()), disk(), 0, rings);
        (StandIn::start(parts, heard.try_clone().unwrap()).unwrap(), heard)
    };
    ask(&mut driver, 0, 0x8000);
    ask(&mut driver, 2, 0x9000);
    let (stand_in, heard) = start(&driver, 0);
    driver.await_used(2);
    assert_eq!((driver.completed(0), driver.completed(1)), ((0, 1), (2, 0)));
    assert_eq!((driver.status(0), driver.memory.read_obj::<u8>(GuestAddress(0x9230)).unwrap()), (1, 0));
    let deadline = Instant::now() + Duration::from_secs(20);
    while rustix::io::read(&heard, &mut [0; 8]).is_err() {
        assert!(Instant::now() < deadline, "nobody is told");
        std::thread::sleep(Duration::from_millis(1));
    }
    let refused = stand_in.refused();
    assert_eq!(refused.iter().map(|fault| fault.address).collect::<Vec<_>>(), [SHIFT + 0x9230]);

    assert_eq!(stand_in.stop(), [(0, 2)]);
    map.unmap(SHIFT + 0x8000);
    map.map(SHIFT + 0x8000, 0xa000, MAP_READ | MAP_WRITE);
    driver.memory.write_obj(0_u8, GuestAddress(0x8430)).unwrap();
    let (stand_in, _heard) = start(&driver, 2);
    ask(&mut driver, 4, 0x8000);
    signal(&driver.kick, 1);
    driver.await_used(3);
    assert_eq!(driver.completed(2), (4, 1));
    assert_eq!((driver.status(4), driver.memory.read_obj::<u8>(GuestAddress(0xa430)).unwrap()), (0, 1));
    drop(stand_in);
}

/// The next backend goes on behind what was given up, and does what it had not seen.
#[test]
fn what_nobody_can_finish_is_given_up_once() {
    let mut driver = Driver::after(10);
    for head in [0, 3, 6] {
        driver.ask(head);
    }
    let stock = Stock { next_avail: 12, unfinished: vec![0, 3] };
    assert_eq!(settle(driver.parts(disk(), EVENT_IDX, stock.clone())), Ok(vec![(0, 12)]));
    // A daemon that found nothing to do did not ask for the next kick, and the one that its predecessor had asked for was
    // for an entry before: the guest's next request was never seen.
    let wanted: u16 = driver.memory.read_obj(GuestAddress(USED + 4 + 8 * u64::from(SIZE))).unwrap();
    assert_eq!(wanted, 12);
    assert_eq!((driver.used(), driver.completed(10), driver.completed(11)), (12, (0, 1), (3, 1)));
    assert_eq!(driver.status(6), 0xff);
    // Nobody knows what a strange device should say.
    assert_eq!(settle(driver.parts(Trade::of(41, 0, &[]), 0, stock)), Err(0));
    assert_eq!(driver.used(), 12);
}

/// What each kind of device says where nobody serves it.
#[test]
fn trades_differ() {
    let answers = |trade: Trade, queues: u16| (0..queues).map(|queue| trade.answer(queue)).collect::<Vec<_>>();
    use Answer::{Drop, Fuse, Leave, Status};
    assert_eq!(answers(Trade::of(NET, 0, &[]), 2), [Leave, Drop]);
    let mut config = [0; 12];
    config[8] = 2;
    let control_and_pairs = 1 << 17 | 1 << 22;
    assert_eq!(answers(Trade::of(NET, control_and_pairs, &config), 5), [Leave, Drop, Leave, Drop, Status(1)]);
    // A driver that did not accept several pairs has the control queue third, whatever is shown.
    assert_eq!(answers(Trade::of(NET, 1 << 17, &config), 3), [Leave, Drop, Status(1)]);
    assert_eq!(answers(Trade::of(CONSOLE, 2, &[]), 4), [Leave, Drop, Leave, Drop]);
    assert_eq!(answers(Trade::of(VSOCK, 0, &[]), 3), [Leave, Drop, Leave]);
    assert_eq!(answers(Trade::of(ENTROPY, 0, &[]), 1), [Leave]);
    assert_eq!(answers(Trade::of(FS, 0, &[]), 2), [Fuse, Fuse]);
}

/// A shared folder's request comes back with an error that names the request; one that wants no answer gets none.
#[test]
fn a_folder_answers_with_an_error() {
    let mut driver = Driver::after(0);
    let asked: [u64; 5] = [40 | 3 << 32, 0x1122_3344_5566, 0, 0, 0];
    for (at, word) in (0..).zip(asked) {
        driver.memory.write_obj(word, GuestAddress(0x8000 + 8 * at)).unwrap();
    }
    driver.describe(0, 0x8000, 40, NEXT, 1);
    driver.describe(1, 0x9000, 12, NEXT | WRITE, 2);
    driver.describe(2, 0x9100, 200, WRITE, 0);
    driver.describe(3, 0x8000, 40, 0, 0);
    driver.offer(0);
    driver.offer(3);
    let stand_in = StandIn::start(driver.parts(Trade::of(FS, 0, &[]), 0, Stock::default()), alarm()).unwrap();
    driver.await_used(2);
    assert_eq!((driver.completed(0), driver.completed(1)), ((0, 16), (3, 0)));
    assert_eq!(driver.memory.read_obj::<u64>(GuestAddress(0x9000)).unwrap(), 16 | u64::from((-5_i32) as u32) << 32);
    assert_eq!(driver.memory.read_obj::<u32>(GuestAddress(0x9008)).unwrap(), 0x3344_5566);
    assert_eq!(driver.memory.read_obj::<u32>(GuestAddress(0x9100)).unwrap(), 0x1122);
    drop(stand_in);
}

proptest! {
    /// Whatever a driver writes into its ring, the stand-in answers at most what is available, writes nothing outside of
    /// what it was given, and ends when it is told to.
    #[test]
    fn any_ring_is_survived(
        table in prop::collection::vec(any::<u128>(), usize::from(SIZE)), tame in any::<[bool; 16]>(),
        heads in prop::collection::vec(0_u16..20, 16), available: u16, used: u16, next_avail: u16,
        unfinished in prop::collection::vec(0_u16..20, 0..4), device_type in 1_u16..30,
    ) {
        let driver = Driver::after(0);
        for (at, (bits, tame)) in (0..).zip(table.iter().zip(tame)) {
            // Half of the descriptors point into RAM, so that chains get long.
            let tamed = (bits & !0 >> 64 & 0xffff) | (bits >> 64 & 0xff) << 64 | (bits >> 96 & 7) << 96 | (bits >> 112 & 15) << 112;
            driver.memory.write_obj(if tame { tamed } else { *bits }, GuestAddress(TABLE + 16 * at)).unwrap();
        }
        for (at, head) in (0..).zip(&heads) {
            driver.memory.write_obj(*head, GuestAddress(AVAILABLE + 4 + 2 * at)).unwrap();
        }
        driver.memory.write_obj(available, GuestAddress(AVAILABLE + 2)).unwrap();
        driver.memory.write_obj(used, GuestAddress(USED + 2)).unwrap();
        let stock = Stock { next_avail, unfinished };
        let parts = driver.parts(Trade::of(device_type, !0, &[]), EVENT_IDX, stock);
        let stand_in = StandIn::start(parts, alarm()).unwrap();
        let bases = stand_in.stop();
        prop_assert!(bases.len() <= 1);
    }
}
