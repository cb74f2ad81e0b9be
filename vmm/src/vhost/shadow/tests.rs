//! A driver in front of shadow rings and a backend behind them, both made by hand.

use std::collections::BTreeSet;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::machine::layout::ram;

pub(super) const SIZE: u16 = 16;
pub(super) const AVAILABLE: u64 = 0x2000;
pub(super) const USED: u64 = 0x3000;

/// A small generator: a seed tells all.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

pub(super) struct Rig {
    pub(super) memory: GuestMemory,
    features: u64,
    kick: EventFd,
    call: EventFd,
    alarm: OwnedFd,
    available: u16,
    pub(super) used: u16,
    pub(super) free: Vec<u16>,
    /// What the driver waits for, in the order of asking.
    pub(super) waiting: Vec<u16>,
}

/// The backend's end of one incarnation.
pub(super) struct Backend {
    pub(super) memory: GuestMemoryMmap,
    pub(super) place: Place,
    pub(super) call: EventFd,
    seen: u16,
    used: u16,
    pub(super) taken: Vec<u16>,
}

impl Backend {
    /// Maps what the memory table says, as a process would.
    fn new(shadow: &Shadow, handed: &Handed) -> Self {
        let row = shadow.memory().table_entry();
        let file = vm_memory::FileOffset::from_arc(shadow.memory().file(), 0);
        let range = (GuestAddress(row.guest_phys_addr), row.memory_size as usize, Some(file));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let call = handed.call.try_clone().unwrap();
        Self { memory, place: handed.place, call, seen: 0, used: 0, taken: Vec::new() }
    }
    pub(super) fn take(&mut self) {
        let available: u16 = self.memory.load(GuestAddress(self.place.available_ring + 2), Ordering::Acquire).unwrap();
        while self.seen != available {
            let at = self.place.available_ring + 4 + 2 * u64::from(self.seen % SIZE);
            self.taken.push(self.memory.read_obj(GuestAddress(at)).unwrap());
            self.seen = self.seen.wrapping_add(1);
        }
    }
    fn put(&mut self, head: u32) {
        self.put_with(head, 7);
    }
    pub(super) fn put_with(&mut self, head: u32, written: u32) {
        let at = self.place.used_ring + 4 + 8 * u64::from(self.used % SIZE);
        self.memory.write_obj(u64::from(head) | u64::from(written) << 32, GuestAddress(at)).unwrap();
        self.used = self.used.wrapping_add(1);
        self.memory.store(self.used, GuestAddress(self.place.used_ring + 2), Ordering::Release).unwrap();
    }
    fn complete(&mut self, which: usize) {
        let head = self.taken.remove(which);
        self.put(u32::from(head));
        signal(&self.call, 1);
    }
}

impl Rig {
    pub(super) fn new(features: u64, start: u16) -> Self {
        let memory = GuestMemory::new(&ram(16 << 20).unwrap()).unwrap();
        for ring in [AVAILABLE, USED] {
            memory.mapped().write_obj(start, GuestAddress(ring + 2)).unwrap();
        }
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap();
        let alarm = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let (kick, call, free) = (event(), event(), (0..SIZE).collect());
        Self { memory, features, kick, call, alarm, available: start, used: start, free, waiting: Vec::new() }
    }
    fn shadow(&self, stock: Stock) -> (Shadow, Backend) {
        self.shadow_with(stock, None)
    }
    pub(super) fn shadow_with(&self, stock: Stock, copied: Option<Terms>) -> (Shadow, Backend) {
        let queue = QueueConfig {
            index: 0,
            size: SIZE,
            descriptor_table: 0x1000,
            available_ring: AVAILABLE,
            used_ring: USED,
            vector: Some(0),
        };
        let (kick, call) = (self.kick.try_clone().unwrap(), self.call.try_clone().unwrap());
        let rings = vec![ShadowRing { queue, kick, call, stock, copied }];
        let alarm = self.alarm.try_clone().unwrap();
        let (shadow, handed) = Shadow::start("disk0", &self.memory, self.features, rings, alarm).unwrap();
        let backend = Backend::new(&shadow, &handed[0]);
        (shadow, backend)
    }
    pub(super) fn ask(&mut self) {
        let Some(head) = self.free.pop() else { return };
        let at = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.mapped().write_obj(head, GuestAddress(at)).unwrap();
        let before = self.available;
        self.available = self.available.wrapping_add(1);
        self.memory.mapped().store(self.available, GuestAddress(AVAILABLE + 2), Ordering::Release).unwrap();
        self.waiting.push(head);
        fence(Ordering::SeqCst);
        let event: u16 = self.memory.mapped().read_obj(GuestAddress(USED + 4 + 8 * u64::from(SIZE))).unwrap();
        if self.features == 0 || event == before {
            signal(&self.kick, 1);
        }
    }
    /// Takes back what is completed; each must be something that was asked for.
    fn reap(&mut self) -> usize {
        let used: u16 = self.memory.mapped().load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
        let mut count = 0;
        while self.used != used {
            let at = USED + 4 + 8 * u64::from(self.used % SIZE);
            let element: u64 = self.memory.mapped().read_obj(GuestAddress(at)).unwrap();
            assert_eq!(element >> 32, 7, "the bytes that the backend said");
            let head = element as u16;
            let at = self.waiting.iter().position(|waiting| *waiting == head);
            self.waiting.remove(at.expect("completed twice, or never asked for"));
            self.free.push(head);
            self.used = self.used.wrapping_add(1);
            count += 1;
        }
        // Wants to hear of the next one.
        self.memory.mapped().write_obj(self.used, GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE))).unwrap();
        count
    }
}

