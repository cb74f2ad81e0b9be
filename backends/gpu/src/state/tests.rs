//! The device as a pure state machine: a guest's memory in this process, commands as bytes, no queue, no socket.

use std::time::{Duration, Instant};

use atoll_kit::memory::{Segment, Segments};
use atoll_protocol::display::{HEADER_LEN, Header as WireHeader, REQUEST_MAX, Request};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::head::FRAME;
use crate::record::{ARENA_AT, ARENA_MIN, PAGE};
use crate::resource::{ENTRIES_MAX, SIDE_MAX};

type Ram = GuestMemoryMmap<()>;

const RAM: usize = 4 << 20;
const SAID: u64 = 0;
const PICTURE: u64 = 1 << 20;

struct Rig {
    gpu: Gpu,
    ram: Ram,
}

fn wishes() -> Wishes {
    Wishes { modes: vec![(640, 480), (320, 200)], enabled: 2 }
}

impl Rig {
    fn new() -> Self {
        let ram = Ram::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let mut gpu = Gpu::new(Record::new(ARENA_MIN).unwrap(), &wishes());
        gpu.load();
        Self { gpu, ram }
    }

    fn raw(&mut self, bytes: &[u8], again: bool) -> Answer {
        self.ram.write_slice(bytes, GuestAddress(SAID)).unwrap();
        let segments = [Segment { addr: GuestAddress(SAID), len: bytes.len() as u32 }];
        self.gpu.control(&self.ram, Segments(&segments), again).answer
    }

    fn say(&mut self, kind: u32, body: &[u32]) -> Answer {
        self.say_again(kind, body, false)
    }

    fn say_again(&mut self, kind: u32, body: &[u32], again: bool) -> Answer {
        let words = [&[kind, 0, 0, 0, 0, 0], body].concat();
        self.raw(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>(), again)
    }

    fn is(&mut self, kind: u32, body: &[u32], status: Status) {
        assert_eq!(self.say(kind, body), Answer::Status(status), "{kind:#x} {body:?}");
    }

    fn attach(&mut self, id: u32, entries: &[[u32; 4]]) -> Answer {
        self.say(ATTACH, &[&[id, entries.len() as u32], entries.as_flattened()].concat())
    }

    /// A picture of 16 by 16 that is shown on a scanout.
    fn show(&mut self, id: u32, scanout: u32) {
        self.is(CREATE, &[id, 2, 16, 16], Status::Ok);
        assert_eq!(self.attach(id, &[[PICTURE as u32, 0, 1024, 0]]), Answer::Status(Status::Ok));
        self.is(TRANSFER, &[0, 0, 16, 16, 0, 0, id, 0], Status::Ok);
        self.is(SET_SCANOUT, &[0, 0, 16, 16, scanout, id], Status::Ok);
        self.is(FLUSH, &[0, 0, 16, 16, id, 0], Status::Ok);
    }

    /// What the screen is told by now: numbers and payloads of messages.
    fn told(&mut self, now: Instant) -> Vec<(u32, Vec<u8>)> {
        let (mut out, mut told) = (Vec::new(), Vec::new());
        while self.gpu.tell(now, &mut Telling::new(&mut out, None)) == Turn::Told {}
        let mut rest = out.as_slice();
        while let Some((head, more)) = rest.split_first_chunk::<HEADER_LEN>() {
            let header = WireHeader::decode(head, REQUEST_MAX).unwrap();
            let (payload, more) = more.split_at(header.payload as usize);
            Request::decode(header.code, payload).unwrap();
            told.push((header.code, payload.to_vec()));
            rest = more;
        }
        told
    }

    /// A process dies and another one has its record.
    fn die(self) -> Self {
        let file = self.gpu.record.try_clone().unwrap();
        let mut gpu = Gpu::new(Record::map(file).unwrap(), &wishes());
        assert!(gpu.load());
        Self { gpu, ram: self.ram }
    }
}

const CREATE: u32 = 0x101;
const UNREF: u32 = 0x102;
const SET_SCANOUT: u32 = 0x103;
const FLUSH: u32 = 0x104;
const TRANSFER: u32 = 0x105;
const ATTACH: u32 = 0x106;
const DETACH: u32 = 0x107;

