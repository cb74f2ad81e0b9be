//! A guest that writes whatever it likes into its rings and descriptors, before a disk serves them and meanwhile.
//! Nothing may panic or hang; a head is in flight once at most; a chain stays within its bounds; a request that is
//! refused touches no memory but its status byte.
#![no_main]

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::Arc;

use atoll_blk::disk::Disk;
use atoll_blk::storage::{Source, Storage};
use atoll_kit::chain::{CHAIN_MAX, Chain};
use atoll_kit::device::Io;
use atoll_kit::ring::{Ring, RingConfig, Taken};
use atoll_kit::stats::Figures;
use atoll_kit::uring::Uring;
use atoll_kit::{Device, Progress, QueueHandler};
use atoll_protocol::stats::QueueStats;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Two regions with a hole between them, so that chains can leave memory in the middle.
const LOW: usize = 0x8000;
const HIGH: (u64, usize) = (0xa000, 0x6000);

struct World {
    mem: Arc<GuestMemoryMmap<()>>,
    uring: Uring,
    disk: Disk,
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World {
        mem: Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), LOW), (GuestAddress(HIGH.0), HIGH.1)]).unwrap()),
        uring: Uring::new(8, &[]).unwrap(),
        disk: Disk::new(Storage::open(&Source::Null(1 << 20), false, false).unwrap(), 1, "fuzz"),
    });
}

/// Takes `n` bytes off the front, zeroes when there are no more.
fn take<const N: usize>(data: &mut &[u8]) -> [u8; N] {
    let mut out = [0; N];
    let n = N.min(data.len());
    out[..n].copy_from_slice(&data[..n]);
    *data = &data[n..];
    out
}

/// Writes descriptors that are nearly right, and makes some of them available.
fn offer(mem: &GuestMemoryMmap<()>, data: &mut &[u8], size: u16, avail: &mut u16) {
    let [count, heads] = take(data);
    for index in 0..u64::from(count % 16) {
        let [page, offset, len, flags, next] = take(data);
        // Headers and lists of ranges, memory, the hole, the end, and the rings themselves.
        let addr = match page % 8 {
            7 => u64::MAX - u64::from(offset),
            page => u64::from(page) * 0x1c00 + u64::from(offset),
        };
        let len = match len {
            0..200 => u32::from(len),
            200..250 => u32::from(len - 200) * 512,
            _ => u32::MAX - u32::from(255 - len) * 16,
        };
        let (flags, next) = (u16::from(flags % 8), u16::from(next) % (size + 2));
        let at = GuestAddress(0x1000 + 16 * index);
        let _ = mem.write_obj(addr.to_le(), at);
        let _ = mem.write_obj(len.to_le(), GuestAddress(at.0 + 8));
        let _ = mem.write_obj(flags.to_le(), GuestAddress(at.0 + 12));
        let _ = mem.write_obj(next.to_le(), GuestAddress(at.0 + 14));
    }
    for _ in 0..heads % 8 {
        let head = u16::from(take::<1>(data)[0]) % (size + 1);
        let _ = mem.write_obj(head.to_le(), GuestAddress(0x2004 + 2 * u64::from(*avail % size)));
        *avail = avail.wrapping_add(1);
    }
    let _ = mem.write_obj(avail.to_le(), GuestAddress(0x2002));
}

/// Spreads bytes over memory: (address, length, bytes), as long as a length is not zero.
fn scribble(mem: &GuestMemoryMmap<()>, data: &mut &[u8]) {
    while let Some(at) = data.first().copied().filter(|at| *at > 0) {
        let [_, low, high] = take(data);
        let n = usize::from(at % 64).min(data.len());
        let _ = mem.write(&data[..n], GuestAddress(u64::from(u16::from_le_bytes([low, high]))));
        *data = &data[n..];
    }
    take::<1>(data);
}

fuzz_target!(|data: &[u8]| {
    WORLD.with_borrow_mut(|World { mem, uring, disk }| {
        let mut data = data;
        let zeroes = vec![0; LOW];
        let _ = mem.write(&zeroes, GuestAddress(0));
        let _ = mem.write(&zeroes[..HIGH.1], GuestAddress(HIGH.0));
        let [order, flags, base_low, base_high] = take(&mut data);
        let size = 1 << (order % 8);
        let base = u16::from_le_bytes([base_low, base_high]);
        let mut avail = base;
        scribble(mem, &mut data);
        offer(mem, &mut data, size, &mut avail);
        let config = RingConfig {
            index: 0,
            size,
            desc: GuestAddress(0x1000),
            avail: GuestAddress(0x2000),
            used: GuestAddress(0x3000),
            base,
            event_idx: flags & 1 != 0,
            indirect: flags & 2 != 0,
            tracker: None,
            in_order: false,
        };
        let Ok(mut ring) = Ring::start(Arc::clone(mem), config) else { return };
        let mut queue = disk.queue(0);
        queue.started(size);
        let mut outstanding = 0;
        let figures = QueueStats::default();
        let mut in_flight = HashSet::new();
        let mut chain = Chain::default();
        for _ in 0..64 {
            match ring.take(&mut chain) {
                Ok(Taken::Empty) => {
                    let _ = ring.arm();
                    if data.is_empty() {
                        break;
                    }
                    scribble(mem, &mut data);
                    offer(mem, &mut data, size, &mut avail);
                }
                Ok(Taken::Malformed(_)) => {
                    assert!(chain.readable().0.is_empty() && chain.writable().0.is_empty());
                    if ring.complete(chain.head(), 0).is_err() {
                        break;
                    }
                }
                Ok(Taken::Request) => {
                    let (readable, writable) = (chain.readable(), chain.writable());
                    assert!(readable.0.len() + writable.0.len() <= CHAIN_MAX);
                    assert!(readable.bytes() + writable.bytes() <= 1 << 32);
                    assert!(chain.head() < size && in_flight.insert(chain.head()));
                    let mut io = Io::new(uring, &mut outstanding, Figures::new(&figures));
                    match queue.request(&mut io, &**mem, &chain) {
                        Progress::Done { written } => {
                            assert!(u64::from(written) <= writable.bytes());
                            // Some are kept in flight, so that the guest can offer them again.
                            if take::<1>(&mut data)[0] & 1 == 0 {
                                in_flight.remove(&chain.head());
                                if ring.complete(chain.head(), written).is_err() {
                                    break;
                                }
                            }
                        }
                        Progress::Pending => panic!("an empty disk waits for nothing"),
                    }
                    let _ = ring.notify();
                }
                Err(_) => break,
            }
            assert_eq!(usize::from(ring.in_flight()), in_flight.len());
        }
    });
});
