//! The virtual IOMMU behind its queues: a driver's rings in memory, a device that keeps translations and confirms changes or
//! does not, and what the driver reads in the used rings.

use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use atoll_devices::iommu::wire::{FAULT_LEN, MAP_READ, PROBE_LEN, Request, TAIL_LEN};
use atoll_devices::iommu::{Access, Change, Iommu, IovaRange};
use atoll_devices::virtio::{Intent, QueueConfig};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::queues::{Interrupt, Queues};
use super::*;

const DISK: u32 = 16;
const PAGE: u64 = 4096;
/// Where the parts of a queue are, from its own base on.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x4000;
const QUEUE: u64 = 0x10_0000;

/// A device behind the IOMMU that notes what it is told.
#[derive(Default)]
struct Device {
    heard: Mutex<Vec<Change>>,
    refuses: bool,
}

impl Endpoint for Device {
    fn changed(&self, change: Change, _deadline: Instant) -> Result<(), Unconfirmed> {
        self.heard.lock().unwrap().push(change);
        if self.refuses { Err(Unconfirmed("it stands".into())) } else { Ok(()) }
    }
}

#[derive(Clone, Default)]
struct Called(Arc<Mutex<Vec<u16>>>);

impl Interrupt for Called {
    fn used(&self, index: u16, _vector: Option<u16>) {
        self.0.lock().unwrap().push(index);
    }
}

/// A driver with two rings, by hand.
struct Driver {
    memory: Arc<GuestMemoryMmap>,
    queues: Queues,
    called: Called,
    made: [u16; 2],
}

impl Driver {
    fn new(unit: &Arc<Unit>) -> Self {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap());
        let called = Called::default();
        let mut queues = Queues::new(Arc::clone(unit), Arc::clone(&memory), Box::new(called.clone()));
        let ring = |index: u16| {
            let base = u64::from(index) * QUEUE;
            QueueConfig {
                index,
                size: 16,
                descriptor_table: base,
                available_ring: base + AVAILABLE,
                used_ring: base + USED,
                vector: None,
            }
        };
        let queue_list = vec![ring(0), ring(1)];
        queues.intent(Intent::Activate {
            features: Iommu::FEATURES | 1 << 32,
            queues: queue_list,
            config_vector: None,
        });
        Self { memory, queues, called, made: [0; 2] }
    }
    /// Makes a buffer available: `readable` for the device, and room for so many bytes behind it.
    fn add(&mut self, queue: u16, readable: &[u8], room: u32) {
        let base = u64::from(queue) * QUEUE;
        let made = &mut self.made[usize::from(queue)];
        let (slot, first) = (u64::from(*made % 16), (*made % 8) * 2);
        let buffer = base + BUFFERS + u64::from(first) * 1024;
        self.memory.write_slice(readable, GuestAddress(buffer)).unwrap();
        let parts = [(buffer, readable.len() as u32, 1_u16, first + 1), (buffer + 512, room, 2, 0)];
        // A queue of faults has no readable part.
        let used = if readable.is_empty() { &parts[1..] } else { &parts[..] };
        for (at, (start, len, flags, next)) in (first..).zip(used) {
            let descriptor = base + 16 * u64::from(at);
            self.memory.write_obj(*start, GuestAddress(descriptor)).unwrap();
            self.memory.write_obj(*len, GuestAddress(descriptor + 8)).unwrap();
            self.memory.write_obj(*flags, GuestAddress(descriptor + 12)).unwrap();
            self.memory.write_obj(*next, GuestAddress(descriptor + 14)).unwrap();
        }
        *made += 1;
        self.memory.write_obj(first, GuestAddress(base + AVAILABLE + 4 + 2 * slot)).unwrap();
        self.memory.write_obj(*made, GuestAddress(base + AVAILABLE + 2)).unwrap();
    }
    /// The last buffer that came back: used length and bytes.
    fn last(&self, queue: u16) -> (u32, Vec<u8>) {
        let base = u64::from(queue) * QUEUE;
        let used: u16 = self.memory.read_obj(GuestAddress(base + USED + 2)).unwrap();
        let element = base + USED + 4 + 8 * u64::from((used - 1) % 16);
        let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(element)).unwrap();
        let mut bytes = vec![0; len as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(base + BUFFERS + u64::from(head) * 1024 + 512)).unwrap();
        (len, bytes)
    }
    fn used(&self, queue: u16) -> u16 {
        self.memory.read_obj(GuestAddress(u64::from(queue) * QUEUE + USED + 2)).unwrap()
    }
    #[track_caller]
    fn ask(&mut self, request: Request) -> u8 {
        self.add(0, &request.encode(), TAIL_LEN as u32);
        assert!(!self.queues.serve(), "nothing more is there");
        let (len, bytes) = self.last(0);
        assert_eq!(len as usize, TAIL_LEN);
        bytes[0]
    }
}

