//! The controller with a driver of the tests' own: no I/O, no process; a death is a controller that is dropped and another one
//! on the same record.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use crate::controller::{Controller, Failed, Io, IoKind, NO_COMMAND};
use crate::identify::Namespace;
use crate::prp::{self, Dma};
use crate::record::Record;
use crate::spec::{CSTS_FATAL, CSTS_READY, CSTS_SHUT, CSTS_SHUT_MASK, PAGE, Status, admin, nvm, register};

/// Memory of a guest, from zero on; and a process that dies before or after one of its next accesses to it.
struct Ram(RefCell<Vec<u8>>, Cell<Option<u32>>);

/// What a process dies of here.
struct Death;

impl Ram {
    fn new(pages: usize) -> Self {
        Self(RefCell::new(vec![0; pages * PAGE as usize]), Cell::new(None))
    }
    fn tick(&self) {
        match self.1.get() {
            Some(0) => {
                self.1.set(None);
                std::panic::resume_unwind(Box::new(Death));
            }
            left => self.1.set(left.map(|left| left - 1)),
        }
    }
    fn word(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        assert!(self.read(at, &mut bytes));
        u32::from_le_bytes(bytes)
    }
}

impl Dma for Ram {
    fn read(&self, address: u64, out: &mut [u8]) -> bool {
        self.tick();
        let memory = self.0.borrow();
        let range = usize::try_from(address).ok().and_then(|at| Some(at..at.checked_add(out.len())?));
        range.and_then(|range| memory.get(range)).map(|from| out.copy_from_slice(from)).is_some()
    }
    fn write(&self, address: u64, data: &[u8]) -> bool {
        self.tick();
        let mut memory = self.0.borrow_mut();
        let range = usize::try_from(address).ok().and_then(|at| Some(at..at.checked_add(data.len())?));
        let done = range.and_then(|range| memory.get_mut(range)).map(|to| to.copy_from_slice(data)).is_some();
        drop(memory);
        self.tick();
        done
    }
    fn publish(&self, address: u64, word: u32) -> bool {
        self.write(address, &word.to_le_bytes())
    }
    fn covers(&self, address: u64, len: u64) -> bool {
        address.checked_add(len).is_some_and(|end| end <= self.0.borrow().len() as u64)
    }
}

const ASQ: u64 = 0x1000;
const ACQ: u64 = 0x2000;
const SQ: u64 = 0x3000;
const CQ: u64 = 0x4000;
const DATA: u64 = 0x10_000;
const SIZE: u32 = 8;

/// A queue pair as its driver has it.
struct Pair {
    number: u32,
    sq: u64,
    cq: u64,
    tail: u32,
    head: u32,
    phase: bool,
}

impl Pair {
    fn new(number: u32, sq: u64, cq: u64) -> Self {
        Self { number, sq, cq, tail: 0, head: 0, phase: true }
    }
    fn submit(&mut self, ram: &Ram, record: &Record, words: [u32; 16]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert!(ram.write(self.sq + u64::from(self.tail) * 64, &bytes));
        self.tail = (self.tail + 1) % SIZE;
        record.doorbell(self.number as usize * 2).unwrap().store(self.tail, Ordering::Release);
    }
    /// The next completion: command, status, result.
    fn take(&mut self, ram: &Ram, record: &Record) -> Option<(u16, Status, u32)> {
        let at = self.cq + u64::from(self.head) * 16;
        let last = ram.word(at + 12);
        if (last >> 16 & 1 == 1) != self.phase {
            return None;
        }
        self.head = (self.head + 1) % SIZE;
        self.phase ^= self.head == 0;
        record.doorbell(self.number as usize * 2 + 1).unwrap().store(self.head, Ordering::Release);
        Some((last as u16, Status((last >> 17) as u16), ram.word(at)))
    }
}

fn command(opcode: u8, id: u16, rest: &[(usize, u32)]) -> [u32; 16] {
    let mut words = [0; 16];
    words[0] = u32::from(opcode) | u32::from(id) << 16;
    words[1] = 1;
    for (at, word) in rest {
        words[*at] = *word;
    }
    words
}

