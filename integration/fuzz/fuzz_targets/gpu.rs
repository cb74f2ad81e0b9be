//! A guest that says whatever it likes to a display, in 2D and in 3D (with a renderer that draws nothing), a screen that comes and goes, and processes that die in between. Nothing
//! may panic, what a screen is told is what it takes, and a successor has what its predecessor had.
#![no_main]

use std::sync::{Arc, LazyLock};
use std::time::Instant;

use atoll_gpu::frame_memory::{FrameMemory, Telling};
use atoll_gpu::head::{FRAME, Turn};
use atoll_gpu::record::{ARENA_MIN, Record};
use atoll_gpu::render::{Blank, RingRam};
use atoll_gpu::state::{Gpu, Wishes};
use atoll_kit::memory::{Segment, Segments};
use atoll_protocol::display::{DisplayInfo, HEADER_LEN, Header, REQUEST_MAX, Rect, Request};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RAM: usize = 1 << 20;

fn wishes() -> Wishes {
    Wishes { modes: vec![(640, 480), (800, 600)], enabled: 1 }
}

type Ram = GuestMemoryMmap<()>;

/// The device on a record, as a process has it.
fn device(record: Record, ram: &Arc<Ram>) -> Gpu {
    let mut gpu = Gpu::new(record, &wishes());
    gpu.serve(Arc::new(Blank));
    gpu.agree(true);
    gpu.memory(Arc::new(RingRam(Arc::clone(ram))));
    gpu.load();
    gpu
}

/// The small numbers with which commands get further: each byte is a word, but for one that says that four follow.
fn words(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = bytes.iter();
    while let Some(byte) = rest.next() {
        match byte {
            0xff => out.extend(rest.by_ref().take(4)),
            byte => out.extend(u32::from(*byte).to_le_bytes()),
        }
    }
    out
}

fn told(gpu: &mut Gpu, now: Instant) {
    static MEMORY: LazyLock<FrameMemory> = LazyLock::new(|| FrameMemory::new().expect("memory for frames"));
    let mut out = Vec::new();
    let mut telling = Telling::new(&mut out, Some(&MEMORY));
    while gpu.tell(now, &mut telling) == Turn::Told {
        assert!(telling.messages.len() < 64 << 20);
    }
    let mut rest = out.as_slice();
    while let Some((head, more)) = rest.split_first_chunk::<HEADER_LEN>() {
        let header = Header::decode(head, REQUEST_MAX).expect("a header");
        let (payload, more) = more.split_at(header.payload as usize);
        Request::decode(header.code, payload).expect("a message that a screen takes");
        rest = more;
    }
}

fuzz_target!(|data: &[u8]| {
    let ram = Arc::new(Ram::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory"));
    let mut gpu = device(Record::new(ARENA_MIN).expect("a record"), &ram);
    let mut now = Instant::now();
    let mut rest = data;
    while let Some(([what, len], more)) = rest.split_first_chunk::<2>() {
        let (body, more) = more.split_at(usize::from(*len).min(more.len()));
        rest = more;
        let kind = u32::from(*what & 0x1f);
        // The upper half is 3D's, for one of two contexts.
        let (group, context) = if kind < 16 { (0x100, 0) } else { (0x200 - 16, 1 + u32::from(*len & 1)) };
        let mut said = [group + kind, 0, 0, 0, context, 0].map(u32::to_le_bytes).concat();
        said.extend(words(body));
        match what >> 5 {
            0..=3 => {
                ram.write_slice(&said, GuestAddress(0)).expect("a command");
                let segments = [Segment { addr: GuestAddress(0), len: said.len() as u32 }];
                gpu.control(&*ram, Segments(&segments), what >> 5 == 3);
            }
            4 => {
                said.splice(..4, (0x300 + kind % 3).to_le_bytes());
                ram.write_slice(&said, GuestAddress(0)).expect("a command");
                let segments = [Segment { addr: GuestAddress(0), len: said.len() as u32 }];
                let _ = gpu.cursor(&*ram, Segments(&segments));
            }
            5 => {
                now += FRAME;
                told(&mut gpu, now);
            }
            6 => {
                let mut info = DisplayInfo::default();
                info.screens[0].rect = Rect { x: 0, y: 0, width: kind << 7, height: kind << 6 };
                gpu.want(&info, true);
                gpu.greet();
            }
            _ => {
                let file = gpu.record().try_clone().expect("a descriptor");
                gpu = device(Record::map(file).expect("its record"), &ram);
            }
        }
    }
    told(&mut gpu, now + FRAME);
});