/// What a driver says that is wrong, and what it hears.
#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let mut rig = Rig::new();
    rig.is(CREATE, &[1, 2, 16, 16], Status::Ok);
    let cases: &[(u32, &[u32], Status)] = &[
        (CREATE, &[1, 2, 16, 16], Status::Resource),
        (CREATE, &[0, 2, 16, 16], Status::Resource),
        (CREATE, &[2, 5, 16, 16], Status::Parameter),
        (CREATE, &[2, 2, 0, 16], Status::Parameter),
        (CREATE, &[2, 2, 16, SIDE_MAX + 1], Status::Parameter),
        (CREATE, &[2, 2, u32::MAX, u32::MAX], Status::Parameter),
        (CREATE, &[2, 2, SIDE_MAX, SIDE_MAX], Status::OutOfMemory),
        (CREATE, &[2, 2, 16], Status::Unspecified),
        (UNREF, &[2, 0], Status::Resource),
        (DETACH, &[1, 0], Status::Unspecified),
        (DETACH, &[2, 0], Status::Resource),
        (TRANSFER, &[0, 0, 16, 16, 0, 0, 1, 0], Status::Unspecified),
        (SET_SCANOUT, &[0, 0, 16, 16, 2, 1], Status::Scanout),
        (SET_SCANOUT, &[0, 0, 16, 16, 2, 0], Status::Scanout),
        (SET_SCANOUT, &[0, 0, 16, 16, 0, 2], Status::Resource),
        (SET_SCANOUT, &[0, 0, 17, 16, 0, 1], Status::Parameter),
        (SET_SCANOUT, &[u32::MAX, 0, 2, 16, 0, 1], Status::Parameter),
        (SET_SCANOUT, &[0, 0, 0, 0, 0, 1], Status::Parameter),
        (FLUSH, &[0, 0, 17, 16, 1, 0], Status::Parameter),
        (FLUSH, &[0, u32::MAX, 16, 2, 1, 0], Status::Parameter),
        (FLUSH, &[0, 0, 16, 16, 2, 0], Status::Resource),
        (0x108, &[0, 0], Status::Unspecified),
        (0x200, &[0; 32], Status::Unspecified),
        (0x300, &[0; 32], Status::Unspecified),
        (ATTACH, &[1, 2, 0, 0, 16, 0], Status::Unspecified),
        (ATTACH, &[1, ENTRIES_MAX + 1], Status::OutOfMemory),
        (ATTACH, &[2, 0], Status::Resource),
    ];
    for (kind, body, status) in cases {
        rig.is(*kind, body, *status);
    }
    // Memory that is not the guest's: behind the end, over it, beyond all addresses.
    for entry in [[RAM as u32, 0, 16, 0], [RAM as u32 - 8, 0, 16, 0], [u32::MAX - 4, u32::MAX, 16, 0]] {
        assert_eq!(rig.attach(1, &[[0, 0, 64, 0], entry]), Answer::Status(Status::Parameter));
    }
    assert_eq!(rig.attach(1, &[[PICTURE as u32, 0, 1024, 0]]), Answer::Status(Status::Ok));
    assert_eq!(rig.attach(1, &[[PICTURE as u32, 0, 1024, 0]]), Answer::Status(Status::Unspecified));
    // Rows and offsets beyond the picture, and beyond its memory.
    for (x, y, width, height, low, high) in [
        (0, 0, 16, 16, 4, 0),
        (1, 0, 16, 16, 0, 0),
        (0, 15, 16, 2, 0, 0),
        (0, 0, 0, 16, 0, 0),
        (0, 0, 16, 16, u32::MAX, u32::MAX),
        (0, 0, u32::MAX, u32::MAX, 0, 0),
    ] {
        rig.is(TRANSFER, &[x, y, width, height, low, high, 1, 0], Status::Parameter);
    }
    rig.is(TRANSFER, &[0, 15, 16, 1, 960, 0, 1, 0], Status::Ok);
    assert_eq!(rig.raw(&[1; 23], false), Answer::Status(Status::Unspecified));
    let outside = [Segment { addr: GuestAddress(RAM as u64), len: 32 }];
    let done = rig.gpu.control(&rig.ram, Segments(&outside), false);
    assert_eq!(done.answer, Answer::Status(Status::Parameter));
}