const ATTACH: Request = Request::Attach { domain: 1, endpoint: DISK, flags: 0, reserved: 0 };
const MAP: Request = Request::Map { domain: 1, virt_start: 0, virt_end: PAGE - 1, phys_start: 0x5000, flags: MAP_READ };
const UNMAP: Request = Request::Unmap { domain: 1, virt_start: 0, virt_end: PAGE - 1, reserved: 0 };

/// The device behind it hears of each change before the driver's request comes back.
#[test]
fn requests_are_answered_when_devices_have_confirmed() {
    let unit = Arc::new(Unit::new().unwrap());
    let device = Arc::new(Device::default());
    let joined: Weak<dyn Endpoint> = Arc::downgrade(&device) as _;
    unit.join(DISK, joined);
    let mut driver = Driver::new(&unit);
    driver.add(0, &Request::Probe { endpoint: DISK }.encode(), (PROBE_LEN + TAIL_LEN) as u32);
    driver.queues.serve();
    assert_eq!(driver.last(0).1[8..16], 0xfee0_0000_u64.to_le_bytes());
    assert_eq!([ATTACH, MAP, UNMAP].map(|request| driver.ask(request)), [0; 3]);
    let page = IovaRange::new(0, PAGE - 1).unwrap();
    let told = [(false, IovaRange::ALL), (true, page), (false, page)].map(|(gained, range)| {
        if gained { Change::Gained { endpoint: DISK, range } } else { Change::Lost { endpoint: DISK, range } }
    });
    assert_eq!(*device.heard.lock().unwrap(), told);
    assert_eq!(driver.called.0.lock().unwrap().len(), 4);
    // A device that has gone confirms nothing and keeps nobody waiting.
    drop(device);
    assert_eq!(driver.ask(MAP), 0);
    driver.queues.intent(Intent::ConfigWrite { offset: 36, data: vec![0] });
    driver.queues.intent(Intent::Reset);
    assert!(unit.find(DISK, 0, Access::Read).is_err(), "no bypass any more");
}

/// What a device does not confirm is not reported as done.
#[test]
fn an_unconfirmed_change_is_an_error() {
    let unit = Arc::new(Unit::new().unwrap());
    let device = Arc::new(Device { refuses: true, ..Device::default() });
    let joined: Weak<dyn Endpoint> = Arc::downgrade(&device) as _;
    unit.join(DISK, joined);
    let mut driver = Driver::new(&unit);
    assert_eq!(driver.ask(ATTACH), 3, "VIRTIO_IOMMU_S_DEVERR");
    assert_eq!(driver.ask(Request::Probe { endpoint: 99 }), 6, "there is no such endpoint");
}

/// Faults wait for buffers, and come in order; a buffer that is too short comes back empty.
#[test]
fn faults_reach_the_driver() {
    let unit = Arc::new(Unit::new().unwrap());
    let device: Arc<dyn Endpoint> = Arc::new(Device::default());
    unit.join(DISK, Arc::downgrade(&device));
    let mut driver = Driver::new(&unit);
    driver.ask(ATTACH);
    for address in [0x7000, 0x8000] {
        unit.report(unit.find(DISK, address, Access::Write).unwrap_err());
    }
    driver.queues.serve();
    assert_eq!(driver.used(1), 0, "there is no buffer");
    driver.add(1, &[], 8);
    assert!(!driver.queues.serve());
    assert_eq!(driver.last(1), (0, Vec::new()));
    for (expected, address) in [(2, 0x70_u8), (3, 0x80)] {
        driver.add(1, &[], FAULT_LEN as u32);
        assert!(!driver.queues.serve());
        let (len, record) = driver.last(1);
        assert_eq!((len as usize, driver.used(1)), (FAULT_LEN, expected));
        assert_eq!((record[0], record[8], record[17]), (2, DISK as u8, address));
    }
    driver.add(1, &[], FAULT_LEN as u32);
    assert!(!driver.queues.serve(), "a buffer without a fault is no work");
    assert_eq!(driver.used(1), 3);
}

/// A ring that cannot be right is left alone; the other one goes on, and a reset starts anew.
#[test]
fn a_broken_ring_is_left_alone() {
    let unit = Arc::new(Unit::new().unwrap());
    let device: Arc<dyn Endpoint> = Arc::new(Device::default());
    unit.join(DISK, Arc::downgrade(&device));
    let mut driver = Driver::new(&unit);
    driver.memory.write_obj(999_u16, GuestAddress(AVAILABLE + 2)).unwrap();
    assert!(!driver.queues.serve());
    unit.report(unit.find(99, 0, Access::Read).unwrap_err());
    driver.add(1, &[], FAULT_LEN as u32);
    driver.queues.serve();
    assert_eq!((driver.used(0), driver.used(1)), (0, 1));
}
