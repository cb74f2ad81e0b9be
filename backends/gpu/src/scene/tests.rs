//! 3D without a library: a renderer that draws nothing and keeps what it is lent.

use std::sync::{Arc, Mutex, Weak};

use atoll_kit::memory::{Segment, Segments};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::command::Status;
use crate::frame_memory::Telling;
use crate::record::{ARENA_MIN, Slot};
use crate::render::{Capset, Pinned, RingRam};
use crate::state::{Gpu, Wishes};

type Guest = GuestMemoryMmap<()>;

const RAM: usize = 1 << 20;

/// What was asked of the renderer, and what it holds.
#[derive(Default)]
struct Diary {
    said: Mutex<Vec<String>>,
    lent: Mutex<BTreeMap<u32, Pinned>>,
}

impl Diary {
    fn say(&self, what: String) {
        self.said.lock().unwrap().push(what);
    }
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.said.lock().unwrap())
    }
}

impl Render for Diary {
    fn capsets(&self) -> &[Capset] {
        &[]
    }
    fn create_context(&self, id: u32, name: &[u8]) -> Result<(), Failed> {
        self.say(format!("begin {id} {}", String::from_utf8_lossy(name)));
        Ok(())
    }
    fn destroy_context(&self, id: u32) {
        self.say(format!("end {id}"));
    }
    fn create(&self, id: u32, _shape: &Shape) -> Result<(), Failed> {
        self.say(format!("create {id}"));
        // One that it cannot make.
        if id == 66 { Err(Failed(22)) } else { Ok(()) }
    }
    fn unref(&self, id: u32) {
        self.lent.lock().unwrap().remove(&id);
        self.say(format!("unref {id}"));
    }
    fn attach(&self, id: u32, backing: Pinned) -> Result<(), Failed> {
        let bytes: usize = backing.pieces().iter().map(|(_, len)| len).sum();
        self.say(format!("attach {id} {bytes}"));
        assert!(self.lent.lock().unwrap().insert(id, backing).is_none(), "it has one");
        Ok(())
    }
    fn detach(&self, id: u32) {
        if self.lent.lock().unwrap().remove(&id).is_some() {
            self.say(format!("detach {id}"));
        }
    }
    fn join(&self, context: u32, id: u32) {
        self.say(format!("join {context} {id}"));
    }
    fn part(&self, context: u32, id: u32) {
        self.say(format!("part {context} {id}"));
    }
    fn submit(&self, context: u32, stream: &mut [u32]) -> Result<(), Failed> {
        self.say(format!("submit {context} {stream:x?}"));
        Ok(())
    }
    fn transfer(&self, transfer: &Transfer) -> Result<(), Failed> {
        self.say(format!("transfer {} {}", transfer.context, transfer.id));
        Ok(())
    }
    fn read(&self, id: u32, rect: Rect, _out: &mut [u8]) -> Result<(), Failed> {
        self.say(format!("read {id} {} {} {} {}", rect.x, rect.y, rect.width, rect.height));
        Ok(())
    }
    fn write(&self, id: u32, rect: Rect, pixels: &mut [u8]) -> Result<(), Failed> {
        self.say(format!("write {id} {} by {}: {}", rect.width, rect.height, pixels[0]));
        Ok(())
    }
    fn finish(&self) {
        self.say("finish".into());
    }
}

struct Rig {
    gpu: Gpu,
    ram: Arc<Guest>,
    diary: Arc<Diary>,
}

fn memory() -> Arc<Guest> {
    Arc::new(Guest::from_ranges(&[(GuestAddress(0), RAM)]).unwrap())
}

impl Rig {
    fn on(record: Record) -> Self {
        let (ram, diary) = (memory(), Arc::new(Diary::default()));
        let mut gpu = Gpu::new(record, &Wishes { modes: vec![(640, 480)], enabled: 1 });
        gpu.serve(Arc::clone(&diary) as Arc<dyn Render>);
        gpu.agree(true);
        gpu.memory(Arc::new(RingRam(Arc::clone(&ram))));
        gpu.load();
        Self { gpu, ram, diary }
    }

    fn new() -> Self {
        Self::on(Record::new(ARENA_MIN).unwrap())
    }

    /// Its successor.
    fn die(self) -> Self {
        Self::on(Record::map(self.gpu.record().try_clone().unwrap()).unwrap())
    }