/// A disk served by somebody else's daemon lost requests when the daemon was restarted, and the guest hung: it completes
/// in any order and keeps no record. Behind shadow rings it may die after any step, hundreds of times: the driver gets each
/// request back once, and the successor sees what is left in the order of asking.
#[test]
fn backends_may_die_at_any_time() {
    for (features, start) in [(0, 0), (EVENT_IDX, 0xfff0)] {
        let mut dice = Dice(0x5eed_0001);
        let mut rig = Rig::new(features, start);
        let mut stock = Stock { next_avail: start, unfinished: Vec::new() };
        let mut asked = 0;
        for life in 0..200 {
            let (shadow, mut backend) = rig.shadow(stock.clone());
            backend.take();
            let again: Vec<u16> = backend.taken.iter().copied().take(stock.unfinished.len()).collect();
            assert_eq!(again, stock.unfinished, "life {life}");
            for _ in 0..dice.below(30) {
                match dice.below(4) {
                    0 | 1 => {
                        rig.ask();
                        asked += 1;
                    }
                    2 if !backend.taken.is_empty() => {
                        backend.complete(dice.below(backend.taken.len() as u64) as usize);
                    }
                    _ => {
                        rig.reap();
                    }
                }
                backend.take();
            }
            // Published, and nobody told: the driver gets it all the same.
            if let Some(head) = backend.taken.pop() {
                backend.put(u32::from(head));
            }
            drop(backend);
            let mut stocks = shadow.close();
            stock = stocks.pop().unwrap().1;
            rig.reap();
            let known: Vec<u16> = rig
                .waiting
                .iter()
                .copied()
                .take(rig.waiting.len() - usize::from(rig.available.wrapping_sub(stock.next_avail)))
                .collect();
            assert_eq!(stock.unfinished, known, "life {life}");
        }
        assert!(asked > 1000, "{asked}");
        // The last one does everything.
        let (shadow, mut backend) = rig.shadow(stock);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !rig.waiting.is_empty() {
            backend.take();
            while !backend.taken.is_empty() {
                backend.complete(0);
            }
            std::thread::sleep(Duration::from_millis(1));
            rig.reap();
            assert!(Instant::now() < deadline, "{:?} wait", rig.waiting);
        }
        assert!(shadow.fault().is_none());
        assert!(take(&rig.call) > 0);
    }
}

/// The end of a shadow was lost now and then, and whoever waited for its thread waited for ever: the signal was taken with a
/// kick that came at the same moment. It is heard whatever comes with it.
#[test]
fn an_end_among_kicks_is_heard() {
    let (told, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let rig = Rig::new(0, 0);
        let mut dice = Dice(0x5eed_0002);
        for _ in 0..3000 {
            let (shadow, _backend) = rig.shadow(Stock::default());
            signal(&rig.kick, 1);
            for _ in 0..dice.below(4000) {
                std::hint::spin_loop();
            }
            signal(&rig.kick, 1);
            drop(shadow);
        }
        told.send(()).unwrap();
    });
    heard.recv_timeout(Duration::from_secs(60)).expect("a shadow did not hear its end");
}

fn fault(rig: &Rig, shadow: &Shadow) -> ShadowFault {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(fault) = shadow.fault() {
            let mut count = [0; 8];
            assert_eq!(rustix::io::read(&rig.alarm, &mut count), Ok(8), "somebody was told");
            return fault;
        }
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a backend completes must be something that it has; what the driver makes available, something that it has not.
#[test]
fn liars_are_found_out() {
    let mut heads = BTreeSet::new();
    for lie in [SIZE.into(), u32::MAX, 3] {
        let mut rig = Rig::new(0, 0);
        let (shadow, mut backend) = rig.shadow(Stock::default());
        rig.ask();
        while backend.taken.is_empty() {
            backend.take();
        }
        heads.insert(backend.taken[0]);
        backend.put(lie);
        signal(&backend.call, 1);
        let expected = BackendFault::Head { queue: 0, head: lie };
        assert_eq!(fault(&rig, &shadow), expected.into());
        assert_eq!(shadow.close()[0].1, Stock { next_avail: 1, unfinished: vec![backend.taken[0]] });
    }
    assert_eq!(heads, BTreeSet::from([SIZE - 1]));

    let rig = Rig::new(0, 0);
    let (shadow, mut backend) = rig.shadow(Stock::default());
    backend.put(0);
    signal(&backend.call, 1);
    assert_eq!(fault(&rig, &shadow), BackendFault::Used { queue: 0, completed: 1, taken: 0 }.into());
    drop(shadow);

    let mut rig = Rig::new(0, 0);
    rig.free = vec![5, 5];
    let (shadow, _backend) = rig.shadow(Stock::default());
    rig.ask();
    rig.ask();
    assert!(matches!(fault(&rig, &shadow), ShadowFault::Driver(what) if what.contains("twice")));
    assert_eq!(shadow.close()[0].1.unfinished, [5]);
}