struct Bench {
    ram: Ram,
    record: Arc<Record>,
    controller: Controller,
    admin: Pair,
    io: Pair,
    next: u16,
}

fn namespace() -> Namespace {
    Namespace { bytes: 1 << 20, read_only: false, serial: "test".into() }
}

impl Bench {
    fn new() -> Self {
        let record = Arc::new(Record::new().unwrap());
        let controller = Controller::new(Arc::clone(&record), namespace(), 4);
        let (admin, io) = (Pair::new(0, ASQ, ACQ), Pair::new(1, SQ, CQ));
        Self { ram: Ram::new(64), record, controller, admin, io, next: 100 }
    }
    fn enabled() -> Self {
        let mut bench = Self::new();
        bench.enable();
        bench
    }
    fn enable(&mut self) {
        let controller = &mut self.controller;
        controller.write(register::AQA, &((SIZE - 1) | ((SIZE - 1) << 16)).to_le_bytes());
        controller.write(register::ASQ, &ASQ.to_le_bytes());
        controller.write(register::ACQ, &ACQ.to_le_bytes());
        controller.write(register::CC, &0x0046_0001_u32.to_le_bytes());
        assert_eq!(self.csts(), CSTS_READY);
    }
    fn csts(&self) -> u32 {
        let mut bytes = [0; 4];
        self.controller.read(register::CSTS, &mut bytes);
        u32::from_le_bytes(bytes)
    }
    fn run(&mut self) -> Vec<Io> {
        let mut out = Vec::new();
        while self.controller.run(Some(&self.ram), &mut out) {}
        out
    }
    fn done(&mut self, io: &Io, outcome: Result<(), Failed>) {
        self.controller.done(io.token, outcome, Some(&self.ram));
        assert!(self.run().is_empty());
    }
    /// An admin command that is answered at once.
    fn ask(&mut self, opcode: u8, rest: &[(usize, u32)]) -> (Status, u32) {
        self.next += 1;
        self.admin.submit(&self.ram, &self.record, command(opcode, self.next, rest));
        assert!(self.run().is_empty());
        let (id, status, result) = self.admin.take(&self.ram, &self.record).unwrap();
        assert_eq!(id, self.next);
        (status, result)
    }
    fn make_queues(&mut self) {
        let size = (SIZE - 1) << 16 | 1;
        let cq = self.ask(admin::CREATE_CQ, &[(6, CQ as u32), (10, size), (11, 1 << 16 | 3)]);
        let sq = self.ask(admin::CREATE_SQ, &[(6, SQ as u32), (10, size), (11, 1 << 16 | 1)]);
        assert_eq!((cq.0, sq.0), (Status::SUCCESS, Status::SUCCESS));
    }
    fn read(&mut self, id: u16, block: u32) {
        let words = command(nvm::READ, id, &[(6, DATA as u32), (10, block), (12, 7)]);
        self.io.submit(&self.ram, &self.record, words);
    }
    /// This process dies, and another one goes on.
    fn die(&mut self) {
        self.controller = Controller::new(Arc::clone(&self.record), namespace(), 4);
    }
}