    fn again(&mut self, again: bool, kind: u32, context: u32, body: &[u32]) -> Status {
        let bytes: Vec<u8> =
            [&[kind, 1, 5, 0, context, 0], body].concat().iter().flat_map(|word| word.to_le_bytes()).collect();
        self.ram.write_slice(&bytes, GuestAddress(0)).unwrap();
        let segments = [Segment { addr: GuestAddress(0), len: bytes.len() as u32 }];
        match self.gpu.control(&*self.ram, Segments(&segments), again).answer {
            Answer::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    fn say(&mut self, kind: u32, context: u32, body: &[u32]) -> Status {
        self.again(false, kind, context, body)
    }

    fn done(&mut self, kind: u32, context: u32, body: &[u32]) {
        assert_eq!(self.say(kind, context, body), Status::Ok, "{kind:#x} {body:?}");
    }

    fn begin(&mut self, context: u32) -> Status {
        self.say(0x200, context, &[&[2, 0, 0x6261], [0; 15].as_slice()].concat())
    }

    fn canvas(&mut self, id: u32) -> Status {
        self.say(0x204, 0, &[id, 2, 1, 2, 16, 16, 1, 1, 0, 0, 0, 0])
    }

    fn said(&self) -> Vec<String> {
        self.diary.take()
    }
}

/// What a program does in its life, and what the renderer hears of it: in this order, and no more.
#[test]
fn a_renderer_hears_what_was_checked() {
    let mut rig = Rig::new();
    assert_eq!((rig.begin(3), rig.canvas(7)), (Status::Ok, Status::Ok));
    rig.done(0x202, 3, &[7, 0]);
    rig.done(0x106, 0, &[7, 2, 4096, 0, 1000, 0, 8192, 0, 24, 0]);
    rig.done(0x207, 3, &[8, 0, 0xab, 0xcd]);
    rig.done(0x205, 3, &[0, 0, 0, 16, 16, 1, 0, 0, 7, 0, 0, 0]);
    assert_eq!(
        rig.said(),
        [
            "begin 3 ab",
            "create 7",
            "join 3 7",
            "attach 7 1024",
            "submit 3 [ab, cd]",
            "finish",
            "transfer 3 7",
            "finish"
        ]
    );
    // Shown, it is read back: all of it first, then what is flushed.
    rig.done(0x103, 0, &[0, 0, 16, 16, 0, 7]);
    rig.done(0x104, 0, &[4, 4, 2, 2, 7, 0]);
    assert_eq!(rig.said(), ["read 7 0 0 16 16"]);
    let mut out = Vec::new();
    rig.gpu.tell(std::time::Instant::now(), &mut Telling::new(&mut out, None));
    rig.done(0x104, 0, &[4, 4, 2, 2, 7, 0]);
    assert_eq!(rig.said(), ["read 7 4 4 2 2"]);
    // What it cannot make is not there afterwards; what it did not hear of neither.
    assert_eq!(rig.canvas(66), Status::Unspecified);
    assert_eq!(rig.say(0x102, 0, &[66, 0]), Status::Resource);
    rig.said();
    assert_eq!(rig.say(0x205, 3, &[0, 0, 0, 17, 16, 1, 0, 0, 7, 0, 0, 0]), Status::Parameter);
    assert_eq!(rig.say(0x207, 4, &[0, 0]), Status::Context);
    rig.done(0x102, 0, &[7, 0]);
    rig.done(0x201, 3, &[]);
    assert_eq!(rig.said(), ["detach 7", "unref 7", "end 3"]);
    // A driver that has not agreed has no 3D.
    rig.gpu.agree(false);
    assert_eq!((rig.begin(1), rig.said().len()), (Status::Unspecified, 0));
}

/// A picture of 2D is uploaded for the stream of a context that may use it, and for nobody else's.
#[test]
fn a_flat_picture_is_mirrored_when_it_is_wanted() {
    let mut rig = Rig::new();
    assert_eq!((rig.begin(1), rig.begin(2)), (Status::Ok, Status::Ok));
    rig.done(0x101, 0, &[7, 2, 16, 16]);
    rig.done(0x106, 0, &[7, 1, 4096, 0, 1024, 0]);
    rig.ram.write_slice(&[9; 1024], GuestAddress(4096)).unwrap();
    rig.done(0x105, 0, &[0, 0, 16, 16, 0, 0, 7, 0]);
    rig.done(0x202, 1, &[7, 0]);
    rig.done(0x207, 2, &[0, 0]);
    assert_eq!(rig.said(), ["begin 1 ab", "begin 2 ab", "submit 2 []", "finish"]);
    rig.done(0x207, 1, &[0, 0]);
    assert_eq!(rig.said(), ["create 7", "join 1 7", "write 7 16 by 16: 9", "submit 1 []", "finish"]);
    rig.done(0x207, 1, &[0, 0]);
    rig.done(0x105, 0, &[0, 0, 4, 2, 0, 0, 7, 0]);
    rig.done(0x207, 1, &[0, 0]);
    assert_eq!(rig.said(), ["submit 1 []", "finish", "write 7 4 by 2: 9", "submit 1 []", "finish"]);
    rig.done(0x102, 0, &[7, 0]);
    assert_eq!(rig.said(), ["unref 7"]);
    rig.done(0x207, 1, &[0, 0]);
}

/// Memory stays mapped for as long as a renderer has pieces of it, and no longer.
#[test]
fn memory_is_held_for_as_long_as_it_is_lent() {
    let mut rig = Rig::new();
    assert_eq!(rig.canvas(7), Status::Ok);
    rig.done(0x106, 0, &[7, 1, 4096, 0, 1024, 0]);
    let first: Weak<Guest> = Arc::downgrade(&rig.ram);
    rig.said();
    rig.ram = memory();
    assert!(first.upgrade().is_some(), "it is lent");
    rig.gpu.memory(Arc::new(RingRam(Arc::clone(&rig.ram))));
    assert_eq!(rig.said(), ["detach 7", "attach 7 1024"]);
    assert!(first.upgrade().is_none(), "nobody has it");
    // The next one is shorter than the backing.
    let short = Arc::new(Guest::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
    rig.gpu.memory(Arc::new(RingRam(short)));
    assert_eq!(rig.said(), ["detach 7"]);
    assert_eq!(rig.say(0x205, 0, &[0, 0, 0, 16, 16, 1, 0, 0, 7, 0, 0, 0]), Status::Unspecified);
    assert_eq!(rig.said(), [""; 0], "it is not asked for what it was not lent");
    rig.done(0x107, 0, &[7, 0]);
    rig.gpu.reset();
    assert_eq!(rig.said(), ["unref 7"]);
}

/// A successor answers for a lost context and draws nothing for it; what the record says of resources is there again, and
/// what cannot be right is not.
#[test]
fn contexts_are_lost_and_resources_are_made_anew() {
    let mut rig = Rig::new();
    assert_eq!((rig.begin(3), rig.canvas(7)), (Status::Ok, Status::Ok));
    rig.done(0x202, 3, &[7, 0]);
    rig.done(0x106, 0, &[7, 1, 4096, 0, 1024, 0]);
    rig.done(0x103, 0, &[0, 0, 16, 16, 0, 7]);
    rig.done(0x104, 0, &[0, 0, 16, 16, 7, 0]);
    // A slot that is as it should be, and some that cannot be.
    let record = rig.gpu.record();
    let good = record.slot(0).unwrap();
    let [first, bind, ..] = good.solid.unwrap();
    let other = Slot { id: 8, pixels_at: 0, entries_at: 0, entries: 0, ..good };
    let wrong = [
        Slot { id: 0, ..other },
        Slot { id: 7, ..other },
        Slot { id: 66, ..other },
        Slot { solid: Some([9, bind, 1, 1, 0]), ..other },
        Slot { solid: Some([first, bind, 0, 1, 0]), ..other },
        Slot { solid: Some([first | 15 << 8, bind, 1, 1, 0]), ..other },
        Slot { width: 0, ..other },
        Slot { width: 16_384, height: 16_384, ..other },
    ];
    (1..).zip(&wrong).for_each(|(number, slot)| record.set_slot(number, slot));
    record.set_slot(50, &Slot { id: 9, pixels_at: good.pixels_at, ..other });
    record.set_context(9, 3);
    let mut rig = rig.die();
    let mut said = rig.said();
    said.sort();
    assert_eq!(said, ["attach 7 1024", "create 66", "create 7", "create 9"]);
    // Nothing of the lost context reaches the renderer, and nothing of it is an error.
    rig.done(0x207, 3, &[8, 0, 1, 2]);
    rig.done(0x104, 0, &[0, 0, 16, 16, 7, 0]);
    rig.done(0x203, 3, &[7, 0]);
    rig.done(0x202, 3, &[7, 0]);
    assert_eq!(rig.said(), [""; 0]);
    rig.done(0x205, 3, &[0, 0, 0, 16, 16, 1, 0, 0, 7, 0, 0, 0]);
    rig.done(0x104, 0, &[0, 0, 16, 16, 7, 0]);
    assert_eq!(rig.said(), ["transfer 0 7", "finish", "read 7 0 0 16 16"], "it has contents again");
    // What was under way is said again.
    assert_eq!(rig.again(true, 0x201, 3, &[]), Status::Ok);
    assert_eq!(rig.again(true, 0x201, 3, &[]), Status::Ok);
    assert_eq!(rig.say(0x201, 3, &[]), Status::Context);
    assert_eq!(rig.begin(3), Status::Ok);
    let mut rig = rig.die();
    let body = [&[2, 0, 0x6261], [0; 15].as_slice()].concat();
    rig.said();
    assert_eq!(rig.again(true, 0x200, 3, &body), Status::Ok, "it died when it had written it down");
    assert_eq!(rig.say(0x200, 3, &body), Status::Context);
    rig.done(0x207, 3, &[0, 0]);
    assert_eq!(rig.said(), ["begin 3 ab", "submit 3 []", "finish"]);
    assert_eq!(
        rig.again(true, 0x204, 0, &[7, 2, 1, 2, 16, 16, 1, 1, 0, 0, 0, 0]),
        Status::Resource,
        "it has a backing"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Any commands with small numbers, and deaths in between: nothing panics, and a renderer is lent nothing twice.
    #[test]
    fn anything_may_be_said(steps in prop::collection::vec((0_u32..26, 0_u32..3, prop::collection::vec(0_u32..20, 0..14)), 0..40)) {
        let mut rig = Rig::new();
        for (kind, context, body) in steps {
            match kind {
                // Those with an answer of their own.
                0..8 => drop(rig.say(0x200 + kind, context, &body)),
                8..16 => drop(rig.say(0x101 + kind % 7, context, &body)),
                16..24 => drop(rig.again(true, 0x200 + kind % 8, context, &body)),
                24 => rig = rig.die(),
                _ => rig.gpu.memory(Arc::new(RingRam(memory()))),
            }
        }
    }
}
