//! A driver whose requests are copied, and a backend that has nothing but the private memory: what each finds where.

use std::time::{Duration, Instant};

use atoll_devices::iommu::Iommu;
use atoll_devices::iommu::wire::{MAP_READ, MAP_WRITE, Request};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::tests::{Backend, Dice, Rig, SIZE, USED};
use super::*;
use crate::iommu::Unit;
use crate::vhost::iotlb::Behind;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const TABLE: u64 = 0x1000;
/// Where indirect tables are, and what the driver gives the device: as far apart for each request.
const TABLES: u64 = 0x4000;
const BUFFERS: u64 = 0x10_0000;
const STEP: u64 = 0x1_0000;
const CANARY: [u8; 16] = *b"canary: 16 bytes";
const ENDPOINT: u32 = 24;
/// What the last byte is when a request fails.
const ERROR: u8 = 1;
const WAIT: Duration = Duration::from_secs(60);

fn terms(memory: &GuestMemory, behind: Option<Behind>) -> Terms {
    let window = Arc::new(Window::new(memory.mapped(), behind));
    Terms { window, answer: crate::vhost::standin::Answer::Status(ERROR), status_last: true, indirect: true }
}

/// One part of a request: address, length, whether the device writes it.
type Part = (u64, u32, bool);

/// Writes the chain of a request, in the table of the queue or in one of its own.
fn describe(memory: &GuestMemoryMmap, head: u16, parts: &[Part], tabled: bool, shift: u64) {
    let write = |table: u64, at: u16, (start, len, flags, next): (u64, u32, u16, u16)| {
        let mut bytes = Vec::from(start.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        memory.write_slice(&bytes, GuestAddress(table + 16 * u64::from(at))).unwrap();
    };
    let (table, first) = if tabled { (TABLES + 256 * u64::from(head), 0) } else { (TABLE, head) };
    for (at, (start, len, writes)) in (0_u16..).zip(parts) {
        let more = usize::from(at) + 1 < parts.len();
        let flags = if more { NEXT } else { 0 } | if *writes { WRITE } else { 0 };
        // A chain in the queue's table goes through descriptors that are nobody's head.
        let place = |at: u16| if tabled || at == 0 { first + at } else { SIZE / 2 + (head * 3 + at - 1) % (SIZE / 2) };
        write(table, place(at), (*start, *len, flags, if more { place(at + 1) } else { 0 }));
    }
    if tabled {
        write(TABLE, head, (table + shift, 16 * parts.len() as u32, INDIRECT, 0));
    }
}

/// What the backend finds behind a head of its own: readable bytes, and where it may write.
fn read(backend: &Backend, head: u16) -> (Vec<u8>, Vec<(u64, u32)>) {
    let row = |table: u64, at: u16| -> (u64, u32, u16, u16) {
        let mut bytes = [0; 16];
        backend.memory.read_slice(&mut bytes, GuestAddress(table + 16 * u64::from(at))).unwrap();
        let long = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let word = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        (long, u32::from_le_bytes(bytes[8..12].try_into().unwrap()), word(12), word(14))
    };
    let (mut table, mut at) = (backend.place.copies.unwrap().table, head);
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    loop {
        let (start, len, flags, next) = row(table, at);
        if flags & INDIRECT != 0 {
            (table, at) = (start, 0);
            continue;
        }
        if flags & WRITE != 0 {
            writable.push((start, len));
        } else {
            let mut bytes = vec![0; len as usize];
            backend.memory.read_slice(&mut bytes, GuestAddress(start)).unwrap();
            readable.extend(bytes);
        }
        if flags & NEXT == 0 {
            return (readable, writable);
        }
        at = next;
    }
}

impl Backend {
    /// Writes `bytes` where a request has room, and says that it has written `said`.
    fn answer(&mut self, head: u16, bytes: &[u8], said: u32) {
        let (_, writable) = read(self, head);
        let mut rest = bytes;
        for (start, len) in writable {
            let (here, later) = rest.split_at(rest.len().min(len as usize));
            self.memory.write_slice(here, GuestAddress(start)).unwrap();
            rest = later;
        }
        self.taken.retain(|taken| *taken != head);
        self.put_with(u32::from(head), said);
        signal(&self.call, 1);
    }
    /// The next request, when there is one.
    fn next(&mut self) -> u16 {
        let deadline = Instant::now() + WAIT;
        while self.taken.is_empty() {
            assert!(Instant::now() < deadline, "no request comes");
            self.take();
            std::thread::sleep(Duration::from_micros(100));
        }
        self.taken[0]
    }
}

impl Rig {
    fn copying(&self, stock: Stock, behind: Option<Behind>) -> (Shadow, Backend) {
        self.shadow_with(stock, Some(terms(&self.memory, behind)))
    }
    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.mapped().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
    /// The next completion: head and length.
    fn completed(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + WAIT;
        loop {
            let used: u16 = self.memory.mapped().load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
            if used != self.used {
                let at = USED + 4 + 8 * u64::from(self.used % SIZE);
                let element: u64 = self.memory.mapped().read_obj(GuestAddress(at)).unwrap();
                self.used = self.used.wrapping_add(1);
                let head = element as u16;
                self.waiting.retain(|waiting| *waiting != head);
                self.free.push(head);
                return (head, (element >> 32) as u32);
            }
            assert!(Instant::now() < deadline, "nothing is completed");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    fn ask_for(&mut self, parts: &[Part], tabled: bool) -> u16 {
        let head = *self.free.last().unwrap();
        describe(self.memory.mapped(), head, parts, tabled, 0);
        self.ask();
        head
    }
}

fn canaries(memory: &GuestMemoryMmap) -> usize {
    use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};
    let mut found = 0;
    for region in memory.iter() {
        let mut bytes = vec![0; region.len() as usize];
        memory.read_slice(&mut bytes, region.start_addr()).unwrap();
        found += bytes.windows(CANARY.len()).filter(|window| *window == CANARY).count();
    }
    found
}

/// Requests of all shapes, with backends that die at any moment: each backend finds what the driver has written and nothing
/// else of the guest's memory, the driver finds what the backend has written, as far as it said, and each request comes back
/// once.
#[test]
fn bytes_go_both_ways_and_nothing_else_does() {
    let mut dice = Dice(0x0c0f_fee5);
    let mut rig = Rig::new(0, 0);
    // Heads are in the lower half of the table.
    rig.free.truncate(usize::from(SIZE / 2));
    for at in (BUFFERS..16 << 20).step_by(CANARY.len()) {
        rig.memory.mapped().write_slice(&CANARY, GuestAddress(at)).unwrap();
    }
    let (mut stock, mut tags, mut done) = (Stock::default(), BTreeMap::new(), 0);
    for life in 0..60_u64 {
        let (shadow, mut backend) = rig.copying(stock, None);
        for turn in 0..20 {
            // Two parts in the queue's own table at most, so that no two requests share a descriptor.
            if !rig.free.is_empty() && dice.below(2) == 0 {
                let head = *rig.free.last().unwrap();
                let at = BUFFERS + 16 * STEP * u64::from(head);
                let tabled = dice.below(2) == 0;
                let count = if tabled { 1 + dice.below(5) } else { 0 };
                let mut parts: Vec<Part> = Vec::new();
                let tag = (life * 100 + turn).to_le_bytes();
                rig.memory.mapped().write_slice(&tag, GuestAddress(at)).unwrap();
                parts.push((at, 8, false));
                for part in 0..count {
                    parts.push((at + (part + 1) * STEP, 1 + dice.below(5000) as u32, true));
                }
                if !tabled {
                    parts.push((at + STEP, 9 + dice.below(5000) as u32, true));
                }
                for (start, _, _) in parts.iter().filter(|part| part.2) {
                    let lay = |at: u64| rig.memory.mapped().write_slice(&CANARY, GuestAddress(start + at)).unwrap();
                    (0..5120).step_by(CANARY.len()).for_each(lay);
                }
                tags.insert(head, (tag, parts.clone()));
                rig.ask_for(&parts, tabled);
            }
            backend.take();
            if !backend.taken.is_empty() && dice.below(3) > 0 {
                let which = dice.below(backend.taken.len() as u64) as usize;
                let head = backend.taken[which];
                let (readable, writable) = read(&backend, head);
                assert_eq!(readable.len(), 8);
                let room: u32 = writable.iter().map(|(_, len)| len).sum();
                let said = dice.below(u64::from(room) + 1) as u32;
                let answer: Vec<u8> = (0..room).map(|at| readable[at as usize % 8] ^ at as u8 ^ 0xff).collect();
                // More than there is room for is cut.
                let lie = if said == room { u32::MAX } else { said };
                backend.answer(head, &answer, lie);
            }
            while rig.memory.mapped().read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != rig.used {
                let (head, written) = rig.completed();
                let (tag, parts) = tags.remove(&head).expect("completed twice");
                let mut at = 0;
                for (start, len, _) in parts.iter().filter(|(_, _, writes)| *writes) {
                    let bytes = rig.bytes(*start, *len as usize);
                    let room: u32 = parts.iter().filter(|part| part.2).map(|part| part.1).sum();
                    for (offset, byte) in bytes.iter().enumerate() {
                        let expected = tag[at as usize % 8] ^ at as u8 ^ 0xff;
                        let canary = CANARY[(*start as usize + offset) % 16];
                        // The status is written whatever the length says.
                        let wrote = at < written || at + 1 == room;
                        assert_eq!(*byte, if wrote { expected } else { canary }, "byte {at} of {written}");
                        at += 1;
                    }
                    assert!(written <= room);
                }
                done += 1;
            }
        }
        assert_eq!(canaries(&backend.memory), 0);
        drop(backend);
        stock = shadow.close().pop().unwrap().1;
    }
    assert!(done > 100, "{done}");
    assert!(canaries(rig.memory.mapped()) > 1000, "they were there");
}

/// Three requests of five megabytes fill the room of a queue. The fourth waits until one is done, and outlives a backend
/// waiting; one that is larger than all of it is answered with an error, and the others go on.
#[test]
fn what_finds_no_room_waits_and_what_never_will_fails() {
    let mut rig = Rig::new(0, 0);
    let status = |rig: &Rig, head: u16| rig.bytes(0x8000 + u64::from(head), 1)[0];
    let ask = |rig: &mut Rig, times: u64| {
        let head = *rig.free.last().unwrap();
        let mut parts: Vec<Part> = (0..times).map(|_| (BUFFERS, 5 << 20, false)).collect();
        parts.push((0x8000 + u64::from(head), 1, true));
        rig.ask_for(&parts, true)
    };
    let (shadow, mut backend) = rig.copying(Stock::default(), None);
    let heads: Vec<u16> = (0..5).map(|_| ask(&mut rig, 1)).collect();
    let large = ask(&mut rig, 4);
    let first = backend.next();
    let deadline = Instant::now() + WAIT;
    while backend.taken.len() < 3 {
        assert!(Instant::now() < deadline);
        backend.take();
    }
    std::thread::sleep(Duration::from_millis(20));
    backend.take();
    assert_eq!(backend.taken.len(), 3, "there is room for three");
    backend.answer(first, &[9], 1);
    assert_eq!((rig.completed(), status(&rig, heads[0])), ((heads[0], 1), 9));
    let deadline = Instant::now() + WAIT;
    while backend.taken.len() < 3 {
        assert!(Instant::now() < deadline, "who waited has room now");
        backend.take();
    }
    let stock = shadow.close().pop().unwrap().1;
    assert_eq!(stock, Stock { next_avail: 5, unfinished: heads[1..].to_vec() }, "the one without room is known too");

    let (shadow, mut backend) = rig.copying(stock, None);
    let mut done = BTreeMap::new();
    for _ in &heads[1..] {
        let next = backend.next();
        backend.answer(next, &[9], 1);
    }
    // The large one is answered as soon as those before it are with the backend.
    for _ in 1..=heads.len() {
        let (head, written) = rig.completed();
        done.insert(head, (written, status(&rig, head)));
    }
    let served = heads[1..].iter().map(|head| (*head, (1, 9)));
    assert_eq!(done, served.chain([(large, (1, ERROR))]).collect(), "of the large one no backend has heard");
    backend.take();
    assert!(backend.taken.is_empty() && shadow.fault().is_none());
}

/// What a backend completes must be one of its requests, and is so once. A chain that it has bent in its own memory leads the
/// copies nowhere: where they go was noted before it had them.
#[test]
fn a_liar_is_lost_and_reaches_nothing() {
    for lie in [u32::from(SIZE), u32::MAX, 0] {
        let mut rig = Rig::new(0, 0);
        let (shadow, mut backend) = rig.copying(Stock::default(), None);
        let head = rig.ask_for(&[(BUFFERS, 8, false), (BUFFERS + STEP, 8, true)], true);
        let id = backend.next();
        if lie == 0 {
            // Its own table says now that the answer is long, and elsewhere.
            let table = GuestAddress(backend.place.copies.unwrap().table + 16 * u64::from(id));
            backend.memory.write_slice(&[0xff; 16], table).unwrap();
            backend.put_with(u32::from(id), u32::MAX);
            signal(&backend.call, 1);
            assert_eq!(rig.completed(), (head, 8));
            backend.put_with(u32::from(id), 8);
        } else {
            backend.put_with(lie, 8);
        }
        signal(&backend.call, 1);
        let deadline = Instant::now() + WAIT;
        let fault = loop {
            if let Some(fault) = shadow.fault() {
                break fault;
            }
            assert!(Instant::now() < deadline, "nobody minds");
            std::thread::sleep(Duration::from_millis(1));
        };
        assert!(matches!(fault, ShadowFault::Backend(_)), "{fault}");
        let unfinished = if lie == 0 { Vec::new() } else { vec![head] };
        assert_eq!(shadow.close().pop().unwrap().1, Stock { next_avail: 1, unfinished });
    }
}

/// A unit with one endpoint in a domain, and what its driver asks of it.
pub(in crate::vhost) struct Mapped(pub(in crate::vhost) Arc<Unit>);

impl Mapped {
    pub(in crate::vhost) fn new() -> Self {
        let unit = Arc::new(Unit::new().unwrap());
        let nobody: std::sync::Weak<crate::vhost::device::Shared> = std::sync::Weak::new();
        unit.join(ENDPOINT, nobody);
        unit.activate(Iommu::FEATURES);
        let mapped = Self(unit);
        mapped.ask(&Request::Attach { domain: 1, endpoint: ENDPOINT, flags: 0, reserved: 0 });
        mapped
    }
    pub(in crate::vhost) fn behind(&self) -> Behind {
        Behind { unit: Arc::clone(&self.0), endpoint: ENDPOINT }
    }
    fn ask(&self, request: &Request) {
        assert_eq!(self.0.request(&request.encode(), Request::WRITABLE_MAX)[0], 0, "{request:?}");
    }
    pub(in crate::vhost) fn map(&self, iova: u64, gpa: u64, flags: u32) {
        let (virt_start, virt_end) = (iova, iova + 0xfff);
        self.ask(&Request::Map { domain: 1, virt_start, virt_end, phys_start: gpa, flags });
    }
    pub(in crate::vhost) fn unmap(&self, iova: u64) {
        self.ask(&Request::Unmap { domain: 1, virt_start: iova, virt_end: iova + 0xfff, reserved: 0 });
    }
}

/// Behind an IOMMU copies follow the map: two neighbouring pages of the driver's lie anywhere, a page that may only be read
/// is not written, one that was taken back is neither read nor written. Each refusal is there to be told.
#[test]
fn copies_follow_the_map_of_the_iommu() {
    let map = Mapped::new();
    let (iova, shift) = (0x7000_0000, 0x6000_0000);
    for (page, gpa) in [(0, 0x20_0000), (1, 0x30_5000), (2, 0x40_0000)] {
        map.map(iova + 0x1000 * page, gpa, MAP_READ | MAP_WRITE);
    }
    map.map(TABLES + shift, TABLES, MAP_READ);
    let mut rig = Rig::new(0, 0);
    let (shadow, mut backend) = rig.copying(Stock::default(), Some(map.behind()));
    let ask = |rig: &mut Rig, parts: &[Part]| {
        let head = *rig.free.last().unwrap();
        describe(rig.memory.mapped(), head, parts, true, shift);
        rig.ask();
    };
    rig.memory.mapped().write_slice(b"here", GuestAddress(0x20_0ffc)).unwrap();
    rig.memory.mapped().write_slice(b"there", GuestAddress(0x30_5000)).unwrap();
    ask(&mut rig, &[(iova + 0xffc, 9, false), (iova + 0x2000, 100, true)]);
    let head = backend.next();
    assert_eq!(read(&backend, head).0, b"herethere");
    backend.answer(head, &[7; 100], 100);
    assert_eq!(rig.completed().1, 100);
    assert_eq!(rig.bytes(0x40_0000, 101), [vec![7; 100], vec![0]].concat());
    assert!(shadow.refused().is_empty());

    // Taken back while the backend has the request: what it writes goes nowhere.
    ask(&mut rig, &[(iova, 4, false), (iova + 0x2000, 100, true)]);
    let head = backend.next();
    map.unmap(iova + 0x2000);
    assert!(shadow.await_pass(Instant::now() + WAIT));
    backend.answer(head, &[8; 100], 100);
    rig.completed();
    assert_eq!(rig.bytes(0x40_0000, 1), [7]);
    let refused = shadow.refused();
    assert_eq!((refused[0].address, refused[0].access), (iova + 0x2000, atoll_devices::iommu::Access::Write));

    // Taken back before: the backend never hears of it, and the request fails where its status can be written.
    map.unmap(iova);
    ask(&mut rig, &[(iova, 4, false), (iova + 0x1000, 1, true)]);
    assert_eq!((rig.completed().1, rig.bytes(0x30_5000, 1)[0]), (1, ERROR));
    backend.take();
    assert!(backend.taken.is_empty());
    assert_eq!(shadow.refused()[0].access, atoll_devices::iommu::Access::Read);

    // Rings that are not the driver's any more are left alone.
    shadow.halt();
    assert!(shadow.await_pass(Instant::now() + WAIT));
    ask(&mut rig, &[(iova + 0x1000, 4, false), (iova + 0x1000, 1, true)]);
    std::thread::sleep(Duration::from_millis(20));
    backend.take();
    assert!(backend.taken.is_empty());
}