#[test]
fn a_driver_finds_its_disk() {
    let mut bench = Bench::enabled();
    let data = |bench: &Bench, at: u64, len: usize| {
        let mut bytes = vec![0; len];
        assert!(bench.ram.read(DATA + at, &mut bytes));
        bytes
    };
    assert_eq!(bench.ask(admin::IDENTIFY, &[(6, DATA as u32), (10, 1)]).0, Status::SUCCESS);
    assert_eq!(data(&bench, 4, 4), b"test");
    assert_eq!(
        data(&bench, 768, 37),
        b"nqn.2014-08.org.nvmexpress:uuid:".iter().chain(&data(&bench, 800, 5)).copied().collect::<Vec<u8>>()
    );
    assert_eq!(bench.ask(admin::IDENTIFY, &[(6, DATA as u32), (10, 0)]).0, Status::SUCCESS);
    assert_eq!(data(&bench, 0, 8), 2048_u64.to_le_bytes());
    assert_eq!(bench.ask(admin::IDENTIFY, &[(1, 0), (6, DATA as u32), (10, 2)]).0, Status::SUCCESS);
    assert_eq!(data(&bench, 0, 8), 1_u64.to_le_bytes());
    assert_eq!(bench.ask(admin::IDENTIFY, &[(1, 2), (6, DATA as u32), (10, 0)]).0, Status::NAMESPACE);
    assert_eq!(bench.ask(admin::SET_FEATURES, &[(10, 7), (11, 0x0007_0007)]), (Status::SUCCESS, 0x0003_0003));
    assert_eq!(bench.ask(admin::GET_FEATURES, &[(10, 6)]), (Status::SUCCESS, 1));
    assert_eq!(bench.ask(admin::LOG_PAGE, &[(6, DATA as u32), (10, 127 << 16 | 2)]).0, Status::SUCCESS);
    assert_eq!(bench.ask(admin::LOG_PAGE, &[(6, DATA as u32), (10, 127 << 16 | 9)]).0, Status::LOG_PAGE);
    bench.make_queues();
    bench.read(1, 8);
    let out = bench.run();
    let [Io { kind: IoKind::Read { offset: 4096, pieces }, .. }] = out.as_slice() else { panic!("{out:?}") };
    assert_eq!(*pieces, [(DATA, 4096)]);
    assert!(bench.controller.take_vectors().contains(&0));
    bench.done(&out[0], Ok(()));
    assert_eq!(bench.io.take(&bench.ram, &bench.record), Some((1, Status::SUCCESS, 0)));
    assert_eq!(bench.controller.take_vectors(), [1]);
    // A write that must be durable, one that fails, and one beyond the end.
    let words = command(nvm::WRITE, 2, &[(6, DATA as u32), (10, 0), (12, 1 << 30)]);
    bench.io.submit(&bench.ram, &bench.record, words);
    let words = command(nvm::WRITE, 3, &[(6, DATA as u32), (10, 2047), (12, 1)]);
    bench.io.submit(&bench.ram, &bench.record, words);
    let out = bench.run();
    assert!(matches!(out.as_slice(), [Io { kind: IoKind::Write { offset: 0, durable: true, .. }, .. }]), "{out:?}");
    assert_eq!(bench.io.take(&bench.ram, &bench.record), Some((3, Status::LBA_RANGE, 0)));
    bench.done(&out[0], Err(Failed));
    assert_eq!(bench.io.take(&bench.ram, &bench.record), Some((2, Status::WRITE_FAULT, 0)));
    // Ranges that are given up.
    let range: Vec<u8> = [(0_u32, 8_u32, 16_u64), (0, 1, 2047)]
        .iter()
        .flat_map(|(hint, blocks, first)| {
            [hint.to_le_bytes().as_slice(), &blocks.to_le_bytes(), &first.to_le_bytes()].concat()
        })
        .collect();
    assert!(bench.ram.write(DATA, &range));
    bench.io.submit(&bench.ram, &bench.record, command(nvm::DATASET, 4, &[(6, DATA as u32), (10, 1), (11, 4)]));
    let out = bench.run();
    let [Io { kind: IoKind::Zero { ranges, release: true, .. }, .. }] = out.as_slice() else { panic!("{out:?}") };
    assert_eq!(*ranges, [(8192, 4096), (2047 * 512, 512)]);
}

