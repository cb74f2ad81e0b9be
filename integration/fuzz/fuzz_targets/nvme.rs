//! A guest that writes whatever it likes to an NVMe controller's registers, doorbells and queues, and processes that die in
//! between. Nothing may panic; what the medium is asked for is within the image and within memory, and asked for once.
#![no_main]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use atoll_nvme::controller::{Controller, Failed, Io, IoKind, NO_COMMAND};
use atoll_nvme::identify::Namespace;
use atoll_nvme::prp::Dma;
use atoll_nvme::record::Record;
use atoll_nvme::spec::{COMMAND_LEN, PAGE, TRANSFER_MAX, admin, register};
use libfuzzer_sys::fuzz_target;

const PAGES: u64 = 64;
const BYTES: u64 = 1 << 20;
const QUEUES: u16 = 4;
const SIZE: u32 = 8;
/// Where the driver that has brought the controller up has its queues: one of each kind, page after page.
const ASQ: u64 = 0x1000;
const SQ: u64 = 0x3000;

struct Ram(RefCell<Vec<u8>>);

impl Ram {
    fn slice(&self, address: u64, len: usize, then: impl FnOnce(&mut [u8])) -> bool {
        let mut memory = self.0.borrow_mut();
        let range = usize::try_from(address).ok().and_then(|at| Some(at..at.checked_add(len)?));
        range.and_then(|range| memory.get_mut(range)).map(then).is_some()
    }
}

impl Dma for Ram {
    fn read(&self, address: u64, out: &mut [u8]) -> bool {
        self.slice(address, out.len(), |from| out.copy_from_slice(from))
    }
    fn write(&self, address: u64, data: &[u8]) -> bool {
        self.slice(address, data.len(), |to| to.copy_from_slice(data))
    }
    fn publish(&self, address: u64, word: u32) -> bool {
        self.write(address, &word.to_le_bytes())
    }
    fn covers(&self, address: u64, len: u64) -> bool {
        usize::try_from(len).is_ok_and(|len| self.slice(address, len, |_| {}))
    }
}

struct Bench {
    ram: Ram,
    record: Arc<Record>,
    controller: Controller,
    /// What the medium was asked for and has not answered.
    asked: Vec<u16>,
}

fn controller(record: &Arc<Record>) -> Controller {
    let namespace = Namespace { bytes: BYTES, read_only: false, serial: "fuzz".into() };
    Controller::new(Arc::clone(record), namespace, QUEUES)
}

impl Bench {
    /// Lets the controller go on, and looks at what it asks for.
    fn run(&mut self, memory: bool) {
        let mut out: Vec<Io> = Vec::new();
        let dma = memory.then_some(&self.ram as &dyn Dma);
        // Bounded: a hostile driver may keep it busy for ever.
        for _ in 0..4 {
            if !self.controller.run(dma, &mut out) {
                break;
            }
        }
        for Io { token, kind } in out {
            assert!(token == NO_COMMAND || !self.asked.contains(&token), "asked twice");
            self.asked.push(token);
            let within = |offset: u64, len: u64| offset.checked_add(len).is_some_and(|end| end <= BYTES);
            match kind {
                IoKind::Read { offset, pieces } | IoKind::Write { offset, pieces, .. } => {
                    let len: u64 = pieces.iter().map(|(_, len)| len).sum();
                    assert!((1..=TRANSFER_MAX).contains(&len) && within(offset, len));
                    assert!(pieces.iter().all(|(at, len)| self.ram.covers(*at, *len)));
                }
                IoKind::Zero { ranges, .. } => assert!(ranges.iter().all(|(offset, len)| within(*offset, *len))),
                IoKind::Flush => {}
            }
        }
        assert_eq!(self.controller.out(), self.asked.len());
        let vectors = self.controller.take_vectors();
        let different: BTreeSet<_> = vectors.iter().collect();
        assert!(different.len() == vectors.len() && vectors.iter().all(|vector| *vector <= QUEUES));
    }

    /// What a stock driver does first.
    fn bring_up(&mut self) {
        let sizes = (SIZE - 1) << 16 | (SIZE - 1);
        self.controller.write(register::AQA, &sizes.to_le_bytes());
        self.controller.write(register::ASQ, &ASQ.to_le_bytes());
        self.controller.write(register::ACQ, &(ASQ + PAGE).to_le_bytes());
        self.controller.write(register::CC, &0x0046_0001_u32.to_le_bytes());
        let size = (SIZE - 1) << 16 | 1;
        let makes = [(admin::CREATE_CQ, SQ + PAGE, 1 << 16 | 3), (admin::CREATE_SQ, SQ, 1 << 16 | 1)];
        for (number, (opcode, base, how)) in (0..).zip(makes) {
            let mut words = [0_u32; 16];
            (words[0], words[6], words[10], words[11]) = (u32::from(opcode), base as u32, size, how);
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            assert!(self.ram.write(ASQ + number * COMMAND_LEN, &bytes));
        }
        self.ring(0, 2);
        self.run(true);
        self.ring(1, 2);
    }