/// Everything that a guest may have comes out of one budget, and comes back when it goes.
#[test]
fn bombs_end_at_the_budget() {
    let mut rig = Rig::new();
    let rounds = |rig: &mut Rig| {
        let made = (1..10_000).take_while(|id| rig.say(CREATE, &[*id, 2, 1, 1]) == Answer::Status(Status::Ok)).count();
        rig.is(CREATE, &[20_000, 2, 1, 1], Status::OutOfMemory);
        (1..=made as u32).for_each(|id| rig.is(UNREF, &[id, 0], Status::Ok));
        made
    };
    assert_eq!(rounds(&mut rig) as u64, ARENA_MIN / PAGE);
    assert_eq!(rounds(&mut rig) as u64, ARENA_MIN / PAGE);
    // Entries of a backing are paid for, too.
    rig.is(CREATE, &[1, 2, 16, 16], Status::Ok);
    rig.is(CREATE, &[2, 2, 256, 1023], Status::OutOfMemory);
    rig.is(CREATE, &[2, 2, 256, 1020], Status::Ok);
    assert_eq!(rig.attach(1, &[[0, 0, 1, 0]]), Answer::Status(Status::OutOfMemory));
    rig.is(UNREF, &[2, 0], Status::Ok);
    assert_eq!(rig.attach(1, &[[0, 0, 1, 0]]), Answer::Status(Status::Ok));
    rig.gpu.reset();
    assert_eq!(rounds(&mut rig) as u64, ARENA_MIN / PAGE);
}

/// A picture whose memory was another's begins black.
#[test]
fn nobody_sees_what_another_picture_was() {
    let mut rig = Rig::new();
    rig.ram.write_slice(&[0xaa; 1024], GuestAddress(PICTURE)).unwrap();
    rig.show(1, 0);
    let now = Instant::now();
    assert!(rig.told(now)[1].1.ends_with(&[0xaa; 1024]));
    rig.is(UNREF, &[1, 0], Status::Ok);
    rig.is(CREATE, &[2, 2, 16, 16], Status::Ok);
    rig.is(SET_SCANOUT, &[0, 0, 16, 16, 0, 2], Status::Ok);
    rig.is(FLUSH, &[0, 0, 16, 16, 2, 0], Status::Ok);
    let told = rig.told(now + FRAME);
    assert!(told.iter().any(|(code, payload)| *code == 8 && payload.ends_with(&[0; 1024])), "{told:?}");
}

/// What is told, when, and how much of it.
#[test]
fn a_screen_is_told_the_newest_and_not_too_often() {
    let mut rig = Rig::new();
    let start = Instant::now();
    assert_eq!(rig.gpu.due(start), None);
    rig.show(1, 0);
    let codes = |told: &[(u32, Vec<u8>)]| told.iter().map(|(code, _)| *code).collect::<Vec<_>>();
    assert_eq!(codes(&rig.told(start)), [7, 8]);
    // Two small parts become one that holds both, and wait for the next frame.
    rig.is(FLUSH, &[1, 1, 2, 2, 1, 0], Status::Ok);
    rig.is(FLUSH, &[8, 4, 1, 1, 1, 0], Status::Ok);
    assert_eq!(rig.gpu.due(start), Some(start + FRAME));
    assert!(rig.told(start + FRAME - Duration::from_micros(1)).is_empty());
    let told = rig.told(start + FRAME);
    assert_eq!((codes(&told), told[0].1.len()), (vec![8], 20 + 8 * 4 * 4));
    // A part of the picture is shown on the second scanout; only what both have is told there.
    rig.is(SET_SCANOUT, &[8, 8, 8, 8, 1, 1], Status::Ok);
    assert_eq!(codes(&rig.told(start + 2 * FRAME)), [7], "not flushed yet");
    rig.is(FLUSH, &[0, 0, 9, 9, 1, 0], Status::Ok);
    let told = rig.told(start + 4 * FRAME);
    assert_eq!(codes(&told), [8, 8]);
    assert_eq!((told[0].1.len(), told[1].1.len()), (20 + 9 * 9 * 4, 20 + 8 * 8 * 4), "all of it the first time");
    // Another screen knows nothing.
    rig.gpu.greet();
    assert_eq!(codes(&rig.told(start + 4 * FRAME)), [7, 8, 7, 8]);
    rig.is(UNREF, &[1, 0], Status::Ok);
    assert_eq!(codes(&rig.told(start + 5 * FRAME)), [7, 7]);
    assert_eq!(rig.gpu.due(start + 9 * FRAME), None);
}