/// A deletion waits for what its queue has under way, and a shutdown for a flush.
#[test]
fn queues_go_and_the_controller_ends_in_order() {
    let mut bench = Bench::enabled();
    bench.make_queues();
    assert_eq!(bench.ask(admin::DELETE_CQ, &[(10, 1)]).0, Status::DELETION);
    bench.read(1, 0);
    let out = bench.run();
    bench.admin.submit(&bench.ram, &bench.record, command(admin::DELETE_SQ, 9, &[(10, 1)]));
    bench.read(2, 0);
    assert!(bench.run().is_empty(), "nothing is fetched from a queue that goes");
    assert_eq!(bench.admin.take(&bench.ram, &bench.record), None);
    bench.done(&out[0], Ok(()));
    assert_eq!(bench.admin.take(&bench.ram, &bench.record), Some((9, Status::SUCCESS, 0)));
    assert_eq!(bench.ask(admin::DELETE_CQ, &[(10, 1)]).0, Status::SUCCESS);
    bench.controller.write(register::CC, &0x0046_4001_u32.to_le_bytes());
    let out = bench.run();
    assert_eq!(out, [Io { token: NO_COMMAND, kind: IoKind::Flush }]);
    bench.controller.done(NO_COMMAND, Ok(()), None);
    assert_eq!(bench.csts() & CSTS_SHUT_MASK, CSTS_SHUT);
    bench.controller.write(register::CC, &0_u32.to_le_bytes());
    bench.run();
    assert_eq!(bench.csts(), 0);
}

#[test]
fn a_driver_that_breaks_the_rules_hurts_itself() {
    // Queues outside of memory: fatal, until it resets the controller.
    let mut bench = Bench::new();
    bench.controller.write(register::AQA, &0x0007_0007_u32.to_le_bytes());
    bench.controller.write(register::ASQ, &(1_u64 << 40).to_le_bytes());
    bench.controller.write(register::ACQ, &ACQ.to_le_bytes());
    bench.controller.write(register::CC, &0x0046_0001_u32.to_le_bytes());
    bench.record.doorbell(0).unwrap().store(1, Ordering::Release);
    bench.run();
    assert_eq!(bench.csts() & CSTS_FATAL, CSTS_FATAL);
    bench.controller.write(register::CC, &0_u32.to_le_bytes());
    bench.run();
    bench.enable();
    let wild = [
        (admin::CREATE_CQ, vec![(6, CQ as u32), (10, 1), (11, 3)], Status::QUEUE_SIZE),
        (admin::CREATE_CQ, vec![(6, CQ as u32), (10, 0xffff << 16 | 1), (11, 3)], Status::QUEUE_SIZE),
        (admin::CREATE_CQ, vec![(6, CQ as u32), (10, 7 << 16), (11, 3)], Status::QUEUE_ID),
        (admin::CREATE_CQ, vec![(6, CQ as u32), (10, 7 << 16 | 5), (11, 3)], Status::QUEUE_ID),
        (admin::CREATE_CQ, vec![(6, CQ as u32 + 4), (10, 7 << 16 | 1), (11, 3)], Status::PRP_OFFSET),
        (admin::CREATE_CQ, vec![(6, CQ as u32), (10, 7 << 16 | 1), (11, 2)], Status::FIELD),
        (admin::CREATE_CQ, vec![(6, CQ as u32), (10, 7 << 16 | 1), (11, 99 << 16 | 3)], Status::VECTOR),
        (admin::CREATE_SQ, vec![(6, SQ as u32), (10, 7 << 16 | 1), (11, 1 << 16 | 1)], Status::CQ_INVALID),
        (admin::DELETE_SQ, vec![(10, 1)], Status::QUEUE_ID),
        (admin::IDENTIFY, vec![(6, 1), (10, 1)], Status::PRP_OFFSET),
        (admin::IDENTIFY, vec![(7, 1), (10, 1)], Status::TRANSFER),
        (admin::IDENTIFY, vec![(6, DATA as u32), (10, 0x77)], Status::FIELD),
        (0x7f, vec![], Status::OPCODE),
        (admin::SET_FEATURES, vec![(10, 1 << 31 | 6)], Status::NOT_SAVEABLE),
    ];
    for (opcode, words, status) in wild {
        assert_eq!(bench.ask(opcode, &words).0, status, "{opcode:#x} {words:x?}");
    }
    // A doorbell with a value that no queue has, and one of no queue: both are told by an AER.
    bench.admin.submit(&bench.ram, &bench.record, command(admin::EVENT, 50, &[]));
    bench.run();
    bench.record.doorbell(0).unwrap().store(4000, Ordering::Release);
    bench.run();
    let told = bench.admin.take(&bench.ram, &bench.record);
    assert_eq!(told, Some((50, Status::SUCCESS, 1 << 8 | 1 << 16)));
    bench.record.doorbell(0).unwrap().store(bench.admin.tail, Ordering::Release);
    bench.record.doorbell(8).unwrap().store(1, Ordering::Release);
    assert_eq!(bench.ask(admin::LOG_PAGE, &[(6, DATA as u32), (10, 15 << 16 | 1)]).0, Status::SUCCESS);
    bench.admin.submit(&bench.ram, &bench.record, command(admin::EVENT, 51, &[]));
    bench.run();
    assert_eq!(bench.admin.take(&bench.ram, &bench.record), Some((51, Status::SUCCESS, 1 << 16)));
    // More AERs than there is room for.
    for id in 60..65 {
        bench.admin.submit(&bench.ram, &bench.record, command(admin::EVENT, id, &[]));
    }
    bench.run();
    assert_eq!(bench.admin.take(&bench.ram, &bench.record), Some((64, Status::EVENT_LIMIT, 0)));
}