    fn ring(&mut self, number: u64, value: u32) {
        self.controller.write(register::DOORBELLS + 4 * number, &value.to_le_bytes());
    }
}

fuzz_target!(|data: &[u8]| {
    let record = Arc::new(Record::new().expect("memory"));
    let controller = controller(&record);
    let ram = Ram(RefCell::new(vec![0; (PAGES * PAGE) as usize]));
    let mut bench = Bench { ram, record, controller, asked: Vec::new() };
    let Some((start, data)) = data.split_first() else { return };
    if start & 1 != 0 {
        bench.bring_up();
    }
    // Each step: what and how wide, where (two bytes), eight bytes to write.
    for step in data.chunks_exact(11) {
        let width = 1_usize << (step[0] & 3);
        let place = u16::from_le_bytes([step[1], step[2]]);
        let (at, value) = (u64::from(place), &step[3..3 + width]);
        let number = u64::from_le_bytes(step[3..11].try_into().unwrap());
        match step[0] >> 2 & 0xf {
            0 => bench.controller.write(at, value),
            1 => bench.controller.read(at, &mut [0; 8][..width]),
            // The registers that mean something.
            2 => bench.controller.write(at & 0x3c, value),
            3 | 4 => bench.ring(at & 0xf, number as u32 % (SIZE + 2)),
            // Memory: anything anywhere, and the words of queues and lists.
            5 => drop(bench.ram.write(at << 2, value)),
            6 | 7 => {
                // A command: which slot of which queue, its opcode, its pointers and its words, out of a few bits each.
                let base = if step[0] & 1 == 0 { SQ } else { ASQ } + (at & 7) * COMMAND_LEN;
                let page = |bits: u64| (bits & 0x7f) * PAGE / 2 + (bits >> 7 & 1) * 8;
                let mut words = [0_u32; 16];
                words[0] = u32::from(place >> 8) | (number as u32 & 7) << 16;
                words[1] = (number >> 3 & 3) as u32;
                words[6] = page(number >> 5) as u32;
                words[8] = page(number >> 13) as u32;
                words[10] = (number >> 21 & 0xffff) as u32 | (number as u32 & 7) << 16;
                words[11] = (number >> 37 & 7) as u32 | (number >> 40 & 7) as u32 * 0x1_0000;
                words[12] = (number >> 43 & 0x7ff) as u32 | (number >> 54 & 0x3f) as u32 * 0x400_0000;
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                bench.ram.write(base, &bytes);
            }
            8 | 9 => bench.run(true),
            10 => bench.run(false),
            11 | 12 => {
                if !bench.asked.is_empty() {
                    let token = bench.asked.remove(usize::from(place) % bench.asked.len());
                    let outcome = if step[3] & 1 == 0 { Ok(()) } else { Err(Failed) };
                    bench.controller.done(token, outcome, (step[3] & 2 == 0).then_some(&bench.ram as &dyn Dma));
                }
            }
            // The process dies, with whatever is under way.
            13 => {
                bench.controller = self::controller(&bench.record);
                bench.asked.clear();
            }
            // A predecessor that meant harm has written anything into what it leaves.
            14 => {
                let record = &bench.record;
                let queue = usize::from(place) % 10;
                if let Some(queue) = record.submission(queue) {
                    queue.size.store(u32::from(place >> 4), Relaxed);
                    queue.fetched.store(number, Relaxed);
                }
                if let Some(queue) = record.completion(queue) {
                    queue.produced.store(number, Relaxed);
                    queue.base.store(at << 8, Relaxed);
                    queue.size.store(u32::from(step[3]) * 9, Relaxed);
                }
                if let Some(slot) = record.slot(place) {
                    slot.state.store(u32::from(step[4] % 4), Relaxed);
                    slot.queue.store(u32::from(step[5] % 70), Relaxed);
                }
                bench.controller = self::controller(record);
                bench.asked.clear();
            }
            _ => {
                if bench.asked.is_empty() {
                    bench.controller.reset();
                }
            }
        }
    }
});