/// A picture that no message can carry is told in parts, as one frame.
#[test]
fn a_large_picture_comes_in_parts() {
    let mut rig = Rig::new();
    rig.gpu = Gpu::new(Record::new(128 << 20).unwrap(), &wishes());
    rig.gpu.load();
    rig.is(CREATE, &[1, 2, 8192, 2100], Status::Ok);
    rig.is(SET_SCANOUT, &[0, 0, 8192, 2100, 0, 1], Status::Ok);
    rig.is(FLUSH, &[0, 0, 8192, 2100, 1, 0], Status::Ok);
    let told = rig.told(Instant::now());
    assert_eq!(told.iter().map(|(code, _)| *code).collect::<Vec<_>>(), [7, 8, 8]);
    let rows = |payload: &[u8]| [payload[8], payload[9], payload[16], payload[17]];
    assert_eq!(rows(&told[1].1), [0, 0, 0, 8], "2048 from the top");
    assert_eq!(rows(&told[2].1), [0, 8, 52, 0], "and 52 below");
}

/// A process dies: its successor has the pictures as they were when they were taken over last, the scanouts and the cursor.
#[test]
fn a_successor_has_it_all() {
    let mut rig = Rig::new();
    rig.ram.write_slice(&[0x55; 1024], GuestAddress(PICTURE)).unwrap();
    rig.show(1, 1);
    rig.is(CREATE, &[3, 2, 64, 64], Status::Ok);
    rig.is(CREATE, &[4, 1, 8, 8], Status::Ok);
    rig.is(UNREF, &[4, 0], Status::Ok);
    let cursor = [0x300_u32, 0, 0, 0, 0, 0, 0, 5, 6, 0, 3, 1, 2, 0].map(u32::to_le_bytes).concat();
    rig.ram.write_slice(&cursor, GuestAddress(SAID)).unwrap();
    let said = [Segment { addr: GuestAddress(SAID), len: cursor.len() as u32 }];
    rig.gpu.cursor(&rig.ram, Segments(&said)).unwrap();
    // The guest draws on, and nothing of that was transferred.
    rig.ram.write_slice(&[0x66; 1024], GuestAddress(PICTURE)).unwrap();
    let mut rig = rig.die();
    let told = rig.told(Instant::now());
    assert_eq!(told.iter().map(|(code, _)| *code).collect::<Vec<_>>(), [6, 7, 8]);
    assert!(told[2].1.ends_with(&[0x55; 1024]));
    rig.is(CREATE, &[1, 2, 16, 16], Status::Resource);
    rig.is(CREATE, &[4, 2, 16, 16], Status::Ok);
    rig.is(TRANSFER, &[0, 0, 16, 16, 0, 0, 1, 0], Status::Ok);
    rig.is(FLUSH, &[0, 0, 16, 16, 1, 0], Status::Ok);
    let told = rig.told(Instant::now() + FRAME);
    assert!(told[0].1.ends_with(&[0x66; 1024]));
    // Its pages are whose they were: all that is left can be had, and no more.
    rig.is(CREATE, &[9, 2, 1024, 249], Status::Ok);
    rig.is(CREATE, &[10, 2, 64, 64], Status::OutOfMemory);
}

/// A successor that was started before its predecessor had written anything finds what was written since.
#[test]
fn a_successor_looks_when_it_takes_over() {
    let record = Record::new(ARENA_MIN).unwrap();
    let mut waiting = Gpu::new(Record::map(record.try_clone().unwrap()).unwrap(), &wishes());
    let mut rig = Rig::new();
    rig.gpu = Gpu::new(record, &wishes());
    assert!(!rig.gpu.load());
    rig.show(1, 0);
    assert!(waiting.load() && waiting.takes_over() && !waiting.takes_over());
    assert_eq!(waiting.resources.len(), 1);
}

/// The last command of a process that died may have been executed and not answered: it is executed again, and does no harm.
#[test]
fn a_command_may_be_executed_again() {
    let mut rig = Rig::new();
    let ok = Answer::Status(Status::Ok);
    let attach = [1, 1, PICTURE as u32, 0, 1024, 0];
    let twice: &[(u32, &[u32])] = &[(CREATE, &[1, 2, 16, 16]), (ATTACH, &attach), (DETACH, &[1, 0]), (UNREF, &[1, 0])];
    for (kind, body) in twice {
        rig.is(*kind, body, Status::Ok);
        let mut other = rig.die();
        assert_eq!(other.say_again(*kind, body, true), ok, "{kind:#x}");
        rig = other;
    }
    rig.is(UNREF, &[1, 0], Status::Resource);
    rig.is(CREATE, &[1, 2, 16, 16], Status::Ok);
    assert_eq!(rig.say_again(CREATE, &[1, 2, 16, 17], true), Answer::Status(Status::Resource), "it is another one");
}