/// A queue of completions that is full holds back, and loses nothing.
#[test]
fn a_full_completion_queue_waits_for_its_driver() {
    let mut bench = Bench::enabled();
    bench.make_queues();
    let mut seen = Vec::new();
    let mut id = 0;
    for _ in 0..3 {
        for _ in 0..SIZE - 1 {
            id += 1;
            bench.read(id, 0);
            for io in bench.run() {
                bench.done(&io, Ok(()));
            }
        }
        // Only now the driver looks.
        while let Some((id, status, _)) = bench.io.take(&bench.ram, &bench.record) {
            assert_eq!(status, Status::SUCCESS);
            seen.push(id);
            for io in bench.run() {
                bench.done(&io, Ok(()));
            }
        }
    }
    assert_eq!(seen, (1..=id).collect::<Vec<_>>());
}

/// Lists that are chained, entries that are not aligned, memory that is not there.
#[test]
fn lists_are_followed_as_far_as_they_are_right() {
    let ram = Ram::new(300);
    let page = |number: u64| number * PAGE;
    assert_eq!(prp::pieces(&ram, 0x10, 0, 100), Ok(vec![(0x10, 100)]));
    assert_eq!(prp::pieces(&ram, 0x1800, page(2), 4096), Ok(vec![(0x1800, 0x800 + 2048)]));
    assert_eq!(prp::pieces(&ram, 0x1800, page(9), 4096), Ok(vec![(0x1800, 0x800), (page(9), 2048)]));
    assert_eq!(prp::pieces(&ram, 0x1800, page(9) + 8, 4096), Err(Status::PRP_OFFSET));
    assert_eq!(prp::pieces(&ram, page(300), 0, 8), Err(Status::TRANSFER));
    assert_eq!(prp::pieces(&ram, 0, 0, 1 << 30), Err(Status::FIELD));
    // A list of two entries at the end of a page, the second of which points to the rest of it.
    let list = page(1) - 16;
    assert!(ram.write(list, &page(20).to_le_bytes()) && ram.write(list + 8, &page(2).to_le_bytes()));
    for entry in 0..8 {
        assert!(ram.write(page(2) + entry * 8, &page(100 + entry).to_le_bytes()));
    }
    let pieces = prp::pieces(&ram, page(50), list, 8 * PAGE).unwrap();
    assert_eq!(pieces, [(page(50), PAGE), (page(20), PAGE), (page(100), 6 * PAGE)]);
    assert!(ram.write(page(2), &(page(100) + 1).to_le_bytes()));
    assert_eq!(prp::pieces(&ram, page(50), list, 8 * PAGE), Err(Status::PRP_OFFSET));
    // One that is nothing but a pointer to itself ends.
    assert!(ram.write(page(3) - 8, &(page(3) - 8).to_le_bytes()));
    assert_eq!(prp::pieces(&ram, page(50), page(3) - 8, 8 * PAGE), Err(Status::PRP_OFFSET));
}