/// A record that makes no sense: what cannot be right is dropped, the rest serves.
#[test]
fn a_record_is_hostile_input() {
    use crate::record::Slot;
    let mut rig = Rig::new();
    rig.show(1, 0);
    let record = rig.gpu.record();
    let good = record.slot(0).unwrap();
    let page = |number: u64| ARENA_AT + number * PAGE;
    let wrong = [
        Slot { id: 0, pixels_at: page(9), ..good },
        Slot { pixels_at: page(9), ..good },
        Slot { id: 2, ..good },
        Slot { id: 2, pixels_at: page(9) + 1, ..good },
        Slot { id: 2, pixels_at: 0, ..good },
        Slot { id: 2, pixels_at: u64::MAX - PAGE + 1, ..good },
        Slot { id: 2, pixels_at: page(255), width: 64, height: 64, ..good },
        Slot { id: 2, pixels_at: page(9), format: 77, ..good },
        Slot { id: 2, pixels_at: page(9), width: u32::MAX, height: u32::MAX, ..good },
    ];
    (1..).zip(&wrong).for_each(|(number, slot)| record.set_slot(number, slot));
    // One whose backing cannot be right has none; a scanout of what is not there shows nothing.
    record.set_slot(99, &Slot { id: 3, pixels_at: page(20), entries_at: page(30), entries: u32::MAX, ..good });
    record.set_scanout(1, [1, 0, 0, 17, 16]);
    let mut rig = rig.die();
    assert_eq!(rig.gpu.resources.len(), 2);
    rig.is(TRANSFER, &[0, 0, 16, 16, 0, 0, 3, 0], Status::Unspecified);
    rig.is(TRANSFER, &[0, 0, 16, 16, 0, 0, 1, 0], Status::Ok);
    assert_eq!(rig.told(Instant::now()).iter().map(|(code, _)| *code).collect::<Vec<_>>(), [7, 8]);
    let rig = rig.die();
    assert_eq!(rig.gpu.resources.len(), 2, "what was dropped stays so");
}

#[derive(Clone, Debug)]
enum Step {
    Say(u32, Vec<u32>),
    Cursor(u32, Vec<u32>),
    Tell,
    Greet,
    Die,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let word = || prop_oneof![8 => 0_u32..20, 2 => 0_u32..5000, 1 => any::<u32>()];
    let words = move || prop::collection::vec(word(), 0..20);
    let step = prop_oneof![
        20 => (0x100_u32..0x10c, words()).prop_map(|(kind, body)| Step::Say(kind, body)),
        3 => (0x300_u32..0x302, words()).prop_map(|(kind, body)| Step::Cursor(kind, body)),
        4 => Just(Step::Tell),
        1 => Just(Step::Greet),
        1 => Just(Step::Die),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    /// Any commands, tellings and deaths in any order: nothing panics, what is told is what a screen takes, and a successor
    /// has as many pictures.
    #[test]
    fn anything_may_be_said(steps in steps()) {
        let mut rig = Rig::new();
        let mut now = Instant::now();
        for step in steps {
            match step {
                Step::Say(kind, body) => drop(rig.say(kind, &body)),
                Step::Cursor(kind, body) => {
                    let words = [&[kind, 0, 0, 0, 0, 0], body.as_slice()].concat();
                    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                    rig.ram.write_slice(&bytes, GuestAddress(SAID)).unwrap();
                    let said = [Segment { addr: GuestAddress(SAID), len: bytes.len() as u32 }];
                    let _ = rig.gpu.cursor(&rig.ram, Segments(&said));
                }
                Step::Tell => {
                    now += FRAME;
                    rig.told(now);
                }
                Step::Greet => rig.gpu.greet(),
                Step::Die => {
                    let before = rig.gpu.resources.len();
                    rig = rig.die();
                    prop_assert_eq!(rig.gpu.resources.len(), before);
                }
            }
        }
    }
}