proptest! {
    /// A process that dies again and again, at any moment between two steps of the controller's or the medium's: every
    /// command completes exactly once.
    #[test]
    fn every_command_completes_exactly_once(steps in prop::collection::vec((0_u8..6, 0_u32..24), 20..300)) {
        let mut bench = Bench::enabled();
        bench.make_queues();
        let (mut id, mut open, mut seen) = (0_u16, Vec::new(), BTreeMap::new());
        let mut waiting = 0;
        for (step, moment) in steps {
            match step {
                0 | 1 if waiting < SIZE - 1 => {
                    id += 1;
                    waiting += 1;
                    bench.read(id, 0);
                }
                2 => open.extend(bench.run()),
                3 => if let Some(io) = open.pop() {
                    bench.controller.done(io.token, Ok(()), Some(&bench.ram));
                },
                // In the middle of whatever it does next, or right afterwards.
                4 => {
                    bench.ram.1.set(Some(moment));
                    let _ = catch_unwind(AssertUnwindSafe(|| {
                        if let Some(io) = open.pop() {
                            bench.controller.done(io.token, Ok(()), Some(&bench.ram));
                        }
                        bench.run()
                    }));
                    bench.ram.1.set(None);
                    bench.die();
                    open.clear();
                }
                _ => while let Some((id, status, _)) = bench.io.take(&bench.ram, &bench.record) {
                    prop_assert_eq!(status, Status::SUCCESS);
                    *seen.entry(id).or_insert(0) += 1;
                    waiting -= 1;
                },
            }
        }
        for _ in 0..4 * SIZE {
            open.extend(bench.run());
            for io in open.drain(..) {
                bench.controller.done(io.token, Ok(()), Some(&bench.ram));
            }
            while let Some((id, _, _)) = bench.io.take(&bench.ram, &bench.record) {
                *seen.entry(id).or_insert(0) += 1;
            }
        }
        prop_assert_eq!(seen, (1..=id).map(|id| (id, 1)).collect::<BTreeMap<_, _>>());
    }

    /// A record in which somebody left whatever he likes, and a driver that writes whatever it likes: never a panic, and
    /// a reset brings the controller back.
    #[test]
    fn nothing_that_stands_in_the_record_or_memory_is_believed(
        noise in prop::collection::vec((0_usize..crate::record::RECORD_LEN - 4, any::<u32>()), 0..64),
        memory in prop::collection::vec((0_u64..0x10_000, any::<u32>()), 0..200),
        writes in prop::collection::vec((prop_oneof![0_u64..0x40, 0x1000_u64..0x1040], any::<u32>()), 0..20),
    ) {
        let mut bench = Bench::enabled();
        bench.make_queues();
        for (at, word) in memory {
            let _ = bench.ram.write(at * 4 % 0x8000, &word.to_le_bytes());
        }
        for (at, word) in noise {
            // The magic word says that it is a record; without it there is none.
            let at = (at & !3).max(24);
            let file = std::os::fd::AsFd::as_fd(&*bench.record);
            rustix::io::pwrite(file, &word.to_le_bytes(), at as u64).unwrap();
        }
        bench.die();
        for (at, word) in writes {
            bench.controller.write(at & !3, &word.to_le_bytes());
            let mut out = Vec::new();
            bench.controller.run(Some(&bench.ram), &mut out);
            for io in out {
                bench.controller.done(io.token, Err(Failed), Some(&bench.ram));
            }
        }
        bench.controller.reset();
        bench.enable();
        bench.admin = Pair::new(0, ASQ, ACQ);
        let _ = bench.ram.write(ACQ, &[0; 4096]);
        prop_assert_eq!(bench.ask(admin::ABORT, &[]).0, Status::SUCCESS);
    }
}
